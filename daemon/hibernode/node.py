"""What a node is made of: its ports and its limits, built once by `__main__`, frozen; and one attempt at an action."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from hibernode.config import Config
from hibernode.errors import Busy, HibernodeError, NoRoom, Stuck
from hibernode.journal import Entry, Journal
from hibernode.model import Cancel, Meter, Status
from hibernode.ports import Criu, Host, Jobs, Notary, Store, Workloads
from hibernode.transfer.arena import Arena

_log = logging.getLogger("hibernode.node")


class Claims:
    """Workloads that an action works on. One action per workload."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[str, str] = {}

    @contextmanager
    def claim(self, key: str, action_id: str) -> Iterator[None]:
        """Hold `key`; Busy if another action has it."""
        with self._lock:
            if (other := self._taken.setdefault(key, action_id)) != action_id:
                raise Busy(f"{key} has another action at work: {other}", hint="wait for it, or cancel it", action=other)
        try:
            yield
        finally:
            with self._lock:
                del self._taken[key]


@dataclass(frozen=True)
class Node:
    """Ports only; nobody asks it for anything but these."""

    config: Config
    workloads: Workloads
    jobs: Jobs
    criu: Criu
    host: Host
    arena: Arena
    journal: Journal
    open_store: Callable[[str], Store]  # by URL; Refused("directory") for one that is not allowed
    notary: Notary
    claims: Claims = field(default_factory=Claims)


@dataclass(frozen=True)
class Attempt:
    """One try at one action: where it writes down what it is about to do, and tells how far it is."""

    entry: Entry
    meter: Meter
    cancel: Cancel
    report: Callable[[Status], None]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Journal the phase before its step, and count its time. A cancelled action begins no further phase."""
        self.cancel.check()
        self.entry.enter(name)
        with self.meter.phase(name):
            yield

    @contextmanager
    def work_directory(self, parent: Path) -> Iterator[Path]:
        """An empty directory on tmpfs for this attempt, gone afterwards. A disk that fills up meanwhile is NoRoom."""
        work = parent / self.entry.action_id
        shutil.rmtree(work, ignore_errors=True)  # of an attempt that a crash ended
        work.mkdir(parents=True, mode=0o700)
        try:
            yield work
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NoRoom(f"no space left: {e}", hint="make the file systems of work_dir and state_dir larger") from e
        finally:
            shutil.rmtree(work, ignore_errors=True)


def insist(what: str, undo: Callable[[], None], tries: int = 3) -> None:
    """Run an undo, again if it fails; Stuck if it never works. An undo is harmless when repeated."""
    for left in reversed(range(tries)):
        try:
            return undo()
        except (HibernodeError, OSError) as e:
            _log.warning("%s failed: %s", what, e)
            if not left:
                raise Stuck(f"{what} failed: {e}", hint="look at the workload by hand, then restart the daemon") from e
    return None


def on_error(held: ExitStack) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    """An exit that runs the undos of `held` only if something was raised."""

    def leave(_kind: type[BaseException] | None, error: BaseException | None, _tb: TracebackType | None) -> None:
        if error is not None:
            held.close()

    return leave
