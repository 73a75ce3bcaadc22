"""The dump side of the page server: socket -> chunks of the arena and the list of segments.

Runs while the workload is frozen, so it does as little as it can: one receive for a segment, straight into the arena. Whoever reads the
page socket closes it on every way out: a reader that stopped and left it open made CRIU wait with the tree held, and CRIU's own
timeout did not end that; a closed socket makes the dump fail and the tree run on.
"""

from __future__ import annotations

import socket
from array import array

import numpy as np

from hibernode.errors import Corrupt
from hibernode.flow import Channel, Threads
from hibernode.model import PAGE
from hibernode.transfer import pageproto
from hibernode.transfer.arena import Chunk
from hibernode.transfer.filling import Filling, Held
from hibernode.transfer.format import SEGMENT, SegmentTable
from hibernode.transfer.pageproto import Header, Wire

SOCKET_BUFFER = 8 << 20  # bytes each way, as the kernel counts: twice what it is asked for; larger ones brought nothing
_SNDBUFFORCE, _RCVBUFFORCE = 32, 33  # asm-generic/socket.h: as SO_SNDBUF and SO_RCVBUF, beyond the limit of net.core
_MAX_SEGMENT_PAGES = 1 << 32  # 16 TiB: beyond it the header is garbage


def page_sockets() -> tuple[socket.socket, socket.socket]:
    """(ours, CRIU's): the page socket of one dump. Where the daemon lacks CAP_NET_ADMIN they have what net.core.wmem_max allows: with
    212,992 bytes, as kernels come, the two wait for each other, and a pause is a fifth longer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in (ours, theirs):
        for forced, asked in ((_SNDBUFFORCE, socket.SO_SNDBUF), (_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                end.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER // 2)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, asked, SOCKET_BUFFER // 2)
    return ours, theirs


def shut(open_: socket.socket) -> None:
    """Wake whoever waits in it; the descriptor stays his."""
    try:
        open_.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already: he has gone


class _Ended(Exception):
    """The socket ended before CRIU closed it: CRIU is gone, and whoever drives it knows why."""


class Collector:
    """One dump's worth of pages. `run` in a thread of its own; `table` and `pages` are complete once it has returned. What it has filled
    waits in `held`, which is shared by all that is captured together."""

    def __init__(self, pages: socket.socket, wire: Wire, out: Channel[Chunk], threads: Threads, held: Held) -> None:
        self._socket, self._wire = pages, wire
        self._filling = Filling(out, threads, held)
        self._segments = array("Q")  # dst_id, vaddr, pages, flags: 32 bytes a segment
        self._dst = 0
        self._opened: int | None = None  # how long the list was when CRIU opened `_dst`
        self.closed = False  # CRIU said that it was finished
        threads.on_stop(lambda: shut(pages))

    @property
    def pages(self) -> int:
        """With content: the image's page numbers run from 0 to here."""
        return self._filling.pages

    @property
    def table(self) -> SegmentTable:
        return np.frombuffer(self._segments.tobytes(), dtype=SEGMENT)

    def run(self) -> None:
        """Receive until CRIU closes. A socket that ends before that leaves `closed` False: whoever drives CRIU knows why."""
        header = memoryview(bytearray(self._wire.size))
        try:
            self._receive(header)
            while not self.closed:
                self._handle(self._wire.decode(header), header)
            self._filling.flush()
        except (_Ended, OSError):
            return
        finally:
            self._socket.close()
            self._filling.abandon()

    def _handle(self, header: Header, following: memoryview) -> None:
        """One message, and what it brings; the next one's header then lies in `following`, unless this was the last."""
        match header.command:
            case pageproto.ADD_F:
                return self._add(header, following)
            case pageproto.OPEN2:
                self._end_space()
                self._dst, self._opened = header.dst_id, len(self._segments)
                self._socket.sendall(pageproto.NO_PARENT_IMAGE)
            case pageproto.PARENT:
                self._socket.sendall(pageproto.NO_PARENT)
            case pageproto.CLOSE | pageproto.FORCE_CLOSE:
                self._end_space()
                self._filling.flush()
                self._socket.sendall(pageproto.CLOSED)
                self.closed = True
                return None
            case unknown:
                raise Corrupt(f"page socket: unknown command {unknown:#x}", hint="is pycriu of the same version as criu?")
        return self._receive(following)

    def _end_space(self) -> None:
        """A space that was opened and got nothing is kept as a segment of no pages: shared memory that nobody has touched has a pagemap all
        the same, and CRIU 4.2.1 does not restore a tree whose memfd or shared mapping lacks its own (criu/shmem.c)."""
        if self._opened == len(self._segments):
            self._segments.extend((self._dst, 0, 0, 0))
        self._opened = None

    def _add(self, header: Header, following: memoryview) -> None:
        if not 0 < header.pages < _MAX_SEGMENT_PAGES or header.vaddr % PAGE:
            raise Corrupt(f"page socket: a segment of {header.pages} pages at {header.vaddr:#x} cannot be")
        self._segments.extend((self._dst, header.vaddr, header.pages, header.flags))
        if header.flags & pageproto.PRESENT:
            self._take(header.pages * PAGE, following)
        else:
            self._receive(following)

    def _take(self, left: int, following: memoryview) -> None:
        """The pages, and with the last of them the header that follows, in one call: of 8,000 mappings of 64 KiB each it is as many calls
        fewer while they are frozen."""
        while left > len(room := self._filling.room()):
            self._receive(room)
            self._filling.advance(len(room))
            left -= len(room)
        self._receive(room[:left], following)
        self._filling.advance(left)

    def _receive(self, *into: memoryview) -> None:
        """Fill all of these, in order."""
        wanted = sum(map(len, into))
        got = self._socket.recvmsg_into(into, 0, socket.MSG_WAITALL)[0]
        if got == wanted:
            return
        for each in into:  # a signal has cut it short, or it has ended
            while got < len(each):
                n = self._socket.recv_into(each[got:], 0, socket.MSG_WAITALL)
                if n == 0:
                    raise _Ended
                got += n
            got -= len(each)
