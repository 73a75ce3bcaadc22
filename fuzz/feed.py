"""Choices out of bytes: the fuzzer mutates bytes, a target wants numbers, texts and one of several. The same bytes always choose the same,
with or without atheris, and bytes that are used up choose the first of everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

# Where readers go wrong: around zero, around the widths of fields, around the limits of the formats.
EDGES = (
    0, 1, 2, 3, 7, 8, 255, 256, 511, 512, 1023, 1024, 1025, 4095, 4096, 4097,
    (1 << 16) - 1, 1 << 16, (1 << 20) + 1, 1 << 22, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
    1 << 40, (1 << 40) + 1, (1 << 53) - 1, 1 << 53, 1 << 57, 1 << 60, 1 << 63, (1 << 64) - 1,
)  # fmt: skip


class Feed:
    """Bytes that are taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, count: int) -> int:
        """0 to `count` - 1, out of as few bytes as that takes."""
        value = self.byte() if count <= 256 else int.from_bytes(self.take(2), "little") if count <= 1 << 16 else self.number()
        return value % count

    def number(self) -> int:
        """Any unsigned 64-bit number: half of the time an edge or a small one."""
        how = self.byte()
        if how < 128:
            return EDGES[how % len(EDGES)]
        return int.from_bytes(self.take(1 + how % 8), "little")

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def very_many(self, most: int, usual: int) -> int:
        """How many of something: below `usual`, or below `most` where the bytes say so in a word that a fuzzer does not hit upon. What
        takes a second tells a test much, and a fuzzer that does it all day nothing."""
        if self._data[self._at : self._at + 4] == b"MANY":
            self._at += 4
            return self.number() % most
        return self.below(usual)

    def text(self) -> str:
        return self.take(self.byte() % 64).decode("utf-8", "replace")

    def rest(self) -> bytes:
        return self.take(max(0, len(self._data) - self._at))
