"""What a manifest says of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from hibernode import gpus
from hibernode.model import GpuImage, GpuProcess, ImageRef, TaskFacts
from hibernode.ports import GpuTree
from tests.fakes.criu import FakeCriu
from tests.fakes.machine import FakeWorkload, Machine
from tests.fakes.script import Script


class Tree:
    def __init__(self, pids: Sequence[int], halted: Sequence[int] = ()) -> None:
        self.pids, self.halted = pids, halted


def saved(tree: Tree, *tasks: TaskFacts) -> GpuImage | None:
    image = GpuImage.model_construct(processes=[GpuProcess(pid=1), GpuProcess(pid=2)], halted=[])
    workload = FakeWorkload(Machine(), FakeCriu(Machine(), Script()), Script())
    return gpus.saved(image, cast(GpuTree, tree), workload, [ImageRef.model_construct(name="main", tasks=list(tasks))])


def test_who_ended_between_his_suspension_and_the_dump_is_not_asked_for_at_a_restore() -> None:
    """A zombie is in the image, and is restored as one: the driver knows nothing of him."""
    found = saved(Tree([1, 2, 3, 4], [1, 2, 5]), TaskFacts(pid=1), TaskFacts(pid=2, dead=True), TaskFacts(pid=4))
    assert found is not None
    assert ([process.pid for process in found.processes], found.halted) == ([1, 4], [1])
    assert saved(Tree([2]), TaskFacts(pid=1), TaskFacts(pid=2, dead=True)) is None
