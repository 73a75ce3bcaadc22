"""The tar of a writable layer: what is written is read, by others too; every cut, flip and lie is Corrupt, in bounded memory."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hibernode.errors import Corrupt
from hibernode.transfer import tar
from hibernode.transfer.tar import Entry, Kind

NAMES = (
    st.binary(min_size=1, max_size=255)
    .map(lambda n: n.replace(b"/", b"_").replace(b"\0", b"0"))
    .filter(lambda n: n not in (b".", b".."))
)
PATHS = st.lists(NAMES, min_size=1, max_size=5).map(b"/".join)
SPACES = st.sampled_from([b"user.", b"trusted.", b"security.", b"trusted.overlay.overlay."])
XATTRS = st.dictionaries(
    st.tuples(SPACES, st.sampled_from([b"a", b"b=%3D", b"\xff\n"])).map(b"".join),
    st.binary(max_size=40), max_size=3,
)  # fmt: skip
IDS = st.sampled_from([0, 1000, 0o7777777, 0o10000000, (1 << 32) - 2])
TIMES = st.integers(-(10**15), 1 << 62)
SIZES = st.sampled_from([0, 1, 511, 512, 0o77777777777, 0o100000000000, (1 << 63) - 1])


def tape(data: bytes) -> Callable[[int], bytes]:
    source = io.BytesIO(data)

    def take(size: int) -> bytes:
        found = source.read(size)
        if len(found) < size:
            raise Corrupt("cut off")
        return found

    return take


def decoded(data: bytes) -> Entry | None:
    return tar.decode(tape(data))


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kind = draw(st.sampled_from(Kind))
    path = draw(PATHS)
    if kind is Kind.LINK:
        return Entry(path, kind, target=draw(PATHS))
    if kind is Kind.WHITEOUT:
        return Entry(path, kind)
    entry = Entry(path, kind, draw(st.integers(0, 0o7777)), draw(IDS), draw(IDS), draw(TIMES), xattrs=draw(XATTRS))
    if kind is Kind.SYMLINK:
        entry.target = draw(st.binary(min_size=1, max_size=300).map(lambda t: t.replace(b"\0", b"0")))
    elif kind is Kind.DEVICE:
        entry.device = draw(st.sampled_from(sorted(tar.DEVICES)))
    elif kind is Kind.DIRECTORY:
        entry.opaque = draw(st.booleans())
        entry.path = b"" if not entry.opaque and draw(st.booleans()) else path
    elif kind is Kind.FILE:
        entry.size = draw(SIZES)
        if entry.size > 100 and draw(st.booleans()):
            cuts = sorted(draw(st.sets(st.integers(1, entry.size - 1), max_size=8)))
            entry.extents = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    return entry


@given(entries())
@settings(max_examples=400)
def test_an_entry_comes_back(entry: Entry) -> None:
    data = tar.encode(entry)
    assert len(data) % tar.BLOCK == 0
    take = tape(data)
    assert tar.decode(take) == entry
    with pytest.raises(Corrupt, match="cut off"):
        take(1)


@given(entries(), st.data())
@settings(max_examples=400)
def test_a_changed_byte_is_another_entry_or_corrupt(entry: Entry, data: st.DataObject) -> None:
    raw = bytearray(tar.encode(entry))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        found = decoded(bytes(raw))
    except Corrupt:
        return
    assert found is not None
    assert tar.encode(found) == raw, "what is read is what would be written"


EXAMPLES = [
    Entry(b"", Kind.DIRECTORY, 0o755, 0, 0, 1),
    Entry(b"d\xff/" + b"n" * 255, Kind.FILE, 0o4755, 1 << 31, 5, -1, 5, xattrs={b"user.x": b"1"}),
    Entry(b"s", Kind.FILE, 0o644, 0, 0, 7, 1 << 40, extents=[(4096, 4096), (1 << 30, 512)]),
    Entry(b"l", Kind.LINK, target=b"a"),
    Entry(b"w", Kind.WHITEOUT),
    Entry(b"o", Kind.DIRECTORY, 0o700, opaque=True),
    Entry(b"k", Kind.SOCKET, 0o700),
]


@pytest.mark.parametrize("entry", EXAMPLES, ids=lambda entry: entry.kind.value)
def test_every_truncation_and_every_flip(entry: Entry) -> None:
    raw = tar.encode(entry)
    for size in range(len(raw)):
        with pytest.raises(Corrupt):
            decoded(raw[:size])
    same = 0
    for at in range(len(raw)):
        for flip in (0x01, 0x10, 0xFF):
            changed = raw[:at] + bytes([raw[at] ^ flip]) + raw[at + 1 :]
            try:
                found = decoded(changed)
            except Corrupt:
                continue
            assert found is not None
            assert found != entry
            assert tar.encode(found) == changed
            same += 1
    assert same < len(raw), "checksums alone let little through"


def test_the_end() -> None:
    assert decoded(tar.END) is None
    with pytest.raises(Corrupt):
        decoded(tar.END[:-1] + b"x")
    with pytest.raises(Corrupt):
        decoded(tar.END[:-1])


def forged(entry: Entry) -> bytes:
    """As `encode` writes it, whatever it says."""
    return tar.encode(entry)


@pytest.mark.parametrize(
    "path",
    [b"..", b"../a", b"a/../b", b"/a", b"/", b"a/", b"a//b", b"./a", b"a/.", b"a\0b", b"x" * 256, b"/".join([b"a"] * 257), b"a/.."],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Kind.FILE, Kind.DIRECTORY, Kind.WHITEOUT, Kind.SYMLINK, Kind.FIFO, "target"])
def test_a_path_that_is_not_plain_is_corrupt(path: bytes, kind: Any) -> None:
    entry = (
        Entry(b"a", Kind.LINK, target=path)
        if kind == "target"
        else Entry(path, kind, target=b"t" if kind is Kind.SYMLINK else b"")
    )
    with pytest.raises(Corrupt):
        decoded(forged(entry))


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"", Kind.FILE), Entry(b"", Kind.WHITEOUT), Entry(b"", Kind.LINK, target=b"a"), Entry(b"", Kind.DIRECTORY, opaque=True),
        Entry(b"a", Kind.FILE, 0o10644), Entry(b"a", Kind.FILE, uid=(1 << 32) - 1), Entry(b"a", Kind.FILE, gid=1 << 40),
        Entry(b"a", Kind.FILE, size=1 << 63), Entry(b"a", Kind.FILE, opaque=True), Entry(b"a", Kind.SYMLINK),
        Entry(b"a", Kind.SYMLINK, target=b"x" * 4096), Entry(b"a", Kind.FIFO, target=b"x"), Entry(b"a", Kind.WHITEOUT, 0o644),
        Entry(b"a", Kind.LINK, 0o644, target=b"0"), Entry(b"a", Kind.LINK, target=b"0", xattrs={b"user.a": b"1"}),
        Entry(b"a", Kind.FILE, device=(1, 3)), Entry(b"a", Kind.FILE, mtime=10**21 + 1), Entry(b"a", Kind.WHITEOUT, uid=5),
        Entry(b"a", Kind.FILE, xattrs={b"trusted.overlay.opaque": b"x"}),
        Entry(b"a", Kind.FILE, xattrs={b"trusted.overlay.redirect": b"/"}),
        Entry(b"a", Kind.FILE, xattrs={b"system.other": b"x"}), Entry(b"a", Kind.FILE, xattrs={b"nothing": b"x"}),
        Entry(b"a", Kind.FILE, xattrs={b"security.selinux": b"x"}), Entry(b"a", Kind.FILE, xattrs={b"user." + b"a" * 251: b"x"}),
        Entry(b"a", Kind.FILE, xattrs={b"user.a\0b": b"x"}), Entry(b"a", Kind.FILE, xattrs={b"user.a": bytes((64 << 10) + 1)}),
        Entry(b"a", Kind.DIRECTORY, extents=[], size=5), Entry(b"a", Kind.FILE, size=5, extents=[(0, 5)]),
        Entry(b"a", Kind.FILE, size=0, extents=[]), Entry(b"a", Kind.FILE, size=10, extents=[(5, 6)]),
        Entry(b"a", Kind.FILE, size=10, extents=[(0, 2), (2, 2)]), Entry(b"a", Kind.FILE, size=10, extents=[(4, 2), (0, 2)]),
        Entry(b"a", Kind.FILE, size=10, extents=[(1, 0), (4, 1)]), Entry(b"a", Kind.FILE, size=1 << 63, extents=[(0, 1)]),
        Entry(b"a", Kind.FILE, size=1 << 40, extents=[(n * 3, 1) for n in range(tar.MAX_EXTENTS + 2)]),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_is_corrupt(entry: Entry) -> None:
    with pytest.raises(Corrupt):
        decoded(forged(entry))


def test_more_attributes_than_can_be_stored_are_refused_when_they_are_written() -> None:
    with pytest.raises(ValueError, match="attributes"):
        tar.encode(Entry(b"a", Kind.FILE, xattrs={b"user.%d" % n: bytes(64 << 10) for n in range(17)}))


@pytest.mark.parametrize("size", [tar.MAX_EXTENDED + 1, 0o77777777777])
def test_a_header_that_says_that_it_is_huge_is_not_read(size: int) -> None:
    raw = tar.encode(Entry(b"a", Kind.FILE))
    lie = raw[:124] + b"%011o\0" % size + raw[136:]

    def take(wanted: int) -> bytes:
        assert wanted <= tar.MAX_EXTENDED + tar.BLOCK
        return lie[:wanted]

    tracemalloc.start()
    try:
        with pytest.raises(Corrupt):
            tar.decode(take)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "record", [b"nothing at all", b"0 a=b\n", b"3 a=b\n", b"99999 a=b\n", b"7 a b\n", b" 6 a=b\n", b"\n", b"1"]
)
def test_a_record_that_is_none_is_corrupt_and_not_read_for_ever(record: bytes) -> None:
    raw = tar.encode(Entry(b"a", Kind.FILE))
    size = int(raw[124:135], 8)
    body = raw[512 : 512 + size] + record
    head = bytearray(raw[:124] + b"%011o\0" % len(body) + raw[136:512])
    with pytest.raises(Corrupt):
        decoded(bytes(head) + body + tar.padding(len(body)) + raw[1024:])


@given(st.binary(max_size=3000))
def test_noise_is_corrupt_or_an_end(data: bytes) -> None:
    try:
        found = decoded(data)
    except Corrupt:
        return
    assert found is None or tar.encode(found) == data[: len(tar.encode(found))]


def test_others_read_it(tmp_path: Path) -> None:
    """GNU tar and Python's, which know nothing of us: names, sizes, holes, attributes."""
    content = random.Random(1).randbytes(4096 + 512)
    everything = b""
    for entry, data in (
        (Entry(b"", Kind.DIRECTORY, 0o755, mtime=1_700_000_000_123_456_789), b""),
        (Entry(b"n" * 120, Kind.FILE, 0o640, mtime=1_700_000_000_123_456_789, size=5, xattrs={b"user.a=b%": b"v\n"}), b"12345"),
        (Entry(b"sparse", Kind.FILE, 0o600, mtime=10**9, size=9 << 20, extents=[(4096, 4096), (8 << 20, 512)]), content),
        (Entry(b"to", Kind.SYMLINK, 0o777, mtime=0, target=b"t" * 150), b""),
        (Entry(b"zz", Kind.LINK, target=b"n" * 120), b""),
    ):
        everything += tar.encode(entry) + data + tar.padding(len(data))
    (file := tmp_path / "layer.tar").write_bytes(everything + tar.END)
    with tarfile.open(file) as other:
        members = {member.name: member for member in other}
        assert members["n" * 120].pax_headers["SCHILY.xattr.user.a%3Db%25"] == "v\n"
        assert members["sparse"].size == 9 << 20
        found = other.extractfile("sparse")
        assert found is not None
        whole = found.read()
    (out := tmp_path / "out").mkdir()
    subprocess.run(["tar", "--no-same-owner", "-xf", file, "-C", out], check=True, timeout=60)
    assert (out / "sparse").read_bytes() == whole
    assert whole == bytes(4096) + content[:4096] + bytes((8 << 20) - 8192) + content[4096:] + bytes((1 << 20) - 512)
    assert (out / ("n" * 120)).stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (out / "zz").samefile(out / ("n" * 120))
    assert (out / "to").readlink() == Path("t" * 150)
