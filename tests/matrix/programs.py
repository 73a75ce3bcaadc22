"""The workloads, as the bench sees them: a small C program, or one that uses a GPU, with a child, which says in a file who it is, how far
it has counted and whether its memory is what it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import keeper
from tests.keeper import wait_until

SLOT = 96  # bytes, as in workload.c
PASS = 10  # beats in which all of its memory is compared, and some
MEMORY = 8  # MiB of the root
INTERVAL = 10_000  # microseconds between beats
BEAT_LIMIT = 5.0  # seconds a loaded machine may take for a pass


@dataclass(frozen=True)
class Beat:
    """What one process of it said last."""

    token: str
    counter: int
    wrong: int
    turns: int
    pid: int


Beats = tuple[Beat, ...]  # root and child, if it has one


class BeatFile:
    """Where a program says it. The length never changes, because CRIU compares it."""

    def __init__(self, path: Path, count: int) -> None:
        """`count`: processes of it."""
        self.path, self._count = path, count
        self.blank()

    def blank(self) -> None:
        """Forget what was said: what is found afterwards was said afterwards."""
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.write(b" " * SLOT * 2)
        else:
            self.path.write_bytes(b" " * SLOT * 2)

    def read(self) -> Beats:
        """All of them, or nothing while one has not said anything yet."""
        said = self._said()
        return said if len(said) == self._count else ()

    def slot(self, pid: int, later_than: Beat | None = None) -> Beat | None:
        """What the process `pid` of it said last, or says after `later_than`; None if it says nothing."""

        def said() -> Beat | None:
            found = next((beat for beat in self._said() if beat.pid == pid), None)
            return None if found and later_than and found.counter <= later_than.counter + PASS else found

        try:
            wait_until(said, BEAT_LIMIT, "a beat")
        except TimeoutError:
            return None
        return said()

    def _said(self) -> Beats:
        lines = [self.path.read_bytes()[at : at + SLOT].split() for at in (0, SLOT)]
        return tuple(Beat(words[0].decode(), *map(int, words[1:])) for words in lines if len(words) == 5)

    def wait(self, what: Callable[[Beats], bool] = bool, limit: float = BEAT_LIMIT) -> Beats:
        """The first that is as wanted; () if none comes."""
        try:
            wait_until(lambda: what(self.read()), limit, "a beat")
        except TimeoutError:
            return ()
        return self.read()

    def a_pass_after(self, before: Beats, limit: float = BEAT_LIMIT) -> Beats:
        """When both have compared all of their memory after `before`; () if one does not."""
        return self.wait(
            lambda now: bool(now) and all(n.counter >= b.counter + PASS for n, b in zip(now, before, strict=True)), limit
        )


def beat_file(path: Path, kind: str) -> BeatFile:
    return BeatFile(path, 1 if kind == "alone" else 2)


def build(directory: Path) -> Path:
    """Compile it. Static: nothing of this machine's libraries is in its images."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("there is no C compiler: install gcc")
    binary = directory / "workload"
    source = Path(__file__).with_name("workload.c")
    subprocess.run([compiler, "-O2", "-static", "-pthread", "-o", str(binary), str(source)], check=True)
    return binary


def command_line(kind: str, binary: Path, beats: BeatFile) -> list[str]:
    if kind == "gpu":
        return [sys.executable, "-m", "tests.matrix.cuda_workload", str(beats.path)]
    return [str(binary), str(beats.path), str(MEMORY), str(INTERVAL), *([kind] if kind == "alone" else [])]


def living(argv: Sequence[str]) -> list[int]:
    """Every process of it that has not ended, by what it executes and where it says it: pids and parents do not matter."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _executes(int(name), argv)]


def _executes(pid: int, argv: Sequence[str]) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[:-1] == [word.encode() for word in argv] and keeper.alive(pid)
    except OSError:
        return False


def held(pid: int) -> str:
    """Why it does not run: stopped, traced; empty if neither."""
    state = keeper.state(pid)
    if state in ("T", "t"):
        return f"state {state}"
    try:
        tracer = next(
            line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("TracerPid")
        )
    except (OSError, StopIteration):
        return ""
    return f"traced by {tracer}" if tracer != "0" else ""
