"""Everything that comes from the broker, and the protobufs' way into the same gate: BadCommand, or a value that comes back as it was.
Of a command also what is read before anything is frozen: its options and its store, which may be Refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from fuzz.edits import edited
from fuzz.feed import Feed
from fuzz.guard import guarded, require, root
from hibernode import preflight, wire
from hibernode._pb import hibernode_pb2 as pb
from hibernode.config import Config
from hibernode.errors import BadCommand, Refused
from hibernode.model import (
    MAX_STREAMS,
    CancelCommand,
    CheckpointCommand,
    DeleteCommand,
    Event,
    Gpu,
    GpuInventory,
    NodeRecord,
    Overrides,
    PhaseCost,
    Profile,
    Progress,
    RestoreCommand,
    Status,
    Target,
    WorkloadView,
)
from hibernode.ports import Store
from hibernode.service import store_opener

MAX_LENGTH = 16384
_ID, _OTHER = "0b1f7a52-3c44-4f0e-8a6b-5d9e1c2f3a40", "6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10"
_RAW, _EDITED, _BINARY, _MANY = 0, 1, 2, 3


@dataclass(frozen=True)
class _Door:
    """One kind of message: how it is read, how it is written again, a good one, and its protobuf's way in."""

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]
    good: bytes
    message: type[Message] | None = None
    from_pb: Callable[[Any], Any] | None = None


_CHECKPOINT = CheckpointCommand(
    action_id=_ID,
    checkpoint_id=_OTHER,
    target=Target(namespace="default", pod_name="trainer"),
    overrides=Overrides(compression="zstd:3", criu_opts='{"tcp": "close"}', directory="file:///tmp/x", streams=4),
    expires_at=1764000000.5,
)
_RESTORE = RestoreCommand(action_id=_ID, checkpoint_id=_OTHER, overrides=Overrides(pod_name="again"))
_EVENT = Event(
    action_id=_ID, seq=3, type="checkpoint", status=Status.ERROR, checkpoint_id=_OTHER, node="node-a", time=1764000000.25,
    code="refused", message="no", hint="yes", details={"found": [1, {"deep": None}], "wanted": 2.5}, retry=True,
    profile=Profile(phases={"dumping": PhaseCost(seconds=0.5, bytes=4096)}, pause_ns=7),
)  # fmt: skip
_PROGRESS = Progress(action_id=_ID, phase="shipping", bytes_done=1, bytes_total=2, stored_bytes=1, seconds=0.5)
_WORKLOAD = WorkloadView(kind="job", namespace="default", name="trainer", uid=_ID, pid=7, command="python train.py", rss=1 << 33)
_NODE = NodeRecord(
    node="a", cluster="default", version="0.1.0", arch="x86_64", kernel="6.8", criu="4.2.1", store="file:///s", cpus=2,
    memory_total=1 << 40, memory_available=1 << 39, load=0.5, actions=1, time=1764000000.0, arena_bytes=1 << 29,
    workloads=[_WORKLOAD],
    gpu_inventory=GpuInventory(state="ok", gpus=[Gpu(index=0, name="H100", memory_used=1 << 33, mig=False, unknown={"minor": "why"})]),
)  # fmt: skip


def _command(verb: str, good: bytes, message: type[Message]) -> _Door:
    return _Door(lambda data: wire.decode_command(verb, data), wire.encode_command, good, message, wire.command_from_pb)


_DOORS = (
    _command("checkpoint", wire.encode_command(_CHECKPOINT), pb.CheckpointCommand),
    _command("restore", wire.encode_command(_RESTORE), pb.RestoreCommand),
    _command("cancel", wire.encode_command(CancelCommand(action_id=_ID)), pb.CancelCommand),
    _command("delete", wire.encode_command(DeleteCommand(action_id=_ID, checkpoint_id=_OTHER)), pb.DeleteCommand),
    _Door(wire.decode_find, wire.encode_find, wire.encode_find(Target(pod_name="trainer")), pb.Target, wire.target_from_pb),
    _Door(
        wire.decode_found, lambda found: wire.encode_found(*found), wire.encode_found("a", [_WORKLOAD]), pb.Workload,
        wire.workload_from_pb,
    ),
    _Door(wire.decode_node, wire.encode_node, wire.encode_node(_NODE), pb.NodeRecord, wire.node_from_pb),
    _Door(wire.decode_event, wire.encode_event, wire.encode_event(_EVENT), pb.Event, wire.event_from_pb),
    _Door(wire.decode_progress, wire.encode_progress, wire.encode_progress(_PROGRESS), pb.Progress, wire.progress_from_pb),
)  # fmt: skip


def one(data: bytes) -> None:
    feed = Feed(data)
    door, how = feed.pick(_DOORS), feed.below(4)
    if how == _BINARY and door.message is not None and door.from_pb is not None:
        _binary(door.message, door.from_pb, feed.rest())
        return
    raw = feed.rest() if how == _RAW else _many(feed) if how == _MANY else edited(json.loads(door.good), feed)
    with guarded(BadCommand, Refused):
        value = door.read(raw)
        again = door.read(door.write(value))
        if isinstance(value, Event) and "dropped" in again.details:  # that one would have been too long for the broker
            require(len(door.write(value)) <= wire.EVENT_LIMIT, "an event that no broker takes")
        else:
            require(again == value, f"{repr(value)[:300]} does not come back")
        if isinstance(value, CheckpointCommand | RestoreCommand):
            _begin(value.overrides)


def _begin(overrides: Overrides) -> None:
    config, opener = _node()
    made = preflight.options(overrides, config, 2)
    require(1 <= made.streams <= MAX_STREAMS and made.criu.ghost_limit <= 1 << 30, f"options {made}")
    store = opener(overrides.directory)
    require(
        store.location == config.store.url or store.location.startswith(f"{config.store.url}/"), f"the store {store.location}"
    )


@functools.cache
def _node() -> tuple[Config, Callable[[str], Store]]:
    config = Config.model_validate({"store": {"url": f"file://{root()}/store"}})
    return config, store_opener(config)


def _binary(message: type[Message], from_pb: Callable[[Any], Any], raw: bytes) -> None:
    with guarded(BadCommand):
        try:
            parsed = message.FromString(raw)
        except DecodeError:
            return  # gRPC itself says no to these
        from_pb(parsed)


def _many(feed: Feed) -> bytes:
    """An object of very many keys, as long as a message can be and a little longer."""
    keys = _keys(1 + feed.below(8))
    count = feed.very_many(1 << 16, 1 << 8)
    last = keys[feed.below(count)] if count and feed.byte() % 2 else '"x":0'
    return ("{" + ",".join([*keys[:count], last]) + "}").encode()


@functools.cache
def _keys(width: int) -> list[str]:
    return [f'"{n:0{width}}":0' for n in range(1 << 16)]


def seeds() -> dict[str, bytes]:
    made = {}
    for n, door in enumerate(_DOORS):
        made[f"{n}-raw"] = bytes([n, _RAW]) + door.good
        made[f"{n}-edited"] = bytes([n, _EDITED]) + bytes(range(40))
    for n, message in enumerate((wire.command_to_pb(_CHECKPOINT), wire.command_to_pb(_RESTORE))):
        made[f"{n}-binary"] = bytes([n, _BINARY]) + message.SerializeToString()
    made["6-binary"] = bytes([6, _BINARY]) + wire.event_to_pb(_EVENT).SerializeToString()
    made["3-binary"] = bytes([3, _BINARY]) + wire.target_to_pb(Target(pid=7)).SerializeToString()
    return made
