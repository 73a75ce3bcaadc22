"""The watchdog beside a real daemon and a real CRIU: whoever dies or hangs, the workload runs on; and what is none of its business it
leaves alone. One daemon, started again where it was killed, and one watchdog for almost all of it: both take a second to start."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.workloads import proc
from tests import keeper
from tests.daemon import ROOT, Daemon, events, failed, ready
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Beat, Program, checkpointed, python

pytestmark = pytest.mark.node

INTERVAL, GRACE = 0.05, 0.4
_SPLICE = "275"  # how CRIU sends pages; x86-64
PAUSE = 1.3  # seconds a dump may hold a workload here, beside 1 s for each 64 MiB
FAMILY = ["counter.py", 0.01, "slow:32", "thread", "thread"]  # memory that takes zstd seconds, so that CRIU waits for us


class Watch:
    """A watchdog process of a daemon."""

    def __init__(self, daemon: Daemon, *words: str) -> None:
        self.log_path, self._since = daemon.config.with_name("watchdog.log"), 0
        env = {name: value for name, value in os.environ.items() if not name.startswith("HIBERNODE_")}
        argv = [sys.executable, "-m", "hibernode", "watchdog", "--config", str(daemon.config), *words]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(argv, env=env | {"PYTHONPATH": str(ROOT / "daemon")}, stdout=log, stderr=log)

    def mark(self) -> None:
        """What it said until now is of the test before."""
        self._since = self.log_path.stat().st_size

    @property
    def lines(self) -> list[dict[str, Any]]:
        said = self.log_path.read_bytes()[self._since :].decode()
        return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith("\n")]

    def said(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if what in line["event"]]

    @property
    def acts(self) -> list[str]:
        """What it did to anybody."""
        return [line["event"] for line in self.lines if line["level"] in ("warning", "error")]

    def looks(self, seconds: float = 3 * GRACE) -> None:
        """It has had its chance: so long, and it still lives."""
        end = time.monotonic() + seconds
        wait_until(lambda: time.monotonic() > end or self.process.poll() is not None, seconds + 1, "looks of the watchdog")
        assert self.process.poll() is None, self.log_path.read_text()


@contextmanager
def watching(daemon: Daemon) -> Iterator[Watch]:
    watch = Watch(daemon)
    try:
        wait_until(lambda: watch.process.poll() is not None or watch.said("watching"), LIMIT, "a watchdog")
        yield watch
        assert watch.process.poll() is None, "it should live"
    except BaseException:
        print(f"--- the watchdog's log:\n{watch.log_path.read_text()}", file=sys.stderr)
        raise
    finally:
        watch.process.kill()
        watch.process.wait()


@contextmanager
def node(*, grace: float = GRACE, pause: float = PAUSE, **limits: float) -> Iterator[tuple[Daemon, Watch]]:
    """A daemon whose deadlines are short, and its watchdog. Restores are done by files: a keeper would come before the watchdog."""
    settings = {
        "watchdog": {"interval": INTERVAL, "grace": grace}, "limits": {"pause": pause, **limits}, "criu": {"filler": False}
    }  # fmt: skip
    with Daemon(arena="16MiB", settings=settings) as daemon, watching(daemon) as watch:
        yield daemon, watch


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[tuple[Daemon, Watch]]:
    with node(transfer=0.3) as (daemon, watch):
        yield daemon, watch


@pytest.fixture
def pair(shared_pair: tuple[Daemon, Watch]) -> Iterator[tuple[Daemon, Watch]]:
    """A daemon that runs, with an empty store, and a watchdog that has said nothing."""
    daemon, watch = shared_pair
    again(daemon)
    watch.mark()
    yield daemon, watch
    again(daemon)
    daemon.empty()


def again(daemon: Daemon) -> None:
    """It runs, whoever has killed it."""
    with contextlib.suppress(AssertionError):  # `pid` of one that a test has ended
        if keeper.alive(daemon.pid) and keeper.state(daemon.pid) != "T":
            return
        ended(daemon)
    daemon.start()


def ended(daemon: Daemon) -> None:
    """By the watchdog, or else now."""
    with contextlib.suppress(ProcessLookupError):
        daemon.kill()


def criu_of(daemon: Daemon) -> int:
    """The pid of its worker, which holds a tree now."""
    for pid in keeper.descendants(daemon.pid):
        with contextlib.suppress(*proc.GONE):
            if proc.stat(pid).comm == "criu" and proc.traced_by(pid):
                return pid
    return 0


def begin(daemon: Daemon, program: Program) -> tuple[str, int, Iterator[pb.Update]]:
    """Begin a checkpoint that takes zstd seconds, until CRIU waits for us: the arena is full. Its action, CRIU's pid, and its updates."""
    program.beat()
    action = str(uuid.uuid4())
    updates = daemon.begin_checkpoint(program.target, action_id=action, compression="zstd:15", streams=1)
    wait_until(lambda: criu_of(daemon), LIMIT, "a criu that holds a tree")
    criu = criu_of(daemon)
    wait_until(lambda: all(_system_call(criu) == _SPLICE for _ in range(5)), LIMIT, "a criu that waits")
    return action, criu, iter(updates)


def _system_call(pid: int) -> str:
    with contextlib.suppress(*proc.GONE):
        return Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return ""


def page(daemon: Daemon, action: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((daemon.state_dir / "journal" / f"{action}.json").read_text())
    return found


def write(daemon: Daemon, record: dict[str, Any]) -> None:
    """As the daemon would have: whole, or not at all."""
    path = daemon.state_dir / "journal" / f"{record['action_id']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(record))
    path.with_suffix(".tmp").rename(path)


def held(program: Program) -> bool:
    """It makes no progress: stopped, or under a tracer."""
    return bool(keeper.state(program.pid) in ("T", "t") or proc.tracers(program.pid))


def goes_on(program: Program, before: Beat, within: float) -> None:
    """The same process beats again."""
    deadline = time.monotonic() + within
    wait_until(lambda: program.beat().counter > before.counter + 2 or time.monotonic() > deadline, within + 1, "a beat")
    now = program.beat()
    assert now.counter > before.counter + 2, f"still {now}; {keeper.describe(program.pid)}"
    assert (now.token, now.content) == (before.token, before.content)
    assert not held(program)


def quiet(updates: Iterable[pb.Update]) -> None:
    """The call ends with its daemon."""
    with contextlib.suppress(grpc.RpcError):
        for _ in updates:
            pass


def outcome(daemon: Daemon, action: str) -> tuple[str, str]:
    entry = daemon.stub.GetAction(pb.ActionId(action_id=action), timeout=10)
    return entry.status, entry.last.code


@contextmanager
def hung(pid: int) -> Iterator[None]:
    """A process that hangs so that no SIGCONT helps: in a frozen cgroup. It can be killed."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    place = Path(next(where for _, where, kind, *_ in mounts if kind == "cgroup2")) / f"hibernode-test-{uuid.uuid4().hex[:8]}"
    place.mkdir()
    try:
        (place / "cgroup.freeze").write_text("1")
        (place / "cgroup.procs").write_text(str(pid))
        wait_until(lambda: "frozen 1" in (place / "cgroup.events").read_text(), LIMIT, "a frozen process")
        yield
    finally:
        (place / "cgroup.freeze").write_text("0")
        with contextlib.suppress(OSError):
            (place / "cgroup.kill").write_text("1")
        wait_until(lambda: "populated 0" in (place / "cgroup.events").read_text(), LIMIT, "an empty cgroup")
        place.rmdir()


# --- who dies or hangs in the middle of a dump ----------------------------------------------------------------------------------


def test_the_daemon_is_killed_in_a_dump(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """CRIU rolls back by itself: there is nothing left to do."""
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        action, _, updates = begin(daemon, program)
        before = program.beat()
        daemon.kill()
        goes_on(program, before, LIMIT)
        quiet(updates)
        watch.looks()
        assert watch.said("no daemon")
        assert watch.acts == []
        daemon.start()
        assert outcome(daemon, action) == ("error", "interrupted")


def test_the_daemon_hangs_in_a_dump(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """It keeps its page socket open, so CRIU waits, and the tree: until the watchdog ends the daemon."""
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        action, _, updates = begin(daemon, program)
        os.kill(daemon.pid, signal.SIGSTOP)
        before = program.beat()
        allowed = page(daemon, action)["until"] - time.clock_gettime(time.CLOCK_BOOTTIME)
        assert held(program)
        goes_on(program, before, allowed + 2 * GRACE + 2)
        (line,) = {line["action"]: line for line in watch.said("the daemon holds")}.values()
        assert (line["action"], line["phase"], line["pid"]) == (action, "dumping", daemon.pid)
        assert line["late"] >= 2 * GRACE, "CRIU was given its time"
        quiet(updates)
        ended(daemon)
        daemon.start()
        assert outcome(daemon, action) == ("error", "interrupted")


def test_criu_is_killed_in_a_dump(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        _, criu, updates = begin(daemon, program)
        before = program.beat()
        os.kill(criu, signal.SIGKILL)
        goes_on(program, before, LIMIT)
        last = list(events(updates))[-1]
        assert last.code in ("dump_failed", "deadline"), last  # the second where zstd was not done with a chunk before that
        assert watch.acts == []


def test_criu_is_stopped_in_a_dump(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """The daemon closes the page socket at its deadline, and lets CRIU go on. It is well, and is left alone."""
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        action, criu, updates = begin(daemon, program)
        os.kill(criu, signal.SIGSTOP)
        before = program.beat()
        allowed = page(daemon, action)["until"] - time.clock_gettime(time.CLOCK_BOOTTIME)
        goes_on(program, before, allowed + GRACE + 2)
        failed(list(events(updates)), "deadline")
        assert set(watch.acts) <= {"criu is stopped, and holds a workload: it goes on"}, "the same, if it was first"


def test_criu_is_stopped_under_a_daemon_that_hangs(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """CRIU is let go on, and waits for the daemon, which is ended then."""
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        action, criu, updates = begin(daemon, program)
        os.kill(daemon.pid, signal.SIGSTOP)
        os.kill(criu, signal.SIGSTOP)
        before = program.beat()
        allowed = page(daemon, action)["until"] - time.clock_gettime(time.CLOCK_BOOTTIME)
        goes_on(program, before, allowed + 2 * GRACE + 2)
        assert [act.partition(":")[0] for act in dict.fromkeys(watch.acts)] == [
            "criu is stopped, and holds a workload", "the daemon holds a workload past its deadline",
        ]  # fmt: skip
        quiet(updates)
        ended(daemon)
        daemon.start()
        assert outcome(daemon, action) == ("error", "interrupted")


def test_criu_is_stopped_and_the_daemon_killed(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """And a new daemon comes at once, recovers, and believes that all is well."""
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        action, criu, updates = begin(daemon, program)
        before = program.beat()
        os.kill(criu, signal.SIGSTOP)
        daemon.kill()
        goes_on(program, before, 2)
        quiet(updates)
        assert set(watch.acts) == {"criu is stopped, and nobody waits for it: it goes on"}
        wait_until(lambda: not keeper.alive(criu), LIMIT, "the end of CRIU")
        daemon.start()
        assert outcome(daemon, action) == ("error", "interrupted")


@pytest.mark.parametrize("comes_back", [False, True])
def test_criu_hangs_and_the_daemon_is_killed(pair: tuple[Daemon, Watch], tmp_path: Path, comes_back: bool) -> None:
    """Nothing but a SIGKILL helps; also where the next daemon has called the action interrupted long ago."""
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        action, criu, updates = begin(daemon, program)
        with hung(criu):
            before = program.beat()
            daemon.kill()
            if comes_back:
                daemon.start()
                assert outcome(daemon, action) == ("error", "interrupted")
            goes_on(program, before, GRACE + 2)
            (line,) = {line["pid"]: line for line in watch.said("criu hangs")}.values()
            assert (line["action"], line["pid"], line["pids"]) == (action, criu, [program.pid])
        quiet(updates)


def test_both_are_killed_in_a_dump(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    daemon, watch = pair
    with Program(tmp_path, python(*FAMILY)) as program:
        _, criu, updates = begin(daemon, program)
        before = program.beat()
        os.kill(criu, signal.SIGKILL)
        daemon.kill()
        goes_on(program, before, LIMIT)
        quiet(updates)
        watch.looks()
        assert watch.acts == []


# --- a workload that is held until it is killed ---------------------------------------------------------------------------------


@contextmanager
def began_shipping(daemon: Daemon, program: Program, **overrides: Any) -> Iterator[str]:
    """A checkpoint whose dump is over, and whose bytes are on their way for long. Inside, somebody ends the daemon."""
    action = str(uuid.uuid4())
    updates = daemon.begin_checkpoint(program.target, action_id=action, compression="zstd:19", streams=1, **overrides)
    wait_until(lambda: daemon.at_work() and page(daemon, action)["phase"] == "shipping", LIMIT, "shipping")
    yield action
    with contextlib.suppress(grpc.RpcError):
        for _ in updates:
            pass


@contextmanager
def left_stopped(daemon: Daemon, program: Program, **changes: str) -> Iterator[str]:
    """A checkpoint for a kill, while it ships: the tree is stopped, the daemon is dead. `changes` are what it would have written down a
    little later."""
    program.beat()
    with began_shipping(daemon, program, criu_opts={"leave_running": False}) as action:
        os.kill(daemon.pid, signal.SIGSTOP)
        write(daemon, page(daemon, action) | changes)
        daemon.kill()
        yield action


SMALL = ["counter.py", 0.01, "slow:8", "thread"]


@pytest.mark.parametrize("phase", ["shipping", "committing"])
def test_the_daemon_is_killed_while_it_holds_a_tree(pair: tuple[Daemon, Watch], tmp_path: Path, phase: str) -> None:
    """Nobody was told `ready`: it goes on, for as long as nobody comes."""
    daemon, watch = pair
    with Program(tmp_path, python(*SMALL)) as program:
        with left_stopped(daemon, program, phase=phase) as action:
            before = program.beat()
            goes_on(program, before, 3)
            assert watch.acts == ["nobody answers for this workload: goes on"]
            os.kill(program.pid, signal.SIGSTOP)  # by its owner, now: it has been given back
            watch.looks()
            assert keeper.state(program.pid) == "T"
            assert len(watch.acts) == 1
            os.kill(program.pid, signal.SIGCONT)
        daemon.start()
        assert outcome(daemon, action) == ("error", "interrupted")
        goes_on(program, program.beat(), LIMIT)


def test_a_pod_that_its_kubelet_would_start_anew_is_left_for_the_next_daemon(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """Only the API server can end it for good, and the watchdog has no way to that."""
    daemon, watch = pair
    with Program(tmp_path, python(*SMALL)) as program:
        with left_stopped(daemon, program, phase="killing", status="ready", place="pod/default/trainer/uid/u-1") as action:
            watch.looks()
            assert (keeper.state(program.pid), watch.acts) == ("T", [])
        daemon.start()
        assert outcome(daemon, action)[0] == "ready"
        wait_until(lambda: not keeper.alive(program.pid), LIMIT, "its end: this daemon knows no API server")


def test_the_daemon_is_killed_while_it_kills(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """`ready` was told: the kill is brought to its end."""
    daemon, watch = pair
    with Program(tmp_path, python(*SMALL)) as program:
        with left_stopped(daemon, program, phase="killing", status="ready") as action:
            wait_until(lambda: not keeper.alive(program.pid), LIMIT, "its end")
            wait_until(lambda: watch.acts, LIMIT, "a line that says so")  # it does so first
            assert set(watch.acts) == {"nobody answers for this workload: killed, as was said"}
        daemon.start()
        assert outcome(daemon, action)[0] == "ready"


def test_a_daemon_that_comes_back_in_time_does_it_all_by_itself(tmp_path: Path) -> None:
    """And whoever does not want to wait, for a daemon that does not, looks once by hand."""
    settings = {"watchdog": {"interval": INTERVAL, "grace": 3600}}
    with Daemon(arena="16MiB", settings=settings) as daemon, Program(tmp_path, python(*SMALL)) as program:
        with watching(daemon) as watch:
            with left_stopped(daemon, program) as action:
                before = program.beat()
            daemon.start()
            assert outcome(daemon, action) == ("error", "interrupted")
            goes_on(program, before, LIMIT)
            assert watch.said("no daemon")
            assert watch.acts == []
        with left_stopped(daemon, program):
            before = program.beat()
            once = Watch(daemon, "--once")
            assert once.process.wait(LIMIT) == 0
            goes_on(program, before, LIMIT)
            assert once.acts == ["nobody answers for this workload: goes on"]
        daemon.start()


def test_a_daemon_hangs_while_it_holds_a_tree(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """No CRIU is left that it may wait for: it is ended at once, and after the grace the tree goes on."""
    daemon, watch = pair
    with Program(tmp_path, python(*SMALL)) as program:
        program.beat()
        with began_shipping(daemon, program, criu_opts={"leave_running": False}) as action:
            os.kill(daemon.pid, signal.SIGSTOP)
            before = program.beat()
            allowed = page(daemon, action)["until"] - time.clock_gettime(time.CLOCK_BOOTTIME)
            assert held(program)
            goes_on(program, before, allowed + 2 * GRACE + 2)
        assert [act.partition(":")[0] for act in dict.fromkeys(watch.acts)] == [
            "the daemon holds a workload past its deadline", "nobody answers for this workload",
        ]  # fmt: skip


# --- restores -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("both", [False, True])
def test_the_end_of_a_daemon_in_a_restore_leaves_nothing(pair: tuple[Daemon, Watch], tmp_path: Path, both: bool) -> None:
    """Whether or not its CRIU died with it: what is half restored is nobody's."""
    daemon, watch = pair
    with Program(tmp_path, python("counter.py", 0.01, "128", "thread")) as program:
        program.beat()
        done = checkpointed(daemon, program, compression="none")
        command = pb.RestoreCommand(action_id=str(uuid.uuid4()), checkpoint_id=done.checkpoint_id)
        updates = daemon.stub.Restore(command, timeout=LIMIT)
        wait_until(lambda: keeper.fields(program.pid), LIMIT, f"pid {program.pid}")
        criu = [pid for pid in keeper.descendants(daemon.pid) if "criu: restore" in keeper.describe(pid)][:1]
        for pid in criu if both else []:
            os.kill(pid, signal.SIGKILL)
        daemon.kill()
        quiet(updates)
        wait_until(lambda: not keeper.alive(program.pid), GRACE + 2, "the end of what was half restored")
        wait_until(lambda: not any(map(keeper.alive, criu)), GRACE + 2, "the end of its CRIU")
        wait_until(lambda: watch.acts, LIMIT, "a line that says so")
        assert set(watch.acts) == {"nobody answers for this workload: half restored: killed"}
        daemon.start()
        assert outcome(daemon, command.action_id) == ("error", "interrupted")
        ready(daemon.restore(done.checkpoint_id))
        assert program.next_beat(after=program.beat())


# --- what is none of its business -------------------------------------------------------------------------------------------------


def test_a_long_dump_within_its_deadline_is_left_alone(tmp_path: Path) -> None:
    """Longer than grace and everything, and the workload stands still: that is what a dump is."""
    with node(pause=60) as (daemon, watch), Program(tmp_path, python(*FAMILY)) as program:
        began = time.monotonic()
        _, _, updates = begin(daemon, program)
        ready(list(events(updates)))
        assert time.monotonic() - began > 3 * GRACE
        assert watch.acts == []


@contextmanager
def debugged(pid: int) -> Iterator[None]:
    """Under a debugger that has stopped it."""
    code = (
        "import ctypes, sys, time\n"
        "c = ctypes.CDLL(None, use_errno=True); pid = int(sys.argv[1])\n"
        "for request in (0x4206, 0x4207):\n"  # PTRACE_SEIZE, PTRACE_INTERRUPT
        "    assert c.ptrace(request, pid, None, None) == 0, ctypes.get_errno()\n"
        "print('there', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(pid)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            wait_until(lambda: keeper.state(pid) == "t", LIMIT, "a stopped tracee")
            yield
        finally:
            process.kill()


def test_who_is_stopped_by_his_owner_or_a_debugger_is_not_held(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """The daemon hangs past its deadline, but it had let the tree go: systemd may deal with that. Then it dies, and nobody is touched."""
    daemon, watch = pair
    family = f"sleep 100 & sleep 100 & sleep 100 & exec {shlex.join(python(*SMALL))}"
    with Program(tmp_path, ["sh", "-c", family]) as program:
        program.beat()
        before, during, traced = keeper.descendants(program.pid)
        os.kill(before, signal.SIGSTOP)
        with began_shipping(daemon, program) as action:
            os.kill(daemon.pid, signal.SIGSTOP)
            record = page(daemon, action)
            assert record["phase"] == "shipping", "it should have taken longer"
            assert [tree["pid"] for tree in record["trees"] if tree["stopped"]] == [before]
            os.kill(during, signal.SIGSTOP)  # by his owner, while the daemon ships
            with debugged(traced):
                watch.looks(record["until"] + 3 * GRACE - time.clock_gettime(time.CLOCK_BOOTTIME))
                assert watch.acts == [], "the daemon hangs, but holds nobody"
                os.kill(during, signal.SIGCONT)
                daemon.kill()
                watch.looks()
                assert [keeper.state(pid) for pid in (before, traced)] == ["T", "t"]
                assert watch.acts == []


def test_pages_of_another_boot_and_of_actions_that_are_over_are_left_alone(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    """Pids come again. The last page shows that the others would have been acted on."""
    daemon, watch = pair
    with Program(tmp_path, python("counter.py", 0.01)) as program:
        program.beat()
        done = ready(daemon.checkpoint(program.target))
        daemon.kill()
        here = {"phase": "dumping", "status": "processing", "until": 1.0, "ended_at": 0.0}
        over = page(daemon, done.action_id)
        assert over["trees"][0]["pid"] == program.pid
        os.kill(program.pid, signal.SIGSTOP)
        write(daemon, over | here | {"boot": "11111111-2222-3333-4444-555555555555"})
        write(daemon, over | {"action_id": str(uuid.uuid4()), "phase": "done"})
        stranger = [{"pid": program.pid, "start_time": over["trees"][0]["start_time"] - 1, "stopped": False}]
        write(daemon, over | here | {"action_id": str(uuid.uuid4()), "trees": stranger})
        half = daemon.state_dir / "journal" / f"{uuid.uuid4()}.tmp"
        half.write_text('{"phase": "dump')
        half.rename(half.with_suffix(".json"))
        watch.looks()
        assert keeper.state(program.pid) == "T"
        assert watch.acts == ["cannot read a page of the journal"]
        write(daemon, over | here | {"what a later version has": 1})
        wait_until(lambda: keeper.state(program.pid) in ("R", "S"), LIMIT, "an act")
        write(daemon, over | here)  # for the next daemon, which is not of a later version


# --- itself -----------------------------------------------------------------------------------------------------------------------


def test_one_for_a_state_dir_small_and_gone_at_once(pair: tuple[Daemon, Watch], tmp_path: Path) -> None:
    daemon, watch = pair
    (check,) = [check for check in daemon.stub.Doctor(pb.Empty(), timeout=20).checks if check.name == "watchdog"]
    assert (check.ok, check.found) == (True, f"pid {watch.process.pid}")
    with open(tmp_path / "second", "wb") as out:
        argv = [*watch.process.args, "--once"]  # type: ignore[misc]
        second = subprocess.run(
            argv, stderr=out, timeout=LIMIT, check=False, env=os.environ | {"PYTHONPATH": str(ROOT / "daemon")}
        )
    assert second.returncode == 75
    assert f"pid {watch.process.pid}" in (tmp_path / "second").read_text()
    status = Path(f"/proc/{watch.process.pid}/status").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.endswith(" kB")}
    assert kib["VmLck"] > 10_000, "its memory is locked"
    assert kib["VmRSS"] < 64 << 10
    assert len(os.listdir(f"/proc/{watch.process.pid}/task")) == 1
    began = time.monotonic()
    watch.process.terminate()
    assert watch.process.wait(LIMIT) == 0
    assert time.monotonic() - began < 5
    (check,) = [check for check in daemon.stub.Doctor(pb.Empty(), timeout=20).checks if check.name == "watchdog"]
    assert (check.ok, check.required) == (False, False)
    watch.process = Watch(daemon).process


def test_who_holds_a_lock_is_seen_in_a_pid_namespace_too(tmp_path: Path) -> None:
    """With the pids of that namespace; of outside one it is seen as one of ours."""
    lock = tmp_path / "lock"
    code = (
        "import fcntl, os, sys; from pathlib import Path; from hibernode import locks\n"
        "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(os.getpid(), locks.holder(Path(sys.argv[1])), flush=True); sys.stdin.read()\n"
    )
    argv = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", code, str(lock)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "daemon")}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        try:
            assert process.stdout is not None
            inside, seen = process.stdout.readline().split()
            assert inside == seen
            from hibernode import locks

            assert locks.holder(lock) in keeper.descendants(process.pid)
        finally:
            process.kill()


def test_ptrace_is_there() -> None:
    """What `debugged` needs."""
    assert ctypes.CDLL(None).ptrace
