"""Threads of one transfer: the first error wins, a stop wakes everybody, nothing outlives the scope."""

# ruff: noqa: PT012 - a scope raises as a whole, with everything that happens in it

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from hibernode.errors import Cancelled, Corrupt, DumpFailed, Stuck
from hibernode.flow import Channel, Stopped, Threads
from hibernode.model import Cancel
from hibernode.transfer.arena import Arena

pytestmark = pytest.mark.timeout(20)  # whoever is not woken hangs

ARENA = Arena(16 << 20)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> object:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
    assert not ARENA.used_bytes


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def fails(error: BaseException) -> None:
    raise error


def test_everything_goes_through_in_order() -> None:
    seen: list[int] = []
    with Threads(Cancel()) as threads:
        channel: Channel[int] = threads.channel(2)
        threads.start("reader", lambda: seen.extend(channel))
        for n in range(100):
            channel.put(n)
            assert len(channel) <= 2
        channel.close()
    assert seen == list(range(100))


def test_many_readers_share_what_comes() -> None:
    seen: list[list[int]] = [[], [], []]
    with Threads(Cancel()) as threads:
        channel: Channel[int] = threads.channel(3)
        for mine in seen:
            threads.start("reader", lambda mine=mine: mine.extend(channel))
        for n in range(300):
            channel.put(n)
        channel.close()
    assert sorted(n for mine in seen for n in mine) == list(range(300))


def test_the_error_of_a_thread_is_raised_where_the_scope_ends() -> None:
    error = Corrupt("first")
    with pytest.raises(Corrupt) as raised, Threads(Cancel()) as threads:
        threads.start("bad", fails, error)
    assert raised.value is error


def test_the_first_error_wins() -> None:
    first, go = Corrupt("first"), threading.Event()
    with pytest.raises(Corrupt) as raised, Threads(Cancel()) as threads:

        def second() -> None:
            go.wait(10)
            raise DumpFailed("because of the first")

        threads.on_stop(go.set)
        threads.start("second", second)
        threads.start("first", fails, first)
        until(lambda: threads.stopping)
        raise DumpFailed("the body's, because of the first")
    assert raised.value is first


def test_what_the_body_raises_stops_the_others_and_is_raised() -> None:
    error = DumpFailed("the body")
    with pytest.raises(DumpFailed) as raised, Threads(Cancel()) as threads:
        channel: Channel[int] = threads.channel(1)
        threads.start("reader", lambda: list(channel) and None)
        raise error
    assert raised.value is error


def test_a_mere_stop_is_never_what_people_see() -> None:
    real = Corrupt("the real one")
    with pytest.raises(Corrupt) as raised, Threads(Cancel()) as threads:
        threads.fail(Stopped())
        threads.start("bad", fails, real).join()
        raise Stopped
    assert raised.value is real


@pytest.mark.parametrize("late", [False, True])
def test_an_undo_that_failed_outranks_its_cause(late: bool) -> None:
    with pytest.raises(Stuck), Threads(Cancel()) as threads:
        threads.start("bad", fails, Corrupt("the cause")).join()
        if late:
            raise Stuck("left suspended")
        threads.start("undo", fails, Stuck("left suspended")).join()


def test_join_raises_the_first_error_of_anybody() -> None:
    with pytest.raises(Corrupt, match="somebody else"), Threads(Cancel()) as threads:
        good = threads.start("good", lambda: None)
        threads.start("bad", fails, Corrupt("somebody else")).join()
        threads.join([good])
        pytest.fail("joined as if all was well")


# --- a stop wakes -----------------------------------------------------------------------------------------------------------


def blocked_put(threads: Threads, at: threading.Event) -> None:
    channel: Channel[int] = threads.channel(1)
    channel.put(1)
    at.set()
    channel.put(2)


def blocked_get(threads: Threads, at: threading.Event) -> None:
    channel: Channel[int] = threads.channel(1)
    at.set()
    for _ in channel:
        pytest.fail("there was nothing")


def blocked_take(threads: Threads, at: threading.Event) -> None:
    with ARENA.share(ARENA.total_bytes, Cancel()) as share:
        threads.on_stop(share.wake)
        chunks = [share.take(threads, lambda: None) for _ in range(4)]
        try:
            share.take(threads, at.set)  # it lets go, and waits
        finally:
            for chunk in chunks:
                share.give_back(chunk)


BLOCKS = [blocked_put, blocked_get, blocked_take]
Block = Callable[[Threads, threading.Event], None]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("how", ["another thread", "the body", "a cancel", "a cancel in time"])
def test_a_stop_wakes(block: Block, how: str) -> None:
    cancel, blocked = Cancel(), threading.Event()
    error: type[BaseException] = Cancelled if "cancel" in how else Corrupt
    with pytest.raises(error), Threads(cancel) as threads:
        thread = threads.start("blocked", block, threads, blocked)
        assert blocked.wait(10)
        if how == "another thread":
            threads.start("bad", fails, Corrupt("stop"))
        elif how == "the body":
            raise Corrupt("stop")
        else:
            elsewhere = threading.Thread(target=cancel.set, args=("enough",))
            elsewhere.start()
            elsewhere.join()
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("block", BLOCKS)
def test_the_body_is_woken_too(block: Block) -> None:
    with pytest.raises(Corrupt, match="stop"), Threads(Cancel()) as threads:
        blocked = threading.Event()

        def stop() -> None:
            blocked.wait(10)
            raise Corrupt("stop")

        threads.start("bad", stop)
        block(threads, blocked)


@pytest.mark.parametrize("block", BLOCKS)
def test_nothing_blocks_after_a_stop(block: Block) -> None:
    with pytest.raises(Corrupt), Threads(Cancel()) as threads:
        threads.fail(Corrupt("stop"))
        with pytest.raises(Stopped):
            block(threads, threading.Event())


def test_on_stop_runs_once_and_at_once_after_a_stop() -> None:
    early, late = [], []
    with pytest.raises(Corrupt), Threads(Cancel()) as threads:
        threads.on_stop(lambda: early.append(1))
        threads.fail(Corrupt("stop"))
        threads.fail(Corrupt("again"))
        threads.on_stop(lambda: late.append(1))
        assert (early, late) == ([1], [1])
    assert (early, late) == ([1], [1])


def test_a_scope_that_ends_well_wakes_nobody() -> None:
    woken = []
    with Threads(Cancel()) as threads:
        threads.on_stop(lambda: woken.append(1))
    assert not woken


def test_what_was_not_taken_can_be_given_back() -> None:
    with pytest.raises(Corrupt), Threads(Cancel()) as threads:
        channel: Channel[int] = threads.channel(5)
        for n in range(3):
            channel.put(n)
        threads.fail(Corrupt("stop"))
        assert channel.drain() == [0, 1, 2]
        assert channel.drain() == []


# --- cancel -----------------------------------------------------------------------------------------------------------------


def test_a_scope_of_a_cancelled_action_does_not_begin() -> None:
    cancel = Cancel()
    cancel.set("before")
    with pytest.raises(Cancelled, match="before"), Threads(cancel):
        pytest.fail("it began")


def test_a_cancel_after_the_scope_is_harmless() -> None:
    cancel = Cancel()
    with Threads(cancel):
        pass
    cancel.set("late")
    assert cancel.reason == "late"


def test_the_first_reason_counts() -> None:
    cancel, woken = Cancel(), []
    with cancel.waking(lambda: woken.append(1)):
        cancel.set("first")
        cancel.set("second")
    with pytest.raises(Cancelled, match="first"):
        cancel.check()
    assert woken == [1]


def test_no_wake_up_comes_after_its_scope() -> None:
    """What it lets go on may be somebody else's by then."""
    cancel, begun, go_on, order = Cancel(), threading.Event(), threading.Event(), list[str]()

    def wake() -> None:
        begun.set()
        assert go_on.wait(10)
        order.append("woken")

    def scope() -> None:
        with cancel.waking(wake):
            assert begun.wait(10)
            leaving.set()
        order.append("left")

    leaving = threading.Event()
    threads = [threading.Thread(target=scope), threading.Thread(target=cancel.set, args=("enough",))]
    threads[0].start()
    until(lambda: cancel._wakes)
    threads[1].start()
    assert leaving.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert order == ["woken", "left"]


def test_two_scopes_of_one_action_are_both_woken() -> None:
    cancel, entered = Cancel(), threading.Barrier(3)
    ended: list[str] = []

    def scope() -> None:
        try:
            with Threads(cancel) as threads:
                entered.wait(10)
                list(threads.channel(1))
        except Cancelled as e:
            ended.append(str(e))

    both = [threading.Thread(target=scope) for _ in range(2)]
    for thread in both:
        thread.start()
    entered.wait(10)
    cancel.set("enough")
    for thread in both:
        thread.join(10)
    assert ended == ["enough", "enough"]
