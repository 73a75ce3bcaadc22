"""CRIU's pagemap and pages files of a restore, made from an index: which file each page number belongs in, and where.

CRIU's image format: two magic numbers, then length-prefixed protobufs. Files of pages are given their full length and filled at known
offsets in any order; pages that no frame holds stay holes, which read as zeros and cost nothing.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from pycriu.images import pagemap_pb2

from hibernode.errors import Corrupt
from hibernode.model import PAGE
from hibernode.transfer import pageproto
from hibernode.transfer.format import SegmentTable

_COMMON_MAGIC, _PAGEMAP_MAGIC = 0x54564319, 0x56084025
_WIDE = "compat_nr_pages" in pagemap_pb2.pagemap_entry.DESCRIPTOR.fields_by_name  # CRIU 4.2 and newer
_MAX_ADDRESS_SPACES = 200_000


@dataclass(frozen=True)
class _Piece:
    """Page numbers `first` to `end` lie in `descriptor` from file page `at` on."""

    first: int
    end: int
    descriptor: int
    at: int


class PageFiles:
    """The pages files of one image, open for writing from any thread. A context manager: leaving it closes them."""

    def __init__(self, directory: Path, segments: SegmentTable) -> None:
        self._directory = directory
        self._pieces: list[_Piece] = []
        self._descriptors: list[int] = []
        try:
            self._lay_out(segments)
        except BaseException as e:
            self.__exit__(type(e), e, e.__traceback__)
            if isinstance(e, FileExistsError):
                raise Corrupt(f"images.tar: a file that the index makes came with it: {e.filename}") from e
            raise
        self._starts = np.array([p.first for p in self._pieces], np.int64)

    def _lay_out(self, segments: SegmentTable) -> None:
        order = list(dict.fromkeys(segments["dst_id"].tolist()))  # as they first appear
        if len(order) > _MAX_ADDRESS_SPACES:
            raise Corrupt(f"index: {len(order)} address spaces")
        present = (segments["flags"] & pageproto.PRESENT) != 0
        sizes = np.where(present, segments["pages"], 0)
        numbers = np.cumsum(sizes) - sizes  # the first page number of each segment
        for pages_id, dst_id in enumerate(order, 1):
            mine = segments["dst_id"] == dst_id
            self._write_pagemap(pages_id, dst_id, segments[mine])
            descriptor = os.open(self._directory / f"pages-{pages_id}.img", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            self._descriptors.append(descriptor)
            end = self._add_pieces(descriptor, numbers[mine & present], sizes[mine & present])
            os.ftruncate(descriptor, end * PAGE)
        self._pieces.sort(key=lambda piece: piece.first)

    def _add_pieces(self, descriptor: int, numbers: SegmentTable, sizes: SegmentTable) -> int:
        """Runs of numbers that follow each other become one piece. Returns the file's length in pages."""
        at = 0
        for first, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            last = self._pieces[-1] if self._pieces and at else None
            if last is not None and last.end == first:
                self._pieces[-1] = _Piece(last.first, first + size, descriptor, last.at)
            else:
                self._pieces.append(_Piece(first, first + size, descriptor, at))
            at += size
        return at

    def _write_pagemap(self, pages_id: int, dst_id: int, segments: SegmentTable) -> None:
        kind, ident = dst_id & 0xFF, dst_id >> 8
        if kind not in (pageproto.TASK, pageproto.SHMEM):
            raise Corrupt(f"index: an address space of unknown kind {kind}")
        name = f"pagemap-{ident}.img" if kind == pageproto.TASK else f"pagemap-shmem-{ident}.img"
        with open(self._directory / name, "xb") as file:
            file.write(struct.pack("<II", _COMMON_MAGIC, _PAGEMAP_MAGIC))
            file.write(_prefixed(pagemap_pb2.pagemap_head(pages_id=pages_id)))
            for _, vaddr, pages, flags in segments.tolist():
                if pages >= 1 << 32 or flags >= 1 << 32:
                    raise Corrupt("index: a segment is too long for a pagemap, or has flags that no pagemap has")
                entry = pagemap_pb2.pagemap_entry(vaddr=vaddr, nr_pages=pages, flags=flags)
                if _WIDE:
                    entry.compat_nr_pages = pages
                file.write(_prefixed(entry))

    def write(self, numbers: np.ndarray[tuple[int], np.dtype[np.int64]], content: list[memoryview]) -> None:
        """Put pages where they belong: `numbers` ascend, `content` holds one page for each, in pieces of any length."""
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        starts = numbers[np.concatenate(([0], cuts))].tolist()
        ends = (numbers[np.concatenate((cuts - 1, [len(numbers) - 1]))] + 1).tolist()
        feed = _Feed(content)
        for first, end in zip(starts, ends, strict=True):
            for descriptor, offset, pages in self._places(first, end):
                _write_all(descriptor, feed.take(pages * PAGE), offset * PAGE)

    def _places(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        at = int(np.searchsorted(self._starts, first, side="right")) - 1
        while first < end:
            piece = self._pieces[at]
            stop = min(end, piece.end)
            yield piece.descriptor, piece.at + first - piece.first, stop - first
            first, at = stop, at + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


class _Feed:
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
        n = os.pwritev(descriptor, views[:1024], offset)  # 1024: IOV_MAX
        offset += n
        while views and n >= len(views[0]):
            n -= len(views.pop(0))
        if n:
            views[0] = views[0][n:]


def _prefixed(message: pagemap_pb2.pagemap_head | pagemap_pb2.pagemap_entry) -> bytes:
    body: bytes = message.SerializeToString()
    return struct.pack("<I", len(body)) + body
