"""A memory cgroup with a limit, on version 1 or 2, whichever this machine has for memory."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self


class MemoryGroup(AbstractContextManager["MemoryGroup"]):
    """Whoever is born into `procs` may use `limit` bytes, page cache included, and no swap."""

    def __init__(self, name: str, limit: int) -> None:
        root, self._version = _hierarchy()
        self._place, self._limit = root / f"{name}-{os.getpid()}", limit

    def __enter__(self) -> Self:
        if self._version == 2:
            (self._place.parent / "cgroup.subtree_control").write_text("+memory")
        self._place.mkdir()
        self._write(("memory.limit_in_bytes", "memory.max"), self._limit)
        self._write(("memory.memsw.limit_in_bytes", "memory.swap.max"), self._limit if self._version == 1 else 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._place.rmdir()

    @property
    def procs(self) -> Path:
        return self._place / "cgroup.procs"

    def leave(self, pid: int) -> None:
        """That process goes to where the group is; harmless where it has ended."""
        with suppress(ProcessLookupError):
            (self._place.parent / "cgroup.procs").write_text(str(pid))

    @property
    def peak(self) -> int:
        """The most bytes that were charged at once; the page cache, which gives way, is among them."""
        return int(self._file("memory.max_usage_in_bytes", "memory.peak").read_text())

    @property
    def oom_kills(self) -> int:
        return self._numbers(self._file("memory.oom_control", "memory.events"))["oom_kill"]

    def _file(self, first: str, second: str) -> Path:
        return self._place / (first if self._version == 1 else second)

    def _write(self, names: tuple[str, str], value: int) -> None:
        file = self._file(*names)
        if file.exists():  # without swap accounting there is no such file
            file.write_text(str(value))

    def _numbers(self, file: Path) -> dict[str, int]:
        return {key: int(value) for key, value in re.findall(r"^(\w+) (\d+)$", file.read_text(), re.MULTILINE)}


def _hierarchy() -> tuple[Path, int]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, where, kind, options, *_ in mounts:
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(where), 1
        if kind == "cgroup2" and "memory" in (Path(where) / "cgroup.controllers").read_text().split():
            return Path(where), 2
    raise RuntimeError("no cgroup of this machine limits memory")
