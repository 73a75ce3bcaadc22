"""What `Cuda` says about the driver, asked of the fake driver always, and of the machine's own with HIBERNODE_TEST_REAL_GPU=1.

Where no document says what a driver answers, the fake's answer is a guess, and the test says so (OPEN). A green run on the fake is no word
about a GPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from hibernode.drivers.gpu.cuda import CudaError, State, Unusable
from tests.cuda_controller import Answer, Controller
from tests.fakes.cuda import CONTEXT, GPU0, GPU1, MIB, FakeGpus
from tests.gpu_jobs import Job, until

GPU2 = "GPU-0f0f0f0f-1111-2222-3333-444444444444"  # of another chip
SLICE = "MIG-99999999-8888-7777-6666-555555555555"
DRIVERS = ["fake", *(["real"] if os.environ.get("HIBERNODE_TEST_REAL_GPU") == "1" else [])]
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, OPERATING_SYSTEM = 1, 2, 3, 304
ILLEGAL_STATE, NOT_READY, NOT_SUPPORTED = 401, 600, 801
OPEN = {INVALID_VALUE, NOT_INITIALIZED, OPERATING_SYSTEM}  # nobody says which of them
MOMENT = 0.2  # seconds; long enough for a call that does not wait


class Machine:
    """A machine with a driver, and a controller on it."""

    def __init__(self, gpus: FakeGpus) -> None:
        self._gpus, self.uuids = gpus, gpus.uuids[:2]
        self.control = Controller(str(gpus.libcuda), env=gpus.env(None))

    def env(self, visible: str = "0", **faults: str) -> dict[str, str]:
        return self._gpus.env(visible, **faults)

    def used(self, uuid: str) -> int:
        return self._gpus.used(uuid)

    def free(self, uuid: str) -> int:
        return {GPU0: 256 * MIB, GPU1: 512 * MIB}[uuid] - self.used(uuid)


class RealMachine(Machine):
    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        count = pynvml.nvmlDeviceGetCount()
        self.uuids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
        self.control = Controller()
        self.control("init")

    def env(self, visible: str = "0", **faults: str) -> dict[str, str]:
        assert not faults
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.uuids[int(index)] for index in visible.split(","))}

    def used(self, uuid: str) -> int:
        return int(self._memory(uuid).used)

    def free(self, uuid: str) -> int:
        return int(self._memory(uuid).free)

    def _memory(self, uuid: str) -> Any:
        return self._nvml.nvmlDeviceGetMemoryInfo(self._nvml.nvmlDeviceGetHandleByUUID(uuid))


class Driver:
    """One test's view of it: `call` and `ask` (see Controller), jobs that end with the test."""

    def __init__(self, machine: Machine, place: Path) -> None:
        self.machine, self._place, self.jobs = machine, place, list[Job]()
        self.call, self.ask, self.start = machine.control, machine.control.ask, machine.control.start

    def job(self, *, visible: str = "0", faults: dict[str, str] | None = None, **options: Any) -> Job:
        job = Job(self._place / f"job-{len(self.jobs)}", self.machine.env(visible, **faults or {}), **options)
        self.jobs.append(job)
        return job

    def state(self, job: Job) -> State:
        return State(self.call("state", job.pid))

    def checkpointed(self, **options: Any) -> Job:
        job = self.job(**options)
        self.call("lock", job.pid, 5000)
        self.call("checkpoint", job.pid)
        return job

    def back(self, job: Job, *pairs: tuple[str, str]) -> None:
        """Restored and unlocked, and it goes on."""
        self.call("restore", job.pid, pairs)
        self.call("unlock", job.pid)
        job.goes_on()


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> FakeGpus:
    root = tmp_path_factory.mktemp("machine")
    return FakeGpus(root, [(GPU0, 256 * MIB, "A"), (GPU1, 512 * MIB, "A"), (GPU2, 512 * MIB, "B"), (SLICE, 256 * MIB, "A")])


@pytest.fixture(scope="module")
def fake_machine(gpus: FakeGpus) -> Iterator[Machine]:
    machine = Machine(gpus)
    yield machine
    machine.control.close()


@pytest.fixture(scope="module")
def real_machine() -> Iterator[RealMachine]:
    machine = RealMachine()
    yield machine
    machine.control.close()


def on(machine: Machine, place: Path) -> Iterator[Driver]:
    driver = Driver(machine, place)
    yield driver
    for job in driver.jobs:
        job.kill()


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    """The driver: what is asked here has to be true of a real one."""
    yield from on(request.getfixturevalue(f"{request.param}_machine"), tmp_path)


@pytest.fixture
def fake(fake_machine: Machine, gpus: FakeGpus, tmp_path: Path) -> Iterator[Driver]:
    """The fake alone: for what a real driver does not do when asked."""
    yield from on(fake_machine, tmp_path)


@pytest.fixture
def arm(gpus: FakeGpus) -> Iterator[Callable[..., None]]:
    """FakeGpus.arm, disarmed after the test."""
    armed = []

    def remember(job: Job, call: Any, what: str) -> None:
        armed.append((job.pid, call))
        gpus.arm(job.pid, call, what)

    yield remember
    for pid, call in armed:
        gpus.disarm(pid, call)


def code(answer: Answer) -> int:
    """0 for success."""
    if answer.error is None:
        return 0
    assert answer.error["kind"] == "CudaError", answer
    return int(answer.error["code"])


def waits(future: Future[Answer], seconds: float = MOMENT) -> bool:
    return not wait([future], seconds).done


# --- states ---


def test_the_whole_way_and_back_and_the_job_does_not_notice(driver: Driver) -> None:
    uuid = driver.machine.uuids[0]
    job = driver.job(mib=32)
    used = driver.machine.used(uuid)
    assert driver.state(job) is State.RUNNING
    driver.call("lock", job.pid, 5000)
    assert driver.state(job) is State.LOCKED
    job.stands_still()
    driver.call("checkpoint", job.pid)
    assert driver.state(job) is State.CHECKPOINTED
    assert used - driver.machine.used(uuid) >= 32 * MIB
    job.stands_still(0.05)
    driver.call("restore", job.pid)
    assert driver.state(job) is State.LOCKED
    assert driver.machine.used(uuid) >= used
    job.stands_still(0.05)
    driver.call("unlock", job.pid)
    assert driver.state(job) is State.RUNNING
    job.goes_on()


def test_again_and_again(driver: Driver) -> None:
    job = driver.job()
    for _ in range(5):
        driver.call("lock", job.pid, 5000)
        driver.call("checkpoint", job.pid)
        driver.back(job)


def test_a_lock_can_be_taken_back(driver: Driver) -> None:
    job = driver.job()
    driver.call("lock", job.pid, 5000)
    driver.call("unlock", job.pid)
    assert driver.state(job) is State.RUNNING
    job.goes_on()


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ([], ["checkpoint", "restore", "unlock"]),
        (["lock"], ["lock", "restore"]),
        (["lock", "checkpoint"], ["lock", "checkpoint", "unlock"]),
        (["lock", "checkpoint", "restore"], ["lock", "restore"]),
    ],
    ids=["running", "locked", "checkpointed", "restored"],
)
def test_a_call_that_does_not_fit_the_state_changes_nothing(driver: Driver, before: list[str], wrong: list[str]) -> None:
    job = driver.job()
    limit = {"lock": [2000]}
    for each in before:
        driver.call(each, job.pid, *limit.get(each, []))
    state = driver.state(job)
    for each in wrong:
        assert code(driver.ask(each, job.pid, *limit.get(each, []))) == ILLEGAL_STATE
        assert driver.state(job) is state


def test_an_error_says_which_call_and_what(driver: Driver) -> None:
    job = driver.job()
    with pytest.raises(CudaError) as told:
        driver.call("unlock", job.pid)
    error = told.value
    assert (error.call, error.code, error.name) == ("cuCheckpointProcessUnlock", 401, "CUDA_ERROR_ILLEGAL_STATE")
    assert str(error) == "cuCheckpointProcessUnlock: CUDA_ERROR_ILLEGAL_STATE (401)"


def test_several_processes_at_once(driver: Driver) -> None:
    jobs = [driver.job(seed=seed) for seed in range(3)]
    for call, *args in (("lock", 5000), ("checkpoint",), ("restore",), ("unlock",)):
        for future in [driver.start(call, job.pid, *args) for job in jobs]:
            future.result(20).insist()
    for job in jobs:
        job.goes_on()


def test_the_restore_thread_is_one_of_the_process(driver: Driver) -> None:
    job = driver.job()
    tid = driver.call("restore_thread", job.pid)
    assert Path(f"/proc/{job.pid}/task/{tid}/comm").read_text().startswith("cuda")


# --- the lock ---


def test_a_lock_that_times_out_leaves_it_running_and_other_threads_run_meanwhile(driver: Driver) -> None:
    job = driver.job(busy_ms=1000, interval_ms=0)
    answer = driver.ask("lock", job.pid, 300)
    assert (code(answer), driver.state(job)) == (NOT_READY, State.RUNNING)
    assert 290 < answer.ms < 1500
    assert answer.ticks > 30  # of 150; bindings that hold the interpreter's lock let one through


def test_a_lock_waits_for_what_runs_on_the_gpu(driver: Driver) -> None:
    job = driver.job(busy_ms=200, interval_ms=0)
    answer = driver.ask("lock", job.pid, 10_000)
    answer.insist()
    assert answer.ms < 5000
    driver.call("checkpoint", job.pid)
    driver.back(job)


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_lock_without_a_limit_is_not_made(driver: Driver, timeout: int) -> None:
    job = driver.job()
    with pytest.raises(ValueError, match="for ever"):
        driver.call("lock", job.pid, timeout)
    assert driver.state(job) is State.RUNNING


# --- who it is ---

CALLS = [("state",), ("restore_thread",), ("lock", 500), ("checkpoint",), ("restore",), ("unlock",)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_no_process_of_that_number(driver: Driver, call: tuple[Any, ...]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    for pid in (0, -1):
        assert code(driver.ask(call[0], pid, *call[1:])) in {INVALID_VALUE, NOT_INITIALIZED}
    assert code(driver.ask(call[0], gone.pid, *call[1:])) in OPEN


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_a_process_without_cuda(driver: Driver, call: tuple[Any, ...]) -> None:
    assert code(driver.ask(call[0], os.getpid(), *call[1:])) in {INVALID_VALUE, NOT_INITIALIZED}


def test_a_zombie(driver: Driver) -> None:
    job = driver.job()
    os.kill(job.pid, signal.SIGKILL)
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
    for call in CALLS:
        assert code(driver.ask(call[0], job.pid, *call[1:])) in OPEN


def test_a_thread_is_taken_for_its_process(driver: Driver) -> None:
    """So a caller has to see to it itself that it names a process (cuda-checkpoint #41)."""
    job = driver.job()
    tid = driver.call("restore_thread", job.pid)
    assert driver.call("state", tid) == State.RUNNING
    job.goes_on()


def test_a_forked_child_has_descriptors_and_no_restore_thread(driver: Driver) -> None:
    job = driver.job(fork_child=True)
    (child,) = job.children()
    assert code(driver.ask("restore_thread", child)) in OPEN
    assert driver.call("restore_thread", job.pid)


def test_a_call_on_a_stopped_process_waits_until_it_goes_on(driver: Driver) -> None:
    job = driver.job()
    os.kill(job.pid, signal.SIGSTOP)
    job.wait_stopped()
    asked = driver.start("state", job.pid)
    assert waits(asked)
    other = driver.job()
    assert driver.state(other) is State.RUNNING  # others are not kept from it
    os.kill(job.pid, signal.SIGCONT)
    assert asked.result(5).insist() == State.RUNNING
    job.goes_on()


# --- restore ---


def test_restored_on_another_gpu_where_there_is_one(driver: Driver) -> None:
    old, new = driver.machine.uuids[0], driver.machine.uuids[-1]
    job = driver.checkpointed(mib=32)
    free = driver.machine.free(new)
    driver.back(job, (old, new))
    assert free - driver.machine.free(new) >= 32 * MIB


def test_a_map_with_an_unknown_gpu_is_refused_and_can_be_made_good(driver: Driver) -> None:
    own, nobody = driver.machine.uuids[0], "GPU-12345678-1234-1234-1234-123456789abc"
    job = driver.checkpointed()
    for pair in ((nobody, own), (own, nobody)):
        assert code(driver.ask("restore", job.pid, [pair])) == INVALID_VALUE
        assert driver.state(job) is State.CHECKPOINTED
    driver.back(job)


@pytest.mark.parametrize(
    "text", ["MIG-99999999-8888-7777-6666-555555555555", "", "GPU-1", "11111111-2222-3333-4444-555555555555"]
)
def test_what_is_no_uuid_of_a_gpu_does_not_reach_the_driver(driver: Driver, text: str) -> None:
    job = driver.checkpointed()
    with pytest.raises(ValueError, match="UUID"):
        driver.call("restore", job.pid, [(driver.machine.uuids[0], text)])
    driver.back(job)


def test_no_room_and_then_never_again(driver: Driver) -> None:
    """cuda-checkpoint #44."""
    uuid = driver.machine.uuids[0]
    empty = driver.machine.free(uuid)
    job = driver.job(mib=64)
    need = empty - driver.machine.free(uuid)
    driver.call("lock", job.pid, 5000)
    driver.call("checkpoint", job.pid)
    context = need - 64 * MIB  # the filler has one too, and 8 MiB; 32 MiB stay free beside it
    filler = driver.job(spare_mib=(driver.machine.free(uuid) - context) // MIB - 8 - 32)
    assert code(driver.ask("restore", job.pid)) == OUT_OF_MEMORY
    assert driver.state(job) is State.CHECKPOINTED
    filler.kill()
    until(lambda: driver.machine.free(uuid) > need + 32 * MIB, "the filler's memory is free")
    for _ in range(2):
        assert code(driver.ask("restore", job.pid)) == OPERATING_SYSTEM
        assert driver.state(job) is State.CHECKPOINTED
    assert code(driver.ask("unlock", job.pid)) == ILLEGAL_STATE


# --- what cannot be checkpointed ---


@pytest.mark.parametrize("kind", ["managed", "ipc"])
def test_managed_memory_and_handles_for_others(driver: Driver, kind: str) -> None:
    job = driver.job(**{kind: True})
    driver.call("lock", job.pid, 5000)
    assert code(driver.ask("checkpoint", job.pid)) == NOT_SUPPORTED


# --- the fake alone: what a real driver does not do when asked, or a machine has not ---


def test_a_map_names_all_gpus_that_the_process_saw(fake: Driver) -> None:
    job = fake.checkpointed(visible="0,1", gpus="0,1")
    for partial in ([(GPU0, GPU0)], [(GPU1, GPU1)], [(GPU0, GPU0), (GPU1, GPU0)], [(GPU0, GPU0), (GPU0, GPU1)]):
        assert code(fake.ask("restore", job.pid, partial)) == INVALID_VALUE
        assert fake.state(job) is State.CHECKPOINTED
    fake.back(job, (GPU0, GPU1), (GPU1, GPU0))


def test_two_gpus_one_used(fake: Driver) -> None:
    job = fake.checkpointed(visible=f"{GPU1},{GPU0}", gpus="0")
    assert (fake.machine.used(GPU0), fake.machine.used(GPU1)) == (0, 0)
    fake.back(job, (GPU0, GPU1), (GPU1, GPU0))
    assert (fake.machine.used(GPU0) > CONTEXT, fake.machine.used(GPU1)) == (True, 0)


def test_a_driver_that_wants_the_whole_box_named(fake: Driver) -> None:
    """cuda-python PR 1983."""
    job = fake.checkpointed(faults={"map": "box"})
    assert code(fake.ask("restore", job.pid, [(GPU0, GPU1)])) == INVALID_VALUE
    assert fake.state(job) is State.CHECKPOINTED
    fake.back(job, (GPU0, GPU1), (GPU1, GPU0), (GPU2, GPU2))


def test_a_gpu_of_another_chip_is_the_end(fake: Driver) -> None:
    job = fake.checkpointed()
    assert code(fake.ask("restore", job.pid, [(GPU0, GPU2)])) == NOT_SUPPORTED
    assert fake.state(job) is State.FAILED


def test_a_slice_of_a_gpu(fake: Driver) -> None:
    """cuda-checkpoint #42."""
    job = fake.job(visible=SLICE)
    fake.call("lock", job.pid, 1000)
    assert code(fake.ask("checkpoint", job.pid)) == OUT_OF_MEMORY


def test_memory_of_two_processes_adds_up_and_that_of_the_dead_is_free(fake: Driver, gpus: FakeGpus) -> None:
    one, two = fake.job(mib=8), fake.job(mib=16)
    assert {pid: used // MIB for pid, used in gpus.users(GPU0).items()} == {str(one.pid): 72, str(two.pid): 80}
    one.kill()
    assert list(gpus.users(GPU0)) == [str(two.pid)]


def test_a_process_of_another_pid_namespace(fake: Driver, gpus: FakeGpus) -> None:
    job = fake.job(wrap=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"))
    (inner,) = job.children()
    tid = fake.call("restore_thread", inner)
    assert Path(f"/proc/{inner}/task/{tid}").exists()
    (user,) = gpus.users(GPU0)
    assert user.startswith("1@")
    fake.call("lock", inner, 1000)
    fake.call("checkpoint", inner)
    assert gpus.used(GPU0) == 0
    fake.call("restore", inner)
    fake.call("unlock", inner)
    job.goes_on()


def test_a_hang_ends_when_it_is_disarmed_and_the_job_does_not_wait(
    fake: Driver, gpus: FakeGpus, arm: Callable[..., None]
) -> None:
    job = fake.job()
    arm(job, "state", "hang")
    asked = fake.start("state", job.pid)
    assert waits(asked)
    job.goes_on()
    gpus.disarm(job.pid, "state")
    assert asked.result(5).insist() == State.RUNNING


def test_a_hang_ends_by_itself(fake: Driver, arm: Callable[..., None]) -> None:
    job = fake.job(faults={"hang_limit": "0.2"})
    arm(job, "lock", "hang")
    answer = fake.ask("lock", job.pid, 1000)
    answer.insist()
    assert answer.ms > 150


@pytest.mark.parametrize("call", ["state", "lock", "checkpoint"])
def test_a_target_that_dies_during_a_call(fake: Driver, arm: Callable[..., None], call: str) -> None:
    job = fake.job(fork_child=True)  # whose copies of the descriptors do not keep the caller waiting
    if call == "checkpoint":
        fake.call("lock", job.pid, 1000)
    arm(job, call, "die")
    assert code(fake.ask(call, job.pid, *([1000] if call == "lock" else []))) == OPERATING_SYSTEM
    assert job.process.wait(5) == -signal.SIGKILL


def test_answers_on_demand(fake: Driver, arm: Callable[..., None]) -> None:
    job = fake.job()
    arm(job, "lock", "800 once")
    assert [code(fake.ask("lock", job.pid, 1000)) for _ in range(2)] == [800, 0]
    arm(job, "unlock", "999 done once")
    assert (code(fake.ask("unlock", job.pid)), fake.state(job)) == (999, State.RUNNING)
    arm(job, "lock", "150ms")
    assert fake.ask("lock", job.pid, 1000).ms > 140
    arm(job, "checkpoint", "801 failed")
    assert (code(fake.ask("checkpoint", job.pid)), fake.state(job)) == (NOT_SUPPORTED, State.FAILED)


def test_a_result_and_a_state_that_the_bindings_do_not_know(fake: Driver, arm: Callable[..., None]) -> None:
    job = fake.job()
    arm(job, "lock", "9999")
    with pytest.raises(CudaError) as told:
        fake.call("lock", job.pid, 1000)
    assert (told.value.code, told.value.name) == (9999, "CUresult 9999")
    arm(job, "state", "state=6")
    with pytest.raises(CudaError) as told:
        fake.call("state", job.pid)
    assert (told.value.code, told.value.name) == (0, "CUprocessState 6")


def test_slow_copies(fake: Driver) -> None:
    job = fake.job(mib=32, faults={"gbps": "0.1"})
    fake.call("lock", job.pid, 1000)
    assert fake.ask("checkpoint", job.pid).ms > 320
    assert fake.ask("restore", job.pid).ms > 320
    fake.call("unlock", job.pid)
    job.goes_on()


@pytest.mark.parametrize(("leftover", "own", "childs"), [("", 0, 0), ("fd", 1, 0), ("child", 0, 1)])
def test_descriptors_of_the_device(fake: Driver, gpus: FakeGpus, leftover: str, own: int, childs: int) -> None:
    node = gpus.node()
    faults = {"device": str(node)} | ({"leftover": "fd"} if leftover == "fd" else {})
    job = fake.job(faults=faults, **({"fork_child": True} if leftover == "child" else {}))
    device = node.stat().st_rdev

    def held(pid: int) -> int:
        return sum(fd.exists() and fd.stat().st_rdev == device for fd in Path(f"/proc/{pid}/fd").iterdir())

    assert held(job.pid) == 1 + own
    fake.call("lock", job.pid, 1000)
    fake.call("checkpoint", job.pid)
    assert (held(job.pid), sum(map(held, job.children()))) == (own, childs)
    fake.call("restore", job.pid)
    assert held(job.pid) == 1 + own


# --- whether there is a driver to talk to ---


@pytest.mark.parametrize("profile", ["r550", "r565"])
def test_a_driver_without_the_calls(gpus: FakeGpus, profile: str) -> None:
    with pytest.raises(Unusable) as told:
        Controller(str(gpus.libcuda), env=gpus.env(None, profile=profile))
    assert (told.value.code, told.value.found) == ("gpu_driver_too_old", {"r550": "CUDA 12.4", "r565": "CUDA 12.7"}[profile])
    assert told.value.wanted == "CUDA 12.8 (driver 570) or newer"
    assert str(told.value) == f"the NVIDIA driver ({told.value.found}) has no cuCheckpointProcessGetState"


def test_a_driver_that_stays_on_its_gpus(gpus: FakeGpus, fake: Driver) -> None:
    job = fake.checkpointed(faults={"profile": "r575"})
    with Controller(str(gpus.libcuda), env=gpus.env(None, profile="r575")) as control:
        assert (control.version, control.can_remap) == (12090, False)
        with pytest.raises(Unusable) as told:
            control("restore", job.pid, [(GPU0, GPU0)])
        assert (told.value.code, told.value.wanted) == ("gpu_driver_too_old", "CUDA 13.0 (driver 580) or newer")
        control("restore", job.pid)
        control("unlock", job.pid)
    job.goes_on()


def test_what_a_driver_says_of_itself(fake: Driver) -> None:
    assert (fake.machine.control.version, fake.machine.control.can_remap) == (13000, True)


def test_found_where_the_loader_looks(gpus: FakeGpus) -> None:
    with Controller(env=gpus.env(None)) as control:
        assert control.version == 13000


def test_init(gpus: FakeGpus, tmp_path: Path) -> None:
    with Controller(str(gpus.libcuda), env=gpus.env(None)) as control:
        control("init")
        assert gpus.used(GPU0) == 0  # no context
        control("init")
    with Controller(str(gpus.libcuda), env=FakeGpus(tmp_path, []).env(None)) as control, pytest.raises(CudaError) as told:
        control("init")
    assert (told.value.call, told.value.name) == ("cuInit", "CUDA_ERROR_NO_DEVICE")


@pytest.mark.parametrize("library", ["/nowhere/libcuda.so.1", "other", "text"])
def test_no_driver(gpus: FakeGpus, tmp_path: Path, library: str) -> None:
    text = tmp_path / "libcuda.so.1"
    text.write_text("not a library")
    path = {"other": str(gpus.libnvml), "text": str(text)}.get(library, library)
    with pytest.raises(Unusable) as told:
        Controller(path)
    assert told.value.code == "gpu_driver_absent"
    assert path in told.value.found


NO_CHECKPOINT = "def cuDriverGetVersion(): raise AssertionError\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cuda/__init__.py": "raise ModuleNotFoundError('No module named cuda')"}, "No module named cuda"),
        ({"cuda/__init__.py": "", "cuda/bindings/__init__.py": "__version__ = '12.8.0'"}, "cannot import name 'driver'"),
        (
            {
                "cuda/__init__.py": "",
                "cuda/bindings/__init__.py": "__version__ = '12.9.0'",
                "cuda/bindings/driver.py": f"{NO_CHECKPOINT}CUcheckpointRestoreArgs = object",
            },
            "cuda-bindings 12.9.0",
        ),
        (
            {
                "cuda/__init__.py": "",
                "cuda/bindings/__init__.py": "__version__ = '13.3.0'",
                "cuda/bindings/driver.py": NO_CHECKPOINT,
            },
            "cuda-bindings 13.3.0",
        ),
    ],
    ids=["none", "without a driver", "hold the GIL", "without arguments"],
)
def test_no_bindings_or_none_that_can_be_used(gpus: FakeGpus, tmp_path: Path, files: dict[str, str], found: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(Unusable) as told:
        Controller(str(gpus.libcuda), path=str(tmp_path), env=gpus.env(None))
    assert told.value.code == "gpu_bindings"
    assert found in told.value.found
    assert told.value.wanted == "cuda-bindings 13.0 or newer, not 13.3.0"


# --- how the fake is built ---

BUILD = "import sys; from tests.fakes.cuda import build; print(build())"


def built(tmp: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD], env=os.environ | {"TMPDIR": str(tmp), "PYTHONPATH": os.pathsep.join(sys.path)} | env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_any_number_may_build_the_fake_at_once(tmp_path: Path) -> None:
    builders = [built(tmp_path) for _ in range(3)]
    said = [builder.communicate(timeout=60) for builder in builders]
    assert {err for _, err in said} == {""}
    (place,) = {out.strip() for out, _ in said}
    assert [Path(place)] == list(tmp_path.iterdir())
    assert sorted(file.name for file in Path(place).iterdir()) == ["libcuda.so.1", "libnvidia-ml.so.1"]


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    _, err = built(tmp_path, PATH="/nowhere").communicate(timeout=60)
    assert "no gcc to build the fake CUDA driver with\nhint: " in err
    assert list(tmp_path.iterdir()) == []
