"""Children: those who are waited for are left to their waiters, all others are reaped, and their ends are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from hibernode.children import Children, _children

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def _nobody_elses() -> None:
    """What other tests have left to this process, as the subreaper that some of them make it, has ended before."""
    Children().reap()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stranger(code: str) -> int:
    """A child that this book has not spawned."""
    return os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code])


def ended(pid: int) -> None:
    """Wait until it has ended, and leave its zombie."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_one_that_is_waited_for_is_not_reaped() -> None:
    children = Children()
    child = children.spawn([sys.executable, "-c", "raise SystemExit(7)"])
    ended(child.pid)
    children.reap()
    assert children.wait(child) == 7
    assert children.take_exits() == {}


def test_every_other_is_reaped_once_and_its_end_is_kept() -> None:
    children = Children()
    killed = stranger("import time; time.sleep(60)")
    children.reap()
    exits = stranger("raise SystemExit(3)")  # now: it may end at once
    os.kill(killed, signal.SIGKILL)
    for pid in (exits, killed):
        ended(pid)
    children.reap()
    assert children.take_exits() == {exits: 3, killed: -signal.SIGKILL}
    assert children.take_exits() == {}
    for pid in (exits, killed):
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_reaping_never_blocks() -> None:
    children = Children()
    pid = stranger("import time; time.sleep(60)")
    before = time.monotonic()
    children.reap()
    assert time.monotonic() - before < 5
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    children.reap()
    assert children.take_exits() == {pid: -signal.SIGKILL}


def test_after_the_wait_a_pid_is_nobody_s() -> None:
    children = Children()
    child = children.spawn([sys.executable, "-c", ""])
    assert children.wait(child) == 0
    assert child.pid not in children._own


def test_a_wait_with_a_limit() -> None:
    children = Children()
    child = children.spawn([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(subprocess.TimeoutExpired):
        children.wait(child, 0.01)
    child.kill()
    assert children.wait(child) == -signal.SIGKILL


def test_only_the_descriptors_that_are_meant_are_handed_over() -> None:
    children = Children()
    meant, other = os.pipe(), os.pipe()
    code = "import os, sys; os.write(int(sys.argv[1]), b'yes'); os.fstat(int(sys.argv[2]))"
    child = children.spawn([sys.executable, "-c", code, str(meant[1]), str(other[1])], pass_fds=[meant[1]])
    assert children.wait(child) == 1, "the other one is not there"
    assert os.read(meant[0], 10) == b"yes"
    for descriptor in (*meant, *other):
        os.close(descriptor)


def test_a_helper_is_in_no_session_and_group_of_ours() -> None:
    children = Children()
    child = children.spawn([sys.executable, "-c", "import time; time.sleep(60)"])
    found = os.getsid(child.pid), os.getpgid(child.pid)
    child.kill()
    children.wait(child)
    assert found == (child.pid, child.pid)


def test_an_orphan_comes_to_the_subreaper() -> None:
    """Asked in a process of its own: being a subreaper stays for ever."""
    code = """
import os, sys, time
sys.path[:0] = sys.argv[1:]
from hibernode.children import Children
children = Children()
children.adopt_orphans()
read, write = os.pipe()
child = os.fork()
if child == 0:
    grandchild = os.fork()
    if grandchild == 0:
        time.sleep(0.2)
        os._exit(5)
    os.write(write, str(grandchild).encode())
    os._exit(0)
orphan, exits = int(os.read(read, 20)), {}
deadline = time.monotonic() + 10
while len(exits) < 2 and time.monotonic() < deadline:
    children.reap()
    exits |= children.take_exits()
    time.sleep(0.01)
assert exits == {child: 0, orphan: 5}, exits
"""
    done = subprocess.run([sys.executable, "-c", code, *sys.path], capture_output=True, text=True, check=False, timeout=25)
    assert done.returncode == 0, done.stderr


# --- short commands ---------------------------------------------------------------------------------------------------------


def test_a_short_command_says_what_it_said() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); raise SystemExit(4)"
    status, said = Children().run([sys.executable, "-u", "-c", code], timeout=20)
    assert (status, said) == (4, "out\nerr\n")


def test_a_command_that_cannot_be_started() -> None:
    status, said = Children().run(["/nowhere/criu", "--version"], timeout=20)
    assert status == 127
    assert "/nowhere/criu" in said


def test_a_command_that_takes_too_long_is_ended() -> None:
    children, before = Children(), _children()
    status, said = children.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    assert (status, "0.2" in said) == (124, True)
    assert not children._own
    assert _children() <= before, "not even a zombie of it is left; others of the test run may have ended"


def test_many_at_once_lose_no_exit_code() -> None:
    """The reaper runs beside those who wait."""
    children = Children()
    waited = [children.spawn([sys.executable, "-S", "-c", f"raise SystemExit({n})"]) for n in range(5)]
    others = {stranger(f"raise SystemExit({n})"): n for n in range(10, 14)}
    found: dict[int, int] = {}

    def reaped() -> bool:
        children.reap()
        found.update(children.take_exits())
        return len(found) == len(others)

    until(reaped)
    assert found == others
    assert [children.wait(child) for child in waited] == [0, 1, 2, 3, 4]
