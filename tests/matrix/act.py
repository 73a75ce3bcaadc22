"""One case, played on a bench: arrange the workload, give the command, let go wrong what is meant to, wait for the end, look at all of it.

The outcome of a case is free: an action may succeed or fail, with any code. What is not free is in `checks`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import grpc

from hibernode._pb import hibernode_pb2 as pb
from hibernode.errors import Internal, NotFound
from hibernode.model import CancelCommand, CheckpointCommand, Event, Overrides, RestoreCommand, Status, Target
from tests import keeper as processes
from tests.fakes.cuda import Call
from tests.matrix import checks
from tests.matrix.bench import ASK, GRACE, LIMIT, SUBJECTS, Bench, Daemon, Subject, is_pid_collision
from tests.matrix.cases import DIRECTIONS, Case
from tests.matrix.checks import Census, Finding, Findings
from tests.matrix.script import Plan

SETTLE = 45.0  # seconds until an action must have ended, daemons restarted and redeliveries waited for
ANSWERED = 0.5  # seconds for an answer of the daemon, if its loop is free to give one
LATE = 0.4  # seconds for a point that is only reached after the end
STALL = 0.7  # seconds
COLLISIONS = 10  # tries of a restore whose pids somebody else has
# A CRIU that is SIGKILLed in the middle of a dump may take a process of the workload with it; see docs/crashes.md.
KILLS_CRIU = (
    "criu_killed",
    "criu_and_daemon_killed",
    "watch_criu_dies_daemon_stopped",
    "watch_criu_stopped_daemon_dies",
    "watch_criu_stopped",
)
_UNTIDY = ("raise", "stall_long")  # a mark that a store did not take back then is left to a collection
_IN_DRIVER = re.compile(r"driver\.(?P<call>\w+)")
LEFT_ALONE = 3.0  # seconds more than promised, on a loaded machine
LIVES = 6  # of the daemon in one case
RETIRED = 4  # checkpoints that stay in the store after their case
RESTORED = 8  # of so many checkpoints whose workload runs on, one is restored all the same

Command = CheckpointCommand | RestoreCommand


@dataclass
class Row:
    """What a case came to."""

    case: str
    fired: bool = False  # what was to go wrong did
    status: str = ""
    code: str = ""
    message: str = ""
    seconds: float = 0.0
    restarts: int = 0
    restored: bool = False  # its checkpoint was restored afterwards
    killed_by_criu: bool = False  # a process of the workload died with CRIU; see docs/crashes.md
    increment: bool = False  # the checkpoint that is made, or restored, refers to others
    action: str = ""
    findings: Findings = field(default_factory=list)
    log: str = ""  # of the daemon, where there are findings

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Player:
    """Plays cases on one bench, one after the other, with the same workloads for as long as they live."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self._bench, self._seed = bench, seed
        self._kept = 0
        self._retired: deque[str] = deque()
        self.collisions = 0  # restores that met a pid of somebody else
        self.baseline: Census | None = None

    def survey(self) -> dict[tuple[str, str], dict[str, int]]:
        """One run of each direction and workload without a fault: the points it passes. What the daemon has after that is its measure."""
        found = {}
        for subject in SUBJECTS:
            for direction in DIRECTIONS:
                row = self.play(Case(direction, subject, "none"))
                if row.status != Status.READY or row.findings:
                    raise RuntimeError(f"without any fault: {row}")
                found[direction, subject] = self._hits
                seen = checks.census(self._bench)
                self.baseline = seen | self.baseline if self.baseline else seen
        return found

    def play(self, case: Case) -> Row:
        """What became of it. Whatever the harness itself trips over is a finding too, and the bench is set up again."""
        row, began = Row(case.id), time.monotonic()
        subject = self._bench.subjects[case.subject]
        log_at = self._bench.log.stat().st_size
        try:
            self._bench.insist_running()
            self._arrange(case.direction, subject)
            self._play(case, subject, row)
        except Exception as e:
            row.findings.append(Finding("harness", f"{type(e).__name__}: {e}"))
            self._start_over(subject)
        row.seconds = round(time.monotonic() - began, 3)
        if row.findings:
            with self._bench.log.open("rb") as log:
                log.seek(log_at)
                row.log = log.read().decode(errors="replace")[-20000:]
        return row

    # --- without faults, for whoever only wants to see it go round ------------------------------------------------------------

    def put_away(self, subject: Subject) -> Findings:
        """Checkpoint it and have it killed."""
        self._arrange("keep", subject)
        subject.born = subject.beats.wait()
        self._end_with_base(subject)
        return []

    def take_out(self, subject: Subject) -> Findings:
        """Restore it, with its token, its memory and its counter; its checkpoint is deleted."""
        found = self._bring_back(subject, subject.base)
        self._retire(subject.base)
        subject.base = ""
        return found

    # --- before -------------------------------------------------------------------------------------------------------------

    def _arrange(self, direction: str, subject: Subject) -> None:
        """It runs, for a checkpoint; it is dead, and there is a checkpoint of it, for a restore."""
        if direction == "restore":
            if not subject.base:
                self._arrange("keep", subject)
                self._end_with_base(subject)
            return
        if subject.base:
            if wrong := self._bring_back(subject, subject.base):
                raise RuntimeError(f"a checkpoint that was restored before: {wrong}")
            self._retire(subject.base)
            subject.base = ""
        elif not subject.born or len(subject.living()) < len(subject.born):
            subject.start()
        if subject.kind == "chain" and not subject.last:  # what the next is to refer to
            self._retire(self._made(subject, kill=False))

    def _end_with_base(self, subject: Subject) -> None:
        self._note_base(subject, self._made(subject, kill=True))

    def _made(self, subject: Subject, *, kill: bool) -> str:
        """A checkpoint of it without any fault; its id."""
        command = self._checkpoint(subject, random.Random(), kill=kill)
        event = self._without_fault(command)
        if event.status != Status.READY:
            raise RuntimeError(f"a checkpoint without any fault: {event.code} {event.message}")
        subject.last = command.checkpoint_id
        return command.checkpoint_id

    def _note_base(self, subject: Subject, checkpoint_id: str) -> None:
        """It has just been killed: how far it had counted is what a restore begins with."""
        subject.base, subject.born = checkpoint_id, subject.beats.read()
        subject.end()

    def _bring_back(self, subject: Subject, checkpoint_id: str, *, whole: bool = True) -> Findings:
        """Restore it where nothing of it is left: the old processes go on, or it is a finding."""
        before = subject.born
        event = self._restored(checkpoint_id)
        if event.status != Status.READY:
            return [Finding("wrong_ready", f"{checkpoint_id} does not restore: {event.code} {event.message}")]
        if whole:
            found = checks.goes_on(subject, before) or checks.same(before, subject.beats.read())
        else:
            found = self._none_held(subject)
        return [Finding("wrong_ready", f"restored: {each.text}") for each in found]

    def _restored(self, checkpoint_id: str) -> Event:
        """How a restore ends; again, if one of its pids belongs to somebody else for the moment: this machine is not ours alone."""
        for _ in range(COLLISIONS):
            event = self._without_fault(RestoreCommand(action_id=str(uuid.uuid4()), checkpoint_id=checkpoint_id))
            if not is_pid_collision(event.code, event.message, str(event.details)):
                break
            self.collisions += 1
            time.sleep(0.3)
        return event

    def _without_fault(self, command: Command) -> Event:
        daemon = self._bench.insist_running()
        daemon.plan(Plan())
        self._bench.bus.send(command)
        waiting = _Action(self._bench, command, Row(""), SETTLE)
        waiting.settle()
        if waiting.row.findings:
            raise RuntimeError(f"without any fault: {waiting.row.findings}")
        return self._bench.bus.events(command.action_id)[-1]

    def _checkpoint(self, subject: Subject, rng: random.Random, *, kill: bool) -> CheckpointCommand:
        asynchronous = rng.random() < 0.5
        ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)]
        said = subject.kind == "chain" and rng.random() < 0.5  # or it is a heartbeat, which is one unasked
        opts = {"leave_running": not kill} | ({"increment": "auto"} if said else {})
        return CheckpointCommand(
            action_id=ids[0], checkpoint_id=ids[1], target=Target(**subject.target),
            reason="heartbeat" if subject.kind == "chain" and not said else "manual",
            overrides=Overrides(asynchronous=asynchronous, criu_opts=json.dumps(opts)),
        )  # fmt: skip

    def _retire(self, checkpoint_id: str) -> None:
        """It stays for a while, for whoever reads the store; the oldest such one is deleted, if none refers to it."""
        self._retired.append(checkpoint_id)
        if len(self._retired) > RETIRED and not self._delete(oldest := self._retired.popleft()):
            self._retired.append(oldest)

    def _delete(self, checkpoint_id: str) -> bool:
        """False: others refer to it."""
        self._bench.insist_running()
        try:
            self._bench.stub.DeleteCheckpoint(pb.CheckpointId(checkpoint_id=checkpoint_id), timeout=ASK)
        except grpc.RpcError as e:  # what is left of it is found where the store is looked at
            return "referenced" not in dict(e.trailing_metadata() or ()).get("hibernode-code", "")
        return True

    def _start_over(self, subject: Subject) -> None:
        """After a case that nobody can go on from: another daemon, another workload."""
        with contextlib.suppress(Exception):
            self._bench.stop(signal.SIGKILL)
        self._bench.bus.revive()
        self._bench.criu_fault(None)
        for pid in self._bench.stray_criu():
            with contextlib.suppress(Exception):
                processes.kill_all([pid])
        subject.end()
        subject.base, subject.born = "", ()

    # --- the case itself ----------------------------------------------------------------------------------------------------

    def _play(self, case: Case, subject: Subject, row: Row) -> None:
        rng = random.Random(f"{self._seed}/{case.id}")
        command: Command
        if case.direction == "restore":
            command = RestoreCommand(action_id=str(uuid.UUID(int=rng.getrandbits(128), version=4)), checkpoint_id=subject.base)
        else:
            command = self._checkpoint(subject, rng, kill=case.direction == "kill")
            subject.born = subject.beats.wait()
        row.action, self._stale = command.action_id, checks.stale(self._bench)
        fault = _Fault(case, self._bench, subject, command, rng)
        action = _Action(self._bench, command, row, SETTLE)
        with self._bench.watched() if case.fault.startswith("watch_") else contextlib.nullcontext():
            fault.begin()
            try:
                self._bench.bus.send(command)
                fault.given()
                action.settle(fault.fire, fault.next_plan, fault.dead, fault.look)
                fault.settled()
                action.settle(fault.fire, fault.next_plan, fault.dead, fault.look)
            finally:
                fault.over()
        row.findings += fault.findings
        row.fired = fault.done or (fault.call is None and (row.fired or case.fault in ("none", "die_at_random")))
        if fault.asked is not None:
            action.wait_for_end(fault.asked)
        action.linger(0 if fault.done or case.fault == "none" else LATE, fault.fire)
        if fault.asked is not None:  # late
            action.wait_for_end(fault.asked)
            action.linger(0)
        row.restarts = action.restarts
        self._hits = self._bench.insist_running().plan(Plan())
        if (
            action.restarts
            and action.known_before
            and self._hits.get("criu.dump.before", 0) + self._hits.get("criu.restore.before", 0)
        ):
            row.findings.append(Finding("ran_twice", "CRIU was called again for an action that a crash had ended"))
        self._judge(case, subject, command, row)

    def _judge(self, case: Case, subject: Subject, command: Command, row: Row) -> None:
        events = self._bench.bus.events(command.action_id)
        row.findings += checks.statuses(events)
        last = events[-1] if events else None
        row.status, row.code, row.message = (last.status.value, last.code, last.message) if last else ("", "", "")
        if row.code == Internal.code and case.argument != "eio":  # that one is what no code of ours stands for
            row.findings.append(Finding("defects", row.message))
        with contextlib.suppress(NotFound):
            row.increment = bool(self._bench.bases(command.checkpoint_id))
        if isinstance(command, RestoreCommand):
            self._judge_restore(subject, row)
        else:
            self._judge_checkpoint(case, subject, command, row)
        if subject.kind == "chain":
            row.findings += checks.guarded(self._bench)
            if case.fault not in _UNTIDY and not row.restarts:
                row.findings += checks.no_more_stale(self._bench, self._stale)
        row.findings += checks.nothing_left(self._bench, self.baseline)
        if any(
            found.counter in ("left_frozen", "left_suspended", "lost_workloads", "half_restores", "not_killed", "no_terminal")
            for found in row.findings
        ):
            self._start_over(subject)
        elif any(found.counter == "leaks" for found in row.findings):
            self._bury_leaks()

    def _bury_leaks(self) -> None:
        """What was counted once is not counted again with the next case."""
        with contextlib.suppress(TimeoutError):
            processes.kill_all(self._bench.stray_criu())
        self._bench.stop()

    def _judge_restore(self, subject: Subject, row: Row) -> None:
        if row.status == Status.READY:
            row.restored = True
            row.findings += checks.goes_on(subject, subject.born)
            row.findings += checks.same(subject.born, subject.beats.read() or subject.born)[:1] if not row.findings else []
        elif row.code != "outcome_unknown":
            row.findings += checks.nothing_lives(subject, "half_restores")
        subject.end()

    def _judge_checkpoint(self, case: Case, subject: Subject, command: CheckpointCommand, row: Row) -> None:
        if case.fault == "driver_hangs":  # its call has returned now, and the helper gives back what it was at
            row.findings += checks.on_gpu(subject, checks.GIVEN_BACK)
        ready, kill, dies = row.status == Status.READY, case.direction == "kill", "dies" in case.fault
        if not ready:
            row.findings += checks.no_checkpoint(self._bench, command.checkpoint_id, unknown=row.code == "outcome_unknown")
        if not (ready and kill):
            row.findings += self._runs_on(case, subject, row) if not dies else self._none_held(subject)
        if ready:
            row.findings += checks.verifies(self._bench, command.checkpoint_id)
            self._kept += 1
            if kill or dies or self._kept % RESTORED == 0:
                row.findings += self._judge_ready(subject, command.checkpoint_id, row, killed=kill and not dies, whole=not dies)
        elif dies:
            subject.end()
            subject.born = ()
        if ready:
            subject.last = command.checkpoint_id
            self._retire(command.checkpoint_id)
        else:
            self._sweep(command.checkpoint_id)

    def _runs_on(self, case: Case, subject: Subject, row: Row) -> Findings:
        found = checks.goes_on(subject, subject.born)
        if case.fault in KILLS_CRIU and {each.counter for each in found} == {"lost_workloads"}:
            row.killed_by_criu = True
            subject.end()
            subject.born = ()
            return []
        return found

    def _none_held(self, subject: Subject) -> Findings:
        """Of a workload that has died, in part or as a whole: what lives is of it, and not held."""
        if found := checks.on_gpu(subject):
            return found
        alive = {pid: subject.beats.slot(pid) for pid in subject.living()}
        for pid, before in alive.items():
            after = subject.beats.slot(pid, later_than=before)
            if after is None:
                if pid in subject.living():
                    return [Finding("left_frozen", processes.describe(pid))]
            elif after.wrong or after.token not in {beat.token for beat in subject.born}:
                return [Finding("lost_workloads", f"{subject.born} has become {after}")]
        return []

    def _judge_ready(self, subject: Subject, checkpoint_id: str, row: Row, *, killed: bool, whole: bool) -> Findings:
        """It was killed, or is now: and comes back. Not `whole`: a part of it may have died before it was dumped."""
        found = checks.nothing_lives(subject, "not_killed") if killed else []
        if killed and not found:
            subject.born = subject.beats.read() or subject.born
        subject.end()
        row.restored = True
        found += self._bring_back(subject, checkpoint_id, whole=whole)
        if found or not whole:
            subject.end()
            subject.born = ()
        return found

    def _sweep(self, checkpoint_id: str) -> None:
        """What it left in the store is counted; the next case does not see it."""
        for key in checks.in_store(self._bench, checkpoint_id):
            self._bench.store.delete(key)
        for upload in list(self._bench.store.open_uploads()):
            self._bench.leaked_uploads += 1
            self._bench.store.abort_upload(upload)


class _Action:
    """One command, until it has ended: its terminal event told, its page of the journal closed, a daemon running."""

    def __init__(self, bench: Bench, command: Command, row: Row, limit: float) -> None:
        self._bench, self._command, self.row = bench, command, row
        self._deadline = time.monotonic() + limit
        self.restarts = 0
        self.known_before = False  # the journal knew it when a daemon died

    def settle(
        self,
        fire: Callable[[dict[str, Any]], None] = lambda _: None,
        plan: Callable[[], Plan] = Plan,
        dead: Callable[[], None] = lambda: None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        while not self._ended():
            look()
            daemon = self._bench.daemon
            if daemon is None or daemon.ended:
                self._next_life(plan(), dead)
            elif (said := daemon.hear(0.01)) is not None and said["say"] == "fired":
                self._fired(daemon, said, fire)
            if time.monotonic() > self._deadline:
                record = self._bench.record(self._command.action_id)
                self.row.findings.append(
                    Finding("no_terminal", f"the journal says {record and (record['phase'], record['status'])}")
                )
                return

    def _fired(self, daemon: Daemon, said: dict[str, Any], fire: Callable[[dict[str, Any]], None]) -> None:
        self.row.fired = True
        while said["deed"] == "die" and not daemon.ended:
            daemon.hear(0.1)
        fire(said)

    def linger(self, seconds: float, fire: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        """What is to happen after the end may happen yet; then a daemon runs."""
        until = time.monotonic() + seconds
        while True:
            daemon = self._bench.daemon
            if daemon is None or daemon.ended:
                self._next_life(Plan(), lambda: None)
                return
            if (said := daemon.hear(0.01)) is not None and said["say"] == "fired":
                self._fired(daemon, said, fire)
                until = time.monotonic() + 0.1
            elif said is None and time.monotonic() > until:
                return

    def wait_for_end(self, asked: Daemon) -> None:
        """Of the daemon that was asked to stop: it drains. It may have ended, and another one run by now."""
        deadline = time.monotonic() + SETTLE
        while self._bench.daemon is asked and not asked.ended:
            asked.hear(0.02)
            if time.monotonic() > deadline:
                self.row.findings.append(Finding("daemon_failed", f"it does not end after SIGTERM: {asked.census()[1]}"))
                asked.signal(signal.SIGKILL)
                deadline += SETTLE

    def _ended(self) -> bool:
        events = self._bench.bus.events(self._command.action_id)
        if not any(event.status.terminal for event in events):
            return False
        record = self._bench.record(self._command.action_id)
        if record is None or not (record["phase"] == "done" or events[-1].code == "left_suspended"):
            return False
        daemon = self._bench.daemon
        return daemon is not None and not daemon.ended

    def _next_life(self, plan: Plan, dead: Callable[[], None]) -> None:
        """Bury the daemon that has ended, and start another."""
        daemon = self._bench.daemon
        if daemon is not None:
            code = self._bench.keeper.exit_code(daemon.pid, ASK)
            if code not in (0, -signal.SIGKILL):
                self.row.findings.append(Finding("daemon_failed", f"its exit code was {code}"))
        self.known_before = self.known_before or self._bench.record(self._command.action_id) is not None
        dead()
        self.restarts += 1
        if self.restarts > LIVES:
            raise RuntimeError("the daemon ends again and again")
        self._bench.start(plan)


class _Fault:
    """What goes wrong in one case, as far as it does not go wrong inside the daemon."""

    def __init__(self, case: Case, bench: Bench, subject: Subject, command: Command, rng: random.Random) -> None:
        self._case, self._bench, self._subject, self._command, self._rng = case, bench, subject, command, rng
        self.done = False
        self.asked: Daemon | None = None  # the daemon that was asked to stop
        self.findings: Findings = []
        self.left_alone = False  # the daemon stands still, and nobody lets it go on
        self._seen = False
        self._lives = 0
        in_driver = _IN_DRIVER.fullmatch(case.point)
        self.call = cast(Call, in_driver["call"]) if in_driver else None
        self._armed = False

    @property
    def _daemon(self) -> Daemon:
        assert self._bench.daemon is not None
        return self._bench.daemon

    def _plan(self) -> Plan:
        case = self._case
        if self.call is not None:
            undone = case.direction == "kill" and self.call in ("restore", "unlock")
            return Plan("criu.dump.after", 1, "raise", "dump_failed") if undone else Plan()
        match case.fault:
            case "die" | "die_twice" | "die_redelivered" | "criu_fault_and_die":
                return Plan(case.point, case.nth, "die")
            case "raise":
                return Plan(case.point, case.nth, "raise", case.argument, times=case.times)
            case "stall":
                return Plan(case.point, case.nth, "stall", seconds=STALL)
            case "stall_long":
                return Plan(case.point, case.nth, "stall", seconds=LIMIT + GRACE + LEFT_ALONE)
            case "watch_die":
                return Plan(case.point, case.nth, "die")
            case "none" | "die_at_random":
                return Plan()
            case fault if fault.endswith("_at_random") or fault.startswith(("criu_", "pause_criu", "watch_criu")):
                return Plan(case.point, 1, "tell")
        return Plan(case.point, case.nth, "hold")

    def begin(self) -> None:
        """Before the command is given."""
        if self._case.fault.startswith("criu_fault"):
            self._bench.criu_fault(int(self._case.argument))
        self._daemon.plan(self._plan())
        if self.call is not None:
            self._arm()

    def _arm(self) -> None:
        """From now on the driver does what it is meant to; what it answers it answers once, or as long as the case lasts."""
        case = self._case
        what = {"driver_says": case.argument.replace(".", " "), "driver_slow": f"{int(STALL * 1000)}ms"}.get(case.fault, "hang")
        for who in self._victims:
            self._bench.gpus.arm(who, self.call, what if case.times > 1 else f"{what} once")
        self._armed = True

    @property
    def _victims(self) -> list[int]:
        """On whom the driver is at work in that moment."""
        both = [beat.pid for beat in self._subject.born]
        return both if self._case.nth == 1 else [both[self._case.nth - 2]]

    def look(self) -> None:
        """Has the driver begun what is armed? It stands still, or takes its time, until this returns."""
        if not self._armed or self.done:
            return
        if self._case.fault in ("driver_says", "driver_slow"):
            self.done = self._case.times > 1 or not any(map(self._is_armed, self._victims))
            return
        steps = self._bench.gpu_steps(self._command.action_id)
        if all(steps.get(pid) == f"{self.call.removesuffix('e')}ing" for pid in self._victims):
            time.sleep(self._rng.uniform(0, 0.05))
            if self._case.fault == "driver_hangs":
                self.done = True
            else:
                self._strike()
                self._disarm()

    def _is_armed(self, who: int) -> bool:
        return (self._bench.gpus.root / "faults" / str(who) / str(self.call)).exists()

    def _disarm(self) -> None:
        if self.call is not None:
            for who in self._victims:
                self._bench.gpus.disarm(who, self.call)
        self._armed = False

    def given(self) -> None:
        """The command is given."""
        if self._case.fault == "die_at_random":
            time.sleep(self._rng.uniform(0, 0.35))
            self._daemon.signal(signal.SIGKILL)
            while not self._daemon.ended:
                self._daemon.hear(0.1)
            self.done = True

    def fire(self, _: dict[str, Any]) -> None:
        """The point is reached; a thread of the daemon may wait there."""
        if self.call is None:
            self._strike()

    def _strike(self) -> None:
        if not self.done:
            self.done = True
            getattr(self, f"_{self._case.fault}", lambda: None)()
        if not self._daemon.ended and not self.left_alone:
            self._daemon.go_on()

    def dead(self) -> None:
        """The daemon is dead, and the next one not yet there."""
        if self._case.fault == "die_redelivered":
            self._bench.bus.send_again(self._command)
        if self._case.fault.startswith("watch_") and not self._seen:
            self._seen = True
            self._see_it_run()

    def _see_it_run(self) -> None:
        """No daemon is there, or none that does anything: of the workload nothing is held, of a restore nothing is left, in a bounded
        time."""
        if isinstance(self._command, RestoreCommand):
            deadline = time.monotonic() + GRACE + LEFT_ALONE
            while time.monotonic() < deadline and not self._runs_or_is_gone():
                time.sleep(0.05)
            if not self._runs_or_is_gone():
                lives = [processes.describe(pid) for pid in self._subject.living()]
                self.findings.append(Finding("half_restores", f"left alone: {lives}"))
            return
        time.sleep(GRACE)
        found = checks.on_gpu(self._subject, checks.GIVEN_BACK) or checks.goes_on(self._subject, self._subject.born)
        if self._case.direction == "kill" and not self._subject.living():
            return  # it was ready: whether it was, is looked at in the end
        if self._case.fault in KILLS_CRIU and {each.counter for each in found} == {"lost_workloads"}:
            return  # a process died with CRIU; see docs/crashes.md
        self.findings += [Finding(each.counter, f"left alone: {each.text}") for each in found]

    def _runs_or_is_gone(self) -> bool:
        """Of a restore: nothing lives, or all of it runs."""
        if not self._subject.living():
            return True
        return not checks.goes_on(self._subject, self._subject.born) and not checks.same(
            self._subject.born, self._subject.beats.read()
        )

    def next_plan(self) -> Plan:
        """For the daemon that comes after one that died."""
        self._lives += 1
        return Plan(self._case.argument, 1, "die") if self._case.fault == "die_twice" and self._lives == 1 else Plan()

    def settled(self) -> None:
        if self._case.fault in ("redeliver", "die_redelivered"):
            self._bench.bus.send_again(self._command)

    def over(self) -> None:
        """Nothing more goes wrong."""
        self.look()
        self._disarm()
        self._bench.criu_fault(None)

    # --- what outsiders do: one method for each fault of that name -----------------------------------------------------------

    def _sigterm(self) -> None:
        self.asked = self._daemon
        self.asked.signal(signal.SIGTERM)

    def _sigterm_twice(self) -> None:
        self._sigterm()
        time.sleep(self._rng.uniform(0, 0.05))
        self._daemon.signal(signal.SIGTERM)

    def _sigterm_at_random(self) -> None:
        time.sleep(self._rng.uniform(0, 0.2))
        self._sigterm_twice() if self._rng.random() < 0.5 else self._sigterm()

    def _pause_daemon(self) -> None:
        self._daemon.signal(signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.2, 1.0))
        self._daemon.signal(signal.SIGCONT)

    def _cancel(self) -> None:
        self._bench.bus.send(CancelCommand(action_id=self._command.action_id))
        time.sleep(0.03)

    def _cancel_by_call(self) -> None:
        """The loop may be what waits at the point: the answer comes later."""
        self._bench.stub.Cancel.future(pb.ActionId(action_id=self._command.action_id), timeout=ASK)
        time.sleep(0.02)

    def _base_deleted(self) -> None:
        """Somebody wants to delete what it refers to, or may refer to; the loop may be what waits at the point."""
        if isinstance(self._command, RestoreCommand):
            ids = self._bench.bases(self._command.checkpoint_id)
        else:
            ids = [self._subject.last]
        for each in ids[:1]:
            self._wait_a_little(self._bench.stub.DeleteCheckpoint.future(pb.CheckpointId(checkpoint_id=each), timeout=ASK))

    def _collected(self) -> None:
        """Whatever is older than the last of each workload, and what is not needed at all, goes now."""
        asked = pb.GarbageRequest(apply=True, grace=0, keep_last=1)
        running = self._bench.stub.CollectGarbage(asked, timeout=ASK)
        thread = threading.Thread(target=_drained, args=(running,), daemon=True)
        thread.start()
        thread.join(ANSWERED)

    @staticmethod
    def _wait_a_little(call: grpc.Future) -> None:
        with contextlib.suppress(grpc.FutureTimeoutError, grpc.RpcError):
            call.result(timeout=ANSWERED)

    def _cancel_at_random(self) -> None:
        time.sleep(self._rng.uniform(0, 0.15))
        self._cancel_by_call() if self._rng.random() < 0.5 else self._cancel()

    def _redeliver(self) -> None:
        self._bench.bus.send_again(self._command)
        self._bench.bus.send_again(self._command)
        time.sleep(0.02)

    def _bus_stopped(self) -> None:
        """Until the action has ended, or cannot."""
        self._bench.bus.server.stop(kill=self._rng.random() < 0.5)
        self._daemon.go_on()
        self._wait_while_away()
        self._bench.bus.server.start()

    def _bus_silent(self) -> None:
        self._bench.bus.server.pause()
        self._daemon.go_on()
        self._wait_while_away()
        self._bench.bus.server.resume()

    def _wait_while_away(self) -> None:
        deadline = time.monotonic() + self._rng.uniform(0.3, 1.5)
        while time.monotonic() < deadline:
            record = self._bench.record(self._command.action_id)
            if record is not None and record["phase"] == "done":
                return
            time.sleep(0.02)

    def _workload_dies(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            processes.kill_all([beat.pid for beat in self._subject.born])

    def _child_dies(self) -> None:
        processes.kill_all([self._subject.born[1].pid])

    def _workload_dies_at_random(self) -> None:
        time.sleep(self._rng.uniform(0, 0.15))
        self._child_dies() if self._rng.random() < 0.5 else processes.kill_all([self._subject.born[0].pid])

    def _criu_killed(self) -> None:
        self.done = self._signal_criu(signal.SIGKILL)

    def _criu_and_daemon_killed(self) -> None:
        self.done = self._signal_criu(signal.SIGKILL)
        self._daemon.signal(signal.SIGKILL)

    def _pause_criu(self) -> None:
        if self._signal_criu(signal.SIGSTOP):
            time.sleep(self._rng.uniform(0.2, 1.0))
            for pid in self._found:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pid, signal.SIGCONT)
            self._close_found()

    def _watch_die_at_random(self) -> None:
        time.sleep(self._rng.uniform(0, 0.3))
        self._kill_daemon()

    def _kill_daemon(self) -> None:
        """It has ended when this returns."""
        daemon, deadline = self._daemon, time.monotonic() + ASK
        daemon.signal(signal.SIGKILL)
        while not daemon.ended and time.monotonic() < deadline:
            daemon.hear(0.01)

    # --- the GPU's helper ------------------------------------------------------------------------------------------------------

    def _helper_killed(self) -> None:
        """Where one is: it comes when it is first asked."""
        with contextlib.suppress(ProcessLookupError):
            if pid := self._bench.helper():
                os.kill(pid, signal.SIGKILL)

    def _helper_and_daemon_killed(self) -> None:
        self._helper_killed()
        self._kill_daemon()

    def _helper_killed_at_random(self) -> None:
        time.sleep(self._rng.uniform(0, 0.2))
        self._helper_killed()

    def _helper_and_daemon_killed_at_random(self) -> None:
        time.sleep(self._rng.uniform(0, 0.2))
        self._helper_and_daemon_killed()

    _daemon_killed = _watch_daemon_killed = _kill_daemon
    _watch_helper_and_daemon_killed = _helper_and_daemon_killed

    def _pause_helper(self) -> None:
        """The driver goes on meanwhile, and nobody hears of it."""
        with contextlib.suppress(ProcessLookupError):
            if pid := self._bench.helper():
                os.kill(pid, signal.SIGSTOP)
                self._disarm()
                time.sleep(self._rng.uniform(0.2, 1.0))
                os.kill(pid, signal.SIGCONT)

    def _watch_stop(self) -> None:
        """For ever: until the watchdog has ended it. Where it holds nobody, that is not the watchdog's business, but systemd's."""
        self._daemon.signal(signal.SIGSTOP)
        self._leave_alone()

    def _watch_stop_at_random(self) -> None:
        time.sleep(self._rng.uniform(0, 0.15))
        self._watch_stop()

    def _leave_alone(self) -> None:
        self.left_alone = True
        deadline = time.monotonic() + LIMIT + 2 * GRACE + LEFT_ALONE
        while not self._daemon.ended and time.monotonic() < deadline:
            self._daemon.hear(0.05)
        self.dead()
        self._daemon.signal(signal.SIGKILL)

    def _watch_criu_stopped(self) -> None:
        """For ever; the daemon has a deadline for it, and the watchdog one for the daemon."""
        self.done = self._signal_criu(signal.SIGSTOP)
        self._close_found()

    def _watch_criu_stopped_daemon_dies(self) -> None:
        self.done = self._signal_criu(signal.SIGSTOP)
        self._close_found()
        self._kill_daemon()

    def _watch_criu_dies_daemon_stopped(self) -> None:
        self._daemon.signal(signal.SIGSTOP)
        self.done = self._signal_criu(signal.SIGKILL)
        self._leave_alone()

    def _stall_long(self) -> None:
        """The store stands still for longer than the phase may take. Of a restore nothing is there yet that could go on."""
        time.sleep(LIMIT + GRACE)
        if self._case.direction == "restore":
            return
        self.findings += [
            Finding(each.counter, f"the store stalls: {each.text}") for each in checks.goes_on(self._subject, self._subject.born)
        ]

    def _signal_criu(self, number: signal.Signals) -> bool:
        """At a random moment of its work: whether there was one."""
        deadline = time.monotonic() + 1.0
        while not self._daemon.criu() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(self._rng.uniform(0, 0.09))
        self._found = _open(self._daemon.criu())
        for pidfd in self._found:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
        found = bool(self._found)
        if number == signal.SIGKILL:
            self._close_found()
        return found

    def _close_found(self) -> None:
        for pidfd in self._found:
            os.close(pidfd)
        self._found = []


def _drained(running: Iterable[object]) -> None:
    with contextlib.suppress(grpc.RpcError):
        list(running)


def _open(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found
