"""Periodic checkpoints of chosen pods: from the configuration, from the table that the API writes, and by the pods' own annotations,
which their nodes tell of. What an operator says of a pod stands before what it asks for itself.

A turn belongs to one server, whoever takes it first. While an action of the pod is at work its turn is left out. Of those that a heartbeat
has made, the newest `keep_last` stay; none goes that a restore reads.
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

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


def of_wish(wish: Mapping[str, Any], cluster: str, now: float) -> Heartbeat | None:
    """What a pod asks for, as its node tells it; None for what is wrong, and for what no policy may say: a node is believed as little as
    anybody. It is of the pod's name, so that a restored pod goes on with it. Its turns are counted from the pod's start, so that they are
    the same for every server, also when it was forgotten and comes again."""
    if wish.get("problem") or not wish.get("uid"):
        return None
    try:
        policy = HeartbeatPolicy(
            namespace=wish["namespace"], pod_name=wish["name"], interval=wish["interval"], keep_last=wish["keep_last"]
        )
        of_name = of_policy(policy, cluster, now)
    except (BadCommand, ValueError, KeyError):  # a ValidationError is a ValueError
        return None
    since = min(float(wish.get("since", 0.0)), now)
    next_at = since + ((now - since) // policy.interval + 1) * policy.interval
    heartbeat_id = str(uuid.uuid5(_SPACE, f"annotation {cluster} {of_name.namespace}/{of_name.pod_name}"))
    return replace(of_name, heartbeat_id=heartbeat_id, pod_id=wish["uid"], annotated=True, next_at=next_at)


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
        await self._ask_pods()
        for heartbeat in await in_thread(self._database.heartbeats, self._settings.cluster):
            if next_at := due(heartbeat, self._clock()):
                await self._turn(heartbeat, next_at)
            await self._tidy(heartbeat)
        for action in await in_thread(self._database.unpurged):
            try:
                await self._control.purge(action)
            except HibernodeError as e:  # the others are not to wait for a node that is gone
                _log.warning("a deleted checkpoint stays in its store", action=action.action_id, code=e.code, error=e.message)

    async def _ask_pods(self) -> None:
        """What pods ask for into the table, and out of it what none asks for any more, or an operator has said otherwise. Each server does
        the same."""
        there = await in_thread(self._database.heartbeats, self._settings.cluster)
        said = {key for each in there if not each.annotated for key in (each.pod_id, (each.namespace, each.pod_name)) if key}
        wanted = await self._wishes() if self._settings.api.annotations else {}
        wanted = {key: each for key, each in wanted.items() if not said & {each.pod_id, (each.namespace, each.pod_name)}}
        known = {each.heartbeat_id: each for each in there if each.annotated}
        for heartbeat_id in known.keys() - wanted.keys():
            await in_thread(self._database.remove_heartbeat, heartbeat_id)
        for heartbeat_id, each in wanted.items():
            old = known.get(heartbeat_id)
            if old is None or (old.pod_id, old.interval, old.keep_last) != (each.pod_id, each.interval, each.keep_last):
                await in_thread(self._database.put_heartbeat, each)
                _log.info("a pod asks for heartbeats", pod=f"{each.namespace}/{each.pod_name}", interval=each.interval)

    async def _wishes(self) -> dict[str, Heartbeat]:
        """Of the nodes that have spoken lately. Where two have a pod of one name, the one that was made last has it."""
        now = self._clock()
        nodes = (await in_thread(self._database.nodes, self._settings.cluster)).values()
        told = [record.get("heartbeats") or () for seen_at, record in nodes if now - seen_at <= self._settings.api.silent_after]
        wishes = sorted((wish for each in told for wish in each), key=lambda wish: (wish["since"], wish["uid"]))
        found = (of_wish(wish, self._settings.cluster, now) for wish in wishes)
        return {each.heartbeat_id: each for each in found if each is not None}

    async def _turn(self, heartbeat: Heartbeat, next_at: float) -> None:
        pod = heartbeat.whose
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
        of_pod = functools.partial(self._database.checkpoints_of_pod, reason="heartbeat", limit=heartbeat.keep_last + 1000)
        made = await in_thread(of_pod, *heartbeat.whose)
        for action in beyond(made, heartbeat.keep_last):
            try:
                await self._control.delete(action)
            except HibernodeError as e:
                _log.warning("an old checkpoint stays", action=action.action_id, code=e.code, error=e.message)
