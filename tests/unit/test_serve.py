"""The server of a lazy restore's pages; the test is the filler. What is waited for is read first, what comes is what was stored."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import random
import socket
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibernode import catalog, filler
from hibernode.errors import Corrupt, StoreUnavailable
from hibernode.flow import Threads
from hibernode.missing import Extent
from hibernode.model import PAGE, Cancel, ImageRef, Meter
from hibernode.transfer import pageproto
from hibernode.transfer.collect import shut
from hibernode.transfer.format import SEGMENT, KeepMap
from hibernode.transfer.frames import Reader, Unpackers
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.serve import Plan, Server, Shelf, inherited, turn_sockets
from tests.fakes.machine import CHILD, ROOT, Run, memory
from tests.fakes.store import MemoryStore
from tests.flow.rig import Rig, nothing_outlives, until

pytestmark = pytest.mark.timeout(60)

FRAME = filler.FRAME_PAGES
START = 0x10000000
LATE = 20.0  # seconds for a turn
ROOM = 64 * filler.SLOT


def plain(frames: int) -> list[Run]:
    """So many frames of one process: the first page of each is like no other, the others are zeros."""
    chance, rest = random.Random(frames), bytes((FRAME - 1) * PAGE)
    return [
        Run(ROOT << 8 | pageproto.TASK, START + n * FRAME * PAGE, chance.randbytes(PAGE) + rest, lazy=True) for n in range(frames)
    ]


def mixed(pages: int) -> list[Run]:
    """Of everything: two processes, shared memory, what may not come late, zeros among other pages, and a stretch of nothing else."""
    zeros = Run(CHILD << 8 | pageproto.TASK, START, bytes(3 * FRAME * PAGE), lazy=True)
    return [*memory(pages, lazy=True), zeros]


def changed(runs: Sequence[Run], seed: int) -> list[Run]:
    """Some pages are others, but where nothing is, and everything has another number."""
    chance = random.Random(seed)

    def content(run: Run) -> bytes | None:
        if run.content is None or not run.content.strip(b"\0"):
            return run.content
        pages = [run.content[at : at + PAGE] for at in range(0, len(run.content), PAGE)]
        return b"".join(chance.randbytes(PAGE) if chance.random() < 0.05 else page for page in pages)

    new = Run(ROOT << 8 | pageproto.TASK, 0x70000000 + seed * 0x1000000, chance.randbytes((seed + 3) * PAGE), lazy=True)
    return [new, *(dataclasses.replace(run, content=content(run)) for run in runs)]


class Gate(MemoryStore):
    """Every read of pages waits until it is let through; `order` has them as they were begun."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[tuple[str, int, int]] = []  # key, offset, bytes
        self.failing = 0
        self._open, self._let = False, set[tuple[str, int]]()
        self._changed = threading.Condition()

    def open(self) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def let(self, read: tuple[str, int, int]) -> None:
        """This one alone."""
        with self._changed:
            self._let.add(read[:2])
            self._changed.notify_all()

    @contextlib.contextmanager
    def reading(self, key: str, offset: int, size: int) -> Iterator[Callable[[memoryview], None]]:
        with self._changed:
            self.order.append((key, offset, size))
            self._changed.notify_all()
            failing, self.failing = self.failing, max(0, self.failing - 1)
        if failing:
            raise StoreUnavailable("not now")
        with self._changed:
            assert self._changed.wait_for(lambda: self._open or (key, offset) in self._let, LATE)
        with super().reading(key, offset, size) as fill:
            yield fill

    def begun(self, count: int) -> list[tuple[str, int, int]]:
        """The first so many; waits for them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.order) >= count, LATE), self.order
            return list(self.order[:count])

    def insist_each_once(self) -> None:
        """No byte of a stream was read twice."""
        reads = defaultdict(list)
        for key, offset, size in self.order:
            reads[key].append((offset, offset + size))
        for key, each in reads.items():
            each.sort()
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(each)), key


class Counted(Shelf):
    """Knows how often somebody has waited."""

    wants = 0

    def want(self, row: int, soon: Sequence[int] = ()) -> None:  # type: ignore[override]
        super().want(row, soon)
        self.wants += 1


class Peer:
    """The filler's end of the socket, and its view of the memory."""

    def __init__(self, end: socket.socket, shelf: Shelf, plan: Plan) -> None:
        self._end, self._memory = end, mmap.mmap(shelf.file, 0)
        end.settimeout(LATE)
        self.slots = len(self._memory) // (filler.SLOT + filler.KEPT)
        self.rows = defaultdict[int, list[tuple[int, Extent]]](list)
        columns = array("Q", plan.table.tobytes())
        for at in range(0, len(columns), filler.COLUMNS):
            pid, *extent = columns[at : at + filler.COLUMNS]
            self.rows[extent[2]].append((pid, Extent(*extent)))
        self.held: dict[int, int] = {}

    def want(self, row: int) -> None:
        self._end.send(filler.TURN.pack(row, filler.WANTED))

    def turn(self) -> int:
        """The row that comes next."""
        if not (data := self._end.recv(filler.TURN.size)):
            raise ConnectionError("closed")
        row, slot = filler.TURN.unpack(data)
        assert row in self.rows
        assert 0 <= slot < self.slots
        assert slot not in self.held.values(), "somebody has it"
        self.held[row] = slot
        return int(row)

    def pages(self, row: int) -> dict[tuple[int, int], bytes]:
        """(process, page) -> what it holds; of a row that is here."""
        slot, found = self.held[row], {}
        at = self.slots * filler.SLOT + slot * filler.KEPT
        bits = int.from_bytes(self._memory[at : at + filler.KEPT], "little")
        for pid, extent in self.rows[row]:
            for n in range(extent.pages):
                place = slot * filler.SLOT + (extent.at + n) * PAGE
                content = self._memory[place : place + PAGE] if bits >> extent.at + n & 1 else bytes(PAGE)
                assert (pid, extent.page + n) not in found, "a page has one place"
                found[pid, extent.page + n] = content
        return found

    def done(self, row: int) -> None:
        self._end.send(filler.TURN.pack(row, self.held.pop(row)))

    def put_back(self, row: int) -> None:
        self._end.send(filler.TURN.pack(row, filler.BACK - self.held.pop(row)))

    def everything(self) -> dict[tuple[int, int], bytes]:
        """Each row once, whatever the order, and each page."""
        found: dict[tuple[int, int], bytes] = {}
        left = set(self.rows) - set(self.held)
        while left:
            row = self.turn()
            left.remove(row)
            new = self.pages(row)
            assert not found.keys() & new.keys()
            found |= new
            self.done(row)
        return found

    def close(self) -> None:
        self._end.close()
        self._memory.close()


class Served:
    """An image in a store, and a server of it that runs. `increments`: so many of a chain, of which it is the last."""

    def __init__(
        self, directory: Path, runs: Sequence[Run], *, streams: int = 1, increments: int = 0, compression: str = "none"
    ) -> None:
        self.runs, self.store, rig = list(runs), Gate(), Rig(directory, list(runs))
        options = {"criu_opts": '{"increment": "auto"}'} if increments else {}
        made = rig.checkpoint(streams=streams, compression=compression, **options)
        for n in range(increments):
            self.runs = rig.machine.runs = changed(self.runs, n)
            made = rig.checkpoint(streams=streams, compression=compression, criu_opts=f'{{"increment": "{made}"}}')
        self.store.objects = rig.store.objects
        self.image: ImageRef = catalog.read(rig.store, made, rig.node.notary).images[0]
        self.receiver, self.meter = Receiver(self.store, Seal(made), self.image, 2, Meter()), Meter()
        self.index = self.receiver.fetch_index()
        self.plan = Plan(self.receiver.sources)

    def late(self) -> dict[tuple[int, int], bytes]:
        """(process, page) -> what it holds, of all that may come late."""
        return {
            (run.dst_id >> 8, run.vaddr // PAGE + n): (run.content or b"")[n * PAGE : (n + 1) * PAGE]
            for run in self.runs
            for n in range(run.count if run.lazy else 0)
        }

    @contextlib.contextmanager
    def running(self, *, readers: int = 2, room: int = ROOM, outage: float = 10.0, reading: bool = True,
                fixed: Path | None = None) -> Iterator[Peer]:  # fmt: skip
        """What goes wrong in a thread is raised here. `reading`: else the test does. `fixed`: where what may not come late goes before."""
        ours, theirs = turn_sockets()
        with contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            threads = Threads(Cancel())
            self.shelf = Counted(room, readers, threads)
            stack.callback(self.shelf.free)
            self.shelf.begin(self.plan)
            self.server = Server(ours, self.store, self.plan, self.shelf, self.meter, outage=outage)
            stack.enter_context(threads)
            stack.callback(self.store.open)
            peer = Peer(theirs, self.shelf, self.plan)
            stack.callback(peer.close)
            threads.on_stop(lambda: shut(ours))
            if fixed is not None:
                with Threads(Cancel()) as fetching:
                    self.receiver.fetch_fixed(self.index, fixed, fetching, self.server.keep, tables=False)
            self.kept = self.shelf.given
            threads.start("serve", self.server.run)
            for n in range(readers if reading else 0):
                threads.start(f"read {n}", self.server.read)
            try:
                yield peer
            except ConnectionError:
                threads.wait()
                threads.join(())
                raise

    def runs_now(self, peer: Peer) -> None:
        """Something is given out of what was read first. The test reads."""
        job = self.shelf.next()
        assert job is not None
        self.server._read(Reader(self.store, self.meter, Unpackers(1)), dict.fromkeys(job.rows))
        self.shelf.finish(job)
        for _ in job.rows:
            peer.done(peer.turn())
        until(lambda: not self.shelf.used, "that it is heard")

    def read(self, row: int) -> tuple[str, int]:
        """How the store is asked for it: key, offset."""
        frame = self.index.frames[row]
        stream = self.image.streams[int(frame["stream"])]
        return f"{self.receiver._seal.checkpoint_id}/{stream.key}", int(frame["offset"])


# --- what comes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("increments", [0, 1, 3])
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("pages", [1, 300, 1025, 6000])
def test_every_page_that_may_come_late_is_what_was_stored(tmp_path: Path, pages: int, streams: int, increments: int) -> None:
    served = Served(tmp_path, mixed(pages), streams=streams, increments=increments)
    served.store.open()
    late = served.late()
    with served.running(readers=3) as peer:
        found = peer.everything()
        assert found.items() <= late.items()
        assert not any(content.strip(b"\0") for page, content in late.items() if page not in found)
        until(lambda: not served.shelf.used, "all slots")
        until(lambda: served.meter.raw_bytes == len(found) * PAGE, "what was counted")
        assert served.shelf.given == 0
    served.store.insist_each_once()
    if pages == 6000:
        assert len(late) - len(found) >= 2 * FRAME, "some are in no frame"
        assert any(not content.strip(b"\0") for content in found.values()), "and some in one, and zeros"
        assert len(served.image.bases) == increments


@pytest.mark.parametrize("increments", [0, 2])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_frames_that_are_read_for_what_may_not_come_late_are_not_read_again(
    tmp_path: Path, compression: str, increments: int
) -> None:
    served = Served(tmp_path, mixed(9000), increments=increments, compression=compression)
    served.store.open()
    (tmp_path / "images").mkdir()
    with served.running(fixed=tmp_path / "images") as peer:
        assert served.kept, "some frames have pages of both kinds"
        assert peer.everything().items() <= served.late().items()
    served.store.insist_each_once()


@pytest.mark.parametrize("increments", [0, 2])
def test_what_does_not_come_late_is_what_is_staged(tmp_path: Path, increments: int) -> None:
    served = Served(tmp_path, mixed(6000), increments=increments)
    fixed = sum(
        bool((run.content or b"")[at : at + PAGE].strip(b"\0"))
        for run in served.runs
        if not run.lazy
        for at in range(0, run.count * PAGE, PAGE)
    )
    said = served.image.pages - served.image.zero_pages - served.plan.late // PAGE
    assert 0 < said <= fixed, "never more: nobody is refused who fits"


def test_shared_memory_never_comes_late_whatever_its_flags(tmp_path: Path) -> None:
    """CRIU flags none so; nobody fills it."""
    shared = Run(77 << 8 | pageproto.SHMEM, START, random.Random(1).randbytes(5 * PAGE), lazy=True)
    served = Served(tmp_path, [*plain(2), shared])
    served.store.open()
    (tmp_path / "images").mkdir()
    with served.running(fixed=tmp_path / "images") as peer:
        assert {pid for pid, _ in peer.everything()} == {ROOT}
    staged = b"".join(path.read_bytes() for path in (tmp_path / "images").glob("pages-*.img"))
    assert staged.count(shared.content or b"?") == 1


def test_one_page_of_a_base_may_come_late_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an array that has grown, and holds one number. Nothing of it is staged."""
    page = random.Random(4).randbytes(PAGE)
    grown = [Run(ROOT << 8 | pageproto.TASK, START, page * 20_000, lazy=True)]
    monkeypatch.setitem(globals(), "changed", lambda *_: grown)
    served = Served(tmp_path, [Run(ROOT << 8 | pageproto.TASK, START, page * 1024, lazy=True)], increments=1)
    assert served.image.pages - served.image.zero_pages == 20_000
    assert served.plan.late == 20_000 * PAGE


def test_a_frame_has_its_slot_when_it_is_there_and_the_last_one_used_comes_first(tmp_path: Path) -> None:
    """So what is never needed at once is never memory: one slot does for all, where each is done with before the next is read."""
    served = Served(tmp_path, plain(12))
    served.store.open()
    used = set()
    with served.running(readers=1, room=8 * filler.SLOT) as peer:  # of one reader nothing is read ahead
        for row in range(12):
            peer.want(row)
            assert peer.turn() == row
            used.add(peer.held[row])
            peer.done(row)
            until(lambda: not served.shelf.used, "the slot")
    assert len(used) == 1


def test_what_is_read_for_another_purpose_has_half_of_the_room(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(6))
    served.store.open()
    with served.running(room=4 * filler.SLOT, reading=False):
        taken = [served.shelf.take(row) for row in range(6)]
        assert taken == [True, True, False, False, False, False]
        assert not served.shelf.take(0), "it is here"


class Stub(Plan):
    """Of so many rows, without an image."""

    def __init__(self, count: int) -> None:
        self.rows = np.arange(count)

    def row(self, source: int, frame: np.void) -> int:
        return int(frame)

    def keeps(self, row: int, frame: np.void) -> KeepMap | None:
        return None


class Alone(Stub):
    """None can be read with another."""

    def together(self, row: int) -> Iterator[int]:
        yield row


def test_frames_that_are_kept_before_anybody_listens_do_not_wait_for_him() -> None:
    """However much room there is: the filler begins when what may not come late is there."""
    ours, theirs = turn_sockets()
    with ours, theirs, Threads(Cancel()) as threads:
        shelf = Shelf(4096 * filler.SLOT, 2, threads)
        shelf.begin(plan := Stub(4096))
        server = Server(ours, MemoryStore(), plan, shelf, Meter(), outage=0.0)
        ours.setblocking(False)  # what would wait, for ever, is not sent, and missed below
        for row in range(2048):
            server.keep(0, np.int64(row), [])  # type: ignore[arg-type]
        kept = shelf.given
        theirs.settimeout(1.0)
        assert [filler.TURN.unpack(theirs.recv(64))[0] for _ in range(kept)] == list(range(kept))
        assert kept >= 64
    shelf.free()


# --- in which order -------------------------------------------------------------------------------------------------------------


def test_what_is_waited_for_is_read_before_what_may_be(tmp_path: Path) -> None:
    """Reads are held back, and let through one by one, so that the order in which they are begun is all there is."""
    served = Served(tmp_path, plain(40))
    with served.running(readers=2) as peer:
        assert served.store.begun(1)[0][:2] == served.read(0), "nobody waits: the first ones"
        peer.want(30)
        second = served.store.begun(2)[1]
        assert second[:2] == served.read(30)
        peer.want(20)
        peer.want(25)
        until(lambda: served.shelf.wants == 3, "that it is heard")
        served.store.let(second)
        assert peer.turn() == 30
        assert served.store.begun(3)[2][:2] == served.read(20)
        served.store.let(served.store.order[2])
        assert peer.turn() == 20
        assert served.store.begun(4)[3][:2] == served.read(25)
        assert served.store.order[0][2] > 3 * served.store.order[1][2], "where nobody waits several are read at once"


def test_one_thread_is_there_for_what_is_waited_for_alone(tmp_path: Path) -> None:
    """However long what is read ahead takes."""
    served = Served(tmp_path, plain(40))
    with served.running(readers=3) as peer:
        ahead = [read[:2] for read in served.store.begun(2)]
        assert set(ahead) == {served.read(0), served.read(4)}
        peer.want(33)
        assert served.store.begun(3)[2][:2] == served.read(33), "the third has not begun anything"


def test_half_of_the_room_is_there_for_what_is_waited_for_alone(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(30))
    served.store.open()
    with served.running(readers=3, room=8 * filler.SLOT) as peer:
        assert {peer.turn() for _ in range(4)} == {0, 1, 2, 3}
        for row in (20, 22, 24, 26, 28):
            peer.want(row)
        assert {peer.turn() for _ in range(4)} == {20, 22, 24, 26}, "as many as there is room for, and nothing else"
        assert served.shelf.used == 8
        peer.done(1)
        assert peer.turn() == 28, "whoever waits comes before what is read ahead"
        for row in (0, 2, 20):
            peer.done(row)
        until(lambda: served.shelf.used == 5, "what was given back")
        peer.want(10)
        assert peer.turn() == 10, "more than half is taken: nothing is read ahead"


def test_little_is_read_ahead_until_the_tree_runs(tmp_path: Path) -> None:
    """CRIU, which makes it, needs the processor; whoever waits meanwhile is served, and what was put back is not given out."""
    served = Served(tmp_path, plain(30))
    served.store.open()
    with served.running(readers=3) as peer:
        assert {peer.turn() for _ in range(8)} == set(range(8))
        peer.want(20)
        assert peer.turn() == 20
        peer.put_back(7)
        peer.put_back(6)
        assert peer.turn() == 8, "eight are here, with the one that somebody waited for"
        assert served.shelf.used == 8
        peer.done(0)
        assert {peer.turn() for _ in range(22)} == {6, 7, *range(9, 30)} - {20}, "then as much as there is room for"


def test_who_is_restored_held_has_all_read_ahead_that_there_is_room_for() -> None:
    with Threads(Cancel()) as threads:
        shelf = Shelf(30 * filler.SLOT, 3, threads, runs=False)
        shelf.begin(Alone(40))
        jobs = []
        while shelf.used < 29:
            job = shelf.next()
            assert job is not None
            jobs += job.rows
            shelf.finish(job)
        assert jobs == list(range(29))
    shelf.free()


def test_the_room_is_kept(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(30))
    served.store.open()
    with served.running(room=1, readers=3) as peer:
        assert peer.slots == 2, "one for each half, at least"
        for row in reversed(range(30)):
            peer.want(row)
        assert len(peer.everything()) == 30 * FRAME


def test_faults_that_follow_each_other_are_read_ahead_of(tmp_path: Path) -> None:
    """One frame after the second, then two, then four; and none after one that is somewhere else. The test reads."""
    served = Served(tmp_path, plain(64))
    with served.running(readers=2, room=256 * filler.SLOT, reading=False) as peer:
        served.store.open()
        served.runs_now(peer)

        def begun_by(row: int) -> list[int]:
            heard = served.shelf.wants
            peer.want(row)
            until(lambda: served.shelf.wants > heard, "that it is heard")
            job = served.shelf.next()
            assert job is not None
            assert (job.rows, job.ahead) == ((row,), False)
            ahead = []
            while True:
                job = served.shelf.next()
                assert job is not None
                assert job.ahead
                served.shelf.finish(job)
                if len(job.rows) > 1:  # the rest, in order
                    return ahead
                ahead += job.rows

        assert begun_by(40) == []
        assert begun_by(41) == [42]
        assert begun_by(43) == [44, 45]
        assert begun_by(46) == [47, 48, 49, 50]
        assert begun_by(60) == []
        assert begun_by(30) == []
        assert begun_by(31) == [32]


def test_rows_that_are_put_back_come_again(tmp_path: Path) -> None:
    """When nothing else is left, or as soon as somebody waits for them."""
    served = Served(tmp_path, plain(8))
    served.store.open()
    with served.running(room=4 * filler.SLOT) as peer:
        assert [peer.turn(), peer.turn()] == [0, 1]
        content = peer.pages(0), peer.pages(1)
        peer.put_back(0)
        peer.done(1)
        order = []
        while 0 not in order:
            order.append(peer.turn())
            assert order[-1] or peer.pages(0) == content[0]
            peer.done(order[-1])
        assert order == [2, 3, 4, 5, 6, 7, 0]
        until(lambda: served.meter.raw_bytes == 8 * FRAME * PAGE, "each is counted, and once")


def test_a_row_that_was_put_back_is_read_for_who_waits(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(8))
    served.store.open()
    with served.running(room=4 * filler.SLOT) as peer:
        assert [peer.turn(), peer.turn()] == [0, 1]
        peer.want(6)
        peer.want(7)
        assert {peer.turn(), peer.turn()} == {6, 7}
        content = peer.pages(1)
        peer.put_back(1)
        peer.want(1)
        assert peer.turn() == 1, "though there is no room for anything that nobody waits for"
        assert peer.pages(1) == content


# --- when something fails -------------------------------------------------------------------------------------------------------


def test_a_store_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(3))
    served.store.open()
    served.store.failing = 3
    with served.running() as peer:
        assert peer.everything() == served.late()
    assert not served.store.failing


def ended_by(served: Served, **settings: float) -> BaseException:
    """Everything is asked for until the socket ends."""

    def ask() -> None:
        with served.running(**settings) as peer:  # type: ignore[arg-type]
            for row in peer.rows:
                peer.want(row)
            while True:
                peer.pages(peer.turn())

    served.store.open()
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which it is, is what is asked
        ask()
    return raised.value


def test_a_store_that_stays_away_ends_it(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(2))
    served.store.failing = 1 << 30
    began = time.monotonic()
    assert isinstance(ended_by(served, outage=0.5), StoreUnavailable)
    assert 0.5 <= time.monotonic() - began < LATE


@pytest.mark.parametrize("at", [0, 20, PAGE - 1])
def test_nothing_of_a_damaged_frame_is_given_out(tmp_path: Path, at: int) -> None:
    served = Served(tmp_path, plain(1))
    (key,) = [key for key in served.store.objects if "/pages-" in key]
    data = bytearray(served.store.objects[key])
    data[at] ^= 1
    served.store.objects[key] = bytes(data)
    served.store.open()
    with pytest.raises(Corrupt), served.running() as peer, pytest.raises(ConnectionError):
        peer.turn()


def test_nothing_of_a_base_that_is_damaged_is_given_out(tmp_path: Path) -> None:
    served = Served(tmp_path, mixed(3000), increments=1)
    base = served.image.bases[0]
    key = f"{base.checkpoint_id}/{base.streams[0].key}"
    served.store.objects[key] = bytes(len(served.store.objects[key]))
    assert isinstance(ended_by(served), Corrupt)


# --- the end --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1 << 30])
def test_the_end_of_the_socket_ends_all_threads(tmp_path: Path, failing: int) -> None:
    """One that waits for something to do, one that waits for a store to answer; without an error: the keeper knows how it was."""
    served = Served(tmp_path, plain(3))
    served.store.failing = failing
    served.store.open()
    with nothing_outlives():
        with served.running(outage=1e9, room=2 * filler.SLOT) as peer:
            served.store.begun(1)
            if not failing:
                peer.turn()
        assert served.shelf.closed


def test_what_becomes_of_a_frame_that_was_read_ahead_is_no_matter_when_all_is_in(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(12))
    with served.running() as peer:
        served.store.begun(1)
        peer.close()
        until(lambda: served.shelf.closed, "the end")
        served.store.objects = {}  # what is held back fails


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(1))
    served.store.open()
    with nothing_outlives(), served.running() as peer:
        peer.done(peer.turn())


RUNS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 40), st.integers(1, 9), st.integers(0, 7)), max_size=12)


@given(RUNS, st.fixed_dictionaries({pid: st.integers(0, 4) for pid in range(1, 5)}))
def test_what_lies_where_the_parent_has_a_page_is_counted_once(
    runs: list[tuple[int, int, int, int]], parents: dict[int, int]
) -> None:
    """Whether it may come late or not; also where an index has a page twice, or names a process as its own parent. What is not there, and
    shared memory, is nobody's own."""
    rows = [(pid << 8 | pageproto.TASK, page * PAGE, count, flags) for pid, page, count, flags in runs]
    segments = np.array([*rows, (1 << 8 | pageproto.SHMEM, 0, 50, pageproto.PRESENT)], SEGMENT)
    pages = defaultdict(set)
    for pid, page, count, flags in runs:
        pages[pid].update(range(page, page + count) if flags & pageproto.PRESENT else ())
    wanted = sum(len(pages[pid] & pages[parent]) for pid, parent in parents.items() if parent)
    assert inherited(segments, parents) == (wanted, sum(count for _, _, count, flags in runs if flags & pageproto.PRESENT))
