"""What can be asked of the control plane: each question once, from the check of what was asked to the command in the stream.

An action is in the database before its command is in the stream, so that none is at work that nobody knows. Where the stream does not
answer, the action is `error`, provisionally: a broker may have taken a command and only not said so, and then its node will.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import structlog
from pydantic import ValidationError

from hibernode import wire
from hibernode.api import actions, placing
from hibernode.api.actions import Action
from hibernode.api.db import Database, Upload, dumps
from hibernode.api.schema import CheckpointPod, CheckpointStatusWithPodSpec, RestorePod
from hibernode.bus import ControlBus
from hibernode.config import Config, Transfer
from hibernode.errors import BadCommand, BusUnavailable, HibernodeError, NotFound, Refused
from hibernode.loop import in_thread
from hibernode.model import (
    ActionCommand,
    CancelCommand,
    CheckpointCommand,
    CriuOpts,
    DeleteCommand,
    NodeRecord,
    Overrides,
    Reason,
    RestoreCommand,
    Status,
    Target,
    WorkloadView,
)

_SPACE = uuid.UUID("6c1f3a52-8c0e-5d0b-9a54-0d8c3f5a7e11")  # of the ids that are made from a caller's own key
_log = structlog.get_logger("hibernode.api")


class Control:
    """On one event loop. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        settings: Config,
        database: Database,
        bus: ControlBus,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._database, self._bus, self._clock = settings, database, bus, clock

    @property
    def cluster(self) -> str:
        return self._settings.cluster

    # --- checkpoint and restore ---------------------------------------------------------------------------------------------

    async def checkpoint_pod(self, wanted: CheckpointPod, key: str = "", *, reason: Reason | None = None) -> str:
        """File a checkpoint; the action's id. BadCommand or Refused: nothing was filed. NotFound: no node has this pod. BusUnavailable:
        the action is there, as `error`. The same `key` again: the same action, filed again where that failed. Keys are the caller's to
        keep apart."""
        self._insist_cluster(wanted.cluster_id or "")
        if wanted.action_id is not None:
            raise BadCommand(
                "action_id is chosen by the server", hint="to make a request that may be repeated, send the header Idempotency-Key",
                property="action_id", found=wanted.action_id[:100], wanted="absent",
            )  # fmt: skip
        given = wanted.overrides
        overrides = _checked(given.model_dump(exclude_none=True) if given else {})
        target = _target(wanted)
        action_id = _new_id("checkpoint", key)
        command = CheckpointCommand(
            action_id=action_id, checkpoint_id=action_id, target=target, kind=wanted.kind, reason=reason or wanted.reason,
            overrides=overrides, expires_at=self._expiry(),
        )  # fmt: skip
        _insist_encodable(command)
        if key and await self._is_filed(action_id):
            return action_id
        action = self._new(command, namespace=target.namespace, pod_name=target.pod_name, pod_id=target.pod_id, kind=wanted.kind)
        try:
            node, workload = await self._find(target)
            host = await self._host(node)
        except BusUnavailable as e:
            raise await self._lost(action, e, new=True) from e
        _insist_same(wanted, workload)
        action = _placed(action, node, host, workload)
        return await self._file(action, command)

    async def checkpoint_again(self, key: str) -> str:
        """The id of the checkpoint that was filed under this key, filed once more if its command may not be in the stream; "" if there is
        none, or none that ever came to a node. BusUnavailable as `checkpoint_pod`."""
        there = await in_thread(self._database.find, _new_id("checkpoint", key))
        if there is None or not there.node:
            return ""
        if actions.unfiled(there):
            now = self._clock()
            action = replace(
                there, status=Status.INITIALIZED, updated_at=now, expires_at=self._expiry(),
                provisional=False, code="", message="", hint="", retry=False, details={},
            )  # fmt: skip
            await self._file(action, _command_of(action))
        return there.action_id

    async def restore_pod(self, wanted: RestorePod, key: str = "", *, avoid: str = "") -> str:
        """File a restore of the checkpoint that this action made, on the node that suits it best; the new action's id. Errors as
        `checkpoint_pod`, BadCommand for an action that made none."""
        self._insist_cluster(wanted.cluster_id)
        made = await self._made(wanted.action_id)
        if not made.host:  # its node has begun it by itself
            made = replace(made, host=await self._host(made.node))
        given = wanted.overrides
        overrides = _checked(given.model_dump(exclude_none=True) if given else {})
        command = RestoreCommand(
            action_id=_new_id("restore", key), checkpoint_id=made.checkpoint_id, reason=wanted.reason, overrides=overrides,
            expires_at=self._expiry(), pod_spec=await in_thread(self._database.pod_spec, made.action_id),
        )  # fmt: skip
        if not command.overrides.directory and (directory := made.overrides.get("directory")):
            command = command.model_copy(update={"overrides": overrides.model_copy(update={"directory": directory})})
        _insist_encodable(command)
        if key and await self._is_filed(command.action_id):
            return command.action_id
        action = self._new(
            command, namespace=made.namespace, pod_name=overrides.pod_name or made.pod_name, pod_id=made.pod_id, kind=made.kind,
            source=made.action_id,
        )  # fmt: skip
        try:
            nodes = await self.nodes()
        except BusUnavailable as e:
            raise await self._lost(action, e, new=True) from e
        await self._insist_gone(action, nodes.values(), avoid)
        rules = {"shared": self._settings.api.shared_file_stores, "pod": bool(command.pod_spec)}
        node = placing.choose(made, list(nodes.values()), avoid=avoid, **rules)
        return await self._file(replace(action, node=node.node, host=_host_of(node)), command)

    async def _insist_gone(self, action: Action, nodes: Iterable[NodeRecord], leaving: str) -> None:
        """A pod does not run twice. What a node has said of itself some seconds ago it is asked again; of one that is leaving its
        checkpoint has ended the pod."""
        mine = (action.namespace or "default", action.pod_name)
        for record in nodes:
            if record.node != leaving and any(mine == (pod.namespace, pod.name) for pod in record.workloads):
                try:
                    target = Target(namespace=mine[0], pod_name=mine[1])
                    node, found = await self._find(target)
                except NotFound:
                    continue
                raise Refused(
                    "running", f"{target} runs on node {node}", prop="target", found=f"{node}: {found.uid}", wanted="on no node",
                    hint="stop it first, or give it another name: overrides.pod_name",
                )  # fmt: skip
        if action.pod_name and (other := await in_thread(self._database.restoring, self.cluster, *mine, action.action_id)):
            raise actions.being_restored("/".join(mine), other)

    async def _made(self, action_id: str) -> Action:
        made = await self._known(action_id)
        if made is None:
            raise BadCommand(
                f"there is no action {action_id[:100]!r}", hint="`GET /v2/checkpoints` lists what can be restored",
                property="action_id", found=action_id[:100], wanted="the action of a checkpoint",
            )  # fmt: skip
        for prop, found, want in (
            ("type", made.type, "checkpoint"),
            ("status", made.status.value, Status.READY.value),
            ("deleted", bool(made.deleted_at), False),
        ):
            if found != want:
                raise Refused(
                    "not_restorable", f"action {action_id} made no checkpoint that can be restored: its {prop} is {found}", prop=prop,
                    found=found, wanted=want, hint="`GET /v2/checkpoints` lists what can be restored",
                )  # fmt: skip
        return made

    def _new(self, command: ActionCommand, **facts: Any) -> Action:
        now = self._clock()
        overrides = command.overrides.model_dump(exclude_defaults=True)
        return Action(
            action_id=command.action_id, checkpoint_id=command.checkpoint_id, type=command.type, status=Status.INITIALIZED,
            created_at=now, updated_at=now, cluster=self.cluster, reason=command.reason, overrides=overrides,
            expires_at=command.expires_at, **facts,
        )  # fmt: skip

    async def _file(self, action: Action, command: ActionCommand) -> str:
        """Into the database, then into the stream."""
        source = action.source if action.type == "restore" else ""
        if not await in_thread(self._database.add, action, source):  # the same key twice: at the same time, or after a failure
            again = await in_thread(self._database.file_again, action)
            if again is None:
                return action.action_id
            action = again
        try:
            await self._bus.send(action.node, command.type, action.action_id, wire.encode_command(command))
        except BusUnavailable as e:
            raise await self._lost(action, e, new=False) from e
        _log.info("filed", action=action.action_id, type=action.type, pod=action.pod, node=action.node, reason=action.reason)
        return action.action_id

    async def _lost(self, action: Action, error: HibernodeError, *, new: bool) -> BusUnavailable:
        """The action is told, not lost."""

        def rule(now: Action) -> Action:
            return actions.failed(now, error.code, error.message, "is the broker up? Give the command again", self._clock())

        if new:
            await in_thread(self._database.add, rule(action))
        else:
            await in_thread(self._database.move, action.action_id, rule)
        _log.warning("the event stream does not answer", action=action.action_id, type=action.type, error=error.message)
        return BusUnavailable(
            f"the event stream does not answer: {error.message}", hint="is the broker up? Give the command again",
            action_id=action.action_id, status=Status.ERROR.value,
        )  # fmt: skip

    async def cancel(self, action_id: str) -> None:
        """Ask its node to stop it. Returns when the command is filed; the action's status says how it ended."""
        action = await self.action(action_id)
        if action.status.terminal and not action.provisional:
            raise Refused(
                "ended", f"action {action_id} has ended", prop="status", found=action.status.value, wanted="an action at work",
            )  # fmt: skip
        if not action.node:
            raise Refused("no_node", f"action {action_id} never came to a node", prop="node", found="none", wanted="a node")
        command = CancelCommand(action_id=action_id)
        await self._bus.send(action.node, "cancel", action_id, wire.encode_command(command))
        _log.info("cancel filed", action=action_id, node=action.node)

    # --- looking ------------------------------------------------------------------------------------------------------------

    async def action(self, action_id: str) -> Action:
        found = await self._known(action_id)
        if found is None:
            raise NotFound(
                f"there is no action {action_id[:100]!r}", hint="`GET /v2/actions` lists them", action_id=action_id[:100]
            )
        return found

    async def _known(self, action_id: str) -> Action | None:
        known_as = action_id.lower()  # UUIDs have one spelling here, and more elsewhere
        return await in_thread(self._database.find, known_as) if wire.UUID.fullmatch(known_as) else None

    async def nodes(self, node: str = "") -> dict[str, NodeRecord]:
        """Every node that is alive, or this one if it is, by name, as it said of itself within the last seconds."""
        return await in_thread(_decoded, await self._bus.nodes(node))  # half a second's work of 10,000

    async def upload(self, given: CheckpointStatusWithPodSpec) -> str:
        """Keep what came with it; NotFound if the action is unknown, or what is said of it makes no sense."""
        action = await self.action(given.action_id)
        status = _known_status(given.status)
        if given.pod_id and not wire.NAME.fullmatch(given.pod_id):
            raise NotFound("no pod has such a UID", property="pod_id", found=given.pod_id[:100], wanted=wire.NAME.pattern)
        kept = {name: _kept(name, getattr(given, name)) for name in ("pod_spec", "pod_metadata_spec", "persistent_volume_claim")}
        upload = Upload(action.action_id, given.pod_id or "", **kept)
        if not await in_thread(self._database.upload, upload, status, self._clock()):
            raise NotFound(f"there is no action {given.action_id!r}", action_id=given.action_id)
        return action.action_id

    async def delete(self, made: Action) -> None:
        """Take a checkpoint out of its store. It is not listed any more from now on; a node that reaches the store does the rest, and
        leaves it as long as somebody reads it."""
        if await in_thread(self._database.mark_deleted, made.action_id, self._clock()):
            await self.purge(made)

    async def purge(self, made: Action) -> None:
        """The second half of a delete; again until the command is in the stream."""
        nodes = await self.nodes()
        node = placing.reaching(made, list(nodes.values()), shared=self._settings.api.shared_file_stores)
        command = DeleteCommand(
            action_id=made.action_id, checkpoint_id=made.checkpoint_id, directory=made.overrides.get("directory", "")
        )
        await self._bus.send(node.node, "delete", made.action_id, wire.encode_command(command))
        await in_thread(self._database.note_purged, made.action_id, self._clock())
        _log.info("delete filed", action=made.action_id, node=node.node, location=made.location)

    async def room_elsewhere(self, node: str, workload: WorkloadView) -> None:
        """Refused("no_node") if no other node could take this workload now."""
        nodes = await self.nodes()
        if (record := nodes.get(node)) is None:
            return
        now, action_id = self._clock(), str(uuid.uuid4())
        made = Action(
            action_id, action_id, "checkpoint", Status.READY, now, now, self.cluster, node=node, host=_host_of(record),
            profile={"raw_bytes": workload.rss}, location=f"{record.store.rstrip('/')}/{action_id}",
        )  # fmt: skip
        rules = {"shared": self._settings.api.shared_file_stores, "pod": workload.kind == "pod"}
        placing.choose(made, list(nodes.values()), avoid=node, **rules)

    async def running_on(self, node: str, namespace: str, name: str, uid: str) -> WorkloadView | None:
        """What it is on that node, if the node says that it has it."""
        target = Target(pod_id=uid) if uid else Target(namespace=namespace, pod_name=name)
        answers = await self._bus.find(wire.encode_find(target), self._settings.api.find_timeout)
        for data in answers:
            with contextlib.suppress(BadCommand):
                who, views = wire.decode_found(data)
                if who == node and views:
                    return views[0]
        return None

    # --- parts --------------------------------------------------------------------------------------------------------------

    async def _is_filed(self, action_id: str) -> bool:
        """It is there, and its command surely is in the stream."""
        there = await in_thread(self._database.find, action_id)
        return there is not None and not actions.unfiled(there)

    def _expiry(self) -> float:
        return self._clock() + self._settings.api.expires_after

    def _insist_cluster(self, cluster_id: str) -> None:
        if cluster_id and cluster_id != self.cluster:
            raise BadCommand(
                f"this is the control plane of cluster {self.cluster!r}", property="cluster_id", found=cluster_id[:100],
                wanted=self.cluster, hint="leave it out",
            )  # fmt: skip

    async def _find(self, target: Target) -> tuple[str, WorkloadView]:
        """The one node that has it, and what it is there."""
        # One UID is one pod: the first who answers has it. A name may be there twice, which only time can tell.
        enough = 1 if target.pod_id else 0
        answers = await self._bus.find(wire.encode_find(target), self._settings.api.find_timeout, enough=enough)
        found: list[tuple[str, WorkloadView]] = []
        for data in answers:
            try:
                node, views = wire.decode_found(data)
            except BadCommand as e:
                _log.warning("an answer cannot be read", error=str(e))
            else:
                found += [(node, view) for view in views]
        if not found:
            raise NotFound(
                f"no node has {target}", hint="`GET /v2/nodes` shows what runs where; names are exact, a UID is sure",
                property="target", found="on no node", wanted=str(target),
            )  # fmt: skip
        if len(found) > 1:
            places = [f"{node}: {view.namespace}/{view.name} {view.uid}" for node, view in found]
            raise Refused(
                "ambiguous", f"{target} is there {len(found)} times", prop="target", found=places[:20], wanted="one of them",
                hint="give its pod_id",
            )  # fmt: skip
        return found[0]

    async def _host(self, node: str) -> dict[str, Any]:
        record = (await self.nodes(node)).get(node)
        return _host_of(record) if record is not None else {}


def _host_of(record: NodeRecord) -> dict[str, Any]:
    facts: dict[str, Any] = {"arch": record.arch, "kernel": record.kernel, "criu": record.criu, "store": record.store}
    facts["cpu_flags"] = record.cpu_flags
    found = record.gpu_inventory
    # Where it is not known what there is the key is absent: an action may not say "none" then.
    if not found.known:
        return facts
    return {**facts, "gpus": [gpu.name or "unknown" for gpu in found.gpus], "gpu_driver": found.driver}


def _placed(action: Action, node: str, host: dict[str, Any], workload: WorkloadView) -> Action:
    return replace(action, node=node, host=host, namespace=workload.namespace, pod_name=workload.name, pod_id=workload.uid)


def _new_id(verb: str, key: str) -> str:
    return str(uuid.uuid5(_SPACE, f"{verb} {key}")) if key else str(uuid.uuid4())


def _command_of(filed: Action) -> CheckpointCommand:
    """Of a checkpoint, as it was filed."""
    target = Target(pod_id=filed.pod_id) if filed.pod_id else Target(namespace=filed.namespace, pod_name=filed.pod_name)
    return CheckpointCommand.model_validate(
        {
            "action_id": filed.action_id, "checkpoint_id": filed.checkpoint_id, "target": target, "kind": filed.kind,
            "reason": filed.reason, "overrides": Overrides(**filed.overrides), "expires_at": filed.expires_at,
        }
    )  # fmt: skip


def _target(wanted: CheckpointPod) -> Target:
    if wanted.pod_id:
        return Target(pod_id=wanted.pod_id)
    if not wanted.pod_name:
        raise BadCommand(
            "the request names no pod", hint="give pod_id, or namespace and pod_name", property="pod_id, pod_name", found="nothing",
            wanted="one of them",
        )  # fmt: skip
    return Target(namespace=wanted.namespace or "default", pod_name=wanted.pod_name)


def _insist_same(wanted: CheckpointPod, found: WorkloadView) -> None:
    """Who gives a UID and a name means one pod."""
    for prop, want, have in (("pod_name", wanted.pod_name, found.name), ("namespace", wanted.namespace, found.namespace)):
        if want and want != have:
            raise BadCommand(
                f"pod {found.uid} has another {prop}",
                property=prop,
                found=want[:100],
                wanted=have,
                hint="leave it out, or the UID",
            )


def _checked(given: dict[str, Any]) -> Overrides:
    """What a node would refuse whatever its configuration says is refused here."""
    overrides = Overrides(**given)
    if overrides.criu_opts:
        _parsed("criu_opts", CriuOpts, overrides.criu_opts)
    if overrides.compression:
        try:
            Transfer(compression=overrides.compression)
        except ValidationError:
            raise BadCommand(
                "overrides.compression is not known", property="overrides.compression", found=overrides.compression[:100],
                wanted="zstd, zstd:<level from -7 to 19>, lz4 or none",
            ) from None  # fmt: skip
    directory = overrides.directory
    if directory and not (
        directory.startswith(("s3://", "file:///")) and directory.isprintable()
    ):  # no answer could say the others
        raise BadCommand(
            "overrides.directory is no store", property="overrides.directory", found=directory[:100],
            wanted="s3://bucket/prefix or file:///path",
        )  # fmt: skip
    return overrides


def _parsed(prop: str, shape: type[CriuOpts], text: str) -> None:
    try:
        shape.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise BadCommand(
            f"{prop}: {key or 'the text'}: {first['msg'].lower()}", property=f"overrides.{prop}.{key}".rstrip("."),
            found=str(first.get("input"))[:100], wanted="one of " + ", ".join(shape.model_fields),
            hint='a JSON object in a string, for example {"tcp": "close", "leave_running": false}',
        ) from None  # fmt: skip


def _insist_encodable(command: ActionCommand) -> None:
    """A node reads it as strictly: what it would not take is refused here, with the same words."""
    wire.decode_command(wire.verb_of(command), wire.encode_command(command))


def _kept(name: str, value: object) -> str | None:
    if value is None:
        return None
    try:
        return dumps(value)
    except ValueError as e:  # Python reads NaN where JSON has none
        raise NotFound(f"{name} is no JSON: {e}", property=name, found="NaN or a number without end", wanted="JSON") from e


def _known_status(text: str) -> Status:
    try:
        return Status(text)
    except ValueError:
        raise NotFound(
            f"there is no status {text[:100]!r}", property="status", found=text[:100], wanted=", ".join(Status)
        ) from None


def _decoded(records: Mapping[str, bytes]) -> dict[str, NodeRecord]:
    """Without those that cannot be read, and those of nodes that say they are others."""
    found: dict[str, NodeRecord] = {}
    for name, data in records.items():
        try:
            record = wire.decode_node(data)
        except BadCommand as e:
            _log.warning("a node's record cannot be read", node_of_record=name, error=str(e))
        else:
            if record.node == name:
                found[name] = record
    return found
