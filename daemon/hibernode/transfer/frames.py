"""Frames of one stream, read at once: verified, decrypted, inflated. Nothing of a frame is handed out before its digest was compared."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from hibernode.errors import Corrupt
from hibernode.model import PAGE, Meter, StreamRef
from hibernode.ports import Store
from hibernode.transfer import codec, format
from hibernode.transfer.format import FrameTable, Index, KeepMap
from hibernode.transfer.places import Loan, Numbers
from hibernode.transfer.seal import ObjectSeal, Seal

BATCH = 16 << 20  # bytes that are asked for at once: several frames, so that a request's latency is paid rarely


@dataclass(frozen=True)
class Batch:
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


class Unpackers:
    """So many frames are decrypted and inflated at a time: threads that wait for the store most of the time share the room for it."""

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[_Unpacker] = SimpleQueue()
        for _ in range(count):
            self._free.put(_Unpacker())

    @contextmanager
    def one(self) -> Iterator[_Unpacker]:
        """Waits for one that is free: no longer than it takes to unpack a frame and to write it."""
        unpacker = self._free.get()
        try:
            yield unpacker
        finally:
            self._free.put(unpacker)


class _Unpacker:
    def __init__(self) -> None:
        self._codec = codec.Unpacker()
        self._opened_into = memoryview(b"")  # made when it is needed

    def unpack(self, seal: ObjectSeal, number: int, stored: memoryview, size: int) -> list[memoryview]:
        self._opened_into = self._opened_into or seal.scratch(format.MAX_STORED)
        return self._codec.unpack(seal.open(number, stored, self._opened_into), size)


class Reader:
    """Reads batches, verified, decrypted and inflated. Of one thread: its buffer is used again."""

    def __init__(self, store: Store, meter: Meter, unpackers: Unpackers | None = None) -> None:
        self._store, self._meter = store, meter
        self._unpackers = unpackers or Unpackers(1)
        self._buffer = np.empty(format.MAX_STORED, np.uint8).data  # of one frame; only what is read into costs memory

    def read(self, batch: Batch) -> Generator[tuple[np.void, list[memoryview]]]:
        """Each frame with the pages that it kept, in pieces, which are good until the next frame is asked for. What comes behind it waits
        where the store's answer is, meanwhile. Close it: it holds one of the unpackers, and a connection."""
        seal = batch.seal.of(batch.key)
        with self._store.reading(f"{batch.seal.checkpoint_id}/{batch.key}", batch.offset, batch.size) as fill:
            for number, frame in enumerate(batch.frames, batch.first):
                stored = self._buffer[: int(frame["stored"])]
                fill(stored)
                self._meter.add(io=len(stored), stored=len(stored))
                _insist_whole(frame, stored, batch.name)
                with self._unpackers.one() as unpacker:
                    yield frame, unpacker.unpack(seal, number, stored, int(frame["kept"]) * PAGE)


def numbers_of(frames: FrameTable) -> Numbers:
    """The number of each frame in its stream, of all frames of an image."""
    numbers = np.empty(len(frames), np.int64)
    order = np.lexsort((frames["offset"], frames["stream"]))
    firsts = np.searchsorted(frames["stream"][order], frames["stream"][order])
    numbers[order] = np.arange(len(frames)) - firsts
    return numbers


def batches_of(
    frames: FrameTable, numbers: Numbers, streams: Sequence[StreamRef], seal: Seal, loan: Loan | None = None
) -> list[Batch]:
    """How some frames are read: those that lie end to end in one stream together, up to `BATCH` bytes of it."""
    if not len(frames):
        return []
    order = np.lexsort((frames["offset"], frames["stream"]))
    ordered, its = frames[order], numbers[order]
    apart = (ordered["stream"][1:] != ordered["stream"][:-1]) | (np.diff(its) != 1) | (np.diff(ordered["offset"] // BATCH) != 0)
    cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(ordered)]
    return [
        Batch(seal, streams[int(ordered["stream"][a])].key, int(its[a]), ordered[a:b], loan) for a, b in itertools.pairwise(cuts)
    ]


def spread(content: Iterable[memoryview], keep: KeepMap | None, pages: npt.NDArray[np.uint8]) -> None:
    """The pages that a frame kept to where they belong among those of its run. `keep`: which it did, None for all; `pages`: a row for each.
    The others are left as they are."""
    pieces = [np.frombuffer(piece, np.uint8) for piece in content]
    if keep is None:
        flat, at = pages.reshape(-1), 0
        for piece in pieces:
            np.copyto(flat[at : at + len(piece)], piece)  # without the interpreter's lock
            at += len(piece)
    elif pieces:
        packed = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        pages[: len(keep)][keep] = packed.reshape(-1, PAGE)


def dense(frame: np.void, content: Iterable[memoryview], index: Index) -> memoryview:
    """All pages of a frame, in memory of their own."""
    whole = frame["kept"] == frame["pages"]
    pages = (np.empty if whole else np.zeros)((int(frame["pages"]), PAGE), np.uint8)
    spread(content, None if whole else index.keeps[int(frame["first_page"])], pages)
    return pages.reshape(-1).data


def _insist_whole(frame: np.void, stored: memoryview, key: str) -> None:
    """Nothing is made of bytes that are not those of the index."""
    if format.digest(stored) != frame["digest"].tobytes():
        raise Corrupt(f"{key}: the frame at {frame['offset']} is damaged", key=key, offset=int(frame["offset"]))
