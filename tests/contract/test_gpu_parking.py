"""What the daemon may expect of the GPU helper, a process of its own, on the fake driver: who is parked, and who is whose.

How the driver answers is for `test_cuda.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hibernode.children import Children
from hibernode.config import Gpu as Settings
from hibernode.drivers.gpu.cuda import State
from hibernode.drivers.gpu.helper import TURN
from hibernode.drivers.gpu.nvidia import Nvidia, Tree
from hibernode.drivers.workloads import proc
from hibernode.ports import Identity, ProcessFacts
from tests.cuda_controller import Controller
from tests.fakes.cuda import GPU0, MIB, FakeGpus
from tests.gpu_jobs import Job, until

LIMIT = 20.0  # seconds, of a park that is not meant to wait


class Node:
    """A node with a GPU, its helper and its jobs. `call` is another controller of the same driver."""

    def __init__(self, place: Path) -> None:
        self.gpus, self._place, self.jobs = FakeGpus(place / "machine", [(GPU0, 2048 * MIB)]), place, list[Job]()
        self.directory = place / "helper"
        self.call = Controller(str(self.gpus.libcuda), env=self.gpus.env(None))
        self.gpu = self.daemon()

    def daemon(self) -> Nvidia:
        settings = Settings(libcuda=str(self.gpus.libcuda), lock_timeout=1.0, idle=2.0)
        return Nvidia(settings, self.directory, Children())

    def job(self, *, state: State = State.RUNNING, **options: Any) -> Job:
        """One in that state, which nobody holds."""
        job = Job(self._place / f"job-{len(self.jobs)}", self.gpus.env("0"), **options)
        self.jobs.append(job)
        if state is not State.RUNNING:
            self.call("lock", job.pid, 1000)
        if state is State.CHECKPOINTED:
            self.call("checkpoint", job.pid)
        return job

    def state(self, job: Job) -> State:
        return State(self.call("state", job.pid))

    def park(self, *jobs: Job, limit: float = LIMIT) -> None:
        self.gpu.park("action", [identity(job) for job in jobs], limit)

    def helper(self) -> int:
        """The pid of the one that is there; 0: none."""
        with open(self.directory / "lock") as lock:
            inode = os.fstat(lock.fileno()).st_ino
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return next((int(words[4]) for words in held if words[1] == "FLOCK" and words[5].endswith(f":{inode}")), 0)

    def kill_helper(self) -> None:
        if helper := self.helper():
            os.kill(helper, signal.SIGKILL)
            until(lambda: self.helper() != helper, "the helper is dead")

    def close(self) -> None:
        for job in self.jobs:
            job.kill()
        if (self.directory / "lock").exists():
            self.kill_helper()
        self.call.close()


def identity(job: Job) -> Identity:
    return job.pid, proc.start_time(job.pid)


def suspended(node: Node, action: str, *jobs: Job) -> Tree:
    """For that action, which holds them until its `resume`, or until some seconds after its `close`."""

    def everybody() -> list[ProcessFacts]:
        return [proc.facts(job.pid) for job in jobs]

    tree = node.gpu.find(action, everybody())
    tree.suspend(everybody, LIMIT)
    assert {node.state(job) for job in jobs} == {State.CHECKPOINTED}
    return tree


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    node = Node(tmp_path)
    for name, value in node.gpus.env(None).items():
        monkeypatch.setenv(name, value)  # of the helper
    yield node
    node.close()


# --- park -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "calls"),
    [(State.RUNNING, ["lock", "checkpoint"]), (State.LOCKED, ["checkpoint"]), (State.CHECKPOINTED, [])],
    ids=lambda value: value.name if isinstance(value, State) else None,
)
def test_whatever_it_was_at_nothing_of_it_is_on_a_gpu(node: Node, state: State, calls: list[str]) -> None:
    job = node.job(state=state)
    node.gpus.record()
    node.park(job)
    assert node.state(job) is State.CHECKPOINTED
    assert node.gpus.used(GPU0) == 0
    assert node.gpus.calls(job.pid) == [(call, 0) for call in calls]
    node.park(job)
    assert node.gpus.calls(job.pid) == [(call, 0) for call in calls]


def test_one_that_the_driver_has_given_up_is_left_as_it_is(node: Node) -> None:
    job, other = node.job(), node.job()
    node.gpus.arm(job.pid, "lock", "801 failed once")
    assert node.call.ask("lock", job.pid, 1000).error
    node.gpus.record()
    node.park(job, other)
    assert (node.state(job), node.gpus.calls(job.pid)) == (State.FAILED, [])
    assert node.state(other) is State.CHECKPOINTED


def test_who_is_gone_and_another_of_his_pid_are_not_asked(node: Node) -> None:
    job, gone = node.job(), node.job()
    who = identity(gone)
    gone.kill()
    node.gpus.record()
    node.gpu.park("action", [who, (job.pid, identity(job)[1] - 1)], LIMIT)
    assert (node.state(job), node.gpus.calls(job.pid)) == (State.RUNNING, [])
    job.goes_on()


def test_nobody_without_the_drivers_library_is_asked_and_no_helper_started(node: Node) -> None:
    node.gpu.park("action", [(os.getpid(), proc.start_time(os.getpid()))], LIMIT)
    assert not node.directory.exists()


@pytest.mark.parametrize(("call", "left"), [("lock", State.RUNNING), ("checkpoint", State.LOCKED)])
def test_what_the_driver_refuses_is_no_error_and_keeps_no_other_from_it(node: Node, call: Any, left: State) -> None:
    job, other = node.job(), node.job()
    node.gpus.arm(job.pid, call, "304")
    node.park(job, other)
    assert (node.state(job), node.state(other)) == (left, State.CHECKPOINTED)


def test_a_kernel_that_does_not_end_is_not_waited_for(node: Node) -> None:
    with contextlib.closing(node.gpu.connect()):  # a helper takes a while to start, and ends when nobody asks it
        job = node.job(busy_ms=4000, interval_ms=0)
        node.gpus.record()
        node.park(job)
        assert node.gpus.calls(job.pid) == [("lock", 600)]


def test_a_call_that_hangs_is_not_waited_for(node: Node) -> None:
    """Its own for as long as was said, another's for a moment; its end by a kill ends the call, and the helper is as good as ever."""
    job, other = node.job(), node.job()
    node.gpus.arm(job.pid, "checkpoint", "hang")
    for limit in (0.5, 4 * TURN):
        began = time.monotonic()
        node.park(job, limit=limit)
        assert time.monotonic() - began < 2 * TURN
    job.kill()
    node.park(other, job)
    assert node.state(other) is State.CHECKPOINTED


def test_who_is_stopped_is_not_waited_for(node: Node) -> None:
    job = node.job()
    os.kill(job.pid, signal.SIGSTOP)
    job.wait_stopped()
    node.park(job)
    os.kill(job.pid, signal.SIGCONT)
    assert node.state(job) is State.RUNNING


def test_a_helper_that_is_stopped_is_not_waited_for(node: Node) -> None:
    job = node.job()
    node.gpu.check()
    os.kill(node.helper(), signal.SIGSTOP)
    began = time.monotonic()
    node.park(job, limit=0.2)
    assert time.monotonic() - began < LIMIT
    job.goes_on()


def test_a_helper_that_dies_in_the_middle_is_asked_again(node: Node) -> None:
    job = node.job()
    node.gpus.record()
    node.gpus.arm(job.pid, "checkpoint", "hang once")
    with ThreadPoolExecutor() as pool:
        parked = pool.submit(node.park, job)
        until(lambda: node.gpus.calls(job.pid) == [("lock", 0)], "it has begun")
        node.kill_helper()
        node.gpus.disarm(job.pid, "checkpoint")
        parked.result(LIMIT)
    assert node.state(job) is State.CHECKPOINTED


def test_nobody_brings_back_who_was_parked(node: Node) -> None:
    """Neither an undo that finds him so, nor one for an action of which he was held."""
    job = node.job()
    tree = suspended(node, "action", job)
    tree.close()
    node.park(job)
    node.gpu.recover("action")
    clock = node.job()
    suspended(node, "other", clock).close()
    clock.goes_on()  # orphans have had their time
    assert node.state(job) is State.CHECKPOINTED


# --- whose it is ----------------------------------------------------------------------------------------------------------------


def orphans_have_had_their_time(node: Node) -> None:
    """What nobody answers for since before this was called has been given back."""
    clock = node.job()
    tree = node.daemon().find("clock", [proc.facts(clock.pid)])
    tree.suspend(lambda: [proc.facts(clock.pid)], LIMIT)
    tree.close()
    clock.goes_on()


@pytest.mark.parametrize("by", ["find", "check", "another suspended"])
def test_an_action_keeps_what_it_holds_though_another_one_starts_the_next_helper(node: Node, by: str) -> None:
    """As in a dump, in which it asks the helper nothing and does not see that it has died."""
    job, other = node.job(), node.job()
    tree = suspended(node, "action", job)
    node.kill_helper()
    match by:
        case "find":
            node.gpu.find("other", [proc.facts(other.pid)]).close()
        case "check":
            node.gpu.check()
        case _:
            with contextlib.closing(suspended(node, "other", other)) as another:
                another.resume(limit=LIMIT)
    orphans_have_had_their_time(node)
    assert node.state(job) is State.CHECKPOINTED
    tree.resume(limit=LIMIT)
    tree.close()
    job.goes_on()


def test_what_an_action_leaves_when_it_is_over_is_given_back_though_its_daemon_holds_more(node: Node) -> None:
    job, held = node.job(), node.job()
    tree = suspended(node, "action", job)
    other = suspended(node, "held", held)
    node.kill_helper()
    node.gpu.check()
    tree.close()
    job.goes_on()
    assert node.state(held) is State.CHECKPOINTED
    other.resume(limit=LIMIT)
    other.close()
    held.goes_on()


def test_a_helper_ends_when_its_daemon_holds_nothing_any_more(node: Node) -> None:
    job = node.job()
    tree = suspended(node, "action", job)
    tree.resume(limit=LIMIT)
    tree.close()
    until(lambda: not node.helper(), "nobody needs it, and it has ended")
