"""Stops processes, and has one thread of a stopped process run: signals and ptrace, for `gpu.design = "stop"`. No other file has ptrace,
but for the keeper of a lazy restore (`hibernode.keeper`), a program that stands alone.

A driver's call is served by a thread of the target (its restore thread). Of a process that SIGSTOP holds, a tracer can let that one thread
run: it seizes it and continues it, and the stop stays in force for all others. What the kernel does with such a thread, and is used here
(ptrace(2), "Group-stop"; tried on 6.x): seized, it traps by itself, so that nobody interrupts it; while it runs, a SIGCONT or a further
SIGSTOP to its process makes it trap again, so that somebody has to look; let go by its tracer, or when that dies, it stands still as the
others do if the stop is in force.

What can go wrong and does not end well by itself: a thread that stands still may hold a lock (malloc's, say) that the restore thread
waits for, and a thread that is born meanwhile stands still from its first moment. So a restore thread that waits for the same lock for
`STALL` seconds gets the others to run until its call has returned: what this design promises is then not kept for that moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import queue
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hibernode.ports import Identity

STALL = 1.0  # seconds in one and the same wait for a lock, before its holder is taken to stand still
_TEND = 0.01  # seconds between two looks at threads that run
_TRAP = 2.0  # seconds for a thread to come to its tracer; it takes less than a millisecond
_LOOK = 0.001  # seconds
_CONT, _DETACH, _SEIZE, _INTERRUPT, _SETSIGMASK = 7, 17, 0x4206, 0x4207, 0x420B  # include/uapi/linux/ptrace.h
_WALL = 0x40000000  # also a thread that is no child
_FUTEX: Final = ("202 ", "449 ", "455 ")  # x86-64: futex, futex_waitv, futex_wait
_AT_REST: Final = {"T", "Z", "X"}
_NAME = re.compile(r"cuda[0-9a-f]+\n")  # what the driver calls its restore thread (gpu.md, section 2)
# What a fault raises in the thread itself: blocked, it would kill the process.
_FAULTS: Final = (signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS)
_EVERYTHING: Final = 2**64 - 1 - sum(1 << (number - 1) for number in _FAULTS)
_log = logging.getLogger("hibernode.gpu")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Lost(Exception):
    """The restore thread cannot be had to run alone: it is not there, or somebody else traces it."""


# --- processes -----------------------------------------------------------------------------------------------------------------


def started(pid: int) -> int:
    """In clock ticks since boot; 0 for nobody."""
    return int((_stat(f"/proc/{pid}") or "0").split()[-1])


def is_there(who: Identity) -> bool:
    """A zombie is not: it has nothing left, and answers nobody."""
    return started(who[0]) == who[1] and bool(states(who[0]) - {"Z", "X"})


def is_stopped(pid: int) -> bool:
    """Or will be, as soon as it comes to run (as `proc.stops` of the workloads' driver)."""
    pending = int(_status(f"/proc/{pid}", "ShdPnd") or "0", 16)
    return bool(pending >> (signal.SIGSTOP - 1) & 1) or "T" in states(pid)


def states(pid: int) -> set[str]:
    """Of all its threads."""
    return {found.split()[0] for task in _tasks(pid) if (found := _stat(task))}


def stop(processes: Sequence[Identity], seconds: float) -> dict[Identity, str]:
    """SIGSTOP them, and wait until no thread of them runs. Who does not stop in time, and the state that keeps it from it."""
    for who in processes:
        send(who, signal.SIGSTOP)
    return wait_stopped(processes, seconds)


def wait_stopped(processes: Iterable[Identity], seconds: float) -> dict[Identity, str]:
    """As `stop`, which somebody has done already."""
    limit, left = time.monotonic() + seconds, list(processes)
    while left := [who for who in left if is_there(who) and not states(who[0]) <= _AT_REST]:
        if time.monotonic() > limit:
            return {who: "".join(sorted(states(who[0]) - _AT_REST)) for who in left}
        time.sleep(_LOOK)
    return {}


def go_on(processes: Iterable[Identity], seconds: float) -> None:
    """SIGCONT. To who is traced when that has ended, at the latest after so many seconds: a CRIU that rolls back a dump of stopped
    processes stops them again as it leaves."""
    limit, left = time.monotonic() + seconds, list(processes)
    while left:
        late = time.monotonic() > limit
        for who in [each for each in left if late or not _is_traced(each)]:
            send(who, signal.SIGCONT)
            left.remove(who)
        if left:
            time.sleep(_LOOK)


def send(who: Identity, number: signal.Signals) -> None:
    """To this very process, if it is there."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(who[0])
        try:
            if is_there(who):
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def _is_traced(who: Identity) -> bool:
    """By its first thread, which is none that we trace."""
    return is_there(who) and _status(f"/proc/{who[0]}", "TracerPid") not in ("", "0")


# --- threads -------------------------------------------------------------------------------------------------------------------


def restore_thread(pid: int) -> int:
    """By its name, which needs no answer of the driver's; 0 if there is none, or more than one."""
    found = [task for task in _tasks(pid) if _NAME.fullmatch(_read(f"{task}/comm"))]
    return int(Path(found[0]).name) if len(found) == 1 else 0


def blocked(pid: int, thread: int) -> int:
    """Its signal mask."""
    return int(_status(f"/proc/{pid}/task/{thread}", "SigBlk") or "0", 16)


def stands(pid: int, thread: int) -> bool:
    return (_stat(f"/proc/{pid}/task/{thread}") or "?").startswith("T")


def _tasks(pid: int) -> list[str]:
    try:
        return [f"/proc/{pid}/task/{name}" for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _stat(place: str) -> str:
    """Its fields from the state to the start time; empty if it is gone."""
    return " ".join(_read(f"{place}/stat").rpartition(")")[2].split()[:20])


def _status(place: str, field: str) -> str:
    found = re.search(rf"^{field}:\t(\w+)$", _read(f"{place}/status"), re.MULTILINE)
    return found[1] if found else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


# --- ptrace --------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A thread that runs alone, or is about to come to rest."""

    who: Identity
    thread: int
    mask: int  # what it gets back
    came: bool = False  # it has come to its tracer, and runs
    leaving: bool = False
    waits_for: str = ""  # the lock, since
    since: float = 0.0
    stalled: bool = False  # the others were let run for it


class Tracer:
    """The kernel takes ptrace calls for a thread from the one that seized it: here all come from one, which looks after all that run."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._runs: dict[int, Run] = {}  # by thread; of the one thread alone
        threading.Thread(target=self._work, name="ptrace", daemon=True).start()

    @contextmanager
    def running(self, who: Identity, thread: int, mask: int) -> Iterator[Run]:
        """Inside, that thread of a stopped process runs, with all signals blocked that nobody raises by a fault; afterwards it stands still
        again, with `mask`. Raises Lost if it cannot be had; one that ends meanwhile is no error."""
        run = Run(who, thread, mask)
        self._ask(lambda: self._begin(run))
        try:
            yield run
        finally:
            self._ask(lambda: self._end(run))

    def give_back(self, who: Identity, thread: int, mask: int) -> None:
        """The mask of a thread whose tracer has died; not of one that runs for us, which gets it back anyway."""
        if blocked(who[0], thread) != mask:
            self._ask(lambda: self._put(Run(who, thread, mask)))

    def _ask(self, work: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self._asked.put((work, done))
        done.result()

    def _work(self) -> None:
        while True:
            try:
                work, done = self._asked.get(timeout=_TEND if self._runs else None)
            except queue.Empty:
                self._tend()
                continue
            try:
                done.set_result(work())
            except Exception as e:  # noqa: BLE001 - it is raised where the work was asked for
                done.set_exception(e)

    def _begin(self, run: Run) -> None:
        if run.thread in self._runs:
            raise Lost(f"thread {run.thread} runs for another call")
        by_itself = stands(run.who[0], run.thread)
        try:
            _ptrace(_SEIZE, run.thread)
            self._runs[run.thread] = run
            for patience in (_TRAP / 4, _TRAP) if by_itself else (_TRAP,):
                if patience == _TRAP:
                    _ptrace(_INTERRUPT, run.thread)  # it goes on by now
                self._tend_until(lambda: run.came or run.thread not in self._runs, patience)
                if run.came:
                    return
        except OSError as e:
            raise Lost(f"thread {run.thread} cannot be traced: {e}") from e
        run.leaving = True  # whenever it comes
        raise Lost(f"thread {run.thread} does not come to its tracer")

    def _end(self, run: Run) -> None:
        run.leaving = True
        if self._runs.get(run.thread) is run:
            with contextlib.suppress(OSError):  # it has ended
                _ptrace(_INTERRUPT, run.thread)
            self._tend_until(lambda: run.thread not in self._runs)

    def _put(self, run: Run) -> None:
        if run.thread not in self._runs:
            with contextlib.suppress(Lost):
                self._begin(run)
                self._end(run)

    def _tend_until(self, there: Callable[[], bool], seconds: float = _TRAP) -> None:
        limit = time.monotonic() + seconds
        while not there() and time.monotonic() < limit:
            self._tend()
            if not there():
                time.sleep(_LOOK / 5)

    def _tend(self) -> None:
        for run in list(self._runs.values()):
            try:
                found, status = os.waitpid(run.thread, _WALL | os.WNOHANG)
                if found and not os.WIFSTOPPED(status):
                    del self._runs[run.thread]  # it has ended
                elif found:
                    self._answer(run, 0 if status >> 16 else os.WSTOPSIG(status))
                elif run.came and not run.leaving:
                    self._look_for_stall(run)
            except (ChildProcessError, ProcessLookupError):
                self._runs.pop(run.thread, None)

    def _answer(self, run: Run, number: int) -> None:
        """It traps: for us, or because of a signal, which it gets."""
        if run.leaving:
            _set_mask(run.thread, run.mask)
            _ptrace(_DETACH, run.thread, 0, number)
            del self._runs[run.thread]
            return
        if not run.came:
            _set_mask(run.thread, _EVERYTHING)
        _ptrace(_CONT, run.thread, 0, number)
        run.came = True

    def _look_for_stall(self, run: Run) -> None:
        waits_for = _read(f"/proc/{run.who[0]}/task/{run.thread}/syscall")
        if not waits_for.startswith(_FUTEX) or waits_for != run.waits_for:
            run.waits_for, run.since = waits_for, time.monotonic()
        elif not run.stalled and time.monotonic() - run.since > STALL:
            run.stalled = True
            _log.warning(
                "pid %d: its driver waits for a lock that a stopped thread may hold: all run until it answers", run.who[0]
            )
            send(run.who, signal.SIGCONT)


def _set_mask(thread: int, mask: int) -> None:
    raw = ctypes.create_string_buffer(struct.pack("=Q", mask), 8)
    _ptrace(_SETSIGMASK, thread, 8, ctypes.addressof(raw))


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
