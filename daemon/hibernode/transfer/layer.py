"""The writable layer of a container -> its tar in chunks of the arena. Twin: `apply.py`.

The layer is the upper directory of an overlay mount, and is read as it lies there. Its container stands still meanwhile, and may be an
enemy: it is walked by descriptors of directories, and no symlink is followed. File content goes from the page cache straight into the
arena. Memory beside it: the names in one directory and those above it, and a path for each file that has several.

What overlayfs keeps in it: a whiteout (a device 0:0, or an empty file with an attribute, which only tools make) hides what lies below; an
opaque directory hides all of what lies below it. With `redirect_dir` or `metacopy`, which are off unless somebody asks for them, a name or
a content lies in another layer; that cannot be read from here, and is refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hibernode.errors import DumpFailed, Refused
from hibernode.flow import Channel, Stopped, Threads
from hibernode.model import MAX_ENTRIES, PAGE, Cancel
from hibernode.transfer import tar
from hibernode.transfer.arena import Chunk
from hibernode.transfer.filling import Filling, Held
from hibernode.transfer.tar import Entry, Kind

_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
_ELSEWHERE = (b"trusted.overlay.redirect", b"trusted.overlay.metacopy")
_OPAQUE, _WHITEOUT = b"trusted.overlay.opaque", b"trusted.overlay.whiteout"
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)  # or something else is in its place
_OWN_KINDS = {stat.S_IFIFO: Kind.FIFO, stat.S_IFSOCK: Kind.SOCKET, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFREG: Kind.FILE}


def check_mount(options: Iterable[str]) -> None:
    """Refused if an overlay mount with these options may have a layer that cannot be read from its upper directory."""
    given = set(options)
    for code, option in (
        ("overlay_redirect", "redirect_dir=on"),
        ("overlay_redirect", "metacopy=on"),
        ("overlay_userxattr", "userxattr"),
    ):
        if option in given:
            raise Refused(
                code, f"the container's overlay is mounted with {option}", prop="overlay", found=option, wanted="without",
                hint="have the container runtime mount it without",
            )  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """What a layer is, about: its container may be running."""

    entries: int
    bytes: int  # of the tar


def survey(upper: Path, cancel: Cancel) -> Survey:
    """Look at a layer before anybody is frozen for it. Refused for what could not be captured; what goes away meanwhile does not count."""
    entries, size = 0, len(tar.END)
    for entry, _ in _Walk(upper, moving=True):
        cancel.check()
        entries += 1
        size += tar.BLOCK * 4 + entry.size
    return Survey(entries, size)


class LayerCollector:
    """One layer's worth of pages. `run` while the container stands still; `pages`, `bytes` and `entries` are complete once it has returned.
    What it has filled waits in `held` until that is released: the pause does not depend on the store while its part has room."""

    def __init__(self, upper: Path, out: Channel[Chunk], threads: Threads, held: Held) -> None:
        self._upper, self._threads = upper, threads
        self._filling = Filling(out, threads, held)
        self.bytes = 0  # of the tar
        self.entries = 0

    @property
    def pages(self) -> int:
        return self._filling.pages

    def run(self) -> None:
        """Read the layer to its end. DumpFailed if it changes meanwhile or cannot be read, Refused for what cannot be captured."""
        try:
            for entry, descriptor in _Walk(self._upper):
                if self._threads.stopping:
                    raise Stopped
                self._put(_encoded(entry))
                if descriptor is not None:
                    self._copy(descriptor, entry)
                self.entries += 1
            self._put(tar.END)
            self._filling.flush()
        finally:
            self._filling.abandon()

    def _put(self, data: bytes) -> None:
        self.bytes += len(data)
        view = memoryview(data)
        while view:
            room = self._filling.room()
            size = min(len(room), len(view))
            room[:size] = view[:size]
            self._filling.advance(size)
            view = view[size:]

    def _copy(self, descriptor: int, entry: Entry) -> None:
        total = 0
        for offset, length in entry.data:
            at, end, total = offset, offset + length, total + length
            while at < end:
                room = self._filling.room()[: end - at]
                try:
                    size = os.preadv(descriptor, [room], at)
                except OSError as e:
                    raise _failed(entry.path, e) from e
                if not size:
                    raise DumpFailed(f"{entry.shown} of the writable layer became shorter while it was read")
                self._filling.advance(size)
                at += size
        self.bytes += total
        self._put(tar.padding(total))


def _encoded(entry: Entry) -> bytes:
    try:
        return tar.encode(entry)
    except ValueError as e:
        raise Refused("layer_attributes", str(e), **_found(entry.path, f"at most {tar.MAX_EXTENDED} bytes")) from e


@dataclass(eq=False)
class _Level:
    """A directory that is being walked."""

    descriptor: int
    path: bytes
    hidden: bool  # nothing that lies below is seen here: marks that say so once more say nothing
    marked: bool  # whiteouts in it may be files
    names: list[bytes] = field(default_factory=list)  # to come, the next one last


class _Walk:
    """Every entry of a layer, parents first, names in the order of their bytes; with it, for a file with content, its descriptor, which is
    good until the next entry. `moving`: files are not opened, and what goes away is left out."""

    def __init__(self, upper: Path, *, moving: bool = False) -> None:
        self._upper, self._moving = upper, moving
        self._levels: list[_Level] = []
        self._seen: dict[tuple[int, int], bytes] = {}  # of files with several names, the first
        self._entries = self._device = 0

    def __iter__(self) -> Iterator[tuple[Entry, int | None]]:
        try:
            top = self._enter(b"", os.open(self._upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self._device = os.fstat(self._levels[-1].descriptor).st_dev
            yield top, None
            while self._levels:
                level = self._levels[-1]
                if level.names:
                    yield from self._next(level, level.names.pop())
                else:
                    os.close(self._levels.pop().descriptor)
        except OSError as e:
            raise _failed(self._levels[-1].path if self._levels else b"", e) from e
        finally:
            for level in self._levels:
                os.close(level.descriptor)
            self._levels.clear()

    def _next(self, level: _Level, name: bytes) -> Iterator[tuple[Entry, int | None]]:
        path = level.path + b"/" + name if level.path else name
        try:
            facts = os.stat(name, dir_fd=level.descriptor, follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode):
                yield self._enter(path, os.open(name, _LOOK | os.O_DIRECTORY, dir_fd=level.descriptor)), None
            elif stat.S_ISREG(facts.st_mode) and not self._moving:
                yield from self._file(level, path, name)
            elif (entry := self._other(level, path, name, facts)) is not None:
                yield entry, None
        except OSError as e:
            if not self._moving or e.errno not in _GONE:
                raise

    def _enter(self, path: bytes, descriptor: int) -> Entry:
        """Its entry; its names are walked next."""
        above = self._levels[-1] if self._levels else None
        level = _Level(descriptor, path, above is not None and above.hidden, marked=False)
        self._levels.append(level)  # the undo, before anything can fail
        facts, xattrs = os.fstat(descriptor), _xattrs(path, descriptor)
        mark = xattrs.get(_OPAQUE, b"")
        opaque = mark == b"y" and above is not None and not level.hidden
        level.hidden, level.marked = level.hidden or opaque, mark == b"x"
        if above is not None and facts.st_dev != self._device:
            raise DumpFailed(f"{path.decode(errors='replace')} of the writable layer is a mount")
        if len(self._levels) > tar.MAX_DEPTH:
            message = "the writable layer has too many directories within each other"
            raise Refused("layer_depth", message, **_found(path, tar.MAX_DEPTH))
        with os.scandir(descriptor) as names:
            for each in names:
                level.names.append(os.fsencode(each.name))
                self._count()
        level.names.sort(reverse=True)
        return _entry(path, Kind.DIRECTORY, facts, xattrs, opaque=opaque)

    def _count(self) -> None:
        self._entries += 1
        if self._entries >= MAX_ENTRIES:
            raise Refused("layer_entries", "the writable layer has too many files", **_found(b"", MAX_ENTRIES))

    def _file(self, level: _Level, path: bytes, name: bytes) -> Iterator[tuple[Entry, int | None]]:
        descriptor = os.open(name, _LOOK, dir_fd=level.descriptor)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise DumpFailed(f"{path.decode(errors='replace')} of the writable layer changed while it was read")
            xattrs = _xattrs(path, descriptor)
            if level.marked and not facts.st_size and _WHITEOUT in xattrs:
                if not level.hidden:
                    yield Entry(path, Kind.WHITEOUT), None
            elif (again := self._again(path, facts)) is not None:
                yield again, None
            else:
                entry = _entry(path, Kind.FILE, facts, xattrs, size=facts.st_size)
                entry.extents = _extents(descriptor, facts.st_size)
                yield entry, descriptor
        finally:
            os.close(descriptor)

    def _other(self, level: _Level, path: bytes, name: bytes, facts: os.stat_result) -> Entry | None:
        """What has no content, and files that are only looked at. None: it says nothing here."""
        kind = stat.S_IFMT(facts.st_mode)
        if kind == stat.S_IFCHR and facts.st_rdev == 0:
            return None if level.hidden else Entry(path, Kind.WHITEOUT)
        xattrs = _xattrs(path, f"/proc/self/fd/{level.descriptor}/".encode() + name)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            device = os.major(facts.st_rdev), os.minor(facts.st_rdev)
            if kind == stat.S_IFBLK or device not in tar.DEVICES:
                message = f"the writable layer holds a device, {'block' if kind == stat.S_IFBLK else 'character'} {device[0]}:{device[1]}"
                raise Refused("layer_device", message, **_found(path, "null, zero, full, random, urandom, tty, ptmx"))
            return self._again(path, facts) or _entry(path, Kind.DEVICE, facts, xattrs, device=device)
        if kind == stat.S_IFLNK:
            target = os.readlink(name, dir_fd=level.descriptor)
            return self._again(path, facts) or _entry(path, Kind.SYMLINK, facts, xattrs, target=target)
        size = min(facts.st_size, facts.st_blocks * 512) if kind == stat.S_IFREG else 0
        return self._again(path, facts) or _entry(path, _OWN_KINDS[kind], facts, xattrs, size=size)

    def _again(self, path: bytes, facts: os.stat_result) -> Entry | None:
        """One more name of a file that has been there."""
        if facts.st_nlink < 2:
            return None
        first = self._seen.setdefault((facts.st_dev, facts.st_ino), path)
        return Entry(path, Kind.LINK, target=first) if first != path else None


def _entry(
    path: bytes,
    kind: Kind,
    facts: os.stat_result,
    xattrs: dict[bytes, bytes],
    *,
    size: int = 0,
    target: bytes = b"",
    device: tuple[int, int] = (0, 0),
    opaque: bool = False,
) -> Entry:
    own = {name: value for name, value in xattrs.items() if tar.kept(name)} if xattrs else xattrs
    mode = stat.S_IMODE(facts.st_mode)
    mtime = max(-tar.LATEST, min(facts.st_mtime_ns, tar.LATEST))
    return Entry(path, kind, mode, facts.st_uid, facts.st_gid, mtime, size, target, device, opaque, own)


def _xattrs(path: bytes, of: int | bytes) -> dict[bytes, bytes]:
    """All attributes, of a descriptor or of what a path names itself."""
    follow = isinstance(of, int)
    names = [os.fsencode(name) for name in os.listxattr(of, follow_symlinks=follow)]
    for name in names:
        if name in _ELSEWHERE:
            message = f"a part of the writable layer lies in another layer ({name.decode()})"
            raise Refused("overlay_redirect", message, **_found(path, "no such mark"))
    return {name: os.getxattr(of, name, follow_symlinks=follow) for name in names}


def _extents(descriptor: int, size: int) -> list[tuple[int, int]] | None:
    """Where the file has data; None if it has no hole. Of a file with very many holes the smallest count as data, as many as it takes."""
    if not size or os.lseek(descriptor, 0, os.SEEK_HOLE) >= size:
        return None
    pieces: list[tuple[int, int]] = []
    smallest, end = 1, 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            break
        end = min(size, os.lseek(descriptor, start, os.SEEK_HOLE))
        _add(pieces, start, end, smallest)
        while len(pieces) > tar.MAX_EXTENTS:
            smallest, pieces, fine = max(2 * PAGE, smallest * 2), [], pieces
            for offset, length in fine:
                _add(pieces, offset, offset + length, smallest)
    return None if pieces == [(0, size)] else pieces


def _add(pieces: list[tuple[int, int]], start: int, end: int, smallest: int) -> None:
    if pieces and start - sum(pieces[-1]) < smallest:
        start = pieces.pop()[0]
    pieces.append((start, end - start))


def _found(path: bytes, wanted: object) -> dict[str, Any]:
    """What a refusal says of the place where it was found."""
    return {"prop": "writable layer", "found": path.decode(errors="replace") or "/", "wanted": wanted}


def _failed(path: bytes, error: OSError) -> DumpFailed:
    where = path.decode(errors="replace") or "/"
    return DumpFailed(f"the writable layer cannot be read at {where}: {error.strerror}", path=where, errno=error.errno)
