"""The node's outside, as it looks from inside. One Protocol per outside thing; the docstring is the contract.

`tests/contract/` holds one suite per port; the real thing and the fake pass the same one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hibernode.errors import DumpFailed
from hibernode.model import (
    Cancel,
    GpuInventory,
    HeartbeatWish,
    HostFacts,
    JobSpec,
    RestoreCommand,
    Signature,
    Target,
    TaskFacts,
    WorkloadFacts,
    WorkloadView,
    WrappedKey,
)

Buffer = bytes | bytearray | memoryview
Identity = tuple[int, int]  # of a process: its pid and when it began (clock ticks since boot), because pids come again


# --- store ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectFacts:
    """An object as the store itself describes it."""

    key: str
    size: int  # bytes
    modified: float  # seconds since the epoch


@dataclass(frozen=True)
class OpenUpload:
    """An upload that nobody has committed or aborted: in progress, or left by a daemon that died. `gc` aborts the old ones."""

    key: str  # "" where the store cannot say
    id: str  # how the store knows it
    began: float  # seconds since the epoch


class Upload(Protocol):
    """One object on its way into the store. One thread at a time; invisible until `commit`; exactly one of commit, abort ends it."""

    def write(self, *pieces: Buffer) -> None:
        """Append them, in this order. When it returns the caller may reuse the memory. Blocks while too many parts are in flight. Raises
        StoreUnavailable (retries inside are over) or NoRoom; then only `abort` is legal."""

    def commit(self) -> ObjectFacts:
        """Make it visible, whole and durable, only if there is no object of that key: else Refused("exists"), and what is there
        stays as it is. Or raise and leave nothing visible (then `abort`). Every byte was acknowledged by the store under a
        checksum."""

    def abort(self) -> None:
        """Throw it away, parts already sent included; never an object of somebody else. Harmless after commit and when repeated.
        Never raises: what could not be removed is logged, and `gc` finds it."""


class Store(Protocol):
    """Objects under a prefix; none is ever replaced. Thread-safe. Every call may raise StoreUnavailable after its own retries; a key
    that is not there is NotFound. Keys are relative, of the form `a/b/c`."""

    @property
    def location(self) -> str:
        """The address people know it by: `file:///path` or `s3://bucket/prefix`."""

    @property
    def lingers(self) -> bool:
        """Whether what a process has begun to write may still become visible when it is dead: a request on its way through a network."""

    @property
    def reads_in_flight(self) -> int:
        """How many reads at once it takes for each stream of a restore: one where bytes come as fast as they are used, more where each
        waits for a network."""

    def check(self) -> None:
        """Write, read and remove a small object. Raises StoreUnavailable or NoRoom, with a hint."""

    def free_bytes(self) -> int | None:
        """Room left, where the store has such a number."""

    def upload(self, key: str) -> Upload:
        """Begin an object. Nothing is visible under `key` until its commit."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small object at once, only if there is none of that key: else Refused("exists"). NoAnswer: it may still come."""

    def get(self, key: str, *, limit: int) -> bytes:
        """A small object whole; more than `limit` bytes is Corrupt."""

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`. An object too short for it is Corrupt. A failed attempt is retried inside."""

    def reading(self, key: str, offset: int, size: int) -> AbstractContextManager[Callable[[memoryview], None]]:
        """So many bytes from `offset`, at least one, asked for at once and read piece by piece: each call fills a view with those that
        come next, as `read_into` would. Who leaves it early has read no more than that."""

    def stat(self, key: str) -> ObjectFacts: ...

    def list(self, prefix: str = "") -> Iterator[ObjectFacts]:
        """Committed objects whose key starts with `prefix`, in order of key."""

    def delete(self, key: str) -> None:
        """Remove; a key that is not there is no error."""

    def open_uploads(self, prefix: str = "") -> Iterator[OpenUpload]:
        """Uploads, of this node or of any other, that are neither committed nor aborted and whose key starts with `prefix`, in no
        order. One that has written less than a part may be missing. The end of a very long key may be cut off."""

    def abort_upload(self, upload: OpenUpload) -> None:
        """Throw away what `open_uploads` has found, with the parts it has sent; it cannot be committed any more. One that has ended
        meanwhile is no error, and the object that it has become stays."""


# --- keys -------------------------------------------------------------------------------------------------------------------


class Notary(Protocol):
    """Signs what this node writes, and decides whose writing it believes."""

    def sign(self, message: bytes) -> Signature | None:
        """None: this node signs nothing."""

    def check(self, message: bytes, signature: Signature | None) -> None:
        """Refused("unsigned" | "signer" | "signature") unless somebody trusted signed just this; nobody is asked where nobody is
        named as trusted."""


class Keyring(Protocol):
    """Keeps the keys that data keys are wrapped with: a file, or a key management service. Thread-safe."""

    def wrap(self, data_key: bytes, checkpoint_id: str) -> WrappedKey | None:
        """None: this node encrypts nothing. `checkpoint_id` is bound to it: it cannot be unwrapped for another one."""

    def unwrap(self, wrapped: WrappedKey, checkpoint_id: str) -> bytes:
        """The data key. Refused("key_unknown") if this keyring has not the key that wrapped it; Corrupt if it is not what was wrapped;
        KeyService if the service does not answer as it must."""


# --- CRIU -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CriuFacts:
    version: int  # 40201 is 4.2.1
    path: str

    def __str__(self) -> str:
        return show_version(self.version)


def show_version(version: int) -> str:
    """CRIU's number as people write it: 40201 -> 4.2.1."""
    major, minor, sub = version // 10000, version // 100 % 100, version % 100
    return f"{major}.{minor}.{sub}" if sub else f"{major}.{minor}"


@dataclass(frozen=True)
class DumpStats:
    """CRIU's own statistics of a dump (images/stats-dump)."""

    freezing_ns: int
    frozen_ns: int
    pages_written: int


@dataclass(frozen=True)
class CriuOptions:
    """What may differ between two calls. `tcp`: refuse (fail on an open connection), close (restored closed), established."""

    leave_stopped: bool = False
    tcp: str = "refuse"
    shell_job: bool = True
    ext_unix_sk: bool = False
    file_locks: bool = True
    link_remap: bool = False
    ghost_limit: int = 64 << 20  # bytes of one deleted-but-open file
    timeout: int = 120  # seconds CRIU gives the tree to stop
    log_level: int = 2
    lazy: bool = False  # of a restore: the tree runs before all its pages are there


@dataclass(frozen=True)
class Prepared:
    """What a workload needs around its restore: descriptors to hand over (CRIU's inherit_fd keys), a cgroup to be born in."""

    inherit: Mapping[str, int] = field(default_factory=dict)
    cgroup_procs: Sequence[str] = ()  # files to write the restoring process's pid into


@dataclass(frozen=True)
class TaskRights:
    """Who a thread of an image will be and what it may do: CRIU gives it back as the image says. Capabilities are bit sets."""

    pid: int  # of the thread
    uids: frozenset[int]  # real, effective, saved, of the file system
    gids: frozenset[int]  # the same, and its groups
    permitted: int  # and effective, inheritable and ambient
    bounding: int
    filtered: bool  # by seccomp; with which filter is the image's affair
    no_new_privs: bool
    label: str  # of AppArmor or SELinux


@dataclass(frozen=True)
class MountFacts:
    """A mount of an image, in its container's root."""

    place: str
    kind: str  # of file system, where CRIU makes it by itself: proc, tmpfs, ...
    key: str  # of one that is brought in from outside; "" for others
    flags: int  # MS_RDONLY and others


@dataclass(frozen=True)
class Endpoint:
    """A socket of an image that is bound to one address, and so needs it."""

    address: str
    peer: str = ""  # "address:port" of the other end of a TCP connection

    @property
    def connected(self) -> bool:
        return bool(self.peer)


@dataclass(frozen=True)
class Demands:
    """All that an image would have of the machine, beside memory."""

    tasks: Sequence[TaskRights]
    mounts: Sequence[MountFacts]
    devices: Sequence[str]  # character and block devices that are open, by path; "deleted" for those without
    deleted: Sequence[str] = ()  # files that are open and have no name any more, by the one they had: made anew for a moment
    sockets: Sequence[Endpoint] = ()  # of the internet


class Keeper(Protocol):
    """What stands behind one lazy restore: a process of its own, which has the filler as its child and outlives the daemon. When
    something dies before all pages are in, the tree is killed before anybody lets go of what is missing (`hibernode.keeper`). One
    thread, but for `wake`."""

    def begin(self, images: Path, table: Path, procs: Sequence[str], own: Sequence[str]) -> None:
        """Have the filler listen in `images`, which are complete but for the pages of `table` (`hibernode.filler`); when this returns CRIU
        may restore there. `procs`: files of the cgroups that the tree will be born in, and nobody else lives in; `own`: of those where
        the keeper is to live. Raises Refused("lazy_kernel") where the kernel does not keep what is promised, Refused("lazy_cgroup"),
        RestoreFailed, or Stopped."""

    def hold(self, criu: int) -> None:
        """As `Held.hold`."""

    def told(self, tree: Sequence[Identity]) -> None:
        """It runs, and these are it."""

    def wait(self, seconds: float) -> bool:
        """Whether all pages are in, within so many seconds. Raises RestoreFailed if they will not come: nobody of the tree is left then, or
        (the keeper has been killed) nobody answers for it any more. Raises Stopped after `wake`."""

    def wake(self) -> None:
        """From any thread: nobody waits any more."""

    def close(self) -> None:
        """If not all is in, whoever is left of the tree is killed. Returns when the keeper has ended. Harmless when repeated."""


class Held(Protocol):
    """Where all pages are brought before anybody runs: what CRIU waits for, when it has made the tree."""

    def hold(self, criu: int) -> None:
        """Before CRIU begins; it waits at the other end of this socket, and lets the tree run when that is closed: it is not to see that
        the daemon has died."""

    def fill(self) -> None:
        """All is made. Returns when all pages are in; whatever is raised, the tree may still be there."""


class Criu(Protocol):
    """Stock CRIU. Calls block, one thread per call. A cancelled restore is killed at once, and its caller ends what may be left of the
    tree. A cancelled dump rolls back when the caller closes the other end of `pages`; only if it hangs is it killed. The tree runs on."""

    def facts(self) -> CriuFacts:
        """Raises Refused("criu_missing" | "criu_too_old")."""

    def environment(self) -> Mapping[str, str]:
        """For a program that starts CRIU by itself: it finds this one, as it is run here."""

    def check(self) -> str:
        """What `criu check` says; empty if all is well."""

    def dump(self, pid: int, images: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        """Dump the tree of `pid`: small images and log into `images`, pages as page-server messages into `pages` (our end of
        the pair is the caller's; this call closes `pages`). The tree runs on, or is left stopped if so asked. Raises
        DumpFailed with the end of CRIU's log; the tree runs on then too."""

    def restore(
        self,
        images: Path,
        options: CriuOptions,
        prepared: Prepared,
        cancel: Cancel,
        held: Held | None = None,
    ) -> int:
        """Restore; the pid of the root task, running. `options.lazy`, or `held`: most pages come from who listens in `images`. With `held`
        nobody runs before `held.fill` has returned; what it raises is raised, and the tree has been killed. Raises RestoreFailed; the
        caller ends what may be left of the tree."""

    def unfit(self) -> str:
        """Why nothing can be filled here (`hibernode.keeper`); empty if it can. Tried out once."""

    def keeper(self, turns: socket.socket, memory: int) -> Keeper:
        """Start one; `turns` is the end of its socket for the filler, and is closed here; `memory` is the file that they share."""

    def let_go(self, work: Path) -> None:
        """Whatever is left of the workers of a daemon that died, and has something in `work` open, goes on, and so comes to its end: one
        that was stopped, or that a killed worker had forked for a moment. What has not ended soon, and holds nobody, is killed.
        Never raises."""

    def tasks(self, images: Path) -> list[TaskFacts]:
        """The tasks a dump directory holds. Raises Corrupt."""

    def demands(self, images: Path) -> Demands:
        """What the images of a container would have. Raises Corrupt."""

    def stats(self, images: Path) -> DumpStats:
        """Of a dump that somebody else has asked for. Raises DumpFailed."""

    def why(self, what: str, error: Exception, log: Path) -> DumpFailed:
        """What went wrong in such a dump, with the end of CRIU's log."""


# --- GPUs ---------------------------------------------------------------------------------------------------------------------


class GpuTree(Protocol):
    """The processes of one workload that have GPU state, on behalf of one action. Calls block: a call of the driver is never ended from
    outside. One thread at a time."""

    @property
    def pids(self) -> Sequence[int]: ...

    @property
    def halted(self) -> Sequence[int]:
        """Processes of the whole workload that `suspend` has stopped; a dump finds them so, and so they come back from it. Without those
        that were stopped before."""

    def look(self, processes: Sequence[ProcessFacts]) -> object:
        """Has one of these begun to use a GPU since? As `Gpu.find`."""

    def suspend(self, everybody: Callable[[], Sequence[ProcessFacts]], limit: float) -> None:
        """Move all GPU state into the processes' own memory: lock all, look again among `everybody` for who has begun to use a GPU
        meanwhile, save all. Afterwards none uses a GPU, and none of its threads gets past its next CUDA call; or, where the node is set
        so, everybody stands still, from before the first is saved until `resume` has brought back the last. Raises GpuBusy (work did
        not end), GpuFailed, Refused("gpu_leftover") or, where a call has not returned after `limit` seconds, GpuWedged; what was begun
        then is undone by `resume`."""

    def resume(self, places: Sequence[Mapping[str, str]] = (), *, strict: bool = False, limit: float = 0.0) -> None:
        """Bring all of it back and let them run, all restored before the first runs. `places`: maps of UUIDs, old to new, of which a later
        one is tried where the driver does not take the one before; none: where it was. `strict`: if one cannot
        be brought back, none runs. Harmless when repeated, also for processes that have ended. Raises GpuFailed or, after `limit`
        seconds (0: none), GpuWedged."""

    def close(self) -> None:
        """Nobody answers for them any more: what is still suspended is resumed by itself some seconds later."""


class Gpu(Protocol):
    """The state that processes have on GPUs, by the driver's own checkpoint."""

    def find(self, action_id: str, processes: Sequence[ProcessFacts]) -> GpuTree:
        """Of those of these that use a GPU; none is the normal case, and costs nothing. Refused where one cannot be saved here, or nobody
        can tell. Nothing is touched."""

    def restored(self, action_id: str, processes: Sequence[Identity], halted: Sequence[Identity] = ()) -> GpuTree:
        """Of these, which CRIU has just brought back with their state in their memory. `halted`: who stands still since the dump, and goes
        on at the end of `resume`; whatever the settings of this node."""

    def check(self) -> None:
        """Can GPU state be brought back here at all? Raises Refused or GpuFailed."""

    def recover(self, action_id: str) -> None:
        """Whatever an action that a crash ended has left suspended runs again. Raises GpuFailed or GpuWedged."""

    def park(self, action_id: str, processes: Sequence[Identity], limit: float) -> None:
        """These are about to be killed: what they have on GPUs, also halfway there, is moved into their own memory first, where one can
        answer. From then on nobody brings it back. Never raises, and returns about `limit` seconds later at the latest (and at most a
        minute after that, where the helper has to be started): who could not be parked is logged, and is to be killed as it is."""


# --- workloads --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessFacts:
    """One live process of a workload, as /proc shows it, for preflight and for the record."""

    pid: int
    start_time: int  # clock ticks since boot: with pid, an identity
    comm: str
    state: str
    tgid: int
    kernel_thread: bool
    tracer: int
    uid: int
    rss: int  # bytes
    fds: tuple[tuple[int, str], ...]  # (descriptor, what /proc/<pid>/fd says)
    tcp: tuple[str, ...] = ()  # established connections, "address:port -> address:port", its own end first
    image: str = ""  # of which it is a part
    inside: int = 0  # its pid there
    ids: frozenset[int] = frozenset()  # its uids and gids: real, effective and saved
    limits: bool = (
        True  # the daemon, and so its CRIU, may read its limits: of another user's CAP_SYS_RESOURCE in its user namespace
    )
    nodes_network: bool = False  # its network is the machine's, and the daemon has another: of a pod with `hostNetwork`, or none
    cuda: bool = False  # it has the CUDA driver's library in its memory: it may have GPU state


@dataclass(frozen=True)
class LayerFacts:
    """The writable layer of a container: the upper directory of its overlay mount, and how that is mounted."""

    upper: Path
    options: tuple[str, ...]


class Workload(Protocol):
    """What is frozen together. Found once per action; pids are checked again by start time before anything is done to them."""

    @property
    def facts(self) -> WorkloadFacts: ...

    @property
    def key(self) -> str:
        """Two actions with one key never run together."""

    @property
    def place(self) -> str:
        """What `Workloads.kill` has to know of it, beside its processes, to end it in a later daemon."""

    @property
    def endable(self) -> bool:
        """`kill` ends it: nobody starts it anew."""

    def pod_spec(self) -> str:
        """What the cluster has of this pod, as JSON with its `metadata` and `spec`: of that another can be made. "" for what no cluster has
        made, or where it is too much for a message. NotFound, if it is deleted already; KubernetesUnavailable, Busy, Refused as
        `Cluster` has them."""

    def roots(self) -> Mapping[str, int]:
        """Image name -> root pid of its tree. NotFound if one has ended."""

    def processes(self) -> Sequence[ProcessFacts]:
        """Every process of every tree, now."""

    def within(self, pid: int) -> tuple[str, int]:
        """The image, and the pid in it, of a process that `processes` has named, be it gone since."""

    def layers(self) -> Mapping[str, LayerFacts]:
        """Of each container, by its image's name. Refused("no_layer") where one has none."""

    def freezers(self) -> tuple[str, ...]:
        """What `freeze` writes to: whoever finds it frozen later can let go by `Workloads.thaw` with these alone."""

    def freeze(self) -> int:
        """Stop all trees together, where there are several: the moment (monotonic, nanoseconds) since which they are held. 0: nobody is
        yet, because CRIU stops a single tree by itself. Raises DumpFailed if they cannot be stopped; then some may be."""

    def dump(self, image: str, into: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        """One of `roots`, by whoever owns its namespaces: small images and log into `into`, pages as page-server messages into `pages`, an
        end of a connected pair that is closed here when CRIU has it. The tree is as it was
        afterwards, or stopped if so asked. Raises DumpFailed; then, too."""

    def thaw(self) -> None:
        """Let everything run that `freeze` or a dump left stopped. Harmless when repeated."""

    def kill(self) -> None:
        """SIGKILL every process of the trees, and who was born since, and wait until they have ended: a zombie may stay where its
        parent does not wait for it. Stuck if they do not end. A pod that a kubelet would start anew is deleted, and what it holds
        frozen never runs again; raises as `Cluster.delete` with nothing done to it. Harmless when repeated."""


class Workloads(Protocol):
    def find(self, target: Target) -> Workload:
        """The one workload that is meant. NotFound, or Refused for something that can never be one (thread, zombie, ...)."""

    @property
    def makes_pods(self) -> bool:
        """A restore of a pod needs nobody else to make the new one."""

    def cluster(self) -> str:
        """What the API server says of this node, in a line; "" where there is none. Raises as `Cluster.node`."""

    def fills(self, facts: WorkloadFacts) -> bool:
        """Whether such a workload can be restored while its pages are brought by the filler: in cgroups of its own."""

    def insist_free(self, facts: WorkloadFacts, command: RestoreCommand) -> None:
        """Refused("name_taken" | "workload_kind" | "no_pod" | "pod_exists") where `prepare` or `restore` would refuse it: asked before a
        fetch, which takes long."""

    def prepare(self, facts: WorkloadFacts, command: RestoreCommand) -> PreparedWorkload:
        """Make ready for a restore of what `facts` describes."""

    def blockers(self, tasks: Sequence[TaskFacts], *, living: bool = False) -> Sequence[tuple[int, str]]:
        """Pids of these tasks that somebody has: (pid, by what). Zombies of ours are reaped first; `living` leaves out those of others,
        which keep their pid and do nothing."""

    def runtimes(self) -> tuple[str, str]:
        """Name and version of the container runtime, and of runc, as they are found now. "" for one that is not here, or does not
        answer."""

    def thaw(self, processes: Sequence[Identity], leave: Collection[Identity] = (), freezers: Sequence[str] = ()) -> None:
        """Recovery: let these run on, and what descends from them, if they are stopped; but not those in `leave`. `freezers`: as
        `Workload.freezers` has them."""

    def kill(
        self, processes: Sequence[Identity], place: str = "", freezers: Sequence[str] = (), *, patience: float | None = None
    ) -> None:
        """Recovery: as `Workload.kill`, and whoever lives in that `place` of a restore, or in cgroups of these `freezers`; not in the
        latter where all of `processes` have ended, since somebody else may have them now. A start time of 0 is nobody: who it was
        is not known. `patience`: seconds for each thing that is waited for, where half a minute is too long."""


@dataclass(frozen=True)
class Pod:
    """One that the API server knows. `manifest` is all it said, with `metadata`, `spec` and `status`."""

    namespace: str
    name: str
    uid: str
    node: str  # "": nobody has placed it
    phase: str  # Pending, Running, Succeeded, Failed, Unknown
    deleting: bool
    annotations: Mapping[str, str]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class KubeNode:
    name: str
    ready: bool
    schedulable: bool  # False: it is cordoned
    labels: Mapping[str, str]


class Cluster(Protocol):
    """The API server of the cluster that this node belongs to. Every call raises KubernetesUnavailable if it does not answer, Busy if it
    has too much to do, Refused("kubernetes_rights") if this node may not. A call that changes something and raises KubernetesUnavailable
    may have done it."""

    def pod(self, namespace: str, name: str, *, uid: str = "") -> Pod:
        """NotFound if there is none, or if the one of that name has another UID than the one that is meant."""

    def create(self, namespace: str, manifest: Mapping[str, Any]) -> Pod:
        """Make it. If it was made before for the same action (`hibernode.io/action`), that one: so it may be repeated.
        Refused("pod_exists") if the name is another's; Refused("pod_refused") if the server does not take it, with its reason."""

    def delete(self, namespace: str, name: str, *, uid: str, grace: float | None = None) -> None:
        """Have the one with this UID end, within `grace` seconds (None: its own). Returns when the server has noted it, not when the pod
        has gone. One that has gone already is well; so is one of that name with another UID, which is left alone."""

    def node(self, name: str) -> KubeNode:
        """NotFound."""


class Jobs(Protocol):
    """Managed jobs: pods of a machine without Kubernetes."""

    def run(self, spec: JobSpec) -> WorkloadView:
        """Start one. Refused("name_taken" | "cannot_start")."""

    def stop(self, namespace: str, name: str, signal_name: str) -> WorkloadView:
        """TERM to its root, and after a grace time KILL to what is left of it; or KILL at once. Returns when all have ended. NotFound."""

    def views(self, target: Target | None) -> list[WorkloadView]:
        """All jobs, or the one workload (process or job) that `target` names."""

    def heartbeats(self) -> list[HeartbeatWish]:
        """What the pods that run here ask for by their annotations. CriUnavailable or Refused where a container runtime is there, and does
        not answer."""

    def reap(self) -> bool:
        """Wait for children that have ended and note how jobs did; whether there was one. Never blocks."""


@dataclass(frozen=True)
class Fetched:
    """A checkpoint on this machine: what CRIU reads, by image, and for each container that has one what puts its writable layer back into
    the root file system that is mounted there. (It raises Corrupt, NoRoom or RestoreFailed, and leaves it half done.)"""

    images: Mapping[str, Path]
    layers: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    # Where the filler brings the pages: to be called before CRIU restores, as `Keeper.begin` without its images.
    begin: Callable[[Sequence[str], Sequence[str]], None] | None = None
    held: Held | None = None  # where it brings them all before anybody runs


class PreparedWorkload(Protocol):
    """A place for trees that come back. Undone by `discard` until `restore` has returned."""

    @property
    def place(self) -> str:
        """What nobody else lives in, durable: `Workloads.kill` empties it, also in a later daemon."""

    def restore(self, fetched: Fetched, options: CriuOptions, cancel: Cancel, note: Callable[[Sequence[str]], None]) -> Workload:
        """Bring it back, and take it into the books: it runs. Where a tree comes into a cgroup of its
        own, `note` is called before that with the freezers of all so far: `Workloads.kill` ends who lives there, also in a later daemon.
        Raises RestoreFailed, or Refused for what does not fit the place; the caller ends what may be left, by `kill`."""

    def kill(self, tasks: Sequence[TaskFacts]) -> None:
        """Undo a restore of `tasks`, however far it came: SIGKILL everything it made, also without its root, also after `restore`.
        Returns when all have ended; Stuck if they do not. Harmless when repeated."""

    def discard(self) -> None:
        """Remove what `prepare` made. Harmless when repeated, no effect after `restore`."""


# --- the machine ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """How the machine is now."""

    cpus: int
    memory_total: int  # bytes
    memory_available: int
    load: float  # of the last minute


class Host(Protocol):
    """The machine this daemon runs on."""

    def facts(self) -> HostFacts:
        """What an image made here says about where it was made; `criu_version` is 0 here, the Criu port knows it."""

    def load(self) -> Load: ...

    def memory_room(self, pid: int) -> int:
        """Bytes that this process can still take, by the machine and by the cgroups that it is in."""

    def lacks_pages(self, pid: int) -> bool:
        """Pages of this process may still come, through a userfaultfd: 10 ms for each GiB of it. False for one that has ended."""

    def room(self, path: Path) -> int:
        """Bytes free in the file system of `path`, or of its nearest parent that is there."""


class Inventory(Protocol):
    """What hangs on this machine beside its CPUs. Thread-safe."""

    def gpus(self) -> GpuInventory:
        """As they are now: what was read before the call is not answered. Never raises: what cannot be known is unknown, with a reason.
        Blocks for seconds at most; a driver that does not answer by then is `silent`, with what it said last, and from then on at once
        for as long as that call hangs."""

    def users(self) -> Mapping[int, Mapping[str, int]]:
        """Who has a CUDA context on which GPU, and bytes of its memory: pid -> UUID -> bytes. Some may be missing: who uses a GPU is for
        `Gpu.find` to say. Waits as `gpus` does."""
