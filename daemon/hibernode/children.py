"""Processes this daemon has to wait for: those it spawned, and the orphans it adopted.

The daemon makes itself a subreaper: managed jobs and restored trees become its children when their parents go, and a zombie would keep
its pid, which CRIU needs free for a restore. `reap` waits for every child that ended, except those somebody here waits for himself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
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
        self,
        argv: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        given: int = subprocess.DEVNULL,
        out: int = subprocess.DEVNULL,
        err: int | None = None,
    ) -> subprocess.Popen[bytes]:
        """A helper process that its caller waits for with `wait`. It has a session of its own: no Ctrl-C meant for the daemon reaches
        it, and what CRIU restores into CRIU's session and process group (`shell_job`) is not in the daemon's, which one `kill(0)` ends."""
        with self._lock:  # so that reap() never sees it before it is in the book
            child = subprocess.Popen(
                list(argv),
                pass_fds=tuple(pass_fds),
                env=dict(env) if env is not None else None,
                stdin=given,
                stdout=out,
                stderr=out if err is None else err,
                cwd="/",
                start_new_session=True,
            )
            self._own.add(child.pid)
        return child

    def run(self, argv: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """A short command to its end: (exit code, what it said on both streams). One that cannot be started, or takes longer than
        `timeout` seconds, says why and has the code 127 or 124."""
        with tempfile.TemporaryFile() as out:
            try:
                child = self.spawn(argv, env=env, out=out.fileno())
            except OSError as e:
                return 127, f"{argv[0]}: {e.strerror}"
            try:
                code = self.wait(child, timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                self.wait(child)
                return 124, f"{argv[0]}: no answer within {timeout} s"
            out.seek(0)
            return code, out.read().decode(errors="replace")

    def wait(self, child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        code = child.wait(timeout)
        with self._lock:
            self._own.discard(child.pid)
        return code

    def helpers(self) -> set[int]:
        """Those that were spawned and not waited for yet."""
        with self._lock:
            return set(self._own)

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


def unprotect(pid: int) -> None:
    """Make `pid` the OOM killer's ordinary prey again, as `OOMScoreAdjust` of the daemon's unit is inherited: a workload must not have its
    protection. CRIU does not help: it restores every score but 0. Best effort."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("0")


def _children() -> set[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update(int(pid) for pid in (task / "children").read_text().split())
        except OSError:
            continue  # the thread has ended
    return pids
