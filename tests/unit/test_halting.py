"""One thread of a stopped process runs, and is itself again afterwards: real processes and real ptrace, whatever happens meanwhile.

The program has a thread with the name of a driver's restore thread, which answers each byte with one; and one that counts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode.drivers.gpu import halting
from hibernode.drivers.gpu.cuda import State
from hibernode.drivers.gpu.helper import Halted, Helper, Journal
from hibernode.drivers.gpu.talk import Question
from hibernode.ports import Identity
from tests.keeper import wait_until

pytestmark = pytest.mark.timeout(50)

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 10.0  # seconds for what takes a few milliseconds
USR1 = 1 << (signal.SIGUSR1 - 1)
PROGRAM = """
import ctypes, os, signal, sys, threading, time
held = threading.Lock()
def serve():
    ctypes.CDLL(None).prctl(15, b"cuda00a00b", 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    os.write(1, b"!")
    while byte := os.read(0, 1):
        if byte == b"L":
            held.acquire()
        os.write(1, byte)
def count():
    held.acquire()
    while True:
        os.pwrite(2, b"%012d" % time.monotonic_ns(), 0)
        time.sleep(0.02) # outside, where it does not hold what another thread of Python needs: it may be stopped anywhere
        if os.path.exists(sys.argv[1]):
            held.release()
            time.sleep(3600)
threading.Thread(target=count).start()
threading.Thread(target=serve).start()
"""


class Target:
    def __init__(self, directory: Path) -> None:
        self.shown, self.unlock = directory / "shown", directory / "unlock"
        with open(self.shown, "wb") as shown:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", PROGRAM, str(self.unlock)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=shown, bufsize=0,
            )  # fmt: skip
        assert self.hears() == b"!"
        self.pid = self.process.pid
        self.who: Identity = self.pid, halting.started(self.pid)
        self.thread = halting.restore_thread(self.pid)
        self.mask = halting.blocked(self.pid, self.thread)

    def asks(self, byte: bytes = b"x") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(byte)

    def answers(self, byte: bytes = b"x") -> bool:
        self.asks(byte)
        return self.hears() == byte

    def hears(self) -> bytes:
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), 1)

    def counts(self) -> bool:
        before = self.shown.read_bytes()
        time.sleep(0.1)
        return self.shown.read_bytes() != before

    @property
    def blocked(self) -> int:
        return halting.blocked(self.pid, self.thread)

    def is_itself(self) -> bool:
        return halting.states(self.pid) == {"T"} and self.blocked == self.mask

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    made = Target(tmp_path)
    yield made
    made.end()


@pytest.fixture
def tracer() -> halting.Tracer:
    return halting.Tracer()


def test_only_that_thread_runs_and_then_none(target: Target, tracer: halting.Tracer) -> None:
    assert target.mask & USR1
    assert halting.stop([target.who], LIMIT) == {}
    for _ in range(20):
        with tracer.running(target.who, target.thread, target.mask):
            assert target.answers()
            assert halting.states(target.pid) - {"T"}
            assert target.blocked != target.mask
        halting.wait_stopped([target.who], LIMIT)
        assert target.is_itself()
    assert not target.counts()
    halting.go_on([target.who], LIMIT)
    wait_until(target.counts, LIMIT, "all to go on")
    assert target.answers()


def test_the_others_go_on_meanwhile_and_stop_again(target: Target, tracer: halting.Tracer) -> None:
    """A watchdog lets a tree go on, somebody else stops it: the thread runs through all of it, and ends as the others do."""
    halting.stop([target.who], LIMIT)
    with tracer.running(target.who, target.thread, target.mask):
        halting.send(target.who, signal.SIGCONT)
        assert target.answers()
        wait_until(target.counts, LIMIT, "the others")
        halting.send(target.who, signal.SIGSTOP)
        wait_until(lambda: not target.counts(), LIMIT, "the others to stop")
        assert target.answers()
        halting.send(target.who, signal.SIGCONT)
        assert target.answers()
    wait_until(target.counts, LIMIT, "the others")
    assert target.answers()
    assert target.blocked == target.mask
    with tracer.running(target.who, target.thread, target.mask):  # of a process that runs already
        assert target.answers()
        wait_until(target.counts, LIMIT, "the others")
    assert target.answers()


def test_a_signal_for_the_process_waits(target: Target, tracer: halting.Tracer) -> None:
    halting.stop([target.who], LIMIT)
    with tracer.running(target.who, target.thread, target.mask):
        halting.send(target.who, signal.SIGTERM)
        assert target.answers()
        assert target.process.poll() is None
    halting.go_on([target.who], LIMIT)
    assert target.process.wait(LIMIT) == -signal.SIGTERM


def test_a_process_that_is_killed_meanwhile_is_no_error(target: Target, tracer: halting.Tracer) -> None:
    halting.stop([target.who], LIMIT)
    with tracer.running(target.who, target.thread, target.mask):
        target.process.kill()
        target.process.wait(LIMIT)
    with pytest.raises(halting.Lost), tracer.running(target.who, target.thread, target.mask):
        pass
    halting.go_on([target.who], LIMIT)


def test_a_lock_that_a_stopped_thread_holds_is_waited_for_with_all_running(target: Target, tracer: halting.Tracer) -> None:
    halting.stop([target.who], LIMIT)
    with tracer.running(target.who, target.thread, target.mask) as run:
        began = time.monotonic()
        target.asks(b"L")
        wait_until(target.counts, LIMIT, "the others to be let run")
        assert time.monotonic() - began > halting.STALL
        assert run.stalled
        target.unlock.touch()
        assert target.hears() == b"L"


def test_a_tracer_that_dies_leaves_a_mask_that_another_gives_back(target: Target, tracer: halting.Tracer) -> None:
    halting.stop([target.who], LIMIT)
    code = (
        "import os\nfrom hibernode.drivers.gpu import halting\n"
        f"with halting.Tracer().running({target.who}, {target.thread}, {target.mask}):\n    os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT / "daemon")}, check=False)
    assert died.returncode == -signal.SIGKILL
    halting.wait_stopped([target.who], LIMIT)
    assert halting.states(target.pid) == {"T"}
    assert target.blocked != target.mask
    tracer.give_back(target.who, target.thread, target.mask)
    assert target.is_itself()
    halting.go_on([target.who], LIMIT)
    assert target.answers()


def test_who_has_a_tracer_already_is_lost(target: Target, tracer: halting.Tracer) -> None:
    halting.stop([target.who], LIMIT)
    with (
        tracer.running(target.who, target.thread, target.mask),
        pytest.raises(halting.Lost),
        halting.Tracer().running(target.who, target.thread, target.mask),
    ):
        pass
    halting.wait_stopped([target.who], LIMIT)
    assert target.is_itself()


# --- the helper's part ----------------------------------------------------------------------------------------------------------


class Driver:
    """Of the target alone. `checkpoint` needs a lock that the other thread holds."""

    version = 13000

    def __init__(self, target: Target) -> None:
        self._target, self._state = target, State.RUNNING

    def state(self, pid: int) -> State:
        assert self._target.answers()
        return self._state

    def restore_thread(self, pid: int) -> int:
        return self._target.thread

    def lock(self, pid: int, timeout_ms: int) -> None:
        self._state = State.LOCKED

    def checkpoint(self, pid: int) -> None:
        self._target.asks(b"L")
        wait_until(self._target.counts, LIMIT, "the others to be let run")
        self._target.unlock.touch()
        assert self._target.hears() == b"L"
        self._state = State.CHECKPOINTED

    def restore(self, pid: int, pairs: object) -> None:
        self._state = State.LOCKED

    def unlock(self, pid: int) -> None:
        self._state = State.RUNNING


def helper_of(target: Target, journal: Path) -> Helper:
    return Helper(Driver(target), Journal(journal))  # type: ignore[arg-type]


def test_a_call_that_needs_a_stopped_thread_ends_and_all_stand_still_again(target: Target, tmp_path: Path) -> None:
    helper = helper_of(target, tmp_path / "journal")
    assert all(result.ok for result in helper.answer(Question("lock", "a", [target.who], 1000)))
    assert [(result.ok, result.halted) for result in helper.answer(Question("halt", "a", [target.who]))] == [(True, "")]
    assert not target.counts()
    assert [result.state for result in helper.answer(Question("checkpoint", "a", [target.who]))] == ["CHECKPOINTED"]
    assert target.is_itself()
    assert [result.state for result in helper.answer(Question("resume", "a", [target.who]))] == ["RUNNING"]
    wait_until(lambda: "T" not in halting.states(target.pid), LIMIT, "all to go on")
    assert not helper.journal.held()


def test_the_next_helper_knows_who_stands_still_and_lets_him_go_on(target: Target, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    helper = helper_of(target, journal)
    helper.answer(Question("lock", "a", [target.who], 1000))
    helper.answer(Question("halt", "a", [target.who]))
    following = helper_of(target, journal)
    assert following.journal.halted("a") == {target.who: Halted(target.thread, target.mask)}
    assert following.orphans() == {"a": [target.who]}
    assert following.undo("a", [target.who])
    wait_until(target.counts, LIMIT, "all to go on")
    assert not following.orphans()
    assert not journal.read_bytes()


def test_a_user_that_somebody_else_has_stopped_is_not_taken_for_ours(target: Target, tmp_path: Path) -> None:
    helper = helper_of(target, tmp_path / "journal")
    helper.answer(Question("lock", "a", [target.who], 1000))
    halting.stop([target.who], LIMIT)
    assert [(result.ok, result.halted) for result in helper.answer(Question("halt", "a", [target.who]))] == [(False, "T")]
    assert not helper.journal.halted("a")


def test_a_thread_that_cannot_be_told_by_its_name_is_refused_before_anybody_is_stopped(target: Target, tmp_path: Path) -> None:
    helper = helper_of(target, tmp_path / "journal")
    helper.answer(Question("lock", "a", [target.who], 1000))
    target.thread = target.pid
    (found,) = helper.answer(Question("halt", "a", [target.who]))
    assert not found.ok
    assert "by its name" in found.name
    wait_until(target.counts, LIMIT, "all of it: nobody was stopped")
