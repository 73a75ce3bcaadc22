"""The daemon's client of the Kubernetes API against a real API server: what it promises, and what stub servers only claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hibernode import config, pods
from hibernode.drivers.kubernetes import Kubernetes
from hibernode.errors import KubernetesUnavailable, NotFound, Refused
from tests.containers.images import COUNTER
from tests.keeper import wait_until
from tests.kubernetes.cluster import NODE, Cluster

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    """A pod that nobody runs, unless `spec` has a node."""
    container = {"name": "app", "image": COUNTER, "imagePullPolicy": "Never", "args": []}
    body = {"containers": [container], "terminationGracePeriodSeconds": 1, **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "annotations": {}}, "spec": body}


def test_a_pod_is_made_read_annotated_and_deleted(client: Kubernetes, namespace: str) -> None:
    made = client.create(namespace, manifest("a"))
    found = client.pod(namespace, "a", uid=made.uid)
    assert (found.uid, found.name, found.namespace, found.node, found.phase) == (made.uid, "a", namespace, "", "Pending")
    client.annotate(namespace, "a", {"x": "1", "y": "2"}, uid=made.uid)
    assert client.annotate(namespace, "a", {"x": None}, uid=made.uid).annotations == {"y": "2"}
    client.delete(namespace, "a", uid=made.uid, grace=0)
    with pytest.raises(NotFound):
        client.pod(namespace, "a")
    client.delete(namespace, "a", uid=made.uid)


def test_another_pod_of_that_name_is_left_alone(client: Kubernetes, namespace: str) -> None:
    old = client.create(namespace, manifest("a"))
    client.delete(namespace, "a", uid=old.uid, grace=0)
    new = client.create(namespace, manifest("a"))
    client.delete(namespace, "a", uid=old.uid, grace=0)
    with pytest.raises(NotFound):
        client.annotate(namespace, "a", {"x": "1"}, uid=old.uid)
    with pytest.raises(NotFound):
        client.pod(namespace, "a", uid=old.uid)
    assert client.pod(namespace, "a").uid == new.uid
    assert client.pod(namespace, "a").annotations == {}


def test_a_pod_is_made_once_for_an_action(client: Kubernetes, namespace: str) -> None:
    body = manifest("a")
    body["metadata"]["annotations"] = {pods.ACTION: "act"}
    made = client.create(namespace, body)
    assert client.create(namespace, body).uid == made.uid
    for action in ({pods.ACTION: "another"}, {}):
        body["metadata"]["annotations"] = action
        with pytest.raises(Refused) as refused:
            client.create(namespace, body)
        assert refused.value.code == "pod_exists"


def test_a_pod_that_the_server_does_not_take_is_refused_with_its_words(client: Kubernetes, namespace: str) -> None:
    with pytest.raises(Refused, match="restartPolicy") as refused:
        client.create(namespace, manifest("a", restartPolicy="Sometimes"))
    assert refused.value.code == "pod_refused"
    with pytest.raises(Refused, match="RuntimeClass") as refused:
        client.create(namespace, manifest("a", runtimeClassName="nobody-has-it"))
    assert refused.value.code == "pod_refused", "the server says 403, as it does of rights"
    with pytest.raises(NotFound):
        client.create("no-such-namespace", manifest("a"))


def test_pods_are_found_by_uid_among_those_of_a_node(client: Kubernetes, cluster: Cluster, namespace: str) -> None:
    placed = client.create(namespace, manifest("placed", nodeName=NODE))
    waiting = client.create(namespace, manifest("waiting"))
    assert client.pod_by_uid(placed.uid, node=NODE).name == "placed"
    assert client.pod_by_uid(waiting.uid).name == "waiting"
    with pytest.raises(NotFound):
        client.pod_by_uid(waiting.uid, node=NODE)
    wait_until(lambda: client.pod(namespace, "placed").phase == "Running", 60, "the pod to run")
    client.delete(namespace, "placed", uid=placed.uid)
    assert client.pod(namespace, "placed").deleting, "it has been told, and has not gone"
    wait_until(lambda: not client.pods(node=NODE), 60, "its end")


def test_a_node_is_ready_and_can_be_cordoned(client: Kubernetes, cluster: Cluster) -> None:
    node = client.node(NODE)
    assert (node.name, node.ready, node.schedulable) == (NODE, True, True)
    assert node.labels["kubernetes.io/hostname"] == NODE
    path, kind = f"/api/v1/nodes/{NODE}", "application/merge-patch+json"
    cluster.api("PATCH", path, {"spec": {"unschedulable": True}}, kind=kind)
    assert not client.node(NODE).schedulable
    cluster.api("PATCH", path, {"spec": {"unschedulable": None}}, kind=kind)
    assert client.node(NODE).schedulable
    with pytest.raises(NotFound):
        client.node("node-2")


def test_a_login_that_is_none_and_a_ca_that_is_anothers(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("nobody's")
    settings = config.Kubernetes(api_server=cluster.url, token_file=str(tmp_path / "token"), ca_file=str(cluster.ca))
    with pytest.raises(Refused) as refused:
        Kubernetes(settings).pod("default", "a")
    assert refused.value.code == "kubernetes_rights"
    with pytest.raises(KubernetesUnavailable, match="certificate"):
        Kubernetes(settings.model_copy(update={"ca_file": ""})).pod("default", "a")
