"""Of a saved pod, the one that is made for its restore: what stays, what goes, and that a cluster would take it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hibernode import pods
from hibernode.errors import Refused

TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"

# As an API server 1.29 gives it for a pod of a Deployment with a GPU, a sidecar and a probe.
METADATA: dict[str, Any] = {
    "name": "trainer-7d9c6b5f4d-x2x7k",
    "generateName": "trainer-7d9c6b5f4d-",
    "namespace": "ml",
    "uid": "0f2a3e0e-5b0c-4a39-8a51-111111111111",
    "resourceVersion": "81231",
    "creationTimestamp": "2026-11-28T10:00:00Z",
    "deletionTimestamp": "2026-11-28T12:00:00Z",
    "deletionGracePeriodSeconds": 30,
    "labels": {"app": "trainer", "pod-template-hash": "7d9c6b5f4d"},
    "annotations": {
        "cni.projectcalico.org/podIP": "10.244.1.7/32",
        "cni.projectcalico.org/containerID": "ab" * 32,
        "kubectl.kubernetes.io/last-applied-configuration": "{}",
        "hibernode.io/heartbeat": "600",
        "hibernode.io/on-failure": "start-fresh",
        "hibernode.io/restore-from": "an-earlier-one",
        "hibernode.io/action": "an-earlier-action",
        "hibernode.io/store": "s3://elsewhere",
        "team": "vision",
    },
    "ownerReferences": [
        {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "trainer-7d9c6b5f4d", "uid": "1", "controller": True}
    ],
    "finalizers": ["example.com/wait"],
    "managedFields": [{"manager": "kubelet", "operation": "Update"}],
}
SPEC: dict[str, Any] = {
    "nodeName": "node-1",
    "serviceAccountName": "trainer",
    "serviceAccount": "trainer",
    "restartPolicy": "Always",
    "schedulerName": "default-scheduler",
    "priorityClassName": "high",
    "priority": 1000,
    "preemptionPolicy": "PreemptLowerPriority",
    "runtimeClassName": "nvidia",
    "overhead": {"cpu": "100m"},
    "terminationGracePeriodSeconds": 30,
    "securityContext": {"fsGroup": 1000},
    "nodeSelector": {"kubernetes.io/hostname": "node-1", "gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "initContainers": [
        {"name": "migrate", "image": "migrate:1", "volumeMounts": [{"name": "kube-api-access-abcde", "mountPath": TOKEN}]},
        {"name": "logs", "image": "logs:1", "restartPolicy": "Always", "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
    ],
    "containers": [
        {
            "name": "app",
            "image": "trainer:1",
            "resources": {"limits": {"nvidia.com/gpu": "1"}},
            "lifecycle": {"postStart": {"exec": {"command": ["/announce"]}}, "preStop": {"exec": {"command": ["/bye"]}}},
            "readinessProbe": {"httpGet": {"path": "/", "port": 80}},
            "volumeMounts": [
                {"name": "data", "mountPath": "/data"},
                {"name": "kube-api-access-abcde", "mountPath": TOKEN, "readOnly": True},
            ],
        },
        {"name": "web", "image": "web:1", "lifecycle": {"postStart": {"exec": {"command": ["/announce"]}}}},
    ],
    "ephemeralContainers": [{"name": "debugger", "image": "debug:1"}],
    "volumes": [
        {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "kube-api-access-abcde", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
    ],
}


def made(spec: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    options = {"node": "node-2", "checkpoint_id": "c-1", "action_id": "a-1", **options}
    return pods.new_pod(SPEC if spec is None else spec, METADATA if metadata is None else metadata, **options)


def with_spec(**fields: Any) -> dict[str, Any]:
    return {**SPEC, **fields}


def test_it_is_for_the_node_the_runtime_class_and_the_restore() -> None:
    pod = made()
    assert (pod["apiVersion"], pod["kind"]) == ("v1", "Pod")
    assert (pod["spec"]["nodeName"], pod["spec"]["runtimeClassName"]) == ("node-2", "hibernode")
    notes = pod["metadata"]["annotations"]
    assert (notes[pods.CHECKPOINT], notes[pods.ACTION]) == ("c-1", "a-1")
    assert pods.STORE not in notes, "the store of an earlier restore says nothing of this one"
    assert pods.CRIU_OPTS not in notes


def test_its_command_may_name_a_store_and_options() -> None:
    notes = made(store="s3://b/p", criu_opts="tcp=close")["metadata"]["annotations"]
    assert (notes[pods.STORE], notes[pods.CRIU_OPTS]) == ("s3://b/p", "tcp=close")


def test_of_its_metadata_stays_what_its_author_wrote() -> None:
    meta = made()["metadata"]
    assert meta == {
        "name": "trainer-7d9c6b5f4d-x2x7k",
        "namespace": "ml",
        "labels": {"app": "trainer"},
        "annotations": {
            "hibernode.io/heartbeat": "600",
            "hibernode.io/on-failure": "start-fresh",
            "team": "vision",
            pods.CHECKPOINT: "c-1",
            pods.ACTION: "a-1",
        },
    }


def test_it_may_have_another_name() -> None:
    assert made(name="trainer-back")["metadata"]["name"] == "trainer-back"


def test_what_the_server_writes_is_left_out_and_the_rest_stays() -> None:
    spec = made()["spec"]
    gone = {"ephemeralContainers", "priority", "preemptionPolicy", "overhead", "serviceAccount"}
    assert SPEC.keys() - spec.keys() == gone
    same = SPEC.keys() - gone - {"nodeName", "runtimeClassName", "nodeSelector", "volumes", "containers", "initContainers"}
    assert {key: spec[key] for key in same} == {key: SPEC[key] for key in same}
    assert "restartPolicy" in same
    assert "tolerations" in same


def test_a_gate_of_the_scheduler_is_left_out() -> None:
    assert "schedulingGates" not in made(with_spec(schedulingGates=[{"name": "wait"}]))["spec"]


def test_what_was_saved_is_not_changed() -> None:
    before = copy.deepcopy((SPEC, METADATA))
    made()
    assert before == (SPEC, METADATA)


# --- the token ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume", ["kube-api-access-abcde", "trainer-token-x7k2p"])
def test_the_token_that_admission_mounted_goes_with_its_mounts(volume: str) -> None:
    """Of this, and of servers before 1.21."""
    mount = {"name": volume, "mountPath": TOKEN}
    containers = [{"name": "app", "image": "i", "volumeMounts": [mount]}]
    spec = made(with_spec(containers=containers, volumes=[{"name": volume}], initContainers=[]))["spec"]
    assert "volumes" not in spec
    assert spec["containers"] == [{"name": "app", "image": "i", "volumeMounts": []}]


def test_volumes_of_its_author_stay_also_at_the_tokens_place() -> None:
    volumes = [{"name": "mine"}, {"name": "kube-api-access-mine", "emptyDir": {}}, {"name": "kube-api-access-abcde"}]
    mounts = [{"name": "mine", "mountPath": TOKEN}, {"name": "kube-api-access-mine", "mountPath": "/mine"}]
    mounts.append({"name": "kube-api-access-abcde", "mountPath": "/elsewhere"})
    spec = made(with_spec(containers=[{"name": "app", "volumeMounts": mounts}], volumes=volumes, initContainers=[]))["spec"]
    assert (spec["volumes"], spec["containers"][0]["volumeMounts"]) == (volumes, mounts)


# --- containers ---------------------------------------------------------------------------------------------------------------


def test_init_containers_that_are_done_are_left_out_and_sidecars_stay() -> None:
    assert [each["name"] for each in made()["spec"]["initContainers"]] == ["logs"]
    assert "initContainers" not in made(with_spec(initContainers=SPEC["initContainers"][:1]))["spec"]


def test_a_pod_can_say_that_its_init_containers_are_to_run_again() -> None:
    metadata = {**METADATA, "annotations": {pods.INIT: "keep"}}
    pod = made(metadata=metadata)
    assert [each["name"] for each in pod["spec"]["initContainers"]] == ["migrate", "logs"]
    assert pod["spec"]["initContainers"][0]["volumeMounts"] == []
    assert pod["metadata"]["annotations"][pods.INIT] == "keep", "it holds for the next restore, too"


def test_a_hook_that_has_been_run_is_not_run_again() -> None:
    app, web = made()["spec"]["containers"]
    assert app["lifecycle"] == {"preStop": {"exec": {"command": ["/bye"]}}}
    assert "lifecycle" not in web
    assert app["readinessProbe"] == SPEC["containers"][0]["readinessProbe"]
    assert app["resources"] == SPEC["containers"][0]["resources"]


# --- the old node -------------------------------------------------------------------------------------------------------------


def affinity(*terms: dict[str, Any], **others: Any) -> dict[str, Any]:
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": list(terms)}}
    return {"nodeAffinity": {**required, **others}}


HOST = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["node-1"]}
NAMED = {"key": "metadata.name", "operator": "In", "values": ["node-1"]}
GPU = {"key": "gpu", "operator": "Exists"}
PREFERRED = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": {"matchExpressions": [GPU]}}]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (affinity({"matchFields": [NAMED]}), None),
        (affinity({"matchExpressions": [HOST]}, {"matchExpressions": [GPU]}), None),
        (affinity({"matchExpressions": [HOST, GPU]}), affinity({"matchExpressions": [GPU]})),
        (affinity({"matchExpressions": [GPU], "matchFields": [NAMED]}), affinity({"matchExpressions": [GPU]})),
        (affinity({"matchFields": [NAMED]}, **PREFERRED), {"nodeAffinity": PREFERRED}),
        ({"podAntiAffinity": {}}, {"podAntiAffinity": {}}),
    ],
)
def test_what_named_the_old_node_goes_and_what_it_must_be_like_stays(
    before: dict[str, Any], after: dict[str, Any] | None
) -> None:
    spec = made(with_spec(affinity=before))["spec"]
    assert spec.get("affinity") == after
    assert spec["nodeSelector"] == {"gpu": "h100"}


# --- what is no pod -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "metadata", "options", "prop"),
    [
        ({}, None, {}, "containers"),
        ({"containers": []}, None, {}, "containers"),
        ({"containers": "app"}, None, {}, "containers"),
        ({"containers": [1]}, None, {}, "containers"),
        ({"containers": [{"name": "a", "volumeMounts": {}}]}, None, {}, "volumeMounts"),
        (None, {}, {}, "name"),
        (None, {"name": "a", "labels": ["x"]}, {}, "labels"),
        (None, {"name": "a", "annotations": {"x": 1}}, {}, "annotations"),
        (None, None, {"name": "Not/a/name"}, "name"),
        (None, None, {"name": "a" * 254}, "name"),
        (None, None, {"name": "a\n"}, "name"),
        (None, None, {"node": ""}, "node"),
    ],
)
def test_what_is_no_pod_is_refused(spec: Any, metadata: Any, options: dict[str, Any], prop: str) -> None:
    with pytest.raises(Refused) as refused:
        made(spec, metadata, **options)
    assert (refused.value.code, refused.value.details["property"]) == ("pod_spec", prop)
