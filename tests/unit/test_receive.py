"""A hostile store: how much is read and allocated is bounded by us, not by what a manifest says."""

from __future__ import annotations

import random
import struct
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hibernode.errors import Corrupt
from hibernode.flow import Channel, Threads
from hibernode.model import PAGE, Cancel, ImageRef, Meter, ObjectRef, StreamRef, TaskFacts
from hibernode.transfer import codec, format
from hibernode.transfer.pageproto import PRESENT
from hibernode.transfer.receive import LayerReceiver, Receiver
from hibernode.transfer.seal import PIECE, Closer, Seal
from tests.fakes.store import MemoryStore
from tests.layers import PLAIN, sent

_ZSTD = struct.Struct("<IBQ")  # magic, descriptor: single segment + 8-byte content size, content size


def received(index: bytes, *, pages: int, zero_pages: int) -> Receiver:
    store = MemoryStore()
    store.put("id/main/index.zst", index)
    ref = ObjectRef(key="main/index.zst", size=len(index), digest=format.digest(index).hex())
    image = ImageRef(
        name="main", tasks=[TaskFacts(pid=7)], pages=pages, zero_pages=zero_pages, streams=[], index=ref,
        files=ref.model_copy(update={"key": "main/images.tar.zst"}),
    )  # fmt: skip
    return Receiver(store, Seal("id"), image, 1, Meter())


@pytest.mark.parametrize(
    ("pages", "inflated"), [(1 << 30, 32 << 30), (1 << 40, format.MAX_INDEX + 1), (1 << 40, 1 << 60), (1000, 1 << 30)]
)
def test_an_index_that_says_that_it_is_huge_is_not_inflated(pages: int, inflated: int) -> None:
    """Pages of zeros cost nothing: a manifest that names many of them must not lift the limit."""
    bomb = _ZSTD.pack(0xFD2FB528, 0xE0, inflated) + bytes(1000)
    receiver = received(bomb, pages=pages, zero_pages=pages)
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match=str(inflated)):
            receiver.fetch_index()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_index_object_larger_than_any_index_is_not_read() -> None:
    receiver = received(b"x" * 100, pages=1 << 40, zero_pages=1 << 40)
    huge = receiver._ref.index.model_copy(update={"size": format.MAX_INDEX + 1})
    receiver._ref = receiver._ref.model_copy(update={"index": huge})
    with pytest.raises(Corrupt, match="larger"):
        receiver.fetch_index()


def without_a_page(size: int, digest: str, stored: bytes) -> Receiver:
    """An image of nothing, and its one stream: what the manifest says of it, and what it is."""
    index = codec.deflate(format.encode_index(NOTHING))
    receiver = received(index, pages=0, zero_pages=0)
    receiver._store.put("id/main/pages-0.zst", stored)
    stream = StreamRef(key="main/pages-0.zst", size=size, digest=digest, frames=0)
    receiver._ref = receiver._ref.model_copy(update={"streams": [stream]})
    return receiver


NOTHING = format.Index(np.zeros(0, format.SEGMENT), np.zeros(0, format.FRAME), {})
TABLE = format.seek_table([], [])


def test_every_byte_of_a_stream_without_a_frame_is_compared_too() -> None:
    """It is a seek table and nothing else."""
    whole = without_a_page(len(TABLE), format.stream_digest([], TABLE), TABLE)
    with Threads(Cancel()) as threads:
        whole.verify_pages(whole.fetch_index(), threads)
    for at in range(len(TABLE)):
        damaged = TABLE[:at] + bytes([TABLE[at] ^ 1]) + TABLE[at + 1 :]
        receiver = without_a_page(len(TABLE), format.stream_digest([], TABLE), damaged)
        with pytest.raises(Corrupt, match="seek table"), Threads(Cancel()) as threads:
            receiver.verify_pages(receiver.fetch_index(), threads)


@pytest.mark.parametrize("size", [0, len(TABLE) - 1, len(TABLE) + 1])
def test_a_stream_without_a_frame_has_the_size_and_digest_of_one(size: int) -> None:
    with pytest.raises(Corrupt, match="fill"):
        without_a_page(size, format.stream_digest([], TABLE), bytes(size)).fetch_index()
    with pytest.raises(Corrupt, match="digest"):
        without_a_page(len(TABLE), "0" * 64, TABLE).fetch_index()


@pytest.mark.parametrize("data_key", [None, bytes(range(32))], ids=["plain", "encrypted"])
def test_an_index_of_several_pieces_comes_back(data_key: bytes | None) -> None:
    """Scattered memory, whose index is larger than what is encrypted at once."""
    count, seal, out = 400_000, Seal("id", data_key), list[bytes]()
    segments = np.zeros(count, format.SEGMENT)
    segments["dst_id"], segments["pages"], segments["flags"] = 7 << 8 | 1, 1, PRESENT
    segments["vaddr"] = np.random.default_rng(1).integers(1, 1 << 34, count, np.uint64) * PAGE
    closer = Closer(seal.of("main/index.zst"), lambda piece: out.append(bytes(piece)))
    closer.write(codec.deflate(format.encode_index(format.Index(segments, np.zeros(0, format.FRAME), {}))))
    closer.end()
    stored = b"".join(out)
    assert len(stored) > 2 * PIECE
    receiver = received(stored, pages=count, zero_pages=count)
    receiver._seal = seal
    assert (receiver.fetch_index().segments == segments).all()


class Far(MemoryStore):
    """Answers a read only when so many are asked for at once."""

    reads_in_flight = 3

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self._wanted, self._asked = wanted, 0
        self._together, self._changed = threading.Event(), threading.Lock()

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        if "index" not in key:
            with self._changed:
                self._asked += 1
                if self._asked == self._wanted:
                    self._together.set()
            assert self._together.wait(10), f"only {self._asked} of {self._wanted} reads came at once"
        super().read_into(key, offset, into)


def test_as_many_reads_are_in_flight_for_each_stream_as_the_store_needs(tmp_path: Path) -> None:
    """Six streams have six seek tables to be read, and a frame at least."""
    store = Far(6)
    (tmp_path / "data").write_bytes(random.Random(7).randbytes(5 << 20))
    ref = sent(tmp_path, store, streams=6)
    receiver = LayerReceiver(store, PLAIN, ref, 2, Meter())
    with Threads(Cancel()) as threads:
        receiver.verify_pages(receiver.fetch_index(), threads)


def test_no_reader_outlives_what_it_writes_to(tmp_path: Path) -> None:
    """The first frame is damaged while others are being written: the files are closed, and their memory unmapped, when all have ended."""
    receiver, ended, at_work = received(b"", pages=0, zero_pages=0), threading.Event(), threading.Event()
    receiver._threads = 2

    def work(jobs: Channel[int]) -> None:
        for job in jobs:
            if job:
                at_work.wait(10)
                raise Corrupt("a frame is damaged")
            at_work.set()
            threads.stopped.wait(10)  # in the middle of a write, which nobody can interrupt
            ended.set()

    class Scope(Threads):
        def __init__(self) -> None:
            super().__init__(Cancel())
            self.stopped = threading.Event()
            self.on_stop(self.stopped.set)

    def read() -> None:
        try:
            receiver._each([0, 1, *[0] * 1000], threads, work)  # type: ignore[list-item, arg-type]
        finally:
            assert ended.is_set()

    with pytest.raises(Corrupt), Scope() as threads:
        read()
