"""Acts on the journal's rule for actions that a crash ended: at start, before the first command. Every step may be repeated; the kill of
a workload whose checkpoint is ready is, for as long as the daemon runs."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from hibernode import catalog
from hibernode.errors import Corrupt, HibernodeError, Interrupted, NotFound, OutcomeUnknown, Refused, Stuck, Transient
from hibernode.journal import BOOT, Entry, Record, remedy, stays
from hibernode.model import Outcome, Status, TaskFacts
from hibernode.node import Node, alarm, calmly, insist

_TRIES = 20  # of an emptying: a second
_PATIENCE = 5.0  # seconds for a kubelet, and for what was killed, of a try that is followed by others
_log = logging.getLogger("hibernode.recovery")


def recover(node: Node, entry: Entry) -> Outcome:
    """Undo or finish what the action was at; how it ended. An undo that fails is `left_suspended`: the next start tries again. A kill that
    fails leaves it `unfinished`."""
    record = entry.record
    work = node.config.work_dir / record.action_id
    if record.type == "checkpoint":  # of a restore nothing may run on, not for a moment: it is killed where it stands
        node.criu.let_go(work)  # while it is there: by it they are known
    todo = remedy(record)
    _log.warning("recovering action %s: it was %s, so: %s", record.action_id, record.phase, todo)
    try:
        match todo:
            case "finish_kill":
                return _ready(node, record)
            case "settle":
                return _settle(node, entry)
            case "thaw":
                _thaw(node, record)
            case "kill_restored" if stays(node.config.work_dir, record):
                return Outcome(Status.READY)  # it had passed its probe, and only the word of it is missing
            case "kill_restored":
                _kill_restored(node, record)
    except HibernodeError as e:
        return Outcome.of(e)
    finally:
        _empty(work)
    return _interrupted(record)


def to_be_killed(record: Record) -> bool:
    """Its checkpoint is ready, so that it stands still for good; if its action is over, nobody has been able to end it."""
    return record.kill and record.boot == BOOT and remedy(record) == "finish_kill"


def finish_kill(node: Node, record: Record) -> None:
    """One more try to end it, which waits for `_PATIENCE` seconds and not for half a minute. Raises HibernodeError, or OSError."""
    _park(node, record)
    node.workloads.kill(_processes(record), record.place, record.freezers, patience=_PATIENCE)


def _empty(work: Path) -> None:
    """Last, when whoever wrote into it has ended; somebody who has just been killed may have made a file meanwhile."""
    for _ in range(_TRIES):
        shutil.rmtree(work, ignore_errors=True)
        if not work.exists():
            return
        time.sleep(0.05)
    _log.warning("%s cannot be removed", work)


def _interrupted(record: Record) -> Outcome:
    return Outcome.of(Interrupted(f"the daemon ended while it was {record.phase}", hint="give the command again, with a new id"))


def _settle(node: Node, entry: Entry) -> Outcome:
    """The commit had begun: the store knows whether it came to its end. Who was told of an error is not killed any more; and nobody is
    held longer than a commit may take, because a store does not answer. Who was let go on for that is not killed either."""
    record = entry.record
    if not record.kill:
        _thaw(node, record)  # before a store is asked that may be slow
    let_go = calmly("letting the workload go on", lambda: _let_go(node, entry))
    try:
        with alarm(node.config.limits.commit, let_go):
            whole = record.status != Status.ERROR and _committed(node, record)
        if whole:
            return _ready(node, entry.record)
    except Transient as e:
        _thaw(node, record)
        raise OutcomeUnknown(
            f"the daemon ended while it was committing, and the store cannot be asked: {e.message}",
            hint="the workload runs on; `hibernode verify` says whether the checkpoint is whole",
        ) from e
    _thaw(node, record)
    return _interrupted(record)


def _let_go(node: Node, entry: Entry) -> None:
    _thaw(node, entry.record)
    entry.update(kill=False)


def _ready(node: Node, record: Record) -> Outcome:
    """It is, whether its workload can be killed at once or not."""
    done = Outcome(Status.READY, profile=record.last.profile if record.last else None)
    if record.kill:
        try:
            insist("killing the workload", lambda: finish_kill(node, record))
        except Stuck as e:
            _log.error("action %s is ready, and its workload stands still: %s", record.action_id, e.message)
            return replace(done, unfinished=True)
    return done


def _thaw(node: Node, record: Record) -> None:
    stopped = [(tree.pid, tree.start_time) for tree in record.trees if tree.stopped]
    insist("letting the workload go on", lambda: node.workloads.thaw(_processes(record), stopped, record.freezers))
    if record.boot == BOOT:  # last: who stands still cannot answer the driver
        insist("bringing GPU state back", lambda: node.gpu.recover(record.action_id))


def _kill_restored(node: Node, record: Record) -> None:
    """Nothing half restored is left; who it was is known from the probe on, and who lives in its place is of it. A pid alone is not
    enough to kill for."""
    _park(node, record)
    insist("killing the restored tree", lambda: node.workloads.kill(_processes(record), record.place, record.freezers))
    unknown = [TaskFacts(pid=tree.pid) for tree in record.trees if not tree.start_time]
    if left := node.workloads.blockers(unknown, living=True):
        pid, holder = left[0]
        raise OutcomeUnknown(
            f"the daemon ended while it was restoring, and pid {pid} is there: {holder}",
            hint="it may be of the restored tree: look at it by hand, and kill it if it is",
            pids=[pid for pid, _ in left][:100],
        )


def _park(node: Node, record: Record) -> None:
    """Who was given back meanwhile, by the helper, is suspended again before he is killed."""
    if record.boot == BOOT:
        node.gpu.park(record.action_id, [who for who in _processes(record) if who[1]], node.config.limits.gpu)


def _processes(record: Record) -> list[tuple[int, int]]:
    return [(tree.pid, tree.start_time) for tree in record.trees]


def _committed(node: Node, record: Record) -> bool:
    """Is the checkpoint whole in its store, and this action's? Another node may have made one under the same id."""
    try:
        store = node.open_store(record.location)
        manifest = catalog.read(store, record.checkpoint_id, node.notary)
        catalog.check_sizes(store, manifest)
    except (NotFound, Corrupt, Refused):
        return False
    return manifest.action_id == record.action_id
