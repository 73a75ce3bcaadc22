"""The filler of a lazy restore: gives a tree its pages while it runs. It stands where `criu lazy-pages` would.

CRIU hands it the userfaultfd of each process it makes (`lazy-pages.socket`, criu/uffd.c). The daemon brings frames, verified and inflated,
in memory that both have mapped; here they are copied to where their pages lie now (UFFDIO_COPY): first to whoever waits, then in the
background. Which pages are still to come, and where, `missing.py` knows. What is missing there holds zeros.

One thread, and that is the point: the kernel lets a program go on with what it does to its memory (fork, mremap, munmap, madvise) as soon
as the event of it is read. So nothing may be copied between that and the moment in which it is known where things lie now, and nothing that
was decided before. While an event is not read the kernel takes no copies (EAGAIN, `mmap_changing` in fs/userfaultfd.c), and a copy that was
begun holds the change up: what is copied is never old.

A page that the kernel has no place for (ENOENT) is nobody's only if it says so twice, with no event read between: the first answer may be
of a change whose event comes later, but then the second is EAGAIN. Of a range it may mean that it lies in two mappings: it is halved.

What the kernel tells is not always how it is. It sends events after it has let go of the memory map, so that those of several threads may
come in another order than what they tell of; and it tells of an unmapping that it has taken back (`mmap` with MAP_FIXED that fails, since
Linux 6.12). So what was told between two moments in which nothing changes is a `_Group`, which is compared with the kernel's own mappings
before a page is copied to whoever is in it; where the two differ the tree is given up.

Whatever is not understood ends it, and that ends the tree: `keeper.py`, whose child it is, kills whoever lacks pages before the
userfaultfds are closed. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from hibernode.missing import Extent, Missing

PAGE, FRAME_PAGES = 4096, 1024  # as in model.py
KEPT = FRAME_PAGES // 8  # bytes: a bit for each page of a slot, the first in the lowest; the others hold zeros
SLOT = FRAME_PAGES * PAGE
COLUMNS = 5  # of the table, unsigned, 64 bits: pid, page, pages, row, at
# From the daemon, (row, slot): it lies there. To it, (row, slot): it has been given out; (row, WANTED): somebody waits for it; (row,
# BACK - slot): the slot is free, and the row is to come again.
TURN = struct.Struct("=qq")
WANTED, BACK = -1, -2
SOCKET = "lazy-pages.socket"  # criu/include/uffd.h
FINISHED = 0x52535446  # likewise, LAZY_PAGES_RESTORE_FINISHED

_COPY, _ZERO, _RANGE = struct.Struct("=QQQQq"), struct.Struct("=QQQq"), struct.Struct("=QQ")
_UFFDIO_COPY, _UFFDIO_ZEROPAGE, _UFFDIO_WAKE, _UFFDIO_CONTINUE = 0xC028AA03, 0xC020AA04, 0x8010AA02, 0xC020AA07
_MESSAGE = struct.Struct("=B7xQQQ")  # struct uffd_msg
_PAGEFAULT, _FORK, _REMAP, _REMOVE, _UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
_AT_ONCE = 64  # events that are read in one go
_PIECE = 256  # pages that are copied between two looks at who waits: 0.5 ms
_AROUND = 16  # pages that one who waits is given
_AGAIN = 0.001  # seconds until a copy is tried again that the kernel would not take
_STARVED = 20.0  # seconds for which there may be no memory for a page
_SAMPLES, _ASKED = 64, 20_000  # pages of a mapping, extents of a process, that the kernel is asked of
_MOMENT = 0.0002  # seconds in which somebody who has sent an event goes on, where a processor is free
_ORDER = "a process has changed its mappings, and what the kernel has told of it is not how they are, or may not be"
_NOWHERE = 1 << 16  # an address that is no mapping's: programs begin behind it


class Lost(Exception):
    """Not all pages will come."""


class _Gone(Exception):
    """The process has ended, or is another program."""


def main(listening: socket.socket, pages: socket.socket, memory: int, table: str, keeper: int) -> int:
    """Until all is in: 0. If that cannot be, why, on stderr, and 1. Without a keeper above it, it stays until nobody lacks a page."""
    spaces: dict[int, Space] = {}
    try:
        with contextlib.closing(Filler(listening, pages, memory, spaces)) as one:
            one.run(table)
    except Lost as e:
        print(f"Error: {e}", file=sys.stderr, flush=True)
    except Exception as e:  # noqa: BLE001 - whatever it is, the tree lacks its pages
        print(f"Error: the filler has failed: {e!r}", file=sys.stderr, flush=True)
    else:
        return 0
    while os.getppid() != keeper and any(space.lives() for space in spaces.values()):
        time.sleep(0.01)
    return 1


class _Told(NamedTuple):
    """Pages from `start` to `end` are in a mapping that is filled, or in none. `sure`: the kernel is asked in any case. What was merely
    unmapped may be mapped again: a mapping that grows where it is tells nothing."""

    start: int
    end: int
    mapped: bool
    sure: bool = False


class Space:
    """The address space of one process: what is missing there, and who waits."""

    def __init__(self, uffd: int, missing: Missing) -> None:
        self.uffd, self.missing = uffd, missing
        self.waiting: set[int] = set()  # pages
        self.group: _Group | None = None  # of what was told of it, as long as that may not be all
        self.among: list[_Group] = []  # those of its ancestors that were open when it was forked

    @property
    def held(self) -> bool:
        """Nothing is copied: it is not known whether all is as it was told."""
        return self.group is not None or bool(self.among)

    def events(self) -> Iterator[tuple[int, int, int, int]]:
        """All there are: kind and what it says."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.uffd, _MESSAGE.size * _AT_ONCE):
                yield from _MESSAGE.iter_unpack(data)

    def copy(self, page: int, pages: int, source: int) -> int:
        """As many of these as are settled: there, or nobody's any more. 0: not now. Whoever waits for them goes on."""
        once = False
        while not self.held:
            request = bytearray(_COPY.pack(page * PAGE, source, pages * PAGE, 0, 0))
            try:
                fcntl.ioctl(self.uffd, _UFFDIO_COPY, request)
            except OSError as e:
                copied = _COPY.unpack(request)[-1]
                if copied > 0:
                    return int(copied) // PAGE
                if e.errno == errno.EEXIST:  # such as a huge page of the parent's, of which only a part was put there
                    raise Lost(f"the page at {page * PAGE:#x} is there already, and nobody has given it") from e
                if e.errno != errno.ENOENT or (pages == 1 and once):
                    return self._not_copied(page, e)
                pages, once = max(1, pages // 2), pages == 1
            else:
                return pages
        return 0

    def zero(self, page: int) -> bool:
        """Nothing is missing there: who waits has zeros. False: not now."""
        if self.held:
            return False
        for once in (True, False):
            try:
                fcntl.ioctl(self.uffd, _UFFDIO_ZEROPAGE, bytearray(_ZERO.pack(page * PAGE, PAGE, 0, 0)))
            except OSError as e:
                if e.errno != errno.ENOENT or not once:
                    return bool(self._not_copied(page, e))
            else:
                break
        return True

    def _not_copied(self, page: int, error: OSError) -> int:
        match error.errno:
            case errno.EEXIST | errno.ENOENT:
                self.wake(page)
                return 1
            case errno.EAGAIN | errno.ENOMEM:
                return 0
            case errno.ESRCH:
                raise _Gone from error
        raise Lost(f"the page at {page * PAGE:#x} is not taken: {error}") from error

    def wake(self, page: int) -> None:
        """Whoever waits for it looks again."""
        fcntl.ioctl(self.uffd, _UFFDIO_WAKE, _RANGE.pack(page * PAGE, PAGE))

    def lives(self) -> bool:
        return self._said_of(_NOWHERE // PAGE) != errno.ESRCH

    def changing(self) -> bool:
        """There is an event that was not read, or who sent it has not seen that it was."""
        return self._said_of(_NOWHERE // PAGE) == errno.EAGAIN

    def has(self, expected: Mapping[int, bool]) -> bool | None:
        """Are these pages in a mapping that is filled, or not, as expected? None: it changes just now."""
        found = {page: self._said_of(page) for page in expected}
        if errno.ESRCH in found.values():
            raise _Gone
        if errno.EAGAIN in found.values():
            return None
        return all((found[page] == errno.EINVAL) == mapped for page, mapped in expected.items())

    def lacks(self, pages: Iterable[int]) -> bool:
        """Is one of them in no mapping that is filled?"""
        return any(self._said_of(page) == errno.ENOENT for page in pages)

    def _said_of(self, page: int) -> int:
        """The kernel's error for a request that private memory never has (UFFDIO_CONTINUE): EINVAL, but where nothing is filled ENOENT."""
        try:
            fcntl.ioctl(self.uffd, _UFFDIO_CONTINUE, bytearray(_ZERO.pack(page * PAGE, PAGE, 0, 0)))
        except OSError as e:
            return e.errno or 0
        return 0


class _Group:
    """What was told of a process since a moment in which nothing changed there, and who was forked off it meanwhile."""

    def __init__(self, root: Space) -> None:
        self.root, self.told, self.emptied = root, list[_Told](), False
        self.kin: list[tuple[Space, int]] = []  # and how much had been told when they were forked
        root.group = self

    def add(self, child: Space) -> None:
        child.among.append(self)
        self.kin.append((child, len(self.told)))

    def expected(self) -> Iterator[tuple[Space, dict[int, bool]]]:
        """Of each of them: pages that are mapped, or not, if all is as it was told. A child has what its parent had until it was forked,
        and what the parent has changed since still lies where it was."""
        yield self.root, _expected(self.told)
        for child, count in self.kin:
            since = [extent for told in self.told[count:] for extent in child.missing.within(told.start, told.end)[:_SAMPLES]]
            yield child, _expected([each._replace(sure=True) for each in self.told[:count]]) | dict.fromkeys(_ends(since), True)

    def close(self) -> None:
        self.root.group = None
        for child, _ in self.kin:
            child.among.remove(self)


def _expected(told: Sequence[_Told]) -> dict[int, bool]:
    """Some pages of each; a later one counts."""
    expected: dict[int, bool] = {}
    for at, each in enumerate(told):
        before = [one for one in told[:at] if one.mapped]
        for page in _some(each.start, each.end):
            if each.mapped or each.sure or any(one.start <= page < one.end for one in before):
                expected[page] = each.mapped
        expected |= {page: each.mapped for page in expected if each.start <= page < each.end}
    return expected


def _some(start: int, end: int) -> list[int]:
    """The first and the last of these pages, and some between, evenly."""
    return [*range(start, end, max(1, (end - start) // _SAMPLES)), end - 1]


def _ends(extents: Iterable[Extent]) -> Iterator[int]:
    for extent in extents:
        yield extent.page
        yield extent.end - 1


class Filler:
    """One lazy restore. `spaces`: by userfaultfd, all that lack pages."""

    def __init__(self, listening: socket.socket, pages: socket.socket, memory: int, spaces: dict[int, Space]) -> None:
        """`memory`: a file of slots, as many as fit, and behind them the bits of each."""
        self._listening, self._daemon, self.spaces = listening, pages, spaces
        self._memory = mmap.mmap(memory, 0)
        self._slots = len(self._memory) // (SLOT + KEPT)
        self._first = ctypes.c_char.from_buffer(self._memory)
        self._criu: socket.socket | None = None
        self._tables: dict[int, Missing] = {}  # of processes that are not made yet
        self._restored = False  # CRIU has said that all are made: until then a mapping may be none of ours yet
        self._here: dict[int, int] = {}  # row -> slot
        self._asked: dict[int, list[tuple[Space, int]]] = {}  # row -> who waits for a page of it
        self._again: list[tuple[Space, int]] = []  # who waits for a page that the kernel would not take now
        self._groups: dict[_Group, None] = {}  # those that are open
        self._stalled = False  # so with what is given out in the background
        self._moved = time.monotonic()  # when a page was settled, or none waited for the kernel
        self._poller = select.epoll()

    def run(self, table: str) -> None:
        """Until nobody lacks a page. Raises Lost."""
        self._load(table)
        for each in (self._listening, self._daemon):
            self._poller.register(each, select.EPOLLIN)
        while not (self._restored and not self.spaces):
            self._look()
            self._catch_up()
            if self._restored:
                self._give()
                self._finish()

    def _catch_up(self) -> None:
        """Whoever has been told of, or waits, is served; for a moment that is tried again and again: who changes its memory all the time
        is quiet for some microseconds only."""
        until = time.monotonic() + _MOMENT
        while True:
            for group in list(self._groups):
                self._settle(group)
            again, self._again = self._again, []
            for space, page in again:
                self._serve(space, page)
            if not (self._groups or self._again) or time.monotonic() > until:
                return

    def close(self) -> None:
        """All but the userfaultfds that are left: they end with the process, and it only when nobody lacks a page."""
        del self._first
        self._memory.close()
        self._poller.close()
        if self._criu is not None:
            self._criu.close()

    def _load(self, table: str) -> None:
        columns = array("Q")
        with open(table, "rb") as file:
            columns.frombytes(file.read())
        for at in range(0, len(columns), COLUMNS):
            pid, *extent = columns[at : at + COLUMNS]
            self._tables.setdefault(pid, Missing()).add(Extent(*extent))

    def _look(self) -> None:
        """At all that has happened; waits for something if there is nothing else to do."""
        waits = bool(self._again or self._stalled or self._groups)
        if waits and time.monotonic() > self._moved + _STARVED:
            raise Lost(f"for {_STARVED:.0f} s no page was taken: there is no memory, or it is changed all the time")
        ready = self._poller.poll(_AGAIN if waits else 0 if self._restored and self._here else -1)
        if not waits:
            self._moved = time.monotonic()
        for number, _ in ready:
            if number == self._listening.fileno():
                self._accept()
            elif number == self._daemon.fileno():
                self._hear_daemon()
            elif self._criu is not None and number == self._criu.fileno():
                self._hear_criu(self._criu)
            elif (space := self.spaces.get(number)) is not None:  # it may have ended just now
                with self._ending(space):
                    self._follow(space)

    # --- CRIU --------------------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        self._criu, _ = self._listening.accept()
        self._poller.unregister(self._listening)
        self._poller.register(self._criu, select.EPOLLIN)

    def _hear_criu(self, criu: socket.socket) -> None:
        """One message: a process and its userfaultfd, one that has none since it is dead, or that all are made."""
        pid = int.from_bytes(criu.recv(4, socket.MSG_WAITALL), sys.byteorder, signed=True)
        if pid == FINISHED:  # nobody of the tree runs yet (criu/cr-restore.c)
            self._insist_made()
            self._restored, self._moved = True, time.monotonic()
            self._poller.unregister(criu)
        elif pid > 0:
            uffd = socket.recv_fds(criu, 1, 1)[1][0]
            os.set_inheritable(uffd, False)
            self._add(Space(uffd, self._tables.pop(pid, Missing())))
        elif pid == 0:
            raise Lost("CRIU has ended before all was restored")

    def _insist_made(self) -> None:
        """All that is missing lies in mappings that are filled: some pages of it are asked for."""
        made = all(not missing for missing in self._tables.values())  # of those that never came
        for space in self.spaces.values():
            extents = list(space.missing)
            made = made and not space.lacks(_ends(extents[:: len(extents) // _ASKED + 1]))
        if not made:
            raise Lost("CRIU has not made all the memory that is to be filled")

    def _add(self, space: Space) -> None:
        self.spaces[space.uffd] = space
        self._poller.register(space.uffd, select.EPOLLIN)

    def _finish(self) -> None:
        """Of a process that lacks nothing the kernel is to ask no more: its new pages cost it nothing then."""
        for space in [each for each in self.spaces.values() if not each.missing and not each.held]:
            self._end(space)

    def _end(self, space: Space) -> None:
        if not self._open(space):
            return
        del self.spaces[space.uffd]
        space.waiting.clear()
        os.close(space.uffd)  # and with it, it is not looked at any more; whoever waits has zeros

    def _open(self, space: Space) -> bool:
        """Its number may be another one's by now."""
        return self.spaces.get(space.uffd) is space

    @contextlib.contextmanager
    def _ending(self, space: Space) -> Iterator[None]:
        try:
            yield
        except _Gone:
            self._end(space)

    # --- the daemon ------------------------------------------------------------------------------------------------------------

    def _hear_daemon(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := self._daemon.recv(TURN.size, socket.MSG_DONTWAIT):
                row, slot = TURN.unpack(data)
                self._here[row] = slot
                for space, page in self._asked.pop(row, ()):
                    self._serve(space, page)
                self._keep_room()
            raise Lost("the daemon has gone")

    def _keep_room(self) -> None:
        """While CRIU still restores nothing is given out but to who waits, and who waits may want more than there is room for: so one slot
        is always free. Held (`serve.Shelf`), all others may be full of what was read ahead."""
        while not self._restored and len(self._here) >= self._slots:
            row = next(iter(self._here))
            self._say(row, BACK - self._here.pop(row))

    def _say(self, row: int, slot: int) -> None:
        try:
            self._daemon.send(TURN.pack(row, slot))  # it always listens
        except OSError as e:
            raise Lost(f"the daemon has gone: {e}") from e

    # --- a process -------------------------------------------------------------------------------------------------------------

    def _follow(self, space: Space) -> None:
        """All that it has done since. Those who wait while its memory changes look again, wherever theirs lies now."""
        changed = False
        for kind, *words in space.events():
            a, b, c = (word // PAGE for word in words)
            if kind == _PAGEFAULT:
                space.waiting.add(b)
                self._again.append((space, b))
                continue
            changed = True
            group = space.group or _Group(space)
            self._groups[group] = None
            if kind == _FORK:
                self._fork(group, words[0] & 0xFFFFFFFF)
            elif kind == _REMAP:
                space.missing.move(a, b, c)
                group.told += [_Told(a, a + c, mapped=False), _Told(b, b + c, mapped=True)]
            elif kind == _REMOVE:
                group.emptied |= bool(space.missing.remove(a, b))
            elif kind == _UNMAP:
                group.told.append(_Told(a, b, mapped=False))
                group.told += [_Told(each.page, each.end, mapped=False, sure=True) for each in space.missing.remove(a, b)]
            else:
                raise Lost(f"the kernel tells of something unknown: {kind:#x}")
        if changed:
            waiting, space.waiting = space.waiting, set()
            for page in waiting:
                space.wake(page)

    def _fork(self, group: _Group, uffd: int) -> None:
        """The child lacks what its parent lacked when it was forked. Where the parent was told to have emptied some of it just before, that
        may have been just afterwards."""
        if group.emptied:
            raise Lost(_ORDER)
        self._add(child := Space(uffd, group.root.missing.copy()))
        for each in (group, *group.root.among):
            each.add(child)

    def _settle(self, group: _Group) -> None:
        """If nothing changes any more: what was told of it is how it is, or Lost."""
        if self._open(group.root) and group.root.changing():
            return
        for space, expected in group.expected():
            if self._open(space):
                with self._ending(space):
                    if (found := space.has(expected)) is None:
                        return
                    if not found:
                        raise Lost(_ORDER)
        group.close()
        del self._groups[group]

    def _serve(self, space: Space, page: int) -> None:
        """Who waits for this page has it, or its row is asked for."""
        with self._ending(space):
            if page in space.waiting and not self._served(space, page):
                self._again.append((space, page))

    def _served(self, space: Space, page: int) -> bool:
        """False: the kernel does not take it now."""
        if (found := space.missing.find(page)) is not None:
            if (slot := self._here.get(found.row)) is None:
                self._ask(found.row, space, page)
                return True
            if not self._copy(space, found, slot, _AROUND):
                return False
        if page in space.waiting and not space.zero(page):
            return False
        space.waiting.discard(page)
        self._moved = time.monotonic()
        return True

    def _ask(self, row: int, space: Space, page: int) -> None:
        if row not in self._asked:
            self._say(row, WANTED)
        self._asked.setdefault(row, []).append((space, page))

    def _give(self) -> None:
        """A piece of what is here, to whoever lacks it."""
        left, self._stalled = _PIECE, False
        for row, slot in list(self._here.items()):
            if (left := self._give_row(row, slot, left)) <= 0:
                return

    def _give_row(self, row: int, slot: int, left: int) -> int:
        """How many pages may still be given in this turn. A row that nobody lacks is done with."""
        for space in list(self.spaces.values()):
            with self._ending(space):
                for extent in space.missing.of_row(row):
                    at = extent.page
                    while at < extent.end:
                        if left <= 0:
                            return 0
                        if not (settled := self._copy(space, extent.part(at, extent.end), slot, left)):
                            self._stalled = True
                            return left
                        at, left = at + settled, left - settled
        self._say(row, self._here.pop(row))
        return left

    def _copy(self, space: Space, extent: Extent, slot: int, most: int) -> int:
        """How many of its first pages are missing no longer; 0: not now. Those that hold zeros are left out, for whoever touches them."""
        bits = self._kept(slot) >> extent.at
        wanted = min(extent.pages, most)
        if bits & 1:
            pages = min((bits ^ (bits + 1)).bit_length() - 1, wanted)  # as many ones as there are at the end
            pages = space.copy(extent.page, pages, ctypes.addressof(self._first) + slot * SLOT + extent.at * PAGE)
            space.waiting.difference_update(range(extent.page, extent.page + pages) if space.waiting else ())
        else:
            pages = min((bits & -bits).bit_length() - 1, wanted) if bits else wanted
        if pages:
            space.missing.remove(extent.page, extent.page + pages)
            self._moved = time.monotonic()
        return pages

    def _kept(self, slot: int) -> int:
        at = self._slots * SLOT + slot * KEPT
        return int.from_bytes(self._memory[at : at + KEPT], "little")
