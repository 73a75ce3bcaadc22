"""What nobody needs any more: which of it goes, and that nothing else does."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from hibernode import catalog, gc
from hibernode.drivers.localdir import LocalDir
from hibernode.errors import Busy, Internal, NotFound, OutcomeUnknown, Refused, StoreUnavailable
from tests.fakes.script import Script
from tests.fakes.store import MemoryStore

MINE, OTHER = str(uuid.uuid4()), str(uuid.uuid4())
CHECKPOINT = str(uuid.uuid4())


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


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
