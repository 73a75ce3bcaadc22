"""One frame of a stream: Corrupt, or exactly as many bytes as the index names."""

from __future__ import annotations

import functools
import struct

import zstandard

from fuzz.feed import Feed
from fuzz.guard import guarded, require
from fuzz.targets import golden
from hibernode.errors import Corrupt
from hibernode.model import FRAME_PAGES, PAGE
from hibernode.transfer import codec

MAX_LENGTH = 16384
_RAW, _BUILT, _BOMB, _STORED, _MARKED = 0, 1, 2, 3, 4
_SIZES = (PAGE, 2 * PAGE, 33 * PAGE, FRAME_PAGES * PAGE)


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(5)
    size = PAGE * (1 + feed.below(FRAME_PAGES)) if feed.byte() % 2 else feed.pick(_SIZES)
    stored = {_RAW: _as_is, _BUILT: _blocks, _BOMB: _bomb, _STORED: _raw_frame, _MARKED: _planes}[how](feed, size)
    with guarded(Corrupt):
        pieces = codec.Unpacker().unpack(memoryview(stored), size)
        require(sum(len(piece) for piece in pieces) == size, "another size than was asked for")


def _as_is(feed: Feed, _: int) -> bytes:
    return feed.rest()


def _blocks(feed: Feed, size: int) -> bytes:
    """A frame header that says what it likes, and blocks of any type and length: raw, one byte over and over, compressed, reserved."""
    said = size if feed.byte() % 4 else feed.number()
    single = feed.byte() % 2
    header = (
        struct.pack("<I", 0xFD2FB528) + bytes([0xC0 | single << 5 | feed.byte() % 4]) + (b"" if single else bytes([feed.byte()]))
    )
    blocks = [header, struct.pack("<Q", said)]
    left = size
    for n in range(1 + feed.below(40)):
        kind, length = feed.below(4), min(left, 128 << 10) if feed.byte() % 2 else feed.below(1 << 16)
        last = int(left <= length and n > 0)
        blocks.append((length << 3 | kind << 1 | last).to_bytes(4, "little")[:3])
        blocks.append(feed.take(1) if kind == 1 else feed.take(length).ljust(length if kind == 0 else 0, b"\0"))
        left = max(0, left - length)
    return b"".join(blocks)


def _bomb(feed: Feed, size: int) -> bytes:
    """A good frame of much more or much less than was said, with or without its size in front."""
    length = feed.pick((size, size + 1, size - 1, 0, 2 * size, 16 << 20))
    packed = bytearray(_zeros(length, bool(feed.byte() % 2), bool(feed.byte() % 2)))
    for _ in range(feed.below(8)):
        packed[feed.below(len(packed))] ^= feed.byte()
    return bytes(packed) + feed.rest()


@functools.lru_cache(200)
def _zeros(length: int, with_size: bool, with_checksum: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=with_size, write_checksum=with_checksum).compress(bytes(length))


def _raw_frame(feed: Feed, size: int) -> bytes:
    """What our own writer stores when nothing shrinks, with a few bytes changed."""
    pieces = codec.Packer(None).pack(memoryview(bytes(size)))
    stored = bytearray(b"".join(bytes(piece) for piece in pieces))
    for _ in range(feed.below(8)):
        stored[feed.below(min(len(stored), 1 << 16))] ^= feed.byte()
    return bytes(stored)


def _planes(feed: Feed, size: int) -> bytes:
    """A mark that is good or nearly, and two zstd frames, good or of other lengths, or whatever else can be built."""
    width = feed.pick((2, 4, 1, 3, 8, 0))
    highest = size // (width or 1)
    parts = []
    for part in (size - highest, highest):
        how = feed.byte() % 4
        parts.append(_bomb(feed, max(part, 1)) if how == 2 else _blocks(feed, part) if how == 3 else _zeros(part, True, False))
    length = feed.number() & 0xFFFFFFFF if feed.byte() % 4 == 3 else len(parts[0])
    stored = bytearray(struct.pack("<IIBBHI", 0x184D2A5B, 8, 1, width, 0, length) + b"".join(parts))
    for _ in range(feed.below(4)):
        stored[feed.below(len(stored))] ^= feed.byte()
    return bytes(stored)


def seeds() -> dict[str, bytes]:
    text = b"".join(n.to_bytes(4, "little") * (PAGE // 4) for n in range(4))
    packed = b"".join(bytes(piece) for piece in codec.Packer(1).pack(memoryview(text)))
    one_page = b"".join(bytes(piece) for piece in codec.Packer(None).pack(memoryview(text[:PAGE])))
    in_lz4 = b"".join(bytes(piece) for piece in codec.Packer("lz4").pack(memoryview(text)))
    return {
        "lz4": bytes([_RAW, 1, 3, 0]) + in_lz4,
        "packed": bytes([_RAW, 1, 3, 0]) + packed,
        "raw": bytes([_RAW, 0, 0]) + one_page,
        "stream": bytes([_RAW, 0, 3]) + golden.stream(1),
        "built": bytes([_BUILT, 0, 1, 1, 1, 0, 0, 0]) + bytes(range(200)),
        "bomb": bytes([_BOMB, 0, 0, 5, 1, 1, 0]),
        "stored": bytes([_STORED, 0, 0, 0]),
        "planes": bytes([_MARKED, 0, 2, 0]),
        "planes-of-four": bytes([_MARKED, 0, 2, 1]),
    }
