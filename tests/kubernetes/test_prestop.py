"""A pod of a real kubelet that is deleted: its preStop hook has it checkpointed first, within its grace period."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hibernode import pods
from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.kubernetes import Kubernetes
from hibernode.errors import NotFound
from tests.containers.containerd import STATES
from tests.containers.images import COUNTER
from tests.daemon import Daemon
from tests.keeper import wait_until
from tests.kubernetes.cluster import NODE, Cluster
from tests.kubernetes.conftest import SOCKET
from tests.kubernetes.test_restore import last
from tests.nats_server import free_port
from tests.node.workload import beats
from tests.unit.test_chart import objects

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

HOOK_PORT = free_port()
GRACE = 30


@pytest.fixture(scope="module", autouse=True)
def handler(cluster: Cluster) -> None:
    cluster.make("/apis/node.k8s.io/v1/runtimeclasses", objects()["RuntimeClass", "hibernode"])


@pytest.fixture
def daemon(cluster: Cluster, tmp_path: Path) -> Iterator[Daemon]:
    (tmp_path / "token").write_text(cluster.token)
    settings = {
        "containers": {"cri": cluster.containerd.address, "roots": [str(STATES)], "socket": str(SOCKET)},
        "kubernetes": {
            "node_name": NODE,
            "api_server": cluster.url,
            "token_file": str(tmp_path / "token"),
            "ca_file": str(cluster.ca),
            "prestop": f"127.0.0.1:{HOOK_PORT}",
        },
    }
    with Daemon(settings=settings) as running:
        yield running


def manifest(name: str, namespace: str, containers: tuple[str, ...] = ("app",)) -> dict[str, Any]:
    hook = {"httpGet": {"host": "127.0.0.1", "port": HOOK_PORT, "path": f"/prestop/{namespace}/trainer"}}
    made = [
        {
            "name": each,
            "image": COUNTER,
            "imagePullPolicy": "Never",
            "command": ["/bin/counter", "-m", "16"],
            "lifecycle": {"preStop": hook},
        }
        for each in containers
    ]
    spec = {"nodeName": NODE, "terminationGracePeriodSeconds": GRACE, "containers": made}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": {"hibernode.io/prestop": "trainer"}},
        "spec": spec,
    }


def checkpoints(daemon: Daemon) -> list[pb.Action]:
    actions = daemon.stub.ListActions(pb.Empty(), timeout=10).actions
    return [action for action in actions if action.type == "checkpoint"]


def gone(client: Kubernetes, name: str, namespace: str) -> float:
    """Wait for its end; after how many seconds it came."""

    def there() -> bool:
        try:
            return bool(client.pod(namespace, name))
        except NotFound:
            return False

    began = time.monotonic()
    wait_until(lambda: not there(), GRACE * 2, f"the end of {name}")
    return time.monotonic() - began


def test_a_pod_that_is_deleted_is_checkpointed_first_and_comes_back(
    cluster: Cluster, client: Kubernetes, daemon: Daemon, namespace: str
) -> None:
    """Both of its containers have the hook: it is one checkpoint, and the kubelet waits for it with the SIGTERM of both."""
    made = cluster.run_pod(manifest("old", namespace, ("app", "beside")), namespace)
    bystander = cluster.run_pod(manifest("bystander", namespace), namespace)
    before = last(cluster, "old", namespace)
    saved = client.pod(namespace, "old").manifest
    client.delete(namespace, "old", uid=made["metadata"]["uid"])
    wait_until(lambda: [each.status for each in checkpoints(daemon)] == ["ready"], GRACE, "its checkpoint")
    gone(client, "old", namespace)
    (action,) = checkpoints(daemon)
    about = daemon.manifest(action.checkpoint_id)
    assert (about["reason"], about["workload"]["uid"]) == ("nodeTermination", made["metadata"]["uid"])
    assert [image["name"] for image in about["images"]] == ["app", "beside"]
    assert client.pod(namespace, "bystander", uid=bystander["metadata"]["uid"]).phase == "Running"

    new = pods.new_pod(saved["spec"], saved["metadata"], node=NODE, checkpoint_id=action.checkpoint_id, action_id="", name="new")
    assert new["metadata"]["annotations"]["hibernode.io/prestop"] == "trainer", "it will be asked for by the same hook"
    client.create(namespace, new)
    cluster.ready_pod("new", namespace)
    wait_until(lambda: cluster.log_lines("new", "app", namespace), 20, "a beat")
    assert {beat.token for beat in beats(cluster.log_lines("new", "app", namespace))} == {before.token}


def test_a_pod_whose_checkpoint_cannot_be_made_ends_all_the_same(
    cluster: Cluster, client: Kubernetes, daemon: Daemon, namespace: str
) -> None:
    made = cluster.run_pod(manifest("a", namespace), namespace)
    shutil.rmtree(daemon.store_dir, ignore_errors=True)
    daemon.store_dir.write_text("no directory")
    client.delete(namespace, "a", uid=made["metadata"]["uid"])
    assert gone(client, "a", namespace) < GRACE
    daemon.store_dir.unlink()
    (action,) = checkpoints(daemon)
    assert action.status == "error"


def test_a_hook_without_a_daemon_does_not_hold_its_pod(cluster: Cluster, client: Kubernetes, namespace: str) -> None:
    made = cluster.run_pod(manifest("a", namespace), namespace)
    client.delete(namespace, "a", uid=made["metadata"]["uid"])
    assert gone(client, "a", namespace) < GRACE
