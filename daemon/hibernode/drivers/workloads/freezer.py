"""The cgroup freezer: everybody in a cgroup stands still, whoever is born there too, and nobody notices. One place for each container.

A place is a directory of cgroup v1's freezer hierarchy, or of v2. The kernel's documents (cgroup-v1/freezer-subsystem, cgroup-v2) have its
states; a write is taken at once, and what cannot stop yet (it waits for a disk) is waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from hibernode.errors import DumpFailed

LIMIT = 10.0  # seconds until all must stand still; a thread that waits for NFS may take longer
_POLL = 0.001


def freeze(places: Sequence[str], limit: float = LIMIT) -> None:
    """All together. DumpFailed if one does not stand still after `limit` seconds, or is gone; the others are then still frozen."""
    ends = time.monotonic() + limit
    try:
        for place in places:
            _write(place, frozen=True)
        while moving := [place for place in places if not is_frozen(place)]:
            if time.monotonic() > ends:
                raise DumpFailed(
                    f"the processes of {moving[0]} do not stand still after {limit:g} s",
                    hint="one waits for a device or a network file system: state D in `ps`",
                )
            time.sleep(_POLL)
            for place in moving:
                _write(place, frozen=True)  # v1 may have to be asked again
    except OSError as e:
        raise DumpFailed(f"cannot freeze: {e}", hint="has a container ended? Is the cgroup file system read-only here?") from e


def thaw(places: Sequence[str]) -> None:
    """All of them; one that is gone is no error. Harmless when repeated. Raises OSError for one that is there and cannot be told."""
    failed: list[OSError] = []
    for place in places:
        try:
            _write(place, frozen=False)
        except FileNotFoundError:
            continue
        except OSError as e:
            failed.append(e)  # the others go on
    if failed:
        raise failed[0]


def is_frozen(place: str) -> bool:
    """Everybody there stands still, by a freezer of this place. Raises FileNotFoundError where it is gone."""
    state = Path(place, "freezer.state")
    if state.exists():
        return state.read_text().strip() == "FROZEN"
    return "frozen 1" in Path(place, "cgroup.events").read_text().splitlines()


def is_asked(place: str) -> bool:
    """Somebody has frozen it, whether all stand still yet or not. False where it is gone."""
    with contextlib.suppress(FileNotFoundError):
        state = Path(place, "freezer.state")
        if state.exists():
            return state.read_text().strip() != "THAWED"
        return Path(place, "cgroup.freeze").read_text().strip() == "1"
    return False


def hides_stopped(place: str) -> bool:
    """A tracer waits for ever there for a process that was stopped before it was frozen: v1, seen on 6.18. On v2 it gets it."""
    return Path(place, "freezer.state").exists()


def members(place: str) -> list[int]:
    """Who lives there, and in what is below it."""
    found: set[int] = set()
    for procs in [Path(place, "cgroup.procs"), *Path(place).rglob("*/cgroup.procs")]:
        with contextlib.suppress(OSError):
            found.update(map(int, procs.read_text().split()))
    return sorted(found)


def _write(place: str, *, frozen: bool) -> None:
    """Raises FileNotFoundError where it is gone: nothing is made here."""
    state = Path(place, "freezer.state")
    file, word = (state, "FROZEN" if frozen else "THAWED") if state.exists() else (Path(place, "cgroup.freeze"), str(int(frozen)))
    with open(file, "r+", encoding="ascii") as there:
        there.write(word)
