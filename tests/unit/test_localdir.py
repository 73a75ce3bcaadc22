"""What only the store in a directory can get wrong: full disks, modes, links, the order in which things become durable."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from hibernode.drivers.localdir import LocalDir
from hibernode.errors import Internal, NoRoom, NotFound, Refused, StoreUnavailable
from hibernode.ports import OpenUpload

MIB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_DETACH = 2  # MNT_DETACH


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    assert _libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=4m") == 0, os.strerror(ctypes.get_errno())
    yield place
    if _libc.umount2(bytes(place), 0) != 0:  # a descriptor was left open: say so, and leave no mount behind all the same
        error = os.strerror(ctypes.get_errno())
        _libc.umount2(bytes(place), _DETACH)
        pytest.fail(f"the file system is still in use: {error}")


@pytest.fixture
def store(tmp_path: Path) -> LocalDir:
    return LocalDir(tmp_path / "store")


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


# --- a full disk ---


def test_a_full_disk_is_no_room_and_nothing_is_visible(tiny: Path) -> None:
    store = LocalDir(tiny)
    upload = store.upload("c1/a")
    with pytest.raises(NoRoom) as raised:
        upload.write(bytes(5 * MIB))
    assert raised.value.hint
    with pytest.raises(Internal):
        upload.write(b"x")
    with pytest.raises(Internal):
        upload.commit()
    assert list(store.list()) == []
    upload.abort()
    assert files(tiny) == []
    store.put("c1/a", b"there is room again")


def test_a_disk_that_is_full_in_the_middle_of_many_pieces(tiny: Path) -> None:
    """The system takes some of them and says so; the next call says why."""
    upload = LocalDir(tiny).upload("c1/a")
    with pytest.raises(NoRoom):
        upload.write(*[bytes(128 << 10)] * 40)
    upload.abort()
    assert files(tiny) == []


def test_put_on_a_full_disk(tiny: Path) -> None:
    store = LocalDir(tiny)
    with pytest.raises(NoRoom):
        store.put("c1/a", bytes(5 * MIB))
    assert files(tiny) == []


def test_check_on_a_full_disk(tiny: Path) -> None:
    (tiny / "other").write_bytes(bytes(4 * MIB))
    with pytest.raises(NoRoom):
        LocalDir(tiny / "store").check()


def test_free_bytes_before_and_after_the_first_write(tiny: Path) -> None:
    store = LocalDir(tiny / "not" / "there" / "yet")
    free = store.free_bytes()
    assert free is not None
    assert 3 * MIB < free <= 4 * MIB
    store.put("a", bytes(MIB))
    assert MIB <= free - (store.free_bytes() or 0) < 2 * MIB


# --- on the disk ---


def test_only_the_owner_can_read(tmp_path: Path, store: LocalDir) -> None:
    old = os.umask(0)
    try:
        upload = store.upload("c1/image/pages-0.zst")
        upload.write(b"x")
        upload.commit()
        store.put("c1/manifest.json", b"{}")
    finally:
        os.umask(old)
    for path in (tmp_path / "store").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


def test_more_than_two_windows_are_written_whole(tmp_path: Path, store: LocalDir) -> None:
    """The page cache is drained every 32 MiB: uneven writes, one of them over three windows long."""
    block = os.urandom(MIB)
    upload = store.upload("a")
    for _ in range(70):
        upload.write(block)
    upload.write(block * 100)
    upload.write(b"end")
    assert upload.commit().size == 170 * MIB + 3
    content = (tmp_path / "store" / "a").read_bytes()
    assert content == block * 170 + b"end"


def test_delete_removes_empty_directories_and_only_those(tmp_path: Path, store: LocalDir) -> None:
    store.put("c1/image/a", b"x")
    store.put("c1/b", b"x")
    store.delete("c1/image/a")
    assert sorted(p.name for p in (tmp_path / "store" / "c1").iterdir()) == ["b"]
    store.delete("c1/b")
    assert not (tmp_path / "store" / "c1").exists()
    assert (tmp_path / "store").exists()


def test_a_put_into_a_directory_that_a_delete_is_removing(store: LocalDir) -> None:
    start = threading.Barrier(4)

    def one(n: int) -> None:
        start.wait(10)
        for _ in range(30):
            store.put(f"c/d/{n}", b"x")
            store.delete(f"c/d/{n}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    assert list(store.list()) == []


def test_an_upload_of_a_daemon_that_died(tmp_path: Path, store: LocalDir) -> None:
    upload = store.upload("c1/image/pages-0.zst")
    upload.write(b"x")
    again = LocalDir(tmp_path / "store")
    left = list(again.open_uploads("c1/"))
    assert [u.key for u in left] == ["c1/image/pages-0.zst"]
    again.abort_upload(left[0])
    assert files(tmp_path / "store") == []
    with pytest.raises(StoreUnavailable):  # the file is gone: a commit must not invent it
        upload.commit()
    upload.abort()
    assert list(again.list()) == []


def test_a_link_that_was_made_and_answered_otherwise(store: LocalDir) -> None:
    """As on NFS, where the answer is lost and the request comes again: the object is ours, and there is no other."""
    upload = store.upload("c1/a")
    upload.write(b"ours")
    path = store.path("c1/a")
    path.parent.mkdir()
    os.link(upload._temp, path)  # type: ignore[attr-defined]
    assert upload.commit().size == 4
    assert store.get("c1/a", limit=10) == b"ours"
    assert list(store.open_uploads()) == []


def test_an_upload_id_cannot_leave_its_directory(tmp_path: Path, store: LocalDir) -> None:
    store.put("c1/a", b"x")
    store.abort_upload(OpenUpload("c1/a", "../c1/a", 0.0))
    assert store.get("c1/a", limit=1) == b"x"


# --- things in the way ---


def test_a_link_is_not_followed(tmp_path: Path, store: LocalDir) -> None:
    (tmp_path / "secret").write_bytes(b"of somebody else")
    store.put("c1/a", b"x")
    (tmp_path / "store" / "c1" / "b").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreUnavailable):
        store.get("c1/b", limit=100)
    with pytest.raises(NotFound):
        store.stat("c1/b")
    assert [f.key for f in store.list()] == ["c1/a"]


def test_an_upload_replaces_neither_a_link_nor_its_target(tmp_path: Path, store: LocalDir) -> None:
    (tmp_path / "secret").write_bytes(b"of somebody else")
    store.put("c1/a", b"x")
    (tmp_path / "store" / "c1" / "b").symlink_to(tmp_path / "secret")
    upload = store.upload("c1/b")
    upload.write(b"ours")
    with pytest.raises(Refused):
        upload.commit()
    upload.abort()
    assert (tmp_path / "secret").read_bytes() == b"of somebody else"
    assert (tmp_path / "store" / "c1" / "b").is_symlink()


def test_of_many_that_commit_one_key_at_once_one_wins(tmp_path: Path, store: LocalDir) -> None:
    uploads, start = [store.upload("c1/a") for _ in range(8)], threading.Barrier(8)

    def commit(n: int) -> bool:
        uploads[n].write(bytes([n]) * 10)
        start.wait(10)
        try:
            uploads[n].commit()
        except Refused:
            uploads[n].abort()
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(commit, range(8)))
    assert won.count(True) == 1
    assert store.get("c1/a", limit=10) == bytes([won.index(True)]) * 10
    assert files(tmp_path / "store") == ["c1/a"]


def test_what_others_left_there_is_not_listed(tmp_path: Path, store: LocalDir) -> None:
    store.put("c1/a", b"x")
    (tmp_path / "store" / "c1" / ".nfs0001").write_bytes(b"")
    (tmp_path / "store" / "lost found").write_bytes(b"")
    (tmp_path / "store" / "c1" / "pipe").mkdir()
    os.mkfifo(tmp_path / "store" / "c1" / "pipe" / "p")
    assert [f.key for f in store.list()] == ["c1/a"]


def test_a_file_where_a_directory_should_be(tmp_path: Path, store: LocalDir) -> None:
    store.put("c1", b"x")
    with pytest.raises(StoreUnavailable):
        store.put("c1/a", b"y")
    assert [f.key for f in store.list()] == ["c1"]
    assert list(store.open_uploads()) == []


def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    """As a user without rights: root would be let in everywhere."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and len(path.parts) > 2:
            path.chmod(path.stat().st_mode | 0o055)
    euid = os.geteuid()
    os.seteuid(65534)
    try:
        with pytest.raises(StoreUnavailable) as raised:
            LocalDir(place).check()
    finally:
        os.seteuid(euid)
    assert "permission denied" in raised.value.message
    assert "owns" in raised.value.hint
    assert list(place.iterdir()) == []


def test_a_read_only_file_system(tiny: Path) -> None:
    store = LocalDir(tiny)
    store.put("a", b"x")
    remount_read_only = 1 | 32
    assert _libc.mount(None, bytes(tiny), None, remount_read_only, None) == 0
    with pytest.raises(StoreUnavailable) as raised:
        store.put("b", b"y")
    assert "read-only" in raised.value.hint
    assert store.get("a", limit=1) == b"x"


def open_below(root: Path) -> list[str]:
    """What this process has open there; other descriptors come and go with other tests' sockets."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of this very listing
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.startswith(str(root))]


def test_no_descriptor_is_left_open(tmp_path: Path, store: LocalDir) -> None:
    for n in range(5):
        upload = store.upload(f"c/{n}")
        upload.write(b"x" * 100)
        assert len(open_below(tmp_path)) == 1
        upload.commit() if n % 2 else upload.abort()
        with pytest.raises(NotFound):
            store.get("nothing", limit=1)
    list(store.list())
    store.check()
    assert open_below(tmp_path) == []
