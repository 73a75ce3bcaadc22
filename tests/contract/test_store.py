"""What every store promises (ports.Store), asked of the fake, of a directory and of a real S3 server."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.s3 import S3
from hibernode.errors import BadCommand, Corrupt, HibernodeError, Internal, NotFound, Refused
from hibernode.ports import Buffer, Store
from tests.fakes.script import Script
from tests.fakes.store import MemoryStore
from tests.servers import S3Server

MIB = 1 << 20
PART = 5 * MIB  # the smallest that S3 allows


@pytest.fixture(params=["memory", "localdir", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "localdir":
        return LocalDir(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3_server")
    return S3(server.bucket, f"tests/{uuid.uuid4().hex}", server.settings(part_size=PART))


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two windows are alike, so that a shifted, repeated or stale block is seen."""
    return random.Random(seed).randbytes(size)


def written(store: Store, key: str, data: bytes, step: int = 1 * MIB) -> None:
    upload = store.upload(key)
    for start in range(0, len(data), step):
        upload.write(data[start : start + step])
    facts = upload.commit()
    assert (facts.key, facts.size) == (key, len(data))


def read(store: Store, key: str, offset: int, size: int) -> bytes:
    into = bytearray(size)
    store.read_into(key, offset, memoryview(into))
    return bytes(into)


def keys(store: Store, prefix: str = "") -> list[str]:
    return [facts.key for facts in store.list(prefix)]


# --- uploads ---


@pytest.mark.parametrize("size", [0, 1, 4096, PART - 1, PART, PART + 1, 3 * PART + 12345], ids=str)
def test_what_was_written_comes_back(store: Store, size: int) -> None:
    data = pattern(size)
    before = time.time()
    written(store, "c1/image/pages-0.zst", data, step=MIB + 17)
    assert read(store, "c1/image/pages-0.zst", 0, size) == data
    facts = store.stat("c1/image/pages-0.zst")
    assert facts.size == size
    assert before - 5 < facts.modified < time.time() + 5
    assert store.get("c1/image/pages-0.zst", limit=size) == data


def test_one_write_may_be_longer_than_several_parts(store: Store) -> None:
    data = pattern(2 * PART + 99)
    written(store, "a", data, step=len(data))
    assert read(store, "a", 0, len(data)) == data


def test_many_pieces_may_be_written_at_once(store: Store) -> None:
    """More than a system takes in one call, some of them empty, one longer than a part."""
    pieces: list[Buffer] = [pattern(n % 7, n) for n in range(3000)]
    pieces += [memoryview(pattern(PART + 5)), bytearray(b"end")]
    upload = store.upload("a")
    upload.write()
    upload.write(*pieces)
    upload.write(b"")
    upload.write(b"more", b"")
    whole = b"".join(pieces) + b"more"
    assert upload.commit().size == len(whole)
    assert read(store, "a", 0, len(whole)) == whole


def test_nothing_is_visible_before_the_commit(store: Store) -> None:
    upload = store.upload("c1/a")
    upload.write(pattern(PART + 1))
    assert keys(store) == []
    with pytest.raises(NotFound):
        store.stat("c1/a")
    with pytest.raises(NotFound):
        store.get("c1/a", limit=10 * MIB)
    upload.commit()
    assert keys(store) == ["c1/a"]


@pytest.mark.parametrize("size", [0, 10, 2 * PART + 1], ids=str)
def test_abort_leaves_nothing(store: Store, size: int) -> None:
    upload = store.upload("c1/a")
    upload.write(pattern(size))
    upload.abort()
    upload.abort()
    assert keys(store) == []
    assert list(store.open_uploads()) == []


def test_abort_after_commit_is_harmless(store: Store) -> None:
    upload = store.upload("c1/a")
    upload.write(b"x" * (PART + 5))
    upload.commit()
    upload.abort()
    assert store.stat("c1/a").size == PART + 5
    assert list(store.open_uploads()) == []


@pytest.mark.parametrize("how", ["commit", "abort"])
def test_after_its_end_an_upload_takes_nothing(store: Store, how: str) -> None:
    upload = store.upload("c1/a")
    upload.write(b"abc")
    getattr(upload, how)()
    with pytest.raises(Internal):
        upload.write(b"more")
    with pytest.raises(Internal):
        upload.commit()
    assert [f.size for f in store.list()] == ([3] if how == "commit" else [])


def test_memory_is_the_callers_again_when_write_returns(store: Store) -> None:
    chunk, total = bytearray(MIB), bytearray()
    upload = store.upload("a")
    for n in range(2 * PART // MIB + 2):
        chunk[:] = pattern(MIB, seed=n)
        total += chunk
        upload.write(memoryview(chunk))
        chunk[:] = b"\xee" * MIB
    upload.commit()
    assert read(store, "a", 0, len(total)) == total


def test_uploads_in_parallel(store: Store) -> None:
    def one(n: int) -> None:
        data = pattern(PART + n * 1000, seed=n)
        written(store, f"c{n % 2}/pages-{n}.zst", data, step=MIB)
        assert read(store, f"c{n % 2}/pages-{n}.zst", 0, len(data)) == data

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(6)))
    assert keys(store) == sorted(f"c{n % 2}/pages-{n}.zst" for n in range(6))
    assert list(store.open_uploads()) == []


@pytest.mark.parametrize("first", ["put", "upload"])
@pytest.mark.parametrize("size", [0, 9, 2 * PART + 1], ids=str)
def test_a_commit_never_replaces(store: Store, size: int, first: str) -> None:
    """Nor does the abort after it remove what is there."""
    if first == "put":
        store.put("c1/a", b"first")
    else:
        written(store, "c1/a", b"first")
    upload = store.upload("c1/a")
    upload.write(pattern(size))
    with pytest.raises(Refused) as refused:
        upload.commit()
    assert refused.value.code == "exists"
    with pytest.raises(Internal):
        upload.commit()
    upload.abort()
    upload.abort()
    assert store.get("c1/a", limit=100) == b"first"
    assert keys(store) == ["c1/a"]
    assert list(store.open_uploads()) == []


@pytest.mark.parametrize("size", [9, PART + 1], ids=str)
def test_of_two_uploads_of_one_key_the_first_to_commit_wins(store: Store, size: int) -> None:
    one, two = store.upload("c1/a"), store.upload("c1/a")
    one.write(pattern(size, seed=1))
    two.write(pattern(size, seed=2))
    two.commit()
    with pytest.raises(Refused):
        one.commit()
    one.abort()
    assert read(store, "c1/a", 0, size) == pattern(size, seed=2)
    assert list(store.open_uploads()) == []


def test_a_key_that_was_deleted_is_free_again(store: Store) -> None:
    written(store, "c1/a", b"old")
    store.delete("c1/a")
    written(store, "c1/a", b"newer")
    assert store.get("c1/a", limit=100) == b"newer"


def test_an_upload_left_open_is_found_and_removed(store: Store) -> None:
    upload = store.upload("c1/pages-0.zst")
    upload.write(pattern(PART + 1))
    left = list(store.open_uploads("c1/"))
    assert [u.key for u in left] == ["c1/pages-0.zst"]
    assert abs(left[0].began - time.time()) < 60
    assert list(store.open_uploads("c2/")) == []
    store.abort_upload(left[0])
    store.abort_upload(left[0])
    assert list(store.open_uploads()) == []
    upload.abort()


def test_an_upload_that_was_removed_cannot_be_committed(store: Store) -> None:
    upload = store.upload("c1/pages-0.zst")
    upload.write(pattern(PART + 1))
    (left,) = store.open_uploads("c1/pages-0.zst")
    store.abort_upload(left)
    with pytest.raises(HibernodeError):
        upload.commit()
    upload.abort()
    assert keys(store) == []
    assert list(store.open_uploads()) == []


def test_an_upload_that_was_committed_is_not_removed_any_more(store: Store) -> None:
    upload = store.upload("c1/pages-0.zst")
    upload.write(pattern(PART + 1))
    (left,) = store.open_uploads("c1/")
    upload.commit()
    store.abort_upload(left)
    assert store.get("c1/pages-0.zst", limit=2 * PART) == pattern(PART + 1)


def test_what_others_have_put_there_is_no_upload(store: Store) -> None:
    for key in ("c1/a", "c10/a"):
        store.upload(key).write(pattern(PART + 1, len(key)))
    assert sorted(u.key for u in store.open_uploads("c1")) == ["c1/a", "c10/a"]
    assert [u.key for u in store.open_uploads("c1/")] == ["c1/a"]
    for left in list(store.open_uploads()):
        store.abort_upload(left)
    assert list(store.open_uploads()) == []


# --- put and get ---


def test_put_then_get(store: Store) -> None:
    store.put("c1/manifest.json", b'{"a":1}')
    assert store.get("c1/manifest.json", limit=7) == b'{"a":1}'
    store.put("c2/empty", b"")
    assert store.get("c2/empty", limit=0) == b""


@pytest.mark.parametrize("again", [b"first", b"other"])
def test_put_never_replaces(store: Store, again: bytes) -> None:
    store.put("c1/manifest.json", b"first")
    with pytest.raises(Refused) as refused:
        store.put("c1/manifest.json", again)
    assert refused.value.code == "exists"
    assert store.get("c1/manifest.json", limit=100) == b"first"
    assert list(store.open_uploads()) == []


def test_get_has_a_limit(store: Store) -> None:
    store.put("a", b"12345")
    with pytest.raises(Corrupt):
        store.get("a", limit=4)


# --- reading ---


def test_ranges(store: Store) -> None:
    data = pattern(PART + MIB)
    written(store, "a", data)
    for offset, size in [(0, 1), (1, 4096), (PART - 10, 20), (len(data) - 1, 1), (12345, MIB), (7, 0)]:
        assert read(store, "a", offset, size) == data[offset : offset + size]


def test_a_slice_of_a_larger_buffer_is_filled_and_nothing_else(store: Store) -> None:
    store.put("a", b"0123456789")
    buffer = bytearray(b"." * 10)
    store.read_into("a", 2, memoryview(buffer)[3:7])
    assert buffer == b"...2345..."


def test_a_range_is_read_piece_by_piece(store: Store) -> None:
    data = pattern(3 * MIB)
    written(store, "a", data)
    pieces = [bytearray(size) for size in (1, 4096, MIB + 17, 7)]
    with store.reading("a", 99, sum(map(len, pieces))) as fill:
        for piece in pieces:
            fill(memoryview(piece))
    assert b"".join(pieces) == data[99 : 99 + sum(map(len, pieces))]


def test_who_reads_may_leave_early(store: Store) -> None:
    data = pattern(3 * MIB)
    written(store, "a", data)
    for offset in (0, MIB):
        piece = bytearray(10)
        with store.reading("a", offset, 2 * MIB) as fill:
            fill(memoryview(piece))
        assert piece == data[offset : offset + 10]


def test_a_range_of_what_is_not_there_or_too_short(store: Store) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(Corrupt), store.reading("a", 5, 6) as fill:
        fill(memoryview(bytearray(6)))
    with pytest.raises(NotFound), store.reading("b", 5, 6) as fill:
        fill(memoryview(bytearray(6)))


@pytest.mark.parametrize(("offset", "size"), [(0, 11), (5, 6), (10, 1), (1000, 4)])
def test_reading_past_the_end_is_corrupt(store: Store, offset: int, size: int) -> None:
    store.put("a", b"0123456789")
    with pytest.raises(Corrupt):
        read(store, "a", offset, size)


def test_what_is_not_there_is_not_found(store: Store) -> None:
    store.put("c1/a", b"x")
    calls: list[Callable[[], object]] = [
        lambda: store.stat("c1/b"),
        lambda: store.get("c1/b", limit=1),
        lambda: read(store, "c1/b", 0, 1),
        lambda: read(store, "c1/b", 0, 0),
        lambda: store.stat("c1"),  # a prefix is no object
        lambda: store.get("c1", limit=1),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()


def test_reads_in_parallel(store: Store) -> None:
    data = pattern(2 * MIB)
    written(store, "a", data)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: read(store, "a", n * 65536, 65536), range(32)))
    assert b"".join(got) == data


# --- list and delete ---


def test_list_is_in_order_of_whole_keys(store: Store) -> None:
    names = ["c1/a/x", "c1/a-b", "c1/a.b", "c1/a0", "c1/B", "c2/z", "c10/m"]
    for name in names:
        store.put(name, name.encode())
    assert keys(store) == sorted(names)
    assert [f.size for f in store.list()] == [len(n) for n in sorted(names)]


def test_list_takes_a_prefix_of_characters(store: Store) -> None:
    for name in ["c1/a/x", "c1/a-b", "c10/m", "c2/a"]:
        store.put(name, b"")
    assert keys(store, "c1") == ["c1/a-b", "c1/a/x", "c10/m"]
    assert keys(store, "c1/") == ["c1/a-b", "c1/a/x"]
    assert keys(store, "c1/a") == ["c1/a-b", "c1/a/x"]
    assert keys(store, "c1/a/x") == ["c1/a/x"]
    assert keys(store, "c3") == []


def test_an_empty_store_lists_nothing(store: Store) -> None:
    assert keys(store) == []


def test_delete_may_be_repeated(store: Store) -> None:
    store.put("c1/a", b"x")
    store.put("c1/b", b"y")
    store.delete("c1/a")
    store.delete("c1/a")
    store.delete("never/was")
    assert keys(store) == ["c1/b"]
    store.put("c1/a", b"again")
    assert store.get("c1/a", limit=5) == b"again"


def test_put_and_delete_beside_each_other(store: Store) -> None:
    """One object stays, so that the directory behind the keys never empties: `rclone serve s3` answers 500 to a PUT whose
    directory a DELETE has just removed. Where directories are our own, tests/unit/test_localdir.py asks for more."""
    start = threading.Barrier(4)
    store.put("c/d/stays", b"x")

    def one(n: int) -> None:
        start.wait(10)
        for _ in range(10):
            store.put(f"c/d/{n}", b"x")
            store.delete(f"c/d/{n}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    assert keys(store) == ["c/d/stays"]


# --- the rest ---


def test_check_leaves_nothing(store: Store) -> None:
    store.check()
    assert keys(store) == []
    assert list(store.open_uploads()) == []


def test_location_and_room(store: Store) -> None:
    scheme, _, rest = store.location.partition("://")
    assert scheme in ("memory", "file", "s3")
    assert rest
    free = store.free_bytes()
    assert free is None or free > 0


BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    "..",
    "a/../b",
    "../a",
    ".a",
    "a/.b",
    "a\0b",
    "a b",
    "a\n",
    "ä",
    "a" * 129,
    "a+b",
    "-a",
]


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_bad_keys_are_refused_by_every_call(store: Store, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.upload(key),
        lambda: store.put(key, b""),
        lambda: store.get(key, limit=1),
        lambda: store.read_into(key, 0, memoryview(bytearray(1))),
        lambda: store.stat(key),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(BadCommand):
            call()


@pytest.mark.parametrize("prefix", ["/", "../", "a//", ".up", "a/../b"])
def test_bad_prefixes_are_refused(store: Store, prefix: str) -> None:
    with pytest.raises(BadCommand):
        keys(store, prefix)


# --- the fake's own faults ---


def test_the_fake_fails_where_the_script_says_and_then_only_abort_is_legal() -> None:
    script = Script(fail_at=3)
    store = MemoryStore(script)
    upload = store.upload("c1/a")
    upload.write(b"one")
    with pytest.raises(HibernodeError):
        upload.write(b"two")
    with pytest.raises(Internal):
        upload.write(b"three")
    with pytest.raises(Internal):
        upload.commit()
    assert len(store.uploads) == 1
    upload.abort()
    assert store.uploads == []
    assert store.objects == {}
    assert script.calls == ["store.upload a", "store.write a", "store.write a"]
    assert script.notes[-1] == "store.abort a"
    assert script.failed == "store.write a"
