"""The restore side of the page server: `criu lazy-pages` asks for pages of a tree that runs already, frames of the store answer. Twin:
`collect.py`.

CRIU asks over one socket, and takes the answers in the order of its questions: one page for a thread that waits for it, and, for each
process, the next piece of what is left, when it has the one before. So what is asked for is read first, in that order, and what will be
asked for meanwhile, by threads that read ahead: the frames that follow a piece; and those that follow a fault, once faults follow each
other, twice as many each time. One of the threads is always there for what is asked for.

A frame is compared with its digest, decrypted and inflated before a byte of it is given out. Pages that hold zeros are answered as zeros.
Memory: (`room` + readers) frames of 4 MiB, and for each reader what one read takes, 4 times 4 MiB at most.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hibernode.errors import Corrupt, RestoreFailed, StoreUnavailable
from hibernode.flow import Stopped, Threads
from hibernode.model import FRAME_PAGES, PAGE, ImageRef, Meter
from hibernode.ports import Store
from hibernode.transfer import pageproto
from hibernode.transfer.format import Index
from hibernode.transfer.frames import Reader, batches_of, dense, numbers_of
from hibernode.transfer.pageproto import Header, Wire
from hibernode.transfer.places import Numbers
from hibernode.transfer.seal import Seal

_AHEAD = 16  # frames after one that was asked for, at most
_SHORT = 16  # pages of an answer while a thread waits for a later one: 64 KiB
_AGAIN = 1000  # times that a process asks for the same piece, before it is clear that CRIU cannot place it
_AGAIN_ONE = 100_000  # likewise, of one page: each child that the tree forks may ask for it, too
_GROUP = 16  # questions between two looks at the socket: half a millisecond
_QUESTIONS = 32 << 20  # bytes, which the kernel doubles: 87,000 questions that nobody has taken yet, 768 each with what it adds
_SNDBUFFORCE, _RCVBUFFORCE = 32, 33  # asm-generic/socket.h: as SO_SNDBUF and SO_RCVBUF, beyond the limit of net.core
_BACKOFF = 0.1, 5.0  # seconds between two tries of a store that does not answer: at first, and at most
_ZEROS = memoryview(bytes(FRAME_PAGES * PAGE))


def question_sockets() -> tuple[socket.socket, socket.socket]:
    """(ours, that of `criu lazy-pages`). Where the daemon lacks CAP_NET_ADMIN they have what net.core.wmem_max allows: 212,992 bytes, as
    kernels come, are 555 questions."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        for forced, asked in ((_SNDBUFFORCE, socket.SO_SNDBUF), (_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                end.setsockopt(socket.SOL_SOCKET, forced, _QUESTIONS)
            except PermissionError:
                end.setsockopt(socket.SOL_SOCKET, asked, _QUESTIONS)
    return pair


class Shelf:
    """Frames that were read, those that are wanted, and who reads which. Thread-safe. `room`: frames that may be here, those that are asked
    for among them: the first so many, others wait for their turn. The one that was not used for the longest time goes first. `readers`:
    threads that read; all but one may read ahead."""

    def __init__(self, room: int, readers: int, threads: Threads) -> None:
        self._room, self._threads = max(1, room), threads
        self._most_ahead, self._reading_ahead = readers - 1, set[int]()
        self.arrived = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable when a frame has come
        self._changed = threading.Condition()
        self._here: OrderedDict[int, memoryview] = OrderedDict()
        self._reading: set[int] = set()
        self._asked: dict[int, None] = {}  # rows of the index, in the order of the questions
        self._ahead: deque[int] = deque()
        self.closed = False
        threads.on_stop(self._wake)

    def ask(self, rows: Iterable[int]) -> None:
        """These are asked for, and no others any more."""
        with self._changed:
            self._asked = {}
            for row in rows:
                self._asked[row] = None
                if len(self._asked) >= self._room:
                    break
            self._changed.notify_all()

    def expect(self, rows: Iterable[int]) -> None:
        """These may be asked for soon, sooner than what was expected before."""
        with self._changed:
            new = dict.fromkeys(row for row in rows if row not in self._here and row not in self._reading)
            self._ahead = deque([*new, *(row for row in self._ahead if row not in new)][: self._room])
            self._changed.notify_all()

    def get(self, row: int) -> memoryview | None:
        with self._changed:
            if (found := self._here.get(row)) is not None:
                self._here.move_to_end(row)
            return found

    def put(self, row: int, content: memoryview) -> None:
        with self._changed:
            self._reading.discard(row)
            self._reading_ahead.discard(row)
            self._here[row] = content
            for other in [each for each in self._here if each not in self._asked][: max(0, len(self._here) - self._room)]:
                del self._here[other]
            self._changed.notify_all()
        os.eventfd_write(self.arrived, 1)

    def drop(self, row: int) -> None:
        """All of it has been given out."""
        with self._changed:
            self._here.pop(row, None)
            with contextlib.suppress(ValueError):
                self._ahead.remove(row)
            self._changed.notify_all()

    def next(self) -> int | None:
        """The row that is to be read now, by whoever asks; waits for one. None: nothing will be wanted any more."""
        with self._changed:
            while True:
                if self._threads.stopping:
                    raise Stopped
                if self.closed:
                    return None
                if (row := self._pick()) is not None:
                    self._reading.add(row)
                    return row
                self._changed.wait()

    def _pick(self) -> int | None:
        for row in self._asked:
            if row not in self._here and row not in self._reading:
                return row
        may = len(self._reading_ahead) < self._most_ahead and len(self._here) + len(self._reading) < self._room
        while may and self._ahead:
            row = self._ahead.popleft()
            if row not in self._here and row not in self._reading:
                self._reading_ahead.add(row)
                return row
        return None

    def pause(self, seconds: float) -> bool:
        """Wait so long; False if nothing is wanted any more. Raises Stopped as soon as the transfer is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._threads.stopping or self.closed, seconds)
            if self._threads.stopping:
                raise Stopped
            return not self.closed

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def free(self) -> None:
        """When no thread uses it any more."""
        os.close(self.arrived)

    def __len__(self) -> int:
        return len(self._here)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Places:
    """Where in an image the page of a process lies: of those that may come late."""

    def __init__(self, index: Index) -> None:
        present = index.segments[(index.segments["flags"] & pageproto.PRESENT) != 0]
        sizes = present["pages"].astype(np.int64)
        numbers = np.cumsum(sizes) - sizes
        lazy = ((present["flags"] & pageproto.LAZY) != 0) & ((present["dst_id"] & 0xFF) == pageproto.TASK)
        order = np.flatnonzero(lazy)[np.lexsort((present["vaddr"][lazy], present["dst_id"][lazy]))]
        self._dst = (present["dst_id"][order] >> np.uint64(8)).astype(np.int64)
        self._vaddr, self._sizes, self._numbers = present["vaddr"][order].astype(np.int64), sizes[order], numbers[order]
        self._spaces = {int(pid): (int(a), int(b)) for pid, a, b in _runs(self._dst)}
        self._firsts = index.frames["first_page"].astype(np.int64)
        self._ends = self._firsts + index.frames["pages"].astype(np.int64)
        self.pages = int(self._sizes.sum())
        self.left = self._count()

    def find(self, pid: int, vaddr: int) -> tuple[int, int]:
        """(number of the page there, how many follow it in number and address). Corrupt where nothing lies that comes late."""
        a, b = self._spaces.get(pid, (0, 0))
        at = a + int(np.searchsorted(self._vaddr[a:b], vaddr, side="right")) - 1
        skip = (vaddr - int(self._vaddr[at])) // PAGE if at >= a else 0
        if at < a or b == a or vaddr % PAGE or skip >= self._sizes[at]:
            raise Corrupt(f"page socket: process {pid} has no page at {vaddr:#x} that comes late")
        return int(self._numbers[at]) + skip, int(self._sizes[at]) - skip

    def frame(self, number: int) -> tuple[int, int]:
        """(row of the frame with this page, how many of its run follow the page's, itself included); row -1: it is in none, a zero."""
        at = int(np.searchsorted(self._firsts, number, side="right")) - 1
        if at >= 0 and number < self._ends[at]:
            return at, int(self._ends[at]) - number
        return -1, (int(self._firsts[at + 1]) if at + 1 < len(self._firsts) else 1 << 62) - number

    def first(self, row: int) -> int:
        return int(self._firsts[row])

    def _count(self) -> Numbers:
        """Pages of each frame that are to be given out."""
        edges = np.concatenate((self._firsts, self._ends))
        order = np.argsort(self._numbers)
        starts, sizes = self._numbers[order], self._sizes[order]
        total = np.concatenate(([0], np.cumsum(sizes)))
        at = np.searchsorted(starts, edges, side="right")
        before = np.concatenate((starts, [0]))[at - 1], np.concatenate((sizes, [0]))[at - 1]
        below = np.where(at > 0, total[np.maximum(at - 1, 0)] + np.minimum(edges - before[0], before[1]), 0)
        return below[len(self._firsts) :] - below[: len(self._firsts)]


def _runs(values: Numbers) -> list[tuple[int, int, int]]:
    """(value, start, end) of each run of equal ones."""
    if not len(values):
        return []
    cuts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1]))).tolist()
    return [(int(values[a]), a, b) for a, b in zip(cuts, [*cuts[1:], len(values)], strict=True)]


@dataclass
class _Question:
    """A GET that is not answered yet: so many pages at that address of a process, which begin with page `number` of the image, in frame
    `row` (-1: zeros). At most `most` of them lie there, so that the answer cannot have more."""

    pid: int
    vaddr: int
    pages: int
    number: int
    row: int
    most: int

    @property
    def waits(self) -> bool:
        """A thread does: it has touched the page."""
        return self.pages == 1


class Server:
    """One lazy restore's pages of one image. `run` in a thread of its own, `read` in several; all end with CRIU's CLOSE, which makes
    `closed` true, or with the end of the socket, which leaves it False: whoever drives CRIU knows why."""

    def __init__(
        self, pages: socket.socket, wire: Wire, store: Store, seal: Seal, image: ImageRef, index: Index, shelf: Shelf, meter: Meter,
        *, outage: float,
    ) -> None:  # fmt: skip
        """`outage`: seconds for which a store that does not answer is tried again, meanwhile whoever needs a page waits."""
        self._socket, self._wire, self._meter, self._shelf = pages, wire, meter, shelf
        self._store, self._seal, self._image, self._index, self._outage = store, seal, image, index, outage
        self._numbers = numbers_of(index.frames)
        self._places = Places(index)
        self._zeros_left = self._places.pages - int(self._places.left.sum())
        self._questions: deque[_Question] = deque()
        self._in, self._out = bytearray(), deque[memoryview]()
        self._faults: dict[int, tuple[int, int]] = {}  # of each process: the frame of the last one, and how many are read ahead
        self._last: dict[tuple[int, bool], tuple[int, int]] = {}  # of a process, whether one page: address, how often again
        self._over = False  # CRIU's end of the socket is closed
        self.closed = False
        self.asked = 0  # questions so far
        self.heard = time.monotonic()  # when the last one came

    @property
    def waiting(self) -> bool:
        """For frames: somebody in the tree may stand still meanwhile."""
        return bool(self._questions)

    def keep(self, row: int, content: memoryview) -> None:
        """A frame that somebody has read for another purpose."""
        if self._places.left[row] > 0:
            self._shelf.put(row, content)

    # --- the thread that answers ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        poller = select.poll()
        poller.register(self._shelf.arrived, select.POLLIN)
        self._socket.setblocking(False)
        try:
            while not self.closed or self._out:
                poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._out else 0))
                ready = dict(poller.poll())
                if self._shelf.arrived in ready:
                    os.eventfd_read(self._shelf.arrived)
                if ready.get(self._socket.fileno(), 0) & ~select.POLLOUT:
                    self._receive()
                self._send()  # first: what is left of an answer keeps the next from being looked for
                self._answer()
        except (OSError, EOFError):
            return  # CRIU has gone
        finally:
            self._shelf.close()
            self._socket.close()

    def _receive(self) -> None:
        """All there is, with a look at the socket between few of them: CRIU (4.2.1) does not wait when it asks, and dies of a socket that
        is full. EOFError at its end."""
        size, heard = self._wire.size, False
        self._drain()
        while len(self._in) >= size and not self.closed:
            group = self._in[: min(len(self._in) // size, _GROUP) * size]
            del self._in[: len(group)]
            for at in range(0, len(group), size):
                if not self.closed:
                    self._handle(self._wire.decode(group[at : at + size]))
            heard = True
            self._drain()
        if heard:
            self._say_what_is_asked()
        if self._over and not self.closed:
            raise EOFError

    def _drain(self) -> None:
        while not self.closed and not self._over:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            self._over = not data
            self._in += data

    def _say_what_is_asked(self) -> None:
        self._shelf.ask(question.row for question in self._questions if question.row >= 0)

    def _handle(self, header: Header) -> None:
        match header.command:
            case pageproto.GET:
                if header.pages < 1:
                    raise Corrupt("page socket: no pages are asked for")
                self._ask(header)
            case pageproto.CLOSE | pageproto.FORCE_CLOSE:
                self._out.append(memoryview(pageproto.CLOSED))
                self.closed = True
            case unknown:
                raise Corrupt(f"page socket: unknown command {unknown:#x}", hint="is pycriu of the same version as criu?")

    def _ask(self, header: Header) -> None:
        number, run = self._places.find(header.dst_id, header.vaddr)
        row, rest = self._places.frame(number)
        most = min(header.pages, run, rest, FRAME_PAGES, self._placeable(header))
        question = _Question(header.dst_id, header.vaddr, header.pages, number, row, most)
        self._questions.append(question)
        self.asked, self.heard = self.asked + 1, time.monotonic()
        if row >= 0:
            last = min(row + 1 + self._window(question), len(self._index.frames))
            self._shelf.expect(each for each in range(row + 1, last) if self._places.left[each] > 0)

    def _placeable(self, header: Header) -> int:
        """CRIU (4.2.1) asks again and again for a piece that the kernel does not take: it lies in two mappings, since the tree has changed
        the rights of a part. A shorter one fits. One page that is not taken never is: the tree has unmapped more than 2 GiB at a time,
        of which CRIU has only seen a part."""
        who = header.dst_id, (one := header.pages == 1)
        vaddr, times = self._last.get(who, (-1, 0))
        times = times + 1 if vaddr == header.vaddr else 0
        self._last[who] = header.vaddr, times
        if times > (_AGAIN_ONE if one else _AGAIN):
            raise RestoreFailed(
                f"criu lazy-pages asks again and again for the page at {header.vaddr:#x} of process {header.dst_id}",
                hint="the tree has changed its memory in a way that CRIU does not follow: restore it without `lazy`", reason="lazy_stuck",
            )  # fmt: skip
        return max(1, header.pages >> min(times, 40))

    def _window(self, question: _Question) -> int:
        """How many frames after this one are read ahead: it learns from the order of faults."""
        if not question.waits:
            return _AHEAD
        last, window = self._faults.get(question.pid, (-2, 0))
        if question.row != last:
            window = min(max(1, window * 2), _AHEAD) if question.row == last + 1 else 0
            self._faults[question.pid] = question.row, window
        return window

    def _answer(self) -> None:
        """The first question, if its frame is here: later ones have to wait for it."""
        while self._questions and not self._out:
            first = self._questions[0]
            content = self._shelf.get(first.row) if first.row >= 0 else _ZEROS
            if content is None:
                return
            self._questions.popleft()
            self._say_what_is_asked()  # before it may be dropped, or it would be read again
            count = min(first.most, _SHORT) if any(question.waits for question in self._questions) else first.most
            at = (first.number - self._places.first(first.row)) * PAGE if first.row >= 0 else 0
            header = Header(pageproto.ADD_F, pageproto.PRESENT, count, first.vaddr, first.pid)
            self._out.append(memoryview(self._wire.encode(header)))
            self._out.append(content[at : at + count * PAGE])
            self._count(first.row, count)
            self._send()
            self._receive()

    def _count(self, row: int, pages: int) -> None:
        """Of pages that a forked child has asked for again, too, each counts once."""
        if row < 0:
            new = min(pages, self._zeros_left)
            self._zeros_left -= new
            self._meter.add(raw=new * PAGE, zero=new * PAGE)
            return
        new = min(pages, int(self._places.left[row]))
        self._places.left[row] -= new
        self._meter.add(raw=new * PAGE)
        if not self._places.left[row]:
            self._shelf.drop(row)

    def _send(self) -> None:
        while self._out:
            try:
                sent = self._socket.sendmsg([self._out[0], *([self._out[1]] if len(self._out) > 1 else [])])
            except BlockingIOError:
                return
            while sent and self._out:
                taken = min(sent, len(self._out[0]))
                sent -= taken
                if taken == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][taken:]

    # --- the threads that read ------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Frames that are wanted, until nothing is: whatever becomes then of one that was read ahead, the tree has all it needs."""
        reader = Reader(self._store, self._meter)
        try:
            while (row := self._shelf.next()) is not None:
                if (content := self._read(reader, row)) is not None:
                    self._shelf.put(row, content)
        except Exception:
            if not self._shelf.closed:
                raise

    def _read(self, reader: Reader, row: int) -> memoryview | None:
        """None: it is not wanted any more."""
        (batch,) = batches_of(self._index.frames[row : row + 1], self._numbers[row : row + 1], self._image.streams, self._seal)
        began, delay = time.monotonic(), _BACKOFF[0]
        while True:
            try:
                (whole,) = [dense(frame, content, self._index) for frame, content in reader.read(batch)]
            except StoreUnavailable:
                if time.monotonic() - began > self._outage:
                    raise
                if not self._shelf.pause(delay):
                    return None
                delay = min(delay * 2, _BACKOFF[1])
            else:
                return whole
