"""The server of pages against a scripted peer in CRIU's place: what is asked for first is read first, what comes is what was stored."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from hibernode import catalog
from hibernode.errors import Corrupt, HibernodeError, RestoreFailed, StoreUnavailable
from hibernode.flow import Threads
from hibernode.model import PAGE, Cancel, ImageRef, Meter
from hibernode.transfer import pageproto
from hibernode.transfer.collect import shut
from hibernode.transfer.format import Index
from hibernode.transfer.pageproto import Header, Wire
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.serve import Places, Server, Shelf, question_sockets
from tests.fakes.criu import VERSION
from tests.fakes.machine import CHILD, ROOT, Run, memory
from tests.fakes.store import MemoryStore
from tests.flow.rig import Rig, until

pytestmark = pytest.mark.timeout(30)

WIRE = Wire(VERSION)
FRAME = 1024  # pages
START = 0x10000000
LATE = 20.0  # seconds for an answer


def plain(frames: int, pid: int = ROOT, start: int = START) -> list[Run]:
    """So many frames of one process, none of them like another, and no zeros."""
    content = np.random.default_rng(frames).integers(1, 256, frames * FRAME * PAGE, np.uint8).tobytes()
    step = 256 * PAGE
    return [Run(pid << 8 | pageproto.TASK, start + at, content[at : at + step], lazy=True) for at in range(0, len(content), step)]


class Gate(MemoryStore):
    """Every read of pages waits until it is let through; `order` has the frames, as they were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.order: list[tuple[str, int]] = []
        self.failing = 0
        self._changed = threading.Condition()

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        if "/pages-" in key:
            with self._changed:
                self.order.append((key.rpartition("/")[2], offset))
                self._changed.notify_all()
                failing, self.failing = self.failing, max(0, self.failing - 1)
            if failing:
                raise StoreUnavailable("not now")
            assert self.open.wait(LATE)
        super().read_into(key, offset, into)

    def asked(self, count: int) -> list[tuple[str, int]]:
        """The first so many; waits for them."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.order) >= count, LATE), self.order
            return list(self.order[:count])


class Peer:
    """CRIU's end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        end.settimeout(LATE)

    def ask(self, vaddr: int, pages: int = 1, pid: int = ROOT) -> None:
        self._end.sendall(WIRE.encode(Header(pageproto.GET, 0, pages, vaddr, pid)))

    def answer(self) -> tuple[Header, bytes]:
        header = WIRE.decode(self._receive(WIRE.size))
        assert (header.command, header.flags) == (pageproto.ADD_F, pageproto.PRESENT)
        return header, self._receive(header.pages * PAGE)

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self._end.recv(size - len(data))
            if not more:
                raise ConnectionError("closed")
            data += more
        return bytes(data)

    def end(self) -> None:
        self._end.sendall(WIRE.encode(Header(pageproto.FORCE_CLOSE, 0, 0, 0, 0)))
        assert self._receive(4) == pageproto.CLOSED


class Served:
    """An image in a store, and a server of it that runs."""

    def __init__(self, directory: Path, runs: Sequence[Run], *, streams: int = 1) -> None:
        self.runs, self.store = list(runs), Gate()
        rig = Rig(directory, self.runs)
        made = rig.checkpoint(streams=streams, compression="none")
        self.store.objects = rig.store.objects
        self.image: ImageRef = catalog.read(rig.store, made, rig.node.notary).images[0]
        self.seal, self.meter = Seal(made), Meter()
        self.index: Index = Receiver(self.store, self.seal, self.image, 1, Meter()).fetch_index()

    @contextlib.contextmanager
    def running(self, *, readers: int = 2, room: int = 64, outage: float = 10.0) -> Iterator[Peer]:
        """What goes wrong in a thread is raised here."""
        ours, theirs = socket.socketpair()
        with theirs, Threads(Cancel()) as threads:
            shelf = Shelf(room, readers, threads)
            self.server = Server(ours, WIRE, self.store, self.seal, self.image, self.index, shelf, self.meter, outage=outage)
            self.shelf = shelf
            threads.on_stop(lambda: shut(ours))
            threads.start("serve", self.server.run)
            for n in range(readers):
                threads.start(f"read {n}", self.server.read)
            try:
                yield Peer(theirs)
            except ConnectionError:
                self.store.open.set()
                threads.wait()
                threads.join(())
                raise
            finally:
                self.store.open.set()
                theirs.close()
        shelf.free()

    def content(self, vaddr: int, pages: int, pid: int = ROOT) -> bytes:
        for run in self.runs:
            if run.dst_id == pid << 8 | pageproto.TASK and run.content and run.vaddr <= vaddr < run.vaddr + len(run.content):
                at = vaddr - run.vaddr
                return run.content[at : at + pages * PAGE]
        raise AssertionError(hex(vaddr))

    def frame(self, row: int) -> tuple[str, int]:
        """How the store is asked for it."""
        found = self.index.frames[row]
        return f"pages-{int(found['stream'])}.zst", int(found["offset"])


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("pages", [1, 300, 1025, 6000])
def test_every_page_that_may_come_late_is_what_was_stored(tmp_path: Path, pages: int, streams: int) -> None:
    served = Served(tmp_path, [*memory(pages, lazy=True), *plain(1, start=START)], streams=streams)
    served.store.open.set()
    with served.running() as peer:
        for run in served.runs:
            at = 0
            while run.lazy and at < run.count:
                peer.ask(run.vaddr + at * PAGE, run.count - at, run.dst_id >> 8)
                header, content = peer.answer()
                assert 0 < header.pages <= run.count - at
                assert content == (run.content or b"")[at * PAGE : (at + header.pages) * PAGE]
                at += header.pages
        peer.end()
    assert served.server.closed
    assert served.meter.raw_bytes == sum(run.count for run in served.runs if run.lazy) * PAGE
    assert not len(served.shelf), "what has been given out is kept no longer"


def test_what_is_asked_for_is_read_before_what_may_be(tmp_path: Path) -> None:
    """The peer asks for a piece, and the frames after it are read ahead; then a thread waits for a page far away. Reads are held back, so
    that the order in which they are begun is all there is."""
    served = Served(tmp_path, plain(40))
    with served.running(readers=2) as peer:
        peer.ask(START, 256)
        assert set(served.store.asked(2)) == {served.frame(0), served.frame(1)}  # asked for, and ahead
        peer.ask(START + 30 * FRAME * PAGE)
        until(lambda: served.server.asked == 2, "the second question")
        served.store.open.set()
        assert served.store.asked(3)[2] == served.frame(30), "before frames 2 to 16, which were expected first"
        header, _ = peer.answer()
        assert header.vaddr == START
        header, content = peer.answer()
        assert (header.vaddr, content) == (START + 30 * FRAME * PAGE, served.content(START + 30 * FRAME * PAGE, 1))
        peer.end()


def test_one_thread_is_there_for_what_is_asked_for_alone(tmp_path: Path) -> None:
    """However long what is read ahead takes."""
    served = Served(tmp_path, plain(12))
    with served.running(readers=2) as peer:
        peer.ask(START, 256)
        first, ahead = served.frame(0), served.frame(1)
        assert set(served.store.asked(2)) == {first, ahead}
        served.shelf.put(0, memoryview(served.content(START, 256) * 4))  # as if it had come: the question is answered
        peer.answer()
        until(lambda: not served.server.waiting, "the answer")
        assert len(served.store.order) == 2, "nothing else is begun: both are still at it"
        peer.end()


def test_an_answer_is_short_while_a_thread_waits_for_a_later_one(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(3))
    with served.running() as peer:
        peer.ask(START, 256)
        peer.ask(START + 2 * FRAME * PAGE)
        until(lambda: served.server.asked == 2, "both questions")
        served.store.open.set()
        header, content = peer.answer()
        assert (header.pages, content) == (16, served.content(START, 16))
        header, _ = peer.answer()
        assert header.pages == 1
        peer.ask(START + 16 * PAGE, 240)
        header, _ = peer.answer()
        assert header.pages == 240, "nobody waits any more"
        peer.end()


def test_faults_that_follow_each_other_are_read_ahead_of(tmp_path: Path) -> None:
    """One frame after the second, two after the third, four after the fourth; and none after one that is somewhere else."""
    served = Served(tmp_path, plain(40))
    served.store.open.set()

    def begun_by(peer: Peer, row: int, page: int = 0) -> set[int]:
        before = len(served.store.order)
        peer.ask(START + (row * FRAME + page) * PAGE)
        peer.answer()
        until(lambda: not served.shelf._ahead and not served.shelf._reading, "the end of reading ahead")
        rows = {served.frame(n): n for n in range(40)}
        return {rows[each] for each in served.store.order[before:]}

    with served.running() as peer:
        assert begun_by(peer, 5) == {5}
        assert begun_by(peer, 5, 7) == set()
        assert begun_by(peer, 6) == {6, 7}
        assert begun_by(peer, 7) == {8, 9}
        assert begun_by(peer, 8) == {10, 11, 12}
        assert begun_by(peer, 30) == {30}
        assert begun_by(peer, 20) == {20}
        peer.end()


def test_the_room_is_kept(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(30))
    served.store.open.set()
    most = 0
    with served.running(room=4, readers=3) as peer:
        for run in served.runs:
            peer.ask(run.vaddr, run.count)
            _, content = peer.answer()
            assert content == run.content
            most = max(most, len(served.shelf))
        peer.end()
    assert most <= 4 + 3


def test_the_room_is_kept_where_more_is_asked_for_at_once(tmp_path: Path) -> None:
    """A process that waits has a frame of its own, and there are more of them than frames there is room for."""
    served = Served(tmp_path, plain(30))
    with served.running(room=4, readers=3) as peer:
        for n in range(30):
            peer.ask(START + n * FRAME * PAGE)
        until(lambda: served.server.asked == 30, "all questions")
        served.store.open.set()
        for n in range(30):
            assert peer.answer()[1] == served.content(START + n * FRAME * PAGE, 1)
            assert len(served.shelf) <= 4
        peer.end()


def test_what_becomes_of_a_frame_that_was_read_ahead_is_no_matter_when_all_is_in(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(12))
    with served.running(readers=2) as peer:
        peer.ask(START, 256)
        served.store.asked(2)  # the one that was asked for, and the next
        served.shelf.put(0, memoryview(served.content(START, 256) * 4))  # as if it had come
        peer.answer()
        peer.end()
        until(lambda: served.shelf.closed, "the end")
        served.store.objects = {}  # what is held back fails
    assert served.server.closed


def test_a_store_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(2))
    served.store.open.set()
    served.store.failing = 3
    with served.running() as peer:
        peer.ask(START, 4)
        assert peer.answer()[1] == served.content(START, 4)
        peer.end()
    assert not served.store.failing


def ended_by(served: Served, questions: Sequence[Header], **settings: float) -> HibernodeError:
    def ask() -> None:
        with served.running(**settings) as peer:  # type: ignore[arg-type]
            for question in questions:
                peer._end.sendall(WIRE.encode(question))
            while True:
                peer.answer()

    served.store.open.set()
    with pytest.raises(HibernodeError) as raised:
        ask()
    return raised.value


def get(vaddr: int, pages: int = 1, pid: int = ROOT) -> Header:
    return Header(pageproto.GET, 0, pages, vaddr, pid)


def test_a_store_that_stays_away_ends_it(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(2))
    served.store.failing = 1 << 30
    assert isinstance(ended_by(served, [get(START)], outage=0.0), StoreUnavailable)


@pytest.mark.parametrize("at", [0, 20, 1 << 21])
def test_nothing_of_a_damaged_frame_is_given_out(tmp_path: Path, at: int) -> None:
    served = Served(tmp_path, plain(1))
    (key,) = [key for key in served.store.objects if "/pages-" in key]
    data = bytearray(served.store.objects[key])
    data[at] ^= 1
    served.store.objects[key] = bytes(data)
    assert isinstance(ended_by(served, [get(START)]), Corrupt)


@pytest.mark.parametrize(
    "question",
    [
        get(START - PAGE),
        get(START + FRAME * PAGE),
        get(START + 1),
        get(START, pid=CHILD),
        get(START, pages=0),
        get(1 << 47),
        Header(pageproto.ADD_F, 0, 1, START, ROOT),
        Header(0x77, 0, 0, 0, 0),
    ],
)
def test_a_question_that_has_no_answer_ends_it(tmp_path: Path, question: Header) -> None:
    assert isinstance(ended_by(Served(tmp_path, plain(1)), [question]), Corrupt)


def test_a_piece_that_the_kernel_does_not_take_is_answered_shorter_and_given_up_at_last(tmp_path: Path) -> None:
    served, lengths = Served(tmp_path, plain(1)), list[int]()
    served.store.open.set()

    def ask() -> None:
        with served.running() as peer:
            while True:
                peer.ask(START, 256)
                lengths.append(peer.answer()[0].pages)

    with pytest.raises(RestoreFailed) as raised:
        ask()
    assert lengths[:10] == [256, 128, 64, 32, 16, 8, 4, 2, 1, 1]
    assert raised.value.details["reason"] == "lazy_stuck"


def test_each_process_has_its_own_piece_that_is_not_taken(tmp_path: Path) -> None:
    """CRIU asks for them in turn."""
    served, lengths = Served(tmp_path, [*plain(1), *plain(1, CHILD)]), dict[int, list[int]]()
    served.store.open.set()
    with served.running() as peer:
        for _ in range(9):
            for pid in (ROOT, CHILD):
                peer.ask(START, 256, pid)
                lengths.setdefault(pid, []).append(peer.answer()[0].pages)
                peer.ask(START + 300 * PAGE, 1, pid)  # a thread waits
                assert peer.answer()[0].pages == 1
        peer.ask(START + PAGE, 255)
        assert peer.answer()[0].pages == 255
        peer.ask(START, 256)
        assert peer.answer()[0].pages == 256, "it has asked for something else meanwhile"
        peer.end()
    assert lengths == {pid: [256, 128, 64, 32, 16, 8, 4, 2, 1] for pid in (ROOT, CHILD)}


def test_a_page_may_be_asked_for_by_many(tmp_path: Path) -> None:
    """By every child that the tree has forked."""
    served = Served(tmp_path, plain(1))
    served.store.open.set()
    with served.running() as peer:
        for _ in range(1500):
            peer.ask(START)
            assert peer.answer()[0].pages == 1
        peer.end()


def test_questions_that_nobody_has_taken_yet_find_room() -> None:
    """CRIU does not wait when it asks."""
    for end, other in (question_sockets(), question_sockets()[::-1]):
        with end, other:
            other.setblocking(False)
            room, count = other.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    other.send(WIRE.encode(get(START)))
                    count += 1
            assert count >= room // 2048


def test_the_end_of_the_socket_is_no_error_of_its_own(tmp_path: Path) -> None:
    """Whoever drives CRIU knows why."""
    served = Served(tmp_path, plain(1))
    with served.running() as peer:
        peer.ask(START)
        peer._end.close()
    assert not served.server.closed


def test_what_was_said_before_the_end_of_the_socket_is_heard(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(1))
    with served.running() as peer:
        peer._end.sendall(WIRE.encode(Header(pageproto.FORCE_CLOSE, 0, 0, 0, 0)))
        peer._end.close()
    assert served.server.closed


def test_every_question_is_taken_while_answers_wait(tmp_path: Path) -> None:
    """CRIU does not wait when it asks: a socket that is full would end it."""
    served = Served(tmp_path, plain(4))
    with served.running() as peer:
        for n in range(3000):
            peer.ask(START + n * PAGE)
            until(lambda: served.server.asked == n + 1, "the question")  # noqa: B023
        served.store.open.set()
        for n in range(3000):
            assert peer.answer()[0].vaddr == START + n * PAGE
        peer.end()


def test_pages_to_give_out_are_counted_by_frame(tmp_path: Path) -> None:
    served = Served(tmp_path, [*memory(3000, lazy=True), *plain(2)])
    places = Places(served.index)
    numbers = set()
    for run in served.runs:
        for n in range(run.count if run.lazy else 0):
            numbers.add(places.find(run.dst_id >> 8, run.vaddr + n * PAGE)[0])
    assert len(numbers) == places.pages
    for row, frame in enumerate(served.index.frames):
        first = int(frame["first_page"])
        assert places.left[row] == len(numbers & set(range(first, first + int(frame["pages"]))))
        assert places.frame(first) == (row, int(frame["pages"]))


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    served = Served(tmp_path, plain(1))
    before = len(os.listdir("/proc/self/fd"))
    with served.running() as peer:
        served.store.open.set()
        peer.ask(START)
        peer.answer()
        peer.end()
    assert len(os.listdir("/proc/self/fd")) == before
