"""What a workload has on GPUs: into its own memory before a dump, and back after a restore. A workload without any passes through.

The driver does both, for one process at a time; a process that stands still cannot answer it. So a GPU is first when the workload stops,
and last when it goes on (gpu.md, design A). Where `gpu.design` is "stop" the driver's own thread runs alone for that (design C): the tree
stands still from then on, a dump finds and leaves it so, and it goes on when its GPU state is back; a thaw in between knows it as stopped
before, and lets nobody go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager

from hibernode import preflight
from hibernode.errors import RestoreFailed
from hibernode.journal import boottime
from hibernode.model import GpuImage, GpuProcess, ImageRef, Meter
from hibernode.node import Attempt, Node, calmly, insist
from hibernode.ports import GpuTree, Identity, ProcessFacts, Workload


def look(node: Node, gpu: GpuTree, workload: Workload, processes: Sequence[ProcessFacts]) -> tuple[GpuImage | None, int]:
    """What a restore will need, and bytes on GPUs; nobody is asked where nobody uses one. Refused where it cannot be saved."""
    gpu.look(processes)
    if not gpu.pids:
        return None, 0
    preflight.gpu_workload(workload.facts, node.config.gpu.design)
    here = node.inventory.gpus()
    image = preflight.gpu_image(gpu.pids, here, node.inventory.users())
    return image, preflight.gpu_memory(image, here, min(map(node.host.memory_room, gpu.pids)))


def saved(image: GpuImage | None, gpu: GpuTree, workload: Workload, images: Sequence[ImageRef]) -> GpuImage | None:
    """With whom it was in the end, by their pids in the images: some have begun to use a GPU in the last moment, and some have ended, be it
    between their suspension and the dump. A restore asks the driver for everybody whom this names."""
    if image is None:
        return None
    known, dumped = {process.pid: process for process in image.processes}, _alive(images)
    places = {pid: workload.within(pid) for pid in (*gpu.pids, *gpu.halted)}
    processes = [
        GpuProcess(image=places[pid][0], pid=places[pid][1], gpus=known[pid].gpus if pid in known else {})
        for pid in gpu.pids
        if places[pid] in dumped
    ]
    halted = [places[pid][1] for pid in gpu.halted if places[pid] in dumped]
    return image.model_copy(update={"processes": processes, "halted": halted}) if processes else None


def _alive(images: Sequence[ImageRef]) -> set[tuple[str, int]]:
    return {(image.name, task.pid) for image in images for task in image.tasks if not task.dead}


def suspend(gpu: GpuTree, workload: Workload, attempt: Attempt, limit: float, held: ExitStack) -> None:
    """When it returns CRIU finds everything in memory; `held` brings it back."""
    if gpu.pids:
        with attempt.phase("suspending", limit), _pause(attempt.meter):
            held.callback(_give_back, gpu, attempt, limit)
            gpu.suspend(workload.processes, limit)


def _give_back(gpu: GpuTree, attempt: Attempt, limit: float) -> None:
    """The phase stays in the journal, because it says what is to be done if the daemon dies. Its deadline is the watchdog's: restoring and
    unlocking may take `limit` each."""
    calmly("writing down how long it may take", lambda: attempt.entry.update(until=boottime() + 2 * limit))()
    with attempt.meter.phase("resuming"), _pause(attempt.meter):
        insist("bringing GPU state back", lambda: gpu.resume(limit=limit))


@contextmanager
def _pause(meter: Meter) -> Iterator[None]:
    """Count the time inside as a part of the workload's pause."""
    before = meter.gpu_ns
    try:
        with meter.gpu():
            yield
    finally:
        meter.pause_ns += meter.gpu_ns - before


def places(node: Node, image: GpuImage | None) -> list[dict[str, str]]:
    """As `preflight.gpu_places`. Refused where what is in the image cannot be brought back onto the GPUs of this machine."""
    if image is None:
        return []
    here = node.inventory.gpus()
    found = preflight.gpu_places(image, here)
    preflight.gpu_room(image, found, here)
    node.gpu.check()
    return found


def resume(
    node: Node, image: GpuImage | None, places: Sequence[Mapping[str, str]], workload: Workload, attempt: Attempt, undo: ExitStack
) -> None:
    """Of a tree that CRIU has just brought back. If one process does not get its state none runs, and the caller kills them all; before
    that `undo` has them parked, whatever fails here or later."""
    if image is None:
        return
    limit = node.config.limits.gpu_of(image.memory)
    there = {(process.image, process.inside): (process.pid, process.start_time) for process in workload.processes()}
    if gone := [user.pid for user in image.processes if (user.image, user.pid) not in there]:
        raise RestoreFailed(f"process {gone[0]} ended before its GPU state was brought back", pids=gone)
    users = [there[user.image, user.pid] for user in image.processes]
    halted = [process for (_, pid), process in there.items() if pid in image.halted]  # of a single tree
    undo.callback(_park, node, users, attempt, limit)
    with (
        attempt.phase("resuming", limit),
        attempt.meter.gpu(),
        closing(node.gpu.restored(attempt.entry.action_id, users, halted)) as gpu,
    ):
        gpu.resume(places, strict=True, limit=limit)


def _park(node: Node, users: Sequence[Identity], attempt: Attempt, limit: float) -> None:
    """A phase of its own in the journal: nobody is to take a daemon for one that hangs because a copy takes its time."""
    calmly("writing down that they are parked", lambda: attempt.entry.enter("parking", limit))()
    with attempt.meter.phase("parking"):
        node.gpu.park(attempt.entry.action_id, users, limit)
