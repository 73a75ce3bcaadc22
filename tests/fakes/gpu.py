"""GPUs of a `Machine`: its root uses one if the machine says so. Its state can be moved only while nobody has stopped it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hibernode.errors import GpuWedged
from hibernode.model import Gpu, GpuInventory
from hibernode.ports import Identity, ProcessFacts
from tests.fakes.machine import ROOT, Machine
from tests.fakes.script import Script

CARD = Gpu(
    index=0, uuid="GPU-00000000-0000-4000-8000-000000000001", name="Fake 80GB", compute_capability="9.0", memory_total=80 << 30,
    memory_used=1 << 30, memory_free=79 << 30, mig=False, mps_processes=0,
)  # fmt: skip
INVENTORY = GpuInventory(state="ok", reason="", driver="580.1", cuda="13.0", gpus=[CARD])


class FakeGpu:
    """ports.Gpu. Steps: `gpu.find`, `.look`, `.suspend`, `.suspend half`, `.resume`, `.restored`, `.recover`; `.park` never fails."""

    def __init__(self, machine: Machine, script: Script) -> None:
        self._machine, self._script = machine, script

    def find(self, action_id: str, processes: Sequence[ProcessFacts]) -> FakeTree:
        self._script.step("gpu.find")
        return FakeTree(self._machine, self._script)

    def restored(self, action_id: str, processes: Sequence[Identity], halted: Sequence[Identity] = ()) -> FakeTree:
        self._script.step("gpu.restored")
        return FakeTree(self._machine, self._script)

    def check(self) -> None:
        self._script.step("gpu.check")

    def recover(self, action_id: str) -> None:
        self._script.step("gpu.recover")
        if self._machine.gpu:
            self._machine.gpu = "RUNNING"

    def park(self, action_id: str, processes: Sequence[Identity], limit: float) -> None:
        self._script.note("gpu.park")
        if self._machine.gpu and (ROOT, 1000 + ROOT) in processes:
            self._machine.gpu = "CHECKPOINTED"


class FakeTree:
    """ports.GpuTree."""

    def __init__(self, machine: Machine, script: Script) -> None:
        self._machine, self._script = machine, script

    @property
    def pids(self) -> Sequence[int]:
        return [ROOT] if self._machine.gpu else []

    @property
    def halted(self) -> Sequence[int]:
        return []

    def look(self, processes: Sequence[ProcessFacts]) -> None:
        self._script.step("gpu.look")

    def suspend(self, everybody: Callable[[], Sequence[ProcessFacts]], limit: float) -> None:
        self._insist_answering()
        self._script.step("gpu.suspend")
        self._machine.gpu = "CHECKPOINTED"
        everybody()
        self._script.step("gpu.suspend half")

    def resume(self, places: Sequence[Mapping[str, str]] = (), *, strict: bool = False, limit: float = 0.0) -> None:
        self._insist_answering()
        self._script.step("gpu.resume")
        if self._machine.gpu:
            self._machine.gpu = "RUNNING"

    def close(self) -> None:
        self._script.note("gpu.close")

    def _insist_answering(self) -> None:
        if self._machine.alive and self._machine.stopped:
            raise GpuWedged("the driver was called for a process that stands still")
