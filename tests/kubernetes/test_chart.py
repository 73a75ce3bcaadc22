"""What the chart makes, before a real API server: that it takes all of it, and that the rights are enough and no more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hibernode.drivers.kubernetes import Kubernetes
from hibernode.errors import Refused
from tests.kubernetes.cluster import NODE, ApiError, Cluster
from tests.kubernetes.conftest import connected
from tests.kubernetes.test_client import manifest
from tests.unit.test_chart import EVERYTHING, objects

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

PLACES = {
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "ConfigMap": "/api/v1/namespaces/hibernode/configmaps",
    "DaemonSet": "/apis/apps/v1/namespaces/hibernode/daemonsets",
    "Deployment": "/apis/apps/v1/namespaces/hibernode/deployments",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/hibernode/networkpolicies",
    "RuntimeClass": "/apis/node.k8s.io/v1/runtimeclasses",
    "Service": "/api/v1/namespaces/hibernode/services",
    "ServiceAccount": "/api/v1/namespaces/hibernode/serviceaccounts",
}
RIGHTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")


@pytest.fixture(scope="module", autouse=True)
def installed(cluster: Cluster) -> None:
    """Namespace, accounts and rights."""
    cluster.namespace("hibernode")
    for (kind, _), each in objects().items():
        if kind in RIGHTS:
            cluster.make(PLACES[kind], each)


@pytest.fixture
def node_client(cluster: Cluster, tmp_path: Path) -> Iterator[Kubernetes]:
    """With the daemon's own account."""
    (tmp_path / "node").write_text(cluster.token_of("hibernode", "hibernode-node"))
    client = connected(cluster, tmp_path / "node")
    yield client
    client.close()


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_an_api_server_takes_all_of_it(cluster: Cluster, changes: dict[str, Any]) -> None:
    """It validates fields and values; what it does not know it drops, which is seen by what it gives back."""
    for (kind, name), each in objects(changes).items():
        if kind not in RIGHTS:
            assert lacks(cluster.api("POST", f"{PLACES[kind]}?dryRun=All", each), each) == [], (kind, name)


@pytest.mark.parametrize("of", ["hibernode-node", "hibernode-api"])
def test_the_pods_of_it_pass_admission(cluster: Cluster, of: str) -> None:
    """Priority class, account, privileges: nobody makes pods of a DaemonSet here."""
    template = next(
        each["spec"]["template"] for (_, name), each in objects().items() if name == of and "template" in each.get("spec", {})
    )
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **template["metadata"]}, "spec": template["spec"]}
    made = cluster.api("POST", "/api/v1/namespaces/hibernode/pods?dryRun=All", pod)
    tokens = [each["name"] for each in made["spec"]["volumes"] if each["name"].startswith("kube-api-access-")]
    assert bool(tokens) is (of == "hibernode-node")


def test_the_daemons_account_may_do_what_its_client_does(node_client: Kubernetes, namespace: str) -> None:
    made = node_client.create(namespace, manifest("a"))
    assert node_client.pod_by_uid(made.uid).name == "a"
    assert node_client.annotate(namespace, "a", {"x": "1"}, uid=made.uid).annotations == {"x": "1"}
    assert node_client.pod(namespace, "a").uid == made.uid
    node_client.delete(namespace, "a", uid=made.uid, grace=0)
    assert node_client.node(NODE).ready


def test_it_may_do_nothing_else(cluster: Cluster, namespace: str) -> None:
    token = cluster.token_of("hibernode", "hibernode-node")
    beyond = [
        ("GET", "/api/v1/secrets"),
        ("GET", f"/api/v1/namespaces/{namespace}/configmaps"),
        ("GET", "/api/v1/nodes"),
        ("PATCH", f"/api/v1/nodes/{NODE}"),
        ("DELETE", f"/api/v1/nodes/{NODE}"),
        ("DELETE", f"/api/v1/namespaces/{namespace}/pods"),  # all of them at once
        ("POST", f"/api/v1/namespaces/{namespace}/pods/a/exec"),
        ("POST", f"/api/v1/namespaces/{namespace}/pods/a/eviction"),
        ("GET", f"/api/v1/namespaces/{namespace}/pods/a/log"),
        ("POST", "/apis/rbac.authorization.k8s.io/v1/clusterroles"),
    ]
    for method, path in beyond:
        with pytest.raises(ApiError) as refused:
            cluster.api(
                method, path, {} if method in ("PATCH", "POST") else None, token=token, kind="application/merge-patch+json"
            )
        assert refused.value.status == 403, path


def test_the_control_planes_account_may_nothing(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    (tmp_path / "api").write_text(cluster.token_of("hibernode", "hibernode"))
    with pytest.raises(Refused, match="cannot get") as refused:
        connected(cluster, tmp_path / "api").pod(namespace, "a")
    assert refused.value.code == "kubernetes_rights"


def lacks(there: Any, wanted: Any, place: str = "") -> list[str]:
    """What of `wanted` is not in `there`, which may have more. Empty things are nothing."""
    if isinstance(wanted, dict):
        if not isinstance(there, dict):
            return [place] if wanted else []
        return [each for key, value in wanted.items() for each in lacks(there.get(key), value, f"{place}.{key}")]
    if isinstance(wanted, list):
        if not isinstance(there, list) or len(there) < len(wanted):
            return [place] if wanted else []
        return [each for i, value in enumerate(wanted) for each in lacks(there[i], value, f"{place}[{i}]")]
    return [] if there == wanted or not wanted else [f"{place}: {there!r}, not {wanted!r}"]
