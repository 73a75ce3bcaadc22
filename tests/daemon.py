"""The real daemon in a process of its own: `with Daemon() as daemon:` starts it, asks it over gRPC, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hibernode._pb import hibernode_pb2 as pb
from hibernode._pb import hibernode_pb2_grpc as pb_grpc
from tests import keeper
from tests.keeper import Kept, wait_until

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT = 20.0  # seconds until it must answer; less than one is usual
STOP_LIMIT = 45.0  # its own drain is 30
CALL_LIMIT = 60.0  # seconds for one action, which no test may need


@dataclass(frozen=True)
class Refusal(Exception):
    """What a call was refused with, as a client reads it."""

    status: grpc.StatusCode
    code: str
    message: str
    hint: str
    details: Mapping[str, Any]

    @classmethod
    def of(cls, error: grpc.RpcError) -> Refusal:
        said = dict(error.trailing_metadata() or ())  # type: ignore[attr-defined]
        details = json.loads(said.get("hibernode-details-bin", b"{}"))
        return cls(error.code(), said.get("hibernode-code", ""), error.details(), said.get("hibernode-hint", ""), details)  # type: ignore[attr-defined]


class Daemon(contextlib.AbstractContextManager["Daemon"]):
    """One daemon with directories of its own: state and store in `home` (a temporary one if none is given), work in `work`, on tmpfs.

    `settings` are further tables and keys of its configuration, `join` are files of cgroups that it is born into, `call_limit` are seconds
    for one action, `start_limit` until it must answer: more where its arena is large. What it leaves behind (a process, a cgroup, a file
    in its work directory) fails the test, unless the test has failed already: then its log is printed.
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        store: str = "",
        node: str = "test-node",
        arena: str = "64MiB",
        bus: str = "",
        metrics: str = "",
        settings: Mapping[str, Any] | None = None,
        join: Sequence[Path] = (),
        work: Path = Path("/dev/shm"),
        call_limit: float = CALL_LIMIT,
        start_limit: float = START_LIMIT,
    ) -> None:
        self._own = Path(tempfile.mkdtemp(prefix="hn-"))  # short: a unix socket's path has 107 bytes
        self.home = home or self._own
        self.home.mkdir(parents=True, exist_ok=True)
        self.state_dir, self.store_dir = self.home / "state", self.home / "store"
        self.socket, self.log_path = self._own / "d.sock", self._own / "log"
        self.work_dir = work / self._own.name
        self.store = store or f"file://{self.store_dir}"
        self.metrics, self._join, self._call_limit, self._start_limit = metrics, list(join), call_limit, start_limit
        self._settings = _merged(
            {
                "node": node,
                "state_dir": str(self.state_dir),
                "work_dir": str(self.work_dir),
                "socket": str(self.socket),
                "containers": {"socket": str(self._own / "r.sock")},
                "store": {"url": self.store},
                "arena": {"size": arena},
                "bus": {"url": bus},
                "metrics": {"listen": metrics},
                "limits": {"attempts": 2, "retry_delay": 0.1, "progress_interval": 0.02},
                "log": {"format": "json"},
            },
            settings or {},
        )
        self.config = self._own / "hibernode.toml"
        self.config.write_text(_toml(self._settings))
        self._kept: Kept | None = None
        self._befores: list[Kept] = []  # keepers of daemons that have ended, whose trees may run on
        self._channel: grpc.Channel | None = None
        self._uids: set[str] = set()

    # --- life ---------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self._print_log()
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            left = self._leave()
            if error is None:
                assert not left, left
            else:
                self._print_log()
        finally:
            self._remove()

    def start(self) -> None:
        """Start it, again after `stop` or `kill` with what it had; returns when it answers."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("HIBERNODE_")}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "daemon"), *filter(None, [env.get("PYTHONPATH")])])
        argv = [sys.executable, "-m", "hibernode", "node", "--config", str(self.config)]
        self._kept = Kept(argv, self.log_path, env=env, join=self._join)
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=[("grpc.enable_retries", 0)])
        health = health_pb2_grpc.HealthStub(self._channel)
        deadline = time.monotonic() + self._start_limit
        while not self._answers(health):
            if not keeper.alive(self.pid) or time.monotonic() > deadline:
                raise RuntimeError(f"the daemon did not start: {self.log[-3000:]}")
            time.sleep(0.02)

    def _answers(self, health: health_pb2_grpc.HealthStub) -> bool:
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(service="hibernode.v1.Node"), timeout=2)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> int:
        """SIGTERM, and wait for its end; its exit code. Workloads run on."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, as a crash would. Workloads run on."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        assert self._kept is not None
        kept, self._kept = self._kept, None
        self._befores.append(kept)
        if self._channel is not None:
            self._channel.close()
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself: `exit_code` says how
            os.kill(kept.pid, number)
        return kept.exit_code(STOP_LIMIT)

    def _leave(self) -> list[str]:
        """End everything; what should not be there any more."""
        left = []
        if self._kept is not None:
            left += [f"a helper: {found}" for found in map(keeper.describe, keeper.descendants(self.pid)) if "criu" in found]
            self._end_workloads()
            code = self.stop()
            left += [f"the daemon's exit code was {code}"] if code else []
        for kept in self._befores:
            kept.kill()
        left += [f"in the work directory: {path}" for path in self.at_work()]
        return left + [f"a cgroup: {path}" for path in self._cgroups() if path.exists()]

    def _end_workloads(self) -> None:
        """Jobs, and trees restored here: they are meant to outlive the daemon, so they are no left-overs."""
        with contextlib.suppress(grpc.RpcError):  # of a daemon that is stuck: the kill below does it
            for job in [job for job in self.jobs().values() if job.pid]:
                self.stub.StopJob(pb.StopRequest(name=job.name, namespace=job.namespace, signal="KILL"), timeout=10)
        keeper.kill_all(keeper.descendants(self.pid))

    def settled(self, last: pb.Event) -> pb.Event:
        """When that action has come to its end: `ready` is told before its mark, its work directory and its claims go."""
        ended = lambda: self.stub.GetAction(pb.ActionId(action_id=last.action_id), timeout=10).phase == "done"  # noqa: E731
        wait_until(ended, START_LIMIT, "the end of an action")
        return last

    def empty(self) -> None:
        """End its workloads and empty its store, for the next test. Its work directory must come to be empty by itself."""
        self._end_workloads()
        wait_until(lambda: not self.at_work(), START_LIMIT, "an empty work directory")
        shutil.rmtree(self.store_dir, ignore_errors=True)

    def at_work(self) -> list[Path]:
        """What is in its work directory, beside the lock."""
        return [path for path in self.work_dir.iterdir() if path.name != ".lock"] if self.work_dir.exists() else []

    @contextlib.contextmanager
    def halted(self) -> Iterator[None]:
        """Nothing of its files comes or goes while they are looked at: it is stopped, and goes on afterwards."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            tasks = Path(f"/proc/{self.pid}/task")
            stopped = lambda: all(keeper.state(int(task.name)) == "T" for task in tasks.iterdir())  # noqa: E731
            wait_until(stopped, START_LIMIT, "the daemon stops")
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def _cgroups(self) -> list[Path]:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [Path(m[1]) / "hibernode" / uid for uid in self._uids for m in mounts if m[2] in ("cgroup", "cgroup2")]

    def _remove(self) -> None:
        for kept in [*self._befores, *filter(None, [self._kept])]:
            kept.kill()
        shutil.rmtree(self.work_dir, ignore_errors=True)
        shutil.rmtree(self._own, ignore_errors=True)

    def _print_log(self) -> None:
        print(f"--- log of daemon {self._settings['node']}:\n{self.log[-8000:]}", file=sys.stderr)

    # --- asking -------------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._kept is not None, "the daemon does not run"
        return self._kept.pid

    @property
    def stub(self) -> pb_grpc.NodeStub:
        assert self._channel is not None
        return pb_grpc.NodeStub(self._channel)  # type: ignore[no-untyped-call]

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def run(self, name: str, argv: Sequence[str], **more: Any) -> pb.Workload:
        """Start a managed job."""
        with refusals():
            job = self.stub.RunJob(pb.RunRequest(name=name, argv=argv, **more), timeout=CALL_LIMIT)
        self._uids.add(job.uid)
        return job

    def jobs(self) -> dict[str, pb.Workload]:
        """All managed jobs, by name."""
        return {job.name: job for job in self.stub.FindWorkloads(pb.Target(), timeout=CALL_LIMIT).workloads}

    def job_lines(self, name: str) -> list[str]:
        """What a job has written."""
        return Path(self.jobs()[name].log).read_text(errors="replace").splitlines()

    def checkpoint(self, target: pb.Target, **command: Any) -> list[pb.Event]:
        """A checkpoint to its end: all events. Keywords are the command's fields and, beside them, those of its overrides."""
        return list(events(self.begin_checkpoint(target, **command)))

    def begin_checkpoint(self, target: pb.Target, **command: Any) -> Iterable[pb.Update]:
        """The running call: updates as they come."""
        return self.stub.Checkpoint(pb.CheckpointCommand(target=target, **_command(command)), timeout=self._call_limit)  # type: ignore[no-any-return]

    def restore(self, checkpoint_id: str, **command: Any) -> list[pb.Event]:
        """A restore to its end: all events."""
        command = _command(command)
        request = pb.RestoreCommand(checkpoint_id=checkpoint_id, **command)
        found = list(events(self.stub.Restore(request, timeout=self._call_limit)))
        if found and found[-1].status == "ready":
            self._note_cgroups(checkpoint_id, command["overrides"].directory)
        return found

    def _note_cgroups(self, checkpoint_id: str, directory: str) -> None:
        """In which cgroups of ours the restored processes live: they must be gone when all has ended."""
        for pid in keeper.descendants(self.pid):
            with contextlib.suppress(OSError):
                places = Path(f"/proc/{pid}/cgroup").read_text().split()
                self._uids.update(place.rpartition("/")[2] for place in places if ":/hibernode/" in place)

    def manifest(self, checkpoint_id: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stub.Inspect(pb.CheckpointId(checkpoint_id=checkpoint_id), timeout=10).manifest)
        return found

    def insist_clean(self, store: Path | None = None) -> None:
        """Nothing is in the store, nothing in the work directory: what was refused or failed has left nothing."""
        store = store or self.store_dir
        left = [path for path in store.rglob("*") if path.is_file()] + self.at_work()
        assert not left, left


def pid_target(pid: int) -> pb.Target:
    return pb.Target(pid=pid)


def job_target(name: str) -> pb.Target:
    return pb.Target(pod_name=name, namespace="default")


def events(updates: Iterable[pb.Update]) -> Iterator[pb.Event]:
    """Without the progress in between. A call that is refused raises Refusal."""
    with refusals():
        for update in updates:
            if update.HasField("event"):
                yield update.event


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """grpc's errors as `Refusal`."""
    try:
        yield
    except grpc.RpcError as e:
        raise Refusal.of(e) from None


def ready(found: Sequence[pb.Event]) -> pb.Event:
    """The last event, which says `ready`."""
    last = found[-1]
    assert last.status == "ready", f"{last.code}: {last.message} (hint: {last.hint}) {details(last)}"
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    return last


def failed(found: Sequence[pb.Event], code: str) -> pb.Event:
    """The last event, which says `error` with this code."""
    last = found[-1]
    assert (last.status, last.code) == ("error", code), f"{last.status} {last.code}: {last.message} {details(last)}"
    return last


def details(event: pb.Event) -> dict[str, Any]:
    return dict(event.details)


def _command(given: Mapping[str, Any]) -> dict[str, Any]:
    """A command's fields, with those of `Overrides` moved into theirs; `criu_opts` may be a table."""
    inside = {field.name for field in pb.Overrides.DESCRIPTOR.fields}
    overrides = {name: value for name, value in given.items() if name in inside}
    if isinstance(overrides.get("criu_opts"), dict):
        overrides["criu_opts"] = json.dumps(overrides["criu_opts"])
    rest = {name: value for name, value in given.items() if name not in inside}
    return {"action_id": str(uuid.uuid4()), **rest, "overrides": pb.Overrides(**overrides)}


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: _merged(base[name], more[name]) for name in base.keys() & more.keys() if isinstance(base[name], Mapping)}
    return {**base, **more, **both}


def _toml(table: Mapping[str, Any], path: str = "") -> str:
    """As TOML: JSON's strings, numbers, booleans and lists are TOML's."""
    plain = [f"{name} = {json.dumps(value)}" for name, value in table.items() if not isinstance(value, Mapping)]
    inner = [_toml(value, f"{path}.{name}".lstrip(".")) for name, value in table.items() if isinstance(value, Mapping)]
    return "\n".join([f"[{path}]" if path else "", *plain, *inner, ""])


__all__ = [
    "CALL_LIMIT", "Daemon", "Refusal", "details", "events", "failed", "job_target", "pid_target", "ready", "refusals", "wait_until",
]  # fmt: skip
