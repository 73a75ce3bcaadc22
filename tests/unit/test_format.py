"""Index and manifest: what is written is read; every cut, flip and lie is Corrupt, in bounded memory, and nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hibernode.config import Signing
from hibernode.drivers.notary import Notary
from hibernode.errors import Corrupt, DumpFailed, HibernodeError, Refused
from hibernode.model import (
    FRAME_PAGES,
    PAGE,
    HostFacts,
    ImageRef,
    LayerRef,
    Manifest,
    ObjectRef,
    StreamRef,
    TaskFacts,
    WorkloadFacts,
)
from hibernode.transfer import codec, format
from hibernode.transfer.format import FRAME, SEGMENT, Index
from hibernode.transfer.pageproto import LAZY, PRESENT
from tests import keys
from tests.envelope import opened, seal, sealed, sealed_json

ID = "0123abcd-0123-4567-89ab-0123456789ab"
NOBODY = Notary(Signing())  # signs nothing, asks for nothing
NOWHERE = ObjectRef(key="main/index.zst", size=0, digest="0" * 64)


# --- arbitrary images -------------------------------------------------------------------------------------------------------


@st.composite
def images(draw: st.DrawFn) -> tuple[Index, ImageRef]:
    """An index as a sender makes it: frames in page order, taken by streams in any order, some runs all zero."""
    flags = st.sampled_from([PRESENT, PRESENT | LAZY, 0])
    rows = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 1 << 30), st.integers(1, 3000), flags), max_size=8))
    empty = draw(st.lists(st.integers(1, 9), max_size=3))
    segments = np.array([(d << 8 | 1, v * PAGE, p, f) for d, v, p, f in rows] + [(d << 8 | 2, 0, 0, 0) for d in empty], SEGMENT)
    total = sum(p for _, _, p, f in rows if f & PRESENT)
    streams = draw(st.integers(1, 4))
    frames, keeps, offsets, first = [], {}, [0] * streams, 0
    while first < total:
        count = min(draw(st.integers(1, FRAME_PAGES)), total - first)
        kept = draw(st.integers(0, count))
        if kept:
            stream, stored = draw(st.integers(0, streams - 1)), draw(st.integers(10, 5000))
            digest = np.frombuffer(draw(st.binary(min_size=32, max_size=32)), np.uint8)
            frames.append((first, offsets[stream], stream, stored, count, kept, digest))
            offsets[stream] += stored
            if kept < count:
                keeps[first] = np.random.default_rng(first).permutation(np.arange(count) < kept)
        first += count
    table = np.array(frames, FRAME) if frames else np.zeros(0, FRAME)
    index = Index(segments, table[np.random.default_rng(total).permutation(len(table))], keeps)
    return index, image_of(index, table, streams, total)


def image_of(index: Index, frames: Any, streams: int, pages: int) -> ImageRef:
    refs = []
    for n in range(streams):
        mine = np.sort(frames[frames["stream"] == n], order="offset")
        table = format.seek_table(mine["stored"], mine["kept"] * PAGE)
        digest = format.stream_digest((d.tobytes() for d in mine["digest"]), table)
        size = int(mine["stored"].sum()) + len(table)
        refs.append(StreamRef(key=f"main/pages-{n}.zst", size=size, digest=digest, frames=len(mine)))
    return ImageRef(
        name="main", tasks=[TaskFacts(pid=7)], pages=pages, zero_pages=pages - int(frames["kept"].sum()), streams=refs,
        index=NOWHERE, files=NOWHERE.model_copy(update={"key": "main/images.tar.zst"}),
    )  # fmt: skip


@given(images())
def test_an_index_comes_back(made: tuple[Index, ImageRef]) -> None:
    index, image = made
    found = format.decode_index(format.encode_index(index), image)
    assert (found.segments == index.segments).all()
    assert (found.frames == np.sort(index.frames, order="first_page")).all()
    assert found.keeps.keys() == index.keeps.keys()
    assert all((found.keeps[page] == keep).all() for page, keep in index.keeps.items())
    assert found.pages == image.pages


def a_small_one() -> tuple[bytes, ImageRef]:
    segments = np.array(
        [(7 << 8 | 1, 0x1000, 1500, PRESENT), (7 << 8 | 1, 0x1000000, 3, 0), (9 << 8 | 2, 0, 30, PRESENT)], SEGMENT
    )
    frames = np.array(
        [
            (0, 0, 0, 900, 1024, 1024, np.arange(32)),
            (1024, 0, 1, 77, 400, 3, np.arange(32) + 1),
            (1424, 900, 0, 4000, 106, 106, np.arange(32) + 2),
        ],
        FRAME,
    )
    index = Index(segments, frames, {1024: np.arange(400) % 150 == 1})
    return format.encode_index(index), image_of(index, frames, 2, 1530)


def consistent(index: Index, image: ImageRef) -> None:
    """What a decoded index promises about itself and the manifest, said again in other words."""
    assert index.pages == image.pages
    numbers: set[int] = set()
    for n, stream in enumerate(image.streams):
        mine = sorted((f for f in index.frames if f["stream"] == n), key=lambda f: int(f["offset"]))
        table = format.seek_table([int(f["stored"]) for f in mine], [int(f["kept"]) * PAGE for f in mine])
        assert sum(int(f["stored"]) for f in mine) + len(table) == stream.size
        assert format.stream_digest((f["digest"].tobytes() for f in mine), table) == stream.digest
        at = 0
        for f in mine:
            assert int(f["offset"]) == at
            at += int(f["stored"])
            run = range(int(f["first_page"]), int(f["first_page"] + f["pages"]))
            assert numbers.isdisjoint(run)
            assert run.stop <= image.pages
            numbers.update(run)
            if f["kept"] < f["pages"]:
                assert int(index.keeps[run.start].sum()) == f["kept"]


def decode_or_corrupt(data: bytes, image: ImageRef) -> None:
    try:
        index = format.decode_index(data, image)
    except Corrupt:
        return
    consistent(index, image)


def test_every_truncation_of_an_index_is_corrupt() -> None:
    data, image = a_small_one()
    consistent(format.decode_index(data, image), image)
    for size in range(len(data)):
        with pytest.raises(Corrupt):
            format.decode_index(data[:size], image)
    with pytest.raises(Corrupt):
        format.decode_index(data + b"\0", image)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_of_an_index_is_corrupt_or_changes_nothing_that_counts(flip: int) -> None:
    data, image = a_small_one()
    for at in range(len(data)):
        decode_or_corrupt(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :], image)


@pytest.mark.parametrize("segment", [(7 << 8 | 2, PAGE, 0, 0), (7 << 8 | 2, 0, 0, PRESENT), (7 << 8 | 2, 0, 0, LAZY)])
def test_a_segment_of_no_pages_says_nothing_else(segment: tuple[int, ...]) -> None:
    frames = np.zeros(0, FRAME)
    for each, good in (((7 << 8 | 2, 0, 0, 0), True), (segment, False)):
        index = Index(np.array([each], SEGMENT), frames, {})
        data, image = format.encode_index(index), image_of(index, frames, 1, 0)
        if good:
            assert format.decode_index(data, image).segments.tolist() == [each]
        else:
            with pytest.raises(Corrupt, match="impossible address or length"):
                format.decode_index(data, image)


@given(st.data())
@settings(max_examples=300)
def test_an_index_with_any_field_replaced(data: st.DataObject) -> None:
    """Absurd numbers in every field of every record, where a flipped bit does not get."""
    raw, image = a_small_one()
    at = data.draw(st.integers(0, len(raw) // 4 - 1)) * 4
    value = data.draw(st.sampled_from([0, 1, 2, 1023, 1024, 1025, 1 << 31, (1 << 32) - 1, (1 << 64) - 1, 1 << 63, 1 << 40]))
    width = 8 if value >= 1 << 32 else data.draw(st.sampled_from([4, 8]))
    changed = (raw[:at] + value.to_bytes(width, "little") + raw[at + width :])[: len(raw)]
    decode_or_corrupt(changed, image)


def test_every_flipped_byte_of_a_compressed_index_is_corrupt_or_the_same() -> None:
    raw, image = a_small_one()
    packed = codec.deflate(raw)
    limit = format.index_limit(image)
    tracemalloc.start()
    try:
        for at in range(len(packed)):
            for flip in (0x01, 0x10, 0xFF):
                try:
                    found = codec.inflate(packed[:at] + bytes([packed[at] ^ flip]) + packed[at + 1 :], limit=limit)
                    decode_or_corrupt(found, image)
                except Corrupt:
                    continue
        for size in range(len(packed)):
            with pytest.raises(Corrupt):
                codec.inflate(packed[:size], limit=limit)
        assert tracemalloc.get_traced_memory()[1] < limit + (4 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("counts", [(1 << 60, 0, 0), (0, 1 << 60, 0), (0, 0, 1 << 60), ((1 << 64) - 1,) * 3])
def test_a_header_that_lies_allocates_nothing(counts: tuple[int, int, int]) -> None:
    raw, image = a_small_one()
    lie = raw[:8] + b"".join(n.to_bytes(8, "little") for n in counts) + raw[32:]
    assert peak_of_corrupt(lambda: format.decode_index(lie, image)) < 1 << 20


def test_many_segments_cost_what_they_are() -> None:
    """Not a Python object each."""
    segments = np.zeros(1_000_000, SEGMENT)
    segments["dst_id"], segments["pages"] = 7 << 8 | 1, 300
    segments["vaddr"] = np.arange(1_000_000) * 400 * PAGE
    index = Index(segments, np.zeros(0, FRAME), {})
    raw, image = format.encode_index(index), image_of(index, index.frames, 1, 0)
    assert peak(lambda: format.decode_index(raw, image)) < 24 << 20  # an object each would be 34 MiB


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python and numpy took at most meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def peak_of_corrupt(work: Callable[[], object]) -> int:
    def refused() -> None:
        with pytest.raises(Corrupt):
            work()

    return peak(refused)


def test_honest_indexes_are_within_the_limit() -> None:
    """The worst: every page a segment and a frame of its own."""
    n = 2000
    segments, frames = np.zeros(n, SEGMENT), np.zeros(n, FRAME)
    segments["dst_id"], segments["pages"], segments["flags"] = 7 << 8 | 1, 1, PRESENT
    frames["first_page"], frames["pages"], frames["kept"] = np.arange(n), 1, 1
    image = image_of(Index(segments, frames, {}), frames, 1, n)
    assert len(format.encode_index(Index(segments, frames, {}))) < format.index_limit(image)


def counted(pages: int, zero_pages: int) -> ImageRef:
    return a_small_one()[1].model_copy(update={"pages": pages, "zero_pages": zero_pages})


def test_a_manifest_cannot_lift_the_limit() -> None:
    """Pages of zeros cost nothing, so a manifest can name any number of them."""
    assert format.index_limit(counted(1 << 30, 1 << 30)) <= format.MAX_INDEX
    assert format.index_limit(counted(1 << 40, 0)) <= format.MAX_INDEX
    assert format.index_limit(counted(1000, 1000)) < 40 << 20


@pytest.mark.parametrize("tib", [1, 7])
def test_an_honest_image_of_many_tib_is_within_the_limit(tib: int) -> None:
    """Every frame with its keep map, and a segment for every 64 KiB."""
    pages = (tib << 40) // PAGE
    frames = pages // FRAME_PAGES
    honest = 32 + pages // 16 * SEGMENT.itemsize + frames * (FRAME.itemsize + FRAME_PAGES // 8)
    assert honest <= format.index_limit(counted(pages, frames))


def test_an_index_that_nobody_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, image = a_small_one()
    monkeypatch.setattr(format, "MAX_INDEX", len(raw) - 1)  # a number, not our code: four GiB would not fit here
    with pytest.raises(DumpFailed):
        format.encode_index(format.decode_index(raw, image))
    monkeypatch.setattr(format, "MAX_INDEX", len(raw))
    assert format.encode_index(format.decode_index(raw, image)) == raw


# --- seek table -------------------------------------------------------------------------------------------------------------


def test_zstd_reads_a_stream_with_its_seek_table(tmp_path: Path) -> None:
    contents = [b"a" * (4 << 20), bytes(range(256)) * 16, b"z" * PAGE]
    packer = codec.Packer(1)
    frames = [b"".join(packer.pack(memoryview(c))) for c in contents]
    path = tmp_path / "pages-0.zst"
    path.write_bytes(b"".join(frames) + format.seek_table(map(len, frames), map(len, contents)))
    assert subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True).stdout == b"".join(contents)
    listed = subprocess.run(["zstd", "-lv", str(path)], capture_output=True, check=True, text=True).stdout
    assert "Number of Skippable Frames: 1" in listed or "# Skippable Frames: 1" in listed, listed


@given(st.lists(st.tuples(st.integers(1, 1 << 23), st.integers(1, 1 << 22)), max_size=5))
def test_a_seek_table_is_what_the_seekable_format_says(sizes: list[tuple[int, int]]) -> None:
    table = format.seek_table([s for s, _ in sizes], [r for _, r in sizes])
    assert table[:4] == bytes.fromhex("5e2a4d18")
    assert int.from_bytes(table[4:8], "little") == len(table) - 8
    assert table[-4:] == bytes.fromhex("b1ea928f")
    assert int.from_bytes(table[-9:-5], "little") == len(sizes)
    assert table[8:-9] == b"".join(s.to_bytes(4, "little") + r.to_bytes(4, "little") for s, r in sizes)


# --- manifest ---------------------------------------------------------------------------------------------------------------


def manifest() -> Manifest:
    _, image = a_small_one()
    return Manifest(
        format_version=1, checkpoint_id=ID, action_id=ID, created_at=1.5, node="n", kind="rootfs", reason="manual",
        workload=WorkloadFacts(kind="job", name="trainer", argv=["a"], logs={"/x": "log"}),
        host=HostFacts(arch="x86_64", kernel="6", page_size=PAGE, criu_version=40201), compression="zstd",
        pause_ns=1, raw_bytes=1, zero_bytes=0, stored_bytes=1, images=[image], layers=[a_layer()],
    )  # fmt: skip


def a_layer() -> LayerRef:
    return LayerRef(
        name="main", pages=2, zero_pages=1, bytes=2 * PAGE - 512, entries=3,
        streams=[StreamRef(key="main/layer-0.zst", size=100, digest="0" * 64, frames=1)],
        index=NOWHERE.model_copy(update={"key": "main/layer-index.zst"}),
    )  # fmt: skip


def encoded() -> bytes:
    return format.encode_manifest(manifest(), NOBODY)


def decoded(data: bytes) -> Manifest:
    return format.decode_manifest(data, ID, NOBODY)


def plain() -> dict[str, Any]:
    return opened(encoded())


def test_a_manifest_comes_back() -> None:
    assert decoded(encoded()) == manifest()


def paths(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths(inner, (*at, key))
    if isinstance(value, list):
        for n, inner in enumerate(value):
            found += paths(inner, (*at, n))
    return found


def changed(path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> bytes:
    value = copy.deepcopy(plain())
    inner: Any = value
    for key in path[:-1]:
        inner = inner[key]
    change(inner, path[-1])
    return seal(value)


OPTIONAL = {"encryption", "layers", "containers", "kubelet",
    "gpu", "criu_opts", "uid", "logs", "argv", "cwd", "namespace", "cpu_model", "cpu_flags", "hibernode", "ppid", "comm", "threads", "tcp",
    "leave_running", "shell_job", "ext_unix_sk", "file_locks", "link_remap", "ghost_limit", "timeout", "dead", "files_bytes",
}  # fmt: skip


@pytest.mark.parametrize("path", paths(plain()), ids=lambda path: ".".join(map(str, path)))
def test_a_manifest_without_one_key_is_corrupt(path: tuple[Any, ...]) -> None:
    data = changed(path, lambda inner, key: inner.pop(key))
    if path[-1] in OPTIONAL or isinstance(path[-1], int) or "logs" in path:
        try:
            decoded(data)
        except Corrupt:
            return
    else:
        with pytest.raises(Corrupt):
            decoded(data)


WRONG: list[object] = [
    None,
    True,
    -1,
    1 << 70,
    1.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    "\x00",
    [],
    {},
    [[]],
    {"a": 1},
    "9" * 5000,
]


@pytest.mark.parametrize("path", paths(plain()), ids=lambda path: ".".join(map(str, path)))
def test_a_manifest_with_a_wrong_value_is_corrupt_or_means_something(path: tuple[Any, ...]) -> None:
    """Never another exception; and what is taken can be written and read again."""
    for value in WRONG:
        data = changed(path, lambda inner, key: inner.__setitem__(key, value))  # noqa: B023
        try:
            found = decoded(data)
        except Corrupt:
            continue
        except Refused:
            assert path == ("format_version",)
            continue
        assert decoded(format.encode_manifest(found, NOBODY)) == found, f"{path} = {value!r} does not come back"


@pytest.mark.parametrize(
    "path", [p[:-1] for p in paths(plain()) if p[-1] in ("node", "arch", "pid", "digest", "pages", "argv", "tcp")]
)
def test_a_manifest_with_an_unknown_key_is_corrupt(path: tuple[Any, ...]) -> None:
    with pytest.raises(Corrupt):
        decoded(changed((*path, "surprise"), lambda inner, key: inner.__setitem__(key, 1)))


@pytest.mark.parametrize("version", [4, 99, 0, -1])
def test_another_format_version_is_refused_by_name_even_if_nothing_else_is_known(version: int) -> None:
    for text in (seal({"format_version": version}), seal({**plain(), "format_version": version, "new": {"a": [1]}})):
        with pytest.raises(Refused) as refused:
            decoded(text)
        assert refused.value.code == "format_version"
        assert (refused.value.details["found"], refused.value.details["wanted"]) == (version, 3)


def in_planes(count: int) -> dict[str, Any]:
    data = {**plain(), "format_version": 2}
    data["images"][0]["in_planes"] = count
    return data


def test_a_manifest_without_frames_in_planes_is_that_of_version_1_still() -> None:
    assert b"in_planes" not in encoded()
    assert format.version_of(manifest().parts) == 1
    assert decoded(seal({**plain(), "format_version": 2})).parts == manifest().parts, "version 2 can do without"


def test_frames_in_planes_take_version_2() -> None:
    """A reader of version 1 stops at the version, which it looks at first, and says so."""
    found = decoded(seal(in_planes(1)))
    assert found.images[0].in_planes == 1
    assert format.version_of(found.parts) == 2
    assert decoded(format.encode_manifest(found, NOBODY)) == found
    with pytest.raises(Corrupt, match="version 1"):
        decoded(seal({**in_planes(1), "format_version": 1}))
    with pytest.raises(Corrupt, match="more frames in planes"):
        decoded(seal(in_planes(1000)))


def in_lz4(count: int, planes: int = 0) -> dict[str, Any]:
    data = in_planes(planes)
    data["images"][0]["in_lz4"] = count
    return {**data, "format_version": 3}


def test_frames_in_lz4_take_version_3() -> None:
    found = decoded(seal(in_lz4(1)))
    assert (found.images[0].in_lz4, format.version_of(found.parts)) == (1, 3)
    assert decoded(format.encode_manifest(found, NOBODY)) == found
    assert b"in_lz4" not in encoded()
    for version in (1, 2):
        with pytest.raises(Corrupt, match=f"version {version}"):
            decoded(seal({**in_lz4(1), "format_version": version}))
    frames = sum(stream.frames for stream in found.images[0].streams)
    for lz4, planes in ((frames + 1, 0), (frames, 1), (1000, 0)):
        with pytest.raises(Corrupt, match="more frames in planes, or in LZ4"):
            decoded(seal(in_lz4(lz4, planes)))


@pytest.mark.parametrize("version", ["1", "2", None, 1.0, True, [], {}, "x" * 10000])
def test_a_format_version_that_is_no_number_is_corrupt(version: object) -> None:
    with pytest.raises(Corrupt):
        decoded(seal({**plain(), "format_version": version}))


def test_duplicate_keys_are_corrupt() -> None:
    """Two readers would read two manifests."""
    text = encoded().decode()
    for doubled in (
        text.replace('"node":', '"node": "other", "node":', 1),
        text.replace('"format_version":', '"format_version": 2, "format_version":', 1),
        text.replace('"size":', '"size": 1, "size":', 1),
    ):
        assert doubled != text
        with pytest.raises(Corrupt):
            decoded(sealed(doubled.encode().split(b"\n", 1)[1]))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"7", b"{}", b'"x"', b"\xff\xfe\x00", b"[" * 200_000, b'{"a":' * 200_000, b'{"format_version":' * 100_000,
        b'{"format_version": 1}', b"\xef\xbb\xbf{}", b'{"format_version": ' + b"9" * 100_000 + b"}",
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_manifest_is_corrupt(data: bytes) -> None:
    for sealing in (bytes, sealed, sealed_json):
        with pytest.raises((Corrupt, Refused)):
            decoded(sealing(data))


def test_a_hundred_megabytes_are_not_even_parsed() -> None:
    data = b" " * (100 << 20)
    assert peak_of_corrupt(lambda: decoded(data)) < 1 << 20


# --- its envelope -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def notaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Notary]:
    """`nobody` has no keys, `signer` signs, `reader` believes the signer, `stranger` somebody else."""
    place = tmp_path_factory.mktemp("keys")
    pairs = {name: keys.pair(place, name) for name in ("signer", "reader", "stranger", "other")}
    return {
        "nobody": NOBODY,
        "signer": Notary(Signing(key=pairs["signer"][0])),
        "reader": Notary(Signing(key=pairs["reader"][0], trusted=(pairs["signer"][1],))),
        "stranger": Notary(Signing(key=pairs["stranger"][0], trusted=(pairs["other"][1],))),
    }


def refusal(data: bytes, notary: Notary, checkpoint_id: str = ID) -> str:
    with pytest.raises((Corrupt, Refused)) as raised:
        format.decode_manifest(data, checkpoint_id, notary)
    return raised.value.code


@pytest.mark.parametrize("where", ["pause_ns", "page_size", "criu_version"])
def test_a_number_that_no_message_can_hold_is_refused(where: str) -> None:
    """One forged manifest must not keep a list from being shown."""
    body = json.loads(format.encode_manifest(manifest(), NOBODY).partition(b"\n")[2].join((b"{", b"")))
    (body if where in body else body["host"])[where] = 10**30
    assert refusal(sealed(json.dumps(body).encode()[1:]), NOBODY) == "corrupt"


def test_a_signed_manifest_comes_back_to_whoever_believes_its_signer(notaries: dict[str, Notary]) -> None:
    data = format.encode_manifest(manifest(), notaries["signer"])
    for name in ("nobody", "signer", "reader"):
        assert format.decode_manifest(data, ID, notaries[name]) == manifest()
    assert refusal(data, notaries["stranger"]) == "signer"
    assert refusal(encoded(), notaries["reader"]) == "unsigned"


def test_the_envelope_is_these_bytes_and_all_of_it_one_json_object(notaries: dict[str, Notary]) -> None:
    for data, lines in ((encoded(), 1), (format.encode_manifest(manifest(), notaries["signer"]), 2)):
        value = json.loads(data)
        assert list(value)[:lines] == ["digest", "signature"][:lines]
        head, rest = data.split(b"\n", 1)
        assert head == b'{"digest":"%s",' % format.digest(rest).hex().encode()
        assert opened(data) == plain()
        assert data.split(b"\n", lines)[lines] == encoded().split(b"\n", 1)[1]


@pytest.mark.parametrize("by", ["nobody", "signer"])
@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_no_byte_of_a_manifest_can_be_changed(notaries: dict[str, Notary], by: str, flip: int) -> None:
    """Not a space, nor a letter of the digest that would mean the same in upper case; asked for a signature or not."""
    data = format.encode_manifest(manifest(), notaries[by])
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
        assert refusal(changed, NOBODY) == "corrupt"
        assert refusal(changed, notaries["reader"]) == "corrupt"


@pytest.mark.parametrize("by", ["nobody", "signer"])
def test_nothing_can_be_cut_off_or_added(notaries: dict[str, Notary], by: str) -> None:
    data = format.encode_manifest(manifest(), notaries[by])
    for size in range(len(data)):
        assert refusal(data[:size], NOBODY) == "corrupt"
    for changed in (data + b"\n", data + b"\0", b"\n" + data, b" " + data, b"\xef\xbb\xbf" + data, data + data):
        assert refusal(changed, NOBODY) == "corrupt"


def test_who_computes_the_digest_anew_cannot_sign_it(notaries: dict[str, Notary]) -> None:
    data = format.encode_manifest(manifest(), notaries["signer"])
    _, rest = data.split(b"\n", 1)
    line, body = rest.split(b"\n", 1)
    reader, other = notaries["reader"], manifest().model_copy(update={"node": "m"})
    assert refusal(sealed(body), reader) == "unsigned"
    assert refusal(sealed(line + b"\n" + format.encode_manifest(other, NOBODY).split(b"\n", 1)[1]), reader) == "signature"
    assert refusal(format.encode_manifest(other, notaries["stranger"]), reader) == "signer"
    assert format.decode_manifest(sealed(rest), ID, reader) == manifest()
    for at in range(len(rest)):
        changed = rest[:at] + bytes([rest[at] ^ 1]) + rest[at + 1 :]
        assert refusal(sealed(changed), reader) in ("unsigned", "signer", "signature"), f"byte {at}"


def test_a_signature_is_of_one_checkpoint(notaries: dict[str, Notary]) -> None:
    """Else an old checkpoint could be put in the place of a newer one, by who can write to the store but has no key."""
    other = ID.replace("0", "f")
    signed, plain_one = format.encode_manifest(manifest(), notaries["signer"]), encoded()
    assert refusal(signed, notaries["reader"], other) == "signature"
    assert refusal(plain_one, NOBODY, other) == "corrupt"
    assert refusal(signed, NOBODY, other) == "corrupt"


def test_an_envelope_inside_is_no_manifest(notaries: dict[str, Notary]) -> None:
    """A second digest or signature would be the one that other readers of JSON see."""
    data = format.encode_manifest(manifest(), notaries["signer"])
    _, rest = data.split(b"\n", 1)
    line, body = rest.split(b"\n", 1)
    for inner in (
        rest + b"",
        b'"digest":"%s",\n' % (b"0" * 64) + body,
        line + b"\n" + rest,
        b" " + rest,
        body[:-3] + b',"signature":1}\n',
    ):
        if inner != rest:
            assert refusal(sealed(inner), NOBODY) == "corrupt"


def test_nothing_is_parsed_of_what_nobody_believes(notaries: dict[str, Notary]) -> None:
    assert refusal(seal({"format_version": 99}), NOBODY) == "format_version"
    assert refusal(seal({"format_version": 99}), notaries["reader"]) == "unsigned"
    assert refusal(sealed(b"no JSON"), notaries["reader"]) == "unsigned"
    assert refusal(b'{"digest":"%s",\nno JSON' % (b"0" * 64), notaries["reader"]) == "corrupt"


@pytest.mark.parametrize(
    "change",
    [
        {
            "index": {"key": "main/files", "size": 1, "digest": "0" * 64},
            "files": {"key": "main/files", "size": 1, "digest": "0" * 64},
        },
        {"index": {"key": "other/index.zst", "size": 1, "digest": "0" * 64}},
        {"pages": 1, "zero_pages": 2},
        {"pages": 1 << 50},
        {"streams": [{"key": f"main/p{n}", "size": 17, "digest": "0" * 64, "frames": 0} for n in range(65)]},
        {"streams": [{"key": "other/pages-0.zst", "size": 17, "digest": "0" * 64, "frames": 0}]},
        {"streams": [{"key": "main/pages-0.zst", "size": 17, "digest": "0" * 64, "frames": 1 << 40}]},
        {"streams": [{"key": "../main/pages-0.zst", "size": 17, "digest": "0" * 64, "frames": 0}]},
        {"tasks": []},
        {"name": "../main"},
    ],
)
def test_a_manifest_that_cannot_be_is_corrupt(change: dict[str, object]) -> None:
    value = plain()
    value["images"][0].update(change)
    with pytest.raises(Corrupt):
        decoded(seal(value))


@pytest.mark.parametrize("what", ["images", "layers"])
def test_two_of_one_name_are_corrupt(what: str) -> None:
    value = plain()
    value[what] *= 2
    with pytest.raises(Corrupt):
        decoded(seal(value))


@pytest.mark.parametrize(
    "change",
    [
        {"pages": 3}, {"pages": 1}, {"pages": 0}, {"zero_pages": 3},
        {"bytes": 2 * PAGE + 512}, {"bytes": PAGE}, {"bytes": 0}, {"bytes": -512}, {"bytes": 1 << 53},
        {"pages": 1, "zero_pages": 0, "bytes": format.MIN_LAYER - 1, "entries": 1},
        {"entries": 0}, {"entries": 6}, {"entries": (1 << 53)},
        {"pages": 1 << 52, "bytes": 1 << 53, "entries": 2_000_001},
        {"index": {"key": "main/index.zst", "size": 1, "digest": "0" * 64}},
        {"index": {"key": "layer-index.zst", "size": 1, "digest": "0" * 64}},
        {"streams": [{"key": "main/pages-0.zst", "size": 100, "digest": "0" * 64, "frames": 1}]},
        {"name": "other"}, {"name": ""}, {"tasks": []}, {"files_bytes": 1},
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_is_corrupt(change: dict[str, object]) -> None:
    value = plain()
    value["layers"][0].update(change)
    with pytest.raises(Corrupt):
        decoded(seal(value))


@pytest.mark.parametrize(
    ("kind", "images", "layers", "good"),
    [
        ("simple", 1, 0, True), ("simple", 1, 1, False), ("simple", 0, 0, False), ("simple", 0, 1, False),
        ("rootfs", 1, 1, True), ("rootfs", 1, 0, True), ("rootfs", 0, 1, False), ("rootfs", 0, 0, False),
        ("rootfsonly", 0, 1, True), ("rootfsonly", 1, 1, False), ("rootfsonly", 0, 0, False), ("rootfsonly", 1, 0, False),
    ],
)  # fmt: skip
def test_a_manifest_has_what_its_kind_says(kind: str, images: int, layers: int, good: bool) -> None:
    value = plain()
    value.update(kind=kind, images=value["images"][:images], layers=value["layers"][:layers])
    if good:
        assert decoded(seal(value)).kind == kind
        return
    with pytest.raises(Corrupt, match=r"manifest: .*(rootfsonly|simple)"):
        decoded(seal(value))


def test_a_second_layer_must_be_of_another_container() -> None:
    value = plain()
    second = copy.deepcopy(value["layers"][0])
    for ref in (*second["streams"], second["index"]):
        ref["key"] = ref["key"].replace("layer-", "layer2-")
    value["layers"].append(second)
    with pytest.raises(Corrupt, match="one container"):
        decoded(seal(value))


@given(st.binary(max_size=400))
def test_any_bytes_are_an_error_of_ours(data: bytes) -> None:
    _, image = a_small_one()
    for decode in (decoded, lambda raw: decoded(sealed(raw)), lambda raw: format.decode_index(raw, image)):
        with pytest.raises(HibernodeError):
            decode(data)
