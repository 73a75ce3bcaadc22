"""The rule by which actions share the arena, replayed in every order that hypothesis finds."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hibernode.transfer.sharing import Part, Sharing

pytestmark = pytest.mark.timeout(60)


def ask(sharing: Sharing, expected: int) -> Part:
    return sharing.ask(expected, lambda: None)


def test_a_part_is_a_tenth_more_than_was_expected_and_never_more_than_there_is() -> None:
    sharing = Sharing(100, at_once=9)
    assert ask(sharing, 50).own == 57
    assert ask(Sharing(100, at_once=9), 99).own == 100
    assert ask(Sharing(100, at_once=9), 100).own == 100, "it fits, and stands still for no store"


def test_what_does_not_fit_has_half_and_borrows_what_nobody_waits_for() -> None:
    sharing = Sharing(100, at_once=9)
    large = ask(sharing, 1000)
    assert (large.own, sharing.left(large)) == (50, 100)
    for _ in range(70):
        assert sharing.take(large)
    small = ask(sharing, 30)
    assert not small.filling, "20 of what it borrowed are not back yet"
    assert sharing.left(large) == 0
    assert sharing.low(large), "it lets go"
    for _ in range(5):
        sharing.give_back(large)
    assert small.filling
    assert (small.own, sharing.left(large)) == (35, 0)


def test_who_is_small_does_not_pass_who_is_large() -> None:
    sharing = Sharing(100, at_once=9)
    first, large, small = (ask(sharing, expected) for expected in (20, 90, 1))
    assert (first.filling, large.filling, small.filling) == (True, False, False)
    sharing.leave(large)
    assert small.filling, "it was behind one that has gone"


def test_what_the_first_in_the_line_waits_for_is_lent_to_nobody() -> None:
    sharing = Sharing(100, at_once=1)
    large = ask(sharing, 1000)
    ask(sharing, 30)
    assert sharing.left(large) == 50 + 15, "it waits for the end of a dump, and not for the rest of the arena"
    ask(sharing, 30)
    assert sharing.left(large) == 50 + 15


def test_what_was_not_used_is_free_when_it_is_full() -> None:
    sharing = Sharing(100, at_once=9)
    first, second = ask(sharing, 80), ask(sharing, 60)
    for _ in range(10):
        assert sharing.take(first)
    assert not second.filling
    sharing.full(first)
    assert second.filling


def test_no_more_stand_still_at_once_than_may() -> None:
    sharing = Sharing(1000, at_once=2)
    parts = [ask(sharing, 1) for _ in range(4)]
    assert [part.filling for part in parts] == [True, True, False, False]
    sharing.full(parts[1])
    assert [part.filling for part in parts] == [True, False, True, False]


class Actions(RuleBasedStateMachine):
    """Any number of them, who do what actions do: ask; take until they are full; ship; give up at any time."""

    @initialize(total=st.integers(1, 40), at_once=st.integers(1, 4))
    def begin(self, total: int, at_once: int) -> None:
        self.total, self.at_once = total, at_once
        self.sharing, self.asked = Sharing(total, at_once), 0
        self.line, self.given, self.all = list[int](), list[int](), dict[int, Part]()

    def some(self, data: st.DataObject, *, filling: bool | None = None, used: bool = False) -> Part | None:
        found = [p for p in self.all.values() if (filling is None or p.filling is filling) and (p.used or not used)]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(expected=st.integers(0, 60))
    def asks(self, expected: int) -> None:
        number = self.asked = self.asked + 1
        self.line.append(number)
        self.all[number] = self.sharing.ask(expected, lambda: self.given.append(number))

    @rule(data=st.data())
    def takes(self, data: st.DataObject) -> None:
        if (part := self.some(data, filling=True)) is not None:
            own, left, used = part.own > part.used, self.sharing.left(part), part.used
            got = self.sharing.take(part)
            assert got is (left > 0) is (part.used == used + 1)
            assert got or not own, "what is its own it has at once"
            assert got or self.sharing.low(part), "nobody blocks who has not been told to let go"

    @rule(data=st.data())
    def ships_one(self, data: st.DataObject) -> None:
        if (part := self.some(data, used=True)) is not None:
            self.sharing.give_back(part)

    @rule(data=st.data())
    def is_full(self, data: st.DataObject) -> None:
        if (part := self.some(data, filling=True)) is not None:
            self.sharing.full(part)

    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        if (part := self.some(data)) is not None:
            self.sharing.leave(part)
            number = next(number for number, each in self.all.items() if each is part)
            if number not in self.given:
                self.line.remove(number)
                del self.all[number]

    @invariant()
    def nothing_is_lent_twice(self) -> None:
        if not hasattr(self, "sharing"):
            return
        assert self.sharing.free >= 0
        assert sum(part.used for part in self.all.values()) <= self.total
        assert sum(part.filling for part in self.all.values()) <= self.at_once

    @invariant()
    def in_the_order_of_the_line(self) -> None:
        if hasattr(self, "sharing"):
            assert self.given == [number for number in self.line if number in self.given]

    def teardown(self) -> None:
        """Whoever fills comes to his end and ships: then everybody had his turn, and everything is back."""
        while any(part.filling or part.used for part in self.all.values()):
            for part in self.all.values():
                if part.filling:
                    self.sharing.full(part)
                while part.used:
                    self.sharing.give_back(part)
        if hasattr(self, "sharing"):
            assert sorted(self.given) == sorted(self.line), "nobody waits for ever"
            assert (self.sharing.free, self.sharing.waiting) == (self.total, 0)


TestActions = Actions.TestCase
TestActions.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
