"""Format versions 1 to 3, pure: index, seek table, manifest; encode and decode, no I/O. `docs/image-format.md` says it in words.

An image's pages with content are numbered from 0 in the order CRIU sent them: segments take numbers in turn, a frame covers a run of
numbers. A frame stores the pages of its run that are not all zero, in order; its keep map says which. Pages that another checkpoint
stores are references: runs of numbers here that are runs of numbers there. What is neither kept nor referenced is zeros.
Everything here takes hostile bytes: sizes are compared with limits before anything is allocated, and every sum is checked.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from pydantic import ValidationError

from hibernode.errors import Corrupt, DumpFailed, Refused
from hibernode.model import FORMAT_VERSION, FRAME_PAGES, MAX_DIGESTED, MAX_STREAMS, PAGE, ImageRef, Manifest, PagesRef, Signature
from hibernode.ports import Notary
from hibernode.transfer.pageproto import PRESENT

SEGMENT = np.dtype([("dst_id", "<u8"), ("vaddr", "<u8"), ("pages", "<u8"), ("flags", "<u8")])
FRAME = np.dtype(
    [
        ("first_page", "<u8"),
        ("offset", "<u8"),
        ("stream", "<u4"),
        ("stored", "<u4"),
        ("pages", "<u4"),
        ("kept", "<u4"),
        ("digest", "u1", 32),
    ]
)
# Pages `first_page` on of this image are pages `source_page` on of the image that number `source` of its bases describes.
REFERENCE = np.dtype([("first_page", "<u8"), ("source_page", "<u8"), ("pages", "<u8"), ("source", "<u8")])
SegmentTable = npt.NDArray[Any]
FrameTable = npt.NDArray[Any]
ReferenceTable = npt.NDArray[Any]
KeepMap = npt.NDArray[np.bool_]
Stretches = npt.NDArray[np.int64]  # of page numbers: a row is (first, end); in order, and no two touch

# bytes, inflated. A TiB of memory is 17 MiB of frames, 50 MiB if all of them have zero pages, and 32 bytes for each segment: with 64 KiB
# of memory per segment, which is very scattered, 7 TiB fit.
MAX_INDEX = 4 << 30
MAX_MANIFEST = 64 << 20  # bytes; 100,000 tasks with ten threads each are about 15 MiB
_MAX_VALUES = 2 << 20  # in a manifest; those tasks are 1.7 million. 60 MiB of `[],` would be 3 GB of Python's objects
_MAGIC, _MAGIC_3 = b"HNINDEX1", b"HNINDEX3"  # of an index without references, and with
_HEADER = struct.Struct("<8sQQQ")  # magic, segments, frames, keep maps
_COUNT = struct.Struct("<Q")  # behind it, where there are references: how many
_KEEP_BYTES = FRAME_PAGES // 8
_STRETCH = FRAME_PAGES // 2  # a huge page
_KEEP_WORDS, _ALL = FRAME_PAGES // 64, (1 << 64) - 1
_KEEPS_AT_ONCE = 4096  # maps that are unpacked together, to be compared: 4 MiB
_MIN_STORED = 10  # bytes; no zstd frame that holds a page is shorter
MAX_STORED = FRAME_PAGES * PAGE * 2  # no zstd frame of 4 MiB is this long
MIN_ENTRY = 3 * 512  # bytes of a layer's tar: the least that an entry is
MIN_LAYER = MIN_ENTRY + 2 * 512  # its root, and the end of a tar
_PAGES_LIMIT = 1 << 40  # 4 PiB of memory

# zstd's seekable format (contrib/seekable_format in zstd): a skippable frame at the end of the stream.
_SKIPPABLE, _SEEKABLE = 0x184D2A5E, 0x8F92EAB1
_SEEK_HEADER, _SEEK_ENTRY, _SEEK_FOOTER = (
    struct.Struct("<II"),
    np.dtype([("stored", "<u4"), ("raw", "<u4")]),
    struct.Struct("<IBI"),
)


def digest(*pieces: bytes | memoryview) -> bytes:
    """BLAKE3, 32 bytes: 5.5 GB/s here on one core, where SHA-256 makes 1.6."""
    state = blake3()
    for piece in pieces:
        state.update(piece)
    return state.digest()


class Digester:
    """The digest and the length of an object that is written piece by piece."""

    def __init__(self) -> None:
        self._state, self.size = blake3(), 0

    def update(self, data: bytes | memoryview) -> None:
        self._state.update(data)
        self.size += len(data)

    def hex(self) -> str:
        return self._state.hexdigest()


# --- seek table and stream digest -------------------------------------------------------------------------------------------


def seek_table(stored: Iterable[int], raw: Iterable[int]) -> bytes:
    """The skippable frame that makes a stream seekable: stored and raw size of each frame, in order."""
    sizes = list(stored)
    entries = np.empty(len(sizes), _SEEK_ENTRY)
    entries["stored"], entries["raw"] = sizes, list(raw)
    body = entries.tobytes() + _SEEK_FOOTER.pack(len(entries), 0, _SEEKABLE)
    return _SEEK_HEADER.pack(_SKIPPABLE, len(body)) + body


def stream_digest(frame_digests: Iterable[bytes], table: bytes) -> str:
    """What the manifest says of a stream: the frames' digests in order, then the seek table. It covers every byte of the stream
    without hashing any of them twice."""
    return digest(b"".join(frame_digests), table).hex()


# --- index ------------------------------------------------------------------------------------------------------------------


def in_order(table: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Sorted by one column: ten times as fast as numpy sorts rows."""
    ordered: npt.NDArray[Any] = table[np.argsort(table[name], kind="stable")]
    return ordered


def no_references() -> ReferenceTable:
    return np.zeros(0, REFERENCE)


@dataclass(frozen=True)
class Index:
    """Segments in order, frames by page number, and for frames that dropped zero pages which pages they kept."""

    segments: SegmentTable
    frames: FrameTable
    keeps: Mapping[int, KeepMap]  # first_page -> bool per page of that frame's run
    references: ReferenceTable = field(default_factory=no_references)  # by first page

    @property
    def nbytes(self) -> int:
        return self.segments.nbytes + self.frames.nbytes + self.references.nbytes + len(self.keeps) * _KEEP_BYTES

    @property
    def pages(self) -> int:
        """Pages with content: how many numbers there are."""
        present = (self.segments["flags"] & PRESENT) != 0
        return int(self.segments["pages"][present].sum())

    def filled(self) -> Stretches:
        """The page numbers that have content, here or by reference; but for short stretches, in which nobody is interested."""
        whole = self.frames[self.frames["kept"] == self.frames["pages"]]
        partial = self.frames[self.frames["kept"] < self.frames["pages"]]["first_page"].tolist()
        rows = [_rows(whole), _rows(self.references), *(_runs(self.keeps[first]) + first for first in partial)]
        found: Stretches = np.concatenate(rows)
        found = found[np.argsort(found[:, 0])]
        cuts = np.flatnonzero(found[1:, 0] != found[:-1, 1])  # else they touch
        if not len(found):
            return found
        joined = np.stack([found[np.append(0, cuts + 1), 0], found[np.append(cuts, len(found) - 1), 1]], axis=1)
        long: Stretches = joined[joined[:, 1] - joined[:, 0] >= _STRETCH]
        return long


def encode_index(index: Index) -> bytes:
    """The index as bytes. DumpFailed if no reader would take it."""
    frames = np.sort(index.frames, order="first_page")
    keeps = [pack_keep(index.keeps[int(f["first_page"])]) for f in frames if f["kept"] < f["pages"]]
    references, many = in_order(index.references, "first_page"), len(index.references)
    head = _HEADER.pack(_MAGIC_3 if many else _MAGIC, len(index.segments), len(frames), len(keeps)) + (
        _COUNT.pack(many) if many else b""
    )
    size = len(head) + index.segments.nbytes + frames.nbytes + len(keeps) * _KEEP_BYTES + references.nbytes
    if size > MAX_INDEX:
        raise DumpFailed(f"the memory is too scattered: its index would have {size} bytes, at most {MAX_INDEX} can be stored")
    return b"".join([head, index.segments.tobytes(), frames.tobytes(), *keeps, references.tobytes()])


def pack_keep(keep: KeepMap) -> bytes:
    """As it is stored: one bit for each page that a frame can have."""
    return np.packbits(np.pad(keep, (0, FRAME_PAGES - len(keep)))).tobytes()


def _runs(keep: KeepMap) -> Stretches:
    """Runs of kept pages."""
    return np.flatnonzero(np.diff(np.pad(keep, 1).astype(np.int8))).reshape(-1, 2).astype(np.int64)


def _rows(table: FrameTable | ReferenceTable) -> Stretches:
    return np.stack([table["first_page"], table["first_page"] + table["pages"]], axis=1).astype(np.int64)


class KeepMaps(Mapping[int, KeepMap]):
    """Keep maps by first page, in the 128 bytes each that they have in the index; unpacked when somebody asks."""

    def __init__(self, first_pages: npt.NDArray[Any], pages: npt.NDArray[Any], packed: npt.NDArray[np.uint8]) -> None:
        """All of one length; in order of `first_pages`."""
        self._first, self._pages, self._packed = first_pages, pages, packed

    @classmethod
    def of(cls, packed: Mapping[int, tuple[int, bytes]]) -> Self:
        """Of (pages of the run, `pack_keep`) by first page."""
        first = sorted(packed)
        rows = np.frombuffer(b"".join(packed[page][1] for page in first), np.uint8).reshape(-1, _KEEP_BYTES)
        return cls(np.array(first, np.uint64), np.array([packed[page][0] for page in first], np.uint32), rows)

    def __getitem__(self, first_page: int) -> KeepMap:
        at = int(np.searchsorted(self._first, np.uint64(first_page)))
        if at == len(self._first) or self._first[at] != first_page:
            raise KeyError(first_page)
        return np.unpackbits(self._packed[at], count=int(self._pages[at])).astype(bool)

    def before(self, first_pages: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Of runs that have a map: how many of the first `places` pages are kept."""
        words, before = self._words
        rows, column = np.searchsorted(self._first, first_pages), np.minimum(places >> 6, _KEEP_WORDS - 1)
        within = words[rows, column] & ~(np.uint64(_ALL) >> (places - (column << 6)).astype(np.uint64))
        found: npt.NDArray[np.int64] = before[rows, column].astype(np.int64) + np.bitwise_count(within)
        return found

    @cached_property
    def _words(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint16]]:
        """The maps, 64 pages a word, the first in the highest bit; and how many are kept before each word. 160 bytes a map."""
        words = np.ascontiguousarray(self._packed).view(">u8").astype(np.uint64)
        counts = np.bitwise_count(words).astype(np.uint16)
        return words, np.cumsum(counts, axis=1, dtype=np.uint16) - counts

    def __iter__(self) -> Iterator[int]:
        return map(int, self._first)

    def __len__(self) -> int:
        return len(self._first)


def index_limit(image: PagesRef) -> int:
    """The largest index that is read for this image. The manifest's own counts bound it, because a segment has a page at least and a
    frame a page that is not zero; but counts can lie, and pages of zeros cost nothing, so there is a ceiling. Segments without content
    are bounded by the address space in use, which no fragmentation makes larger than the pages themselves by more than this."""
    kept = image.pages - image.zero_pages - image.referenced
    tables = (image.pages + (1 << 20)) * SEGMENT.itemsize + kept * (FRAME.itemsize + _KEEP_BYTES)
    references = _COUNT.size + image.referenced * REFERENCE.itemsize if image.referenced else 0
    return min(MAX_INDEX, _HEADER.size + tables + references)


def decode_index(data: bytes, image: PagesRef) -> Index:
    """The index of `image`, consistent in itself and with the manifest, or Corrupt."""
    if len(data) < _HEADER.size:
        raise Corrupt("index: too short")
    magic, n_segments, n_frames, n_keeps = _HEADER.unpack_from(data)
    at, n_references = _HEADER.size, 0
    if image.referenced and len(data) >= at + _COUNT.size:
        (n_references,) = _COUNT.unpack_from(data, at)
        at += _COUNT.size
    sizes = (n_segments * SEGMENT.itemsize, n_frames * FRAME.itemsize, n_keeps * _KEEP_BYTES, n_references * REFERENCE.itemsize)
    if magic != (_MAGIC_3 if image.referenced else _MAGIC) or len(data) != at + sum(sizes):
        raise Corrupt("index: not an index of its manifest's format version, or of the wrong length")
    segments = np.frombuffer(data, SEGMENT, n_segments, at)
    frames = np.frombuffer(data, FRAME, n_frames, at := at + segments.nbytes)
    keeps = np.frombuffer(data, np.uint8, n_keeps * _KEEP_BYTES, at := at + frames.nbytes).reshape(-1, _KEEP_BYTES)
    references = np.frombuffer(data, REFERENCE, n_references, at + keeps.nbytes)
    index = Index(segments, frames, _keep_maps(frames, keeps), references)
    _check_segments(index, image)
    _check_frames(index, image)
    _check_references(index, image)
    return index


def layer_segments(pages: int) -> SegmentTable:
    """What the index of a layer has for segments: one, of all its pages."""
    return np.array([(0, 0, pages, PRESENT)], SEGMENT)


def _keep_maps(frames: FrameTable, packed: npt.NDArray[np.uint8]) -> KeepMaps:
    partial = frames[frames["kept"] < frames["pages"]]
    first, pages, kept = (np.ascontiguousarray(partial[name]) for name in ("first_page", "pages", "kept"))
    if len(partial) != len(packed) or (frames["pages"] > FRAME_PAGES).any() or (first[:-1] >= first[1:]).any():
        raise Corrupt("index: frames and keep maps do not fit together")
    for at in range(0, len(packed), _KEEPS_AT_ONCE):
        some = slice(at, at + _KEEPS_AT_ONCE)
        keep = np.unpackbits(packed[some], axis=1)
        beyond = np.arange(FRAME_PAGES) >= pages[some, None]
        if (keep.sum(axis=1, dtype=np.uint32) != kept[some]).any() or keep[beyond].any():
            raise Corrupt("index: a keep map does not fit its frame")
    return KeepMaps(first, pages, packed)


def _check_segments(index: Index, image: PagesRef) -> None:
    pages = index.segments["pages"]
    empty = index.segments[pages == 0]
    if len(pages) and (
        pages.max() > _PAGES_LIMIT or (index.segments["vaddr"] % PAGE).any() or empty["vaddr"].any() or empty["flags"].any()
    ):
        raise Corrupt("index: a segment has an impossible address or length")
    if (index.segments["vaddr"] > (1 << 57) - pages * PAGE).any() or pages.sum(dtype=np.float64) > _PAGES_LIMIT:
        raise Corrupt("index: a segment lies outside of any address space")
    if index.pages != image.pages:
        raise Corrupt(f"index: {index.pages} pages, the manifest says {image.pages}")


def _check_frames(index: Index, image: PagesRef) -> None:
    if len(index.frames):
        _check_runs(index.frames, image)
    elif image.zero_pages + image.referenced != image.pages:
        raise Corrupt("index: no frames, the manifest knows some")
    for n, stream in enumerate(image.streams):
        _check_stream(index.frames[index.frames["stream"] == n], stream.frames, stream.size, stream.digest)


def _check_runs(frames: FrameTable, image: PagesRef) -> None:
    if (
        (frames["kept"] < 1).any()
        or (frames["pages"] < frames["kept"]).any()
        or ((frames["stored"] < _MIN_STORED) | (frames["stored"] > MAX_STORED)).any()
    ):
        raise Corrupt("index: a frame has impossible sizes")
    if frames["first_page"].max() > image.pages or frames["offset"].max() > 1 << 60:
        raise Corrupt("index: a frame lies outside of its image")
    ends = frames["first_page"] + frames["pages"]
    if (ends[:-1] > frames["first_page"][1:]).any() or ends[-1] > image.pages:
        raise Corrupt("index: frames overlap or reach beyond the image")
    if image.pages - int(frames["kept"].sum()) - image.referenced != image.zero_pages:
        raise Corrupt("index: the count of zero pages differs from the manifest's")
    if (frames["stream"] >= len(image.streams)).any():
        raise Corrupt("index: a frame names a stream that is not there")


def _check_references(index: Index, image: PagesRef) -> None:
    """Runs within the image, each page at most once and none that a frame keeps; as many as the manifest says. Whether there is such a
    source, and keeps such pages, is for `places.insist`: that takes the source's index."""
    table = index.references
    if not len(table):
        if image.referenced:
            raise Corrupt("index: no references, the manifest knows some")
        return
    first, pages = table["first_page"], table["pages"]
    if max(first.max(), pages.max(), table["source_page"].max()) > _PAGES_LIMIT or pages.min() < 1:
        raise Corrupt("index: a reference is of impossible pages")
    ends = first + pages
    if (ends[:-1] > first[1:]).any() or ends[-1] > image.pages:
        raise Corrupt("index: references overlap or reach beyond the image")
    if int(pages.sum()) != image.referenced:
        raise Corrupt("index: the count of referenced pages differs from the manifest's")
    ranks = Ranks(index)
    if (ranks.before(ends) != ranks.before(first)).any():
        raise Corrupt("index: a page is kept and referenced")


class Ranks:
    """Of the pages that the frames of an index keep: how many come before a page number. Looked up as often as one likes: what is summed
    up is kept, 32 bytes a frame."""

    def __init__(self, index: Index) -> None:
        frames = index.frames
        self._keeps = index.keeps
        self.first, self.pages, self._kept = (frames[name].astype(np.int64) for name in ("first_page", "pages", "kept"))
        self.sums = np.concatenate(([0], np.cumsum(self._kept)))  # before each frame

    def frames(self, numbers: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The frame that begins last, not after each number; -1: none does."""
        return np.searchsorted(self.first, numbers, side="right") - 1

    def before(self, numbers: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """For each page number: how many pages with a smaller one are kept."""
        numbers = numbers.astype(np.int64)
        if not len(self.first):
            return np.zeros(len(numbers), np.int64)
        rows = self.frames(numbers)
        places = np.clip(numbers - self.first[rows], 0, self.pages[rows])
        within = places.copy()
        partial = np.flatnonzero((self._kept < self.pages)[rows] & (rows >= 0) & (places > 0))
        if len(partial):
            within[partial] = _before(self._keeps, self.first[rows[partial]], places[partial])
        return np.where(rows < 0, 0, self.sums[rows] + within)


def _before(
    keeps: Mapping[int, KeepMap], first_pages: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    if isinstance(keeps, KeepMaps):
        return keeps.before(first_pages, places)
    return np.array(
        [keeps[first][:place].sum() for first, place in zip(first_pages.tolist(), places.tolist(), strict=True)], np.int64
    )


def _check_stream(frames: FrameTable, count: int, size: int, wanted: str) -> None:
    """The frames of one stream lie end to end from 0, and with their seek table give the size and the digest of the manifest."""
    frames = np.sort(frames, order="offset")
    ends = np.cumsum(frames["stored"], dtype=np.uint64)
    starts = np.concatenate(([0], ends[:-1])) if len(frames) else ends
    table = seek_table(frames["stored"], frames["kept"] * PAGE)
    total = (int(ends[-1]) if len(ends) else 0) + len(table)
    if len(frames) != count or (frames["offset"] != starts).any() or total != size:
        raise Corrupt("index: the frames of a stream do not fill it")
    if stream_digest([frames["digest"].tobytes()], table) != wanted:
        raise Corrupt("index: the frames' digests do not give the stream's digest of the manifest")


# --- manifest ---------------------------------------------------------------------------------------------------------------


# The envelope, in every format version to come: the first line is the digest of all bytes after it, the second may be a signature of
# the rest. A reader compares bytes and not values, so that nothing can be changed that would mean the same; and all of it is one
# JSON object still.
_DIGEST_LINE = re.compile(rb'\{"digest":"([0-9a-f]{64})",\n')
_SIGNATURE_LINE = re.compile(rb'"signature":\{"key":"([0-9a-f]{64})","ed25519":"([0-9a-f]{128})"\},\n')
_VERSION = "format_version"
_NOTHING: dict[str, Any] = {}
_DOMAIN = b"hibernode manifest v1\0"  # what is signed is a manifest, and nothing else that a key may be used for


def version_of(parts: Iterable[PagesRef]) -> int:
    """The oldest format version whose readers understand all of it. Digests of pages take version 3, too, though a restore needs none:
    readers of versions 1 and 2 would say `corrupt` of the key, and not that a newer one is needed."""
    parts = list(parts)
    if any(part.in_lz4 or part.referenced or part.digests or (isinstance(part, ImageRef) and part.bases) for part in parts):
        return 3
    return 2 if any(part.in_planes for part in parts) else 1


def encode_manifest(manifest: Manifest, notary: Notary) -> bytes:
    """The manifest in its envelope, signed if `notary` signs."""
    body = manifest.model_dump_json(indent=1).encode().removeprefix(b"{\n") + b"\n"
    signature = notary.sign(_signed(manifest.checkpoint_id, body))
    line = f'"signature":{signature.model_dump_json()},\n'.encode() if signature else b""
    return b'{"digest":"%s",\n' % digest(line, body).hex().encode() + line + body


def decode_manifest(data: bytes, checkpoint_id: str, notary: Notary) -> Manifest:
    """The manifest of that checkpoint, or Corrupt. The digest is compared before anything is parsed, then `notary` is asked (what it
    refuses is Refused) before anything is believed; a newer format is Refused("format_version")."""
    body = _opened(data, checkpoint_id, notary)
    _check_version(body)
    try:
        manifest = Manifest.model_validate_json(body)
    except (ValidationError, RecursionError) as e:
        first = e.errors()[0] if isinstance(e, ValidationError) else {"loc": ("",), "msg": "nested too deep"}
        where = ".".join(str(part) for part in first["loc"])
        raise Corrupt(f"manifest: {where}: {str(first['msg']).lower()}") from e
    if manifest.checkpoint_id != checkpoint_id:
        raise Corrupt(f"the manifest of {checkpoint_id} says that it is {manifest.checkpoint_id}")
    _check_images(manifest)
    return manifest


def _opened(data: bytes, checkpoint_id: str, notary: Notary) -> bytes:
    """What is in the envelope, as JSON."""
    if len(data) > MAX_MANIFEST or sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise Corrupt("manifest: too large")
    head = _DIGEST_LINE.match(data)
    if head is None:
        raise Corrupt("manifest: its first line is no digest", hint="it is no manifest of hibernode, or damaged")
    if digest(memoryview(data)[head.end() :]).hex().encode() != head[1]:
        raise Corrupt("manifest: it is damaged: its digest is not that of its first line")
    line = _SIGNATURE_LINE.match(data, head.end())
    signature = Signature(key=line[1].decode(), ed25519=line[2].decode()) if line else None
    body = data[line.end() if line else head.end() :]
    notary.check(_signed(checkpoint_id, body), signature)
    return b"{" + body


def _signed(checkpoint_id: str, body: bytes) -> bytes:
    """What a signature is of: this manifest, of this checkpoint and no other."""
    return _DOMAIN + checkpoint_id.encode() + digest(body)


def _check_version(data: bytes) -> None:
    try:
        version = json.loads(data, object_pairs_hook=_once)[_VERSION]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise Corrupt("manifest: not JSON with a format_version") from e
    if type(version) is not int:
        raise Corrupt("manifest: format_version is not a number")
    if not 1 <= version <= FORMAT_VERSION:
        raise Refused(
            "format_version",
            f"the checkpoint has format version {version}, this hibernode reads 1 to {FORMAT_VERSION}",
            prop="format_version",
            found=version,
            wanted=FORMAT_VERSION,
            hint="restore it with a newer hibernode",
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which nothing is kept but its version: there may be a hundred thousand. A key that comes twice would mean one
    thing to one reader and another to the next."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key comes twice")
    return {key: value for key, value in pairs if key == _VERSION} or _NOTHING


def _check_images(manifest: Manifest) -> None:
    keys = [ref.key for part in manifest.parts for ref in part.objects]
    if len(set(keys)) != len(keys):
        raise Corrupt("manifest: two objects have one key")
    if len({layer.name for layer in manifest.layers}) != len(manifest.layers):
        raise Corrupt("manifest: two layers of one container")
    for layer in manifest.layers:
        if not MIN_LAYER <= layer.bytes <= layer.pages * PAGE < layer.bytes + PAGE or layer.entries * MIN_ENTRY > layer.bytes:
            raise Corrupt(f"manifest: layer {layer.name} has impossible sizes")
    if manifest.format_version < (needed := version_of(manifest.parts)):
        what = "frames in planes" if needed == 2 else "frames in LZ4, and no references to other checkpoints"
        raise Corrupt(f"manifest: format version {manifest.format_version} has no {what}")
    for part in manifest.parts:
        _check_part(part)
    for image in manifest.images:
        _check_bases(image, manifest.checkpoint_id, encrypted=manifest.encryption is not None)
    for layer in manifest.layers:
        if layer.referenced or layer.digests:
            raise Corrupt(f"manifest: layer {layer.name} refers to other checkpoints")


def _check_part(part: PagesRef) -> None:
    if part.in_planes + part.in_lz4 > sum(stream.frames for stream in part.streams):
        raise Corrupt(f"manifest: {part.name} has more frames in planes, or in LZ4, than frames")
    if len(part.streams) > MAX_STREAMS or part.zero_pages + part.referenced > part.pages or part.pages > _PAGES_LIMIT:
        raise Corrupt(f"manifest: {part.name} has impossible counts")
    if part.digests is not None and part.pages > MAX_DIGESTED:
        raise Corrupt(f"manifest: {part.name} has too many pages to have digests of them")
    if any(stream.frames * _SEEK_ENTRY.itemsize > stream.size for stream in part.streams):
        raise Corrupt(f"manifest: {part.name} has a stream that cannot hold its frames")
    if any(not ref.key.startswith(f"{part.name}/") for ref in part.objects):
        raise Corrupt(f"manifest: {part.name} names objects outside of its folder")


def _check_bases(image: ImageRef, checkpoint_id: str, *, encrypted: bool) -> None:
    if bool(image.bases) != bool(image.referenced):
        raise Corrupt(f"manifest: {image.name} has bases without references, or references without bases")
    owners = [base.checkpoint_id for base in image.bases]
    if len({*owners, checkpoint_id}) != len(owners) + 1:
        raise Corrupt(f"manifest: {image.name} names a base twice, or itself")
    for base in image.bases:
        if (base.encryption is not None) != encrypted:  # who has no key must not have a node decrypt pages of others for him
            raise Corrupt(f"manifest: a base of {image.name} is encrypted, and the checkpoint is not, or the other way round")
        _check_part(base)
        keys = [ref.key for ref in base.objects]
        if len(set(keys)) != len(keys) or base.digests is None:
            raise Corrupt(f"manifest: a base of {image.name} has two objects of one key, or no digests")
