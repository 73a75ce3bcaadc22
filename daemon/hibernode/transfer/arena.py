"""The arena: memory into which pages are received while a workload is frozen, allocated and touched long before.

Why it exists (criu.md's measurements on two cores): receiving into touched huge pages runs at 11 GB/s, into touched 4 KiB pages at 3,
into fresh memory at 0.5 to 1. So the whole arena is one mapping, advised huge, populated once at start, and reused for ever.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hibernode.flow import Stopped, Threads
from hibernode.model import FRAME_PAGES, PAGE, Cancel
from hibernode.transfer.sharing import Part, Sharing

CHUNK = FRAME_PAGES * PAGE  # 4 MiB: one chunk becomes one frame
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module yet


@dataclass(eq=False)
class Chunk:
    """A piece of the arena on its way: pages `first_page` to `first_page + pages` of its image's page numbers."""

    memory: memoryview
    first_page: int = 0
    pages: int = 0

    @property
    def data(self) -> memoryview:
        return self.memory[: self.pages * PAGE]


class Arena:
    """`size` bytes in chunks of 4 MiB, shared by all actions of the node, of which `at_once` fill it at the same time. Thread-safe."""

    def __init__(self, size: int, at_once: int = 2) -> None:
        count = max(1, size // CHUNK)
        self._map = mmap.mmap(-1, count * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._map.madvise(mmap.MADV_DONTDUMP)  # a core of the daemon (its watchdog aborts it) must not hold other people's memory
        self._populate()
        whole = memoryview(self._map)
        self._free = [Chunk(whole[i * CHUNK : (i + 1) * CHUNK]) for i in range(count)]
        self._sharing = Sharing(count, at_once)
        self._changed = threading.Condition()  # who fills a part waits here; whoever waits for one has an event of his own
        self.total_bytes = count * CHUNK

    def _populate(self) -> None:
        try:
            self._map.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # an older kernel: touch every page by hand
            for at in range(0, len(self._map), PAGE):
                self._map[at] = 0

    @property
    def used_bytes(self) -> int:
        return self.total_bytes - len(self._free) * CHUNK

    @property
    def waiting(self) -> int:
        """Actions that wait for a part."""
        return self._sharing.waiting

    @contextmanager
    def share(self, size: int, cancel: Cancel) -> Iterator[Share]:
        """A part for about `size` bytes. Waits, before anybody is frozen, until it can be had: for as long as others fill and ship theirs.
        Raises `Cancelled`. Every chunk of it has to be given back before it is left."""
        given = threading.Event()
        with self._changed:
            part = self._sharing.ask(-(-size // CHUNK), given.set)
        try:
            with cancel.waking(given.set):
                given.wait()
            cancel.check()
            yield Share(self, part)
        finally:
            with self._changed:
                self._sharing.leave(part)
                self._changed.notify_all()

    def wake(self) -> None:
        """Let blocked `take`s look again whether their scope stops."""
        with self._changed:
            self._changed.notify_all()


class Share:
    """What one action has of the arena (`sharing.py`). Thread-safe."""

    def __init__(self, arena: Arena, part: Part) -> None:
        self._free, self._sharing, self._changed = arena._free, arena._sharing, arena._changed
        self._part = part
        self.wake = arena.wake

    def take(self, threads: Threads, let_go: Callable[[], None]) -> Chunk:
        """A free chunk; blocks until there is one. `let_go` is called when the part runs low, and before it blocks: what its owner keeps
        back would be waited for in vain. Raises `Stopped` when `threads` stops (it must have `wake` as a stop)."""
        if self._low():
            let_go()
        if (chunk := self._take(threads, wait=False)) is None:  # somebody asked for what could have been borrowed
            let_go()
            chunk = self._take(threads, wait=True)
        assert chunk is not None
        chunk.first_page = chunk.pages = 0
        return chunk

    def give_back(self, chunk: Chunk) -> None:
        with self._changed:
            self._free.append(chunk)
            self._sharing.give_back(self._part)
            self._changed.notify_all()

    def full(self) -> None:
        """It will take no more: what it has not used is for others."""
        with self._changed:
            self._sharing.full(self._part)
            self._changed.notify_all()

    def _low(self) -> bool:
        with self._changed:
            return self._sharing.low(self._part)

    def _take(self, threads: Threads, *, wait: bool) -> Chunk | None:
        with self._changed:
            while not threads.stopping:
                if self._sharing.take(self._part):
                    return self._free.pop()
                if not wait:
                    return None
                self._changed.wait()
        raise Stopped
