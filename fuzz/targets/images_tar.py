"""`images.tar.zst`: Corrupt, or plain files of plain names in their directory, no more bytes than were allowed."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import zstandard

from fuzz.feed import Feed
from fuzz.guard import guarded, require
from fuzz.targets import golden
from hibernode.errors import Corrupt
from hibernode.transfer import codec, files

MAX_LENGTH = 16384
_PACKED, _TAR, _SEALED, _BUILT = 0, 1, 2, 3
_LIMIT = 1 << 20  # bytes unpacked
_BLOCK = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAMES = (
    b"core-1.img", b"pstree.img", b"../out", b"/tmp/out", b"a/b", b".", b"..", b"", b".hidden", b"a\0b", b"x" * 100, b"n\xff.img", b"a\nb",
    b"core-1.img/", b"./core-1.img",
)  # fmt: skip
_TYPES = b"0\0" + b"1234567LKSxgNVDXA"
_SIZES = (
    b"00000000000\0", b"00000001000\0", b"00000000001\0", b"77777777777\0", b"-0000001000\0", b"\x80" + bytes(10) + b"\x05",
    b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"          1\0", b"garbage    \0", b"00004000000\0",
)  # fmt: skip
_EXTENDED = (
    b"30 mtime=1764000000.123456789\n", b"20 path=../../escape\n", b"30 size=99999999999999999999\n", b"22 linkpath=/etc/passwd\n", b"",
)  # fmt: skip


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(4)
    packed = feed.rest() if how == _PACKED else _zstd({_TAR: Feed.rest, _SEALED: _sealed, _BUILT: _built}[how](feed))
    with guarded(Corrupt) as place:
        source, directory = place / "packed", place / "images"
        source.write_bytes(packed)
        directory.mkdir()
        (place / "outside").write_bytes(b"")
        try:
            files.unpack(source, directory, limit=_LIMIT)
        finally:
            _check(place, directory)


def _check(place: Path, directory: Path) -> None:
    found = list(directory.iterdir())
    require({path.name for path in place.iterdir()} == {"packed", "images", "outside"}, "something beside the directory")
    require(all(path.is_file() and not path.is_symlink() for path in found), "something that is no plain file")
    require(all(_NAME.fullmatch(path.name) for path in found), "a name that is not plain")
    require(sum(path.stat().st_size for path in found) <= _LIMIT, "more bytes than were allowed")


def _zstd(tar: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(tar)


def _sealed(feed: Feed) -> bytes:
    """Blocks as they come; where the reader will look for a header the checksum is made right."""
    blocks = bytearray(feed.rest())
    blocks += bytes(-len(blocks) % _BLOCK) + bytes(2 * _BLOCK)
    at = 0
    while at + _BLOCK <= len(blocks):
        header = blocks[at : at + _BLOCK]
        if any(header):
            blocks[at : at + _BLOCK] = header = _checked(header)
        try:
            size = max(0, tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape").size)
        except tarfile.TarError:
            size = 0
        at += _BLOCK + size + -size % _BLOCK
    return bytes(blocks)


def _checked(header: bytearray) -> bytearray:
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def _built(feed: Feed) -> bytes:
    tar = bytearray()
    for _ in range(feed.below(8)):
        name = feed.pick(_NAMES) if feed.byte() % 4 else b"f%d" % feed.below(4)
        size = feed.pick(_SIZES) if feed.byte() % 2 else b"%011o\0" % feed.below(3000)
        kind = bytes([feed.pick(_TYPES)]) if feed.byte() % 2 else b"0"
        header = bytearray(_BLOCK)
        header[:100], header[124:136], header[156:157] = name[:100].ljust(100, b"\0"), size, kind
        header[157:257] = feed.pick((b"", b"/etc/passwd", b"../outside")).ljust(100, b"\0")
        header[257:265] = feed.pick((b"ustar\x0000", b"ustar  \0", bytes(8)))
        header[345:500] = (b"../prefix" if feed.byte() > 230 else b"").ljust(155, b"\0")
        tar += _checked(header)
        body = feed.pick(_EXTENDED) if kind in b"xgLK" else b"\x5a" * min(4096, int(size[:11], 8) if size[:11].isdigit() else 0)
        tar += body + bytes(-len(body) % _BLOCK)
    end = feed.pick((2 * _BLOCK, _BLOCK, 0, 10240, 20480, 20481, 1 << 22))
    return bytes(tar) + bytes(end) + feed.take(4)


def seeds() -> dict[str, bytes]:
    packed = golden.small_images()
    with codec.inflating(_Once(packed)) as inflated:  # type: ignore[arg-type]
        tar = inflated.read(1 << 20)
    return {
        "packed": bytes([_PACKED]) + packed,
        "tar": bytes([_TAR]) + tar[: MAX_LENGTH - 1],
        "sealed": bytes([_SEALED]) + tar[: 8 * _BLOCK],
        "built": bytes([_BUILT, 2, 1, 0, 0, 3, 0, 0, 0, 0, 1, 1, 0, 0, 5, 0, 0, 0, 0, 0]),
        "built-all": bytes([_BUILT, 7]) + bytes(range(90)),
    }


class _Once:
    """The least that a stream reader reads from."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int) -> bytes:
        taken, self._data = self._data[:size], self._data[size:]
        return taken
