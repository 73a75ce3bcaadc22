"""Managed jobs and what the daemon knows of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import keeper
from tests.daemon import Daemon, job_target, pb, ready
from tests.keeper import wait_until
from tests.node.workload import Program, beats, goes_on, python

pytestmark = pytest.mark.node


def test_how_a_job_ended_is_known_whoever_reaped_it(daemon: Daemon) -> None:
    daemon.run("killed", python("counter.py", 0.05))
    daemon.run("other", ["/bin/sh", "-c", "exit 3"])
    assert daemon.stub.StopJob(pb.StopRequest(name="killed", signal="KILL"), timeout=20).state == "killed"
    wait_until(lambda: daemon.jobs()["other"].state == "exited", 5, "the end of the other job")
    assert daemon.jobs()["killed"].state == "killed"


@pytest.mark.parametrize("signal_name", ["TERM", "KILL"])
def test_a_stopped_job_leaves_nothing_running(daemon: Daemon, signal_name: str) -> None:
    """Its root ends by TERM at once; a child does not listen to it, another has left the tree, and lives in the job's cgroup."""
    before = set(keeper.descendants(daemon.pid))
    moved = "until grep -q hibernode /proc/self/cgroup; do :; done"  # into its cgroup, by the daemon that started it
    daemon.run("family", ["/bin/sh", "-c", f"{moved}; (trap '' TERM; exec sleep 60) & (setsid sleep 60 &); wait"])
    root = daemon.jobs()["family"].pid

    def family() -> set[int]:
        return {pid for pid in keeper.descendants(daemon.pid) if keeper.alive(pid)} - before

    wait_until(lambda: sum(keeper.describe(pid).split()[2:] == ["sleep", "60"] for pid in family()) == 2, 10, "the family")
    wait_until(lambda: bool(family() - {root, *keeper.descendants(root)}), 10, "one that has left the tree")
    daemon.stub.StopJob(pb.StopRequest(name="family", signal=signal_name), timeout=20)
    assert not family()


def test_restored_processes_leave_no_cgroup_behind(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01)) as program:
        before = program.beat()
        done = ready(daemon.checkpoint(program.target))
        program.kill()
        ready(daemon.restore(done.checkpoint_id))
        places = [Path(line) for line in Path(f"/proc/{program.pid}/cgroup").read_text().split() if ":/hibernode/" in line]
        assert places, "it should have left the daemon's cgroups"
        goes_on(program, before)
        os.kill(program.pid, signal.SIGKILL)
        wait_until(lambda: not keeper.fields(program.pid), 5, "the daemon to reap its restored child")
    # the daemon's own exit in these tests looks whether the cgroups are gone


def test_jobs_outlive_the_daemon_and_the_next_one_knows_them(daemon: Daemon) -> None:
    """SIGTERM while idle: managed and restored jobs run on; the new daemon has them under their uid and pid, and can dump them."""
    job = daemon.run("managed", python("counter.py", 0.01))
    restored = daemon.run("restored", python("counter.py", 0.01))
    wait_until(lambda: beats(daemon.job_lines("restored")), 10, "a beat")
    done = ready(daemon.checkpoint(job_target("restored"), criu_opts={"leave_running": False}))
    ready(daemon.restore(done.checkpoint_id))
    identities = {name: keeper.identity(pid) for name, pid in (("managed", job.pid), ("restored", restored.pid))}
    before = {name: beats(daemon.job_lines(name))[-1] for name in identities}

    assert daemon.stop() == 0
    for name, (pid, _) in identities.items():
        assert keeper.identity(pid) == identities[name]
    daemon.start()

    for name, uid in (("managed", job.uid), ("restored", restored.uid)):
        known = daemon.jobs()[name]
        assert (known.uid, known.pid, known.state) == (uid, identities[name][0], "running")
        wait_until(lambda name=name: beats(daemon.job_lines(name))[-1].counter > before[name].counter, 10, "a later beat")
        assert beats(daemon.job_lines(name))[-1].token == before[name].token
        again = ready(daemon.checkpoint(job_target(name), criu_opts={"leave_running": False}))
        last = beats(daemon.job_lines(name))[-1]
        ready(daemon.restore(again.checkpoint_id))
        wait_until(lambda name=name, last=last: beats(daemon.job_lines(name))[-1].counter > last.counter, 10, "a restored beat")
        assert beats(daemon.job_lines(name))[-1].token == last.token
