"""What a node is made of: its ports and its limits, built once by `__main__`, frozen; and one attempt at an action."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from hibernode.config import Config
from hibernode.errors import Busy, Cancelled, Corrupt, DeadlineExceeded, GpuWedged, HibernodeError, NoRoom, Stuck
from hibernode.journal import Entry, Journal
from hibernode.model import Cancel, Manifest, Meter, Status
from hibernode.ports import Criu, Gpu, Host, Inventory, Jobs, Keyring, Notary, Store, Workloads
from hibernode.transfer.arena import Arena

_AGAIN = 0.05  # seconds between two tries of an undo: a moment without descriptors or memory passes
_log = logging.getLogger("hibernode.node")


class Taken(Busy):
    """Another action has the claim on `key`."""

    def __init__(self, key: str, other: str) -> None:
        super().__init__(f"{key} has another action at work: {other}", hint="wait for it, or cancel it", action=other)
        self.key = key


class Claims:
    """Workloads that an action works on. One action per workload. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[str, str] = {}
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    @contextmanager
    def claim(self, key: str, action_id: str) -> Iterator[None]:
        """Hold `key`; Taken if another action has it."""
        with self._lock:
            if (other := self._taken.setdefault(key, action_id)) != action_id:
                raise Taken(key, other)
        try:
            yield
        finally:
            with self._lock:
                del self._taken[key]
                waiting = self._waiting.pop(key, [])
            for wake in waiting:
                wake()

    def when_free(self, key: str, wake: Callable[[], None]) -> None:
        """Call `wake` once, from any thread, when nobody has `key` any more: at once if nobody has. Of many one will get it; the others
        ask again."""
        with self._lock:
            if key in self._taken:
                self._waiting.setdefault(key, []).append(wake)
                return
        wake()


@dataclass(frozen=True)
class Node:
    """Ports only; nobody asks it for anything but these."""

    config: Config
    workloads: Workloads
    jobs: Jobs
    criu: Criu
    gpu: Gpu
    host: Host
    inventory: Inventory
    arena: Arena
    journal: Journal
    open_store: Callable[[str], Store]  # by URL; Refused("directory") for one that is not allowed
    notary: Notary
    keyring: Keyring
    claims: Claims = field(default_factory=Claims)
    damaged: dict[str, set[str]] = field(default_factory=dict)  # checkpoint in which damage was found -> itself and its bases

    @property
    def suspected(self) -> set[str]:
        """Checkpoints to which nothing new refers: damage was found in them, or in one that refers to them, and may be theirs."""
        return set().union(*list(self.damaged.values()))

    @contextmanager
    def suspecting(self, manifest: Manifest) -> Iterator[None]:
        """What is Corrupt inside makes it, and its bases, `suspected`."""
        try:
            yield
        except Corrupt:
            self.suspect(manifest.checkpoint_id, (base.checkpoint_id for base in manifest.bases))
            raise

    def suspect(self, checkpoint_id: str, bases: Iterable[str]) -> None:
        self.damaged[checkpoint_id] = {checkpoint_id, *bases}

    def clear(self, checkpoint_id: str) -> None:
        """Every byte that a restore of it needs was read, and is good: what it has itself, and what was said of its bases because of it."""
        self.damaged.pop(checkpoint_id, None)
        for suspected in list(self.damaged.values()):
            suspected.discard(checkpoint_id)


class Report(Protocol):
    def __call__(self, status: Status, pod_spec: str = "") -> None:
        """A status was reached; durable when it returns. `pod_spec`: as in Event."""


@dataclass(frozen=True)
class Attempt:
    """One try at one action: where it writes down what it is about to do, and tells how far it is."""

    entry: Entry
    meter: Meter
    cancel: Cancel
    report: Report
    open: list[_Open] = field(default_factory=list)  # phases that are open, the innermost last

    @contextmanager
    def phase(self, name: str, limit: float) -> Iterator[None]:
        """Journal the phase before its step, count its time, and cancel the action with `deadline` if it takes more than `limit` seconds.
        What fails after a cancel has failed because of it. A cancelled action begins no further phase."""
        self.cancel.check()
        self.entry.enter(name, limit)
        late = _too_late(name, limit)
        with self.meter.phase(name), alarm(limit, lambda: self.cancel.set(late.message, late)) as ringing:
            self.open.append(_Open(name, limit, ringing))
            try:
                yield
            except HibernodeError as e:
                if self.cancel.reason and not isinstance(e, Stuck | Cancelled | DeadlineExceeded):
                    raise self.cancel.error from e
                raise
            finally:
                self.open.pop()

    @contextmanager
    def within(self, name: str, limit: float) -> Iterator[None]:
        """A phase in the middle of the one that is open, whose time stands still meanwhile, and whose limit begins anew afterwards."""
        outer = self.open[-1]
        outer.ringing.stop()
        with self.phase(name, limit):
            yield
        self.entry.enter(outer.name, outer.limit)
        self.meter.phase_name = outer.name
        outer.ringing.start()

    @contextmanager
    def work_directory(self, parent: Path) -> Iterator[Path]:
        """An empty directory on tmpfs for this attempt, gone afterwards. A disk that fills up meanwhile is NoRoom."""
        work = parent / self.entry.action_id
        shutil.rmtree(work, ignore_errors=True)  # of an attempt that a crash ended
        work.mkdir(parents=True, mode=0o700)
        try:
            yield work
        except OSError as e:
            if is_full(e):
                raise no_room(e) from e
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room(error: OSError) -> NoRoom:
    """What a disk that is full is to people."""
    return NoRoom(f"no space left: {error}", hint="make the file systems of work_dir and state_dir larger")


_HINTS = {
    "preflight": "does the store answer? Else raise `limits.preflight`",
    "dumping": "the arena is full and the store is slow? Raise `limits.pause`, or enlarge the arena",
    "suspending": "is the driver well? Raise `limits.gpu` if there is very much device memory",
    "resuming": "is the driver well? Raise `limits.gpu` if there is very much device memory",
    "shipping": "the store is slow; raise `limits.transfer`",
    "fetching": "the store is slow; raise `limits.transfer`",
    "filling": "the store is slow; raise `limits.transfer`, or restore it without `lazy`",
    "committing": "does the store answer? Else raise `limits.commit`",
    "probing": "is the machine too busy? Else raise `limits.preflight`",
    "restoring": "CRIU did not come to its end; raise `limits.restore` if the tree is very large",
    "holding": "the store is slow; raise `limits.transfer`",
}


def _too_late(phase: str, limit: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{phase} was not done after {round(limit, 2):g} s", hint=_HINTS.get(phase, ""), phase=phase, limit=round(limit, 3)
    )


class _Ringing:
    """An alarm that rings after so many seconds, if it is not stopped before."""

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self._seconds, self._ring = seconds, ring
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        self._timer = threading.Timer(self._seconds, self._ring)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """When this returns it does not ring any more. Harmless when repeated."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()


@contextmanager
def alarm(seconds: float, ring: Callable[[], None]) -> Iterator[_Ringing]:
    """`ring` is called, from a thread of its own, if what is done inside takes longer. No thread outlives it."""
    ringing = _Ringing(seconds, ring)
    ringing.start()
    try:
        yield ringing
    finally:
        ringing.stop()


class _Open(NamedTuple):
    name: str
    limit: float  # seconds
    ringing: _Ringing


def calmly(what: str, undo: Callable[[], None]) -> Callable[[], None]:
    """An undo that is tried ahead of its turn, from where nobody hears an error: its turn comes, and then it is insisted on."""

    def attempt() -> None:
        try:
            undo()
        except Exception as e:  # noqa: BLE001 - no memory, for one: nobody here may end for it
            _log.warning("%s failed, and is tried again: %s", what, e)

    return attempt


def insist(what: str, undo: Callable[[], None], tries: int = 3) -> None:
    """Run an undo, again if it fails; Stuck if it never works. An undo is harmless when repeated."""
    for left in reversed(range(tries)):
        try:
            return undo()
        except GpuWedged:
            raise  # it has waited long enough
        except Exception as e:
            _log.warning("%s failed: %s", what, e)
            if not left:
                raise Stuck(f"{what} failed: {e}", hint="look at the workload by hand, then restart the daemon") from e
            time.sleep(_AGAIN)
    return None


def on_error(held: ExitStack) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    """An exit that runs the undos of `held` only if something was raised."""

    def leave(_kind: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None) -> None:
        if error is not None:
            held.close()

    return leave
