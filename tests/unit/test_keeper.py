"""The keeper of a lazy restore, alone: in place of `criu lazy-pages` a program that holds a FIFO, in place of a cgroup a file with pids.
What the FIFO tells is what the kernel would do with a userfaultfd: its end comes when the only writer closes it.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hibernode import keeper as program
from tests import keeper
from tests.keeper import Kept, wait_until

pytestmark = pytest.mark.timeout(60)

LIMIT = 20.0  # seconds
LAZY_PAGES = """
import os, signal, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
open(words["--out"], "w").write(str(os.getpid()))
held = os.open(words["--holds"], os.O_WRONLY)
if words["--does"] == "many":
    import ctypes
    while ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | os.O_NONBLOCK) >= 0:  # userfaultfd
        pass
    words["--does"] = "1"
if words["--does"] == "silent":
    sys.exit(0)
os.write(int(words["--status-fd"]), bytes(1))
if words["--does"] == "in":
    sys.exit(0)
if words["--does"] == "fails":
    sys.exit(1)
os.read(int(words["--ps-socket"]), 1)
sys.exit(int(words["--does"]))
"""
SLEEPS = [sys.executable, "-S", "-E", "-c", "import signal; signal.pause()"]
FORKS = [
    sys.executable,
    "-S",
    "-E",
    "-c",
    "import os, signal; child = os.fork(); child and print(child, flush=True); signal.pause()",
]


class Ward:
    """A keeper, what it keeps, and the test in the daemon's place."""

    def __init__(self, directory: Path, stack: ExitStack, descriptors: int = 0) -> None:
        """`descriptors`: as many as it may have, and `criu lazy-pages`."""
        self._directory, self._stack = directory, stack
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pages, served = socket.socketpair()
        for each in (self.control, self.pages):
            stack.callback(each.close)
            each.settimeout(LIMIT)
        os.mkfifo(directory / "held")
        self.held = os.open(directory / "held", os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, self.held)
        numbers = theirs.fileno(), served.fileno()
        limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors else []
        self.process = subprocess.Popen(
            [*limit, sys.executable, "-I", "-S", program.__file__, *map(str, numbers)], pass_fds=numbers,
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
        log = self._directory / f"tree {len(self.tree)}"
        kept = Kept(argv, log)
        self._stack.callback(kept.kill)
        self.tree.append(kept.pid)
        return kept.pid

    def said_by_tree(self, number: int) -> str:
        log = self._directory / f"tree {number}"
        wait_until(log.read_text, LIMIT, "what it says")
        return log.read_text().strip()

    def begin(self, does: str, **more: object) -> None:
        """What `criu lazy-pages` does when it listens: it ends with so much when it is let, or `in`, `fails`; `silent` ends before."""
        script, procs = self._directory / "lazy-pages.py", self._directory / "cgroup.procs"
        script.write_text(LAZY_PAGES)
        procs.write_text("".join(f"{pid}\n" for pid in self.tree))
        argv = [sys.executable, "-S", "-E", str(script), "--does", does, "--out", "pid", "--holds", "held"]
        order: dict[str, Any] = {"argv": argv, "env": {}, "cwd": str(self._directory), "procs": [str(procs)], **more}
        self.control.sendall(json.dumps(order).encode())

    @property
    def lazy_pages(self) -> int:
        return int((self._directory / "pid").read_text())

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
    ward.begin("in")
    assert ward.hears() == {"ready": True}
    assert ward.hears() == {"in": True}
    assert ward.process.wait(LIMIT) == 0
    assert not ward.gone()


def kill(ward: Ward) -> None:
    os.kill(ward.lazy_pages, signal.SIGKILL)


def kill_twice(ward: Ward) -> None:
    pid = ward.lazy_pages
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def terminate(ward: Ward) -> None:
    os.kill(ward.lazy_pages, signal.SIGTERM)


def close_the_pages(ward: Ward) -> None:
    ward.pages.close()


def daemon_goes(ward: Ward) -> None:
    ward.control.close()


def daemon_and_lazy_pages_go(ward: Ward) -> None:
    ward.control.close()
    kill(ward)


@pytest.mark.parametrize("end", [kill, kill_twice, terminate, close_the_pages, daemon_goes, daemon_and_lazy_pages_go])
def test_whoever_ends_the_tree_is_dead_before_anything_is_let_go(ward: Ward, end: Callable[[Ward], None]) -> None:
    """As soon as the FIFO has no writer any more, nobody of the tree may be there."""
    for _ in range(3):
        ward.has(SLEEPS)
    ward.begin("1")
    assert ward.hears() == {"ready": True}
    poller = select.poll()
    poller.register(ward.held, select.POLLIN)
    assert not poller.poll(0), "it is held"
    end(ward)
    assert poller.poll(LIMIT * 1000)
    assert ward.gone(), "let go of while somebody could read zeros"
    assert ward.process.wait(LIMIT) == 2
    assert not keeper.alive(ward.lazy_pages)


def test_what_is_lost_is_told_when_nobody_is_left(ward: Ward) -> None:
    ward.has(SLEEPS)
    ward.begin("fails")
    assert ward.hears() == {"ready": True}
    said = ward.hears()
    assert said == {"lost": "criu lazy-pages ended with exit status 1", "killed": ward.tree}
    assert ward.gone()


def test_one_that_has_no_descriptor_left_still_sees_who_is_there(tmp_path: Path) -> None:
    """`criu lazy-pages` has as many userfaultfds as it may: copies of them take all that the keeper has."""
    with ExitStack() as stack:
        ward = Ward(tmp_path, stack, descriptors=40)
        ward.has(SLEEPS)
        ward.begin("many")
        assert ward.hears() == {"ready": True}
        kill(ward)
        assert ward.hears()["killed"] == ward.tree
        assert ward.gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_shuts_the_machine_down_does_not_end_it(ward: Ward, number: signal.Signals) -> None:
    ward.has(SLEEPS)
    ward.begin("0")
    assert ward.hears() == {"ready": True}
    os.kill(ward.process.pid, number)
    ward.pages.sendall(b".")
    assert ward.hears() == {"in": True}
    assert not ward.gone()


@contextlib.contextmanager
def looking(procs: Path) -> Iterator[Callable[[], tuple[list[program.Identity], bool]]]:
    """The look of a keeper that is not run."""
    with socket.socket() as control:
        kept = program.Keeper(control, -1, {"procs": [str(procs)]})
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
    ward.begin("1")
    assert ward.hears() == {"ready": True}
    named = ward.has(SLEEPS)
    ward.control.sendall(json.dumps({"tree": [[named, int(keeper.identity(named)[1])]]}).encode())
    kill(ward)
    assert sorted(ward.hears()["killed"]) == sorted([*ward.tree, child])
    assert not keeper.alive(child)


def test_another_process_of_the_same_pid_is_left_alone(ward: Ward) -> None:
    ward.begin("1")
    assert ward.hears() == {"ready": True}
    named = ward.has(SLEEPS)
    ward.control.sendall(json.dumps({"tree": [[named, int(keeper.identity(named)[1]) - 1]]}).encode())
    kill(ward)
    assert ward.hears()["killed"] == []
    assert not ward.gone()


@pytest.mark.parametrize(("does", "argv"), [("silent", None), ("in", ["/nowhere/criu"])])
def test_one_that_never_listens_is_an_end_like_any_other(ward: Ward, does: str, argv: list[str] | None) -> None:
    ward.begin(does, **({"argv": argv} if argv else {}))
    assert "criu lazy-pages ended" in ward.hears()["lost"]
    assert ward.process.wait(LIMIT) == 2


def test_one_that_is_stopped_goes_on_and_ends_well(ward: Ward) -> None:
    ward.has(SLEEPS)
    ward.begin("0")
    assert ward.hears() == {"ready": True}
    for _ in range(3):
        os.kill(ward.lazy_pages, signal.SIGSTOP)
        wait_until(lambda: keeper.state(ward.lazy_pages) in ("T", "t"), LIMIT, "its stop")
        os.kill(ward.lazy_pages, signal.SIGCONT)
        wait_until(lambda: keeper.state(ward.lazy_pages) == "S", LIMIT, "that it goes on")
    ward.pages.sendall(b".")
    assert ward.hears() == {"in": True}
    assert not ward.gone()


def test_a_daemon_that_goes_before_it_says_anything_is_no_harm(ward: Ward) -> None:
    ward.control.close()
    assert ward.process.wait(LIMIT) == 0


def test_it_needs_nothing_but_the_standard_library() -> None:
    """It is run without the project in its path."""
    code = f"import runpy; runpy.run_path({program.__file__!r}, run_name='keeper')"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, timeout=LIMIT)
