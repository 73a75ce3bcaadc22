"""What the daemon asks of the GPU helper, and what it hears: a line of JSON each way."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from hibernode.ports import Identity

AT_ONCE = 8  # processes of one question at the same time (as NVIDIA's own nvcf does); `patience` is for each round
Verb = Literal["probe", "lock", "halt", "checkpoint", "restore", "unlock", "resume", "undo", "park", "own"]


@dataclass(frozen=True)
class Question:
    """What is to be done to these processes, at the same time. `halt`: they stand still, all their threads, until `resume` or `undo`, or
    because of a call that hangs; the driver's own is had to run while it is asked something. `resume`: whatever it takes until they run;
    all are restored before the first is unlocked, and if `strict` and one is not restored, none. `undo`: that, of whatever the action
    still holds. `park`: they are about to be killed, so nothing of them is to be left on a GPU; from then on nobody brings it back.
    `own`: nothing; `mine` are the actions that the asking daemon answers for, until it says otherwise on this connection or hangs up."""

    verb: Verb
    action: str
    processes: list[Identity]
    timeout_ms: int = 0  # of a lock
    patience: float = 0.0  # seconds until an answer is wanted, whatever hangs; 0: for ever
    pairs: tuple[tuple[str, str], ...] = ()  # of a restore: UUIDs of GPUs, old and new
    strict: bool = False
    halted: list[Identity] = field(default_factory=list)  # of a resume: they were brought back as if somebody had halted them
    mine: list[str] = field(default_factory=list)  # actions, beside this one, that are no orphans while this connection is there

    def of(self, processes: list[Identity]) -> Question:
        return replace(self, processes=processes)

    @classmethod
    def of_line(cls, line: bytes) -> Question:
        """ValueError if it is none."""
        try:
            table = json.loads(line)
            ask = cls(**table)
            if ask.verb not in get_args(Verb):
                raise ValueError(f"nobody knows how to {ask.verb!r}")
            pairs = tuple((str(old), str(new)) for old, new in ask.pairs)
            return replace(ask, processes=_identities(ask.processes), pairs=pairs, halted=_identities(ask.halted))
        except (TypeError, AttributeError) as e:
            raise ValueError(f"no question: {e}") from e


def _identities(said: Sequence[Sequence[int]]) -> list[Identity]:
    return [(int(pid), int(start)) for pid, start in said]


@dataclass(frozen=True)
class Result:
    """Of one process. `ok`: it was done, or was so already; else one of the others says why not."""

    who: Identity
    ok: bool = False
    state: str = ""  # RUNNING, LOCKED, CHECKPOINTED, FAILED; "" where the driver did not say
    call: str = ""  # the driver's call that failed
    code: int = 0  # CUresult
    name: str = ""
    ms: float = 0.0  # how long it took
    gone: bool = False  # the process has ended
    halted: str = ""  # it cannot answer: T stopped, t traced, frozen. Of a halt that is `ok`: it was stopped before
    wedged: bool = False  # the call has not returned, and goes on


@contextlib.contextmanager
def address(directory: Path) -> Iterator[str]:
    """Of the helper's socket in `directory`, however long its name is: the kernel takes 107 bytes. OSError if it is not there."""
    place = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{place}/socket"
    finally:
        os.close(place)


def encode(said: Question | Sequence[Result]) -> bytes:
    table = asdict(said) if isinstance(said, Question) else [asdict(result) for result in said]
    return json.dumps(table).encode() + b"\n"


def decode_results(line: bytes) -> list[Result]:
    """ValueError if it is none."""
    try:
        found = [Result(**table) for table in json.loads(line)]
        return [replace(result, who=(int(result.who[0]), int(result.who[1]))) for result in found]
    except (TypeError, AttributeError) as e:
        raise ValueError(f"no answer: {e}") from e
