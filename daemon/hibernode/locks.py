"""Who holds a lock file: asked without taking the lock, not even for a moment, because who starts in that moment would be refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_GONE = (FileNotFoundError, ProcessLookupError)


def holder(path: Path) -> int:
    """The pid of the process that has an flock on `path`; 0 if nobody of this pid namespace has. Raises PermissionError where the one
    who may have it hides: that is not the same as nobody.

    /proc/locks alone does not do: the device it names is not the one that stat(2) names on btrfs, nor the inode on overlayfs. So
    everybody who has a lock is asked for a descriptor of this very file that has it; first whom the file names.
    """
    try:
        file, named = path.stat(), _named(path)
    except FileNotFoundError:
        return 0
    for pid, inode in sorted(_locked(), key=lambda each: each[0] != named):
        try:
            if any(_has_lock(pid, fd, file) for fd in os.listdir(f"/proc/{pid}/fd")):
                return pid
        except _GONE:
            continue
        except PermissionError:
            if pid == named or inode == file.st_ino:
                raise
    return 0


def _named(path: Path) -> int:
    with contextlib.suppress(ValueError, IndexError):
        return int(path.read_text(errors="replace").split()[0])
    return 0  # on a full disk nothing could be written


def _locked() -> Iterator[tuple[int, int]]:
    """(pid, inode) of every flock that is held."""
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 fe:00:9979258 0 EOF; one who waits has an arrow before his
        if words[1:2] == ["FLOCK"]:
            yield int(words[4]), int(words[5].rpartition(":")[2])


def _has_lock(pid: int, fd: str, file: os.stat_result) -> bool:
    """A second daemon that waits for the first one's end has the file open, too."""
    with contextlib.suppress(*_GONE):  # closed while we looked
        found = os.stat(f"/proc/{pid}/fd/{fd}")
        if (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino):
            return "FLOCK" in Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
    return False
