"""The GPU helper: the one process of a node that makes CUDA driver calls. `hibernode gpu-helper`; the daemon starts it when it needs one.

A driver call cannot be ended from outside, and one that is abandoned leaves a process locked. So calls are made here, where nobody ends
them: the helper outlives its daemon, and has a journal of its own. Before each call it writes down what it is about to do, to which
process (pid and start time, because pids come again); what a dead helper left half done, the next one undoes. Each action has a
connection, and each daemon one for all its actions: during a dump nobody asks anything, so that an action does not see that its helper has
died. An action without a connection, because its daemon died, is undone `ORPHAN` seconds later: all its processes are restored, then all
unlocked. What hangs in the driver is waited for; who asked is told that it is `wedged`.

With `gpu.design = "stop"` it also stops the whole tree, and has none but the driver's own thread run until all is given back
(`halting.py`). An action that is undone because somebody died lets its tree go on first, which needs no driver.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from hibernode.drivers.gpu import halting, talk
from hibernode.drivers.gpu.cuda import Cuda, CudaError, State, Unusable
from hibernode.drivers.gpu.talk import AT_ONCE, Question, Result, Verb
from hibernode.ports import Identity

ORPHAN = 5.0  # seconds an action is kept for a daemon that comes back
UNDO = 60.0  # seconds for a process to be restored, or unlocked, until its peers do not wait for it any more
TURN = 5.0  # seconds that one who is to be parked waits for another call for him; his kill must not wait for one that hangs
AGAIN = 30.0  # seconds until the undoing of one that could not be undone is tried again
_TAKES = ("locking", "checkpointing", "halting")
_LOOK = 0.5  # seconds
_END = 0.05  # seconds from the last descriptor of a process that ends to its end; it takes less than a millisecond
_HALT = 5.0  # seconds for SIGSTOP to stop a process: one that waits for a disk, or for a child by vfork, may not
_ROLLBACK = 30.0  # seconds for a CRIU without a daemon to let go of a tree: then the watchdog has killed it
_BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
_log = logging.getLogger("hibernode.gpu")


# --- what it has begun --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halted:
    """A process that this helper has stopped. Its restore thread (0: it uses no GPU) with the signal mask that is its own: a tracer that
    dies lets go of a thread, but leaves its mask as it is."""

    thread: int = 0
    mask: int = 0


class Unnoted(Exception):
    """What was to be done is not in the journal, and was not begun."""

    def __init__(self, why: OSError) -> None:
        super().__init__(f"the journal cannot be written: {why.strerror}")


class Journal:
    """Which processes are not as they were: one line before each call, one after it, on disk when `write` returns. So too who is stopped,
    from before he is until he has been let go on."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._held: dict[str, dict[Identity, str]] = {}
        self._halted: dict[str, dict[Identity, Halted]] = {}
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last one may be half a line: its call was not made
                said = json.loads(line)
                if said["boot"] == _BOOT:
                    halted = Halted(int(said.get("thread", 0)), int(said.get("mask", 0)))
                    self._note(said["action"], (int(said["pid"]), int(said["start"])), said["step"], halted)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        if not self._held and not self._halted:
            os.ftruncate(self._file, 0)  # of another boot, or given back
        elif not path.read_bytes().endswith(b"\n"):
            os.write(self._file, b"\n")

    def write(self, action: str, who: Identity, step: str) -> None:
        """What takes something away has to be on disk, or it is not begun: Unnoted. What gives back is done all the same: it would be
        done once more, which changes nothing."""
        try:
            self._write(action, {who: Halted()}, step)
        except OSError as e:
            if step in _TAKES:
                raise Unnoted(e) from e
            _log.warning("cannot write the journal: %s", e)

    def halting(self, action: str, processes: Mapping[Identity, Halted]) -> None:
        """Raises Unnoted: then none of them is stopped."""
        try:
            self._write(action, processes, "halting")
        except OSError as e:
            raise Unnoted(e) from e

    def going_on(self, action: str, processes: Sequence[Identity]) -> None:
        with contextlib.suppress(OSError):  # as in `write`
            self._write(action, dict.fromkeys(processes, Halted()), "going on")

    def _write(self, action: str, processes: Mapping[Identity, Halted], step: str) -> None:
        lines = []
        with self._lock:
            for who, halted in processes.items():
                self._note(action, who, step, halted)
                more = {"thread": halted.thread, "mask": halted.mask} if halted.thread else {}
                lines.append(json.dumps({"boot": _BOOT, "action": action, "pid": who[0], "start": who[1], "step": step, **more}))
            if self._held or self._halted:
                self._append("".join(f"{line}\n" for line in lines).encode())
            else:
                os.ftruncate(self._file, 0)
            os.fdatasync(self._file)

    def _append(self, data: bytes) -> None:
        """All of it or nothing."""
        size = os.fstat(self._file).st_size
        if os.write(self._file, data) < len(data):
            os.ftruncate(self._file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _note(self, action: str, who: Identity, step: str, halted: Halted) -> None:
        if step == "halting":
            self._halted.setdefault(action, {})[who] = halted
        elif step == "going on":
            self._halted.get(action, {}).pop(who, None)
        elif step in ("running", "gone", "parking"):
            self._held.get(action, {}).pop(who, None)
        else:
            self._held.setdefault(action, {})[who] = step
        for book in (self._held, self._halted):
            if not book.get(action, True):
                del book[action]

    def held(self) -> dict[str, list[Identity]]:
        """The actions that have not given everything back, with the processes whose GPU state is left; none, if only that it stands
        still is left."""
        with self._lock:
            return {action: list(self._held.get(action, {})) for action in [*self._held, *self._halted]}

    def is_saved(self, action: str, who: Identity) -> bool:
        """It is checkpointed, and nothing has been begun since."""
        with self._lock:
            return self._held.get(action, {}).get(who) == State.CHECKPOINTED.name.lower()

    def holder(self, who: Identity) -> str:
        """The action that has not given it back; empty: none."""
        with self._lock:
            return next((action for action, held in self._held.items() if who in held), "")

    def halted(self, action: str) -> dict[Identity, Halted]:
        """Who stands still for that action."""
        with self._lock:
            return dict(self._halted.get(action, {}))


# --- calls ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What is done to one process: the driver's call, what the journal says before it, and the state in which it is done already."""

    make: Callable[[Cuda, int, Question], None]
    before: str
    done_in: frozenset[State]


_CALLS: dict[Verb, Call] = {
    "lock": Call(lambda cuda, pid, ask: cuda.lock(pid, ask.timeout_ms), "locking", frozenset()),
    "checkpoint": Call(lambda cuda, pid, _: cuda.checkpoint(pid), "checkpointing", frozenset()),
    "restore": Call(lambda cuda, pid, ask: cuda.restore(pid, ask.pairs), "restoring", frozenset({State.LOCKED, State.RUNNING})),
    "unlock": Call(lambda cuda, pid, _: cuda.unlock(pid), "unlocking", frozenset({State.RUNNING})),
}


@dataclass
class Helper:
    """Answers questions, each in the thread of its connection. One call at a time for each process."""

    cuda: Cuda
    journal: Journal
    tracer: halting.Tracer = field(default_factory=halting.Tracer)
    answered_for: dict[int, frozenset[str]] = field(default_factory=dict)  # actions, by connection
    _busy: dict[Identity, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _parked: set[Identity] = field(default_factory=set)  # who was or is to be parked, and may be there still
    _standing: threading.Lock = field(default_factory=threading.Lock)  # one at a time stops processes, or lets them go on
    _calls: int = 0

    def answer(self, ask: Question) -> list[Result]:
        try:
            match ask.verb:
                case "probe":
                    found = self._all(ask, self._probe)
                case "park":
                    found = self._all(ask, lambda who: self._park(ask, who))
                case "undo":
                    self._let_go(ask.action, _ROLLBACK)
                    found = self._resume(ask.of(self.journal.held().get(ask.action, [])))
                case "halt":
                    found = self._halt(ask)
                case "resume":
                    found = self._resume_halted(ask)
                case verb:
                    found = self._all(ask, lambda who: self._call(ask, verb, who))  # `own` has nobody
        except Unnoted as e:
            return [Result(who=who, name=str(e)) for who in ask.processes]
        return found

    def _resume_halted(self, ask: Question) -> list[Result]:
        """As `_resume`, and whoever was stopped for it goes on, at last; or at first, if a call hangs: it may wait for one of them."""
        new = [who for who in ask.halted if who not in self.journal.halted(ask.action)]
        if new:  # CRIU has brought them back as they were, and does not know why they stood still
            self._note_halted(ask.action, new, ask.processes)
            halting.wait_stopped(new, _HALT)
        if self._is_busy(ask.processes):
            self._let_go(ask.action)
        found = self._resume(ask)
        if not ask.strict or all(result.state == State.RUNNING.name for result in found):
            self._let_go(ask.action)
        return found

    def _resume(self, ask: Question) -> list[Result]:
        """All are restored before the first is unlocked: none runs against a peer that is half there."""
        restored = {result.who: result for result in self._all(ask, lambda who: self._call(ask, "restore", who))}
        if ask.strict and not all(result.ok for result in restored.values()):
            return list(restored.values())
        ready = [who for who, result in restored.items() if result.ok]
        unlocked = self._all(ask.of(ready), lambda who: self._call(ask, "unlock", who))
        return list((restored | {result.who: result for result in unlocked}).values())

    def _all(self, ask: Question, work: Callable[[Identity], Result]) -> list[Result]:
        """Of every process of it; one that takes longer than `patience` is wedged, and goes on."""
        pool = ThreadPoolExecutor(AT_ONCE, "gpu call")
        calls: dict[Identity, Future[Result]] = {who: pool.submit(self._counted, work, who) for who in sorted(set(ask.processes))}
        wait(calls.values(), ask.patience * -(-len(calls) // AT_ONCE) or None)
        pool.shutdown(wait=False, cancel_futures=True)
        return [_outcome(who, call) for who, call in calls.items()]

    def _counted(self, work: Callable[[Identity], Result], who: Identity) -> Result:
        with self._lock:
            self._calls += 1
        try:
            return work(who)
        finally:
            with self._lock:
                self._calls -= 1

    @property
    def calls(self) -> int:
        return self._calls

    def _probe(self, who: Identity) -> Result:
        """Whether it has GPU state, and which. Nobody whose thread cannot answer is asked: that call would never return."""
        if not halting.is_there(who):
            return Result(who=who, gone=True)
        if halted := _halted(who[0]):
            return Result(who=who, halted=halted)
        with self._turn(who):
            try:
                self.cuda.restore_thread(who[0])
                return Result(who=who, ok=True, state=self.cuda.state(who[0]).name)
            except CudaError as e:
                return _failed(who, e, gone=_ends(who))

    # --- who is about to be killed ---

    def _park(self, ask: Question, who: Identity) -> Result:
        """Nothing of it is on a GPU when this is `ok`: a driver of 595 may hang the host when a process is killed that it has restored
        (NVIDIA/cuda-checkpoint, issue 53). Who cannot answer is not waited for, nor one for whom a call hangs: its kill ends both."""
        with self._lock:
            self._parked = {each for each in self._parked if halting.is_there(each)} | {who}
        if not (turn := self._turn_of(who)).acquire(timeout=TURN):
            return Result(who=who, call="park", wedged=True)
        try:
            if not halting.is_there(who):
                self.journal.write(ask.action, who, "gone")
                return Result(who=who, gone=True)
            if self.journal.is_saved(ask.action, who):  # so it is where a workload stands still until it is killed
                self.journal.write(ask.action, who, "parking")
                return Result(who=who, ok=True, state=State.CHECKPOINTED.name)
            if who not in self.journal.halted(ask.action) and (halted := _halted(who[0])):
                return Result(who=who, call="park", halted=halted)
            self.journal.write(ask.action, who, "parking")
            with self._answering(ask.action, who):
                return self._park_now(ask, who)
        except (halting.Lost, Unnoted) as e:
            return Result(who=who, call="park", name=str(e), gone=not halting.is_there(who))
        finally:
            turn.release()

    def _park_now(self, ask: Question, who: Identity) -> Result:
        began, state = time.monotonic(), ""
        try:
            if self.cuda.state(who[0]) is State.RUNNING:
                self.cuda.lock(who[0], ask.timeout_ms)
            if self.cuda.state(who[0]) is State.LOCKED:
                self.cuda.checkpoint(who[0])
            state = self.cuda.state(who[0]).name
        except CudaError as e:
            return _failed(who, e, ms=_since(began), gone=not halting.is_there(who))
        return Result(who=who, ok=state == State.CHECKPOINTED.name, call="park", state=state, ms=_since(began))

    # --- who stands still ---

    def _halt(self, ask: Question) -> list[Result]:
        """Nobody of these runs any more. Who was stopped before is his owner's, and stays so when the others go on; he cannot be one whose
        driver is still to be asked."""
        ours = [who for who in ask.processes if not halting.is_stopped(who[0]) and halting.states(who[0]) - {"Z", "X"}]
        users = [who for who in self.journal.held().get(ask.action, []) if who in ask.processes]
        for who in users:
            if who not in ours:
                return [Result(who=who, call="halt", halted="T", gone=not halting.is_there(who))]
            try:
                if self.cuda.restore_thread(who[0]) != halting.restore_thread(who[0]):
                    return [Result(who=who, call="halt", name="its restore thread cannot be told by its name")]
            except CudaError as e:
                return [_failed(who, e)]
        with self._standing:
            self._note_halted(ask.action, ours, users)
            late = halting.stop(ours, _HALT)
        return [Result(who=who, ok=who not in late, halted=late.get(who, "" if who in ours else "T")) for who in ask.processes]

    def _note_halted(self, action: str, processes: Sequence[Identity], users: Sequence[Identity]) -> None:
        threads = {who: halting.restore_thread(who[0]) for who in processes if who in users}
        self.journal.halting(
            action,
            {who: Halted(tid, halting.blocked(who[0], tid)) if (tid := threads.get(who, 0)) else Halted() for who in processes},
        )

    def _let_go(self, action: str, patience: float = 0.0) -> None:
        """Who was stopped for that action goes on. `patience`: seconds for somebody else, who traces them, to end."""
        with self._standing:
            if halted := self.journal.halted(action):
                for who, each in halted.items():
                    if each.thread and halting.is_there(who):
                        self.tracer.give_back(who, each.thread, each.mask)
                halting.go_on(halted, patience)
                self.journal.going_on(action, list(halted))

    def _is_busy(self, processes: Sequence[Identity]) -> bool:
        with self._lock:
            return any(who in self._busy and self._busy[who].locked() for who in processes)

    @contextlib.contextmanager
    def _answering(self, action: str, who: Identity) -> Iterator[None]:
        """It can answer: if it stands still its restore thread runs, alone, until this is left."""
        halted = self.journal.halted(action).get(who)
        if halted is None:
            yield
            return
        if not halted.thread:
            raise halting.Lost("it stands still, and its restore thread cannot be told by its name")
        with self.tracer.running(who, halted.thread, halted.mask) as run:
            yield
            if run.stalled:
                self._halt_again(action, who)
        if who in self.journal.halted(action):
            halting.wait_stopped([who], _LOOK)  # who dumps it next finds it at rest

    def _halt_again(self, action: str, who: Identity) -> None:
        with self._standing:  # not while somebody lets it go on for good
            if who in self.journal.halted(action):
                halting.send(who, signal.SIGSTOP)

    # --- calls ---

    def _call(self, ask: Question, verb: Verb, who: Identity) -> Result:
        """The call, unless it is done already. It is in the journal from before it begins until the process is as it was."""
        with self._turn(who):
            if not halting.is_there(who):
                self.journal.write(ask.action, who, "gone")
                return Result(who=who, gone=True)
            if (other := self.journal.holder(who)) not in ("", ask.action):
                return Result(who=who, call=verb, name=f"action {other} has it")
            if who in self._parked:  # an undo that had begun before it was given up
                return Result(who=who, call=verb, name="it is about to be killed")
            try:
                with self._answering(ask.action, who):
                    return self._call_now(ask, verb, who)
            except halting.Lost as e:
                return Result(who=who, call=verb, name=str(e), gone=not halting.is_there(who))

    def _call_now(self, ask: Question, verb: Verb, who: Identity) -> Result:
        call, began = _CALLS[verb], time.monotonic()
        try:
            if call.done_in and self.cuda.state(who[0]) in call.done_in:
                return self._done(ask, who, began)
            self.journal.write(ask.action, who, call.before)
            call.make(self.cuda, who[0], ask)
        except Unusable as e:
            return Result(who=who, call=verb, name=str(e))
        except CudaError as e:
            _log.warning("%s of pid %d: %s", verb, who[0], e)
            found = self._done(ask, who, began)
            if found.ok and verb == "unlock" and found.state == State.RUNNING.name:
                return found  # the error was on its way back
            return _failed(who, e, found.state, found.ms, gone=found.gone)
        return self._done(ask, who, began)

    def _done(self, ask: Question, who: Identity, began: float) -> Result:
        """How it is now, which the journal says too."""
        try:
            state = self.cuda.state(who[0])
        except CudaError as e:
            if _ends(who):
                self.journal.write(ask.action, who, "gone")
                return Result(who=who, gone=True, ms=_since(began))
            return _failed(who, e, ms=_since(began))
        self.journal.write(ask.action, who, state.name.lower())
        return Result(who=who, ok=True, state=state.name, ms=_since(began))

    @contextlib.contextmanager
    def _turn(self, who: Identity) -> Iterator[None]:
        with self._turn_of(who):
            yield

    def _turn_of(self, who: Identity) -> threading.Lock:
        with self._lock:
            return self._busy.setdefault(who, threading.Lock())

    def attach(self, connection: int, actions: Iterable[str]) -> None:
        """These have somebody who answers for them, as long as that connection is there."""
        with self._lock:
            self.answered_for[connection] = frozenset(actions)

    def detach(self, connection: int) -> None:
        with self._lock:
            self.answered_for.pop(connection, None)

    def orphans(self) -> dict[str, list[Identity]]:
        held = self.journal.held()
        with self._lock:
            attached = frozenset[str]().union(*self.answered_for.values())
            return {action: who for action, who in held.items() if action not in attached}

    def undo(self, action: str, processes: Sequence[Identity]) -> bool:
        """Give back what an action holds for which nobody answers any more; whether all of it is."""
        _log.warning("nobody answers for action %s: pids %s go on", action, [pid for pid, _ in processes])
        self._let_go(action, _ROLLBACK)
        found = self._resume(Question("resume", action, list(processes), patience=UNDO))
        return all(result.gone or result.state == State.RUNNING.name for result in found)


def _halted(pid: int) -> str:
    """The state of a thread that is stopped, or traced, or in a frozen cgroup; empty if all can run."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, IndexError):
                state = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                if state in ("T", "t"):
                    return state
                if "refrigerator" in (task / "wchan").read_text():
                    return "frozen"
    return "frozen" if _in_frozen_cgroup(pid) else ""


def _in_frozen_cgroup(pid: int) -> bool:
    """Of the second version of cgroups, which show nothing of it in a thread's state."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                    events = Path(f"{mount}{line[3:]}/cgroup.events")
                    if events.exists() and "frozen 1" in events.read_text():
                        return True
    return False


def _ends(who: Identity) -> bool:
    """Whether an error of the driver's was because it is about to end: its descriptors are closed a moment before it is gone."""
    limit = time.monotonic() + _END
    while (there := halting.is_there(who)) and time.monotonic() < limit:
        time.sleep(_END / 50)
    return not there


def _outcome(who: Identity, call: Future[Result]) -> Result:
    if not call.done() or call.cancelled():
        return Result(who=who, wedged=True)
    try:
        return call.result()
    except Unnoted as e:
        return Result(who=who, name=str(e))


def _failed(who: Identity, error: CudaError, state: str = "", ms: float = 0.0, *, gone: bool = False) -> Result:
    return Result(who=who, call=error.call, code=error.code, name=error.name, state=state, ms=ms, gone=gone)


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1e3, 3)


# --- who asks ------------------------------------------------------------------------------------------------------------------


class Server:
    """Connections, orphans, and when to end."""

    def __init__(self, helper: Helper, listening: socket.socket, idle: float) -> None:
        self._helper, self._listening, self._idle = helper, listening, idle
        self._connections = self._questions = 0
        self._ending = threading.Event()
        self._due: dict[str, float] = {}  # when an orphan is undone
        self._undoing: dict[str, threading.Thread] = {}

    def run(self) -> None:
        """Until SIGTERM, or until nobody has asked anything for `idle` seconds and nothing is held. What nobody answers for is undone
        before it ends; what hangs is waited for."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._ending.set())
        threading.Thread(target=self._accept, daemon=True).start()
        quiet_since = time.monotonic()
        while not self._ending.wait(_LOOK):
            self._undo_orphans(ORPHAN)
            if self._connections or self._helper.calls or self._helper.journal.held():
                quiet_since = time.monotonic()
            elif time.monotonic() - quiet_since > self._idle:
                break
        while self._questions:
            time.sleep(_LOOK)
        self._give_back()
        while self._helper.calls:  # never leave a call that has begun; its undoing had not the patience for it
            while self._helper.calls:
                time.sleep(_LOOK)
            self._give_back()

    def _give_back(self) -> None:
        """What nobody answers for; without what hangs for longer than an undoing has patience."""
        for thread in list(self._undoing.values()):
            thread.join()
        for action, processes in self._helper.orphans().items():
            self._helper.undo(action, processes)

    def _undo_orphans(self, after: float) -> None:
        """One thread for each action, never two: what hangs would gather them."""
        now, orphans = time.monotonic(), self._helper.orphans()
        self._undoing = {action: thread for action, thread in self._undoing.items() if thread.is_alive()}
        self._due = {action: self._due.get(action, now + after) for action in orphans}
        for action, at in list(self._due.items()):
            if now >= at and action not in self._undoing:
                self._due[action] = now + AGAIN
                self._undoing[action] = threading.Thread(target=self._helper.undo, args=(action, orphans[action]), daemon=True)
                self._undoing[action].start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            self._connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rwb") as stream:
                for line in stream:
                    ask = Question.of_line(line)
                    self._helper.attach(id(connection), [ask.action, *ask.mine])
                    self._questions += 1
                    try:
                        answer = self._helper.answer(ask)
                    finally:
                        self._questions -= 1
                    stream.write(talk.encode(answer))
                    stream.flush()
        except (OSError, ValueError) as e:
            _log.warning("a connection ended: %s", e)
        except Exception:  # noqa: BLE001 - the other connections go on
            _log.exception("defect")
        finally:
            self._helper.detach(id(connection))
            self._connections -= 1


# --- the program ---------------------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    """Returns in the caller's process when the helper answers in one of its own; what keeps it from it is a line of JSON, and status 1."""
    parser = argparse.ArgumentParser("hibernode gpu-helper", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="where its socket, journal, lock and log are")
    parser.add_argument("--libcuda", default="", help="path of libcuda.so.1; else what the loader finds")
    parser.add_argument("--idle", type=float, default=300.0, help="seconds without a question after which it ends")
    arguments = parser.parse_args(words)
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    heard, say = os.pipe()
    if os.fork():
        os.close(say)
        said = os.fdopen(heard, "rb").read()
        sys.stdout.write(said.decode())
        return 0 if not said else 1
    os.close(heard)
    os.setsid()
    with open(directory / "log", "ab") as log, open(os.devnull, "rb") as nothing:
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source.fileno(), target)
    try:
        _become(directory, arguments.libcuda, arguments.idle, lambda: os.close(say))
    except Unusable as e:
        os.write(say, json.dumps({"code": e.code, "found": e.found, "wanted": e.wanted, "message": str(e)}).encode())
        return 0
    return 0


def _become(directory: Path, library: str, idle: float, ready: Callable[[], None]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # all that the machine has
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ready()  # there is one
    cuda = Cuda.open(library)
    try:
        cuda.init()
    except CudaError as e:
        raise Unusable("gpu_driver_absent", f"the driver does not start: {e}", found=e.name, wanted="CUDA_SUCCESS") from e
    path = directory / "socket"
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    with talk.address(directory) as short:
        listening.bind(short)
    path.chmod(0o600)
    listening.listen(64)
    _log.info("serving, driver %d, pid %d", cuda.version, os.getpid())
    ready()
    try:
        Server(Helper(cuda, Journal(directory / "journal")), listening, idle).run()
    finally:
        path.unlink(missing_ok=True)
        _log.info("ended")
    return None
