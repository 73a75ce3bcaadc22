"""Where pages are stored, run by run: as said of each page alone."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hibernode.transfer.format import REFERENCE, SEGMENT
from hibernode.transfer.pagemap import PageFiles
from hibernode.transfer.pageproto import LAZY, PRESENT, SHMEM, TASK
from hibernode.transfer.places import Origins, overlaps

RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12)
CUTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), max_size=12)  # pages between two stretches, and of one


def stretches_of(cuts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, and apart: first and end."""
    found, at = [], 0
    for gap, pages in cuts:
        found.append((at + gap, at + gap + pages))
        at += gap + pages
    return found


def columns(rows: list[tuple[int, int]]) -> list[np.ndarray]:
    return [np.array([row[n] for row in rows], np.int64) for n in range(2)]


@given(RUNS, CUTS)
def test_overlaps_are_all_pages_that_are_in_both(runs: list[tuple[int, int]], cuts: list[tuple[int, int]]) -> None:
    """Each pair once, in the order of the runs, and then of the stretches."""
    ends, stretches = [(first, first + pages) for first, pages in runs], stretches_of(cuts)
    found = list(zip(*(each.tolist() for each in overlaps(*columns(ends), *columns(stretches))), strict=True))
    wanted = [
        (run, stretch, max(first, start), min(end, stop))
        for run, (first, end) in enumerate(ends)
        for stretch, (start, stop) in enumerate(stretches)
        if first < stop and start < end
    ]
    assert found == wanted


@given(CUTS, st.integers(0, 30), st.data())
def test_stretches_say_of_each_page_what_is_said_of_it_alone(
    cuts: list[tuple[int, int]], behind: int, data: st.DataObject
) -> None:
    rows = [
        (first, data.draw(st.integers(0, 1000)), end - first, data.draw(st.integers(0, 3))) for first, end in stretches_of(cuts)
    ]
    references = np.array([(first, there, pages, source) for first, there, pages, source in rows], REFERENCE)
    total = (rows[-1][0] + rows[-1][2] if rows else 0) + behind
    origins = Origins(references)
    start, end, source, there = origins.stretches(total)
    assert (start < end).all()
    assert [0, *end.tolist()] == [*start.tolist(), total], "in order, and without gaps"
    each, numbers = origins.of(np.arange(total))
    pages = end - start
    assert np.repeat(source, pages).tolist() == each.tolist()
    assert (np.repeat(there - start, pages) + np.arange(total)).tolist() == numbers.tolist()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([TASK, SHMEM]), st.sampled_from([0, PRESENT, PRESENT | LAZY]), st.integers(1, 15)), max_size=8
    ),
    CUTS,
)
def test_references_of_fixed_pages_are_those_of_pages_that_criu_reads_by_itself(
    segments: list[tuple[int, int, int]], cuts: list[tuple[int, int]]
) -> None:
    table = np.array(
        [(7 << 8 | kind, 0x1000 * n * 64, pages, flags) for n, (kind, flags, pages) in enumerate(segments, 1)], SEGMENT
    )
    fixed = [not (flags & LAZY and kind == TASK) for kind, flags, pages in segments if flags & PRESENT for _ in range(pages)]
    references = [
        (first, 5 * first + 7, end - first, n % 3) for n, (first, end) in enumerate(stretches_of(cuts)) if end <= len(fixed)
    ]
    with tempfile.TemporaryDirectory() as directory, PageFiles(Path(directory), table) as pages:
        found = pages.of_fixed(np.array(references, REFERENCE))
    said = [
        (first + n, there + n, source)
        for first, there, count, source in found[["first_page", "source_page", "pages", "source"]].tolist()
        for n in range(count)
    ]
    wanted = [
        (first + n, there + n, source) for first, there, count, source in references for n in range(count) if fixed[first + n]
    ]
    assert said == wanted
    assert all(before["first_page"] < after["first_page"] for before, after in itertools.pairwise(found))
