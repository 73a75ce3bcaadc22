"""GPU state: a CUDA program through the whole path, on a driver that is not NVIDIA's (`tests/fakes/cuda`): real bindings, real CRIU."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from hibernode.drivers.gpu import halting
from tests import keeper
from tests.daemon import Daemon, details, failed, job_target, ready
from tests.fakes.cuda import GPU0, GPU1, MIB, Call, FakeGpus
from tests.keeper import wait_until
from tests.node.programs.cuda_job import sequence
from tests.node.test_watchdog import criu_of, watching
from tests.node.workload import python

pytestmark = pytest.mark.node

MIB_USED = 16
KILL = {"leave_running": False}


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    made = FakeGpus(tmp_path / "gpus")
    monkeypatch.setenv("FAKE_CUDA_ROOT", str(made.root))  # of the daemon, for its helper
    return made


def gpu_settings(gpus: FakeGpus, design: str = "lock") -> dict[str, object]:
    return {"libcuda": str(gpus.libcuda), "nvml": str(gpus.libnvml), "lock_timeout": 2.0, "design": design}


@pytest.fixture
def design() -> str:
    """`gpu.design`; a test that asks for `both` has it with each."""
    return "lock"


both = pytest.mark.parametrize("design", ["lock", "stop"])
stop = pytest.mark.parametrize("design", ["stop"])


@pytest.fixture
def daemon(gpus: FakeGpus, design: str) -> Iterator[Daemon]:
    with Daemon(settings={"gpu": gpu_settings(gpus, design)}) as running:
        yield running


class Training:
    """A managed job on one GPU, and what it has written."""

    def __init__(
        self,
        daemon: Daemon,
        gpus: FakeGpus,
        out: Path,
        *options: str,
        name: str = "train",
        seed: int = 1,
        steps: int = 5,
        first: str = "",
        **env: str,
    ) -> None:
        """`first`: what a shell does before it becomes the program."""
        self.name, self._out, self._seed = name, out, seed
        env = {"device": str(gpus.node()), **env}
        argv = python("cuda_job.py", str(out), "--mib", str(MIB_USED), "--seed", str(seed), *options)
        argv = ["/bin/sh", "-c", f'{first}; exec "$@"', "sh", *argv] if first else argv
        self.job = daemon.run(name, argv, env=gpus.env("0", **env))
        self.target = job_target(name)
        self.goes_on(steps)

    @property
    def pid(self) -> int:
        return self.job.pid

    @property
    def lines(self) -> list[list[str]]:
        return [line.split() for line in self._out.read_text().rpartition("\n")[0].splitlines()] if self._out.exists() else []

    def goes_on(self, steps: int = 5) -> None:
        before = len(self.lines)
        wait_until(lambda: len(self.lines) >= before + steps, 10, f"{steps} steps more than {before}")
        self.insist_exact()

    def insist_exact(self) -> None:
        """Every value is what a program that nobody has touched would have, and it is the same program."""
        lines = self.lines
        wanted = itertools.islice(sequence(self._seed, MIB_USED), len(lines))
        assert [(int(step), int(value)) for step, value, _ in lines] == list(enumerate(wanted, 1))
        assert len({token for *_, token in lines}) == 1


def helper_of(daemon: Daemon) -> int:
    return next(pid for pid in keeper.descendants(daemon.pid) if "gpu-helper" in keeper.describe(pid))


def begun(daemon: Daemon, call: Call) -> bool:
    """The helper is about to make that call, or in the middle of it."""
    journal = daemon.state_dir / "gpu" / "journal"
    return journal.exists() and f'"{call.removesuffix("e")}ing"' in journal.read_text()


@both
def test_a_training_goes_on_after_its_checkpoint_and_comes_back_from_it(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out")
    used = gpus.used(GPU0)
    assert used > MIB_USED * MIB
    ready(daemon.checkpoint(training.target))
    assert gpus.used(GPU0) == used
    training.goes_on()

    done = ready(daemon.checkpoint(training.target, criu_opts=KILL))
    profile = done.profile
    assert profile.pause_ns > profile.gpu_ns > 0
    assert {"suspending", "dumping", "resuming"} - set(profile.phases) == {"resuming"}, "it was killed as it was"
    wait_until(lambda: gpus.used(GPU0) == 0, 5, "a GPU without it")
    steps = len(training.lines)
    ready(daemon.restore(done.checkpoint_id))
    training.goes_on()
    assert len(training.lines) > steps
    assert gpus.used(GPU0) == used


def ticks(path: Path) -> tuple[int, int]:
    """Of a thread and of a child without CUDA, of a program that ticks."""
    return struct.unpack("<QQ", path.read_bytes())


def who_ticks(path: Path) -> tuple[bool, bool]:
    before = ticks(path)
    time.sleep(0.1)
    thread, child = ticks(path)
    return thread > before[0], child > before[1]


def insist_who_ticks(path: Path, wanted: tuple[bool, bool]) -> None:
    """Who is to stand still does so at once; who is to go on may have to wait for a processor."""
    if True in wanted:
        wait_until(lambda: who_ticks(path) == wanted, 5, f"{wanted}")
    assert True in wanted or who_ticks(path) == wanted


@both
def test_who_runs_while_gpu_state_is_on_its_way(daemon: Daemon, gpus: FakeGpus, tmp_path: Path, design: str) -> None:
    """With "stop" nobody: not while it is saved, not until the dump, and not before it is back."""
    shown, nobody = tmp_path / "ticks", (False, False)
    meanwhile = nobody if design == "stop" else (True, True)
    training = Training(daemon, gpus, tmp_path / "out", "--tick", str(shown))
    gpus.arm("any", "checkpoint", "hang once")
    events = daemon.begin_checkpoint(training.target, criu_opts=KILL)
    wait_until(lambda: begun(daemon, "checkpoint"), 10, "a helper in its checkpoint")
    time.sleep(0.05)
    insist_who_ticks(shown, meanwhile)
    then = ticks(shown)
    gpus.disarm("any", "checkpoint")
    last = list(events)[-1].event
    assert last.status == "ready"
    assert (ticks(shown) == then) == (design == "stop")

    gpus.arm("any", "restore", "hang once")
    with ThreadPoolExecutor() as pool:
        restored = pool.submit(daemon.restore, last.checkpoint_id)
        wait_until(lambda: begun(daemon, "restore"), 10, "a helper in its restore")
        insist_who_ticks(shown, meanwhile)
        assert (ticks(shown) == then) == (design == "stop")
        gpus.disarm("any", "restore")
        ready(restored.result())
    training.goes_on()
    wait_until(lambda: who_ticks(shown) == (True, True), 5, "all to go on")
    ready(daemon.checkpoint(training.target))
    wait_until(lambda: who_ticks(shown) == (True, True), 5, "all to go on")
    training.goes_on()


@stop
def test_who_was_stopped_by_its_owner_stays_stopped(daemon: Daemon, gpus: FakeGpus, tmp_path: Path, design: str) -> None:
    training = Training(daemon, gpus, tmp_path / "out", "--tick", str(tmp_path / "ticks"))
    (child,) = (pid for pid in keeper.descendants(training.pid) if pid != training.pid)
    os.kill(child, signal.SIGSTOP)

    def insist_stopped() -> None:
        wait_until(lambda: who_ticks(tmp_path / "ticks") == (True, False), 5, "the one to go on, and not the other")
        assert keeper.fields(child)[0] == "T"

    ready(daemon.checkpoint(training.target))
    training.goes_on()
    insist_stopped()
    done = ready(daemon.checkpoint(training.target, criu_opts=KILL))
    assert daemon.manifest(done.checkpoint_id)["gpu"]["halted"] == [training.pid]
    ready(daemon.restore(done.checkpoint_id))
    training.goes_on()
    insist_stopped()
    gpus.arm("any", "checkpoint", "801 once")
    failed(daemon.checkpoint(training.target), "gpu_failed")
    training.goes_on()
    insist_stopped()


@both
def test_an_image_is_restored_by_a_node_with_the_other_setting(
    daemon: Daemon, gpus: FakeGpus, tmp_path: Path, design: str
) -> None:
    training = Training(daemon, gpus, tmp_path / "out", "--tick", str(tmp_path / "ticks"))
    done = ready(daemon.checkpoint(training.target, criu_opts=KILL))
    assert bool(daemon.manifest(done.checkpoint_id)["gpu"]["halted"]) == (design == "stop")
    assert daemon.stop() == 0
    daemon.config.write_text(daemon.config.read_text().replace(f'"{design}"', '"lock"' if design == "stop" else '"stop"'))
    daemon.start()
    ready(daemon.restore(done.checkpoint_id))
    training.goes_on()
    wait_until(lambda: who_ticks(tmp_path / "ticks") == (True, True), 5, "all to go on")


def test_a_driver_that_hangs_holds_nobody_up(gpus: FakeGpus, tmp_path: Path) -> None:
    """Nobody can end its call; but who has nothing to do with it runs again, as it would with the other design."""
    limits = {"gpu": 1.0}
    with Daemon(settings={"gpu": gpu_settings(gpus, "stop"), "limits": limits}) as daemon:
        shown = tmp_path / "ticks"
        training = Training(daemon, gpus, tmp_path / "out", "--tick", str(shown))
        gpus.arm("any", "checkpoint", "hang once")
        last = list(daemon.begin_checkpoint(training.target))[-1].event
        assert (last.status, last.code) == ("error", "gpu_wedged")
        wait_until(lambda: who_ticks(shown) == (True, True), 5, "all to go on")
        gpus.disarm("any", "checkpoint")


def test_a_long_name_of_the_state_directory(gpus: FakeGpus, tmp_path: Path) -> None:
    """A unix socket's path has 107 bytes; the helper's is in a directory that a person has chosen."""
    home = tmp_path / ("long-" * 20)
    with Daemon(home, settings={"gpu": gpu_settings(gpus)}) as daemon:
        training = Training(daemon, gpus, tmp_path / "out")
        ready(daemon.checkpoint(training.target))
        training.goes_on()


@both
def test_a_driver_that_hangs_in_a_restore_ends_it(gpus: FakeGpus, tmp_path: Path, design: str) -> None:
    """None of the tree is left, traced and standing still as it may be; and then it can be restored."""
    with Daemon(settings={"gpu": gpu_settings(gpus, design), "limits": {"gpu": 1.0}}) as daemon:
        training = Training(daemon, gpus, tmp_path / "out")
        done = ready(daemon.checkpoint(training.target, criu_opts=KILL))
        gpus.arm("any", "restore", "hang once")
        failed(daemon.restore(done.checkpoint_id), "gpu_wedged")
        assert not keeper.fields(training.pid)
        gpus.disarm("any", "restore")
        ready(daemon.restore(done.checkpoint_id))
        training.goes_on()


# --- another GPU ----------------------------------------------------------------------------------------------------------------


def elsewhere(daemon: Daemon, gpus: FakeGpus, uuids: list[str]) -> None:
    """What a machine has is known to NVML when it starts: a daemon on a node with these GPUs."""
    assert daemon.stop() == 0
    gpus.replug(uuids)
    daemon.start()


@both
def test_a_training_comes_back_on_another_gpu(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    """Its own is not there any more, as on another node; one of its kind is."""
    training = Training(daemon, gpus, tmp_path / "out")
    done = ready(daemon.checkpoint(training.target, criu_opts=KILL))
    elsewhere(daemon, gpus, [GPU1])
    ready(daemon.restore(done.checkpoint_id))
    training.goes_on()
    assert gpus.used(GPU1) > MIB_USED * MIB
    assert not gpus.used(GPU0)


def test_without_a_gpu_of_its_kind_nothing_is_restored(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out")
    done = ready(daemon.checkpoint(training.target, criu_opts=KILL))
    elsewhere(daemon, gpus, [])
    failed(daemon.restore(done.checkpoint_id), "gpu_model")
    assert not keeper.fields(training.job.pid)


@both
def test_a_gpu_that_is_full_ends_the_restore_and_all_that_it_made(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out")
    done = ready(daemon.checkpoint(training.target, criu_opts=KILL))
    gpus.arm("any", "restore", "2 once")
    last = failed(daemon.restore(done.checkpoint_id), "gpu_failed")
    assert details(last)["cuda"] == 2
    assert not keeper.fields(training.job.pid)
    ready(daemon.restore(done.checkpoint_id))
    training.goes_on()


class Pair:
    """A job of two programs on one GPU below a shell, in a checkpoint and killed; `calls` are recorded from then on."""

    def __init__(self, daemon: Daemon, gpus: FakeGpus, place: Path) -> None:
        programs = [python("cuda_job.py", str(place / name), "--mib", "4", "--seed", name) for name in ("1", "2")]
        words = " & ".join(" ".join(words) for words in programs)
        self.root = daemon.run("pair", ["/bin/sh", "-c", f"{words} & wait"], env=gpus.env("0", device=str(gpus.node()))).pid
        wait_until(lambda: all(self._lines(place / name) > 3 for name in ("1", "2")), 10, "both of them")
        self.pids = [
            next(pid for pid in keeper.descendants(self.root) if str(place / name) in keeper.describe(pid)) for name in ("1", "2")
        ]
        self.checkpoint_id = ready(daemon.checkpoint(job_target("pair"), criu_opts=KILL)).checkpoint_id
        gpus.record()

    @staticmethod
    def _lines(out: Path) -> int:
        return len(out.read_text().splitlines()) if out.exists() else 0

    def insist_gone(self) -> None:
        assert [pid for pid in (self.root, *self.pids) if keeper.fields(pid)] == []


@both
def test_who_was_restored_is_parked_before_it_is_killed_for_another(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    pair = Pair(daemon, gpus, tmp_path)
    good, bad = pair.pids
    gpus.arm(bad, "restore", "2")
    last = failed(daemon.restore(pair.checkpoint_id), "gpu_failed")
    assert details(last)["pid"] == bad
    pair.insist_gone()
    assert gpus.calls(good) == [("restore", 0), ("checkpoint", 0)], "it was locked, and nothing was on the GPU when it died"
    assert gpus.calls(bad) == [("restore", 2)]
    gpus.disarm(bad, "restore")
    ready(daemon.restore(pair.checkpoint_id))


SAVED = [("lock", 0), ("checkpoint", 0)]
WHOLE = [("restore", 0), ("unlock", 0), *SAVED]


@both
def test_who_runs_again_is_parked_before_it_is_killed_for_a_probe_that_fails(
    daemon: Daemon, gpus: FakeGpus, tmp_path: Path
) -> None:
    pair = Pair(daemon, gpus, tmp_path)
    one, two = pair.pids
    gpus.arm(two, "unlock", "hang once")
    with ThreadPoolExecutor() as pool:
        restored = pool.submit(daemon.restore, pair.checkpoint_id)
        wait_until(lambda: gpus.calls(one) == WHOLE[:2], 20, "one of them to run")
        os.kill(pair.root, signal.SIGKILL)
        wait_until(lambda: keeper.state(pair.root) in ("", "Z"), 5, "the shell to have ended")
        gpus.disarm(two, "unlock")
        last = failed(restored.result(), "restore_failed")
    assert details(last)["pid"] == pair.root
    pair.insist_gone()
    assert [gpus.calls(pid) for pid in pair.pids] == [WHOLE, WHOLE]
    assert gpus.used(GPU0) == 0


@both
@pytest.mark.parametrize("when", ["at once", "given back"])
def test_a_restore_that_a_dead_daemon_left_is_parked_before_it_is_killed(
    daemon: Daemon, gpus: FakeGpus, tmp_path: Path, when: str
) -> None:
    """By the next daemon, whether the helper has brought the rest back meanwhile or not."""
    pair = Pair(daemon, gpus, tmp_path)
    one, two = pair.pids
    gpus.arm(two, "unlock", "hang once" if when == "at once" else "304 once")
    gpus.arm(one, "unlock", "hang once")
    with ThreadPoolExecutor() as pool:
        restored = pool.submit(daemon.restore, pair.checkpoint_id)
        wait_until(lambda: gpus.calls(one)[:1] == gpus.calls(two)[:1] == WHOLE[:1], 20, "both to be restored")
        daemon.kill()
        assert restored.exception(10)
    for pid in pair.pids:
        gpus.disarm(pid, "unlock")
    if when == "given back":
        wait_until(lambda: ("unlock", 0) in gpus.calls(two), 20, "the helper to bring it back")
    daemon.start()
    pair.insist_gone()
    assert [gpus.calls(pid)[-2:] for pid in pair.pids] == [WHOLE[-2:], WHOLE[-2:]]
    ready(daemon.restore(pair.checkpoint_id))


# --- what goes wrong ------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("answer", ["801", "801 failed", "801 done"])
def test_one_of_two_cannot_be_saved_and_both_run_on(daemon: Daemon, gpus: FakeGpus, tmp_path: Path, answer: str) -> None:
    both = [python("cuda_job.py", str(tmp_path / name), "--mib", "4", "--seed", name) for name in ("1", "2")]
    words = " & ".join(" ".join(words) for words in both)
    daemon.run("both", ["/bin/sh", "-c", f"{words} & wait"], env=gpus.env("0", device=str(gpus.node())))

    def lines(name: str) -> int:
        path = tmp_path / name
        return len(path.read_text().splitlines()) if path.exists() else 0

    wait_until(lambda: lines("1") > 3 and lines("2") > 3, 10, "both of them")
    victim = next(pid for pid in keeper.descendants(daemon.jobs()["both"].pid) if str(tmp_path / "2") in keeper.describe(pid))
    gpus.arm(victim, "checkpoint", f"{answer} once")
    given_up = answer.endswith("failed")
    last = failed(daemon.checkpoint(job_target("both")), "left_suspended" if given_up else "gpu_failed")
    assert given_up or details(last)["pid"] == victim
    before = lines("1"), lines("2")
    wait_until(lambda: lines("1") > before[0] + 3, 10, "the first to go on")
    if not given_up:
        wait_until(lambda: lines("2") > before[1] + 3, 10, "the second to go on")


def test_a_kernel_that_does_not_end_in_time_is_said_to_be_busy(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out", "--interval-ms", "0")
    gpus.arm(training.pid, "lock", "600")
    assert failed(daemon.checkpoint(training.target), "gpu_busy").retry
    training.goes_on()
    gpus.arm(training.pid, "lock", "600 once")
    ready(daemon.checkpoint(training.target))
    training.goes_on()


def test_a_real_kernel_is_waited_for(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out", "--busy-ms", "300")
    done = ready(daemon.checkpoint(training.target))
    assert done.profile.gpu_ns > 0
    training.goes_on(2)
    long = Training(daemon, gpus, tmp_path / "long", "--busy-ms", "6000", name="long", steps=1)
    failed(daemon.checkpoint(long.target), "gpu_busy")
    long.goes_on(1)


@both
@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
def test_the_helper_is_killed_in_the_middle_of_a_call(daemon: Daemon, gpus: FakeGpus, tmp_path: Path, call: Call) -> None:
    """The next one finds in the journal what was begun; whatever becomes of the action, the training runs on."""
    training = Training(daemon, gpus, tmp_path / "out")
    mask = halting.blocked(training.pid, halting.restore_thread(training.pid))
    gpus.arm(training.pid, call, "hang once")
    events = daemon.begin_checkpoint(training.target)
    wait_until(lambda: begun(daemon, call), 10, f"a helper in its {call}")
    os.kill(helper_of(daemon), signal.SIGKILL)
    gpus.disarm(training.pid, call)
    assert list(events)[-1].event.status in ("ready", "error")
    training.goes_on()
    assert halting.blocked(training.pid, halting.restore_thread(training.pid)) == mask
    ready(daemon.checkpoint(training.target))
    training.goes_on()


@both
@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_daemon_that_dies_leaves_nobody_suspended(daemon: Daemon, gpus: FakeGpus, tmp_path: Path, call: Call) -> None:
    """Before another comes: the helper gives back what nobody answers for."""
    training = Training(daemon, gpus, tmp_path / "out")
    gpus.arm(training.pid, call, "hang once")
    events = daemon.begin_checkpoint(training.target)
    wait_until(lambda: begun(daemon, call), 10, f"a helper in its {call}")
    daemon.kill()
    with contextlib.suppress(grpc.RpcError):
        list(events)
    gpus.disarm(training.pid, call)
    training.goes_on()
    daemon.start()
    ready(daemon.checkpoint(training.target))
    training.goes_on()


@pytest.mark.parametrize("call", ["checkpoint", "restore"])
def test_a_call_that_hangs_is_told_and_undone_when_it_returns(gpus: FakeGpus, tmp_path: Path, call: Call) -> None:
    with Daemon(settings={"gpu": gpu_settings(gpus), "limits": {"gpu": 1.0}}) as daemon:
        training = Training(daemon, gpus, tmp_path / "out")
        gpus.arm(training.pid, call, "hang once")
        last = failed(daemon.checkpoint(training.target), "gpu_wedged")
        assert details(last)["pid"] == training.pid
        gpus.disarm(training.pid, call)
        training.goes_on()
        assert daemon.stop() == 0
        daemon.start()
        ready(daemon.checkpoint(training.target))
        training.goes_on()


def test_a_helper_that_another_action_starts_leaves_a_dump_alone(gpus: FakeGpus, tmp_path: Path) -> None:
    """The daemon answers for both, until it dies: then all is given back."""
    with Daemon(settings={"gpu": gpu_settings(gpus)}, arena="16MiB") as daemon:
        slow = Training(daemon, gpus, tmp_path / "slow", "--spare-mib", "128", name="slow")
        quick = Training(daemon, gpus, tmp_path / "quick", name="quick")
        gpus.record()
        events = daemon.begin_checkpoint(slow.target, compression="zstd:19", streams=1)  # CRIU waits for it: the arena is full
        criu: list[int] = []
        wait_until(lambda: criu or criu.extend(filter(None, [criu_of(daemon)])), 10, "a criu that holds it")
        os.kill(criu[0], signal.SIGSTOP)
        try:
            os.kill(helper_of(daemon), signal.SIGKILL)
            gpus.arm(quick.pid, "state", "state=1 once")
            failed(daemon.checkpoint(quick.target), "gpu_state")
            for _ in range(12):  # steps of 10 ms: a helper gives back after 5 s what nobody answers for
                quick.goes_on(60)
            told = (daemon.state_dir / "gpu" / "log").read_text()
            assert "nobody answers" not in told, "a call that waits until CRIU lets go would be in the image"
            daemon.kill()
        finally:
            os.kill(criu[0], signal.SIGCONT)
        with contextlib.suppress(grpc.RpcError):
            list(events)
        slow.goes_on()
        assert gpus.calls(slow.pid) == [*SAVED, *WHOLE[:2]]
        daemon.start()


def test_daemon_and_helper_die_and_the_watchdog_has_the_training_go_on(gpus: FakeGpus, tmp_path: Path) -> None:
    with Daemon(settings={"gpu": gpu_settings(gpus), "watchdog": {"interval": 0.1, "grace": 0.5}}) as watched:
        training = Training(watched, gpus, tmp_path / "out")
        gpus.arm(training.pid, "checkpoint", "hang once")
        events = watched.begin_checkpoint(training.target)
        wait_until(lambda: begun(watched, "checkpoint"), 10, "a helper in its checkpoint")
        helper = helper_of(watched)
        watched.kill()
        os.kill(helper, signal.SIGKILL)
        gpus.disarm(training.pid, "checkpoint")
        with contextlib.suppress(grpc.RpcError):
            list(events)
        with watching(watched):
            training.goes_on()
        watched.start()
        ready(watched.checkpoint(training.target))


@both
def test_a_daemon_that_dies_in_a_dump_leaves_nobody_standing_still(
    daemon: Daemon, gpus: FakeGpus, tmp_path: Path, design: str
) -> None:
    """No watchdog and no other daemon: CRIU rolls back, or comes to its end, and the helper waits for that before it gives back."""
    training = Training(daemon, gpus, tmp_path / "out", "--spare-mib", "192", "--tick", str(tmp_path / "ticks"))
    events = daemon.begin_checkpoint(training.target)
    pages = daemon.state_dir / "journal"
    wait_until(lambda: any('"phase":"dumping"' in page.read_text() for page in pages.glob("*.json")), 10, "a dump")
    daemon.kill()
    with contextlib.suppress(grpc.RpcError):
        list(events)
    wait_until(lambda: all(who_ticks(tmp_path / "ticks")), 15, "all to go on")
    training.goes_on()
    daemon.start()
    ready(daemon.checkpoint(training.target))
    training.goes_on()


@both
def test_a_dump_that_fails_gives_everything_back(gpus: FakeGpus, tmp_path: Path, design: str) -> None:
    with Daemon(settings={"gpu": gpu_settings(gpus, design), "criu": {"ghost_limit": 4096}}) as daemon:
        ghost = f"cd {tmp_path}; exec 9>ghost; head -c 100000 /dev/zero >&9; rm ghost"
        training = Training(daemon, gpus, tmp_path / "out", "--tick", str(tmp_path / "ticks"), first=ghost)
        used = gpus.used(GPU0)
        failed(daemon.checkpoint(training.target), "dump_failed")
        wait_until(lambda: who_ticks(tmp_path / "ticks") == (True, True), 5, "all to go on")
        assert gpus.used(GPU0) == used
        training.goes_on()


# --- refusals -------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_saved_is_refused_and_runs_on(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out")
    for field, code in (("mig", "gpu_mig"), ("mps", "gpu_mps")):
        gpus.say(GPU0, field, "1")
        failed(daemon.checkpoint(training.target), code)
        gpus.say(GPU0, field, "")
    gpus.arm("any", "state", "state=1")
    failed(daemon.checkpoint(training.target), "gpu_state")
    gpus.disarm("any", "state")
    os.kill(training.pid, signal.SIGSTOP)
    failed(daemon.checkpoint(training.target), "target_frozen")
    os.kill(training.pid, signal.SIGCONT)
    training.goes_on()
    ready(daemon.checkpoint(training.target))


@pytest.mark.parametrize("option", ["--managed", "--ipc"])
def test_memory_that_the_driver_gives_up_is_told(daemon: Daemon, gpus: FakeGpus, tmp_path: Path, option: str) -> None:
    """Nobody can ask a driver before the call whether there is any, and after it the process is lost (gpu.md, section 2)."""
    training = Training(daemon, gpus, tmp_path / "out", option)
    last = failed(daemon.checkpoint(training.target), "left_suspended")
    assert f"bring back process {training.pid}" in last.message
    assert "managed memory" in last.message


def test_a_child_that_inherited_the_device_is_named(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out", "--fork-child")
    failed(daemon.checkpoint(training.target), "gpu_probe_failed")
    training.goes_on()


@both
def test_a_descriptor_that_stays_open_is_named(daemon: Daemon, gpus: FakeGpus, tmp_path: Path) -> None:
    training = Training(daemon, gpus, tmp_path / "out", leftover="fd")
    assert details(failed(daemon.checkpoint(training.target), "gpu_leftover"))["found"] == str(gpus.node())
    training.goes_on()


@pytest.mark.parametrize(
    ("settings", "env", "code"),
    [
        ({"libcuda": "/nonexistent/libcuda.so.1"}, {}, "gpu_driver_absent"),
        ({}, {"FAKE_DRIVER_PROFILE": "r550"}, "gpu_driver_too_old"),
    ],
)
def test_without_a_driver_that_can_a_training_is_refused_and_runs_on(
    gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], env: dict[str, str], code: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with Daemon(settings={"gpu": {**gpu_settings(gpus), **settings}}) as daemon:
        training = Training(daemon, gpus, tmp_path / "out", profile="r580")
        failed(daemon.checkpoint(training.target), code)
        training.goes_on()


def test_a_workload_without_cuda_never_needs_a_helper(daemon: Daemon) -> None:
    daemon.run("plain", python("counter.py", 0.05))
    ready(daemon.checkpoint(job_target("plain")))
    assert not (daemon.state_dir / "gpu").exists()
