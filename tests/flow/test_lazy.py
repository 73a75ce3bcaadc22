"""A restore whose pages the filler brings, on fakes: lazily, or before anybody runs. Every page comes, in the right place; it is `ready`
when all of them have; whatever fails, nobody runs on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hibernode.errors import Cancelled, Corrupt, DeadlineExceeded, HibernodeError, NoRoom, Refused
from hibernode.journal import remedy
from hibernode.model import PAGE, RestoreCommand, Status
from hibernode.transfer import pageproto
from tests.envelope import opened, seal
from tests.fakes.gpu import INVENTORY
from tests.fakes.machine import CHILD, ROOT, Machine, Run, memory
from tests.fakes.script import Script
from tests.flow.rig import Rig, defect, fitting_error, new_id, nothing_outlives, until

pytestmark = pytest.mark.timeout(60)

LAZY = '{"restore": "lazy"}'
BOTH = pytest.mark.parametrize("how", [LAZY, ""], ids=["lazy", "eager"])


def made(
    directory: Path, pages: int = 6000, script: Script | None = None, *, common: int = 0, **settings: object
) -> tuple[Rig, str]:
    """A checkpoint, whose original has ended. From then on `script` counts. `common`: so many pages of the child lie where the root has
    some, too."""
    runs = memory(pages, lazy=True)
    if common:
        content = random.Random(common).randbytes(common * PAGE)
        runs += [Run(pid << 8 | pageproto.TASK, 0x70000000, content, lazy=True) for pid in (ROOT, CHILD)]
    rig = Rig(directory, runs, **settings)
    rig.criu.unable = ""
    checkpoint_id = rig.checkpoint(streams=2)
    rig.end_of_original()
    rig.rescript(script or Script())
    return rig, checkpoint_id


@BOTH
@pytest.mark.parametrize("pages", [0, 1, 20, 1100, 9000])
def test_every_page_comes(tmp_path: Path, pages: int, how: str) -> None:
    rig, checkpoint_id = made(tmp_path, pages)
    with nothing_outlives():
        rig.restore(checkpoint_id, criu_opts=how)
    assert rig.machine.restored
    assert rig.statuses == [Status.READY]
    assert not rig.leftovers(checkpoint_id)


def test_it_is_ready_when_all_is_in_and_not_before(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path)
    rig.restore(checkpoint_id, criu_opts=LAZY)
    notes = rig.script.notes
    order = [
        "criu.keeper", "keeper.begin", "criu.restore", "journal.update probing", "journal.update filling", "keeper.wait",
        "keeper.half", "journal.update probing", "keeper.close", "report ready",
    ]  # fmt: skip
    assert [note for note in notes if note in order] == order


def test_without_lazy_it_runs_when_all_is_in_and_not_before(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path)
    rig.restore(checkpoint_id)
    notes = rig.script.notes
    order = [
        "criu.keeper", "journal.update restoring", "keeper.begin", "criu.restore", "keeper.hold", "journal.update holding", "keeper.wait",
        "keeper.half", "journal.update restoring", "criu.restore end", "journal.update probing",
        "keeper.close", "report ready",
    ]  # fmt: skip
    assert [note for note in notes[notes.index("criu.keeper") :] if note in order] == order
    assert "journal.update filling" not in notes


ONCE = {"connections": '{"tcp": "established"}', "names": '{"link_remap": true}'}


@pytest.mark.parametrize("why", ["the kernel", "the node's settings", "a container", *ONCE])
def test_where_nothing_can_be_filled_criu_reads_files(tmp_path: Path, why: str) -> None:
    rig, checkpoint_id = made(tmp_path, criu={"filler": why != "the node's settings"})
    if why == "a container":
        doctored(rig, checkpoint_id, lambda manifest: manifest["workload"].update(kind="container"))
    rig.criu.unable = "no userfaultfd" if why == "the kernel" else ""
    rig.restore(checkpoint_id, criu_opts=ONCE.get(why, ""))
    assert rig.statuses == [Status.READY]
    assert "criu.keeper" not in rig.script.calls


@BOTH
@pytest.mark.parametrize(("common", "few"), [(0, True), (100, True), (400, False), (6000, False)])
def test_what_a_fork_may_have_left_shared_is_read_by_criu(tmp_path: Path, common: int, how: str, *, few: bool) -> None:
    """Which lets both processes share it again. Of 4000 pages and these, twice, one of sixteen is few."""
    rig, checkpoint_id = made(tmp_path, common=common)
    with nothing_outlives():
        rig.restore(checkpoint_id, criu_opts=how)
    assert rig.statuses == [Status.READY]
    assert ("keeper.begin" in rig.script.calls) == (few or bool(how)), "lazily there is no other way"


@BOTH
def test_very_many_small_runs_are_read_by_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("hibernode.transfer.serve._MANY", 0)
    monkeypatch.setattr("hibernode.transfer.serve._SMALL", 1 << 30)
    rig, checkpoint_id = made(tmp_path)
    with nothing_outlives():
        rig.restore(checkpoint_id, criu_opts=how)
    assert rig.statuses == [Status.READY]
    assert ("keeper.begin" in rig.script.calls) == bool(how), "lazily there is no other way"


def test_its_pages_are_counted_and_no_page_is_read_for_nothing(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path, transfer={"lazy_room": 64 << 20})
    rig.restore(checkpoint_id, criu_opts=LAZY)
    frames = sum(
        stream["frames"] for stream in opened(rig.store.objects[f"{checkpoint_id}/manifest.json"])["images"][0]["streams"]
    )
    reads = [call for call in rig.script.calls if call.startswith("store.read pages-")]
    assert len(reads) <= frames, "all that was read for CRIU itself is kept for the tree"


@BOTH
def test_what_criu_itself_reads_has_to_fit_into_the_work_directory(tmp_path: Path, how: str) -> None:
    """A third of the pages, and none of the others."""
    rig, checkpoint_id = made(tmp_path, 6000)
    rig.machine.room = 4 << 20
    with nothing_outlives(), pytest.raises(NoRoom) as refused:
        rig.restore(checkpoint_id, criu_opts=how)
    assert 4 << 20 < refused.value.details["wanted"] < 10 << 20
    assert not [call for call in rig.script.calls if call.startswith(("criu.restore", "store.read pages-"))]
    rig.machine.room = refused.value.details["wanted"]
    rig.restore(checkpoint_id, criu_opts=how)
    assert rig.machine.restored


@BOTH
def test_little_room_is_enough(tmp_path: Path, how: str) -> None:
    rig, checkpoint_id = made(tmp_path, 20_000, transfer={"lazy_room": 16 << 20})
    rig.restore(checkpoint_id, criu_opts=how)
    assert rig.statuses == [Status.READY]


@BOTH
@pytest.mark.timeout(180)  # a hundred restores
@pytest.mark.parametrize("error", [fitting_error, defect])
def test_it_fails_at_every_step(tmp_path: Path, error: Callable[[str], HibernodeError], how: str) -> None:
    rig, checkpoint_id = made(tmp_path / "count", limits={"outage": 0})
    rig.restore(checkpoint_id, criu_opts=how)
    count, failures = len(rig.script.calls), 0
    for n in range(1, count + 1):
        rig, checkpoint_id = made(tmp_path / str(n), script=Script(n, error), limits={"outage": 0})
        raised = None
        with nothing_outlives():
            try:
                rig.restore(checkpoint_id, criu_opts=how)
            except HibernodeError as e:
                raised = e.with_traceback(None)
        where = f"after a failure at {rig.script.failed}"
        if raised is None:
            continue
        failures += 1
        assert rig.script.failed in str(raised), f"{where}: {raised!r}"
        assert not rig.machine.restored or rig.script.failed == "report ready", f"{where}: it runs on"
        assert not (left := rig.at_work()), f"{where}: {left}"
    assert failures > count - 12, "only undos, marks that are removed, and what is not needed may be forgiven"


@BOTH
def test_a_cancel_when_half_is_in_leaves_nothing(tmp_path: Path, how: str) -> None:
    class Cancels(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "keeper.half":
                rig.cancel.set("enough")

    rig, checkpoint_id = made(tmp_path, script=Cancels())
    with nothing_outlives(), pytest.raises(Cancelled):
        rig.restore(checkpoint_id, criu_opts=how)
    assert not rig.machine.restored
    assert not rig.at_work()


def test_a_store_that_hangs_meets_the_deadline_of_the_phase(tmp_path: Path) -> None:
    class Hangs(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "keeper.half":
                until(lambda: bool(rig.cancel.reason), "the deadline")

    rig, checkpoint_id = made(tmp_path, 40, script=Hangs(), limits={"transfer": 1.0})
    with nothing_outlives(), pytest.raises(DeadlineExceeded) as raised:
        rig.restore(checkpoint_id, criu_opts=LAZY)
    assert raised.value.details["phase"] == "filling"
    assert "limits.transfer" in raised.value.hint
    assert not rig.machine.restored
    assert not rig.at_work()


def test_a_daemon_that_dies_meanwhile_leaves_a_tree_to_be_killed(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path)
    found: list[str] = []

    class Looks(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "keeper.half":
                found.append(remedy(rig.entry.record))

    rig.rescript(Looks())
    rig.restore(checkpoint_id, criu_opts=LAZY)
    assert found == ["kill_restored"]


@BOTH
@pytest.mark.parametrize("at", [0, 1 << 16, -5000])
def test_a_damaged_frame_reaches_nobody(tmp_path: Path, at: int, how: str) -> None:
    rig, checkpoint_id = made(tmp_path)
    key = f"{checkpoint_id}/main/pages-0.zst"
    data = bytearray(rig.store.objects[key])
    data[at] ^= 1
    rig.store.objects[key] = bytes(data)
    with nothing_outlives(), pytest.raises(Corrupt, match="damaged"):
        rig.restore(checkpoint_id, criu_opts=how)
    assert not rig.machine.restored
    assert not rig.at_work()


# --- refused before anything is touched -------------------------------------------------------------------------------------------


def doctored(rig: Rig, checkpoint_id: str, change: Callable[[dict[str, Any]], object]) -> None:
    key = f"{checkpoint_id}/manifest.json"
    manifest = opened(rig.store.objects[key])
    change(manifest)
    rig.store.objects[key] = seal(manifest)


@pytest.mark.parametrize("kind", ["container", "pod"])
def test_containers_are_refused(tmp_path: Path, kind: str) -> None:
    rig, checkpoint_id = made(tmp_path)
    doctored(rig, checkpoint_id, lambda manifest: manifest["workload"].update(kind=kind))
    insist_refused(rig, checkpoint_id, "lazy_kind")


def test_a_node_that_does_not_allow_it_refuses_it(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path, criu={"lazy": False})
    insist_refused(rig, checkpoint_id, "lazy_off")
    rig.restore(checkpoint_id)
    assert rig.statuses == [Status.READY]


def test_state_on_gpus_is_refused(tmp_path: Path) -> None:
    machine = Machine()
    machine.gpu, machine.gpus = "RUNNING", INVENTORY
    rig = Rig(tmp_path, memory(100, lazy=True))
    rig.machine.gpu, rig.machine.gpus = machine.gpu, machine.gpus
    checkpoint_id = rig.checkpoint()
    rig.end_of_original()
    rig.rescript(Script())
    insist_refused(rig, checkpoint_id, "lazy_gpu")


def insist_refused(rig: Rig, checkpoint_id: str, code: str) -> None:
    with pytest.raises(Refused) as refused:
        rig.restore(checkpoint_id, criu_opts=LAZY)
    assert refused.value.code == code
    assert not [call for call in rig.script.calls if call.startswith(("workloads.", "criu.keeper", "criu.restore", "store.read"))]


def test_a_checkpoint_refuses_it_and_never_keeps_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(20, lazy=True))
    with pytest.raises(Refused) as refused:
        rig.checkpoint(criu_opts=LAZY)
    assert (refused.value.code, refused.value.details["property"]) == ("criu_opts", "criu_opts.restore")
    checkpoint_id = rig.checkpoint(criu_opts='{"restore": "eager"}')
    assert "restore" not in opened(rig.store.objects[f"{checkpoint_id}/manifest.json"])["criu_opts"]


@pytest.mark.parametrize(
    ("phase", "lacking", "refused"), [("filling", {CHILD}, True), ("filling", set(), False), ("done", {CHILD}, False)]
)
def test_who_lacks_pages_is_not_checkpointed(tmp_path: Path, phase: str, lacking: set[int], *, refused: bool) -> None:
    """A child that a tree has forked while it is filled, which has claimed only who is in its image."""
    rig = Rig(tmp_path, memory(20))
    filling = rig.node.journal.begin(RestoreCommand(action_id=new_id(), checkpoint_id=new_id()))
    filling.update(phase=phase, published=filling.record.seq)
    rig.machine.lacking = frozenset(lacking)
    if refused:
        with pytest.raises(Refused) as raised:
            rig.checkpoint()
        assert raised.value.code == "filling"
        assert not [call for call in rig.script.calls if call.startswith(("workload.freeze", "criu.dump"))]
    else:
        rig.checkpoint()
    assert ("host.lacks_pages" in rig.script.calls) == (phase == "filling"), "it takes time"


def test_a_manifest_that_has_it_does_not_make_a_restore_lazy(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path)
    doctored(rig, checkpoint_id, lambda manifest: manifest["criu_opts"].update(restore="lazy"))
    rig.restore(checkpoint_id)
    assert "journal.update filling" not in rig.script.notes
    assert rig.machine.processes()[0].pid == ROOT
