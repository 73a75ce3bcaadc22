"""What the steps stand on: the GPUs of this machine, or the fake ones; targets; the driver's calls; a real daemon."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as LateError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from google.protobuf.json_format import MessageToDict

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.gpu.cuda import State
from hibernode.drivers.gpu.nvidia import leftovers
from hibernode.drivers.gpu.nvml import Nvml
from hibernode.drivers.workloads import proc
from hibernode.model import Gpu
from tests import keeper
from tests.cuda_controller import Controller
from tests.daemon import Daemon
from tests.fakes.cuda import FakeGpus
from tests.node.programs import cuda_job

MIB, GIB = 1 << 20, 1 << 30
MARK = "HIBERNODE_GPU_VERIFY"  # in the environment of all that a step starts: the step's folder
GIVEN = "HIBERNODE_GPU_VERIFY_GIVEN_"  # what `run` of a bundle has set aside for programs that are not ours
PROGRAMS = Path(__file__).parent / "programs"
PLAIN = (sys.executable, "-S", "-E", "-B")  # for programs that need the standard library alone
TWIN_STEPS = 4000
_START = 60.0  # seconds until a target's first step: torch is slow to load, and a driver to start


class Unable(Exception):
    """This step, or a part of it, cannot run here; the text says why. Neither good nor bad."""


class Wrong(Exception):
    """What a step was to show is not so."""


def insist(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


@dataclass(frozen=True)
class Options:
    """Of the whole run, as every step gets them."""

    out: str  # where results stay
    work: str  # where everything else is
    criu: str
    python: str = ""  # one that has torch and a GPU; empty: ctypes must do
    fake: bool = False
    quick: bool = False


@dataclass
class Rig(contextlib.AbstractContextManager["Rig"]):
    """One step's. Whatever it started has ended after the `with`."""

    options: Options
    place: Path  # the step's folder
    ends: float  # time.monotonic() at which the step is given up
    detail: dict[str, Any] = field(default_factory=dict)
    fake: FakeGpus | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _control: Controller | None = None
    _count: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        os.environ[MARK] = str(self.place)
        if self.options.fake:
            self.fake = FakeGpus(Path(self.options.work) / "gpus")
            os.environ["FAKE_CUDA_ROOT"] = str(self.fake.root)
        self.nvml = Nvml(str(self.fake.libnvml) if self.fake else "")

    def __exit__(self, *_: object) -> None:
        self.held.close()

    @property
    def torch(self) -> bool:
        return bool(self.options.python)

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.1, self.ends - time.monotonic())

    def note(self, **facts: Any) -> None:
        """Into the step's detail, on disk at once: a step that hangs says how far it came."""
        self.detail.update(facts)
        draft = self.place / "detail.new"
        draft.write_text(json.dumps(self.detail, default=str))
        draft.rename(self.place / "detail.json")

    # --- the GPUs -----------------------------------------------------------------------------------------------------------

    def gpus(self) -> list[Gpu]:
        found = self.nvml.gpus()
        if found.state != "ok" or not found.gpus:
            raise Unable(f"no GPU to be seen: {found.state}: {found.reason}")
        return found.gpus

    @property
    def gpu(self) -> Gpu:
        """The one that targets use."""
        return self.gpus()[0]

    @property
    def used(self) -> int:
        """Bytes, of that one."""
        return self.gpu.memory_used or 0

    def freed(self, size: int, before: int) -> int:
        """Bytes that are in use less than `before`; waits a little for so many as `size`."""
        with contextlib.suppress(TimeoutError):
            keeper.wait_until(lambda: before - self.used >= size, 3, "memory of the GPU")
        return before - self.used

    # --- programs -----------------------------------------------------------------------------------------------------------

    def env(self, *, visible: str = "", **faults: str) -> dict[str, str]:
        """Of a target: this machine's own, without what is ours; one GPU, or the `visible` ones."""
        found = given()
        if self.fake:
            return found | self.fake.env(visible or self.fake.uuids[0], **{"device": str(self.fake.node()), **faults})
        return found | {"CUDA_VISIBLE_DEVICES": visible or self.gpu.uuid}

    def target(
        self, name: str = "job", *, kind: Literal["", "cuda", "torch", "churn"] = "", daemon: Daemon | None = None,
        wrap: Sequence[str] = (), env: Mapping[str, str] | None = None, twin: bool = True, **options: object,
    ) -> Target:  # fmt: skip
        """A program on the GPU, started and past its first step; torch's where there is torch. `daemon`: as its managed job. `options`:
        the program's own, underscores for dashes, True for those without a value."""
        kind = kind or ("torch" if self.torch else "cuda")
        target = Target(self, self.place / f"{name}-{next(self._count)}.out", kind, options, twin=twin)
        if target.expected is None and kind == "torch" and twin:
            target.expected = self.twin(options)
        target.start(daemon, wrap, {**self.env(), **(env or {})})
        self.held.callback(target.end)
        return target

    def twin(self, options: Mapping[str, object]) -> list[str]:
        """What a training with these options writes that nobody interrupts: made once in a run."""
        seed = options.get("seed", 1)
        path = Path(self.options.work) / f"twin-{seed}.out"
        if not path.exists():
            steps = TWIN_STEPS // 4 if self.options.quick else TWIN_STEPS
            draft = self.place / "twin"
            argv = [self.options.python, str(PROGRAMS / "torch_job.py"), str(draft), "--seed", str(seed)]
            argv += ["--steps", str(steps), "--interval-ms", "0"]
            done = subprocess.run(
                argv, env=self.env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=self.left, check=False
            )
            insist(not done.returncode, f"the twin: {done.stderr[-800:]}")
            draft.rename(path)
        return [line.split()[1] for line in path.read_text().splitlines()]

    # --- the driver ---------------------------------------------------------------------------------------------------------

    def controller(self, *, init: bool = True) -> Controller:
        """A process that makes driver calls; a call that hangs hangs there."""
        made = Controller(str(self.fake.libcuda) if self.fake else "", env=self.fake.env(None) if self.fake else {})
        self.held.callback(made.close)
        if init:
            made.start("init").result(60).insist()
        return made

    @property
    def control(self) -> Controller:
        if self._control is None:
            self._control = self.controller()
        return self._control

    def call(self, do: str, *args: object, limit: float = 0.0, control: Controller | None = None) -> float:
        """One call, which must succeed; its milliseconds."""
        try:
            answer = (control or self.control).start(do, *args).result(min(limit, self.left) if limit else self.left)
        except LateError:
            raise Wrong(f"{do} does not answer") from None
        answer.insist()
        return round(answer.ms, 2)

    def code(self, do: str, *args: object, limit: float = 10.0) -> int | str:
        """What it answers: 0, a CUresult, "hangs", or what else was raised."""
        try:
            answer = self.control.start(do, *args).result(min(limit, self.left))
        except LateError:
            return "hangs"
        if answer.error is None:
            return 0
        return int(answer.error["code"]) if answer.error["kind"] == "CudaError" else str(answer.error["text"])[:200]

    def state(self, pid: int) -> State:
        return State(self.control.start("state", pid).result(min(10.0, self.left)).insist())

    def suspend(self, pid: int) -> dict[str, float]:
        """Lock and checkpoint; milliseconds."""
        return {"lock": self.call("lock", pid, 30_000), "checkpoint": self.call("checkpoint", pid)}

    def resume(self, pid: int, pairs: Sequence[tuple[str, str]] = ()) -> dict[str, float]:
        return {"restore": self.call("restore", pid, list(pairs)), "unlock": self.call("unlock", pid)}

    # --- the daemon ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def daemon(self, arena: str = "64MiB") -> Iterator[Daemon]:
        """A real one, with a local store. Raises Unable where CRIU does not work."""
        self.insist_criu()
        gpu: dict[str, object] = {"lock_timeout": 10.0, "idle": 20.0}
        if self.fake:
            gpu |= {"libcuda": str(self.fake.libcuda), "nvml": str(self.fake.libnvml)}
        home = self.place / f"daemon-{next(self._count)}"
        with Daemon(
            home,
            arena=arena,
            settings={"gpu": gpu, "criu": {"path": self.options.criu}},
            work=self.images(),
            call_limit=self.left,
        ) as daemon:
            try:
                yield daemon
            finally:
                shutil.copyfile(daemon.log_path, home / "log")
        shutil.rmtree(daemon.store_dir, ignore_errors=True)

    def images(self) -> Path:
        """Where a daemon may keep CRIU's images: on tmpfs, unless there is none worth the name."""
        shm = Path("/dev/shm")
        if shm.is_dir() and shutil.disk_usage(shm).free >= GIB // 2:
            return shm
        return Path(self.options.work)

    def insist_criu(self) -> None:
        verdict = Path(self.options.work) / "criu-check"
        if not verdict.exists():
            verdict.write_text(self.check_criu())
        if said := verdict.read_text():
            raise Unable(f"CRIU does not work here: {said}")

    def check_criu(self) -> str:
        """Empty if it is well."""
        try:
            done = subprocess.run(
                [self.options.criu, "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            return str(e)
        return "" if not done.returncode else (done.stderr or done.stdout)[-400:].strip() or f"status {done.returncode}"


class Target:
    """A program that writes `<step> <value> <token>` to a file, and what those values have to be."""

    def __init__(self, rig: Rig, out: Path, kind: str, options: Mapping[str, object], *, twin: bool = True) -> None:
        self._rig, self.out, self.kind = rig, out, kind
        self.expected: list[str] | None = None
        self._exact = twin
        words = [
            word
            for name, value in options.items()
            if value is not False
            for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
        ]
        self._mib, self._seed = int(str(options.get("mib", 8))), int(str(options.get("seed", 1)))
        self._gpus = len(str(options.get("gpus", "0")).split(","))
        program = {"torch": PROGRAMS / "torch_job.py", "churn": PROGRAMS / "churn.py"}.get(kind, Path(cuda_job.__file__))
        python = [rig.options.python] if kind == "torch" else PLAIN
        self.argv = [*python, str(program), str(out), *words]
        self.pid, self.process = 0, None
        self.cycled = False  # the driver has restored it once

    process: subprocess.Popen[bytes] | None

    def start(self, daemon: Daemon | None, wrap: Sequence[str], env: Mapping[str, str]) -> None:
        if daemon is not None:
            self.pid = daemon.run(self.out.stem, [*wrap, *self.argv], env=dict(env)).pid
        else:
            with open(f"{self.out}.err", "wb") as err:
                self.process = subprocess.Popen(
                    [*wrap, *self.argv], env=env, stdin=subprocess.DEVNULL, stdout=err, stderr=err, start_new_session=True
                )
            self.pid = self.process.pid
        try:
            self.wait(1, _START)
        except Wrong:
            self.end()
            raise

    def lines(self) -> list[list[str]]:
        text = self.out.read_text() if self.out.exists() else ""
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self) -> int:
        return len(self.lines())

    def wait(self, steps: int, limit: float = 20.0) -> None:
        end = time.monotonic() + min(limit, self._rig.left)
        while self.steps() < steps:
            if (self.process and self.process.poll() is not None) or not keeper.alive(self.pid) or time.monotonic() > end:
                said = Path(f"{self.out}.err")
                last = said.read_text(errors="replace").strip()[-600:] if said.exists() else ""
                raise Wrong(f"{self.out.name} ({keeper.describe(self.pid)}) makes no step after {self.steps()}: {last}")
            time.sleep(0.01)

    def goes_on(self, steps: int = 5, limit: float = 20.0) -> None:
        """It makes so many more, and all that it ever wrote is right."""
        self.wait(self.steps() + steps, limit)
        self.check()

    def check(self) -> None:
        lines = self.lines()
        insist([line[0] for line in lines] == [str(number) for number in range(1, len(lines) + 1)], "steps are missing, or twice")
        insist(len({line[2] for line in lines}) == 1, "it began again: there are two tokens")
        found = [line[1] for line in lines]
        if self._exact:
            wanted = self._wanted(len(found))
            wrong = next((n for n, (one, other) in enumerate(zip(found, wanted, strict=False), 1) if one != other), 0)
            insist(not wrong, f"step {wrong} is not as its twin's: {found[wrong - 1 : wrong]}")

    @property
    def compared(self) -> int:
        """How many of its steps `check` can compare with what they have to be."""
        return min(self.steps(), len(self.expected) if self.expected is not None else self.steps()) if self._exact else 0

    def _wanted(self, count: int) -> Sequence[str]:
        if self.expected is not None:
            return self.expected
        return [str(value) for value in itertools.islice(cuda_job.sequence(self._seed, self._mib, self._gpus), count)]

    def stands_still(self, seconds: float = 0.3) -> bool:
        time.sleep(0.1)
        before = self.steps()
        time.sleep(seconds)
        return self.steps() == before

    def devices(self) -> list[str]:
        """What of a GPU it still has open or mapped."""
        return [path for _, _, path in leftovers([proc.facts(self.pid)])]

    def memory(self) -> dict[str, int]:
        """MiB, as /proc/<pid>/status says."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = dict(line.split(":", 1) for line in status.splitlines())
        return {key: int(found[key].split()[0]) >> 10 for key in ("VmRSS", "RssAnon", "RssShmem", "VmLck") if key in found}

    def end(self) -> None:
        """Kill it, and what it has started; a process that the driver has restored is locked and checkpointed first
        (NVIDIA/cuda-checkpoint #53: a 595 driver hangs the host otherwise). Harmless when repeated."""
        if self.cycled and keeper.alive(self.pid):
            with contextlib.suppress(Exception):
                lay_down(self._rig, self.pid)
        for kill in (os.killpg, os.kill):  # one in a tree of others leads no group
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)


def lay_down(rig: Rig, pid: int) -> None:
    """Whatever its state is, to CHECKPOINTED: then it can be killed."""
    state = rig.state(pid)
    if state is State.RUNNING:
        rig.call("lock", pid, 5000, limit=10)
    if state in (State.RUNNING, State.LOCKED):
        rig.call("checkpoint", pid, limit=60)


def given() -> dict[str, str]:
    """This process's environment, as it was before what is ours was put into it."""
    ours = {"PYTHONPATH", "PYTHONHOME", "PYTHONPYCACHEPREFIX"}
    known = {name.removeprefix(GIVEN): value for name, value in os.environ.items() if name.startswith(GIVEN) and value}
    return {name: value for name, value in os.environ.items() if name not in ours} | known


# --- what everything leaves behind --------------------------------------------------------------------------------------------


def marked(place: Path) -> list[int]:
    """Who was started by the step of that folder, or by the whole run whose folder it is."""
    mark, found = f"{MARK}={place}".encode(), list[int]()
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                if any(word == mark or word.startswith(mark + b"/") for word in words):
                    found.append(int(name))
    return found


def mop(place: Path, limit: float = 10.0) -> list[str]:
    """Kill them; what each was. One that does not die is left."""
    found = [pid for pid in marked(place) if keeper.alive(pid)]
    said = [keeper.describe(pid)[:160] for pid in found]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        keeper.wait_until(lambda: not any(map(keeper.alive, found)), limit, "their end")
    return [f"{what}{' (does not die)' if keeper.alive(pid) else ''}" for pid, what in zip(found, said, strict=True)]


# --- what events say ----------------------------------------------------------------------------------------------------------


def seconds(event: pb.Event) -> dict[str, Any]:
    """Of an action: its phases, and how long the workload stood still."""
    phases: Mapping[str, Any] = MessageToDict(event.profile).get("phases", {})
    found = {name: round(float(cost.get("seconds", 0.0)), 3) for name, cost in phases.items()}
    profile = event.profile
    return {
        **found, "total": round(profile.total_duration / 1e9, 3), "pause": round(profile.pause_ns / 1e9, 3),
        "gpu": round(profile.gpu_ns / 1e9, 3),
        "raw_mib": profile.raw_bytes >> 20, "stored_mib": profile.stored_bytes >> 20,
    }  # fmt: skip


def outcome(events: Sequence[pb.Event]) -> str:
    last = events[-1]
    return "ready" if last.status == "ready" else f"{last.code}: {last.message}"


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    began = time.monotonic()
    work()
    return round((time.monotonic() - began) * 1e3, 1)
