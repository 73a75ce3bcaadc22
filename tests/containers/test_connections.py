"""Established TCP connections that are to be kept (`{"tcp": "established"}`): with everything that was on its way, or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import BinaryIO

import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.workloads import proc
from tests import keeper
from tests.containers.containerd import STATES, Containerd
from tests.containers.images import COUNTER
from tests.containers.pods import PORT, Container, Pod, counter
from tests.containers.restoring import again, of, refused, restores
from tests.containers.test_checkpoints import ready
from tests.daemon import Daemon
from tests.keeper import wait_until
from tests.node.workload import Beat, beats

pytestmark = [pytest.mark.containers, pytest.mark.timeout(180)]

KEPT, CLOSED = '{"tcp": "established"}', '{"tcp": "close"}'
ENDS = ("sends", "receives")
LIBC, PIDFD_GETFD, TCP_REPAIR = ctypes.CDLL(None), 438, 19  # of every architecture; include/uapi/linux/tcp.h


def stream(name: str, *words: object) -> Container:
    """One end of a connection, or both, as `programs/stream.c` says."""
    return Container(name, COUNTER, ["/bin/stream", *map(str, words)])


def last(pod: Pod, end: str, name: str = "app") -> Beat:
    def said() -> list[Beat]:
        return [beat for beat in beats(pod.lines(name)) if beat.content[1] == end]

    wait_until(lambda: bool(said()), 20, f"a beat of the end that {end}")
    return said()[-1]


def goes_on(pod: Pod, end: str, name: str = "app") -> Beat:
    """Half a megabyte more goes through it, and nothing is wrong."""
    before = last(pod, end, name)
    wait_until(lambda: last(pod, end, name).counter >= before.counter + 512, 20, f"the end that {end} to go on after {before}")
    after = last(pod, end, name)
    assert (after.token, after.content[0]) == (before.token, "whole")
    return after


def test_a_connection_within_a_container_is_kept_with_all_that_was_on_its_way(node: Containerd, restorer: Daemon) -> None:
    pair = [stream("app", "pair", PORT)]
    with Pod(node, pair) as old:
        for end in ENDS:
            goes_on(old, end)
        assert last(old, "sends").counter > last(old, "receives").counter + 1024, "the buffers are full"
        made = again(node, restorer, old, pair, KEPT)
        before = {end: goes_on(old, end) for end in ENDS}
    with made as new:
        for end, beat in before.items():
            assert goes_on(new, end).token == beat.token
        wait_until(lambda: restores(restorer) == ["ready"], 20, "the restore to be told")


def test_a_connection_between_two_containers_is_refused_before_anybody_is_frozen(node: Containerd, restorer: Daemon) -> None:
    two = [stream("a", "serve", PORT), stream("b", "dial", "127.0.0.1", PORT)]
    with Pod(node, two) as old:
        goes_on(old, "receives", "a")
        event = restorer.checkpoint(pb.Target(pod_id=old.uid), criu_opts=KEPT)[-1]
        assert (event.status, event.code) == ("error", "tcp_peer")
        alone = restorer.checkpoint(pb.Target(container=old.ids["b"]), criu_opts=KEPT)[-1]
        assert alone.code == "tcp_peer", "nor is one whose other end is in no image at all"
        restorer.insist_clean()
        goes_on(old, "receives", "a")
        goes_on(old, "sends", "b")
        made = again(node, restorer, old, two, CLOSED)
    with made as new:
        assert [last(new, end, name).content[0] for end, name in zip(ENDS, "ba", strict=True)] == ["closed", "closed"]


def test_a_connection_with_the_world_is_kept_on_the_same_address_alone(node: Containerd, restorer: Daemon) -> None:
    """Of a pod whose network went before it was killed, since who is killed says goodbye; and with a peer that is silent meanwhile: the new
    pod has its address before it has its processes, and tells who asks that there is no such connection."""
    one = [counter(port=PORT)]
    node.count_addresses_anew()
    ports = set(node.ports())
    old = Pod(node, one)
    old.run()
    try:
        before, address = old.beat(), old.ip
        with socket.create_connection((address, PORT), timeout=60) as client:
            client.sendall(b"?\n")
            assert beats([client.recv(200).decode()])[0].token == before.token
            event = ready(restorer, pb.Target(pod_id=old.uid), criu_opts=KEPT)
            (port,) = set(node.ports()) - ports
            subprocess.run(["ip", "link", "set", port, "down"], check=True)
            elsewhere = of(node, event.checkpoint_id, [])
            elsewhere.run_sandbox()
            assert elsewhere.ip != address
            said = refused(elsewhere, one[0])
            assert "(no_address)" in said
            assert '{"tcp": "close"}' in said
            wait_until(lambda: restores(restorer) == ["no_address"], 20, "the restore to be told")
            assert not (STATES / elsewhere.ids["app"]).exists(), "nothing of it is left"
            elsewhere.remove()
            old.remove()
            node.count_addresses_anew()
            with of(node, event.checkpoint_id, one) as new:
                assert new.ip == address
                client.sendall(b"?\n")
                assert beats([client.recv(200).decode()])[0].token == before.token
                assert new.ask().token == before.token
    finally:
        old.remove()
    with of(node, event.checkpoint_id, one, {"hibernode.io/criu-opts": CLOSED}) as new:
        assert new.ask().token == before.token, "closed, if the new pod says so"


@pytest.mark.parametrize("who", ["criu", "both"])
def test_a_criu_that_is_killed_leaves_no_network_closed(node: Containerd, restorer: Daemon, who: str) -> None:
    """Nor a socket in repair; also where its daemon dies with it. Whether the processes go on is another matter: one in which the CRIU had
    code of its own may not (docs/crashes.md)."""
    with Pod(node, [stream("app", "pair", PORT), counter("large", memory=64)]) as pod, contextlib.ExitStack() as stack:
        goes_on(pod, "receives")
        pod.beat("large")
        app = pod.pid()
        network = stack.enter_context(open(f"/proc/{app}/ns/net", "rb"))  # of a pod whose processes may be gone soon
        is_closed = functools.partial(closed_by_criu, network)
        answers = restorer.begin_checkpoint(pb.Target(pod_id=pod.uid), criu_opts=KEPT)
        wait_until(lambda: killed_while(is_closed, restorer), 20, "CRIU to close the network")
        if who == "both":
            restorer.kill()
            del answers
            restorer.start()
        else:
            assert [answer.event.code for answer in answers][-1] == "dump_failed"
        wait_until(lambda: not is_closed(), 20, "it to be opened")
        wait_until(lambda: not in_repair(app), 20, "its sockets to leave repair")


def in_repair(pid: int) -> list[str]:
    """Its TCP sockets, and its children's, that send nothing and take nothing. Who has ended has none."""
    found = []
    for each in filter(keeper.alive, (pid, *keeper.descendants(pid))):
        pidfd = os.pidfd_open(each)
        for name in os.listdir(f"/proc/{each}/fd"):
            copy = LIBC.syscall(PIDFD_GETFD, pidfd, int(name), 0)
            if copy < 0:
                continue  # closed meanwhile
            try:
                with socket.socket(fileno=copy) as of:
                    if of.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR):
                        found.append(f"{each}: {name}")
            except OSError:  # none, or none of TCP
                with contextlib.suppress(OSError):
                    os.close(copy)
        os.close(pidfd)
    return found


def criu_of(daemon: Daemon) -> list[int]:
    """Its own ones, which runc has started, alone: others may be at work on this machine."""
    return [pid for pid in keeper.descendants(daemon.pid) if keeper.alive(pid) and proc.stat(pid).comm == "criu"]


def killed_while(is_closed: Callable[[], bool], daemon: Daemon) -> bool:
    """Its CRIU, if it has closed the network and not answered yet: it is looked at while it stands."""
    with contextlib.ExitStack() as going_on:
        standing = criu_of(daemon)
        for pid in standing:
            _send(pid, signal.SIGSTOP)
            going_on.callback(_send, pid, signal.SIGCONT)
            wait_until(functools.partial(_stands, pid), 20, "a CRIU to stand")
        if not standing or not is_closed():
            return False
        for pid in standing:
            _send(pid, signal.SIGKILL)
        going_on.pop_all()
    return True


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stands(pid: int) -> bool:
    return keeper.state(pid) in ("T", "t", "", "Z")


def closed_by_criu(network: BinaryIO) -> bool:
    words = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network.fileno()}"]
    return any(
        "CRIU" in subprocess.run([*words, f"{ip}-save"], capture_output=True, text=True, check=True).stdout
        for ip in ("iptables", "ip6tables")
    )
