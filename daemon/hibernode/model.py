"""The nouns: commands, targets, manifests, events. Values only: no I/O, no threads, nothing mutable but `Cancel` and `Meter`.

What comes from outside (commands, manifests) is parsed into these strictly: an unknown key, a wrong type or a value out of range
is an error here and nowhere later.
"""

from __future__ import annotations

import operator
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, model_validator

from hibernode.errors import BadCommand, Cancelled, HibernodeError

PAGE = 4096  # bytes; x86-64 and the only page size format version 1 knows
FRAME_PAGES = 1024  # pages of one frame at most: 4 MiB, the size of one arena chunk
MAX_STREAMS = 64
MAX_TASKS = 100_000  # processes of one image
MAX_ENTRIES = 2_000_000  # of one writable layer: a minute and a half of pause, if all are small files
MAX_LISTED = 500  # workloads in a node's record: under 400 KiB with the longest names, of the 1 MiB that a broker takes
MAX_WISHES = 250  # and heartbeats that its pods ask for: under 250 KiB more; a kubelet has 110 pods, where nobody says otherwise
MAX_GPUS = 64  # of one node; NVIDIA's driver takes 32
MAX_DIGESTED = 1 << 28  # pages, 1 TiB of memory: 4 GiB of digests; of a larger image there are none, and it is nobody's base
MAX_BASES = 64  # other checkpoints whose pages one image may have
FORMAT_VERSION = 3  # the newest that is read; 1 or 2 is written where that is enough

_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
Id = Annotated[str, StringConstraints(pattern=rf"^{_UUID}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Long = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # what a message can hold


class Value(BaseModel):
    """A frozen, strict value: unknown keys, wrong types, and floats that are no numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Status(StrEnum):
    """Of an action; it only moves forward, and READY and ERROR end it."""

    INITIALIZED = "initialized"
    PROCESSING = "processing"
    CHECKPOINT_CREATED = "checkpoint_created"
    READY = "ready"
    ERROR = "error"

    @property
    def terminal(self) -> bool:
        return self in (Status.READY, Status.ERROR)

    @property
    def rank(self) -> int:
        """How far it is: of two statuses of one action the later has the greater one. Both ends have the same."""
        return _RANKS[self]


_RANKS = {Status.INITIALIZED: 0, Status.PROCESSING: 1, Status.CHECKPOINT_CREATED: 2, Status.READY: 3, Status.ERROR: 3}


Kind = Literal["simple", "rootfs", "rootfsonly"]
Reason = Literal["manual", "heartbeat", "nodeTermination", "nodeUnschedulable"]
ActionType = Literal["checkpoint", "restore"]


POD_SPEC_LIMIT = 256 << 10  # bytes: it has to fit into a message. Most have 10 KiB; an API server takes 1.5 MiB
PodSpec = Annotated[str, StringConstraints(max_length=POD_SPEC_LIMIT)]


class Target(Value):
    """Who is meant: a pod by UID, or by namespace and name (exact, never a prefix), a process by pid, or a container of runc by its id.
    Exactly one of them."""

    pod_id: str = ""
    namespace: str = ""
    pod_name: str = ""
    pid: int = 0
    container: str = ""

    def __str__(self) -> str:
        if self.pid:
            return f"pid {self.pid}"
        if self.container:
            return f"container {self.container}"
        return f"pod {self.pod_id}" if self.pod_id else f"pod {self.namespace or 'default'}/{self.pod_name}"


class Overrides(Value):
    """What one command may choose for itself. Empty or 0 means: what the node's configuration says."""

    asynchronous: bool = False
    compression: str = ""
    criu_opts: str = ""
    directory: str = ""
    streams: int = 0
    pod_name: str = ""


class CriuOpts(Value):
    """The documented keys of `criu_opts`. `tcp` says what becomes of established connections: the checkpoint is refused, they are
    closed in the restored workload, or they are restored (which needs the same addresses). None: as the node is configured."""

    tcp: Literal["refuse", "close", "established"] | None = None
    leave_running: bool = True  # False: killed after the checkpoint is ready
    shell_job: bool = True
    ext_unix_sk: bool = False
    file_locks: bool = True
    link_remap: bool = False
    ghost_limit: Annotated[int, Field(ge=0, le=1 << 30)] | None = None  # bytes of one deleted-but-open file
    timeout: Annotated[int, Field(ge=1, le=86400)] | None = None  # seconds CRIU gives the tree to stop
    # Of a checkpoint, and not kept in its manifest: whose pages are not stored again. "auto": of the last one of this workload that can
    # be had; or a checkpoint id. None: "auto" for a heartbeat, else "none".
    increment: Annotated[str, StringConstraints(pattern=rf"^(auto|none|{_UUID})$")] | None = Field(
        default=None, exclude_if=operator.not_
    )
    # When the tree runs: with all its memory, or before its pages are there. Of one command alone: no checkpoint keeps it.
    restore: Annotated[Literal["eager", "lazy"] | None, Field(exclude_if=operator.not_)] = None


class CheckpointCommand(Value):
    action_id: Id
    checkpoint_id: Id
    target: Target
    kind: Kind = "simple"
    reason: Reason = "manual"
    overrides: Overrides = Overrides()
    expires_at: float = 0.0  # seconds since the epoch; 0 = never

    @property
    def type(self) -> ActionType:
        return "checkpoint"


class RestoreCommand(Value):
    """`pod_id`: of a pod that is being made and waits for it. Else, for the checkpoint of a pod, one is made of `pod_spec`, as Event has
    it."""

    action_id: Id
    checkpoint_id: Id
    pod_id: Annotated[str, StringConstraints(max_length=253)] = ""
    reason: Reason = "manual"
    overrides: Overrides = Overrides()
    expires_at: float = 0.0
    pod_spec: PodSpec = ""

    @property
    def type(self) -> ActionType:
        return "restore"


class CancelCommand(Value):
    action_id: Id


class DeleteCommand(Value):
    """Take a checkpoint out of its store. `action_id` made it. No action: there are no events."""

    action_id: Id
    checkpoint_id: Id
    directory: str = ""  # as in Overrides


ActionCommand = CheckpointCommand | RestoreCommand
Command = CheckpointCommand | RestoreCommand | CancelCommand | DeleteCommand


class PhaseCost(Value):
    seconds: float
    bytes: Long = 0


class Profile(Value):
    """Where the time and the bytes of an action went. Phase seconds and `unaccounted` add up to `total_duration`."""

    phases: dict[str, PhaseCost] = Field(default_factory=dict)  # `{}` would be copied for each, at a price
    unaccounted: float = 0.0  # seconds
    pause_ns: Long = 0  # the time the workload was frozen, its GPU's included
    gpu_ns: Long = 0  # of that, what saving GPU state and bringing it back took
    total_duration: Long = 0  # nanoseconds
    total_io: Long = 0  # bytes written to or read from the store
    raw_bytes: Long = 0  # memory pages in the image
    zero_bytes: Long = 0  # of these, pages that hold only zeros and are not stored
    stored_bytes: Long = 0  # what they take in the store, after compression
    streams: Long = 0


class Event(Value):
    """One change of an action's status. `seq` counts up from 1 per action; a terminal event comes exactly once. `pod_spec`: of a pod of a
    cluster, when its checkpoint is made: JSON with its `metadata` and `spec`."""

    action_id: Id
    seq: Long
    type: ActionType
    status: Status
    checkpoint_id: str
    node: str
    time: float
    code: str = ""
    message: str = ""
    hint: str = ""
    details: dict[str, object] = Field(default_factory=dict)
    retry: bool = False
    profile: Profile | None = None
    pod_spec: PodSpec = ""


class Progress(Value):
    """How far an action is; lossy, a few times a second."""

    action_id: Id
    phase: str
    bytes_done: int
    bytes_total: int  # an estimate until the dump is over; 0 = unknown
    stored_bytes: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How an action ended: for the journal, the event, and whoever asks again."""

    status: Status
    code: str = "ok"
    message: str = ""
    hint: str = ""
    details: Mapping[str, object] = field(default_factory=dict)
    retry: bool = False
    profile: Profile | None = None
    pod_spec: str = ""
    unfinished: bool = False  # somebody may still stand still: the page stays open

    @classmethod
    def of(cls, error: HibernodeError, profile: Profile | None = None) -> Outcome:
        details = {key: printable(value) for key, value in error.details.items()}
        return cls(Status.ERROR, error.code, _encodable(error.message), _encodable(error.hint), details, error.retry, profile)


def printable(value: object) -> object:
    """What can be said in JSON: file names may hold bytes that are no text, and details anything at all."""
    match value:
        case None | bool() | int() | float():
            return value
        case list() | tuple():
            return [printable(item) for item in value]
        case dict():
            return {_encodable(str(key)): printable(item) for key, item in value.items()}
        case _:
            return _encodable(str(value))


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


# --- what is in the store ---------------------------------------------------------------------------------------------------

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,7}")


def checked_key(key: str) -> str:
    """`key`, if every store can hold it: one to eight names, none hidden, none `..`, nothing absolute. Else BadCommand."""
    if not is_key(key):
        raise BadCommand(f"{key[:200]!r} is no object key", property="key", found=key[:200], wanted=_KEY.pattern)
    return key


def is_key(text: str) -> bool:
    """Whether `checked_key` takes it: stores list nothing else, whatever others have put beside our objects."""
    return _KEY.fullmatch(text) is not None


def checked_prefix(prefix: str) -> str:
    """`prefix`, if it is empty or how a key can begin. Else BadCommand."""
    if prefix:
        checked_key(prefix.removesuffix("/"))
    return prefix


class ObjectRef(Value):
    """One object of a checkpoint: where (relative to the checkpoint's prefix), how long, and the BLAKE3 of all its bytes."""

    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,2}$")]
    size: Count
    digest: Digest


class StreamRef(ObjectRef):
    """One `pages-<n>.zst`. Its digest is the BLAKE3 of its frames' digests in order, then its seek table (`format.stream_digest`)."""

    frames: Count


class TaskFacts(Value):
    """One process of a tree, as CRIU dumped it: these pids and thread ids must be free where it is restored."""

    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    ppid: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    comm: Annotated[str, StringConstraints(max_length=64)] = ""
    # FailFast: an enemy's list has a hundred thousand errors, and one will do.
    threads: Annotated[list[Annotated[int, Field(gt=0, lt=1 << 31)]], Field(max_length=100_000), FailFast()] = []
    dead: bool = False  # a zombie, and restored as one


class PagesRef(Value):
    """Pages in the store: streams of frames, and the index that says which page lies where."""

    name: Name
    pages: Count  # in all, zero pages included
    zero_pages: Count
    streams: Annotated[list[StreamRef], Field(max_length=MAX_STREAMS)]
    index: ObjectRef
    # Frames whose floats are stored in planes (`transfer/planes.py`). From format version 2 on; with none it is not written.
    in_planes: Annotated[Count, Field(exclude_if=operator.not_)] = 0
    # Pages that are stored in other checkpoints, and which of these have which is in the index. From version 3 on, as the next.
    referenced: Annotated[Count, Field(exclude_if=operator.not_)] = 0
    digests: Annotated[ObjectRef | None, Field(exclude_if=operator.not_)] = (
        None  # of its own pages: a later one may refer to them
    )
    # Frames that are LZ4's. From format version 3 on; with none it is not written.
    in_lz4: Annotated[Count, Field(exclude_if=operator.not_)] = 0

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        """All that it consists of."""
        return (*self.streams, self.index, *([self.digests] if self.digests else []))


class WrappedKey(Value):
    """The data key of an encrypted checkpoint, as only the holder of another key can read it."""

    cipher: Literal["AES-256-GCM"]
    key: Annotated[str, StringConstraints(max_length=1024)]  # which one wrapped it, in words of the keyring
    wrapped: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/=]{1,8192}$")]  # base64


class BaseRef(PagesRef):
    """Another checkpoint that stores pages of this one, with all that is needed to read and compare them."""

    checkpoint_id: Id
    encryption: WrappedKey | None = None


class ImageRef(PagesRef):
    """Everything needed to restore one process tree. Its pages are memory. `bases` in the order in which the index counts them: all that
    store pages of it, so that no restore has to follow one checkpoint to the next."""

    bases: Annotated[list[BaseRef], Field(max_length=MAX_BASES, exclude_if=operator.not_), FailFast()] = []
    tasks: Annotated[list[TaskFacts], Field(min_length=1, max_length=MAX_TASKS), FailFast()]
    files: ObjectRef  # images.tar.zst
    files_bytes: Count = 0  # what is in it, unpacked; 0: by a writer that did not say yet

    @property
    def objects(self) -> tuple[ObjectRef, ...]:
        return (*super().objects, self.files)


class LayerRef(PagesRef):
    """The writable layer of the container `name`. Its pages are those of a tar, the last one filled up with zeros."""

    bytes: Count  # of the tar
    entries: Annotated[int, Field(ge=1, le=MAX_ENTRIES)]  # files, directories, what was deleted: all that it names


CpuFlags = Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(max_length=2000), FailFast()]

_OF_BOTH = (
    "pni ssse3 cx16 movbe popcnt aes pclmulqdq xsave xsaveopt xsavec xgetbv1 f16c fma rdrand rdseed rdtscp lahf_lm abm "
    "bmi1 bmi2 adx fsgsbase ospke clflushopt clwb gfni vaes vpclmulqdq rdpid user_shstk apx"
)
_OF_INTEL = "rtm tsxldtrk mpx movdiri movdir64b enqcmd serialize waitpkg cmpccxadd sm3 sm4"
_OF_AMD = "3dnow 3dnowext misalignsse xop fma4 tbm lwp clzero mwaitx rdpru"
_SETS = frozenset(f"{_OF_BOTH} {_OF_INTEL} {_OF_AMD}".split())
_FAMILIES = ("sse", "avx", "amx_", "sha")  # also of those that are still to come


def lacking(made: Iterable[str], here: Iterable[str]) -> list[str]:
    """Instruction sets that a process of a CPU with the flags `made` may use, and one with the flags `here` has not; in order of name.

    A program looks once, as it starts, at what its CPU has (glibc's ifuncs, OpenBLAS, NVIDIA's libraries) and goes on with that wherever
    it is restored: its first missing instruction is a SIGILL, perhaps days later. So all that user space can execute counts, used or not.

    Flags are the names in /proc/cpuinfo (Linux, arch/x86/include/asm/cpufeatures.h). Which of them are instructions: the manuals of Intel
    (volume 2, "CPUID feature flag" of each instruction) and AMD (APM volume 3, appendix D), the levels of the x86-64 psABI, and what CRIU
    compares with `--cpu-cap ins`, which knows none since AVX-512VL: no AMX, VNNI, GFNI or VAES. Two of these are more than instructions:
    `ospke` (protection keys) and `user_shstk` (shadow stacks) are state of a process that only such a kernel can hold.

    What does not count: what every x86-64 CPU has (SSE2 and below); hints that others ignore, and what is only faster (hle,
    3dnowprefetch, cldemote, erms, fsrm, rep_good); what only a kernel can execute or see (monitor, xsaves, invpcid, smap, wbnoinvd);
    mitigations, virtualisation, power, clocks. Any flag that is not known here does not count either."""
    return sorted(flag for flag in set(made) - set(here) if flag in _SETS or flag.startswith(_FAMILIES))


class HostFacts(Value):
    """Where an image was made. A restore compares arch, page size, CRIU's version and the CPU's instruction sets before it touches
    anything; the rest is for people."""

    arch: str
    kernel: str
    page_size: Count
    criu_version: Count  # as CRIU counts: 40201 is 4.2.1
    cpu_model: str = ""
    cpu_flags: CpuFlags = []  # as /proc/cpuinfo names them; none: by a writer that did not say yet
    hibernode: str = ""


class ContainerFacts(Value):
    """One container of a pod, as its runtime told of it."""

    name: Name  # of its image, too
    image: Annotated[str, StringConstraints(max_length=1024)] = ""  # as the pod's manifest named it
    image_ref: Annotated[str, StringConstraints(max_length=1024)] = ""  # by digest


WorkloadKind = Literal["process", "job", "container", "pod"]


class WorkloadFacts(Value):
    """What was checkpointed, and what its driver needs to bring it back."""

    kind: WorkloadKind
    name: Annotated[str, StringConstraints(max_length=253)]
    namespace: Annotated[str, StringConstraints(max_length=253)] = "default"
    uid: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{0,64}$")] = ""  # becomes a file name
    logs: dict[str, str] = {}  # of a job: path at the time of the dump -> "log"
    argv: list[str] = []
    cwd: str = ""
    containers: Annotated[list[ContainerFacts], Field(max_length=64)] = []  # of a pod, those that ran
    kubelet: bool = False  # a kubelet has made the pod, and starts anew what ends in it

    @property
    def contained(self) -> bool:
        """Its processes have pids of their own, and so take none of the machine's."""
        return self.kind in ("container", "pod")


Uuid = Annotated[str, StringConstraints(pattern=r"^GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]  # of a GPU


class GpuCard(Value):
    """A GPU as a restore compares it."""

    uuid: Uuid
    name: Annotated[str, StringConstraints(max_length=200)]
    compute_capability: Annotated[str, StringConstraints(max_length=200)]  # 9.0
    memory_total: Count  # bytes


class GpuProcess(Value):
    """A process whose GPU state is in its own memory, in that image."""

    image: Name = "main"
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]  # as `TaskFacts` has it
    gpus: dict[Uuid, Count] = Field(default_factory=dict)  # on which it had a context, with bytes; empty: not known


class GpuImage(Value):
    """What has to be brought back onto GPUs when CRIU has brought back the rest."""

    driver: Annotated[str, StringConstraints(max_length=200)]  # 580.65.06
    cards: Annotated[list[GpuCard], Field(max_length=64)]  # all of the node: the driver's map has to name every one
    processes: Annotated[list[GpuProcess], Field(min_length=1, max_length=MAX_TASKS), FailFast()]
    # Pids, as `TaskFacts` has them, of who was stopped for the dump and comes back so; the owner's own stops are not here.
    halted: Annotated[list[Annotated[int, Field(gt=0, lt=1 << 31)]], Field(max_length=MAX_TASKS), FailFast()] = []

    @property
    def memory(self) -> int:
        """Bytes, as far as they are known."""
        return sum(sum(process.gpus.values()) for process in self.processes)


class Signature(Value):
    """Of a manifest, by ed25519."""

    key: Digest  # whose: SHA-256 of the public key's 32 bytes
    ed25519: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class Manifest(Value):
    """The last object written. A checkpoint without it does not exist."""

    format_version: int
    checkpoint_id: Id
    action_id: Id
    created_at: float
    node: str
    kind: Kind
    reason: Reason
    workload: WorkloadFacts
    host: HostFacts
    compression: str
    criu_opts: CriuOpts = CriuOpts()
    pause_ns: Count
    raw_bytes: Count
    zero_bytes: Count
    stored_bytes: Count
    images: Annotated[list[ImageRef], Field(max_length=64), FailFast()]
    layers: Annotated[
        list[LayerRef], Field(max_length=64), FailFast()
    ] = []  # one for each container whose writable layer was saved
    encryption: WrappedKey | None = None  # None: what is stored is not encrypted
    gpu: GpuImage | None = None  # None: no process of it used a GPU

    @model_validator(mode="after")
    def _has_what_its_kind_says(self) -> Self:
        if bool(self.images) == (self.kind == "rootfsonly"):
            raise ValueError("rootfsonly, and nothing else, is without an image of processes")
        if not self.layers and self.kind == "rootfsonly":
            raise ValueError("rootfsonly is one writable layer at least")
        if self.layers and self.kind == "simple":
            raise ValueError("simple is without writable layers")
        return self

    @property
    def parts(self) -> tuple[ImageRef | LayerRef, ...]:
        return (*self.images, *self.layers)

    @property
    def bases(self) -> tuple[BaseRef, ...]:
        """Of all its images."""
        return tuple(base for image in self.images for base in image.bases)


# --- what people ask for ------------------------------------------------------------------------------------------------


class ActionView(Value):
    """One action as this node knows it."""

    action_id: str
    checkpoint_id: str
    type: ActionType
    status: Status
    phase: str
    target: str
    began_at: float  # seconds since the epoch
    ended_at: float = 0.0
    last: Event | None = None


class WorkloadView(Value):
    """A managed job, a pod, or what somebody asked about."""

    kind: WorkloadKind
    namespace: str
    name: str
    uid: str = ""
    pid: int = 0  # of the root; 0 when it does not run
    state: str = "running"  # running, exited, killed
    command: str = ""
    rss: int = 0  # bytes, the whole tree
    processes: int = 0
    log: str = ""
    started_at: float = 0.0
    moves: bool = False  # of a pod: it asks to go on elsewhere when its node leaves


class Check(Value):
    """One line of `doctor`."""

    name: str
    ok: bool
    found: str
    hint: str = ""  # how to mend it
    required: bool = True


class Verdict(Value):
    """How far a verification is, and at its end what it found."""

    ok: bool
    bytes: int
    frames: int
    seconds: float
    code: str = ""
    message: str = ""


class GarbageRequest(Value):
    """A `gc`: of which store, by which rules (None: as this node is configured), and whether anything is removed."""

    apply: bool = False
    directory: str = ""
    grace: Annotated[float, Field(ge=0)] | None = None  # seconds
    keep_last: Annotated[int, Field(ge=0)] | None = None
    keep_days: Annotated[float, Field(ge=0)] | None = None


class Garbage(Value):
    """Something that `gc` has found: to be removed, or worth telling that it stays."""

    what: Literal["upload", "attempt", "checkpoint", "mark"]  # a mark: of a reference, which tells `key`
    checkpoint_id: str
    key: str = ""  # of an upload, or a mark
    bytes: int = 0  # an upload's are not known
    age: float  # seconds
    reason: Literal[
        "orphaned_upload", "no_manifest", "beyond_last", "too_old", "unwanted", "no_referrer", "unreadable", "foreign"
    ]
    workload: str = ""  # namespace/name, or the process's name
    state: Literal["found", "removed", "in_use", "failed", "kept"]
    code: str = ""  # why it failed, or cannot be read
    message: str = ""


Said = Annotated[str, StringConstraints(max_length=256)]  # by a driver, of itself


class Gpu(Value):
    """One NVIDIA GPU as its driver tells of it. None, or empty text, is unknown and never zero; `unknown` says why, by field."""

    index: Annotated[int, Field(ge=0, lt=1 << 31)]  # NVML's, in the order of bus ids; CUDA may count in another
    uuid: Said = ""
    name: Said = ""
    bus_id: Said = ""  # 0000:3b:00.0
    minor: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None  # of /dev/nvidia<minor>
    compute_capability: Said = ""  # 9.0
    memory_total: Count | None = None  # bytes
    memory_used: Count | None = None  # what the driver reserves included
    memory_free: Count | None = None
    mig: bool | None = None
    persistence: bool | None = None
    compute_mode: Said = ""  # default, exclusive_process, prohibited
    processes: Annotated[int, Field(ge=0, lt=1 << 31)] | None = (
        None  # with a CUDA context, as NVML lists them: some may be missing
    )
    mps_processes: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    ecc_uncorrected: Count | None = None  # errors since the driver was loaded
    rows_pending: bool | None = None  # rows of its memory are remapped at the next reset
    rows_failed: bool | None = None  # one could not be
    unknown: dict[Said, Said] = Field(default_factory=dict)


class GpuInventory(Value):
    """The GPUs of a machine. No GPU is a healthy machine; not to know is something else, and `reason` says what.

    `state`: ok; absent (no NVIDIA driver); else what keeps NVML from telling: bindings (its package), library, mismatch (with the kernel's
    driver), unloaded (that one), silent (it does not answer), failed, untold (by the node). Then `gpus` is what could be had without, or,
    of a silent one, how they were."""

    state: Said = "untold"
    reason: Said = "the node does not say"
    driver: Said = ""  # 580.65.06
    cuda: Said = ""  # 13.0, the newest that the driver takes
    gpus: Annotated[list[Gpu], Field(max_length=MAX_GPUS), FailFast()] = []

    @property
    def known(self) -> bool:
        """`gpus` is all there is, as it is now."""
        return self.state in ("ok", "absent")

    @property
    def mps(self) -> bool | None:
        """Whether a process uses one of them through MPS."""
        counts = [gpu.mps_processes for gpu in self.gpus]
        return True if any(counts) else None if None in counts or not self.known else False


class HeartbeatWish(Value):
    """A pod asks by its annotations to be checkpointed again and again. `problem`: what is wrong with them; then it is not."""

    namespace: str
    name: str
    uid: str
    since: float = 0.0  # seconds since the epoch: when it was made
    interval: float = 0.0  # seconds
    keep_last: int = 0
    problem: str = ""


class NodeRecord(Value):
    """What a node tells the others about itself."""

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
    workloads: Annotated[list[WorkloadView], FailFast()] = []  # managed and running; without command and log
    gpu_inventory: GpuInventory = GpuInventory()
    cpu_flags: CpuFlags = []  # as in HostFacts
    heartbeats: Annotated[list[HeartbeatWish], FailFast()] = []  # of pods that run
    makes_pods: bool = False  # it knows an API server, which makes the pods that restores need


class JobSpec(Value):
    """A managed job to start: a pod of this node without Kubernetes."""

    name: Name
    namespace: Name = "default"
    argv: Annotated[list[str], Field(min_length=1)]
    cwd: str = "/"
    env: dict[str, str] = {}


# --- two things that change -------------------------------------------------------------------------------------------------


class Cancel:
    """A request to stop, seen by every thread of an action. Setting it runs the wake-ups that blocking calls have registered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason = ""
        self._error: HibernodeError | None = None
        self._closed = False
        self._woken = threading.Event()
        self._wakes: list[Callable[[], None]] = []

    def set(self, reason: str, error: HibernodeError | None = None) -> None:
        """The first one counts. `error` is what stopping means then; a cancellation if nothing is said."""
        with self._lock:
            if self._reason or self._closed:
                return
            self._reason, self._error = reason, error
            wakes = list(self._wakes)
        try:
            for wake in wakes:
                wake()
        finally:
            self._woken.set()

    @property
    def reason(self) -> str:
        return self._reason

    @property
    def error(self) -> HibernodeError:
        """What to raise once there is a reason."""
        return self._error or Cancelled(self._reason)

    def check(self) -> None:
        """Raise `error` if somebody asked for it."""
        if self._reason:
            raise self.error

    def close(self) -> None:
        """The point of no return: raise `error` if somebody asked before it; who asks later is too late."""
        with self._lock:
            self.check()
            self._closed = True

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """While inside, `wake` is called (from another thread, at most once) when the action is cancelled; and never afterwards, when
        its workload may be another action's."""
        with self._lock:  # with `set`: either it sees the wake-up, or we see the reason
            self.check()
            self._wakes.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakes.remove(wake)
                being_woken = bool(self._reason)
            if being_woken:
                self._woken.wait()


class Meter:
    """Counters and phase times of one action, written by its threads and read by whoever shows progress.

    Plain integers: each counter has one writer, or is added to under the lock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.began = clock()
        self.phase_name = "starting"
        self.bytes_total = 0
        self.raw_bytes = 0
        self.zero_bytes = 0
        self.stored_bytes = 0
        self.total_io = 0
        self.streams = 0
        self.pause_ns = 0
        self.gpu_ns = 0
        self._phases: dict[str, PhaseCost] = {}
        self._inside = 0.0, 0  # seconds and bytes of phases inside the one that is open

    def add(self, *, raw: int = 0, zero: int = 0, stored: int = 0, io: int = 0) -> None:
        with self._lock:
            self.raw_bytes += raw
            self.zero_bytes += zero
            self.stored_bytes += stored
            self.total_io += io

    def fill(self, raw: int, zero: int) -> None:
        """All of so many bytes are there: those too that nobody has asked for, because the tree did not want them any more."""
        with self._lock:
            self.raw_bytes, self.zero_bytes = max(self.raw_bytes, raw), max(self.zero_bytes, zero)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards phase `name`, and the bytes moved inside with it, but those of a phase within."""
        self.phase_name, start, moved = name, self._clock(), self.total_io
        outside, self._inside = self._inside, (0.0, 0)
        try:
            yield
        finally:
            seconds, size = self._clock() - start, self.total_io - moved
            old, (others, of_others) = self._phases.get(name, PhaseCost(seconds=0.0)), self._inside
            self._phases[name] = PhaseCost(seconds=old.seconds + seconds - others, bytes=old.bytes + size - of_others)
            self._inside = outside[0] + seconds, outside[1] + size

    @contextmanager
    def gpu(self) -> Iterator[None]:
        """Count the time inside as time for which GPUs stand still."""
        start = self._clock()
        try:
            yield
        finally:
            self.gpu_ns += int((self._clock() - start) * 1e9)

    def progress(self, action_id: str) -> Progress:
        return Progress(
            action_id=action_id,
            phase=self.phase_name,
            bytes_done=self.raw_bytes,
            bytes_total=max(self.bytes_total, self.raw_bytes),
            stored_bytes=self.stored_bytes,
            seconds=self._clock() - self.began,
        )

    def profile(self) -> Profile:
        total = self._clock() - self.began
        return Profile(
            phases=dict(self._phases),
            unaccounted=max(0.0, total - sum(p.seconds for p in self._phases.values())),
            pause_ns=self.pause_ns,
            gpu_ns=self.gpu_ns,
            total_duration=int(total * 1e9),
            total_io=self.total_io,
            raw_bytes=self.raw_bytes,
            zero_bytes=self.zero_bytes,
            stored_bytes=self.stored_bytes,
            streams=self.streams,
        )
