"""A node leaves: its pods go to other nodes, each on its own.

A pod is checkpointed, if another node could take it, killed when that is `ready`, and restored elsewhere. Where its node is silent, or
falls silent before the checkpoint is ready, the pod's latest ready checkpoint is restored, but only for `nodeTermination`: the caller
says that the node ends, so that nothing of it runs on beside what is restored. A pod that could not be checkpointed runs on where it is,
and its move has `failed`.

A pod that is evicted on its own, and whose annotation says `hibernode.io/on-stop: migrate`, goes the second half of the same way: its
node has made the checkpoint (`prestop.py`), and once the pod has ended it is restored elsewhere.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import structlog

from hibernode.api import actions
from hibernode.api.actions import Action
from hibernode.api.control import Control
from hibernode.api.db import Database, Move
from hibernode.api.schema import CheckpointOverrides, CheckpointPod, RestorePod
from hibernode.config import Config
from hibernode.errors import HibernodeError, NotFound, Refused
from hibernode.loop import in_thread
from hibernode.model import NodeRecord, Status

Reason = Literal["nodeTermination", "nodeUnschedulable"]
_KILL = json.dumps({"leave_running": False})
_SPACE = uuid.UUID("b5a6c1de-2f0f-5a07-8a55-0a6e6f2f9b10")
_EVICTED = "evicted"  # of a move: it began with a checkpoint that the node made by itself
_PASSING = ("no_node", "restoring")  # refusals that may pass: a node may come, a restore may end
_log = structlog.get_logger("hibernode.api")


class Departures:
    """Moves, begun by a request and carried on in the rounds of any server. `heard_since`: since when this server has heard the event
    stream without a break, 0 if it does not."""

    def __init__(
        self, settings: Config, database: Database, control: Control, heard_since: Callable[[], float],
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._settings, self._database, self._control = settings, database, control
        self._heard_since, self._clock = heard_since, clock

    async def leave(self, node: str, reason: Reason) -> list[Move]:
        """Begin to move every managed pod of this node; its moves, begun now or since the node last spoke. Asked again, or of two servers
        at once, no pod goes twice. NotFound for a node that nobody has seen."""
        cluster = self._settings.cluster
        seen = await in_thread(self._database.nodes, cluster)
        alive = await self._control.nodes(node)
        if node not in alive and node not in seen:
            raise NotFound(
                f"nobody has seen node {node[:100]!r}",
                property="node",
                found=node[:100],
                wanted=", ".join(sorted(seen)) or "a node",
            )
        spoke, pods = await self._pods(alive.get(node), *seen.get(node, (0.0, {})))
        before = await in_thread(self._database.moves, cluster, node)
        lately = {
            (each.namespace, each.pod_name) for each in before if each.open or (each.state == "done" and each.updated_at >= spoke)
        }
        now = self._clock()
        new = [
            Move(self._id(node, pod, before), cluster, node, reason, *pod, "checkpointing", created_at=now, updated_at=now)
            for pod in pods
            if pod[:2] not in lately
        ]
        await in_thread(self._database.add_moves, new)
        await self.round()
        ids = {move.move_id for move in new}
        moves = await in_thread(self._database.moves, cluster, node)
        return [move for move in moves if move.open or move.move_id in ids or move.updated_at >= spoke]

    async def _pods(
        self, alive: NodeRecord | None, seen_at: float, said: dict[str, object]
    ) -> tuple[float, list[tuple[str, str, str]]]:
        """When the node last spoke, and which pods it had then that go elsewhere: (namespace, name, UID). Of a cluster's pods those that
        ask for it: the others are their controllers', which make them anew, or belong to the node."""
        if alive is not None:
            spoke, workloads = alive.time, [each.model_dump() for each in alive.workloads]
        else:
            found = said.get("workloads", ())
            spoke, workloads = seen_at, list(found) if isinstance(found, list) else []
        return spoke, [
            (each["namespace"], each["name"], each["uid"]) for each in workloads if each["kind"] == "job" or each.get("moves")
        ]

    def _id(self, node: str, pod: tuple[str, str, str], before: list[Move]) -> str:
        """The same for two who ask at the same time: it counts the moves of this pod that are over."""
        over = sum((each.namespace, each.pod_name) == pod[:2] for each in before)
        return str(uuid.uuid5(_SPACE, " ".join((self._settings.cluster, node, *pod, str(over)))))

    async def round(self) -> None:
        """Every open move one step on, where there is one."""
        await self._see_evicted()
        for move in await in_thread(self._database.moves, self._settings.cluster, only_open=True):
            try:
                new = await self._step(move)
            except HibernodeError as e:
                if e.retry:
                    _log.warning("a move waits", pod=move.pod_name, node=move.node, code=e.code, error=e.message)
                    continue
                new = replace(move, state="failed", message=f"{e.code}: {e.message}")
            except Exception:  # noqa: BLE001 - the others go on
                _log.exception("defect", move=move.move_id)
                continue
            if new != move and await in_thread(self._database.change_move, move, replace(new, updated_at=self._clock())):
                _log.info(
                    "move", pod=f"{new.namespace}/{new.pod_name}", node=new.node, state=new.state, message=new.message or None
                )

    async def _see_evicted(self) -> None:
        """A move for each pod that was checkpointed because it was evicted, and wants to go on; once, whoever sees it first. One that
        nobody has seen for as long as a command waits is not moved any more."""
        if not self._settings.api.annotations:
            return
        now, cluster = self._clock(), self._settings.cluster
        made = await in_thread(self._database.stopped, cluster, now - self._settings.api.expires_after)
        moves = [
            Move(
                str(uuid.uuid5(_SPACE, f"{_EVICTED} {each.action_id}")), cluster, each.node, _EVICTED, each.namespace, each.pod_name,
                each.pod_id, "restoring", created_at=now, updated_at=now, checkpoint_action_id=each.action_id,
            )
            for each in made
            if actions.wants_to_go_on(each) and each.pod_name
        ]  # fmt: skip
        await in_thread(self._database.add_moves, moves)

    async def _step(self, move: Move) -> Move:
        if move.state == "restoring":
            return await self._restoring(move)
        return await (self._checkpointing(move) if move.checkpoint_action_id else self._leaving(move))

    async def _leaving(self, move: Move) -> Move:
        """Nothing was done to the pod yet. Its checkpoint will end it: not before somebody could take it. But where that was filed, and
        whoever did so could not write it down or does not know whether it came, the pod may be saved and gone by now: nobody is asked."""
        key = f"move {move.move_id}"
        if filed := await self._control.checkpoint_again(key):
            return replace(move, checkpoint_action_id=filed, message="")
        found = await self._control.running_on(move.node, move.namespace, move.pod_name, move.pod_id)
        if found is None:
            return await self._of_silent(move)
        try:
            await self._control.room_elsewhere(move.node, found)
        except Refused as e:
            return replace(move, state="failed", message=f"{e.code}: {e.message}; its pod runs on where it is")
        wanted = CheckpointPod(
            pod_id=move.pod_id or None, namespace=None if move.pod_id else move.namespace,
            pod_name=None if move.pod_id else move.pod_name, overrides=CheckpointOverrides(criu_opts=_KILL),
        )  # fmt: skip
        filed = await self._control.checkpoint_pod(wanted, key, reason=_reason(move))
        return replace(move, checkpoint_action_id=filed, message="")

    async def _of_silent(self, move: Move) -> Move:
        """The node does not say that it has it: it is over there, or nobody is there to say so."""
        if move.node in await self._control.nodes(move.node):
            return replace(move, message="the node does not answer for this pod; it may have ended")
        seen_at = (await in_thread(self._database.nodes, self._settings.cluster)).get(move.node, (0.0, {}))[0]
        since, now = self._heard_since(), self._clock()
        if not since or now - max(seen_at, since) <= self._settings.api.silent_after:
            return replace(move, message="the node is silent, and waited for")
        return await self._restoring(
            replace(move, state="restoring", message="the node is silent: the latest ready checkpoint is taken")
        )

    async def _checkpointing(self, move: Move) -> Move:
        made = await self._control.action(move.checkpoint_action_id)
        if made.status == Status.READY:
            return await self._restoring(replace(move, state="restoring"))
        if made.status != Status.ERROR:
            return move
        if made.code == actions.NODE_SILENT and move.reason == "nodeTermination":
            return await self._restoring(replace(move, state="restoring", message=f"{made.code}: the latest ready one is taken"))
        if actions.unfiled(made):
            return replace(move, checkpoint_action_id="")  # under the same key: once
        if made.provisional:
            return replace(move, message=f"{made.code}: {made.message}")  # the node may say otherwise
        return replace(move, state="failed", message=f"{made.code}: {made.message}; its pod runs on where it is")

    async def _restoring(self, move: Move) -> Move:
        if not move.restore_action_id:
            return await self._restore(move)
        restored = await self._control.action(move.restore_action_id)
        if restored.status == Status.READY:
            return replace(move, state="done", message="")
        if restored.status != Status.ERROR:
            return move
        if actions.unfiled(restored):
            return replace(move, restore_action_id="")  # under the same key: once
        if restored.provisional:
            return replace(move, message=f"{restored.code}: {restored.message}")
        return replace(move, state="failed", message=f"{restored.code}: {restored.message}; its checkpoint is kept")

    async def _restore(self, move: Move) -> Move:
        if move.reason == _EVICTED and await self._control.running_on(move.node, move.namespace, move.pod_name, move.pod_id):
            return replace(move, message="the pod has not ended yet")
        source = await self._source(move)
        wanted = RestorePod(action_id=source.action_id, reason=_reason(move))
        try:
            filed = await self._control.restore_pod(wanted, f"move {move.move_id}", avoid=move.node)
        except Refused as e:
            if e.code not in _PASSING:
                raise
            return replace(move, message=f"waits: {e.code}: {e.message}")
        return replace(move, restore_action_id=filed, message="")

    async def _source(self, move: Move) -> Action:
        """What it is restored from: the checkpoint of this move, else the pod's latest."""
        made = await in_thread(self._database.checkpoints_of_pod, move.namespace, move.pod_name, move.pod_id, limit=1000)
        mine = [action for action in made if action.action_id == move.checkpoint_action_id]
        if not made:
            raise NotFound(f"no checkpoint of pod {move.namespace}/{move.pod_name} is ready", hint="it cannot be moved")
        if not mine and move.reason != "nodeTermination":
            raise NotFound(
                f"node {move.node} is silent, and may come back with pod {move.pod_name}",
                hint="say nodeTermination if it does not",
            )
        return (mine or made)[0]


def _reason(move: Move) -> Reason:
    return "nodeTermination" if move.reason == "nodeTermination" else "nodeUnschedulable"
