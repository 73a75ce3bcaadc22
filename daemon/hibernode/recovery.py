"""Acts on the journal's rule for actions that a crash ended: once at start, before the first command. Every step may be repeated."""

from __future__ import annotations

import logging
import shutil

from hibernode import catalog
from hibernode.errors import Corrupt, HibernodeError, Interrupted, NotFound, Refused
from hibernode.journal import Entry, Record, remedy
from hibernode.model import Outcome, Status
from hibernode.node import Node

_log = logging.getLogger("hibernode.recovery")


def recover(node: Node, entry: Entry) -> Outcome:
    """Undo or finish what the action was at; how it ended. An undo that fails is `left_suspended`: the next start tries again."""
    record = entry.record
    shutil.rmtree(node.config.work_dir / record.action_id, ignore_errors=True)
    todo = remedy(record)
    _log.warning("recovering action %s: it was %s, so: %s", record.action_id, record.phase, todo)
    try:
        if todo in ("settle", "finish_kill") and _committed(node, record):
            if record.kill:
                node.workloads.kill([(t.pid, t.start_time) for t in record.trees])
            return Outcome(Status.READY, profile=record.last.profile if record.last else None)
        if todo in ("thaw", "settle"):
            node.workloads.thaw([(t.pid, t.start_time) for t in record.trees])
        if todo == "kill_restored":
            node.workloads.kill([(t.pid, t.start_time) for t in record.trees])
    except HibernodeError as e:
        return Outcome.of(e)
    return Outcome.of(Interrupted(f"the daemon ended while it was {record.phase}", hint="give the command again, with a new id"))


def _committed(node: Node, record: Record) -> bool:
    """Is the checkpoint whole in its store?"""
    try:
        store = node.open_store(record.location)
        catalog.check_sizes(store, catalog.read(store, record.checkpoint_id))
    except (NotFound, Corrupt, Refused):
        return False
    return True
