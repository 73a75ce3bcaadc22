"""One containerd for all tests, since its start and its images take seconds; each test removes its pods."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode.drivers.workloads.cri import Cri
from tests.containers.containerd import STATES, Containerd, real_directory
from tests.containers.restoring import HOLD, RUNC, SOCKET, WRAPPER
from tests.daemon import Daemon
from tests.failing import failed, pytest_runtest_makereport  # noqa: F401 - pytest finds the hook here


@pytest.fixture(scope="session")
def shared_containerd() -> Iterator[Containerd]:
    with Containerd() as running:
        yield running


@pytest.fixture
def containerd(shared_containerd: Containerd, request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """A containerd without pods."""
    at = len(shared_containerd.log)
    yield shared_containerd
    if failed(request):
        print(f"--- containerd's log of this test:\n{shared_containerd.log[at:][-8000:]}")
        shared_containerd.remove_pods()
    assert not (left := shared_containerd.remove_pods()), left
    assert not (left := shared_containerd.leftovers()), left


@pytest.fixture
def cri(containerd: Containerd) -> Iterator[Cri]:
    """The daemon's own client of it."""
    client = Cri(containerd.address)
    yield client
    client.close()


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory that may hold what an overlay writes."""
    with tempfile.TemporaryDirectory(prefix="hn-", dir=real_directory()) as made:
        yield Path(made)


@pytest.fixture(scope="session")
def shared_node() -> Iterator[Containerd]:
    """With our runtime as handler `hibernode`, and a runc for it that a test can hold."""
    HOLD.mkdir()
    runc = HOLD / "held-runc"
    runc.write_text(RUNC.format(hold=HOLD))
    runc.chmod(0o755)
    try:
        with Containerd(wrapper=WRAPPER, env={"HIBERNODE_RUNTIME_SOCKET": str(SOCKET), "HIBERNODE_RUNC": str(runc)}) as running:
            yield running
    finally:
        shutil.rmtree(HOLD)


@pytest.fixture
def node(shared_node: Containerd, request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """A node for restores, without pods."""
    yield shared_node
    if failed(request):
        shared_node.remove_pods()
    assert not (left := shared_node.remove_pods()), left
    assert not (left := shared_node.leftovers()), left


@pytest.fixture
def restorer(node: Containerd) -> Iterator[Daemon]:
    """Its daemon; a restore waits 15 seconds for what does not come."""
    cri = {"cri": node.address, "roots": [str(STATES)], "socket": str(SOCKET)}
    with Daemon(settings={"containers": cri, "limits": {"restore": 15.0}}) as running:
        yield running
