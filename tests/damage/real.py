"""A checkpoint of a real process, made by CRIU, and the third of a chain: damaged in the store of a real daemon, which is asked to restore
and to verify it, and, of the chain, to make the next one while the process runs on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hibernode._pb import hibernode_pb2 as pb
from hibernode.children import Children
from hibernode.drivers.criu import Criu
from hibernode.drivers.host import LinuxHost
from hibernode.model import Cancel, TaskFacts
from hibernode.ports import CriuOptions, Held, Prepared
from tests import keeper
from tests.daemon import CALL_LIMIT, Daemon, Refusal, ready, refusals
from tests.damage import needed
from tests.damage.harm import Harm
from tests.damage.needed import Needed, differing
from tests.damage.stored import FULL, MIDDLE, Objects, Stored, read, write
from tests.damage.trial import CODES, DAMAGED, LAST, NO_INCREMENT, Trial, following
from tests.fakes.criu import FakeCriu
from tests.fakes.machine import ROOT, FakeHost, FakeWorkloads, Machine
from tests.fakes.script import Script
from tests.flow.rig import Rig
from tests.node.workload import Beat, Program, Untouched, change, checkpointed, goes_on, python

NAME, CHAIN = "real", "real chain"
_MIB = 1  # of memory that changes in a chain


@dataclass(frozen=True)
class Real:
    """A checkpoint in the daemon's store, whose process has ended, and how to know that process again. `looks`: of one of a chain."""

    daemon: Daemon
    stored: Stored
    tasks: list[TaskFacts]
    program: Program
    before: Beat
    looks: Needed | None = None

    def play(self, harm: Harm, after: Objects) -> Trial:
        """What the daemon makes of it; the store holds what is whole again afterwards."""
        self._write(after)
        trial = Trial(harm, self._restore(self.stored.checkpoint_id))
        if not trial.code:
            goes_on(self.program, self.before)
            self.program.kill()
        found = self._verify(self.stored.checkpoint_id)
        restores, verifies = (
            self.looks is not None and not differing(looks, self.stored.objects, after)
            for looks in ((self.looks.restore, self.looks.verify) if self.looks else ({}, {}))
        )
        trial.wrong += [f"restore ends with {trial.code or 'ready'}"] if _wrong(trial.code, fine=restores) else []
        trial.wrong += [f"verify says {found or 'ok'}"] if _wrong(found, fine=verifies) else []
        trial.wrong += (
            [f"verify says {found or 'ok'}, restore {trial.code or 'ready'}"]
            if found != trial.code and restores == verifies
            else []
        )
        self._insist_nothing_is_left(trial)
        trial.wrong += ["the store is not as it was"] if self._read() != after else []
        self._write(self.stored.objects)
        return trial

    def follow(self, harm: Harm, after: Objects) -> Trial:
        """It is restored while it is whole, then damaged; and what the daemon makes of the next, with what is there to refer to."""
        assert self.looks is not None
        trial, program, stored = Trial(harm, ""), self.program, self.stored
        for each in (
            *stored.bases.values(),
            stored.checkpoint_id,
        ):  # while they are whole: the daemon forgets what it has found before
            self._verify(each)
        ready(self.daemon.restore(stored.checkpoint_id))
        goes_on(program, self.before)
        change(program)
        self._write(after)
        seen = differing(self.looks.following, stored.objects, after)
        if seen:
            with Untouched(program):
                *_, last = self.daemon.checkpoint(program.target, criu_opts={"increment": stored.checkpoint_id})
            trial.wrong += [f"an increment of it ends with {last.code or 'ready'}"] if last.code not in NO_INCREMENT else []
        before = program.beat()
        *_, last = self.daemon.checkpoint(program.target, reason="heartbeat")
        if last.status != "ready":
            trial.wrong.append(f"the next ends with {last.code}: {last.message}")
        else:
            program.kill()
            self._judge(trial, last.checkpoint_id, before, seen=bool(seen), after=after)
        program.kill()
        self._insist_nothing_is_left(trial)
        self._write(stored.objects)
        return trial

    def _judge(self, trial: Trial, made: str, before: Beat, *, seen: bool, after: Objects) -> None:
        """It is restored and goes on, or it is refused by name, and nobody could have known without reading it."""
        (image,) = self.daemon.manifest(made)["images"]
        bases = [base["checkpoint_id"] for base in image.get("bases", ())]
        trial.following = following(self.stored, bases)
        trial.wrong += ["the next refers to what cannot be read"] if seen and trial.following == LAST else []
        trial.wrong += ["the next does not refer to it"] if not seen and trial.following != LAST else []
        trial.code, found = self._restore(made), self._verify(made)
        if not trial.code:
            goes_on(self.program, before)
        elif trial.code == "corrupt" and bases and _as_long(self.stored.objects, after):
            trial.following = DAMAGED
        else:
            trial.wrong.append(f"the next ends with {trial.code} when it is restored")
        trial.wrong += (
            [f"verify of the next says {found or 'ok'}, restore {trial.code or 'ready'}"] if found != trial.code else []
        )
        shutil.rmtree(self.daemon.store_dir / made)

    def _insist_nothing_is_left(self, trial: Trial) -> None:
        trial.wrong += [f"it runs: {keeper.describe(task.pid)}" for task in self.tasks if keeper.fields(task.pid)]
        trial.wrong += [f"the daemon has a child: {keeper.describe(pid)}" for pid in keeper.descendants(self.daemon.pid)]
        trial.wrong += [f"in the work directory: {path}" for path in self.daemon.at_work()]

    def _read(self) -> Objects:
        return self.stored.named(_in_store(self.daemon, self.stored.ids))

    def _write(self, objects: Objects) -> None:
        keys = self.stored.keys(objects)
        for each in self.stored.ids:
            mine = {key.removeprefix(f"{each}/"): data for key, data in keys.items() if key.startswith(f"{each}/")}
            write(self.daemon.store_dir / each, mine)

    def _restore(self, checkpoint_id: str) -> str:
        """The code it is refused with; from the phase `probing` on it runs."""
        *_, last = self.daemon.restore(checkpoint_id)
        if last.status == "ready":
            return ""
        return f"{last.status} {last.code} after it has run" if "probing" in last.profile.phases else str(last.code)

    def _verify(self, checkpoint_id: str) -> str:
        request = pb.CheckpointId(checkpoint_id=checkpoint_id)
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
        self.program.kill()


def _wrong(code: str, *, fine: bool) -> bool:
    return bool(code) if fine else code not in CODES


def _as_long(before: Objects, after: Objects) -> bool:
    """Nothing has changed but bytes of streams: what is read of all of them is too much for the next increment."""
    return all(
        name in after and len(after[name]) == len(data)
        for name, data in before.items()
        if after.get(name) != data and "/pages-" in name
    )


def program(directory: Path) -> Program:
    return Program(directory, python("counter.py", 0.01))


def changing(directory: Path) -> Program:
    return Program(directory, python("changing.py", _MIB, "noise", 20))


def real(daemon: Daemon, running: Program) -> Real:
    """`running` checkpointed by the daemon, and killed."""
    before = running.beat()
    return _real(daemon, running, before, NAME, [checkpointed(daemon, running, streams=2).checkpoint_id])


def chain(daemon: Daemon, running: Program, directory: Path, **settings: Any) -> Real:
    """Three times, each with pages of those before it, by a daemon with those settings; then it was killed. `directory` is empty."""
    ids = []
    for _ in range(2):
        ids.append(ready(daemon.checkpoint(running.target, criu_opts={"increment": "auto"}, streams=2)).checkpoint_id)
        change(running)
    before = running.beat()
    ids.append(checkpointed(daemon, running, criu_opts={"increment": "auto"}, streams=2).checkpoint_id)
    made = _real(daemon, running, before, CHAIN, ids, **settings)
    rig = made.stored.rig(directory)
    for key, data in made.stored.keys(made.stored.objects).items():
        rig.store.put(key, data)
    return replace(made, looks=needed.of(made.stored, rig))


def _real(daemon: Daemon, running: Program, before: Beat, name: str, ids: Sequence[str], **settings: Any) -> Real:
    tasks = [TaskFacts.model_validate(task) for task in daemon.manifest(ids[-1])["images"][0]["tasks"]]
    stored = Stored(
        name, ids[-1], {}, lambda work: _rig(work, tasks, settings), dict(zip((FULL, MIDDLE), ids[:-1], strict=False))
    )
    return Real(daemon, replace(stored, objects=stored.named(_in_store(daemon, ids))), tasks, running, before)


def _in_store(daemon: Daemon, ids: Sequence[str]) -> dict[str, bytes]:
    return {f"{each}/{name}": data for each in ids for name, data in read(daemon.store_dir / each).items()}


# --- the same on a node of fakes ------------------------------------------------------------------------------------------------


def _rig(directory: Path, tasks: list[TaskFacts], settings: Mapping[str, Any]) -> Rig:
    rig, machine = Rig(directory, **settings), _Seen(tasks)
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

    def restore(
        self,
        images: Path,
        options: CriuOptions,
        prepared: Prepared,
        cancel: Cancel,
        held: Held | None = None,
    ) -> int:
        self._script.step("criu.restore")
        self.restores += 1
        self._machine.restored = True
        return ROOT
