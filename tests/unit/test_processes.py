"""The book of jobs and the places of restores, with real processes and without CRIU."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hibernode.children import Children
from hibernode.drivers.workloads import cgroup, proc, trees
from hibernode.drivers.workloads.process import Jobs, ProcessWorkload, ProcessWorkloads
from hibernode.errors import DumpFailed, Refused
from hibernode.model import Cancel, JobSpec, Target, TaskFacts, WorkloadFacts
from hibernode.ports import CriuOptions, DumpStats, Fetched, Held, Prepared
from tests import keeper
from tests.fakes.criu import FakeCriu
from tests.fakes.machine import Machine
from tests.fakes.script import Script
from tests.keeper import wait_until

pytestmark = pytest.mark.timeout(30)

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
PROCESS = WorkloadFacts(kind="process", name="x")


def spec(name: str) -> JobSpec:
    return JobSpec(name=name, argv=SLEEP)


class Restored(FakeCriu):
    """Its restores end at once, with a process that somebody else has started."""

    def __init__(self) -> None:
        super().__init__(Machine(), Script())
        self.pid = 0

    def restore(
        self,
        images: Path,
        options: CriuOptions,
        prepared: Prepared,
        cancel: Cancel,
        held: Held | None = None,
    ) -> int:
        return self.pid


class Node:
    """The driver, as a daemon holds it, on a directory of its own; and processes that descend from it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.children = directory, Children()
        self.jobs = Jobs(directory, self.children)
        self.criu = Restored()
        self.workloads = ProcessWorkloads(self.jobs, self.criu, self.children)
        self._started: list[tuple[int, int]] = []

    def child(self) -> int:
        pid = os.spawnv(os.P_NOWAIT, SLEEP[0], SLEEP)
        self._started.append((pid, proc.start_time(pid)))
        return pid

    def parent_of_a_living(self) -> int:
        program = "import os, time; os.fork(); time.sleep(60)"
        pid = os.spawnv(os.P_NOWAIT, SLEEP[0], [sys.executable, "-S", "-c", program])
        self._started.append((pid, proc.start_time(pid)))
        wait_until(lambda: len(keeper.descendants(pid)) == 1, 10, "a child")
        self._started += [(each, proc.start_time(each)) for each in keeper.descendants(pid)]
        return pid

    def parent(self) -> int:
        """Of a child that has ended, or will in a moment, and that it does not wait for."""
        argv = [sys.executable, "-S", "-c", "import os, time\nif os.fork():\n    time.sleep(60)"]
        self._started.append((pid := os.spawnv(os.P_NOWAIT, argv[0], argv), proc.start_time(pid)))
        wait_until(lambda: [keeper.state(child) for child in keeper.descendants(pid)] == ["Z"], 10, "the zombie")
        return pid

    def job(self, name: str) -> int:
        return self.jobs.run(spec(name)).pid

    def end(self) -> None:
        for job in self.jobs.all():
            self.jobs.stop(job.namespace, job.name, "KILL")
        trees.kill(self._started, self.children)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "jobs")
    yield made
    made.end()


def test_the_place_of_a_tree_goes_when_its_last_child_has(node: Node) -> None:
    argv = [sys.executable, "-S", "-c", "import os, time; os.fork(); time.sleep(60)"]
    root, uid = os.spawnv(os.P_NOWAIT, argv[0], argv), str(uuid.uuid4())
    wait_until(lambda: len(keeper.descendants(root)) == 1, 10, "the child")
    (child,) = keeper.descendants(root)
    procs = cgroup.create(uid)
    places = [Path(each).parent for each in procs]
    assert places, "there are no cgroups to write to"

    def gone() -> bool:
        node.jobs.reap()
        return not any(place.exists() for place in places)

    try:
        for pid in (root, child):
            cgroup.join(procs, pid)
        node.jobs.adopt(root, uid)
        os.kill(root, signal.SIGKILL)
        wait_until(node.jobs.reap, 10, "its end")
        assert all(place.exists() for place in places)
        os.kill(child, signal.SIGKILL)
        wait_until(gone, 10, "the end of its place")
    finally:
        for pid in cgroup.members(uid):
            os.kill(pid, signal.SIGKILL)


class Dumps(Restored):
    """Of which only the root is in the image."""

    def __init__(self, root: int) -> None:
        super().__init__()
        self.root = root

    def dump(self, pid: int, images: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        return DumpStats(pages_written=0, freezing_ns=1, frozen_ns=2)

    def tasks(self, images: Path) -> list[TaskFacts]:
        return [TaskFacts(pid=self.root)]


def test_who_has_left_the_tree_and_is_not_saved_is_not_killed_with_it(node: Node, tmp_path: Path) -> None:
    """He was there when it was looked at, and would be killed; where nobody is killed, or he has ended, it is no matter."""
    root = node.parent_of_a_living()
    (child,) = keeper.descendants(root)
    workload = ProcessWorkload(PROCESS, root, Dumps(root), node.children)
    assert {each.pid for each in workload.processes()} == {root, child}
    with socket.socket() as pages:
        ours = functools.partial(workload.dump, "main", tmp_path, pages)
        ours(CriuOptions(), Cancel())
        with pytest.raises(DumpFailed, match=f"process {child} has left"):
            ours(CriuOptions(leave_stopped=True), Cancel())
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not keeper.alive(child), 10, "its end")
        ours(CriuOptions(leave_stopped=True), Cancel())


# --- the place of a restore ---------------------------------------------------------------------------------------------------


def test_where_no_cgroup_can_be_made_a_failed_restore_is_known_by_pids_age_and_descent(node: Node) -> None:
    older, job = node.child(), node.job("other")
    wait_until(lambda: proc.now() > proc.start_time(job), 5, "the next tick of the clock")
    prepared = node.workloads.prepare(PROCESS, "")
    restored, another, later_job = node.child(), node.child(), node.job("later")
    try:
        prepared.kill([TaskFacts(pid=pid) for pid in (older, job, restored, later_job, os.getppid())])
    finally:
        prepared.discard()
    assert not keeper.fields(restored)
    assert all(keeper.alive(pid) for pid in (older, job, another, later_job, os.getppid()))


def test_a_helper_that_has_taken_a_pid_of_the_image_is_not_of_the_restore(node: Node) -> None:
    """The CRIU of another action's dump: killed, it may take its workload with it."""
    prepared = node.workloads.prepare(PROCESS, "")
    helper = node.children.spawn(["sleep", "60"])
    try:
        prepared.kill([TaskFacts(pid=helper.pid)])
        assert keeper.alive(helper.pid)
        assert keeper.state(helper.pid) != "T"
    finally:
        prepared.discard()
        helper.kill()
        node.children.wait(helper)


def test_a_zombie_has_its_pid_and_does_not_live(node: Node) -> None:
    """So nothing can be restored under it; and who looks for what may run on after a crash need not fear it."""
    parent = node.parent()
    (zombie,) = keeper.descendants(parent)
    tasks = [TaskFacts(pid=zombie), TaskFacts(pid=parent)]
    assert proc.facts(zombie).limits, "of him nothing is saved"
    first, second = node.workloads.blockers(tasks)
    assert (first[0], second[0]) == (zombie, parent)
    assert f"its parent {parent} has not waited for" in first[1]
    assert node.workloads.blockers(tasks, living=True) == [second]


def test_whether_a_name_is_free_can_be_asked_before(node: Node) -> None:
    node.job("trainer")
    job = WorkloadFacts(kind="job", name="trainer")
    for facts, name in ((job, ""), (PROCESS, "trainer")):
        with pytest.raises(Refused) as refused:
            node.workloads.insist_free(facts, name)
        assert refused.value.code == "name_taken"
    for facts, name in ((job, "another"), (PROCESS, ""), (WorkloadFacts(kind="process", name="trainer"), "")):
        node.workloads.insist_free(facts, name)


def test_a_restore_that_fails_leaves_no_log_and_no_name(node: Node) -> None:
    facts = WorkloadFacts(kind="job", name="trainer", uid="a-1", logs={"/old/place.log": "log"})
    prepared = node.workloads.prepare(facts, "")
    assert list(node.directory.iterdir())
    with pytest.raises(Refused):
        node.job("trainer")
    prepared.discard()
    prepared.discard()
    assert not list(node.directory.iterdir())
    node.job("trainer")


def test_a_restore_that_fails_leaves_the_log_of_the_job_that_was(node: Node) -> None:
    uid = node.jobs.run(spec("trainer")).uid
    node.jobs.stop("default", "trainer", "KILL")
    log = Path(node.jobs.log_path(uid))
    log.write_text("what it said")
    node.workloads.prepare(WorkloadFacts(kind="job", name="trainer", uid=uid, logs={str(log): "log"}), "").discard()
    assert log.read_text() == "what it said"


def test_a_restored_job_keeps_its_log_and_its_name(node: Node) -> None:
    facts = WorkloadFacts(kind="job", name="trainer", logs={"/old/place.log": "log"})
    prepared = node.workloads.prepare(facts, "")
    node.criu.pid = node.child()
    job = prepared.restore(Fetched({"main": node.directory}), CriuOptions(), Cancel(), lambda _: None).facts
    prepared.discard()
    assert [Path(path).exists() for path in job.logs] == [True]
    with pytest.raises(Refused):
        node.workloads.prepare(facts, "")


# --- the book -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_byte_can_be_written() -> Iterator[None]:
    """As on a full disk: files are made, and stay empty."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_job_that_cannot_be_written_down_does_not_run(node: Node) -> None:
    before = set(keeper.descendants(os.getpid()))
    with no_byte_can_be_written(), pytest.raises(OSError, match="File too large"):
        node.job("trainer")
    assert not set(keeper.descendants(os.getpid())) - before
    assert not list(node.directory.iterdir())
    node.job("trainer")


def test_a_program_that_cannot_be_started_leaves_nothing(node: Node) -> None:
    with pytest.raises(Refused) as refused:
        node.jobs.run(JobSpec(name="trainer", argv=["/nowhere/program"]))
    assert refused.value.code == "cannot_start"
    assert not list(node.directory.iterdir())
    node.job("trainer")


def test_of_many_who_want_one_name_at_once_one_gets_it(node: Node) -> None:
    count = 8
    together = threading.Barrier(count)

    def run(_: int) -> str:
        together.wait(10)
        try:
            return node.jobs.run(spec("trainer")).state
        except Refused as e:
            return e.code

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(run, range(count)))
    assert sorted(found) == ["name_taken"] * (count - 1) + ["running"]


def test_saving_and_reaping_at_once_never_break_a_page_of_the_book(node: Node) -> None:
    node.job("trainer")
    (job,) = node.jobs.all()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: node.jobs.save(replace(job, started_at=float(n))), range(200)))
    assert [found.uid for found in node.jobs.all()] == [job.uid]


def test_what_is_told_of_all_jobs_is_what_is_told_of_each(node: Node) -> None:
    program = "import os, time; os.fork(); time.sleep(60)"
    pair = node.jobs.run(JobSpec(name="pair", argv=[sys.executable, "-S", "-c", program]))
    wait_until(lambda: len(proc.tree(pair.pid)) == 2, 10, "its child")
    node.job("single")
    node.job("ended")
    node.jobs.stop("default", "ended", "KILL")
    told = node.workloads.views(None)
    assert [(view.name, view.state, view.processes) for view in told] == [
        ("pair", "running", 2), ("single", "running", 1), ("ended", "killed", 0),
    ]  # fmt: skip
    assert [bool(view.pid) and view.rss > 0 for view in told] == [True, True, False]
    again = [view for name in ("pair", "single", "ended") for view in node.workloads.views(Target(pod_name=name))]
    assert [view.model_copy(update={"rss": 0}) for view in again] == [view.model_copy(update={"rss": 0}) for view in told]


# --- the end of a job -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """Those up to 1023 are taken, as by a daemon that serves many."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while taken[-1] < 1024:
            taken.append(os.dup(taken[0]))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_job_is_asked_to_end_also_by_a_daemon_with_many_descriptors(node: Node, tmp_path: Path) -> None:
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('here', flush=True); time.sleep(60)"
    job = node.jobs.run(JobSpec(name="trainer", argv=[sys.executable, "-S", "-c", program]))
    wait_until(lambda: "here" in Path(node.jobs.log_path(job.uid)).read_text(), 10, "its handler")
    with many_descriptors():
        node.jobs.stop("default", "trainer", "TERM")
    (ended,) = node.jobs.all()
    assert ended.exit_code == 7, "by itself, within the time it is given"


def test_a_job_that_does_not_end_when_it_is_asked_is_killed(node: Node) -> None:
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    job = node.jobs.run(JobSpec(name="trainer", argv=[sys.executable, "-S", "-c", program]))
    wait_until(lambda: "here" in Path(node.jobs.log_path(job.uid)).read_text(), 10, "its handler")
    node.jobs.stop("default", "trainer", "TERM", grace=0.05)
    assert not keeper.alive(job.pid)
