"""The tar of a writable layer, pure: an entry to bytes and back. `docs/image-format.md` says it in words.

pax, so that GNU tar reads it: each entry has an extended header with its path and time, its attributes and what else a plain header has no
room for. It is written in one way only, and nothing is read that is written in another: what was understood is encoded again and compared.
Everything that is read may be hostile: lengths are compared with limits before anything is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from hibernode.errors import Corrupt

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_DEPTH = 256  # directories within each other: whoever walks them holds a descriptor for each
MAX_EXTENTS = 1 << 16  # pieces of data between the holes of one file
MAX_EXTENDED = 1 << 20  # bytes of an extended header: the attributes of one entry
DEVICES = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)})  # null, zero, full, random, urandom, tty, ptmx
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_HOSTS_OWN = (b"security.selinux", b"security.evm")  # made by the policy and the key of one machine
_OVERLAY, _ESCAPED = b"trusted.overlay.", b"trusted.overlay.overlay."
_OPAQUE = b"SCHILY.xattr.trusted.overlay.opaque"
_XATTR = b"SCHILY.xattr."
_PATH, _LINK, _UID, _GID, _SIZE, _TIME, _TYPE = b"path", b"linkpath", b"uid", b"gid", b"size", b"mtime", b"HIBERNODE.type"
_MAJOR, _MINOR, _SPARSE_NAME, _SPARSE_SIZE = (
    b"GNU.sparse.major",
    b"GNU.sparse.minor",
    b"GNU.sparse.name",
    b"GNU.sparse.realsize",
)
_SECONDS = re.compile(rb"(-?)([0-9]{1,12})\.([0-9]{9})")
LATEST = 10**21 - 1  # nanoseconds, before 1970 or after: no other is read; some file systems keep later ones (btrfs, tmpfs)
_OCTAL = re.compile(rb"[0-7]+\0")
_NUMBER = re.compile(rb"[0-9]{1,20}")
_SMALL_ID, _SMALL_SIZE = 0o7777777, 0o77777777777  # the largest that a plain header holds
_MAX_ID, _MAX_SIZE, _MAX_NAME, _MAX_TEXT, _MAX_VALUE = (1 << 32) - 2, (1 << 63) - 1, 255, 4095, 64 << 10  # the kernel's


class Kind(Enum):
    FILE = "file"
    LINK = "hard link"
    SYMLINK = "symlink"
    DEVICE = "device"  # of characters; no other is in a layer
    DIRECTORY = "directory"
    FIFO = "fifo"
    SOCKET = "socket"  # to other readers an empty file: no tar knows sockets
    WHITEOUT = "whiteout"  # something of this name, of the layers below, was deleted: a device 0:0, as in the layer itself


_FLAGS = {
    Kind.FILE: b"0",
    Kind.LINK: b"1",
    Kind.SYMLINK: b"2",
    Kind.DEVICE: b"3",
    Kind.DIRECTORY: b"5",
    Kind.FIFO: b"6",
    Kind.SOCKET: b"0",
    Kind.WHITEOUT: b"3",
}
_KINDS = {b"0": Kind.FILE, b"1": Kind.LINK, b"2": Kind.SYMLINK, b"3": Kind.DEVICE, b"5": Kind.DIRECTORY, b"6": Kind.FIFO}
_PLAIN = (Kind.LINK, Kind.WHITEOUT)  # have a path and nothing of their own


@dataclass(slots=True)
class Entry:
    """One name of a layer. `path` is relative and plain; the root's is empty."""

    path: bytes
    kind: Kind
    mode: int = 0  # permissions, set-user-ID, set-group-ID, sticky
    uid: int = 0
    gid: int = 0
    mtime: int = 0  # nanoseconds since the epoch
    size: int = 0  # bytes of a file, holes included
    target: bytes = b""  # of a symlink its text, of a hard link the path of an entry before
    device: tuple[int, int] = (0, 0)  # major, minor
    opaque: bool = False  # a directory of which nothing that lies below is seen
    xattrs: dict[bytes, bytes] = field(default_factory=dict)  # as they are in the layer
    extents: list[tuple[int, int]] | None = None  # of a file with holes, where there is data: offset, length. None: everywhere

    @property
    def parts(self) -> tuple[bytes, ...]:
        """Entries come in this order."""
        return tuple(self.path.split(b"/")) if self.path else ()

    @property
    def data(self) -> list[tuple[int, int]]:
        """Offset and length of what follows the header, in order."""
        return [(0, self.size)] if self.extents is None else self.extents

    @property
    def shown(self) -> str:
        """Its path for people."""
        return self.path.decode(errors="replace") or "/"


def kept(xattr: bytes) -> bool:
    """Whether this attribute of something in a layer is the layer's: not overlayfs's own, nor the file system's, nor this machine's.
    What is escaped is an attribute of overlayfs's name that somebody has set inside."""
    if xattr.startswith(_OVERLAY):
        return xattr.startswith(_ESCAPED)
    return xattr in _ACLS or (xattr.startswith((b"user.", b"trusted.", b"security.")) and xattr not in _HOSTS_OWN)


def merged_name(xattr: bytes) -> bytes:
    """What an attribute of the layer is called on the mount."""
    return _OVERLAY + xattr.removeprefix(_ESCAPED) if xattr.startswith(_ESCAPED) else xattr


def layer_name(xattr: bytes) -> bytes:
    """The way back."""
    return _ESCAPED + xattr.removeprefix(_OVERLAY) if xattr.startswith(_OVERLAY) else xattr


# --- out --------------------------------------------------------------------------------------------------------------------


def encode(entry: Entry) -> bytes:
    """All that is written of an entry before its data, a file's map of holes included. ValueError if its attributes are too long."""
    sparse = b"" if entry.extents is None else _map(entry)
    stored = len(sparse) + sum(length for _, length in entry.data) if entry.kind is Kind.FILE else 0
    body = b"".join(_record(key, value) for key, value in _records(entry, stored, sparse=bool(sparse)))
    if len(body) > MAX_EXTENDED:
        raise ValueError(f"the attributes of {entry.shown} have {len(body)} bytes, at most {MAX_EXTENDED} can be stored")
    extended = _header(b"././@PaxHeader", b"x", size=len(body), mode=0o600)
    name = b"GNUSparseFile.0/" + entry.path.rpartition(b"/")[2] if sparse else entry.path or b"."
    mtime = entry.mtime // 1_000_000_000
    plain = _header(
        name,
        _FLAGS[entry.kind],
        size=stored if stored <= _SMALL_SIZE else 0,
        mode=entry.mode,
        uid=entry.uid if entry.uid <= _SMALL_ID else 0,
        gid=entry.gid if entry.gid <= _SMALL_ID else 0,
        mtime=mtime if 0 <= mtime <= _SMALL_SIZE else 0,
        target=entry.target,
        device=entry.device,
    )
    return b"".join((extended, body, padding(len(body)), plain, sparse))


def padding(size: int) -> bytes:
    """What follows `size` bytes up to the next block."""
    return bytes(-size % BLOCK)


def _records(entry: Entry, stored: int, *, sparse: bool) -> Iterator[tuple[bytes, bytes]]:
    if sparse:
        yield from ((_MAJOR, b"1"), (_MINOR, b"0"), (_SPARSE_NAME, entry.path), (_SPARSE_SIZE, b"%d" % entry.size))
    else:
        yield _PATH, entry.path or b"."
    if entry.target:
        yield _LINK, entry.target
    if stored > _SMALL_SIZE:
        yield _SIZE, b"%d" % stored
    if entry.uid > _SMALL_ID:
        yield _UID, b"%d" % entry.uid
    if entry.gid > _SMALL_ID:
        yield _GID, b"%d" % entry.gid
    if entry.kind is Kind.SOCKET:
        yield _TYPE, b"socket"
    if entry.kind not in _PLAIN:
        seconds, rest = divmod(abs(entry.mtime), 1_000_000_000)
        yield _TIME, b"%s%d.%09d" % (b"-" if entry.mtime < 0 else b"", seconds, rest)
    if entry.opaque:
        yield _OPAQUE, b"y"
    for name in sorted(entry.xattrs):
        yield _XATTR + name.replace(b"%", b"%25").replace(b"=", b"%3D"), entry.xattrs[name]  # as GNU tar writes them


def _record(key: bytes, value: bytes) -> bytes:
    """Its length, which counts its own digits, then the rest."""
    size = len(key) + len(value) + 3
    length = size + len(str(size))
    if len(str(length)) != len(str(size)):
        length = size + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _header(
    name: bytes,
    flag: bytes,
    *,
    size: int,
    mode: int,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    target: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    """A plain header. The names are for people and old programs: the extended header has them in full."""
    head = name[:100].ljust(100, b"\0") + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, gid, size, mtime)
    tail = flag + target[:100].ljust(100, b"\0") + b"ustar\x0000" + bytes(64) + b"%07o\0%07o\0" % device + bytes(167)
    return b"%s%06o\0 %s" % (head, sum(head) + 8 * ord(" ") + sum(tail), tail)


def _map(entry: Entry) -> bytes:
    """Where a file has data, as GNU tar writes it: a file that ends with a hole has a piece of no bytes there."""
    pieces = list(entry.extents or ())
    if not pieces or sum(pieces[-1]) < entry.size:
        pieces.append((entry.size, 0))
    text = b"%d\n" % len(pieces) + b"".join(b"%d\n%d\n" % piece for piece in pieces)
    return text + padding(len(text))


# --- in ---------------------------------------------------------------------------------------------------------------------


def decode(take: Callable[[int], bytes]) -> Entry | None:
    """The next entry; None at the tar's end. `take` gives so many of the next bytes, or raises. Corrupt for anything that `encode` would
    not write; what an entry says is possible in itself, and its path is plain."""
    extended = take(BLOCK)
    if not any(extended):
        if any(take(len(END) - BLOCK)):
            raise Corrupt("layer: its end is not how a tar ends")
        return None
    size = _octal(extended[124:136])
    if extended[156:157] != b"x" or size > MAX_EXTENDED:
        raise Corrupt("layer: an entry does not begin with its extended header")
    body = take(size + len(padding(size)))
    plain = take(BLOCK)
    records = _parse(body[:size])
    sparse = _take_map(take) if _MAJOR in records else b""
    try:
        entry = _entry(records, plain, sparse)
        again = encode(entry)
    except (ValueError, KeyError) as e:
        raise Corrupt(f"layer: an entry that cannot be: {e}") from e
    if again != b"".join((extended, body, plain, sparse)):
        raise Corrupt(f"layer: {entry.shown[:200]!r} is not as it would be written")
    return entry


def _octal(digits: bytes) -> int:
    if not _OCTAL.fullmatch(digits):
        raise Corrupt("layer: a header without a number where one belongs")
    return int(digits[:-1], 8)


def _parse(body: bytes) -> dict[bytes, bytes]:
    records, at = {}, 0
    while at < len(body):
        digits = body[at : at + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, found, value = body[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not found or not len(digits) + 1 < length <= len(body) - at:
            raise Corrupt("layer: an extended header that is none")
        records[key] = value
        at += length
    return records


def _take_map(take: Callable[[int], bytes]) -> bytes:
    blocks = [take(BLOCK)]
    count = blocks[0].partition(b"\n")[0]
    if not _NUMBER.fullmatch(count) or not 1 <= int(count) <= MAX_EXTENTS + 1:
        raise Corrupt("layer: a map of holes that is none")
    missing = 1 + 2 * int(count) - blocks[0].count(b"\n")
    while missing > 0:
        blocks.append(take(BLOCK))
        lines = blocks[-1].count(b"\n")
        if not lines:
            raise Corrupt("layer: a map of holes that does not go on")
        missing -= lines
    return b"".join(blocks)


def _entry(records: dict[bytes, bytes], plain: bytes, sparse: bytes) -> Entry:
    """What they say, if it can be; ValueError or KeyError if not."""
    kind = _KINDS[plain[156:157]]
    device = _octal(plain[329:337]), _octal(plain[337:345])
    if kind is Kind.DEVICE and device == (0, 0):
        kind = Kind.WHITEOUT
    if records.get(_TYPE) == b"socket":
        kind = Kind.SOCKET
    stored = _number(records.get(_SIZE), _MAX_SIZE, _octal(plain[124:136]))
    extents, size = None, stored
    if sparse:
        size = _number(records[_SPARSE_SIZE], _MAX_SIZE)
        extents = _extents(sparse, size)
        if stored != len(sparse) + sum(length for _, length in extents):
            raise ValueError("a file that is not as long as its pieces")
    path = records[_SPARSE_NAME if sparse else _PATH]
    entry = Entry(
        path=b"" if path == b"." else _checked_path(path),
        kind=kind,
        mode=_octal(plain[100:108]),
        uid=_number(records.get(_UID), _MAX_ID, _octal(plain[108:116])),
        gid=_number(records.get(_GID), _MAX_ID, _octal(plain[116:124])),
        mtime=0 if kind in _PLAIN else _nanoseconds(records[_TIME]),
        size=size if kind is Kind.FILE else 0,
        target=records.get(_LINK, b""),
        device=device,
        opaque=_OPAQUE in records,
        xattrs=dict(_xattrs(records)),
        extents=extents,
    )
    _check(entry)
    return entry


def _check(entry: Entry) -> None:
    """ValueError where a kind has what it cannot have."""
    kind, target = entry.kind, entry.target
    if entry.mode > 0o7777 or (entry.opaque and (kind is not Kind.DIRECTORY or not entry.path)):
        raise ValueError("a mode, or a mark, that cannot be")
    if not entry.path and kind is not Kind.DIRECTORY:
        raise ValueError("a root that is no directory")
    if kind in _PLAIN and (entry.mode or entry.uid or entry.gid or entry.xattrs):
        raise ValueError(f"a {kind.value} with attributes")
    if kind is not Kind.FILE and entry.extents is not None:
        raise ValueError(f"a {kind.value} with holes")
    if entry.device != (0, 0) and kind is not Kind.DEVICE:
        raise ValueError(f"a {kind.value} with numbers of a device")
    if kind is Kind.LINK:
        _checked_path(target)
    elif kind is Kind.SYMLINK:
        if not target or b"\0" in target or len(target) > _MAX_TEXT:
            raise ValueError("a symlink to nowhere")
    elif target:
        raise ValueError(f"a {kind.value} with a target")


def _checked_path(path: bytes) -> bytes:
    parts = path.split(b"/")
    if len(parts) > MAX_DEPTH or b"\0" in path or any(part in (b"", b".", b"..") or len(part) > _MAX_NAME for part in parts):
        raise ValueError("a path that is not plain")
    return path


def _number(text: bytes | None, limit: int, otherwise: int = 0) -> int:
    if text is not None and not _NUMBER.fullmatch(text):
        raise ValueError("something that is no number")
    value = otherwise if text is None else int(text)
    if value > limit:
        raise ValueError("a number that is too large")
    return value


def _nanoseconds(text: bytes) -> int:
    if (found := _SECONDS.fullmatch(text)) is None:
        raise ValueError("a time that is none")
    value = int(found[2]) * 1_000_000_000 + int(found[3])
    return -value if found[1] else value


def _xattrs(records: dict[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    for key, value in records.items():
        if key.startswith(_XATTR) and key != _OPAQUE:
            name = key.removeprefix(_XATTR).replace(b"%3D", b"=").replace(b"%25", b"%")
            if not kept(name) or len(name) > _MAX_NAME or b"\0" in name or len(value) > _MAX_VALUE:
                raise ValueError("an attribute that no layer has")
            yield name, value


def _extents(sparse: bytes, size: int) -> list[tuple[int, int]]:
    """Pieces that ascend, do not touch, and lie within the file; without the empty one at its end."""
    numbers = [_number(line, _MAX_SIZE) for line in sparse.rstrip(b"\0").split(b"\n")[1:-1]]
    pieces = list(zip(numbers[::2], numbers[1::2], strict=True))
    if pieces and pieces[-1] == (size, 0):
        pieces.pop()
    end = -1
    for offset, length in pieces:
        if offset <= end or length < 1 or offset + length > size:
            raise ValueError("a map of holes that cannot be")
        end = offset + length
    if pieces == [(0, size)] or not size:
        raise ValueError("a map of holes without a hole")
    return pieces
