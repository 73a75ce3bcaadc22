"""What a node asks of an API server for pods that it checkpoints and restores. That a real kubelet does it is asked in tests/kubernetes."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from hibernode.drivers.workloads import kubelet
from hibernode.drivers.workloads.kubelet import Kubelet
from hibernode.errors import Cancelled, KubernetesUnavailable, NotFound, Refused, RestoreFailed
from hibernode.model import POD_SPEC_LIMIT, Cancel, ContainerFacts, Overrides, RestoreCommand, WorkloadFacts
from hibernode.pods import ACTION, CHECKPOINT
from hibernode.ports import KubeNode, Pod

FACTS = WorkloadFacts(kind="pod", name="train", namespace="ml", uid="u-1", kubelet=True)
ID, OTHER = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"


class Cluster:
    """ports.Cluster, of pods by name: no kubelet, so that they stay as they are made."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.gone: list[tuple[str, float | None]] = []
        self.silent = False
        self.faults = 0  # calls that nobody answers, from now on
        self.schedulable = True

    def put(self, name: str, uid: str, *, deleting: bool = False, notes: Mapping[str, str] | None = None, **status: Any) -> Pod:
        metadata = {
            "namespace": "ml",
            "name": name,
            "uid": uid,
            "annotations": dict(notes or {}),
            "managedFields": [{"of": "them"}],
        }
        manifest = {"metadata": metadata, "spec": {"containers": [{"name": "a"}], "nodeName": "n1"}, "status": status}
        phase = status.get("phase", "Running")
        self.pods[name] = Pod("ml", name, uid, "n1", phase, deleting, dict(notes or {}), manifest)
        return self.pods[name]

    def pod(self, namespace: str, name: str, *, uid: str = "") -> Pod:
        self.faults -= 1
        if self.silent or self.faults >= 0:
            raise KubernetesUnavailable("nobody answers")
        found = self.pods.get(name)
        if found is None or namespace != "ml" or uid not in ("", found.uid):
            raise NotFound("no such pod")
        return found

    def create(self, namespace: str, manifest: Mapping[str, Any]) -> Pod:
        assert manifest["metadata"]["name"] not in self.pods
        meta = manifest["metadata"]
        return self.put(meta["name"], "u-new", notes=meta["annotations"])

    def delete(self, namespace: str, name: str, *, uid: str, grace: float | None = None) -> None:
        self.faults -= 1
        if self.silent or self.faults >= 0:
            raise KubernetesUnavailable("nobody answers")
        self.gone.append((uid, grace))

    def node(self, name: str) -> KubeNode:
        return KubeNode(name, True, self.schedulable, {})


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def command(cluster: Cluster, **changes: Any) -> RestoreCommand:
    cluster.put("train", "u-1")
    given = {"action_id": ID, "checkpoint_id": OTHER, "pod_spec": Kubelet(cluster, "n1").spec(FACTS), **changes}
    cluster.pods.clear()
    return RestoreCommand(**given)


def test_the_spec_is_what_the_server_says_but_for_who_wrote_it(cluster: Cluster) -> None:
    cluster.put("train", "u-1", notes={"a": "b"})
    found = json.loads(Kubelet(cluster, "n1").spec(FACTS))
    assert found["metadata"] == {"namespace": "ml", "name": "train", "uid": "u-1", "annotations": {"a": "b"}}
    assert found["spec"] == {"containers": [{"name": "a"}], "nodeName": "n1"}


def test_another_pod_of_that_name_is_not_the_one(cluster: Cluster) -> None:
    cluster.put("train", "u-2")
    with pytest.raises(NotFound):
        Kubelet(cluster, "n1").spec(FACTS)


KEPT = {"hibernode.io/init-containers": "keep"}


@pytest.mark.parametrize(
    ("container", "notes", "good"),
    [
        ("a", {}, True),
        ("side", {}, True),
        ("init", {}, False),
        ("init", {"hibernode.io/init-containers": "keep"}, True),
        ("debug", {}, False),
    ],
)
def test_who_would_be_in_no_restored_pod_is_refused_before_anybody_is_frozen(
    cluster: Cluster, container: str, notes: dict[str, str], good: bool
) -> None:
    pod = cluster.put("train", "u-1", notes=notes)
    spec = pod.manifest["spec"]
    spec["initContainers"] = [{"name": "init"}, {"name": "side", "restartPolicy": "Always"}]
    spec["ephemeralContainers"] = [{"name": "debug"}]
    facts = FACTS.model_copy(update={"containers": [ContainerFacts(name="a"), ContainerFacts(name=container)]})
    if good:
        assert json.loads(Kubelet(cluster, "n1").spec(facts))["spec"] == spec
        return
    with pytest.raises(Refused) as refused:
        Kubelet(cluster, "n1").spec(facts)
    assert (refused.value.code, refused.value.details["found"]) == ("pod_containers", container)


def test_a_spec_that_fits_into_no_message_is_not_told(cluster: Cluster) -> None:
    cluster.put("train", "u-1", notes={"long": "x" * POD_SPEC_LIMIT})
    assert Kubelet(cluster, "n1").spec(FACTS) == ""


def test_a_pod_is_made_for_the_action_on_this_node(cluster: Cluster) -> None:
    given = command(cluster, overrides=Overrides(pod_name="again"))
    kubelet = Kubelet(cluster, "n2")
    kubelet.insist_free(FACTS, given)
    made = kubelet.make(given, Cancel())
    assert (made.name, dict(made.annotations)) == ("again", {CHECKPOINT: OTHER, ACTION: ID})


def test_a_name_that_is_taken_is_refused_before_anything_is_fetched(cluster: Cluster) -> None:
    given = command(cluster)
    cluster.put("train", "u-2")
    with pytest.raises(Refused) as refused:
        Kubelet(cluster, "n1").insist_free(FACTS, given)
    assert (refused.value.code, refused.value.details["found"]) == ("pod_exists", "u-2")


@pytest.mark.parametrize(("deleting", "notes"), [(True, {}), (False, {ACTION: ID})], ids=["goes away", "was made before"])
def test_a_name_that_becomes_free_or_is_ours_is_not_taken(cluster: Cluster, deleting: bool, notes: Mapping[str, str]) -> None:
    given = command(cluster)
    cluster.put("train", "u-2", deleting=deleting, notes=notes)
    Kubelet(cluster, "n1").insist_free(FACTS, given)


def test_a_pod_that_goes_away_is_waited_for_unless_it_is_cancelled(cluster: Cluster) -> None:
    given, cancel = command(cluster), Cancel()
    cluster.put("train", "u-1", deleting=True)
    cancel.set("enough")
    with pytest.raises(Cancelled):
        Kubelet(cluster, "n1").make(given, cancel)
    assert [pod.uid for pod in cluster.pods.values()] == ["u-1"]


@pytest.mark.parametrize("spec", ["", "no JSON", "[]", "{}", '{"metadata":{},"spec":[]}', "[" * 100_000])
def test_what_is_no_spec_is_refused(cluster: Cluster, spec: str) -> None:
    given = command(cluster).model_copy(update={"pod_spec": spec})
    with pytest.raises(Refused, match="no pod can be made"):
        Kubelet(cluster, "n1").insist_free(FACTS, given)


@pytest.mark.parametrize(("key", "value"), [("namespace", "kube-system"), ("name", "other"), ("uid", "u-7")])
def test_the_spec_of_another_pod_is_refused(cluster: Cluster, key: str, value: str) -> None:
    given = command(cluster)
    saved = json.loads(given.pod_spec)
    saved["metadata"][key] = value
    with pytest.raises(Refused, match="of another pod"):
        Kubelet(cluster, "n1").insist_free(FACTS, given.model_copy(update={"pod_spec": json.dumps(saved)}))


def test_what_a_kubelet_says_of_a_pod(cluster: Cluster) -> None:
    kubelet = Kubelet(cluster, "n1")
    waiting = {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]}
    pod = cluster.put("a", "u-1", phase="Pending", **waiting)
    assert kubelet.look(pod) == "ImagePullBackOff: no such image"
    assert kubelet.look(cluster.put("a", "u-1", phase="Running", containerStatuses=[{"state": {"running": {}}}])) == ""
    cluster.put("a", "u-1", phase="Failed", reason="NodeAffinity", message="no")
    with pytest.raises(RestoreFailed, match="NodeAffinity: no"):
        kubelet.look(pod)
    cluster.put("a", "u-9")
    with pytest.raises(RestoreFailed, match="has been deleted"):
        kubelet.look(pod)


def test_a_pod_that_ends_is_waited_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubelet, "_LOOK", 0.01)
    looks = iter([False, False, True])
    Kubelet(cluster, "n1").end("ml", "train", "u-1", lambda: next(looks))
    assert cluster.gone == [("u-1", kubelet.GRACE)]
    assert next(looks, None) is None


def test_a_server_that_is_away_for_a_moment_is_asked_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod stands still meanwhile: killed otherwise, it would be started anew; and a restore has been fetched already."""
    monkeypatch.setattr(kubelet, "_AGAIN", 0.01)
    given = command(cluster)
    cluster.faults = 3
    Kubelet(cluster, "n1").end("ml", "train", "u-1", lambda: True)
    assert cluster.gone == [("u-1", kubelet.GRACE)]
    cluster.faults = 3
    assert Kubelet(cluster, "n1").make(given, Cancel()).uid == "u-new"


def test_a_server_that_stays_away_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubelet, "_AGAIN", 0.01)
    monkeypatch.setattr(kubelet, "ASK_LIMIT", 0.05)
    cluster.silent = True
    with pytest.raises(KubernetesUnavailable):
        Kubelet(cluster, "n1").end("ml", "train", "u-1", lambda: True)


def test_a_pod_that_moves_is_waited_for_though_nobody_has_deleted_it_yet(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ready` is told before its node deletes it."""
    monkeypatch.setattr(kubelet, "_LOOK", 0.01)
    given = command(cluster, reason="nodeUnschedulable")
    cluster.put("train", "u-1")
    of = Kubelet(cluster, "n1")
    of.insist_free(FACTS, given)
    threading.Timer(0.2, cluster.pods.clear).start()
    assert of.make(given, Cancel()).uid == "u-new"
    cluster.pods.clear()
    cluster.put("train", "u-2")
    with pytest.raises(Refused, match="there is a pod"):
        of.insist_free(FACTS, given)


def test_a_kubelet_that_ends_nothing_is_not_waited_for_for_ever(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubelet, "END_LIMIT", 0.05)
    Kubelet(cluster, "n1").end("ml", "train", "u-1", lambda: False)
    assert len(cluster.gone) == 1


def test_only_the_pod_of_its_action_is_forgotten(cluster: Cluster) -> None:
    of = Kubelet(cluster, "n1")
    of.forget("ml", "train", ID)
    cluster.put("train", "u-1", notes={ACTION: OTHER})
    of.forget("ml", "train", ID)
    assert cluster.gone == []
    cluster.put("train", "u-2", notes={ACTION: ID})
    of.forget("ml", "train", ID)
    assert cluster.gone == [("u-2", kubelet.GRACE)]
    cluster.silent = True
    of.forget("ml", "train", ID)


def test_places_are_read_as_they_were_written() -> None:
    given = RestoreCommand(action_id=ID, checkpoint_id=OTHER)
    assert kubelet.read_place(kubelet.place_of(FACTS)) == ("ml", "train", "u-1", "")
    assert kubelet.read_place(kubelet.place_for(given, FACTS)) == ("ml", "train", "", ID)
    assert not kubelet.is_place("0b7a")


def test_a_node_says_how_it_is(cluster: Cluster) -> None:
    of = Kubelet(cluster, "n1")
    assert of.says() == "node n1, ready"
    cluster.schedulable = False
    assert of.says() == "node n1, ready, cordoned"
