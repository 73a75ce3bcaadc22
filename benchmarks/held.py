"""What `programs/held.c` says, and what that proves: how long it stood still, and that what goes on is the old process."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.keeper import wait_until

LIMIT = 300.0  # seconds for anything
BOUNDARY = 64  # MiB: what the program holds is so many times this, or less
_PROGRAM = Path(__file__).parent / "programs" / "held.c"

Lines = Callable[[], Sequence[str]]


class Beat(NamedTuple):
    token: str
    number: int
    checks: int
    state: str
    at: int  # ns


def build(into: Path) -> Path:
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", into, _PROGRAM, "-lm"], check=True)
    return into


def beats(lines: Sequence[str]) -> list[Beat]:
    words = [line.split() for line in lines if line.startswith("beat ")]
    return [Beat(word[1], int(word[2]), int(word[3]), word[4], int(word[5])) for word in words if len(word) == 6]


def pause(lines: Lines, began: float) -> float:
    """Seconds: the longest gap since then, of any of its processes."""
    now = time.time_ns()
    wait_until(lambda: beats(lines()[-3:])[-1:] and beats(lines()[-3:])[-1].at > now, LIMIT, "a beat")
    gaps = [tuple(map(int, line.split()[1:3])) for line in lines() if line.startswith("gap ")]
    return max((to - since for since, to in gaps if to > began * 1e9), default=0) / 1e9


def goes_on(lines: Lines, planted: Beat, began: float) -> Beat:
    """The first beat of what was restored: of the process that had that beat before its checkpoint, or this is no restore."""
    wait_until(lambda: beats(lines()), LIMIT, "a beat of what was restored")
    first = beats(lines())[0]
    insist_same(planted, first, began)
    return first


def insist_same(planted: Beat, first: Beat, began: float) -> None:
    if first.at < began * 1e9:
        raise RuntimeError(f"a beat of before its restore: {first}")
    if first.token != planted.token or first.number <= planted.number:
        raise RuntimeError(f"another process: {planted}, {first}")


def insist_whole(planted: Mapping[str, Beat], last: Mapping[str, Beat]) -> None:
    """All of the memory, of each of them, is what it wrote before anything was measured. `last`: after it has looked."""
    for token, before in planted.items():
        if token not in last or last[token].state != "whole":
            raise RuntimeError(f"not what it was: {before}, {last.get(token)}")
