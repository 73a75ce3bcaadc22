"""Floats taken apart into planes of bytes, and put together again; and which frames are worth it. Knows nothing of zstd.

In a weight the exponent, which takes few values, stands beside a mantissa, which is noise. As they lie, zstd finds next to nothing in
them. So each element, of two bytes (bfloat16) or four (float32), is rotated left by one bit: then the highest byte is the exponent,
and the sign is the lowest bit. Then come first all lowest bytes, and so on, at last all highest. Measured figures are in
docs/decisions.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hibernode.model import FRAME_PAGES, PAGE

WIDTHS = (2, 4)  # bytes of an element
SMALLEST = 16 * PAGE  # bytes of a frame that is looked at
_WORDS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}
_STEP = 256 << 10  # bytes that are worked on at once: they stay in a core's own cache

# The probe: 64 words of four bytes at each of eight places of a frame. Two bytes of one place in their word are equal by chance once in
# 256 times if they are noise; of exponents of normal weights once in 5.
_SAMPLES, _SAMPLE = 8, 64
_EACH = _SAMPLES * _SAMPLE  # bytes that are seen of each place


def _squares(times: float) -> float:
    """The sum of the squares of how often each byte comes, if two are equal `times` as often as in noise."""
    return _EACH + _EACH * (_EACH - 1) * times / 256


_NOISE, _SKEWED = _squares(1.3), _squares(2)  # noise is above the former once in 10^11 times


def probe(data: memoryview) -> int:
    """Of what width the floats are that the frame seems to hold; 0: it holds something else, or is too small. Asks a sample: in 4 to 13 us,
    or three times that with cold caches; the quickest frame takes 630."""
    if len(data) < SMALLEST or len(data) % PAGE:
        return 0
    words = _sample(data)
    if _squares_of(words, 3) < _SKEWED or _squares_of(words, 2) > _NOISE:  # noise, the quickest to pack, ends here
        return 0
    return 2 if _squares_of(words, 0) <= _NOISE and _squares_of(words, 1) >= _SKEWED else 4


def noise(data: memoryview) -> bool:
    """Whether no byte seems to come more often than others; False of what is too small. Asks the sample of `probe`: it sees no repeats."""
    if len(data) < SMALLEST:
        return False
    words = _sample(data)
    return all(_squares_of(words, place) <= _NOISE for place in range(4))


def _sample(data: memoryview) -> npt.NDArray[np.uint8]:
    # A ninth, because what repeats does so at powers of two: noise that is met twice would not look like noise.
    step = len(data) // (_SAMPLES + 1) // PAGE * PAGE
    return np.ndarray((_SAMPLES, _SAMPLE, 4), np.uint8, data, PAGE // 2, (step, 4, 1))


def _squares_of(words: npt.NDArray[np.uint8], place: int) -> float:
    counts = np.bincount(words[:, :, place].ravel())
    return float(counts.dot(counts))


class Planes:
    """There and back. Of one thread: what it gives is good until it is asked again."""

    def __init__(self) -> None:
        self._whole = np.empty(FRAME_PAGES * PAGE, np.uint8)  # only what is used of it costs memory
        self._some, self._more = np.empty(_STEP, np.uint8), np.empty(_STEP, np.uint8)

    def split(self, data: memoryview, width: int) -> tuple[memoryview, memoryview]:
        """Of at most a frame: its planes but the highest, end to end, and the highest, which has the exponents."""
        words = np.frombuffer(data, _WORDS[width])
        planes = self._whole[: len(data)].reshape(width, -1)
        some, more = self._some.view(words.dtype), self._more.view(words.dtype)
        for at in range(0, len(words), len(some)):
            piece = words[at : at + len(some)]
            turned, rest = some[: len(piece)], more[: len(piece)]
            np.left_shift(piece, 1, out=turned)
            np.right_shift(piece, 8 * width - 1, out=rest)
            np.bitwise_or(turned, rest, out=turned)
            for plane in planes:
                np.copyto(
                    plane[at : at + len(piece)], turned, casting="unsafe"
                )  # the lowest byte: 59 GB/s, a strided copy makes 7
                np.right_shift(turned, 8, out=turned)
        return planes[:-1].reshape(-1).data, planes[-1].data

    def merge(self, lower: npt.NDArray[np.uint8], highest: npt.NDArray[np.uint8]) -> memoryview:
        """The way back; `lower` is one or three times as long as `highest`, together they are a frame at most."""
        width = len(lower) // len(highest) + 1
        size = len(lower) + len(highest)
        words, planes = self._whole[:size].view(_WORDS[width]), lower.reshape(width - 1, -1)
        some = self._some.view(words.dtype)
        for at in range(0, len(words), len(some)):
            turned = words[at : at + len(some)]
            rest = some[: len(turned)]
            np.copyto(turned, highest[at : at + len(turned)])
            for plane in planes[::-1]:
                np.left_shift(turned, 8, out=turned)
                np.copyto(rest, plane[at : at + len(turned)])  # by itself: an operation that casts as it goes takes longer
                np.bitwise_or(turned, rest, out=turned)
            np.left_shift(turned, 8 * width - 1, out=rest)
            np.right_shift(turned, 1, out=turned)
            np.bitwise_or(turned, rest, out=turned)
        return self._whole[:size].data
