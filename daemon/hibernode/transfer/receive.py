"""Ranged reads on N streams -> frames, verified -> inflated -> pages files. Twin: `send.py`.

Every frame is compared with its digest before it is inflated, so damaged or foreign bytes reach neither zstd nor CRIU. Memory beside
the pages files themselves (tmpfs, the image's pages that are not zero): threads * (2 * batch) for reads, decrypted and inflated frames.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hibernode.errors import Corrupt
from hibernode.flow import Channel, Threads
from hibernode.model import FRAME_PAGES, PAGE, ImageRef, Meter, ObjectRef
from hibernode.ports import Store
from hibernode.transfer import codec, files, format
from hibernode.transfer.format import FrameTable, Index
from hibernode.transfer.pagemap import PageFiles
from hibernode.transfer.seal import PIECE, ObjectSeal, Seal, opened

BATCH = 16 << 20  # bytes of one ranged read: several frames, so that a request's latency is paid rarely


@dataclass(frozen=True)
class _Batch:
    """Frames that lie end to end in one stream."""

    key: str  # relative to the checkpoint
    first: int  # number of the first one in its stream
    frames: FrameTable

    @property
    def offset(self) -> int:
        return int(self.frames["offset"][0])

    @property
    def size(self) -> int:
        return int(self.frames["stored"].sum())


@dataclass(frozen=True)
class _Table:
    """The seek table at the end of one stream, as the index has it."""

    key: str
    offset: int
    content: bytes


class Receiver:
    """One image on its way out of the store."""

    def __init__(self, store: Store, seal: Seal, image: ImageRef, threads: int, meter: Meter) -> None:
        self._store, self._seal, self._image, self._meter = store, seal, image, meter
        self._prefix = seal.checkpoint_id
        self._threads = max(1, threads)

    def fetch_files(self, packed: Path, directory: Path) -> None:
        """CRIU's small images into `directory`; `packed` is where the tar lies meanwhile, and is gone afterwards."""
        try:
            files.fetch(self._store, self._prefix, self._image.files, self._seal.of(self._image.files.key), packed)
            files.unpack(packed, directory, limit=self._image.files_bytes or files.UNSAID_BYTES)
        finally:
            packed.unlink(missing_ok=True)
        self._meter.add(io=self._image.files.size)

    def verify_files(self) -> None:
        """Read CRIU's small images, compare them with their digest, and keep nothing."""
        files.verify(self._store, self._prefix, self._image.files, self._seal.of(self._image.files.key))
        self._meter.add(io=self._image.files.size)

    def fetch_index(self) -> Index:
        """The index, compared with its digest and with the manifest. Takes no more memory than `format.index_limit` and what it inflates
        to, whatever the manifest says."""
        limit = format.index_limit(self._image)
        data = self._fetch_small(self._image.index, limit)
        return format.decode_index(codec.inflate(data, limit=limit), self._image)

    def _fetch_small(self, ref: ObjectRef, limit: int) -> memoryview:
        seal = self._seal.of(ref.key)
        if ref.size > limit + (limit // PIECE + 1) * seal.extra:
            raise Corrupt(f"{ref.key} is larger than it can be")
        data = memoryview(bytearray(ref.size))
        if data:
            self._store.read_into(f"{self._prefix}/{ref.key}", 0, data)
        if format.digest(data).hex() != ref.digest:
            raise Corrupt(f"{ref.key} is damaged: its digest is not the manifest's", key=ref.key)
        self._meter.add(io=len(data))
        return _opened(seal, data) if seal.extra else data

    def fetch_pages(self, index: Index, directory: Path, threads: Threads) -> None:
        """All pages into pages files in `directory`, verified; returns when they are there."""
        with PageFiles(directory, index.segments) as pages:
            self._each_frame(index, threads, pages)

    def verify_pages(self, index: Index, threads: Threads) -> None:
        """Read, compare and inflate every frame, and keep nothing."""
        self._each_frame(index, threads, None)

    def _each_frame(self, index: Index, threads: Threads, pages: PageFiles | None) -> None:
        batches: Channel[_Batch | _Table] = threads.channel(1 << 20)
        workers = [threads.start(f"{self._image.name} read {n}", self._work, batches, index, pages) for n in range(self._threads)]
        for batch in self._plan(index):
            batches.put(batch)
        for table in self._tables(index):
            batches.put(table)
        batches.close()
        threads.join(workers)
        holes = (self._image.pages - int(index.frames["pages"].sum())) * PAGE  # runs of zero pages have no frame at all
        self._meter.add(raw=holes, zero=holes)

    def _plan(self, index: Index) -> list[_Batch]:
        """Batches of every stream in turn, so that the threads read from all of them at once."""
        rows = []
        for n, stream in enumerate(self._image.streams):
            frames = _of_stream(index, n)
            cuts = np.flatnonzero(np.diff(frames["offset"] // BATCH)) + 1 if len(frames) else np.array([], np.int64)
            for turn, (first, part) in enumerate(zip((0, *cuts), np.split(frames, cuts), strict=True)):
                if len(part):
                    rows.append((turn, n, _Batch(stream.key, int(first), part)))
        return [batch for _, _, batch in sorted(rows, key=lambda row: row[:2])]

    def _tables(self, index: Index) -> list[_Table]:
        """What no frame's digest covers of a stream. No restore needs it, but a stream of which a byte has changed is damaged."""
        found = []
        for n, stream in enumerate(self._image.streams):
            frames = _of_stream(index, n)
            table = format.seek_table(frames["stored"], frames["kept"] * PAGE)
            found.append(_Table(stream.key, stream.size - len(table), table))
        return found

    def _work(self, batches: Channel[_Batch | _Table], index: Index, pages: PageFiles | None) -> None:
        unpacker = codec.Unpacker()
        opened_into = self._seal.of("").scratch(format.MAX_STORED)
        buffer = np.empty(BATCH + 3 * FRAME_PAGES * PAGE, np.uint8).data  # only what is read into costs memory
        for batch in batches:
            if isinstance(batch, _Table):
                self._compare(batch)
                continue
            if batch.size > len(buffer):
                raise Corrupt(f"{batch.key}: frames are larger than they can be")
            data = buffer[: batch.size]
            self._store.read_into(f"{self._prefix}/{batch.key}", batch.offset, data)
            self._meter.add(io=batch.size, stored=batch.size)
            seal = self._seal.of(batch.key)
            for number, frame in enumerate(batch.frames, batch.first):
                at = int(frame["offset"]) - batch.offset
                stored = data[at : at + int(frame["stored"])]
                _insist_whole(frame, stored, batch.key)
                self._frame(frame, seal.open(number, stored, opened_into), unpacker, index, pages)

    def _compare(self, table: _Table) -> None:
        data = memoryview(bytearray(len(table.content)))
        self._store.read_into(f"{self._prefix}/{table.key}", table.offset, data)
        self._meter.add(io=len(data))
        if data != table.content:
            raise Corrupt(f"{table.key}: its seek table is damaged", key=table.key, offset=table.offset)

    def _frame(self, frame: np.void, packed: memoryview, unpacker: codec.Unpacker, index: Index, pages: PageFiles | None) -> None:
        first, count, kept = int(frame["first_page"]), int(frame["pages"]), int(frame["kept"])
        content = unpacker.unpack(packed, kept * PAGE)
        if pages is not None:
            numbers = np.arange(first, first + count, dtype=np.int64)
            pages.write(numbers if kept == count else numbers[index.keeps[first]], content)
        self._meter.add(raw=count * PAGE, zero=(count - kept) * PAGE)


def _of_stream(index: Index, number: int) -> FrameTable:
    """The frames of one stream, as they lie in it."""
    return np.sort(index.frames[index.frames["stream"] == number], order="offset")


def _insist_whole(frame: np.void, stored: memoryview, key: str) -> None:
    """Nothing is made of bytes that are not those of the index."""
    if format.digest(stored) != frame["digest"].tobytes():
        raise Corrupt(f"{key}: the frame at {frame['offset']} is damaged", key=key, offset=int(frame["offset"]))


def _opened(seal: ObjectSeal, data: memoryview) -> memoryview:
    """The whole of a small object."""
    whole = io.BytesIO()
    for piece in opened(seal, len(data), lambda at, size: data[at : at + size]):
        whole.write(piece)  # at once: the next one takes its place
    return whole.getbuffer()
