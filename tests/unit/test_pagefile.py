"""One pages file: every byte where it belongs, however it is cut, in huge pages or not; no more memory than is asked for."""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hibernode.flow import Threads
from hibernode.model import PAGE, Cancel
from hibernode.transfer.format import FRAME, REFERENCE, SEGMENT, Index
from hibernode.transfer.pagefile import BLOCK_PAGES, PageFile
from hibernode.transfer.pageproto import PRESENT

PAGES = 4 * BLOCK_PAGES + 77
CONTENT = memoryview(random.Random(1).randbytes(PAGES * PAGE))
BLOCK = BLOCK_PAGES * PAGE


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hn-") as directory:
        yield Path(directory)


def put(file: PageFile, first: int, end: int, *, piece: int = 1 << 20) -> None:
    data = CONTENT[first * PAGE : end * PAGE]
    file.write([data[i : i + piece] for i in range(0, len(data), piece)], first, end - first)


def taken(path: Path) -> int:
    """Bytes of memory."""
    return path.stat().st_blocks * 512


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
def test_any_cuts_in_any_order(memory: Path, data: st.DataObject) -> None:
    """Whatever is said of it beforehand: a stretch that is said to be filled, and is not, reads as zeros."""
    page = st.integers(0, PAGES)
    said = sorted(data.draw(st.sets(page, max_size=6)))
    cuts = sorted({0, PAGES, *data.draw(st.sets(page, max_size=8))})
    left = data.draw(st.sets(st.sampled_from(range(len(cuts) - 1)), max_size=2))
    parts = [part for n, part in enumerate(itertools.pairwise(cuts)) if n not in left]
    path = Path(tempfile.mkdtemp(dir=memory)) / "pages-1.img"
    with closing(PageFile(path)) as file:
        file.lay_out(PAGES, zip(said[::2], said[1::2], strict=False))
        for first, end in data.draw(st.permutations(parts)):
            put(file, first, end, piece=data.draw(st.sampled_from([1000, PAGE, 3 * PAGE, 1 << 20, 1 << 30])))
    wanted = bytearray(PAGES * PAGE)
    for first, end in parts:
        wanted[first * PAGE : end * PAGE] = CONTENT[first * PAGE : end * PAGE]
    assert path.read_bytes() == wanted
    path.unlink()


def test_threads_that_share_blocks(memory: Path) -> None:
    """Whoever comes first makes the block; nobody's pages are lost to that."""
    path = memory / "pages-1.img"
    file = PageFile(path)
    file.lay_out(PAGES, [(0, PAGES)])

    def work(turn: int) -> None:
        for first in range(turn, PAGES, 4):
            put(file, first, first + 1)

    with Threads(Cancel()) as threads:
        for turn in range(4):
            threads.start(f"{turn}", work, turn)
    file.close()
    assert path.read_bytes() == CONTENT


def test_dense_blocks_are_huge_pages_and_no_others(memory: Path) -> None:
    """A page of a dense block takes the whole block at once; beside it a page takes a page."""
    path = memory / "pages-1.img"
    file = PageFile(path)
    file.lay_out(PAGES, [(1, 2 * BLOCK_PAGES + 5), (3 * BLOCK_PAGES, 4 * BLOCK_PAGES - 1)])
    put(file, 7, 8)
    assert taken(path) == PAGE  # the first block lacks a page
    put(file, BLOCK_PAGES + 9, BLOCK_PAGES + 10)
    assert taken(path) == PAGE + BLOCK
    put(file, BLOCK_PAGES, 2 * BLOCK_PAGES)
    assert taken(path) == PAGE + BLOCK
    put(file, 3 * BLOCK_PAGES, 3 * BLOCK_PAGES + 2)
    file.close()
    assert taken(path) == 3 * PAGE + BLOCK


def test_where_there_are_no_huge_pages() -> None:
    """A disk has none: it is filled all the same, and nothing takes more room."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="hn-"))
    path = directory / "pages-1.img"
    try:
        file = PageFile(path)
        file.lay_out(PAGES, [(0, PAGES)])
        for first in range(0, PAGES, 100):
            put(file, first, min(PAGES, first + 100))
        file.close()
        assert path.read_bytes() == CONTENT
    finally:
        path.unlink()
        directory.rmdir()


def test_nothing_of_it_is_left_in_the_process(memory: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("pages-1.img")

    before = held()
    file = PageFile(memory / "pages-1.img")
    file.lay_out(PAGES, [(0, PAGES)])
    put(file, 0, PAGES)
    assert held() == (before[0] + 1, 1)
    file.close()
    file.close()
    assert held() == before


def test_never_over_another_file(memory: Path) -> None:
    (memory / "pages-1.img").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        PageFile(memory / "pages-1.img")


# --- what the index says of it ------------------------------------------------------------------------------------------------


def index(*frames: tuple[int, int, list[int]], references: Sequence[tuple[int, int]] = ()) -> Index:
    """Of (first page, pages, which of them are zero or elsewhere), and of (first page, pages)."""
    table, elsewhere = np.zeros(len(frames), FRAME), np.zeros(len(references), REFERENCE)
    keeps = {}
    for row, (first, pages, zeros) in zip(table, frames, strict=True):
        row["first_page"], row["pages"], row["kept"] = first, pages, pages - len(zeros)
        if zeros:
            keeps[first] = ~np.isin(np.arange(pages), zeros)
    for row, (first, pages) in zip(elsewhere, references, strict=True):
        row["first_page"], row["pages"] = first, pages
    return Index(np.array([(1 << 8 | 1, 0, 1 << 20, PRESENT)], SEGMENT), table, keeps, elsewhere)


def test_frames_that_touch_are_one_stretch() -> None:
    found = index((0, 1024, []), (1024, 1024, []), (3000, 600, []), (3600, 1024, [0]), (4624, 10, [])).filled()
    assert found.tolist() == [[0, 2048], [3000, 3600], [3601, 4634]]


def test_zero_pages_cut_a_stretch_and_short_pieces_are_left_out() -> None:
    assert index((0, 1024, [511])).filled().tolist() == [[512, 1024]]
    assert index((0, 1024, [300, 813])).filled().tolist() == [[301, 813]]
    assert index((0, 1024, list(range(0, 1024, 2)))).filled().tolist() == []
    assert index().filled().tolist() == []


def test_what_earlier_checkpoints_store_counts() -> None:
    """Of an increment most is elsewhere: every twentieth page is its own."""
    own = [n for n in range(1024) if n % 20]
    runs = [(n, min(19, 1024 - n)) for n in range(1, 1024, 20)]
    assert index((0, 1024, own), references=runs).filled().tolist() == [[0, 1024]]
    assert index((0, 1024, own), references=runs[:-1]).filled().tolist() == [[0, 1021]]
    assert index(references=[(7, 2000)]).filled().tolist() == [[7, 2007]]
