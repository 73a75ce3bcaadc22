"""Frames and small objects: any zstd reads what we write; what we read is bounded by what the index says."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator

import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hibernode.errors import Corrupt, Refused
from hibernode.model import PAGE
from hibernode.transfer import codec, planes
from tests.golden.make import floats

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


def pack(data: bytes, level: codec.Level = 1) -> bytes:
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


# --- a quick look before a slow level ---------------------------------------------------------------------------------------


def few(count: int, width: int) -> bytes:
    """Numbers of so many bytes out of a few: each byte as frequent as any other, as in noise."""
    table = np.frombuffer(RANDOM[: count * width], np.uint8).reshape(count, width)
    return table[np.random.default_rng(1).integers(0, count, FRAME // width)].tobytes()[:FRAME]


EVEN = {
    "noise": RANDOM,
    "a MiB of noise, again and again": (RANDOM[: (1 << 20) + 17] * 4)[:FRAME],
    "half of it again, at an odd place": RANDOM[: FRAME // 2 - 3] + RANDOM[: FRAME // 2 + 3],
    "few numbers of four bytes": few(100_000, 4),
    "fewer": few(10_000, 4),
    "few of eight": few(10_000, 8),
    "a frame's end again": RANDOM[:-70_000] + RANDOM[:70_000],
}


@pytest.mark.parametrize("level", [5, 9, 15])
@pytest.mark.parametrize("name", EVEN)
def test_what_is_even_loses_nothing_by_the_quick_look(name: str, level: int) -> None:
    """At most a hundredth of what the level alone would store, or it is as good as raw anyway."""
    data = EVEN[name]
    alone = zstandard.ZstdCompressor(level=level).compress(data)
    stored = pack(data, level)
    assert unpack(stored, len(data)) == data
    assert len(stored) <= 1.01 * len(alone) or (len(stored) < 1.001 * len(data) and len(alone) > 0.97 * len(data))


@pytest.mark.parametrize("width", planes.WIDTHS)
@pytest.mark.parametrize("level", [5, 12])
def test_floats_lose_nothing_by_it(width: int, level: int) -> None:
    data = floats(width, FRAME)
    split = planes.Planes().split(memoryview(data), width)
    alone = [len(zstandard.ZstdCompressor(level=level).compress(each)) for each in split]
    assert len(pack(data, level)) <= 1.01 * sum(alone)


# --- LZ4 -------------------------------------------------------------------------------------------------------------------

LZ4 = bytes.fromhex("04224d18607073")  # magic, blocks by themselves, of 4 MiB at most, the checksum of these two bytes
TEXT = b"".join(b"%d. hibernode\n" % n for n in range(3 * PAGE))[: 9 * PAGE]


@pytest.mark.parametrize("name", CONTENTS)
def test_what_lz4_packs_comes_back_and_its_own_programs_read_it(name: str) -> None:
    """So does zstd's, if it was built with LZ4; what does not shrink is a raw zstd frame here, too."""
    data, packer = CONTENTS[name], codec.Packer("lz4")
    stored = b"".join(packer.pack(memoryview(data)))
    assert unpack(stored, len(data)) == data
    assert len(stored) <= len(data) + 9 + 3 * (len(data) // (128 << 10) + 1)
    assert packer.in_lz4 == (stored[:7] == LZ4) == (len(stored) < len(data))
    assert not packer.in_planes
    for program in ["zstd", "lz4"] if packer.in_lz4 else ["zstd"]:
        assert subprocess.run([program, "-dc"], input=stored, capture_output=True, check=True).stdout == data


@pytest.mark.parametrize("width", planes.WIDTHS)
def test_lz4_leaves_floats_as_they_are(width: int) -> None:
    """Planes take longer than all of LZ4."""
    packer, data = codec.Packer("lz4"), floats(width)
    assert unpack(b"".join(packer.pack(memoryview(data))), len(data)) == data
    assert (packer.in_planes, packer.in_lz4) == (0, 0)


@given(st.binary(max_size=300), st.integers(1, 3000))
def test_any_bytes_come_back_through_lz4(piece: bytes, times: int) -> None:
    data = (piece * times)[: FRAME // 8]
    assert unpack(pack(data, "lz4"), len(data)) == data


def other_lz4_frames() -> Iterator[tuple[str, bytes]]:
    good = pack(TEXT, "lz4")
    block, end = good[11:-4], bytes(4)
    yield "blocks that lean on each other", good.replace(LZ4, LZ4[:4] + bytes.fromhex("407073"))
    yield "blocks of 64 KiB", good.replace(LZ4, LZ4[:5] + bytes.fromhex("4082"))
    yield "with its size", LZ4[:4] + bytes.fromhex("6870") + len(TEXT).to_bytes(8, "little") + b"\0" + good[7:]
    yield "two blocks", good[:-4] + good[7:]
    yield "two frames", good + good
    yield "no end", good[:-4]
    yield "a checksum at the end", good + end
    yield "an empty block", LZ4 + end
    yield "no block", LZ4
    yield "a stored block", LZ4 + (len(TEXT) | 1 << 31).to_bytes(4, "little") + TEXT + end
    yield "a length too small", LZ4 + (len(block) - 1).to_bytes(4, "little") + block + end
    yield "a length too large", LZ4 + (len(block) + 1).to_bytes(4, "little") + block + end
    yield "a byte too many", LZ4 + (len(block) + 1).to_bytes(4, "little") + block + b"\0" + end
    yield "zstd within", LZ4 + len(TEXT).to_bytes(4, "little") + TEXT + end


@pytest.mark.parametrize("stored", [each for _, each in other_lz4_frames()], ids=[name for name, _ in other_lz4_frames()])
def test_anything_else_than_one_block_of_lz4_is_corrupt(stored: bytes) -> None:
    assert unpack(pack(TEXT, "lz4"), len(TEXT)) == TEXT
    for size in (len(TEXT), PAGE, FRAME):
        assert peak_of_corrupt(lambda: unpack(stored, size)) < 3 * FRAME  # noqa: B023


@pytest.mark.parametrize("size", [0, 1, PAGE, len(TEXT) - 1, len(TEXT) + 1, FRAME, FRAME + 1, 1 << 31, 1 << 40])
def test_an_lz4_frame_of_another_size_than_the_index_says_is_corrupt(size: int) -> None:
    assert peak_of_corrupt(lambda: unpack(pack(TEXT, "lz4"), size)) < 3 * FRAME


def test_an_lz4_bomb_does_not_go_off() -> None:
    """16 MiB of content in 64 KiB: what is not asked for is not made."""
    stored = pack(bytes(FRAME), "lz4")
    block = lz4.block.compress(bytes(4 * FRAME), store_size=False)
    bomb = LZ4 + len(block).to_bytes(4, "little") + block + bytes(4)
    for each in (stored, bomb):
        assert peak_of_corrupt(lambda: unpack(each, PAGE)) < 1 << 20  # noqa: B023


def test_an_lz4_frame_that_is_cut_or_flipped_is_corrupt_or_of_the_size_that_was_asked() -> None:
    stored = pack(TEXT, "lz4")
    for size in range(0, len(stored), 7):
        with pytest.raises(Corrupt):
            unpack(stored[:size], len(TEXT))
    for at in [*range(40), *range(40, len(stored), 97), len(stored) - 1]:
        for flip in (0x01, 0x80, 0xFF):
            try:
                found = unpack(stored[:at] + bytes([stored[at] ^ flip]) + stored[at + 1 :], len(TEXT))
            except Corrupt:
                continue
            assert len(found) == len(TEXT)


# --- floats -----------------------------------------------------------------------------------------------------------------

WEIGHTS = floats(4, FRAME)
FLOATS = {
    "bfloat16": floats(2, FRAME),
    "float32": WEIGHTS,
    "float32 that was bfloat16": (np.frombuffer(WEIGHTS, "<u4") & 0xFFFF0000).tobytes(),
    "few bfloat16": floats(2),
    "few float32": floats(4),
    "a page less than a frame": WEIGHTS[PAGE:],
}


def in_planes(data: bytes, level: int | None = 1) -> tuple[bytes, bool]:
    packer = codec.Packer(level)
    return b"".join(packer.pack(memoryview(data))), packer.in_planes == 1


@pytest.mark.parametrize("level", [0, 1, 3, 9, 19])
@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_stored_in_planes_and_come_back(name: str, level: int) -> None:
    data = FLOATS[name][: FRAME if level < 9 else 1 << 18]
    stored, split = in_planes(data, level)
    assert split
    assert unpack(stored, len(data)) == data
    assert len(stored) < 0.92 * len(zstandard.ZstdCompressor(level=level).compress(data)), "and are smaller for it"


def test_weights_are_as_small_as_they_can_be() -> None:
    """No coder of single values comes below their entropy: of normal bfloat16 8 bits for sign and mantissa, 2.55 for the exponent."""
    data = FLOATS["bfloat16"]
    _, counts = np.unique(np.frombuffer(data, "<u2"), return_counts=True)
    share = counts / counts.sum()
    bound = -float((share * np.log2(share)).sum()) / 16
    assert bound < len(in_planes(data)[0]) / len(data) < 1.02 * bound


@pytest.mark.parametrize("level", [None, -1, -7])
@pytest.mark.parametrize("name", FLOATS)
def test_who_wants_speed_alone_gets_no_planes(name: str, level: int | None) -> None:
    stored, split = in_planes(FLOATS[name], level)
    assert not split
    assert zstandard.ZstdDecompressor().decompress(stored) == FLOATS[name]


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_float_is_stored_as_ever(name: str) -> None:
    """Byte for byte: what readers of version 1 know."""
    data = CONTENTS[name]
    stored, split = in_planes(data)
    packed = zstandard.ZstdCompressor(level=1).compress(data)
    assert not split
    assert stored == (packed if len(packed) <= 0.97 * len(data) else pack(data, None))


def test_weights_that_repeat_are_stored_as_they_are_where_that_is_smaller() -> None:
    data = floats(2, 17 * PAGE) * 15
    stored, split = in_planes(data)
    assert not split
    assert stored == zstandard.ZstdCompressor(level=1).compress(data)
    assert planes.probe(memoryview(data)) == 2, "else nothing was tried"


@pytest.mark.parametrize("name", FLOATS)
def test_the_zstd_program_takes_planes_and_gives_them(name: str) -> None:
    data = FLOATS[name]
    stored, _ = in_planes(data)
    width = planes.probe(memoryview(data))
    subprocess.run(["zstd", "-t"], input=stored, capture_output=True, check=True)
    found = subprocess.run(["zstd", "-dc"], input=stored, capture_output=True, check=True).stdout
    words = np.frombuffer(found, np.uint8).reshape(width, -1).T.copy().view(f"<u{width}")
    assert (words >> 1 | words << (8 * width - 1)).tobytes() == data, "undone as docs/image-format.md says"


MARK = struct.Struct("<IIBBHI")  # once more, as docs/image-format.md has it
LOWER, HIGHEST = (zstandard.ZstdCompressor().compress(bytes(n * PAGE)) for n in (3, 1))


def marked(first: bytes, second: bytes, width: int = 4, length: int | None = None) -> bytes:
    return MARK.pack(0x184D2A5B, 8, 1, width, 0, len(first) if length is None else length) + first + second


def test_the_mark_is_what_the_format_says() -> None:
    assert unpack(marked(LOWER, HIGHEST), 4 * PAGE) == bytes(4 * PAGE)
    data = FLOATS["few float32"]
    stored, _ = in_planes(data)
    length = MARK.unpack_from(stored)[-1]
    assert stored.startswith(MARK.pack(0x184D2A5B, 8, 1, 4, 0, length))
    for frame, size in ((stored[16 : 16 + length], 3 * len(data) // 4), (stored[16 + length :], len(data) // 4)):
        assert len(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)) == size


def other_marks() -> Iterator[tuple[str, bytes]]:
    good = marked(LOWER, HIGHEST)
    changes = {0: (0x5A, 0x5E), 4: (7, 9), 7: (1,), 8: (0, 2), 9: (0, 1, 2, 3, 8), 10: (1,), 11: (1,)}
    for at, value in ((at, value) for at, values in changes.items() for value in values):
        yield f"byte {at} is {value}", good[:at] + bytes([value]) + good[at + 1 :]
    for length in (0, 1, len(LOWER) - 1, len(LOWER) + 1, len(good), 1 << 31, (1 << 32) - 1):
        yield f"length {length}", marked(LOWER, HIGHEST, length=length)
    yield "exchanged", marked(HIGHEST, LOWER)
    yield "nothing", marked(b"", b"")
    yield "one", marked(LOWER, b"")
    yield "three", marked(LOWER, HIGHEST + HIGHEST)
    yield "whole", marked(zstandard.ZstdCompressor().compress(bytes(4 * PAGE)), b"")
    yield "a mark in a mark", marked(marked(LOWER, HIGHEST), HIGHEST)
    yield "two marks", good[:16] + good


@pytest.mark.parametrize("stored", [each for _, each in other_marks()], ids=[name for name, _ in other_marks()])
def test_anything_else_than_that_mark_and_two_frames_is_corrupt(stored: bytes) -> None:
    for size in (4 * PAGE, 3 * PAGE, PAGE):
        with pytest.raises(Corrupt):
            unpack(stored, size)


@pytest.mark.parametrize("size", [0, 1, 4, 4 * PAGE - 4, 4 * PAGE + 4, FRAME, FRAME + 4, 1 << 40])
def test_planes_of_another_size_than_the_index_says_are_corrupt(size: int) -> None:
    with pytest.raises(Corrupt):
        unpack(marked(LOWER, HIGHEST), size)


def test_planes_of_more_than_a_frame_are_corrupt() -> None:
    lower, highest = (zstandard.ZstdCompressor().compress(bytes(n * FRAME)) for n in (3, 1))
    assert peak_of_corrupt(lambda: unpack(marked(lower, highest), 4 * FRAME)) < 1 << 20


@pytest.mark.parametrize("width", [2, 4])
def test_planes_that_are_cut_or_flipped_are_corrupt_or_of_the_size_that_was_asked(width: int) -> None:
    data = floats(width)
    stored, _ = in_planes(data)
    for size in [*range(64), *range(64, len(stored), 991), len(stored) - 1]:
        with pytest.raises(Corrupt):
            unpack(stored[:size], len(data))
    with pytest.raises(Corrupt):
        unpack(stored + b"\0", len(data))
    for at in [*range(64), *range(64, len(stored), 991), len(stored) - 1]:
        for flip in (0x01, 0x80, 0xFF):
            try:
                found = unpack(stored[:at] + bytes([stored[at] ^ flip]) + stored[at + 1 :], len(data))
            except Corrupt:
                continue
            assert len(found) == len(data)


def test_what_a_frame_takes_is_what_the_memory_bound_counts() -> None:
    """Its planes, and it compressed both ways; `send.memory_bound` counts the pages and the encrypted frame beside it."""
    packer, data = codec.Packer(1), floats(4, FRAME)
    other = (np.frombuffer(data, "<u4") & 0xFFFF0000).tobytes()  # of which both ways are tried
    tracemalloc.start()
    try:
        for each in (data, other):
            packer.pack(memoryview(each))
        assert tracemalloc.get_traced_memory()[1] < 3 * FRAME + (1 << 20)
    finally:
        tracemalloc.stop()


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
    for data in (*CONTENTS.values(), *FLOATS.values(), *CONTENTS.values()):
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
        part = zstandard.ZstdCompressor().compress(bytes(size // 2))
        for stored in (bomb, marked(bomb, part, 2), marked(part, bomb, 2)):
            assert peak_of_corrupt(lambda: unpack(stored, size)) < 2 * FRAME  # noqa: B023
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
    [("zstd", 1), ("zstd:1", 1), ("zstd:19", 19), ("zstd:-7", -7), ("zstd:0", 0), ("zstd:03", 3), ("none", None), ("lz4", "lz4")],
)
def test_known_compressions(text: str, level: codec.Level) -> None:
    assert codec.parse_compression(text) == level


@pytest.mark.parametrize(
    "text",
    ["", "lz4:", "lz4:1", "lz4:-1", "LZ4", "lz4hc", "lz4 ", "lz4,zstd",
     "gzip", "ZSTD", "zstd:20", "zstd:-8", "zstd:x", "zstd:--1", "zstd:1:2", "zstd:1.5", "none:1", " zstd", "zstd: 1",
     "zstd:-", "zstd:²", "zstd:" + "9" * 5000],
)  # fmt: skip
def test_unknown_compressions_are_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        codec.parse_compression(text)
    assert refused.value.code == "compression"
    assert refused.value.details["property"] == "compression"
    assert refused.value.details["found"] == text
    assert "zstd" in str(refused.value.details["wanted"])
