"""The OCI runtime in front of runc under a real containerd: whatever fails or dies, ordinary containers are made, a container that could
not be restored says why, and nothing half restored is left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests.containers.containerd import STATES, Containerd
from tests.containers.pods import Container, Pod, counter
from tests.containers.restoring import ON_FAILURE, again, held, of, pod_failure, refused, restores, wait_held, wrappers
from tests.containers.test_checkpoints import ready, watched
from tests.daemon import Daemon
from tests.keeper import wait_until
from tests.node.workload import Beat

pytestmark = [pytest.mark.containers, pytest.mark.timeout(180)]

UNKNOWN = "00000000-0000-4000-8000-000000000000"


@contextmanager
def saved(node: Containerd, daemon: Daemon, containers: list[Container], **more: object) -> Iterator[tuple[Pod, dict[str, Beat]]]:
    """A pod that is to be the checkpoint of another one, which is gone, and has its sandbox already; the last beats of that."""
    with Pod(node, containers) as old:
        for each in containers:
            old.beat(each.name)
        made = again(node, daemon, old, containers, **more)  # type: ignore[arg-type]
        beats = {each.name: old.beat(each.name) for each in containers}
    made.run_sandbox()
    try:
        yield made, beats
    finally:
        made.remove()


@contextmanager
def starting(pod: Pod, container: Container) -> Iterator[list[str]]:
    """One container is being started meanwhile; afterwards, what was said of its failure (nothing: it has started)."""
    made, said = pod.create(container), list[str]()

    def start() -> None:
        with pod_failure() as why:
            pod.start(made)
        said.extend(why)

    def attempt() -> None:
        try:
            start()
        except AssertionError:
            return

    thread = threading.Thread(target=attempt)
    thread.start()
    try:
        yield said
    finally:
        thread.join(60)
        assert not thread.is_alive()


def nothing_left(pod: Pod) -> None:
    """Of containers that were not started: no state of runc, and nobody in their cgroups."""
    for container_id in pod.ids.values():
        wait_until(lambda each=container_id: not (STATES / each).exists(), 20, "runc to forget it")  # type: ignore[misc]
    here = f"pod{pod.uid}/"
    ids = [each for each in pod.ids.values() if each]
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            places = Path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            continue
        assert not any(f"{here}{each}" in places for each in ids), Path(f"/proc/{pid}/cmdline").read_bytes()


# --- nobody else is harmed ----------------------------------------------------------------------------------------------------


def test_without_a_daemon_everybody_runs_but_who_was_to_be_restored(node: Containerd) -> None:
    with Pod(node, [counter()], handler="hibernode") as pod:
        pod.next_beat(pod.beat())
    pod = of(node, UNKNOWN, [])
    pod.run_sandbox()
    assert "hibernode: cannot restore: the daemon does not answer" in refused(pod, counter())
    nothing_left(pod)
    pod.remove()


def test_started_fresh_where_the_pod_says_so(node: Containerd) -> None:
    with of(node, UNKNOWN, [counter()], {ON_FAILURE: "start-fresh"}) as pod:
        pod.next_beat(pod.beat())


# --- checkpoints that cannot be restored --------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_or_damaged_says_so_to_who_describes_the_pod(node: Containerd, restorer: Daemon) -> None:
    pod = of(node, UNKNOWN, [])
    pod.run_sandbox()
    said = refused(pod, counter())
    assert "hibernode: cannot restore:" in said
    assert UNKNOWN in said
    assert "(not_found)" in said
    pod.remove()
    with Pod(node, [counter(memory=4)]) as old:
        old.beat()
        event = ready(restorer, pb.Target(pod_id=old.uid))
    pages = max(restorer.store_dir.rglob("*pages*"), key=lambda file: file.stat().st_size)
    data = bytearray(pages.read_bytes())
    data[len(data) // 2] ^= 1
    pages.chmod(0o600)
    pages.write_bytes(data)
    pod = of(node, event.checkpoint_id, [])
    pod.run_sandbox()
    assert "(corrupt)" in refused(pod, counter(memory=4))
    nothing_left(pod)
    pod.remove()
    with of(node, event.checkpoint_id, [counter(memory=4)], {ON_FAILURE: "start-fresh"}) as fresh:
        fresh.next_beat(fresh.beat())
    assert restores(restorer)[:2] == ["not_found", "corrupt"]


# --- which containers -----------------------------------------------------------------------------------------------------------


def test_a_container_that_ends_is_started_fresh_the_next_time(node: Containerd, restorer: Daemon) -> None:
    with saved(node, restorer, [counter()]) as (pod, before):
        pod.start(pod.create(counter()))
        assert pod.next_beat(pod.beat()).token == before["app"].token
        wait_until(lambda: restores(restorer) == ["ready"], 20, "the restore to be told")
        pod.stop("app")
        pod.start(pod.create(counter(attempt=1)))
        assert pod.state() == "RUNNING"
        wait_until(lambda: pod.beat().token != before["app"].token, 20, "a new one")
        assert restores(restorer) == ["ready"]


def test_a_container_whose_restore_nobody_remembers_is_started_fresh(node: Containerd, restorer: Daemon) -> None:
    """It has ended long ago: a journal keeps a thousand actions."""
    notes = {"hibernode.io/action": "00000000-0000-4000-8000-00000000dead"}
    with of(node, "00000000-0000-4000-8000-000000000001", [counter()], notes) as pod:
        assert pod.beat().token
    assert restores(restorer) == []


def test_nobody_reads_in_his_namespace_what_was_saved_in_another(node: Containerd, restorer: Daemon) -> None:
    with Pod(node, [counter()], namespace="theirs") as old:
        before = old.beat()
        event = ready(restorer, pb.Target(pod_id=old.uid))
    pod = of(node, event.checkpoint_id, [], namespace="mine")
    pod.run_sandbox()
    assert "(other_pod)" in refused(pod, counter())
    pod.remove()
    with of(node, event.checkpoint_id, [counter()], namespace="theirs") as new:
        assert new.next_beat(new.beat()).token == before.token


def test_nobody_takes_the_place_of_a_container_of_another_pod(node: Containerd, restorer: Daemon) -> None:
    """Whoever names an action that goes on gets nothing of it, and does not end it."""
    two = [counter("a"), counter("b")]
    with Pod(node, two) as old:
        before = {name: old.beat(name) for name in ("a", "b")}
        event = ready(restorer, pb.Target(pod_id=old.uid))
    pod = of(node, event.checkpoint_id, [])
    pod.run_sandbox()
    pod.start(pod.create(counter("a")))
    (action,) = [each.action_id for each in restorer.stub.ListActions(pb.Empty(), timeout=10).actions if each.type == "restore"]
    thief = of(node, event.checkpoint_id, [], {"hibernode.io/action": action})
    thief.run_sandbox()
    assert "(other_pod)" in refused(thief, counter("b"))
    thief.remove()
    pod.start(pod.create(counter("b")))
    for name, beat in before.items():
        assert pod.next_beat(pod.beat(name), name).token == beat.token
    wait_until(lambda: restores(restorer) == ["ready"], 20, "the restore to be told")
    pod.remove()


def test_a_container_that_the_checkpoint_has_not_is_started(node: Containerd, restorer: Daemon) -> None:
    """Before, between and after those that it has; also when all of them are there, and the restore is not yet told."""
    with saved(node, restorer, [counter("b"), counter("d")]) as (pod, before):
        for name in "abcde":
            pod.start(pod.create(counter(name)))
        tokens = {name: pod.next_beat(pod.beat(name), name).token for name in "abcde"}
        assert {name: token for name, token in tokens.items() if name in "bd"} == {name: before[name].token for name in "bd"}
        assert len(set(tokens.values())) == 5
        wait_until(lambda: restores(restorer) == ["ready"], 20, "the restore to be told")


def test_a_container_that_never_comes_ends_the_restore_of_the_others(node: Containerd, restorer: Daemon) -> None:
    with saved(node, restorer, [counter("a"), counter("missing")]) as (pod, before):
        pod.start(pod.create(counter("a")))
        assert pod.next_beat(pod.beat("a"), "a").token == before["a"].token
        wait_until(lambda: restores(restorer) == ["deadline"], 40, "the deadline")
        last = restorer.stub.ListActions(pb.Empty(), timeout=10).actions[-1].last
        assert "missing" in last.message
        wait_until(lambda: pod.state("a") == "EXITED", 20, "its end")
        said = refused(pod, counter("a", attempt=1))
        assert "missing (deadline)" in said


# --- who dies ---------------------------------------------------------------------------------------------------------------------


def test_a_shim_that_gives_up_while_its_runtime_waits_may_try_again(node: Containerd, restorer: Daemon) -> None:
    with saved(node, restorer, [counter()]) as (pod, before):
        os.kill(restorer.pid, signal.SIGSTOP)
        try:
            with starting(pod, counter()) as said:
                wait_until(lambda: bool(wrappers(pod, "app")), 20, "the runtime")
                for pid in wrappers(pod, "app"):
                    os.kill(pid, signal.SIGKILL)
        finally:
            os.kill(restorer.pid, signal.SIGCONT)
        assert said
        nothing_left(pod)
        pod.start(pod.create(counter(attempt=1)))
        assert pod.next_beat(pod.beat()).token == before["app"].token
        wait_until(lambda: "ready" in restores(restorer), 20, "the restore to be told")


@pytest.mark.parametrize("verb", ["restore", "pause"])
def test_a_runtime_that_is_killed_in_a_restore_leaves_nothing(node: Containerd, restorer: Daemon, verb: str) -> None:
    with saved(node, restorer, [counter()]) as (pod, _):
        with held(verb) as hold, starting(pod, counter()) as said:
            wait_held(hold)
            for pid in wrappers(pod, "app"):
                os.kill(pid, signal.SIGKILL)
        assert said
        wait_until(lambda: restores(restorer) == ["restore_failed"], 20, "the restore to fail")
        nothing_left(pod)


@pytest.mark.parametrize("verb", ["restore", "pause"])
def test_what_is_restored_while_its_daemon_dies_does_not_run(node: Containerd, restorer: Daemon, verb: str) -> None:
    with saved(node, restorer, [counter()]) as (pod, before):
        with held(verb) as hold, starting(pod, counter()) as said:
            wait_held(hold)
            restorer.kill()
            hold.unlink()
        assert "the daemon does not answer" in said[0]
        nothing_left(pod)
        restorer.start()
        assert restores(restorer) == ["interrupted"]
        pod.start(pod.create(counter(attempt=1)))
        assert pod.next_beat(pod.beat()).token == before["app"].token, "it is tried again"
        wait_until(lambda: restores(restorer) == ["interrupted", "ready"], 20, "the restore to be told")


@pytest.mark.parametrize("gently", [True, False])
def test_a_daemon_that_starts_anew_ends_what_was_half_restored(node: Containerd, restorer: Daemon, gently: bool) -> None:
    """Three containers: one runs, one is about to, the third was not made. One that is stopped gives the restore its time."""
    three = [counter("a"), counter("b"), counter("c")]
    with saved(node, restorer, three) as (pod, before):
        pod.start(pod.create(counter("a")))
        assert pod.next_beat(pod.beat("a"), "a").token == before["a"].token
        with held("resume") as hold, starting(pod, counter("b")):
            wait_held(hold)
            pids = [pod.pid("a")]
            if gently:
                restorer.stop()
            else:
                restorer.kill()
            hold.unlink()
        restorer.start()
        wait_until(lambda: pod.state("a") == "EXITED", 20, "the end of the first")
        wait_until(lambda: pod.state("b") == "EXITED", 20, "the end of the second")
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        assert restores(restorer) == ["deadline" if gently else "interrupted"]


def test_a_watchdog_alone_ends_what_was_half_restored(node: Containerd, restorer: Daemon) -> None:
    with saved(node, restorer, [counter("a"), counter("b")]) as (pod, before):
        pod.start(pod.create(counter("a")))
        assert pod.next_beat(pod.beat("a"), "a").token == before["a"].token
        restorer.kill()
        wait_until(lambda: watched(restorer) and pod.state("a") == "EXITED", 20, "its end")
        restorer.start()
        assert restores(restorer) == ["interrupted"]
