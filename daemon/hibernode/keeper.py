"""The keeper of a lazy restore: a process of its own, which sees to it that no tree runs on when its pages will not come.

Such a tree reads what it has not yet through userfaultfds, and `criu lazy-pages` holds them. When the last copy of one is closed, the
kernel takes what is missing for zeros, and the tree calculates with them. So whoever is left when something dies has to hold them until
nobody of the tree is there any more: not the daemon, which may die itself, and not `criu lazy-pages`, which ends when its pages end.

The keeper starts `criu lazy-pages` and traces it, for one thing alone: a traced process stands still at the beginning of its end
(PTRACE_EVENT_EXIT), whatever ends it, SIGKILL too, and has all its descriptors still. If it ends otherwise than well, or the daemon's end
of the control socket is closed before all pages are in, the tree is killed and waited for; only then may it close them. Children that the
tree has forked meanwhile have userfaultfds of their own, which are `criu lazy-pages`' from the moment that it reads of them: so there is
no moment in which one is held by nobody. That this kernel does stop it there is tried out with a child before anything is restored.

What is left: faults of `criu lazy-pages` while it is well (docs/operations.md, "Lazy restores"); and keeper and `criu lazy-pages` SIGKILLed
both, before the daemon has killed the tree for the first of them (milliseconds). For that reason the keeper lives in a cgroup of its own:
who kills the daemon's does not meet it.

Standard library only, and run by its path (`python -I -S`): it starts in 20 ms, and takes 9 MiB. One thread. Messages are JSON, one for
each packet. In: what to start, and `{"tree": [[pid, start time], ...]}` when it runs. Out: `{"ready": true}` when CRIU may restore; then
`{"in": true}`, or, with nobody of the tree left, `{"lost": reason, "killed": pids}`; or at once `{"unfit": reason}`, for a kernel where
all this would not hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

Identity = tuple[int, int]  # of a process: pid and start time

_CONT, _SEIZE, _GETEVENTMSG, _LISTEN = 7, 0x4206, 0x4201, 0x4208  # include/uapi/linux/ptrace.h
_TRACE_EXIT, _EVENT_EXIT, _EVENT_STOP = 0x40, 6, 128
_WALL = 0x40000000
_USERFAULTFD, _PIDFD_GETFD = 323, 438  # x86-64
_API = struct.Struct("=QQQ")  # struct uffdio_api: api, features, ioctls
_UFFDIO_API, _UFFD_API = 0xC018AA3F, 0xAA
_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # of fork, remap, remove, unmap: without them a child would read zeros
_UFFD = "anon_inode:[userfaultfd]"
_LOOK = 0.005  # seconds between two looks at who is left
_START = 20.0  # seconds for `criu lazy-pages` to listen; 20 ms are usual
_MOST = 1 << 20  # bytes of a message
_SPARE = 12  # descriptors that are kept for the end: three are needed at once
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # who shuts the machine down ends the tree, and so the keeper
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)  # of a process, or a cgroup; any other error says nothing of who is left
_KIDS = 100  # pids that are told

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def main(words: Sequence[str]) -> int:
    """`words`: the numbers of the control socket and of the page socket's end for `criu lazy-pages`."""
    control, pages = socket.socket(fileno=int(words[0])), int(words[1])
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a userfaultfd for each process of the tree
    if reason := unfit():
        _say(control, unfit=reason)
        return 1
    data = control.recv(_MOST)  # empty: nothing comes, the restore has failed before
    return Keeper(control, pages, json.loads(data)).run() if data else 0


def unfit() -> str:
    """Why a lazy restore would not be safe here; empty if it is."""
    with contextlib.suppress(OSError):
        os.close(_userfaultfd())
        return "" if _stands_still() else "a traced process that is killed does not stand still at its end (PTRACE_EVENT_EXIT)"
    return "no userfaultfd with the events fork, remap, remove and unmap"


def _userfaultfd() -> int:
    descriptor: int = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise _error()
    try:
        fcntl.ioctl(descriptor, _UFFDIO_API, _API.pack(_UFFD_API, _EVENTS, 0))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _stands_still() -> bool:
    """A child that is killed, twice, still has its descriptors: 2 ms."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        while True:
            signal.pause()
    os.close(writing)
    os.set_blocking(reading, False)
    try:
        _ptrace(_SEIZE, pid, 0, _TRACE_EXIT)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, _WALL)
        if not os.WIFSTOPPED(status):
            return False  # and reaped
        os.kill(pid, signal.SIGKILL)
        held = status >> 16 == _EVENT_EXIT and _is_open(reading)
        _ptrace(_CONT, pid, 0, 0)
        os.waitpid(pid, _WALL)
    except OSError:
        return False
    finally:
        os.close(reading)
    return held


def _is_open(reading: int) -> bool:
    """The other end of a pipe, from which nothing comes."""
    try:
        return os.read(reading, 1) != b""
    except BlockingIOError:
        return True


class Keeper:
    """One lazy restore. `order`: the `argv` of `criu lazy-pages` without its descriptors, its `env`, the directory `cwd`, and `procs`, the
    files of the cgroups in which the tree is born."""

    def __init__(self, control: socket.socket, pages: int, order: dict[str, Any]) -> None:
        self._control, self._pages, self._order = control, pages, order
        self._procs: list[str] = order["procs"]
        self._spare = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(_SPARE)]
        self._held: list[int] = []  # copies of userfaultfds
        self._known: dict[Identity, None] = {}  # of the tree, wherever they live
        self._killed: dict[Identity, None] = {}
        self._pid, self._at_end = 0, False  # of `criu lazy-pages`; whether it stands still at the beginning of its end

    def run(self) -> int:
        """Until all is in, or nobody is left."""
        try:
            reason = self._watch()
        except Exception as e:  # noqa: BLE001 - whatever it is: who ended for it would let go of all at once
            reason = f"the keeper has failed: {e!r}"
        if not reason:
            _say(self._control, **{"in": True})
            return 0
        while True:
            try:
                return self._lose(reason)
            except Exception:  # noqa: BLE001 - no memory, no descriptors: nobody has been seen to be gone, so again
                time.sleep(_LOOK)

    def _watch(self) -> str:
        """Why the tree is lost; empty when all is in."""
        woken, waking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        try:
            status = self._start()
        except OSError as e:
            return f"criu lazy-pages cannot be started: {e}"
        poller, until = select.poll(), time.monotonic() + _START
        for descriptor in (woken, self._control.fileno(), status):
            poller.register(descriptor, select.POLLIN)
        listening = False
        while True:
            ready = {number for number, _ in poller.poll(None if listening else _START * 1000)}
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
            if (code := self._ended()) is not None:
                self._hears()  # what was said before, if anything was
                return f"criu lazy-pages ended {_how(code)}" if code or not listening else ""
            if self._control.fileno() in ready and not self._hears():
                return "the daemon has gone"
            if status in ready:
                poller.unregister(status)
                if os.read(status, 1):
                    listening = True
                    _say(self._control, ready=True)
            if not listening and time.monotonic() > until:
                return "criu lazy-pages does not listen"

    def _hears(self) -> bool:
        """What the daemon says; False if it has gone."""
        try:
            data = self._control.recv(_MOST, socket.MSG_DONTWAIT)
        except OSError:
            return False
        if data:
            self._known.update(dict.fromkeys((pid, began) for pid, began in json.loads(data)["tree"]))
        return bool(data)

    def _start(self) -> int:
        """Where it says that it listens. It is seized before its first instruction: nobody could have given it a userfaultfd before."""
        (status, says), (waits, go) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        argv = [*self._order["argv"], "--ps-socket", str(self._pages), "--status-fd", str(says)]
        self._pid = os.fork()
        if not self._pid:
            with contextlib.suppress(OSError):
                os.close(go)
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, *_IGNORED):
                    signal.signal(number, signal.SIG_DFL)
                os.setsid()
                os.chdir(self._order["cwd"])
                os.set_inheritable(self._control.fileno(), False)
                for descriptor in (self._pages, says):
                    os.set_inheritable(descriptor, True)
                os.read(waits, 1)
                os.execve(argv[0], argv, self._order["env"])
            os._exit(127)
        for descriptor in (waits, says, self._pages):  # who serves the pages is to see when they are wanted no more
            os.close(descriptor)
        try:
            _ptrace(_SEIZE, self._pid, 0, _TRACE_EXIT)
        finally:
            os.close(go)
        return status

    # --- how criu lazy-pages is ----------------------------------------------------------------------------------------------

    def _ended(self) -> int | None:
        """The wait status of `criu lazy-pages`, if it has ended, or is about to and not well: then it stands still. None: it goes on."""
        while True:
            found, status = os.waitpid(self._pid, os.WNOHANG | _WALL)
            if not found:
                return None
            if not os.WIFSTOPPED(status):
                self._pid = 0
                return status
            number, event = status >> 8 & 0xFF, status >> 16
            if event == _EVENT_EXIT and (code := self._exit_status()):
                self._at_end = True
                return code
            if event == _EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
                self._go_on(_LISTEN, 0)
            else:
                self._go_on(_CONT, 0 if event else number)

    def _exit_status(self) -> int:
        found = ctypes.c_ulong()
        _ptrace(_GETEVENTMSG, self._pid, 0, ctypes.addressof(found))
        return int(found.value)

    def _go_on(self, request: int, number: int) -> None:
        with contextlib.suppress(OSError):  # killed meanwhile: its end is told next
            _ptrace(request, self._pid, 0, number)

    # --- ends ------------------------------------------------------------------------------------------------------------------

    def _lose(self, reason: str) -> int:
        """Nobody of the tree runs on with what it has. Returns when the last one has ended, however long that takes. To be repeated if it
        raises."""
        if self._pid and not self._held:
            self._hold()
        while self._spare:
            os.close(self._spare.pop())
        self._kill()
        self._let_go()
        _say(self._control, lost=reason, killed=[pid for pid, _ in self._killed][:_KIDS])
        return 2

    def _hold(self) -> None:
        """Copies of all its userfaultfds, as many as there is room for. It has them itself until it is let go on to its end, but here they
        are safe from a kernel that would let it go on for a second SIGKILL."""
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self._pid)
            try:
                for name in os.listdir(f"/proc/{self._pid}/fd"):
                    with contextlib.suppress(OSError):
                        if os.readlink(f"/proc/{self._pid}/fd/{name}") == _UFFD:
                            copy = _libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
                            self._held += [copy] if copy >= 0 else []
            finally:
                os.close(pidfd)

    def _kill(self) -> None:
        """SIGKILL whoever is known of the tree or lives in its cgroups, and who descends from them, until two looks in a row have found
        nobody: who is killed forks no more, so that it comes to its end."""
        quiet = 0
        while quiet < 2:
            try:
                found, over = self._look()
            finally:
                for file in self._procs:  # first, and whatever could not be read
                    self._kill_group(file)
            for who in found:
                _kill(who)
            self._killed.update(dict.fromkeys(found))
            quiet = quiet + 1 if over else 0
            time.sleep(_LOOK)

    def _kill_group(self, file: str) -> None:
        """By the kernel (cgroup v2), which misses nobody who is being forked; where it cannot, they are killed one by one."""
        with contextlib.suppress(OSError):
            descriptor = os.open(f"{os.path.dirname(file)}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
            try:
                if not {self._pid, os.getpid()} & _pids(file):
                    os.write(descriptor, b"1")
            finally:
                os.close(descriptor)

    def _look(self) -> tuple[list[Identity], bool]:
        """(who of the tree runs, whether it is sure that nobody does). The cgroups are asked before everybody is looked at, and again
        afterwards: of a chain that forks and exits each one is gone when it is looked at, and another has come."""
        before = self._members()
        stats = dict(_everybody())
        inside = before & stats.keys()
        inside |= {pid for pid, began in [*self._known, *self._killed] if pid in stats and stats[pid][1] == began}
        new = inside
        while new:
            new = {pid for pid, (parent, _) in stats.items() if parent in new and pid not in inside}
            inside |= new
        found = [(pid, stats[pid][1]) for pid in sorted(inside - {self._pid, os.getpid()}) if _runs(pid)]
        return found, not found and self._members() <= before

    def _members(self) -> set[int]:
        return {pid for file in self._procs for pid in _pids(file)}

    def _let_go(self) -> None:
        while self._held:
            os.close(self._held.pop())
        while self._pid:
            if self._at_end:
                self._go_on(_CONT, 0)
            else:
                os.kill(self._pid, signal.SIGKILL)
            self._ended()
            time.sleep(_LOOK if self._pid else 0)


def _say(control: socket.socket, **facts: object) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        control.send(json.dumps(facts).encode(), socket.MSG_NOSIGNAL)


def _how(status: int) -> str:
    return f"with signal {status & 0x7F}" if status & 0x7F else f"with exit status {status >> 8}"


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


# --- whom it kills -------------------------------------------------------------------------------------------------------------


def _everybody() -> Iterator[tuple[int, tuple[int, int]]]:
    """pid -> (parent, start time) of every process."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and (found := _stat(f"/proc/{name}")):
            yield int(name), (int(found[1]), int(found[19]))


def _stat(place: str) -> list[str]:
    """From the state on; empty for nobody."""
    try:
        with open(f"{place}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as e:
        return _gone(e)
    return text[text.rindex(")") + 2 :].split()


def _runs(pid: int) -> bool:
    """A thread of it has not ended: a zombie has no memory any more."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError as e:
        threads = _gone(e)
    return any((_stat(f"/proc/{pid}/task/{thread}") or "X")[0] not in ("Z", "X") for thread in threads)


def _pids(file: str) -> set[int]:
    """Empty when the cgroup is gone, and with it all who lived there."""
    try:
        with open(file, encoding="ascii") as procs:
            return {int(line) for line in procs}
    except OSError as e:
        return set(map(int, _gone(e)))


def _gone(error: OSError) -> list[str]:
    """Nobody, if the error says so."""
    if error.errno not in _GONE:
        raise error
    return []


def _kill(who: Identity) -> None:
    try:
        pidfd = os.pidfd_open(who[0])
    except ProcessLookupError:
        return
    try:
        if (_stat(f"/proc/{who[0]}") or ["0"] * 20)[19] == str(who[1]):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
