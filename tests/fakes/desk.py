"""A dispatcher that plays scripts: what the gRPC service and the command line are tested against."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hibernode.errors import HibernodeError, NotFound
from hibernode.model import (
    ActionView,
    Check,
    CheckpointCommand,
    CriuOpts,
    Event,
    Garbage,
    GarbageRequest,
    HostFacts,
    ImageRef,
    JobSpec,
    Manifest,
    NodeRecord,
    ObjectRef,
    PhaseCost,
    Profile,
    Progress,
    RestoreCommand,
    Status,
    StreamRef,
    Target,
    TaskFacts,
    Verdict,
    WorkloadFacts,
    WorkloadView,
)
from hibernode.rpc import RpcServer
from tests.fakes.machine import GPUS

ActionCommand = CheckpointCommand | RestoreCommand
T = TypeVar("T")

CHECKPOINT = "6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10"
ACTION = "0b1f7a52-3c44-4f0e-8a6b-5d9e1c2f3a40"
MIB = 1 << 20
GIB = 1 << 30

HOLD = "hold"  # in a script: wait here until `FakeDesk.released` is set
Step = Event | Progress | float | str
Script = Callable[[ActionCommand], Sequence[Step]]

PROFILE = Profile(
    phases={
        "starting": PhaseCost(seconds=0.012),
        "dumping": PhaseCost(seconds=0.412, bytes=0),
        "shipping": PhaseCost(seconds=6.2, bytes=680 * MIB),
        "committing": PhaseCost(seconds=0.08),
    },
    unaccounted=0.02,
    pause_ns=412_300_000,
    total_duration=6_724_000_000,
    total_io=680 * MIB,
    raw_bytes=2 * GIB,
    zero_bytes=412 * MIB,
    stored_bytes=680 * MIB,
    streams=8,
)


class Lines:
    """Builds the events of one action, counted from 1."""

    def __init__(self, command: ActionCommand) -> None:
        self._command = command
        self._seq = 0

    def event(self, status: Status, error: HibernodeError | None = None, profile: Profile | None = None) -> Event:
        self._seq += 1
        return Event(
            action_id=self._command.action_id,
            seq=self._seq,
            type=self._command.type,
            status=status,
            checkpoint_id=self._command.checkpoint_id,
            node="node-a",
            time=time.time(),
            code=error.code if error else "",
            message=error.message if error else "",
            hint=error.hint if error else "",
            details=dict(error.details) if error else {},
            retry=bool(error and error.retry),
            profile=profile,
        )

    def progress(self, phase: str, done: int, total: int, stored: int, seconds: float) -> Progress:
        return Progress(
            action_id=self._command.action_id,
            phase=phase,
            bytes_done=done,
            bytes_total=total,
            stored_bytes=stored,
            seconds=seconds,
        )


def succeeding(pace: float = 0.0) -> Script:
    """A checkpoint or restore of 2 GiB that goes well; `pace` seconds between two steps."""

    def script(command: ActionCommand) -> list[Step]:
        lines = Lines(command)
        first, second = ("dumping", "shipping") if command.type == "checkpoint" else ("fetching", "restoring")
        steps: list[Step] = [lines.event(Status.PROCESSING)]
        for n in range(1, 9):
            phase = first if n < 3 else second
            steps.append(lines.progress(phase, n * 256 * MIB, 2 * GIB, n * 85 * MIB, n * 0.8))
            if n == 3 and command.type == "checkpoint":
                steps.append(lines.event(Status.CHECKPOINT_CREATED, profile=PROFILE))
            steps.append(pace)
        steps.append(lines.event(Status.READY, profile=PROFILE))
        return steps

    return script


def holding(command: ActionCommand) -> list[Step]:
    """Stands still in the middle until it is released."""
    lines = Lines(command)
    return [
        lines.event(Status.PROCESSING),
        lines.progress("dumping", 512 * MIB, 2 * GIB, 100 * MIB, 1.0),
        HOLD,
        lines.event(Status.READY, profile=PROFILE),
    ]


def failing(error: HibernodeError) -> Script:
    """Ends with `error` after a little progress."""

    def script(command: ActionCommand) -> list[Step]:
        lines = Lines(command)
        return [
            lines.event(Status.PROCESSING),
            lines.progress("dumping", 512 * MIB, 2 * GIB, 100 * MIB, 1.0),
            lines.event(Status.ERROR, error=error, profile=PROFILE),
        ]

    return script


def manifest(checkpoint_id: str = CHECKPOINT, name: str = "trainer") -> Manifest:
    digest = "a" * 64
    return Manifest(
        format_version=1,
        checkpoint_id=checkpoint_id,
        action_id=ACTION,
        created_at=time.time() - 3700,
        node="node-a",
        kind="simple",
        reason="manual",
        workload=WorkloadFacts(kind="job", name=name, argv=["python", "train.py", "--epochs", "90"], cwd="/srv/train"),
        host=HostFacts(arch="x86_64", kernel="6.8.0", page_size=4096, criu_version=40201, cpu_model="EPYC 9554"),
        compression="zstd:3",
        criu_opts=CriuOpts(tcp="close"),
        pause_ns=PROFILE.pause_ns,
        raw_bytes=PROFILE.raw_bytes,
        zero_bytes=PROFILE.zero_bytes,
        stored_bytes=PROFILE.stored_bytes,
        images=[
            ImageRef(
                name=name,
                tasks=[TaskFacts(pid=4242, comm="python", threads=[4242, 4243]), TaskFacts(pid=4250, ppid=4242)],
                pages=PROFILE.raw_bytes // 4096,
                zero_pages=PROFILE.zero_bytes // 4096,
                streams=[StreamRef(key=f"{name}/pages-{n}.zst", size=85 * MIB, digest=digest, frames=64) for n in range(8)],
                index=ObjectRef(key=f"{name}/index.zst", size=71_000, digest=digest),
                files=ObjectRef(key=f"{name}/images.tar.zst", size=220_000, digest=digest),
            )
        ],
    )


AGE = 7300.0  # seconds since a job has started
JOB = WorkloadView(
    kind="job",
    namespace="default",
    name="trainer",
    uid="9a3e1a52-3c44-4f0e-8a6b-5d9e1c2f3a40",
    pid=4242,
    state="running",
    command="python train.py --epochs 90",
    rss=3 * GIB,
    processes=5,
    log="/var/lib/hibernode/jobs/default/trainer/log",
    started_at=time.time() - AGE,
)
EXITED = JOB.model_copy(update={"name": "preprocess-imagenet", "state": "exited", "pid": 0, "rss": 0, "processes": 0})
CHECKS = [
    Check(name="criu", ok=True, found="4.2.1"),
    Check(name="store", ok=False, found="no room on the device", hint="free some space under /var/lib/hibernode/store"),
    Check(name="GPUs", ok=False, found="none", hint="a GPU may be lost: dmesg | grep -i xid", required=False),
]
NODE = NodeRecord(
    node="node-a",
    cluster="default",
    version="0.1.0",
    arch="x86_64",
    kernel="6.8.0",
    criu="4.2.1",
    store="s3://checkpoints/prod",
    cpus=64,
    memory_total=512 * GIB,
    memory_available=400 * GIB,
    load=12.5,
    actions=1,
    time=time.time(),
    arena_bytes=512 * MIB,
    gpu_inventory=GPUS,
)
GARBAGE = [
    Garbage(
        what="upload",
        checkpoint_id=ACTION,
        key=f"{ACTION}/main/pages-0.zst",
        age=90_000,
        reason="orphaned_upload",
        state="found",
    ),
    Garbage(what="attempt", checkpoint_id=ACTION, bytes=300 * MIB, age=90_000, reason="no_manifest", state="found"),
    Garbage(
        what="checkpoint",
        checkpoint_id=CHECKPOINT,
        bytes=2 * GIB,
        age=30 * 86400,
        reason="beyond_last",
        workload="default/trainer",
        state="found",
    ),
]


class FakeDesk:
    """Plays `script` for every command. `fail[method]` is raised by that method; `watchers` counts open watches."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or succeeding()
        self.commands: list[ActionCommand] = []
        self.cancelled: list[str] = []
        self.manifests = [manifest(), manifest(ACTION, "preprocess-imagenet")]
        self.deleted: list[str] = []
        self.collected: list[GarbageRequest] = []
        self.garbage = list(GARBAGE)
        self.stopped: list[tuple[str, str, str]] = []
        self.jobs: list[JobSpec] = []
        self.targets: list[Target | None] = []
        self.checks = list(CHECKS)
        self.node = NODE
        self.verdicts = [
            Verdict(ok=True, bytes=n * 170 * MIB, frames=n * 128, seconds=n * 0.3, code="ok" if n == 4 else "")
            for n in range(1, 5)
        ]
        self.fail: dict[str, Exception] = {}
        self.watchers = 0
        self.released = asyncio.Event()
        self.log: list[Event | Progress] = []
        self._changed = asyncio.Condition()
        self._plays: set[asyncio.Task[None]] = set()

    def _fault(self, method: str) -> None:
        if method in self.fail:
            raise self.fail[method]

    async def submit(self, command: ActionCommand) -> None:
        self._fault("submit")
        if command.action_id not in {c.action_id for c in self.commands}:
            self.commands.append(command)
            play = asyncio.create_task(self._play(command))
            self._plays.add(play)
            play.add_done_callback(self._plays.discard)

    async def _play(self, command: ActionCommand) -> None:
        for step in self.script(command):
            if isinstance(step, str):
                await self.released.wait()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                async with self._changed:
                    self.log.append(step)
                    self._changed.notify_all()

    async def watch(self, action_id: str) -> AsyncGenerator[Event | Progress]:
        self._fault("watch")
        if action_id and action_id not in {c.action_id for c in self.commands}:
            raise NotFound(f"no action {action_id} on this node", hint="`hibernode status` lists them")
        self.watchers += 1
        try:
            at = 0
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: len(self.log) > at)  # noqa: B023 - waited for right here
                for change in self.log[at:]:
                    at += 1
                    if action_id in ("", change.action_id):
                        yield change
                        if action_id and isinstance(change, Event) and change.status.terminal:
                            return
        finally:
            self.watchers -= 1

    async def cancel(self, action_id: str) -> bool:
        self._fault("cancel")
        self.cancelled.append(action_id)
        return action_id in {c.action_id for c in self.commands}

    async def action(self, action_id: str) -> ActionView:
        self._fault("action")
        for view in await self.actions():
            if view.action_id == action_id:
                return view
        raise NotFound(f"no action {action_id} on this node", hint="`hibernode status` lists them")

    async def actions(self) -> list[ActionView]:
        self._fault("actions")
        return [self._view(c) for c in self.commands]

    def _view(self, command: ActionCommand) -> ActionView:
        events = [e for e in self.log if isinstance(e, Event) and e.action_id == command.action_id]
        last = events[-1] if events else None
        return ActionView(
            action_id=command.action_id,
            checkpoint_id=command.checkpoint_id,
            type=command.type,
            status=last.status if last else Status.INITIALIZED,
            phase="done" if last and last.status.terminal else "dumping",
            target=str(command.target) if isinstance(command, CheckpointCommand) else "",
            began_at=time.time() - 7,
            ended_at=time.time() if last and last.status.terminal else 0.0,
            last=last,
        )

    async def workloads(self, target: Target | None) -> list[WorkloadView]:
        self._fault("workloads")
        self.targets.append(target)
        return [job.model_copy(update={"started_at": time.time() - AGE}) for job in (JOB, EXITED)]  # however long the suite takes

    async def run_job(self, spec: JobSpec) -> WorkloadView:
        self._fault("run_job")
        self.jobs.append(spec)
        return JOB.model_copy(update={"name": spec.name, "namespace": spec.namespace, "command": " ".join(spec.argv)})

    async def stop_job(self, namespace: str, name: str, signal: str) -> WorkloadView:
        self._fault("stop_job")
        self.stopped.append((namespace, name, signal))
        return JOB.model_copy(update={"name": name, "namespace": namespace, "state": "killed", "pid": 0})

    async def inspect(self, checkpoint_id: str) -> tuple[Manifest, str]:
        self._fault("inspect")
        found = next((each for each in self.manifests if each.checkpoint_id == checkpoint_id), manifest(checkpoint_id))
        return found, f"s3://checkpoints/prod/{checkpoint_id}"

    async def verify(self, checkpoint_id: str) -> AsyncGenerator[Verdict]:
        self._fault("verify")
        for verdict in self.verdicts:
            yield verdict

    async def checkpoints(self) -> list[Manifest]:
        self._fault("checkpoints")
        return self.manifests

    async def delete(self, checkpoint_id: str) -> None:
        self._fault("delete")
        self.deleted.append(checkpoint_id)

    async def collect_garbage(self, request: GarbageRequest) -> AsyncGenerator[Garbage]:
        self._fault("collect_garbage")
        self.collected.append(request)
        for each in self.garbage:
            done = each.state == "found" and request.apply
            yield each.model_copy(update={"state": "removed"}) if done else each

    async def doctor(self) -> list[Check]:
        self._fault("doctor")
        return self.checks

    async def nodes(self) -> list[NodeRecord]:
        self._fault("nodes")
        return [self.node, self.node.model_copy(update={"node": "node-b", "load": 0.5, "actions": 0})]


class Served:
    """A desk behind a real gRPC server, on a loop of its own thread."""

    def __init__(self, desk: FakeDesk, path: Path) -> None:
        self.desk = desk
        self.path = path
        self.server = RpcServer(desk, path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def call(self, work: Coroutine[None, None, T]) -> T:
        """Run `work` on the server's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self.desk.released.set)

    def start(self) -> None:
        self._thread.start()
        self.call(self.server.start())

    def close(self) -> None:
        self.release()
        self.call(self.server.stop(grace=1.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


@contextmanager
def serving(desk: FakeDesk, path: Path) -> Iterator[Served]:
    served = Served(desk, path)
    served.start()
    try:
        yield served
    finally:
        served.close()
