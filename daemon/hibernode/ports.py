"""The node's outside, as it looks from inside. One Protocol per outside thing; the docstring is the contract.

`tests/contract/` holds one suite per port; the real thing and the fake pass the same one.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hibernode.model import Cancel, HostFacts, JobSpec, Signature, Target, TaskFacts, WorkloadFacts, WorkloadView, WrappedKey

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

    def write(self, data: Buffer) -> None:
        """Append. When it returns the caller may reuse the memory. Blocks while too many parts are in flight. Raises
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

    def check(self) -> None:
        """Write, read and remove a small object. Raises StoreUnavailable or NoRoom, with a hint."""

    def free_bytes(self) -> int | None:
        """Room left, where the store has such a number."""

    def upload(self, key: str) -> Upload:
        """Begin an object. Nothing is visible under `key` until its commit."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small object at once, only if there is none of that key: else Refused("exists")."""

    def get(self, key: str, *, limit: int) -> bytes:
        """A small object whole; more than `limit` bytes is Corrupt."""

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`. An object too short for it is Corrupt. A failed attempt is retried inside."""

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


@dataclass(frozen=True)
class Prepared:
    """What a workload needs around its restore: descriptors to hand over (CRIU's inherit_fd keys), a cgroup to be born in."""

    inherit: Mapping[str, int] = field(default_factory=dict)
    cgroup_procs: Sequence[str] = ()  # files to write the restoring process's pid into


class Criu(Protocol):
    """Stock CRIU. Calls block, one thread per call. A cancelled restore is killed at once, and its caller ends what may be left of the
    tree. A cancelled dump rolls back when the caller closes the other end of `pages`; only if it hangs is it killed. The tree runs on."""

    def facts(self) -> CriuFacts:
        """Raises Refused("criu_missing" | "criu_too_old")."""

    def check(self) -> str:
        """What `criu check` says; empty if all is well."""

    def dump(self, pid: int, images: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        """Dump the tree of `pid`: small images and log into `images`, pages as page-server messages into `pages` (our end of
        the pair is the caller's; this call closes `pages`). The tree runs on, or is left stopped if so asked. Raises
        DumpFailed with the end of CRIU's log; the tree runs on then too."""

    def restore(self, images: Path, options: CriuOptions, prepared: Prepared, cancel: Cancel) -> int:
        """Restore; the pid of the root task, running. Raises RestoreFailed; the caller ends what may be left of the tree."""

    def let_go(self, work: Path) -> None:
        """Whatever is left of the workers of a daemon that died, and has something in `work` open, goes on, and so comes to its end: one
        that was stopped, or that a killed worker had forked for a moment. What has not ended soon, and holds nobody, is killed.
        Never raises."""

    def tasks(self, images: Path) -> list[TaskFacts]:
        """The tasks a dump directory holds. Raises Corrupt."""


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
    tcp: tuple[str, ...] = ()  # established connections, "local -> remote"


class Workload(Protocol):
    """What is frozen together. Found once per action; pids are checked again by start time before anything is done to them."""

    @property
    def facts(self) -> WorkloadFacts: ...

    @property
    def key(self) -> str:
        """Two actions with one key never run together."""

    def roots(self) -> Mapping[str, int]:
        """Image name -> root pid of its tree."""

    def processes(self) -> Sequence[ProcessFacts]:
        """Every process of every tree, now."""

    def freeze(self) -> None:
        """Stop all trees together, where there are several; CRIU stops a single tree by itself."""

    def thaw(self) -> None:
        """Let everything run that `freeze` or a dump left stopped. Harmless when repeated."""

    def kill(self) -> None:
        """SIGKILL every process of the trees, and who was born since, and wait until they have ended: a zombie may stay where its
        parent does not wait for it. Stuck if they do not end. Harmless when repeated."""


class Workloads(Protocol):
    def find(self, target: Target) -> Workload:
        """The one workload that is meant. NotFound, or Refused for something that can never be one (thread, zombie, ...)."""

    def insist_free(self, facts: WorkloadFacts, name: str) -> None:
        """Refused("name_taken") where `prepare` would refuse it: asked before a fetch, which takes long."""

    def prepare(self, facts: WorkloadFacts, name: str) -> PreparedWorkload:
        """Make ready for a restore of what `facts` describes, under `name` if one is given."""

    def blockers(self, tasks: Sequence[TaskFacts]) -> Sequence[tuple[int, str]]:
        """Pids of these tasks that somebody has: (pid, by what). Zombies of ours are reaped first."""

    def thaw(self, processes: Sequence[Identity], leave: Collection[Identity] = ()) -> None:
        """Recovery: let these run on, and what descends from them, if they are stopped; but not those in `leave`."""

    def kill(self, processes: Sequence[Identity], place: str = "") -> None:
        """Recovery: as `Workload.kill`, and whoever lives in that `place` of a restore. A start time of 0 is nobody: who it was is
        not known."""


class Jobs(Protocol):
    """Managed jobs: pods of a machine without Kubernetes."""

    def run(self, spec: JobSpec) -> WorkloadView:
        """Start one. Refused("name_taken" | "cannot_start")."""

    def stop(self, namespace: str, name: str, signal_name: str) -> WorkloadView:
        """TERM to its root, and after a grace time KILL to what is left of it; or KILL at once. Returns when all have ended. NotFound."""

    def views(self, target: Target | None) -> list[WorkloadView]:
        """All jobs, or the one workload (process or job) that `target` names."""

    def reap(self) -> bool:
        """Wait for children that have ended and note how jobs did; whether there was one. Never blocks."""


class PreparedWorkload(Protocol):
    """A place for a tree that comes back. Undone by `discard` until `adopt`."""

    @property
    def prepared(self) -> Prepared: ...

    @property
    def place(self) -> str:
        """What nobody else lives in, durable: `Workloads.kill` empties it, also in a later daemon."""

    def adopt(self, pid: int) -> Workload:
        """The tree is here, with root `pid`: take it into the books."""

    def kill(self, tasks: Sequence[TaskFacts]) -> None:
        """Undo a restore of `tasks`, however far it came: SIGKILL everything it made, also without its root, also after `adopt`.
        Returns when all have ended; Stuck if they do not. Harmless when repeated."""

    def discard(self) -> None:
        """Remove what `prepare` made. Harmless when repeated, no effect after `adopt`."""


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

    def room(self, path: Path) -> int:
        """Bytes free in the file system of `path`, or of its nearest parent that is there."""
