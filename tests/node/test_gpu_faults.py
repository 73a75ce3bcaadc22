"""GPU state and what goes wrong around it, through the whole path: a helper or a daemon that stands still, a full disk, a small cgroup, the
dead of a tree, and a tree of many. On a driver that is not NVIDIA's (`tests/fakes/cuda`); real bindings, real CRIU."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from hibernode import locks
from tests import keeper
from tests.daemon import Daemon, details, failed, job_target, ready
from tests.fakes.cuda import CONTEXT, GPU0, MIB, Call, FakeGpus
from tests.keeper import wait_until
from tests.node.memory_group import MemoryGroup
from tests.node.programs.cuda_job import sequence
from tests.node.test_gpu import KILL, MIB_USED, Training, begun, gpu_settings, helper_of
from tests.node.test_watchdog import watching
from tests.node.workload import python

pytestmark = pytest.mark.node

WATCHDOG = {"interval": 0.1, "grace": 0.5}
ORPHAN = 5.0  # seconds that a helper waits for a daemon, as in `drivers/gpu/helper.py`
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    made = FakeGpus(tmp_path / "gpus")
    monkeypatch.setenv("FAKE_CUDA_ROOT", str(made.root))  # of the daemon, for its helper
    return made


@pytest.fixture
def daemon(gpus: FakeGpus) -> Iterator[Daemon]:
    with Daemon(settings={"gpu": gpu_settings(gpus)}) as running:
        yield running


# --- who stands still -----------------------------------------------------------------------------------------------------------


def test_a_helper_that_is_stopped_ends_the_action_and_the_training_waits_until_it_goes_on(gpus: FakeGpus, tmp_path: Path) -> None:
    with Daemon(settings={"gpu": gpu_settings(gpus), "limits": {"gpu": 0.5}}) as daemon:
        training = Training(daemon, gpus, tmp_path / "out")
        gpus.arm(training.pid, "checkpoint", "hang once")
        events = daemon.begin_checkpoint(training.target)
        wait_until(lambda: begun(daemon, "checkpoint"), 10, "a helper in its checkpoint")
        helper = helper_of(daemon)
        os.kill(helper, signal.SIGSTOP)
        gpus.disarm(training.pid, "checkpoint")
        last = list(events)[-1].event
        assert (last.status, last.code) == ("error", "gpu_wedged")
        assert "the GPU helper does not answer" in last.message
        assert keeper.alive(training.pid)
        os.kill(helper, signal.SIGCONT)
        training.goes_on()
        ready(daemon.checkpoint(training.target))
        training.goes_on()
        assert helper_of(daemon) == helper


def test_a_daemon_that_hangs_while_gpu_state_is_suspended_is_ended_and_the_training_goes_on(
    gpus: FakeGpus, tmp_path: Path
) -> None:
    """Nobody of the workload is stopped: that it does not run is in the helper's journal alone."""
    settings = {"gpu": gpu_settings(gpus), "watchdog": WATCHDOG, "limits": {"gpu": 1.0}}
    with Daemon(settings=settings) as daemon, watching(daemon) as watch:
        training = Training(daemon, gpus, tmp_path / "out")
        gpus.arm(training.pid, "checkpoint", "hang once")
        events = daemon.begin_checkpoint(training.target)
        wait_until(lambda: begun(daemon, "checkpoint"), 10, "a helper in its checkpoint")
        os.kill(hung := daemon.pid, signal.SIGSTOP)
        gpus.disarm(training.pid, "checkpoint")
        wait_until(lambda: gpus.used(GPU0) == 0, 5, "suspended GPU state")
        steps = len(training.lines)
        wait_until(lambda: not keeper.alive(hung), 10, "the end of the daemon")
        assert len(training.lines) == steps
        wait_until(lambda: len(training.lines) > steps + 3, ORPHAN + 5, "the training to go on")
        training.goes_on()
        (said,) = {line["pid"]: line for line in watch.said("the daemon holds a workload past its deadline")}.values()
        assert (said["pid"], said["phase"]) == (hung, "suspending")
        with contextlib.suppress(grpc.RpcError):
            list(events)
        with contextlib.suppress(ProcessLookupError):
            daemon.kill()
        daemon.start()
        ready(daemon.checkpoint(training.target))
        training.goes_on()


@pytest.mark.parametrize("call", ["checkpoint", "restore"])
def test_a_watchdog_takes_a_daemon_that_waits_for_its_driver_for_no_one_that_hangs(
    gpus: FakeGpus, tmp_path: Path, call: Call
) -> None:
    """It has a time for saving, and another one for giving back: both are over before it tells what became of it."""
    settings = {"gpu": gpu_settings(gpus), "watchdog": {**WATCHDOG, "grace": 1.0}, "limits": {"gpu": 2.0}}
    with Daemon(settings=settings) as daemon, watching(daemon) as watch:
        training = Training(daemon, gpus, tmp_path / "out")
        gpus.arm(training.pid, call, "hang once")
        failed(daemon.checkpoint(training.target), "gpu_wedged")
        assert keeper.alive(daemon.pid)
        assert watch.acts == []
        gpus.disarm(training.pid, call)
        training.goes_on()
        ready(daemon.checkpoint(training.target))
        training.goes_on()


def test_a_helper_that_died_under_an_idle_daemon_is_followed_by_another(gpus: FakeGpus, tmp_path: Path) -> None:
    """The action has ended, the daemon has nothing to do, and would ask nobody: the watchdog has it started."""
    with Daemon(settings={"gpu": gpu_settings(gpus), "watchdog": WATCHDOG, "limits": {"gpu": 1.0}}) as daemon:
        training = Training(daemon, gpus, tmp_path / "out")
        gpus.arm(training.pid, "checkpoint", "hang once")
        failed(daemon.checkpoint(training.target), "gpu_wedged")
        os.kill(helper_of(daemon), signal.SIGKILL)
        gpus.disarm(training.pid, "checkpoint")
        wait_until(lambda: not locks.holder(daemon.state_dir / "gpu" / "lock"), 5, "the end of the helper")
        steps = len(training.lines)
        with watching(daemon) as watch:
            wait_until(lambda: len(training.lines) > steps + 3, ORPHAN + 10, "the training to go on")
            training.goes_on()
            assert watch.said("a helper is started")
            ready(daemon.checkpoint(training.target))
            training.goes_on()
            os.kill(locks.holder(daemon.state_dir / "gpu" / "lock"), signal.SIGKILL)


# --- no room --------------------------------------------------------------------------------------------------------------------


@contextmanager
def full(directory: Path) -> Iterator[Path]:
    """A file system of its own in that directory, without a free page; the file that takes them."""
    directory.mkdir(parents=True, mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={8 * PAGE},mode=700", "tmpfs", str(directory)], check=True)
    try:
        filler = directory / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(PAGE)) == PAGE:
                pass
        yield filler
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_what_the_helper_cannot_note_it_does_not_take_away(gpus: FakeGpus, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with full(home / "state" / "gpu") as filler, Daemon(home, settings={"gpu": gpu_settings(gpus)}) as daemon:
        training = Training(daemon, gpus, tmp_path / "out")
        gpus.arm(training.pid, "lock", "die")
        last = failed(daemon.checkpoint(training.target), "gpu_failed")
        assert "the journal cannot be written: No space left on device" in last.message
        gpus.disarm(training.pid, "lock")
        training.goes_on()
        daemon.insist_clean()
        filler.unlink()
        ready(daemon.checkpoint(training.target))
        training.goes_on()


def test_a_cgroup_without_room_for_what_is_on_the_gpu_refuses_it(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    """The kernel would kill it in the middle of the driver's checkpoint."""
    training = Training(daemon, gpus, tmp_path / "out")
    needed = (CONTEXT + MIB_USED * MIB) * 11 // 10
    with MemoryGroup("hibernode-gpu", needed) as group:
        home = Path(f"/proc/{training.pid}/cgroup").read_text()
        group.procs.write_text(str(training.pid))
        try:
            assert Path(f"/proc/{training.pid}/cgroup").read_text() != home
            training.goes_on()
            told = details(failed(daemon.checkpoint(training.target), "host_memory"))
            assert needed <= told["wanted"] < needed + 2 * MIB
            assert 0 <= told["found"] < needed, "what it has itself counts"
            training.goes_on()
            assert group.oom_kills == 0
        finally:
            group.leave(training.pid)
    ready(daemon.checkpoint(training.target))
    training.goes_on()


# --- many, and the dead among them ----------------------------------------------------------------------------------------------


class Family:
    """So many trainings in one job, numbered from 1; their parent waits for none that ends."""

    def __init__(self, daemon: Daemon, gpus: FakeGpus, place: Path, count: int, *, brief: Sequence[int] = ()) -> None:
        """`brief`: who ends after three steps."""
        self._place, self._numbers = place, range(1, count + 1)
        place.mkdir()
        words = []
        for number in self._numbers:
            more = ["--steps", "3"] if number in brief else []
            argv = python(
                "cuda_job.py", str(place / f"{number}."), "--mib", "4", "--seed", str(number), "--interval-ms", "50", *more
            )
            words.append(" ".join(argv))
        script = " & ".join([*words, "exec sleep 100000"])
        self.root = daemon.run("family", ["/bin/sh", "-c", script], env=gpus.env("0", device=str(gpus.node()))).pid
        self.target = job_target("family")
        self.brief = brief
        wait_until(lambda: all(len(self.lines(number)) >= 3 for number in self._numbers), 30, "all of them")
        self.pids = {
            number: pid
            for pid in keeper.descendants(self.root)
            for number in self._numbers
            if f"{place}/{number}. " in keeper.describe(pid)
        }

    def lines(self, number: int) -> list[list[str]]:
        path = self._place / f"{number}."
        text = path.read_text() if path.exists() else ""
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def goes_on(self, without: Sequence[int] = ()) -> None:
        """Everybody else makes steps, and every value that anybody has written is right."""
        there = [number for number in self._numbers if number not in (*self.brief, *without)]
        before = {number: len(self.lines(number)) for number in there}
        wait_until(lambda: all(len(self.lines(number)) > before[number] + 2 for number in there), 20, "all to go on")
        for number in self._numbers:
            lines = self.lines(number)
            wanted = itertools.islice(sequence(number, 4), len(lines))
            assert [(int(step), int(value)) for step, value, _ in lines] == list(enumerate(wanted, 1))
            assert len({token for *_, token in lines}) == 1


def test_twelve_processes_are_saved_and_come_back(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    """More than the helper calls at once."""
    family = Family(daemon, gpus, tmp_path / "family", 12)
    assert len(family.pids) == 12
    used = gpus.used(GPU0)
    ready(daemon.checkpoint(family.target))
    family.goes_on()
    assert gpus.used(GPU0) == used
    done = ready(daemon.checkpoint(family.target, criu_opts=KILL))
    saved = daemon.manifest(done.checkpoint_id)["gpu"]["processes"]
    assert sorted(process["pid"] for process in saved) == sorted(family.pids.values())
    wait_until(lambda: gpus.used(GPU0) == 0, 5, "a GPU without them")
    ready(daemon.restore(done.checkpoint_id))
    family.goes_on()
    assert gpus.used(GPU0) == used


def test_who_is_dead_is_no_user_and_comes_back_as_dead(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    family = Family(daemon, gpus, tmp_path / "family", 2, brief=[1])
    (dead,) = (pid for pid in keeper.descendants(family.root) if pid != family.pids[2])  # it may be at its last step still
    wait_until(lambda: keeper.state(dead) == "Z", 10, "a zombie")
    done = ready(daemon.checkpoint(family.target, criu_opts=KILL))
    assert [process["pid"] for process in daemon.manifest(done.checkpoint_id)["gpu"]["processes"]] == [family.pids[2]]
    ready(daemon.restore(done.checkpoint_id))
    assert keeper.state(dead) == "Z"
    family.goes_on()


def test_who_dies_while_he_is_saved_is_not_waited_for(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    """The others are saved, and come back, and he as what he is: dead."""
    family = Family(daemon, gpus, tmp_path / "family", 3)
    gpus.arm(family.pids[2], "checkpoint", "die")
    done = ready(daemon.checkpoint(family.target, criu_opts=KILL))
    saved = daemon.manifest(done.checkpoint_id)["gpu"]["processes"]
    assert sorted(process["pid"] for process in saved) == sorted([family.pids[1], family.pids[3]])
    ready(daemon.restore(done.checkpoint_id))
    assert keeper.state(family.pids[2]) == "Z"
    family.goes_on(without=[2])


def test_who_dies_while_he_is_brought_back_ends_the_restore_and_nobody_is_left(
    daemon: Daemon, gpus: FakeGpus, tmp_path: Path
) -> None:
    family = Family(daemon, gpus, tmp_path / "family", 3)
    done = ready(daemon.checkpoint(family.target, criu_opts=KILL))
    steps = [len(family.lines(number)) for number in (1, 2, 3)]
    gpus.arm(family.pids[2], "restore", "die")
    last = failed(daemon.restore(done.checkpoint_id), "gpu_failed")
    assert f"bring back process {family.pids[2]}" in last.message
    assert not any(keeper.fields(pid) for pid in (family.root, *family.pids.values()))
    assert [len(family.lines(number)) for number in (1, 2, 3)] == steps, "none ran without the other"
    assert gpus.used(GPU0) == 0
    gpus.disarm(family.pids[2], "restore")
    ready(daemon.restore(done.checkpoint_id))
    family.goes_on()
