"""Periodic checkpoints of chosen pods: from the configuration, and from the table that the API writes.

A turn belongs to one server, whoever takes it first. While an action of the pod is at work its turn is left out. Of those that a heartbeat
has made, the newest `keep_last` stay; none goes that a restore reads.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence

import structlog

from hibernode import config
from hibernode.api.actions import Action
from hibernode.api.control import Control
from hibernode.api.db import Database, Heartbeat
from hibernode.api.schema import CheckpointPod, HeartbeatPolicy
from hibernode.config import Config
from hibernode.errors import BadCommand, HibernodeError, Refused
from hibernode.loop import in_thread
from hibernode.wire import NAME

_SPACE = uuid.UUID("0f2b6a64-5f0c-5b5e-9a1e-6f0b7d6a4c22")
_log = structlog.get_logger("hibernode.api")


def of_policy(policy: HeartbeatPolicy, cluster: str, now: float, *, configured: bool = False) -> Heartbeat:
    """Its first turn is now. BadCommand for one that names no pod, or two."""
    if bool(policy.pod_id) == bool(policy.pod_name):
        raise BadCommand(
            "a heartbeat is of one pod", hint="give pod_id, or namespace and pod_name", property="pod_id, pod_name",
            found="both" if policy.pod_id else "nothing", wanted="one of them",
        )  # fmt: skip
    for prop in ("pod_id", "namespace", "pod_name"):
        if (value := getattr(policy, prop)) and not NAME.fullmatch(value):
            raise BadCommand(f"{prop} is not a valid name", property=prop, found=value[:100], wanted=NAME.pattern)
    namespace = "" if policy.pod_id else policy.namespace or "default"
    key = f"{cluster} {policy.pod_id or f'{namespace}/{policy.pod_name}'}"
    return Heartbeat(
        str(uuid.uuid5(_SPACE, key)), cluster, namespace, policy.pod_name, policy.pod_id, policy.interval, policy.keep_last,
        configured=configured, next_at=now,
    )  # fmt: skip


def due(heartbeat: Heartbeat, now: float) -> float:
    """When the next turn is, if this one is now; 0 if it is not yet. Turns that nobody took are not made up for."""
    if heartbeat.next_at > now:
        return 0.0
    missed = int((now - heartbeat.next_at) // heartbeat.interval)
    return heartbeat.next_at + (missed + 1) * heartbeat.interval


def beyond(made: Sequence[Action], keep_last: int) -> list[Action]:
    """Which of these need not stay: those that neither were filed last nor were ready last. Clocks of two servers may differ."""
    if not keep_last:
        return []
    by = (lambda action: action.created_at, lambda action: action.completed_at)
    stay = {action.action_id for key in by for action in sorted(made, key=key)[-keep_last:]}
    return [action for action in made if action.action_id not in stay]


def _of_config(each: config.Heartbeat, cluster: str, now: float) -> Heartbeat:
    try:
        return of_policy(HeartbeatPolicy(**each.model_dump()), cluster, now, configured=True)
    except (BadCommand, ValueError) as e:
        raise Refused(
            "config", f"api.heartbeats: {e}", prop="api.heartbeats", found=each.pod_name or each.pod_id or "no pod",
            wanted="pod_id, or namespace and pod_name; interval from 10 s to 366 days",
        ) from e  # fmt: skip


class Heartbeats:
    """One server's share of them."""

    def __init__(self, settings: Config, database: Database, control: Control, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._database, self._control, self._clock = settings, database, control, clock
        self._configured = [_of_config(each, settings.cluster, clock()) for each in settings.api.heartbeats]

    async def configure(self) -> None:
        """What the configuration says into the table, and out of it what it no longer says."""
        cluster = self._settings.cluster
        wanted = {each.heartbeat_id: each for each in self._configured}
        for heartbeat in await in_thread(self._database.heartbeats, cluster):
            if heartbeat.configured and heartbeat.heartbeat_id not in wanted:
                await in_thread(self._database.remove_heartbeat, heartbeat.heartbeat_id)
        for heartbeat in wanted.values():
            await in_thread(self._database.put_heartbeat, heartbeat)

    async def round(self) -> None:
        for heartbeat in await in_thread(self._database.heartbeats, self._settings.cluster):
            if next_at := due(heartbeat, self._clock()):
                await self._turn(heartbeat, next_at)
            await self._tidy(heartbeat)
        for action in await in_thread(self._database.unpurged):
            await self._control.purge(action)

    async def _turn(self, heartbeat: Heartbeat, next_at: float) -> None:
        pod = (heartbeat.namespace, heartbeat.pod_name, heartbeat.pod_id)
        if not await in_thread(self._database.take_turn, heartbeat, next_at):
            return
        action_id, message = "", ""
        if other := await in_thread(self._database.pod_at_work, *pod):
            message = f"left out: action {other} is at work"
        else:
            wanted = CheckpointPod(
                namespace=heartbeat.namespace or None, pod_name=heartbeat.pod_name or None, pod_id=heartbeat.pod_id or None,
                reason="heartbeat",
            )  # fmt: skip
            try:
                action_id = await self._control.checkpoint_pod(wanted)
            except HibernodeError as e:
                message = f"{e.code}: {e.message}"
        if message:
            _log.warning("no heartbeat", pod="/".join(filter(None, pod)), why=message)
        await in_thread(self._database.note_turn, heartbeat.heartbeat_id, action_id, message)

    async def _tidy(self, heartbeat: Heartbeat) -> None:
        if not heartbeat.keep_last:
            return
        made = await in_thread(
            self._database.checkpoints_of_pod, heartbeat.namespace, heartbeat.pod_name, heartbeat.pod_id, reason="heartbeat"
        )
        for action in beyond(made, heartbeat.keep_last):
            try:
                await self._control.delete(action)
            except HibernodeError as e:
                _log.warning("an old checkpoint stays", action=action.action_id, code=e.code, error=e.message)
