"""Ranged reads on N streams -> frames, verified -> inflated -> pages files. Twin: `send.py`.

Every frame is compared with its digest before it is inflated, so damaged or foreign bytes reach neither zstd nor CRIU. Of other
checkpoints that store pages of this image only those frames are read that have one. There are as many threads as streams, times as many
reads as the store needs at once. Memory beside the pages files themselves (tmpfs, the image's pages that are not zero), in frames of 4 MiB:
one for each thread, as it is stored, and for each stream three: decrypted, inflated, put together from its planes; and 2 MiB for each of
what it writes to. For a layer, which is used as it comes, `_AHEAD` windows of frames more, 48 MiB.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, Generic, ParamSpec, TypeVar

import numpy as np

from hibernode.errors import Corrupt
from hibernode.flow import Channel, Stopped, Threads
from hibernode.model import FRAME_PAGES, PAGE, BaseRef, ImageRef, LayerRef, Meter, ObjectRef, PagesRef
from hibernode.ports import Store
from hibernode.transfer import codec, files, format, known
from hibernode.transfer.fingerprint import Digests
from hibernode.transfer.format import FrameTable, Index
from hibernode.transfer.frames import Batch, Reader, Unpackers, batches_of, dense, numbers_of
from hibernode.transfer.pagemap import PageFiles
from hibernode.transfer.places import Loan, Source, insist
from hibernode.transfer.seal import PIECE, ObjectSeal, Seal, opened

R = TypeVar("R", bound=PagesRef)
P = ParamSpec("P")

# Of a layer, which is read in order: frames that are asked for together, and how many such windows are read or wait to be used.
_WINDOW, _AHEAD = 4, 3
_JOBS = 1 << 20  # more than there ever are: of a layer windows are the bound
_ZEROS = memoryview(bytes(FRAME_PAGES * PAGE))
Keep = Callable[[int, np.void, list[memoryview]], None]  # number of the source, frame, the pages that it has


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
        self._threads = max(1, threads) * store.reads_in_flight
        self._unpackers = Unpackers(max(1, threads))

    def fetch_index(self) -> Index:
        """The index, compared with its digest and with the manifest. Takes no more memory than `format.index_limit` and what it inflates
        to, whatever the manifest says."""
        return self.index_within(format.MAX_INDEX)

    def index_within(self, most: int) -> Index:
        """Likewise, of at most so many bytes."""
        limit = min(format.index_limit(self._ref), most)
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
        batches = [batch for _, batch in sorted(planned, key=lambda row: row[0])]
        self._each([*batches, *self._tables(index)], threads, self._work, index, pages)
        zeros, lent = self._ref.zero_pages * PAGE, 0 if pages is not None else self._ref.referenced * PAGE
        self._meter.add(raw=zeros + lent, zero=zeros)
        return sum(len(batch.frames) for batch in batches)

    def _each(
        self, jobs: Sequence[Batch | _Table], threads: Threads, work: Callable[Concatenate[Channel[Batch | _Table], P], None],
        *args: P.args, **kwargs: P.kwargs,
    ) -> None:  # fmt: skip
        """`work` on a channel of these, by several threads. None of them outlives this, however it ends: what they write to is closed next,
        and its memory unmapped."""
        channel: Channel[Batch | _Table] = threads.channel(len(jobs) + 1)
        for job in jobs:
            channel.put(job)
        channel.close()
        workers: list[threading.Thread] = []
        try:
            for n in range(self._threads):
                workers += [threads.start(f"{self._ref.name} read {n}", work, channel, *args, **kwargs)]
        except BaseException as e:
            threads.fail(e)
            raise
        finally:
            for worker in workers:
                worker.join()
        threads.join(workers)

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

    def _work(self, batches: Channel[Batch | _Table], index: Index, pages: PageFiles | None) -> None:
        reader = Reader(self._store, self._meter, self._unpackers)
        for batch in batches:
            if isinstance(batch, _Table):
                self._compare(batch)
                continue
            with closing(reader.read(batch)) as frames:
                for frame, content in frames:
                    self._use(batch.loan, frame, content, index, pages)

    def _use(self, loan: Loan | None, frame: np.void, content: list[memoryview], index: Index, pages: PageFiles | None) -> None:
        if loan is None:
            self._meter.add(raw=int(frame["kept"]) * PAGE)
        if pages is not None and loan is not None:
            self._hand_out(loan, frame, content, pages)
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
        """Likewise; and of the bases, by what the manifest says of them: all together no more than one may have. Every reference is to
        pages that are there."""
        index = super().fetch_index()
        sources, left = [Source(self._ref, self._seal, index)], format.MAX_INDEX - index.nbytes
        for base in self._ref.bases:
            seal = self._seal.base(base.checkpoint_id)
            sources.append(Source(base, seal, _Pages(self._store, seal, base, 1, self._meter).index_within(left)))
            left -= sources[-1].index.nbytes
        insist(sources)
        self.sources = sources
        return index

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
        with PageFiles(directory, index.segments, index.filled()) as pages:
            self._each_frame(index, threads, pages)

    def fetch_fixed(self, index: Index, directory: Path, threads: Threads, keep: Keep, *, tables: bool) -> None:
        """Where the filler brings the others: pages files of full length in `directory` that hold only what CRIU reads by itself, the pages
        that may not come later. `keep` is given each frame that was read for them: the others of it will be wanted. `tables`: the seek
        tables are compared, too; then every byte of the image is, when all frames have been read."""
        with PageFiles(directory, index.segments) as pages:
            frames = index.frames
            rows = np.flatnonzero(pages.needed(frames["first_page"].astype(np.int64), frames["pages"].astype(np.int64)))
            wanted = batches_of(frames[rows], numbers_of(frames)[rows], self._ref.streams, self._seal)
            fixed = pages.of_fixed(index.references)
            for number, source in enumerate(self.sources[1:]):
                loan = Loan(fixed[fixed["source"] == number], source)
                loan.cut()
                wanted += [batch for _, batch in _planned(source.ref, source.seal, source.index.frames, loan)]
            self._each([*wanted, *(self._tables(index) if tables else ())], threads, self._work_fixed, index, pages, keep)

    def _work_fixed(self, batches: Channel[Batch | _Table], index: Index, pages: PageFiles, keep: Keep) -> None:
        reader, numbers = (
            Reader(self._store, self._meter, self._unpackers),
            {id(source.seal): n for n, source in enumerate(self.sources)},
        )
        for batch in batches:
            if isinstance(batch, _Table):
                self._compare(batch)
                continue
            with closing(reader.read(batch)) as frames:
                for frame, content in frames:
                    if batch.loan is not None:
                        self._hand_out(batch.loan, frame, content, pages)
                    else:
                        _write_fixed(frame, content, index, pages)
                    keep(numbers[id(batch.seal)], frame, content)


def _write_fixed(frame: np.void, content: list[memoryview], index: Index, pages: PageFiles) -> None:
    """Of the pages that the frame has, those that may not come later."""
    first, count = int(frame["first_page"]), int(frame["pages"])
    kept = np.ones(count, bool) if frame["kept"] == count else index.keeps[first]
    for start, end in (pages.fixed(first, count) - first).tolist():
        if len(some := np.flatnonzero(kept[start:end])):
            before = int(np.count_nonzero(kept[:start]))
            pages.write(first + start + some, _cut(content, before * PAGE, len(some) * PAGE))


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
        jobs: Channel[Batch | _Table] = threads.channel(_JOBS)
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

    def _windows(self, index: Index) -> Iterator[tuple[FrameTable, list[Batch]]]:
        """Frames in the order of their pages, a few at a time, and how they are read."""
        numbers = numbers_of(index.frames)
        for at in range(0, len(index.frames), _WINDOW):
            window = index.frames[at : at + _WINDOW]
            yield window, batches_of(window, numbers[at : at + _WINDOW], self._ref.streams, self._seal)

    def _hole(self, pages: int) -> Iterator[memoryview]:
        self._meter.add(raw=pages * PAGE, zero=pages * PAGE)
        for at in range(0, pages, FRAME_PAGES):
            yield _ZEROS[: min(FRAME_PAGES, pages - at) * PAGE]

    def _read_ahead(self, jobs: Channel[Batch | _Table], index: Index, ready: _Ready) -> None:
        reader = Reader(self._store, self._meter, self._unpackers)
        for job in jobs:
            if isinstance(job, _Table):
                self._compare(job)
                continue
            with closing(reader.read(job)) as frames:
                for frame, content in frames:
                    ready.put(int(frame["first_page"]), dense(frame, content, index))
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


def _planned(ref: PagesRef, seal: Seal, frames: FrameTable, loan: Loan | None = None) -> Iterator[tuple[int, Batch]]:
    """Batches of every stream, each with its turn: taken by turns, the threads read from all streams at once."""
    rows = np.arange(len(frames)) if loan is None else np.flatnonzero(loan.wanted())
    turns = Counter[str]()
    for batch in batches_of(frames[rows], numbers_of(frames)[rows], ref.streams, seal, loan):
        yield turns[batch.key], batch
        turns[batch.key] += 1


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


def _opened(seal: ObjectSeal, data: memoryview) -> memoryview:
    """The whole of a small object."""
    whole = io.BytesIO()
    for piece in opened(seal, len(data), lambda at, size: data[at : at + size]):
        whole.write(piece)  # at once: the next one takes its place
    return whole.getbuffer()
