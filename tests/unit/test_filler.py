"""The filler against the kernel's own userfaultfd: a program changes its memory in every way while it is filled, and each page is right.

No CRIU: `shifting.c` opens its userfaultfd itself, and hands it over as CRIU does. The test is the daemon: it brings rows, those that
somebody waits for first. What is checked is checked by the program, which knows of each of its pages what it has to be.

What is rare is made one by one with `puppet.py`, which does what it is told; there the test brings a row when it likes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest

from hibernode import filler
from hibernode.filler import Filler, Lost, Space
from hibernode.missing import Extent, Missing
from tests import puppet
from tests.keeper import wait_until

pytestmark = pytest.mark.timeout(120)

LIMIT = 60.0  # seconds
BASE = 0x200000000 // filler.PAGE  # page of its first one, in shifting.c
SOURCE = Path(__file__).with_name("shifting.c")


@pytest.fixture(scope="session")
def shifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("shifting") / "shifting"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, SOURCE], check=True)
    return program


class Rows:
    """All the memory of a program, in rows of 1,024 pages: page n holds n + 1 in each of its words, every seventh is zeros."""

    def __init__(self, pages: int) -> None:
        self.pages, self.count = pages, -(-pages // filler.FRAME_PAGES)

    def table(self, pid: int, path: Path) -> Path:
        columns = array("Q")
        for row in range(self.count):
            first = row * filler.FRAME_PAGES
            columns.extend((pid, BASE + first, min(filler.FRAME_PAGES, self.pages - first), row, 0))
        path.write_bytes(columns.tobytes())
        return path

    def fill(self, row: int, pages: np.ndarray, bits: np.ndarray) -> None:
        numbers = np.arange(row * filler.FRAME_PAGES, (row + 1) * filler.FRAME_PAGES)
        pages[:] = (numbers + 1)[:, None].astype(np.uint64)
        bits[:] = np.packbits(numbers % 7 != 0, bitorder="little")


class Daemon:
    """The daemon's side: so many slots, and rows in an order of chance; who is waited for comes first. `gap`: seconds before each."""

    def __init__(self, rows: Rows, slots: int, seed: int, gap: float) -> None:
        self.rows, self._gap = rows, gap
        self.memory = os.memfd_create("rows")
        os.ftruncate(self.memory, slots * (filler.SLOT + filler.KEPT))
        whole = np.memmap(f"/proc/self/fd/{self.memory}", np.uint8, "r+")
        self._pages = whole[: slots * filler.SLOT].view(np.uint64).reshape(slots, filler.FRAME_PAGES, -1)
        self._bits = whole[slots * filler.SLOT :].reshape(slots, filler.KEPT)
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._left = list(range(rows.count))
        random.Random(seed).shuffle(self._left)
        self._free = list(range(slots))
        self._wanted: list[int] = []
        self.brought: list[int] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while not self.stopped.is_set():
                next_ = next((row for row in self._wanted if row in self._left), None)
                if next_ is not None and self._free:
                    self._bring(next_)
                elif self._left and len(self._free) > len(self._pages) // 2 and not select.select([self.ours], [], [], 0)[0]:
                    time.sleep(self._gap)
                    self._bring(self._left[0])
                elif data := self.ours.recv(filler.TURN.size):
                    self._hear(*filler.TURN.unpack(data))
                else:
                    return

    def _hear(self, row: int, slot: int) -> None:
        if slot == filler.WANTED:
            self._wanted.append(row)
            return
        self._free.append(filler.BACK - slot if slot <= filler.BACK else slot)
        self._left += [row] if slot <= filler.BACK else []

    def _bring(self, row: int) -> None:
        self._left.remove(row)
        self._wanted = [each for each in self._wanted if each != row]
        slot = self._free.pop()
        self.rows.fill(row, self._pages[slot], self._bits[slot])
        self.brought.append(row)
        self.ours.send(filler.TURN.pack(row, slot))


class Run:
    """One program, its filler and its daemon."""

    def __init__(self, directory: Path, program: Path, threads: int, pieces: int, size: int, rounds: int, does: str,
                 *, seed: int = 1, slots: int = 8, gap: float = 0.0) -> None:  # fmt: skip
        self.daemon = Daemon(Rows(threads * pieces * size), slots, seed, gap)
        self._socket = directory / filler.SOCKET
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self._socket))
        self._listening.listen()
        numbers = map(str, (threads, pieces, size, rounds, seed))
        self.program = subprocess.Popen(
            [program, self._socket, *numbers, does], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.spaces: dict[int, filler.Space] = {}
        self.filler = Filler(self._listening, self.daemon.theirs, self.daemon.memory, self.spaces)
        self.error: BaseException | None = None
        table = self.daemon.rows.table(self.program.pid, directory / "table")
        self._threads = [threading.Thread(target=self._fill, args=(table,)), threading.Thread(target=self.daemon.run)]
        for thread in self._threads:
            thread.start()

    def _fill(self, table: Path) -> None:
        try:
            self.filler.run(str(table))
        except BaseException as e:
            self.error = e
            self.kill()
        finally:
            self.filler.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.program.pid, signal.SIGKILL)

    def end(self) -> list[str]:
        """What the program says; and nothing is left of the filler."""
        said, _ = self.program.communicate(timeout=LIMIT)
        self._threads[0].join(LIMIT)
        assert not self._threads[0].is_alive()
        self.daemon.theirs.close()
        self._threads[1].join(LIMIT)
        if self.error is not None:
            raise self.error
        return said.split()

    def close(self) -> None:
        self.kill()
        self.program.wait()
        self.daemon.stopped.set()
        for each in (self.daemon.theirs, self.daemon.ours, self._listening):
            each.close()
        for thread in self._threads:
            thread.join(LIMIT)
        for uffd in self.spaces:
            os.close(uffd)
        if self.program.stdout is not None:
            self.program.stdout.close()
        os.close(self.daemon.memory)


@contextlib.contextmanager
def running(*arguments: object, **settings: object) -> Iterator[Run]:
    run = Run(*arguments, **settings)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        run.close()


# Each of what a program may do, alone and with others; by one thread and by several.
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("does", ["w", "ew", "mw", "uw", "pw", "fw", "nw", "emuwp", "emuwpl"])
def test_every_page_is_right_whatever_the_program_does(tmp_path: Path, shifting: Path, does: str, threads: int) -> None:
    with running(tmp_path, shifting, threads, 64, 64, 400, does, gap=0.002) as run:
        said, checks, _ = run.end()
    assert said == "good"
    assert int(checks) >= threads * 400 * ("u" not in does)
    assert not run.spaces


@pytest.mark.parametrize(("threads", "does"), [*itertools.product((1, 4), ("emuwpf", "emuwpn", "emuwpfl", "emuwprf")), (1, "wx")])
def test_no_page_is_wrong_where_it_is_not_known_what_has_happened(
    tmp_path: Path, shifting: Path, does: str, threads: int
) -> None:
    """A fork beside another thread that changes something; a mapping that is unmapped and grows again; one that is said to be unmapped, and
    is not. It is filled as it should be, or given up. Of one thread, that does nothing of this, it is known."""
    given_up = 0
    for seed in range(3):
        (directory := tmp_path / str(seed)).mkdir()
        with running(directory, shifting, threads, 64, 64, 200, does, gap=0.002, seed=seed) as run:
            try:
                assert run.end()[0] == "good"
            except Lost:
                given_up += 1
    assert not given_up or threads > 1 or set(does) & set("rx")


# --- one by one -----------------------------------------------------------------------------------------------------------------


class Scene:
    """A filler, the test in the daemon's place, and a puppet of so many pages: of each row that many, page n holds n + 1."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack, *, rows: int, each: int, pages: int, slots: int = 4,
                 of_others: Collection[int] = ()) -> None:  # fmt: skip
        """`pages`: of the puppet; the table says of rows * each that they are missing, those `of_others` in a process that never comes."""
        self.each, self.slots = each, slots
        memory = os.memfd_create("rows")
        stack.callback(os.close, memory)
        os.ftruncate(memory, slots * (filler.SLOT + filler.KEPT))
        whole = np.memmap(f"/proc/self/fd/{memory}", np.uint8, "r+")
        self._pages = whole[: slots * filler.SLOT].view(np.uint64).reshape(slots, filler.FRAME_PAGES, -1)
        self._bits = whole[slots * filler.SLOT :].reshape(slots, filler.KEPT)
        self.daemon, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.daemon.settimeout(LIMIT)
        listening = socket.socket(socket.AF_UNIX)
        for each_socket in (self.daemon, theirs, listening):
            stack.callback(each_socket.close)
        listening.bind(str(directory / filler.SOCKET))
        listening.listen()
        self.puppet = subprocess.Popen(
            [sys.executable, "-S", puppet.__file__, directory / filler.SOCKET, str(pages)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        stack.callback(self._end_puppet)
        table = array("Q")
        for row in range(rows):
            pid = os.getpid() if row in of_others else self.puppet.pid
            table.extend((pid, BASE + row * each, each, row, 0))
        (directory / "table").write_bytes(table.tobytes())
        self.spaces: dict[int, Space] = {}
        stack.callback(lambda: [os.close(uffd) for uffd in self.spaces])
        self.filler = Filler(listening, theirs, memory, self.spaces)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, args=(directory / "table",))
        self._thread.start()
        stack.callback(self._thread.join, LIMIT)
        stack.callback(theirs.shutdown, socket.SHUT_RDWR)

    def _fill(self, table: Path) -> None:
        try:
            self.filler.run(str(table))
        except BaseException as e:
            self.error = e
        finally:
            self.filler.close()

    def _end_puppet(self) -> None:
        self.puppet.kill()
        self.puppet.communicate()

    def tells(self, *words: object) -> None:
        assert self.puppet.stdin is not None
        self.puppet.stdin.write(" ".join(map(str, words)) + "\n")

    def hears(self) -> str:
        """What the puppet says next."""
        assert self.puppet.stdout is not None
        assert select.select([self.puppet.stdout], [], [], LIMIT)[0], "it still waits"
        return self.puppet.stdout.readline().strip()

    def is_asked(self) -> tuple[int, int]:
        row, slot = filler.TURN.unpack(self.daemon.recv(64))
        return row, slot

    def brings(self, row: int, slot: int) -> None:
        self._pages[slot, : self.each] = (np.arange(row * self.each, (row + 1) * self.each, dtype=np.uint64) + 1)[:, None]
        self._bits[slot] = 0xFF
        self.daemon.send(filler.TURN.pack(row, slot))

    def ends(self) -> BaseException | None:
        """With what the filler has ended."""
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        return self.error

    def space(self) -> Space:
        """The puppet's, when the filler has it, and waits."""
        wait_until(lambda: self.spaces, LIMIT, "a userfaultfd")
        return next(iter(self.spaces.values()))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as found:
        yield found


def test_more_may_wait_than_there_is_room_for_while_criu_restores(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    """Nothing is given out in the background yet: what nobody waits for any more goes back, and comes again."""
    scene = Scene(tmp_path, stack, rows=10, each=4, pages=40)
    for row in range(10):
        scene.tells("touch", row * 4 + 1)
        assert scene.is_asked() == (row, filler.WANTED)
    there, free, back = [], list(range(scene.slots)), []
    for row in range(10):
        there.append((row, free.pop()))
        scene.brings(*there[-1])
        assert scene.hears() == f"{row * 4 + 1} {row * 4 + 2}"
        if len(there) == scene.slots:  # one is always free
            oldest, slot = there.pop(0)
            assert scene.is_asked() == (oldest, filler.BACK - slot)
            free.append(slot)
            back.append(oldest)
    assert back == list(range(11 - scene.slots))
    scene.tells("finished")
    for row, slot in there:
        assert scene.is_asked() == (row, slot)
        free.append(slot)
    for row in back:
        scene.brings(row, free[0])
        assert scene.is_asked() == (row, free[0])
    assert scene.ends() is None
    assert not scene.spaces
    for page in range(40):
        scene.tells("touch", page)
        assert scene.hears() == f"{page} {page + 1}"


def test_who_waits_again_for_what_went_back_has_it_asked_for_again(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=3, each=64, pages=3 * 64, slots=2)
    for row, slot in ((0, 0), (1, 1)):
        scene.tells("touch", row * 64)
        assert scene.is_asked() == (row, filler.WANTED)
        scene.brings(row, slot)
        assert scene.hears() == f"{row * 64} {row * 64 + 1}"
    assert scene.is_asked() == (0, filler.BACK - 0)
    scene.tells("touch", 40)  # further than what came with page 0
    assert scene.is_asked() == (0, filler.WANTED)
    scene.brings(0, 0)
    assert scene.hears() == "40 41"


@pytest.mark.parametrize("there", [0, 1, 5, 7, 8])
def test_pages_that_are_nobodys_are_left_out(tmp_path: Path, stack: contextlib.ExitStack, there: int) -> None:
    """Eight come, and the kernel knows of the first so many: it says twice that the others have no place (ENOENT)."""
    scene = Scene(tmp_path, stack, rows=1, each=8, pages=64)
    scene.tells("finished")
    wait_until(lambda: scene.filler._restored, LIMIT, "the end of CRIU")
    scene.space().missing.move(BASE, BASE + 64 - there, 8)  # the others behind all that it has
    scene.brings(0, 2)
    assert scene.is_asked() == (0, 2)
    assert scene.ends() is None
    for page in range(there):
        scene.tells("touch", 64 - there + page)
        assert scene.hears() == f"{64 - there + page} {page + 1}"


def test_what_criu_has_not_made_ends_it(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=1, each=8, pages=4)
    scene.tells("finished")
    error = scene.ends()
    assert isinstance(error, Lost)
    assert "has not made" in str(error)


@pytest.mark.parametrize("lacks", [(), (0,)], ids=["alone", "beside one that came"])
def test_a_process_that_was_to_be_filled_and_never_came_ends_it(
    tmp_path: Path, stack: contextlib.ExitStack, lacks: tuple[int, ...]
) -> None:
    """Else its pages would be zeros that nobody asked for. Whether the one that came lacks something makes no difference."""
    scene = Scene(tmp_path, stack, rows=2, each=8, pages=16, of_others={0, 1} - set(lacks))
    scene.tells("finished")
    error = scene.ends()
    assert isinstance(error, Lost)
    assert "has not made" in str(error)


def test_nobody_came_though_somebody_was_to_be_filled(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        rows = Rows(8)
        daemon = Daemon(rows, slots=2, seed=1, gap=0.0)
        listening, criu = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        for each in (listening, criu, daemon.ours, daemon.theirs):
            stack.callback(each.close)
        stack.callback(os.close, daemon.memory)
        listening.bind(str(tmp_path / filler.SOCKET))
        listening.listen()
        criu.connect(str(tmp_path / filler.SOCKET))
        criu.sendall(struct.pack("=i", filler.FINISHED))
        one = stack.enter_context(contextlib.closing(Filler(listening, daemon.theirs, daemon.memory, {})))
        with pytest.raises(Lost, match="has not made"):
            one.run(str(rows.table(os.getpid(), tmp_path / "table")))


def test_what_is_emptied_moved_and_unmapped_is_followed(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=2, each=16, pages=64)
    scene.tells("finished")
    for command in ("empty 4 4", "move 8 40 4", "unmap 12 2", "move 14 12 2"):
        scene.tells(command)
        assert scene.hears() == "done"
    scene.brings(0, 0)
    scene.brings(1, 1)
    assert {scene.is_asked(), scene.is_asked()} == {(0, 0), (1, 1)}
    assert scene.ends() is None
    wanted = {page: page + 1 for page in (0, 3, *range(16, 32))} | {4: 0, 7: 0, 40: 9, 43: 12, 12: 15, 13: 16, 44: 0}
    for page, word in wanted.items():
        scene.tells("touch", page)
        assert scene.hears() == f"{page} {word}"


def test_a_child_has_pages_of_its_own_to_wait_for(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=2, each=16, pages=32)
    scene.tells("finished")
    scene.space()
    scene.tells("fork", 20)
    assert scene.is_asked() == (1, filler.WANTED)
    scene.tells("empty", 16, 16)  # by the parent alone
    assert scene.hears() == "done"
    scene.brings(1, 0)
    assert scene.hears() == "20 21"
    scene.tells("touch", 20)
    assert scene.hears() == "20 0"


# --- what ends it ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "agrees"),
    [
        ([(0, 4, True)], True),
        ([(0, 4, False)], False),
        ([(64, 80, False)], True),
        ([(64, 80, True)], False),
        ([(60, 70, True)], False),
        ([(0, 4, True), (0, 4, False)], False),
        ([(0, 4, False), (0, 4, True)], True),
        ([(64, 70, True), (64, 70, False)], True),
    ],
)
def test_what_was_told_is_compared_with_what_the_kernel_has(
    tmp_path: Path, stack: contextlib.ExitStack, told: list[tuple[int, int, bool]], agrees: bool
) -> None:
    """Of a puppet of 64 pages. What was only unmapped may be mapped again since, which nobody tells: it is not looked at, but where
    something was missing, or of a child."""
    space = Scene(tmp_path, stack, rows=1, each=1, pages=64).space()
    only_unmapped = not any(mapped for _, _, mapped in told)
    for sure in (False, True):
        made = [filler._Told(BASE + start, BASE + end, mapped, sure) for start, end, mapped in told]
        assert space.has(filler._expected(made)) == (agrees or (only_unmapped and not sure))


@pytest.mark.parametrize("page", [10, 70])
def test_what_a_child_lacks_where_its_parent_has_changed_something_since_is_in_a_mapping(
    tmp_path: Path, stack: contextlib.ExitStack, page: int
) -> None:
    parent = Scene(tmp_path, stack, rows=1, each=1, pages=64).space()
    child = Space(parent.uffd, Missing())
    child.missing.add(Extent(BASE + page, 2, 0, 0))
    group = filler._Group(parent)
    group.add(child)
    assert [space.has(expected) for space, expected in group.expected()] == [True, True], "nothing has changed"
    group.told.append(filler._Told(BASE + 8, BASE + 100, mapped=False))
    assert [space.has(expected) for space, expected in group.expected()] == [True, page < 64]
    assert parent.held
    assert child.held
    group.close()
    assert not parent.held
    assert not child.held


def test_changes_that_were_not_told_as_they_are_end_it(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=1, each=16, pages=64)
    scene.tells("finished")
    group = filler._Group(scene.space())
    group.told += [filler._Told(BASE + 8, BASE + 12, mapped=True), filler._Told(BASE + 8, BASE + 12, mapped=False)]
    scene.filler._groups[group] = None
    scene.tells("unmap", 60, 1)
    assert scene.hears() == "done"
    error = scene.ends()
    assert isinstance(error, Lost)
    assert "has changed its mappings" in str(error)
    assert scene.spaces, "who ends it holds them until nobody lacks a page"


def test_a_fork_that_may_have_been_before_its_parent_emptied_something_ends_it(
    tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    scene = Scene(tmp_path, stack, rows=1, each=16, pages=64)
    group = filler._Group(scene.space())
    group.emptied = True
    with pytest.raises(Lost, match="may not be"):
        scene.filler._fork(group, -1)


def test_a_kind_of_event_that_nobody_knows_ends_it(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=1, each=16, pages=64)
    reading, writing = os.pipe2(os.O_NONBLOCK)
    stack.callback(os.close, writing)
    os.write(writing, filler._MESSAGE.pack(0x17, 0, 0, 0))
    scene.space()
    scene.filler._add(Space(reading, Missing()))
    error = scene.ends()
    assert isinstance(error, Lost)
    assert "0x17" in str(error)


@pytest.mark.parametrize("finished", [True, False])
def test_a_daemon_that_goes_ends_it(tmp_path: Path, stack: contextlib.ExitStack, finished: bool) -> None:
    scene = Scene(tmp_path, stack, rows=1, each=16, pages=64)
    scene.space()
    if finished:
        scene.tells("finished")
        scene.tells("touch", 20)
        assert scene.hears() == "20 0", "what is not missing holds zeros"
    scene.daemon.close()
    error = scene.ends()
    assert isinstance(error, Lost)
    assert "daemon has gone" in str(error)
    assert scene.spaces


def test_a_criu_that_goes_before_all_is_made_ends_it(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=1, each=16, pages=64)
    scene.space()
    scene.puppet.kill()
    error = scene.ends()
    assert isinstance(error, Lost)
    assert "CRIU has ended" in str(error)


def test_a_process_that_ends_lacks_nothing(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    scene = Scene(tmp_path, stack, rows=2, each=16, pages=64)
    scene.tells("finished")
    wait_until(lambda: scene.filler._restored, LIMIT, "that it is heard")
    scene.puppet.kill()
    scene.puppet.wait(LIMIT)
    scene.brings(0, 0)
    assert scene.is_asked() == (0, 0)
    assert scene.ends() is None
    assert not scene.spaces


def test_a_page_that_is_not_taken_now_is_no_end_though_nothing_was_to_be_given_for_long(
    tmp_path: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not answer for minutes, and then a change that the kernel is not done with when it is looked at."""
    looks = iter([True] * 20)
    monkeypatch.setattr(filler, "_STARVED", 0.5)
    monkeypatch.setattr(Space, "changing", lambda _: next(looks, False))
    scene = Scene(tmp_path, stack, rows=1, each=16, pages=64)
    scene.tells("finished")
    scene.space()
    time.sleep(1.0)
    scene.tells("unmap", 60, 1)
    assert scene.hears() == "done"
    wait_until(lambda: next(looks, False) is False or scene.error, LIMIT, "that it has looked again and again")
    assert scene.error is None
    scene.brings(0, 0)
    assert scene.is_asked() == (0, 0)
    assert scene.ends() is None


def test_a_tree_that_takes_no_page_for_long_is_lost(
    tmp_path: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filler, "_STARVED", 0.2)
    monkeypatch.setattr(Space, "changing", lambda _: True)
    scene = Scene(tmp_path, stack, rows=1, each=16, pages=64)
    scene.tells("finished")
    scene.space()
    scene.tells("unmap", 60, 1)
    assert scene.hears() == "done"
    error = scene.ends()
    assert isinstance(error, Lost)
    assert "memory" in str(error)
