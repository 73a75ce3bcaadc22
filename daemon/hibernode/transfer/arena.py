"""The arena: memory into which pages are received while a workload is frozen, allocated and touched long before.

Why it exists (criu.md's measurements on two cores): receiving into touched huge pages runs at 11 GB/s, into touched 4 KiB pages at 3,
into fresh memory at 0.5 to 1. So the whole arena is one mapping, advised huge, populated once at start, and reused for ever.
"""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass

from hibernode.flow import Stopped, Threads
from hibernode.model import FRAME_PAGES, PAGE, Cancel

CHUNK = FRAME_PAGES * PAGE  # 4 MiB: one chunk becomes one frame
_NEARLY = 0.9  # of the arena: a chunk or two may be on their way back
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
    """`size` bytes in chunks of 4 MiB, shared by all actions of the node. Thread-safe."""

    def __init__(self, size: int) -> None:
        count = max(1, size // CHUNK)
        self._map = mmap.mmap(-1, count * CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._map.madvise(mmap.MADV_DONTDUMP)  # a core of the daemon (its watchdog aborts it) must not hold other people's memory
        self._populate()
        whole = memoryview(self._map)
        self._free = [Chunk(whole[i * CHUNK : (i + 1) * CHUNK]) for i in range(count)]
        self._changed = threading.Condition()
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

    def take(self, threads: Threads) -> Chunk:
        """A free chunk; blocks until there is one. Raises `Stopped` when `threads` stops (it must have `wake` as a stop)."""
        with self._changed:
            self._changed.wait_for(lambda: threads.stopping or self._free)
            if threads.stopping:
                raise Stopped
            chunk = self._free.pop()
        chunk.first_page = chunk.pages = 0
        return chunk

    def wait_for_room(self, size: int, cancel: Cancel) -> None:
        """Return when `size` bytes (of an image that is larger: nearly all) are free. Nothing is reserved. Raises `Cancelled`.

        Asked before a workload is frozen: with an arena full of somebody else's image it would stay frozen until that is shipped."""
        chunks = min(-(-size // CHUNK), int(self.total_bytes // CHUNK * _NEARLY))
        with cancel.waking(self.wake), self._changed:
            self._changed.wait_for(lambda: cancel.reason or len(self._free) >= chunks)
        cancel.check()

    def give_back(self, chunk: Chunk) -> None:
        with self._changed:
            self._free.append(chunk)
            self._changed.notify_all()

    def wake(self) -> None:
        """Let blocked `take`s look again whether their scope stops."""
        with self._changed:
            self._changed.notify_all()
