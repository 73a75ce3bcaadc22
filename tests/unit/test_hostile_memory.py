"""What a hostile checkpoint made the daemon hold is let go at once when it is refused, not when the collector of cycles comes by."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from hibernode.errors import Corrupt
from hibernode.flow import Stopped, Threads
from hibernode.model import Cancel


class Buffer(bytearray):
    """One that can be asked whether it is still there."""


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def refuse(kept: list[weakref.ref[Buffer]]) -> None:
    buffer = Buffer(1 << 20)
    kept.append(weakref.ref(buffer))
    raise Corrupt("a frame is damaged")


def refused_in_a_thread(kept: list[weakref.ref[Buffer]]) -> None:
    with Threads(Cancel()) as threads:
        threads.join([threads.start("read", refuse, kept)])


def refused_beside_the_body(kept: list[weakref.ref[Buffer]]) -> None:
    with Threads(Cancel()) as threads:
        threads.start("read", refuse, kept)
        channel = threads.channel(1)
        for _ in channel:
            raise AssertionError("nothing was put")


def refused_in_the_body(kept: list[weakref.ref[Buffer]]) -> None:
    with Threads(Cancel()):
        refuse(kept)


def stopped(kept: list[weakref.ref[Buffer]]) -> None:
    with Threads(Cancel()) as threads:
        threads.start("read", refuse, kept)
        threads.wait()
        raise Stopped


@pytest.mark.parametrize("way", [refused_in_a_thread, refused_beside_the_body, refused_in_the_body, stopped])
def test_the_buffers_of_a_failed_transfer_are_let_go(way: object) -> None:
    kept: list[weakref.ref[Buffer]] = []
    with pytest.raises(Corrupt) as raised:
        way(kept)  # type: ignore[operator]
    del raised
    assert [ref() for ref in kept] == [None]
