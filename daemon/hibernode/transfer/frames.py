"""Frames of one stream, read at once: verified, decrypted, inflated. Nothing of a frame is handed out before its digest was compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hibernode.errors import Corrupt
from hibernode.model import FRAME_PAGES, PAGE, Meter, StreamRef
from hibernode.ports import Store
from hibernode.transfer import codec, format
from hibernode.transfer.format import FrameTable, Index
from hibernode.transfer.places import Loan, Numbers
from hibernode.transfer.seal import Seal

BATCH = 16 << 20  # bytes of one ranged read: several frames, so that a request's latency is paid rarely


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


class Reader:
    """Reads batches, verified, decrypted and inflated. Of one thread: buffers and contexts are used again."""

    def __init__(self, store: Store, meter: Meter) -> None:
        self._store, self._meter = store, meter
        self._unpacker = codec.Unpacker()
        self._opened_into = memoryview(b"")  # made when it is needed
        self._buffer = np.empty(BATCH + 3 * FRAME_PAGES * PAGE, np.uint8).data  # only what is read into costs memory

    def read(self, batch: Batch) -> Iterator[tuple[np.void, list[memoryview]]]:
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


def dense(frame: np.void, content: list[memoryview], index: Index) -> memoryview:
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


def _insist_whole(frame: np.void, stored: memoryview, key: str) -> None:
    """Nothing is made of bytes that are not those of the index."""
    if format.digest(stored) != frame["digest"].tobytes():
        raise Corrupt(f"{key}: the frame at {frame['offset']} is damaged", key=key, offset=int(frame["offset"]))
