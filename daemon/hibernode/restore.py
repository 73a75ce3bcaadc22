"""A restore, on one page. Twin: `checkpoint.py`.

Everything before `restoring` only reads and prepares; each frame of the image is verified before CRIU, or a process, sees any of it. If
CRIU, the probe or anything later fails, no process of the tree is left. The local machine decides what a restored tree may do; the image
does not.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

from hibernode import catalog, gc, gpus, preflight
from hibernode.config import Limits
from hibernode.errors import RestoreFailed
from hibernode.fetch import Supply, by_filler, fetch
from hibernode.journal import Tree, mark_of
from hibernode.model import ImageRef, Manifest, RestoreCommand, Status
from hibernode.node import Attempt, Node, insist
from hibernode.ports import Workload


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
        lazy, filled = options.criu.lazy, by_filler(node, manifest, options.criu)
        places = gpus.places(node, manifest.gpu)
        preflight.restore_room(manifest, node.host.room(node.config.work_dir), node.host.load(), filled=filled)
        catalog.check_sizes(store, manifest)
        attempt.meter.bytes_total = manifest.raw_bytes
        attempt.meter.streams = sum(len(part.streams) for part in manifest.parts)

    claim = node.claims.claim(f"checkpoint {command.checkpoint_id}", command.action_id)
    taken = [] if manifest.workload.contained else tasks  # pids of this machine
    old = node.claims.claim(
        f"pid {taken[0].pid}" if taken else f"pod {command.pod_id or manifest.workload.uid}", command.action_id
    )  # it may still be killed
    new = node.claims.claim(f"pod of {command.action_id}", command.action_id)  # half restored it is nobody's to checkpoint
    with (
        node.suspecting(manifest), claim, old, new, attempt.work_directory(node.config.work_dir) as work,
        ExitStack() as supplying, ExitStack() as undo, ExitStack() as reading,
    ):  # fmt: skip
        for task in taken[1:] if filled else ():  # it is there while pages are missing: nothing of it is anybody's to checkpoint
            supplying.enter_context(node.claims.claim(f"pid {task.pid}", command.action_id))
        with attempt.phase("preflight", limits.preflight):
            node.workloads.insist_free(manifest.workload, command)
            preflight.pids(node.workloads.blockers(taken))
        with attempt.phase("fetching", limits.transfer_of(manifest.raw_bytes)):
            reading.enter_context(gc.using(store, command.checkpoint_id, command.action_id))
            supply = Supply(node, store, seal, attempt, attempt.meter.streams, lazy=lazy) if filled else None
            supplying.enter_context(supply or nullcontext())
            fetched = fetch(node, store, seal, manifest, work, attempt, supply)
            prepared = node.workloads.prepare(manifest.workload, command)
            undo.callback(prepared.discard)
            if not manifest.layers and not filled:  # which are read when there is a place for them
                reading.close()
            preflight.pids(node.workloads.blockers(taken))  # again: the fetch took its time
        node.journal.take_place(attempt.entry, prepared.place, tuple(Tree(pid=task.pid, start_time=0) for task in taken))

        with attempt.phase("restoring", limits.restore_of(manifest.raw_bytes)):
            undo.callback(insist, "killing what was restored", lambda: prepared.kill(tasks))
            note = lambda freezers: attempt.entry.update(freezers=tuple(freezers))  # noqa: E731
            workload = prepared.restore(fetched, options.criu, attempt.cancel, note)
            attempt.entry.update(trees=tuple(Tree(pid=p.pid, start_time=p.start_time) for p in workload.processes()))
        gpus.resume(node, manifest.gpu, places, workload, attempt, undo)
        if supply is not None and lazy:  # it runs, and hangs on the store until all of it is there
            _fill(supply, workload, manifest, attempt, limits)
        with attempt.phase("probing", limits.preflight):
            if not lazy:
                _probe(workload, manifest.images)
            attempt.cancel.close()
            mark_of(node.config.work_dir, command.action_id).touch()  # from here on it stays, whatever dies
        undo.pop_all()  # it runs, and it stays
    attempt.report(Status.READY)


def _fill(supply: Supply, workload: Workload, manifest: Manifest, attempt: Attempt, limits: Limits) -> None:
    with attempt.phase("probing", limits.preflight):
        _probe(workload, manifest.images)  # first: who ends by himself while it is filled was restored well
    with attempt.phase("filling", limits.transfer_of(manifest.raw_bytes)):
        supply.fill_running(workload)


def _probe(workload: Workload, images: list[ImageRef]) -> None:
    """The root runs, none of the image is still being held, and who was dead is not alive. Others may have ended by themselves: a shell
    that waits for its children is restored well, and is never quiet."""
    there = {(process.image, process.inside): process.state for process in workload.processes()}
    for image, task in ((each, task) for each in images for task in each.tasks):
        state, root = there.get((image.name, task.pid), "gone"), task is image.tasks[0]
        if state == "t" or (root and state in ("gone", "Z", "X")) or (task.dead and state not in ("gone", "Z", "X")):
            raise RestoreFailed(
                f"restored process {task.pid} ({task.comm!r}) is not as it was: {state}", pid=task.pid, state=state
            )
