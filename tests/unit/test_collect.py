"""The page server's receiving side, on a real socket pair: what arrives, what is refused, and that every chunk is given back."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hibernode.errors import Corrupt
from hibernode.flow import Channel, Stopped, Threads
from hibernode.model import FRAME_PAGES, PAGE, Cancel
from hibernode.transfer import pageproto
from hibernode.transfer.arena import Arena, Chunk, Share
from hibernode.transfer.collect import SOCKET_BUFFER, Collector, page_sockets
from hibernode.transfer.filling import Held
from hibernode.transfer.pageproto import PRESENT, Header, Wire
from tests.fakes.criu import FakeCriu
from tests.fakes.machine import Machine, memory
from tests.fakes.script import Script

pytestmark = pytest.mark.timeout(20)

ARENA = Arena(32 << 20)
WIRE = Wire(40201)
TASK_1, TASK_2, SHARED = 1 << 8 | pageproto.TASK, 2 << 8 | pageproto.TASK, 9 << 8 | pageproto.SHMEM


@pytest.fixture(autouse=True)
def _every_chunk_is_given_back() -> Iterator[None]:
    yield
    assert ARENA.used_bytes == 0


def header(command: int, flags: int = 0, pages: int = 0, vaddr: int = 0, dst_id: int = 0) -> bytes:
    return WIRE.encode(Header(command, flags, pages, vaddr, dst_id))


CLOSE = header(pageproto.CLOSE)


class Dump:
    """One collector at work. `send` plays CRIU; `end` waits for it and keeps what came."""

    def __init__(self, threads: Threads, share: Share) -> None:
        ours, self.criu = page_sockets()
        self.threads, self.share, self.held = threads, share, Held(share)
        self.chunks: Channel[Chunk] = threads.channel(100)
        self.collector = Collector(ours, WIRE, self.chunks, threads, self.held)
        self.thread = threads.start("collect", self.collector.run)

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.criu.sendall(piece)

    def answer(self, size: int) -> bytes:
        return self.criu.recv(size, socket.MSG_WAITALL)

    def end(self) -> list[tuple[int, bytes]]:
        """(first page, content) of every chunk, all given back."""
        self.thread.join()
        self.held.release()
        found = []
        for chunk in self.chunks.drain():
            found.append((chunk.first_page, bytes(chunk.data)))
            self.share.give_back(chunk)
        return found

    def segments(self) -> list[tuple[int, ...]]:
        return [tuple(int(value) for value in row) for row in self.collector.table.tolist()]


def with_dump(work: Callable[[Dump], None]) -> Dump:
    """Run `work` with a dump; whatever happens, its sockets are closed and what was held back is given back."""
    with ARENA.share(ARENA.total_bytes, Cancel()) as share, Threads(Cancel()) as threads:
        dump = Dump(threads, share)
        try:
            work(dump)
        finally:
            dump.criu.close()
            dump.thread.join()
            dump.held.discard()
            for chunk in dump.chunks.drain():
                share.give_back(chunk)
    return dump


def test_the_page_socket_holds_as_much_whatever_the_machine_allows() -> None:
    """Both ends: what it holds is CRIU's lead over the collector, and as machines come they allow 416 KiB."""
    probe, other = socket.socketpair()
    with probe, other:
        try:
            probe.setsockopt(socket.SOL_SOCKET, 32, SOCKET_BUFFER // 2)
        except PermissionError:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER // 2)
        wanted = probe.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    for end in page_sockets():
        with end:
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == wanted


def test_segments_of_several_address_spaces_in_the_order_they_came() -> None:
    content = random.Random(3).randbytes(6 * PAGE)

    def criu(dump: Dump) -> None:
        dump.send(header(pageproto.PARENT, dst_id=TASK_1))
        assert dump.answer(4) == pageproto.NO_PARENT
        dump.send(header(pageproto.OPEN2, dst_id=TASK_1))
        assert dump.answer(1) == pageproto.NO_PARENT_IMAGE
        dump.send(header(pageproto.ADD_F, PRESENT, 2, 0x1000, TASK_1), content[: 2 * PAGE])
        dump.send(header(pageproto.ADD_F, 0, 70, 0x900000, TASK_1))
        dump.send(header(pageproto.OPEN2, dst_id=SHARED))
        assert dump.answer(1) == pageproto.NO_PARENT_IMAGE
        dump.send(header(pageproto.ADD_F, PRESENT | pageproto.LAZY, 3, 0, SHARED), content[2 * PAGE : 5 * PAGE])
        dump.send(
            header(pageproto.OPEN2, dst_id=TASK_2),
            header(pageproto.ADD_F, PRESENT, 1, 0x2000, TASK_2),
            content[5 * PAGE :],
            CLOSE,
        )
        assert dump.answer(1) == pageproto.NO_PARENT_IMAGE
        assert dump.answer(4) == pageproto.CLOSED
        assert dump.end() == [(0, content)]
        assert dump.criu.recv(1) == b"", "our end is closed"

    dump = with_dump(criu)
    assert dump.collector.closed
    assert dump.collector.pages == 6
    assert dump.segments() == [
        (TASK_1, 0x1000, 2, PRESENT),
        (TASK_1, 0x900000, 70, 0),
        (SHARED, 0, 3, PRESENT | pageproto.LAZY),
        (TASK_2, 0x2000, 1, PRESENT),
    ]


def test_a_space_that_was_opened_and_got_nothing_is_kept() -> None:
    """Shared memory that nobody has touched: CRIU sends none of it, and wants its pagemap when it restores."""

    def criu(dump: Dump) -> None:
        dump.send(
            *(header(pageproto.OPEN2, dst_id=dst) for dst in (SHARED, TASK_1)),
            header(pageproto.ADD_F, 0, 1, 0x1000, TASK_1),
            *(header(pageproto.OPEN2, dst_id=dst) for dst in (TASK_2, SHARED + 256)),
            CLOSE,
        )
        assert dump.answer(4 + 4) == 4 * pageproto.NO_PARENT_IMAGE + pageproto.CLOSED
        assert dump.end() == []

    assert with_dump(criu).segments() == [(SHARED, 0, 0, 0), (TASK_1, 0x1000, 1, 0), (TASK_2, 0, 0, 0), (SHARED + 256, 0, 0, 0)]


@pytest.mark.parametrize("sizes", [[1024], [1023, 1], [1023, 2], [1, 1024, 1], [2049], [1024, 1024], [500] * 5, [1] * 3, []])
def test_chunks_end_where_a_frame_is_full(sizes: list[int]) -> None:
    content = random.Random(4).randbytes(sum(sizes) * PAGE)

    def criu(dump: Dump) -> None:
        at = 0
        for size in sizes:
            dump.send(header(pageproto.ADD_F, PRESENT, size, 0x1000, TASK_1), content[at : at + size * PAGE])
            at += size * PAGE
        dump.send(CLOSE)
        assert dump.answer(4) == pageproto.CLOSED
        chunks = dump.end()
        assert b"".join(data for _, data in chunks) == content
        assert [first for first, _ in chunks] == list(range(0, sum(sizes), FRAME_PAGES))
        assert all(len(data) == FRAME_PAGES * PAGE for _, data in chunks[:-1])

    assert with_dump(criu).collector.closed


def test_bytes_may_come_one_by_one() -> None:
    def criu(dump: Dump) -> None:
        for byte in header(pageproto.ADD_F, PRESENT, 1, 0x1000, TASK_1) + b"x" * 10:
            dump.send(bytes([byte]))
        dump.send(b"x" * (PAGE - 10), CLOSE)
        assert dump.end() == [(0, b"x" * PAGE)]

    assert with_dump(criu).collector.closed


def test_nothing_is_handed_on_while_the_workload_is_frozen() -> None:
    """Unless the arena runs low."""

    def criu(dump: Dump) -> None:
        dump.send(header(pageproto.ADD_F, PRESENT, 3000, 0x1000, TASK_1), bytes(3000 * PAGE), CLOSE)
        assert dump.answer(4) == pageproto.CLOSED
        dump.thread.join()
        assert len(dump.chunks) == 0
        assert len(dump.end()) == 3

    with_dump(criu)


def test_a_stop_while_chunks_are_handed_on_loses_none() -> None:
    """The one that did not fit in anywhere any more is given back like the others: an arena that empties chunk by chunk would one
    day hold a workload for ever. (The fixture counts them.)"""

    def work(dump: Dump) -> None:
        dump.send(header(pageproto.OPEN2, dst_id=TASK_1))
        dump.answer(1)
        pages = 3 * FRAME_PAGES
        threading.Thread(
            target=dump.send, args=(header(pageproto.ADD_F, PRESENT, pages, 0x1000), bytes(pages * PAGE), CLOSE)
        ).start()
        dump.answer(4)
        dump.thread.join()
        assert ARENA.used_bytes == 3 * FRAME_PAGES * PAGE
        dump.threads.fail(Corrupt("somebody else failed"))
        with pytest.raises(Stopped):
            dump.held.release()

    with pytest.raises(Corrupt, match="somebody else"):
        with_dump(work)


def test_an_image_larger_than_the_arena_waits_for_those_who_take() -> None:
    pages = 2 * ARENA.total_bytes // PAGE
    taken = []

    def criu(dump: Dump) -> None:
        def take() -> None:
            for chunk in dump.chunks:
                taken.append(chunk.first_page)
                dump.share.give_back(chunk)

        taking = dump.threads.start("take", take)
        dump.send(header(pageproto.ADD_F, PRESENT, pages, 0x1000, TASK_1))
        for _ in range(pages // FRAME_PAGES):
            dump.send(bytes(FRAME_PAGES * PAGE))
        dump.send(CLOSE)
        assert dump.answer(4) == pageproto.CLOSED
        dump.thread.join()
        dump.held.release()
        dump.chunks.close()
        taking.join()

    with_dump(criu)
    assert taken == list(range(0, pages, FRAME_PAGES))


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [header(pageproto.OPEN2, dst_id=TASK_1)],
        [CLOSE[:5]],
        [header(pageproto.ADD_F, PRESENT, 2, 0x1000, TASK_1), bytes(2 * PAGE)],
        [header(pageproto.ADD_F, PRESENT, 2, 0x1000, TASK_1), bytes(2 * PAGE), CLOSE[:-1]],
        [header(pageproto.ADD_F, PRESENT, 2, 0x1000, TASK_1)],
        [header(pageproto.ADD_F, PRESENT, 2, 0x1000, TASK_1), bytes(2 * PAGE - 1)],
        [header(pageproto.ADD_F, PRESENT, 2000, 0x1000, TASK_1), bytes(1500 * PAGE)],
    ],
    ids=["nothing", "opened", "part of a header", "pages", "almost closed", "no page", "part of a page", "part of a segment"],
)
def test_a_socket_that_ends_early_is_not_closed(pieces: list[bytes]) -> None:
    """Whoever drives CRIU knows why; that it was not all is what counts."""

    def criu(dump: Dump) -> None:
        dump.send(*pieces)
        dump.criu.close()
        dump.thread.join()

    assert not with_dump(criu).collector.closed


@pytest.mark.parametrize(
    "bad",
    [
        header(0x77),
        header(0),
        header(pageproto.GET),
        header(pageproto.ADD_F, PRESENT, 0, 0x1000, TASK_1),
        header(pageproto.ADD_F, PRESENT, 1, 0x1001, TASK_1),
        header(pageproto.ADD_F, PRESENT, 1 << 40, 0x1000, TASK_1),
        header(pageproto.ADD_F, 0, (1 << 64) - 1, 0x1000, TASK_1),
        b"\xff" * WIRE.size,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
@pytest.mark.parametrize("after", [0, 5])
def test_garbage_is_corrupt_and_closes_the_socket(bad: bytes, after: int) -> None:
    """An open socket would make CRIU wait with the tree held."""

    def criu(dump: Dump) -> None:
        if after:
            dump.send(header(pageproto.ADD_F, PRESENT, after, 0x1000, TASK_1), bytes(after * PAGE))
        dump.send(bad)
        assert dump.criu.recv(1) == b""

    with pytest.raises(Corrupt, match="page socket"):
        with_dump(criu)


def test_the_headers_of_an_older_criu_are_not_taken_for_ours() -> None:
    """What a wrong choice of `Wire` looks like: garbage, and never a dump that is said to be complete."""
    old = Wire(40100)

    def criu(dump: Dump) -> None:
        dump.send(old.encode(Header(pageproto.ADD_F, PRESENT, 3, 0x1000, TASK_1)), bytes(range(256)) * 16 * 3)
        dump.send(old.encode(Header(pageproto.CLOSE, 0, 0, 0, 0)))
        dump.criu.close()
        dump.thread.join()
        assert not dump.collector.closed

    with pytest.raises(Corrupt):
        with_dump(criu)


@pytest.mark.parametrize("where", ["before a header", "inside a segment", "waiting for the arena"])
def test_a_stop_ends_a_receive_wherever_it_is(where: str) -> None:
    def criu(dump: Dump) -> None:
        others = []
        if where == "waiting for the arena":
            others = [dump.share.take(dump.threads, lambda: None) for _ in range(8)]
        if where != "before a header":
            dump.send(header(pageproto.ADD_F, PRESENT, 2000, 0x1000, TASK_1))
        if where == "inside a segment":
            dump.send(bytes(1500 * PAGE))
        try:
            threading.Thread(target=dump.threads.fail, args=(Corrupt("somebody failed"),)).start()
            dump.thread.join(10)
            assert not dump.thread.is_alive()
            assert dump.criu.recv(1) == b""
        finally:
            for chunk in others:
                dump.share.give_back(chunk)

    with pytest.raises(Corrupt, match="somebody failed"):
        with_dump(criu)


def test_a_whole_dump_of_the_fake(tmp_path: Path) -> None:
    """The fake that the flow tests stand on sends what it says."""
    runs = memory(5000)

    def criu(dump: Dump) -> None:
        fake = FakeCriu(Machine(runs), Script())
        images = tmp_path
        stats = fake._dump(images, dump.criu)
        assert stats == 5000
        chunks = dump.end()
        assert b"".join(data for _, data in chunks) == b"".join(run.content or b"" for run in runs)

    dump = with_dump(criu)
    assert dump.collector.pages == 5000
    assert dump.segments() == [(run.dst_id, run.vaddr, run.count, run.flags) for run in runs]
