"""A room for one bench: pids, mounts and cgroups of its own. A pid of an image is never somebody else's there, several daemons do not
sweep each other's cgroups, and when its first process ends, the kernel ends all others."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def enter(name: str, close: Iterable[int] = ()) -> None:
    """Returns in the first process of a new room; the one that called waits for it, and ends as it did. `close`: descriptors that only
    the room is to have. Must be called before there are threads."""
    _end_with_parent()
    _check(_libc.unshare(_CLONE_NEWNS | _CLONE_NEWPID), "unshare")
    if child := os.fork():
        for descriptor in close:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    _end_with_parent()
    mount("none", Path("/"), _MS_REC | _MS_PRIVATE)
    mount("proc", Path("/proc"), 0, "proc")
    for place in _hierarchies():
        with contextlib.suppress(OSError):  # read-only here: then the daemon makes none either
            (place / name).mkdir(exist_ok=True)
            bind(place / name, place)


def _end_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def bind(what: Path, where: Path) -> None:
    """From now on, in this room, `what` is seen at `where`."""
    mount(str(what), where, _MS_BIND)


def mount(what: str, where: Path, flags: int, kind: str = "none") -> None:
    _check(_libc.mount(what.encode(), str(where).encode(), kind.encode(), flags, None), f"mount {what} at {where}")


def leave_nothing(name: str) -> list[str]:
    """After the room: its cgroups are removed; those that were in it are what its daemon has left, with who lives there."""
    left = []
    for place in _hierarchies():
        for found in sorted((place / name).glob("hibernode/*/"), reverse=True):
            left.append(f"{found}: {(found / 'cgroup.procs').read_text().split()}")
            with contextlib.suppress(OSError):
                found.rmdir()
        for found in (place / name / "hibernode", place / name):
            with contextlib.suppress(OSError):
                found.rmdir()
    return left


def _hierarchies() -> list[Path]:
    """Where cgroups are mounted, except those that take nobody without being set up."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [
        Path(where)
        for _, where, kind, options, *_ in mounts
        if kind in ("cgroup", "cgroup2") and "cpuset" not in options.split(",")
    ]


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
