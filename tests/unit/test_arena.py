"""The arena: memory that is there before anybody is frozen, shared by all actions, and nobody else's to read."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode.errors import Cancelled, Corrupt
from hibernode.flow import Stopped, Threads
from hibernode.model import PAGE, Cancel
from hibernode.transfer.arena import CHUNK, Arena, Chunk

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(16 << 20)
    yield made
    assert made.used_bytes == 0


def mapping(arena: Arena) -> str:
    """What smaps says of the mapping that the arena lies in: the kernel may join it with others of its kind."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(arena._map))
    for text in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", text)
        if found and int(found[1], 16) <= address < int(found[2], 16):
            return text
    raise AssertionError("no such mapping")


def test_a_core_dump_of_the_daemon_holds_nothing_of_the_arena() -> None:
    """`dd` in VmFlags is MADV_DONTDUMP: what the arena holds is other people's memory."""
    arena = Arena(48 << 20)
    assert arena.total_bytes == 48 << 20
    flags = re.search(r"^VmFlags: (.*)$", mapping(arena), re.MULTILINE)
    assert flags is not None
    assert "dd" in flags[1].split()


def test_all_of_it_is_touched_before_it_is_needed() -> None:
    """A page fault while a workload is frozen is part of its pause."""
    before = resident()
    arena = Arena(32 << 20)
    assert resident() - before >= arena.total_bytes * 0.95


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.parametrize(("size", "chunks"), [(16 << 20, 4), ((16 << 20) + 1, 4), ((20 << 20) - 1, 4), (1, 1)])
def test_it_is_cut_into_chunks(size: int, chunks: int) -> None:
    assert Arena(size).total_bytes == chunks * CHUNK


def test_chunks_are_lent_one_by_one_and_come_back_empty(arena: Arena) -> None:
    with Threads(Cancel()) as threads:
        chunks = [arena.take(threads) for _ in range(4)]
        assert arena.used_bytes == arena.total_bytes == 16 << 20
        for n, chunk in enumerate(chunks):
            chunk.memory[:] = bytes([n]) * CHUNK
            chunk.pages, chunk.first_page = n, 7
        assert [chunk.memory[0] for chunk in chunks] == [0, 1, 2, 3], "no two share memory"
        assert [len(chunk.data) for chunk in chunks] == [0, PAGE, 2 * PAGE, 3 * PAGE]
        for chunk in chunks:
            arena.give_back(chunk)
        again = arena.take(threads)
        assert (again.pages, again.first_page, len(again.data)) == (0, 0, 0)
        arena.give_back(again)


def test_who_waits_gets_the_next_that_comes_back(arena: Arena) -> None:
    got: list[Chunk] = []
    with Threads(Cancel()) as threads:
        chunks = [arena.take(threads) for _ in range(4)]
        waiting = threads.start("waits", lambda: got.append(arena.take(threads)))
        arena.give_back(chunks.pop())
        waiting.join(10)
        assert len(got) == 1
        for chunk in (*chunks, *got):
            arena.give_back(chunk)


def test_room_is_waited_for_before_anybody_is_frozen(arena: Arena) -> None:
    with Threads(Cancel()) as threads:
        chunks = [arena.take(threads) for _ in range(3)]
        arena.wait_for_room(CHUNK, Cancel())
        waiting = threads.start("waits", arena.wait_for_room, 2 * CHUNK - 1, Cancel())
        waiting.join(0.05)
        assert waiting.is_alive()
        arena.give_back(chunks.pop())
        waiting.join(10)
        assert not waiting.is_alive()
        for chunk in chunks:
            arena.give_back(chunk)
        arena.wait_for_room(1 << 40, Cancel())  # larger than the arena: it will never be all free at once for it


def test_a_cancelled_action_waits_for_no_room(arena: Arena) -> None:
    cancel = Cancel()
    with Threads(Cancel()) as threads:
        chunks = [arena.take(threads) for _ in range(4)]
        timer = threading.Timer(0.05, cancel.set, ["enough"])
        timer.start()
        with pytest.raises(Cancelled, match="enough"):
            arena.wait_for_room(CHUNK, cancel)
        timer.join()
        for chunk in chunks:
            arena.give_back(chunk)


def test_the_stop_of_one_action_does_not_end_the_wait_of_another(arena: Arena) -> None:
    got: list[Chunk] = []
    with Threads(Cancel()) as threads:
        chunks = [arena.take(threads) for _ in range(4)]
        waiting = threads.start("waits", lambda: got.append(arena.take(threads)))
        stopped: list[BaseException] = []

        def other_action() -> None:
            try:
                with Threads(Cancel()) as scope:
                    scope.on_stop(arena.wake)
                    scope.start("fails", lambda: scope.fail(Corrupt("stop")))
                    arena.take(scope)
            except (Corrupt, Stopped) as e:
                stopped.append(e)

        other = threading.Thread(target=other_action, daemon=True)
        other.start()
        other.join(10)
        assert [type(e) for e in stopped] == [Corrupt]
        assert not got
        arena.give_back(chunks.pop())
        waiting.join(10)
        for chunk in (*chunks, *got):
            arena.give_back(chunk)
