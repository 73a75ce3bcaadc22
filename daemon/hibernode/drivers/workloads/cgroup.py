"""A cgroup for what is not ours: managed jobs and restored trees leave the daemon's, so that stopping the daemon's unit does not stop
them, and their memory is not counted as the daemon's. Best effort: without one, `KillMode` in the unit still keeps them alive.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from hibernode.children import unprotect

_PARENT = "hibernode"
_NEEDS_SETTINGS = {"cpuset"}  # an empty cpuset takes no process


def _hierarchies() -> list[Path]:
    """Where cgroups are mounted: one place on v2, one per controller on v1."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [
        Path(where)
        for _, where, kind, options, *_ in mounts
        if kind == "cgroup2" or (kind == "cgroup" and not _NEEDS_SETTINGS & set(options.split(",")))
    ]


def create(uid: str) -> tuple[str, ...]:
    """The files to write a pid into, so that it and its children live in cgroup `hibernode/<uid>` of every hierarchy."""
    procs = []
    for hierarchy in _hierarchies():
        place = hierarchy / _PARENT / uid
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue  # read-only here, as in most containers
        procs.append(str(place / "cgroup.procs"))
    return tuple(procs)


def possible() -> bool:
    """Whether one can be made here."""
    uid = f"{uuid.uuid4()}.possible"
    try:
        return bool(create(uid))
    finally:
        remove(uid)


def join(procs: tuple[str, ...], pid: int) -> None:
    """`pid` leaves what is the daemon's: its cgroups, and its protection from the OOM killer."""
    unprotect(pid)
    for file in procs:
        try:
            Path(file).write_text(str(pid))
        except OSError:
            continue


def members(uid: str) -> list[int]:
    """Who lives in the cgroups of `uid` now."""
    found: set[int] = set()
    for hierarchy in _hierarchies():
        try:
            found.update(map(int, (hierarchy / _PARENT / uid / "cgroup.procs").read_text().split()))
        except OSError:
            continue
    return sorted(found)


def kill(uid: str) -> None:
    """SIGKILL whoever lives there, and whoever is being born there: where the kernel has it (v2, from 5.14)."""
    for hierarchy in _hierarchies():
        place = hierarchy / _PARENT / uid / "cgroup.kill"
        try:
            if place.exists():
                place.write_text("1")
        except OSError:
            continue


def remove(uid: str) -> bool:
    """Remove the empty cgroups of `uid`; False: some are in use, and stay."""
    gone = True
    for place in (hierarchy / _PARENT / uid for hierarchy in _hierarchies()):
        try:
            os.rmdir(place)
        except OSError:
            gone = gone and not place.exists()
    return gone


def remove_empty() -> None:
    """Remove every cgroup of ours that nothing lives in: those of processes that ended while no daemon ran."""
    for hierarchy in _hierarchies():
        for place in (hierarchy / _PARENT).glob("*/"):
            try:
                os.rmdir(place)
            except OSError:
                continue  # in use
