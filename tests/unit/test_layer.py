"""Writable layers without a mount: the way through a store, what damage does to it, and tars of enemies."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hibernode.errors import Cancelled, Corrupt, DumpFailed, HibernodeError, NoRoom, Refused, RestoreFailed, StoreUnavailable
from hibernode.flow import Threads
from hibernode.model import MAX_ENTRIES, PAGE, Cancel, Meter
from hibernode.transfer import layer as layers
from hibernode.transfer import tar
from hibernode.transfer.apply import apply
from hibernode.transfer.arena import CHUNK, Arena
from hibernode.transfer.filling import Held
from hibernode.transfer.layer import LayerCollector, check_mount, survey
from hibernode.transfer.receive import LayerReceiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.tar import Entry, Kind
from tests.fakes.script import Script
from tests.fakes.store import MemoryStore
from tests.layers import ARENA, ID, applied, captured, described, received, sent, tree

pytestmark = pytest.mark.timeout(60)

UID, GID = os.getuid(), os.getgid()


def _descriptors() -> set[tuple[str, str]]:
    """What is open, but for the directory that is read for it."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()  # what another test has let go of closes its descriptors now, and not meanwhile
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    assert set(threading.enumerate()) <= threads
    assert _descriptors() - descriptors == set()  # threads of other tests may close theirs meanwhile
    assert not ARENA.used_bytes


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """Several frames: text, noise, zeros in a frame and in place of frames, holes, a directory of small files."""
    root = tmp_path / "upper"
    (root / "a/b").mkdir(parents=True)
    (root / "a/noise").write_bytes(random.Random(1).randbytes((5 << 20) + 7))
    (root / "a/text").write_bytes(b"line\n" * 1_000_000)
    (root / "a/zeros").write_bytes(bytes(11 << 20))
    with open(root / "sparse", "wb") as file:
        file.seek(3 << 30)
        file.write(b"end")
    for n in range(200):
        (root / f"a/b/{n}").write_bytes(random.Random(n).randbytes(n * 7))
    os.link(root / "a/text", root / "again")
    (root / "z").symlink_to("a")
    return root


# --- through a store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("level", [None, 1], ids=["raw", "zstd"])
@pytest.mark.parametrize("data_key", [None, bytes(range(32))], ids=["plain", "encrypted"])
def test_a_layer_comes_back_through_a_store(
    upper: Path, tmp_path: Path, streams: int, level: int | None, data_key: bytes | None
) -> None:
    store, seal = MemoryStore(), Seal(ID, data_key)
    ref = sent(upper, store, streams=streams, level=level, seal=seal)
    assert sorted(store.objects) == sorted(f"{ID}/{each.key}" for each in ref.objects)
    assert [each.key for each in ref.streams] == [f"main/layer-{n}.zst" for n in range(streams)]
    assert ref.zero_pages > (10 << 20) // PAGE
    (root := tmp_path / "root").mkdir()
    received(store, ref, root, threads=3, seal=seal)
    assert captured(root) == captured(upper)
    assert (root / "sparse").stat().st_blocks < 100


def test_the_pieces_are_the_tar_in_order_and_are_counted(upper: Path) -> None:
    store, meter = MemoryStore(), Meter()
    ref = sent(upper, store, streams=3)
    receiver = LayerReceiver(store, Seal(ID), ref, 2, meter)
    with Threads(Cancel()) as threads:
        found = b"".join(map(bytes, receiver.pieces(receiver.fetch_index(), threads)))
    data, _ = captured(upper)
    assert found == data + bytes(-len(data) % PAGE)
    assert (meter.raw_bytes, meter.zero_bytes) == (ref.pages * PAGE, ref.zero_pages * PAGE)


def test_a_layer_larger_than_the_arena_and_what_waits_beside_it(upper: Path, tmp_path: Path) -> None:
    """Three chunks, all of them held back by somebody else who is captured together with it."""
    arena, store = Arena(3 * CHUNK), MemoryStore()
    ref = sent(upper, store, arena=arena)
    assert ref.bytes > 5 * CHUNK
    assert not arena.used_bytes
    with Threads(Cancel()) as threads, arena.share(arena.total_bytes, Cancel()) as share:
        held, theirs, ours = Held(share), threads.channel(100), threads.channel(100)
        for _ in range(3):
            held.add(theirs, share.take(threads, lambda: None))
        collector = LayerCollector(upper, ours, threads, held)
        thread = threads.start("layer", collector.run)
        for chunks in (theirs, ours):
            threads.start("ship", lambda chunks=chunks: [share.give_back(chunk) for chunk in chunks] and None)
        thread.join()
        held.release()
        theirs.close()
        ours.close()
    assert collector.pages == ref.pages
    assert not arena.used_bytes


def test_every_object_is_compared(upper: Path, tmp_path: Path) -> None:
    """A byte of any of them, at both ends and somewhere between."""
    store = MemoryStore()
    ref = sent(upper, store)
    for each in ref.objects:
        whole = store.objects[f"{ID}/{each.key}"]
        for at in (0, len(whole) // 2, len(whole) - 1):
            store.objects[f"{ID}/{each.key}"] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            (root := tmp_path / f"{each.key.replace('/', '-')}-{at}").mkdir()
            with pytest.raises(Corrupt):
                received(store, ref, root)
        store.objects[f"{ID}/{each.key}"] = whole


def test_a_store_that_fails_ends_it(upper: Path, tmp_path: Path) -> None:
    """At any of its calls."""
    store, calls = MemoryStore(), Script()
    ref = sent(upper, store)
    store._script = calls
    (root := tmp_path / "root").mkdir()
    received(store, ref, root, threads=1)
    assert len(calls.calls) >= 5
    for n in range(1, len(calls.calls) + 1):
        store._script = Script(n)
        with pytest.raises(StoreUnavailable):
            received(store, ref, root, threads=1)


def test_a_store_that_fails_keeps_nothing_of_it(upper: Path) -> None:
    store = MemoryStore(calls := Script())
    sent(upper, store, streams=1)
    for n in range(1, len(calls.calls) + 1, 3):
        store = MemoryStore(Script(n))
        with pytest.raises(StoreUnavailable):
            sent(upper, store, streams=1)
        assert not store.objects
        assert not store.uploads
        assert not ARENA.used_bytes


def _read_and_cancel(receiver: LayerReceiver, cancel: Cancel) -> None:
    index = receiver.fetch_index()
    with Threads(cancel) as threads, closing(receiver.pieces(index, threads)) as pieces:
        next(pieces)
        cancel.set("enough")
        assert not list(pieces), "it says that it was cancelled, and nothing else"


def test_a_cancel_ends_both_ways(upper: Path, tmp_path: Path) -> None:
    store, cancel = MemoryStore(), Cancel()
    ref = sent(upper, store)
    receiver = LayerReceiver(store, Seal(ID), ref, 2, Meter())
    with pytest.raises(Cancelled):
        _read_and_cancel(receiver, cancel)
    with ARENA.share(0, Cancel()) as share, pytest.raises(Cancelled), Threads(cancel) as threads:
        LayerCollector(upper, threads.channel(9), threads, Held(share)).run()


def test_reading_ahead_is_bounded(tmp_path: Path) -> None:
    """A reader who takes his time holds a few windows of frames, and not the layer."""
    (upper := tmp_path / "upper").mkdir()
    (upper / "large").write_bytes(b"some text " * (8 << 20))
    ref = sent(upper, store := MemoryStore())
    receiver = LayerReceiver(store, Seal(ID), ref, 2, Meter())
    index = receiver.fetch_index()
    tracemalloc.start()
    try:
        with Threads(Cancel()) as threads, closing(receiver.pieces(index, threads)) as pieces:
            for n, _ in enumerate(pieces):
                if n == 2:
                    time.sleep(0.3)  # all that may be read meanwhile is read; a bound that is not kept would show
        assert tracemalloc.get_traced_memory()[1] < (48 + 2 * 28 + 16) << 20
    finally:
        tracemalloc.stop()


# --- capture ----------------------------------------------------------------------------------------------------------------


def test_a_layer_that_changes_while_it_is_read_is_no_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (upper := tmp_path / "upper").mkdir()
    (file := upper / "shrinks").write_bytes(b"x" * 100_000)
    real = os.preadv

    def shrinking(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(file, 10)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(DumpFailed, match="shorter"):
        captured(upper)


def test_a_layer_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DumpFailed, match="cannot be read"):
        captured(tmp_path / "nowhere")


def test_limits_of_a_layer_are_refused_before_and_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "deep"
    (deep / "/".join("d" * tar.MAX_DEPTH)).mkdir(parents=True)
    monkeypatch.setattr(layers, "MAX_ENTRIES", 10)
    (many := tmp_path / "many").mkdir()
    for n in range(10):
        (many / f"{n}").touch()
    for root, code in ((deep, "layer_entries"), (many, "layer_entries")):
        for look in (captured, lambda root: survey(root, Cancel())):
            with pytest.raises(Refused) as refused:
                look(root)
            assert refused.value.code == code
    (many / "0").unlink()
    assert captured(many)[1].entries == 10
    monkeypatch.setattr(layers, "MAX_ENTRIES", MAX_ENTRIES)
    with pytest.raises(Refused) as refused:
        captured(deep)
    assert refused.value.code == "layer_depth"


def test_a_symlink_is_not_followed(tmp_path: Path) -> None:
    (secret := tmp_path / "secret").mkdir()
    (secret / "file").write_text("not of the layer")
    (upper := tmp_path / "upper").mkdir()
    (upper / "link").symlink_to(secret)
    data, ref = captured(upper)
    assert ref.entries == 2
    assert b"not of the layer" not in data


def test_a_file_with_very_many_holes_keeps_the_larger_ones(tmp_path: Path) -> None:
    (upper := tmp_path / "upper").mkdir()
    with open(upper / "holes", "wb") as file:
        for n in range(40):
            os.pwrite(file.fileno(), b"x", n * 3 * 4096)  # holes of two pages
            os.pwrite(file.fileno(), b"y", (1 << 30) + n * 16 * 4096)
    few, _ = captured(upper)
    real, tar.MAX_EXTENTS = tar.MAX_EXTENTS, 50
    try:
        coarse, ref = captured(upper)
        assert len(coarse) // 4096 == (39 * 3 + 1) + 40, "of the first half the holes, too"
        (root := tmp_path / "root").mkdir()
        applied(coarse, ref, root)
        assert captured(root) == (coarse, ref)
    finally:
        tar.MAX_EXTENTS = real
    assert len(few) < len(coarse)
    assert (root / "holes").read_bytes() == (upper / "holes").read_bytes()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["rw", "lowerdir=/a", "index=off", "redirect_dir=off", "metacopy=off", "xino=off"], ""),
        (["rw", "redirect_dir=on"], "overlay_redirect"),
        (["metacopy=on"], "overlay_redirect"),
        (["userxattr"], "overlay_userxattr"),
    ],
)
def test_the_options_of_a_mount(options: list[str], code: str) -> None:
    found = ""
    try:
        check_mount(options)
    except Refused as e:
        found = e.code
    assert found == code


# --- tars of enemies --------------------------------------------------------------------------------------------------------

TOP = Entry(b"", Kind.DIRECTORY, 0o755, UID, GID)


def made(*entries: Entry | tuple[Entry, bytes], top: Entry | None = TOP, end: bytes = tar.END) -> bytes:
    out = tar.encode(top) if top is not None else b""
    for each in entries:
        entry, data = each if isinstance(each, tuple) else (each, b"")
        out += tar.encode(entry) + data + tar.padding(len(data))
    return out + end


def file(path: bytes, size: int = 0, **more: object) -> Entry:
    return Entry(path, Kind.FILE, 0o644, UID, GID, size=size, **more)  # type: ignore[arg-type]


def folder(path: bytes, **more: object) -> Entry:
    return Entry(path, Kind.DIRECTORY, 0o755, UID, GID, **more)  # type: ignore[arg-type]


def symlink(path: bytes, target: bytes) -> Entry:
    return Entry(path, Kind.SYMLINK, 0o777, UID, GID, target=target)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A root to apply to, with something in it, and beside it what must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine")
    (root := tmp_path / "root").mkdir()
    (root / "out").symlink_to("../outside")
    (root / "there").mkdir()
    (root / "there/old").write_text("old")
    before = tree(tmp_path / "outside")
    yield root
    assert tree(tmp_path / "outside") == before
    assert sorted(os.listdir(tmp_path)) == ["outside", "root"]


def refused(data: bytes, root: Path, entries: int) -> HibernodeError:
    with pytest.raises(HibernodeError) as raised:
        applied(data, described(len(data), entries), root)
    return raised.value


@pytest.mark.parametrize(
    "entries",
    [
        [symlink(b"l", b"../outside"), file(b"l/file")],
        [symlink(b"l", b"/"), folder(b"l/tmp")],
        [file(b"out/file")],
        [file(b"out/new")],
        [symlink(b"l", b"../outside/file"), file(b"l")],
        [file(b"a"), file(b"a/b")],
        [file(b"b"), file(b"a")],
        [folder(b"a"), folder(b"a")],
        [folder(b"a"), folder(b"b"), file(b"a/x")],
        [file(b"a/x"), folder(b"a")],
        [folder(b"a-"), file(b"a/x")],
        [folder(b""), file(b"a")],
        [Entry(b"z", Kind.LINK, target=b"out/file")],
        [Entry(b"z", Kind.LINK, target=b"there")],
        [Entry(b"z", Kind.LINK, target=b"nothing")],
        [Entry(b"z", Kind.LINK, target=b"z")],
        [file(b"zz"), Entry(b"z", Kind.LINK, target=b"zz")],
        [Entry(b"a", Kind.WHITEOUT), Entry(b"z", Kind.LINK, target=b"a")],
        [symlink(b"l", b".."), Entry(b"z", Kind.LINK, target=b"l/outside")],
        [Entry(b"there", Kind.WHITEOUT), file(b"there/old")],
    ],
    ids=lambda entries: " ".join(f"{entry.kind.value} {entry.path!r}" for entry in entries),
)
def test_no_entry_leads_out(place: Path, entries: list[Entry]) -> None:
    data = made(*entries)
    assert isinstance(refused(data, place, 1 + len(entries)), Corrupt)


def test_what_is_in_the_place_of_an_entry_is_removed_and_not_followed(place: Path) -> None:
    data = made((file(b"out", 3), b"new"), Entry(b"there", Kind.WHITEOUT))
    applied(data, described(len(data), 3), place)
    assert (place / "out").read_bytes() == b"new"
    assert not (place / "out").is_symlink()
    assert not (place / "there").exists()


def test_a_whiteout_of_a_symlink_removes_the_symlink(place: Path) -> None:
    data = made(Entry(b"out", Kind.WHITEOUT), Entry(b"was-never", Kind.WHITEOUT))
    applied(data, described(len(data), 3), place)
    assert sorted(os.listdir(place)) == ["there"]


def test_an_opaque_directory_in_place_of_a_symlink(place: Path) -> None:
    data = made(folder(b"out", opaque=True), file(b"out/x"), folder(b"there", opaque=True))
    applied(data, described(len(data), 4), place)
    assert sorted(os.listdir(place / "out")) == ["x"]
    assert os.listdir(place / "there") == []
    assert sorted(os.listdir(place)) == ["out", "there"]


def small() -> tuple[bytes, int]:
    entries = [
        folder(b"d"), (file(b"d/f", 5), b"12345"), (file(b"d/s", 9000, extents=[(4096, 10)]), b"0123456789"),
        symlink(b"l", b"d"), Entry(b"out", Kind.WHITEOUT), Entry(b"z", Kind.LINK, target=b"d/f"),
    ]  # fmt: skip
    return made(*entries), 1 + len(entries)  # type: ignore[arg-type]


def test_every_truncation_is_corrupt(place: Path) -> None:
    """Said to be as long as it was, and said to be as short as it is."""
    data, entries = small()
    applied(data, described(len(data), entries), place)
    for size in range(0, len(data), 7):
        for said in (len(data), size):
            with pytest.raises(Corrupt):
                apply(iter([memoryview(data)[:size]]), place, described(said, entries))


def test_every_flipped_byte_is_corrupt_or_stays_inside(place: Path) -> None:
    data, entries = small()
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        try:
            applied(changed, described(len(changed), entries), place)
        except (Corrupt, Refused, RestoreFailed):
            continue


def test_counts_and_lengths_are_those_of_the_manifest(place: Path) -> None:
    data, entries = small()
    for size, count in (
        (len(data), entries - 1),
        (len(data), entries + 1),
        (len(data) + 512, entries),
        (len(data) - 512, entries),
    ):
        with pytest.raises(Corrupt):
            applied(data, described(size, count), place)
    padded = data + bytes(-len(data) % PAGE)
    for tail in (padded[:-1] + b"x", padded + b"x"):
        with pytest.raises(Corrupt, match="behind"):
            apply(iter([memoryview(tail)]), place, described(len(data), entries))


def test_something_behind_the_end_of_a_file_is_corrupt(place: Path) -> None:
    data = tar.encode(TOP) + tar.encode(file(b"f", 3)) + b"abc" + b"x" * 509 + tar.END
    assert isinstance(refused(data, place, 2), Corrupt)


@pytest.mark.parametrize(
    "entry",
    [file(b"f", 1 << 40), file(b"f", (1 << 63) - 1), file(b"f", 1 << 50, extents=[(5, 1 << 41)])],
    ids=["tib", "max", "sparse"],
)
def test_a_size_beyond_the_layer_is_corrupt(place: Path, entry: Entry) -> None:
    assert isinstance(refused(made(entry), place, 2), Corrupt)


def test_a_hole_that_no_file_system_has_is_no_file(place: Path) -> None:
    data = made((file(b"f", (1 << 63) - 1, extents=[(0, 1)]), b"x"))
    assert isinstance(refused(data, place, 2), RestoreFailed)


def test_it_begins_with_its_root(place: Path) -> None:
    assert isinstance(refused(made(file(b"a"), top=None), place, 1), Corrupt)
    assert isinstance(refused(made(top=None), place, 1), Corrupt)


def test_a_device_that_could_be_anything_is_not_made(place: Path) -> None:
    data = made(Entry(b"disk", Kind.DEVICE, 0o666, UID, GID, device=(8, 0)))
    assert refused(data, place, 2).code == "layer_device"
    assert not (place / "disk").exists()


def test_a_full_disk_is_no_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert isinstance(refused(made((file(b"f", 1), b"x")), place, 2), NoRoom)


def test_a_root_can_be_a_descriptor(place: Path) -> None:
    data, entries = small()
    descriptor = os.open(place, os.O_PATH)
    try:
        apply(iter([memoryview(data)]), descriptor, described(len(data), entries))
    finally:
        os.close(descriptor)
    assert (place / "z").read_bytes() == b"12345"


@pytest.mark.parametrize("seconds", [10**12, 10**11, -(10**11), -(10**12)])
def test_a_time_that_no_tar_of_ours_has_is_the_latest_that_one_has(seconds: int) -> None:
    """Some file systems keep it; whoever reads it back would not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        path = Path(place) / "a"
        path.touch()
        os.utime(path, ns=(0, seconds * 10**9))
        facts = path.stat()
    entry = layers._entry(b"a", Kind.FILE, facts, {})
    found = tar.decode(io.BytesIO(tar.encode(entry)).read)
    assert found is not None
    assert abs(found.mtime) == min(abs(facts.st_mtime_ns), 10**21 - 1)
    assert abs(facts.st_mtime_ns) >= 10**20, "what it is about"
