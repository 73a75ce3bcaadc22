"""Frames and small objects: any zstd reads what we write; what we read is bounded by what the index says."""

from __future__ import annotations

import io
import random
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hibernode.errors import Corrupt, Refused
from hibernode.model import PAGE
from hibernode.transfer import codec

FRAME = codec.FRAME_BYTES
RANDOM = random.Random(7).randbytes(FRAME)
MIXED = b"".join(RANDOM[i : i + 2048] + bytes(2048) for i in range(0, FRAME, PAGE))
CONTENTS = {
    "compressible": b"hibernode" * 100_000,
    "random": RANDOM,
    "mixed": MIXED,
    "zeros": bytes(FRAME),
    "one page": RANDOM[:PAGE],
    "one page of text": b"ab" * (PAGE // 2),
    "a block": RANDOM[: 128 << 10],
    "a block and a byte": RANDOM[: (128 << 10) + 1],
    "a byte": b"x",
    "nearly a frame": RANDOM[:-1],
}


def pack(data: bytes, level: int | None = 1) -> bytes:
    return b"".join(codec.Packer(level).pack(memoryview(data)))


def unpack(stored: bytes, size: int) -> bytes:
    return b"".join(codec.Unpacker().unpack(memoryview(stored), size))


@pytest.mark.parametrize("level", [None, -7, 1, 3, 19])
@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_packed_comes_back(name: str, level: int | None) -> None:
    data = CONTENTS[name][: FRAME if level != 19 else 1 << 18]
    stored = pack(data, level)
    assert unpack(stored, len(data)) == data
    assert len(stored) <= len(data) + 9 + 3 * (len(data) // (128 << 10) + 1), "never much longer than what it holds"
    assert zstandard.ZstdDecompressor().decompress(stored) == data
    assert zstandard.frame_content_size(stored) == len(data)


@pytest.mark.parametrize("name", CONTENTS)
def test_the_zstd_program_reads_a_raw_frame(name: str) -> None:
    data = CONTENTS[name]
    assert subprocess.run(["zstd", "-dc"], input=pack(data, None), capture_output=True, check=True).stdout == data
    subprocess.run(["zstd", "-t"], input=pack(data, None), capture_output=True, check=True)


@pytest.mark.parametrize(("name", "raw"), [("compressible", False), ("mixed", False), ("random", True), ("one page", True)])
def test_only_what_shrinks_is_compressed(name: str, raw: bool) -> None:
    data = CONTENTS[name]
    assert (len(pack(data)) > len(data)) is raw


def test_a_raw_frame_is_not_copied() -> None:
    data = bytearray(RANDOM)
    pieces = codec.Packer(None).pack(memoryview(data))
    data[:4] = b"same"
    assert b"".join(pieces)[12:16] == b"same"


@given(st.binary(max_size=3000), st.sampled_from([None, 1]))
def test_any_bytes_come_back(data: bytes, level: int | None) -> None:
    assert unpack(pack(data, level), len(data)) == data


def test_one_packer_serves_many_frames() -> None:
    packer, unpacker = codec.Packer(1), codec.Unpacker()
    for data in CONTENTS.values():
        stored = b"".join(packer.pack(memoryview(data)))
        assert b"".join(unpacker.unpack(memoryview(stored), len(data))) == data


@pytest.mark.parametrize("level", [None, 1])
def test_every_truncation_and_many_flips_are_corrupt_or_the_size_that_was_asked(level: int | None) -> None:
    data = MIXED[: 3 * PAGE]
    stored = pack(data, level)
    for size in range(len(stored)):
        with pytest.raises(Corrupt):
            unpack(stored[:size], len(data))
    with pytest.raises(Corrupt):
        unpack(stored + b"\0", len(data))
    for at in [*range(40), *range(40, len(stored), 97), len(stored) - 1]:
        for flip in (0x01, 0x80, 0xFF):
            try:
                found = unpack(stored[:at] + bytes([stored[at] ^ flip]) + stored[at + 1 :], len(data))
            except Corrupt:
                continue
            assert len(found) == len(data)


@pytest.mark.parametrize("level", [None, 1])
@pytest.mark.parametrize("size", [0, 1, PAGE, 2 * PAGE - 1, 2 * PAGE + 1, FRAME])
def test_a_frame_of_another_size_than_the_index_says_is_corrupt(level: int | None, size: int) -> None:
    with pytest.raises(Corrupt):
        unpack(pack(MIXED[: 2 * PAGE], level), size)


def frame(header: bytes, *blocks: bytes) -> bytes:
    return bytes.fromhex("28b52ffd") + header + b"".join(blocks)


def rle_block(size: int, *, last: bool) -> bytes:
    """A block of four bytes that inflates to `size`."""
    return (size << 3 | 1 << 1 | last).to_bytes(3, "little") + b"\0"


def bombs() -> Iterator[tuple[str, bytes]]:
    block = rle_block(128 << 10, last=False)
    yield "no size, a gigabyte", frame(b"\x00\x88", block * 8192, rle_block(1, last=True))
    yield "says a page, is a gigabyte", frame(b"\xa0" + PAGE.to_bytes(4, "little"), block * 8192, rle_block(1, last=True))
    yield "says a terabyte", frame(b"\xe0" + (1 << 40).to_bytes(8, "little"), block, rle_block(1, last=True))
    yield "says a terabyte, in a window", frame(b"\xc0\xa0" + (1 << 40).to_bytes(8, "little"), block, rle_block(1, last=True))
    yield "says as much as can be", frame(b"\xe0" + b"\xfe" + b"\xff" * 7, rle_block(1, last=True))
    yield "a window of 4 GB", frame(b"\x00\xb0", block, rle_block(1, last=True))
    yield "real", zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20))
    yield "skippable", bytes.fromhex("502a4d18ffffffff")


@pytest.mark.parametrize("bomb", [bomb for _, bomb in bombs()], ids=[name for name, _ in bombs()])
def test_a_bomb_does_not_go_off(bomb: bytes) -> None:
    for size in (PAGE, FRAME):
        assert peak_of_corrupt(lambda: unpack(bomb, size)) < 2 * FRAME  # noqa: B023
    assert peak_of_corrupt(lambda: codec.inflate(bomb, limit=1 << 20)) < 4 << 20


@pytest.mark.parametrize("size", [1 << 40, (1 << 62) - 1])
def test_an_object_for_which_there_is_no_memory_is_corrupt(size: int) -> None:
    """Where the limit is large, because the manifest says so."""
    lie = frame(b"\xe0" + size.to_bytes(8, "little"), rle_block(1, last=True))
    with pytest.raises(Corrupt):
        codec.inflate(lie, limit=1 << 63)


def peak_of_corrupt(work: Callable[[], object]) -> int:
    """Bytes that were taken at most until it was found to be Corrupt."""
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@given(st.binary(min_size=1, max_size=2000))
def test_a_small_object_comes_back(data: bytes) -> None:
    assert codec.inflate(codec.deflate(data), limit=len(data)) == data


def test_a_small_object_that_is_too_large_is_corrupt() -> None:
    with pytest.raises(Corrupt):
        codec.inflate(codec.deflate(b"12345"), limit=4)


@given(st.binary(max_size=200))
def test_garbage_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        codec.inflate(data, limit=1000)
    with pytest.raises(Corrupt):
        unpack(data, 77)


# --- a file that leaves compressed ------------------------------------------------------------------------------------------


def test_what_goes_through_a_deflater_comes_back() -> None:
    out: list[bytes] = []
    with codec.Deflater(out.append) as file:
        for _ in range(3):
            file.write(RANDOM[:70_000])
    assert codec.inflating(io.BytesIO(b"".join(out))).read(1 << 20) == RANDOM[:70_000] * 3


def test_a_failed_write_is_not_followed_by_another() -> None:
    """The first error is the story; closing the file must neither hide it nor write again."""
    calls = []

    def fails(data: bytes) -> None:
        calls.append(data)
        raise OSError("first")

    def write_for_ever() -> None:
        with codec.Deflater(fails) as file:
            while True:
                file.write(RANDOM)

    with pytest.raises(OSError, match="first"):
        write_for_ever()
    assert len(calls) == 1


def test_a_file_that_ends_inside_a_frame_gives_no_more_than_it_has() -> None:
    packed = zstandard.ZstdCompressor().compress(RANDOM)
    source = codec.inflating(io.BytesIO(packed[:-5]))
    assert sum(len(piece) for piece in iter(lambda: source.read(1 << 16), b"")) < len(RANDOM)


# --- what a command may ask for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "level"),
    [("zstd", 1), ("zstd:1", 1), ("zstd:19", 19), ("zstd:-7", -7), ("zstd:0", 0), ("zstd:03", 3), ("none", None)],
)
def test_known_compressions(text: str, level: int | None) -> None:
    assert codec.parse_compression(text) == level


@pytest.mark.parametrize(
    "text",
    ["", "lz4", "gzip", "ZSTD", "zstd:20", "zstd:-8", "zstd:x", "zstd:--1", "zstd:1:2", "zstd:1.5", "none:1", " zstd", "zstd: 1",
     "zstd:-", "zstd:²", "zstd:" + "9" * 5000],
)  # fmt: skip
def test_unknown_compressions_are_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        codec.parse_compression(text)
    assert refused.value.code == "compression"
    assert refused.value.details["property"] == "compression"
    assert refused.value.details["found"] == text
    assert "zstd" in str(refused.value.details["wanted"])
