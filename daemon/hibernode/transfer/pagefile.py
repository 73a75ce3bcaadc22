"""One pages file of a restore, filled at known offsets by many threads; what is dense of it lies in huge pages.

A page of tmpfs that is written for the first time is found, cleared or copied, and charged, 262,144 times for each GiB, and all that under
one lock of the file. Blocks of 2 MiB that will be full are asked for as huge pages instead (MADV_COLLAPSE, Linux 6.1: it needs no setting
of the machine and no mount option) and filled through a mapping: 0.11 s per GiB instead of 0.43 on one thread, and threads do not wait
for each other; CRIU then reads and frees them at 0.62 s per GiB instead of 1.03 (two cores, kernel 6.18). Where the kernel does not make
one, everything is written as ever: nothing but time hangs on it.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hibernode.model import PAGE

BLOCK_PAGES = 512  # of a huge page, 2 MiB
_BLOCK = BLOCK_PAGES * PAGE
_MADV_COLLAPSE = 25  # Linux 6.1; not in the mmap module yet
_PATIENCE = 4  # blocks that may fail: memory is in pieces then, and putting it together each time would take longer than it saves
_LOCKS = 64  # so many blocks are made at a time, at most
_FIXED = 0x10  # MAP_FIXED
_MAX_PIECES = 1024  # IOV_MAX
_FIRST = bytes(PAGE)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class PageFile:
    """A new file with room for so many pages, all of them holes. `close` it before anybody else reads it. FileExistsError if there is
    one. Memory beside its pages: as much as there are stretches, and some for each block that was written."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._starts: list[int] = []  # of runs of dense blocks, in order, and where they end
        self._ends: list[int] = []
        self._made: dict[int, bool] = {}  # dense blocks that were asked for: is it a huge page?
        self._failed = 0  # of them, how many the kernel would not make
        self._mapped = _Mapped()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def lay_out(self, pages: int, filled: Iterable[tuple[int, int]]) -> None:
        """`filled`: stretches (first page, end), in order, of which every page will be written. Blocks that lie in one are dense."""
        os.ftruncate(self._descriptor, pages * PAGE)
        for first, end in filled:
            start, last = -(-first // BLOCK_PAGES), end // BLOCK_PAGES
            if start < last:
                self._starts.append(start)
                self._ends.append(last)
        if self._ends:
            self._mapped = _map(self._descriptor, self._ends[-1] * _BLOCK)

    def write(self, views: list[memoryview], at: int, pages: int) -> None:
        """So many pages, in pieces, to page `at` on. Thread-safe where no two write the same page."""
        if not self._mapped.size:
            return _write_all(self._descriptor, views, at * PAGE)
        feed = Feed(views)
        for first, count, huge in self._parts(at, pages):
            if huge:
                self._mapped.fill(first * PAGE, feed.take(count * PAGE))
            else:
                _write_all(self._descriptor, feed.take(count * PAGE), first * PAGE)
        return None

    def _parts(self, at: int, pages: int) -> Iterator[tuple[int, int, bool]]:
        """(first page, pages, whether they are in a huge page): of those no more at a time, which are memory of the daemon meanwhile."""
        end, first = at + pages, at
        huge = self._is_huge(at // BLOCK_PAGES)
        for block in range(at // BLOCK_PAGES + 1, (end - 1) // BLOCK_PAGES + 1):
            if (this := self._is_huge(block)) or huge:
                yield first, block * BLOCK_PAGES - first, huge
                first, huge = block * BLOCK_PAGES, this
        yield first, end - first, huge

    def _is_huge(self, block: int) -> bool:
        run = bisect.bisect_right(self._starts, block) - 1
        if run < 0 or block >= self._ends[run]:
            return False
        with self._locks[block % _LOCKS]:  # whoever comes first makes it, before anybody has written there
            if block not in self._made:
                self._made[block] = self._make(block)
            return self._made[block]

    def _make(self, block: int) -> bool:
        """A block without a single page counts as cut off, and is not collapsed (mm/khugepaged.c): so one is written first."""
        if self._failed >= _PATIENCE:
            return False
        os.pwrite(self._descriptor, _FIRST, block * _BLOCK)
        done = _libc.madvise(self._mapped.address + block * _BLOCK, _BLOCK, _MADV_COLLAPSE) == 0
        self._failed += not done
        return bool(done)

    def close(self) -> None:
        """May be repeated."""
        self._mapped.end()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Mapped:
    """The dense blocks of a file, as memory. Of size 0: there are none, or the kernel gave no mapping."""

    def __init__(self, address: int = 0, size: int = 0) -> None:
        self.address, self.size = address, size
        self._memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else np.zeros(0, np.uint8)

    def fill(self, offset: int, views: list[memoryview]) -> None:
        start = offset // _BLOCK * _BLOCK
        for view in views:
            np.copyto(self._memory[offset : offset + len(view)], np.frombuffer(view, np.uint8))  # without the interpreter's lock
            offset += len(view)
        # The pages are the file's. Left in our page table they would look like memory of the daemon as well.
        _libc.madvise(self.address + start, -(-offset // _BLOCK) * _BLOCK - start, mmap.MADV_DONTNEED)

    def end(self) -> None:
        if self.size:
            _libc.munmap(self.address, self.size)
            self.size = 0


def _map(descriptor: int, size: int) -> _Mapped:
    """At an address that huge pages can have: Python's own mmap cannot be told one."""
    room = _libc.mmap(None, size + _BLOCK, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if room == _FAILED:
        return _Mapped(0, 0)
    start, end = -(-room // _BLOCK) * _BLOCK, room + size + _BLOCK
    mapped = _libc.mmap(start, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, descriptor, 0) != _FAILED
    for at, length in ((room, start - room), (start + size, end - start - size)) if mapped else ((room, size + _BLOCK),):
        if length:
            _libc.munmap(at, length)
    return _Mapped(start, size) if mapped else _Mapped()


class Feed:
    """Takes bytes off the front of a list of views, without copying."""

    def __init__(self, views: list[memoryview]) -> None:
        self._views = list(reversed(views))

    def take(self, size: int) -> list[memoryview]:
        taken = []
        while size:
            view = self._views.pop()
            if len(view) > size:
                self._views.append(view[size:])
                view = view[:size]
            taken.append(view)
            size -= len(view)
        return taken


def _write_all(descriptor: int, views: list[memoryview], offset: int) -> None:
    while views:
        n = os.pwritev(descriptor, views[:_MAX_PIECES], offset)
        offset += n
        while views and n >= len(views[0]):
            n -= len(views.pop(0))
        if n:
            views[0] = views[0][n:]
