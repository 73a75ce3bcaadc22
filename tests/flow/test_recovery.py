"""Recovery on fakes: what it does to processes, given what the journal of a dead daemon says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hibernode.journal import BOOT, Tree, mark_of
from hibernode.model import Outcome, RestoreCommand, Status
from hibernode.recovery import recover
from tests.fakes.machine import ROOT, FakePrepared
from tests.fakes.script import Script
from tests.flow.rig import Rig, checkpoint_command, new_id

pytestmark = pytest.mark.timeout(30)


def crashed_checkpoint(rig: Rig, *, stopped_before: bool) -> Outcome:
    """What recovery makes of a daemon that died while CRIU dumped, with all that the page had written down until then."""
    written: list[tuple[Tree, ...]] = []

    class Looks(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "workload.freeze":
                written.append(rig.entry.record.trees)

    rig.machine.stopped = stopped_before
    rig.rescript(Looks())
    rig.checkpoint()
    entry = rig.node.journal.begin(checkpoint_command())
    entry.update(phase="dumping", status=Status.PROCESSING, trees=written[0])
    rig.machine.stopped = True
    return recover(rig.node, entry)


def crashed_restore(rig: Rig, *, marked: bool = False, **changes: object) -> Outcome:
    """What recovery makes of a daemon that died while CRIU restored, or just after that."""
    rig.end_of_original()
    rig.machine.restored = True
    entry = rig.node.journal.begin(RestoreCommand(action_id=new_id(), checkpoint_id=new_id()))
    entry.update(**{"phase": "restoring", "status": Status.PROCESSING, "trees": (Tree(pid=ROOT, start_time=0),), **changes})
    if marked:
        mark = mark_of(rig.node.config.work_dir, entry.action_id)
        mark.parent.mkdir()
        mark.touch()
    return recover(rig.node, entry)


def test_a_workload_that_was_frozen_goes_on(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert crashed_checkpoint(rig, stopped_before=False).code == "interrupted"
    assert not rig.machine.stopped


@pytest.mark.parametrize("phase", ["suspending", "dumping", "shipping"])
def test_what_was_on_gpus_is_brought_back_when_nobody_stands_still(tmp_path: Path, phase: str) -> None:
    rig = Rig(tmp_path)
    rig.machine.gpu, rig.machine.stopped = "CHECKPOINTED", True
    entry = rig.node.journal.begin(checkpoint_command())
    entry.update(phase=phase, status=Status.PROCESSING, trees=(Tree(pid=ROOT, start_time=1000 + ROOT),), boot=BOOT)
    assert recover(rig.node, entry).code == "interrupted"
    assert (rig.machine.gpu, rig.machine.stopped) == ("RUNNING", False)
    assert rig.script.calls.index("gpu.recover") > rig.script.calls.index("workloads.thaw")


def test_a_workload_that_its_owner_had_stopped_stays_so(tmp_path: Path) -> None:
    """The journal is what a checkpoint itself writes before it dumps."""
    rig = Rig(tmp_path)
    assert crashed_checkpoint(rig, stopped_before=True).code == "interrupted"
    assert rig.machine.stopped


def test_whoever_lives_in_the_place_of_a_restore_is_of_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert crashed_restore(rig, place=FakePrepared.place).code == "interrupted"
    assert not rig.machine.restored


@pytest.mark.parametrize(("boot", "status"), [(BOOT, Status.READY), ("another", Status.ERROR)], ids=["this boot", "another"])
def test_a_tree_that_had_passed_its_probe_stays(tmp_path: Path, boot: str, status: Status) -> None:
    """Only its `ready` could not be written down. The mark of another boot is of a tree that is gone with that."""
    rig = Rig(tmp_path)
    outcome = crashed_restore(rig, place=FakePrepared.place, boot=boot, marked=True)
    assert outcome.status == status
    assert rig.machine.restored is (status == Status.READY)


def test_what_a_half_restored_tree_has_on_gpus_is_parked_before_it_is_killed(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.machine.gpu = "RUNNING"
    known = (Tree(pid=ROOT, start_time=1000 + ROOT),)
    assert crashed_restore(rig, place=FakePrepared.place, boot=BOOT, trees=known).code == "interrupted"
    assert not rig.machine.restored
    assert rig.machine.killed == ["restored"]
    assert not rig.machine.killed_on_gpu


def test_a_workload_that_was_given_back_is_parked_before_its_kill_is_finished(tmp_path: Path) -> None:
    """The helper had brought its GPU state back, as nobody answered for it."""
    rig = Rig(tmp_path)
    rig.machine.gpu = "RUNNING"
    entry = rig.node.journal.begin(checkpoint_command())
    trees = (Tree(pid=ROOT, start_time=1000 + ROOT),)
    entry.update(phase="killing", status=Status.READY, trees=trees, boot=BOOT, kill=True)
    assert recover(rig.node, entry).status == Status.READY
    assert (rig.machine.killed, rig.machine.gpu) == (["original"], "CHECKPOINTED")
    assert rig.script.notes.index("gpu.park") < rig.script.notes.index("workloads.kill")


@pytest.mark.parametrize("place", ["", "another"])
def test_a_pid_alone_is_not_enough_to_kill_for(tmp_path: Path, place: str) -> None:
    rig = Rig(tmp_path)
    assert crashed_restore(rig, place=place).code == "outcome_unknown"
    assert rig.machine.restored
