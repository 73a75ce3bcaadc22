"""zstd and LZ4, and the only file that knows them. A frame is compressed, or stored as a zstd frame of raw blocks: any zstd reads both. A
frame of floats may be stored as their planes: a mark, which is a skippable frame, then two zstd frames; any zstd reads those, as planes.
Where speed is asked for, it is a frame of LZ4's own format: the zstd program reads it, if it was built with LZ4, and so does lz4.

zstd at level 1 unless a command says otherwise: on the two-core machine of criu.md it keeps up with a store, higher levels do not.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from typing import IO, Any, BinaryIO, Literal, cast

import lz4.block
import numpy as np
import zstandard

from hibernode.errors import Corrupt, Refused
from hibernode.model import FRAME_PAGES, PAGE
from hibernode.transfer import planes
from hibernode.transfer.planes import Planes

DEFAULT_LEVEL = 1
FRAME_BYTES = FRAME_PAGES * PAGE
_LEVEL = re.compile(r"zstd:(-?[0-9]{1,2})")
_WORTH = 0.97  # a frame that shrinks less is stored raw: it is then read back at the speed of a copy
_MAGIC = 0xFD2FB528
_RAW_HEADER = struct.Struct("<IBI")  # magic, descriptor: single segment + 4-byte content size, content size
_RAW_DESCRIPTOR = 0xA0
_BLOCK = 128 << 10  # the largest block the zstd format allows

# Of a frame in planes: magic, length of the rest, that these are planes, their width, nothing, length of the first of two zstd frames.
_MARK = struct.Struct("<IIBBHI")
_MARK_MAGIC, _PLANES = 0x184D2A5B, 1

# A plane of exponents has no repeats, only few values: Huffman's code alone makes it 3.07 times smaller in 2.4 ms per 2 MiB, where level 1,
# which believes in chance matches, makes it 2.78 times smaller in 6.5 ms. Matches of seven bytes, sought in the smallest table, are few.
_FEW_MATCHES = {
    "window_log": 17,
    "hash_log": 6,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 7,
    "target_length": 0,
    "strategy": zstandard.STRATEGY_FAST,
}
# What looks like noise is looked at quickly before a higher level tries: 0.6 ms a frame, where level 9 takes 3 and level 19 takes 600 to
# find nothing. It sees repeats of four bytes and more in all of the frame. To level 4 zstd itself gives noise up as quickly.
_QUICK = {**_FEW_MATCHES, "window_log": 22, "hash_log": 17, "min_match": 4}
_SLOW, _NOTHING = 5, 0.99  # from this level on; what shrinks less has nothing for any level
# Mantissas that shrink so much have repeats, and zstd may find more of them where the floats lie whole: both ways are tried.
_REPEATS = 0.6

# An LZ4 frame of one block. Its head: magic, version 1 and blocks by themselves, blocks of 4 MiB at most, the checksum of these two bytes.
# Then the block's length and the block, at last an empty one. Neither size nor checksum of the content: the index has both.
_LZ4_HEAD, _LZ4_END = bytes.fromhex("04224d18 60 70 73"), bytes(4)

PACKED_BYTES = FRAME_BYTES + _RAW_HEADER.size + 3 * -(-FRAME_BYTES // _BLOCK)  # of the longest frame that is ever written

Buffer = bytes | memoryview
Level = int | Literal["lz4"] | None  # of zstd; LZ4; None: raw frames only


def parse_compression(text: str) -> Level:
    """`zstd`, `zstd:<level>` -> level; `lz4`; `none` -> None. Anything else is Refused("compression")."""
    if text == "none":
        return None
    if text == "lz4":
        return "lz4"
    if text == "zstd":
        return DEFAULT_LEVEL
    if (found := _LEVEL.fullmatch(text)) and -7 <= int(found[1]) <= 19:
        return int(found[1])
    raise Refused(
        "compression",
        f"compression {text!r} is not known",
        prop="compression",
        found=text,
        wanted="zstd, zstd:<-7 to 19>, lz4, none",
        hint="leave it out for zstd at level 1",
    )


class Packer:
    """Turns the pages of one frame into its stored form. One per thread: contexts and buffers are used again."""

    def __init__(self, level: Level) -> None:
        self._lz4 = level == "lz4"
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False) if isinstance(level, int) else None
        self._few_matches = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(**_FEW_MATCHES))
        # Whoever asks for LZ4, or for less than 0, wants speed alone.
        self._planes = Planes() if isinstance(level, int) and level >= 0 else None
        slow = isinstance(level, int) and level >= _SLOW
        self._quick = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(**_QUICK)) if slow else None
        self.in_planes = self.in_lz4 = 0  # frames so far that were stored so

    def pack(self, data: memoryview) -> list[Buffer]:
        """The frame's bytes, in pieces; those of a raw frame point into `data`."""
        packed: list[Buffer] = []
        if self._zstd is not None:
            packed = self._smaller(data, self._zstd)
        elif self._lz4:
            packed = _lz4_frame(data)
        if not packed or sum(len(piece) for piece in packed) > len(data) * _WORTH:
            return _raw_frame(data)
        self.in_lz4 += self._lz4
        self.in_planes += len(packed) > 1 and not self._lz4
        return packed

    def _smaller(self, data: memoryview, zstd: zstandard.ZstdCompressor) -> list[Buffer]:
        """In planes, or as it is."""
        width = planes.probe(data) if self._planes is not None else 0
        if self._planes is None or not width:
            return [self._deflated(data, zstd)]
        lower, highest = self._planes.split(data, width)
        first, second = self._deflated(lower, zstd), self._few_matches.compress(highest)
        if len(first) < len(lower) * _REPEATS:
            whole = self._deflated(data, zstd)
            if len(whole) <= _MARK.size + len(first) + len(second):
                return [whole]
        return [_MARK.pack(_MARK_MAGIC, _MARK.size - 8, _PLANES, width, 0, len(first)), first, second]

    def _deflated(self, data: memoryview, zstd: zstandard.ZstdCompressor) -> bytes:
        """One zstd frame; of noise as the quick look leaves it, if that finds nothing."""
        if self._quick is not None and planes.noise(data):
            packed = self._quick.compress(data)
            if len(packed) > len(data) * _NOTHING:
                return packed
        return zstd.compress(data)


class Unpacker:
    """The way back. One per thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)
        self._planes: Planes | None = None

    def unpack(self, stored: memoryview, size: int) -> list[memoryview]:
        """The `size` bytes of one frame, in pieces (of a raw frame: pointing into `stored`), which are good until the next. Corrupt if it
        is anything else; memory is bounded by `size`, and a frame for planes, whatever is stored says."""
        if raw := _raw_pieces(stored, size):
            return raw
        if stored[: len(_LZ4_HEAD)] == _LZ4_HEAD:
            return [memoryview(_of_lz4(stored, size))]
        try:
            if _is_marked(stored):
                return [self._merged(stored, size)]
            self._insist(stored, size)
            return [memoryview(self._inflated(stored, size))]
        except zstandard.ZstdError as e:
            raise Corrupt(f"a frame does not decompress: {e}") from e

    def _merged(self, stored: memoryview, size: int) -> memoryview:
        _, _, _, width, _, length = mark = _MARK.unpack_from(stored)
        wanted = _MARK_MAGIC, _MARK.size - 8, _PLANES, width, 0, length
        if mark != wanted or width not in planes.WIDTHS or size % width or not 0 < size <= FRAME_BYTES:
            raise Corrupt("a frame is marked in a way that is not known")
        first, second = stored[_MARK.size : _MARK.size + length], stored[_MARK.size + length :]
        self._insist(first, size - size // width)
        self._insist(second, size // width)  # both before either is inflated
        lower, highest = self._inflated(first, size - size // width), self._inflated(second, size // width)
        self._planes = self._planes or Planes()
        return self._planes.merge(np.frombuffer(lower, np.uint8), np.frombuffer(highest, np.uint8))

    def _insist(self, stored: memoryview, size: int) -> None:
        if zstandard.frame_content_size(stored) != size:
            raise Corrupt(f"a frame does not hold the {size} bytes that the index names")

    def _inflated(self, stored: memoryview, size: int) -> bytes:
        return self._zstd.decompress(stored, max_output_size=size, allow_extra_data=False)


def _is_marked(stored: memoryview) -> bool:
    return len(stored) >= _MARK.size and int.from_bytes(stored[:4], "little") == _MARK_MAGIC


def _lz4_frame(data: memoryview) -> list[Buffer]:
    block = lz4.block.compress(data, store_size=False)
    return [_LZ4_HEAD + len(block).to_bytes(4, "little"), block, _LZ4_END]


def _of_lz4(stored: memoryview, size: int) -> bytes:
    """What is in a frame that is exactly as `_lz4_frame` writes it; else Corrupt."""
    at = len(_LZ4_HEAD) + 4
    block = stored[at : -len(_LZ4_END)]
    if (
        len(block).to_bytes(4, "little") != stored[at - 4 : at]
        or stored[-len(_LZ4_END) :] != _LZ4_END
        or not 0 < size <= FRAME_BYTES
    ):
        raise Corrupt("an LZ4 frame is not one block")
    try:
        content: bytes = lz4.block.decompress(block, uncompressed_size=size)
    except lz4.block.LZ4BlockError as e:
        raise Corrupt(f"a frame does not decompress: {e}") from e
    if len(content) != size:
        raise Corrupt(f"a frame does not hold the {size} bytes that the index names")
    return content


def _raw_frame(data: memoryview) -> list[Buffer]:
    pieces: list[Buffer] = [_RAW_HEADER.pack(_MAGIC, _RAW_DESCRIPTOR, len(data))]
    for at in range(0, len(data), _BLOCK):
        left = len(data) - at
        pieces += (_BLOCK_HEADER, data[at : at + _BLOCK]) if left > _BLOCK else (_block_header(left, last=True), data[at:])
    return pieces


def _block_header(size: int, *, last: bool) -> bytes:
    """Of a raw one: its type is 0."""
    return (size << 3 | last).to_bytes(3, "little")


_BLOCK_HEADER = _block_header(_BLOCK, last=False)


def _raw_pieces(stored: memoryview, size: int) -> list[memoryview]:
    """The blocks of a frame that is exactly as `_raw_frame` writes it; empty if it is not."""
    blocks = -(-size // _BLOCK)
    if len(stored) != _RAW_HEADER.size + size + 3 * blocks:
        return []
    if bytes(stored[: _RAW_HEADER.size]) != _RAW_HEADER.pack(_MAGIC, _RAW_DESCRIPTOR, size):
        return []
    pieces, at = [], _RAW_HEADER.size
    for n in range(blocks):
        length = min(_BLOCK, size - n * _BLOCK)
        if bytes(stored[at : at + 3]) != (_BLOCK_HEADER if n < blocks - 1 else _block_header(length, last=True)):
            return []
        pieces.append(stored[at + 3 : at + 3 + length])
        at += 3 + length
    return pieces


def deflate(data: bytes) -> bytes:
    """One zstd frame of a small object."""
    return zstandard.ZstdCompressor(level=3).compress(data)


def deflated_bound(size: int) -> int:
    """Bytes that `deflate` makes of so many at most: what does not shrink grows by some."""
    return size + (size >> 8) + 64  # zstd's own bound is less, ZSTD_COMPRESSBOUND


def inflate(data: Buffer, *, limit: int) -> bytes:
    """The content of one frame written by `deflate`; Corrupt if it is empty, larger than `limit` (or memory), or damaged."""
    try:
        size = zstandard.frame_content_size(data)
        if not 0 < size <= limit:
            raise Corrupt(f"an object says that it inflates to {size} bytes, 1 to {limit} are possible")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as e:
        raise Corrupt(f"an object does not decompress: {e}") from e


class Deflater(io.RawIOBase):
    """A file to write to; what is written leaves through `sink` compressed. `close` ends the zstd frame."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._zstd = zstandard.ZstdCompressor(level=3).compressobj()
        self._sink = sink

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if packed := self._zstd.compress(data):
            self._let_out(packed)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            try:
                self._let_out(self._zstd.flush())
            finally:
                super().close()

    def _let_out(self, packed: bytes) -> None:
        sink, self._sink = self._sink, _nowhere  # whoever closes this after a failure must not write again, and hide it
        sink(packed)
        self._sink = sink


def _nowhere(_: bytes) -> None:
    return


def inflating(source: IO[bytes]) -> BinaryIO:
    """`source` inflated as it is read; whoever reads bounds the total. Damage is a `DamagedError` of the reader."""
    return cast(BinaryIO, zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(source, read_across_frames=False))


DamagedError = zstandard.ZstdError
