"""A node leaves: its pods go to other nodes, each on its own.

While the node is alive a pod is checkpointed, killed when that is `ready`, and restored elsewhere. Where it is silent, or falls silent
before its checkpoint is ready, the pod's latest ready checkpoint is restored, but only for `nodeTermination`: the caller says that the
node ends, so that nothing of it runs on beside what is restored. A pod that could not be checkpointed runs on where it is, and its move
has `failed`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import structlog

from hibernode.api import actions
from hibernode.api.actions import Action
from hibernode.api.control import Control
from hibernode.api.db import Database, Move
from hibernode.api.schema import CheckpointOverrides, CheckpointPod, RestorePod
from hibernode.config import Config
from hibernode.errors import HibernodeError, NotFound
from hibernode.loop import in_thread
from hibernode.model import NodeRecord, Status

Reason = Literal["nodeTermination", "nodeUnschedulable"]
_KILL = json.dumps({"leave_running": False})
_log = structlog.get_logger("hibernode.api")


class Departures:
    """Moves, begun by a request and carried on in the rounds of any server."""

    def __init__(self, settings: Config, database: Database, control: Control, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._database, self._control, self._clock = settings, database, control, clock

    async def leave(self, node: str, reason: Reason) -> list[Move]:
        """Begin to move every managed pod of this node; all its moves that are open, old and new. NotFound for a node nobody has seen."""
        cluster = self._settings.cluster
        seen = await in_thread(self._database.nodes, cluster)
        alive = await self._control.nodes()
        if node not in alive and node not in seen:
            raise NotFound(
                f"nobody has seen node {node[:100]!r}", property="node", found=node[:100], wanted=", ".join(sorted(seen))
            )
        record = alive.get(node) or NodeRecord.model_validate(seen[node][1])
        going = {(move.namespace, move.pod_name) for move in await in_thread(self._database.moves, cluster, node, only_open=True)}
        new = [
            Move(
                str(uuid.uuid4()), cluster, node, reason, each.namespace, each.name, each.uid,
                "checkpointing" if node in alive else "restoring", self._clock(),
            )
            for each in record.workloads
            if each.kind != "process" and (each.namespace, each.name) not in going
        ]  # fmt: skip
        await in_thread(self._database.add_moves, new)
        await self.round()
        ids = {move.move_id for move in new}
        moves = await in_thread(self._database.moves, cluster, node)
        return [move for move in moves if move.open or move.move_id in ids]

    async def round(self) -> None:
        """Every open move one step on, where there is one."""
        for move in await in_thread(self._database.moves, self._settings.cluster, only_open=True):
            try:
                new = await self._step(move)
            except HibernodeError as e:
                if e.retry:
                    _log.warning("a move waits", pod=move.pod_name, node=move.node, code=e.code, error=e.message)
                    continue
                new = replace(move, state="failed", message=f"{e.code}: {e.message}")
            if new != move and await in_thread(self._database.change_move, move, new):
                _log.info(
                    "move", pod=f"{new.namespace}/{new.pod_name}", node=new.node, state=new.state, message=new.message or None
                )

    async def _step(self, move: Move) -> Move:
        if move.state == "checkpointing":
            return await self._checkpointing(move)
        return await self._restoring(move)

    async def _checkpointing(self, move: Move) -> Move:
        if not move.checkpoint_action_id:
            wanted = CheckpointPod(
                pod_id=move.pod_id or None, namespace=None if move.pod_id else move.namespace,
                pod_name=None if move.pod_id else move.pod_name, overrides=CheckpointOverrides(criu_opts=_KILL),
            )  # fmt: skip
            reason: Reason = "nodeTermination" if move.reason == "nodeTermination" else "nodeUnschedulable"
            filed = await self._control.checkpoint_pod(wanted, f"move {move.move_id}", reason=reason)
            return replace(move, checkpoint_action_id=filed)
        made = await self._control.action(move.checkpoint_action_id)
        if made.status == Status.READY:
            return await self._restoring(replace(move, state="restoring"))
        if made.status != Status.ERROR:
            return move
        if made.code == actions.NODE_SILENT and move.reason == "nodeTermination":
            return await self._restoring(replace(move, state="restoring", message=f"{made.code}: the latest ready one is taken"))
        why = f"{made.code}: {made.message}"
        return replace(move, state="failed", message=f"{why}; its pod runs on where it is" if not made.provisional else why)

    async def _restoring(self, move: Move) -> Move:
        if not move.restore_action_id:
            source = await self._source(move)
            wanted = RestorePod(action_id=source.action_id, reason=_restore_reason(move))
            filed = await self._control.restore_pod(wanted, f"move {move.move_id}", avoid=move.node)
            return replace(move, restore_action_id=filed)
        restored = await self._control.action(move.restore_action_id)
        if restored.status == Status.READY:
            return replace(move, state="done", message="")
        if restored.status == Status.ERROR and not restored.provisional:
            return replace(move, state="failed", message=f"{restored.code}: {restored.message}; its checkpoint is kept")
        return move

    async def _source(self, move: Move) -> Action:
        """What it is restored from: the checkpoint of this move, else the pod's latest."""
        made: Sequence[Action] = await in_thread(self._database.checkpoints_of_pod, move.namespace, move.pod_name, move.pod_id)
        mine = [action for action in made if action.action_id == move.checkpoint_action_id]
        if not made:
            raise NotFound(f"no checkpoint of pod {move.namespace}/{move.pod_name} is ready", hint="it cannot be moved")
        if not mine and move.reason != "nodeTermination":
            raise NotFound(
                f"node {move.node} is silent, and may come back with pod {move.pod_name}",
                hint="say nodeTermination if it does not",
            )
        return (mine or list(made))[0]


def _restore_reason(move: Move) -> Reason:
    return "nodeTermination" if move.reason == "nodeTermination" else "nodeUnschedulable"
