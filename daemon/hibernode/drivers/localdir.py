"""The store in a directory: the embedded default, for one machine or a file system that several share.

Knows how a file becomes visible at once, whole and durable: written under the hidden `.uploads/` of the same file
system, synced, linked (the one call that makes a name and refuses one that is there), and every directory on its way
synced. A crash leaves files in `.uploads/` at worst, which `open_uploads` finds.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import stat
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hibernode.errors import Corrupt, Internal, NoRoom, NotFound, Refused, StoreUnavailable
from hibernode.model import checked_key, checked_prefix, is_key
from hibernode.ports import Buffer, ObjectFacts, OpenUpload

_log = logging.getLogger(__name__)

_UPLOADS = ".uploads"  # no key begins with a dot, so no key can name anything in it

# Dirty pages of one upload stay under two windows and one write: an image of a terabyte must not push the workloads'
# memory out, nor end in one long fsync. Measured with 4 MiB writes to ext4 on a virtual disk, 1 to 2 GB per run: 2.3
# to 3.2 GB/s so; 1.7 to 1.8 GB/s with fdatasync instead of sync_file_range, because that waits for the window just
# written too; 0.34 to 2.3 GB/s, with up to ten times the CPU, when left to the kernel, which at its dirty limit stops
# whoever writes.
_WINDOW = 32 << 20
_SYNC_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin
_SYNC_ALL = 7  # WAIT_BEFORE | WRITE | WAIT_AFTER: begin and wait
_AT_ONCE = os.sysconf("SC_IOV_MAX")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_PARENT_TRIES = 100  # of mkdir and rename: a `delete` in between may remove the directory because it is empty


class LocalDir:
    """ports.Store in a directory. Files are 0600, directories 0700."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._uploads = self._root / _UPLOADS

    @property
    def location(self) -> str:
        return f"file://{self._root}"

    @property
    def lingers(self) -> bool:
        return False  # a process that is in a system call ends with it

    @property
    def reads_in_flight(self) -> int:
        return 1

    def check(self) -> None:
        key, data = f"check-{uuid.uuid4().hex}", os.urandom(64)
        self.put(key, data)
        try:
            if self.get(key, limit=len(data)) != data:
                raise StoreUnavailable(f"{self.location} does not give back what was written", hint="look at its disk")
        finally:
            self.delete(key)

    def free_bytes(self) -> int | None:
        """Bytes that this user may still write; of the nearest directory that exists, before the first write."""
        place = next(p for p in (self._root, *self._root.parents) if p.exists())
        with _translating(self.location, "cannot ask for free space"):
            facts = os.statvfs(place)
        return facts.f_bavail * facts.f_frsize

    def upload(self, key: str) -> LocalUpload:
        return LocalUpload(self, checked_key(key))

    def put(self, key: str, data: bytes) -> None:
        upload = LocalUpload(self, checked_key(key))
        try:
            upload.write(data)
            upload.commit()
        finally:
            upload.abort()

    def get(self, key: str, *, limit: int) -> bytes:
        with self._reading(key) as fd:
            size = os.fstat(fd).st_size
            if size > limit:
                raise Corrupt(f"{key} has {size} bytes, at most {limit} were expected")
            data = bytearray(size)
            self._fill(fd, key, 0, memoryview(data))
            return bytes(data)

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        with self._reading(key) as fd:
            self._fill(fd, key, offset, into.cast("B"))

    @contextmanager
    def reading(self, key: str, offset: int, size: int) -> Iterator[Callable[[memoryview], None]]:  # noqa: ARG002 - one disk answers anyhow
        with self._reading(key) as fd:
            at = offset

            def fill(into: memoryview) -> None:
                nonlocal at
                self._fill(fd, key, at, into.cast("B"))
                at += into.nbytes

            yield fill

    def stat(self, key: str) -> ObjectFacts:
        path = self.path(key)
        with _translating(self.location, f"cannot look at {key}"):
            try:
                facts = os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                raise self._not_found(key) from None
        if not stat.S_ISREG(facts.st_mode):
            raise self._not_found(key)
        return ObjectFacts(key, facts.st_size, facts.st_mtime)

    def list(self, prefix: str = "") -> Iterator[ObjectFacts]:
        for key in self._keys(self._root, "", checked_prefix(prefix)):
            with suppress(NotFound):  # deleted meanwhile
                yield self.stat(key)

    def delete(self, key: str) -> None:
        """Remove, durably, and with it the directories that it leaves empty."""
        path = self.path(key)
        with _translating(self.location, f"cannot delete {key}"):
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return
            for parent in self._parents(path):
                try:
                    os.rmdir(parent)
                except OSError:  # not empty, or another delete was faster
                    break
            with suppress(FileNotFoundError):
                _sync_directory(next(p for p in (*self._parents(path), self._root) if p.exists()))

    def open_uploads(self, prefix: str = "") -> Iterator[OpenUpload]:
        """What is in `.uploads/`, in no order; keys are cut at 180 characters."""
        if not self._uploads.exists():
            return
        with _translating(self.location, "cannot list uploads"):
            names = os.listdir(self._uploads)
        for name in names:
            key = name.rpartition(".")[0].replace("+", "/")
            with suppress(FileNotFoundError):
                if key.startswith(checked_prefix(prefix)):
                    yield OpenUpload(key, name, os.lstat(self._uploads / name).st_mtime)

    def abort_upload(self, upload: OpenUpload) -> None:
        """Remove it; one that is gone is no error."""
        with _translating(self.location, f"cannot remove the upload of {upload.key}"), suppress(FileNotFoundError):
            os.unlink(self._uploads / os.path.basename(upload.id))

    # --- for the upload ---

    def path(self, key: str) -> Path:
        """Where `key` lives: always below the root, because no valid key can leave it."""
        return self._root / checked_key(key)

    def temp(self, key: str) -> tuple[Path, int]:
        """A new file for an upload of `key`, open for writing. Its name tells the key (`+` is in none)."""
        path = self._uploads / f"{key.replace('/', '+')[:180]}.{uuid.uuid4().hex}"
        with _translating(self.location, f"cannot begin {key}"):
            _make_directory(self._uploads)
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    def publish(self, temp: Path, key: str) -> None:
        """Give the synced file `temp` the name `key` too, durably; on an error it does not have it."""
        path = self.path(key)
        with _translating(self.location, f"cannot commit {key}"):
            try:
                self._name(temp, path)
            except FileExistsError:
                # On NFS the answer to a link that was made may be lost, and it is asked for again.
                if path.exists() and path.samefile(temp):
                    return
                raise Refused(
                    "exists", f"{key} is already there", prop="object", found=key, wanted="no object of that key"
                ) from None
            try:
                # All of them, also those that were there: the thread that made one may not have synced it yet.
                for parent in (*self._parents(path), self._root):
                    _sync_directory(parent)
            except OSError:
                os.unlink(path)  # ours: the link was made
                raise

    def _name(self, temp: Path, path: Path) -> None:
        for _ in range(_PARENT_TRIES):
            _make_directory(path.parent)
            try:
                return os.link(temp, path)
            except FileNotFoundError:
                if not temp.exists():
                    raise
        raise FileNotFoundError(errno.ENOENT, "its directory is removed again and again", str(path.parent))

    def _parents(self, path: Path) -> Sequence[Path]:
        """The directories above `path` and below the root, the nearest first."""
        return [p for p in path.parents if self._root in p.parents]

    # --- reading ---

    @contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        path = self.path(key)
        with _translating(self.location, f"cannot read {key}"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError):
                raise self._not_found(key) from None
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise self._not_found(key)
                yield fd
            finally:
                os.close(fd)

    def _fill(self, fd: int, key: str, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            n = os.preadv(fd, [into[done:]], offset + done)
            if n == 0:
                raise Corrupt(f"{key} ends at byte {offset + done}, {len(into) - done} bytes too early")
            done += n

    def _keys(self, directory: Path, base: str, prefix: str) -> Iterator[str]:
        """Keys below `directory` in the order of whole keys: a directory sorts as its name and the slash after it."""
        with _translating(self.location, "cannot list"):
            try:
                entries = [(e.name, e.is_dir(follow_symlinks=False)) for e in os.scandir(directory) if is_key(base + e.name)]
            except FileNotFoundError:
                return
        for key, is_directory in sorted((f"{base}{name}{'/' if is_dir else ''}", is_dir) for name, is_dir in entries):
            if is_directory and (key.startswith(prefix) or prefix.startswith(key)):
                yield from self._keys(self._root / key, key, prefix)
            elif not is_directory and key.startswith(prefix):
                yield key

    def _not_found(self, key: str) -> NotFound:
        return NotFound(f"no object {key} in {self.location}")


class LocalUpload:
    """ports.Upload into a LocalDir."""

    def __init__(self, store: LocalDir, key: str) -> None:
        self._store = store
        self._key = key
        self._temp, self._fd = store.temp(key)
        self._size = 0
        self._begun = 0  # bytes that the kernel was told to write
        self._dropped = 0  # of these, bytes that it has written and no longer caches
        self._writable = True

    def write(self, *pieces: Buffer) -> None:
        """In one call of the system, if it takes so many: a raw frame has 65 pieces, and took 1.6 times as long one by one."""
        with self._breaking(f"cannot write {self._key}"):
            left = deque(memoryview(piece).cast("B") for piece in pieces if len(piece))
            while left:
                n = os.writev(self._fd, list(itertools.islice(left, _AT_ONCE)))
                self._size += n
                while left and n >= len(left[0]):
                    n -= len(left.popleft())
                if n:
                    left[0] = left[0][n:]
            if self._size - self._begun >= _WINDOW:
                self._drain()

    def commit(self) -> ObjectFacts:
        with self._breaking(f"cannot commit {self._key}"):
            os.fsync(self._fd)
            facts = os.fstat(self._fd)
            self._store.publish(self._temp, self._key)
        self.abort()
        return ObjectFacts(self._key, facts.st_size, facts.st_mtime)

    def abort(self) -> None:
        self._writable = False
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError as e:
                _log.warning("closing the upload of %s failed: %s", self._key, e)
        try:
            self._temp.unlink(missing_ok=True)
        except OSError as e:
            _log.warning("removing the upload of %s failed, gc will find it: %s", self._key, e)

    def _drain(self) -> None:
        """Have the window just filled written, wait for the one before it and drop that from the page cache."""
        _sync_range(self._fd, self._begun, self._size - self._begun, _SYNC_WRITE)
        if before := self._begun - self._dropped:
            _sync_range(self._fd, self._dropped, before, _SYNC_ALL)
            os.posix_fadvise(self._fd, self._dropped, before, os.POSIX_FADV_DONTNEED)
        self._dropped, self._begun = self._begun, self._size

    @contextmanager
    def _breaking(self, what: str) -> Iterator[None]:
        """Whatever fails in here leaves only `abort` legal."""
        if not self._writable:
            raise Internal(f"the upload of {self._key} has ended or failed before")
        self._writable = False
        with _translating(self._store.location, what):
            yield
        self._writable = True


_HINTS = {
    errno.EACCES: "check who owns the directory and its mode",
    errno.EPERM: "check who owns the directory; its file system must have hard links",
    errno.EOPNOTSUPP: "its file system must have hard links",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOENT: "something else removes files there",
    errno.ENOTDIR: "something on the way there is not a directory",
}


@contextmanager
def _translating(location: str, what: str) -> Iterator[None]:
    """The one place where errors of the system become ours."""
    try:
        yield
    except OSError as e:
        reason = f"{what} in {location}: {(e.strerror or str(e)).lower()}"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(reason, hint="free space there, or let store.url name another place") from e
        raise StoreUnavailable(reason, hint=_HINTS.get(e.errno or 0, "look at the kernel log")) from e


def _make_directory(path: Path) -> None:
    """Make `path` and what is missing above it, each durable in its parent."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        _make_directory(path.parent)
        _make_directory(path)
    else:
        with suppress(FileNotFoundError):  # a `delete` was faster, and whoever needs the directory comes back
            _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_range(fd: int, offset: int, size: int, flags: int) -> None:
    """An error that it reports is reported once: a later fsync would not, so it must end the upload."""
    if _libc.sync_file_range(fd, offset, size, flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
