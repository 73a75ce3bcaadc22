"""The book of jobs and the places of restores, with real processes and without CRIU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode.children import Children
from hibernode.drivers.workloads import proc, trees
from hibernode.drivers.workloads.process import Jobs, ProcessWorkloads
from hibernode.errors import Refused
from hibernode.model import JobSpec, TaskFacts, WorkloadFacts
from tests import keeper
from tests.keeper import wait_until

pytestmark = pytest.mark.timeout(30)

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
PROCESS = WorkloadFacts(kind="process", name="x")


class Node:
    """The driver, as a daemon holds it, on a directory of its own; and processes that descend from it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.children = directory, Children()
        self.jobs = Jobs(directory, self.children)
        self.workloads = ProcessWorkloads(self.jobs, self.children)
        self._started: list[tuple[int, int]] = []

    def child(self) -> int:
        pid = os.spawnv(os.P_NOWAIT, SLEEP[0], SLEEP)
        self._started.append((pid, proc.start_time(pid)))
        return pid

    def job(self, name: str) -> int:
        return self.jobs.run(JobSpec(name=name, namespace="default", argv=SLEEP, cwd="/", env={})).pid

    def end(self) -> None:
        for job in self.jobs.all():
            self.jobs.stop(job.namespace, job.name, "KILL")
        trees.kill(self._started, self.children)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "jobs")
    yield made
    made.end()


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


def test_whether_a_name_is_free_can_be_asked_before(node: Node) -> None:
    node.job("trainer")
    job = WorkloadFacts(kind="job", name="trainer")
    for facts, name in ((job, ""), (PROCESS, "trainer")):
        with pytest.raises(Refused) as refused:
            node.workloads.insist_free(facts, name)
        assert refused.value.code == "name_taken"
    for facts, name in ((job, "another"), (PROCESS, ""), (WorkloadFacts(kind="process", name="trainer"), "")):
        node.workloads.insist_free(facts, name)
