"""A hostile store: how much is read and allocated is bounded by us, not by what a manifest says."""

from __future__ import annotations

import struct
import tracemalloc

import pytest

from hibernode.errors import Corrupt
from hibernode.model import ImageRef, Meter, ObjectRef, TaskFacts
from hibernode.transfer import format
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal
from tests.fakes.store import MemoryStore

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
    huge = receiver._image.index.model_copy(update={"size": format.MAX_INDEX + 1})
    receiver._image = receiver._image.model_copy(update={"index": huge})
    with pytest.raises(Corrupt, match="larger"):
        receiver.fetch_index()
