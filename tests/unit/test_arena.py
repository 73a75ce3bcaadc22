"""The arena: memory that is there before anybody is frozen, shared by all actions, and nobody else's to read."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode.errors import Cancelled, Corrupt
from hibernode.flow import Channel, Stopped, Threads
from hibernode.model import PAGE, Cancel
from hibernode.transfer.arena import CHUNK, Arena, Chunk
from hibernode.transfer.filling import Held
from tests.flow.rig import until

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


def nothing() -> None:
    """For a `let_go` of somebody who keeps nothing back."""


def test_chunks_are_lent_one_by_one_and_come_back_empty(arena: Arena) -> None:
    with arena.share(arena.total_bytes, Cancel()) as share, Threads(Cancel()) as threads:
        chunks = [share.take(threads, nothing) for _ in range(4)]
        assert arena.used_bytes == arena.total_bytes == 16 << 20
        for n, chunk in enumerate(chunks):
            chunk.memory[:] = bytes([n]) * CHUNK
            chunk.pages, chunk.first_page = n, 7
        assert [chunk.memory[0] for chunk in chunks] == [0, 1, 2, 3], "no two share memory"
        assert [len(chunk.data) for chunk in chunks] == [0, PAGE, 2 * PAGE, 3 * PAGE]
        for chunk in chunks:
            share.give_back(chunk)
        again = share.take(threads, nothing)
        assert (again.pages, again.first_page, len(again.data)) == (0, 0, 0)
        share.give_back(again)


def test_who_waits_gets_the_next_that_comes_back(arena: Arena) -> None:
    got: list[Chunk] = []
    with arena.share(arena.total_bytes, Cancel()) as share, Threads(Cancel()) as threads:
        chunks = [share.take(threads, nothing) for _ in range(4)]
        blocked = threading.Event()
        waiting = threads.start("waits", lambda: got.append(share.take(threads, blocked.set)))
        assert blocked.wait(10), "it is told to let go before it blocks"
        share.give_back(chunks.pop())
        waiting.join(10)
        assert len(got) == 1
        for chunk in (*chunks, *got):
            share.give_back(chunk)


def test_a_part_is_waited_for_before_anybody_is_frozen(arena: Arena) -> None:
    """Also if nothing of the part before has been used yet."""
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with arena.share(arena.total_bytes, Cancel()):
            entered.set()
            assert leave.wait(10)

    with Threads(Cancel()) as threads:
        with arena.share(1, Cancel()) as share:
            threads.start("second", second)
            until(lambda: arena.waiting == 1, "somebody who waits")
            assert not entered.is_set()
            chunk = share.take(threads, nothing)
            share.full()
            assert not entered.is_set(), "a chunk is being shipped"
            share.give_back(chunk)
            assert entered.wait(10), "nothing of it is left: that the first has not gone yet is nobody's affair"
        leave.set()


def test_a_cancelled_action_waits_for_no_part(arena: Arena) -> None:
    cancel = Cancel()
    with arena.share(arena.total_bytes, Cancel()), Threads(Cancel()) as threads:
        threads.start("cancels", lambda: (until(lambda: arena.waiting == 1, "somebody who waits"), cancel.set("enough")))  # type: ignore[arg-type]
        with pytest.raises(Cancelled, match="enough"), arena.share(CHUNK, cancel):
            raise AssertionError("it has a part")
        assert arena.waiting == 0


def test_the_stop_of_one_action_does_not_end_the_wait_of_another(arena: Arena) -> None:
    got: list[Chunk] = []
    with arena.share(CHUNK, Cancel()) as share, Threads(Cancel()) as threads:
        chunks = [share.take(threads, nothing) for _ in range(4)]
        waiting = threads.start("waits", lambda: got.append(share.take(threads, nothing)))
        stopped: list[BaseException] = []

        def other_action() -> None:
            try:
                with Threads(Cancel()) as scope:
                    scope.on_stop(arena.wake)
                    scope.start("fails", lambda: scope.fail(Corrupt("stop")))
                    share.take(scope, nothing)
            except (Corrupt, Stopped) as e:
                stopped.append(e)

        other = threading.Thread(target=other_action, daemon=True)
        other.start()
        other.join(10)
        assert [type(e) for e in stopped] == [Corrupt]
        assert not got
        share.give_back(chunks.pop())
        waiting.join(10)
        for chunk in (*chunks, *got):
            share.give_back(chunk)


def test_actions_of_all_sizes_at_once_come_to_their_end() -> None:
    """Each takes all that it needs while it holds back what it has, as one does that stands still, then ships it. None waits for another
    then: all that blocks is the line."""
    arena, ends = Arena(64 << 20, at_once=3), list[int]()
    sizes = [1, 2, 3, 5, 8, 13, 16, 17, 40, 1, 1, 9]  # chunks; the arena has 16

    def action(chunks: int) -> None:
        with arena.share(chunks * CHUNK, Cancel()) as share, Threads(Cancel()) as threads:
            threads.on_stop(share.wake)
            out: Channel[Chunk] = threads.channel(1000)
            threads.start("ship", lambda: [share.give_back(chunk) for chunk in out] and None)
            held = Held(share)
            for _ in range(chunks):
                held.add(out, share.take(threads, held.release))
                assert arena.used_bytes <= arena.total_bytes
            held.release()
            share.full()
            out.close()
        ends.append(chunks)

    with Threads(Cancel()) as threads:
        for size in sizes:
            threads.start(f"{size} chunks", action, size)
    assert sorted(ends) == sorted(sizes)
    assert (arena.used_bytes, arena.waiting) == (0, 0)
