"""The dump side of the page server: socket -> chunks of the arena and the list of segments.

Runs while the workload is frozen, so it does as little as it can: one header, one receive straight into the arena. Whoever reads the
page socket closes it on every way out: a reader that stopped and left it open made CRIU wait with the tree held, and CRIU's own
timeout did not end that; a closed socket makes the dump fail and the tree run on.
"""

from __future__ import annotations

import socket
from array import array
from collections import deque

import numpy as np

from hibernode.errors import Corrupt
from hibernode.flow import Channel, Threads
from hibernode.model import FRAME_PAGES, PAGE
from hibernode.transfer import pageproto
from hibernode.transfer.arena import Arena, Chunk
from hibernode.transfer.format import SEGMENT, SegmentTable
from hibernode.transfer.pageproto import Header, Wire

SOCKET_BUFFER = 8 << 20  # bytes each way; larger ones brought nothing
# Chunks are held back while the workload is frozen, until the arena is this full: compression beside the copy made the pause of a
# 1 GB process on two (busy) cores three times longer, 0.65 s instead of 0.21 s, for the same time until `ready`.
_FILLED = 0.9
_MAX_SEGMENT_PAGES = 1 << 32  # 16 TiB: beyond it the header is garbage


def page_sockets() -> tuple[socket.socket, socket.socket]:
    """(ours, CRIU's): the page socket of one dump."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
    return ours, theirs


class _Ended(Exception):
    """The socket ended inside a segment: CRIU is gone, and whoever drives it knows why."""


class Collector:
    """One dump's worth of pages. `run` in a thread of its own; `table` and `pages` are complete once it has returned."""

    def __init__(self, pages: socket.socket, wire: Wire, arena: Arena, out: Channel[Chunk], threads: Threads) -> None:
        self._socket, self._wire, self._arena, self._out, self._threads = pages, wire, arena, out, threads
        self._segments = array("Q")  # dst_id, vaddr, pages, flags: 32 bytes a segment
        self._dst = 0
        self._chunk: Chunk | None = None
        self._held_back: deque[Chunk] = deque()
        self.pages = 0  # with content: the image's page numbers run from 0 to here
        self.closed = False  # CRIU said that it was finished
        threads.on_stop(self._shut)
        threads.on_stop(arena.wake)

    @property
    def table(self) -> SegmentTable:
        return np.frombuffer(self._segments.tobytes(), dtype=SEGMENT)

    def run(self) -> None:
        """Receive until CRIU closes. A socket that ends before that leaves `closed` False: whoever drives CRIU knows why."""
        header = bytearray(self._wire.size)
        try:
            while not self.closed and self._receive(memoryview(header)):
                self._handle(self._wire.decode(header))
            self._flush()
        except (_Ended, OSError):
            return
        finally:
            self._socket.close()
            if self._chunk is not None:
                self._arena.give_back(self._chunk)
                self._chunk = None

    def release(self) -> None:
        """Hand every filled chunk to the streams: the workload is running again, or the arena runs low."""
        while self._held_back:
            self._out.put(self._held_back[0])  # raises when the scope stops: then the chunk is still ours, and `discard` finds it
            self._held_back.popleft()

    def discard(self) -> None:
        """Give back what was never released. Harmless when nothing is left."""
        while self._held_back:
            self._arena.give_back(self._held_back.popleft())

    def _shut(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a blocked receive; the descriptor stays ours until run() ends
        except OSError:
            return  # closed already: run() is over

    def _handle(self, header: Header) -> None:
        match header.command:
            case pageproto.ADD_F:
                self._add(header)
            case pageproto.OPEN2:
                self._dst = header.dst_id
                self._socket.sendall(pageproto.NO_PARENT_IMAGE)
            case pageproto.PARENT:
                self._socket.sendall(pageproto.NO_PARENT)
            case pageproto.CLOSE | pageproto.FORCE_CLOSE:
                self._flush()
                self._socket.sendall(pageproto.CLOSED)
                self.closed = True
            case unknown:
                raise Corrupt(f"page socket: unknown command {unknown:#x}", hint="is pycriu of the same version as criu?")

    def _add(self, header: Header) -> None:
        if not 0 < header.pages < _MAX_SEGMENT_PAGES or header.vaddr % PAGE:
            raise Corrupt(f"page socket: a segment of {header.pages} pages at {header.vaddr:#x} cannot be")
        self._segments.extend((self._dst, header.vaddr, header.pages, header.flags))
        if header.flags & pageproto.PRESENT:
            self._take_pages(header.pages)

    def _take_pages(self, left: int) -> None:
        while left:
            chunk = self._chunk or self._open_chunk()
            take = min(left, FRAME_PAGES - chunk.pages)
            if not self._receive(chunk.memory[chunk.pages * PAGE : (chunk.pages + take) * PAGE]):
                raise _Ended
            chunk.pages += take
            self.pages += take
            left -= take
            if chunk.pages == FRAME_PAGES:
                self._flush()

    def _open_chunk(self) -> Chunk:
        if self._arena.used_bytes > self._arena.total_bytes * _FILLED:
            self.release()
        self._chunk = self._arena.take(self._threads)
        self._chunk.first_page = self.pages
        return self._chunk

    def _flush(self) -> None:
        if self._chunk is not None and self._chunk.pages:
            self._held_back.append(self._chunk)
            self._chunk = None

    def _receive(self, into: memoryview) -> bool:
        """Fill `into`; False if the socket ended."""
        got = 0
        while got < len(into):
            n = self._socket.recv_into(into[got:], len(into) - got, socket.MSG_WAITALL)
            if n == 0:
                return False
            got += n
        return True
