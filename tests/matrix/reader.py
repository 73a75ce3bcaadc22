"""Somebody who reads the stores all through a run, and believes what is there: each checkpoint that can be seen is restored, in a room of
its own, where its pids are free and its workload writes into a file of its own while the original runs on outside.

One that is gone before its restore has ended (deleted, or withdrawn by whoever wrote it) says nothing; one that is still there and does
not restore is bad.
"""

from __future__ import annotations

import signal
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import grpc

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.localdir import LocalDir
from tests import keeper as processes
from tests.matrix import programs, room
from tests.matrix.bench import SUBJECTS, Bench, is_pid_collision
from tests.matrix.programs import BeatFile, beat_file

RESTORE = 60.0  # seconds one may take: nobody stands in its way, but the machine is busy with the matrix, and whatever else
# Whoever lives in its room, threads of its daemon too, has pids above those of the workloads that it restores there: these come from
# rooms that count from 1, and come to 20,000 in a full run.
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
ABOVE = max(25_000, int(Path("/proc/sys/kernel/pid_max").read_text()) // 2)
PAUSE = 0.02  # seconds between two looks into the stores


@dataclass
class Report:
    listed: int = 0  # looks into a store
    seen: int = 0  # checkpoints
    restored: int = 0  # which ran on
    gone: int = 0  # before their restore had ended
    bad: int = 0
    why: list[str] = field(default_factory=list)


def read(runner: Connection, home: Path, work: Path, benches: Iterable[Path], binary: Path, criu: str, keyed: str) -> None:
    """Until the runner says that it is over; the report is what it gets. A process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    room.enter(f"{home.parent.name}-{home.name}", [runner.fileno()])
    LAST_PID.write_text(str(ABOVE))
    report = Report()
    try:
        with Bench(
            home, work, binary, criu, stores=[place / "store" for place in benches], bus=False, keys=keyed, limit=RESTORE
        ) as bench:
            _Reader(bench, list(benches), report).read(runner)
    except (EOFError, BrokenPipeError):
        return
    except Exception as e:
        report.bad += 1
        report.why.append(f"the reader ended: {type(e).__name__}: {e}")
    runner.send(asdict(report))


class _Reader:
    def __init__(self, bench: Bench, benches: list[Path], report: Report) -> None:
        self._bench, self._benches, self._report = bench, benches, report
        self._seen: set[tuple[Path, str]] = set()
        self._beats: dict[tuple[Path, str], BeatFile] = {}

    def read(self, runner: Connection) -> None:
        while not runner.poll(PAUSE):
            for place in self._benches:
                for checkpoint_id in self._list(place):
                    if (place, checkpoint_id) not in self._seen:
                        self._seen.add((place, checkpoint_id))
                        self._report.seen += 1
                        self._try(place, checkpoint_id)
        runner.recv()

    def _list(self, place: Path) -> list[str]:
        """Every checkpoint that can be seen, as anybody sees it: there is a manifest."""
        self._report.listed += 1
        if not (place / "store").exists():
            return []
        return [facts.key.partition("/")[0] for facts in LocalDir(place / "store").list() if facts.key.endswith("/manifest.json")]

    def _try(self, place: Path, checkpoint_id: str) -> None:
        """Restore it, look whether it runs, end it."""
        self._own_files(place)
        wrong = self._restore(place, checkpoint_id) or self._look(place)
        for kind in SUBJECTS:
            processes.kill_all(self._living(place, kind))
        if not wrong:
            self._report.restored += 1
        elif checkpoint_id not in self._list(place):
            self._report.gone += 1
        else:
            self._report.bad += 1
            self._report.why.append(f"{place.name} {checkpoint_id}: {wrong}")

    def _living(self, place: Path, kind: str) -> list[int]:
        return programs.living(programs.command_line(kind, self._bench.binary, self._beats[place, kind]))

    def _own_files(self, place: Path) -> None:
        """What its workloads say in here is not written over what they say outside, and their GPUs are this node's."""
        if (place, SUBJECTS[0]) not in self._beats:
            self._bench.gpus.node()
            room.bind(self._bench.gpus.root, place / "gpus")
        for kind in SUBJECTS:
            if (place, kind) not in self._beats:
                own = beat_file(self._bench.home / f"{place.name}-{kind}.beats", kind)
                room.bind(own.path, place / f"{kind}.beats")
                self._beats[place, kind] = beat_file(place / f"{kind}.beats", kind)
            self._beats[place, kind].blank()

    def _restore(self, place: Path, checkpoint_id: str) -> str:
        """Empty if it is ready; else why not."""
        for _ in range(10):
            overrides = pb.Overrides(directory=f"file://{place}/store", pod_name=f"read-{uuid.uuid4()}")
            command = pb.RestoreCommand(action_id=str(uuid.uuid4()), checkpoint_id=checkpoint_id, overrides=overrides)
            try:
                *_, last = (
                    update.event for update in self._bench.stub.Restore(command, timeout=RESTORE) if update.HasField("event")
                )
            except grpc.RpcError as e:
                return f"{e.details()}"
            if not is_pid_collision(last.code, last.message, str(last.details)):
                break
            time.sleep(0.1)
        return "" if last.status == "ready" else f"{last.code}: {last.message}"

    def _look(self, place: Path) -> str:
        """Empty if what was restored runs, with its memory."""
        alive = {pid: self._beats[place, kind] for kind in SUBJECTS for pid in self._living(place, kind)}
        if not alive:
            return "it is ready, and nobody is there"
        for pid, file in alive.items():
            before = file.slot(pid)
            after = file.slot(pid, later_than=before) if before else None
            if after is None:
                return f"it does not run: {processes.describe(pid)}"
            if after.wrong:
                return f"its memory has changed: {after}"
        return ""
