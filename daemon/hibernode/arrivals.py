"""Where containers that are being made meet the restore that is for them. An OCI runtime, a process for each call, asks what it is to do
with a container (`runtime.py` speaks with it, on the event loop); the action that has its image answers, from its thread.

A container runtime gives up on a container that takes it too long and makes another in its place: of two of one name the later counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path

from hibernode.errors import HibernodeError, RestoreFailed
from hibernode.model import Cancel

_LOOK = 0.2  # seconds between two looks at a cancel


@dataclass(frozen=True)
class Order:
    """What the runtime is to do: make the container as it would without us, or restore it from `images`."""

    images: Path | None = None
    flags: tuple[str, ...] = ()  # of runc restore
    env: Mapping[str, str] = field(default_factory=dict)  # for it


@dataclass(eq=False)
class Arrival:
    """One container that its runtime is about to make. `order` is set by the action, `made` by the runtime (an error: it could not),
    `started` when the container may run."""

    action_id: str
    name: str  # in its pod
    id: str
    root: Path  # of runc's states
    bundle: Path
    pod: str = ""  # its UID
    namespace: str = ""
    order: Future[Order] = field(default_factory=Future)
    made: Future[None] = field(default_factory=Future)
    started: Future[None] = field(default_factory=Future)
    touched: bool = False  # something of it was begun, in its root file system at least: it is not to be made of that any more

    @property
    def restored(self) -> bool:
        """It is there, made of an image."""
        if not (self.order.done() and self.made.done()) or self.order.exception() or self.made.exception():
            return False
        return self.order.result().images is not None

    def give(self, order: Order) -> bool:
        """False: nobody waits for it any more."""
        with contextlib.suppress(InvalidStateError):
            self.order.set_result(order)
            return True
        return False

    def end(self, error: HibernodeError) -> None:
        """Whoever waits in it hears of it."""
        for future in (self.order, self.made, self.started):
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)


def _key(of: Arrival) -> tuple[str, str, str]:
    return of.action_id, of.pod, of.name


class Arrivals:
    """All of a node. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[tuple[str, str, str], Arrival] = {}  # by action, pod and name
        self._by_id: dict[str, Arrival] = {}

    def arrive(self, arrival: Arrival) -> None:
        with self._changed:
            before = self._waiting.pop(_key(arrival), None)
            self._waiting[_key(arrival)] = arrival
            self._by_id[arrival.id] = arrival
            self._changed.notify_all()
        if before is not None:
            before.end(RestoreFailed(f"container {arrival.name!r} is being made anew"))

    def next(self, action_id: str, cancel: Cancel) -> Arrival:
        """The next that has come for this action; each is given out once. Blocks until there is one, or raises what `cancel` says."""

        def find() -> Arrival | None:
            return next((each for (action, *_), each in self._waiting.items() if action == action_id), None)

        with self._changed:
            while (found := find()) is None:
                cancel.check()
                self._changed.wait(_LOOK)
            del self._waiting[_key(found)]
            return found

    def awaits(self, container_id: str) -> bool:
        """Its restore goes on, and waits for its start."""
        with self._changed:
            arrival = self._by_id.get(container_id)
        return arrival is not None and not arrival.started.done()

    def started(self, container_id: str) -> None:
        """Its runtime has let it run."""
        with self._changed:
            arrival = self._by_id.pop(container_id, None)
        if arrival is not None:
            with contextlib.suppress(InvalidStateError):
                arrival.started.set_result(None)

    def leave(self, arrival: Arrival) -> None:
        """Nobody asks for it any more, but to start it, if it was restored."""
        with self._changed:
            if self._waiting.get(_key(arrival)) is arrival:
                del self._waiting[_key(arrival)]
            if not arrival.restored and self._by_id.get(arrival.id) is arrival:
                del self._by_id[arrival.id]

    def close(self, action_id: str, error: HibernodeError) -> None:
        """The action has ended: who still waits for it need not."""
        with self._changed:
            gone = [each for (action, *_), each in self._waiting.items() if action == action_id]
            gone += [each for each in self._by_id.values() if each.action_id == action_id and each not in gone]
            for each in gone:
                self._waiting.pop(_key(each), None)
                self._by_id.pop(each.id, None)
        for each in gone:
            each.end(error)


def awaited(future: Future[None], cancel: Cancel, there: Callable[[], bool] = lambda: True) -> None:
    """Its result; or what `cancel` says, as soon as it does. RestoreFailed when what is to be started is no longer `there`."""
    while True:
        cancel.check()
        try:
            return future.result(_LOOK)
        except FutureTimeout:
            if future.done():
                raise
            if not there():
                raise RestoreFailed("a restored container has ended before it was started") from None
