"""A run: several benches side by side, each in a process of its own, which are dealt the cases in blocks; the reader beside them. Every
second bench signs and encrypts."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import keys
from tests.keeper import wait_until
from tests.matrix import checks, programs, room, table
from tests.matrix.act import Player
from tests.matrix.bench import READS, WRITES, Bench
from tests.matrix.cases import Case, Survey, parse
from tests.matrix.checks import Finding, Findings
from tests.matrix.reader import read

BLOCK = 8  # cases of one workload and one side that follow each other
SAVE = 20.0  # seconds between two writings of the partial result
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Settings:
    seed: int
    benches: int
    criu: str
    choose: Callable[[Survey], list[Case]]
    design: str = "lock"  # `gpu.design` of the nodes
    output: Path | None = None  # the JSON, partial while the run goes on
    say: Callable[[str], None] = print


def run(settings: Settings) -> dict[str, Any]:
    """Everything: the benches are set up, surveyed, and play all cases; then they are looked over. Leaves nothing behind."""
    home = Path(tempfile.mkdtemp(prefix="hn-matrix-"))
    work = Path("/dev/shm") / home.name
    try:
        return _Run(settings, home, work).run()
    finally:
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def forked(work: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """`work` in a process of its own, with our end of a pipe; it has ended afterwards."""
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=work, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(60)
        if process.is_alive():
            process.kill()


class _Run:
    def __init__(self, settings: Settings, home: Path, work: Path) -> None:
        self._settings, self._home, self._work = settings, home, work
        self._rows: list[dict[str, Any]] = []
        self._afterwards: list[dict[str, str]] = []
        self._began = self._saved = time.monotonic()
        self._total = 0
        self._reader: dict[str, Any] = {}
        signer, public = keys.pair(home)
        self._keys = {"signer": signer, "public": public, "wrapper": keys.wrapper(home)}

    def run(self) -> dict[str, Any]:
        binary = programs.build(self._home)
        benches = []
        reader = self._start_reader(binary)
        for number in range(self._settings.benches):
            ours, theirs = _fork.Pipe()
            name = f"bench{number}"
            keyed = WRITES.format(**self._keys) if number % 2 else ""
            settings = self._settings
            arguments = (
                theirs,
                self._home / name,
                self._work / name,
                binary,
                settings.criu,
                settings.seed,
                keyed,
                settings.design,
            )
            process = _fork.Process(target=_bench, args=arguments, name=name)
            process.start()
            theirs.close()
            benches.append((process, ours))
        try:
            self._deal({ours for _, ours in benches})
        finally:
            for process, ours in benches:
                ours.close()
                process.join(120)
                if process.is_alive():
                    process.kill()
        self._ask_reader(reader)
        for name in (*(f"bench{number}" for number in range(self._settings.benches)), "reader"):
            if left := room.leave_nothing(f"{self._home.name}-{name}"):
                self._afterwards.append({"counter": "leaks", "text": f"cgroups: {left[:8]}"})
        return self._result(done=True)

    def _start_reader(self, binary: Path) -> tuple[BaseProcess, Connection]:
        ours, theirs = _fork.Pipe()
        benches = [self._home / f"bench{number}" for number in range(self._settings.benches)]
        keyed = READS.format(**self._keys)
        arguments = (theirs, self._home / "reader", self._work / "reader", benches, binary, self._settings.criu, keyed)
        process = _fork.Process(target=read, args=arguments, name="reader")
        process.start()
        theirs.close()
        return process, ours

    def _ask_reader(self, reader: tuple[BaseProcess, Connection]) -> None:
        """It ends, and says what it has seen."""
        process, ours = reader
        try:
            ours.send("over")
            self._reader = ours.recv()
        except (EOFError, OSError):
            self._reader = {"bad": 1, "why": ["the reader died"]}
        process.join(60)

    def _deal(self, open_: set[Connection]) -> None:
        """Blocks to whoever is free, until there are none; a bench that is gone is a finding."""
        waiting: list[Connection] = []
        blocks: Iterator[list[Case]] | None = None
        while open_:
            for bench in multiprocessing.connection.wait(list(open_)):
                assert isinstance(bench, Connection)
                try:
                    what, said = bench.recv()
                except EOFError:
                    open_.discard(bench)
                    continue
                match what:
                    case "surveyed":
                        if blocks is None:
                            cases = self._settings.choose(said)
                            self._total, blocks = len(cases), iter(_blocks(cases))
                        waiting.append(bench)
                    case "row":
                        self._note(said)
                    case "free":
                        waiting.append(bench)
                    case "end":
                        self._afterwards += said
            while waiting and blocks is not None:
                with contextlib.suppress(BrokenPipeError):
                    waiting.pop().send([case.id for case in next(blocks, [])])

    def _note(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        for finding in row["findings"]:
            self._settings.say(f"{finding['counter']}: {row['case']}: {finding['text'][:200]}")
        if time.monotonic() - self._saved > SAVE:
            self._saved = time.monotonic()
            self._settings.say(f"{len(self._rows)} of {self._total} cases, {self._seconds():.0f} s")
            if self._settings.output:
                table.write(self._result(done=False), self._settings.output)

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _result(self, *, done: bool) -> dict[str, Any]:
        facts = {
            "complete": done and len(self._rows) == self._total,
            "planned": self._total,
            "seconds": round(self._seconds(), 1),
            "reader": self._reader,
        }
        return table.summary(self._rows, self._afterwards, seed=self._settings.seed, benches=self._settings.benches, **facts)


def _blocks(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that need the workload in the same state stand together; the blocks keep the order of their first cases."""
    groups: dict[tuple[bool, str], list[list[Case]]] = {}
    blocks: list[list[Case]] = []
    for case in cases:
        mine = groups.setdefault((case.direction == "restore", case.subject), [])
        if not mine or len(mine[-1]) == BLOCK:
            mine.append([])
            blocks.append(mine[-1])
        mine[-1].append(case)
    return blocks


# --- in the process of a bench ------------------------------------------------------------------------------------------------


def _bench(runner: Connection, home: Path, work: Path, binary: Path, criu: str, seed: int, keyed: str, design: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    room.enter(f"{home.parent.name}-{home.name}", [runner.fileno()])
    ended: Findings = []
    try:
        with Bench(home, work, binary, criu, keys=keyed, design=design) as bench:
            player = Player(bench, seed)
            runner.send(("surveyed", player.survey()))
            while block := runner.recv():
                for case in block:
                    runner.send(("row", player.play(parse(case)).as_json()))
                runner.send(("free", None))
            ended = afterwards(bench)
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        ended = [*ended, Finding("harness", f"{home.name} ended: {traceback.format_exc()}")]
    with contextlib.suppress(BrokenPipeError):
        runner.send(("end", [{"counter": each.counter, "text": each.text} for each in ended]))


def afterwards(bench: Bench) -> Findings:
    """What can only be said at the end: over the whole stream, and when everything has ended."""
    found: Findings = []
    bench.insist_running()
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not bench.bus.unanswered(), 10, "acknowledgements")
    if left := bench.bus.unanswered():
        found.append(Finding("leaks", f"{left} commands were never acknowledged"))
    actions: dict[str, list[Any]] = {}
    for event in bench.bus.stream():
        actions.setdefault(event.action_id, []).append(event)
    for events in actions.values():
        found += checks.statuses(events)
        if not any(event.status.terminal for event in events):
            found.append(Finding("no_terminal", f"{events[0].action_id}"))
    for subject in bench.subjects.values():
        subject.end()
    found += checks.guarded(bench)
    found += checks.can_be_deleted(bench)
    bench.stop()
    said = bench.log_tail().count("connected to the broker")
    bench.start()  # a start sweeps the cgroups of what ended while no daemon was its parent
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: bench.log_tail().count("connected to the broker") != said, 5, "a connection")
    code = bench.stop()
    if code != 0:
        found.append(Finding("daemon_failed", f"its exit code after SIGTERM was {code}"))
    found += checks.no_helper(bench)
    found += checks.nothing_left(bench, None)
    return found


def default_benches() -> int:
    """One more than there are processors: each waits a good part of its time."""
    return len(os.sched_getaffinity(0)) + 1
