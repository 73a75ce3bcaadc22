"""Where each page of an image is stored: in which frame of which checkpoint, and where in that frame.

Source 0 is the image itself, source n + 1 is number n of its bases. A page that is in no frame of its source is zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hibernode.errors import Corrupt
from hibernode.model import PagesRef
from hibernode.transfer.format import Index, Ranks, ReferenceTable, in_order
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
    """What an image has of one of its bases, frame by frame. However the references lie, it is not larger than they are."""

    def __init__(self, references: ReferenceTable, source: Source) -> None:
        """`references`: those to this source alone."""
        self.source = source
        table = in_order(references, "source_page")
        self._first, self._pages, self._to = (table[name].astype(np.int64) for name in ("source_page", "pages", "first_page"))
        self._ends = np.maximum.accumulate(self._first + self._pages)  # two references may be to one page

    def wanted(self) -> npt.NDArray[np.bool_]:
        """Of each frame of the source: is any page of it needed?"""
        ranks = self.source.ranks
        steps = np.zeros(len(ranks.first) + 1, np.int64)
        np.add.at(steps, ranks.frames(self._first), 1)
        np.add.at(steps, ranks.frames(self._first + self._pages - 1) + 1, -1)
        return np.cumsum(steps[:-1]) > 0

    def parts(self, frame: np.void) -> Iterator[Part]:
        first, count = int(frame["first_page"]), int(frame["pages"])
        low = int(np.searchsorted(self._ends, first, side="right"))
        high = int(np.searchsorted(self._first, first + count))
        starts = np.maximum(self._first[low:high], first)
        ends = np.minimum(self._first[low:high] + self._pages[low:high], first + count)
        to = self._to[low:high] + starts - self._first[low:high]
        places = starts - first
        if frame["kept"] < count:
            keep = self.source.index.keeps[first]
            places = (np.cumsum(keep) - keep)[np.minimum(places, count - 1)]
        for part in zip(to.tolist(), places.tolist(), (ends - starts).tolist(), strict=True):
            if part[2] > 0:
                yield Part(*part)
