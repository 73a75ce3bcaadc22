"""Pages that an earlier checkpoint of the same workload has, by their digests: what a new one need not store. And the object that says so.

`digests.zst` is one zstd frame of a head (magic, pages, the seed of the chain) and 16 bytes for each page of the image, zeros for a page
that this image does not store itself. So each page that is stored has its digest stored once in a chain, and an increment that stores
little has a small one. Memory for an image of so many pages: `KNOWN_PAGE` bytes each while it is looked up, made before anybody is frozen;
`OWN_PAGE` each for the digests of the new one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hibernode.errors import Corrupt
from hibernode.model import BaseRef
from hibernode.transfer.fingerprint import DIGEST, Digests
from hibernode.transfer.format import REFERENCE, ReferenceTable, in_order, no_references
from hibernode.transfer.places import Numbers, Origins

KNOWN_PAGE = DIGEST + 8 + 8  # bytes: its digest, half of it again in order, and whose it is
OWN_PAGE = 3 * DIGEST + 8  # bytes: digest and number as a stream has them, in the table, on its way
_HEAD = struct.Struct("<8sQQ")
_MAGIC = b"HNDIGST1"
_TURNS = 4  # places at which one chunk may go on in another part of the earlier image, before single pages are looked up
_NOTHING = np.zeros((0, 2), np.uint64)


def digests_size(pages: int) -> int:
    """Bytes of the object, inflated."""
    return _HEAD.size + pages * DIGEST


def encode(digests: Digests, seed: int) -> bytes:
    return _HEAD.pack(_MAGIC, len(digests), seed) + digests.tobytes()


def decode(data: bytes, pages: int) -> tuple[Digests, int]:
    """The digests of an image of so many pages, and the seed that they were made with; Corrupt for anything else."""
    if len(data) != digests_size(pages) or data[:8] != _MAGIC:
        raise Corrupt("digests: not those of an image of that many pages")
    _, count, seed = _HEAD.unpack_from(data)
    if count != pages:
        raise Corrupt("digests: not those of an image of that many pages")
    return np.frombuffer(data, np.uint64, offset=_HEAD.size).reshape(-1, 2), seed


class Known:
    """What the earlier image has. Thread-safe: only read. Without pages (the first of a chain) nothing is known but the seed."""

    def __init__(
        self, seed: int, digests: Digests = _NOTHING, references: ReferenceTable | None = None, bases: Sequence[BaseRef] = ()
    ) -> None:
        """`digests`: of each of its pages, zeros for those that are zeros. `references`: its own, to the `bases`, of which the last is the
        earlier image itself, which has all other pages."""
        self.seed, self.bases = seed, bases
        self._digests = digests
        self._origins = Origins(no_references() if references is None else references)
        self._order = np.argsort(digests[:, 0], kind="stable")
        self._sorted = digests[self._order, 0]

    @property
    def pages(self) -> int:
        return len(self._digests)

    def find(self, numbers: Numbers, digests: Digests, step: int) -> tuple[Numbers, int]:
        """For each of these pages, in order of their numbers: a page of the earlier image with the same content, or -1. `step`: by how much
        the number of the page before was off; and that of the last one. Looked for there first: memory seldom moves, and then in one piece.
        Of pages that are there more than once, those are taken that make the longest runs."""
        if not self.pages:
            return np.full(len(numbers), -1, np.int64), step
        found = self._along(numbers, digests, step)
        best, rest = int((found >= 0).sum()), np.flatnonzero(found < 0)
        for _ in range(_TURNS):
            there = self._anywhere(digests[rest])
            rest, there = rest[there >= 0], there[there >= 0]
            if not len(rest):
                break
            other = self._along(numbers, digests, int(there[0] - numbers[rest[0]]))
            if (count := int((other >= 0).sum())) > best:
                best, found, other = count, other, found
            found = np.where(found < 0, other, found)
            rest = rest[found[rest] < 0]
        if len(rest):
            found[rest] = self._anywhere(digests[rest])
        hits = np.flatnonzero(found >= 0)
        return found, int(found[hits[-1]] - numbers[hits[-1]]) if len(hits) else step

    def _along(self, numbers: Numbers, digests: Digests, step: int) -> Numbers:
        """Those pages that are where they would be with that step; -1 for the others."""
        there = numbers + step
        within = np.flatnonzero((there >= 0) & (there < self.pages))
        same = np.zeros(len(numbers), bool)
        same[within] = (self._digests[there[within]] == digests[within]).all(axis=1)
        return np.where(same, there, -1)

    def _anywhere(self, digests: Digests) -> Numbers:
        at = np.minimum(np.searchsorted(self._sorted, digests[:, 0]), self.pages - 1)
        there = self._order[at]
        return np.where((self._digests[there] == digests).all(axis=1), there, -1)

    def references(self, numbers: Numbers, found: Numbers) -> ReferenceTable:
        """That those pages of the new image are those of the earlier one, as runs; -1 is left out. Where the earlier image refers to
        another one itself, so does this: to who stores it."""
        hits = found >= 0
        numbers, found = numbers[hits], found[hits]
        source, there = self._origins.of(found)
        return runs(numbers, np.where(source > 0, source - 1, len(self.bases) - 1), there)


def runs(numbers: Numbers, source: Numbers, there: Numbers) -> ReferenceTable:
    """Pages, in order of their numbers, as references."""
    if not len(numbers):
        return no_references()
    new = (np.diff(numbers) != 1) | (np.diff(there) != 1) | (np.diff(source) != 0)
    starts = np.concatenate(([0], np.flatnonzero(new) + 1))
    table = np.empty(len(starts), REFERENCE)
    table["first_page"], table["source_page"], table["source"] = numbers[starts], there[starts], source[starts]
    table["pages"] = np.diff(np.append(starts, len(numbers)))
    return table


def joined(tables: Sequence[ReferenceTable]) -> ReferenceTable:
    """All of them in order; those that go on where one ends are one."""
    table = in_order(np.concatenate([no_references(), *tables]), "first_page")
    if not len(table):
        return table
    ends, there = table["first_page"] + table["pages"], table["source_page"] + table["pages"]
    apart = (
        (table["first_page"][1:] != ends[:-1])
        | (table["source_page"][1:] != there[:-1])
        | (table["source"][1:] != table["source"][:-1])
    )
    starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
    whole = table[starts]
    whole["pages"] = np.add.reduceat(table["pages"], starts)
    return whole


def numbered(table: ReferenceTable) -> tuple[ReferenceTable, list[int]]:
    """The sources that are used, in order, and the table with numbers that count these alone."""
    used = np.unique(table["source"])
    table = table.copy()
    table["source"] = np.searchsorted(used, table["source"])
    return table, [int(each) for each in used]


def fold(whole: Digests, references: ReferenceTable, number: int, base: Digests) -> None:
    """Put the digests of the pages that an image has of base `number` into `whole`, those of its own. One base after the other: each has
    as many as it has pages. Corrupt where one of them has none."""
    mine = references[references["source"] == number]
    to, there = _spread(mine["first_page"], mine["pages"]), _spread(mine["source_page"], mine["pages"])
    if len(there) and int(there.max()) >= len(base):
        raise Corrupt("digests: a reference to pages that its base does not have")
    taken = base[there]
    if not taken.any(axis=1).all():
        raise Corrupt("digests: a reference to pages that its base does not store")
    whole[to] = taken


def _spread(first: npt.NDArray[Any], pages: npt.NDArray[Any]) -> Numbers:
    """All numbers of these runs."""
    first, pages = first.astype(np.int64), pages.astype(np.int64)
    ends = np.cumsum(pages)
    whole: Numbers = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - (ends - pages), pages)
    return whole
