"""What is encrypted comes back as it went in, from its own place only, and nothing else does."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibernode.errors import Corrupt
from hibernode.transfer.codec import Buffer
from hibernode.transfer.seal import PIECE, TAG, Closer, ObjectSeal, Seal, new_key, opened

ID = "0d1cbd6c-2b9f-4b5a-9b43-7a3c1f6fd2a0"
KEY = bytes(range(32))
SEAL = Seal(ID, KEY)
STREAM = SEAL.of("main/pages-0.zst")


def closed(seal: ObjectSeal, data: bytes, number: int = 0, *, last: bool = False) -> bytes:
    return b"".join(seal.close(number, [data], seal.scratch(len(data) + TAG), last=last))


def reopened(seal: ObjectSeal, stored: bytes, number: int = 0, *, last: bool = False) -> bytes:
    return bytes(seal.open(number, memoryview(stored), seal.scratch(len(stored)), last=last))


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=6), st.integers(0, 1 << 40))
def test_pieces_come_back_joined(pieces: list[bytes], number: int) -> None:
    whole = b"".join(pieces)
    into = STREAM.scratch(len(whole) + TAG)
    stored = b"".join(STREAM.close(number, [memoryview(piece) for piece in pieces], into))
    assert len(stored) == len(whole) + STREAM.extra
    assert reopened(STREAM, stored, number) == whole


def test_the_bytes_are_those_of_format_version_1() -> None:
    """They never change: checkpoints lie in stores."""
    stored = closed(STREAM, b"hibernode", 7)
    assert stored.hex() == "e2700232facb0f183185255aa626f9707ef716d6aa82f5a6e1"


@pytest.mark.parametrize(
    "other",
    [
        Seal("9d1cbd6c-2b9f-4b5a-9b43-7a3c1f6fd2a0", KEY).of("main/pages-0.zst"),
        SEAL.of("main/pages-1.zst"),
        SEAL.of("other/pages-0.zst"),
        Seal(ID, bytes(32)).of("main/pages-0.zst"),
    ],
    ids=["another checkpoint's", "another stream's", "another image's", "another key's"],
)
def test_it_is_opened_in_its_own_place_only(other: ObjectSeal) -> None:
    stored = closed(STREAM, b"x" * 100)
    with pytest.raises(Corrupt):
        reopened(other, stored)


@pytest.mark.parametrize(("number", "last"), [(1, False), (0, True)])
def test_it_is_opened_at_its_own_number_only(number: int, last: bool) -> None:
    stored = closed(STREAM, b"x" * 100)
    with pytest.raises(Corrupt):
        reopened(STREAM, stored, number, last=last)


def test_every_changed_bit_and_every_cut_is_found() -> None:
    stored = closed(STREAM, b"a few bytes of memory")
    for bit in range(len(stored) * 8):
        changed = bytearray(stored)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Corrupt):
            reopened(STREAM, bytes(changed))
    for length in range(len(stored)):
        with pytest.raises(Corrupt):
            reopened(STREAM, stored[:length])


@given(st.binary(max_size=200))
def test_what_nobody_closed_is_never_opened(data: bytes) -> None:
    with pytest.raises(Corrupt):
        reopened(STREAM, data)


def test_no_two_objects_and_no_two_pieces_look_alike() -> None:
    """A number that were used twice with one key would give both contents away."""
    seals = [SEAL.of(f"main/pages-{n}.zst") for n in range(4)] + [Seal(ID, new_key()).of("main/pages-0.zst") for _ in range(4)]
    found = {closed(seal, bytes(64), number)[:64] for seal in seals for number in range(50)}
    assert len(found) == len(seals) * 50


def test_without_a_key_everything_stays_as_it_is() -> None:
    plain = Seal(ID).of("main/pages-0.zst")
    pieces: list[Buffer] = [b"a", memoryview(b"b")]
    assert plain.close(0, pieces, plain.scratch(10)) is pieces
    stored = memoryview(b"stored")
    assert plain.open(3, stored, plain.scratch(10)) is stored
    assert plain.extra == 0


def test_the_key_is_shown_to_nobody() -> None:
    assert KEY.hex() not in repr(SEAL)
    assert repr(KEY) not in repr(SEAL)


# --- small objects ----------------------------------------------------------------------------------------------------------


def written(seal: ObjectSeal, data: bytes, step: int) -> bytes:
    out: list[bytes] = []
    closer = Closer(seal, lambda piece: out.append(bytes(piece)))
    for at in range(0, len(data), step):
        closer.write(data[at : at + step])
    closer.end()
    return b"".join(out)


def read(seal: ObjectSeal, stored: bytes) -> bytes:
    view = memoryview(stored)
    return b"".join(bytes(piece) for piece in opened(seal, len(stored), lambda at, size: view[at : at + size]))


@pytest.mark.parametrize("seal", [SEAL, Seal(ID)], ids=["encrypted", "plain"])
@pytest.mark.parametrize("size", [1, 17, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 5])
@pytest.mark.parametrize("step", [1 << 14, PIECE, 3 * PIECE])
def test_a_small_object_comes_back(seal: Seal, size: int, step: int) -> None:
    small, data = seal.of("main/index.zst"), os.urandom(size)
    stored = written(small, data, step)
    assert len(stored) == size + small.extra * -(-size // PIECE)
    assert read(small, stored) == data


def test_pieces_of_a_small_object_cannot_be_cut_off_swapped_or_doubled() -> None:
    small, data = SEAL.of("main/images.tar.zst"), os.urandom(3 * PIECE + 100)
    stored = written(small, data, PIECE)
    cut = PIECE + TAG
    one, two, three, four = stored[:cut], stored[cut : 2 * cut], stored[2 * cut : 3 * cut], stored[3 * cut :]
    for wrong in (
        b"",
        one,
        one + two,
        one + two + three,
        two + one + three + four,
        one + one + two + three + four,
        stored + one,
        four,
    ):
        with pytest.raises(Corrupt):
            read(small, wrong)


def test_an_object_of_nothing_is_nothing_only_where_nothing_is_encrypted() -> None:
    small = SEAL.of("main/images.tar.zst")
    assert read(small, written(small, b"", 1)) == b""
    assert written(Seal(ID).of("main/images.tar.zst"), b"", 1) == b""
