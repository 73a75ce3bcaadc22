"""Device nodes of a container that CRIU has brought back: its /dev is that of the image, made for the old one's devices.

A GPU that has taken the place of another has a number of its own, and the driver looks for its node by that (ai-dynamo/snapshot, #37); the
same GPU may have another number on another machine. What the new container's specification gives is what it may use (its devices cgroup
says the same).
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from hibernode.errors import RestoreFailed

_log = logging.getLogger("hibernode.devices")


def give(name: str, spec: Mapping[str, Any], pid: int, needed: Collection[str]) -> None:
    """Each node of the specification that container `name`, in which `pid` is, has not, or of another device. What is there and no device
    stays. It may have begun to run, and change its directories meanwhile: what it gets is its own in any case. RestoreFailed where one
    of `needed`, which it has open, cannot be made; others may have been made then."""
    for device in (spec.get("linux") or {}).get("devices") or ():
        try:
            _give(name, device, pid)
        except (OSError, KeyError, TypeError, ValueError) as e:
            if device.get("path") in needed:
                raise RestoreFailed(f"container {name!r} cannot be given the device {device['path']}: {e}", container=name) from e
            _log.warning("container %r cannot be given the device %s: %s", name, device.get("path"), e)


def _give(name: str, device: Mapping[str, Any], pid: int) -> None:
    place, kind = (
        PurePosixPath(str(device["path"])),
        {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK}.get(str(device["type"]), 0),
    )
    wanted = os.makedev(int(device.get("major", 0)), int(device.get("minor", 0)))
    if not kind or not place.is_absolute() or ".." in place.parts:
        return
    folder = _folder(pid, place.parent)
    try:
        there = _stat(place.name, folder)
        if there is not None:
            if stat.S_IFMT(there.st_mode) not in (stat.S_IFCHR, stat.S_IFBLK):
                return
            if (stat.S_IFMT(there.st_mode), there.st_rdev) == (kind, wanted):
                return
            os.unlink(place.name, dir_fd=folder)
        mode = int(device.get("fileMode") or 0o666)
        os.mknod(place.name, kind | mode, wanted, dir_fd=folder)
        made = os.open(place.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.chown(f"/proc/self/fd/{made}", int(device.get("uid") or 0), int(device.get("gid") or 0))
            os.chmod(f"/proc/self/fd/{made}", mode)  # without our umask
        finally:
            os.close(made)
        _log.info("container %r has got the device %s", name, place)
    finally:
        os.close(folder)


def _folder(pid: int, place: PurePosixPath) -> int:
    """Of its own root file system, made where it is missing. No symlink is followed: what is in there may be an enemy's."""
    folder = os.open(f"/proc/{pid}/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in place.parts[1:]:
        above = folder
        try:
            if _stat(part, above) is None:
                os.mkdir(part, 0o755, dir_fd=above)
            folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        finally:
            os.close(above)
    return folder


def _stat(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
