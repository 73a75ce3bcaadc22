"""The tar of a writable layer -> a new container's root directory, through its merged mount. Twin: `layer.py`.

Nothing is ever written into an upper directory: a deletion is a deletion on the mount, and the kernel makes of it what fits the layers
below. The tar may be hostile; what it is applied to is used by nobody else meanwhile. No path of it is ever looked up as a whole: entries
come in one order, each below directories that are open, so that nothing outside of the root can be reached, through no symlink and no `..`;
a mount in it is not entered. What is in an entry's place is removed, never opened.

Descriptors: one for each level of directories, and a few. Memory: one entry, and what `pieces` holds.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from hibernode.errors import Corrupt, NoRoom, Refused, RestoreFailed
from hibernode.model import LayerRef
from hibernode.transfer import tar
from hibernode.transfer.tar import Entry, Kind

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EPERM, errno.EXDEV)  # EPERM: a hard link to a directory


def apply(pieces: Iterator[memoryview], root: Path | int, ref: LayerRef) -> None:
    """Put the layer `ref`, whose bytes `pieces` gives in order, into `root` (a path, or a descriptor): afterwards it is as the container
    left it. Corrupt for what is no layer, Refused for what is not brought back, NoRoom, RestoreFailed for what the file system does not do,
    and what `pieces` raises. After any of them `root` is something between: a container that is made of it must not be started."""
    tape = _Tape(pieces, ref.bytes)
    top = os.open(root, _DIRECTORY & ~os.O_NOFOLLOW) if isinstance(root, Path) else os.open(".", _DIRECTORY, dir_fd=root)
    with _Applying(top, tape) as applying:
        while (entry := tar.decode(tape.take)) is not None:
            if applying.entries == ref.entries:
                raise Corrupt(f"layer {ref.name}: more entries than the {ref.entries} of the manifest")
            applying.apply(entry)
        applying.end()
    if applying.entries != ref.entries:
        raise Corrupt(f"layer {ref.name}: {applying.entries} entries, the manifest says {ref.entries}")
    tape.end()


class _Tape:
    """The tar's bytes, front to back."""

    def __init__(self, pieces: Iterator[memoryview], size: int) -> None:
        self._pieces, self._left = pieces, size
        self._piece = memoryview(b"")

    def take(self, size: int) -> bytes:
        """So many bytes, which are few."""
        return b"".join(map(bytes, self.data(size)))

    def data(self, size: int) -> Iterator[memoryview]:
        """So many bytes, in pieces that are good until the next. Corrupt if there are less."""
        if size > self._left:
            raise Corrupt("layer: it ends in the middle of an entry")
        self._left -= size
        while size:
            if not self._piece:
                self._piece = next(self._pieces, self._piece)
                if not self._piece:
                    raise Corrupt("layer: it ends too early")
            taken = self._piece[:size]
            yield taken
            self._piece = self._piece[len(taken) :]
            size -= len(taken)

    def end(self) -> None:
        """Nothing follows but zeros; then whoever gives the pieces has compared everything."""
        if self._left:
            raise Corrupt(f"layer: {self._left} bytes behind its end")
        for piece in itertools.chain((self._piece,), self._pieces):
            if any(piece):
                raise Corrupt("layer: something behind its end")


@dataclass(eq=False)
class _Level:
    """A directory into which entries are put. What is put into it changes its time, so that comes last."""

    descriptor: int
    name: bytes
    mtime: int


@dataclass(eq=False)
class _Applying:
    """Where we are: the directories above the last entry. A context manager: leaving it closes them."""

    top: int
    tape: _Tape
    entries: int = 0
    _levels: list[_Level] = field(default_factory=list)
    _last: tuple[bytes, ...] = ()

    def apply(self, entry: Entry) -> None:
        try:
            self._apply(entry, entry.parts)
        except OSError as e:
            raise _failed(entry, e) from e

    def _apply(self, entry: Entry, parts: tuple[bytes, ...]) -> None:
        if not self.entries:
            self._begin(entry)
        elif parts <= self._last:
            raise Corrupt(f"layer: {entry.shown[:200]!r} is not in its place")
        else:
            self._leave(parts[:-1])
            self._put(self._levels[-1].descriptor, parts[-1], entry)
        self._last = parts
        self.entries += 1

    def end(self) -> None:
        """No more entries: all directories have their times."""
        try:
            while self._levels:
                self._leave_one()
        except OSError as e:
            raise RestoreFailed(f"the writable layer's directories do not get their times: {e.strerror}") from e

    def _begin(self, entry: Entry) -> None:
        if entry.path:
            raise Corrupt("layer: it does not begin with its root")
        self._device = os.fstat(self.top).st_dev
        self._levels.append(_Level(os.dup(self.top), b"", entry.mtime))
        _adorn(self.top, entry)

    def _leave(self, above: tuple[bytes, ...]) -> None:
        """Be in the directory of that path, which has come."""
        names = tuple(level.name for level in self._levels[1:])
        while names[: len(above)] != above[: len(names)] or len(names) > len(above):
            self._leave_one()
            names = names[:-1]
        if names != above:
            raise Corrupt("layer: an entry without its directory")

    def _leave_one(self) -> None:
        level = self._levels.pop()
        try:
            os.utime(level.descriptor, ns=(level.mtime, level.mtime))
        finally:
            os.close(level.descriptor)

    def _put(self, folder: int, name: bytes, entry: Entry) -> None:
        match entry.kind:
            case Kind.WHITEOUT:
                _remove(folder, name, self._device)
            case Kind.DIRECTORY:
                self._enter(folder, name, entry)
            case Kind.FILE:
                self._file(folder, name, entry)
            case Kind.LINK:
                self._link(folder, name, entry)
            case Kind.SYMLINK:
                self._make_room(folder, name)
                os.symlink(entry.target, name, dir_fd=folder)
                _adorn_path(folder, name, entry)
            case Kind.DEVICE | Kind.FIFO | Kind.SOCKET:
                self._node(folder, name, entry)

    def _make_room(self, folder: int, name: bytes) -> None:
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        _remove(folder, name, self._device)

    def _enter(self, folder: int, name: bytes, entry: Entry) -> None:
        try:
            if entry.opaque:
                self._make_opaque(folder, name)
            elif not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                _remove(folder, name, self._device)
                os.mkdir(name, 0o700, dir_fd=folder)
        except FileNotFoundError:
            os.mkdir(name, 0o700, dir_fd=folder)
        descriptor = _opened(folder, name, self._device)
        self._levels.append(_Level(descriptor, name, entry.mtime))
        _adorn(descriptor, entry)

    def _make_opaque(self, folder: int, name: bytes) -> None:
        """An empty directory that the kernel has marked, in place of what is there: it marks one that is renamed within a directory which
        has something below, as the root always has, and leaves the mark when it is renamed again."""
        _remove(folder, name, self._device)
        made, marked = (f".hibernode-{os.urandom(16).hex()}" for _ in range(2))
        os.mkdir(made, 0o700, dir_fd=self.top)
        os.rename(made, marked, src_dir_fd=self.top, dst_dir_fd=self.top)
        os.rename(marked, name, src_dir_fd=self.top, dst_dir_fd=folder)

    def _file(self, folder: int, name: bytes, entry: Entry) -> None:
        try:
            descriptor = os.open(name, _NEW, 0o600, dir_fd=folder)
        except FileExistsError:
            _remove(folder, name, self._device)
            descriptor = os.open(name, _NEW, 0o600, dir_fd=folder)
        try:
            self._fill(descriptor, entry)
            _adorn(descriptor, entry)  # last: writing takes away set-user-ID and capabilities
            os.utime(descriptor, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, entry: Entry) -> None:
        total = 0
        for offset, length in entry.data:
            total += length
            at = offset
            for piece in self.tape.data(length):
                end = at + len(piece)
                while at < end:
                    at += os.pwrite(descriptor, piece[at - end :], at)
        if entry.extents is not None:
            os.ftruncate(descriptor, entry.size)
        if any(self.tape.take(len(tar.padding(total)))):
            raise Corrupt(f"layer: something behind the end of {entry.shown[:200]!r}")

    def _link(self, folder: int, name: bytes, entry: Entry) -> None:
        *above, last = target = tuple(entry.target.split(b"/"))
        if target >= entry.parts:
            raise Corrupt(f"layer: {entry.shown[:200]!r} is a link to what has not come")
        self._make_room(folder, name)
        source = os.dup(self.top)
        try:
            for part in above:
                deeper = _opened(source, part, self._device)
                os.close(source)
                source = deeper
            os.link(last, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as e:
            if e.errno in _NOT_THERE:
                raise Corrupt(f"layer: {entry.shown[:200]!r} is a link to no file of it") from e
            raise
        finally:
            os.close(source)

    def _node(self, folder: int, name: bytes, entry: Entry) -> None:
        if entry.kind is Kind.DEVICE and entry.device not in tar.DEVICES:
            raise Refused(
                "layer_device", f"the layer holds the device {entry.device[0]}:{entry.device[1]}", prop="device",
                found=entry.shown, wanted="null, zero, full, random, urandom, tty, ptmx",
            )  # fmt: skip
        self._make_room(folder, name)
        kind = {Kind.DEVICE: stat.S_IFCHR, Kind.FIFO: stat.S_IFIFO, Kind.SOCKET: stat.S_IFSOCK}[entry.kind]
        os.mknod(name, kind | 0o600, os.makedev(*entry.device), dir_fd=folder)
        _adorn_path(folder, name, entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for level in self._levels:
            os.close(level.descriptor)
        self._levels.clear()
        os.close(self.top)


def _opened(folder: int, name: bytes, device: int) -> int:
    """A directory of the same mount; ENOTDIR or ELOOP if it is none."""
    descriptor = os.open(name, _DIRECTORY, dir_fd=folder)
    if os.fstat(descriptor).st_dev != device:
        os.close(descriptor)
        raise RestoreFailed(f"something is mounted at {name.decode(errors='replace')} of the container's root")
    return descriptor


def _remove(folder: int, name: bytes, device: int) -> None:
    """What has that name is gone, with all it holds; it may not be there."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        levels = [_opened(folder, name, device)]
        names, waiting = [name], [_names(levels[0])]
        try:
            while levels:
                if waiting[-1]:
                    _remove_next(levels, names, waiting, device)
                else:
                    os.close(levels.pop())
                    waiting.pop()
                    os.rmdir(names.pop(), dir_fd=levels[-1] if levels else folder)
        finally:
            for level in levels:
                os.close(level)


def _remove_next(levels: list[int], names: list[bytes], waiting: list[list[bytes]], device: int) -> None:
    child = waiting[-1].pop()
    try:
        os.unlink(child, dir_fd=levels[-1])
    except IsADirectoryError:
        levels.append(_opened(levels[-1], child, device))
        names.append(child)
        waiting.append(_names(levels[-1]))


def _names(descriptor: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(descriptor)]


def _adorn(descriptor: int, entry: Entry) -> None:
    """Owner, mode and attributes of a file or directory: in this order, for each takes away some of those before."""
    os.fchown(descriptor, entry.uid, entry.gid)
    _unset(descriptor, entry)
    os.fchmod(descriptor, entry.mode)
    for name, value in entry.xattrs.items():
        os.setxattr(descriptor, tar.merged_name(name), value)


def _adorn_path(folder: int, name: bytes, entry: Entry) -> None:
    """The same of what is not opened, and its time. What a path below /proc/self/fd names itself is not followed."""
    path = f"/proc/self/fd/{folder}/".encode() + name
    os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
    if entry.kind is not Kind.SYMLINK:
        _unset(path, entry)
        os.chmod(name, entry.mode, dir_fd=folder)  # it has just been made, and is no symlink
    for attribute, value in entry.xattrs.items():
        os.setxattr(path, tar.merged_name(attribute), value, follow_symlinks=False)
    os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=folder, follow_symlinks=False)


def _unset(of: int | bytes, entry: Entry) -> None:
    """Attributes that it has and should not have: of a directory from below, or inherited from the one it is in."""
    follow = isinstance(of, int)
    for text in os.listxattr(of, follow_symlinks=follow):
        name = os.fsencode(text)
        if (own := tar.layer_name(name)) not in entry.xattrs and tar.kept(own):
            os.removexattr(of, name, follow_symlinks=follow)


def _failed(entry: Entry, error: OSError) -> NoRoom | RestoreFailed:
    message = f"{entry.shown} of the writable layer cannot be put back: {error.strerror}"
    if error.errno in _FULL:
        return NoRoom(message, hint="the disk of the container's writable layers is full")
    return RestoreFailed(message, path=entry.shown, errno=error.errno)
