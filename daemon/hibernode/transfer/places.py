"""Where each page of an image is stored: in which frame of which checkpoint, and where in that frame.

Source 0 is the image itself, source n + 1 is number n of its bases. A page that is in no frame of its source is zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hibernode.errors import Corrupt
from hibernode.model import PagesRef
from hibernode.transfer.format import Index, Ranks, ReferenceTable
from hibernode.transfer.seal import Seal

Numbers = npt.NDArray[np.int64]


class Origins:
    """References, to be looked up often: 32 bytes each."""

    def __init__(self, references: ReferenceTable) -> None:
        self._first, self._pages, self._there, self._source = (
            references[name].astype(np.int64) for name in ("first_page", "pages", "source_page", "source")
        )

    def of(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """For each page: its source, and its number there."""
        if not len(self._first):
            return np.zeros(len(numbers), np.int64), numbers
        rows = np.searchsorted(self._first, numbers, side="right") - 1
        away = numbers - self._first[rows]
        within = (rows >= 0) & (away < self._pages[rows])
        return np.where(within, self._source[rows] + 1, 0), np.where(within, self._there[rows] + away, numbers)

    def stretches(self, pages: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Of an image of so many pages, in order and without gaps: first and end of each stretch with one origin, its source, and the
        number of its first page there."""
        starts, ends = np.append(0, self._first + self._pages), np.append(self._first, pages)
        own = np.flatnonzero(starts < ends)
        starts, ends = starts[own], ends[own]
        rows = [
            np.concatenate(each) for each in (
                (starts, self._first), (ends, self._first + self._pages), (np.zeros_like(starts), self._source + 1), (starts, self._there)
            )
        ]  # fmt: skip
        start, end, source, there = (each[np.argsort(rows[0])] for each in rows)
        return start, end, source, there


@dataclass(frozen=True)
class Source:
    """An image, as far as its pages go: what the manifest says of it, what its checkpoint is opened with, and its index."""

    ref: PagesRef
    seal: Seal
    index: Index

    @cached_property
    def ranks(self) -> Ranks:
        return Ranks(self.index)

    @cached_property
    def origins(self) -> Origins:
        return Origins(self.index.references)


def overlaps(first: Numbers, end: Numbers, starts: Numbers, ends: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Where runs (first, end) and stretches (starts, ends) overlap: (which run, which stretch, first, end). Stretches are in order, and no
    two of them overlap; runs come as they like."""
    low = np.searchsorted(ends, first, side="right")
    counts = np.maximum(np.searchsorted(starts, end, side="left") - low, 0)
    run = np.repeat(np.arange(len(first)), counts)
    stretch = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    return run, stretch, np.maximum(first[run], starts[stretch]), np.minimum(end[run], ends[stretch])


class Places(NamedTuple):
    """For each page that was asked for. `frame`: row of its source's frames, -1 for a page of zeros; `place`: which of the pages that this
    frame keeps."""

    source: Numbers
    frame: Numbers
    place: Numbers


def find(sources: Sequence[Source], numbers: npt.NDArray[Any]) -> Places:
    """Of page numbers of `sources[0]`, in any order, which `insist` has passed."""
    numbers = np.asarray(numbers, np.int64)
    source, there = sources[0].origins.of(numbers)
    frame, place = np.full(len(numbers), -1, np.int64), np.zeros(len(numbers), np.int64)
    for each in np.unique(source).tolist():
        mine = np.flatnonzero(source == each)
        frame[mine], place[mine] = _in_frames(sources[each].ranks, there[mine])
    return Places(source, frame, place)


def _in_frames(ranks: Ranks, numbers: Numbers) -> tuple[Numbers, Numbers]:
    before = ranks.before(numbers)
    kept = ranks.before(numbers + 1) > before
    rows = ranks.frames(numbers)
    return np.where(kept, rows, -1), np.where(kept, before - ranks.sums[rows], 0)


def insist(sources: Sequence[Source]) -> None:
    """Every reference is to pages that a frame of its source keeps, or Corrupt."""
    references = sources[0].index.references
    if len(references) and int(references["source"].max()) >= len(sources) - 1:
        raise Corrupt("index: a reference to a base that the manifest does not name")
    for number, source in enumerate(sources[1:]):
        mine = references[references["source"] == number]
        ends, first = mine["source_page"] + mine["pages"], mine["source_page"]
        if not len(mine):
            raise Corrupt("index: no reference to a base that the manifest names")
        if (source.ranks.before(ends) - source.ranks.before(first) != mine["pages"].astype(np.int64)).any():
            raise Corrupt("index: a reference to pages that its base does not keep")


class Part(NamedTuple):
    """Pages of a frame that go to pages of an image: `pages` of them, from place `place` in the frame on, to `first_page` on."""

    first_page: int
    place: int
    pages: int


class Loan:
    """What an image has of one of its bases, frame by frame. `insist` has passed it."""

    def __init__(self, references: ReferenceTable, source: Source) -> None:
        """`references`: those to this source alone."""
        self.source, self._references = source, references
        self._rows, self._parts = np.zeros(0, np.int64), np.zeros((0, len(Part._fields)), np.int64)

    def wanted(self) -> npt.NDArray[np.bool_]:
        """Of each frame of the source: is any page of it needed? In time and memory as references and frames are, whatever they say."""
        ranks, first, pages = self.source.ranks, *self._columns("source_page", "pages")
        steps = np.zeros(len(ranks.first) + 1, np.int64)
        np.add.at(steps, ranks.frames(first), 1)
        np.add.at(steps, ranks.frames(first + pages - 1) + 1, -1)
        return np.cumsum(steps[:-1]) > 0

    def parts(self, frame: np.void) -> Iterator[Part]:
        """Of a frame of the source, when `cut` was called. Any thread may."""
        row = int(self.source.ranks.frames(np.array([frame["first_page"]], np.int64))[0])
        low, high = np.searchsorted(self._rows, [row, row + 1]).tolist()
        return itertools.starmap(Part, self._parts[low:high].tolist())

    def cut(self) -> None:
        """References are cut where frames begin. A piece has a page, at least: 32 bytes of this for 4 KiB of the image, at the most."""
        ranks, first, pages, to = self.source.ranks, *self._columns("source_page", "pages", "first_page")
        begin, counts = ranks.frames(first), ranks.frames(first + pages - 1) - ranks.frames(first) + 1
        ends = np.cumsum(counts)
        rows = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(begin - (ends - counts), counts)
        first, pages, to = (np.repeat(each, counts) for each in (first, pages, to))
        start = np.maximum(first, ranks.first[rows])
        stop = np.minimum(first + pages, ranks.first[rows] + ranks.pages[rows])
        parts = np.stack((to + start - first, ranks.before(start) - ranks.sums[rows], stop - start), axis=1)
        order = np.argsort(rows, kind="stable")
        self._rows, self._parts = rows[order], parts[order]

    def _columns(self, *names: str) -> Iterator[Numbers]:
        return (self._references[name].astype(np.int64) for name in names)
