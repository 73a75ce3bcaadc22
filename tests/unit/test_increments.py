"""Pages that are in other checkpoints: tables of references, digests, and where each page lies; and what an enemy makes of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hibernode import catalog
from hibernode.errors import Corrupt
from hibernode.model import (
    FRAME_PAGES,
    MAX_DIGESTED,
    PAGE,
    BaseRef,
    ImageRef,
    Meter,
    ObjectRef,
    PagesRef,
    StreamRef,
    TaskFacts,
    WrappedKey,
)
from hibernode.transfer import fingerprint, format, known, places
from hibernode.transfer.format import FRAME, REFERENCE, SEGMENT, Index, Ranks
from hibernode.transfer.known import Known
from hibernode.transfer.pageproto import PRESENT
from hibernode.transfer.places import Loan, Source
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal
from tests.fakes import machine
from tests.flow.rig import Rig

IDS = [f"0000000{n}-0000-4000-8000-000000000000" for n in range(5)]
NOWHERE = ObjectRef(key="main/index.zst", size=0, digest="0" * 64)
ZERO, KEPT, REFERENCED = 0, 1, 2


def index_of(states: np.ndarray, references: np.ndarray, chance: np.random.Generator) -> tuple[Index, PagesRef]:
    """An image whose pages are so: frames of any length over those that are kept, in one stream, in any order."""
    frames, keeps, at, total = [], {}, 0, len(states)
    runs = []
    while at < total:
        count = min(int(chance.integers(1, FRAME_PAGES + 1)), total - at)
        runs.append((at, count))
        at += count
    offset = 0
    for first, count in [runs[n] for n in chance.permutation(len(runs))]:
        keep = states[first : first + count] == KEPT
        if keep.any():
            stored = int(chance.integers(10, 5000))
            frames.append((first, offset, 0, stored, count, int(keep.sum()), chance.integers(0, 256, 32).astype(np.uint8)))
            offset += stored
            if not keep.all():
                keeps[first] = keep
    table = np.sort(np.array(frames, FRAME) if frames else np.zeros(0, FRAME), order="first_page")
    segments = np.array([(7 << 8 | 1, 0x1000, total, PRESENT)] if total else [], SEGMENT)
    index = Index(segments, table, keeps, references)
    mine = np.sort(table, order="offset")
    seek = format.seek_table(mine["stored"], mine["kept"] * PAGE)
    digest = format.stream_digest((each.tobytes() for each in mine["digest"]), seek)
    stream = StreamRef(key="main/pages-0.zst", size=offset + len(seek), digest=digest, frames=len(mine))
    ref = PagesRef(
        name="main", pages=total, zero_pages=int((states == ZERO).sum()), streams=[stream], index=NOWHERE,
        referenced=int((states == REFERENCED).sum()), digests=NOWHERE.model_copy(update={"key": "main/digests.zst"}),
    )  # fmt: skip
    return index, ref


class World:
    """An image, and the others that store pages of it. `there`: of each page that is referenced, (source, page)."""

    def __init__(self, seed: int, pages: int, others: int) -> None:
        self.chance = chance = np.random.default_rng(seed)
        sources = [np.where(chance.random(int(chance.integers(1, 3000))) < 0.7, KEPT, ZERO) for _ in range(others)]
        for states in sources:
            states[0] = KEPT
        self.states = chance.choice([ZERO, KEPT, REFERENCED], pages, p=[0.2, 0.3, 0.5])
        source, there = np.full(pages, -1), np.full(pages, -1)
        at = 0
        while at < pages:  # runs, as memory has them
            length, which = int(chance.integers(1, 60)), int(chance.integers(0, others))
            begin = int(chance.integers(0, len(sources[which])))
            for page in range(at, min(pages, at + length)):
                if self.states[page] == REFERENCED:
                    other = begin + page - at
                    if other < len(sources[which]) and sources[which][other] == KEPT:
                        source[page], there[page] = which, other
                    else:
                        self.states[page] = KEPT
            at += length
        for which in range(others):  # no base without a reference
            page = int(chance.integers(0, pages))
            self.states[page], source[page], there[page] = REFERENCED, which, 0
        source[self.states != REFERENCED] = -1
        self.source, self.there = source, there
        hits = np.flatnonzero(source >= 0)
        used = sorted(set(source[hits].tolist()))
        table, self.used = known.numbered(known.runs(hits, source[hits], there[hits]))
        assert self.used == used
        self.index, self.ref = index_of(self.states, table, chance)
        self.bases = [index_of(sources[which], format.no_references(), chance) for which in self.used]
        self.sources = [Source(self.ref, Seal("p"), self.index)] + [
            Source(ref, Seal(IDS[n]), index) for n, (index, ref) in enumerate(self.bases)
        ]


WORLDS = st.builds(World, st.integers(0, 1 << 32), st.integers(1, 4000), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(WORLDS)
def test_an_index_with_references_comes_back_and_every_page_is_found(world: World) -> None:
    found = format.decode_index(format.encode_index(world.index), world.ref)
    assert (found.references == world.index.references).all()
    sources = [Source(world.ref, Seal("p"), found), *world.sources[1:]]
    places.insist(sources)
    numbers = world.chance.permutation(world.ref.pages)
    where = places.find(sources, numbers)
    for number, source, row, place in zip(numbers.tolist(), *(each.tolist() for each in where), strict=True):
        if world.states[number] == ZERO:
            assert row == -1
            continue
        wanted, there = (
            (0, number) if world.states[number] == KEPT else (world.used.index(world.source[number]) + 1, world.there[number])
        )
        index = sources[source].index
        frame = index.frames[row]
        first, count = int(frame["first_page"]), int(frame["pages"])
        keep = index.keeps[first] if frame["kept"] < count else np.ones(count, bool)
        assert source == wanted
        assert first + np.flatnonzero(keep)[place] == there


@settings(max_examples=60, deadline=None)
@given(WORLDS)
def test_what_is_borrowed_is_all_and_no_frame_is_read_for_nothing(world: World) -> None:
    got = np.full((world.ref.pages, 2), -1)
    for number, source in enumerate(world.sources[1:]):
        references = world.index.references
        loan = Loan(references[references["source"] == number], source)
        loan.cut()
        for frame, wanted in zip(source.index.frames, loan.wanted().tolist(), strict=True):
            first, count = int(frame["first_page"]), int(frame["pages"])
            keep = source.index.keeps[first] if frame["kept"] < count else np.ones(count, bool)
            kept = first + np.flatnonzero(keep)
            parts = list(loan.parts(frame))
            assert bool(parts) == wanted
            for part in parts:
                to = slice(part.first_page, part.first_page + part.pages)
                assert (got[to] == -1).all()
                got[to, 0], got[to, 1] = number, kept[part.place : part.place + part.pages]
    lent = world.states == REFERENCED
    assert (got[~lent] == -1).all()
    assert (got[lent, 0] == [world.used.index(each) for each in world.source[lent]]).all()
    assert (got[lent, 1] == world.there[lent]).all()


@settings(max_examples=60, deadline=None)
@given(WORLDS)
def test_ranks_are_counted_from_maps_in_memory_and_from_those_of_an_index(world: World) -> None:
    numbers = np.arange(world.ref.pages + 2)
    wanted = np.concatenate(([0], np.cumsum(world.states == KEPT), [int((world.states == KEPT).sum())]))
    for index in (world.index, format.decode_index(format.encode_index(world.index), world.ref)):
        assert (Ranks(index).before(numbers) == wanted[numbers]).all()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=60), st.integers(1, 9))
def test_runs_say_what_pages_said_however_they_are_cut(pages: list[tuple[int, int]], cut: int) -> None:
    numbers = np.flatnonzero([n % 7 != 3 for n in range(len(pages))])
    source, there = np.array([p[0] for p in pages], np.int64)[numbers], np.array([p[1] for p in pages], np.int64)[numbers]
    tables = [known.runs(numbers[a : a + cut], source[a : a + cut], there[a : a + cut]) for a in range(0, len(numbers), cut)]
    whole = known.joined(tables[::-1])
    said = [
        (first + n, src, page + n)
        for first, page, count, src in whole[["first_page", "source_page", "pages", "source"]].tolist()
        for n in range(count)
    ]
    assert said == list(zip(numbers.tolist(), source.tolist(), there.tolist(), strict=True))
    assert whole.tolist() == known.runs(numbers, source, there).tolist()


# --- what is known ------------------------------------------------------------------------------------------------------------


def memory(words: Any) -> np.ndarray:
    """A page for each number; 0 is a page of zeros."""
    return np.repeat(np.asarray(words, np.uint64)[:, None], PAGE // 8, axis=1)


def table_of(words: np.ndarray, seed: int) -> np.ndarray:
    """The digests of such an image."""
    pages, table = memory(words), np.zeros((len(words), 2), np.uint64)
    table[words != 0] = fingerprint.digests(pages, words != 0, seed)
    return table


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=200),
    st.lists(st.one_of(st.integers(0, 60), st.just(-1)), max_size=200),
    st.integers(0, (1 << 64) - 1),
    st.integers(-50, 50),
)
def test_whatever_was_there_is_found_wherever_it_is_now(before: list[int], after: list[int], seed: int, step: int) -> None:
    """-1 in what comes after: as the page before says, one further."""
    old, new = np.array(before), []
    for n, word in enumerate(after):
        new.append(word if word >= 0 else before[n % len(before)])
    now = np.array([0, *new])
    earlier = Known(seed, table_of(old, seed), None, [base(0)])
    wanted = now != 0
    digests = fingerprint.digests(memory(now), wanted, seed)
    found, _ = earlier.find(np.flatnonzero(wanted), digests, step)
    for word, there in zip(now[wanted].tolist(), found.tolist(), strict=True):
        assert (there >= 0) == (word in before)
        assert there < 0 or old[there] == word


def test_what_has_not_moved_is_referred_to_where_it_is_though_it_is_there_twice() -> None:
    """One run, and not one for each page that is like another."""
    words = np.array([1, 2, 1, 1, 3, 2] * 100)
    earlier = Known(7, table_of(words, 7), None, [base(0)])
    numbers = np.arange(600)
    digests = fingerprint.digests(memory(words), words != 0, 7)
    for step, moved in ((0, 0), (0, 40), (-3, 0)):
        found, last = earlier.find(numbers[moved:], digests[moved:], step)
        assert len(earlier.references(numbers[moved:], found)) <= 2
        assert last == found[-1] - 599


def test_with_nothing_before_nothing_is_known_and_another_seed_finds_nothing() -> None:
    words = np.arange(1, 100)
    digests = fingerprint.digests(memory(words), words != 0, 7)
    assert (Known(7).find(np.arange(99), digests, 0)[0] == -1).all()
    assert (Known(8, table_of(words, 8), None, [base(0)]).find(np.arange(99), digests, 0)[0] == -1).all()


def test_a_chain_is_flat() -> None:
    """Pages that the earlier one has of a third are of the third."""
    words = np.arange(1, 11)
    references = np.array([(2, 50, 3, 0)], REFERENCE)
    earlier = Known(7, table_of(words, 7), references, [base(0), base(1)])
    found, _ = earlier.find(np.arange(10), fingerprint.digests(memory(words), words != 0, 7), 0)
    table, used = known.numbered(earlier.references(np.arange(10), found))
    assert used == [0, 1]
    assert table[["first_page", "source_page", "pages", "source"]].tolist() == [(0, 0, 2, 1), (2, 50, 3, 0), (5, 5, 5, 1)]


@pytest.mark.parametrize(("references", "what"), [([(0, 3, 2, 0)], "does not store"), ([(0, 9, 2, 0)], "does not have")])
def test_digests_of_pages_that_a_base_has_not_are_corrupt(references: list[tuple[int, ...]], what: str) -> None:
    of_base = table_of(np.array([1, 2, 3, 4, 0, 6, 7, 8, 9, 10]), 7)
    with pytest.raises(Corrupt, match=what):
        known.fold(np.zeros((10, 2), np.uint64), np.array(references, REFERENCE), 0, of_base)


@given(st.binary(max_size=100), st.integers(0, 5))
def test_what_are_no_digests_is_corrupt(data: bytes, pages: int) -> None:
    whole = known.encode(np.ones((pages, 2), np.uint64), 9)
    table, seed = known.decode(whole, pages)
    assert (table.tolist(), seed) == ([[1, 1]] * pages, 9)
    for wrong in (data, whole[:-1], whole + b"\0", b"X" + whole[1:], whole[:8] + b"\xff" * 8 + whole[16:]):
        with pytest.raises(Corrupt):
            known.decode(wrong, pages)


# --- an enemy's ---------------------------------------------------------------------------------------------------------------


def base(n: int) -> BaseRef:
    return BaseRef(
        name="main", pages=4, zero_pages=0, streams=[], index=NOWHERE, checkpoint_id=IDS[n],
        digests=NOWHERE.model_copy(update={"key": "main/digests.zst"}),
    )  # fmt: skip


def lies(references: list[tuple[int, int, int, int]], referenced: int) -> None:
    """Ten pages: 0 and 1 kept, 2 to 8 in this table, 9 zeros; of a base whose pages 0 to 4 of 6 are kept."""
    chance = np.random.default_rng(1)
    states = np.array([KEPT, KEPT, *[REFERENCED] * 7, ZERO])
    index, ref = index_of(states, np.array(references, REFERENCE), chance)
    ref = ref.model_copy(update={"referenced": referenced})
    raw = format.encode_index(index)
    decoded = format.decode_index(raw, ref)
    other, its = index_of(np.array([KEPT] * 5 + [ZERO]), format.no_references(), chance)
    places.insist([Source(ref, Seal("p"), decoded), Source(its, Seal(IDS[0]), other)])


def test_the_honest_table_of_these_is_taken() -> None:
    lies([(2, 0, 5, 0), (7, 1, 2, 0)], 7)


@pytest.mark.parametrize(
    ("references", "referenced", "what"),
    [
        ([(2, 0, 5, 0), (6, 1, 2, 0)], 7, "overlap"),
        ([(2, 0, 5, 0), (7, 1, 4, 0)], 9, "beyond|count of zero"),
        ([(1, 0, 5, 0), (7, 1, 2, 0)], 7, "kept and referenced"),
        ([(2, 0, 5, 0), (7, 1, 1, 0)], 7, "count of (referenced|zero)"),
        ([(2, 0, 5, 0), (7, 1, 2, 0)], 6, "count of (referenced|zero)"),
        ([(2, 0, 5, 0), (7, 1, 2, 1)], 7, "does not name"),
        ([(2, 0, 5, 0), (7, 4, 2, 0)], 7, "does not keep"),
        ([(2, 0, 5, 0), (7, 700, 2, 0)], 7, "does not keep"),
        ([(2, 0, 5, 0), (7, 1, 2, 0), (9, 0, 0, 0)], 7, "impossible"),
        ([(2, 0, 5, 0), (7, 1 << 63, 2, 0)], 7, "impossible"),
        ([(2, 0, 5, 0), (7, 1, (1 << 64) - 1, 0)], 7, "impossible"),
        ([(2, 0, 5, 0), (7, 1, 2, (1 << 64) - 1)], 7, "does not name"),
        ([], 7, "not an index"),
    ],
)
def test_a_table_that_lies_is_corrupt(references: list[tuple[int, int, int, int]], referenced: int, what: str) -> None:
    with pytest.raises(Corrupt, match=what):
        lies(references, referenced)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 4), st.integers(0, 1 << 16), st.integers(1, 255), st.integers(0, 1 << 16))
def test_flips_and_cuts_are_corrupt_or_consistent(seed: int, others: int, at: int, flip: int, cut: int) -> None:
    world = World(seed, 300, max(1, others))
    raw = bytearray(format.encode_index(world.index))
    raw[at % len(raw)] ^= flip
    for data in (bytes(raw), bytes(raw[: cut % len(raw)])):
        try:
            index = format.decode_index(data, world.ref)
            sources = [Source(world.ref, Seal("p"), index), *world.sources[1:]]
            places.insist(sources)
        except Corrupt:
            continue
        where = places.find(sources, np.arange(world.ref.pages))
        assert int((where.frame < 0).sum()) == world.ref.zero_pages


def test_an_image_names_no_base_twice_and_none_for_nothing() -> None:
    """What `decode_manifest` refuses of bases."""
    image = ImageRef(
        name="main", pages=4, zero_pages=0, referenced=4, streams=[], index=NOWHERE, tasks=[TaskFacts(pid=7)], files=NOWHERE,
        bases=[base(1)],
    )  # fmt: skip
    format._check_bases(image, IDS[0], encrypted=False)
    other_folder = base(1).model_copy(update={"index": NOWHERE.model_copy(update={"key": "elsewhere/index.zst"})})
    for changed in (
        {"bases": [base(0)]},
        {"bases": [base(1), base(1)]},
        {"bases": []},
        {"referenced": 0},
        {"bases": [base(1).model_copy(update={"digests": None})]},
        {"bases": [base(1).model_copy(update={"digests": NOWHERE})]},
        {"bases": [base(1).model_copy(update={"zero_pages": 5})]},
        {"bases": [other_folder]},
        {"bases": [base(1).model_copy(update={"encryption": WrappedKey(cipher="AES-256-GCM", key="k", wrapped="AA==")})]},
    ):
        with pytest.raises(Corrupt):
            format._check_bases(image.model_copy(update=changed), IDS[0], encrypted=False)


def test_what_an_enemy_lends_again_and_again_takes_no_longer_than_it_is_much() -> None:
    """One run over very many frames of a page each, and as many references to its first page."""
    count = 20_000
    frames = np.zeros(count, FRAME)
    frames["first_page"], frames["pages"], frames["kept"] = np.arange(count), 1, 1
    other = Source(base(0), Seal(IDS[0]), Index(np.zeros(0, SEGMENT), frames, {}))
    rows = [(0, 0, count, 0), *((count + n, 0, 1, 0) for n in range(count))]
    loan = Loan(np.array(rows, REFERENCE), other)
    began = time.process_time()
    assert loan.wanted().all()
    loan.cut()
    assert sum(part.pages for frame in frames[1:] for part in loan.parts(frame)) == count - 1
    assert len(list(loan.parts(frames[0]))) == count + 1
    assert time.process_time() - began < 10


def test_digests_of_more_pages_than_any_writer_has_them_of_are_corrupt() -> None:
    """16 bytes for each page, whatever is stored: pages of zeros cost nothing."""
    image = PagesRef(
        name="main",
        pages=MAX_DIGESTED,
        zero_pages=MAX_DIGESTED,
        streams=[],
        index=NOWHERE,
        digests=NOWHERE.model_copy(update={"key": "main/digests.zst"}),
    )
    format._check_part(image)
    with pytest.raises(Corrupt, match="digests"):
        format._check_part(image.model_copy(update={"pages": MAX_DIGESTED + 1, "zero_pages": MAX_DIGESTED + 1}))


def test_the_indexes_of_an_image_and_its_bases_have_one_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone is small enough."""
    rig = Rig(tmp_path, machine.memory(8))
    first = rig.checkpoint(criu_opts='{"increment": "auto"}')
    second = rig.checkpoint(criu_opts=f'{{"increment": "{first}"}}')
    (image,) = catalog.read(rig.store, second, rig.node.notary).images
    index = Receiver(rig.store, Seal(second), image, 1, Meter()).fetch_index()
    monkeypatch.setattr(format, "MAX_INDEX", index.nbytes + 100)
    with pytest.raises(Corrupt, match=r"inflates|larger"):
        Receiver(rig.store, Seal(second), image, 1, Meter()).fetch_index()


def test_one_that_has_lost_a_stream_is_referred_to_no_more(tmp_path: Path) -> None:
    """Found out when all was written, it would cost a freeze each time."""
    rig = Rig(tmp_path, machine.memory(8))
    first = rig.checkpoint(criu_opts='{"increment": "auto"}')
    (image,) = catalog.read(rig.store, first, rig.node.notary).images
    rig.store.delete(f"{first}/{image.streams[0].key}")
    with pytest.raises(Corrupt, match="not in the store"):
        rig.checkpoint(criu_opts=f'{{"increment": "{first}"}}')
    assert [call for call in rig.script.calls if "dump" in call].count("criu.dump") == 1
