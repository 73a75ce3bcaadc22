"""A pod of a real kubelet is checkpointed by the daemon, and comes back as the pod that `new_pod` makes of what the API server had saved:
the same process, which the kubelet finds ready, not restarted."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hibernode import pods
from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.kubernetes import Kubernetes
from hibernode.pods import ACTION
from tests.containers.containerd import STATES
from tests.containers.images import COUNTER
from tests.containers.pods import PORT, ask
from tests.containers.test_checkpoints import ready
from tests.daemon import Daemon, failed
from tests.daemon import ready as ended
from tests.keeper import wait_until
from tests.kubernetes.cluster import NODE, ApiError, Cluster
from tests.kubernetes.conftest import SOCKET
from tests.kubernetes.test_chart import PLACES
from tests.node.workload import Beat, beats
from tests.unit.test_chart import objects

KILL = '{"leave_running": false}'
pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def handler(cluster: Cluster) -> None:
    cluster.make("/apis/node.k8s.io/v1/runtimeclasses", objects()["RuntimeClass", "hibernode"])


@pytest.fixture
def daemon(cluster: Cluster) -> Iterator[Daemon]:
    settings = {
        "containers": {"cri": cluster.containerd.address, "roots": [str(STATES)], "socket": str(SOCKET)},
        "kubernetes": {"node_name": NODE},
    }
    with Daemon(settings=settings) as running:
        yield running


def manifest(name: str, **spec: Any) -> dict[str, Any]:
    """As a person writes one."""
    container = {
        "name": "app",
        "image": COUNTER,
        "imagePullPolicy": "Never",
        "command": ["/bin/counter", "-m", "16", "-p", str(PORT)],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "livenessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1, "failureThreshold": 20},
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }
    body = {
        "nodeName": NODE,
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "nodeSelector": {"kubernetes.io/hostname": NODE},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "counter"}}, "spec": {**body, **spec}}


def last(cluster: Cluster, name: str, namespace: str) -> Beat:
    return beats(cluster.log_lines(name, "app", namespace))[-1]


def test_a_pod_comes_back_in_a_new_one(cluster: Cluster, client: Kubernetes, daemon: Daemon, namespace: str) -> None:
    old = cluster.run_pod(manifest("old"), namespace)
    tokens = [each["name"] for each in old["spec"]["volumes"] if each["name"].startswith("kube-api-access-")]
    assert tokens, "admission has mounted a token"
    event = ready(daemon, pb.Target(pod_id=old["metadata"]["uid"]))
    before = last(cluster, "old", namespace)
    saved = client.pod(namespace, "old").manifest
    client.delete(namespace, "old", uid=old["metadata"]["uid"])

    new = pods.new_pod(
        saved["spec"], saved["metadata"], node=NODE, checkpoint_id=event.checkpoint_id, action_id="", name="new"
    )  # the first of its containers begins the restore
    assert tokens[0] not in str(new)
    began = time.monotonic()
    client.create(namespace, new)
    found = cluster.ready_pod("new", namespace)
    print(f"ready after {time.monotonic() - began:.1f} s")
    assert [each["restartCount"] for each in found["status"]["containerStatuses"]] == [0]
    assert found["metadata"]["labels"] == {"app": "counter"}

    assert ask(found["status"]["podIP"], PORT).token == before.token, "it listens on its new address"
    after = last(cluster, "new", namespace)
    assert (after.token, after.content) == (before.token, ("16", "whole"))
    assert after.counter > before.counter
    assert {beat.token for beat in beats(cluster.log_lines("new", "app", namespace))} == {before.token}
    mounted = [each["mountPath"] for each in found["spec"]["containers"][0]["volumeMounts"]]
    assert sorted(mounted) == ["/scratch", "/var/run/secrets/kubernetes.io/serviceaccount"]


def test_a_restore_that_fails_makes_no_container(cluster: Cluster, client: Kubernetes, daemon: Daemon, namespace: str) -> None:
    """The kubelet is told, and says so of the pod; a pod that says so is started afresh."""
    body = manifest("a")
    none = "00000000-0000-4000-8000-000000000000"
    new = pods.new_pod(body["spec"], body["metadata"] | {"namespace": namespace}, node=NODE, checkpoint_id=none, action_id="")
    made = client.create(namespace, new)

    def why() -> str:
        waiting = [
            each["state"].get("waiting") or {} for each in cluster.pod("a", namespace)["status"].get("containerStatuses", ())
        ]
        return str(waiting)

    wait_until(lambda: "cannot restore" in why(), 60, "the kubelet to be told")
    assert "not_found" in why() or "no checkpoint" in why()
    assert cluster.log_lines("a", "app", namespace) == []
    client.delete(namespace, "a", uid=made.uid)
    new["metadata"]["name"] = "b"
    new["metadata"]["annotations"]["hibernode.io/on-failure"] = "start-fresh"
    cluster.run_pod(new, namespace)
    assert len(beats(cluster.log_lines("b", "app", namespace))) > 0


@pytest.fixture
def known(cluster: Cluster, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that knows the API server, as in the chart: with the rights of its account there, and no others."""
    cluster.namespace("hibernode")
    name = "hibernode-node"
    for kind in ("ClusterRole", "ServiceAccount", "ClusterRoleBinding"):
        cluster.make(PLACES[kind], objects()[kind, name])
    (tmp_path / "token").write_text(cluster.token_of("hibernode", "hibernode-node"))
    of = {"api_server": cluster.url, "token_file": str(tmp_path / "token"), "ca_file": str(cluster.ca), "node_name": NODE}
    containers = {"cri": cluster.containerd.address, "roots": [str(STATES)], "socket": str(SOCKET)}
    with Daemon(settings={"containers": containers, "kubernetes": of}) as running:
        yield running


def there(cluster: Cluster, name: str, namespace: str) -> bool:
    with contextlib.suppress(ApiError):
        return bool(cluster.pod(name, namespace))
    return False


def test_a_pod_is_ended_by_its_kubelet_and_made_anew_by_the_daemon(cluster: Cluster, known: Daemon, namespace: str) -> None:
    """It would be started anew, if it were killed otherwise. It comes back under its own name."""
    old = cluster.run_pod(manifest("job"), namespace)
    before = last(cluster, "job", namespace)
    began = time.monotonic()
    told = known.checkpoint(pb.Target(pod_id=old["metadata"]["uid"]), criu_opts=KILL)
    done = ended(told)
    print(f"checkpointed and ended after {time.monotonic() - began:.1f} s")
    wait_until(lambda: not there(cluster, "job", namespace), 30, "the end of the pod")
    failed(known.restore(done.checkpoint_id), "no_pod")  # nobody has said of what

    (pod_spec,) = {event.pod_spec for event in told} - {""}
    began = time.monotonic()
    made = ended(known.restore(done.checkpoint_id, pod_spec=pod_spec))
    print(f"restored after {time.monotonic() - began:.1f} s")
    new = cluster.ready_pod("job", namespace)
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert new["metadata"]["annotations"][ACTION] == made.action_id
    assert [each["restartCount"] for each in new["status"]["containerStatuses"]] == [0]
    wait_until(lambda: last(cluster, "job", namespace).counter > before.counter, 10, "it to go on")
    assert last(cluster, "job", namespace).content == ("16", "whole")
    assert {beat.token for beat in beats(cluster.log_lines("job", "app", namespace))} == {before.token}

    failed(known.restore(done.checkpoint_id, pod_spec=pod_spec), "pod_exists")
    assert there(cluster, "job", namespace), "it is another action's"


def test_a_pod_that_its_kubelet_does_not_run_is_not_waited_for(cluster: Cluster, known: Daemon, namespace: str) -> None:
    old = cluster.run_pod(manifest("a"), namespace)
    told = known.checkpoint(pb.Target(pod_id=old["metadata"]["uid"]))
    done = ended(told)
    saved = json.loads(next(event.pod_spec for event in told if event.pod_spec))
    saved["spec"]["nodeSelector"] = {"kind-of-node": "none"}
    began = time.monotonic()
    event = failed(known.restore(done.checkpoint_id, pod_spec=json.dumps(saved), pod_name="b"), "restore_failed")
    assert "its kubelet does not run the pod" in event.message
    assert time.monotonic() - began < 20
    wait_until(lambda: not there(cluster, "b", namespace), 30, "the end of the pod")
    assert last(cluster, "a", namespace).content == ("16", "whole")


def ends(cluster: Cluster, name: str, namespace: str) -> bool:
    """It is gone, or the server has noted that it is to go."""
    return not there(cluster, name, namespace) or "deletionTimestamp" in cluster.pod(name, namespace)["metadata"]


def test_a_daemon_that_dies_while_its_pod_is_being_made_leaves_none(cluster: Cluster, known: Daemon, namespace: str) -> None:
    old = cluster.run_pod(manifest("a"), namespace)
    told = known.checkpoint(pb.Target(pod_id=old["metadata"]["uid"]))
    done = ended(told)
    saved = json.loads(next(event.pod_spec for event in told if event.pod_spec))
    saved["spec"]["volumes"].append({"name": "none", "configMap": {"name": "none"}})  # which the kubelet waits for
    action = str(uuid.uuid4())
    command = pb.RestoreCommand(
        action_id=action, checkpoint_id=done.checkpoint_id, pod_spec=json.dumps(saved), overrides=pb.Overrides(pod_name="b")
    )
    updates = known.stub.Restore(command)
    wait_until(lambda: there(cluster, "b", namespace), 30, "the pod")
    known.kill()
    known.start()
    wait_until(lambda: ends(cluster, "b", namespace), 30, "the pod to be deleted")  # a kubelet waits for its volume
    assert known.stub.GetAction(pb.ActionId(action_id=action)).last.code == "interrupted"
    del updates
