"""The pages of a lazy restore, on their way to a tree that runs already: frames out of the store into memory that the filler has mapped,
too (`filler.py`). Twin: `collect.py`.

What somebody waits for is read first. Then what may be wanted soon: the frames that follow a fault, once faults follow each other, twice
as many each time. Then the rest, in order. One of the threads, and half of the room, are always there for what somebody waits for.

A frame is compared with its digest, decrypted and inflated before a byte of it is given out. Memory: `room` frames of 4 MiB, and for each
reader what one read takes, 2 * 16 MiB at most.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hibernode import filler
from hibernode.errors import StoreUnavailable
from hibernode.flow import Stopped, Threads
from hibernode.model import FRAME_PAGES, PAGE, Meter
from hibernode.ports import Store
from hibernode.transfer import pageproto
from hibernode.transfer.format import SegmentTable
from hibernode.transfer.frames import Reader, Unpackers, batches_of, numbers_of, spread
from hibernode.transfer.pagemap import may_come_late
from hibernode.transfer.places import Loan, Numbers, Source, overlaps

_AHEAD = 16  # frames after one that somebody waits for, at most
# Frames that are read ahead of a tree before it runs: its pages are not given out before, and CRIU, which makes it, has better use for the
# processor. Measured on two cores: running after 0.21 to 0.24 s, with all of the room 0.27 to 0.33 (docs/performance.md).
_FIRST = 8
_TOGETHER = 4  # frames that are read at a time where nobody waits: 16 MiB
_BACKOFF = 0.1, 5.0  # seconds between two tries of a store that does not answer: at first, and at most
_MANY, _SMALL = 20_000, 8  # runs, and pages of one
_UNHEARD = 128  # rows that are given before the filler is there to hear of them: its socket takes 278, as kernels come
_LATE = np.dtype([(name, "<u8") for name in ("pid", "page", "pages", "row", "at")])  # as `filler.COLUMNS`


def turn_sockets() -> tuple[socket.socket, socket.socket]:
    """(ours, the filler's): what it is told of rows, and tells."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Plan:
    """Which pages of which processes may come late, and in which row. A row is a frame of one of the image's sources: those of the image
    itself come first, then those of its bases. Pages that are in no frame hold zeros, and are not in the plan."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """`sources`: as `places.find` takes them."""
        self._sources = sources
        frames = [source.index.frames for source in sources]
        self._first = np.cumsum([0, *map(len, frames)])  # row of each source
        self._numbers = [numbers_of(each) for each in frames]
        references = sources[0].index.references
        self._loans = [None, *(Loan(references[references["source"] == n], each) for n, each in enumerate(sources[1:]))]
        self.table = self._late()
        self.rows: Numbers = np.unique(self.table["row"]).astype(np.int64)
        self._pages = np.bincount(self.table["row"].astype(np.int64), self.table["pages"], int(self._first[-1])).astype(np.int64)
        self._next = self._in_streams()

    def _late(self) -> npt.NDArray[np.void]:
        index = self._sources[0].index
        pid, page, number, pages = _late_runs(index.segments)
        start, end, source, there = self._sources[0].origins.stretches(index.pages)
        late, stretch, low, high = overlaps(number, number + pages, start, end)
        pid, page, there, source = (
            pid[late],
            page[late] + low - number[late],
            there[stretch] + low - start[stretch],
            source[stretch],
        )
        found = []
        for n, each in enumerate(self._sources):
            mine = np.flatnonzero(source == n)
            first = each.index.frames["first_page"].astype(np.int64)
            begin, length = there[mine], (high - low)[mine]
            of, frame, low_, high_ = overlaps(begin, begin + length, first, first + each.index.frames["pages"].astype(np.int64))
            table = np.empty(len(of), _LATE)
            table["pid"], table["page"], table["pages"] = pid[mine][of], page[mine][of] + low_ - begin[of], high_ - low_
            table["row"], table["at"] = self._first[n] + frame, low_ - first[frame]
            found.append(table)
        return np.concatenate(found)

    def _in_streams(self) -> dict[int, int]:
        """Row -> the one that lies behind it in its stream, and comes late, too."""
        source = np.searchsorted(self._first, self.rows, side="right") - 1
        frame = self.rows - self._first[source]
        stream, number = np.empty_like(frame), np.empty_like(frame)
        for n, each in enumerate(self._sources):
            mine = source == n
            stream[mine], number[mine] = each.index.frames["stream"][frame[mine]], self._numbers[n][frame[mine]]
        order = np.lexsort((number, stream, source))
        follows = (np.diff(source[order]) == 0) & (np.diff(stream[order]) == 0) & (np.diff(number[order]) == 1)
        rows = self.rows[order]
        return dict(zip(rows[:-1][follows].tolist(), rows[1:][follows].tolist(), strict=True))

    @property
    def late(self) -> int:
        """Bytes of pages that come late, but for those that hold zeros."""
        kept = np.concatenate([source.index.frames["kept"] for source in self._sources]).astype(np.int64)
        kept[self._first[1] :] = self._pages[
            self._first[1] :
        ]  # of a base a page that is referred to is there, and may be many times
        return PAGE * int(np.minimum(kept, self._pages)[self.rows].sum())

    @property
    def scattered(self) -> bool:
        """Very many small runs, of which each takes the filler 36 us (measured): CRIU reads them from files in less."""
        return len(self.table) > _MANY and int(self.table["pages"].sum()) < len(self.table) * _SMALL

    def together(self, row: int) -> Iterator[int]:
        """It and those that can be read with it."""
        for _ in range(_TOGETHER):
            yield row
            if (following := self._next.get(row)) is None:
                return
            row = following

    def pages(self, row: int) -> int:
        """That come late with it."""
        return int(self._pages[row])

    def row(self, source: int, frame: np.void) -> int:
        firsts = self._sources[source].index.frames["first_page"]
        return int(self._first[source]) + int(np.searchsorted(firsts, frame["first_page"]))

    def read(self, reader: Reader, rows: Sequence[int]) -> Iterator[tuple[int, np.void, list[memoryview]]]:
        """Rows of one source, as `Reader.read` has frames."""
        n = int(np.searchsorted(self._first, rows[0], side="right")) - 1
        source, at = self._sources[n], np.array(rows) - self._first[n]
        for batch in batches_of(source.index.frames[at], self._numbers[n][at], source.ref.streams, source.seal, self._loans[n]):
            for frame, content in reader.read(batch):
                yield self.row(n, frame), frame, content

    def keeps(self, row: int, frame: np.void) -> npt.NDArray[np.bool_] | None:
        """Which pages of its run the frame has; None: all."""
        n = int(np.searchsorted(self._first, row, side="right")) - 1
        return None if frame["kept"] == frame["pages"] else self._sources[n].index.keeps[int(frame["first_page"])]


def _late_runs(segments: SegmentTable) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Of each run: process, page of its memory, number of its first page, how many they are."""
    present = segments[(segments["flags"] & pageproto.PRESENT) != 0]
    sizes = present["pages"].astype(np.int64)
    late = may_come_late(present)
    pids, pages = (present["dst_id"] >> np.uint64(8)).astype(np.int64), (present["vaddr"] // PAGE).astype(np.int64)
    return pids[late], pages[late], (np.cumsum(sizes) - sizes)[late], sizes[late]


def inherited(segments: SegmentTable, parents: Mapping[int, int]) -> tuple[int, int]:
    """(Pages that lie where their process's parent has one, too, pages of all processes): what a fork has left shared is among the first.
    `parents`: of each process."""
    rows = segments[((segments["flags"] & pageproto.PRESENT) != 0) & ((segments["dst_id"] & 0xFF) == pageproto.TASK)]
    rows = rows[np.lexsort((rows["vaddr"], rows["dst_id"]))]
    pids, first = np.unique(rows["dst_id"] >> np.uint64(8), return_index=True)
    own = {int(pid): _union(rows[slice(*each)]) for pid, each in zip(pids, itertools.pairwise([*first, len(rows)]), strict=True)}
    found = 0
    for pid, mine in own.items():
        if (theirs := own.get(parents.get(pid, 0))) is not None:
            _, _, low, high = overlaps(*mine, *theirs)
            found += int((high - low).sum())
    return found, int(rows["pages"].sum())


def _union(rows: SegmentTable) -> tuple[Numbers, Numbers]:
    """Of one process, in order of its memory: where runs of pages begin and end. A page is in one of them, though an index may have it
    twice."""
    start = (rows["vaddr"] // PAGE).astype(np.int64)
    end = np.maximum.accumulate(start + rows["pages"].astype(np.int64))
    return np.maximum(start, np.concatenate([start[:1], end[:-1]])), end


@dataclass(frozen=True)
class _Job:
    """Rows that are read by one reader, for each of which there is a slot. `ahead`: nobody waits for them."""

    rows: tuple[int, ...]
    ahead: bool


class Shelf:
    """Memory for rows that are here, and what is read next. Thread-safe. `file` is what the filler maps, as `filler.py` says. A row has its
    slot when it is there, and one that was used last comes first: what is never needed at once is never memory."""

    def __init__(self, room: int, readers: int, threads: Threads, *, runs: bool = True) -> None:
        """`room`: bytes. `readers`: threads that read; all but one may read ahead. `runs`: a tree, which may wait for many pages, and for
        which half of the room is always there; else one slot is, for who is being restored."""
        count = max(2, room // filler.SLOT)
        self.file = os.memfd_create("lazy pages", os.MFD_CLOEXEC)
        os.ftruncate(self.file, count * (filler.SLOT + filler.KEPT))  # what nothing was put into costs nothing
        self._memory = mmap.mmap(self.file, 0)
        whole = np.frombuffer(self._memory, np.uint8)
        self._slots = whole[: count * filler.SLOT].reshape(count, FRAME_PAGES, PAGE)
        self._bits = whole[count * filler.SLOT :].reshape(count, filler.KEPT)
        self._free = list(range(count))
        self._promised = 0  # slots, of rows that are being read
        self._most_ahead, self._reading_ahead = readers - 1, 0
        self._ahead = max(1, count // 2 if runs else count - 1)  # slots for what is read ahead
        self._now = min(_FIRST, self._ahead) if runs else self._ahead  # how many of them, until something is given out
        self._threads, self._changed = threads, threading.Condition()
        self._left: dict[int, None] = {}  # rows that nobody has begun to read, in the order in which they are wanted
        self._wanted, self._soon = deque[int](), deque[int]()
        self._given = 0
        self.closed = False
        threads.on_stop(self._wake)

    def begin(self, plan: Plan) -> None:
        """All of these will be wanted."""
        self._plan, self._left = plan, dict.fromkeys(plan.rows.tolist())

    @property
    def given(self) -> int:
        """Rows that the filler has, and is not done with."""
        return self._given

    @property
    def used(self) -> int:
        """Slots that are full, or promised."""
        return len(self._bits) - len(self._free) + self._promised

    def want(self, row: int, soon: Iterable[int] = ()) -> None:
        """Somebody waits for it; and may, soon, for these."""
        with self._changed:
            self._wanted.append(row)
            self._soon = deque([*soon, *self._soon][:_AHEAD])
            self._changed.notify_all()

    def take(self, row: int) -> bool:
        """Is there a slot for a row that somebody has read for another purpose? If not it is read again when it is wanted."""
        with self._changed:
            if row not in self._left or self.used >= min(self._ahead, _UNHEARD):
                return False
            del self._left[row]
            self._promised += 1
            return True

    def next(self) -> _Job | None:
        """What is to be read now, by whoever asks; waits for something. None: nothing will be wanted any more."""
        with self._changed:
            while True:
                if self._threads.stopping:
                    raise Stopped
                if self.closed:
                    return None
                if (job := self._pick()) is not None:
                    self._reading_ahead += job.ahead
                    return job
                self._changed.wait()

    def _pick(self) -> _Job | None:
        while self._wanted and self.used < len(self._bits):
            row = self._wanted.popleft()
            if row in self._left:
                return self._job([row], ahead=False)
        room = self._now - self.used
        if self._reading_ahead >= self._most_ahead or room <= 0:
            return None
        while self._soon:
            row = self._soon.popleft()
            if row in self._left:
                return self._job([row], ahead=True)
        for row in self._left:
            some = [each for each in self._plan.together(row) if each in self._left]
            return self._job(some[: -(-room // (self._most_ahead - self._reading_ahead))], ahead=True)
        return None

    def _job(self, rows: Sequence[int], *, ahead: bool) -> _Job:
        for row in rows:
            del self._left[row]
        self._promised += len(rows)
        return _Job(tuple(rows), ahead)

    def lay(self, row: int, frame: np.void, content: Iterable[memoryview]) -> int:
        """A frame into a slot of its own; from then on it is the filler's."""
        with self._changed:
            slot = self._free.pop()
            self._promised -= 1
        keep = self._plan.keeps(row, frame)
        spread(content, keep, self._slots[slot])
        if keep is None:
            self._bits[slot] = 0xFF
        else:
            self._bits[slot] = np.packbits(np.pad(keep, (0, FRAME_PAGES - len(keep))), bitorder="little")
        with self._changed:
            self._given += 1
        return slot

    def finish(self, job: _Job) -> None:
        with self._changed:
            self._reading_ahead -= job.ahead
            self._changed.notify_all()

    def put_back(self, row: int, slot: int, *, again: bool) -> None:
        """The filler is done with a slot; `again`: but not with its row."""
        with self._changed:
            self._free.append(slot)
            self._given -= 1
            if again:
                self._left[row] = None
            else:
                self._now = self._ahead
            self._changed.notify_all()

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
        del self._slots, self._bits
        self._memory.close()
        os.close(self.file)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Server:
    """The pages of one restore. `run` in a thread of its own, `read` in several; all end with the filler's end of the socket: the keeper
    knows whether all is in."""

    def __init__(
        self, turns: socket.socket, store: Store, plan: Plan, shelf: Shelf, meter: Meter, *, outage: float, unpackers: int = 1
    ) -> None:
        """`outage`: seconds for which a store that does not answer is tried again, meanwhile whoever needs a page waits. `unpackers`:
        frames that are inflated at a time."""
        self._socket, self._store, self._plan, self._shelf = turns, store, plan, shelf
        self._meter, self._outage, self._unpackers = meter, outage, Unpackers(unpackers)
        self._fault, self._window = -2, 0  # the row of the last one, and how many are read ahead
        self.heard = time.monotonic()  # when the filler has said something

    def run(self) -> None:
        try:
            while data := self._socket.recv(filler.TURN.size):
                self.heard = time.monotonic()
                self._hear(*filler.TURN.unpack(data))
        except OSError:
            return  # it has gone
        finally:
            self._shelf.close()
            self._socket.close()

    def _hear(self, row: int, slot: int) -> None:
        if slot == filler.WANTED:
            self._shelf.want(row, range(row + 1, row + 1 + self._ahead_of(row)))
        elif slot <= filler.BACK:
            self._shelf.put_back(row, filler.BACK - slot, again=True)
        else:
            self._meter.add(raw=self._plan.pages(row) * PAGE)
            self._shelf.put_back(row, slot, again=False)

    def _ahead_of(self, row: int) -> int:
        """How many rows after this one are read ahead: it learns from the order of faults."""
        follows = self._fault < row <= self._fault + max(1, self._window) + 1
        self._fault, self._window = row, min(max(1, self._window * 2), _AHEAD) if follows else 0
        return self._window

    def keep(self, source: int, frame: np.void, content: Iterable[memoryview]) -> None:
        """A frame that somebody has read for another purpose."""
        row = self._plan.row(source, frame)
        if self._shelf.take(row):
            self._give(row, frame, content)

    def read(self) -> None:
        """What is wanted, until nothing is: whatever becomes then of what was read ahead, the tree has all it needs."""
        reader = Reader(self._store, self._meter, self._unpackers)
        try:
            while (job := self._shelf.next()) is not None:
                self._read(reader, dict.fromkeys(job.rows))
                self._shelf.finish(job)
        except Exception:
            if not self._shelf.closed:
                raise

    def _read(self, reader: Reader, left: dict[int, None]) -> None:
        began, delay = time.monotonic(), _BACKOFF[0]
        while left:
            try:
                for row, frame, content in self._plan.read(reader, list(left)):
                    del left[row]
                    self._give(row, frame, content)
            except StoreUnavailable:
                if time.monotonic() - began > self._outage:
                    raise
                if not self._shelf.pause(delay):
                    return
                delay = min(delay * 2, _BACKOFF[1])

    def _give(self, row: int, frame: np.void, content: Iterable[memoryview]) -> None:
        slot = self._shelf.lay(row, frame, content)
        with contextlib.suppress(OSError):  # it has gone: `run` sees it, too
            self._socket.send(filler.TURN.pack(row, slot))
