"""zstd, and the only file that knows it. A frame is compressed, or stored as a zstd frame of raw blocks: any zstd reads both.

Level 1 unless a command says otherwise: on the two-core machine of criu.md it keeps up with a store, higher levels do not.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, cast

import zstandard

from hibernode.errors import Corrupt, Refused
from hibernode.model import FRAME_PAGES, PAGE

DEFAULT_LEVEL = 1
FRAME_BYTES = FRAME_PAGES * PAGE
_LEVEL = re.compile(r"zstd:(-?[0-9]{1,2})")
_WORTH = 0.97  # a frame that shrinks less is stored raw: it is then read back at the speed of a copy
_MAGIC = 0xFD2FB528
_RAW_HEADER = struct.Struct("<IBI")  # magic, descriptor: single segment + 4-byte content size, content size
_RAW_DESCRIPTOR = 0xA0
_BLOCK = 128 << 10  # the largest block the zstd format allows

PACKED_BYTES = FRAME_BYTES + _RAW_HEADER.size + 3 * -(-FRAME_BYTES // _BLOCK)  # of the longest frame that is ever written

Buffer = bytes | memoryview


def parse_compression(text: str) -> int | None:
    """`zstd`, `zstd:<level>` -> level; `none` -> None. Anything else is Refused("compression")."""
    if text == "none":
        return None
    if text == "zstd":
        return DEFAULT_LEVEL
    if (found := _LEVEL.fullmatch(text)) and -7 <= int(found[1]) <= 19:
        return int(found[1])
    raise Refused(
        "compression",
        f"compression {text!r} is not known",
        prop="compression",
        found=text,
        wanted="zstd, zstd:<-7 to 19>, none",
        hint="leave it out for zstd at level 1",
    )


class Packer:
    """Turns the pages of one frame into its stored form. One per thread: the zstd context is reused."""

    def __init__(self, level: int | None) -> None:
        self._zstd = zstandard.ZstdCompressor(level=level, write_checksum=False) if level is not None else None

    def pack(self, data: memoryview) -> list[Buffer]:
        """The frame's bytes, in pieces; those of a raw frame point into `data`."""
        if self._zstd is not None:
            packed = self._zstd.compress(data)
            if len(packed) <= len(data) * _WORTH:
                return [packed]
        return list(_raw_frame(data))


class Unpacker:
    """The way back. One per thread."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=FRAME_BYTES)

    def unpack(self, stored: memoryview, size: int) -> list[memoryview]:
        """The `size` bytes of one frame, in pieces (of a raw frame: pointing into `stored`). Corrupt if it is anything else;
        memory is bounded by `size`, whatever the frame says."""
        if raw := _raw_pieces(stored, size):
            return raw
        try:
            if zstandard.frame_content_size(stored) != size:
                raise Corrupt(f"a frame does not hold the {size} bytes that the index names")
            return [memoryview(self._zstd.decompress(stored, max_output_size=size, allow_extra_data=False))]
        except zstandard.ZstdError as e:
            raise Corrupt(f"a frame does not decompress: {e}") from e


def _raw_frame(data: memoryview) -> Iterator[Buffer]:
    yield _RAW_HEADER.pack(_MAGIC, _RAW_DESCRIPTOR, len(data))
    for at in range(0, len(data), _BLOCK):
        size = min(_BLOCK, len(data) - at)
        yield (size << 3 | (at + size == len(data))).to_bytes(3, "little")  # block header: size, type raw (0), last block
        yield data[at : at + size]


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
        if bytes(stored[at : at + 3]) != (length << 3 | (n == blocks - 1)).to_bytes(3, "little"):
            return []
        pieces.append(stored[at + 3 : at + 3 + length])
        at += 3 + length
    return pieces


def deflate(data: bytes) -> bytes:
    """One zstd frame of a small object."""
    return zstandard.ZstdCompressor(level=3).compress(data)


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
