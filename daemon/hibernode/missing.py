"""Which pages of an address space are still to come, and what they are pages of. Follows what a program does to its memory meanwhile:
parts of it are emptied, unmapped, moved, forked.

Addresses are counted in pages. Standard library only: it is part of `filler.py`. Each extent lies in one block of 1,024 pages of
addresses, so that whatever is looked up or changed is a short list, however large the memory is: 0.2 KiB for each extent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_BLOCK = 1024  # pages


class Extent(NamedTuple):
    """Pages that follow each other in memory and in the row (a frame of the store) that they come with, from its page `at` on."""

    page: int
    pages: int
    row: int
    at: int

    @property
    def end(self) -> int:
        return self.page + self.pages

    def part(self, start: int, end: int) -> Extent:
        """What of it lies between; there is some."""
        start, end = max(start, self.page), min(end, self.end)
        return Extent(start, end - start, self.row, self.at + start - self.page)


class Missing:
    """Of one address space."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[Extent]] = {}
        self._rows: dict[int, set[int]] = {}  # row -> the blocks in which some of it lies, or lay

    def __bool__(self) -> bool:
        """Is anything missing?"""
        return bool(self._blocks)

    def copy(self) -> Missing:
        """As a forked child has it."""
        child = Missing()
        child._blocks = {block: list(extents) for block, extents in self._blocks.items()}
        child._rows = {row: set(blocks) for row, blocks in self._rows.items()}
        return child

    def add(self, extent: Extent) -> None:
        """It is missing, and nothing that lies there was."""
        for block in range(extent.page // _BLOCK, (extent.end - 1) // _BLOCK + 1):
            extents = self._blocks.setdefault(block, [])
            extents.append(extent.part(block * _BLOCK, (block + 1) * _BLOCK))
            self._rows.setdefault(extent.row, set()).add(block)

    def find(self, page: int) -> Extent | None:
        """The one that this page is missing in, from this page on."""
        for extent in self._blocks.get(page // _BLOCK, ()):
            if extent.page <= page < extent.end:
                return extent.part(page, extent.end)
        return None

    def of_row(self, row: int) -> list[Extent]:
        """All that comes with this row."""
        blocks = self._rows.get(row, set())
        found = [extent for block in blocks for extent in self._blocks.get(block, ()) if extent.row == row]
        if not found:
            self._rows.pop(row, None)
        return found

    def remove(self, start: int, end: int) -> list[Extent]:
        """These pages are missing no longer; what was missing of them."""
        removed: list[Extent] = []
        for block in self._within(start, end):
            kept: list[Extent] = []
            for extent in self._blocks[block]:
                if extent.end <= start or end <= extent.page:
                    kept.append(extent)
                    continue
                removed.append(extent.part(start, end))
                kept += [extent.part(extent.page, start)] if extent.page < start else []
                kept += [extent.part(end, extent.end)] if end < extent.end else []
            if kept:
                self._blocks[block] = kept
            else:
                del self._blocks[block]
        return removed

    def move(self, start: int, to: int, pages: int) -> None:
        """So many pages lie elsewhere from now on; nothing of what lay there is missing any more."""
        moved = self.remove(start, start + pages)
        self.remove(to, to + pages)
        for extent in moved:
            self.add(extent._replace(page=extent.page - start + to))

    def within(self, start: int, end: int) -> list[Extent]:
        """What is missing between."""
        blocks = self._within(start, end)
        return [each.part(start, end) for block in blocks for each in self._blocks[block] if each.page < end and start < each.end]

    def _within(self, start: int, end: int) -> list[int]:
        """Blocks with something missing between, of which there may be fewer than the room has."""
        first, last = start // _BLOCK, (end - 1) // _BLOCK
        if last - first < len(self._blocks):
            return [block for block in range(first, last + 1) if block in self._blocks]
        return [block for block in self._blocks if first <= block <= last]

    def __iter__(self) -> Iterator[Extent]:
        for extents in self._blocks.values():
            yield from extents
