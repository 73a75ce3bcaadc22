"""Pods as Kubernetes writes them: of a saved one, the one that is to be made for its restore; and the annotations that we read and write.

What a pod has beyond what its author wrote came from the API server, from admission controllers, the scheduler, its controller or the old
node. All of that is left out, and the cluster adds what belongs to the new one. The rest stays as it was: CRIU finds again every mount that
was there only if the new pod has it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from hibernode.errors import Refused

CHECKPOINT, ACTION = (
    "hibernode.io/restore-from",
    "hibernode.io/action",
)  # of a restored pod: what it comes from, and by which action
STORE, CRIU_OPTS = "hibernode.io/store", "hibernode.io/criu-opts"  # of a restored pod: where that is, and how
INIT = "hibernode.io/init-containers"  # of any pod: "keep" if they are to run again when it is restored
RUNTIME_CLASS = "hibernode"

_OURS = (CHECKPOINT, ACTION, STORE, CRIU_OPTS)  # of one restore: those of an earlier one say nothing of this
# What others wrote of the old pod: its place in the network, how its kubelet came by it, what kubectl had last sent.
_OF_THE_OLD = re.compile(
    r"cni\.projectcalico\.org/(podIPs?|containerID)|k8s\.v1\.cni\.cncf\.io/networks?-status|k8s\.ovn\.org/pod-networks"
    r"|kubernetes\.io/config\.(hash|mirror|seen|source)|kubectl\.kubernetes\.io/last-applied-configuration"
)
# By these a controller finds its own: with one of them it would adopt the new pod, and delete one as surplus.
_CONTROLLERS = (
    "pod-template-hash",
    "controller-uid",
    "batch.kubernetes.io/controller-uid",
    "controller-revision-hash",
    "pod-template-generation",
)
# Written by the server, the scheduler or an admission controller, which refuse or ignore what they did not write.
_SERVER_SIDE = (
    "ephemeralContainers",  # nobody may create a pod with some
    "schedulingGates",  # nor one with some and a node
    "priority",  # of its class: admission computes it, and refuses another number
    "preemptionPolicy",  # likewise
    "overhead",  # of the runtime class: likewise
    "serviceAccount",  # the old name of serviceAccountName
)
_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
_HOSTNAME = "kubernetes.io/hostname"
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def new_pod(
    saved_spec: Mapping[str, Any],
    saved_metadata: Mapping[str, Any],
    *,
    node: str,
    checkpoint_id: str,
    action_id: str,
    name: str = "",
    store: str = "",
    criu_opts: str = "",
) -> dict[str, Any]:
    """The pod to be created so that `checkpoint_id` is restored in it by the action `action_id` on the Kubernetes node `node`. Pure: what
    was saved is not changed.

    `action_id` empty: the first of its containers begins the restore. `name`: of the new pod; empty: the old one's, which must have gone
    by then. `store` and `criu_opts`: of the restore, where its command has some. It has no owner, so that no controller counts it; and its
    containers no `postStart`, which has been run. Init containers have done their work and are left out, but for those that run on beside
    the pod (restartPolicy Always), or all of them if the saved pod says `hibernode.io/init-containers: keep`. Refused("pod_spec") if what
    was saved is no pod.
    """
    name = name or str(saved_metadata.get("name") or "")
    for prop, value in (("name", name), ("node", node)):
        if not _NAME.fullmatch(value):
            raise _bad(prop, value, "a name as Kubernetes has them: lower case letters, digits, dashes and dots, 253 at most")
    notes = _texts("annotations", saved_metadata)
    labels = _texts("labels", saved_metadata)
    given = {CHECKPOINT: checkpoint_id, ACTION: action_id, STORE: store, CRIU_OPTS: criu_opts}
    kept = {key: value for key, value in notes.items() if key not in _OURS and not _OF_THE_OLD.fullmatch(key)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": str(saved_metadata.get("namespace") or "default"),
            "labels": {key: value for key, value in labels.items() if key not in _CONTROLLERS},
            "annotations": {**kept, **{key: value for key, value in given.items() if value}},
        },
        "spec": _spec(saved_spec, node, keep_init=notes.get(INIT) == "keep"),
    }


def _spec(saved: Mapping[str, Any], node: str, *, keep_init: bool) -> dict[str, Any]:
    spec = {key: copy.deepcopy(value) for key, value in saved.items() if key not in _SERVER_SIDE}
    if not _objects("containers", spec):
        raise _bad("containers", spec.get("containers"), "one at least")
    init = [each for each in _objects("initContainers", spec) if keep_init or each.get("restartPolicy") == "Always"]
    spec["initContainers"] = init
    for container in (*spec["containers"], *init):
        lifecycle = container.get("lifecycle")
        if isinstance(lifecycle, dict) and lifecycle.pop("postStart", None) is not None and not lifecycle:
            del container["lifecycle"]
    _drop_tokens(spec)
    _unbind(spec)
    for empty in ("initContainers", "volumes", "nodeSelector", "affinity"):
        if not spec.get(empty):
            spec.pop(empty, None)
    return {**spec, "nodeName": node, "runtimeClassName": RUNTIME_CLASS}


def _drop_tokens(spec: dict[str, Any]) -> None:
    """The service account's token that admission mounted: it mounts one anew at the same place. What the author mounted stays."""
    account = str(spec.get("serviceAccountName") or "default")
    volumes = _objects("volumes", spec)
    # of 1.21 and later, and of earlier ones
    mounted = re.compile(rf"kube-api-access-[a-z0-9]{{5}}|{re.escape(account)}-token-[a-z0-9]{{5}}")
    added = {str(each.get("name")) for each in volumes if mounted.fullmatch(str(each.get("name")))}
    for container in (*spec["containers"], *spec["initContainers"]):
        mounts = _objects("volumeMounts", container)
        left = [each for each in mounts if not (each.get("name") in added and each.get("mountPath") == _TOKEN)]
        if len(left) < len(mounts):
            container["volumeMounts"] = left
    used = {
        each.get("name")
        for container in (*spec["containers"], *spec["initContainers"])
        for each in _objects("volumeMounts", container)
    }
    spec["volumes"] = [each for each in volumes if each.get("name") not in added - used]


def _unbind(spec: dict[str, Any]) -> None:
    """A kubelet refuses a pod that wants another node than its own: what named the old node goes, what it must be like stays."""
    selector = spec.get("nodeSelector")
    if isinstance(selector, dict):
        selector.pop(_HOSTNAME, None)
    affinity = spec.get("affinity")
    of_nodes = affinity.get("nodeAffinity") if isinstance(affinity, dict) else None
    required = of_nodes.get("requiredDuringSchedulingIgnoredDuringExecution") if isinstance(of_nodes, dict) else None
    if not isinstance(affinity, dict) or not isinstance(of_nodes, dict) or not isinstance(required, dict):
        return
    terms = _objects("nodeSelectorTerms", required)
    for term in terms:
        term.pop("matchFields", None)  # the only field is the node's name
        wishes = [each for each in _objects("matchExpressions", term) if each.get("key") != _HOSTNAME]
        term["matchExpressions"] = wishes
    if not all(term["matchExpressions"] for term in terms):  # one of them wanted nothing else: then any node will do
        del of_nodes["requiredDuringSchedulingIgnoredDuringExecution"]
    if not of_nodes:
        del affinity["nodeAffinity"]


def _objects(key: str, of: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = of.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise _bad(key, found, "a list of objects")
    return found


def _texts(key: str, metadata: Mapping[str, Any]) -> Mapping[str, str]:
    found = metadata.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise _bad(key, found, "texts by name")
    return found


def _bad(prop: str, found: object, wanted: str) -> Refused:
    return Refused(
        "pod_spec", f"no pod can be made of what was saved: {prop} is not {wanted}", prop=prop, found=str(found)[:200], wanted=wanted,
        hint="was it saved by this program? `hibernode verify` reads every byte of it",
    )  # fmt: skip
