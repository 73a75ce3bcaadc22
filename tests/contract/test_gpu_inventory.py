"""ports.Inventory through NVML: what is there is told, what is not costs nothing, and nothing hangs.

pynvml and the library under it are one for a process, so each test asks in a process of its own. The library is `tests/fakes/cuda`'s, and
with HIBERNODE_TEST_REAL_GPU=1 the part that is true of every machine is asked of the driver here too. The fake proves our handling of
answers, and nothing of a driver.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

import pytest

from hibernode.model import MAX_GPUS, Gpu, GpuInventory

SOURCE = Path(__file__).resolve().parents[1] / "fakes" / "cuda" / "fakenvml.c"
ONE, OTHER = "GPU-11111111-0000-4000-8000-000000000001", "GPU-22222222-0000-4000-8000-000000000002"
GIB = 1 << 30
LIMIT = 20.0  # seconds, for whatever is waited for
KINDS = ["fake", *(["real"] if os.environ.get("HIBERNODE_TEST_REAL_GPU") == "1" else [])]

ASKER = """
import json, os, sys, threading
from pathlib import Path
if sys.argv[1] == "without":
    sys.modules["pynvml"] = None
from hibernode.drivers.gpu.nvml import Nvml

made = Nvml(sys.argv[2], patience=float(sys.argv[3]), proc=Path(sys.argv[4]))

def inherited(fd):
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return not int(next(line for line in lines if line.startswith("flags:")).split()[1], 8) & os.O_CLOEXEC

for line in sys.stdin:
    if line.strip() == "many":
        found = []
        threads = [threading.Thread(target=lambda: found.append(made.gpus().model_dump())) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    elif line.strip() == "descriptors":
        names = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
        found = [[name, inherited(fd)] for fd, name in names.items() if name.startswith("/dev/nvidia")]
    else:
        found = made.gpus().model_dump()
    print(json.dumps(found), flush=True)
"""


class Asker:
    """A process that asks NVML. Leaving it must end it, whatever hangs in there."""

    def __init__(self, env: Mapping[str, str], library: str, patience: float, proc: Path, *, package: bool = True) -> None:
        command = [sys.executable, "-c", ASKER, "with" if package else "without", library, str(patience), str(proc)]
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths} | env
        )

    def _ask(self, what: str) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def gpus(self) -> GpuInventory:
        return GpuInventory.model_validate(self._ask("gpus"))

    def many(self) -> list[GpuInventory]:
        found = self._ask("many")
        assert isinstance(found, list)
        return [GpuInventory.model_validate(each) for each in found]

    def descriptors(self) -> object:
        return self._ask("descriptors")

    def until(self, state: str) -> GpuInventory:
        deadline = time.monotonic() + LIMIT
        while (found := self.gpus()).state != state:
            assert time.monotonic() < deadline, found
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(LIMIT) == 0
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


class Machine:
    """Two GPUs of the fake library, and what a test makes of them while somebody asks."""

    def __init__(self, library: Path, root: Path) -> None:
        self.library, self.root, self.proc = library, root, root / "proc"
        self.env = {"FAKE_CUDA_ROOT": str(root)}
        self._ledgers: dict[str, int] = {}
        self.put("devices", f"{ONE} {80 * GIB}\n{OTHER} {40 * GIB}\n")

    def put(self, name: str, text: str) -> None:
        """Whole or not at all: somebody may be reading."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}").write_text(text)
        path.with_name(f".{path.name}").rename(path)

    def set(self, uuid: str, **fields: str) -> None:
        for name, text in fields.items():
            self.put(f"nvml/{uuid}/{name}", text)

    def use(self, uuid: str, size: int) -> None:
        """By a process that lives as long as this one holds the lock."""
        path = self.root / uuid / str(os.getpid())
        path.parent.mkdir(exist_ok=True)
        if uuid not in self._ledgers:
            self._ledgers[uuid] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(self._ledgers[uuid], fcntl.LOCK_EX)
        os.pwrite(self._ledgers[uuid], f"{size:20}".encode(), 0)

    def close(self) -> None:
        for ledger in self._ledgers.values():
            os.close(ledger)

    def fail(self, **codes: int | str) -> None:
        self.put("nvml/errors", "".join(f"{function} {code}\n" for function, code in codes.items()))

    def asker(self, library: str | None = None, patience: float = 5.0, *, package: bool = True, **env: str) -> Asker:
        return Asker(self.env | env, str(self.library) if library is None else library, patience, self.proc, package=package)

    def kernel(self, version: str = "580.65.06") -> None:
        """As the kernel's driver shows itself."""
        self.put(
            "proc/version",
            f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (me)\nGCC version: 13",
        )
        for at, (uuid, minor) in enumerate(((OTHER, 1), ("GPU-????????-????-????-????-????????????", 0))):
            said = (
                f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 7\nGPU UUID: \t {uuid}\nBus Location: \t 0000:0{9 - at}:00.0\n"
            )
            self.put(f"proc/gpus/0000:0{9 - at}:00.0/information", f"{said}Device Minor: \t {minor}\nGPU Excluded:\t No\n")


Builder = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    def built(*options: str) -> Path:
        library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", *options]
        subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
        return library

    return built


@pytest.fixture(scope="session")
def library(build: Builder) -> Path:
    return build()


@pytest.fixture
def machine(library: Path, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(library, tmp_path)
    yield made
    made.close()


@pytest.fixture(params=KINDS)
def any_asker(request: pytest.FixtureRequest, machine: Machine) -> Iterator[Asker]:
    made = machine.asker() if request.param == "fake" else Asker({}, "", 20.0, Path("/proc/driver/nvidia"))
    with made:
        yield made


# --- of every machine with GPUs ------------------------------------------------------------------------------------------------------


def test_what_is_told_of_a_gpu_makes_sense_or_says_why_it_is_missing(any_asker: Asker) -> None:
    found = any_asker.gpus()
    assert (found.state, found.reason, found.known) == ("ok", "", True)
    assert found.driver.split(".")[0].isdigit()
    assert float(found.cuda) >= 12
    assert 0 < len(found.gpus) <= MAX_GPUS
    assert len({gpu.uuid for gpu in found.gpus}) == len(found.gpus)
    for index, gpu in enumerate(found.gpus):
        assert gpu.index == index
        assert gpu.uuid.startswith("GPU-")
        assert gpu.name
        assert float(gpu.compute_capability) >= 5
        assert set(gpu.unknown) == {name for name, value in gpu if name != "unknown" and value in (None, "")}
        assert all(gpu.unknown.values())
        if gpu.memory_total is not None and gpu.memory_used is not None and gpu.memory_free is not None:
            assert 0 < gpu.memory_total >= max(gpu.memory_used, gpu.memory_free)


def test_many_may_ask_at_once(any_asker: Asker) -> None:
    first = any_asker.gpus()
    assert [[gpu.uuid for gpu in found.gpus] for found in any_asker.many()] == [[gpu.uuid for gpu in first.gpus]] * 8


def test_a_question_is_cheap_once_nvml_is_open(any_asker: Asker) -> None:
    any_asker.gpus()
    took = []
    for _ in range(5):
        before = time.monotonic()
        any_asker.gpus()
        took.append(time.monotonic() - before)
    assert min(took) < 0.5


def test_no_child_inherits_a_descriptor_of_the_driver(any_asker: Asker) -> None:
    any_asker.gpus()
    descriptors = any_asker.descriptors()
    assert isinstance(descriptors, list)
    assert [name for name, inherited in descriptors if inherited] == []


# --- what there is -------------------------------------------------------------------------------------------------------------------


def test_everything_that_nvml_tells(machine: Machine) -> None:
    machine.set(ONE, name="NVIDIA H100 80GB HBM3", reserved=str(GIB), bus="00000000:3B:00.0", minor="4", ecc="2", rows="1 1 1 0")
    machine.set(OTHER, compute="8.0", mig="1", persistence="0", mode="3", mps="17\n18\n")
    machine.use(ONE, 2 * GIB)
    machine.put(f"{ONE}/{1 << 30}", "7")  # ended
    machine.put("nvml/driver", "610.1.2")
    machine.put("nvml/cuda", "13020")
    with machine.asker() as asker:
        found = asker.gpus()
    one = Gpu(
        index=0, uuid=ONE, name="NVIDIA H100 80GB HBM3", bus_id="0000:3b:00.0", minor=4, compute_capability="9.0",
        memory_total=80 * GIB, memory_used=3 * GIB, memory_free=77 * GIB, mig=False, persistence=True, compute_mode="default",
        processes=1, mps_processes=0, ecc_uncorrected=2, rows_pending=True, rows_failed=False,
    )  # fmt: skip
    other = Gpu(
        index=1, uuid=OTHER, name="Fake GPU", bus_id="0000:02:00.0", minor=1, compute_capability="8.0", memory_total=40 * GIB,
        memory_used=0, memory_free=40 * GIB, mig=True, persistence=False, compute_mode="exclusive_process", processes=0,
        mps_processes=2, ecc_uncorrected=0, rows_pending=False, rows_failed=False,
    )  # fmt: skip
    assert found == GpuInventory(state="ok", reason="", driver="610.1.2", cuda="13.2", gpus=[one, other])
    assert found.mps is True


def test_an_answer_is_as_old_as_its_question(machine: Machine) -> None:
    """Whether memory was freed is seen by the difference of two answers."""
    with machine.asker() as asker:
        for used in (0, 5 * GIB, 1 * GIB):
            machine.use(OTHER, used)
            assert [gpu.memory_used for gpu in asker.gpus().gpus] == [0, used]


def test_a_machine_with_a_driver_and_no_gpu_is_well(machine: Machine) -> None:
    machine.put("devices", "")
    with machine.asker() as asker:
        found = asker.gpus()
    assert (found.state, found.known, found.gpus, found.driver) == ("ok", True, [], "580.159.04")
    assert found.mps is False


def test_the_library_may_come_by_the_path_of_the_linker(machine: Machine) -> None:
    with machine.asker("", LD_LIBRARY_PATH=str(machine.library.parent)) as asker:
        assert len(asker.gpus().gpus) == 2


# --- what there is not ---------------------------------------------------------------------------------------------------------------


def test_a_machine_without_driver_is_well(machine: Machine) -> None:
    with machine.asker("") as asker:  # no library, nothing of the kernel
        assert asker.gpus() == GpuInventory(state="absent", reason="no NVIDIA driver")
        assert asker.gpus().known


def test_neither_package_nor_driver_is_well_too(machine: Machine) -> None:
    with machine.asker("", package=False) as asker:
        assert asker.gpus().state == "absent"


@pytest.mark.parametrize(
    ("package", "state", "reason"), [(True, "library", "libnvidia-ml.so.1 was not found"), (False, "bindings", "ml-py")]
)
def test_without_nvml_the_kernel_says_what_it_knows(machine: Machine, *, package: bool, state: str, reason: str) -> None:
    machine.kernel()
    with machine.asker("", package=package) as asker:
        found = asker.gpus()
    assert (found.state, found.known, found.driver) == (state, False, "580.65.06")
    assert reason in found.reason
    assert [(gpu.uuid, gpu.name, gpu.bus_id, gpu.minor) for gpu in found.gpus] == [
        ("", "NVIDIA H100 80GB HBM3", "0000:08:00.0", 0),  # the driver has not woken it up: it has no name for it yet
        (OTHER, "NVIDIA H100 80GB HBM3", "0000:09:00.0", 1),
    ]
    for gpu in found.gpus:
        assert gpu.memory_used is None
        assert gpu.unknown["memory_used"] == found.reason
    assert found.mps is None


def test_a_configured_library_that_is_not_there_is_said(machine: Machine) -> None:
    with machine.asker("/nowhere/libnvidia-ml.so.1") as asker:
        found = asker.gpus()
    assert (found.state, found.known) == ("library", False)
    assert "gpu.nvml: /nowhere/libnvidia-ml.so.1" in found.reason


def test_a_configured_library_of_another_name_is_said(machine: Machine, tmp_path: Path) -> None:
    """pynvml would pass it over in silence, and take another."""
    other = tmp_path / "libother.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libother.so", "-o", str(other), str(SOURCE)], check=True)
    with machine.asker(str(other), LD_LIBRARY_PATH=str(machine.library.parent)) as asker:
        found = asker.gpus()
    assert found.state == "library"
    assert "does not call itself" in found.reason


def test_what_an_older_driver_has_not_is_unknown(machine: Machine, build: Builder) -> None:
    machine.library = build("-DFAKE_NVML_RELEASE=440")
    with machine.asker() as asker:
        found = asker.gpus()
    lacking = {"mig", "processes", "mps_processes", "rows_pending", "rows_failed"}
    for gpu in found.gpus:
        assert gpu.unknown == dict.fromkeys(lacking, "Function Not Found")
        assert all(getattr(gpu, name) is None for name in lacking)
        assert gpu.memory_total
    assert found.known
    assert found.mps is None


def test_what_one_gpu_does_not_support_is_unknown_of_it_alone(machine: Machine) -> None:
    machine.set(OTHER, mig="n/a", reserved="n/a", ecc="n/a", name="n/a")
    with machine.asker() as asker:
        one, other = asker.gpus().gpus
    lacking = ("name", "mig", "memory_total", "memory_used", "memory_free", "ecc_uncorrected")
    assert (one.unknown, other.unknown) == ({}, dict.fromkeys(lacking, "Not Supported"))
    assert (other.name, other.mig, other.memory_used, other.ecc_uncorrected) == ("", None, None, None)


def test_a_number_that_is_none_is_unknown(machine: Machine) -> None:
    machine.set(ONE, ecc=str((1 << 64) - 1), minor=str((1 << 32) - 1))
    with machine.asker() as asker:
        gpu = asker.gpus().gpus[0]
    assert (gpu.ecc_uncorrected, gpu.minor) == (None, None)
    assert gpu.unknown == dict.fromkeys(("ecc_uncorrected", "minor"), "the driver gives no value")


def test_a_gpu_that_is_lost_is_listed_with_the_reason(machine: Machine) -> None:
    machine.fail(nvmlDeviceGetHandleByIndex_v2=15)
    with machine.asker() as asker:
        found = asker.gpus()
    assert found.state == "ok"
    assert [(gpu.index, gpu.uuid, gpu.unknown["uuid"]) for gpu in found.gpus] == [(0, "", "GPU is lost"), (1, "", "GPU is lost")]


# --- what comes and goes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", ["nvmlInitWithFlags", "nvmlSystemGetDriverVersion", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetName"]
)
@pytest.mark.parametrize(("code", "state"), [(18, "mismatch"), (9, "unloaded")])
def test_a_driver_that_is_replaced_or_gone_is_said_and_seen_when_it_is_back(
    machine: Machine, function: str, code: int, state: str
) -> None:
    machine.kernel("610.1.2")
    with machine.asker() as asker:
        if function != "nvmlInitWithFlags":
            assert asker.gpus().state == "ok"
        machine.fail(**{function: code})
        found = asker.gpus()
        assert (found.state, found.known, found.driver) == (state, False, "610.1.2")
        assert found.reason.startswith("NVML: ")
        assert len(found.gpus) == 2
        machine.fail()
        assert asker.gpus().state == "ok"


def test_a_library_without_its_driver_is_no_healthy_machine(machine: Machine) -> None:
    (machine.root / "devices").unlink()
    with machine.asker() as asker:
        found = asker.gpus()
        assert (found.state, found.reason, found.known, found.gpus) == ("unloaded", "NVML: Driver Not Loaded", False, [])
        machine.put("devices", f"{ONE} {GIB}\n")
        assert [gpu.uuid for gpu in asker.gpus().gpus] == [ONE]


def test_any_other_error_is_a_reason_too(machine: Machine) -> None:
    machine.fail(nvmlInitWithFlags=999)
    with machine.asker() as asker:
        assert (asker.gpus().state, asker.gpus().reason) == ("failed", "NVML: Unknown Error")


def test_a_call_that_hangs_leaves_the_last_answer_and_holds_up_nobody(machine: Machine) -> None:
    with machine.asker(patience=0.3) as asker:
        before = asker.until("ok")
        machine.fail(nvmlDeviceGetMemoryInfo="hang")
        silent = asker.gpus()
        assert silent == before.model_copy(update={"state": "silent", "reason": "NVML does not answer"})
        assert not silent.known
        began = time.monotonic()
        assert [asker.gpus(), *asker.many()] == [silent] * 9
        assert time.monotonic() - began < 1  # nine times the patience would be more
        machine.fail()
        assert asker.until("ok") == before


def test_a_call_that_hangs_from_the_first_keeps_no_process_from_ending(machine: Machine) -> None:
    machine.fail(nvmlInitWithFlags="hang")
    with machine.asker(patience=0.1) as asker:
        assert asker.gpus() == GpuInventory(state="silent", reason="NVML does not answer")


def test_a_thread_that_cannot_be_had_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from hibernode.drivers.gpu.nvml import Nvml

    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    made = Nvml("/nowhere", patience=0.1)
    monkeypatch.setattr(threading.Thread, "start", none)
    assert [made.gpus().state, made.gpus().state] == ["failed", "failed"]
