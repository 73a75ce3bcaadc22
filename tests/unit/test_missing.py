"""What is still to come, against a plain dict: page -> the row that it comes with, and which of that row's pages it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hibernode.missing import Extent, Missing

BLOCK = 1024  # pages: extents are cut at its multiples
BASES = (0, 7 * BLOCK, (1 << 47) // 4096 - 8 * BLOCK)  # the end of what a program may have
PAGES = st.builds(int.__add__, st.sampled_from(BASES), st.integers(0, 4 * BLOCK))
NEAR = st.builds(lambda block, off: max(0, block * BLOCK + off), st.integers(0, 4), st.integers(-2, 2))  # where blocks meet
LENGTHS = st.one_of(st.integers(1, 5), st.integers(1, 2 * BLOCK), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1]))
ROWS, OWN = st.integers(0, 3), st.integers(0, 900)

Model = dict[int, tuple[int, int]]


def spread(extents: Iterable[Extent]) -> Model:
    """Each page once."""
    found: Model = {}
    for extent in extents:
        assert extent.pages > 0
        assert extent.page // BLOCK == (extent.end - 1) // BLOCK, "it lies in one block"
        for n in range(extent.pages):
            assert extent.page + n not in found
            found[extent.page + n] = (extent.row, extent.at + n)
    return found


class Spaces(RuleBasedStateMachine):
    """Some address spaces, all forked off one, and what each of them is to be."""

    @initialize()
    def begin(self) -> None:
        self.spaces: list[tuple[Missing, Model]] = [(Missing(), {})]

    def chosen(self, which: int) -> tuple[Missing, Model]:
        return self.spaces[which % len(self.spaces)]

    @rule(which=st.integers(0, 5), page=st.one_of(PAGES, NEAR), pages=LENGTHS, row=ROWS, at=OWN)
    def add(self, which: int, page: int, pages: int, row: int, at: int) -> None:
        missing, model = self.chosen(which)
        while pages and any(page + n in model for n in range(pages)):  # nothing that lies there may be missing
            pages //= 2
        if pages:
            missing.add(Extent(page, pages, row, at))
            model.update({page + n: (row, at + n) for n in range(pages)})

    @rule(which=st.integers(0, 5), page=st.one_of(PAGES, NEAR), pages=LENGTHS)
    def remove(self, which: int, page: int, pages: int) -> None:
        missing, model = self.chosen(which)
        wanted = {each: model.pop(each) for each in range(page, page + pages) if each in model}
        assert spread(missing.remove(page, page + pages)) == wanted

    @rule(which=st.integers(0, 5), page=st.one_of(PAGES, NEAR), to=st.one_of(PAGES, NEAR), pages=LENGTHS)
    def move(self, which: int, page: int, to: int, pages: int) -> None:
        missing, model = self.chosen(which)
        moved = {each - page + to: model.pop(each) for each in range(page, page + pages) if each in model}
        for each in range(to, to + pages):
            model.pop(each, None)
        model.update(moved)
        missing.move(page, to, pages)

    @rule(which=st.integers(0, 5))
    def copy(self, which: int) -> None:
        missing, model = self.chosen(which)
        self.spaces.append((missing.copy(), dict(model)))

    @rule(which=st.integers(0, 5), page=st.one_of(PAGES, NEAR))
    def find(self, which: int, page: int) -> None:
        missing, model = self.chosen(which)
        found = missing.find(page)
        assert (found is not None) == (page in model)
        if found is not None:
            assert found.page == page
            assert spread([found]).items() <= model.items()

    @rule(which=st.integers(0, 5), start=st.one_of(PAGES, NEAR), pages=st.one_of(LENGTHS, st.just(1 << 35)))
    def within(self, which: int, start: int, pages: int) -> None:
        missing, model = self.chosen(which)
        wanted = {page: facts for page, facts in model.items() if start <= page < start + pages}
        assert spread(missing.within(start, start + pages)) == wanted

    @rule(which=st.integers(0, 5), row=ROWS)
    def of_row(self, which: int, row: int) -> None:
        missing, model = self.chosen(which)
        assert spread(missing.of_row(row)) == {page: facts for page, facts in model.items() if facts[0] == row}

    @invariant()
    def all_is_there(self) -> None:
        for missing, model in self.spaces:
            assert bool(missing) == bool(model)
            assert spread(missing.within(0, 1 << 36)) == model


TestSpaces = Spaces.TestCase
TestSpaces.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSpaces.pytestmark = [pytest.mark.timeout(60)]  # type: ignore[attr-defined]


@given(PAGES, LENGTHS, ROWS, OWN, st.data())
def test_a_part_is_of_the_same_pages(page: int, pages: int, row: int, at: int, data: st.DataObject) -> None:
    extent = Extent(page, pages, row, at)
    within = data.draw(st.integers(page, extent.end - 1))
    start, end = data.draw(st.integers(max(0, page - 3), within)), data.draw(st.integers(within + 1, extent.end + 3))
    part = extent.part(start, end)
    assert (part.page, part.end, part.row) == (max(start, page), min(end, extent.end), row)
    assert part.at - at == part.page - page


@pytest.mark.parametrize(
    "change",
    [
        lambda missing: missing.remove(0, 4 * BLOCK),
        lambda missing: missing.move(0, 100 * BLOCK, 4 * BLOCK),
        lambda missing: missing.add(Extent(50 * BLOCK, 1, 5, 0)),
    ],
)
def test_what_one_does_is_no_others_after_a_fork(change: Callable[[Missing], object]) -> None:
    parent = Missing()
    parent.add(Extent(BLOCK - 3, 7, 5, 2))
    child, grandchild = parent.copy(), parent.copy().copy()
    before = spread(parent.of_row(5))
    change(child)
    assert spread(child.of_row(5)) != before
    assert spread(parent.of_row(5)) == spread(grandchild.of_row(5)) == before


def test_nothing_is_missing_any_more_of_what_lay_where_something_is_moved_to() -> None:
    missing = Missing()
    missing.add(Extent(10, 20, 0, 0))
    missing.add(Extent(BLOCK + 5, 20, 1, 0))
    missing.move(5, BLOCK, 10)
    wanted = {BLOCK + 5 + n: (0, n) for n in range(5)} | {15 + n: (0, 5 + n) for n in range(15)}
    assert spread(missing.within(0, 2 * BLOCK)) == wanted | {BLOCK + 10 + n: (1, 5 + n) for n in range(15)}


@pytest.mark.timeout(20)
def test_it_takes_no_longer_for_memory_that_is_large() -> None:
    """What is unmapped may be very much, and two pages of it be missing: who went through all of it would never end."""
    missing = Missing()
    for page in (5, 1 << 34):
        missing.add(Extent(page, 1, 0, 0))
    assert len(missing.within(0, 1 << 60)) == 2
    assert len(missing.remove(0, 1 << 60)) == 2
    assert not missing
