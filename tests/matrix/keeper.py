"""The process that starts the daemons and programs of one bench, and adopts and waits for whatever they leave behind.

It is a fork server: everything the daemon imports is imported before, so that a daemon is there at once. That is safe because nothing of
it has begun yet: no thread, no loop, and grpc is only imported. The bench speaks to it over a socket pair; when the bench is gone, the
keeper ends everything and itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hibernode import config, service
from hibernode.errors import HibernodeError
from tests import keeper as processes
from tests.matrix.dress import dress
from tests.matrix.script import MESSAGE, Plan, Script

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PDEATHSIG = 1


class Keeper:
    """The bench's end of it. One thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            with _ending():
                _Server(theirs).serve()
        theirs.close()
        self._socket = ours
        self._exits: dict[int, int] = {}

    def start_daemon(self, settings: Path, log: Path, plan: dict[str, object]) -> tuple[int, socket.socket]:
        """Its pid, and our end of its script's channel: the end of that is the end of the daemon."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            return self._ask({"start": "daemon", "config": str(settings), "log": str(log), "plan": plan}, [theirs.fileno()]), ours

    def start_program(self, argv: list[str], directory: Path, log: str = os.devnull, env: Mapping[str, str] | None = None) -> int:
        """In a session of its own, without input; what it says goes to the end of `log`. `env`: beside the bench's."""
        request = {"start": "program", "argv": argv, "cwd": str(directory), "log": log, "env": dict(env or {})}
        return self._ask(request, [])

    def _ask(self, request: dict[str, object], descriptors: list[int]) -> int:
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        while True:
            answer = json.loads(self._socket.recv(MESSAGE))
            if "pid" in answer:
                return int(answer["pid"])
            self._exits[answer["ended"]] = answer["code"]

    def exit_code(self, pid: int, timeout: float) -> int | None:
        """How it ended, minus the signal that killed it; None if it has not within `timeout` seconds."""
        while pid not in self._exits:
            if not select.select([self._socket], [], [], timeout)[0]:
                return None
            answer = json.loads(self._socket.recv(MESSAGE))
            self._exits[answer["ended"]] = answer["code"]
        return self._exits.pop(pid)

    def close(self) -> None:
        """End everything it has started, and itself."""
        self._socket.close()
        os.waitpid(self.pid, 0)


class _Server:
    """The keeper itself."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._mine: set[int] = set()

    def serve(self) -> None:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            readable, _, _ = select.select([self._channel, reading], [], [])
            if reading in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(reading, 4096)
                self._reap()
            if self._channel in readable:
                data, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE, 4)
                if not data:
                    return self._bury()
                self._start(json.loads(data), descriptors)

    def _start(self, request: dict[str, Any], descriptors: list[int]) -> None:
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._channel.close()
            with _ending():
                if request["start"] == "daemon":
                    _daemon(request, descriptors[0])
                else:
                    _program(request)
        for descriptor in descriptors:
            os.close(descriptor)
        self._mine.add(pid)
        self._say({"pid": pid})

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid in self._mine:
                    self._mine.discard(pid)
                    self._say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def _say(self, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # the bench has gone
            self._channel.send(json.dumps(message).encode())

    def _bury(self) -> None:
        """SIGKILL everything that descends from it, until nothing does."""
        while left := processes.descendants(os.getpid()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)


@contextlib.contextmanager
def _ending() -> Any:
    """A forked child never returns into what was forked."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _daemon(request: dict[str, Any], channel: int) -> NoReturn:
    """The real daemon with its real drivers, dressed. As `hibernode node` would be: own session, nothing on its input."""
    os.setsid()
    _redirect(request["log"])
    for name in [name for name in os.environ if name.startswith("HIBERNODE_")]:
        del os.environ[name]
    os.set_inheritable(channel, False)
    script = Script(socket.socket(fileno=channel), Plan(**request["plan"]))
    try:
        service.run(config.load(Path(request["config"]), {}), dress(script))
    except HibernodeError as e:
        sys.stderr.write(f"error: {e.message}\n")
        sys.exit(78)
    sys.exit(0)


def _program(request: dict[str, Any]) -> NoReturn:
    os.setsid()
    os.chdir(request["cwd"])
    _redirect(request["log"])
    os.closerange(3, 1024)
    os.execve(request["argv"][0], request["argv"], os.environ | request["env"])
    raise AssertionError("not reached")


def _redirect(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, number in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(descriptor, number)
    os.close(nothing)
    os.close(out)
