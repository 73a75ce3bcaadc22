"""CRIU's pagemap and pages files of a restore, made from an index: which file each page number belongs in, and where.

CRIU's image format: two magic numbers, then length-prefixed protobufs. Files of pages are given their full length and filled at known
offsets in any order; pages that no frame holds stay holes, which read as zeros and cost nothing.
"""

from __future__ import annotations

import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from pycriu.images import pagemap_pb2

from hibernode.errors import Corrupt, NoRoom
from hibernode.model import PAGE
from hibernode.transfer import pageproto
from hibernode.transfer.format import ReferenceTable, SegmentTable, Stretches
from hibernode.transfer.pagefile import Feed, PageFile
from hibernode.transfer.places import overlaps

_COMMON_MAGIC, _PAGEMAP_MAGIC = 0x54564319, 0x56084025
_WIDE = "compat_nr_pages" in pagemap_pb2.pagemap_entry.DESCRIPTOR.fields_by_name  # CRIU 4.2 and newer
_MAX_ADDRESS_SPACES = 200_000
_AT_ONCE = 1 << 14  # segments that are Python objects at a time, which takes six times the room
# Page numbers `first` to `end` lie in that file, from its page `at` on.
_PIECE = np.dtype([("first", "<i8"), ("end", "<i8"), ("at", "<i8"), ("file", "<i8")])
_NOWHERE: Stretches = np.zeros((0, 2), np.int64)
_Rows = npt.NDArray[np.int64]


class PageFiles:
    """The pages files of one image, open for writing from any thread. A context manager: leaving it closes them."""

    def __init__(self, directory: Path, segments: SegmentTable, filled: Stretches = _NOWHERE) -> None:
        """`filled`: as `Index.filled` has it; whatever is written beside it costs more time, and nothing else."""
        self._directory = directory
        self._pieces = np.empty(0, _PIECE)
        self._files: list[PageFile] = []
        try:
            self._lay_out(segments, filled)
        except BaseException as e:
            self.__exit__(type(e), e, e.__traceback__)
            if isinstance(e, FileExistsError):
                raise Corrupt(f"images.tar: a file that the index makes came with it: {e.filename}") from e
            raise
        self._starts = np.ascontiguousarray(self._pieces["first"])
        self._fixed = _fixed(segments)

    def _lay_out(self, segments: SegmentTable, filled: Stretches) -> None:
        spaces = _spaces(segments["dst_id"])
        self._insist_room(len(spaces))
        present = (segments["flags"] & pageproto.PRESENT) != 0
        sizes = np.where(present, segments["pages"], 0).astype(np.int64)
        numbers = np.cumsum(sizes) - sizes  # the first page number of each segment
        pieces = [np.empty(0, _PIECE)]
        for pages_id, (dst_id, rows) in enumerate(spaces, 1):
            self._write_pagemap(pages_id, dst_id, segments, rows)
            file = PageFile(self._directory / f"pages-{pages_id}.img")
            self._files.append(file)
            full = rows[present[rows]]
            pieces.append(_pieces(len(self._files) - 1, numbers[full], sizes[full]))
            file.lay_out(int(sizes[full].sum()), _filled(pieces[-1], filled))
        unsorted = np.concatenate(pieces)
        self._pieces = unsorted[np.argsort(unsorted["first"])]

    def _insist_room(self, spaces: int) -> None:
        """Every address space takes a descriptor while its pages are written, and the daemon needs some for itself."""
        if spaces > _MAX_ADDRESS_SPACES:
            raise Corrupt(f"index: {spaces} address spaces")
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        if spaces > most:
            raise NoRoom(
                f"the image has {spaces} address spaces, as many files may be open at a time: {most}",
                hint="a higher LimitNOFILE in the daemon's unit; half of it may be taken by one restore",
            )

    def _write_pagemap(self, pages_id: int, dst_id: int, segments: SegmentTable, rows: _Rows) -> None:
        kind, ident = dst_id & 0xFF, dst_id >> 8
        if kind not in (pageproto.TASK, pageproto.SHMEM):
            raise Corrupt(f"index: an address space of unknown kind {kind}")
        name = f"pagemap-{ident}.img" if kind == pageproto.TASK else f"pagemap-shmem-{ident}.img"
        with open(self._directory / name, "xb") as file:
            file.write(struct.pack("<II", _COMMON_MAGIC, _PAGEMAP_MAGIC))
            file.write(_prefixed(pagemap_pb2.pagemap_head(pages_id=pages_id)))
            for at in range(0, len(rows), _AT_ONCE):
                some = segments[rows[at : at + _AT_ONCE]].tolist()
                file.writelines(_entry(*segment) for segment in some if segment[2])

    def needed(self, first: _Rows, pages: _Rows) -> npt.NDArray[np.bool_]:
        """Which of these runs of page numbers hold some of `fixed`."""
        return np.searchsorted(self._fixed[:, 1], first, side="right") < np.searchsorted(self._fixed[:, 0], first + pages)

    def fixed(self, first: int, pages: int) -> _Rows:
        """Runs (start, end) of those of these page numbers whose pages may not come later."""
        first, end = int(first), int(first) + int(pages)
        a, b = np.searchsorted(self._fixed[:, 1], first, side="right"), np.searchsorted(self._fixed[:, 0], end)
        found: _Rows = np.clip(self._fixed[a:b], first, end)
        return found

    def of_fixed(self, references: ReferenceTable) -> ReferenceTable:
        """References to pages that may not come later, and no others."""
        first, start = references["first_page"].astype(np.int64), references["source_page"].astype(np.int64)
        row, _, low, high = overlaps(first, first + references["pages"].astype(np.int64), self._fixed[:, 0], self._fixed[:, 1])
        found = references[row]
        found["first_page"], found["source_page"], found["pages"] = low, start[row] + low - first[row], high - low
        return found

    def write(self, numbers: np.ndarray[tuple[int], np.dtype[np.int64]], content: list[memoryview]) -> None:
        """Put pages where they belong: `numbers` ascend, `content` holds one page for each, in pieces of any length."""
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        starts = numbers[np.concatenate(([0], cuts))].tolist()
        ends = (numbers[np.concatenate((cuts - 1, [len(numbers) - 1]))] + 1).tolist()
        feed = Feed(content)
        for first, end in zip(starts, ends, strict=True):
            self._write(first, end, feed)

    def write_run(self, first: int, pages: int, content: list[memoryview]) -> None:
        """So many pages, which follow each other."""
        self._write(first, first + pages, Feed(content))

    def _write(self, first: int, end: int, feed: Feed) -> None:
        for file, at, pages in self._places(first, end):
            self._files[file].write(feed.take(pages * PAGE), at, pages)

    def _places(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        at = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < end:
            number, last, there, file = self._pieces[at].item()
            stop = min(end, last)
            yield file, there + first - number, stop - first
            first, at = stop, at + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for file in self._files:
            file.close()
        self._files.clear()


def _spaces(ids: npt.NDArray[np.uint64]) -> list[tuple[int, _Rows]]:
    """Every address space as (id, rows of its segments), as they first appear. Sorted once: there may be as many as segments."""
    if not len(ids):
        return []
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    rows = np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    return sorted(((int(ids[mine[0]]), mine) for mine in rows), key=lambda space: int(space[1][0]))


def _pieces(file: int, numbers: _Rows, sizes: _Rows) -> npt.NDArray[np.void]:
    """The pieces of one file. Runs of numbers that follow each other are one piece: it is written in one call."""
    ends, places = numbers + sizes, np.cumsum(sizes) - sizes
    starts = np.flatnonzero(np.concatenate(([True], numbers[1:] != ends[:-1]))) if len(numbers) else np.empty(0, np.int64)
    pieces = np.empty(len(starts), _PIECE)
    pieces["first"], pieces["at"], pieces["file"] = numbers[starts], places[starts], file
    pieces["end"] = ends[np.append(starts[1:], len(numbers)) - 1] if len(starts) else 0
    return pieces


def _filled(pieces: npt.NDArray[np.void], filled: Stretches) -> Iterator[tuple[int, int]]:
    """The parts of one file that lie in a stretch of page numbers that is filled: as pages of the file, in order."""
    starts = filled[:, 0]
    for first, end, at, _ in pieces.tolist() if len(filled) else ():
        row = max(0, int(np.searchsorted(starts, first, side="right")) - 1)
        while row < len(filled) and filled[row, 0] < end:
            low, high = max(first, int(filled[row, 0])), min(end, int(filled[row, 1]))
            if low < high:
                yield at + low - first, at + high - first
            row += 1


def _fixed(segments: SegmentTable) -> _Rows:
    """Runs (start, end) of page numbers with content whose pages may not come later: CRIU reads them before the tree runs."""
    present = segments[(segments["flags"] & pageproto.PRESENT) != 0]
    ends = np.cumsum(present["pages"].astype(np.int64))
    rows = np.column_stack((ends - present["pages"].astype(np.int64), ends))
    found: _Rows = rows[~may_come_late(present)]
    return found


def may_come_late(segments: SegmentTable) -> npt.NDArray[np.bool_]:
    """Which of these hold pages that CRIU leaves to whoever fills a process: of its own memory alone, whatever else is flagged so."""
    late: npt.NDArray[np.bool_] = ((segments["flags"] & pageproto.LAZY) != 0) & ((segments["dst_id"] & 0xFF) == pageproto.TASK)
    return late


def _entry(_: int, vaddr: int, pages: int, flags: int) -> bytes:
    if pages >= 1 << 32 or flags >= 1 << 32:
        raise Corrupt("index: a segment is too long for a pagemap, or has flags that no pagemap has")
    entry = pagemap_pb2.pagemap_entry(vaddr=vaddr, nr_pages=pages, flags=flags)
    if _WIDE:
        entry.compat_nr_pages = pages
    return _prefixed(entry)


def _prefixed(message: pagemap_pb2.pagemap_head | pagemap_pb2.pagemap_entry) -> bytes:
    body: bytes = message.SerializeToString()
    return struct.pack("<I", len(body)) + body
