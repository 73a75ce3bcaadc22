"""A checkpoint of a real process, made by CRIU: damaged in the store of a real daemon, which is asked to restore and to verify it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hibernode._pb import hibernode_pb2 as pb
from hibernode.children import Children
from hibernode.drivers.criu import Criu
from hibernode.drivers.host import LinuxHost
from hibernode.model import Cancel, TaskFacts
from hibernode.ports import CriuOptions, Prepared
from tests import keeper
from tests.daemon import CALL_LIMIT, Daemon, Refusal, ready, refusals
from tests.damage.harm import Harm
from tests.damage.stored import Objects, Stored, read, write
from tests.damage.trial import CODES, Trial
from tests.fakes.criu import FakeCriu
from tests.fakes.machine import ROOT, FakeHost, FakeWorkloads, Machine
from tests.fakes.script import Script
from tests.flow.rig import Rig
from tests.node.workload import Beat, Program, checkpointed, goes_on, python

NAME = "real"


@dataclass(frozen=True)
class Real:
    """A checkpoint in the daemon's store, whose process has ended, and how to know that process again."""

    daemon: Daemon
    stored: Stored
    tasks: list[TaskFacts]
    program: Program
    before: Beat

    @property
    def place(self) -> Path:
        return self.daemon.store_dir / self.stored.checkpoint_id

    def play(self, harm: Harm, after: Objects) -> Trial:
        """What the daemon makes of it; the store holds what is whole again afterwards."""
        write(self.place, after)
        trial = Trial(harm, self._restore())
        found = self._verify()
        trial.wrong += [f"restore ends with {trial.code or 'ready'}"] if trial.code not in CODES else []
        trial.wrong += [f"verify says {found or 'ok'}, restore {trial.code or 'ready'}"] if found != trial.code else []
        trial.wrong += [f"it runs: {keeper.describe(task.pid)}" for task in self.tasks if keeper.fields(task.pid)]
        trial.wrong += [f"the daemon has a child: {keeper.describe(pid)}" for pid in keeper.descendants(self.daemon.pid)]
        trial.wrong += [f"in the work directory: {path}" for path in self.daemon.at_work()]
        trial.wrong += ["the store is not as it was"] if read(self.place) != after else []
        write(self.place, self.stored.objects)
        return trial

    def _restore(self) -> str:
        """The code it is refused with; CRIU is called in the phase `restoring`."""
        *_, last = self.daemon.restore(self.stored.checkpoint_id)
        if "restoring" in last.profile.phases:
            return f"{last.status} {last.code} after CRIU was called"
        return "" if last.status == "ready" else str(last.code)

    def _verify(self) -> str:
        request = pb.CheckpointId(checkpoint_id=self.stored.checkpoint_id)
        try:
            with refusals():
                *_, verdict = self.daemon.stub.Verify(request, timeout=CALL_LIMIT)
        except Refusal as e:
            return e.code
        return "" if verdict.ok else str(verdict.code)

    def still_restores(self) -> None:
        """What was damaged and is whole again is the old process, going on: else those refusals would prove nothing."""
        ready(self.daemon.restore(self.stored.checkpoint_id))
        goes_on(self.program, self.before)


def program(directory: Path) -> Program:
    return Program(directory, python("counter.py", 0.01))


def real(daemon: Daemon, running: Program) -> Real:
    """`running` checkpointed by the daemon, and killed."""
    before = running.beat()
    checkpoint_id = checkpointed(daemon, running, streams=2).checkpoint_id
    tasks = [TaskFacts.model_validate(task) for task in daemon.manifest(checkpoint_id)["images"][0]["tasks"]]
    stored = Stored(NAME, checkpoint_id, read(daemon.store_dir / checkpoint_id), lambda work: _rig(work, tasks))
    return Real(daemon, stored, tasks, running, before)


# --- the same on a node of fakes ------------------------------------------------------------------------------------------------


def _rig(directory: Path, tasks: list[TaskFacts]) -> Rig:
    rig, machine = Rig(directory), _Seen(tasks)
    rig.machine, rig.criu = machine, _RealImages(machine, rig.script, directory / "plugins")
    workloads = FakeWorkloads(machine, rig.criu, rig.script)
    rig.node = replace(rig.node, workloads=workloads, jobs=workloads, criu=rig.criu, host=FakeHost(machine, rig.script))
    return rig


class _Seen(Machine):
    """A machine on which those tasks run, once they are restored."""

    def __init__(self, tasks: list[TaskFacts]) -> None:
        super().__init__()
        self._tasks = tasks
        self.cpu_flags = LinuxHost().facts().cpu_flags  # its checkpoint was made here

    @property
    def tasks(self) -> list[TaskFacts]:
        return self._tasks


class _RealImages(FakeCriu):
    """Reads images as CRIU made them, and restores nothing: whether they are right a real restore says."""

    def __init__(self, machine: Machine, script: Script, plugins: Path) -> None:
        super().__init__(machine, script)
        self._reader = Criu("criu", Children(), plugins)

    def tasks(self, images: Path) -> list[TaskFacts]:
        self._script.step("criu.tasks")
        return self._reader.tasks(images)

    def restore(self, images: Path, options: CriuOptions, prepared: Prepared, cancel: Cancel) -> int:
        self._script.step("criu.restore")
        self.restores += 1
        self._machine.restored = True
        return ROOT
