"""Chunks of the arena -> frames -> N streams -> uploads. Twin: `receive.py`.

Each stream is one thread with one upload and one zstd context; all of them take chunks from one channel. Opened before anything is
frozen. Memory while sending is bounded by

    arena + streams * (frames + zstd contexts + (parts in flight + 1) * part size) + 2 * socket buffer
        + 4 * 32 bytes * segments + 768 bytes * frames + 88 bytes * pages + 4 * 32 bytes * references

which is `memory_bound`, beside the interpreter and its libraries; the last two where pages have digests, of this image or the earlier
one, whichever has more. A stream has five frames at most: the kept pages, their planes, both compressed, and, where frames are encrypted,
the one on its way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from hibernode.errors import HibernodeError, Internal
from hibernode.flow import Channel, Threads
from hibernode.model import FRAME_PAGES, MAX_DIGESTED, PAGE, ImageRef, LayerRef, Meter, ObjectRef, PagesRef, StreamRef, TaskFacts
from hibernode.ports import Store, Upload
from hibernode.transfer import codec, fingerprint, format
from hibernode.transfer.arena import CHUNK, Chunk, Share
from hibernode.transfer.collect import SOCKET_BUFFER
from hibernode.transfer.fingerprint import Digests
from hibernode.transfer.format import FRAME, REFERENCE, SEGMENT, Digester, Index, KeepMap, KeepMaps, ReferenceTable, SegmentTable
from hibernode.transfer.known import KNOWN_PAGE, OWN_PAGE, Known, encode, joined, numbered
from hibernode.transfer.places import Numbers
from hibernode.transfer.seal import TAG, Closer, Seal

T = TypeVar("T")

_QUEUE = 1 << 16  # chunks waiting: more than any arena has, so that the arena alone is the bound
_FRAMES = 5  # of each stream, see above
_ZSTD_CONTEXT = 8 << 20  # to level 4, 6 MiB measured; level 5 takes 12 MiB, 9 takes 21, 15 takes 75: docs/operations.md adds them
_SEGMENT_COPIES = 4  # while the index is encoded: what was collected, as a table, joined with the rest, on its way
_REFERENCE_COPIES = 4  # likewise
_FRAME_FACTS = 768  # bytes: digest, sizes and keep map as Python objects (554 measured), and what the index has of it (192)
_log = logging.getLogger("hibernode.send")


def memory_bound(
    arena: int,
    streams: int,
    parts_in_flight: int,
    part_size: int,
    segments: int,
    frames: int,
    pages: int = 0,
    references: int = 0,
) -> int:
    """Bytes that a checkpoint needs at most, whatever the size of the workload (without the interpreter itself). `pages`: 0 where there are
    no increments."""
    per_stream = _FRAMES * CHUNK + _ZSTD_CONTEXT + (parts_in_flight + 1) * part_size
    index = _SEGMENT_COPIES * SEGMENT.itemsize * segments + _FRAME_FACTS * frames  # frames: memory / 4 MiB, and a few more
    increments = (KNOWN_PAGE + OWN_PAGE) * pages + _REFERENCE_COPIES * REFERENCE.itemsize * references
    return arena + streams * per_stream + 2 * SOCKET_BUFFER + index + increments


@dataclass(frozen=True)
class Packing:
    """How an image is stored: so many streams, and how their frames are packed."""

    streams: int
    level: codec.Level


class _Pages(AbstractContextManager["_Pages"]):
    """Pages on their way into the store. Inside its `with`, chunks put into `chunks` end up in the streams; `finish` completes them and
    says what they consist of. Left without `keep`, nothing of it stays in the store. `known`: pages that need not be stored again, and
    digests are stored of the others; None: no digests."""

    _STREAM: ClassVar[str]  # names of the objects in the folder
    _INDEX: ClassVar[str]

    def __init__(
        self,
        store: Store,
        seal: Seal,
        name: str,
        packing: Packing,
        share: Share,
        threads: Threads,
        meter: Meter,
        known: Known | None = None,
    ) -> None:
        self._store, self._seal, self._name, self._share = store, seal, name, share
        self._threads, self._meter, self._known = threads, meter, known
        keys = [f"{name}/{self._STREAM.format(n)}" for n in range(packing.streams)]
        self._streams = [_Stream(key, n, packing.level, seal, share, meter, known) for n, key in enumerate(keys)]
        self._uploads: list[_Object] = []
        self._kept = False
        self.chunks: Channel[Chunk] = threads.channel(_QUEUE)

    def __enter__(self) -> Self:
        try:
            for stream in self._streams:
                stream.made = self._open(stream.key)
            for stream in self._streams:
                stream.thread = self._threads.start(stream.key, stream.run, self.chunks)
        except BaseException as e:
            self.__exit__(type(e), e, e.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._kept:
            self._threads.fail(error or Internal(f"{self._name} was not kept"))
            self._threads.wait()
            for chunk in self.chunks.drain():
                self._share.give_back(chunk)
            self._undo()

    def _join(self) -> None:
        """No more chunks: wait for the streams."""
        self.chunks.close()
        self._threads.join([stream.thread for stream in self._streams if stream.thread])

    def _put_index(self, table: SegmentTable, pages: int, references: ReferenceTable) -> PagesRef:
        frames = np.concatenate([s.table() for s in self._streams])
        keeps = KeepMaps.of({page: keep for s in self._streams for page, keep in s.keeps.items()})
        index = format.encode_index(Index(table, frames, keeps, references))
        index_ref, _ = self._put(self._INDEX, lambda write: write(codec.deflate(index)))
        referenced = int(references["pages"].sum())
        zero_pages = pages - int(frames["kept"].sum()) - referenced
        streams = [s.ref() for s in self._streams]
        packers = [s.packer for s in self._streams]
        return PagesRef(
            name=self._name, pages=pages, zero_pages=zero_pages, streams=streams, index=index_ref, referenced=referenced,
            in_planes=sum(packer.in_planes for packer in packers), in_lz4=sum(packer.in_lz4 for packer in packers),
        )  # fmt: skip

    def keep(self) -> None:
        """It is part of a committed checkpoint now."""
        self._kept = True

    def _put(self, name: str, fill: Callable[[Callable[[bytes], None]], T]) -> tuple[ObjectRef, T]:
        key = f"{self._name}/{name}"
        made, digester = self._open(key), Digester()

        def write(data: codec.Buffer) -> None:
            digester.update(data)
            made.upload.write(data)
            self._meter.add(stored=len(data), io=len(data))

        closer = Closer(self._seal.of(key), write)
        said = fill(closer.write)
        closer.end()
        made.commit()
        return ObjectRef(key=key, size=digester.size, digest=digester.hex()), said

    def _open(self, key: str) -> _Object:
        whole = f"{self._seal.checkpoint_id}/{key}"
        made = _Object(whole, self._store.upload(whole))
        self._uploads.append(made)  # the undo, before the first byte
        return made

    def _undo(self) -> None:
        for made in self._uploads:
            made.upload.abort()
            if made.committed:  # else what may lie under that key is not ours
                try:
                    self._store.delete(made.key)
                except HibernodeError as e:
                    _log.warning("could not remove %s: %s", made.key, e)  # invisible without a manifest; gc finds it


class Sender(_Pages):
    """One image."""

    _STREAM, _INDEX = "pages-{}.zst", "index.zst"

    def finish(
        self, table: SegmentTable, pages: int, tasks: list[TaskFacts], pack: Callable[[Callable[[bytes], None]], int]
    ) -> ImageRef:
        """No more chunks: wait for the streams, write the small images (`pack` is given a writer, and says how many bytes they have) and
        the index."""
        self._join()
        files, files_bytes = self._put("images.tar.zst", pack)
        references, used = numbered(joined([table for s in self._streams for table in s.references]))
        ref = self._put_index(table, pages, references)
        bases = [self._known.bases[each] for each in used] if self._known else []
        more = {"digests": self._put_digests(self._known.seed, pages)} if self._known and pages <= MAX_DIGESTED else {}
        return ImageRef(**(dict(ref) | more), bases=bases, tasks=tasks, files=files, files_bytes=files_bytes)

    def _put_digests(self, seed: int, pages: int) -> ObjectRef:
        """Of the pages that are stored here."""
        table = np.zeros((pages, 2), np.uint64)
        for stream in self._streams:
            for numbers, digests in stream.digests:
                table[numbers] = digests
            stream.digests.clear()
        return self._put("digests.zst", lambda write: write(codec.deflate(encode(table, seed))))[0]


class LayerSender(_Pages):
    """One writable layer, beside the image of the same name, if there is one."""

    _STREAM, _INDEX = "layer-{}.zst", "layer-index.zst"

    def finish(self, pages: int, size: int, entries: int) -> LayerRef:
        """No more chunks: wait for the streams, and write the index. `size` is the length of the tar in bytes."""
        self._join()
        ref = self._put_index(format.layer_segments(pages), pages, format.no_references())
        return LayerRef(**dict(ref), bytes=size, entries=entries)


@dataclass(eq=False)
class _Object:
    """An object on its way, and whether it is in the store: a commit that raises has left nothing, or leaves it to `abort`."""

    key: str
    upload: Upload
    committed: bool = False

    def commit(self) -> None:
        self.upload.commit()
        self.committed = True


class _Stream:
    """One stream: a thread, an upload, a zstd context, and the frames it has written."""

    def __init__(
        self, key: str, number: int, level: codec.Level, seal: Seal, share: Share, meter: Meter, known: Known | None
    ) -> None:
        self.key = key
        self.references: list[ReferenceTable] = []
        self.digests: list[tuple[Numbers, Digests]] = []  # of what is stored: page numbers, and a row for each
        self._known, self._step = known, 0
        self.keeps: dict[int, tuple[int, bytes]] = {}  # first page -> pages, packed keep map
        self.made: _Object | None = None
        self.thread: threading.Thread | None = None
        self._number, self._share, self._meter = number, share, meter
        self.packer = codec.Packer(level)
        self._scratch = np.empty((FRAME_PAGES, PAGE // 8), np.uint64)
        self._seal = seal.of(key)
        self._sealed = self._seal.scratch(codec.PACKED_BYTES + TAG)
        self._frames: list[_Frame] = []
        self._offset = 0

    def run(self, chunks: Channel[Chunk]) -> None:
        assert self.made is not None
        for chunk in chunks:
            try:
                self._send(chunk, self.made.upload)
            finally:
                self._share.give_back(chunk)
        self.made.upload.write(self._seek_table())
        self.made.commit()

    def _send(self, chunk: Chunk, upload: Upload) -> None:
        pages = np.frombuffer(chunk.data, np.uint64).reshape(-1, PAGE // 8)
        keep = np.bitwise_or.reduce(pages, axis=1) != 0  # 25 GB/s here: cheaper than asking the first words first
        zeros = chunk.pages - int(keep.sum())
        if self._known is not None:
            keep = self._new(chunk.first_page, pages, keep, self._known)
        data = self._drop(pages, keep)
        kept, stored = len(data) // PAGE, 0
        if kept:
            pieces = self._seal.close(len(self._frames), self.packer.pack(data), self._sealed)
            stored = sum(len(piece) for piece in pieces)
            self._frames.append(_Frame(chunk.first_page, self._offset, stored, chunk.pages, kept, format.digest(*pieces)))
            if kept < chunk.pages:
                self.keeps[chunk.first_page] = chunk.pages, format.pack_keep(keep)
            upload.write(*pieces)
            self._offset += stored
        self._meter.add(raw=chunk.pages * PAGE, zero=zeros * PAGE, stored=stored, io=stored)

    def _new(self, first_page: int, pages: npt.NDArray[np.uint64], keep: KeepMap, known: Known) -> KeepMap:
        """Of the pages that are not all zero, those that no earlier checkpoint has."""
        rows = np.flatnonzero(keep)
        numbers, digests = first_page + rows, fingerprint.digests(pages, keep, known.seed)
        found, self._step = known.find(numbers, digests, self._step)
        self.references.append(known.references(numbers, found))
        new = found < 0
        self.digests.append((numbers[new], digests[new]))
        keep = np.zeros(len(pages), bool)
        keep[rows[new]] = True
        return keep

    def _drop(self, pages: npt.NDArray[np.uint64], keep: KeepMap) -> memoryview:
        """The pages that are kept, end to end."""
        if keep.all():
            return pages.reshape(-1).data.cast("B")
        kept = np.compress(keep, pages, axis=0, out=self._scratch[: int(keep.sum())])
        return kept.reshape(-1).data.cast("B")

    def _seek_table(self) -> bytes:
        return format.seek_table((f.stored for f in self._frames), (f.kept * PAGE for f in self._frames))

    def table(self) -> format.FrameTable:
        table = np.zeros(len(self._frames), FRAME)
        for name in ("first_page", "offset", "stored", "pages", "kept"):
            table[name] = [getattr(f, name) for f in self._frames]
        table["stream"] = self._number
        table["digest"] = np.frombuffer(b"".join(f.digest for f in self._frames), np.uint8).reshape(-1, 32)
        return table

    def ref(self) -> StreamRef:
        table = self._seek_table()
        digest = format.stream_digest((f.digest for f in self._frames), table)
        return StreamRef(key=self.key, size=self._offset + len(table), digest=digest, frames=len(self._frames))


class _Frame(NamedTuple):
    first_page: int
    offset: int
    stored: int
    pages: int
    kept: int
    digest: bytes
