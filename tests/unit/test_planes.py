"""Floats taken apart and put together; and which frames are worth it."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibernode.model import FRAME_PAGES, PAGE
from hibernode.transfer import planes
from tests.golden.make import floats

FRAME = FRAME_PAGES * PAGE
NOISE = random.Random(7).randbytes(FRAME)
NORMAL = np.random.default_rng(7).standard_normal(FRAME // 4) * 0.02


def there_and_back(data: bytes, width: int, of: planes.Planes) -> tuple[bytes, bytes, bytes]:
    lower, highest = (bytes(each) for each in of.split(memoryview(data), width))
    again = of.merge(np.frombuffer(lower, np.uint8), np.frombuffer(highest, np.uint8))
    return lower, highest, bytes(again)


@pytest.mark.parametrize("width", planes.WIDTHS)
@pytest.mark.parametrize(
    "size", [4, 8, PAGE, 3 * PAGE, (256 << 10) - 4, 256 << 10, (256 << 10) + 4, 257 * PAGE, FRAME - PAGE, FRAME]
)
def test_what_is_split_comes_back(size: int, width: int) -> None:
    lower, highest, again = there_and_back(NOISE[:size], width, planes.Planes())
    assert again == NOISE[:size]
    assert (len(lower), len(highest)) == (size - size // width, size // width)


@given(st.data(), st.sampled_from(planes.WIDTHS))
def test_any_words_come_back_and_are_where_the_format_says(data: st.DataObject, width: int) -> None:
    bits = 8 * width
    words = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=50))
    plain = b"".join(word.to_bytes(width, "little") for word in words)
    lower, highest, again = there_and_back(plain, width, planes.Planes())
    turned = [(word << 1 | word >> (bits - 1)) & ((1 << bits) - 1) for word in words]
    assert lower + highest == b"".join(bytes(word >> 8 * n & 255 for word in turned) for n in range(width))
    assert again == plain


def test_one_serves_frames_of_all_sizes_and_widths() -> None:
    of = planes.Planes()
    for size, width in ((FRAME, 4), (PAGE, 2), (FRAME, 2), (300 * PAGE, 4), (PAGE, 4)):
        assert there_and_back(NOISE[-size:], width, of)[2] == NOISE[-size:]


@pytest.mark.parametrize("width", planes.WIDTHS)
def test_the_highest_plane_is_the_exponents(width: int) -> None:
    data = floats(width)
    _, highest, _ = there_and_back(data, width, planes.Planes())
    words = [word for (word,) in struct.iter_unpack({2: "<H", 4: "<I"}[width], data)]
    assert list(highest) == [word >> (7 if width == 2 else 23) & 255 for word in words]


def rows(size: int) -> bytes:
    return b"".join(
        json.dumps({"step": n, "name": f"layer.{n % 97}.weight", "loss": 1 / (n + 1)}).encode() for n in range(90_000)
    )[:size]


def of_bf16(values: np.ndarray) -> bytes:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


HELD = {
    "bfloat16": (of_bf16(np.tile(NORMAL, 2)), 2),
    "bfloat16, none below 0": (of_bf16(np.abs(np.tile(NORMAL, 2))), 2),
    "float16": (np.tile(NORMAL, 2).astype("<f2").tobytes(), 2),
    "float32": (NORMAL.astype("<f4").tobytes(), 4),
    "float32, squares": ((NORMAL * NORMAL).astype("<f4").tobytes(), 4),
    "float32, from 0 to 1": (np.random.default_rng(3).random(FRAME // 4, np.float32).tobytes(), 4),
    "float32 that was bfloat16": ((NORMAL.astype("<f4").view("<u4") & 0xFFFF0000).tobytes(), 4),
    "a text": (rows(FRAME), 0),
    "noise": (NOISE, 0),
    "zeros": (bytes(FRAME), 0),
    "half zeros": (b"".join(NOISE[at : at + 2048] + bytes(2048) for at in range(0, FRAME, PAGE)), 0),
    "one word": (b"\1\2\3\4" * (FRAME // 4), 0),
    "numbers": (np.arange(FRAME // 4, dtype="<u4").tobytes(), 0),
    "tokens": (np.random.default_rng(1).integers(0, 50_000, FRAME // 8).astype("<i8").tobytes(), 0),
    "pointers": ((np.random.default_rng(1).integers(0, 1 << 24, FRAME // 8) * 16 + (0x7F31 << 32)).astype("<u8").tobytes(), 0),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("size", [planes.SMALLEST, 100 * PAGE, 1001 * PAGE, FRAME])
def test_floats_are_known_and_nothing_else_is_taken_for_them(name: str, size: int) -> None:
    data, width = HELD[name]
    assert planes.probe(memoryview(data)[:size]) == width


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("size", [planes.SMALLEST, 100 * PAGE, 1001 * PAGE + 2048, FRAME])
def test_only_noise_looks_like_noise(name: str, size: int) -> None:
    assert planes.noise(memoryview(HELD[name][0])[:size]) is (name == "noise")


def test_mantissas_are_noise_and_what_is_small_is_not() -> None:
    lower, highest = planes.Planes().split(memoryview(HELD["bfloat16"][0]), 2)
    assert (planes.noise(lower), planes.noise(highest)) == (True, False)
    assert not planes.noise(memoryview(NOISE)[: planes.SMALLEST - 1])
    assert not planes.noise(memoryview(b""))


@pytest.mark.parametrize("size", [0, 1, PAGE, planes.SMALLEST - PAGE, planes.SMALLEST - 1, planes.SMALLEST + 1, FRAME - 1])
def test_what_is_small_or_no_pages_is_left_as_it_is(size: int) -> None:
    assert planes.probe(memoryview(HELD["float32"][0])[:size]) == 0


@given(st.binary(min_size=1, max_size=64), st.integers(16, 40))
def test_any_pages_can_be_asked_about(piece: bytes, pages: int) -> None:
    data = (piece * (pages * PAGE // len(piece) + 1))[: pages * PAGE]
    assert planes.probe(memoryview(data)) in (0, *planes.WIDTHS)
