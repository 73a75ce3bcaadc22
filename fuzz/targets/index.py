"""`index.zst`, and what a restore does with it: the index is decoded, pages files are laid out and frames written into them, those of
another checkpoint, too; and `digests.zst`.

The manifest belongs to the enemy too, so the built ones come with an `ImageRef` that agrees with whatever the tables say, with frames
whose digests are right: only the checks that remain stand between them and the pages files.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from fuzz.feed import Feed
from fuzz.guard import guarded, require
from fuzz.targets import golden
from hibernode.errors import Corrupt
from hibernode.flow import Threads
from hibernode.model import FRAME_PAGES, MAX_STREAMS, PAGE, BaseRef, Cancel, ImageRef, Meter, ObjectRef, StreamRef, TaskFacts
from hibernode.ports import Store
from hibernode.transfer import codec, format, known
from hibernode.transfer.pagemap import PageFiles
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal

MAX_LENGTH = 8192
_PACKED, _TABLES, _BUILT, _MANY, _BORROWED = 0, 1, 2, 3, 4
_BASE = "0123abcd-0123-4567-89ab-0123456789ab"
_HEADER = struct.Struct("<8sQQQ")
_TASKS = [TaskFacts(pid=1)]
_MOST_PAGES = 3 * FRAME_PAGES  # that one run writes
_MOST_SPACES = 50  # address spaces: two files each
_DIGEST = "0" * 64


@dataclass
class _Shelf:
    """The part of a store that is read from here."""

    objects: dict[str, bytes] = field(default_factory=dict)
    reads_in_flight: int = 1

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        piece = self.objects.get(key, b"")[offset : offset + len(into)]
        if len(piece) != len(into):
            raise Corrupt(f"{key} is too short")
        into[:] = piece

    @contextmanager
    def reading(self, key: str, offset: int, size: int) -> Iterator[Callable[[memoryview], None]]:
        pieces = io.BytesIO(self.objects.get(key, b"")[offset : offset + size])

        def fill(into: memoryview) -> None:
            if pieces.readinto(into) != len(into):
                raise Corrupt(f"{key} is too short")

        yield fill


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(5)
    if how == _PACKED:
        _packed(feed.rest())
    elif how == _TABLES:
        _tables(feed.rest())
    elif how == _MANY:
        _many(feed)
    elif how == _BORROWED:
        _borrowed(feed)
    else:
        _built(feed)


def _packed(stored: bytes) -> None:
    """The object itself, with the golden manifest."""
    image = ImageRef.model_validate(json.loads(golden.manifest())["images"][0])
    with guarded(Corrupt):
        format.decode_index(codec.inflate(stored, limit=format.index_limit(image)), image)


def _tables(raw: bytes) -> None:
    """The index inflated, with a manifest that agrees, and no frames behind it."""
    image = _agreeing(raw, {})
    with guarded(Corrupt) as place:
        index = format.decode_index(raw, image)
        require(index.pages == image.pages, "an index of another size than its manifest says")
        if len(np.unique(index.segments["dst_id"])) <= _MOST_SPACES:
            with PageFiles(place, index.segments):
                _check(place, image)


def _built(feed: Feed) -> None:
    segments = _segments(feed)
    shelf, frames, keeps = _Shelf(), [], []
    streams = 1 + feed.below(3)
    lengths = [0] * streams
    present = int(segments["pages"][segments["flags"] & 4 != 0].sum(dtype=np.uint64))
    at = 0
    for _ in range(feed.below(6)):
        pages = min(present - at, 1 + feed.below(FRAME_PAGES)) if present > at else feed.below(3)
        if not 0 < pages <= FRAME_PAGES:
            break
        kept, stream = max(1, pages - feed.below(4)), feed.below(streams)
        stored = _content(feed, kept)
        frames.append((at, lengths[stream], stream, len(stored), pages, kept, np.frombuffer(format.digest(stored), np.uint8)))
        keeps += [np.packbits(np.arange(FRAME_PAGES) < kept).tobytes()] if kept < pages else []
        shelf.objects[f"p/main/pages-{stream}.zst"] = shelf.objects.get(f"p/main/pages-{stream}.zst", b"") + stored
        lengths[stream] += len(stored)
        at += pages + (feed.below(3) if feed.byte() > 200 else 0)
    table = np.array(frames, format.FRAME)
    _spoil(segments, feed)
    _spoil(table, feed)
    raw = (
        _HEADER.pack(b"HNINDEX1", len(segments), len(table), len(keeps)) + segments.tobytes() + table.tobytes() + b"".join(keeps)
    )
    image = _agreeing(raw, {f"main/pages-{n}.zst": length for n, length in enumerate(lengths)})
    with guarded(Corrupt) as place:
        _restore(shelf, image, raw, place)


def _borrowed(feed: Feed) -> None:
    """An image with pages in another one: references that lie one behind the other in what its own frames leave free, to runs of the
    other, whose index and frames are honest, or nearly."""
    segments, shelf = _segments(feed), _Shelf()
    present = int(segments["pages"][segments["flags"] & 4 != 0].sum(dtype=np.uint64))
    frames, keeps, end = _frames(feed, shelf, "p", present // 2)
    others, other_keeps, there = _frames(feed, shelf, _BASE, 1 + feed.below(2500))
    rows = []
    for _ in range(feed.below(8)):
        end += feed.below(4)
        first = feed.below(max(1, there))
        pages = min(1 + feed.below(700), present - end, there - first if feed.below(8) else 700)
        if pages < 1:
            break
        rows.append((end, first, pages, feed.byte() == 255))
        end += pages
    references = np.array(rows, format.REFERENCE)
    if how := feed.below(8):
        _spoil((references, frames, others, references[:0])[how % 4], feed)
    raw = _HEADER.pack(b"HNINDEX3", len(segments), len(frames), len(keeps)) + len(references).to_bytes(8, "little")
    raw += segments.tobytes() + frames.tobytes() + b"".join(keeps) + references.tobytes()
    base = np.array([(1 << 8 | 1, 0, max(1, there), 4)], format.SEGMENT)
    its = _HEADER.pack(b"HNINDEX1", 1, len(others), len(other_keeps)) + base.tobytes() + others.tobytes() + b"".join(other_keeps)
    shelf.objects[f"{_BASE}/main/index.zst"] = codec.deflate(its)
    lent = sum(references["pages"].tolist())
    image = _said(segments, frames, raw)
    other = _said(base, others, its)
    with guarded(Corrupt) as place:
        known.decode(feed.take(feed.below(64)), feed.below(3)) if feed.byte() > 250 else None
        try:
            more = {"checkpoint_id": _BASE, "digests": other.index.model_copy(update={"key": "main/digests.zst"})}
            ref = BaseRef.model_validate(
                {**other.model_dump(exclude={"tasks", "files", "files_bytes", "bases", "digests"}), **more}
            )
            image = ImageRef.model_validate(
                image.model_dump()
                | {"referenced": lent, "zero_pages": max(0, image.zero_pages - lent), "bases": [ref.model_dump()]}
            )
        except ValidationError:
            return
        _restore(shelf, image, raw, place)


def _frames(feed: Feed, shelf: _Shelf, prefix: str, pages: int) -> tuple[np.ndarray, list[bytes], int]:
    """Frames of runs that follow each other, within so many pages, in a stream on the shelf; keep maps; where they end."""
    frames, keeps, at, length, key = [], [], 0, 0, f"{prefix}/main/pages-0.zst"
    for _ in range(feed.below(5)):
        count = min(1 + feed.below(FRAME_PAGES), pages - at)
        if count < 1:
            break
        kept = max(1, count - (feed.below(4) if feed.byte() > 200 else 0))
        stored = _content(feed, kept)
        frames.append((at, length, 0, len(stored), count, kept, np.frombuffer(format.digest(stored), np.uint8)))
        keeps += [np.packbits(np.arange(FRAME_PAGES) < kept).tobytes()] if kept < count else []
        shelf.objects[key] = shelf.objects.get(key, b"") + stored
        length, at = length + len(stored), at + count
    return np.array(frames, format.FRAME), keeps, at


def _many(feed: Feed) -> None:
    """Very many segments, of pages of zeros in one address space or in many: a few KiB in a store."""
    count = feed.very_many(1 << 20, 1 << 9)
    spaces = feed.pick((1, 2, 50, 4000))
    segments = np.zeros(count, format.SEGMENT)
    segments["dst_id"] = (np.arange(count) % spaces + 1) << 8 | 1
    segments["vaddr"], segments["pages"], segments["flags"] = PAGE * feed.byte(), 1 + feed.byte(), feed.pick((4, 0, 6))
    raw = _HEADER.pack(b"HNINDEX1", count, 0, 0) + segments.tobytes()
    image = _agreeing(raw, {})
    with guarded(Corrupt, memory=4 * segments.nbytes + (16 << 20)) as place:
        index = format.decode_index(raw, image)
        with PageFiles(place, index.segments):
            _check(place, image)


def _segments(feed: Feed) -> format.SegmentTable:
    rows = []
    for _ in range(feed.below(8)):
        space = feed.pick((1 << 8 | 1, 2 << 8 | 1, 9 << 8 | 2, 1 << 8 | 2, 0, (1 << 64) - 1, feed.byte() << 8 | feed.byte()))
        vaddr = feed.below(1 << 12) * PAGE
        rows.append((space, vaddr, 1 + feed.below(1500), feed.pick((4, 4, 4, 0, 2, 6, 1, 5, 7))))
    return np.array(rows, format.SEGMENT)


def _content(feed: Feed, kept: int) -> bytes:
    """A frame of so many pages; one time in eight of another length, or of none."""
    pages = kept if feed.below(8) else feed.below(FRAME_PAGES)
    if feed.byte() % 2:
        return b"".join(
            bytes(piece) for piece in codec.Packer(1 if feed.byte() % 2 else None).pack(memoryview(bytes(pages * PAGE)))
        )
    return codec.deflate(feed.take(16) * (pages * PAGE // 16)) if pages else feed.take(8)


def _spoil(table: np.ndarray, feed: Feed) -> None:
    """Write any number into any field of any row, a few times."""
    for _ in range(feed.below(4) if len(table) else 0):
        row, name = feed.below(len(table)), feed.pick([n for n in table.dtype.names or () if n != "digest"])
        bits = table.dtype[name].itemsize * 8
        table[row][name] = feed.number() % (1 << bits) if feed.byte() % 2 else int(table[row][name]) ^ 1 << feed.below(bits)


def _agreeing(raw: bytes, lengths: dict[str, int]) -> ImageRef:
    """What a manifest would say that agrees with these tables as far as any can."""
    _, n_segments, n_frames, _ = _HEADER.unpack(raw[: _HEADER.size].ljust(_HEADER.size, b"\0"))
    at = _HEADER.size
    segments = _rows(raw, format.SEGMENT, n_segments, at)
    return _said(segments, _rows(raw, format.FRAME, n_frames, at + segments.nbytes), raw, len(lengths))


def _said(segments: np.ndarray, frames: np.ndarray, raw: bytes, streams: int = 1) -> ImageRef:
    pages = sum(segments["pages"][segments["flags"] & 4 != 0].tolist())  # as Python counts: these may overflow
    zero = pages - sum(frames["kept"].tolist())
    count = min(MAX_STREAMS, max([streams, *(frames["stream"] + 1).tolist()]))
    try:
        return ImageRef(
            name="main",
            tasks=_TASKS,
            pages=pages,
            zero_pages=max(0, zero),
            streams=[_stream(n, np.sort(frames[frames["stream"] == n], order="offset")) for n in range(count)],
            index=_index_object(raw),
            files=ObjectRef(key="main/images.tar.zst", size=1, digest=_DIGEST),
        )
    except ValidationError:  # more than any manifest can say: some of it then
        return ImageRef(
            name="main", tasks=_TASKS, pages=1 << 40, zero_pages=0, streams=[], index=_index_object(raw),
            files=ObjectRef(key="main/images.tar.zst", size=1, digest=_DIGEST),
        )  # fmt: skip


def _rows(raw: bytes, dtype: np.dtype, count: int, at: int) -> np.ndarray:
    return np.frombuffer(raw, dtype, max(0, min(count, (len(raw) - at) // dtype.itemsize)), min(at, len(raw)))


def _stream(n: int, frames: format.FrameTable) -> StreamRef:
    table = format.seek_table(frames["stored"].tolist(), (frames["kept"] * PAGE).tolist())
    digest = format.stream_digest((f.tobytes() for f in frames["digest"]), table)
    size = sum(int(f["stored"]) for f in frames) + len(table)
    return StreamRef(key=f"main/pages-{n}.zst", size=size, digest=digest, frames=len(frames))


def _index_object(raw: bytes) -> ObjectRef:
    stored = codec.deflate(raw)
    return ObjectRef(key="main/index.zst", size=len(stored), digest=format.digest(stored).hex())


def _restore(shelf: _Shelf, image: ImageRef, raw: bytes, place: Path) -> None:
    """As `restore.py` does it, with the threads of a Receiver; then nothing is where it does not belong."""
    shelf.objects["p/main/index.zst"] = codec.deflate(raw)
    store: Store = shelf  # type: ignore[assignment] # only what a Receiver calls
    receiver = Receiver(store, Seal("p"), image, 1, Meter())
    index = receiver.fetch_index()
    require(index.pages == image.pages, "an index of another size than its manifest says")
    if image.pages - image.zero_pages > _MOST_PAGES or len(np.unique(index.segments["dst_id"])) > _MOST_SPACES:
        return  # honest or not, it takes its time
    for n, stream in enumerate(image.streams):
        mine = np.sort(index.frames[index.frames["stream"] == n], order="offset")
        key, table = f"p/{stream.key}", format.seek_table(mine["stored"], mine["kept"] * PAGE)
        shelf.objects[key] = shelf.objects.get(key, b"") + table
    with Threads(Cancel()) as threads:
        receiver.fetch_pages(index, place, threads)
    _check(place, image)


def _check(place: Path, image: ImageRef) -> None:
    names = {path.name for path in place.iterdir()}
    require(all(name.startswith(("pages-", "pagemap-")) and name.endswith(".img") for name in names), f"files {names}")
    length = sum((place / name).stat().st_size for name in names if name.startswith("pages-"))
    require(length == image.pages * PAGE, f"{length} bytes of pages files for {image.pages} pages")


def seeds() -> dict[str, bytes]:
    packed = golden.index()
    raw = codec.inflate(packed, limit=1 << 20)
    plain = bytes([_BUILT, 2, 0, 1, 0, 9, 0, 0, 2, 5, 0, 80, 0, 0, 1, 3, 9, 0, 2, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    return {
        "packed": bytes([_PACKED]) + packed,
        "tables": bytes([_TABLES]) + raw,
        "no-pages": bytes([_TABLES]) + _HEADER.pack(b"HNINDEX1", 0, 0, 0),
        "built": plain,
        "many": bytes([_MANY, 200, 0, 2, 1, 0, 0]),
        "borrowed": bytes([_BORROWED, 2, 0, 1, 0, 9, 0, 0, 2, 5, 0, 80, 0, 0, 1, 3, 9, 0, 2, 0, 1, 1, 0, 0, 0, 1, 1, 1])
        + bytes(range(40)),
        "borrowed-more": bytes([_BORROWED]) + bytes(range(3, 80)) + bytes(60),
        "built-more": bytes([_BUILT, 5]) + bytes(range(1, 60)) + bytes(60),
    }
