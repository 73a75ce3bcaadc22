"""The keeper of a lazy restore: a process of its own, which sees to it that no tree runs on when its pages will not come.

Such a tree reads what it has not yet through userfaultfds, and the filler (`filler.py`), a child of the keeper, holds them. When the last
copy of one is closed, the kernel takes what is missing for zeros, and the tree calculates with them. So whoever is left when something dies
has to hold them until nobody of the tree is there any more: not the daemon, which may die itself, and not the filler, which may, too.

The keeper traces the filler, for one thing alone: a traced process stands still at the beginning of its end
(PTRACE_EVENT_EXIT), whatever ends it, SIGKILL too, and has all its descriptors still. If it ends otherwise than well, or the daemon's end
of the control socket is closed before all pages are in, the tree is killed and waited for; only then may it close them. Children that the
tree has forked meanwhile have userfaultfds of their own, which are the filler's from the moment that it reads of them: so there is
no moment in which one is held by nobody. That this kernel does stop it there is tried out with a child before anything is restored.

What is left: keeper and filler SIGKILLed both, before the daemon has killed the tree for the first of them (milliseconds). For that reason
the keeper lives in a cgroup of its own: who kills the daemon's does not meet it. A filler whose keeper is gone holds on to what it has
until nobody lacks a page.

Standard library only, and run without site-packages (`python -S`): it starts in 30 ms, and takes 10 MiB, and as much for the filler.
One thread. Messages are JSON, one for each packet. In: where the images are, and `{"tree": [[pid, start time], ...]}` when it runs, or `{}`
with the daemon's end of CRIU's socket, where CRIU holds the tree until all is in: it lets it run if that is closed. Out:
`{"ready": true}` when CRIU may restore; then `{"in": true}`, or, with nobody of the tree left, `{"lost": reason, "killed": pids}`; or at
once `{"unfit": reason}`, for a kernel where all this would not hold.
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

from hibernode import filler

CRIU_ENDED = "CRIU has ended, which held it"
Identity = tuple[int, int]  # of a process: pid and start time

_CONT, _SEIZE, _GETEVENTMSG, _LISTEN = 7, 0x4206, 0x4201, 0x4208  # include/uapi/linux/ptrace.h
_TRACE_EXIT, _EVENT_EXIT, _EVENT_STOP = 0x40, 6, 128
_WALL = 0x40000000
_USERFAULTFD, _PIDFD_GETFD = 323, 438  # x86-64
_API = struct.Struct("=QQQ")  # struct uffdio_api: api, features, ioctls
_UFFDIO_API, _UFFD_API = 0xC018AA3F, 0xAA
_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6  # of fork, remap, remove, unmap: without them a child would read zeros
_RECENT = 1 << 11  # UFFD_FEATURE_EXACT_ADDRESS, of Linux 5.18: it counts the changes that it holds up, and knows UFFDIO_CONTINUE
_UFFD = "anon_inode:[userfaultfd]"
_LOOK = 0.005  # seconds between two looks at who is left
_START = 20.0  # seconds for the filler to listen; 2 ms are usual
LOG = "filler.log"  # in the images' directory
_MOST = 1 << 20  # bytes of a message
_SPARE = 12  # descriptors that are kept for the end: three are needed at once
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # who shuts the machine down ends the tree, and so the keeper
_NEVER = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # what a kernel says that will say so again
_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)  # of a process, or a cgroup; any other error says nothing of who is left
_KIDS = 100  # pids that are told

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def main(words: Sequence[str]) -> int:
    """`words`: the numbers of the control socket, of the page socket's end for the filler, and of the memory that it shares. Or `unfit`:
    say on stdout what `unfit` says."""
    if words == ["unfit"]:
        print(unfit())
        return 0
    control, pages, memory = socket.socket(fileno=int(words[0])), int(words[1]), int(words[2])
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a userfaultfd for each process of the tree
    if reason := unfit():
        _say(control, unfit=reason)
        return 1
    data = control.recv(_MOST)  # empty: nothing comes, the restore has failed before
    return Keeper(control, pages, memory, json.loads(data)).run() if data else 0


def unfit() -> str:
    """Why nothing can be filled safely here; empty if it can. OSError if that cannot be found out now."""
    try:
        os.close(_userfaultfd())
    except OSError as e:
        if e.errno not in _NEVER:
            raise
        return "no userfaultfd with the events fork, remap, remove and unmap, of Linux 5.18"
    return "" if _stands_still() else "a traced process that is killed does not stand still at its end (PTRACE_EVENT_EXIT)"


def _userfaultfd() -> int:
    descriptor: int = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise _error()
    try:
        _, features, _ = _API.unpack(fcntl.ioctl(descriptor, _UFFDIO_API, _API.pack(_UFFD_API, _EVENTS, 0)))
        if not features & _RECENT:
            raise OSError(errno.EOPNOTSUPP, "too old")
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
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, _WALL)
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
    """One lazy restore. `order`: the `table` of what comes late, the `images`, where CRIU looks for a socket, and `procs`, the files of the
    cgroups in which the tree is born."""

    def __init__(self, control: socket.socket, pages: int, memory: int, order: dict[str, Any]) -> None:
        self._control, self._pages, self._memory, self._order = control, pages, memory, order
        self._procs: list[str] = order["procs"]
        self._spare = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(_SPARE)]
        self._held: list[int] = []  # copies of userfaultfds
        self._criu: list[int] = []  # the daemon's end of its socket: CRIU would let a tree run when that is closed
        self._known: dict[Identity, None] = {}  # of the tree, wherever they live
        self._killed: dict[Identity, None] = {}
        self._pid, self._at_end = 0, False  # of the filler; whether it stands still at the beginning of its end

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
            return f"the filler cannot be started: {e}"
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
                return f"the filler ended {_how(code)}" if code or not listening else ""
            if ready & set(self._criu):
                return CRIU_ENDED
            if self._control.fileno() in ready and not self._hears():
                return "the daemon has gone"
            for descriptor in self._criu:
                poller.register(descriptor, 0)  # its end, and nothing else
            if status in ready:
                poller.unregister(status)
                if os.read(status, 1):
                    listening = True
                    _say(self._control, ready=True)
            if not listening and time.monotonic() > until:
                return "the filler does not listen"

    def _hears(self) -> bool:
        """What the daemon says; False if it has gone."""
        try:
            data, more, _, _ = self._control.recvmsg(_MOST, socket.CMSG_LEN(4), socket.MSG_DONTWAIT)  # recv_fds of 3.11 waits
        except OSError:
            return False
        self._criu += [int.from_bytes(each, sys.byteorder) for _, _, each in more]
        said = json.loads(data or b"{}")
        self._known.update(dict.fromkeys((pid, began) for pid, began in said.get("tree", ())))
        return bool(more) if data and not said else bool(data)

    def _start(self) -> int:
        """Where it says that it listens. It is seized before its first step: nobody could have given it a userfaultfd before."""
        (status, says), (waits, go) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        keeper = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            code = 127
            try:
                os.close(go)
                self._control.close()  # or nobody would see the end of the keeper
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, *_IGNORED):
                    signal.signal(number, signal.SIG_DFL)
                os.setsid()
                os.chdir(self._order["images"])
                os.dup2(os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), sys.stderr.fileno())
                os.read(waits, 1)
                code = _fill(says, socket.socket(fileno=self._pages), self._memory, self._order["table"], keeper)
            except Exception as e:  # noqa: BLE001 - no way out of here but one
                print(f"Error: the filler cannot start: {e!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        for descriptor in (waits, says, self._pages):  # who brings the pages is to see when they are wanted no more
            os.close(descriptor)
        try:
            _ptrace(_SEIZE, self._pid, 0, _TRACE_EXIT)
        finally:
            os.close(go)
        return status

    # --- how the filler is ------------------------------------------------------------------------------------------------

    def _ended(self) -> int | None:
        """The wait status of the filler, if it has ended, or is about to and not well: then it stands still. None: it goes on."""
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
            self._kill_held()
            for file in self._procs:  # whatever cannot be read
                self._kill_group(file)
            found, over = self._look()
            for who in found:
                _kill(who)
            self._killed.update(dict.fromkeys(found))
            quiet = quiet + 1 if over else 0
            time.sleep(_LOOK)

    def _kill_held(self) -> None:
        """Before who holds them: else they would run for a moment."""
        with contextlib.suppress(OSError):
            for pid in self._members() - {self._pid, os.getpid()}:
                if (stat := _stat(f"/proc/{pid}")) and stat[0] == "t":
                    _kill((pid, int(stat[19])))

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


def _fill(says: int, pages: socket.socket, memory: int, table: str, keeper: int) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(filler.SOCKET)
        listening.listen()
        os.write(says, b".")
        return filler.main(listening, pages, memory, table, keeper)


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
