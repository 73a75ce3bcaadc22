"""Bytes into chunks of the arena, in order: what CRIU sends, and the tar of a writable layer.

Chunks are held back while the workload is frozen, until its part of the arena runs low: compression beside the copy made the pause of a
1 GB process on two (busy) cores three times longer, 0.65 s instead of 0.21 s, for the same time until `ready`.
"""

from __future__ import annotations

import threading
from collections import deque

from hibernode.flow import Channel, Threads
from hibernode.model import PAGE
from hibernode.transfer.arena import CHUNK, Chunk, Share


class Held:
    """Chunks that wait until the workload runs again. One for all that is captured together: whoever finds their part full lets go of what
    the others hold too, or he would wait for it for ever. Thread-safe."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self._chunks: deque[tuple[Channel[Chunk], Chunk]] = deque()
        self._lock = threading.Lock()

    def add(self, out: Channel[Chunk], chunk: Chunk) -> None:
        with self._lock:
            self._chunks.append((out, chunk))

    def release(self) -> None:
        """Hand every chunk to its streams: the workload is running again, or their part runs low."""
        with self._lock:
            while self._chunks:
                out, chunk = self._chunks[0]
                out.put(chunk)  # raises when the scope stops: then the chunk is still ours, and `discard` finds it
                self._chunks.popleft()

    def discard(self) -> None:
        """Give back what was never released. Harmless when nothing is left."""
        with self._lock:
            while self._chunks:
                self.share.give_back(self._chunks.popleft()[1])


class Filling:
    """One run of pages on its way into the arena, and from there to `out`. Of one thread at a time."""

    def __init__(self, out: Channel[Chunk], threads: Threads, held: Held) -> None:
        self._share, self._out, self._threads, self._held = held.share, out, threads, held
        self._chunk: Chunk | None = None
        self._first_page = self._filled = 0  # of the chunk at hand: its number, bytes in it
        threads.on_stop(held.share.wake)

    @property
    def pages(self) -> int:
        """That are full, or were flushed."""
        return self._first_page + self._filled // PAGE

    def room(self) -> memoryview:
        """What is still empty of the chunk at hand, at least a byte. Blocks while its part is full; raises `Stopped`."""
        return (self._chunk or self._open()).memory[self._filled :]

    def advance(self, size: int) -> None:
        """The first `size` bytes of `room` are filled."""
        self._filled += size
        if self._filled == CHUNK:
            self.flush()

    def flush(self) -> None:
        """What there is of the chunk at hand goes; the rest of its last page is zeros."""
        chunk = self._chunk
        if chunk is not None and self._filled:
            whole = -(-self._filled // PAGE) * PAGE
            chunk.memory[self._filled : whole] = bytes(whole - self._filled)
            chunk.first_page, chunk.pages = self._first_page, whole // PAGE
            self._chunk = None
            self._first_page, self._filled = self._first_page + chunk.pages, 0
            self._held.add(self._out, chunk)

    def abandon(self) -> None:
        """Give back the chunk at hand, with what is in it. Harmless when there is none."""
        if self._chunk is not None:
            self._share.give_back(self._chunk)
            self._chunk = None

    def _open(self) -> Chunk:
        self._chunk = self._share.take(self._threads, self._held.release)
        return self._chunk
