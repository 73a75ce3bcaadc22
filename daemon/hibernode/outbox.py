"""Events on disk until the broker has them: a broker that is away delays a status and never loses one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


class Outbox:
    """A queue of small files in order of their names. `add` from any thread; `waiting` and `sent` from one reader."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._lock = directory, threading.Lock()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        names = self._names()
        self._next = int(names[-1].split("-")[0]) + 1 if names else 1

    def _names(self) -> list[str]:
        return sorted(name for name in os.listdir(self._directory) if name[0].isdecimal() and name.endswith(".json"))

    def add(self, message_id: str, data: bytes) -> None:
        """Durable when it returns. `message_id` has the form `<action id>.<seq>`."""
        with self._lock:
            name = f"{self._next:016d}-{message_id}.json"
            self._next += 1
        temporary = self._directory / f".{name}"
        with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._directory / name)
        directory = os.open(self._directory, os.O_DIRECTORY)
        try:
            os.fsync(directory)  # else the new name may be lost with the power
        finally:
            os.close(directory)

    def waiting(self) -> Iterator[tuple[str, str, bytes]]:
        """(token, message id, data) of every event not sent yet, oldest first."""
        for name in self._names():
            with contextlib.suppress(FileNotFoundError):  # sent meanwhile, by a second reader that flushes at the end
                yield name, name.removesuffix(".json").split("-", 1)[1], (self._directory / name).read_bytes()

    def sent(self, token: str) -> None:
        (self._directory / token).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._names())
