"""A checkpoint and its restore on fakes, bit for bit: sizes, streams, compressions; and lies of CRIU's."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
from pathlib import Path

import pytest

from hibernode import catalog
from hibernode.errors import Busy, Cancelled, Corrupt, DumpFailed, NoRoom, Refused, Stuck
from hibernode.model import PAGE, Cancel, Status
from tests.fakes.criu import Fault
from tests.fakes.machine import memory
from tests.fakes.script import Script
from tests.flow.rig import ARENA, Background, Rig, new_id, nothing_outlives, until

pytestmark = pytest.mark.timeout(30)

ALL = [Status.CHECKPOINT_CREATED, Status.READY]


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
@pytest.mark.parametrize("compression", ["zstd", "none", "zstd:-3", "lz4"])
@pytest.mark.parametrize("pages", [0, 1, 1023, 1024, 1025, 9000])
def test_what_comes_back_is_what_was_there(tmp_path: Path, pages: int, compression: str, streams: int) -> None:
    rig = Rig(tmp_path, memory(pages))
    with nothing_outlives():
        made = rig.checkpoint(compression=compression, streams=streams)
        assert rig.statuses == ALL
        assert rig.machine.alive
        assert not rig.machine.stopped
        assert not rig.leftovers(made)
        rig.end_of_original()
        rig.restore(made)  # FakeCriu compares every page
    assert rig.machine.restored
    assert rig.criu.restores == 1
    assert not rig.leftovers(made)


@pytest.mark.parametrize("pages", [1, 2500])
def test_zero_pages_cost_nothing(tmp_path: Path, pages: int) -> None:
    rig = Rig(tmp_path, memory(pages, zero=True))
    made = rig.checkpoint()
    manifest = catalog.read(rig.store, made, rig.node.notary)
    (image,) = manifest.images
    assert (image.pages, image.zero_pages) == (pages, pages)
    assert sum(stream.frames for stream in image.streams) == 0
    assert (manifest.raw_bytes, manifest.zero_bytes) == (pages * PAGE, pages * PAGE)
    rig.end_of_original()
    rig.restore(made)
    assert rig.machine.restored


def test_an_image_larger_than_the_arena(tmp_path: Path) -> None:
    runs = memory(3 * ARENA.total_bytes // PAGE // 2)
    rig = Rig(tmp_path, runs)
    made = rig.checkpoint(streams=2)
    rig.end_of_original()
    rig.restore(made)
    assert rig.machine.restored
    assert not rig.leftovers(made)


def test_streams_are_plain_zstd(tmp_path: Path) -> None:
    runs = memory(2100)
    rig = Rig(tmp_path, runs)
    made = rig.checkpoint(streams=3)
    raw = b"".join(
        subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True, timeout=20).stdout
        for key, data in rig.store.objects.items()
        if "/pages-" in key
    )
    content = [run.content or b"" for run in runs]
    pages = sorted(page for c in content for i in range(0, len(c), PAGE) if any(page := c[i : i + PAGE]))
    assert sorted(raw[i : i + PAGE] for i in range(0, len(raw), PAGE)) == pages
    assert b"pstree.img" in subprocess.run(
        ["tar", "--use-compress-program=zstd", "-tf", "-"], input=rig.store.objects[f"{made}/main/images.tar.zst"],
        capture_output=True, check=True, timeout=20,
    ).stdout  # fmt: skip


def test_the_profile_and_the_manifest_agree(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(3000))
    manifest = catalog.read(rig.store, rig.checkpoint(streams=2), rig.node.notary)
    objects = {key.split("/", 1)[1]: len(data) for key, data in rig.store.objects.items()}
    (image,) = manifest.images
    assert {ref.key: ref.size for ref in (*image.streams, image.index, image.files)} == {
        key: size for key, size in objects.items() if key != "manifest.json"
    }
    assert manifest.raw_bytes == 3000 * PAGE
    assert manifest.zero_bytes == image.zero_pages * PAGE > 0
    assert manifest.pause_ns == 3000


# --- the end that was asked for ---------------------------------------------------------------------------------------------


def test_killed_only_after_ready(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(1500))
    made = rig.checkpoint(criu_opts='{"leave_running": false}')
    assert rig.statuses == ALL
    assert rig.machine.killed == ["original"]
    order = rig.script.notes
    assert order.index("report ready") < order.index("workload.kill")
    assert "workload.thaw" not in order
    assert not rig.leftovers(made)


def test_what_was_told_ready_and_cannot_be_killed_never_goes_on(tmp_path: Path) -> None:
    """Somebody may restore it from now on: it stays stopped, and the journal says that it is to be killed."""

    class Immortal(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "workload.kill":
                raise OSError(errno.EMFILE, "no descriptors")

    rig = Rig(tmp_path, memory(10), Immortal())
    with pytest.raises(Stuck):
        rig.checkpoint(criu_opts='{"leave_running": false}')
    assert rig.statuses == ALL
    assert rig.machine.stopped
    assert "workload.thaw" not in rig.script.notes
    assert (rig.entry.record.phase, rig.entry.record.kill) == ("killing", True)


def test_who_was_stopped_is_asked_last_of_all(tmp_path: Path) -> None:
    """The wait for room in the arena may be long: who was stopped by its owner before it may run after it."""

    class GoesOn(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name.startswith("store.upload"):
                rig.machine.stopped = False

    rig = Rig(tmp_path, memory(10), GoesOn())
    rig.machine.stopped = True
    rig.checkpoint()
    assert rig.entry.record.trees
    assert not any(tree.stopped for tree in rig.entry.record.trees)


def test_the_manifest_is_written_after_everything_it_names(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(1500))
    rig.checkpoint(streams=2)
    notes = rig.script.notes
    manifest = notes.index("store.put manifest.json")
    assert all(notes.index(note) < manifest for note in notes if note.startswith(("store.commit", "store.write")))
    assert "store.get manifest.json" in notes[manifest : notes.index("report ready")], "it is read back before `ready`"


def test_nothing_is_frozen_before_the_streams_are_open(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(10))
    rig.checkpoint(streams=4)
    notes = rig.script.notes
    opened = [i for i, note in enumerate(notes) if note.startswith("store.upload pages-")]
    assert len(opened) == 4
    assert max(opened) < notes.index("workload.freeze")


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(10))
    made = rig.checkpoint()
    before = dict(rig.store.objects)
    with pytest.raises(Refused) as refused:
        rig.checkpoint(made)
    assert refused.value.code == "exists"
    assert rig.store.objects == before


def test_two_actions_with_one_checkpoint_id_do_not_mix(tmp_path: Path) -> None:
    """The second comes while the first is at work, for another workload: it would write the same objects."""
    rig, other = Rig(tmp_path / "a", memory(2000)), Rig(tmp_path / "b", memory(500, seed=2))
    other.machine.key = "pid 9"
    other.node = dataclasses.replace(other.node, claims=rig.node.claims, open_store=rig.node.open_store)
    made = new_id()
    rig.criu.gate.clear()
    first = Background(lambda: rig.checkpoint(made))
    until(rig.criu.dumping.is_set, "the first dump")
    try:
        with pytest.raises(Busy):
            other.checkpoint(made)
    finally:
        rig.criu.gate.set()
    assert first.result() == made
    with pytest.raises(Refused, match="exists"):
        other.checkpoint(made)
    rig.end_of_original()
    rig.restore(made)
    assert rig.machine.restored


# --- CRIU lies or stops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error"), [("eof", DumpFailed), ("lie", DumpFailed), ("garbage", Corrupt), ("cut", DumpFailed)]
)
@pytest.mark.parametrize("pages", [0, 3000])
def test_a_dump_that_is_not_what_it_says(tmp_path: Path, fault: Fault, error: type[Exception], pages: int) -> None:
    rig = Rig(tmp_path, memory(pages))
    rig.criu.fault = fault
    made = new_id()
    with nothing_outlives(), pytest.raises(error):
        rig.checkpoint(made)
    assert rig.machine.alive
    assert not rig.machine.stopped
    assert not rig.statuses
    assert not rig.leftovers(made)


@pytest.mark.parametrize("pages", [0, 3000])
def test_a_dump_that_hangs_is_ended_by_a_cancel(tmp_path: Path, pages: int) -> None:
    rig = Rig(tmp_path, memory(pages))
    rig.criu.fault = "hang"
    made = new_id()

    with nothing_outlives():
        action = Background(lambda: rig.checkpoint(made))
        until(rig.criu.dumping.is_set, "the dump")
        rig.cancel.set("enough")
        with pytest.raises(Cancelled, match="enough"):
            action.result()
    assert not rig.machine.stopped
    assert not rig.leftovers(made)


# --- restore refuses --------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> tuple[Rig, str]:
    rig = Rig(tmp_path, memory(2500))
    checkpoint_id = rig.checkpoint(streams=2)
    rig.end_of_original()
    return rig, checkpoint_id


@pytest.mark.parametrize("name", ["pages-0.zst", "pages-1.zst", "index.zst", "images.tar.zst"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "gone", "swapped"])
def test_damage_never_reaches_criu(made: tuple[Rig, str], name: str, how: str) -> None:
    rig, checkpoint_id = made
    key = f"{checkpoint_id}/main/{name}"
    data = rig.store.objects[key]
    match how:
        case "flipped":
            rig.store.objects[key] = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        case "truncated":
            rig.store.objects[key] = data[:-1]
        case "longer":
            rig.store.objects[key] = data + b"\0"
        case "gone":
            del rig.store.objects[key]
        case "swapped":
            rig.store.objects[key] = bytes(len(data))
    with nothing_outlives(), pytest.raises(Corrupt):
        rig.restore(checkpoint_id)
    assert rig.criu.restores == 0
    assert not rig.machine.restored
    assert not os_entries(rig)


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_flipped_byte_of_a_stream_is_found_by_verify(made: tuple[Rig, str], at: str) -> None:
    rig, checkpoint_id = made
    told = []
    catalog.verify(rig.store, checkpoint_id, rig.node.notary, rig.node.keyring, 2, Cancel(), told.append)
    key = f"{checkpoint_id}/main/pages-0.zst"
    data = bytearray(rig.store.objects[key])
    data[0 if at == "first" else 5000] ^= 0x80
    rig.store.objects[key] = bytes(data)
    with pytest.raises(Corrupt):
        catalog.verify(rig.store, checkpoint_id, rig.node.notary, rig.node.keyring, 2, Cancel(), told.append)
    assert len(told) == 1


def test_pids_must_be_free(made: tuple[Rig, str]) -> None:
    rig, checkpoint_id = made
    rig.machine.alive = True
    with pytest.raises(Refused) as refused:
        rig.restore(checkpoint_id)
    assert refused.value.code == "pid_taken"
    assert rig.criu.restores == 0


def test_a_full_tmpfs_is_no_room(made: tuple[Rig, str]) -> None:
    rig, checkpoint_id = made
    rig.machine.room = 1 << 20
    with pytest.raises(NoRoom):
        rig.restore(checkpoint_id)


def os_entries(rig: Rig) -> list[str]:
    work = rig.node.config.work_dir
    return [path.name for path in work.iterdir()] if work.exists() else []
