"""Ranged reads on N streams -> frames, verified -> inflated -> pages files. Twin: `send.py`.

Every frame is compared with its digest before it is inflated, so damaged or foreign bytes reach neither zstd nor CRIU. Of other
checkpoints that store pages of this image only those frames are read that have one. Memory beside
the pages files themselves (tmpfs, the image's pages that are not zero): threads * (2 * batch) for reads, decrypted and inflated frames;
for a layer, which is used as it comes, `_AHEAD` windows of frames more, 48 MiB.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from hibernode.errors import Corrupt
from hibernode.flow import Channel, Stopped, Threads
from hibernode.model import FRAME_PAGES, MAX_STREAMS, PAGE, BaseRef, ImageRef, LayerRef, Meter, ObjectRef, PagesRef
from hibernode.ports import Store
from hibernode.transfer import codec, files, format, known
from hibernode.transfer.fingerprint import Digests
from hibernode.transfer.format import FrameTable, Index
from hibernode.transfer.pagemap import PageFiles
from hibernode.transfer.places import Loan, Source, insist
from hibernode.transfer.seal import PIECE, ObjectSeal, Seal, opened

R = TypeVar("R", bound=PagesRef)

BATCH = 16 << 20  # bytes of one ranged read: several frames, so that a request's latency is paid rarely
# Of a layer, which is read in order: frames that are asked for together, and how many such windows are read or wait to be used.
_WINDOW, _AHEAD = 4, 3
_JOBS = 1 << 16  # more than there ever are: windows are the bound, and a stream's table each
_ZEROS = memoryview(bytes(FRAME_PAGES * PAGE))


@dataclass(frozen=True)
class _Batch:
    """Frames that lie end to end in one stream."""

    seal: Seal  # of the checkpoint that they lie in
    key: str  # relative to it
    first: int  # number of the first one in its stream
    frames: FrameTable
    loan: Loan | None = None  # what is wanted of them, where they are another checkpoint's

    @property
    def name(self) -> str:
        """For people, who know what checkpoint they asked for."""
        return self.key if self.loan is None else f"{self.seal.checkpoint_id}/{self.key}"

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


class _Pages(Generic[R]):
    """The pages of one image or layer on their way out of the store."""

    def __init__(self, store: Store, seal: Seal, ref: R, threads: int, meter: Meter) -> None:
        self._store, self._seal, self._ref, self._meter = store, seal, ref, meter
        self._prefix = seal.checkpoint_id
        self._named = f"{self._prefix}/" if isinstance(ref, BaseRef) else ""  # before keys, for people
        self._threads = max(1, threads)

    def fetch_index(self) -> Index:
        """The index, compared with its digest and with the manifest. Takes no more memory than `format.index_limit` and what it inflates
        to, whatever the manifest says."""
        limit = format.index_limit(self._ref)
        data = self._fetch_small(self._ref.index, limit)
        return format.decode_index(codec.inflate(data, limit=limit), self._ref)

    def _fetch_small(self, ref: ObjectRef, limit: int) -> memoryview:
        seal = self._seal.of(ref.key)
        if ref.size > limit + (limit // PIECE + 1) * seal.extra:
            raise Corrupt(f"{self._named}{ref.key} is larger than it can be")
        data = memoryview(bytearray(ref.size))
        if data:
            self._store.read_into(f"{self._prefix}/{ref.key}", 0, data)
        if format.digest(data).hex() != ref.digest:
            raise Corrupt(f"{self._named}{ref.key} is damaged: its digest is not the manifest's", key=f"{self._named}{ref.key}")
        self._meter.add(io=len(data))
        return _opened(seal, data) if seal.extra else data

    def fetch_digests(self) -> tuple[Digests, int]:
        """The digests of the pages that it stores, for an increment, and the seed of their chain. Corrupt where there are none."""
        if self._ref.digests is None:
            raise Corrupt(f"{self._named}{self._ref.name} has no digests of its pages")
        limit = known.digests_size(self._ref.pages)
        stored = self._fetch_small(self._ref.digests, codec.deflated_bound(limit))
        return known.decode(codec.inflate(stored, limit=limit), self._ref.pages)

    def verify_pages(self, index: Index, threads: Threads) -> int:
        """Read, compare and inflate every frame, and keep nothing; how many they were."""
        return self._each_frame(index, threads, None)

    def _each_frame(self, index: Index, threads: Threads, pages: PageFiles | None) -> int:
        planned = [*_planned(self._ref, self._seal, index.frames)]
        for loan in self._loans(index):
            if pages is not None:
                loan.cut()
            planned += _planned(loan.source.ref, loan.source.seal, loan.source.index.frames, loan)
        batches: Channel[_Batch | _Table] = threads.channel(len(planned) + MAX_STREAMS)
        workers = [threads.start(f"{self._ref.name} read {n}", self._work, batches, index, pages) for n in range(self._threads)]
        for _, batch in sorted(planned, key=lambda row: row[0]):
            batches.put(batch)
        for table in self._tables(index):
            batches.put(table)
        batches.close()
        threads.join(workers)
        zeros, lent = self._ref.zero_pages * PAGE, 0 if pages is not None else self._ref.referenced * PAGE
        self._meter.add(raw=zeros + lent, zero=zeros)
        return sum(len(batch.frames) for _, batch in planned)

    def _loans(self, index: Index) -> Iterable[Loan]:  # noqa: ARG002 - an image has some
        """What it has of other checkpoints."""
        return ()

    def _tables(self, index: Index) -> list[_Table]:
        """What no frame's digest covers of a stream. No restore needs it, but a stream of which a byte has changed is damaged."""
        found = []
        for n, stream in enumerate(self._ref.streams):
            frames = _of_stream(index, n)
            table = format.seek_table(frames["stored"], frames["kept"] * PAGE)
            found.append(_Table(stream.key, stream.size - len(table), table))
        return found

    def _work(self, batches: Channel[_Batch | _Table], index: Index, pages: PageFiles | None) -> None:
        reader = _Reader(self._store, self._meter)
        for batch in batches:
            if isinstance(batch, _Table):
                self._compare(batch)
                continue
            for frame, content in reader.read(batch):
                if batch.loan is None:
                    self._meter.add(raw=int(frame["kept"]) * PAGE)
                if pages is not None and batch.loan is not None:
                    self._hand_out(batch.loan, frame, content, pages)
                elif pages is not None:
                    first, count = int(frame["first_page"]), int(frame["pages"])
                    numbers = np.arange(first, first + count, dtype=np.int64)
                    pages.write(numbers if frame["kept"] == count else numbers[index.keeps[first]], content)

    def _hand_out(self, loan: Loan, frame: np.void, content: list[memoryview], pages: PageFiles) -> None:
        """The pages of another checkpoint's frame that are wanted to where they belong."""
        count = 0
        for part in loan.parts(frame):
            pages.write_run(part.first_page, part.pages, _cut(content, part.place * PAGE, part.pages * PAGE))
            count += part.pages
        self._meter.add(raw=count * PAGE)

    def _compare(self, table: _Table) -> None:
        data = memoryview(bytearray(len(table.content)))
        self._store.read_into(f"{self._prefix}/{table.key}", table.offset, data)
        self._meter.add(io=len(data))
        if data != table.content:
            raise Corrupt(f"{table.key}: its seek table is damaged", key=table.key, offset=table.offset)


class Receiver(_Pages[ImageRef]):
    """One image on its way out of the store. `sources`, when its index is fetched: itself and its bases, as `places.find` takes them."""

    sources: Sequence[Source] = ()

    def fetch_index(self) -> Index:
        """Likewise; and of the bases, by what the manifest says of them. Every reference is to pages that are there."""
        index = super().fetch_index()
        self.sources = [Source(self._ref, self._seal, index), *map(self._source, self._ref.bases)]
        insist(self.sources)
        return index

    def _source(self, base: BaseRef) -> Source:
        seal = self._seal.base(base.checkpoint_id)
        return Source(base, seal, _Pages(self._store, seal, base, 1, self._meter).fetch_index())

    def digests_of(self, base: Source) -> tuple[Digests, int]:
        """`fetch_digests` of one of its bases."""
        return _Pages(self._store, base.seal, base.ref, 1, self._meter).fetch_digests()

    def _loans(self, index: Index) -> Iterable[Loan]:
        for number, source in enumerate(self.sources[1:]):
            yield Loan(index.references[index.references["source"] == number], source)

    def fetch_files(self, packed: Path, directory: Path) -> None:
        """CRIU's small images into `directory`; `packed` is where the tar lies meanwhile, and is gone afterwards."""
        try:
            files.fetch(self._store, self._prefix, self._ref.files, self._seal.of(self._ref.files.key), packed)
            files.unpack(packed, directory, limit=self._ref.files_bytes or files.UNSAID_BYTES)
        finally:
            packed.unlink(missing_ok=True)
        self._meter.add(io=self._ref.files.size)

    def verify_files(self) -> None:
        """Read CRIU's small images, compare them with their digest, and keep nothing."""
        files.verify(self._store, self._prefix, self._ref.files, self._seal.of(self._ref.files.key))
        self._meter.add(io=self._ref.files.size)

    def fetch_pages(self, index: Index, directory: Path, threads: Threads) -> None:
        """All pages into pages files in `directory`, verified; returns when they are there."""
        with PageFiles(directory, index.segments) as pages:
            self._each_frame(index, threads, pages)


class LayerReceiver(_Pages[LayerRef]):
    """One writable layer on its way out of the store."""

    def fetch_index(self) -> Index:
        index = super().fetch_index()
        if not np.array_equal(index.segments, format.layer_segments(self._ref.pages)):
            raise Corrupt("index: a layer has one segment, of all its pages")
        return index

    def pieces(self, index: Index, threads: Threads) -> Generator[memoryview]:
        """The bytes of all its pages in order, the zeros behind the tar included, in pieces of 4 MiB at most. A frame is compared with its
        digest before anything of it is given out; those to come are read meanwhile, `_AHEAD` windows of them and no more. Raises Corrupt,
        what the store raises, or `Stopped`; the last piece has come when the seek tables were compared, too."""
        ready = _Ready(threads)
        jobs: Channel[_Batch | _Table] = threads.channel(_JOBS)
        workers = [
            threads.start(f"{self._ref.name} layer {n}", self._read_ahead, jobs, index, ready) for n in range(self._threads)
        ]
        windows, asked, at = self._windows(index), deque[FrameTable](), 0
        while True:
            for frames, batches in itertools.islice(windows, _AHEAD - len(asked)):
                asked.append(frames)
                for batch in batches:
                    jobs.put(batch)
            if not asked:
                break
            for frame in asked.popleft():
                first = int(frame["first_page"])
                yield from self._hole(first - at)
                yield ready.take(first)
                at = first + int(frame["pages"])
        for table in self._tables(index):
            jobs.put(table)
        jobs.close()
        threads.join(workers)
        yield from self._hole(self._ref.pages - at)

    def _windows(self, index: Index) -> Iterator[tuple[FrameTable, list[_Batch]]]:
        """Frames in the order of their pages, a few at a time, and how they are read: those that lie end to end in a stream together."""
        frames, numbers = index.frames, np.empty(len(index.frames), np.int64)  # of each in its stream
        order = np.lexsort((frames["offset"], frames["stream"]))
        firsts = np.searchsorted(frames["stream"][order], frames["stream"][order])
        numbers[order] = np.arange(len(frames)) - firsts
        for at in range(0, len(frames), _WINDOW):
            window, its = frames[at : at + _WINDOW], numbers[at : at + _WINDOW]
            order = np.lexsort((window["offset"], window["stream"]))
            ordered, its = window[order], its[order]
            apart = (ordered["stream"][1:] != ordered["stream"][:-1]) | (np.diff(its) != 1)
            cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(ordered)]
            yield (
                window,
                [
                    _Batch(self._seal, self._ref.streams[int(ordered["stream"][a])].key, int(its[a]), ordered[a:b])
                    for a, b in itertools.pairwise(cuts)
                ],
            )

    def _hole(self, pages: int) -> Iterator[memoryview]:
        self._meter.add(raw=pages * PAGE, zero=pages * PAGE)
        for at in range(0, pages, FRAME_PAGES):
            yield _ZEROS[: min(FRAME_PAGES, pages - at) * PAGE]

    def _read_ahead(self, jobs: Channel[_Batch | _Table], index: Index, ready: _Ready) -> None:
        reader = _Reader(self._store, self._meter)
        for job in jobs:
            if isinstance(job, _Table):
                self._compare(job)
                continue
            for frame, content in reader.read(job):
                ready.put(int(frame["first_page"]), _dense(frame, content, index))
                count, kept = int(frame["pages"]), int(frame["kept"])
                self._meter.add(raw=count * PAGE, zero=(count - kept) * PAGE)


class _Ready:
    """What has been read and is not used yet, by first page."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._contents: dict[int, memoryview] = {}
        self._changed = threading.Condition()
        threads.on_stop(self._wake)

    def put(self, first_page: int, content: memoryview) -> None:
        with self._changed:
            self._contents[first_page] = content
            self._changed.notify_all()

    def take(self, first_page: int) -> memoryview:
        with self._changed:
            self._changed.wait_for(lambda: self._threads.stopping or first_page in self._contents)
            if self._threads.stopping:
                raise Stopped
            return self._contents.pop(first_page)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Reader:
    """Reads batches, verified, decrypted and inflated. Of one thread: buffers and contexts are used again."""

    def __init__(self, store: Store, meter: Meter) -> None:
        self._store, self._meter = store, meter
        self._unpacker = codec.Unpacker()
        self._opened_into = memoryview(b"")  # made when it is needed
        self._buffer = np.empty(BATCH + 3 * FRAME_PAGES * PAGE, np.uint8).data  # only what is read into costs memory

    def read(self, batch: _Batch) -> Iterator[tuple[np.void, list[memoryview]]]:
        """Each frame with the pages that it kept, in pieces, which are good until the next frame is asked for."""
        if batch.size > len(self._buffer):
            raise Corrupt(f"{batch.name}: frames are larger than they can be")
        data = self._buffer[: batch.size]
        self._store.read_into(f"{batch.seal.checkpoint_id}/{batch.key}", batch.offset, data)
        self._meter.add(io=batch.size, stored=batch.size)
        seal = batch.seal.of(batch.key)
        self._opened_into = self._opened_into or seal.scratch(format.MAX_STORED)
        for number, frame in enumerate(batch.frames, batch.first):
            at = int(frame["offset"]) - batch.offset
            stored = data[at : at + int(frame["stored"])]
            _insist_whole(frame, stored, batch.name)
            yield frame, self._unpacker.unpack(seal.open(number, stored, self._opened_into), int(frame["kept"]) * PAGE)


def _dense(frame: np.void, content: list[memoryview], index: Index) -> memoryview:
    """All pages of a frame, in memory of their own."""
    first, count, kept = int(frame["first_page"]), int(frame["pages"]), int(frame["kept"])
    packed = np.empty(kept * PAGE, np.uint8)
    at = 0
    for piece in content:
        packed[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    if kept == count:
        return packed.data
    pages = np.zeros((count, PAGE), np.uint8)
    pages[index.keeps[first]] = packed.reshape(-1, PAGE)
    return pages.reshape(-1).data


def _planned(ref: PagesRef, seal: Seal, frames: FrameTable, loan: Loan | None = None) -> Iterator[tuple[tuple[int, int], _Batch]]:
    """Batches of every stream, each with its turn: taken by turns, the threads read from all streams at once."""
    wanted = np.ones(len(frames), bool) if loan is None else loan.wanted()
    for n, stream in enumerate(ref.streams):
        rows = np.flatnonzero(frames["stream"] == n)
        rows = rows[np.argsort(frames["offset"][rows])]
        numbers = np.flatnonzero(wanted[rows])
        mine = frames[rows[numbers]]
        cuts = np.flatnonzero((np.diff(mine["offset"] // BATCH) != 0) | (np.diff(numbers) != 1)) + 1
        for turn, (first, part) in enumerate(zip(np.split(numbers, cuts), np.split(mine, cuts), strict=True)):
            if len(part):
                yield (turn, n), _Batch(seal, stream.key, int(first[0]), part, loan)


def _cut(content: list[memoryview], offset: int, size: int) -> list[memoryview]:
    """So many bytes out of the middle."""
    taken = []
    for piece in content:
        if offset < len(piece) and size:
            taken.append(piece[offset : offset + size])
            size -= len(taken[-1])
        offset = max(0, offset - len(piece))
    return taken


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
