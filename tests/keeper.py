"""A process that keeps another one: starts it in a session of its own, adopts whatever that leaves behind, waits for all of them.

Init does so on a real machine, but in many containers nobody does, and a zombie keeps its pid, which a restore needs. A keeper ends when
nothing that descends from it is left: "has the keeper ended?" is the whole question whether a test leaves processes behind.

Run as a program, this file is the keeper itself. Standard library only, so that it starts fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

_PR_SET_CHILD_SUBREAPER = 36


class Kept:
    """One program under a keeper; `pid` is the program's own. What it says goes to the end of the file `log`."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = "/",
        join: Sequence[Path] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        """`join`: files of cgroups to write the program's pid into before it runs."""
        reading, writing = os.pipe()
        try:
            with open(log, "ab") as out:  # appending: CRIU compares the length of every other file at restore
                self._keeper = subprocess.Popen(
                    [sys.executable, "-I", __file__, str(writing), str(len(join)), *map(str, join), *argv],
                    stdin=stdin, stdout=out, stderr=out, env=None if env is None else dict(env), cwd=cwd, pass_fds=[writing],
                )  # fmt: skip
        finally:
            os.close(writing)
        self._reports: BinaryIO = open(reading, "rb", buffering=0)  # noqa: SIM115 - closed by `wait` or `kill`
        self.pid = int(self._reports.readline())

    def exit_code(self, timeout: float) -> int:
        """Wait until the program itself has ended; minus the signal that killed it."""
        wait_until(lambda: not alive(self.pid), timeout, f"the end of pid {self.pid}")
        return int(self._reports.readline() or b"-1")

    def left(self) -> list[int]:
        """Everything alive that descends from the keeper."""
        return [pid for pid in descendants(self._keeper.pid) if alive(pid)]

    def wait(self, timeout: float) -> None:
        """Until nothing is left. Raises TimeoutError that says what is."""
        try:
            self._keeper.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still there: {[describe(pid) for pid in self.left()]}") from None
        self._reports.close()

    def kill(self) -> None:
        """SIGKILL everything that is left, and wait for it. Harmless when repeated."""
        deadline = time.monotonic() + 20
        while self._keeper.poll() is None:
            for pid in self.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(0.02)
            if time.monotonic() > deadline:
                raise TimeoutError(f"does not die: {[describe(pid) for pid in self.left()]}")
        self._reports.close()


# --- /proc, as tests see it ---------------------------------------------------------------------------------------------------


def fields(pid: int) -> list[str]:
    """/proc/<pid>/stat from the state on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()


def state(pid: int) -> str:
    """As in proc(5); empty when there is no such process."""
    return "".join(fields(pid)[:1])


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def identity(pid: int) -> tuple[int, str]:
    """The pid and when it began: another process of the same pid has another one."""
    return pid, fields(pid)[19]


def describe(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} {state(pid)} {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode(errors='replace')}"
    return f"{pid} (gone)"


def descendants(root: int) -> list[int]:
    """Parents first, without `root`."""
    children = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdecimal() and (found := fields(int(name))):
            children[int(found[1])].append(int(name))
    found_pids: list[int] = []
    for pid in children[root]:
        found_pids.append(pid)
        children[root].extend(children[pid])
    return found_pids


def kill_tree(root: int, timeout: float = 20.0) -> None:
    """SIGKILL `root` and its descendants and wait until their pids are free: somebody must reap them."""
    pids = [root, *descendants(root)]
    kill_all(pids, timeout)
    wait_until(lambda: not any(fields(pid) for pid in pids), timeout, f"free pids {pids}")


def kill_all(pids: Sequence[int], timeout: float = 20.0) -> None:
    """SIGKILL these and wait until all their threads have ended (a zombie's may not have): their parent can reap them then."""
    deadline = time.monotonic() + timeout
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"does not die: {describe(pid)}")
        finally:
            os.close(pidfd)


def wait_until(condition: object, timeout: float, what: str) -> None:
    """Until the callable `condition` gives something true. TimeoutError names `what` was waited for."""
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.01)


# --- the keeper itself --------------------------------------------------------------------------------------------------------


def _keep(report: int, join: Sequence[str], argv: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_inheritable(report, False)
    child = os.fork()
    if not child:
        os.setsid()
        for procs in join:
            Path(procs).write_text("0")
        os.execvp(argv[0], argv)
    os.write(report, b"%d\n" % child)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.wait()
            if pid == child:
                with contextlib.suppress(BrokenPipeError):
                    os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    _count = int(sys.argv[2])
    _keep(int(sys.argv[1]), sys.argv[3 : 3 + _count], sys.argv[3 + _count :])
