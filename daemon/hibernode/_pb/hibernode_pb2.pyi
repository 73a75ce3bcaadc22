from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Target(_message.Message):
    __slots__ = ("pod_id", "namespace", "pod_name", "pid", "container")
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    pod_id: str
    namespace: str
    pod_name: str
    pid: int
    container: str
    def __init__(self, pod_id: _Optional[str] = ..., namespace: _Optional[str] = ..., pod_name: _Optional[str] = ..., pid: _Optional[int] = ..., container: _Optional[str] = ...) -> None: ...

class Overrides(_message.Message):
    __slots__ = ("asynchronous", "compression", "criu_opts", "directory", "streams", "pod_name")
    ASYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    CRIU_OPTS_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    POD_NAME_FIELD_NUMBER: _ClassVar[int]
    asynchronous: bool
    compression: str
    criu_opts: str
    directory: str
    streams: int
    pod_name: str
    def __init__(self, asynchronous: _Optional[bool] = ..., compression: _Optional[str] = ..., criu_opts: _Optional[str] = ..., directory: _Optional[str] = ..., streams: _Optional[int] = ..., pod_name: _Optional[str] = ...) -> None: ...

class CheckpointCommand(_message.Message):
    __slots__ = ("action_id", "checkpoint_id", "target", "kind", "reason", "overrides", "expires_at")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    checkpoint_id: str
    target: Target
    kind: str
    reason: str
    overrides: Overrides
    expires_at: float
    def __init__(self, action_id: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., target: _Optional[_Union[Target, _Mapping[str, object]]] = ..., kind: _Optional[str] = ..., reason: _Optional[str] = ..., overrides: _Optional[_Union[Overrides, _Mapping[str, object]]] = ..., expires_at: _Optional[float] = ...) -> None: ...

class RestoreCommand(_message.Message):
    __slots__ = ("action_id", "checkpoint_id", "reason", "overrides", "expires_at", "pod_id", "pod_spec")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    POD_SPEC_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    checkpoint_id: str
    reason: str
    overrides: Overrides
    expires_at: float
    pod_id: str
    pod_spec: str
    def __init__(self, action_id: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., reason: _Optional[str] = ..., overrides: _Optional[_Union[Overrides, _Mapping[str, object]]] = ..., expires_at: _Optional[float] = ..., pod_id: _Optional[str] = ..., pod_spec: _Optional[str] = ...) -> None: ...

class CancelCommand(_message.Message):
    __slots__ = ("action_id",)
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    def __init__(self, action_id: _Optional[str] = ...) -> None: ...

class DeleteCommand(_message.Message):
    __slots__ = ("action_id", "checkpoint_id", "directory")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    checkpoint_id: str
    directory: str
    def __init__(self, action_id: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., directory: _Optional[str] = ...) -> None: ...

class PhaseCost(_message.Message):
    __slots__ = ("seconds", "bytes")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    bytes: int
    def __init__(self, seconds: _Optional[float] = ..., bytes: _Optional[int] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("phases", "unaccounted", "pause_ns", "gpu_ns", "total_duration", "total_io", "raw_bytes", "zero_bytes", "stored_bytes", "streams")
    class PhasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: PhaseCost
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[PhaseCost, _Mapping[str, object]]] = ...) -> None: ...
    PHASES_FIELD_NUMBER: _ClassVar[int]
    UNACCOUNTED_FIELD_NUMBER: _ClassVar[int]
    PAUSE_NS_FIELD_NUMBER: _ClassVar[int]
    GPU_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_DURATION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_IO_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    ZERO_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    phases: _containers.MessageMap[str, PhaseCost]
    unaccounted: float
    pause_ns: int
    gpu_ns: int
    total_duration: int
    total_io: int
    raw_bytes: int
    zero_bytes: int
    stored_bytes: int
    streams: int
    def __init__(self, phases: _Optional[_Mapping[str, PhaseCost]] = ..., unaccounted: _Optional[float] = ..., pause_ns: _Optional[int] = ..., gpu_ns: _Optional[int] = ..., total_duration: _Optional[int] = ..., total_io: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., zero_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., streams: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("action_id", "seq", "type", "status", "checkpoint_id", "node", "time", "code", "message", "hint", "details", "retry", "profile", "pod_spec")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    POD_SPEC_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    seq: int
    type: str
    status: str
    checkpoint_id: str
    node: str
    time: float
    code: str
    message: str
    hint: str
    details: _struct_pb2.Struct
    retry: bool
    profile: Profile
    pod_spec: str
    def __init__(self, action_id: _Optional[str] = ..., seq: _Optional[int] = ..., type: _Optional[str] = ..., status: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., node: _Optional[str] = ..., time: _Optional[float] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., details: _Optional[_Union[_struct_pb2.Struct, _Mapping[str, object]]] = ..., retry: _Optional[bool] = ..., profile: _Optional[_Union[Profile, _Mapping[str, object]]] = ..., pod_spec: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("action_id", "phase", "bytes_done", "bytes_total", "stored_bytes", "seconds")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    phase: str
    bytes_done: int
    bytes_total: int
    stored_bytes: int
    seconds: float
    def __init__(self, action_id: _Optional[str] = ..., phase: _Optional[str] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class FindRequest(_message.Message):
    __slots__ = ("target",)
    TARGET_FIELD_NUMBER: _ClassVar[int]
    target: Target
    def __init__(self, target: _Optional[_Union[Target, _Mapping[str, object]]] = ...) -> None: ...

class FindReply(_message.Message):
    __slots__ = ("node", "workloads")
    NODE_FIELD_NUMBER: _ClassVar[int]
    WORKLOADS_FIELD_NUMBER: _ClassVar[int]
    node: str
    workloads: _containers.RepeatedCompositeFieldContainer[Workload]
    def __init__(self, node: _Optional[str] = ..., workloads: _Optional[_Iterable[_Union[Workload, _Mapping[str, object]]]] = ...) -> None: ...

class Workload(_message.Message):
    __slots__ = ("kind", "namespace", "name", "uid", "pid", "state", "command", "rss", "processes", "log", "started_at", "moves")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    RSS_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    namespace: str
    name: str
    uid: str
    pid: int
    state: str
    command: str
    rss: int
    processes: int
    log: str
    started_at: float
    moves: bool
    def __init__(self, kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., uid: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., command: _Optional[str] = ..., rss: _Optional[int] = ..., processes: _Optional[int] = ..., log: _Optional[str] = ..., started_at: _Optional[float] = ..., moves: _Optional[bool] = ...) -> None: ...

class Gpu(_message.Message):
    __slots__ = ("index", "uuid", "name", "bus_id", "minor", "compute_capability", "memory_total", "memory_used", "memory_free", "mig", "persistence", "compute_mode", "processes", "mps_processes", "ecc_uncorrected", "rows_pending", "rows_failed", "unknown")
    class UnknownEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    INDEX_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUS_ID_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_FIELD_NUMBER: _ClassVar[int]
    MIG_FIELD_NUMBER: _ClassVar[int]
    PERSISTENCE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MODE_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    MPS_PROCESSES_FIELD_NUMBER: _ClassVar[int]
    ECC_UNCORRECTED_FIELD_NUMBER: _ClassVar[int]
    ROWS_PENDING_FIELD_NUMBER: _ClassVar[int]
    ROWS_FAILED_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    index: int
    uuid: str
    name: str
    bus_id: str
    minor: int
    compute_capability: str
    memory_total: int
    memory_used: int
    memory_free: int
    mig: bool
    persistence: bool
    compute_mode: str
    processes: int
    mps_processes: int
    ecc_uncorrected: int
    rows_pending: bool
    rows_failed: bool
    unknown: _containers.ScalarMap[str, str]
    def __init__(self, index: _Optional[int] = ..., uuid: _Optional[str] = ..., name: _Optional[str] = ..., bus_id: _Optional[str] = ..., minor: _Optional[int] = ..., compute_capability: _Optional[str] = ..., memory_total: _Optional[int] = ..., memory_used: _Optional[int] = ..., memory_free: _Optional[int] = ..., mig: _Optional[bool] = ..., persistence: _Optional[bool] = ..., compute_mode: _Optional[str] = ..., processes: _Optional[int] = ..., mps_processes: _Optional[int] = ..., ecc_uncorrected: _Optional[int] = ..., rows_pending: _Optional[bool] = ..., rows_failed: _Optional[bool] = ..., unknown: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GpuInventory(_message.Message):
    __slots__ = ("state", "reason", "driver", "cuda", "gpus")
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    CUDA_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    state: str
    reason: str
    driver: str
    cuda: str
    gpus: _containers.RepeatedCompositeFieldContainer[Gpu]
    def __init__(self, state: _Optional[str] = ..., reason: _Optional[str] = ..., driver: _Optional[str] = ..., cuda: _Optional[str] = ..., gpus: _Optional[_Iterable[_Union[Gpu, _Mapping[str, object]]]] = ...) -> None: ...

class HeartbeatWish(_message.Message):
    __slots__ = ("namespace", "name", "uid", "since", "interval", "keep_last", "problem")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    KEEP_LAST_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    name: str
    uid: str
    since: float
    interval: float
    keep_last: int
    problem: str
    def __init__(self, namespace: _Optional[str] = ..., name: _Optional[str] = ..., uid: _Optional[str] = ..., since: _Optional[float] = ..., interval: _Optional[float] = ..., keep_last: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class NodeRecord(_message.Message):
    __slots__ = ("node", "cluster", "version", "arch", "kernel", "criu", "store", "cpus", "memory_total", "memory_available", "load", "actions", "time", "arena_bytes", "workloads", "gpu_inventory", "cpu_flags", "heartbeats", "makes_pods")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ARCH_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    CRIU_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORKLOADS_FIELD_NUMBER: _ClassVar[int]
    GPU_INVENTORY_FIELD_NUMBER: _ClassVar[int]
    CPU_FLAGS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEATS_FIELD_NUMBER: _ClassVar[int]
    MAKES_PODS_FIELD_NUMBER: _ClassVar[int]
    node: str
    cluster: str
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
    time: float
    arena_bytes: int
    workloads: _containers.RepeatedCompositeFieldContainer[Workload]
    gpu_inventory: GpuInventory
    cpu_flags: _containers.RepeatedScalarFieldContainer[str]
    heartbeats: _containers.RepeatedCompositeFieldContainer[HeartbeatWish]
    makes_pods: bool
    def __init__(self, node: _Optional[str] = ..., cluster: _Optional[str] = ..., version: _Optional[str] = ..., arch: _Optional[str] = ..., kernel: _Optional[str] = ..., criu: _Optional[str] = ..., store: _Optional[str] = ..., cpus: _Optional[int] = ..., memory_total: _Optional[int] = ..., memory_available: _Optional[int] = ..., load: _Optional[float] = ..., actions: _Optional[int] = ..., time: _Optional[float] = ..., arena_bytes: _Optional[int] = ..., workloads: _Optional[_Iterable[_Union[Workload, _Mapping[str, object]]]] = ..., gpu_inventory: _Optional[_Union[GpuInventory, _Mapping[str, object]]] = ..., cpu_flags: _Optional[_Iterable[str]] = ..., heartbeats: _Optional[_Iterable[_Union[HeartbeatWish, _Mapping[str, object]]]] = ..., makes_pods: _Optional[bool] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("event", "progress")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    event: Event
    progress: Progress
    def __init__(self, event: _Optional[_Union[Event, _Mapping[str, object]]] = ..., progress: _Optional[_Union[Progress, _Mapping[str, object]]] = ...) -> None: ...

class ActionId(_message.Message):
    __slots__ = ("action_id",)
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    def __init__(self, action_id: _Optional[str] = ...) -> None: ...

class Action(_message.Message):
    __slots__ = ("action_id", "checkpoint_id", "type", "status", "phase", "target", "began_at", "ended_at", "last")
    ACTION_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    BEGAN_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    action_id: str
    checkpoint_id: str
    type: str
    status: str
    phase: str
    target: str
    began_at: float
    ended_at: float
    last: Event
    def __init__(self, action_id: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., type: _Optional[str] = ..., status: _Optional[str] = ..., phase: _Optional[str] = ..., target: _Optional[str] = ..., began_at: _Optional[float] = ..., ended_at: _Optional[float] = ..., last: _Optional[_Union[Event, _Mapping[str, object]]] = ...) -> None: ...

class Actions(_message.Message):
    __slots__ = ("actions",)
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    actions: _containers.RepeatedCompositeFieldContainer[Action]
    def __init__(self, actions: _Optional[_Iterable[_Union[Action, _Mapping[str, object]]]] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ("found",)
    FOUND_FIELD_NUMBER: _ClassVar[int]
    found: bool
    def __init__(self, found: _Optional[bool] = ...) -> None: ...

class RunRequest(_message.Message):
    __slots__ = ("name", "namespace", "argv", "cwd", "env")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ARGV_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    name: str
    namespace: str
    argv: _containers.RepeatedScalarFieldContainer[str]
    cwd: str
    env: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., namespace: _Optional[str] = ..., argv: _Optional[_Iterable[str]] = ..., cwd: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("name", "namespace", "signal")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    namespace: str
    signal: str
    def __init__(self, name: _Optional[str] = ..., namespace: _Optional[str] = ..., signal: _Optional[str] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("checkpoint_id", "workload", "kind", "node", "created_at", "raw_bytes", "stored_bytes", "pause_ns", "images", "streams", "bases")
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAUSE_NS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    BASES_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    workload: str
    kind: str
    node: str
    created_at: float
    raw_bytes: int
    stored_bytes: int
    pause_ns: int
    images: int
    streams: int
    bases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, checkpoint_id: _Optional[str] = ..., workload: _Optional[str] = ..., kind: _Optional[str] = ..., node: _Optional[str] = ..., created_at: _Optional[float] = ..., raw_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., pause_ns: _Optional[int] = ..., images: _Optional[int] = ..., streams: _Optional[int] = ..., bases: _Optional[_Iterable[str]] = ...) -> None: ...

class Checkpoints(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping[str, object]]]] = ...) -> None: ...

class CheckpointId(_message.Message):
    __slots__ = ("checkpoint_id",)
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    def __init__(self, checkpoint_id: _Optional[str] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("manifest", "location")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    manifest: str
    location: str
    def __init__(self, manifest: _Optional[str] = ..., location: _Optional[str] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("ok", "bytes", "frames", "seconds", "code", "message")
    OK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    bytes: int
    frames: int
    seconds: float
    code: str
    message: str
    def __init__(self, ok: _Optional[bool] = ..., bytes: _Optional[int] = ..., frames: _Optional[int] = ..., seconds: _Optional[float] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class GarbageRequest(_message.Message):
    __slots__ = ("apply", "directory", "grace", "keep_last", "keep_days")
    APPLY_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    KEEP_LAST_FIELD_NUMBER: _ClassVar[int]
    KEEP_DAYS_FIELD_NUMBER: _ClassVar[int]
    apply: bool
    directory: str
    grace: float
    keep_last: int
    keep_days: float
    def __init__(self, apply: _Optional[bool] = ..., directory: _Optional[str] = ..., grace: _Optional[float] = ..., keep_last: _Optional[int] = ..., keep_days: _Optional[float] = ...) -> None: ...

class Garbage(_message.Message):
    __slots__ = ("what", "checkpoint_id", "key", "bytes", "age", "reason", "workload", "state", "code", "message")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WORKLOAD_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    what: str
    checkpoint_id: str
    key: str
    bytes: int
    age: float
    reason: str
    workload: str
    state: str
    code: str
    message: str
    def __init__(self, what: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., key: _Optional[str] = ..., bytes: _Optional[int] = ..., age: _Optional[float] = ..., reason: _Optional[str] = ..., workload: _Optional[str] = ..., state: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Check(_message.Message):
    __slots__ = ("name", "ok", "found", "hint", "required")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    name: str
    ok: bool
    found: str
    hint: str
    required: bool
    def __init__(self, name: _Optional[str] = ..., ok: _Optional[bool] = ..., found: _Optional[str] = ..., hint: _Optional[str] = ..., required: _Optional[bool] = ...) -> None: ...

class DoctorReply(_message.Message):
    __slots__ = ("checks",)
    CHECKS_FIELD_NUMBER: _ClassVar[int]
    checks: _containers.RepeatedCompositeFieldContainer[Check]
    def __init__(self, checks: _Optional[_Iterable[_Union[Check, _Mapping[str, object]]]] = ...) -> None: ...

class Workloads(_message.Message):
    __slots__ = ("workloads",)
    WORKLOADS_FIELD_NUMBER: _ClassVar[int]
    workloads: _containers.RepeatedCompositeFieldContainer[Workload]
    def __init__(self, workloads: _Optional[_Iterable[_Union[Workload, _Mapping[str, object]]]] = ...) -> None: ...

class Nodes(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeRecord]
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodeRecord, _Mapping[str, object]]]] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
