"""What is done to trees of real processes: everything of a tree is met, whatever it does meanwhile, and nobody else."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hibernode.children import Children
from hibernode.drivers.workloads import proc, trees
from hibernode.drivers.workloads.process import ProcessWorkload
from hibernode.model import WorkloadFacts
from hibernode.ports import Identity
from tests import keeper
from tests.fakes.criu import FakeCriu
from tests.fakes.machine import Machine
from tests.fakes.script import Script
from tests.keeper import Kept, wait_until

pytestmark = pytest.mark.timeout(50)

LIMIT = 10.0  # seconds for what takes a few milliseconds
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_DETACH = 0x4206, 0x4207, 17

# Every process forks a child a millisecond, as long as there are fewer than 300; each ends by itself after 30 s.
FORKING = """
import os, sys, time
end = time.monotonic() + 30
while time.monotonic() < end:
    if os.stat(sys.argv[1]).st_size < 300 and not os.fork():
        with open(sys.argv[1], "ab") as count:
            count.write(b".")
    time.sleep(0.001)
"""
PARENT = "import os, time\nfor _ in range(3):\n    if not os.fork():\n        break\ntime.sleep(60)"
LEADERLESS = (
    "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nctypes.CDLL(None).pthread_exit(0)"
)


class Running:
    """Programs under keepers, which reap everything that is left of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: list[Kept] = []

    def start(self, code: str, *args: str) -> int:
        self._kept.append(Kept([sys.executable, "-S", "-c", code, *args], self._directory / "log"))
        return self._kept[-1].pid

    def family(self) -> int:
        """A parent of three."""
        pid = self.start(PARENT)
        wait_until(lambda: len(proc.tree(pid)) == 4, LIMIT, "three children")
        return pid

    def living(self) -> list[int]:
        """Everything alive that these programs ever started, whoever its parent is now."""
        return [pid for kept in self._kept for pid in kept.left()]

    def end(self) -> None:
        for kept in self._kept:
            kept.kill()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    programs = Running(tmp_path)
    yield programs
    programs.end()


def identity(pid: int) -> Identity:
    return pid, proc.start_time(pid)


def workload(pid: int) -> ProcessWorkload:
    return ProcessWorkload(WorkloadFacts(kind="process", name="x"), pid, FakeCriu(Machine(), Script()), Children())


def states(pids: list[int]) -> set[str]:
    return {keeper.state(pid) for pid in pids}


def stop(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: states(pids) == {"T"}, LIMIT, "all to be stopped")


# --- kill ---------------------------------------------------------------------------------------------------------------------


def test_a_tree_that_forks_all_the_time_is_killed_whole(running: Running, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.touch()
    root = running.start(FORKING, str(count))
    wait_until(lambda: count.stat().st_size > 30, LIMIT, "thirty processes")
    trees.kill([identity(root)], Children())
    assert not running.living()


def test_who_was_seen_is_killed_also_when_his_parent_has_ended(running: Running) -> None:
    root = running.family()
    of = workload(root)
    of.processes()
    os.kill(root, signal.SIGKILL)
    wait_until(lambda: not keeper.alive(root), LIMIT, "the end of the root")
    assert len(running.living()) == 3
    of.kill()
    assert not running.living()


def test_a_zombie_whose_parent_does_not_wait_counts_as_killed(running: Running) -> None:
    parent = running.start("import os, time\nif os.fork():\n    time.sleep(60)\ntime.sleep(60)")
    wait_until(lambda: len(proc.tree(parent)) == 2, LIMIT, "the child")
    child = proc.tree(parent)[1]
    before, burnt = time.monotonic(), time.process_time()
    trees.kill([identity(child)], Children())
    assert time.monotonic() - before < trees.REAP_GRACE + 5
    assert time.process_time() - burnt < trees.REAP_GRACE / 2, "the wait spins"
    assert keeper.state(child) == "Z"
    assert keeper.alive(parent)


def test_stopped_ones_and_those_whose_first_thread_has_ended_are_killed(running: Running) -> None:
    family, leaderless = running.family(), running.start(LEADERLESS)
    wait_until(lambda: keeper.state(leaderless) == "Z", LIMIT, "the end of the first thread")
    stop(proc.tree(family))
    trees.kill([identity(family), identity(leaderless)], Children())
    assert not running.living()


@pytest.mark.parametrize("who", [lambda pid, began: (pid, began + 1), lambda pid, _: (pid, 0)])
def test_another_process_of_that_pid_is_not_met(running: Running, who: Callable[[int, int], Identity]) -> None:
    root = running.family()
    trees.kill([who(*identity(root))], Children())
    assert len(running.living()) == 4
    other = who(*identity(root))
    trees.send(other, signal.SIGTERM)
    assert trees.ends(other, 0), "nobody is waited for"
    assert not trees.ends(identity(root), 0.01)
    stop(proc.tree(root))
    trees.thaw([other])
    assert states(proc.tree(root)) == {"T"}


def test_who_has_ended_is_not_waited_for_and_not_signalled(running: Running) -> None:
    gone = identity(running.start("pass"))
    assert trees.ends(gone, LIMIT)
    trees.send(gone, signal.SIGTERM)
    assert trees.ends(gone, 0)


# --- thaw ---------------------------------------------------------------------------------------------------------------------


def test_who_is_about_to_stop_goes_on(running: Running) -> None:
    """As CRIU leaves a tree: SIGSTOP is on its way, and the process has not come to run yet."""
    pid = running.start("import time; time.sleep(60)")
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(PTRACE_SEIZE, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    assert libc.ptrace(PTRACE_INTERRUPT, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    wait_until(lambda: proc.state(pid) == "t", LIMIT, "a held process")
    os.kill(pid, signal.SIGSTOP)
    assert proc.state(pid) == "t"
    assert proc.stops(pid)
    trees.thaw([identity(pid)])
    assert not proc.stops(pid)
    assert libc.ptrace(PTRACE_DETACH, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    wait_until(lambda: proc.state(pid) == "S", LIMIT, "a process that goes on")


def test_everything_of_a_tree_goes_on_also_who_was_born_later(running: Running) -> None:
    root = running.family()
    noted = [identity(root)]
    stop(proc.tree(root))
    trees.thaw(noted)
    wait_until(lambda: not {"T"} & states(proc.tree(root)), LIMIT, "all to go on")


def test_who_was_stopped_before_stays_stopped(running: Running) -> None:
    root = running.family()
    before = proc.tree(root)[2]
    stop([before])
    of = workload(root)
    of.freeze()
    stop(proc.tree(root))
    of.thaw()
    wait_until(lambda: [p for p in proc.tree(root) if keeper.state(p) == "T"] == [before], LIMIT, "the others to go on")


def test_who_was_seen_goes_on_also_when_his_parent_has_ended(running: Running) -> None:
    root = running.family()
    of = workload(root)
    of.freeze()
    tree = proc.tree(root)
    stop(tree)
    os.kill(root, signal.SIGKILL)
    wait_until(lambda: not keeper.alive(root), LIMIT, "the end of the root")
    of.thaw()
    wait_until(lambda: states(tree[1:]) == {"S"}, LIMIT, "its children to go on")


def test_a_process_whose_first_thread_has_ended_goes_on(running: Running) -> None:
    pid = running.start(LEADERLESS)
    wait_until(lambda: keeper.state(pid) == "Z", LIMIT, "the end of the first thread")
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: "T" in proc.thread_states(pid), LIMIT, "the others to stop")
    trees.thaw([identity(pid)])
    wait_until(lambda: "T" not in proc.thread_states(pid), LIMIT, "the others to go on")
    os.kill(pid, signal.SIGKILL)  # the keeper takes it for a zombie


def test_who_is_named_stays_stopped_and_what_was_born_later_goes_on(running: Running) -> None:
    root = running.family()
    _, stays, *others = proc.tree(root)
    stop(proc.tree(root))
    trees.thaw([identity(root)], leave=[identity(stays)])
    wait_until(lambda: "T" not in states([root, *others]), LIMIT, "the others to go on")
    assert keeper.state(stays) == "T"
