"""A kubelet's probes come when they like, also in the middle of a dump."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests.containers.containerd import STATES, Containerd
from tests.containers.pods import PORT, Pod, counter
from tests.containers.test_checkpoints import ready
from tests.daemon import Daemon

pytestmark = [pytest.mark.containers, pytest.mark.timeout(120)]


def test_a_connection_that_nobody_has_accepted_yet_does_not_keep_a_pod_from_being_saved(containerd: Containerd) -> None:
    """While a pod stands still the kernel takes connections for it."""
    settings = {"containers": {"cri": containerd.address, "roots": [str(STATES)]}}
    with Daemon(settings=settings) as daemon, Pod(containerd, [counter(port=PORT)]) as pod:
        before, done = pod.beat(), threading.Event()

        def probe() -> None:
            with contextlib.ExitStack() as held:
                while not done.wait(0.01):
                    held.enter_context(socket.create_connection((pod.ip, PORT), timeout=5)).close()

        prober = threading.Thread(target=probe)
        prober.start()
        try:
            ready(daemon, pb.Target(pod_id=pod.uid), criu_opts={"tcp": "close"})
        finally:
            done.set()
            prober.join()
        assert pod.next_beat(pod.beat()).token == before.token
