"""Pods that come back: as new pods, in new sandboxes, by the OCI runtime in front of runc; the old processes go on."""

from __future__ import annotations

import os
import socket
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hibernode._pb import cri_pb2 as cri_pb
from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.workloads import freezer, runc
from tests.containers import images
from tests.containers.containerd import STATES, Containerd
from tests.containers.pods import PORT, Container, Mount, Pod, counter, shell
from tests.containers.restoring import ON_FAILURE, SOCKET, WRAPPER, again, of, refused, restores
from tests.containers.runc import RuncContainer
from tests.containers.test_checkpoints import ready
from tests.daemon import Daemon
from tests.keeper import wait_until

pytestmark = [pytest.mark.containers, pytest.mark.timeout(180)]


def test_a_pod_comes_back_as_another_pod(node: Containerd, restorer: Daemon) -> None:
    with Pod(node, [counter(memory=16, port=PORT)]) as old:
        old.beat()
        made = again(node, restorer, old, [counter(memory=16, port=PORT)])
        before = old.next_beat(old.beat())
    with made as new:
        after = new.beat()
        assert (after.token, after.content) == (before.token, ("16", "whole"))
        assert new.next_beat(after).token == before.token
        assert new.ask().token == before.token, "it listens on its new address"
        assert new.uid != old.uid
        wait_until(lambda: restores(restorer) == ["ready"], 20, "the restore to be told")


@pytest.mark.parametrize("share", [False, True])
def test_three_containers_come_back_each_as_it_was(node: Containerd, restorer: Daemon, share: bool) -> None:
    three = [counter("a", port=PORT), counter("b", memory=8, port=PORT + 1), counter("c", image=images.BUSYBOX)]
    with Pod(node, three, share=share) as old:
        before = {name: old.beat(name) for name in "abc"}
        made = again(node, restorer, old, three, share=share)
        address = old.ip
    with made as new:
        for name, beat in before.items():
            after = new.next_beat(new.beat(name), name)
            assert (after.token, after.content) == (beat.token, beat.content)
            assert after.counter > beat.counter
        assert [new.ask(port).token for port in (PORT, PORT + 1)] == [before[name].token for name in "ab"]
        assert new.ip != address
        assert before["a"].token in new.exec("c", "sh", "-c", f"echo | nc 127.0.0.1 {PORT}"), "they share one network"
        assert new.exec("c", "ps").count("/bin/counter") == (3 if share else 1)
        for name in "abc":
            assert f"pod{new.uid}/{new.ids[name]}" in Path(f"/proc/{new.pid(name)}/cgroup").read_text()
        wait_until(lambda: restores(restorer) == ["ready"], 20, "the restore to be told")


def test_what_is_new_in_the_new_pod_is_seen_by_the_old_process(node: Containerd, restorer: Daemon, disk: Path) -> None:
    """The files that a kubelet mounts, a directory of the machine and the empty directory are the new pod's; the memory is the old."""
    (disk / "old").mkdir()
    (disk / "old/given").write_text("of the old pod")
    (disk / "new").mkdir()
    (disk / "new/given").write_text("of the new pod")
    script = "exec 3>>/scratch/kept; while :; do sleep 0.1; done"

    def two(place: str) -> list[Container]:
        return [counter("app"), shell("looks", script, mounts=[Mount(str(disk / place), "/given", readonly=True)])]

    with Pod(node, two("old"), name="first") as old:
        before = old.beat()
        old.exec("looks", "sh", "-c", "echo x >/scratch/old-file")
        made = again(node, restorer, old, two("new"), name="second")
        (made.kubelet / "scratch").mkdir(parents=True)
        (made.kubelet / "scratch/kept").touch()  # what was open there must be there
    with made as new:
        assert new.next_beat(new.beat()).token == before.token
        assert new.exec("looks", "cat", "/given/given") == "of the new pod"
        for path in ("/etc/hosts", "/var/run/secrets/kubernetes.io/serviceaccount/token"):
            assert new.uid in new.exec("looks", "cat", path)
            assert old.uid not in new.exec("looks", "cat", path)
        assert new.exec("looks", "ls", "/scratch").split() == ["kept"], "an emptyDir comes back empty"
        new.exec("looks", "sh", "-c", "echo farewell >/dev/termination-log")
        assert (new.kubelet / "termination-log").read_text() == "farewell\n"
        assert new.exec("looks", "hostname") == "first\n", "a caveat: it is part of the image"


def test_a_terminal_and_a_read_only_root_come_back(node: Containerd, restorer: Daemon) -> None:
    two = [
        shell("tty", "exec /bin/counter", tty=True, stdin=True),
        counter("app", image=images.BUSYBOX, security={"readonly_rootfs": True}),
    ]
    with Pod(node, two) as old:
        before = {name: old.beat(name) for name in ("tty", "app")}
        made = again(node, restorer, old, two)
    with made as new:
        for name, beat in before.items():
            assert new.next_beat(new.beat(name), name).token == beat.token
        assert os.readlink(f"/proc/{new.pid('tty')}/fd/1").startswith("/dev/pts/")
        assert "Read-only" in new.exec("app", "touch", "/x", check=False)


def test_a_seccomp_filter_comes_back_and_is_asked_for(node: Containerd, restorer: Daemon) -> None:
    """It is of the image, and compared with what the new pod wants: one that wants a filter gets no process without."""
    filtered = {"seccomp": cri_pb.SecurityProfile(profile_type=cri_pb.SecurityProfile.RuntimeDefault)}
    with Pod(node, [counter(security=filtered), counter("free")]) as old:
        before = {name: old.beat(name) for name in ("app", "free")}
        assert [seccomp(old.pid(name)) for name in ("app", "free")] == ["2", "0"]
        event = ready(restorer, pb.Target(pod_id=old.uid))
    with of(node, event.checkpoint_id, [counter(security=filtered), counter("free")]) as new:
        for name, beat in before.items():
            assert new.next_beat(new.beat(name), name).token == beat.token
        assert [seccomp(new.pid(name)) for name in ("app", "free")] == ["2", "0"]
    pod = of(node, event.checkpoint_id, [])
    pod.run_sandbox()
    assert "(privileges)" in refused(pod, counter("free", security=filtered))
    wait_until(lambda: restores(restorer)[-1] == "privileges", 20, "its end")
    pod.remove()


def seccomp(pid: int) -> str:
    """0: no filter, 2: one."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Seccomp:"))


def test_a_container_of_another_user_comes_back_where_its_limits_can_be_read(node: Containerd, restorer: Daemon) -> None:
    """CRIU reads them by prlimit(2), for which it needs CAP_SYS_RESOURCE: where this machine lacks it, that is said before anything is
    frozen."""
    user = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 1000}}
    able = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16) >> 24 & 1
    with Pod(node, [counter(image=images.BUSYBOX, security=user)]) as old:
        before = old.beat()
        event = restorer.checkpoint(pb.Target(pod_id=old.uid))[-1]
        assert (event.status, event.code) == (("ready", "ok") if able else ("error", "cap_sys_resource"))
        assert old.next_beat(before).token == before.token
    if able:
        with of(node, event.checkpoint_id, [counter(image=images.BUSYBOX, security=user)]) as new:
            assert new.next_beat(new.beat()).token == before.token
            assert os.stat(f"/proc/{new.pid()}").st_uid == 1000


def test_a_container_of_another_user_comes_back_in_a_user_namespace(node: Containerd, disk: Path) -> None:
    """Of which root is the owner: he may read limits there, without CAP_SYS_RESOURCE outside. A container of plain runc, since this
    containerd gives no pod a user namespace."""

    def container(name: str, **more: Any) -> RuncContainer:
        (disk / name).mkdir()
        return RuncContainer(disk / name, node.images[images.COUNTER], ["/bin/counter", "-m", "16"], user=1000, **more)

    settings = {"roots": [str(disk / "old/runc")], "socket": str(SOCKET)}
    with Daemon(settings={"containers": settings}) as daemon:
        with container("old") as old:
            assert os.stat(f"/proc/{old.pid}").st_uid == 1000
            event = ready(daemon, pb.Target(container=old.id))
            before = old.next_beat(old.beat())
        notes = {
            "hibernode.io/restore-from": event.checkpoint_id,
            "io.kubernetes.cri.container-name": old.id,
            "io.kubernetes.cri.sandbox-uid": str(uuid.uuid4()),
        }
        with container("new", annotations=notes, program=WRAPPER, env={"HIBERNODE_RUNTIME_SOCKET": str(SOCKET)}) as new:
            after = new.next_beat(new.beat())
            assert (after.token, after.content) == (before.token, ("16", "whole"))
            said = Path(f"/proc/{new.pid}/status").read_text().splitlines()
            assert {"Uid:\t1000\t1000\t1000\t1000", "Gid:\t1000\t1000\t1000\t1000"} <= set(said)
            assert os.readlink(f"/proc/{new.pid}/ns/user") != os.readlink("/proc/self/ns/user")
            wait_until(lambda: restores(daemon) == ["ready"], 20, "the restore to be told")


def test_redis_comes_back_with_its_keys(node: Containerd, restorer: Daemon) -> None:
    def cli(pod: Pod, *words: str) -> str:
        return pod.exec("redis", "redis-cli", *words, check=False)

    def facts(pod: Pod) -> list[str]:
        script = "local s = '' for i = 1, 1000 do s = redis.sha1hex(s .. redis.call('get', 'key' .. i)) end return s"
        run = [line for line in cli(pod, "info", "server").splitlines() if line.startswith("run_id:")]
        return [cli(pod, "dbsize"), cli(pod, "get", "planted"), cli(pod, "eval", script, "0"), *run]

    redis = [Container("redis", images.REDIS)]
    with Pod(node, redis) as old:
        wait_until(lambda: "PONG" in cli(old, "ping"), 20, "redis")
        cli(old, "eval", "for i = 1, 1000 do redis.call('set', 'key' .. i, i * i) end", "0")
        cli(old, "set", "planted", old.uid)
        before = facts(old)
        assert [before[0], before[1], len(before)] == ["1001\n", f"{old.uid}\n", 4]
        made = again(node, restorer, old, redis, '{"tcp": "close"}')
    with made as new:
        wait_until(lambda: "PONG" in cli(new, "ping"), 20, "redis")
        assert facts(new) == before


def test_connections_are_closed_in_the_new_pod_and_those_that_wait_are_taken(node: Containerd, restorer: Daemon) -> None:
    with Pod(node, [counter(port=PORT)]) as old, ExitStack() as stack:
        old.beat()  # it listens
        client = stack.enter_context(socket.create_connection((old.ip, PORT), timeout=10))
        client.sendall(b"?\n")
        assert client.recv(100)
        before = old.beat()
        made = again(node, restorer, old, [counter(port=PORT)], '{"tcp": "close"}')
    with made as new:
        assert new.ask().token == before.token
        assert new.next_beat(new.beat()).token == before.token


def test_what_was_restored_can_be_saved_and_restored_again(node: Containerd, restorer: Daemon) -> None:
    with Pod(node, [counter("a", port=PORT), counter("b")]) as first:
        before = {name: first.beat(name) for name in "ab"}
        made = again(node, restorer, first, [counter("a", port=PORT), counter("b")])
    with made as second:
        middle = {name: second.next_beat(second.beat(name), name) for name in "ab"}
        made = again(node, restorer, second, [counter("a", port=PORT), counter("b")])
    with made as third:
        for name in "ab":
            last = third.next_beat(third.beat(name), name)
            assert (last.token, last.content) == (before[name].token, before[name].content)
            assert last.counter > middle[name].counter
        assert third.ask().token == before["a"].token


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_container_with_a_seccomp_profile_comes_back_with_it(node: Containerd, restorer: Daemon, uid: int) -> None:
    """Also one that is not root: where the daemon may not read the limits of its processes it says so, and nobody was frozen."""
    profile = cri_pb.SecurityProfile(profile_type=cri_pb.SecurityProfile.RuntimeDefault)
    security = {"seccomp": profile, "run_as_user": {"value": uid}, "no_new_privs": True}
    container = counter(security=security)
    status = Path("/proc/self/status").read_text()
    capable = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16) >> 24 & 1
    with Pod(node, [container]) as old:
        before = old.beat()
        if uid and not capable:
            event = restorer.checkpoint(pb.Target(pod_id=old.uid))[-1]
            assert (event.status, event.code) == ("error", "cap_sys_resource")
            assert list(dict(event.details)["found"]) == [uid]
            assert not freezer.is_asked(runc.load(STATES, old.ids["app"]).freezer)
            assert old.next_beat(old.beat()).token == before.token
            restorer.insist_clean()
            return
        made = again(node, restorer, old, [container])
    with made as new:
        assert new.next_beat(new.beat()).token == before.token
        said = Path(f"/proc/{new.pid()}/status").read_text()
        for line in ("Seccomp:\t2", "NoNewPrivs:\t1", f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}"):
            assert line in said.splitlines()


# --- what does not fit the new pod ------------------------------------------------------------------------------------------


def test_a_pod_that_may_less_than_its_checkpoint_had_is_refused(node: Containerd, restorer: Daemon, disk: Path) -> None:
    """Nothing of it runs, and whoever describes the pod reads what is missing; a fresh one starts, if the pod says so."""
    (disk / "volume").mkdir()
    volume = [Mount(str(disk / "volume"), "/volume")]
    given = {"capabilities": {"add_capabilities": ["SYS_PTRACE"]}}
    with Pod(node, [counter(image=images.BUSYBOX, mounts=volume, security=given)]) as old:
        before = old.beat()
        event = ready(restorer, pb.Target(pod_id=old.uid))
    same = {"image": images.BUSYBOX, "mounts": volume, "security": given}
    for less, code, said in (
        ({"security": {}}, "privileges", "CAP"),
        ({"security": {**given, "no_new_privs": True}}, "privileges", "no_new_privs"),
        ({"security": {**given, "readonly_rootfs": True}}, "privileges", "mount /"),
        ({"security": {**given, "masked_paths": ["/proc/version"]}}, "container_mounts", "a mount at /proc/"),
        ({"mounts": []}, "container_mounts", "/volume"),
        ({"mounts": [Mount(str(disk / "volume"), "/volume", readonly=True)]}, "privileges", "mount /volume"),
        ({"image": images.COUNTER}, "container_image", "another image"),
    ):
        pod = of(node, event.checkpoint_id, [])
        pod.run_sandbox()
        why = refused(pod, counter(**{**same, **less}))
        assert f"({code})" in why, why
        assert said in why, why
        wait_until(lambda code=code: restores(restorer)[-1] == code, 20, "its end")  # type: ignore[misc]
        pod.remove()
    with of(node, event.checkpoint_id, [counter(image=images.BUSYBOX)], {ON_FAILURE: "start-fresh"}) as fresh:
        assert fresh.next_beat(fresh.beat()).token != before.token
    with of(node, event.checkpoint_id, [counter(**same)]) as new:  # type: ignore[arg-type]
        assert new.next_beat(new.beat()).token == before.token, "who may as much comes back"
