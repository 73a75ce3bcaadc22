"""What must not happen while hostile bytes are read, whatever they say. Each breach is a `Finding`:

- an exception that is not one of those the reader documents;
- more than `SECONDS` of processor time, or `MEMORY` more resident bytes than before; or much memory that is still held afterwards,
  by an error and its frames that hold each other;
- a file opened, made, renamed or removed outside of the temporary directory, a process started, a connection made;
- a descriptor or a thread that is still there afterwards.

An endless wait uses no processor time: the engine's own clock ends that one, and in a test the test's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 5.0  # of processor time; the slowest honest input here takes a tenth of one
MEMORY = 128 << 20  # bytes; the inputs here are small, and so are the limits that they are read with
_PAGE = resource.getpagesize()
_LIBC = ctypes.CDLL(None)
_HELD = 16 << 20  # bytes that are still there afterwards, until a cycle of objects is found
_PILE = 256 << 20  # bytes of it, from many runs, that may lie about until they are looked for
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {  # audit events -> how many of their first arguments are paths
    "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1,
}  # fmt: skip
_NEVER = (
    "subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "socket.connect", "socket.bind",
)  # fmt: skip
# Modules are imported late, and the kernel is asked about ourselves.
_READABLE = (sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[1]), "/proc/", "/dev/", "/usr/", "/etc/localtime")


class Finding(BaseException):
    """No `Exception`: nobody who tidies up may swallow it."""


class _Watch:
    """The one audit hook of this process: it stays for ever, and is asleep outside of `guarded`."""

    def __init__(self) -> None:
        # On tmpfs, as what a restore stages is: elsewhere 8,000 new files take seconds of processor time, which would be counted here.
        shared = "/dev/shm" if "TMPDIR" not in os.environ and Path("/dev/shm").is_dir() else None
        self._temporary = tempfile.TemporaryDirectory(prefix="hibernode-fuzz-", dir=shared)
        self.root = Path(self._temporary.name).resolve()
        self.awake = False
        self.breach = ""
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.awake:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITES
            if isinstance(path, str | bytes | os.PathLike) and not self._ours(path) and (writes or not _known(path)):
                self._stop(f"{'writes' if writes else 'reads'} {os.fsdecode(path)!r}")
        elif event in _PATHS:
            for path in arguments[: _PATHS[event]]:
                if isinstance(path, str | bytes | os.PathLike) and not self._ours(path):
                    self._stop(f"{event} of {os.fsdecode(path)!r}")
        elif event in _NEVER:
            self._stop(f"{event} {arguments!r}")

    def _ours(self, path: str | bytes | os.PathLike[str]) -> bool:
        """Inside of the temporary directory, once links and `..` are resolved."""
        full = os.path.realpath(os.fsdecode(path))
        return full == str(self.root) or full.startswith(f"{self.root}/")

    def _stop(self, what: str) -> None:
        self.breach = self.breach or f"outside of the temporary directory: {what}"  # kept: somebody may swallow what is raised
        raise Finding(self.breach)


def _known(path: str | bytes | os.PathLike[str]) -> bool:
    return os.fsdecode(path).startswith(_READABLE)


_watch = _Watch()


def root() -> Path:
    """The temporary directory of this process: what a target makes once and keeps goes here."""
    return _watch.root


@contextmanager
def guarded(*allowed: type[Exception], seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[Path]:
    """An empty directory, and an eye on what is done inside. `allowed` is what the reader says that it raises."""
    place = _emptied(_watch.root / "place")
    before = _Held()
    _watch.awake, _watch.breach = True, ""
    try:
        with contextlib.suppress(*allowed):
            yield place
        _watch.awake = False
        if _watch.breach:
            raise Finding(_watch.breach)
        before.compare(seconds, memory)
    finally:
        _watch.awake = False
        gc.unfreeze()


def _emptied(place: Path) -> Path:
    """Most targets write nothing: it is as it was then."""
    try:
        empty = not os.listdir(place)
    except FileNotFoundError:
        empty = False
    if not empty:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    return place


class _Held:
    """What this process has and has used, to be compared afterwards."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._descriptors = _descriptors()
        _forget_peak()
        _freeze()
        self._resident, self._peak, self._seconds = _resident(), _peak(), time.process_time()

    def compare(self, seconds: float, memory: int) -> None:
        if (took := time.process_time() - self._seconds) > seconds:
            raise Finding(f"took {took:.1f} s of processor time")
        if (grown := _peak() - self._peak) > memory:
            raise Finding(f"took {grown >> 20} MiB of memory")
        self._let_go()
        if left := set(threading.enumerate()) - self._threads:
            raise Finding(f"threads are left: {left}")
        if _descriptors() > self._descriptors:
            gc.collect()  # an exception's traceback may hold one a moment longer
            if _descriptors() > self._descriptors:
                raise Finding("descriptors are left open")

    def _let_go(self) -> None:
        if (resident := _resident()) - self._resident > _HELD:
            cycles = gc.collect()
            _LIBC.malloc_trim(0)  # what is free may still be there: it is the allocator's, and none of the run's
            if cycles and (freed := resident - _resident()) > _HELD // 2:
                raise Finding(f"{freed >> 20} MiB were held until the collector of cycles came by")


def _freeze() -> None:
    """Whatever lies about from before is none of what is collected at the end. Until `gc.unfreeze`. It must not pile up, though: what is
    frozen is old afterwards, and Python seldom looks through what is old."""
    global _clean  # noqa: PLW0603 - of this process
    if _resident() > _clean + _PILE:
        gc.collect()
        _clean = _resident()
    gc.freeze()


_clean = 0  # bytes that were resident after the last collection


def _resident() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _forget_peak() -> None:
    """From now on the peak is of what comes (proc(5), clear_refs); a kernel that does not let us counts from the highest so far."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"5")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def require(condition: object, what: str) -> None:
    """What must be true of whatever was read, or it is a finding."""
    if not condition:
        raise Finding(what)
