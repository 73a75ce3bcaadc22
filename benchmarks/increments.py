"""Increments: the second checkpoint over the first, in bytes and in time, when one page of twenty has changed at random between them.

The same processes as `memory` (`programs/held.c`), for each kind of memory one tree. A round is a full checkpoint, the first of a new
chain; a change of five percent of the pages that are not zeros; an increment; a kill, and a restore of the increment, after which token,
counter and all of the memory are what they were. Time is from the freeze to `ready`, as the daemon's own phases say it: the preflight, in
which the increment reads what the first one has, holds nobody up and is told beside it. The first round is not counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import held
from benchmarks.held import BOUNDARY, LIMIT
from benchmarks.memory import KINDS
from benchmarks.tables import spread, table
from hibernode._pb import hibernode_pb2 as pb
from tests import keeper
from tests.daemon import Daemon, pid_target, ready
from tests.keeper import Kept, wait_until

NAME = "increments"
STORES = {"directory": "/var/tmp", "tmpfs": "/dev/shm"}
_BEFORE = ("preflight",)  # phases in which nobody is frozen


def measure(*, quick: bool, size: int = 0, rounds: int = 0, kinds: str = "") -> dict[str, Any]:
    """Every round: store -> kind -> list of what was taken."""
    size, rounds = size or (256 if quick else 1024), rounds or (2 if quick else 5)
    wanted = kinds.split(",") if kinds else [*KINDS]
    if unknown := set(wanted) - set(KINDS):
        raise SystemExit(f"run: --kinds: no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if size % (8 * BOUNDARY) and size not in (64, 128, 256):
        raise SystemExit(f"run: --size: so many times {8 * BOUNDARY} MiB (or 64, 128, 256): eight processes hold {BOUNDARY} each")
    taken: dict[str, dict[str, list[dict[str, float]]]] = {}
    for store, parent in STORES.items():
        with tempfile.TemporaryDirectory(prefix="hn-bench-", dir=parent) as place:
            taken[store] = {kind: _kind(kind, size, rounds, Path(place)) for kind in wanted}
    return {"mebibytes": size, "rounds": rounds, "taken": taken, **_ratios(taken)}


def _kind(kind: str, size: int, rounds: int, place: Path) -> list[dict[str, float]]:
    settings = {"store": {"url": f"file://{place}/store"}}
    made = Daemon(
        store=f"file://{place}/store", arena=f"{size * 5 // 4 + 64}MiB", settings=settings, call_limit=LIMIT, start_limit=LIMIT
    )
    with made as daemon, _running(kind, size, place) as tree:
        found = []
        for turn in range(rounds + 1):
            one = tree.once(daemon)
            print(f"{kind}: round {turn}: {_told(one)}", flush=True)
            if turn:
                found.append(one)
            shutil.rmtree(place / "store")
        return found


class _Tree:
    """The processes; their pids stay the same."""

    def __init__(self, kept: Kept, log: Path) -> None:
        self._kept, self.pid, self._log, self._mark = kept, kept.pid, log, 0

    def lines(self) -> list[str]:
        with self._log.open("rb") as log:
            log.seek(self._mark)
            return log.read().rpartition(b"\n")[0].decode().splitlines()

    def last(self) -> dict[str, held.Beat]:
        return {beat.token: beat for beat in held.beats(self.lines())}

    def once(self, daemon: Daemon) -> dict[str, float]:
        os.sync()
        cpu = [_cpu(daemon.pid)]
        first = self._taken(daemon, {"increment": "auto"})
        cpu.append(_cpu(daemon.pid))
        self._ask(signal.SIGUSR2)
        os.sync()
        before = self.last()
        cpu.append(_cpu(daemon.pid))
        second = self._taken(daemon, {"increment": first.checkpoint_id})
        cpu.append(_cpu(daemon.pid))
        self.end()
        began = time.time()
        ready(daemon.restore(second.checkpoint_id))
        wait_until(lambda: before.keys() <= self.last().keys(), LIMIT, "a beat of each that was restored")
        restore = time.time() - began
        for token, planted in before.items():
            held.insist_same(planted, self.last()[token], began)
        self._ask(signal.SIGUSR1)
        held.insist_whole(before, self.last())
        return {
            "first bytes": _stored(daemon, first), "second bytes": _stored(daemon, second),
            "first": _after(first), "second": _after(second), "first cpu": cpu[1] - cpu[0], "second cpu": cpu[3] - cpu[2],
            "first preflight": first.profile.phases["preflight"].seconds, "preflight": second.profile.phases["preflight"].seconds,
            "pause": second.profile.pause_ns / 1e9, "restore": restore, "load": os.getloadavg()[0],
        }  # fmt: skip

    def _taken(self, daemon: Daemon, opts: Mapping[str, str]) -> pb.Event:
        return ready(daemon.checkpoint(pid_target(self.pid), criu_opts=opts))

    def _ask(self, number: signal.Signals) -> None:
        planted = self.last()
        for pid in (self.pid, *keeper.descendants(self.pid)):
            os.kill(pid, number)
        wait_until(lambda: all(self.last()[token].checks > beat.checks for token, beat in planted.items()), LIMIT, "its memory")

    def end(self) -> None:
        keeper.kill_all(keeper.descendants(self.pid))
        keeper.kill_tree(self.pid)
        self._kept.kill()
        self._mark = self._log.stat().st_size


@contextlib.contextmanager
def _running(kind: str, size: int, place: Path) -> Iterator[_Tree]:
    program, log = held.build(place / "held"), place / f"{kind}.log"
    tree = _Tree(Kept([str(program), str(size), kind], log), log)
    try:
        wait_until(lambda: len(tree.last()) == KINDS[kind], LIMIT, "the program to fill its memory")
        yield tree
    finally:
        tree.end()


def _cpu(pid: int) -> float:
    """Seconds of processor time of it and of the children that it has waited for."""
    return sum(map(int, keeper.fields(pid)[11:15])) / os.sysconf("SC_CLK_TCK")


def _after(event: pb.Event) -> float:
    """Seconds from the freeze to `ready`."""
    return sum(cost.seconds for name, cost in event.profile.phases.items() if name not in _BEFORE)


def _stored(daemon: Daemon, event: pb.Event) -> float:
    """Bytes of all that lies under its id: streams, index, digests, small images, manifest."""
    place = Path(daemon.store.removeprefix("file://")) / event.checkpoint_id
    return float(sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))


def _ratios(taken: Mapping[str, Mapping[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians, and the worst of them."""
    pairs = {
        f"{kind}, {store}": {
            "increment_bytes": statistics.median(one["second bytes"] / one["first bytes"] for one in rounds),
            "increment_time": statistics.median(one["second"] / one["first"] for one in rounds),
        }
        for store, kinds in taken.items()
        for kind, rounds in kinds.items()
    }
    worst = {name: max(pairs, key=lambda of: pairs[of][name]) for name in ("increment_bytes", "increment_time")}
    return {"pairs": pairs, "worst": worst, "ratios": {name: round(pairs[of][name], 3) for name, of in worst.items()}}


def render(found: Mapping[str, Any]) -> str:
    """Medians, and from the least to the greatest of the rounds."""
    lines = [f"{found['mebibytes']} MiB, {found['rounds']} rounds, 5 % of the pages changed"]
    heads = ["first, MiB", "second, MiB", "bytes", "first, s", "second, s", "time", "CPU", "pause", "preflight", "restore"]
    for store, kinds in found["taken"].items():
        rows = {
            kind: [
                spread([one["first bytes"] / 2**20 for one in rounds], ""), spread([one["second bytes"] / 2**20 for one in rounds], ""),
                f"{found['pairs'][f'{kind}, {store}']['increment_bytes']:.3f}",
                spread([one["first"] for one in rounds], ""), spread([one["second"] for one in rounds], ""),
                f"{found['pairs'][f'{kind}, {store}']['increment_time']:.3f}",
                spread([one["second cpu"] / one["first cpu"] for one in rounds], ""),
                *(spread([one[name] for one in rounds]) for name in ("pause", "preflight", "restore")),
            ]
            for kind, rounds in kinds.items()
        }  # fmt: skip
        lines += ["", *table(store, heads, rows)]
    rows = {name: [f"{ratio:.3f}", found["worst"][name]] for name, ratio in found["ratios"].items()}
    return "\n".join([*lines, "", *table("the worst median", ["", "of"], rows)])


def _told(one: Mapping[str, float]) -> str:
    return (
        f"bytes {one['second bytes'] / one['first bytes']:.3f} of {one['first bytes'] / 2**20:.0f} MiB, "
        f"time {one['second'] / one['first']:.3f} of {one['first']:.2f} s, CPU {one['second cpu'] / one['first cpu']:.3f}, "
        f"pause {one['pause']:.2f} s"
    )
