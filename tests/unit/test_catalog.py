"""Checkpoints as a whole: the manifest is the checkpoint, written last, removed first."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from hibernode import catalog
from hibernode.config import Signing
from hibernode.drivers.notary import Notary
from hibernode.errors import Corrupt, NoAnswer, NotFound, OutcomeUnknown, Refused, StoreUnavailable
from hibernode.model import PAGE, Cancel, HostFacts, ImageRef, Manifest, ObjectRef, StreamRef, TaskFacts, WorkloadFacts
from hibernode.transfer import format
from tests.fakes.script import Script
from tests.fakes.store import MemoryStore

NOBODY = Notary(Signing())  # signs nothing, asks for nothing
NAMES = ("pages-0.zst", "index.zst", "images.tar.zst")


def stored(script: Script | None = None, *, commit: bool = True) -> tuple[MemoryStore, Manifest]:
    """A store with a checkpoint whose objects are only as long as they should be."""
    store, made = MemoryStore(script), str(uuid.uuid4())
    for name in NAMES:
        upload = store.upload(f"{made}/main/{name}")
        upload.write(b"x" * 20)
        upload.commit()
    stream, index, files = (ObjectRef(key=f"main/{name}", size=20, digest="0" * 64) for name in NAMES)
    image = ImageRef(
        name="main", tasks=[TaskFacts(pid=7)], pages=0, zero_pages=0, streams=[StreamRef(**stream.model_dump(), frames=0)],
        index=index, files=files,
    )  # fmt: skip
    manifest = Manifest(
        format_version=1, checkpoint_id=made, action_id=made, created_at=1.0, node="n", kind="simple", reason="manual",
        workload=WorkloadFacts(kind="job", name="a"), host=HostFacts(arch="x", kernel="6", page_size=PAGE, criu_version=40201),
        compression="zstd", pause_ns=0, raw_bytes=0, zero_bytes=0, stored_bytes=0, images=[image],
    )  # fmt: skip
    if commit:
        catalog.commit(store, manifest, NOBODY, Cancel())
    return store, manifest


def key(manifest: Manifest) -> str:
    return f"{manifest.checkpoint_id}/manifest.json"


def test_a_committed_checkpoint_can_be_read() -> None:
    store, manifest = stored()
    assert catalog.read(store, manifest.checkpoint_id, NOBODY) == manifest
    assert list(catalog.manifests(store, NOBODY)) == [manifest]


def test_the_manifest_is_written_after_every_object_was_seen_and_is_read_back() -> None:
    script = Script()
    store, manifest = stored(script, commit=False)
    script.calls.clear()
    catalog.commit(store, manifest, NOBODY, Cancel())
    assert script.calls == [*(f"store.stat {name}" for name in NAMES), "store.put manifest.json", "store.get manifest.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [lambda _: None, lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_nothing_is_committed_that_is_not_all_there(name: str, damage: Callable[[bytes], bytes | None]) -> None:
    store, manifest = stored(commit=False)
    object_key = f"{manifest.checkpoint_id}/main/{name}"
    data = damage(store.objects.pop(object_key))
    if data is not None:
        store.objects[object_key] = data
    with pytest.raises(Corrupt, match=name):
        catalog.commit(store, manifest, NOBODY, Cancel())
    assert key(manifest) not in store.objects


def test_an_existing_checkpoint_is_neither_replaced_nor_removed() -> None:
    store, manifest = stored()
    before = store.objects[key(manifest)]
    with pytest.raises(Refused) as refused:
        catalog.commit(store, manifest.model_copy(update={"node": "other"}), NOBODY, Cancel())
    assert refused.value.code == "exists"
    assert store.objects[key(manifest)] == before
    with pytest.raises(Refused):
        catalog.insist_new(store, manifest.checkpoint_id)
    catalog.insist_new(store, str(uuid.uuid4()))


def test_an_id_with_parts_of_an_unfinished_checkpoint_is_not_new() -> None:
    """Else it would be refused after the dump: no object is ever replaced."""
    store, manifest = stored(commit=False)
    with pytest.raises(Refused, match="parts") as refused:
        catalog.insist_new(store, manifest.checkpoint_id)
    assert refused.value.code == "exists"


def test_the_manifest_of_another_action_is_not_withdrawn() -> None:
    """It appears at the moment of our own put, whose answer is lost."""
    store, manifest = stored(commit=False)
    theirs = format.encode_manifest(manifest.model_copy(update={"action_id": str(uuid.uuid4())}), NOBODY)

    class Races(Lies):
        def put(self, key: str, data: bytes) -> None:
            super(Lies, self).put(key, theirs)
            raise StoreUnavailable("no answer")

    with pytest.raises(StoreUnavailable):
        catalog.commit(Races(store), manifest, NOBODY, Cancel())
    assert store.objects[key(manifest)] == theirs


class Lies(MemoryStore):
    """What is read is not what was written; or the answer to a write is lost; and a delete may fail so many times."""

    def __init__(
        self, source: MemoryStore, *, flip: bool = False, lose: type[StoreUnavailable] | None = None, deletes_fail: int = 0
    ) -> None:
        super().__init__()
        self.objects, self._modified = source.objects, source._modified
        self._flip, self._lose, self._deletes_fail = flip, lose, deletes_fail

    def get(self, key: str, *, limit: int) -> bytes:
        data = super().get(key, limit=limit)
        return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:] if self._flip else data

    def put(self, key: str, data: bytes) -> None:
        super().put(key, data)
        if self._lose is not None:
            raise self._lose("no answer")

    def delete(self, key: str) -> None:
        if self._deletes_fail:
            self._deletes_fail -= 1
            raise StoreUnavailable("no delete")
        super().delete(key)


@pytest.mark.parametrize("deletes_fail", [0, 1, 2])
@pytest.mark.parametrize(("fault", "error"), [({"flip": True}, Corrupt), ({"lose": StoreUnavailable}, StoreUnavailable)])
def test_a_manifest_in_doubt_is_removed(fault: dict[str, Any], error: type[Exception], deletes_fail: int) -> None:
    store, manifest = stored(commit=False)
    with pytest.raises(error):
        catalog.commit(Lies(store, **fault, deletes_fail=deletes_fail), manifest, NOBODY, Cancel())
    assert key(manifest) not in store.objects


def test_where_a_manifest_may_still_come_what_it_names_stays() -> None:
    """A request that was given up may be carried out, by a store behind a network, when nobody waits for it any more."""
    store, manifest = stored(commit=False)
    before = set(store.objects)
    with pytest.raises(OutcomeUnknown):
        catalog.commit(Lies(store, lose=NoAnswer), manifest, NOBODY, Cancel())
    assert set(store.objects) == before, "the manifest was removed, and nothing else"


def test_a_manifest_in_doubt_that_cannot_be_removed_is_told() -> None:
    store, manifest = stored(commit=False)
    with pytest.raises(OutcomeUnknown) as raised:
        catalog.commit(Lies(store, lose=StoreUnavailable, deletes_fail=100), manifest, NOBODY, Cancel())
    assert raised.value.code == "outcome_unknown"
    assert "no answer" in raised.value.message
    assert raised.value.hint


# --- read -------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_is_not_found_with_the_place() -> None:
    store, _ = stored()
    with pytest.raises(NotFound, match="memory:///") as raised:
        catalog.read(store, str(uuid.uuid4()), NOBODY)
    assert raised.value.hint


def test_a_manifest_of_another_checkpoint_is_corrupt() -> None:
    """Copied, or moved by hand."""
    store, manifest = stored()
    other = str(uuid.uuid4())
    store.objects[f"{other}/manifest.json"] = store.objects[key(manifest)]
    with pytest.raises(Corrupt, match=other):
        catalog.read(store, other, NOBODY)


def test_a_manifest_too_large_is_corrupt_unread() -> None:
    store, manifest = stored()
    store.objects[key(manifest)] = b" " * (format.MAX_MANIFEST + 1)
    with pytest.raises(Corrupt):
        catalog.read(store, manifest.checkpoint_id, NOBODY)


def test_a_list_leaves_out_what_cannot_be_read() -> None:
    store, manifest = stored()

    def put(name: str, data: bytes) -> None:
        store.objects[name], store._modified[name] = data, 1.0

    put(f"{uuid.uuid4()}/manifest.json", b"damaged")
    put(f"{uuid.uuid4()}/manifest.json", b'{"format_version": 99}')
    put(f"{uuid.uuid4()}/main/index.zst", b"of an attempt that failed")
    put(f"{uuid.uuid4()}/main/manifest.json", store.objects[key(manifest)])
    put("manifest.json", store.objects[key(manifest)])
    assert list(catalog.manifests(store, NOBODY)) == [manifest]


def test_one_that_goes_away_during_a_list_is_left_out() -> None:
    store, manifest = stored()

    class Vanishes(Script):
        def step(self, name: str) -> None:
            if name == "store.get manifest.json":
                store.objects.pop(key(manifest), None)

    store._script = Vanishes()
    assert list(catalog.manifests(store, NOBODY)) == []


def test_a_store_that_is_away_is_no_empty_list() -> None:
    store, _ = stored()
    store._script = Script(2)
    with pytest.raises(StoreUnavailable):
        list(catalog.manifests(store, NOBODY))


# --- delete -----------------------------------------------------------------------------------------------------------------


def test_the_manifest_goes_first() -> None:
    script = Script()
    store, manifest = stored(script)
    other = stored()[0].objects
    store.objects.update(other)
    store._modified.update(dict.fromkeys(other, 1.0))
    script.calls.clear()
    catalog.delete(store, manifest.checkpoint_id)
    deletes = [call for call in script.calls if call.startswith("store.delete")]
    assert deletes[0] == "store.delete manifest.json"
    assert sorted(deletes[1:]) == sorted(f"store.delete {name}" for name in NAMES)
    assert store.objects == other


def test_a_delete_that_stops_half_way_leaves_no_checkpoint() -> None:
    for n in range(1, 7):
        store, manifest = stored()
        before = dict(store.objects)
        store._script = Script(n)
        try:
            catalog.delete(store, manifest.checkpoint_id)
        except StoreUnavailable:
            assert key(manifest) not in store.objects or store.objects == before
        else:
            assert not store.objects


def test_what_is_not_there_cannot_be_deleted() -> None:
    store, _ = stored()
    with pytest.raises(NotFound):
        catalog.delete(store, str(uuid.uuid4()))
