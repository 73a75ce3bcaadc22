"""A restore, on one page. Twin: `checkpoint.py`.

Everything before `restoring` only reads and prepares; the image is verified frame by frame before CRIU sees any of it. If CRIU, the
probe or anything later fails, no process of the tree is left. The local machine decides what a restored tree may do; the image does not.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from hibernode import catalog, gc, preflight
from hibernode.errors import Corrupt, RestoreFailed
from hibernode.flow import Threads
from hibernode.journal import Tree, mark_of
from hibernode.model import ImageRef, RestoreCommand, Status, TaskFacts
from hibernode.node import Attempt, Node, insist
from hibernode.ports import Store, Workload
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal


def restore(node: Node, command: RestoreCommand, attempt: Attempt) -> None:
    """Read the manifest, refuse what does not fit, fetch and verify, restore, probe, report `ready`. Raises with nothing left."""
    limits = node.config.limits
    with attempt.phase("preflight", limits.preflight):
        store = node.open_store(command.overrides.directory)
        manifest = catalog.read(store, command.checkpoint_id, node.notary)
        seal = catalog.seal_of(manifest, node.keyring)
        options = preflight.options(command.overrides, node.config, node.host.load().cpus, manifest.criu_opts)
        tasks = [task for image in manifest.images for task in image.tasks]
        preflight.restore(manifest, node.host.facts(), node.criu.facts())
        preflight.restore_room(manifest, node.host.room(node.config.work_dir), node.host.load())
        catalog.check_sizes(store, manifest)
        attempt.meter.bytes_total = manifest.raw_bytes
        attempt.meter.streams = sum(len(image.streams) for image in manifest.images)

    claim = node.claims.claim(f"checkpoint {command.checkpoint_id}", command.action_id)
    old = node.claims.claim(f"pid {tasks[0].pid}", command.action_id)  # a checkpoint that says `ready` may still be killing it
    with claim, old, attempt.work_directory(node.config.work_dir) as work, ExitStack() as undo:
        with attempt.phase("preflight", limits.preflight):
            node.workloads.insist_free(manifest.workload, command.overrides.pod_name)
            preflight.pids(node.workloads.blockers(tasks))
        reading = gc.using(store, command.checkpoint_id, command.action_id)
        with attempt.phase("fetching", limits.transfer_of(manifest.raw_bytes)), reading:
            for image in manifest.images:
                _fetch(store, seal, image, work, attempt)
                _compare(image, node.criu.tasks(work / image.name))
            prepared = node.workloads.prepare(manifest.workload, command.overrides.pod_name)
            undo.callback(prepared.discard)
            preflight.pids(node.workloads.blockers(tasks))  # again: the fetch took its time
        attempt.entry.update(place=prepared.place, trees=tuple(Tree(pid=task.pid, start_time=0) for task in tasks))

        with attempt.phase("restoring", limits.restore_of(manifest.raw_bytes)):
            (image,) = manifest.images
            undo.callback(insist, "killing what was restored", lambda: prepared.kill(tasks))
            workload = prepared.adopt(node.criu.restore(work / image.name, options.criu, prepared.prepared, attempt.cancel))
            attempt.entry.update(trees=tuple(Tree(pid=p.pid, start_time=p.start_time) for p in workload.processes()))
        with attempt.phase("probing", limits.preflight):
            _probe(workload, tasks)
            attempt.cancel.close()
            mark_of(node.config.work_dir, command.action_id).touch()  # from here on it stays, whatever dies
        undo.pop_all()  # it runs, and it stays
    attempt.report(Status.READY)


def _fetch(store: Store, seal: Seal, image: ImageRef, work: Path, attempt: Attempt) -> None:
    """One image into `work/<name>`: small images, pagemaps, pages; every byte of it compared with its digest."""
    receiver = Receiver(store, seal, image, max(2, len(image.streams)), attempt.meter)
    directory = work / image.name
    directory.mkdir()
    receiver.fetch_files(work / f"{image.name}.tar.zst", directory)
    with Threads(attempt.cancel) as threads:
        receiver.fetch_pages(receiver.fetch_index(), directory, threads)


def _compare(image: ImageRef, found: list[TaskFacts]) -> None:
    """What was asked for (are these pids free? who is killed if it fails?) must be what CRIU will make."""
    zombies = {task.pid for task in found if task.dead}  # whose threads an older manifest may have made up

    def pids(tasks: list[TaskFacts]) -> list[tuple[int, int, list[int]]]:
        return [(task.pid, task.ppid, [] if task.pid in zombies else sorted(task.threads)) for task in tasks]

    if pids(image.tasks) != pids(found):
        raise Corrupt(
            f"image {image.name!r}: the manifest names other tasks than CRIU's images hold", hint="take another checkpoint"
        )


def _probe(workload: Workload, tasks: list[TaskFacts]) -> None:
    """The root runs, none of the image is still being held, and who was dead is not alive. Others may have ended by themselves: a shell
    that waits for its children is restored well, and is never quiet."""
    there = {process.pid: process.state for process in workload.processes()}
    for task in tasks:
        state = there.get(task.pid, "gone")
        if state == "t" or (task is tasks[0] and state in ("gone", "Z", "X")) or (task.dead and state not in ("gone", "Z", "X")):
            raise RestoreFailed(
                f"restored process {task.pid} ({task.comm!r}) is not as it was: {state}", pid=task.pid, state=state
            )
