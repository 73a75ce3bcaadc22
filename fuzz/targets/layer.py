"""The tar of a writable layer: Corrupt, or entries that their writer would write again to the byte; then all of it into a directory, and
nothing beside that directory changes. The second runs outside of the guard: it works by descriptors of directories, whose names the guard
would take for names in the current one. What it may not touch lies beside the directory, and links lead there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fuzz.feed import Feed
from fuzz.guard import guarded, require, root
from hibernode.errors import Corrupt, NoRoom, Refused, RestoreFailed
from hibernode.model import PAGE, LayerRef
from hibernode.transfer import tar
from hibernode.transfer.apply import apply
from hibernode.transfer.tar import Entry, Kind

MAX_LENGTH = 16384
_RAW, _SEALED, _BUILT = 0, 1, 2
_NAMES = (b"a", b"b", b"out", b"file", b"..", b".", b"", b"c\xff", b"/", b"outside", b"x" * 255, b"x" * 256)
_TARGETS = (b"../outside", b"/", b"a", b"a/b", b"out/file", b"../outside/file", b"", b".", b"file")
_SIZES = (0, 1, 512, 5000, 1 << 40, (1 << 63) - 1, 1 << 63)
_XATTRS = (
    b"user.a",
    b"user.=%",
    b"trusted.overlay.opaque",
    b"trusted.overlay.overlay.x",
    b"system.posix_acl_access",
    b"security.capability",
)


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(3)
    raw = {_RAW: Feed.rest, _SEALED: _sealed, _BUILT: _built}[how](feed)
    with guarded(Corrupt):
        _decode(raw)
    _apply(raw, raw.count(b"ustar\x00") // 2 + feed.below(2))


def _decode(raw: bytes) -> None:
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        if size > len(raw) - at:
            raise Corrupt("cut off")
        at += size
        return raw[at - size : at]

    while True:
        began = at
        if (entry := tar.decode(take)) is None:
            return
        require(tar.encode(entry) == raw[began:at], "an entry that is written in another way")
        require(not any(part in (b"", b".", b"..") for part in entry.parts), "a path that is not plain")
        size = sum(length for _, length in entry.data)
        take(size + len(tar.padding(size)))


def _apply(raw: bytes, entries: int) -> None:
    place = root() / "layer"
    shutil.rmtree(place, ignore_errors=True)
    (place / "root/a").mkdir(parents=True)
    (place / "outside").mkdir()
    (place / "outside/file").write_bytes(b"mine")
    (place / "root/out").symlink_to("../outside")
    before = _state(place)
    ref = LayerRef.model_validate(
        {
            "name": "n", "pages": -(-len(raw) // PAGE), "zero_pages": 0, "streams": [], "bytes": len(raw), "entries": max(1, entries),
            "index": {"key": "n/layer-index.zst", "size": 0, "digest": "0" * 64},
        }
    )  # fmt: skip
    try:
        apply(iter([memoryview(raw)]), place / "root", ref)
    except (Corrupt, Refused, NoRoom, RestoreFailed):
        pass
    finally:
        require(_state(place) == before, "something beside the root")


def _state(place: Path) -> list[object]:
    facts = (place / "outside").lstat(), (place / "outside/file").lstat()
    kept = [(each.st_mode, each.st_uid, each.st_gid, each.st_nlink, each.st_mtime_ns) for each in facts]
    return [sorted(os.listdir(place)), os.listdir(place / "outside"), (place / "outside/file").read_bytes(), kept]


def _sealed(feed: Feed) -> bytes:
    """Blocks as they come, with checksums that are right where a header may be."""
    blocks = bytearray(feed.rest())
    blocks += bytes(-len(blocks) % tar.BLOCK) + tar.END
    for at in range(0, len(blocks) - len(tar.END), tar.BLOCK):
        header = blocks[at : at + tar.BLOCK]
        if header[257:262] == b"ustar":
            header[148:156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(blocks)


def _built(feed: Feed) -> bytes:
    out = tar.encode(Entry(b"", Kind.DIRECTORY, 0o755)) if feed.byte() % 8 else b""
    for _ in range(feed.below(8)):
        entry = _entry(feed)
        size = min(sum(length for _, length in entry.data), 8192) if entry.kind is Kind.FILE else 0
        out += tar.encode(entry) + b"\x5a" * size + tar.padding(size)
    return out + (tar.END if feed.byte() % 8 else b"")


def _entry(feed: Feed) -> Entry:
    kind = feed.pick(tuple(Kind))
    entry = Entry(b"/".join(feed.pick(_NAMES) for _ in range(1 + feed.below(3))), kind)
    if kind not in (Kind.WHITEOUT, Kind.LINK) or not feed.byte() % 8:
        entry.mode, entry.mtime = feed.number() % 0o10100, feed.number() % (1 << 62)
    if kind in (Kind.LINK, Kind.SYMLINK) or not feed.byte() % 16:
        entry.target = feed.pick(_TARGETS)
    if kind is Kind.FILE:
        entry.size = feed.pick(_SIZES) if feed.byte() % 2 else feed.below(6000)
        if entry.size and not feed.byte() % 3:
            entry.extents = [(feed.below(9000), feed.below(3000)) for _ in range(feed.below(4))]
    entry.opaque = not feed.byte() % 8
    entry.device = (feed.below(12), feed.below(12)) if kind is Kind.DEVICE else (0, 0)
    if not feed.byte() % 4:
        entry.xattrs = {feed.pick(_XATTRS): feed.take(feed.below(40))}
    return entry


def seeds() -> dict[str, bytes]:
    good = [
        Entry(b"", Kind.DIRECTORY, 0o755),
        Entry(b"a", Kind.DIRECTORY, 0o700, mtime=5, opaque=True),
        Entry(b"a/f", Kind.FILE, 0o4755, 1000, 1 << 31, -1, 5, xattrs={b"user.a=": b"\n"}),
        Entry(b"a/s", Kind.FILE, 0o644, size=9000, extents=[(4096, 4)]),
        Entry(b"b", Kind.LINK, target=b"a/f"),
        Entry(b"l", Kind.SYMLINK, 0o777, target=b"../outside"),
        Entry(b"out", Kind.WHITEOUT),
        Entry(b"p", Kind.FIFO, 0o600),
    ]
    whole = b""
    for entry in good:
        size = sum(length for _, length in entry.data) if entry.kind is Kind.FILE else 0
        whole += tar.encode(entry) + b"x" * size + tar.padding(size)
    return {
        "raw": bytes([_RAW]) + whole + tar.END,
        "sealed": bytes([_SEALED]) + whole,
        "built": bytes([_BUILT, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 2, 0, 0, 0]),
        "built-all": bytes([_BUILT, 1, 7]) + bytes(range(120)),
    }
