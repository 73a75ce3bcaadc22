"""Real programs to checkpoint, and the proof that what was restored is the old process.

A program says who it is in lines `beat <token> <counter> <what it holds>`: the token is random and made by the program itself, the
counter goes up, the rest is a checksum that must not change. After a restore the same token with a higher counter can only come from the
process that was dumped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from hibernode._pb import hibernode_pb2 as pb
from tests import keeper
from tests.daemon import Daemon, pid_target, ready
from tests.keeper import Kept, wait_until

PROGRAMS = Path(__file__).parent / "programs"
LIMIT = 20.0  # seconds for a program to do what takes it a few milliseconds


def python(program: str, *arguments: object) -> list[str]:
    """A program of ours; -S -E: nothing of the environment's packages, so that its tree is small and starts fast."""
    return [sys.executable, "-S", "-E", str(PROGRAMS / program), *map(str, arguments)]


@dataclass(frozen=True)
class Beat:
    token: str
    counter: int
    content: tuple[str, ...]


def beats(lines: Sequence[str]) -> list[Beat]:
    found = [line.split() for line in lines]
    return [Beat(words[1], int(words[2]), tuple(words[3:])) for words in found if words[:1] == ["beat"] and len(words) > 2]


class Program(AbstractContextManager["Program"]):
    """A process of its own: own session, output appended to a file. Gone after the `with`, restored or not."""

    def __init__(
        self, directory: Path, argv: Sequence[str], *, env: dict[str, str] | None = None, stdin: int | None = None
    ) -> None:
        self.log = directory / "output"
        self.log.touch()
        self._kept = Kept(argv, self.log, env=env, cwd=directory, stdin=subprocess.DEVNULL if stdin is None else stdin)
        self.pid = self._kept.pid
        self._killed_at = 0

    @property
    def target(self) -> pb.Target:
        return pid_target(self.pid)

    def lines(self) -> list[str]:
        """What it said since the last `kill`, in whole lines."""
        return self.log.read_bytes()[self._killed_at :].decode(errors="replace").rpartition("\n")[0].splitlines()

    def said(self, word: str) -> list[str]:
        """What follows `word` on the line that begins with it; waits for that line."""
        wait_until(lambda: not keeper.alive(self.pid) or any(line.split()[:1] == [word] for line in self.lines()), LIMIT, word)
        return next(line.split()[1:] for line in reversed(self.lines()) if line.split()[:1] == [word])

    def beat(self) -> Beat:
        """The last one; waits for the first."""
        wait_until(lambda: beats(self.lines()) or not keeper.alive(self.pid), LIMIT, f"a beat of {self.log}")
        return beats(self.lines())[-1]

    def next_beat(self, after: Beat) -> Beat:
        """Two beats after `after`, so that one of them was begun after it."""
        wait_until(lambda: self.beat().counter > after.counter + 1, LIMIT, f"a beat after {after} in {self.log}")
        return self.beat()

    def kill(self) -> None:
        """The whole tree; returns when its pids are free."""
        keeper.kill_tree(self.pid)
        self._killed_at = self.log.stat().st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._kept.kill()


class Untouched(AbstractContextManager["Untouched"]):
    """Inside, something is refused or fails; after it the program must be the same process, neither stopped nor traced, and go on."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._before = program.beat()
        self._identity = keeper.identity(program.pid)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            now = self._program.next_beat(after=self._program.beat())
            assert keeper.identity(self._program.pid) == self._identity
            assert keeper.state(self._program.pid) in ("R", "S", "D"), keeper.state(self._program.pid)  # D: it writes, and waits
            assert (now.token, now.content) == (self._before.token, self._before.content)


def goes_on(program: Program, before: Beat) -> Beat:
    """The restored program is the one of `before`: what it says since it was killed goes on from there, and never starts again."""
    now = program.next_beat(after=before)
    said = beats(program.lines())
    assert {beat.token for beat in said} == {before.token}
    assert {beat.content for beat in said} == {before.content}
    counters = [beat.counter for beat in said]
    assert counters == list(range(counters[0], counters[0] + len(said)))
    assert counters[0] > before.counter
    return now


def change(program: Program) -> None:
    """Of `changing.py`: so many of its pages as it was told, at random; a beat of what it holds then has come."""
    times = len([line for line in program.lines() if line.startswith("changed ")])
    os.kill(program.pid, signal.SIGUSR1)
    wait_until(lambda: len([line for line in program.lines() if line.startswith("changed ")]) > times, LIMIT, "its change")
    checksum = program.said("changed")[1]
    wait_until(lambda: program.beat().content == (checksum,), LIMIT, "a beat after its change")


def checkpointed(daemon: Daemon, program: Program, **overrides: object) -> pb.Event:
    """Checkpoint it to `ready`, and kill the tree: nothing of it is left but what is in the store."""
    done = daemon.settled(ready(daemon.checkpoint(program.target, **overrides)))
    program.kill()
    return done
