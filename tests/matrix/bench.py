"""One bench: a node of its own (directories, broker, store, daemon) and the programs on it. Benches do not know each other."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from hibernode import locks
from hibernode._pb import hibernode_pb2 as pb
from hibernode._pb import hibernode_pb2_grpc as pb_grpc
from hibernode.drivers.localdir import LocalDir
from tests import keeper as processes
from tests.envelope import opened
from tests.fakes.cuda import FakeGpus
from tests.keeper import wait_until
from tests.matrix import programs
from tests.matrix.bus import CLUSTER, Bus
from tests.matrix.keeper import Keeper
from tests.matrix.programs import Beats
from tests.matrix.script import MESSAGE, Plan, encode_plan

SUBJECTS = ("process", "job", "gpu", "chain", "alone")
LIMIT = 6.0  # seconds a phase may take
DRIVER = 2.0  # seconds a call of the GPU driver may take, beside 1 s for each 128 MiB
STATE = 1.0  # seconds the driver may take to say how a process is
GRACE = 1.0  # seconds the watchdog waits for a daemon that may come back, or come to its end
ROOT = Path(__file__).resolve().parents[2]
START = 20.0  # seconds until a daemon takes calls
MANIFEST = 1 << 20  # bytes, more than any has
ASK = 20.0  # seconds for an answer of the script, or of gRPC
SETTINGS = """
node = "{node}"
cluster = "{cluster}"
state_dir = "{home}/state"
work_dir = "{work}"
socket = "{home}/d.sock"
bus = {{ url = "{bus}", ack_wait = 1.0 }}
store = {{ url = "file://{home}/store", allowed = [{allowed}] }}
arena = {{ size = "16MiB" }}
transfer = {{ streams = 2 }}
criu = {{ path = "{home}/bin/criu" }}
gpu = {{ libcuda = "{libcuda}", nvml = "{libnvml}", lock_timeout = 1.0, design = "{design}" }}
metrics = {{ listen = "" }}
log = {{ format = "json" }}
watchdog = {{ interval = 0.1, grace = {grace} }}
increments = {{ bases = 4 }}

{keys}
[limits]
attempts = 2
retry_delay = 0.05
progress_interval = 0.05
node_interval = 2.0
preflight = {limit}
pause = {limit}
transfer = {limit}
commit = {limit}
restore = {limit}
gpu = {driver}
"""
# Where it has keys: what one node writes is signed and encrypted, what another reads may be.
WRITES = """
[signing]
key = "{signer}"
trusted = ["{public}"]
[encryption]
key = "{wrapper}"
"""
READS = """
[encryption]
former = ["{wrapper}"]
"""
# CRIU's own fault injection is switched by its environment; a file beside it says which, so that a daemon need not be started for it.
CRIU = """#!/bin/sh
if [ -s "$0.fault" ] && [ "$1" = swrk ]; then CRIU_FAULT=$(cat "$0.fault"); export CRIU_FAULT; fi
exec {real} "$@"
"""


class Subject:
    """One workload: a process, a managed job, or a process with state on a GPU, and a child of each. `beats` is what it says. A `chain` is
    a process of which each checkpoint is an increment of the last, if it can be. One that is `alone` has no child."""

    def __init__(self, bench: Bench, kind: str) -> None:
        self.kind, self._bench = kind, bench
        self.beats = programs.beat_file(bench.home / f"{kind}.beats", kind)
        self.born: Beats = ()  # who it is
        self.base = ""  # a checkpoint of it that is ready, while it is dead
        self.last = ""  # the last that was ready, of one that may have come back since

    @property
    def target(self) -> dict[str, Any]:
        return {"namespace": "default", "pod_name": "job"} if self.kind == "job" else {"pid": self.born[0].pid}

    @property
    def argv(self) -> list[str]:
        return programs.command_line(self.kind, self._bench.binary, self.beats)

    def start(self) -> None:
        """A new one, in place of what may be left of the old."""
        self.end()
        if self.kind == "job":
            self._bench.stub.RunJob(pb.RunRequest(name="job", argv=self.argv, cwd=str(self._bench.home)), timeout=ASK)
        else:
            env = self._bench.gpu_env() if self.kind == "gpu" else {}
            self._bench.keeper.start_program(self.argv, self._bench.home, env=env)
        self.born = self.beats.wait()
        self.base = self.last = ""
        if not self.born:
            raise RuntimeError(f"the {self.kind} does not start")

    def end(self) -> None:
        """SIGKILL what there is of it; its pids are free afterwards, and what it said is forgotten."""
        pids = sorted({*self.living(), *(beat.pid for beat in self.born)})
        processes.kill_all([pid for pid in pids if pid in self.living()])
        wait_until(lambda: not any(processes.fields(pid) for pid in pids), ASK, f"free pids {pids}")
        self.beats.blank()

    def living(self) -> list[int]:
        return programs.living(self.argv)

    def suspended(self) -> list[str]:
        """Whose GPU state is not where it was, as the driver itself says; who has none is not asked."""
        if self.kind != "gpu":
            return []
        states = {pid: self._bench.driver.state(pid) for pid in self.living()}
        return [f"{pid} is {state}" for pid, state in states.items() if state != "RUNNING" and pid in self.living()]


class Driver:
    """Asks the GPU driver how a process is, past everything of ours."""

    def __init__(self, library: Path) -> None:
        self._path = library

    @functools.cached_property
    def _library(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(self._path))

    def state(self, pid: int) -> str:
        """Whoever stands still gives no answer: the thread that waits for it ends with that."""
        said: list[str] = []
        threading.Thread(target=lambda: said.append(self._ask(pid)), daemon=True).start()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: said, STATE, "the driver")
        return said[0] if said else "silent"

    def _ask(self, pid: int) -> str:
        state = ctypes.c_int()
        code = self._library.cuCheckpointProcessGetState(pid, ctypes.byref(state))
        return f"error {code}" if code else ("RUNNING", "LOCKED", "CHECKPOINTED", "FAILED")[state.value]


class Daemon:
    """One life of the daemon, seen through the channel of its script."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid, self._channel = pid, channel
        self.ended = False
        self._said: deque[dict[str, Any]] = deque()

    def hear(self, timeout: float) -> dict[str, Any] | None:
        """The next thing it says of itself; None if it says nothing or has ended."""
        if not self._said:
            self._receive(timeout)
        return self._said.popleft() if self._said else None

    def _receive(self, timeout: float) -> None:
        self._channel.settimeout(max(timeout, 0.001))
        try:
            data = self._channel.recv(MESSAGE)
        except TimeoutError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            self._said.append(json.loads(data))
        else:
            self.ended = True

    def plan(self, plan: Plan) -> dict[str, int]:
        """From now on this is what goes wrong; the points that were hit since the plan before."""
        return dict((self._ask("planned", say="plan", plan=encode_plan(plan)) or {}).get("hits", {}))

    def go_on(self) -> None:
        self._tell(say="go")

    def census(self) -> tuple[list[str], list[str]]:
        """Its threads by name, and the tasks of its loop by where they wait."""
        said = self._ask("census", say="census") or {}
        return list(said.get("threads", [])), list(said.get("tasks", []))

    def _ask(self, answer: str, **question: object) -> dict[str, Any] | None:
        self._tell(**question)
        deadline, kept = time.monotonic() + ASK, []
        try:
            while not self.ended and time.monotonic() < deadline:
                self._receive(0.1)
                while self._said:
                    said = self._said.popleft()
                    if said["say"] == answer:
                        return said
                    kept.append(said)
            return None
        finally:
            self._said.extend(kept)

    def _tell(self, **message: object) -> None:
        try:
            self._channel.send(json.dumps(message).encode())
        except OSError:
            self.ended = True

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def criu(self) -> list[int]:
        """CRIU's worker and what it has forked and not yet restored."""
        return [pid for pid in processes.descendants(self.pid) if is_criu(pid)]

    def close(self) -> None:
        self._channel.close()


class Bench:
    """`with Bench(...) as bench:` has a daemon running. One thread."""

    def __init__(
        self, home: Path, work: Path, binary: Path, criu: str, *, stores: Sequence[Path] = (), bus: bool = True, keys: str = "",
        limit: float = LIMIT, design: str = "lock",
    ) -> None:  # fmt: skip
        """`stores`: others that it may restore from. Without `bus` it is asked over gRPC only. `keys`: further tables of settings.
        `limit`: seconds that a phase may take. `design`: of saving what is on GPUs."""
        self.home, self.work, self.binary = home, work, binary
        self.home.mkdir(parents=True)
        self.node = home.name
        self.gpus = FakeGpus(home / "gpus")
        self.driver = Driver(self.gpus.libcuda)
        os.environ["FAKE_CUDA_ROOT"] = str(
            self.gpus.root
        )  # of the daemon's helper, and of the watchdog's; and for our own questions
        self.keeper = Keeper()  # first: it must not be forked from a process with threads
        self._bus = Bus(home / "nats", self.node) if bus else None
        self.store = LocalDir(home / "store")
        (home / "bin").mkdir()
        self._criu = home / "bin" / "criu"
        self._criu.write_text(CRIU.format(real=criu))
        self._criu.chmod(0o755)
        self.settings, self.log = home / "hibernode.toml", home / "daemon.log"
        allowed = ", ".join(f'"file://{store}"' for store in stores)
        url = self._bus.url if self._bus else ""
        text = SETTINGS.format(
            node=self.node, cluster=CLUSTER, home=home, work=work, bus=url, allowed=allowed, limit=limit, grace=GRACE, keys=keys,
            driver=DRIVER, design=design, libcuda=self.gpus.libcuda, libnvml=self.gpus.libnvml,
        )  # fmt: skip
        self.settings.write_text(text)
        self.subjects = {kind: Subject(self, kind) for kind in SUBJECTS}
        self._channel: grpc.Channel | None = None
        self.daemon: Daemon | None = None
        self.starts = 0
        self.leaked_uploads = 0  # swept after the cases that left them

    @property
    def bus(self) -> Bus:
        assert self._bus is not None
        return self._bus

    def start(self, plan: Plan | None = None) -> bool:
        """A daemon, which takes calls when this returns; False if it has ended before it did."""
        if self.daemon is not None and self.daemon.ended:  # its channel is closed; its lock and its socket may not be yet
            before = self.daemon.pid
            wait_until(lambda: not processes.alive(before), ASK, f"the end of daemon {before}")
        self._forget_daemon()
        self.starts += 1
        pid, channel = self.keeper.start_daemon(self.settings, self.log, encode_plan(plan or Plan()))
        self.daemon = Daemon(pid, channel)
        deadline = time.monotonic() + START
        while not self._answers():
            self.daemon._receive(0.003)
            if self.daemon.ended:
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"the daemon does not start: {self.log_tail()}")
        self._channel = grpc.insecure_channel(f"unix:{self.home}/d.sock", options=[("grpc.enable_retries", 0)])
        return True

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.home / "d.sock"))
            except OSError:
                return False
        return True

    def insist_running(self) -> Daemon:
        """The daemon that runs; a new one where it has ended."""
        if self.daemon is None or self.daemon.ended or not processes.alive(self.daemon.pid):
            if not self.start():
                raise RuntimeError(f"the daemon does not start: {self.log_tail()}")
            assert self.daemon is not None
        return self.daemon

    def _forget_daemon(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self.daemon is not None:
            self.daemon.close()
            self.daemon = None

    def stop(self, number: signal.Signals = signal.SIGTERM, limit: float = 45.0) -> int | None:
        """End it; how it ended, None if it does not."""
        if self.daemon is None:
            return 0
        pid = self.daemon.pid
        self.daemon.signal(number)
        code = self.keeper.exit_code(pid, limit)
        self._forget_daemon()
        return code

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """The watchdog runs meanwhile: the real one, a process of its own."""
        log = self.home / "watchdog.log"
        said = log.stat().st_size if log.exists() else 0
        argv = [sys.executable, "-m", "hibernode", "watchdog", "--config", str(self.settings)]
        pid = self.keeper.start_program(argv, Path("/"), str(log))
        try:
            wait_until(lambda: log.exists() and b"watching" in log.read_bytes()[said:], START, "the watchdog")
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            self.keeper.exit_code(pid, ASK)

    @property
    def stub(self) -> pb_grpc.NodeStub:
        assert self._channel is not None
        return pb_grpc.NodeStub(self._channel)  # type: ignore[no-untyped-call]

    def record(self, action_id: str) -> dict[str, Any] | None:
        """What the journal has of an action."""
        try:
            found: dict[str, Any] = json.loads((self.home / "state" / "journal" / f"{action_id}.json").read_text())
        except FileNotFoundError:
            return None
        return found

    def bases(self, checkpoint_id: str) -> list[str]:
        """To whom a checkpoint in the store refers; NotFound if it is not there."""
        manifest = opened(self.store.get(f"{checkpoint_id}/manifest.json", limit=MANIFEST))
        return sorted({base["checkpoint_id"] for image in manifest["images"] for base in image.get("bases", ())})

    def at_work(self) -> list[str]:
        """What is in the work directory, beside the lock."""
        return [name for name in os.listdir(self.work) if name != ".lock"] if self.work.exists() else []

    def criu_fault(self, number: int | None) -> None:
        """CRIU's own fault injection for its next runs."""
        fault = self._criu.with_name("criu.fault")
        if number is None:
            fault.unlink(missing_ok=True)
        else:
            fault.write_text(str(number))

    def gpu_env(self) -> dict[str, str]:
        """Of the program that uses a GPU."""
        return {**self.gpus.env("0", device=str(self.gpus.node())), "PYTHONPATH": str(ROOT)}

    def helper(self) -> int:
        """The pid of the GPU helper; 0: there is none."""
        return locks.holder(self.home / "state" / "gpu" / "lock")

    def helpers(self) -> list[int]:
        """All of them below the keeper."""
        return [pid for pid in processes.descendants(self.keeper.pid) if " gpu-helper " in processes.describe(pid)]

    def gpu_steps(self, action_id: str) -> dict[int, str]:
        """What the helper has begun for that action last, by process."""
        journal = self.home / "state" / "gpu" / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        said = [json.loads(line) for line in lines if line.endswith("}")]
        return {line["pid"]: line["step"] for line in said if line["action"] == action_id}

    def suspends(self) -> list[str]:
        """What the helper has not given back. Where none is left, because a restore killed it and nobody asked for another, the next one
        finds that those it was about have ended."""
        if not self.helper():
            return []
        journal = self.home / "state" / "gpu" / "journal"
        return journal.read_text().splitlines() if journal.exists() else []

    def end_helper(self) -> None:
        """SIGTERM; it gives back what it holds first."""
        with contextlib.suppress(ProcessLookupError):
            if pid := self.helper():
                os.kill(pid, signal.SIGTERM)

    def stray_criu(self) -> list[int]:
        """CRIU's processes anywhere below the keeper."""
        return [pid for pid in processes.descendants(self.keeper.pid) if is_criu(pid)]

    def log_tail(self, size: int = 3000) -> str:
        return self.log.read_bytes()[-size:].decode(errors="replace") if self.log.exists() else ""

    def close(self) -> None:
        with contextlib.suppress(Exception):  # best effort: the keeper ends what is left
            self.stop()
        self.keeper.close()
        if self._bus is not None:
            self._bus.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self) -> Self:
        if not self.start():
            raise RuntimeError(f"the daemon does not start: {self.log_tail()}")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_criu(pid: int) -> bool:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")).startswith("criu")
    except OSError:
        return False


def is_pid_collision(code: str, message: str, details: str) -> bool:
    """A restore that met a pid of somebody else: the image is not to blame."""
    return code == "pid_taken" or (code == "restore_failed" and ("pid_taken" in details or ": -17" in message))
