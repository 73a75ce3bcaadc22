"""The keeper of a lazy restore and its filler: in place of a userfaultfd the end of a pipe, in place of a cgroup a file with pids.
What the pipe tells is what the kernel would do with a userfaultfd: its end comes when the only writer closes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hibernode import filler
from hibernode import keeper as program
from tests import keeper, puppet
from tests.keeper import Kept, wait_until

pytestmark = pytest.mark.timeout(60)

LIMIT = 20.0  # seconds
PYTHON = [sys.executable, "-P", "-s", "-S"]  # as drivers/criu.py starts it
ENVIRONMENT = {"PYTHONPATH": str(Path(program.__file__).parents[1])}
PID, ROW, SLOTS = 77, 3, 2  # of the process that the test hands over, which nobody is; the row of its one page; slots
SLEEPS = [sys.executable, "-S", "-E", "-c", "import signal; signal.pause()"]
FORKS = [
    sys.executable,
    "-S",
    "-E",
    "-c",
    "import os, signal; child = os.fork(); child and print(child, flush=True); signal.pause()",
]


class Ward:
    """A keeper, what it keeps, and the test in the daemon's place, and in CRIU's."""

    def __init__(self, directory: Path, stack: ExitStack, descriptors: int = 0) -> None:
        """`descriptors`: as many as it may have, and the filler."""
        self.directory, self._stack = directory, stack
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pages, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (self.control, self.pages):
            stack.callback(each.close)
            each.settimeout(LIMIT)
        self.memory = os.memfd_create("pages")
        stack.callback(os.close, self.memory)
        os.ftruncate(self.memory, SLOTS * (filler.SLOT + filler.KEPT))  # no bit is set: the page that comes is of zeros
        numbers = theirs.fileno(), served.fileno(), self.memory
        limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors else []
        self.process = subprocess.Popen(
            [*limit, *PYTHON, "-m", program.__name__, *map(str, numbers)], pass_fds=numbers, env=ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        stack.callback(self._end)
        for each in (theirs, served):
            each.close()
        self.tree: list[int] = []

    def _end(self) -> None:
        self.control.close()
        self.process.wait(LIMIT)

    def has(self, argv: Sequence[str]) -> int:
        """One more of the tree."""
        log = self.directory / f"tree {len(self.tree)}"
        kept = Kept(argv, log)
        self._stack.callback(kept.kill)
        self.tree.append(kept.pid)
        return kept.pid

    def said_by_tree(self, number: int) -> str:
        log = self.directory / f"tree {number}"
        wait_until(log.read_text, LIMIT, "what it says")
        return log.read_text().strip()

    def orders(self, **more: object) -> None:
        """What the daemon says first."""
        procs, table = self.directory / "cgroup.procs", self.directory / "table"
        procs.write_text("".join(f"{pid}\n" for pid in self.tree))
        table.write_bytes(array("Q", (PID, 5, 1, ROW, 0)).tobytes())
        order: dict[str, Any] = {"images": str(self.directory), "table": str(table), "procs": [str(procs)], **more}
        self.control.sendall(json.dumps(order).encode())

    def begin(self) -> None:
        """Until the filler holds something of a process that lacks a page: a pipe, of which the test has the other end."""
        self.orders()
        assert self.hears() == {"ready": True}
        (self.filler,) = keeper.descendants(self.process.pid)
        self.criu = socket.socket(socket.AF_UNIX)
        self._stack.callback(self.criu.close)
        self.criu.connect(str(self.directory / filler.SOCKET))
        self.held, writing = os.pipe()
        self._stack.callback(os.close, self.held)
        self.hands_over(PID, writing)
        os.close(writing)

    def hands_over(self, pid: int, descriptor: int) -> None:
        """As CRIU does; returns when the filler has it."""
        there = len(self.of_filler())
        self.criu.sendall(pid.to_bytes(4, sys.byteorder))
        socket.send_fds(self.criu, [b"\0"], [descriptor])
        wait_until(lambda: len(self.of_filler()) > there, LIMIT, "that it is taken")

    def of_filler(self) -> list[str]:
        """Its descriptors; without the socket to CRIU, which it may not have yet."""
        found = []
        for name in os.listdir(f"/proc/{self.filler}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{self.filler}/fd/{name}"))
        return [each for each in found if not each.startswith("socket:")]

    def finishes(self) -> None:
        """CRIU has made all, and the page comes: it holds zeros, so nothing is copied."""
        self.criu.sendall(filler.FINISHED.to_bytes(4, sys.byteorder))
        self.pages.send(filler.TURN.pack(ROW, 0))

    def fails(self) -> None:
        """The page does not hold zeros, and what it is copied through is a pipe."""
        os.pwrite(self.memory, b"\1", SLOTS * filler.SLOT)
        self.finishes()

    def hears(self) -> dict[str, Any]:
        for _ in range(2):
            with contextlib.suppress(ConnectionResetError):
                found: dict[str, Any] = json.loads(self.control.recv(1 << 16) or b"{}")
                return found
        return {}

    def gone(self) -> bool:
        return not any(map(keeper.alive, self.tree))


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    with ExitStack() as stack:
        yield Ward(tmp_path, stack)


def test_all_is_in_and_nobody_is_touched(ward: Ward) -> None:
    ward.has(SLEEPS)
    ward.begin()
    ward.finishes()
    assert filler.TURN.unpack(ward.pages.recv(64)) == (ROW, 0)
    assert ward.hears() == {"in": True}
    assert ward.process.wait(LIMIT) == 0
    assert not ward.gone()


def test_one_that_has_nothing_to_fill_ends_well(ward: Ward) -> None:
    ward.has(SLEEPS)
    ward.begin()
    other, writing = os.pipe()
    ward.hands_over(PID + 1, writing)
    os.close(writing)
    ward.finishes()
    assert ward.hears() == {"in": True}
    assert not os.read(other, 1), "and has let go"
    os.close(other)
    assert not ward.gone()


def kill(ward: Ward) -> None:
    os.kill(ward.filler, signal.SIGKILL)


def kill_twice(ward: Ward) -> None:
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.kill(ward.filler, signal.SIGKILL)


def terminate(ward: Ward) -> None:
    os.kill(ward.filler, signal.SIGTERM)


def close_the_pages(ward: Ward) -> None:
    ward.pages.close()


def end_criu(ward: Ward) -> None:
    ward.criu.close()


def fail(ward: Ward) -> None:
    ward.fails()


def daemon_goes(ward: Ward) -> None:
    ward.control.close()


def daemon_and_filler_go(ward: Ward) -> None:
    ward.control.close()
    kill(ward)


@pytest.mark.parametrize("end", [kill, kill_twice, terminate, close_the_pages, end_criu, fail, daemon_goes, daemon_and_filler_go])
def test_whoever_ends_the_tree_is_dead_before_anything_is_let_go(ward: Ward, end: Callable[[Ward], None]) -> None:
    """As soon as the pipe has no writer any more, nobody of the tree may be there."""
    for _ in range(3):
        ward.has(SLEEPS)
    ward.begin()
    poller = select.poll()
    poller.register(ward.held, select.POLLIN)
    assert not poller.poll(0), "it is held"
    end(ward)
    assert poller.poll(LIMIT * 1000)
    assert ward.gone(), "let go of while somebody could read zeros"
    assert ward.process.wait(LIMIT) == 2
    assert not keeper.alive(ward.filler)


def test_what_is_lost_is_told_when_nobody_is_left(ward: Ward) -> None:
    ward.has(SLEEPS)
    ward.begin()
    ward.fails()
    assert ward.hears() == {"lost": "the filler ended with exit status 1", "killed": ward.tree}
    assert "is not taken" in (ward.directory / program.LOG).read_text()
    assert ward.gone()


def test_one_that_has_no_descriptor_left_still_sees_who_is_there(tmp_path: Path) -> None:
    """The filler has as many userfaultfds as it may: copies of them take all that the keeper has."""
    most = 48
    with ExitStack() as stack:
        ward = Ward(tmp_path, stack, descriptors=most)
        ward.has(SLEEPS)
        ward.begin()
        uffd = program._userfaultfd()
        stack.callback(os.close, uffd)
        for pid in range(most - len(os.listdir(f"/proc/{ward.filler}/fd"))):
            ward.hands_over(1000 + pid, uffd)
        assert len(os.listdir(f"/proc/{ward.filler}/fd")) == most
        kill(ward)
        assert ward.hears()["killed"] == ward.tree
        assert ward.gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_shuts_the_machine_down_does_not_end_it(ward: Ward, number: signal.Signals) -> None:
    ward.has(SLEEPS)
    ward.begin()
    os.kill(ward.process.pid, number)
    ward.finishes()
    assert ward.hears() == {"in": True}
    assert not ward.gone()


@contextlib.contextmanager
def looking(procs: Path) -> Iterator[Callable[[], tuple[list[program.Identity], bool]]]:
    """The look of a keeper that is not run."""
    with socket.socket() as control:
        kept = program.Keeper(control, -1, -1, {"procs": [str(procs)]})
        yield kept._look
        for descriptor in kept._spare:
            os.close(descriptor)


def test_of_a_chain_that_forks_and_exits_nobody_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was there has gone when it is looked at; its child has come, and nobody had listed it."""
    procs = tmp_path / "cgroup.procs"
    gone = subprocess.Popen(["true"])
    gone.wait(LIMIT)
    procs.write_text(f"{gone.pid}\n")
    everybody = program._everybody

    def forks() -> Iterator[tuple[int, tuple[int, int]]]:
        yield from [(pid, facts) for pid, facts in everybody() if pid != os.getpid()]
        procs.write_text(f"{os.getpid()}\n")

    with looking(procs) as look:
        assert look() == ([], True)
        monkeypatch.setattr(program, "_everybody", forks)
        assert look() == ([], False)


def test_what_cannot_be_read_does_not_mean_that_nobody_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    with looking(tmp_path / "cgroup.procs") as look:
        assert look() == ([], True), "no cgroup, nobody in it"
        monkeypatch.setattr(program, "open", fails, raising=False)
        with pytest.raises(OSError, match="too many open files"):
            look()


def test_who_has_left_the_cgroup_is_killed_too(ward: Ward) -> None:
    """A child of somebody there, and whoever the daemon has named."""
    ward.has(FORKS)
    child = int(ward.said_by_tree(0))
    ward.begin()
    named = ward.has(SLEEPS)
    ward.control.sendall(json.dumps({"tree": [[named, int(keeper.identity(named)[1])]]}).encode())
    kill(ward)
    assert sorted(ward.hears()["killed"]) == sorted([*ward.tree, child])
    assert not keeper.alive(child)


def test_another_process_of_the_same_pid_is_left_alone(ward: Ward) -> None:
    ward.begin()
    named = ward.has(SLEEPS)
    ward.control.sendall(json.dumps({"tree": [[named, int(keeper.identity(named)[1]) - 1]]}).encode())
    kill(ward)
    assert ward.hears()["killed"] == []
    assert not ward.gone()


@pytest.mark.parametrize("why", ["no directory", "a socket that is there", "a table that is none"])
def test_one_that_never_listens_is_an_end_like_any_other(ward: Ward, why: str) -> None:
    ward.has(SLEEPS)
    if why == "a socket that is there":
        (ward.directory / filler.SOCKET).touch()
    ward.orders(**{"no directory": {"images": "/nowhere"}, "a table that is none": {"table": "/nowhere"}}.get(why, {}))
    said = ward.hears()
    if why == "a table that is none" and said == {"ready": True}:  # it has listened, and ends: the keeper may see its end first
        said = ward.hears()
    assert said["lost"].startswith("the filler ended with exit status ")
    assert said["killed"] == ward.tree
    assert ward.process.wait(LIMIT) == 2
    assert ward.gone()


def test_one_that_is_stopped_goes_on_and_ends_well(ward: Ward) -> None:
    ward.has(SLEEPS)
    ward.begin()
    for _ in range(3):
        os.kill(ward.filler, signal.SIGSTOP)
        wait_until(lambda: keeper.state(ward.filler) in ("T", "t"), LIMIT, "its stop")
        os.kill(ward.filler, signal.SIGCONT)
        wait_until(lambda: keeper.state(ward.filler) == "S", LIMIT, "that it goes on")
    ward.finishes()
    assert ward.hears() == {"in": True}
    assert not ward.gone()


def test_a_daemon_that_goes_before_it_says_anything_is_no_harm(ward: Ward) -> None:
    ward.control.close()
    assert ward.process.wait(LIMIT) == 0


def test_a_filler_without_keeper_and_daemon_holds_on_until_nobody_lacks_a_page(ward: Ward) -> None:
    """Both are SIGKILLed: what somebody waits for is not zeros then, it does not come."""
    ward.orders()
    assert ward.hears() == {"ready": True}
    (ward.filler,) = keeper.descendants(ward.process.pid)
    with subprocess.Popen(
        [*PYTHON, puppet.__file__, ward.directory / filler.SOCKET, "4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as lacking:
        assert lacking.stdin is not None
        assert lacking.stdout is not None
        try:
            wait_until(lambda: "anon_inode:[userfaultfd]" in ward.of_filler(), LIMIT, "that it is taken")
            os.kill(ward.process.pid, signal.SIGKILL)
            ward.process.wait(LIMIT)
            ward.pages.close()
            wait_until(lambda: "the daemon has gone" in (ward.directory / program.LOG).read_text(), LIMIT, "that it is seen")
            lacking.stdin.write(b"touch 1\n")
            lacking.stdin.flush()
            assert not select.select([lacking.stdout], [], [], 0.5)[0], "zeros"
            assert keeper.alive(ward.filler)
        finally:
            lacking.kill()
    wait_until(lambda: not keeper.alive(ward.filler), LIMIT, "the end of who holds on for nobody")


def test_it_needs_nothing_but_the_standard_library() -> None:
    """It is run without the packages of the project."""
    subprocess.run([*PYTHON, "-c", f"import {program.__name__}"], env=ENVIRONMENT, check=True, timeout=LIMIT)
