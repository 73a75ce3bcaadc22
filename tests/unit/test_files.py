"""Small images as one object: what is packed comes back, and a hostile tar reaches nothing."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from hibernode.errors import Corrupt, DumpFailed, Internal, StoreUnavailable
from hibernode.model import ObjectRef
from hibernode.transfer import files, format
from hibernode.transfer.seal import Seal
from tests.fakes.store import MemoryStore


def packed(directory: Path) -> bytes:
    out: list[bytes] = []
    files.pack(directory, out.append)
    return b"".join(out)


def unpack(data: bytes, directory: Path, limit: int = files.MAX_BYTES) -> dict[str, bytes]:
    directory.mkdir(exist_ok=True)
    (directory.parent / "packed").write_bytes(data)
    files.unpack(directory.parent / "packed", directory, limit=limit)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "pstree.img").write_bytes(b"\x01\x02")
    (directory / "core-1.img").write_bytes(os.urandom(3 << 20))
    (directory / "empty").write_bytes(b"")
    (directory / "dump.log").write_bytes(b"line\n" * 100_000)
    return directory


def test_what_is_packed_comes_back(images: Path, tmp_path: Path) -> None:
    wanted = {path.name: path.read_bytes() for path in images.iterdir()}
    assert unpack(packed(images), tmp_path / "back") == wanted
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "back").iterdir()} == {0o600}


def test_only_plain_files_with_plain_names_are_packed(images: Path, tmp_path: Path) -> None:
    wanted = {path.name for path in images.iterdir()}
    (images / "link").symlink_to("/etc/passwd")
    (images / "folder").mkdir()
    (images / ".hidden").write_bytes(b"x")
    (images / "a b").write_bytes(b"x")
    os.mkfifo(images / "pipe")
    assert set(unpack(packed(images), tmp_path / "back")) == wanted


def test_how_much_is_packed_is_said(images: Path, tmp_path: Path) -> None:
    size = files.pack(images, lambda _: None)
    assert size == sum(path.stat().st_size for path in images.iterdir())
    unpack(packed(images), tmp_path / "back", limit=size)
    with pytest.raises(Corrupt):
        unpack(packed(images), tmp_path / "again", limit=size - 1)


def test_no_file_needs_an_extended_header(images: Path) -> None:
    """Whatever its time, its name, and its size: a ghost file of 64 GiB too."""
    (images / ("x" * 100)).write_bytes(b"x")
    os.utime(images / "empty", ns=(1, 1_700_000_000_123_456_789))
    kinds = set()
    tar = io.BytesIO(zstandard.ZstdDecompressor().stream_reader(packed(images)).read())
    while (block := tar.read(512)).strip(b"\0"):
        found = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        kinds.add(found.type)
        tar.seek(-(-found.size // 512) * 512, os.SEEK_CUR)
    assert kinds == {tarfile.REGTYPE}
    ghost = member("ghost-file-1.img")
    ghost.size = files.MAX_BYTES
    assert len(ghost.tobuf(tarfile.GNU_FORMAT)) == 512
    assert tarfile.TarInfo.frombuf(ghost.tobuf(tarfile.GNU_FORMAT), "ascii", "strict").size == files.MAX_BYTES


def test_tar_itself_reads_it(images: Path, tmp_path: Path) -> None:
    wanted = sorted(path.name for path in images.iterdir())
    (tmp_path / "packed.tar.zst").write_bytes(packed(images))
    plain = subprocess.run(["zstd", "-dc", tmp_path / "packed.tar.zst"], check=True, capture_output=True).stdout
    said = subprocess.run(["tar", "-t"], input=plain, check=True, capture_output=True).stdout.decode()
    assert said.split() == wanted


@pytest.mark.parametrize("deed", ["remove", "remove all", "add", "grow", "shrink"])
def test_files_that_change_while_they_are_packed_are_no_image(images: Path, deed: str) -> None:
    """Somebody else is at work in the directory: what was packed is not what was dumped."""
    (images / "a-first").write_bytes(os.urandom(8 << 20))
    done = []

    def write(_: bytes) -> None:
        if done:
            return
        done.append(deed)
        match deed:
            case "remove":
                (images / "pstree.img").unlink()
            case "remove all":
                shutil.rmtree(images)
            case "add":
                (images / "zzz").write_bytes(b"x")
            case "grow":
                (images / "pstree.img").write_bytes(b"longer than it was")
            case "shrink":
                (images / "core-1.img").write_bytes(b"")

    with pytest.raises(Internal):
        files.pack(images, write)
    assert done


def test_an_empty_directory_is_no_image(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(Internal):
            files.pack(place, lambda _: None)


def test_more_than_can_be_read_is_not_written(images: Path) -> None:
    os.truncate(images / "empty", files.MAX_BYTES)  # a sparse file
    with pytest.raises(DumpFailed) as failed:
        files.pack(images, lambda _: pytest.fail("written"))
    assert "ghost" in failed.value.hint


def test_nobody_learns_who_dumped(images: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().stream_reader(packed(images)).read())) as tar:
        assert {(m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, "", "", 0o600)}


def test_the_first_error_of_the_writer_is_the_one_that_is_raised(images: Path) -> None:
    calls = []

    def fails(data: bytes) -> None:
        calls.append(len(data))
        raise StoreUnavailable("first")

    with pytest.raises(StoreUnavailable, match="first"):
        files.pack(images, fails)
    assert len(calls) == 1


# --- hostile ----------------------------------------------------------------------------------------------------------------


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return zstandard.ZstdCompressor().compress(out.getvalue())


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../up",
        "..",
        ".",
        "a/b",
        "a/../../up",
        "./a",
        ".hidden",
        "",
        "a\nb",
        "a b",
        "-rf",
        "x" * 300,
        "ü",
        "a\x00b",
        "pages\n",
    ],
)
def test_names_that_are_not_plain_are_corrupt(tmp_path: Path, name: str) -> None:
    before = set(tmp_path.iterdir())
    bad = tar_of((member(name), b"x"))
    (tmp_path / "in").mkdir()
    try:
        found = unpack(bad, tmp_path / "in")
    except Corrupt:
        found = {}
    assert set(found) <= {"a"}, "a tar header cannot hold a NUL: what it holds is cut there"
    assert set(tmp_path.iterdir()) - before == {tmp_path / "in", tmp_path / "packed"}
    if "\x00" not in name:
        assert not found


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"), (tarfile.SYMTYPE, "first"), (tarfile.LNKTYPE, "first"), (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.DIRTYPE, ""), (tarfile.CHRTYPE, ""), (tarfile.BLKTYPE, ""), (tarfile.FIFOTYPE, ""), (b"Z", ""),
    ],
)  # fmt: skip
def test_what_is_no_plain_file_is_corrupt(tmp_path: Path, kind: bytes, target: str) -> None:
    try:
        found = unpack(tar_of((member("first"), b"x"), (member("bad", kind, target), b"")), tmp_path / "in")
    except Corrupt:
        found = {path.name: b"" for path in (tmp_path / "in").iterdir()}
    assert set(found) <= {"first", "bad"}
    bad = tmp_path / "in" / "bad"
    assert not bad.exists() or (bad.is_file() and not bad.is_symlink() and bad.stat().st_nlink == 1)
    if kind != b"Z":  # an unknown type is a plain file by the rules of tar
        assert not os.path.lexists(bad)


def test_a_name_that_comes_twice_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(Corrupt):
        unpack(tar_of((member("a"), b"1"), (member("a"), b"2")), tmp_path / "in")


def test_a_file_is_never_written_through_a_link_that_is_there(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").symlink_to(victim)
    with pytest.raises(Corrupt):
        unpack(tar_of((member("a"), b"overwritten")), tmp_path / "in")
    assert victim.read_bytes() == b"untouched"


def huge(size: int, form: str) -> bytes:
    info = member("a")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT if form == "gnu" else tarfile.PAX_FORMAT)
    return zstandard.ZstdCompressor().compress(header + bytes(10_000))


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("size", [files.MAX_BYTES + 1, 1 << 50, (1 << 63) - 1])
def test_a_member_larger_than_can_be_is_corrupt_before_it_is_written(tmp_path: Path, size: int, form: str) -> None:
    with pytest.raises(Corrupt):
        unpack(huge(size, form), tmp_path / "in")
    assert not any((tmp_path / "in").iterdir())


def extended(size: int, kind: bytes = tarfile.XHDTYPE, content: bytes = b"") -> bytes:
    """A header that announces so much to be read before the next one."""
    info = member("././@PaxHeader", kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"X"])
@pytest.mark.parametrize("size", [1 << 30, 1 << 20, 513])
def test_an_extended_header_is_refused_before_it_is_read(tmp_path: Path, size: int, kind: bytes) -> None:
    """A few KB of zeros, compressed, would become as many GiB in memory."""
    out, one = zstandard.ZstdCompressor().compressobj(), bytes(1 << 20)
    parts = [out.compress(extended(size, kind))] + [out.compress(one) for _ in range(-(-min(size, 256 << 20) >> 20))]
    bomb = b"".join([*parts, out.flush()])
    (tmp_path / "in").mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt):
            unpack(bomb, tmp_path / "in")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert not any((tmp_path / "in").iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"20 size=68719476736\n", b"17 path=../../up\n", b"30 GNU.sparse.realsize=10000\n", b"", b"junk", b"28 mtime=1.5\n17 path=../up\n",
    ],
)  # fmt: skip
def test_an_extended_header_that_says_more_than_a_time_is_corrupt(tmp_path: Path, content: bytes) -> None:
    raw = extended(len(content), content=content) + member("a").tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    with pytest.raises(Corrupt):
        unpack(zstandard.ZstdCompressor().compress(raw), tmp_path / "in")


def test_many_extended_headers_in_a_row_are_corrupt(tmp_path: Path) -> None:
    """For `tarfile` each is a call inside the one before."""
    time = b"28 mtime=1795491135.9946606\n"
    raw = extended(len(time), content=time) * 5000 + member("a").tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    with pytest.raises(Corrupt):
        unpack(zstandard.ZstdCompressor().compress(raw), tmp_path / "in")


def test_what_the_first_writers_wrote_is_read(images: Path, tmp_path: Path) -> None:
    """With the parts of a second of each file's time in an extended header."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(images.iterdir()):
            tar.add(path, arcname=path.name)
    assert b" mtime=" in out.getvalue()
    found = unpack(zstandard.ZstdCompressor().compress(out.getvalue()), tmp_path / "back")
    assert found == {path.name: path.read_bytes() for path in images.iterdir()}


def test_a_sparse_member_does_not_grow(tmp_path: Path) -> None:
    """GNU sparse headers give a small member a large size."""
    info = member("a")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a",
        "GNU.sparse.realsize": str(1 << 40),
    }
    data = b"0\n".ljust(512, b"\0")
    try:
        unpack(tar_of((info, data), form=tarfile.PAX_FORMAT), tmp_path / "in")
    except Corrupt:
        return
    assert sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) < 1 << 20


def test_negative_sizes_do_not_make_room(tmp_path: Path) -> None:
    info = member("a")
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = b"\xff" * 12  # base 256: -1
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    with pytest.raises(Corrupt):
        unpack(zstandard.ZstdCompressor().compress(bytes(raw) + bytes(1024)), tmp_path / "in")


def test_too_many_members_are_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 5)  # a number, not our code: half a million files would take a minute
    with pytest.raises(Corrupt):
        unpack(tar_of(*[(member(f"f{n}"), b"") for n in range(6)]), tmp_path / "in")


def test_a_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    """That is what the manifest says, and what room was found for."""
    members = [(member(f"f{n}"), bytes(1 << 20)) for n in range(200)]
    with pytest.raises(Corrupt):
        unpack(tar_of(*members), tmp_path / "in", limit=3 << 20)
    assert sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) <= 3 << 20


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: d[:-1], lambda d: b"", lambda d: b"junk" + d, lambda d: d[:100]]
)
def test_damage_is_corrupt(images: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(Corrupt):
        unpack(damage(packed(images)), tmp_path / "back")


@pytest.mark.parametrize("inner", [b"", b"x" * 511, b"x" * 5000, bytes(100), bytes(1024)])
def test_a_frame_that_holds_no_tar(tmp_path: Path, inner: bytes) -> None:
    try:
        assert unpack(zstandard.ZstdCompressor().compress(inner), tmp_path / "in") == {}
    except Corrupt:
        return
    assert not inner.strip(b"\0"), "only an empty tar is one"


def test_every_flipped_byte_is_corrupt_or_a_plain_file(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    (small / "a").write_bytes(b"content")
    data = packed(small)
    for at in range(len(data)):
        target = tmp_path / f"in{at}"
        try:
            unpack(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :], target)
        except Corrupt:
            continue


OPEN = Seal("id").of("main/images.tar.zst")  # not encrypted


# --- in the store -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored() -> tuple[MemoryStore, ObjectRef, bytes]:
    store, data = MemoryStore(), os.urandom((5 << 20) + 3)
    store.objects["id/main/images.tar.zst"] = data
    return store, ObjectRef(key="main/images.tar.zst", size=len(data), digest=format.digest(data).hex()), data


def test_fetch_copies_what_has_the_digest(stored: tuple[MemoryStore, ObjectRef, bytes], tmp_path: Path) -> None:
    store, ref, data = stored
    files.fetch(store, "id", ref, OPEN, tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == data
    files.verify(store, "id", ref, OPEN)


@pytest.mark.parametrize("change", [{"size": 5}, {"size": (5 << 20) + 4}, {"digest": "0" * 64}])
def test_another_size_or_digest_is_corrupt(
    stored: tuple[MemoryStore, ObjectRef, bytes], tmp_path: Path, change: dict[str, object]
) -> None:
    store, ref, _ = stored
    lie = ref.model_copy(update=change)
    with pytest.raises(Corrupt):
        files.fetch(store, "id", lie, OPEN, tmp_path / "to")
    with pytest.raises(Corrupt):
        files.verify(store, "id", lie, OPEN)
