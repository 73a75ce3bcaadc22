"""Fail at every step: one action run once to count its calls on the outside, then once per call with that call failing.

Each time the workload runs on as it did, nothing half made is left anywhere, and the error is the one that was injected.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hibernode import catalog
from hibernode.errors import Cancelled, HibernodeError, Internal, NoRoom, NotFound, Refused, StoreUnavailable, Stuck
from hibernode.model import Cancel, Status
from hibernode.transfer.arena import Arena
from tests.fakes.gpu import INVENTORY
from tests.fakes.machine import Run, memory
from tests.fakes.script import Script
from tests.flow.rig import Rig, defect, fitting_error, new_id, nothing_outlives

pytestmark = pytest.mark.timeout(60)

Error = Callable[[str], BaseException]
RUNS = memory(1100)
OTHER_ARENA = Arena(16 << 20)
KILL = '{"leave_running": false}'


def no_room(step: str) -> HibernodeError:
    return NoRoom(f"scripted failure of {step}")


def disk_full(step: str) -> OSError:
    return OSError(errno.ENOSPC, f"scripted failure of {step}")


class Outage(Script):
    """The n-th call fails, and of its kind (the store, or the workload) every later one."""

    def step(self, name: str) -> None:
        if self.failed and name.split(".", maxsplit=1)[0] == self.failed.split(".", maxsplit=1)[0]:
            with self._lock:
                self.notes.append(name)
            raise self._error(name)
        super().step(name)


class Cancels(Script):
    """At the n-th call the action is cancelled; the call itself works."""

    def __init__(self, at: int, cancel: Callable[[], Cancel]) -> None:
        super().__init__()
        self._at, self._cancel = at, cancel

    def step(self, name: str) -> None:
        super().step(name)
        if len(self.calls) == self._at:
            self.failed = name
            self._cancel().set("cancelled at " + name)


def rig_of(directory: Path, script: Script | None = None, runs: list[Run] | None = None) -> Rig:
    return Rig(directory, RUNS if runs is None else runs, script)


def on_gpu(rig: Rig, state: str) -> None:
    rig.machine.gpu = state
    if state:
        rig.machine.gpus = INVENTORY


def steps_of_checkpoint(directory: Path, gpu: str = "", **overrides: object) -> int:
    rig = rig_of(directory / "count")
    on_gpu(rig, gpu)
    rig.checkpoint(streams=2, **overrides)
    return len(rig.script.calls)


def insist_on_checkpoint(rig: Rig, made: str, *, raised: BaseException | None, kill: bool = False) -> None:
    """What holds after a checkpoint, however it ended."""
    where = f"after a failure at {rig.script.failed}"
    assert not (left := rig.leftovers(made)), f"{where}: {left}"
    if raised is None or Status.READY in rig.statuses:
        assert rig.whole(made), where
        assert rig.machine.alive is not (kill and raised is None), where
    else:
        assert rig.machine.alive, f"{where}: killed"
        assert not rig.machine.killed, where
    assert not (rig.machine.alive and rig.machine.stopped), f"{where}: left stopped"


def caught(work: Callable[[], object]) -> BaseException | None:
    with nothing_outlives():
        return raised_by(work)


def raised_by(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except BaseException as e:
        return e.with_traceback(None)
    return None


@pytest.mark.parametrize("gpu", ["", "RUNNING"])
@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("error", [fitting_error, no_room, defect, disk_full])
def test_a_checkpoint_fails_at_every_step(tmp_path: Path, error: Error, kill: bool, gpu: str) -> None:
    overrides = {"criu_opts": KILL} if kill else {}
    count = steps_of_checkpoint(tmp_path, gpu=gpu, **overrides)
    assert count > 35, "the fakes count too little"
    failures = 0
    for n in range(1, count + 1):
        script, made = Script(n, error), new_id()
        rig = rig_of(tmp_path / str(n), script)
        on_gpu(rig, gpu)
        raised = caught(lambda: rig.checkpoint(made, streams=2, **overrides))  # noqa: B023
        insist_on_checkpoint(rig, made, raised=raised, kill=kill)
        if raised is not None:
            failures += 1
            wanted = error(script.failed)
            assert type(raised) is type(wanted) or is_no_room(raised, wanted), f"{script.failed} raised {raised!r}"
            assert script.failed in str(raised), f"{script.failed} raised {raised!r}"
    assert failures > count - 8, "only undos, which are tried again, and reading the load may be forgiven"


def is_no_room(raised: BaseException, wanted: BaseException) -> bool:
    """A full disk is told as such, once it is the work directory's."""
    return isinstance(raised, NoRoom) and isinstance(wanted, OSError)


@pytest.mark.parametrize("kill", [False, True])
def test_the_store_goes_away_at_every_step_and_stays_away(tmp_path: Path, kill: bool) -> None:
    """Then objects cannot be removed either: what may be left is what nobody can see, or a whole checkpoint."""
    overrides = {"criu_opts": KILL} if kill else {}
    for n in range(1, steps_of_checkpoint(tmp_path, **overrides) + 1):
        script, made = Outage(n, fitting_error), new_id()
        rig = rig_of(tmp_path / str(n), script)
        raised = caught(lambda: rig.checkpoint(made, streams=2, **overrides))  # noqa: B023
        if not script.failed.startswith("store."):
            continue
        if script.failed == "store.delete attempt":  # after `ready`: a mark is left beside a whole checkpoint
            assert raised is None
            continue
        assert isinstance(raised, HibernodeError), script.failed
        assert rig.machine.alive
        assert not rig.machine.stopped, f"stopped after {script.failed}"
        assert not rig.store.uploads, f"open uploads after {script.failed}"
        if f"{made}/manifest.json" in rig.store.objects:
            assert rig.whole(made), f"half a checkpoint is visible after {script.failed}"


@pytest.mark.parametrize("kill", [False, True])
def test_a_checkpoint_is_cancelled_at_every_step(tmp_path: Path, kill: bool) -> None:
    overrides = {"criu_opts": KILL} if kill else {}
    cancelled = 0
    for n in range(1, steps_of_checkpoint(tmp_path, **overrides) + 1):
        made, rigs = new_id(), []
        script = Cancels(n, lambda: rigs[0].cancel)  # noqa: B023
        rig = rig_of(tmp_path / str(n), script)
        rigs.append(rig)
        raised = caught(lambda: rig.checkpoint(made, streams=2, **overrides))  # noqa: B023
        assert raised is None or isinstance(raised, Cancelled), f"cancelled at {script.failed}: {raised!r}"
        killed = kill and not rig.machine.alive
        insist_on_checkpoint(rig, made, raised=None if killed else raised, kill=killed)
        cancelled += Status.READY not in rig.statuses
    assert cancelled > 25


@pytest.mark.parametrize("kill", [False, True])
def test_a_workload_that_cannot_be_thawed_is_what_people_hear_of(tmp_path: Path, kill: bool) -> None:
    """The failure that made the undo necessary must not hide that the undo failed."""

    class ThawFails(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "workload.thaw":
                raise OSError("it does not go on")

    overrides = {"criu_opts": KILL} if kill else {}
    for n in range(1, steps_of_checkpoint(tmp_path, **overrides) + 1):
        script, made = ThawFails(n, fitting_error), new_id()
        rig = rig_of(tmp_path / str(n), script)
        raised = caught(lambda: rig.checkpoint(made, streams=2, **overrides))  # noqa: B023
        if "workload.thaw" in script.notes:
            assert isinstance(raised, Stuck), f"{script.failed}: {raised!r}"
            assert script.notes.count("workload.thaw") == 3


def test_a_lost_answer_to_the_manifest_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    """The store wrote it, and said that it failed."""
    rig = rig_of(tmp_path)
    put = rig.store.put

    def lose(key: str, data: bytes) -> None:
        put(key, data)
        raise StoreUnavailable("no answer")

    rig.store.put = lose  # type: ignore[method-assign] - the peer's fault, not ours
    made = new_id()
    raised = caught(lambda: rig.checkpoint(made))
    assert isinstance(raised, StoreUnavailable)
    insist_on_checkpoint(rig, made, raised=raised)


def test_a_manifest_that_comes_back_different_is_removed(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    put = rig.store.put
    rig.store.put = lambda key, data: put(key, data[:-2] + b" \n" if "manifest" in key else data)  # type: ignore[method-assign]
    made = new_id()
    raised = caught(lambda: rig.checkpoint(made))
    assert isinstance(raised, HibernodeError)
    assert raised.code == "corrupt"
    insist_on_checkpoint(rig, made, raised=raised)


class Meanwhile(Script):
    """Before the n-th call something else happens."""

    def __init__(self, at: int, deed: Callable[[], object]) -> None:
        super().__init__()
        self._at, self._deed = at, deed

    def step(self, name: str) -> None:
        super().step(name)
        if len(self.calls) == self._at:
            self.failed = name
            self._deed()


def elsewhere(directory: Path, rig: Rig) -> Rig:
    """Another node of the same store."""
    other = Rig(directory, RUNS)
    other.store.objects, other.store._modified, other.store._lock = rig.store.objects, rig.store._modified, rig.store._lock
    other.node = replace(other.node, arena=OTHER_ARENA)
    return other


def test_two_nodes_make_one_checkpoint_id(tmp_path: Path) -> None:
    """The whole of one runs at every step of the other: one of them says `ready`, and what it has said stays true."""
    won, count = {"this": 0, "other": 0}, steps_of_checkpoint(tmp_path)
    for n in range(1, count + 1):
        made, rigs, outcomes = new_id(), [], []
        script = Meanwhile(n, lambda: outcomes.append(raised_by(lambda: rigs[1].checkpoint(made, streams=2))))  # noqa: B023
        rig = rig_of(tmp_path / str(n), script)
        rigs += [rig, elsewhere(tmp_path / f"other {n}", rig)]
        outcomes.append(caught(lambda: rig.checkpoint(made, streams=2)))  # noqa: B023
        where = f"{script.failed}: {outcomes!r}"
        for each, raised in zip((rigs[1], rig), outcomes, strict=True):
            assert raised is None or (isinstance(raised, Refused) and raised.code == "exists"), where
            assert (Status.READY in each.statuses) is (raised is None), where
            assert each.machine.alive, where
            assert not each.machine.stopped, where
            assert not each.store.uploads, where
        if outcomes.count(None) == 1:
            winner = rigs[1] if outcomes[0] is None else rig
            assert rig.whole(made), where
            assert catalog.read(rig.store, made, rig.node.notary).action_id == winner.entry.action_id, where
            assert list(catalog.manifests(rig.store, rig.node.notary)), where
            won["other" if winner is rigs[1] else "this"] += 1
        else:
            assert outcomes.count(None) == 0, where
            assert not [key for key in rig.store.objects if key.startswith(made)], f"{where}: neither, and something is left"
    assert won["this"] > 3
    assert won["other"] > 3  # until this one's mark is there


def test_what_fails_removes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    """An object of somebody else's attempt appears under one of our keys, at any step; and any later step fails."""
    made, key, count = new_id(), "main/index.zst", steps_of_checkpoint(tmp_path)
    for n in range(1, count + 1):
        rigs: list[Rig] = []
        script = Meanwhile(n, lambda: rigs[0].store.objects.setdefault(f"{made}/{key}", b"not ours"))  # noqa: B023
        rig = rig_of(tmp_path / str(n), script)
        rigs.append(rig)
        raised = caught(lambda: rig.checkpoint(made, streams=2))  # noqa: B023
        if rig.store.objects.get(f"{made}/{key}") != b"not ours":
            assert raised is None, f"removed after {script.failed}"
            assert rig.whole(made)


# --- restore ----------------------------------------------------------------------------------------------------------------


def made_once(directory: Path, gpu: str = "") -> tuple[Rig, str]:
    rig = rig_of(directory)
    on_gpu(rig, gpu)
    made = rig.checkpoint(streams=2)
    rig.end_of_original()
    return rig, made


def insist_on_restore(rig: Rig, raised: BaseException | None) -> None:
    where = f"after a failure at {rig.script.failed}"
    assert rig.machine.restored is (raised is None), f"{where}: half a restore is left"
    assert not rig.machine.killed_on_gpu, f"{where}: killed before it was parked"
    assert not rig.machine.prepared, where
    assert not rig.node.claims._taken, where
    assert not rig.at_work(), where
    assert rig.statuses == ([] if raised else [Status.READY]), where


@pytest.mark.parametrize("gpu", ["", "RUNNING"])
@pytest.mark.parametrize("error", [fitting_error, no_room, defect, disk_full])
def test_a_restore_fails_at_every_step(tmp_path: Path, error: Error, gpu: str) -> None:
    rig, made = made_once(tmp_path, gpu)
    in_the_image = "CHECKPOINTED" if gpu else ""
    rig.machine.gpu = in_the_image
    rig.rescript(Script())
    rig.restore(made)
    assert rig.machine.gpu == gpu
    count = len(rig.script.calls)
    assert count > 25, "the fakes count too little"
    failures = 0
    for n in range(1, count + 1):
        rig.machine.restored = rig.machine.adopted = False
        rig.machine.gpu = in_the_image
        rig.rescript(Script(n, error))
        raised = caught(lambda: rig.restore(made))
        assert raised is not None or rig.machine.gpu == gpu
        if rig.script.failed == "report ready":
            assert rig.machine.restored, "it runs; that nobody could be told does not end it"
            continue
        insist_on_restore(rig, raised)
        if raised is not None:
            failures += 1
            wanted = error(rig.script.failed)
            assert type(raised) is type(wanted) or is_no_room(raised, wanted), f"{rig.script.failed} raised {raised!r}"
            assert rig.script.failed in str(raised), f"{rig.script.failed} raised {raised!r}"
    assert failures > count - 5


@pytest.mark.parametrize("gpu", ["", "RUNNING"])
def test_a_restore_is_cancelled_at_every_step(tmp_path: Path, gpu: str) -> None:
    rig, made = made_once(tmp_path, gpu)
    in_the_image = rig.machine.gpu = "CHECKPOINTED" if gpu else ""
    rig.rescript(Script())
    rig.restore(made)
    cancelled = 0
    for n in range(1, len(rig.script.calls) + 1):
        rig.machine.restored = rig.machine.adopted = False
        rig.machine.gpu = in_the_image
        rig.rescript(Cancels(n, lambda: rig.cancel))
        raised = caught(lambda: rig.restore(made))
        assert raised is None or isinstance(raised, Cancelled)
        insist_on_restore(rig, raised)
        cancelled += raised is not None
    assert cancelled > 20


def test_a_tree_that_dies_at_once_is_no_restore(tmp_path: Path) -> None:
    rig, made = made_once(tmp_path)

    class Dies(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "workload.processes":
                rig.machine.restored = False

    rig.rescript(Dies())
    raised = caught(lambda: rig.restore(made))
    assert isinstance(raised, HibernodeError)
    assert raised.code == "restore_failed"
    insist_on_restore(rig, raised)


def test_a_restored_tree_that_cannot_be_killed_is_what_people_hear_of(tmp_path: Path) -> None:
    rig, made = made_once(tmp_path)

    class Immortal(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "workload.processes":
                raise Internal("the probe broke")
            if name == "prepared.kill":
                raise NotFound("no way")

    rig.rescript(Immortal())
    raised = caught(lambda: rig.restore(made))
    assert isinstance(raised, Stuck)
