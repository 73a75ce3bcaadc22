"""Processes this daemon has to wait for: those it spawned, and the orphans it adopted.

The daemon makes itself a subreaper: managed jobs and restored trees become its children when their parents go, and a zombie would keep
its pid, which CRIU needs free for a restore. `reap` waits for every child that ended, except those somebody here waits for himself.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from hibernode.errors import Internal

_PR_SET_CHILD_SUBREAPER = 36


class Children:
    """The book of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: set[int] = set()
        self._exits: dict[int, int] = {}

    def adopt_orphans(self) -> None:
        """Become the subreaper of everything that descends from this process."""
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise Internal(f"cannot become a subreaper: {os.strerror(ctypes.get_errno())}")

    def spawn(
        self, argv: Sequence[str], *, pass_fds: Sequence[int] = (), env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A helper process that its caller waits for with `wait`."""
        with self._lock:  # so that reap() never sees it before it is in the book
            child = subprocess.Popen(
                list(argv),
                pass_fds=tuple(pass_fds),
                env=dict(env) if env is not None else None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
            self._own.add(child.pid)
        return child

    def wait(self, child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        code = child.wait(timeout)
        with self._lock:
            self._own.discard(child.pid)
        return code

    def reap(self) -> None:
        """Wait for every other child that has ended; how it did is kept for `take_exits`. Never blocks."""
        with self._lock:
            for pid in _children() - self._own:
                try:
                    found, status = os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue
                if found:
                    self._exits[pid] = os.waitstatus_to_exitcode(status)

    def take_exits(self) -> dict[int, int]:
        """Who was reaped since the last call, by whichever thread: pid -> exit code (negative: the signal)."""
        with self._lock:
            exits, self._exits = self._exits, {}
        return exits


def _children() -> set[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update(int(pid) for pid in (task / "children").read_text().split())
        except OSError:
            continue  # the thread has ended
    return pids
