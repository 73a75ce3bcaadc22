"""One cluster for all tests, since it takes a quarter of a minute; each test has a namespace of its own."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode import config
from hibernode.drivers.kubernetes import Kubernetes
from tests.containers.containerd import ROOT
from tests.kubernetes.cluster import Cluster

RUN = Path(f"/run/hibernode-test-{os.getpid()}")
SOCKET = RUN / "runtime.sock"
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Its containerd has the runtime handler `hibernode`, which asks at `SOCKET`."""
    with Cluster(wrapper=ROOT / "runtime/hibernode_runc.py", env={"HIBERNODE_RUNTIME_SOCKET": str(SOCKET)}) as running:
        yield running
    shutil.rmtree(RUN, ignore_errors=True)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    yield cluster.namespace(f"test-{next(_numbers)}")
    assert not (left := cluster.remove_pods()), left


@pytest.fixture
def client(cluster: Cluster, tmp_path: Path) -> Iterator[Kubernetes]:
    """With every right."""
    (tmp_path / "token").write_text(cluster.token)
    client = connected(cluster, tmp_path / "token")
    yield client
    client.close()


def connected(cluster: Cluster, token_file: Path) -> Kubernetes:
    return Kubernetes(config.Kubernetes(api_server=cluster.url, token_file=str(token_file), ca_file=str(cluster.ca)))
