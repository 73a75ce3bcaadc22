"""Containers that are being made, and the restore that is for them: who meets whom, and who is forgotten when."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hibernode.arrivals import Arrival, Arrivals, Order, awaited
from hibernode.errors import Cancelled, RestoreFailed
from hibernode.model import Cancel

RESTORE = Order(Path("/images"))


def arrival(name: str, container_id: str = "", action: str = "action") -> Arrival:
    return Arrival(action, name, container_id or name, Path("/root"), Path("/bundle"))


def test_each_is_given_out_once_to_its_own_action() -> None:
    arrivals = Arrivals()
    mine, other = arrival("a"), arrival("a", "x", "another")
    arrivals.arrive(other)
    arrivals.arrive(mine)
    assert arrivals.next("action", Cancel()) is mine
    cancel = Cancel()
    threading.Timer(0.05, lambda: cancel.set("enough")).start()
    with pytest.raises(Cancelled):
        arrivals.next("action", cancel)
    assert arrivals.next("another", Cancel()) is other


def test_of_two_of_one_name_the_later_counts() -> None:
    arrivals = Arrivals()
    first, second = arrival("a", "1"), arrival("a", "2")
    arrivals.arrive(first)
    arrivals.arrive(second)
    with pytest.raises(RestoreFailed, match="made anew"):
        first.order.result(0)
    assert not first.give(RESTORE)
    assert arrivals.next("action", Cancel()) is second


def test_only_what_was_restored_waits_for_its_start() -> None:
    arrivals = Arrivals()
    restored, fresh, failed = arrival("a"), arrival("b"), arrival("c")
    for each in (restored, fresh, failed):
        arrivals.arrive(each)
    assert restored.give(RESTORE)
    restored.made.set_result(None)
    assert fresh.give(Order())
    fresh.made.set_result(None)
    failed.end(RestoreFailed("it could not"))
    for each in (restored, fresh, failed):
        arrivals.leave(each)
    assert [arrivals.awaits(name) for name in "abc"] == [True, False, False]
    assert list(arrivals._by_id) == ["a"]
    arrivals.started("a")
    awaited(restored.started, Cancel())
    assert not arrivals._by_id


def test_the_end_of_an_action_is_heard_by_all_who_wait_for_it() -> None:
    arrivals = Arrivals()
    waiting, made, other = arrival("a"), arrival("b"), arrival("c", action="another")
    for each in (waiting, made, other):
        arrivals.arrive(each)
    assert arrivals.next("action", Cancel()) is waiting
    made.give(RESTORE)
    made.made.set_result(None)
    arrivals.close("action", RestoreFailed("it has ended"))
    for future in (waiting.order, waiting.made, made.started):
        with pytest.raises(RestoreFailed, match="it has ended"):
            future.result(0)
    assert not other.order.done()
    assert not arrivals.awaits("b")


def test_what_has_ended_is_not_waited_for() -> None:
    with pytest.raises(RestoreFailed, match="ended before it was started"):
        awaited(arrival("a").started, Cancel(), lambda: False)
