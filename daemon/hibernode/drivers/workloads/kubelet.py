"""Pods that a kubelet of this node makes and ends, by way of the API server: nobody else may, and what is killed beside it is started anew.

A kubelet that ends a pod kills what is frozen in it, and only then lets it go on (runc 1.1 thaws after SIGKILL), so that it does nothing
any more: a pod that is to be killed after its checkpoint stays frozen until its kubelet has done that.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from hibernode.errors import HibernodeError, NotFound, Refused, RestoreFailed, Transient
from hibernode.model import POD_SPEC_LIMIT, Cancel, RestoreCommand, WorkloadFacts
from hibernode.pods import ACTION, new_pod
from hibernode.ports import Cluster, Pod

GRACE = 1.0  # seconds that a kubelet gives what is held frozen, and cannot use them
END_LIMIT = 40.0  # seconds for a kubelet to end a pod; it takes 2 to 4
ASK_LIMIT = 30.0  # seconds for an API server to be back, while a pod that is to end stands still
GO_LIMIT = 60.0  # seconds for a pod that moves to be gone from the node that it leaves
_LOOK, _AGAIN = 0.25, 1.0  # seconds between two looks, and between two tries
_SOURCE = "kubernetes.io/config.source"  # which a kubelet notes on every pod that it makes: api, file or http
_UNSAID = ("managedFields",)  # of metadata: who wrote what, which is longer than all the rest
_log = logging.getLogger("hibernode.kubelet")


def of_kubelet(annotations: Mapping[str, str]) -> bool:
    """Of a sandbox."""
    return _SOURCE in annotations


def of_server(annotations: Mapping[str, str]) -> bool:
    """The API server has it, and can delete it: no static pod."""
    return annotations.get(_SOURCE) == "api"


class Kubelet:
    """Those of the Kubernetes node `node`. Raises as ports.Cluster does, if nothing else is said."""

    def __init__(self, server: Cluster, node: str) -> None:
        self._server, self._node = server, node

    def says(self) -> str:
        """What the API server says of this node."""
        node = self._server.node(self._node)
        state = "ready" if node.ready else "not ready"
        return f"node {node.name}, {state}" + ("" if node.schedulable else ", cordoned")

    def spec(self, facts: WorkloadFacts) -> str:
        """ports.Workload.pod_spec. Refused("pod_containers") if somebody runs in it who is in no pod that can be made of it: a restore
        would wait for him."""
        manifest = self._server.pod(facts.namespace, facts.name, uid=facts.uid).manifest
        made = new_pod(manifest["spec"], manifest["metadata"], node=self._node, checkpoint_id="", action_id="")["spec"]
        again = {each.get("name") for each in (*made["containers"], *made.get("initContainers", ()))}
        for container in facts.containers:
            if container.name not in again:
                raise Refused(
                    "pod_containers", f"container {container.name!r} of {facts.namespace}/{facts.name} is a debug or an init container, "
                    "and a pod that is restored has none", prop="container", found=container.name,
                    wanted=", ".join(sorted(map(str, again))),
                    hint="wait until an init container has done its work, or annotate the pod with `hibernode.io/init-containers: keep`; "
                    "leave a debug container, so that it ends",
                )  # fmt: skip
        metadata = {key: value for key, value in manifest["metadata"].items() if key not in _UNSAID}
        text = json.dumps({"metadata": metadata, "spec": manifest["spec"]}, separators=(",", ":"))
        if len(text) > POD_SPEC_LIMIT:
            _log.warning("pod %s/%s: its spec has %d bytes, and is not kept", facts.namespace, facts.name, len(text))
            return ""
        return text

    def insist_free(self, facts: WorkloadFacts, command: RestoreCommand) -> None:
        """Refused("pod_spec") for what no pod can be made of, or what is of another pod; Refused("pod_exists") if somebody has its name and
        is to keep it."""
        meta, old = self._manifest(command)["metadata"], _parsed(command.pod_spec)["metadata"]
        was = tuple(str(old.get(key)) for key in ("namespace", "name", "uid"))
        if was != (facts.namespace, facts.name, facts.uid):
            raise Refused(
                "pod_spec", "the spec is of another pod than the checkpoint", prop="pod_spec.metadata", found="/".join(was),
                wanted=f"{facts.namespace}/{facts.name}/{facts.uid}", hint="it is what the event of this checkpoint had",
            )  # fmt: skip
        try:
            there = self._server.pod(meta["namespace"], meta["name"])
        except NotFound:
            return
        leaving = there.uid == facts.uid and command.reason != "manual"  # its node ends it, or is about to
        if not there.deleting and not leaving and there.annotations.get(ACTION) != command.action_id:
            raise Refused(
                "pod_exists", f"there is a pod {there.namespace}/{there.name}", prop="pod_name", found=there.uid,
                wanted="a name that is free", hint="delete that pod, or give another name for the restored one",
            )  # fmt: skip

    def make(self, command: RestoreCommand, cancel: Cancel) -> Pod:
        """The pod of this restore, made once however often it is asked for. One of its name that is going away is waited for, and for a
        minute the one that was checkpointed, where it moves; so is an API server that does not answer."""
        manifest = self._manifest(command)
        old = _parsed(command.pod_spec)["metadata"].get("uid") if command.reason != "manual" else None
        until = time.monotonic() + GO_LIMIT
        while True:
            cancel.check()
            try:
                if not self._is_going(manifest["metadata"], old if time.monotonic() < until else None):
                    return self._server.create(manifest["metadata"]["namespace"], manifest)
            except Transient as e:
                _log.warning("the pod of a restore cannot be made yet: %s", e)
                time.sleep(_AGAIN)
            time.sleep(_LOOK)

    def _is_going(self, of: Mapping[str, Any], old: object) -> bool:
        try:
            there = self._server.pod(of["namespace"], of["name"])
        except NotFound:
            return False
        return there.deleting or there.uid == old

    def _manifest(self, command: RestoreCommand) -> dict[str, Any]:
        saved = _parsed(command.pod_spec)
        overrides = command.overrides
        return new_pod(
            saved["spec"], saved["metadata"], node=self._node, checkpoint_id=command.checkpoint_id, action_id=command.action_id,
            name=overrides.pod_name, store=overrides.directory, criu_opts=overrides.criu_opts,
        )  # fmt: skip

    def look(self, pod: Pod) -> str:
        """What keeps it from running, in the kubelet's words; "" where it says nothing. RestoreFailed if it never will."""
        try:
            found = self._server.pod(pod.namespace, pod.name, uid=pod.uid)
        except NotFound as e:
            raise RestoreFailed("the pod that was made for it has been deleted", hint="who deletes pods in its namespace?") from e
        status = found.manifest.get("status") or {}
        if found.phase in ("Failed", "Succeeded"):
            why = ": ".join(str(status[key]) for key in ("reason", "message") if status.get(key)) or found.phase
            raise RestoreFailed(f"its kubelet does not run the pod that was made for it: {why}", pod=found.name, uid=found.uid)
        waiting = [(each.get("state") or {}).get("waiting") or {} for each in status.get("containerStatuses") or ()]
        said = [": ".join(str(each[key]) for key in ("reason", "message") if each.get(key)) for each in waiting]
        return "; ".join(each for each in said if each)[:500]

    def end(self, namespace: str, name: str, uid: str, ended: Callable[[], bool], patience: float | None = None) -> None:
        """Have it deleted, and wait until its processes have `ended`, or its kubelet has had time for it. A server that does not answer is
        asked again for `ASK_LIMIT` seconds: nothing is done to a pod that it has not noted. `patience`: in place of either limit."""
        until = time.monotonic() + (ASK_LIMIT if patience is None else patience)
        while True:
            try:
                self._server.delete(namespace, name, uid=uid, grace=GRACE)
                break
            except Transient:
                if time.monotonic() > until:
                    raise
                time.sleep(_AGAIN)
        until = time.monotonic() + (END_LIMIT if patience is None else patience)
        while not ended() and time.monotonic() < until:
            time.sleep(_LOOK)

    def forget(self, namespace: str, name: str, action_id: str) -> None:
        """Have the pod that was made for this action deleted, if there is one. Never raises: what is left says that its restore has failed,
        and runs nothing."""
        try:
            there = self._server.pod(namespace, name)
            if there.annotations.get(ACTION) == action_id:
                self._server.delete(namespace, name, uid=there.uid, grace=GRACE)
        except NotFound:
            return
        except HibernodeError as e:
            _log.warning("pod %s/%s is left, and runs nothing: delete it by hand: %s", namespace, name, e)


def _parsed(pod_spec: str) -> Mapping[str, Any]:
    try:
        saved = json.loads(pod_spec)
        if isinstance(saved["metadata"], dict) and isinstance(saved["spec"], dict):
            return dict(saved)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise Refused(
        "pod_spec", "no pod can be made of what was saved: it is no JSON with metadata and spec", prop="pod_spec",
        found=pod_spec[:200], wanted="an object with `metadata` and `spec`", hint="it is what the event of the checkpoint had",
    )  # fmt: skip


# --- in the journal -----------------------------------------------------------------------------------------------------------


def place_of(facts: WorkloadFacts) -> str:
    """ports.Workload.place of a pod that the API server can delete."""
    return f"pod/{facts.namespace}/{facts.name}/uid/{facts.uid}"


def place_for(command: RestoreCommand, facts: WorkloadFacts) -> str:
    """ports.PreparedWorkload.place of one that is made for a restore."""
    return f"pod/{facts.namespace}/{facts.name}/action/{command.action_id}"


def is_place(place: str) -> bool:
    return place.startswith("pod/")


def read_place(place: str) -> tuple[str, str, str, str]:
    """(namespace, name, uid or "", action or "")."""
    _, namespace, name, kind, whose = place.split("/")
    return namespace, name, whose if kind == "uid" else "", whose if kind == "action" else ""
