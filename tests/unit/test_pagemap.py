"""CRIU's own files out of an index: every page where CRIU looks for it, zero pages as holes."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hibernode.errors import Corrupt
from hibernode.model import PAGE
from hibernode.transfer import pagemap
from hibernode.transfer.format import SEGMENT, SegmentTable
from hibernode.transfer.pagemap import PageFiles
from hibernode.transfer.pageproto import LAZY, PRESENT, SHMEM, TASK
from tests.fakes.criu import read_memory

A, B, S = 11 << 8 | TASK, 12 << 8 | TASK, 77 << 8 | SHMEM
NAMES = {A: "pagemap-11.img", B: "pagemap-12.img", S: "pagemap-shmem-77.img"}


def table(*rows: tuple[int, int, int, int]) -> SegmentTable:
    return np.array(list(rows), SEGMENT)


def page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE)


def write(files: PageFiles, numbers: list[int], *, piece: int = PAGE) -> None:
    data = memoryview(b"".join(page(n) for n in numbers))
    files.write(np.array(numbers, np.int64), [data[i : i + piece] for i in range(0, len(data), piece)])


@pytest.fixture
def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_interleaved_address_spaces(tmp_path: Path) -> None:
    """Numbers run through all of them in the order CRIU sent them; each file has its own in order."""
    segments = table(
        (A, 0x1000, 2, PRESENT),
        (S, 0, 3, PRESENT),
        (A, 0x9000, 1, PRESENT | LAZY),
        (A, 0x20000, 5, 0),
        (B, 0x1000, 2, PRESENT),
        (A, 0x40000, 1, PRESENT),
    )
    with PageFiles(tmp_path, segments) as files:
        write(files, list(range(9)))
    assert read_memory(tmp_path) == {
        NAMES[A]: [
            (0x1000, 2, PRESENT, page(0) + page(1)),
            (0x9000, 1, PRESENT | LAZY, page(5)),
            (0x20000, 5, 0, b""),
            (0x40000, 1, PRESENT, page(8)),
        ],
        NAMES[S]: [(0, 3, PRESENT, page(2) + page(3) + page(4))],
        NAMES[B]: [(0x1000, 2, PRESENT, page(6) + page(7))],
    }


def test_a_space_without_a_segment_has_a_pagemap_without_an_entry(tmp_path: Path) -> None:
    with PageFiles(tmp_path, table((S, 0, 0, 0), (A, 0x1000, 1, PRESENT), (B, 0, 0, 0))) as files:
        write(files, [0])
    assert read_memory(tmp_path) == {NAMES[S]: [], NAMES[A]: [(0x1000, 1, PRESENT, page(0))], NAMES[B]: []}


def test_pages_that_nobody_writes_are_holes(tmp_path: Path) -> None:
    with PageFiles(tmp_path, table((A, 0x1000, 10_000, PRESENT))) as files:
        write(files, [17, 9_000])
    found = (tmp_path / "pages-1.img").stat()
    assert found.st_size == 10_000 * PAGE
    assert found.st_blocks * 512 <= 64 * PAGE
    ((_, _, _, content),) = read_memory(tmp_path)[NAMES[A]]
    assert content[17 * PAGE : 18 * PAGE] == page(17)
    assert content[9_000 * PAGE : 9_001 * PAGE] == page(9_000)
    assert content.count(0) > 9_990 * PAGE


@pytest.mark.parametrize("segments", [table(), table((A, 0x1000, 3, 0))])
def test_no_pages_at_all(tmp_path: Path, segments: SegmentTable) -> None:
    with PageFiles(tmp_path, segments):
        pass
    assert read_memory(tmp_path) == ({NAMES[A]: [(0x1000, 3, 0, b"")]} if len(segments) else {})


rows = st.lists(st.tuples(st.sampled_from([A, B, S]), st.integers(1, 40), st.sampled_from([PRESENT, PRESENT, 0])), max_size=12)


@given(rows, st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_layout_and_any_order_of_writes(
    tmp_path_factory: pytest.TempPathFactory, found: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("pages")
    segments = table(*[(dst, 0x1000 + 0x100000 * n, pages, flags) for n, (dst, pages, flags) in enumerate(found)])
    total = sum(pages for _, pages, flags in found if flags)
    zeros = set(data.draw(st.lists(st.integers(0, max(0, total - 1)), max_size=30)))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    runs = [[n for n in range(a, b) if n not in zeros] for a, b in itertools.pairwise(cuts)]
    with PageFiles(directory, segments) as files:
        for numbers in data.draw(st.permutations(runs)):
            if numbers:
                write(files, numbers, piece=data.draw(st.sampled_from([1000, PAGE, 3 * PAGE, 1 << 20])))
    wanted: dict[str, list[tuple[int, int, int, bytes]]] = {}
    at = 0
    for dst, vaddr, pages, flags in segments.tolist():
        here = range(at, at + pages) if flags else range(0)
        content = b"".join(bytes(PAGE) if n in zeros else page(n) for n in here)
        wanted.setdefault(NAMES[dst], []).append((vaddr, pages, flags, content))
        at += len(here)
    assert read_memory(directory) == wanted


def test_more_pieces_than_one_call_takes(tmp_path: Path) -> None:
    """A write with more views than IOV_MAX, and one that spans many files."""
    rows = [((A, B)[n % 2], 0x1000 * (n + 1), 1, PRESENT) for n in range(3000)]
    with PageFiles(tmp_path, table(*rows)) as files:
        write(files, list(range(3000)), piece=512)
    found = read_memory(tmp_path)
    assert [content for *_, content in found[NAMES[A]]] == [page(n) for n in range(0, 3000, 2)]
    assert [content for *_, content in found[NAMES[B]]] == [page(n) for n in range(1, 3000, 2)]


@pytest.mark.parametrize(
    "bad",
    [
        table((A, 0x1000, 1, PRESENT), (5 << 8 | 3, 0x1000, 1, PRESENT)),
        table((A, 0x1000, 1, PRESENT), (0, 0x1000, 1, PRESENT)),
        table((A, 0x1000, 1, PRESENT), (B, 0x1000, 1 << 32, 0)),
    ],
)
def test_what_criu_cannot_have_is_corrupt_and_leaves_nothing_open(
    tmp_path: Path, bad: SegmentTable, descriptors: set[str]
) -> None:
    with pytest.raises(Corrupt):
        PageFiles(tmp_path, bad)
    assert set(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("name", ["pagemap-11.img", "pages-1.img", "pages-2.img", "pagemap-shmem-77.img"])
def test_a_file_that_came_with_the_small_images_is_not_taken_for_pages(tmp_path: Path, name: str, descriptors: set[str]) -> None:
    (tmp_path / name).write_bytes(b"planted")
    with pytest.raises(Corrupt, match=name):
        PageFiles(tmp_path, table((A, 0x1000, 1, PRESENT), (S, 0, 1, PRESENT)))
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_too_many_address_spaces_are_corrupt(tmp_path: Path) -> None:
    rows = np.zeros(pagemap._MAX_ADDRESS_SPACES + 1, SEGMENT)
    rows["dst_id"] = np.arange(len(rows)) << 8 | TASK
    with pytest.raises(Corrupt, match="address spaces"):
        PageFiles(tmp_path, rows)
    assert not os.listdir(tmp_path)


def test_leaving_closes_everything(tmp_path: Path, descriptors: set[str]) -> None:
    with PageFiles(tmp_path, table((A, 0, 1, PRESENT), (B, 0, 1, PRESENT))):
        assert len(set(os.listdir("/proc/self/fd")) - descriptors) == 2
    assert set(os.listdir("/proc/self/fd")) == descriptors
