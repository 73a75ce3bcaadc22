"""The watchdog: a process of its own that gives back every workload the daemon had frozen, whatever died or hangs: daemon, CRIU, or both.

It reads three things and writes none: the daemon's lock (is there a daemon, which one?), its journal (which trees are held, until when),
and /proc (who really stands still, and who holds them). It knows no store, no broker and no network, waits for nobody, and is safe to
kill and to start again at any time: what it does may be repeated, by itself and by the recovery of the next daemon.

Nobody is dealt with for a pid alone: a process of a workload is a pid and a start time out of the journal, a worker of CRIU has its log
open in the daemon's work directory, and the daemon has its lock. What is stopped is let go on before anything is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from hibernode import locks
from hibernode.config import Config, usable
from hibernode.drivers.workloads import cgroup, freezer, proc, trees
from hibernode.errors import Refused
from hibernode.journal import BOOT, Record, boottime, remedy, stays
from hibernode.model import Status
from hibernode.ports import Identity
from hibernode.systemd import notify, ping_interval

LOCK = "watchdog.lock"  # in the state directory: `hibernode doctor` asks who holds it
_MCL_CURRENT, _MCL_FUTURE = 1, 2
_HELPER = 10.0  # seconds until a GPU helper that has ended is started again: there may be no driver
_Key = tuple[str, str, Status, float]  # of a page of the journal as it is now: its action, phase, status and deadline
_log = logging.getLogger("hibernode.watchdog")


def run(settings: Config, *, once: bool = False) -> None:
    """Look every `watchdog.interval` seconds until SIGTERM; or `once`, for cron and for people: then nobody who is gone is waited for.
    Raises Refused for what keeps it from starting."""
    if os.geteuid():
        raise Refused("not_root", "the watchdog needs root", prop="uid", found=os.geteuid(), wanted=0, hint="it signals others")
    _log_to_stderr(settings)
    signal.signal(signal.SIGTERM, _leave)  # as PID 1 of a container it has no default action
    lock = _alone(settings.state_dir / LOCK)
    try:
        grace = 0.0 if once else settings.watchdog.grace
        watchdog = Watchdog(settings.state_dir, settings.work_dir, grace, libcuda=settings.gpu.libcuda)
        if once:
            return watchdog.look()
        _stay_in_memory()
        _say(
            logging.INFO,
            "watching",
            state_dir=settings.state_dir,
            interval=settings.watchdog.interval,
            grace=settings.watchdog.grace,
        )
        notify("READY=1")
        interval = min(settings.watchdog.interval, ping_interval() or settings.watchdog.interval)
        while True:
            watchdog.look()
            notify("WATCHDOG=1")
            time.sleep(interval)
    finally:
        os.close(lock)


def _leave(*_: object) -> NoReturn:
    sys.exit(0)  # at once: nothing is left half done


def _alone(path: Path) -> int:
    """The descriptor of our lock: held until the process ends. Two that act on one tree would each wait for the other's patience."""
    with usable("state_dir", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        other = locks.holder(path) or "unknown"
        raise Refused(
            "watchdog_running", f"another watchdog, pid {other}, works in {path.parent}", prop="lock", found=f"held by pid {other}",
            wanted="free", hint="one for each state_dir",
        ) from None  # fmt: skip
    with contextlib.suppress(OSError):  # a full disk: the lock holds without
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _stay_in_memory() -> None:
    """When memory is short it is needed most: it must not wait for a page of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        _say(logging.WARNING, "cannot lock its memory", error=os.strerror(ctypes.get_errno()), hint="CAP_IPC_LOCK")


# --- what one look sees -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Daemon:
    """The one that holds the lock."""

    process: Identity
    began: float  # CLOCK_BOOTTIME, seconds

    @classmethod
    def of(cls, pid: int) -> Daemon | None:
        began = proc.start_time(pid)
        return cls((pid, began), began / os.sysconf("SC_CLK_TCK")) if began else None


@dataclass(frozen=True)
class Worker:
    """A CRIU of this node: it has a file of an action open in the daemon's work directory. (Its environment would say so too, but CRIU
    writes its title over that.)"""

    process: Identity
    action_id: str
    orphan: bool  # no daemon is above it: nobody waits for its answer any more
    holds: tuple[Identity, ...]  # whom it traces

    @property
    def stopped(self) -> bool:
        return "T" in proc.thread_states(self.process[0])


def workers(work_dir: Path, daemon: Daemon | None) -> list[Worker]:
    """All that are there now."""
    below = set(proc.forest([daemon.process])) if daemon else set()
    found = []
    for each in proc.everybody():
        if each.comm == "criu" and (action := _action_of(each.pid, work_dir)):
            process = each.pid, each.start_time
            found.append(Worker(process, action, process not in below, tuple(proc.traced_by(each.pid))))
    return found


def _action_of(pid: int, work_dir: Path) -> str:
    """Whose images it reads or writes, also where they have been removed since."""
    with contextlib.suppress(*proc.GONE):
        for _, path in proc.descriptors(pid):
            inside, _, rest = path.removeprefix(f"{work_dir}/").partition("/")
            if rest and path.startswith(f"{work_dir}/"):
                return inside
    return ""


def abandoned_since(record: Record, daemon: Daemon | None, gone_since: float, writer: Identity) -> float | None:
    """Since when (CLOCK_BOOTTIME) the daemon that wrote it, `writer` as far as one could see, does not work on it; None: it does."""
    if daemon is None:
        return gone_since
    if record.ended_at:
        return 0.0  # it has given up, and told (`left_suspended`): the page is open because somebody has to go on trying
    if writer != daemon.process or 0 < record.until < daemon.began:
        return daemon.began  # of a daemon before this one, which recovers, and may be waiting for a store
    return None


# --- the journal, read only -------------------------------------------------------------------------------------------------

# No more than is needed, so that a daemon of another version, or a strange event, does not make the watchdog blind.
_FIELDS = {"action_id", "type", "phase", "until", "boot", "status", "ended_at", "trees", "freezers", "place", "kill"}
_TREE = {"pid", "start_time", "stopped"}
_UNUSED = {"checkpoint_id": "", "target": "", "command": "", "began_at": 0.0}


class Pages:
    """The journal's files as they are now. Only what has changed since the last time is read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._read: dict[str, tuple[tuple[int, int], Record | None]] = {}

    def all(self) -> list[Record]:
        """Every record of this boot that can be read: pids and deadlines of another one mean nothing."""
        there: dict[str, tuple[tuple[int, int], Record | None]] = {}
        with contextlib.suppress(FileNotFoundError):  # no daemon has ever run
            for file in os.scandir(self._directory):
                if file.name.endswith(".json"):
                    with contextlib.suppress(FileNotFoundError):
                        found = file.stat()
                        version = (found.st_ino, found.st_mtime_ns)
                        old = self._read.get(file.name)
                        there[file.name] = old if old and old[0] == version else (version, _record(Path(file.path)))
        self._read = there
        return [record for _, record in there.values() if record is not None]


def _record(path: Path) -> Record | None:
    """One that cannot be read is the daemon's business: it answers for the action, and keeps the file."""
    try:
        found = json.loads(path.read_bytes())
        known = {key: value for key, value in found.items() if key in _FIELDS}
        known["trees"] = [{key: value for key, value in tree.items() if key in _TREE} for tree in known.get("trees", ())]
        record = Record.model_validate_json(json.dumps({**_UNUSED, **known}))
    except FileNotFoundError:
        return None  # replaced or pruned while we looked
    except (OSError, ValueError, AttributeError, TypeError) as e:  # pydantic's errors are ValueErrors
        _say(logging.WARNING, "cannot read a page of the journal", path=path, error=str(e)[:300])
        return None
    return record if record.boot == BOOT else None


# --- acting -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Orphan:
    """A worker without a daemon."""

    since: float
    action_id: str
    holds: set[Identity]  # everybody it was ever seen to trace


class Watchdog:
    """What it remembers from look to look is only since when something is as it is: a new one begins to count anew."""

    def __init__(
        self, state_dir: Path, work_dir: Path, grace: float, clock: Callable[[], float] = boottime, libcuda: str = ""
    ) -> None:
        self._lock, self._work_dir, self._grace, self._clock = state_dir / "lock", work_dir, grace, clock
        self._gpu, self._libcuda = state_dir / "gpu", libcuda
        self._helper: subprocess.Popen[bytes] | None = None
        self._helper_at = 0.0  # when another one may be started
        self._pages = Pages(state_dir / "journal")
        self._daemon: Daemon | None = None
        self._last: Identity = (0, 0)  # the daemon that is there, or was before
        self._gone_since: float | None = None
        self._orphans: dict[Identity, _Orphan] = {}
        self._writers: dict[_Key, Identity] = {}  # whose page it is: the daemon that was there when it was first seen
        self._late: dict[_Key, float] = {}  # since when it has held a tree that it should not
        self._given_back: set[_Key] = set()
        self._quiet = False  # nothing was open at the last look, and no worker there

    def look(self) -> None:
        """Once over everything. What is wrong with one workload keeps no other one frozen; all is tried again at the next look."""
        try:
            self._note(Daemon.of(locks.holder(self._lock)))
            records = self._pages.all()
            pages = {_key(record): record for record in records if not record.done and remedy(record) != "nothing"}
            found = self._workers(busy=bool(pages))
        except OSError as e:  # who may not look must not take that for nobody: nothing is touched
            return _say(logging.ERROR, "cannot look", error=str(e), hint="it needs root, CAP_SYS_PTRACE and the daemon's /proc")
        self._forget_all_but(pages)
        for worker in found:
            with _surely(worker.action_id):
                self._attend(worker, records)
        for process in self._orphans.keys() - {worker.process for worker in found}:
            self._clear_up(self._orphans.pop(process), records)
        for key, record in pages.items():
            with _surely(record.action_id):
                self._tend(key, record, found)
        with _surely("of a GPU helper"):
            self._tend_gpus(list(pages.values()))
        return None

    def _note(self, daemon: Daemon | None) -> None:
        if daemon != self._daemon:
            self._quiet = False  # a worker of the one before may be left
            _say(logging.INFO, "a daemon" if daemon else "no daemon", pid=daemon.process[0] if daemon else None)
        self._daemon = daemon
        if daemon is not None:
            self._gone_since, self._last = None, daemon.process
        elif self._gone_since is None:
            self._gone_since = self._clock()

    def _workers(self, *, busy: bool) -> list[Worker]:
        """All; without a look at every process where none can be."""
        if self._quiet and not busy:
            return []
        found = workers(self._work_dir, self._daemon)
        self._quiet = not busy and not found
        return found

    def _forget_all_but(self, pages: Mapping[_Key, Record]) -> None:
        self._writers = {key: self._writers[key] for key in pages if key in self._writers}
        self._late = {key: self._late[key] for key in pages if key in self._late}
        self._given_back &= pages.keys()
        self._writers = dict.fromkeys(pages, self._last) | self._writers

    # --- GPU state without a daemon -----------------------------------------------------------------------------------------

    def _suspends(self, record: Record) -> bool:
        """Is something of it on its way from or to a GPU? If its daemon ends, the helper gives it back."""
        with contextlib.suppress(OSError):
            return f'"{record.action_id}"' in (self._gpu / "journal").read_text(errors="replace")
        return False

    def _tend_gpus(self, open_pages: Sequence[Record]) -> None:
        """A helper that lives gives back by itself what no daemon answers for. Where none does, and its journal says that it had begun
        something, one is started: it does the same. A daemon whose actions are at work starts one by itself."""
        if self._helper is not None and self._helper.poll() is not None:
            self._helper = None
        gone = self._daemon is None and self._clock() - (self._gone_since or 0.0) > self._grace
        idle = self._daemon is not None and all(record.ended_at for record in open_pages)
        if not (gone or idle) or self._helper is not None or self._clock() < self._helper_at or locks.holder(self._gpu / "lock"):
            return
        with contextlib.suppress(FileNotFoundError):
            if (self._gpu / "journal").stat().st_size:
                _say(logging.WARNING, "GPU state is suspended, and nobody is there: a helper is started")
                argv = [
                    sys.executable,
                    "-m",
                    "hibernode",
                    "gpu-helper",
                    "--directory",
                    str(self._gpu),
                    "--libcuda",
                    self._libcuda,
                ]
                self._helper_at = self._clock() + _HELPER
                self._helper = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)

    # --- a CRIU without a daemon --------------------------------------------------------------------------------------------

    def _attend(self, worker: Worker, records: Sequence[Record]) -> None:
        """Its page socket is closed, so it rolls back by itself, unless it is stopped, or hangs. A SIGKILL is the last resort: the kernel
        lets the tree run then, but 4 of 118 such kills cost it a process (docs/crashes.md)."""
        if not worker.orphan or _restores(worker, records):  # what is half restored is killed with its place, not helped on
            return
        now, pid = self._clock(), worker.process[0]
        orphan = self._orphans.setdefault(worker.process, _Orphan(now, worker.action_id, set()))
        orphan.holds.update(worker.holds)
        if worker.stopped:
            _say(logging.WARNING, "criu is stopped, and nobody waits for it: it goes on", action=worker.action_id, pid=pid)
            trees.send(worker.process, signal.SIGCONT)
        elif worker.holds and now - orphan.since > self._grace:
            pids = [each for each, _ in worker.holds][:100]
            _say(logging.ERROR, "criu hangs, and holds a workload: killed", action=worker.action_id, pid=pid, pids=pids)
            trees.send(worker.process, signal.SIGKILL)

    def _clear_up(self, orphan: _Orphan, records: Sequence[Record]) -> None:
        """It has ended. If it came to the end of a dump for a kill, it left the tree stopped: for a daemon that may have looked before."""
        record = next((record for record in records if record.action_id == orphan.action_id), None)
        if record is None or remedy(record) != "finish_kill":
            with _surely(orphan.action_id):
                _told("goes on", orphan.action_id, _let_go(orphan.holds, _stopped(record) if record else []))

    # --- an action that is open ---------------------------------------------------------------------------------------------

    def _tend(self, key: _Key, record: Record, found: Sequence[Worker]) -> None:
        since = abandoned_since(record, self._daemon, self._gone_since or 0.0, self._writers[key])
        if since is not None:
            if key not in self._given_back and self._clock() - since > self._grace and self._give_back(record, found):
                self._given_back.add(key)  # what its owner stops from now on is his
        elif record.until and self._clock() > record.until + self._grace and (_holds(record, found) or self._suspends(record)):
            self._hurry(key, record, found)

    def _give_back(self, record: Record, found: Sequence[Worker]) -> bool:
        """The journal's own rule, as far as it needs no store. True if there is nothing left to do.

        `settle` (nobody was told `ready`; the store would say whether the commit came to its end) is a thaw here, also where the
        workload is to be killed: it must not stand still for as long as no daemon comes. That takes nothing from the recovery: it asks
        the store as ever, and if the checkpoint is there it kills the tree by pid and start time, wherever it has got to: what it did
        since the dump was not to be kept, and its checkpoint is whole. Only a file that it went on writing may then be longer than
        CRIU expects at a restore (`file_changed`)."""
        match remedy(record):
            case "kill_restored" if stays(self._work_dir, record):
                return True  # it runs, and the next daemon says `ready` of it
            case "kill_restored":
                return not self._end_restored(record, found)
            case "finish_kill":
                if record.kill and record.place.startswith("pod/"):
                    return True  # killed, it would be started anew by its kubelet: it stands still until the next daemon has it deleted
                if record.kill:
                    killed = trees.kill_now(_trees(record))
                    freezer.thaw(record.freezers)  # who is frozen does not die
                    return not _told("killed, as was said", record.action_id, killed)
                return True
            case _:
                thawed = [place for place in record.freezers if freezer.is_asked(place)]
                freezer.thaw(thawed)
                _told("goes on", record.action_id, _let_go(_trees(record), _stopped(record)) or _trees(record)[: len(thawed)])
                return not _holds(record, found)

    def _end_restored(self, record: Record, found: Sequence[Worker]) -> list[Identity]:
        """Nobody of it is left when this is empty. Where no cgroup could be made, what descends from its CRIU is of it."""
        members = [pid for place in record.freezers for pid in freezer.members(place)]
        if 0 in members or (record.place and 0 in cgroup.members(record.place)):  # they have no pid here
            _say(logging.ERROR, "not in the pid namespace of the daemon: nothing is done", action=record.action_id)
            return []
        of_criu = [worker.process for worker in found if worker.action_id == record.action_id]
        inside = [(pid, proc.start_time(pid)) for pid in members]
        killed = trees.kill_now([*_trees(record), *of_criu, *inside], record.place)
        freezer.thaw(record.freezers)  # a container that waited for its start: who is frozen does not die
        return _told("half restored: killed", record.action_id, killed)

    def _hurry(self, key: _Key, record: Record, found: Sequence[Worker]) -> None:
        """The daemon is there, and should have let go long ago. If it waits for a CRIU that is stopped, that goes on; one that hangs, and
        what is half restored, it kills by itself. If it does none of that, it hangs: its end closes its page sockets, and CRIU lets go."""
        holders = [worker for worker in found if worker.action_id == record.action_id]
        for worker in holders:
            if worker.stopped:
                pid = worker.process[0]
                _say(logging.WARNING, "criu is stopped, and holds a workload: it goes on", action=record.action_id, pid=pid)
                trees.send(worker.process, signal.SIGCONT)
        may_wait = bool(holders) or remedy(record) == "kill_restored"
        if may_wait and self._clock() - self._late.setdefault(key, self._clock()) <= self._grace:
            return
        if self._daemon is None or locks.holder(self._lock) != self._daemon.process[0]:
            return  # it has ended meanwhile
        late, pid = round(self._clock() - record.until, 3), self._daemon.process[0]
        facts = {"action": record.action_id, "phase": record.phase, "late": late, "pid": pid}
        _say(logging.ERROR, "the daemon holds a workload past its deadline: killed", **facts)
        trees.send(self._daemon.process, signal.SIGKILL)


@contextlib.contextmanager
def _surely(action_id: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        _say(logging.ERROR, "could not do it, and will try again", action=action_id, error=str(e))


def _key(record: Record) -> _Key:
    return record.action_id, record.phase, record.status, record.until


def _restores(worker: Worker, records: Sequence[Record]) -> bool:
    return any(record.action_id == worker.action_id and record.type == "restore" for record in records)


def _trees(record: Record) -> list[Identity]:
    return [(tree.pid, tree.start_time) for tree in record.trees]


def _stopped(record: Record) -> list[Identity]:
    """By their owner, before anything was done to them."""
    return [(tree.pid, tree.start_time) for tree in record.trees if tree.stopped]


def _holds(record: Record, found: Sequence[Worker]) -> bool:
    """Does somebody stand still because of this action? Not who is stopped after the daemon has let go, or traced by a debugger. What is
    being restored stands still until CRIU has ended; from the probe on it runs, and a daemon that stays there may only have no disk to
    write `ready` to: its end would be the tree's."""
    workers_of_it = [worker for worker in found if worker.action_id == record.action_id]
    if remedy(record) == "kill_restored":
        there = bool(record.place and cgroup.members(record.place)) or bool(proc.forest(_trees(record)))
        there = there or any(map(freezer.members, record.freezers))
        return there and (record.phase != "probing" or bool(workers_of_it))
    traced = {process for worker in workers_of_it for process in worker.holds}
    keeps_stopped = record.kill or record.phase in ("suspending", "dumping")
    if keeps_stopped and any(map(freezer.is_asked, record.freezers)):
        return True
    here = [process for process in proc.forest(_trees(record)) if process not in _stopped(record)]
    return any(process in traced or (keeps_stopped and _is_stopped(process)) for process in here)


def _is_stopped(process: Identity) -> bool:
    return "T" in proc.thread_states(process[0])


def _let_go(processes: Iterable[Identity], leave: Collection[Identity]) -> list[Identity]:
    """Who of these, and of what descends from them, was stopped; they go on, except those in `leave`."""
    still = [process for process in proc.forest(processes) if process not in leave and _is_stopped(process)]
    trees.thaw(still, leave)
    return still


def _told(what: str, action_id: str, whom: list[Identity]) -> list[Identity]:
    if whom:
        _say(logging.ERROR, f"nobody answers for this workload: {what}", action=action_id, pids=[pid for pid, _ in whom][:100])
    return whom


# --- saying it --------------------------------------------------------------------------------------------------------------


def _say(level: int, event: str, **facts: object) -> None:
    _log.log(level, event, extra={"facts": {key: value for key, value in facts.items() if value is not None}})


class Lines(logging.Formatter):
    """The daemon's lines, without the memory that structlog takes."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")
        if self._as_json:
            about = {"level": record.levelname.lower(), "logger": record.name, "timestamp": stamp}
            return json.dumps({**facts, "event": record.getMessage(), **about}, default=str)
        said = " ".join(f"{key}={value}" for key, value in facts.items())
        return f"{stamp} [{record.levelname.lower():<8}] {record.getMessage()} {said}".rstrip()


def _log_to_stderr(settings: Config) -> None:
    on_terminal = sys.stderr.isatty() if settings.log.format == "auto" else settings.log.format == "console"
    handler = logging.StreamHandler()
    handler.setFormatter(Lines(as_json=not on_terminal))
    logging.basicConfig(level=settings.log.level.upper(), handlers=[handler], force=True)
