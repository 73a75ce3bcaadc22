"""Addresses of networks, and of connections as the kernel writes them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from hibernode.drivers.workloads import network, proc
from hibernode.errors import Refused
from hibernode.ports import Endpoint

HERE: dict[str, Any] = {"linux": {"namespaces": [{"type": "network", "path": "/proc/self/ns/net"}]}}
NOWHERE = "192.0.2.1"  # an address of documents


def test_a_socket_needs_its_address_and_a_connection_only_if_it_is_kept() -> None:
    connection = Endpoint(NOWHERE, "192.0.2.2:80")
    network.insist_there("app", HERE, [Endpoint("127.0.0.1"), connection], kept=False)
    for sockets, said in (([connection], "a connection to 192.0.2.2:80"), ([Endpoint(NOWHERE)], "a socket")):
        with pytest.raises(Refused, match=said) as raised:
            network.insist_there("app", HERE, sockets, kept=True)
        assert (raised.value.code, raised.value.details["wanted"]) == ("no_address", NOWHERE)


@pytest.mark.parametrize("path", ["", "/proc/0/ns/net"])
def test_what_cannot_be_looked_into_is_left_to_criu(path: str) -> None:
    spec = {"linux": {"namespaces": [{"type": "network", "path": path}]}}
    network.insist_there("app", spec, [Endpoint(NOWHERE)], kept=True)


ASKS = """
import os
from hibernode.drivers.workloads import proc
proc._FIRST = {here}
print(proc.facts({here}).nodes_network, proc.facts(os.getpid()).nodes_network)
"""


def test_who_is_in_the_nodes_network_is_known_to_a_daemon_that_has_another() -> None:
    """A process of this test stands in for the first of the machine, which may have rights that we have not."""
    asked = ASKS.format(here=os.getpid())
    for words, answer in ((["unshare", "--net"], ["True", "False"]), ([], ["False", "False"])):
        said = subprocess.run([*words, sys.executable, "-c", asked], capture_output=True, text=True, check=True, timeout=30)
        assert said.stdout.split() == answer


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1")]
)
def test_a_connection_is_the_same_from_both_ends(family: socket.AddressFamily, address: str) -> None:
    """Also where one end knows it by IPv4 and the other by IPv6."""
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1" if "." in address else address, port)) as one, listener.accept()[0] as other:
            ours = [proc.connections(os.getpid(), [(0, f"socket:[{os.fstat(each.fileno()).st_ino}]")]) for each in (one, other)]
    assert len(ours[0]) == len(ours[1]) == 1
    own, _, peer = ours[0][0].partition(" -> ")
    assert ours[1][0] == f"{peer} -> {own}"
    assert peer == (f"127.0.0.1:{port}" if "." in address else f"[::1]:{port}")
