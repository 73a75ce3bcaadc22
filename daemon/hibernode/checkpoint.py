"""A checkpoint, on one page. Twin: `restore.py`.

Everything before `dumping` only looks; everything after it is undone if it fails, and the workload runs on with its data. Undos are
registered before the deed. CRIU never kills: a workload that is to be killed is held stopped, and killed after the commit.
"""

from __future__ import annotations

from contextlib import ExitStack, closing

from hibernode import catalog, gc, gpus, increment, preflight
from hibernode.capture import Capture, living, survey
from hibernode.journal import Tree
from hibernode.model import CheckpointCommand, Status
from hibernode.node import Attempt, Node, calmly, insist, on_error
from hibernode.ports import GpuTree, Workload


def checkpoint(node: Node, command: CheckpointCommand, attempt: Attempt) -> None:
    """Freeze, dump, let go; ship; commit; report `ready`; kill if asked. Raises with the workload running as before."""
    meter, limits = attempt.meter, node.config.limits
    with attempt.phase("preflight", limits.preflight):
        store = node.open_store(command.overrides.directory)
        options = preflight.options(command.overrides, node.config, node.host.load().cpus)
        node.criu.facts()  # raises where there is none that could dump
        workload = node.workloads.find(command.target)

    with (
        node.claims.claim(workload.key, command.action_id),
        node.claims.claim(f"checkpoint {command.checkpoint_id}", command.action_id),  # another one would write the same objects
        attempt.work_directory(node.config.work_dir) as work,
        ExitStack() as undo,
    ):
        with attempt.phase("preflight", limits.preflight):  # with the claim: nobody else is doing anything to the workload now
            undo.enter_context(gc.attempting(store, command.checkpoint_id, command.action_id))
            processes = living(node, workload) if command.kind != "rootfsonly" else ()  # of them nothing is saved then
            preflight.checkpoint(command, workload.facts, processes, options.criu, endable=workload.endable)
            pod_spec = workload.pod_spec()
            gpu = undo.enter_context(closing(node.gpu.find(command.action_id, processes)))
            on_gpus = gpus.look(node, gpu, workload, processes)[1] + survey(workload, command.kind, attempt.cancel)
            meter.bytes_total = sum(process.rss for process in processes) + on_gpus
            preflight.room(meter.bytes_total, store.free_bytes(), node.host.room(node.config.work_dir))
            store.check()
        with attempt.phase("preflight", limits.transfer_of(meter.bytes_total)):  # what is read of an earlier one grows with it
            origin = undo.enter_context(increment.origin(node, store, command, workload, options))
        share = undo.enter_context(node.arena.share(meter.bytes_total, attempt.cancel))  # nobody is frozen until there is one
        with attempt.phase("preflight", limits.preflight):  # a store that hangs now hangs before anybody is frozen
            capture = undo.enter_context(
                Capture(node, share, store, origin.seal, workload, command.kind, options, attempt, work, origin.known)
            )
            processes = living(node, workload)  # again: the wait may have been long, and who was stopped then may run now
            gpu_image, on_gpus = gpus.look(node, gpu, workload, saved := processes if command.kind != "rootfsonly" else ())
            meter.bytes_total = max(meter.bytes_total, sum(process.rss for process in saved) + on_gpus)  # it may have grown
        let_go = calmly(
            "letting the workload go on",
            lambda: _let_go(workload, gpu, limits.gpu_of(on_gpus), attempt) if options.kill else None,
        )
        attempt.entry.update(
            trees=tuple(Tree(pid=each.pid, start_time=each.start_time, stopped=each.state == "T") for each in processes),
            freezers=workload.freezers(), place=workload.place, kill=options.kill, location=command.overrides.directory,
        )  # fmt: skip

        with ExitStack() as held:
            gpus.suspend(gpu, workload, attempt, limits.gpu_of(on_gpus), held)  # first: who stands still cannot answer the driver
            with attempt.phase("dumping", limits.pause_of(meter.bytes_total)), ExitStack() as frozen:
                frozen.callback(insist, "letting the workload go on", workload.thaw)
                meter.pause_ns += capture.dump(since=workload.freeze())
                if options.kill:
                    held.enter_context(frozen.pop_all())
            if options.kill:
                undo.push(on_error(stopped := held.pop_all()))  # until it is killed, or let go if anything fails
        attempt.report(Status.CHECKPOINT_CREATED, pod_spec)

        with attempt.phase("shipping", limits.transfer_of(meter.bytes_total)), attempt.cancel.waking(let_go):
            images, layers = capture.finish()
        with attempt.phase("committing", limits.commit), attempt.cancel.waking(let_go):
            on_gpu = gpus.saved(gpu_image, gpu, workload, images)
            manifest = catalog.describe(node, command, workload, options, meter, images, layers, origin.seal, on_gpu)
            with capture.keeping(), origin.references.committing(store, manifest):
                catalog.commit(store, manifest, node.notary, attempt.cancel)
        attempt.report(Status.READY)
        if options.kill:
            stopped.pop_all()  # somebody may restore it now: it never goes on again, also if it cannot be killed at once
            calmly("writing down that it is killed", lambda: attempt.entry.enter("killing", limits.preflight))()
            insist("killing the workload", workload.kill)


def _let_go(workload: Workload, gpu: GpuTree, limit: float, attempt: Attempt) -> None:
    """It goes on for good: nobody who finds this action later kills what has run on."""
    workload.thaw()
    gpu.resume(limit=limit)
    attempt.entry.update(kill=False)
