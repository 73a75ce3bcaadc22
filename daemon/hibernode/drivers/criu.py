"""Stock CRIU: `criu swrk` spawned by us, spoken to with pycriu. The only place that knows CRIU's options, its exit and its log.

We spawn the worker ourselves (pycriu would fork inside a threaded process) and hand pycriu our end of the socket: so its pid, its
time limit and its log are ours. A worker that dumps is not killed for a cancel: 4 of 118 such kills cost the tree a process
(docs/crashes.md). Closing the page socket makes it roll back instead (one that somebody has stopped needs a SIGCONT, too), and only one
that does not do even that is killed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pycriu
from google.protobuf.message import DecodeError
from pycriu.images import (
    core_pb2,
    creds_pb2,
    fdinfo_pb2,
    ghost_file_pb2,
    magic,
    mnt_pb2,
    pstree_pb2,
    remap_file_path_pb2,
    stats_pb2,
)

from hibernode import keeper
from hibernode.children import Children, unprotect
from hibernode.errors import Corrupt, DumpFailed, HibernodeError, Refused, RestoreFailed, Stuck
from hibernode.flow import Stopped
from hibernode.model import MAX_TASKS, Cancel, TaskFacts
from hibernode.ports import (
    CriuFacts,
    CriuOptions,
    Demands,
    DumpStats,
    Endpoint,
    Held,
    Identity,
    MountFacts,
    Prepared,
    TaskRights,
    show_version,
)

OLDEST = 40200  # 4.1 cannot dump sockets on kernels from 6.16 on, and has another page wire
_LOG_LINES = 12
_ROLLBACK = 15.0  # seconds a dump has to roll back after its page socket closed; 10 to 30 ms are usual
_LEFT = 2.0  # seconds that what a dead daemon's CRIU has left gets to end by itself
_STANDS = 0.1  # seconds for a worker to stand still that is to be killed
_START = 30.0  # seconds for a keeper to have its filler listen; 50 ms are usual
_TOLD = 5000  # processes of a tree that a keeper is told of: they fit into a packet, and the others live in its cgroup
_LAST = 30.0  # seconds a SIGKILLed worker has to end: it may be in the middle of freeing much memory
_ANSWER = 1 << 20  # bytes, far more than CRIU says
_MAX_FILE = 16 << 20  # bytes; 100,000 tasks of ten threads are 7 MiB of pstree.img, and a core is tens of KiB
_TASK_DEAD = 2  # criu/include/image.h
_log = logging.getLogger("hibernode.criu")
# Logged as an error without CAP_SYS_RESOURCE, and as a warning because the page socket is no TCP one: neither means anything.
_HARMLESS = re.compile(r"RLIMIT_NOFILE|prlimit|Can't set RLIMIT|TCP_NODELAY")
# What CRIU's log says -> (stable reason, what to do about it).
_KNOWN = (
    (r"Connected TCP socket", "tcp_established", 'say {"tcp": "close"} or {"tcp": "established"} in criu_opts'),
    (r"io_uring", "io_uring", "CRIU cannot save io_uring; run the workload without it"),
    (
        r"has bad size",
        "file_changed",
        "a file the workload has open is longer or shorter than it was; put it back as it was",
    ),
    (r"Can't open file|Can't open .* on restore", "file_missing", "a file the workload had open is not here"),
    (r"Can't get rlimit", "cap_sys_resource", "the daemon needs CAP_SYS_RESOURCE for workloads of other users"),
    (r"tty|pts/", "terminal", "the workload holds a terminal; start it with `hibernode run` or under setsid"),
    (r"Pid \d+ do not match|EEXIST|File exists", "pid_taken", "a pid of the tree is in use"),
    (r"is unlinked|Can't dump ghost file", "ghost_file", "a deleted file is larger than criu.ghost_limit"),
)


# -S and an environment of its own: it needs nothing but the standard library, and starts in a fraction of the time.
_KEEPER = (sys.executable, "-P", "-s", "-S", "-m", keeper.__name__)


class Criu:
    """ports.Criu on the binary at `path`."""

    def __init__(self, path: str, children: Children, plugins: Path, rollback: float = _ROLLBACK) -> None:
        """`rollback`: seconds a worker has to end by itself, after a cancel as after its answer."""
        self._path, self._children, self._rollback = path, children, rollback
        plugins.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._env = {
            **os.environ,
            "CRIU_LIBS_DIR": str(plugins),
        }  # an empty folder: CRIU's own CUDA plugin must stay out
        self._facts: CriuFacts | None = None
        self._unfit: str | None = None

    def facts(self) -> CriuFacts:
        if self._facts is None:
            version = self._version()
            if version < OLDEST:
                raise Refused(
                    "criu_too_old",
                    f"CRIU {show_version(version)} is too old",
                    prop="criu",
                    found=show_version(version),
                    wanted=f"{show_version(OLDEST)} or newer",
                    hint="`scripts/setup` provides one",
                )
            self._facts = CriuFacts(version, self._path)
        return self._facts

    def environment(self) -> Mapping[str, str]:
        places = [str(Path(self.facts().path).parent), self._env.get("PATH", os.defpath)]
        return {**self._env, "PATH": os.pathsep.join(places)}

    def _version(self) -> int:
        _, said = self._children.run([self._path, "--version"], timeout=30)
        if not (found := re.search(r"Version: (\d+)\.(\d+)(?:\.(\d+))?", said)):
            raise Refused(
                "criu_missing",
                f"no usable CRIU at {self._path}",
                prop="criu",
                found=said.strip()[:200],
                wanted=f"{show_version(OLDEST)} or newer",
                hint="`scripts/setup` provides one; or set `path` in [criu]",
            )
        major, minor, sub = (int(part or 0) for part in found.groups())
        return major * 10000 + minor * 100 + sub

    def check(self) -> str:
        code, said = self._children.run([self._path, "check"], timeout=60, env=self._env)
        lines = [line for line in said.splitlines() if not _HARMLESS.search(line)]
        return "" if code == 0 else "; ".join(lines)[-500:] or f"exit status {code}"

    def dump(self, pid: int, images: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        cancel.check()
        try:
            with self._worker(images, "dump.log", options, cancel, self._rollback, pass_fds=[pages.fileno()]) as request:
                request.opts.pid = pid
                request.opts.ps.fd = pages.fileno()
                request.opts.leave_running = not options.leave_stopped
                request.opts.leave_stopped = options.leave_stopped
                pages_closed = pages.detach()
                try:
                    request.dump()
                finally:
                    os.close(pages_closed)
        except pycriu.CRIUException as e:
            raise self._failed(DumpFailed, f"CRIU could not dump pid {pid}", e, images / "dump.log") from e
        finally:
            pages.close()
        return self.stats(images)

    def restore(
        self,
        images: Path,
        options: CriuOptions,
        prepared: Prepared,
        cancel: Cancel,
        held: Held | None = None,
    ) -> int:
        cancel.check()
        try:
            with self._worker(
                images,
                "restore.log",
                options,
                cancel,
                patience=0.0,  # what it has made is killed anyway
                pass_fds=list(prepared.inherit.values()),
                leave_for=prepared.cgroup_procs,
                held=held,
            ) as request:
                request.opts.auto_dedup = True  # frees each page of the files as it is used: no second copy at the end
                request.opts.lazy_pages = options.lazy or held is not None
                for key, descriptor in prepared.inherit.items():
                    request.opts.inherit_fd.add(key=key, fd=descriptor)
                return int(request.restore().pid)
        except pycriu.CRIUException as e:
            raise self._failed(RestoreFailed, "CRIU could not restore the tree", e, images / "restore.log") from e

    @contextmanager
    def _worker(
        self,
        images: Path,
        log: str,
        options: CriuOptions,
        cancel: Cancel,
        patience: float,
        *,
        pass_fds: list[int],
        leave_for: Sequence[str] | None = None,
        held: Held | None = None,
    ) -> Iterator[pycriu.criu]:
        """A request to a worker of its own; the worker has ended when this is left. One that has not ended `patience` seconds after a
        cancel is killed. `leave_for`: it leaves the daemon's cgroups for these, and the daemon's protection, because what it restores
        inherits both. `held`: as `restore` has it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = os.open(images, os.O_DIRECTORY)
        try:
            argv = [self._path, "swrk", str(theirs.fileno())]
            # The directory, too: by it the watchdog knows whose worker this is, from its first moment on.
            worker = self._children.spawn(argv, pass_fds=[theirs.fileno(), directory, *pass_fds], env=self._env)
            theirs.close()
            if leave_for is not None:
                unprotect(worker.pid)
                joined = [_join_cgroup(procs, worker.pid) for procs in leave_for]
                if (options.lazy or held) and not any(joined):
                    raise RestoreFailed("a tree that is filled has no cgroup to be born in", reason="lazy_cgroup")
            stuck = _KilledIfStuck(worker, ours, cancel, patience, restores=leave_for is not None)
            request = _Request(stuck, held)
            request.use_fd(ours.fileno())
            _apply(request.opts, options, directory, log)
            try:
                with stuck:
                    yield request
            finally:
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)  # a keeper may have it, too
                ours.close()
                _disconnect(request)
                self._wait(worker, restores=leave_for is not None)
        finally:
            os.close(directory)
            ours.close()
            theirs.close()

    def _wait(self, worker: subprocess.Popen[bytes], *, restores: bool) -> None:
        """It ends when its request is answered, or its socket closed; one that does not (it hangs) is killed. Alone, if it `restores`: what
        it has restored well may be in its group (`shell_job`), and what has not is killed with its cgroup."""
        for patience in (self._rollback, _LAST):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._children.wait(worker, patience)
                return
            _log.error("criu (pid %d) does not end, and is killed", worker.pid)
            if restores:
                worker.kill()
            else:
                _signal(worker, signal.SIGKILL)
        raise Stuck(f"criu (pid {worker.pid}) does not end after SIGKILL", hint="its state in `ps` says what it waits for")

    def _failed(self, kind: type[HibernodeError], what: str, error: Exception, log: Path) -> HibernodeError:
        tail = log_tail(log)
        text = "\n".join(tail)
        reason, hint = next(((r, h) for pattern, r, h in _KNOWN if re.search(pattern, text)), ("", ""))
        said = " ".join(str(error).split())
        first = next((line for line in tail if "Error" in line), said)  # later errors are mostly consequences
        return kind(f"{what}: {first}", hint=hint, criu_log=tail, reason=reason, criu=said)

    def stats(self, images: Path) -> DumpStats:
        return read_stats(images)

    def why(self, what: str, error: Exception, log: Path) -> DumpFailed:
        found = self._failed(DumpFailed, what, error, log)
        assert isinstance(found, DumpFailed)
        return found

    def unfit(self) -> str:
        if self._unfit is None:
            code, said = self._children.run([*_KEEPER, "unfit"], timeout=_START, env=_keeper_environment())
            if code:  # not for ever: memory, processes, descriptors may have been short
                _log.warning(
                    "it could not be found out whether restores can be filled: exit status %d: %s", code, said.strip()[-200:]
                )
                return f"exit status {code}"
            self._unfit = said.strip()
            if self._unfit:
                _log.info("restores are done by files: %s", self._unfit)
        return self._unfit

    def keeper(self, turns: socket.socket, memory: int) -> Keeper:
        try:
            return Keeper(self._children, turns, memory)
        finally:
            turns.close()

    def let_go(self, work: Path) -> None:
        limit = time.monotonic() + _LEFT
        while left := [pid for pid in _everybody() if _is_of(pid, work)]:
            late = time.monotonic() > limit
            held = {_status(pid)[1] for pid in _everybody()} if late else set()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late and pid not in held else signal.SIGCONT)
            if late:
                _log.warning("left by a daemon that died, and killed: criu, pids %s", sorted(set(left) - held))
                return
            time.sleep(0.05)

    def tasks(self, images: Path) -> list[TaskFacts]:
        try:
            entries = list(_entries(_content(images / "pstree.img"), "PSTREE", MAX_TASKS))
            parsed = [pstree_pb2.pstree_entry.FromString(entry) for entry in entries]
            return [_task(images, entry) for entry in parsed]
        except (OSError, struct.error, ValueError, DecodeError) as e:
            raise Corrupt(f"CRIU's images do not say which tasks they hold: {e}") from e

    def demands(self, images: Path) -> Demands:
        try:
            entries = map(pstree_pb2.pstree_entry.FromString, _entries(_content(images / "pstree.img"), "PSTREE", MAX_TASKS))
            threads = {thread for entry in entries for thread in (entry.pid, *entry.threads)}
            return Demands(
                tasks=[rights for thread in sorted(threads) for rights in _rights(images, thread)],
                mounts=[_mount(entry) for file in sorted(images.glob("mountpoints-*.img")) for entry in _all(file, "MNTS")],
                devices=[*_open_devices(images), *_ghost_devices(images)],
                deleted=_deleted(images),
                sockets=list(_sockets(images)),
            )
        except (OSError, struct.error, ValueError, DecodeError) as e:
            raise Corrupt(f"CRIU's images do not say what they need: {e}") from e


class Keeper:
    """ports.Keeper. Of the process there is nothing here but its pid and the control socket."""

    def __init__(self, children: Children, turns: socket.socket, memory: int) -> None:
        self._children, self._log = children, Path(os.devnull)
        self._woken = self._all_in = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        numbers = theirs.fileno(), turns.fileno(), memory
        try:
            self._process = children.spawn([*_KEEPER, *map(str, numbers)], pass_fds=numbers, env=_keeper_environment())
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()

    def begin(self, images: Path, table: Path, procs: Sequence[str], own: Sequence[str]) -> None:
        joined = [_join_cgroup(file, self._process.pid) for file in own]  # who kills the daemon's cgroup must not meet it
        if not any(joined):
            raise Refused(
                "lazy_cgroup", "the keeper of a restore cannot have a cgroup of its own here", prop="cgroup", found="the daemon's",
                wanted="hibernode/<uid>.keeper", hint="restore it without `lazy`, and with `filler = false` in [criu]",
            )  # fmt: skip
        self._log = images / keeper.LOG
        self._say(images=str(images), table=str(table), procs=list(procs))
        if "ready" not in self._hear(_START):
            raise RestoreFailed(
                f"the filler does not listen after {_START:.0f} s", criu_log=log_tail(self._log), reason="lazy_pages"
            )

    def hold(self, criu: int) -> None:
        try:
            socket.send_fds(self._control, [json.dumps({}).encode()], [criu])
        except (BrokenPipeError, ConnectionResetError):  # it has gone: `_hear` says so
            return
        except OSError as e:
            raise RestoreFailed(f"the keeper cannot be given CRIU's socket: {e}", reason="lazy_keeper") from e

    def told(self, tree: Sequence[Identity]) -> None:
        self._say(tree=[list(who) for who in tree[:_TOLD]])

    def wait(self, seconds: float) -> bool:
        self._all_in = self._all_in or "in" in self._hear(seconds)
        return self._all_in

    def _say(self, **facts: object) -> None:
        with contextlib.suppress(OSError):  # it has gone: `_hear` says so
            self._control.sendall(json.dumps(facts).encode())

    def _hear(self, seconds: float) -> Mapping[str, object]:
        """What it says next: good news, or that it is `late`."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        said = self._received() if poller.poll(seconds * 1000) else {"late": True}
        if self._woken:
            raise Stopped
        if reason := said.get("unfit"):
            raise Refused(
                "lazy_kernel", f"on this kernel a tree cannot be filled safely: {reason}", prop="kernel", found=os.uname().release,
                wanted="userfaultfd with all its events, and ptrace", hint="without `lazy`, and with `filler = false` in [criu]",
            )  # fmt: skip
        if reason := said.get("lost"):
            tail = log_tail(self._log)
            first = next((line for line in tail if "Error" in line), "no reason in its log")
            raise RestoreFailed(
                f"not all pages came, and the tree was killed: {reason}: {first}", criu_log=tail,
                reason="criu_ended" if reason == keeper.CRIU_ENDED else "lazy_pages",
                pids=said.get("killed", []),
            )  # fmt: skip
        if not said:
            raise RestoreFailed("the keeper of the restore has ended", hint="somebody has killed it", reason="lazy_keeper")
        return said

    def _received(self) -> dict[str, object]:
        """Empty at its end. One that ends with something of ours unread makes itself heard by an error, then by what it has said."""
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError):
                found: dict[str, object] = json.loads(self._control.recv(1 << 16) or b"{}")
                return found
        return {}

    def wake(self) -> None:
        self._woken = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._control.close()
        if self._process.returncode is None:
            try:
                self._children.wait(self._process, _LAST)
            except subprocess.TimeoutExpired:  # it is never killed: it may hold what keeps a tree from reading zeros
                _log.error("the keeper (pid %d) does not end: somebody of its tree does not", self._process.pid)


def _keeper_environment() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(keeper.__file__).parents[1])}


class _NoAnswer(pycriu.CRIUException):  # type: ignore[misc]
    def __init__(self, why: str) -> None:
        super().__init__(why)
        self._str = f"no answer: {why}"  # what pycriu's says of itself


class _Request(pycriu.criu):  # type: ignore[misc]
    """One that answers what CRIU asks meanwhile, if something is `held`: before anybody runs (`pre-resume`: all are stopped, and the filler
    has been told that all is made, restore_root_task in criu/cr-restore.c) it waits for that. CRIU would go on whatever it is answered."""

    def __init__(self, stuck: _KilledIfStuck, held: Held | None) -> None:
        super().__init__()
        self._stuck, self._held = stuck, held
        self.opts.notify_scripts = held is not None

    def _send_req_and_recv_resp(self, req: pycriu.rpc.criu_req) -> pycriu.rpc.criu_resp:
        if self._held is None:
            return super()._send_req_and_recv_resp(req)
        answers = self._comm.connect(False)
        self._held.hold(answers.fileno())
        said = self._ask(answers, req)
        while said.type == pycriu.rpc.NOTIFY:
            if said.notify.script == "pre-resume":
                with self._stuck.aside():
                    self._held.fill()
            said = self._ask(answers, pycriu.rpc.criu_req(type=pycriu.rpc.NOTIFY, notify_success=True))
        return said

    def _ask(self, answers: socket.socket, req: pycriu.rpc.criu_req) -> pycriu.rpc.criu_resp:
        try:
            answers.send(req.SerializeToString())
            if data := answers.recv(_ANSWER):
                return pycriu.rpc.criu_resp.FromString(data)
        except (OSError, DecodeError) as e:
            raise _NoAnswer(str(e)) from e
        raise _NoAnswer("it has ended")


class _KilledIfStuck(AbstractContextManager["_KilledIfStuck"]):
    """A cancel lets a worker that is stopped go on. `patience` seconds later it is killed, and whoever waits for its answer wakes up:
    those it was restoring hold the other end of the socket, too. Without patience it does not go on at all: a tree that is to be killed
    must not run for a moment, and write to its files. So whom a worker that `restores` holds is killed before it."""

    def __init__(
        self, worker: subprocess.Popen[bytes], ours: socket.socket, cancel: Cancel, patience: float, *, restores: bool
    ) -> None:
        self._worker, self._ours, self._cancel, self._patience, self._restores = worker, ours, cancel, patience, restores
        self._timers: list[threading.Timer] = []
        self._waking = ExitStack()

    def __enter__(self) -> Self:
        self._waking.enter_context(self._cancel.waking(self._soon))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._waking.close()
        for timer in self._timers:
            timer.cancel()
            timer.join()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While inside, a cancel is the affair of who is; if anything is raised there, or somebody whom it held is not held any more, the
        worker does not go on: it would let the others run before it sees that one has gone."""
        self._waking.close()
        try:
            before = self._held()
            yield
            if gone := sorted(set(before) - set(self._held())):
                raise RestoreFailed(
                    "a process has ended while CRIU held it, before all was in", pids=gone, reason="ended_held",
                    hint="somebody has killed it: is there memory for all of the tree?",
                )  # fmt: skip
            self.__enter__()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        try:
            with contextlib.suppress(OSError):  # no descriptors, no memory: who brings the pages kills them
                self._kill_held()
        finally:
            _signal(self._worker, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)

    def _kill_held(self) -> None:
        """Whomever a worker that restores traces. It stands still meanwhile: it would let them go before they are killed."""
        if not self._restores or self._worker.returncode is not None:
            return
        os.kill(self._worker.pid, signal.SIGSTOP)
        until = time.monotonic() + _STANDS
        while _status(self._worker.pid)[0] not in ("T", "t", "Z") and time.monotonic() < until:
            time.sleep(0.001)
        for pid in _everybody():
            with contextlib.suppress(ProcessLookupError), _pidfd(pid) as descriptor:
                if _status(pid)[1] == self._worker.pid:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def _held(self) -> list[int]:
        """Processes that it traces, and that stand still."""
        return [pid for pid in _everybody() if _status(pid) == ("t", self._worker.pid)]

    def _soon(self) -> None:
        if not self._patience:
            self._end()
            return
        _signal(self._worker, signal.SIGCONT)
        timer = threading.Timer(self._patience, self._end)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()


def _everybody() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _is_of(pid: int, work: Path) -> bool:
    """A process of CRIU's that has something in `work` open, and has not ended."""
    try:
        place = Path(f"/proc/{pid}")
        if (place / "comm").read_text() != "criu\n":
            return False
        return any(Path(os.readlink(each)).is_relative_to(work) for each in (place / "fd").iterdir())
    except OSError:
        return False


def _status(pid: int) -> tuple[str, int]:
    """State of its first thread, and who traces that; CRIU traces all threads of a process or none. Of nobody: nothing, and 0."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    state, tracer = (re.search(rf"^{key}:\t(\w+)", text, re.MULTILINE) for key in ("State", "TracerPid"))
    return state[1] if state else "", int(tracer[1]) if tracer else 0


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _disconnect(request: pycriu.criu) -> None:
    """pycriu works on a copy of our descriptor, and leaves it open where no answer came: a worker that reads would wait for more."""
    if (copy := getattr(request._comm, "sk", None)) is not None:
        copy.close()


def _signal(worker: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the worker and those it has forked for a moment: they are a group of their own, and one that is stopped holds up the others."""
    if worker.returncode is None:  # nobody has waited for it: its pid is nobody else's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, number)


def _apply(opts: pycriu.rpc.criu_opts, options: CriuOptions, directory: int, log: str) -> None:
    opts.images_dir_fd = directory
    opts.log_file, opts.log_level = log, options.log_level
    opts.timeout = options.timeout  # CRIU's own 10 s is too short for large trees
    opts.shell_job, opts.ext_unix_sk = options.shell_job, options.ext_unix_sk
    opts.file_locks, opts.link_remap = options.file_locks, options.link_remap
    opts.ghost_limit = options.ghost_limit
    opts.tcp_established = options.tcp == "established"
    opts.tcp_close = options.tcp == "close"
    # A dump locks the network of a tree with a network namespace of its own, and a killed CRIU leaves the lock: only where needed.
    opts.network_lock = pycriu.rpc.IPTABLES if options.tcp == "established" else pycriu.rpc.SKIP
    opts.manage_cgroups_mode = pycriu.rpc.IGNORE


def _join_cgroup(procs: str, pid: int) -> bool:
    """Best effort: without it the tree is born in the daemon's own cgroup, and `KillMode` keeps it alive. One that is gone is made again:
    another daemon of this machine removes as it starts what nobody lives in."""
    try:
        Path(procs).parent.mkdir(parents=True, exist_ok=True)
        Path(procs).write_text(str(pid))
    except OSError:
        return False
    return True


def read_stats(images: Path) -> DumpStats:
    """CRIU's statistics of the dump in `images`."""
    try:
        (entry,) = _entries(_content(images / "stats-dump"), "STATS", 1)
        dump = stats_pb2.stats_entry.FromString(entry).dump
    except (OSError, struct.error, ValueError, DecodeError) as e:
        raise DumpFailed(f"CRIU said that it dumped, but left no readable statistics: {e}") from e
    return DumpStats(dump.freezing_time * 1000, dump.frozen_time * 1000, dump.pages_written + dump.shpages_written)


def _content(path: Path) -> bytes:
    """Of a file that may have come with somebody else's checkpoint: long ones are small in a store."""
    with open(path, "rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ValueError(f"{path.name} has more than {_MAX_FILE} bytes")
    return data


def _entries(data: bytes, kind: str, most: int) -> Iterator[bytes]:
    """The protobufs of a CRIU image file, `most` at most: one or two magic numbers, then length-prefixed messages."""
    first, second = struct.unpack_from("<II", data)
    if first not in (magic.by_name["IMG_COMMON"], magic.by_name["IMG_SERVICE"]) or second != magic.by_name[kind]:
        raise ValueError("wrong magic number")
    at, count = 8, 0
    while at < len(data):
        count += 1
        if count > most:
            raise ValueError(f"more than {most} entries")
        (size,) = struct.unpack_from("<I", data, at)
        if at + 4 + size > len(data):
            raise ValueError("truncated")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def _task(images: Path, entry: pstree_pb2.pstree_entry) -> TaskFacts:
    path, core = images / f"core-{entry.pid}.img", core_pb2.core_entry()
    if path.exists():  # a helper task has none
        core = core_pb2.core_entry.FromString(next(_entries(_content(path), "CORE", 1), b""))
    dead = core.tc.task_state == _TASK_DEAD
    # Of a zombie CRIU (4.2.1) writes memory that it never filled; it has no threads.
    threads = [] if dead else [thread for thread in entry.threads if thread != entry.pid]
    return TaskFacts(pid=entry.pid, ppid=entry.ppid, comm=str(core.tc.comm)[:64], threads=threads, dead=dead)


def _all(file: Path, kind: str) -> Iterator[bytes]:
    return _entries(_content(file), kind, MAX_TASKS)


def _rights(images: Path, thread: int) -> Iterator[TaskRights]:
    """None of a helper, which has no core, or of a zombie, which is nobody any more."""
    path = images / f"core-{thread}.img"
    if not path.exists():
        return
    core = core_pb2.core_entry.FromString(next(_entries(_content(path), "CORE", 1), b""))
    if core.tc.task_state == _TASK_DEAD:
        return
    creds: creds_pb2.creds_entry = core.thread_core.creds
    if not core.thread_core.HasField("creds"):
        raise ValueError(f"{path.name} does not say whose it is")
    filters = (core.tc.old_seccomp_mode, core.thread_core.seccomp_mode)
    yield TaskRights(
        pid=thread,
        uids=frozenset((creds.uid, creds.euid, creds.suid, creds.fsuid)),
        gids=frozenset((creds.gid, creds.egid, creds.sgid, creds.fsgid, *creds.groups)),
        permitted=_bits(creds.cap_prm) | _bits(creds.cap_eff) | _bits(creds.cap_inh) | _bits(creds.cap_amb),
        bounding=_bits(creds.cap_bnd),
        filtered=core_pb2.filter in filters,
        no_new_privs=bool(creds.no_new_privs),
        label=str(creds.lsm_profile)[:1024],
    )


def _bits(words: Sequence[int]) -> int:
    return sum(word << 32 * n for n, word in enumerate(words))


def _mount(data: bytes) -> MountFacts:
    entry = mnt_pb2.mnt_entry.FromString(data)
    kind = mnt_pb2.fstype.Name(entry.fstype).lower() if entry.fstype in mnt_pb2.fstype.values() else str(entry.fstype)
    return MountFacts(place=entry.mountpoint, kind=kind, key=entry.ext_key, flags=entry.flags | entry.sb_flags)


def _open_devices(images: Path) -> Iterator[str]:
    path = images / "files.img"
    for data in _all(path, "FILES") if path.exists() else ():
        entry = fdinfo_pb2.file_entry.FromString(data)
        if entry.type == fdinfo_pb2.EXT:
            yield "of a plugin"
        elif stat.S_ISCHR(entry.reg.mode) or stat.S_ISBLK(entry.reg.mode):
            yield str(entry.reg.name)


def _sockets(images: Path) -> Iterator[Endpoint]:
    """Those that are bound to one address. A connection that was dumped to be closed has kept its addresses."""
    path = images / "files.img"
    for data in _all(path, "FILES") if path.exists() else ():
        entry = fdinfo_pb2.file_entry.FromString(data)
        if entry.type != fdinfo_pb2.INETSK or not (address := _address(entry.isk.src_addr)):
            continue
        of_tcp = entry.isk.proto == socket.IPPROTO_TCP and entry.isk.dst_port
        yield Endpoint(address, f"{_address(entry.isk.dst_addr)}:{entry.isk.dst_port}" if of_tcp else "")


def _address(words: Sequence[int]) -> str:
    """As CRIU writes it: one word, or four, in the order of the network. Empty for any."""
    found = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return "" if found.is_unspecified else str(found)


def _deleted(images: Path) -> list[str]:
    files, remaps = images / "files.img", images / "remap-fpath.img"
    if not (files.exists() and remaps.exists()):
        return []
    gone = {remap_file_path_pb2.remap_file_path_entry.FromString(data).orig_id for data in _all(remaps, "REMAP_FPATH")}
    entries = map(fdinfo_pb2.file_entry.FromString, _all(files, "FILES"))
    return [str(entry.reg.name) for entry in entries if entry.type == fdinfo_pb2.REG and entry.id in gone]


def _ghost_devices(images: Path) -> Iterator[str]:
    """A ghost is a deleted file, which CRIU makes anew for a moment: the first entry of its image says what it was."""
    for path in images.glob("ghost-file-*.img"):
        with open(path, "rb") as file:
            first, second, size = struct.unpack("<III", file.read(12))
            if (first, second) != (magic.by_name["IMG_COMMON"], magic.by_name["GHOST_FILE"]):
                raise ValueError(f"{path.name}: wrong magic number")
            mode = ghost_file_pb2.ghost_file_entry.FromString(file.read(min(size, _MAX_FILE))).mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            yield "deleted"


def log_tail(log: Path, lines: int = _LOG_LINES) -> list[str]:
    """The last errors and warnings of a CRIU log, harmless ones left out; the last lines if there is none."""
    try:
        text = log.read_bytes()[-65536:].decode(errors="replace").splitlines()
    except OSError:
        return []
    text = [line for line in text if not _HARMLESS.search(line)]
    return [line for line in text if "Error" in line or "Warn" in line][-lines:] or text[-lines:]
