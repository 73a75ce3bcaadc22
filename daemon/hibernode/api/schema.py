"""The shapes of requests and answers: the contract's, by its names, and what this server adds to them.

What is asked for is read strictly: a key that nobody knows is an error, because an option that is ignored in silence is a checkpoint made
otherwise than somebody thinks. Answers may have more keys in a later version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeAliasType

from hibernode.api.actions import Action as Row
from hibernode.api.db import Heartbeat as HeartbeatRow
from hibernode.api.db import Move as MoveRow
from hibernode.model import MAX_STREAMS, NodeRecord, Progress, printable
from hibernode.wire import LATEST

# Named types, so that the document has them under the contract's names.
CheckpointKind = TypeAliasType("CheckpointKind", Literal["simple", "rootfs", "rootfsonly"])
CheckpointReason = TypeAliasType("CheckpointReason", Literal["heartbeat", "manual"])
RestoreReason = TypeAliasType("RestoreReason", Literal["nodeTermination", "nodeUnschedulable", "manual"])
CheckpointOperationStatus = TypeAliasType(
    "CheckpointOperationStatus", Literal["initialized", "processing", "checkpoint_created", "ready", "error", "not_found"]
)


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


# --- requests ---------------------------------------------------------------------------------------------------------------


class CheckpointOverrides(Request):
    """What one checkpoint may choose for itself."""

    asynchronous: bool = Field(default=False, description="The node's slot is free as soon as the workload runs on")
    compression: str | None = Field(default=None, description="zstd, zstd:<level>, lz4 or none")
    criu_opts: str | None = Field(default=None, description="A JSON object in a string; only documented keys")
    directory: str | None = Field(default=None, description="A store that the node allows, or a place under one")
    streams: int = Field(
        default=0, ge=0, le=MAX_STREAMS, description="1 to 64; 0: as the node thinks good", json_schema_extra={"format": "int32"}
    )


class RestoreOverrides(Request):
    criu_opts: str | None = None
    pod_name: str | None = Field(default=None, description="The name it comes back under")


class CheckpointPod(Request):
    """Which pod, by `pod_id` (its UID) or by `namespace` and `pod_name`, and how."""

    action_id: str | None = Field(default=None, json_schema_extra={"readOnly": True})
    cluster_id: str | None = None
    kind: CheckpointKind = "simple"
    namespace: str | None = None
    overrides: CheckpointOverrides | None = None
    pod_id: str | None = None
    pod_name: str | None = None
    reason: CheckpointReason = "manual"


class RestorePod(Request):
    """Which checkpoint, by the action that made it, and how."""

    action_id: str
    cluster_id: str = ""
    overrides: RestoreOverrides | None = None
    reason: RestoreReason


class CheckpointStatusWithPodSpec(Request):
    """What is to be kept with an action, so that its pod can be made again."""

    action_id: str
    persistent_volume_claim: Any = None
    pod_id: str | None = None
    pod_metadata_spec: Any = None
    pod_spec: Any = None
    status: str


class NodeLeave(Request):
    """Why the node's pods go elsewhere."""

    reason: Literal["nodeTermination", "nodeUnschedulable"]


class HeartbeatPolicy(Request):
    """A pod that is checkpointed again and again: by UID, or by namespace and name."""

    namespace: str = "default"
    pod_name: str = ""
    pod_id: str = ""
    interval: float = Field(ge=10, le=86400 * 366, description="Seconds from one checkpoint to the next")
    keep_last: int = Field(default=0, ge=0, le=10_000, description="How many ready ones stay; 0: all")


# --- answers ----------------------------------------------------------------------------------------------------------------


class ApiError(Answer):
    """What went wrong. `details` has a stable `code`, and where it helps `hint`, `property`, `found` and `wanted`."""

    code: str | None = Field(default=None, description="HTTP status code")
    details: Any = None
    message: str


class StatusResponse(Answer):
    details: str | None = None
    status: CheckpointOperationStatus


class ProgressView(Answer):
    """How far a running action is."""

    phase: str
    bytes_done: int
    bytes_total: int
    stored_bytes: int
    seconds: float


class Action(Answer):
    """One action. `total_duration` and `pause_ns` are nanoseconds, sizes bytes."""

    action_id: str = Field(json_schema_extra={"format": "uuid"})
    action_timestamp: datetime | None = None
    checkpoint_completed_timestamp: datetime | None = None
    checkpoint_id: str = Field(json_schema_extra={"format": "uuid"})
    details: Any
    gpu: str
    node_name: str | None = None
    platform: str
    reason: str | None = None
    status: str
    total_duration: int | None = Field(default=None, json_schema_extra={"format": "int64"})
    total_io: int | None = Field(default=None, json_schema_extra={"format": "int64"})
    type: str
    updated_timestamp: datetime | None = None
    kind: str | None = None
    namespace: str | None = None
    pod_name: str | None = None
    pod_id: str | None = None
    pause_ns: int | None = None
    raw_bytes: int | None = None
    stored_bytes: int | None = None
    location: str | None = Field(default=None, description="Of a checkpoint that is ready: where it is")
    source_action_id: str | None = Field(default=None, description="Of a restore: the action whose checkpoint it brings back")
    provisional: bool = Field(
        default=False, description="The status is the control plane's own word until the node says how it is"
    )
    progress: ProgressView | None = None


class EventView(Answer):
    """A change of an action's status."""

    seq: int
    status: str
    timestamp: datetime | None
    code: str
    message: str
    hint: str
    details: Any


class PhaseView(Answer):
    name: str
    seconds: float
    bytes: int


class ActionDetails(Action):
    """One action with all that is known of it."""

    events: list[EventView]
    phases: list[PhaseView]
    unaccounted: float | None = Field(default=None, description="Seconds that belong to no phase")
    zero_bytes: int | None = None
    streams: int | None = None
    overrides: Any = None


class Checkpoint(Answer):
    """A checkpoint that can be restored."""

    checkpoint_id: str
    action_id: str
    namespace: str | None
    pod_name: str | None
    pod_id: str | None
    node_name: str | None
    location: str | None
    kind: str
    reason: str
    raw_bytes: int | None
    stored_bytes: int | None
    zero_bytes: int | None
    pause_ns: int | None
    checkpoint_completed_timestamp: datetime | None
    platform: str
    gpu: str


class WorkloadOfNode(Answer):
    kind: str
    namespace: str
    name: str
    uid: str
    pid: int
    rss: int
    processes: int
    started_timestamp: datetime | None


class GpuOfNode(Answer):
    """What is null is not known; `unknown` says why, by field. Sizes are bytes."""

    index: int
    uuid: str
    name: str
    compute_capability: str
    memory_total: int | None
    memory_used: int | None
    mig: bool | None
    processes: int | None
    unknown: dict[str, str]


class HeartbeatOfNode(Answer):
    """What a pod asks for by its annotations."""

    namespace: str
    pod_name: str
    pod_id: str
    interval: float
    keep_last: int
    problem: str = Field(description="What is wrong with the annotations: then there is no heartbeat; empty: nothing")


class NodeView(Answer):
    """What a node last said of itself."""

    name: str
    cluster: str
    alive: bool
    seen_timestamp: datetime | None
    version: str
    arch: str
    kernel: str
    criu: str
    store: str
    cpus: int
    memory_total: int
    memory_available: int
    load: float
    actions: int
    gpus: list[GpuOfNode]
    gpu_driver: str = Field(description="Version of NVIDIA's driver; empty: none, or not known")
    gpu_reason: str = Field(description="Why there are no GPUs, or why `gpus` may not be all there is; empty: it is")
    workloads: list[WorkloadOfNode]
    heartbeats: list[HeartbeatOfNode] = Field(description="What its pods ask for by their annotations")


class Move(Answer):
    """One pod on its way from a node that leaves."""

    namespace: str
    pod_name: str
    pod_id: str
    checkpoint_action_id: str | None
    restore_action_id: str | None
    state: str
    message: str


class Heartbeat(Answer):
    """A pod that is checkpointed again and again."""

    heartbeat_id: str
    namespace: str | None
    pod_name: str | None
    pod_id: str | None
    interval: float
    keep_last: int
    configured: bool = Field(description="By the server's configuration")
    annotated: bool = Field(description="By the pod's own annotations")
    next_timestamp: datetime | None
    last_action_id: str | None
    message: str | None = Field(description="Why the last turn was left out")


class Health(Answer):
    ready: bool
    checks: dict[str, str]


# --- from what we have ------------------------------------------------------------------------------------------------------


def sayable(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON can hold it."""
    return {key: printable(each) for key, each in value.items()}


def moment(seconds: float) -> datetime | None:
    """None for what is no moment: a node's clock can say anything."""
    return datetime.fromtimestamp(seconds, UTC) if 0 < seconds < LATEST else None


def platform_of(row: Row) -> str:
    return f"linux/{row.host['arch']}" if row.host.get("arch") else "unknown"


def gpu_of(row: Row) -> str:
    """The GPUs of its node when the action was filed: `2 × NVIDIA H100`."""
    if "gpus" not in row.host:
        return "unknown"
    return ", ".join(f"{count} × {name}" for name, count in Counter(row.host["gpus"]).items()) or "none"


def _details(row: Row) -> dict[str, Any] | None:
    if not row.code and not row.message:
        return None
    return {"code": row.code, "message": row.message, "hint": row.hint, "retry": row.retry, **row.details}


def _facts(row: Row, progress: Progress | None) -> dict[str, Any]:
    # A profile counts from 0: where nothing has been moved yet there is nothing to tell.
    profile = row.profile if row.profile.get("raw_bytes") else {**row.profile, "raw_bytes": None, "stored_bytes": None}
    running = progress if progress is not None and not row.status.terminal else None
    return {
        "action_id": row.action_id,
        "action_timestamp": moment(row.created_at),
        "checkpoint_completed_timestamp": moment(row.completed_at),
        "checkpoint_id": row.checkpoint_id,
        "details": _details(row),
        "gpu": gpu_of(row),
        "node_name": row.node or None,
        "platform": platform_of(row),
        "reason": row.reason,
        "status": row.status.value,
        "total_duration": profile.get("total_duration"),
        "total_io": profile.get("total_io"),
        "type": row.type,
        "updated_timestamp": moment(row.updated_at),
        "kind": row.kind,
        "namespace": row.namespace or None,
        "pod_name": row.pod_name or None,
        "pod_id": row.pod_id or None,
        "pause_ns": profile.get("pause_ns") if row.type == "checkpoint" else None,
        "raw_bytes": profile.get("raw_bytes"),
        "stored_bytes": profile.get("stored_bytes"),
        "location": row.location or None,
        "source_action_id": row.source or None,
        "provisional": row.provisional,
        "progress": _progress(running) if running else None,
    }


def _progress(progress: Progress) -> ProgressView:
    return ProgressView(**progress.model_dump(exclude={"action_id"}))


def action(row: Row, progress: Progress | None = None) -> Action:
    return Action(**_facts(row, progress))


def action_details(row: Row, events: Sequence[Mapping[str, Any]], progress: Progress | None = None) -> ActionDetails:
    profile = row.profile
    return ActionDetails(
        **_facts(row, progress),
        events=[
            EventView(
                timestamp=moment(event["time"]), **{key: event[key] for key in EventView.model_fields if key != "timestamp"}
            )
            for event in events
        ],
        phases=[PhaseView(name=name, **cost) for name, cost in profile.get("phases", {}).items()],
        unaccounted=profile.get("unaccounted"),
        zero_bytes=profile.get("zero_bytes") if profile.get("raw_bytes") else None,
        streams=profile.get("streams"),
        overrides=row.overrides,
    )


def checkpoint(row: Row) -> Checkpoint:
    facts = _facts(row, None)
    return Checkpoint(
        **{key: facts[key] for key in Checkpoint.model_fields if key in facts}, zero_bytes=row.profile.get("zero_bytes")
    )


def node(record: NodeRecord, seen_at: float, *, alive: bool) -> NodeView:
    facts = record.model_dump(include=set(NodeView.model_fields) & set(NodeRecord.model_fields) - {"workloads", "heartbeats"})
    found = record.gpu_inventory
    return NodeView(
        **facts,
        name=record.node,
        alive=alive,
        seen_timestamp=moment(seen_at),
        gpus=[GpuOfNode(**gpu.model_dump(include=set(GpuOfNode.model_fields))) for gpu in found.gpus],
        gpu_driver=found.driver,
        gpu_reason=found.reason,
        workloads=[
            WorkloadOfNode(**each.model_dump(include=set(WorkloadOfNode.model_fields)), started_timestamp=moment(each.started_at))
            for each in record.workloads
        ],
        heartbeats=[
            HeartbeatOfNode(
                namespace=wish.namespace, pod_name=wish.name, pod_id=wish.uid, interval=wish.interval, keep_last=wish.keep_last,
                problem=wish.problem,
            )
            for wish in record.heartbeats
        ],
    )  # fmt: skip


def move(row: MoveRow) -> Move:
    return Move(
        namespace=row.namespace,
        pod_name=row.pod_name,
        pod_id=row.pod_id,
        checkpoint_action_id=row.checkpoint_action_id or None,
        restore_action_id=row.restore_action_id or None,
        state=row.state,
        message=row.message,
    )


def heartbeat(row: HeartbeatRow) -> Heartbeat:
    return Heartbeat(
        heartbeat_id=row.heartbeat_id,
        namespace=row.namespace or None,
        pod_name=row.pod_name or None,
        pod_id=row.pod_id or None,
        interval=row.interval,
        keep_last=row.keep_last,
        configured=row.configured,
        annotated=row.annotated,
        next_timestamp=moment(row.next_at),
        last_action_id=row.last_action_id or None,
        message=row.message or None,
    )
