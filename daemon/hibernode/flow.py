"""The threads of one transfer: a scope they live in, channels between them, the first error wins, a stop wakes everybody.

    with Threads(cancel) as threads:
        chunks = threads.channel(8)
        threads.start("stream 0", work, chunks)
        ...                                        # the body is one more worker: what it raises stops the others

Leaving the scope joins every thread. If one failed, its exception is raised (not what its end made the others raise); if the action
was cancelled, `Cancelled`. No thread outlives the scope, so nothing can write into an arena that was given back.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Generic, ParamSpec, Self, TypeVar

from hibernode.errors import Stuck
from hibernode.model import Cancel

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_LARGE = 5 << 20  # bytes: more than a packed frame, which is made and let go again and again, and no more than a part's
_libc = ctypes.CDLL(None)
T = TypeVar("T")
P = ParamSpec("P")


class Stopped(Exception):
    """Raised inside workers when the scope is stopping; never leaves the scope, because somebody else's error caused it."""


class Channel(Generic[T]):
    """A bounded queue between threads of one scope. `put` and iteration block; both raise `Stopped` when the scope stops."""

    def __init__(self, limit: int) -> None:
        self._items: deque[T] = deque()
        self._limit = limit
        self._changed = threading.Condition()
        self._closed = self._stopped = False

    def put(self, item: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < self._limit)
            if self._stopped:
                raise Stopped
            self._items.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """No more items: iterating threads end when what is in it is used up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def drain(self) -> list[T]:
        """What nobody took, after a stop."""
        with self._changed:
            items = list(self._items)
            self._items.clear()
        return items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._items or self._closed)
                if self._stopped:
                    raise Stopped
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


def share_memory() -> None:
    """All threads to come share one arena of the C library's allocator, in place of 8 per processor: each keeps what it once had, and
    an idle daemon held 40 MiB for nothing after 200 checkpoints and restores. And what is large is given back when it is let go: by itself
    the C library moves that limit up to 32 MiB, and then the arena is full of holes. Called once, before there are threads."""
    _libc.mallopt(_M_ARENA_MAX, 1)
    _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    _libc.mallopt(_M_TRIM_THRESHOLD, _LARGE)


def trim() -> None:
    """What the C library's allocator keeps, of threads that have ended too, goes back to the kernel."""
    _libc.malloc_trim(0)


class Threads(AbstractContextManager["Threads"]):
    """The scope. `start`, `channel` and `on_stop` may be called from any thread inside it."""

    def __init__(self, cancel: Cancel) -> None:
        self.cancel = cancel
        self._waking = cancel.waking(self._cancelled)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._stops: list[Callable[[], None]] = []
        self._error: BaseException | None = None
        self._stopping = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    def channel(self, limit: int) -> Channel[T]:
        channel: Channel[T] = Channel(limit)
        self.on_stop(channel.stop)
        return channel

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Call `wake` (from any thread, once) when the scope stops early; at once if it already does."""
        with self._lock:
            stopping = self._stopping
            self._stops.append(wake)
        if stopping:
            wake()

    def start(self, name: str, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> threading.Thread:
        def run() -> None:
            try:
                work(*args, **kwargs)
            except BaseException as e:  # noqa: BLE001 - kept, and raised again where the scope ends
                self.fail(e)

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()  # first: one that did not start cannot be waited for
        self._threads.append(thread)
        return thread

    def fail(self, error: BaseException) -> None:
        """The first call that is not a mere `Stopped` decides what the scope raises; but an undo that failed outranks what made it
        necessary."""
        with self._lock:
            if self._error is None or isinstance(self._error, Stopped) or isinstance(error, Stuck):
                self._error = error
            if self._stopping:
                return
            self._stopping = True
            stops = list(self._stops)
        for wake in stops:
            wake()

    def wait(self) -> None:
        """Wait for every thread, whatever became of it."""
        for thread in self._threads:
            thread.join()

    def join(self, threads: Iterable[threading.Thread]) -> None:
        """Wait for these; raise the first error of any thread of the scope."""
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _cancelled(self) -> None:
        self.fail(self.cancel.error)

    def __enter__(self) -> Self:
        self._waking.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self.fail(error)
        self.wait()
        self._waking.__exit__(None, None, None)
        # Not kept: its traceback holds the frames of our threads with all their buffers, and they hold us. A failed restore would go on
        # to hold its memory until the collector of cycles comes by.
        first, self._error = self._error, None
        try:
            if first is not None and first is not error:
                raise first from None
        finally:
            del first, error
