"""What nobody needs any more: which of it goes, and that nothing else does."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibernode import catalog, gc
from hibernode.config import Retention, Signing
from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.notary import Notary
from hibernode.errors import (
    Busy,
    Cancelled,
    Corrupt,
    HibernodeError,
    Internal,
    NotFound,
    OutcomeUnknown,
    Refused,
    StoreUnavailable,
)
from hibernode.gc import Place, Removal, plan
from hibernode.journal import Record
from hibernode.model import BaseRef, Cancel, CheckpointCommand, Garbage, GarbageRequest, Manifest, RestoreCommand
from hibernode.ports import ObjectFacts, OpenUpload
from tests.fakes import machine
from tests.fakes.desk import manifest
from tests.fakes.machine import memory
from tests.fakes.script import Script
from tests.fakes.store import MemoryStore
from tests.flow.rig import Rig

MINE, OTHER = str(uuid.uuid4()), str(uuid.uuid4())
CHECKPOINT = str(uuid.uuid4())
NOTARY = Notary(Signing())


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def keys(store: MemoryStore) -> list[str]:
    return [facts.key for facts in store.list()]


def shipped(store: MemoryStore, checkpoint_id: str = CHECKPOINT) -> None:
    """Two objects of an image, one upload that is open."""
    store.put(f"{checkpoint_id}/main/pages-0.zst", b"pages")
    store.put(f"{checkpoint_id}/main/index.zst", b"index")
    store.upload(f"{checkpoint_id}/main/pages-1.zst").write(b"more")


def left_with(error: Exception, inside: AbstractContextManager[None], work: Callable[[], None] = lambda: None) -> None:
    """What is done inside ends with `error`, and that is what comes out."""
    with pytest.raises(type(error)) as raised:
        _fail(inside, work, error)
    assert raised.value is error


def _fail(inside: AbstractContextManager[None], work: Callable[[], None], error: Exception) -> None:
    with inside:
        work()
        raise error


def committed(store: MemoryStore) -> None:
    store.put(f"{CHECKPOINT}/main/index.zst", b"index")
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")


# --- one attempt at an id -----------------------------------------------------------------------------------------------------


def test_an_attempt_that_ends_well_leaves_no_mark(store: MemoryStore) -> None:
    with gc.attempting(store, CHECKPOINT, MINE):
        assert keys(store) == [f"{CHECKPOINT}/attempt"]
        committed(store)
    assert keys(store) == [f"{CHECKPOINT}/main/index.zst", f"{CHECKPOINT}/manifest.json"]


def test_an_attempt_that_fails_leaves_nothing(store: MemoryStore) -> None:
    left_with(Internal("no"), gc.attempting(store, CHECKPOINT, MINE), lambda: shipped(store))
    assert (keys(store), store.uploads) == ([], [])


def test_an_attempt_that_fails_after_its_commit_leaves_a_checkpoint(store: MemoryStore) -> None:
    left_with(Internal("nobody could be told"), gc.attempting(store, CHECKPOINT, MINE), lambda: committed(store))
    assert keys(store) == [f"{CHECKPOINT}/main/index.zst", f"{CHECKPOINT}/manifest.json"]


def test_of_a_commit_that_may_have_been_nothing_is_removed(store: MemoryStore) -> None:
    """Its manifest may still come."""
    left_with(OutcomeUnknown("nobody knows"), gc.attempting(store, CHECKPOINT, MINE), lambda: shipped(store))
    assert f"{CHECKPOINT}/main/pages-0.zst" in keys(store)


def test_an_id_has_one_attempt_at_a_time(store: MemoryStore) -> None:
    with gc.attempting(store, CHECKPOINT, OTHER):
        with pytest.raises(Refused) as refused, gc.attempting(store, CHECKPOINT, MINE):
            raise AssertionError("never reached")
        assert refused.value.code == "exists"
        assert keys(store) == [f"{CHECKPOINT}/attempt"]


def test_of_two_that_saw_nothing_there_one_is_refused(store: MemoryStore) -> None:
    """The other's mark comes between our look and our own mark."""

    class Late(MemoryStore):
        def put(self, key: str, data: bytes) -> None:
            super().put(key, OTHER.encode())
            super().put(key, data)

    late = Late()
    with pytest.raises(Refused) as refused, gc.attempting(late, CHECKPOINT, MINE):
        raise AssertionError("never reached")
    assert refused.value.code == "exists"
    assert late.objects == {f"{CHECKPOINT}/attempt": OTHER.encode()}


def test_what_a_try_before_could_not_remove_does_not_stop_the_next(store: MemoryStore) -> None:
    store.put(f"{CHECKPOINT}/attempt", MINE.encode())
    shipped(store)
    with gc.attempting(store, CHECKPOINT, MINE):
        assert (keys(store), store.uploads) == ([f"{CHECKPOINT}/attempt"], [])


def test_an_error_of_an_attempt_is_not_hidden_by_its_sweep() -> None:
    script = Script()
    store = MemoryStore(script)
    left_with(Internal("this is what happened"), gc.attempting(store, CHECKPOINT, MINE), script.fail_next)


# --- what a crash has left ----------------------------------------------------------------------------------------------------


def test_a_sweep_removes_uploads_and_objects_of_its_action_and_may_be_repeated(store: MemoryStore) -> None:
    store.put(f"{CHECKPOINT}/attempt", MINE.encode())
    shipped(store)
    shipped(store, OTHER)
    for _ in range(2):
        gc.sweep(store, CHECKPOINT, MINE)
        assert keys(store) == [f"{OTHER}/main/index.zst", f"{OTHER}/main/pages-0.zst"]
        assert [upload.key for upload in store.uploads] == [f"{OTHER}/main/pages-1.zst"]


@pytest.mark.parametrize("mark", [None, OTHER, "", MINE + "x"])
def test_a_sweep_leaves_what_it_cannot_know_to_be_its_own(store: MemoryStore, mark: str | None) -> None:
    if mark is not None:
        store.put(f"{CHECKPOINT}/attempt", mark.encode())
    shipped(store)
    before = keys(store)
    gc.sweep(store, CHECKPOINT, MINE)
    assert keys(store) == before
    assert len(store.uploads) == 1


def test_a_sweep_never_touches_a_checkpoint(store: MemoryStore) -> None:
    """The daemon died after the commit, before it took its mark away."""
    for key in ("attempt", "main/index.zst", "manifest.json"):
        store.put(f"{CHECKPOINT}/{key}", MINE.encode())
    gc.sweep(store, CHECKPOINT, MINE)
    assert keys(store) == [f"{CHECKPOINT}/main/index.zst", f"{CHECKPOINT}/manifest.json"]


def test_a_sweep_that_fails_anywhere_is_done_by_the_next() -> None:
    """Its mark goes last: until then the rest is known to be its own."""
    script = Script()
    store = MemoryStore(script)
    store.put(f"{CHECKPOINT}/attempt", MINE.encode())
    shipped(store)
    before = len(script.calls)
    gc.sweep(store, CHECKPOINT, MINE)
    for at in range(1, len(script.calls) - before + 1):
        store = MemoryStore()
        store.put(f"{CHECKPOINT}/attempt", MINE.encode())
        shipped(store)
        store._script = Script(fail_at=at)
        with pytest.raises(StoreUnavailable):
            gc.sweep(store, CHECKPOINT, MINE)
        gc.sweep(store, CHECKPOINT, MINE)
        assert (keys(store), store.uploads) == ([], []), at


def test_a_sweep_asks_little() -> None:
    """One mark, one list of the prefix: recovery does it for every action."""
    script = Script()
    gc.sweep(MemoryStore(script), CHECKPOINT, MINE)
    assert script.calls == ["store.get attempt"]


def recorded(rig: Rig, phase: str, kind: type[CheckpointCommand | RestoreCommand], **more: object) -> Record:
    target = {"target": {"pod_name": "trainer"}} if kind is CheckpointCommand else {}
    command = kind.model_validate({"action_id": MINE, "checkpoint_id": CHECKPOINT, **target, **more})
    entry = rig.node.journal.begin(command)
    entry.update(phase=phase)
    return entry.record


@pytest.mark.parametrize("phase", ["preflight", "dumping", "shipping"])
def test_recovery_tidies_up_after_a_checkpoint(rig: Rig, phase: str) -> None:
    rig.store.put(f"{CHECKPOINT}/attempt", MINE.encode())
    shipped(rig.store)
    gc.tidy(rig.node, recorded(rig, phase, CheckpointCommand))
    assert (rig.store.objects, rig.store.uploads) == ({}, [])


def test_recovery_leaves_objects_whose_manifest_may_be_on_its_way(rig: Rig) -> None:
    """The daemon died while it put the manifest, and a store behind a network may finish what it was sent."""
    rig.store.lingers = True
    rig.store.put(f"{CHECKPOINT}/attempt", MINE.encode())
    shipped(rig.store)
    record, before = recorded(rig, "committing", CheckpointCommand), dict(rig.store.objects)
    gc.tidy(rig.node, record)
    assert rig.store.objects == before
    rig.store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    gc.tidy(rig.node, record)
    assert rig.store.objects.keys() == before.keys() - {f"{CHECKPOINT}/attempt"} | {f"{CHECKPOINT}/manifest.json"}


def test_recovery_tidies_up_after_a_commit_where_nothing_is_on_its_way(rig: Rig) -> None:
    rig.store.put(f"{CHECKPOINT}/attempt", MINE.encode())
    shipped(rig.store)
    gc.tidy(rig.node, recorded(rig, "committing", CheckpointCommand))
    assert (rig.store.objects, rig.store.uploads) == ({}, [])


def test_recovery_takes_back_the_upload_of_a_manifest_that_is_there(rig: Rig) -> None:
    """The daemon died between giving it its name and letting its upload go."""
    for key in ("attempt", "manifest.json"):
        rig.store.put(f"{CHECKPOINT}/{key}", MINE.encode())
    for key in ("manifest.json", f"uses/{OTHER}"):
        rig.store.upload(f"{CHECKPOINT}/{key}")
    gc.tidy(rig.node, recorded(rig, "committing", CheckpointCommand))
    assert [upload.key for upload in rig.store.open_uploads()] == [f"{CHECKPOINT}/uses/{OTHER}"]
    assert keys(rig.store) == [f"{CHECKPOINT}/manifest.json"]


def test_recovery_takes_back_the_use_of_a_restore(rig: Rig) -> None:
    for key in ("manifest.json", f"uses/{MINE}", f"uses/{OTHER}"):
        rig.store.put(f"{CHECKPOINT}/{key}", b"")
    gc.tidy(rig.node, recorded(rig, "fetching", RestoreCommand))
    assert keys(rig.store) == [f"{CHECKPOINT}/manifest.json", f"{CHECKPOINT}/uses/{OTHER}"]


def test_recovery_takes_back_a_use_that_was_being_said(rig: Rig) -> None:
    rig.store.put(f"{CHECKPOINT}/manifest.json", b"")
    rig.store.upload(f"{CHECKPOINT}/uses/{MINE}")
    rig.store.upload(f"{CHECKPOINT}/uses/{OTHER}")
    gc.tidy(rig.node, recorded(rig, "preflight", RestoreCommand))
    assert [upload.key for upload in rig.store.open_uploads()] == [f"{CHECKPOINT}/uses/{OTHER}"]


def test_recovery_tidies_up_where_the_command_sent_it(tmp_path: Path) -> None:
    """The store is in the command: a crash may come before anything else of it is written down."""
    rig, asked = Rig(tmp_path), list[str]()
    node = dataclasses.replace(rig.node, open_store=lambda url: asked.append(url) or rig.store)  # type: ignore[func-returns-value]
    gc.tidy(node, recorded(rig, "dumping", CheckpointCommand, overrides={"directory": "file:///other"}))
    assert asked == ["file:///other"]


def test_recovery_is_not_held_up_by_a_store_that_does_not_answer(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    record = recorded(rig, "dumping", CheckpointCommand)
    rig.rescript(Script(fail_at=1))
    gc.tidy(rig.node, record)
    assert "tidying up" in caplog.text
    gc.tidy(rig.node, record.model_copy(update={"command": ""}))


# --- in use -------------------------------------------------------------------------------------------------------------------


def test_a_use_is_there_while_it_lasts(store: MemoryStore) -> None:
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    with gc.using(store, CHECKPOINT, MINE):
        assert keys(store) == [f"{CHECKPOINT}/manifest.json", f"{CHECKPOINT}/uses/{MINE}"]
    assert keys(store) == [f"{CHECKPOINT}/manifest.json"]
    left_with(Internal("the restore failed"), gc.using(store, CHECKPOINT, MINE))
    assert keys(store) == [f"{CHECKPOINT}/manifest.json"]


def test_two_may_use_it(store: MemoryStore) -> None:
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    with gc.using(store, CHECKPOINT, MINE), gc.using(store, CHECKPOINT, OTHER):
        assert len(keys(store)) == 3
    assert keys(store) == [f"{CHECKPOINT}/manifest.json"]


def test_a_use_that_a_crash_left_is_as_young_as_the_next_try(tmp_path: Path) -> None:
    store = LocalDir(tmp_path)
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    use = f"{CHECKPOINT}/uses/{MINE}"
    store.put(use, b"")
    os.utime(tmp_path / use, (1000, 1000))
    with gc.using(store, CHECKPOINT, MINE):
        assert abs(store.stat(use).modified - time.time()) < 60
    store.put(use, b"")
    gc.release(store, CHECKPOINT, MINE)
    gc.release(store, CHECKPOINT, MINE)
    assert [facts.key for facts in store.list()] == [f"{CHECKPOINT}/manifest.json"]


def test_a_checkpoint_that_is_gone_cannot_be_used(store: MemoryStore) -> None:
    with pytest.raises(NotFound), gc.using(store, CHECKPOINT, MINE):
        raise AssertionError("never reached")
    assert keys(store) == []


def test_a_checkpoint_that_is_being_removed_cannot_be_used(store: MemoryStore) -> None:
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    store.put(f"{CHECKPOINT}/removing", b"")
    with pytest.raises(Busy), gc.using(store, CHECKPOINT, MINE):
        raise AssertionError("never reached")
    assert keys(store) == [f"{CHECKPOINT}/manifest.json", f"{CHECKPOINT}/removing"]


def test_a_removal_that_somebody_gave_up_is_no_hindrance(tmp_path: Path) -> None:
    store = LocalDir(tmp_path)
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    store.put(f"{CHECKPOINT}/removing", b"")
    os.utime(tmp_path / CHECKPOINT / "removing", (1000, 1000))
    with gc.using(store, CHECKPOINT, MINE):
        pass


def test_a_store_that_cannot_be_written_can_be_restored_from(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(Script(fail_at=1))
    with gc.using(store, CHECKPOINT, MINE):
        assert keys(store) == []
    assert "in use" in caplog.text


def test_marks_and_uses_make_no_checkpoint_and_go_with_one(store: MemoryStore) -> None:
    for key in ("attempt", "removing", f"uses/{MINE}"):
        store.put(f"{OTHER}/{key}", b"")
        store.put(f"{CHECKPOINT}/{key}", b"")
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    catalog.delete(store, CHECKPOINT)
    assert {key.partition("/")[0] for key in keys(store)} == {OTHER}
    with pytest.raises(Refused):
        catalog.insist_new(store, OTHER)


# --- what goes: the rule ------------------------------------------------------------------------------------------------------

NOW = 2_000_000_000.0
DAY = 86400.0
HOUR = 3600.0
IDS = [str(uuid.UUID(int=n)) for n in range(40)]
UNREADABLE = (
    Corrupt("manifest: it is damaged"),
    Refused("format_version", "newer", prop="format_version", found=9, wanted=1),
    Refused("unsigned", "not signed", prop="signature", found="none", wanted="one"),
    StoreUnavailable("the store does not answer"),
)


def made(uid: str, created: float, checkpoint_id: str = CHECKPOINT) -> Manifest:
    old = manifest(checkpoint_id)
    return old.model_copy(update={"created_at": created, "workload": old.workload.model_copy(update={"uid": uid})})


def whole(checkpoint_id: str, age: float, *, uid: str = "u", clock: float = 0.0) -> Place:
    """A checkpoint; `clock`: how far its node's clock is ahead of the store's."""
    objects = [ObjectFacts(f"{checkpoint_id}/{key}", 10, NOW - age) for key in ("main/index.zst", "manifest.json")]
    return Place(checkpoint_id, tuple(objects), (), made(uid, NOW - age + clock, checkpoint_id))


def attempt(checkpoint_id: str, *ages: float, uploads: tuple[float, ...] = ()) -> Place:
    objects = (ObjectFacts(f"{checkpoint_id}/main/pages-{n}.zst", 10, NOW - age) for n, age in enumerate(ages))
    opened = (OpenUpload(f"{checkpoint_id}/main/pages-{n}.zst", f"id{n}", NOW - age) for n, age in enumerate(uploads))
    return Place(checkpoint_id, tuple(objects), tuple(opened))


def gone(removals: list[Removal]) -> list[tuple[str, str, str]]:
    return [(each.what, each.place.checkpoint_id, each.reason) for each in removals]


def by(policy: str, *found: Place, in_use: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    rules = {
        "last 2": Retention(keep_last=2),
        "10 days": Retention(keep_days=10),
        "both": Retention(keep_last=2, keep_days=10),
        "none": Retention(),
        "at once": Retention(grace=0),
    }
    return gone(plan(found, NOW, rules[policy], in_use))


def test_without_rules_checkpoints_stay_and_the_rest_goes() -> None:
    found = [whole(IDS[0], 999 * DAY), attempt(IDS[1], 2 * DAY), attempt(IDS[2], uploads=(2 * DAY, 3 * DAY))]
    assert by("none", *found) == [
        ("attempt", IDS[1], "no_manifest"),
        ("upload", IDS[2], "orphaned_upload"),
        ("upload", IDS[2], "orphaned_upload"),
    ]


def test_the_last_of_each_workload_stay() -> None:
    mine = [whole(IDS[n], (n + 2) * DAY) for n in range(4)]
    others = [whole(IDS[n], (n + 2) * DAY, uid="v") for n in (10, 11)]
    assert by("last 2", *mine, *others) == [("checkpoint", IDS[n], "beyond_last") for n in (2, 3)]


def test_the_young_stay_and_the_old_go() -> None:
    assert by("10 days", whole(IDS[0], 9.9 * DAY), whole(IDS[1], 10.1 * DAY)) == [("checkpoint", IDS[1], "too_old")]


def test_what_one_rule_keeps_the_other_does_not_remove() -> None:
    found = [whole(IDS[n], age * DAY) for n, age in enumerate([2, 3, 4, 11, 12])]
    assert by("both", *found) == [("checkpoint", IDS[n], "too_old") for n in (3, 4)]
    old = [whole(IDS[n], age * DAY) for n, age in enumerate([20, 21, 22])]
    assert by("both", *old) == [("checkpoint", IDS[2], "too_old")]


def test_nothing_younger_than_the_grace_time_goes() -> None:
    found = [whole(IDS[n], (n + 1) * HOUR) for n in range(5)]
    assert by("last 2", *found, attempt(IDS[6], HOUR), attempt(IDS[7], uploads=(HOUR,))) == []


def test_an_attempt_is_as_young_as_the_newest_of_its_parts() -> None:
    """On another node it may be at work: streams are committed one after the other, and opened long before."""
    assert by("none", attempt(IDS[0], 9 * DAY, HOUR)) == []
    assert by("none", attempt(IDS[0], 9 * DAY, uploads=(HOUR,))) == []
    assert by("none", attempt(IDS[0], HOUR, uploads=(9 * DAY,))) == []


def test_an_upload_beside_a_checkpoint_goes_and_the_checkpoint_stays() -> None:
    place = whole(IDS[0], HOUR)
    upload = OpenUpload(f"{IDS[0]}/main/pages-0.zst", "id", NOW - 9 * DAY)
    assert by("none", Place(IDS[0], place.objects, (upload,), place.manifest)) == [("upload", IDS[0], "orphaned_upload")]


def test_what_is_in_use_stays() -> None:
    found = [whole(IDS[n], (n + 2) * DAY) for n in range(4)]
    assert by("last 2", *found, in_use=(IDS[3],)) == [("checkpoint", IDS[2], "beyond_last")]
    assert by("none", attempt(IDS[5], 9 * DAY, uploads=(9 * DAY,)), in_use=(IDS[5],)) == []


@pytest.mark.parametrize(("age", "goes"), [(HOUR, False), (23 * HOUR, False), (25 * HOUR, True), (-HOUR, False)])
def test_a_use_by_another_node_counts_for_a_day(age: float, goes: bool) -> None:
    place = whole(IDS[0], 99 * DAY)
    use = ObjectFacts(f"{IDS[0]}/uses/{OTHER}", 0, NOW - age)
    used = Place(IDS[0], (*place.objects, use), (), place.manifest)
    assert bool(by("10 days", used)) is goes


@pytest.mark.parametrize("trouble", UNREADABLE, ids=lambda e: e.code)
def test_what_cannot_be_read_stays_whatever_the_rules(trouble: HibernodeError) -> None:
    place = whole(IDS[0], 999 * DAY)
    upload = OpenUpload(f"{IDS[0]}/main/pages-0.zst", "id", NOW - 999 * DAY)
    for policy in ("last 2", "10 days", "both", "none", "at once"):
        assert by(policy, Place(IDS[0], place.objects, (upload,), None, trouble)) == []


def test_what_is_not_believed_pushes_nothing_out() -> None:
    """Anybody who may write to the store can write manifests: three forged ones, and the two last that are believed stay."""
    forged = [Place(IDS[n], whole(IDS[n], DAY).objects, (), None, UNREADABLE[2]) for n in range(3)]
    assert by("last 2", *forged, whole(IDS[10], 30 * DAY), whole(IDS[11], 31 * DAY)) == []


@pytest.mark.parametrize("key", ["data.bin", "main/notes.txt", "main/pages-x.zst", "uses/somebody", "a/b/c/index.zst"])
def test_what_somebody_else_has_put_there_protects_all_of_it(key: str) -> None:
    """Others name directories by UUIDs, too."""
    strange = ObjectFacts(f"{IDS[0]}/{key}", 10, NOW - 999 * DAY)
    upload = OpenUpload(f"{IDS[0]}/main/pages-0.zst", "id", NOW - 999 * DAY)
    assert by("at once", Place(IDS[0], (*attempt(IDS[0], 999 * DAY).objects, strange), (upload,))) == []
    assert by("at once", Place(IDS[0], (), (OpenUpload(f"{IDS[0]}/{key}", "id", 0.0),))) == []


@pytest.mark.parametrize("clock", [-30 * DAY, 30 * DAY])
def test_a_node_whose_clock_is_wrong_loses_nothing(clock: float) -> None:
    """Its newest checkpoints look old, or those it made before the clock was put right look new."""
    right = [whole(IDS[n], (20 + n) * DAY) for n in range(2)]
    wrong = [whole(IDS[n], (8 + n) * DAY, clock=clock) for n in (2, 3)]
    stays = {*IDS[:4]} - {checkpoint_id for _, checkpoint_id, _ in by("last 2", *right, *wrong)}
    assert {IDS[2], IDS[3]} <= stays


def test_in_a_store_that_was_copied_the_last_are_still_the_last() -> None:
    """The copy was made in some order; what is newest by its node's clock came first."""
    found = [whole(IDS[n], 30 * DAY - n * HOUR, clock=-n * DAY) for n in range(5)]
    assert by("last 2", *found) == [("checkpoint", IDS[2], "beyond_last")]


def test_processes_of_one_name_are_not_one_workload() -> None:
    def process(n: int, node: str, pid: int) -> Place:
        place = whole(IDS[n], (n + 2) * DAY, uid="")
        assert place.manifest is not None
        (image,) = place.manifest.images
        root, *rest = image.tasks
        images = [image.model_copy(update={"tasks": [root.model_copy(update={"pid": pid}), *rest]})]
        return Place(IDS[n], place.objects, (), place.manifest.model_copy(update={"node": node, "images": images}))

    assert by("last 2", *(process(n, "a", pid) for n, pid in enumerate([1, 2, 3]))) == []
    assert by("last 2", *(process(n, node, 1) for n, node in enumerate("abc"))) == []
    assert by("last 2", *(process(n, "a", 1) for n in range(3))) == [("checkpoint", IDS[2], "beyond_last")]


ages = st.one_of(st.floats(-2 * DAY, 60 * DAY), st.sampled_from([0.0, DAY, 10 * DAY]))
policies = st.builds(
    Retention,
    grace=st.one_of(st.just(0.0), st.floats(0, 20 * DAY)),
    keep_last=st.integers(0, 4),
    keep_days=st.one_of(st.just(0.0), st.floats(0, 40)),
)


referrers = st.one_of(st.just([]), st.just([]), st.lists(st.sampled_from(IDS), unique=True, max_size=2))


@st.composite
def stores(draw: st.DrawFn) -> list[Place]:
    found = []
    for checkpoint_id in draw(st.lists(st.sampled_from(IDS), unique=True, max_size=14)):
        base = whole(checkpoint_id, draw(ages), uid=draw(st.sampled_from("ab")), clock=draw(ages) * draw(st.sampled_from([0, 1])))
        rest = attempt(
            checkpoint_id, *draw(st.lists(ages, max_size=2)), uploads=tuple(draw(st.lists(ages, min_size=1, max_size=2)))
        )
        uses = tuple(ObjectFacts(f"{checkpoint_id}/uses/{MINE}", 0, NOW - age) for age in draw(st.lists(ages, max_size=1)))
        marks = {each: ObjectFacts(f"{checkpoint_id}/refs/{each}", 0, NOW - draw(ages)) for each in draw(referrers)}
        uses += tuple(facts for each, facts in marks.items() if each < checkpoint_id)  # none refers to who refers to it
        strange = (ObjectFacts(f"{checkpoint_id}/theirs", 1, NOW - 60 * DAY),) if draw(st.integers(0, 9)) == 0 else ()
        kind = draw(st.sampled_from(["whole", "whole", "attempt", "unreadable"]))
        objects = (rest.objects if kind == "attempt" else base.objects) + uses + strange
        found.append(
            Place(
                checkpoint_id,
                objects,
                rest.uploads if draw(st.booleans()) or not objects else (),
                base.manifest if kind == "whole" else None,
                UNREADABLE[0] if kind == "unreadable" else None,
            )
        )
    marked = {each: place.checkpoint_id for place in found for each in place.marks}  # of one of those; and what it means is drawn
    refer = {place.checkpoint_id for place in found if place.manifest and place.checkpoint_id in marked and draw(st.booleans())}
    return [referring(each, marked[each.checkpoint_id]) if each.checkpoint_id in refer else each for each in found]


@given(stores(), policies, st.sets(st.sampled_from(IDS), max_size=3), st.randoms(use_true_random=False))
def test_the_rule_holds_for_any_store(found: list[Place], policy: Retention, in_use: set[str], order: random.Random) -> None:
    removals = plan(found, NOW, policy, in_use)
    believed = [place for place in found if place.manifest is not None]
    for removal in removals:
        place, manifest = removal.place, removal.place.manifest
        assert removal.age >= policy.grace
        if removal.what == "mark":
            continue
        assert place.checkpoint_id not in in_use
        assert not any(f.key.startswith(f"{place.checkpoint_id}/uses/") and NOW - f.modified < DAY for f in place.objects)
        assert place.trouble is None
        assert not any(facts.key.endswith("theirs") for facts in place.objects)
        if manifest is None:
            assert max((*(f.modified for f in place.objects), *(u.began for u in place.uploads))) <= NOW - policy.grace
        if removal.what == "checkpoint":
            assert manifest is not None
            assert policy.keep_last or policy.keep_days
            assert min(NOW - manifest.created_at, NOW - place.committed) >= max(policy.grace, policy.keep_days * DAY)
            newer = [each for each in believed if each.manifest and each.manifest.workload.uid == manifest.workload.uid]
            assert sum(each.committed >= place.committed for each in newer) > policy.keep_last
            assert sum(each.created >= place.created for each in newer) > policy.keep_last
    gone = [each.place.checkpoint_id for each in removals if each.what in ("attempt", "checkpoint")]
    bases = {place.checkpoint_id: place.bases if place.manifest else None for place in found if place.manifest or place.trouble}

    def may_refer(referrer: str, base: str) -> bool:
        return referrer in bases and (bases[referrer] is None or base in (bases[referrer] or ()))

    for place in found:
        for referrer in {f.key.rpartition("/")[2] for f in place.objects if "/refs/" in f.key} & bases.keys():
            if place.checkpoint_id in gone and may_refer(referrer, place.checkpoint_id):
                assert referrer in gone[: gone.index(place.checkpoint_id)], "who refers goes first, or it stays"
    taken = [each.key.split("/refs/") for each in removals if each.what == "mark"]
    assert not [pair for pair in taken if may_refer(pair[1], pair[0])]
    told = [(each.what, each.place.checkpoint_id, each.key or (each.upload.id if each.upload else "")) for each in removals]
    assert len(set(told)) == len(told)
    shuffled = order.sample(found, len(found))
    assert plan(shuffled, NOW, policy, in_use) == removals


# --- what goes: in a store ----------------------------------------------------------------------------------------------------


def finished(rig: Rig) -> str:
    """A checkpoint whose action has come to its end; its id."""
    checkpoint_id = rig.checkpoint()
    for entry in rig.node.journal.all():
        entry.update(phase="done")
    return checkpoint_id


def collected(rig: Rig, *, apply: bool = True, **rules: float) -> list[Garbage]:
    told: list[Garbage] = []
    gc.collect(rig.node, rig.store, Retention.model_validate({"grace": 0, **rules}), told.append, Cancel(), apply=apply)
    return told


def said(told: list[Garbage]) -> list[tuple[str, str, str]]:
    return [(each.what, each.checkpoint_id, each.state) for each in told]


def test_a_dry_run_removes_nothing_and_tells_what_apply_removes(rig: Rig) -> None:
    for _ in range(3):
        finished(rig)
    shipped(rig.store, OTHER)
    before = dict(rig.store.objects)
    dry = collected(rig, apply=False, keep_last=1)
    assert (rig.store.objects, len(rig.store.uploads)) == (before, 1)
    assert {each.state for each in dry} == {"found"}
    done = collected(rig, keep_last=1)
    assert [(each.what, each.checkpoint_id, each.key) for each in done] == [(e.what, e.checkpoint_id, e.key) for e in dry]
    assert {each.state for each in done} == {"removed"}
    assert len(list(catalog.manifests(rig.store, rig.node.notary))) == 1
    assert (len(rig.store.objects), rig.store.uploads) == (len(before) - 2 - 2 * (len(before) - 2) // 3, [])
    assert collected(rig, keep_last=1) == []


def test_sizes_and_names_are_told(rig: Rig) -> None:
    finished(rig)
    size = sum(map(len, rig.store.objects.values()))
    (told,) = collected(rig, apply=False, keep_days=1e-9)
    assert (told.what, told.bytes, told.reason, bool(told.workload)) == ("checkpoint", size, "too_old", True)
    assert 0 <= told.age < 60


def test_what_this_node_works_on_stays(rig: Rig) -> None:
    """By its claim, which is held while something is removed; the claim of one says nothing of others."""
    first, second = finished(rig), finished(rig)
    with rig.node.claims.claim(f"checkpoint {first}", MINE):
        told = collected(rig, keep_days=1e-9)
    assert sorted(said(told)) == sorted([("checkpoint", first, "in_use"), ("checkpoint", second, "removed")])
    assert "claim" not in "".join(rig.leftovers(second))


def test_what_another_node_restores_cannot_be_deleted(rig: Rig) -> None:
    checkpoint_id = finished(rig)
    with gc.using(rig.store, checkpoint_id, OTHER), pytest.raises(Busy, match="uses"):
        gc.remove(rig.store, rig.node.notary, checkpoint_id)
    assert not [key for key in keys(rig.store) if "removing" in key]
    gc.remove(rig.store, rig.node.notary, checkpoint_id)
    assert not rig.store.objects
    with pytest.raises(NotFound):
        gc.remove(rig.store, rig.node.notary, checkpoint_id)


def test_what_an_open_entry_of_the_journal_names_is_not_even_planned(rig: Rig) -> None:
    checkpoint_id = finished(rig)
    shipped(rig.store, OTHER)
    rig.node.journal.all()[0].update(checkpoint_id=OTHER, phase="shipping")
    assert said(collected(rig, keep_days=1e-9)) == [("checkpoint", checkpoint_id, "removed")]
    assert len(rig.store.uploads) == 1


def test_an_action_that_begins_meanwhile_keeps_what_it_names(rig: Rig) -> None:
    """Its entry is written long before it claims anything: a restore reads the manifest first."""
    ids = sorted(finished(rig) for _ in range(2))
    told: list[Garbage] = []

    def tell(garbage: Garbage) -> None:
        told.append(garbage)
        rig.node.journal.begin(RestoreCommand(action_id=OTHER, checkpoint_id=ids[1]))

    gc.collect(rig.node, rig.store, Retention(grace=0, keep_days=1e-9), tell, Cancel(), apply=True)
    assert said(told) == [("checkpoint", ids[0], "removed"), ("checkpoint", ids[1], "in_use")]


def test_one_that_cannot_be_removed_keeps_no_other(rig: Rig) -> None:
    ids = sorted(finished(rig) for _ in range(3))
    rig.rescript(Script())
    collected(rig, apply=False, keep_days=1e-9)
    asked = len(rig.script.calls)
    rig.rescript(Script(fail_at=asked + 1))
    told = collected(rig, keep_days=1e-9)
    assert said(told) == [("checkpoint", ids[0], "failed"), *[("checkpoint", each, "removed") for each in ids[1:]]]
    assert (told[0].code, "scripted failure" in told[0].message) == ("store_unavailable", True)
    assert said(collected(rig, keep_days=1e-9)) == [("checkpoint", ids[0], "removed")]
    assert rig.store.objects == {}


def test_a_removal_that_fails_anywhere_leaves_a_checkpoint_or_none(rig: Rig) -> None:
    """Never a manifest that names what is gone; and the next run takes the rest."""
    steps = 0
    while True:
        checkpoint_id = finished(rig)
        rig.rescript(Script())
        collected(rig, apply=False, keep_days=1e-9)
        rig.rescript(Script(fail_at=len(rig.script.calls) + 1 + steps))
        told = collected(rig, keep_days=1e-9)
        failed, script = bool(rig.script.failed), Script()
        rig.rescript(script)
        if f"{checkpoint_id}/manifest.json" in rig.store.objects:
            assert rig.whole(checkpoint_id)
        collected(rig, keep_days=1e-9)
        assert rig.store.objects == {}
        if not failed:
            assert [each.state for each in told] == ["removed"]
            break
        steps += 1
    assert steps >= 6


def test_a_restore_that_begins_while_it_is_removed_is_seen_or_sees_it(rig: Rig) -> None:
    """At each step of a removal another node begins to use the checkpoint: one of the two gives way."""

    class Meeting(Script):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.at, self.restore, self.lease = at, "nobody", ExitStack()

        def step(self, name: str) -> None:
            super().step(name)
            if len(self.calls) == self.at:
                self.at = 0
                try:
                    self.lease.enter_context(gc.using(rig.store, checkpoint_id, OTHER))
                    self.restore = "used"
                except (Busy, NotFound) as e:
                    self.restore = e.code

    seen = set()
    for at in range(1, 30):
        checkpoint_id = finished(rig)
        meeting = Meeting(at)
        rig.rescript(meeting)
        told = collected(rig, keep_days=1e-9)
        there = rig.store.objects.keys() >= {f"{checkpoint_id}/manifest.json"}
        seen.add((meeting.restore, told[0].state if told else "not found", there))
        meeting.lease.close()
        rig.rescript(Script())
        rig.store.objects.clear()
    assert seen == {
        ("used", "not found", True),
        ("used", "in_use", True),
        ("busy", "removed", False),
        ("nobody", "removed", False),
    }


def test_an_attempt_that_goes_on_meanwhile_stays(rig: Rig) -> None:
    shipped(rig.store, OTHER)
    place = gc.look(rig.store, rig.node.notary)[0]
    rig.store.put(f"{OTHER}/manifest.json", b"{}")
    removal = Removal("attempt", place, 1.0, "no_manifest")
    assert gc._remove(rig.node, rig.store, removal).state == "in_use"
    assert len(rig.store.objects) == 3


def test_what_cannot_be_read_is_told(rig: Rig) -> None:
    good, bad = finished(rig), finished(rig)
    key = f"{bad}/manifest.json"
    rig.store.objects[key] = rig.store.objects[key][:-9] + b"damaged!}"
    before = dict(rig.store.objects)
    (told,) = collected(rig, keep_last=1)
    assert (told.checkpoint_id, told.state, told.reason, told.code) == (bad, "kept", "unreadable", "corrupt")
    assert rig.store.objects == before
    assert good in {key.partition("/")[0] for key in before}


@pytest.mark.parametrize("name", ["refs", "uses"])
def test_a_container_may_be_called_as_our_marks_are(rig: Rig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its objects are neither marks of others, nor do they say that somebody uses it."""
    monkeypatch.setattr(machine, "MAIN", name)
    checkpoint_id = finished(rig)
    assert f"{checkpoint_id}/{name}/index.zst" in rig.store.objects
    later(rig)
    assert collected(rig) == []
    assert rig.whole(checkpoint_id)
    rig.end_of_original()
    rig.restore(checkpoint_id)
    rig.store.upload(f"{checkpoint_id}/{name}/pages-7.zst").write(b"more")
    rig.store.put(f"{checkpoint_id}/attempt", MINE.encode())
    gc.sweep(rig.store, checkpoint_id, MINE)
    assert rig.store.uploads == [], "of an attempt that was committed, and is nobody's mark"
    gc.remove(rig.store, rig.node.notary, checkpoint_id)
    assert not any(key.startswith(checkpoint_id) for key in rig.store.objects)


@pytest.mark.parametrize("wrong", ["gone", "short", "base"])
def test_who_could_not_be_restored_pushes_nothing_out_and_is_told(tmp_path: Path, wrong: str) -> None:
    rig = Rig(tmp_path, memory(200))
    good = finished(rig)
    base = rig.checkpoint(criu_opts='{"increment": "auto"}')
    bad = rig.checkpoint(criu_opts=json.dumps({"increment": base}))
    for entry in rig.node.journal.all():
        entry.update(phase="done")
    lost = {"gone": f"{bad}/main/index.zst", "short": f"{bad}/main/images.tar.zst", "base": f"{base}/main/pages-0.zst"}[wrong]
    data = rig.store.objects.pop(lost)
    if wrong == "short":
        rig.store.objects[lost] = data[:-1]
    told = collected(rig, keep_last=1)
    kept = {each.checkpoint_id for each in told if (each.state, each.reason, each.code) == ("kept", "unreadable", "corrupt")}
    assert kept == ({bad, base} if wrong == "base" else {bad})
    assert rig.whole(good) == (wrong == "base"), "the base is the last that is whole, and of two ids the later"
    assert {bad, base} <= {manifest.checkpoint_id for manifest in catalog.manifests(rig.store, rig.node.notary)}


def test_what_was_deleted_goes_though_it_could_not_be_restored(rig: Rig) -> None:
    """Its last referrer went, and nobody came to take it with him."""
    checkpoint_id = finished(rig)
    rig.store.put(f"{checkpoint_id}/unwanted", b"")
    del rig.store.objects[f"{checkpoint_id}/main/index.zst"]
    assert ("checkpoint", checkpoint_id, "removed") in said(collected(rig))
    assert not rig.store.objects


def later(rig: Rig) -> None:
    """In two days."""
    for key in rig.store._modified:
        rig.store._modified[key] -= 2 * 86400.0


def test_other_keys_are_never_touched(rig: Rig) -> None:
    others = ["readme", "check-0123", "data/file", f"{MINE[:-1]}/main/index.zst", f"{MINE.upper()}/main/index.zst", f"x{MINE}/a"]
    for key in [*others, f"{OTHER}/theirs", f"{OTHER}/main/index.zst"]:
        rig.store.put(key, b"data")
    rig.store.upload("data/upload").write(b"data")
    before = dict(rig.store.objects)
    (told,) = collected(rig, keep_last=1, keep_days=1e-9)
    assert (rig.store.objects, len(rig.store.uploads)) == (before, 1)
    assert (told.checkpoint_id, told.key, told.reason, told.state) == (OTHER, f"{OTHER}/theirs", "foreign", "kept")


def test_whoever_stops_listening_stops_it(rig: Rig) -> None:
    for _ in range(3):
        finished(rig)
    cancel, told = Cancel(), list[Garbage]()

    def tell(garbage: Garbage) -> None:
        told.append(garbage)
        cancel.set("nobody waits for it any more")

    with pytest.raises(Cancelled):
        gc.collect(rig.node, rig.store, Retention(grace=0, keep_days=1e-9), tell, cancel, apply=True)
    assert len(told) == 1
    assert len(list(catalog.manifests(rig.store, rig.node.notary))) == 2


def test_a_rule_that_is_asked_for_stands_for_the_configured_one() -> None:
    configured = Retention(grace=1, keep_last=2, keep_days=3)
    assert gc.policy(configured, GarbageRequest()) == configured
    assert gc.policy(configured, GarbageRequest(grace=0.0, keep_last=0, keep_days=0.0)) == Retention(grace=0)


# --- others refer to it -------------------------------------------------------------------------------------------------------


def referred(place: Place, *marks: tuple[str, float], **objects: float) -> Place:
    """With marks of these: (whose, age); and other objects by age."""
    more = [ObjectFacts(f"{place.checkpoint_id}/refs/{who}", 0, NOW - age) for who, age in marks]
    more += [ObjectFacts(f"{place.checkpoint_id}/{name}", 0, NOW - age) for name, age in objects.items()]
    return dataclasses.replace(place, objects=(*place.objects, *more))


def referring(place: Place, *bases: str) -> Place:
    """Its manifest names these bases."""
    assert place.manifest is not None
    (image,) = place.manifest.images
    refs = [
        BaseRef(name="main", pages=1, zero_pages=0, streams=[], index=image.index, digests=image.index, checkpoint_id=base)
        for base in bases
    ]
    images = [image.model_copy(update={"bases": refs, "referenced": 1})]
    return dataclasses.replace(place, manifest=place.manifest.model_copy(update={"images": images}))


def test_who_is_referred_to_by_one_that_stays_stays_and_goes_after_one_that_goes() -> None:
    base, other = referred(whole(IDS[0], 30 * DAY), (IDS[5], 20 * DAY)), referring(whole(IDS[5], 20 * DAY), IDS[0])
    assert by("10 days", base, referring(whole(IDS[5], 5 * DAY), IDS[0])) == []
    assert by("10 days", base, other) == [("checkpoint", IDS[5], "too_old"), ("checkpoint", IDS[0], "too_old")]
    assert by("10 days", base, other, in_use=(IDS[5],)) == []
    assert by("10 days", base, Place(IDS[5], other.objects, (), None, UNREADABLE[0])) == []
    young = Place(IDS[5], (ObjectFacts(f"{IDS[5]}/attempt", 0, NOW - HOUR),))
    assert by("10 days", base, young) == []


def test_a_chain_of_which_the_last_stays_stays_whole() -> None:
    first = referred(whole(IDS[0], 30 * DAY), (IDS[1], 29 * DAY), (IDS[2], DAY))
    second = referred(referring(whole(IDS[1], 29 * DAY), IDS[0]), (IDS[2], DAY))
    third = referring(whole(IDS[2], DAY), IDS[0], IDS[1])
    assert by("10 days", first, second, third) == []
    assert gone(plan([first, second, third], NOW, Retention(keep_last=1, grace=0), ())) == []


def test_a_manifest_protects_its_base_whose_mark_is_lost() -> None:
    base = whole(IDS[0], 30 * DAY)
    assert by("10 days", base, referring(whole(IDS[5], 5 * DAY), IDS[0])) == []


def test_a_mark_of_nobody_keeps_nothing_and_goes() -> None:
    base = referred(whole(IDS[0], 30 * DAY), (IDS[5], 20 * DAY))
    assert by("10 days", base) == [("checkpoint", IDS[0], "too_old")]
    (mark,) = plan([base], NOW, Retention(), ())
    assert (mark.what, mark.key, mark.reason) == ("mark", f"{IDS[0]}/refs/{IDS[5]}", "no_referrer")
    assert by("none", referred(whole(IDS[0], 30 * DAY), (IDS[5], HOUR))) == []


def test_a_mark_of_one_that_does_not_refer_after_all_keeps_nothing_and_goes() -> None:
    """It might have, until it was committed; a crash, or a store that was away, has left the mark. Who cannot be read may refer."""
    base, other = referred(whole(IDS[0], 30 * DAY), (IDS[5], 20 * DAY)), whole(IDS[5], 20 * DAY)
    assert by("none", base, other) == [("mark", IDS[0], "no_referrer")]
    assert by("none", base, referring(other, IDS[0])) == []
    assert by("none", base, Place(IDS[5], other.objects, (), None, UNREADABLE[0])) == []
    assert ("checkpoint", IDS[0], "too_old") in by("10 days", base, whole(IDS[5], 5 * DAY))


def test_nor_does_it_in_a_store(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(40))
    first, second = chained(rig, 2)
    rig.store.put(f"{second}/refs/{first}", b"")  # it was to be taken back when that was committed without it
    assert said(collected(rig)) == [("mark", second, "removed")]
    rig.store.put(f"{second}/refs/{first}", b"")
    gc.remove(rig.store, rig.node.notary, second)
    gc.remove(rig.store, rig.node.notary, first)
    assert rig.store.objects == {}


def test_what_was_deleted_while_it_was_needed_goes_when_it_is_not() -> None:
    base = referred(whole(IDS[0], 3 * DAY), (IDS[5], 2 * DAY), unwanted=DAY)
    assert by("none", base, referring(whole(IDS[5], 2 * DAY), IDS[0])) == []
    assert by("none", base) == [("checkpoint", IDS[0], "unwanted")]
    assert by("none", base, in_use=(IDS[0],)) == [("mark", IDS[0], "no_referrer")]


def test_a_circle_that_nobody_of_us_wrote_is_no_endless_loop() -> None:
    a, b = referred(whole(IDS[0], 30 * DAY), (IDS[1], 20 * DAY)), referred(whole(IDS[1], 30 * DAY), (IDS[0], 20 * DAY))
    assert len(by("10 days", a, b)) == 2


def test_layers_and_digests_are_ours() -> None:
    for key in ("layer-0.zst", "layer-index.zst", "digests.zst"):
        place = Place(IDS[0], (ObjectFacts(f"{IDS[0]}/main/{key}", 10, NOW - 9 * DAY),))
        assert by("none", place) == [("attempt", IDS[0], "no_manifest")]


def test_marks_are_there_while_it_is_made_and_those_that_are_needed_afterwards(store: MemoryStore) -> None:
    for each in IDS[:2]:
        store.put(f"{each}/manifest.json", b"{}")
    with gc.referring(store, NOTARY, IDS[:2], CHECKPOINT) as references:
        assert keys(store) == sorted(f"{each}/{name}" for each in IDS[:2] for name in ("manifest.json", f"refs/{CHECKPOINT}"))
        made = referring(whole(CHECKPOINT, 0), IDS[1]).manifest
        assert made is not None
        store.put(f"{CHECKPOINT}/attempt", made.action_id.encode())
        with references.committing(store, made):
            store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    store.delete(f"{CHECKPOINT}/attempt")
    store.delete(f"{CHECKPOINT}/manifest.json")
    assert keys(store) == [f"{IDS[0]}/manifest.json", f"{IDS[1]}/manifest.json", f"{IDS[1]}/refs/{CHECKPOINT}"]


def test_an_attempt_that_another_node_has_collected_meanwhile_is_not_committed(store: MemoryStore) -> None:
    """Nor one of which a base has gone; a mark that is missing is put again."""
    made = referring(whole(CHECKPOINT, 0), IDS[0]).manifest
    assert made is not None
    store.put(f"{IDS[0]}/manifest.json", b"{}")
    with pytest.raises(Busy, match="attempt"), gc.References(IDS[:1]).committing(store, made):
        raise AssertionError("never reached")
    store.put(f"{CHECKPOINT}/attempt", made.action_id.encode())
    store.delete(f"{IDS[0]}/refs/{CHECKPOINT}")
    with gc.References(IDS[:1]).committing(store, made):
        assert f"{IDS[0]}/refs/{CHECKPOINT}" in keys(store)
    store.delete(f"{IDS[0]}/manifest.json")
    with pytest.raises(NotFound), gc.References(IDS[:1]).committing(store, made):
        raise AssertionError("never reached")


def test_who_is_unwanted_goes_with_an_attempt_that_comes_to_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(8))
    (base,) = chained(rig, 1)
    with gc.attempting(rig.store, OTHER, MINE), gc.referring(rig.store, rig.node.notary, [base], OTHER):
        gc.remove(rig.store, rig.node.notary, base, later=True)
        assert f"{base}/unwanted" in [facts.key for facts in rig.store.list()]
    assert not list(rig.store.list())


def test_of_what_fails_no_mark_stays_but_of_what_may_be_there(store: MemoryStore) -> None:
    store.put(f"{IDS[0]}/manifest.json", b"{}")
    left_with(Internal("no"), gc.referring(store, NOTARY, IDS[:1], CHECKPOINT))
    assert keys(store) == [f"{IDS[0]}/manifest.json"]
    left_with(OutcomeUnknown("nobody knows"), gc.referring(store, NOTARY, IDS[:1], CHECKPOINT))
    assert keys(store) == [f"{IDS[0]}/manifest.json", f"{IDS[0]}/refs/{CHECKPOINT}"]
    store.put(f"{CHECKPOINT}/manifest.json", b"{}")
    left_with(Internal("nobody could be told"), gc.referring(store, NOTARY, IDS[:1], CHECKPOINT))
    assert f"{IDS[0]}/refs/{CHECKPOINT}" in keys(store)


def test_who_is_gone_or_goes_is_not_referred_to(store: MemoryStore) -> None:
    store.put(f"{IDS[0]}/manifest.json", b"{}")
    for error, base in ((NotFound, IDS[1]), (Busy, IDS[0])):
        if error is Busy:
            store.put(f"{IDS[0]}/removing", b"")
        with pytest.raises(error), gc.referring(store, NOTARY, [base], CHECKPOINT):
            raise AssertionError("never reached")
        assert not [key for key in keys(store) if "/refs/" in key]


def test_a_store_that_takes_no_mark_is_not_referred_to() -> None:
    with pytest.raises(StoreUnavailable), gc.referring(MemoryStore(Script(fail_at=1)), NOTARY, IDS[:1], CHECKPOINT):
        raise AssertionError("never reached")


def chained(rig: Rig, count: int = 3) -> list[str]:
    """So many, each with pages of all before it."""
    ids = [rig.checkpoint(criu_opts='{"increment": "auto"}')]
    for n in range(1, count):
        rig.machine.runs = [*rig.machine.runs, *memory(20, seed=n + 1)]
        ids.append(rig.checkpoint(criu_opts=json.dumps({"increment": ids[-1]})))
    for entry in rig.node.journal.all():
        entry.update(phase="done")
    return ids


def test_a_delete_of_what_others_need_is_refused_or_waits_for_them(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(40))
    first, second, third = chained(rig)
    with pytest.raises(Refused) as refused:
        gc.remove(rig.store, rig.node.notary, first)
    assert refused.value.code == "referenced"
    assert set(refused.value.details["found"]) == {second, third}  # type: ignore[call-overload]
    assert rig.whole(first)
    gc.remove(rig.store, rig.node.notary, first, later=True)
    gc.remove(rig.store, rig.node.notary, first, later=True)
    gc.remove(rig.store, rig.node.notary, second, later=True)
    assert all(map(rig.whole, (first, second, third)))
    assert said(collected(rig)) == []
    gc.remove(rig.store, rig.node.notary, third)
    assert rig.store.objects == {}


def test_retention_breaks_no_checkpoint_that_it_keeps(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(40))
    ids = chained(rig)
    assert said(collected(rig, keep_last=1)) == []
    rig.checkpoint()
    for entry in rig.node.journal.all():
        entry.update(phase="done")
    assert said(collected(rig, keep_last=1)) == [("checkpoint", each, "removed") for each in reversed(ids)]
    assert len({key.partition("/")[0] for key in rig.store.objects}) == 1


def test_who_begins_to_refer_while_it_is_removed_is_seen_or_sees_it(tmp_path: Path) -> None:
    """At each step of a removal another node begins an increment of it: one of the two gives way, and none is broken."""
    rig = Rig(tmp_path, memory(8))

    class Meeting(Script):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.at, self.made, self.lease = at, "nobody", ExitStack()

        def step(self, name: str) -> None:
            super().step(name)
            if len(self.calls) == self.at:
                self.at = 0
                try:
                    self.lease.enter_context(gc.attempting(rig.store, OTHER, MINE))
                    self.lease.enter_context(gc.referring(rig.store, NOTARY, [base], OTHER))
                    self.made = "referred"
                except (Busy, NotFound) as e:
                    self.made = e.code

    seen = set()
    for at in range(1, 30):
        (base,) = chained(rig, 1)
        meeting = Meeting(at)
        rig.rescript(meeting)
        try:
            gc.remove(rig.store, rig.node.notary, base)
            removed = "removed"
        except Refused as e:
            removed = e.code
        rig.rescript(Script())
        assert (meeting.made == "referred") <= rig.whole(base)
        seen.add((meeting.made, removed))
        with contextlib.suppress(Internal), meeting.lease:
            raise Internal("over")
        rig.store.objects.clear()
    assert seen - {("not_found", "removed")} == {("referred", "referenced"), ("busy", "removed"), ("nobody", "removed")}
