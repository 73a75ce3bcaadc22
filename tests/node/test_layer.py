"""Writable layers of real overlay mounts: put back over the same layers below, each is what it was, to the byte of its tar."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hibernode.errors import Refused, RestoreFailed
from hibernode.model import Cancel
from hibernode.transfer.layer import survey
from hibernode.transfer.send import memory_bound
from tests.fakes.store import MemoryStore
from tests.layers import applied, captured, overlay, received, sent, tree

pytestmark = pytest.mark.node

ANYBODY = 2**32 - 1
ACL = struct.pack("<I", 2) + b"".join(  # of rights, for whom: owner, user 1234, group, mask, others
    struct.pack("<HHI", *entry) for entry in ((1, 6, ANYBODY), (2, 4, 1234), (4, 4, ANYBODY), (16, 6, ANYBODY), (32, 0, ANYBODY))
)
CAPABILITY = struct.pack("<IIIII", 0x02000000 | 1, 1 << 10, 0, 0, 0)  # cap_net_bind_service, effective


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """What an image may have."""
    root = tmp_path / "lower"
    for folder in ("etc/conf.d", "opt/tool/deep/er", "gone", "renamed/in", "becomes-file/x", "same", "acl"):
        (root / folder).mkdir(parents=True)
        (root / folder / "file").write_text(folder)
    for name in ("deleted", "changed", "becomes-directory", "linked", "meta", "hidden"):
        (root / name).write_text(name)
    os.setxattr(root / "meta", "user.old", b"1")
    os.setxattr(root / "same", "user.old", b"1")
    os.setxattr(root / "acl", "system.posix_acl_default", ACL)
    (root / "link").symlink_to("changed")
    for path in root.rglob("*"):
        os.utime(path, ns=(10**18, 10**18 + 5), follow_symlinks=False)
    return root


def changed(m: Path) -> None:
    (m / "changed").write_text("other")


def deleted(m: Path) -> None:
    (m / "deleted").unlink()
    shutil.rmtree(m / "gone")


def replaced(m: Path) -> None:
    """Directories that hide what lies below."""
    shutil.rmtree(m / "opt")
    (m / "opt/tool").mkdir(parents=True)
    (m / "opt/tool/new").write_text("new")
    shutil.rmtree(m / "etc/conf.d")
    (m / "etc/conf.d").mkdir()


def kinds(m: Path) -> None:
    """A file where a directory was, and the other way round."""
    shutil.rmtree(m / "becomes-file")
    (m / "becomes-file").write_text("now")
    (m / "becomes-directory").unlink()
    (m / "becomes-directory/in").mkdir(parents=True)
    (m / "link").unlink()
    (m / "link").write_text("no link any more")
    (m / "linked").unlink()
    (m / "linked").symlink_to("/etc/passwd")


def renamed(m: Path) -> None:
    """Without redirect_dir a directory of the image is copied by whoever renames it."""
    with pytest.raises(OSError, match="cross-device"):
        (m / "renamed").rename(m / "moved")
    shutil.move(m / "renamed", m / "moved")
    (m / "moved/in").rename(m / "moved/out")


def links(m: Path) -> None:
    (m / "a").mkdir()
    (m / "a/one").write_text("many names")
    os.link(m / "a/one", m / "a/two")
    os.link(m / "a/one", m / "zz")
    os.link(m / "hidden", m / "hidden-too")
    (m / "sym").symlink_to("nowhere")
    os.link(m / "sym", m / "sym-too", follow_symlinks=False)


def holes(m: Path) -> None:
    with open(m / "sparse", "wb") as file:
        for at in (0, 1 << 20, 5 << 30):
            file.seek(at)
            file.write(b"data")
        file.truncate(10 << 30)
    with open(m / "hole", "wb") as file:
        file.truncate(123_456_789)
    with open(m / "tail", "wb") as file:
        file.seek(1 << 20)
        file.write(b"at the end")
    (m / "zeros").write_bytes(bytes(10_000))


def special(m: Path) -> None:
    os.mkfifo(m / "fifo", 0o640)
    os.mknod(m / "null", 0o20666, os.makedev(1, 3))
    os.mknod(m / "socket", 0o140755)
    os.chown(m / "socket", 5, 6)


def owners(m: Path) -> None:
    (m / "setuid").write_bytes(b"#!")
    os.chown(m / "setuid", 1000, 4_000_000_000)
    (m / "setuid").chmod(0o6751)
    (m / "sticky").mkdir()
    (m / "sticky").chmod(0o3777)
    os.chown(m / "same", 77, 78)
    (m / "owned").symlink_to("x")
    os.chown(m / "owned", 9, 9, follow_symlinks=False)
    (m / "none").write_bytes(b"secret")
    (m / "none").chmod(0)


def attributes(m: Path) -> None:
    (m / "tool").write_bytes(b"\x7fELF")
    os.setxattr(m / "tool", "security.capability", CAPABILITY)
    os.setxattr(m / "tool", "user.a=b%\n", bytes(range(256)))
    os.setxattr(m / "tool", "trusted.mine", b"")
    os.removexattr(m / "meta", "user.old")
    os.removexattr(m / "same", "user.old")
    os.setxattr(m / "same", "user.new", b"2")
    (m / "with-acl").write_text("x")
    os.setxattr(m / "with-acl", "system.posix_acl_access", ACL)
    os.setxattr(m / "etc", "system.posix_acl_default", ACL)
    (m / "etc/inherits").write_text("x")
    (m / "etc/inherits-too").mkdir()
    (m / "acl/inherits").write_text("x")
    os.removexattr(m / "acl/inherits", "system.posix_acl_access")
    os.setxattr(m / "tool", "trusted.overlay.opaque", b"of the workload's own")


def names(m: Path) -> None:
    (m / ("n" * 255)).mkdir()
    (m / ("n" * 255) / ("ü" * 127)).write_text("long")
    Path(os.fsdecode(os.fsencode(m) + b"/\xff\xfe\x80 \n\t")).write_text("no text")
    (m / " leading").mkdir()
    (m / "a\\b").write_text("x")
    deep = m / "/".join(["d" * 20] * 60)
    deep.mkdir(parents=True)
    (deep / "leaf").write_text("x")


def times(m: Path) -> None:
    (m / "old").write_text("x")
    os.utime(m / "old", ns=(0, -(10**9) - 1))
    (m / "timed").mkdir()
    (m / "timed/in").write_text("x")
    os.utime(m / "timed", ns=(0, 123_456_789_987_654_321))
    os.utime(m / "etc", ns=(0, 5))
    os.utime(m, ns=(0, 7))


def content(m: Path) -> None:
    for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, (4 << 20) - 1536, (4 << 20), (9 << 20) + 3):
        (m / f"{size}").write_bytes(random.Random(size).randbytes(size))


def nothing(m: Path) -> None:
    m.stat()


DEEDS = [changed, deleted, replaced, kinds, renamed, links, holes, special, owners, attributes, names, times, content, nothing]


def everything(m: Path) -> None:
    for deed in DEEDS:
        deed(m)


@pytest.mark.parametrize("deed", [*DEEDS, everything], ids=lambda deed: deed.__name__)
def test_what_comes_back_is_the_same_to_the_byte(lower: Path, tmp_path: Path, deed: Callable[[Path], None]) -> None:
    with overlay(tmp_path / "first", lower) as first, overlay(tmp_path / "second", lower) as second:
        deed(first.merged)
        data, ref = captured(first.upper)
        applied(data, ref, second.merged, piece=70_001)
        if deed not in (holes, everything):  # too large to be read
            assert tree(second.merged) == tree(first.merged)
        again, said = captured(second.upper)
        assert said == ref
        assert again == data
        assert survey(first.upper, Cancel()).entries == ref.entries
        assert abs(survey(first.upper, Cancel()).bytes - ref.bytes) < 4096 * ref.entries + 65536


def test_hard_links_holes_and_what_is_hidden_are_what_they_were(lower: Path, tmp_path: Path) -> None:
    """What a tar that is the same does not say by itself."""
    with overlay(tmp_path / "first", lower) as first, overlay(tmp_path / "second", lower) as second:
        everything(first.merged)
        applied(*captured(first.upper), second.merged)
        m = second.merged
        assert (m / "a/one").samefile(m / "zz")
        assert (m / "a/one").stat().st_nlink == 3
        assert (m / "sparse").stat().st_blocks * 512 < 1 << 20
        assert sorted(os.listdir(m / "opt/tool")) == ["new"]
        assert not (m / "gone").exists()
        assert os.getxattr(second.upper / "opt", "trusted.overlay.opaque") == b"y"
        assert stat.S_ISCHR((second.upper / "deleted").lstat().st_mode)
        assert os.getxattr(m / "tool", "security.capability") == CAPABILITY
        assert not (second.upper / "opt/tool/deep").exists()


@pytest.mark.parametrize("streams", [1, 3])
def test_through_a_store(lower: Path, tmp_path: Path, streams: int) -> None:
    store = MemoryStore()
    with overlay(tmp_path / "first", lower) as first, overlay(tmp_path / "second", lower) as second:
        everything(first.merged)
        ref = sent(first.upper, store, streams=streams)
        received(store, ref, second.merged, threads=3)
        assert captured(second.upper) == captured(first.upper)
    assert not store.uploads


def test_whiteouts_that_are_files_become_those_of_the_kernel(lower: Path, tmp_path: Path) -> None:
    """Tools make them, in directories with a mark that is no sign of an opaque one."""
    upper = tmp_path / "first/upper"
    (upper / "etc").mkdir(parents=True)
    os.setxattr(upper / "etc", "trusted.overlay.opaque", b"x")
    (upper / "etc/file").touch()
    os.setxattr(upper / "etc/file", "trusted.overlay.whiteout", b"")
    (upper / "etc/kept").write_text("x")
    with overlay(tmp_path / "second", lower) as second:
        (lower / "etc/file").write_text("deleted")
        (lower / "etc/other").write_text("stays")
        data, ref = captured(upper)
        applied(data, ref, second.merged)
        assert sorted(os.listdir(second.merged / "etc")) == ["conf.d", "kept", "other"]
        assert captured(second.upper)[0] == data


@pytest.mark.parametrize("options", ["redirect_dir=on", "metacopy=on"])
def test_what_lies_in_another_layer_is_refused(lower: Path, tmp_path: Path, options: str) -> None:
    with overlay(tmp_path / "first", lower, f",{options}") as first:
        (first.merged / "renamed").rename(first.merged / "moved")
        (first.merged / "changed").chmod(0o600)
        for look in (lambda: survey(first.upper, Cancel()), lambda: captured(first.upper)):
            with pytest.raises(Refused) as refused:
                look()
            assert refused.value.code == "overlay_redirect"


def test_a_device_that_could_be_anything_is_refused(lower: Path, tmp_path: Path) -> None:
    with overlay(tmp_path / "first", lower) as first:
        os.mknod(first.merged / "disk", 0o60600, os.makedev(8, 0))
        for look in (lambda: survey(first.upper, Cancel()), lambda: captured(first.upper)):
            with pytest.raises(Refused) as refused:
                look()
            assert refused.value.code == "layer_device"


def test_a_mount_in_the_root_is_not_entered(lower: Path, tmp_path: Path) -> None:
    """Neither to put something into it, nor to remove what is there."""
    with overlay(tmp_path / "first", lower) as first, overlay(tmp_path / "second", lower) as second:
        (first.merged / "etc/new").write_text("x")
        shutil.rmtree(first.merged / "gone")
        data, ref = captured(first.upper)
        for place in ("etc", "gone"):
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", second.merged / place], check=True, timeout=20)
            try:
                (second.merged / place / "mine").write_text("stays")
                with pytest.raises(RestoreFailed, match="mounted"):
                    applied(data, ref, second.merged)
                assert os.listdir(second.merged / place) == ["mine"]
            finally:
                subprocess.run(["umount", second.merged / place], check=True, timeout=20)


def _write(rng: random.Random, place: Path, some: Path, folder: Path) -> None:
    place.write_bytes(rng.randbytes(rng.randrange(9000)))


def _replace(rng: random.Random, place: Path, some: Path, folder: Path) -> None:
    place.unlink(missing_ok=True)
    place.mkdir()


def _adorn(rng: random.Random, place: Path, some: Path, folder: Path) -> None:
    folder.chmod(rng.choice([0o700, 0o1777, 0o2755]))
    os.setxattr(folder, f"user.{rng.randrange(3)}", rng.randbytes(rng.randrange(30)))
    os.utime(folder, ns=(0, rng.randrange(1 << 60)))


SMALL_DEEDS: list[Callable[[random.Random, Path, Path, Path], object]] = [
    _write,
    _write,
    _replace,
    _replace,
    _adorn,
    lambda rng, place, some, folder: some.unlink(),
    lambda rng, place, some, folder: shutil.rmtree(folder),
    lambda rng, place, some, folder: os.link(some, place),
    lambda rng, place, some, folder: place.symlink_to(rng.choice(["..", "/", "a/b", "é"])),
    lambda rng, place, some, folder: os.truncate(some, rng.randrange(1 << 20)),
    lambda rng, place, some, folder: some.rename(place),
    lambda rng, place, some, folder: folder.rename(place),
]


def random_tree(rng: random.Random, m: Path) -> None:
    """Many small deeds; one that is not possible there and then is left out."""
    done = 0
    for _ in range(80):
        there = [path for path in sorted(m.rglob("*")) if not path.is_symlink()]
        folders = [path for path in there if path.is_dir()] or [m]
        files = [path for path in there if path.is_file()] or [m]
        place = rng.choice([m, *folders]) / f"{rng.choice('abcdefgh')}{rng.choice(['', '.x', 'é'])}"
        with contextlib.suppress(OSError):
            rng.choice(SMALL_DEEDS)(rng, place, rng.choice(files), rng.choice(folders))
            done += 1
    assert done > 20


@pytest.mark.parametrize("seed", range(25))
def test_random_trees_come_back(lower: Path, tmp_path: Path, seed: int) -> None:
    with overlay(tmp_path / "first", lower) as first, overlay(tmp_path / "second", lower) as second:
        random_tree(random.Random(seed), first.merged)
        data, ref = captured(first.upper)
        applied(data, ref, second.merged)
        assert tree(second.merged) == tree(first.merged)
        again, _ = captured(second.upper)
        assert again == data


def test_six_hundred_megabytes_through_an_arena_of_sixty_four(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """What a layer needs does not grow with it: neither on its way out, nor on its way back."""
    (upper := tmp_path / "upper").mkdir()
    (root := tmp_path / "root").mkdir()
    block = random.Random(1).randbytes(1 << 20)
    with open(upper / "large", "wb") as file:
        file.writelines(n.to_bytes(8, "little") * 64 + block[512:] for n in range(600))
    arena = 64 << 20
    program = Path(__file__).parent / "programs" / "layer.py"
    root_of_all = Path(__file__).resolve().parents[2]
    out = subprocess.run(
        [sys.executable, program, upper, tmp_path / "store", root, f"{arena}"],
        check=True, capture_output=True, timeout=100, env={**os.environ, "PYTHONPATH": f"{root_of_all}:{root_of_all / 'daemon'}"},
    ).stdout  # fmt: skip
    before, sending, receiving = map(int, out.split())
    for name, figure in {"before": before, "sending": sending, "receiving": receiving}.items():
        record_property(name, figure)
    assert sending - before < memory_bound(0, 2, parts_in_flight=0, part_size=0, segments=1, frames=151)
    assert receiving - sending < 130 << 20, "three windows of four frames, and two buffers of 28 MiB"
    assert (root / "large").stat().st_size == 600 << 20
    assert subprocess.run(["cmp", upper / "large", root / "large"], check=False, timeout=60).returncode == 0
