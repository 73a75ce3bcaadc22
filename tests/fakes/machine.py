"""A machine without processes: one tree of tasks with scripted memory, and the ports that freeze, dump, restore and kill it.

`Machine` is the world, `FakeWorkloads`, `FakeJobs`, `FakeHost` and (in `criu.py`) `FakeCriu` are what the node sees of it. The world
remembers what was done to it, so that a test can ask afterwards: does the tree run, was it ever killed, is a half-restored one left?
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hibernode.errors import NotFound
from hibernode.model import (
    PAGE,
    Cancel,
    Gpu,
    GpuInventory,
    HeartbeatWish,
    HostFacts,
    JobSpec,
    RestoreCommand,
    Target,
    TaskFacts,
    WorkloadFacts,
    WorkloadView,
)
from hibernode.ports import Criu, CriuOptions, DumpStats, Fetched, Identity, LayerFacts, Load, Prepared, ProcessFacts
from hibernode.transfer.pageproto import LAZY, PRESENT, SHMEM, TASK
from tests.fakes.script import Script

ROOT, CHILD = 4242, 4243
MAIN = "main"


@dataclass(frozen=True)
class Run:
    """Pages of one address space, as CRIU sends them; no content: pages that are known and not sent."""

    dst_id: int
    vaddr: int
    content: bytes | None
    pages: int = 0  # where there is no content
    lazy: bool = False  # it may come when the tree runs

    @property
    def count(self) -> int:
        return self.pages if self.content is None else len(self.content) // PAGE

    @property
    def flags(self) -> int:
        return 0 if self.content is None else PRESENT | (LAZY if self.lazy else 0)


def memory(pages: int, *, zero: bool = False, seed: int = 1, lazy: bool = False) -> list[Run]:
    """An image of so many pages: two address spaces and a piece of shared memory, taking turns; some pages zero, some text, some
    random; runs longer than a chunk and runs of one page. `lazy`: what is not shared may come late, but for the first run."""
    runs: list[Run] = []
    at, left, n = 0x10000, pages, 0
    spaces = (ROOT << 8 | TASK, CHILD << 8 | TASK, 77 << 8 | SHMEM)
    lengths = (1, 7, 1500, 64, 3, 1023, 1024, 1025)
    while left:
        count = min(left, lengths[n % len(lengths)])
        content = b"".join(_page(seed, n, i, zero=zero) for i in range(count))
        runs.append(Run(spaces[n % 3], at, content, lazy=lazy and n > 0 and n % 3 != 2))
        if n % 4 == 1:
            runs.append(Run(spaces[n % 3], at + (count + 5) * PAGE, None, pages=2))
        at, left, n = at + (count + 16) * PAGE, left - count, n + 1
    return runs


def _page(seed: int, run: int, page: int, *, zero: bool) -> bytes:
    word = (seed * 1_000_003 + run * 4099 + page) & 0xFFFFFFFF
    if zero or word % 3 == 0:
        return bytes(PAGE)
    if word % 3 == 1:
        return word.to_bytes(4, "little") * (PAGE // 4)
    return random.Random(word).randbytes(PAGE)


GPUS = GpuInventory(
    state="ok", reason="", driver="580.65.06", cuda="13.0",
    gpus=[
        Gpu(
            index=n, uuid=f"GPU-0000000{n}", name="NVIDIA H100", bus_id=f"0000:0{n}:00.0", minor=n, compute_capability="9.0",
            memory_total=80 << 30, memory_used=n << 30, memory_free=80 - n << 30, mig=False, persistence=True, compute_mode="default",
            processes=n, mps_processes=0, ecc_uncorrected=0, rows_pending=False, rows_failed=False,
        )
        for n in range(2)
    ],
)  # fmt: skip


@dataclass
class Machine:
    """The world. `alive` and `stopped` are of the original tree, `restored` of the one that a restore made."""

    runs: list[Run] = field(default_factory=list)
    alive: bool = True
    stopped: bool = False
    restored: bool = False
    killed: list[str] = field(default_factory=list)
    killed_on_gpu: bool = False  # a restored one, with its state on the GPU
    adopted: bool = False
    key: str = f"pid {ROOT}"
    gpu: str = ""  # of the root's GPU state: RUNNING or CHECKPOINTED; empty: it has none
    prepared: int = 0  # places prepared and neither adopted nor discarded
    pod_spec: str = ""
    room: int = 1 << 40
    lacking: frozenset[int] = frozenset()  # whose pages are not all there
    cpu_flags: list[str] = field(default_factory=lambda: ["sse2", "avx2", "avx512f"])
    gpus: GpuInventory = field(default_factory=lambda: GPUS)
    wishes: list[HeartbeatWish] = field(default_factory=list)
    dead: frozenset[int] = frozenset()  # who is a zombie in the original
    states: dict[int, str] = field(
        default_factory=dict
    )  # of restored ones, where not as in the original; "" has ended and is gone

    def kill_restored(self) -> None:
        self.killed.append("restored")
        self.killed_on_gpu |= self.gpu == "RUNNING"
        self.restored = False

    @property
    def tasks(self) -> list[TaskFacts]:
        child = TaskFacts(pid=CHILD, ppid=ROOT, comm="loader", dead=CHILD in self.dead)
        return [TaskFacts(pid=ROOT, comm="train", threads=[ROOT + 10]), child]

    def processes(self) -> list[ProcessFacts]:
        if not (self.alive or self.restored):
            return []
        rss = len(self.runs) * PAGE
        found = ((task, self._state(task)) for task in self.tasks)
        return [
            ProcessFacts(t.pid, 1000 + t.pid, t.comm, state, t.pid, False, 0, 0, rss, (), image=MAIN, inside=t.pid)
            for t, state in found
            if state
        ]

    def _state(self, task: TaskFacts) -> str:
        as_it_was = "Z" if task.dead else "T" if self.alive and self.stopped else "S"
        return self.states.get(task.pid, as_it_was) if self.restored else as_it_was


FACTS = WorkloadFacts(kind="job", name="trainer", uid="uid-1", logs={}, argv=["train"])


class FakeWorkload:
    """ports.Workload."""

    def __init__(self, machine: Machine, criu: Criu, script: Script) -> None:
        self._machine, self._criu, self._script = machine, criu, script

    facts, place, endable = FACTS, "", True

    def pod_spec(self) -> str:
        return self._machine.pod_spec

    @property
    def key(self) -> str:
        return self._machine.key

    def roots(self) -> Mapping[str, int]:
        self._script.step("workload.roots")
        if not (self._machine.alive or self._machine.restored):
            raise NotFound("the process has ended")
        return {MAIN: ROOT}

    def processes(self) -> Sequence[ProcessFacts]:
        self._script.step("workload.processes")
        return self._machine.processes()

    def within(self, pid: int) -> tuple[str, int]:
        return MAIN, pid

    def layers(self) -> Mapping[str, LayerFacts]:
        return {}

    def freezers(self) -> tuple[str, ...]:
        return ()

    def freeze(self) -> int:
        self._script.step("workload.freeze")
        self._machine.stopped = True
        return 0

    def dump(self, image: str, into: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        assert image == MAIN
        return self._criu.dump(ROOT, into, pages, options, cancel)

    def thaw(self) -> None:
        self._script.step("workload.thaw")
        self._machine.stopped = False

    def kill(self) -> None:
        self._script.step("workload.kill")
        self._machine.killed.append("restored" if self._machine.restored else "original")
        if self._machine.restored:
            self._machine.restored = False
        else:
            self._machine.alive = False


class FakePrepared:
    """ports.PreparedWorkload."""

    def __init__(self, machine: Machine, criu: Criu, script: Script) -> None:
        self._machine, self._criu, self._script, self._open = machine, criu, script, True
        machine.prepared += 1

    place = "place-1"

    def restore(
        self, fetched: Fetched, options: CriuOptions, cancel: Cancel, note: Callable[[Sequence[str]], None]
    ) -> FakeWorkload:
        if fetched.begin is not None:
            fetched.begin(("tree/cgroup.procs",), ("keeper/cgroup.procs",))
        pid = self._criu.restore(fetched.images[MAIN], options, Prepared(), cancel, fetched.held)
        self._script.step("prepared.adopt")
        assert pid == ROOT
        self._close()
        self._machine.adopted = True
        return FakeWorkload(self._machine, self._criu, self._script)

    def kill(self, tasks: Sequence[TaskFacts]) -> None:
        self._script.step("prepared.kill")
        if self._machine.restored:
            self._machine.kill_restored()

    def discard(self) -> None:
        self._script.note("prepared.discard")
        self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._machine.prepared -= 1


class FakeWorkloads:
    """ports.Workloads and ports.Jobs."""

    def __init__(self, machine: Machine, criu: Criu, script: Script) -> None:
        self._machine, self._criu, self._script = machine, criu, script

    def find(self, target: Target) -> FakeWorkload:
        self._script.step("workloads.find")
        known = target.pid == ROOT or target.pod_name == FACTS.name or target.pod_id == FACTS.uid
        if not known or not (self._machine.alive or self._machine.restored):
            raise NotFound(f"no {target} on this node")
        return FakeWorkload(self._machine, self._criu, self._script)

    def fills(self, facts: WorkloadFacts) -> bool:
        return not facts.contained

    def insist_free(self, facts: WorkloadFacts, command: RestoreCommand) -> None:
        self._script.step("workloads.insist_free")

    makes_pods = False

    def cluster(self) -> str:
        self._script.step("workloads.cluster")
        return ""

    def runtimes(self) -> tuple[str, str]:
        return "containerd 1.6.20", ""

    def prepare(self, facts: WorkloadFacts, command: RestoreCommand) -> FakePrepared:
        self._script.step("workloads.prepare")
        return FakePrepared(self._machine, self._criu, self._script)

    def blockers(self, tasks: Sequence[TaskFacts], *, living: bool = False) -> Sequence[tuple[int, str]]:
        self._script.step("workloads.blockers")
        there = {process.pid: process.comm for process in self._machine.processes()}
        return [(task.pid, there[task.pid]) for task in tasks if task.pid in there]

    def thaw(self, processes: Sequence[Identity], leave: Collection[Identity] = (), freezers: Sequence[str] = ()) -> None:
        self._script.step("workloads.thaw")
        if (ROOT, 1000 + ROOT) in processes and (ROOT, 1000 + ROOT) not in leave:
            self._machine.stopped = False

    def kill(
        self, processes: Sequence[Identity], place: str = "", freezers: Sequence[str] = (), *, patience: float | None = None
    ) -> None:
        self._script.step("workloads.kill")
        if (ROOT, 1000 + ROOT) in processes or (place == FakePrepared.place and self._machine.restored):
            if self._machine.restored:
                self._machine.kill_restored()
            else:
                self._machine.killed.append("original")
                self._machine.alive = False

    def run(self, spec: JobSpec) -> WorkloadView:
        raise NotImplementedError

    def stop(self, namespace: str, name: str, signal_name: str) -> WorkloadView:
        raise NotImplementedError

    def views(self, target: Target | None) -> list[WorkloadView]:
        if target is not None and target.pid != ROOT and target.pod_name != FACTS.name:
            raise NotFound(f"no {target} on this node")
        pid = ROOT if self._machine.alive or self._machine.restored else 0
        return [
            WorkloadView(
                kind="job", namespace="default", name=FACTS.name, uid=FACTS.uid, pid=pid, command="train", log="/var/log/train"
            )
        ]

    def heartbeats(self) -> list[HeartbeatWish]:
        return self._machine.wishes

    def reap(self) -> bool:
        return False


class FakeHost:
    """ports.Host."""

    def __init__(self, machine: Machine, script: Script) -> None:
        self._machine, self._script = machine, script

    def facts(self) -> HostFacts:
        self._script.step("host.facts")
        return HostFacts(arch="x86_64", kernel="6.12", page_size=PAGE, criu_version=0, cpu_flags=self._machine.cpu_flags)

    def load(self) -> Load:
        self._script.step("host.load")
        return Load(cpus=2, memory_total=1 << 40, memory_available=1 << 40, load=0.1)

    def memory_room(self, pid: int) -> int:
        self._script.step("host.memory_room")
        return 1 << 40

    def lacks_pages(self, pid: int) -> bool:
        self._script.step("host.lacks_pages")
        return pid in self._machine.lacking

    def room(self, path: Path) -> int:
        self._script.step("host.room")
        return self._machine.room


class FakeInventory:
    """ports.Inventory."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def gpus(self) -> GpuInventory:
        return self._machine.gpus

    def users(self) -> Mapping[int, Mapping[str, int]]:
        return {ROOT: {gpu.uuid: 1 << 20 for gpu in self._machine.gpus.gpus}}
