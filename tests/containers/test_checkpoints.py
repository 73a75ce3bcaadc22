"""Containers and pods checkpointed by a real daemon, with real runc and containerd: all of a pod stand still together, and run on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.workloads import freezer
from tests.containers import images
from tests.containers.containerd import STATES, Containerd
from tests.containers.pods import PORT, Pod, counter, shell
from tests.containers.runc import RuncContainer
from tests.daemon import Daemon, failed
from tests.keeper import wait_until

pytestmark = [pytest.mark.containers, pytest.mark.timeout(120)]


@pytest.fixture
def daemon(containerd: Containerd, disk: Path) -> Iterator[Daemon]:
    settings = {"containers": {"cri": containerd.address, "roots": [str(disk / "runc"), str(STATES)]}}
    with Daemon(settings=settings) as running:
        yield running


def ready(daemon: Daemon, target: pb.Target, **command: object) -> pb.Event:
    last = daemon.checkpoint(target, **command)[-1]
    assert last.status == "ready", last
    return last


def test_a_pod_is_checkpointed_by_its_uid_and_runs_on(containerd: Containerd, daemon: Daemon) -> None:
    with Pod(containerd, [counter(memory=16, port=PORT)]) as pod:
        before = pod.beat()
        event = ready(daemon, pb.Target(pod_id=pod.uid))
        after = pod.next_beat(pod.beat())
        assert (after.token, after.content) == (before.token, ("16", "whole"))
        assert pod.ask().token == before.token, "its network is not locked"
    manifest = daemon.manifest(event.checkpoint_id)
    workload = manifest["workload"]
    assert (workload["kind"], workload["uid"], workload["name"], workload["namespace"]) == (
        "pod",
        pod.uid,
        pod.name,
        pod.namespace,
    )
    assert [(each["name"], each["image"]) for each in workload["containers"]] == [("app", images.COUNTER)]
    (image,) = manifest["images"]
    assert (image["name"], image["tasks"][0]["pid"]) == ("app", 1)
    assert manifest["raw_bytes"] > 16 << 20
    assert 0 < manifest["pause_ns"] < 20e9


def test_all_containers_of_a_pod_stand_still_together(containerd: Containerd, daemon: Daemon) -> None:
    with Pod(containerd, [counter(name, memory=8) for name in ("a", "b", "c")], namespace="space") as pod:
        before = {name: pod.beat(name) for name in "abc"}
        event = ready(daemon, pb.Target(namespace="space", pod_name=pod.name))
        for name, first in before.items():
            assert pod.next_beat(pod.beat(name), name).token == first.token
    assert [image["name"] for image in daemon.manifest(event.checkpoint_id)["images"]] == ["a", "b", "c"]


def test_a_container_of_plain_runc_is_named_by_its_id(containerd: Containerd, daemon: Daemon, disk: Path) -> None:
    with RuncContainer(disk, containerd.images[images.COUNTER], ["/bin/counter", "-m", "16"]) as container:
        before = container.beat()
        event = ready(daemon, pb.Target(container=container.id))
        assert container.next_beat(container.beat()).token == before.token
        assert container.state["status"] == "running"
    manifest = daemon.manifest(event.checkpoint_id)
    assert (manifest["workload"]["kind"], manifest["workload"]["name"]) == ("container", container.id)


def test_two_pods_whose_names_share_a_prefix_are_two(containerd: Containerd, daemon: Daemon) -> None:
    with Pod(containerd, [counter()], name="train") as one, Pod(containerd, [counter()], name="train-2") as two:
        for pod in (one, two):
            event = ready(daemon, pb.Target(pod_name=pod.name, namespace=pod.namespace))
            assert daemon.manifest(event.checkpoint_id)["workload"]["uid"] == pod.uid
        assert daemon.checkpoint(pb.Target(pod_name="trai", namespace=one.namespace))[-1].code == "not_found"


def test_a_pod_that_is_not_there_or_has_ended_is_not_found(containerd: Containerd, daemon: Daemon) -> None:
    with Pod(containerd, [counter()]) as pod:
        pod.beat()
        pod.stop("app")
        wait_until(lambda: pod.state() == "EXITED", 20, "its end")
        assert daemon.checkpoint(pb.Target(pod_id=pod.uid))[-1].code == "not_found"
    assert daemon.checkpoint(pb.Target(pod_id=pod.uid))[-1].code == "not_found"
    assert daemon.checkpoint(pb.Target(container="../../etc"))[-1].code == "not_found"


def test_a_paused_container_is_refused_and_stays_paused(containerd: Containerd, daemon: Daemon, disk: Path) -> None:
    with RuncContainer(disk, containerd.images[images.COUNTER]) as container:
        container.beat()
        container.runc("pause", container.id)
        event = daemon.checkpoint(pb.Target(container=container.id))[-1]
        assert (event.code, container.state["status"]) == ("paused", "paused")
        container.runc("resume", container.id)
        ready(daemon, pb.Target(container=container.id))


def test_a_stopped_process_is_refused_before_anybody_is_frozen(containerd: Containerd, daemon: Daemon) -> None:
    """CRIU would wait for it, with all of the pod frozen. Nobody else has to stop for it."""
    with Pod(containerd, [shell("app", "sleep 1000 & echo $! > /tmp/pid; kill -STOP $!; exec /bin/counter")]) as pod:
        before = pod.beat()
        assert daemon.checkpoint(pb.Target(pod_id=pod.uid))[-1].code == "stopped"
        daemon.insist_clean()
        assert pod.next_beat(before).token == before.token
        pod.exec("app", "sh", "-c", "kill -CONT $(cat /tmp/pid)")
        ready(daemon, pb.Target(pod_id=pod.uid))


def test_one_container_of_three_fails_and_all_three_run(containerd: Containerd, daemon: Daemon) -> None:
    """The second has a file open that was deleted, and is larger than a ghost file may be."""
    holds = "dd if=/dev/zero of=/tmp/big bs=1M count=2 2>/dev/null; exec 3</tmp/big; rm /tmp/big; exec /bin/counter"
    with Pod(containerd, [counter("a"), shell("b", holds), counter("c")]) as pod:
        before = {name: pod.beat(name) for name in "abc"}
        event = daemon.checkpoint(pb.Target(pod_id=pod.uid), criu_opts='{"ghost_limit": 1000}')[-1]
        assert (event.status, event.code) == ("error", "dump_failed")
        assert "'b'" in event.message
        for name, first in before.items():
            assert pod.next_beat(pod.beat(name), name).token == first.token
    assert not list(daemon.store_dir.glob("*/*"))


def test_established_connections_are_refused_or_closed_as_asked(containerd: Containerd, daemon: Daemon) -> None:
    with ExitStack() as stack:
        pod = stack.enter_context(Pod(containerd, [counter(port=PORT)]))
        pod.beat()
        client = stack.enter_context(socket.create_connection((pod.ip, PORT), timeout=10))
        client.sendall(b"?\n")
        assert client.recv(100)
        refused = daemon.checkpoint(pb.Target(pod_id=pod.uid))[-1]
        assert refused.code == "tcp_established"
        ready(daemon, pb.Target(pod_id=pod.uid), criu_opts='{"tcp": "close"}')
        client.sendall(b"?\n")
        assert client.recv(100), "the original keeps its connection"


def test_killed_after_ready_and_not_before(containerd: Containerd, daemon: Daemon, disk: Path) -> None:
    with RuncContainer(disk, containerd.images[images.COUNTER]) as container:
        container.beat()
        ready(daemon, pb.Target(container=container.id), criu_opts='{"leave_running": false}')
        wait_until(lambda: container.state["status"] == "stopped", 10, "its end")


def test_a_daemon_that_is_killed_in_a_dump_leaves_nobody_frozen(containerd: Containerd, daemon: Daemon, disk: Path) -> None:
    with RuncContainer(disk, containerd.images[images.COUNTER], ["/bin/counter", "-m", "200"]) as container:
        before = container.beat()
        place = _freezer(container)
        answers = daemon.begin_checkpoint(pb.Target(container=container.id))
        wait_until(lambda: freezer.is_frozen(place), 20, "the freezer")
        daemon.kill()
        del answers
        assert freezer.is_asked(place)
        daemon.start()
        wait_until(lambda: not freezer.is_asked(place), 20, "it to be let go")
        assert container.next_beat(before).token == before.token


def _freezer(container: RuncContainer) -> str:
    paths = json.loads((container.root / container.id / "state.json").read_bytes())["cgroup_paths"]
    return str(paths.get("freezer") or paths[""])


def test_a_watchdog_alone_lets_a_frozen_container_go(containerd: Containerd, daemon: Daemon, disk: Path) -> None:
    with RuncContainer(disk, containerd.images[images.COUNTER], ["/bin/counter", "-m", "200"]) as container:
        before = container.beat()
        place = _freezer(container)
        answers = daemon.begin_checkpoint(pb.Target(container=container.id))
        wait_until(lambda: freezer.is_frozen(place), 20, "the freezer")
        os.kill(daemon.pid, signal.SIGSTOP)
        daemon.kill()
        del answers
        wait_until(lambda: watched(daemon) and not freezer.is_asked(place), 20, "the watchdog to let it go")
        assert container.next_beat(before).token == before.token
        daemon.start()


def watched(daemon: Daemon) -> bool:
    words = [sys.executable, "-m", "hibernode", "watchdog", "--once", "--config", str(daemon.config)]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def freezer_of(pid: int) -> Path:
    """Its cgroup of version 1's freezer, or of version 2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    v1 = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup" and "freezer" in mount[3].split(",")]
    top = (*v1, *(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"))[0]
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return top / next(name.lstrip("/") for _, which, name in lines if which == ("freezer" if v1 else ""))


def test_what_the_daemon_lives_in_is_never_frozen(containerd: Containerd, daemon: Daemon) -> None:
    """As the pod of a DaemonSet, which a node that leaves might want to move: it would stand still for ever, and its watchdog with it."""
    with Pod(containerd, [counter(), counter("other")]) as pod:
        inside, outside = (freezer_of(pid) for pid in (pod.pid("other"), daemon.pid))
        try:
            (inside / "cgroup.procs").write_text(str(daemon.pid))
            for target in (pb.Target(pod_id=pod.uid), pb.Target(container=pod.ids["other"])):
                event = failed(daemon.checkpoint(target), "not_a_workload")
                assert "has the daemon in it" in event.message
        finally:
            (outside / "cgroup.procs").write_text(str(daemon.pid))
        assert ready(daemon, pb.Target(pod_id=pod.uid)).status == "ready"


def test_a_pod_of_a_kubelet_is_not_killed_because_it_would_be_started_anew(containerd: Containerd, daemon: Daemon) -> None:
    with Pod(containerd, [counter()], annotations={"kubernetes.io/config.source": "api"}) as pod:
        before = pod.beat()
        event = daemon.checkpoint(pb.Target(pod_id=pod.uid), criu_opts='{"leave_running": false}')[-1]
        assert event.code == "kubelet"
        assert pod.next_beat(before).token == before.token
        ready(daemon, pb.Target(pod_id=pod.uid))


@pytest.mark.parametrize("kind", ["simple", "rootfs"])
def test_who_was_brought_in_by_exec_stands_still_and_goes_on_with_its_connection(
    containerd: Containerd, daemon: Daemon, kind: str
) -> None:
    """As a kubelet runs a preStop command. It waits for an answer over TCP meanwhile, and has a child of its own."""
    with (
        Pod(containerd, [counter(image=images.BUSYBOX)]) as pod,
        socket.create_server(("", 0)) as server,
        ThreadPoolExecutor(1) as beside,
    ):
        before = pod.beat()
        server.settimeout(20)
        port = server.getsockname()[1]
        command = f"sleep 1000 & echo asked | nc {containerd.subnet[1]} {port}; kill $!; echo done"
        hook = beside.submit(pod.exec, "app", "sh", "-c", command)
        asking, _ = server.accept()
        with asking:
            event = ready(daemon, pb.Target(pod_id=pod.uid), kind=kind)
            assert not hook.done()
            assert pod.next_beat(pod.beat()).token == before.token
            asking.sendall(b"answer\n")
        assert hook.result(20) == "answer\ndone\n"
        (image,) = daemon.manifest(event.checkpoint_id)["images"]
        assert [task["pid"] for task in image["tasks"]] == [1], "it is not of the image"
