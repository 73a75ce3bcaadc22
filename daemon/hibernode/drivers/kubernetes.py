"""The Kubernetes API server, as this node needs it: read a pod, make one, delete one, annotate one; read a node. Plain REST over urllib3.

A pod that is deleted or annotated is named by its UID beside its name, so that another of that name is left alone, and a pod that is made
twice for one action is one pod. Nothing is tried again here: whoever asks knows what he can afford.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import urllib3
from urllib3.exceptions import HTTPError, LocationParseError

from hibernode import config
from hibernode.errors import Busy, KubernetesUnavailable, NotFound, Refused
from hibernode.pods import ACTION
from hibernode.ports import KubeNode, Pod

_LIMIT = 32 << 20  # bytes of an answer: 250 pods of one node take 3 MB
_PIECE = 64 << 10
_NO_RIGHT = re.compile(r'User "[^"]*" cannot ')  # as RBAC says it
_JSON, _MERGE = "application/json", "application/merge-patch+json"


class Kubernetes:
    """ports.Cluster: one API server, as one account. Any thread; connections are kept and shared.

    Every call raises KubernetesUnavailable if the server is silent for `kubernetes.timeout` seconds, or not done in twice as many, or says
    what cannot be believed; Busy if it has too much to do; Refused("kubernetes_rights") if the account may not. A call that changes
    something and raises KubernetesUnavailable may have done it.
    """

    def __init__(self, settings: config.Kubernetes) -> None:
        """`settings.api_server` is set. Raises Refused("config") if its address or the CA's file is no such thing. Asks nobody."""
        self._settings, self._url = settings, settings.api_server.rstrip("/")
        try:
            place = urllib3.util.parse_url(self._url)
            if place.scheme not in ("http", "https") or not place.host:
                raise LocationParseError(self._url)
            trusted = ssl.create_default_context(cafile=settings.ca_file or None) if place.scheme == "https" else None
        except (LocationParseError, OSError, ValueError) as e:  # ssl.SSLError is an OSError
            raise Refused(
                "config", f"cannot use the API server {self._url} with the CA {settings.ca_file!r}: {e}",
                prop="kubernetes.api_server, kubernetes.ca_file", found=f"{self._url}, {settings.ca_file}",
                wanted="https://host:port, and the path of a CA in PEM",
                hint="in a pod leave both empty, and mount its service account's token",
            ) from e  # fmt: skip
        self._pool = urllib3.PoolManager(num_pools=1, maxsize=8, ssl_context=trusted, retries=False)

    def close(self) -> None:
        self._pool.clear()

    # --- pods -----------------------------------------------------------------------------------------------------------------

    def pod(self, namespace: str, name: str, *, uid: str = "") -> Pod:
        """NotFound if there is none, or if the one of that name has another UID than the one that is meant."""
        found = read_pod(self._ask("GET", _path(namespace, name), f"pod {namespace}/{name}"))
        if uid and found.uid != uid:
            raise _replaced(namespace, name, uid, found.uid)
        return found

    def pods(self, *, node: str = "") -> list[Pod]:
        """All of them, or all of a node."""
        which = {"fieldSelector": f"spec.nodeName={node}"} if node else {}
        found = self._ask("GET", "/api/v1/pods", "pods", query=which)
        items = found.get("items")
        if not isinstance(items, list):
            raise KubernetesUnavailable("the API server sent no list of pods")
        return [read_pod(each) for each in items]

    def pod_by_uid(self, uid: str, *, node: str = "") -> Pod:
        """A server does not search by UID, so `node` (where it runs) saves it from sending all pods there are. NotFound."""
        for found in self.pods(node=node):
            if found.uid == uid:
                return found
        raise NotFound(
            f"no pod has the UID {uid}" + (f" on node {node}" if node else ""), hint="it may have been deleted", uid=uid
        )

    def create(self, namespace: str, manifest: Mapping[str, Any]) -> Pod:
        """Make it. If it was made before for the same action (`hibernode.io/action`), that one: so it may be repeated.
        Refused("pod_exists") if the name is another's; Refused("pod_refused") if the server does not take it, with its reason."""
        name = str(manifest["metadata"]["name"])
        try:
            return read_pod(self._ask("POST", _path(namespace), f"pod {namespace}/{name}", body=manifest))
        except _Conflict as e:
            there = self.pod(namespace, name)
            wanted = (manifest["metadata"].get("annotations") or {}).get(ACTION)
            if wanted and there.annotations.get(ACTION) == wanted and not there.deleting:
                return there
            raise Refused(
                "pod_exists", f"there is a pod {namespace}/{name}", prop="pod_name", found=there.uid, wanted="a name that is free",
                hint="delete that pod, or give another name for the restored one",
            ) from e  # fmt: skip

    def delete(self, namespace: str, name: str, *, uid: str, grace: float | None = None) -> None:
        """Have the one with this UID end, within `grace` seconds (None: its own). Returns when the server has noted it, not when the pod
        has gone. One that has gone already is well; so is one of that name with another UID, which is left alone."""
        body: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": uid}}
        if grace is not None:
            body["gracePeriodSeconds"] = round(grace)
        try:
            self._ask("DELETE", _path(namespace, name), f"pod {namespace}/{name}", body=body)
        except (NotFound, _Conflict):
            return

    def annotate(self, namespace: str, name: str, notes: Mapping[str, str | None], *, uid: str) -> Pod:
        """Set these annotations of the one with this UID, None: take it away; the others stay. NotFound if it has gone."""
        body = {"metadata": {"uid": uid, "annotations": dict(notes)}}
        try:
            return read_pod(self._ask("PATCH", _path(namespace, name), f"pod {namespace}/{name}", body=body, kind=_MERGE))
        except _Conflict as e:
            raise _replaced(namespace, name, uid, "another") from e

    # --- nodes ----------------------------------------------------------------------------------------------------------------

    def node(self, name: str) -> KubeNode:
        """NotFound."""
        found = self._ask("GET", f"/api/v1/nodes/{quote(name, safe='')}", f"node {name}")
        try:
            conditions = {each["type"]: each["status"] for each in (found.get("status") or {}).get("conditions") or ()}
            return KubeNode(
                name=str(found["metadata"]["name"]),
                ready=conditions.get("Ready") == "True",
                schedulable=not found["spec"].get("unschedulable"),
                labels={str(key): str(value) for key, value in (found["metadata"].get("labels") or {}).items()},
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise KubernetesUnavailable(f"the API server sent no node: {e!r}") from e

    # --- the wire -------------------------------------------------------------------------------------------------------------

    def _ask(
        self, method: str, path: str, what: str, *, query: Mapping[str, str] | None = None, body: object = None, kind: str = _JSON
    ) -> Mapping[str, Any]:
        limit = self._settings.timeout
        deadline = time.monotonic() + limit
        headers = {"Accept": _JSON, "User-Agent": "hibernode", **self._login()}
        if body is not None:
            headers["Content-Type"] = kind
        try:
            answer = self._pool.request(
                method,
                self._url + path + (f"?{urlencode(query)}" if query else ""),
                body=None if body is None else json.dumps(body).encode(),
                headers=headers,
                timeout=urllib3.Timeout(connect=min(limit, 5.0), read=limit),
                redirect=False,
                preload_content=False,
            )
            try:
                said = _read(answer, deadline)
            except BaseException:
                answer.close()  # it still has something to say: not for whoever has the connection next
                raise
            answer.release_conn()
        except (HTTPError, OSError) as e:
            raise KubernetesUnavailable(
                f"the API server {self._url} does not answer: {e}", hint="is it up, and reached from this node? See [kubernetes]"
            ) from e
        if not 200 <= answer.status < 300:
            _refuse(answer.status, said, what, method)
        try:
            found = json.loads(said)
        except ValueError as e:
            raise KubernetesUnavailable(f"the API server answered no JSON: {said[:100]!r}") from e
        if not isinstance(found, dict):
            raise KubernetesUnavailable(f"the API server answered no object: {said[:100]!r}")
        return found

    def _login(self) -> Mapping[str, str]:
        """Read anew for each call: a kubelet replaces the token of a pod every hour."""
        if not self._settings.token_file:
            return {}
        try:
            token = Path(self._settings.token_file).read_text().strip()
            if not re.fullmatch(r"[!-~]+", token):  # a library would quote it
                raise ValueError("it is not one word")
            return {"Authorization": f"Bearer {token}"}
        except (OSError, ValueError) as e:
            raise Refused(
                "kubernetes_rights", f"the token for the API server cannot be read: {e}", prop="kubernetes.token_file",
                found=self._settings.token_file, wanted="a file with a service account's token", hint="is it mounted into this pod?",
            ) from e  # fmt: skip


def read_pod(found: Mapping[str, Any]) -> Pod:
    """Raises KubernetesUnavailable for what is no pod."""
    try:
        meta, spec, status = found["metadata"], found["spec"], found.get("status") or {}
        return Pod(
            namespace=str(meta["namespace"]),
            name=str(meta["name"]),
            uid=str(meta["uid"]),
            node=str(spec.get("nodeName") or ""),
            phase=str(status.get("phase") or "Unknown"),
            deleting=bool(meta.get("deletionTimestamp")),
            annotations={str(key): str(value) for key, value in (meta.get("annotations") or {}).items()},
            manifest=found,
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise KubernetesUnavailable(f"the API server sent no pod: {e!r}") from e


class _Conflict(Exception):
    """409: the name is taken, or the UID is another's."""


def _read(answer: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
    """A server that sends a byte now and then does not hold us longer than one that is silent."""
    said = bytearray()
    while piece := answer.read1(_PIECE):  # what is there; `read` would wait for all of it
        said += piece
        if len(said) > _LIMIT:
            raise HTTPError(f"more than {_LIMIT} bytes")
        if time.monotonic() > deadline:
            raise HTTPError(f"no whole answer in time, {len(said)} bytes of one")
    return bytes(said)


def _refuse(status: int, said: bytes, what: str, method: str) -> None:
    """Every answer but a good one, as what it means here."""
    message = _message(said) or f"status {status}"
    admission = status == 403 and method == "POST" and not _NO_RIGHT.search(message)  # it says no with the same number
    if status in (401, 403) and not admission:
        raise Refused(
            "kubernetes_rights", f"the API server does not let us {method} {what}: {message}", prop="service account",
            found=status, wanted="the rights of the chart's ClusterRole", hint="docs/kubernetes.md has the table of rights",
        )  # fmt: skip
    if status == 404:
        raise NotFound(f"the API server knows no {what}", hint="it may have been deleted")
    if status == 409 or (status == 422 and _of_another(said)):
        raise _Conflict(message)
    if status in (400, 405, 406, 415, 422) or admission:
        raise Refused(
            "pod_refused", f"the API server does not take {what}: {message}", prop=what, found=status, wanted="what it takes",
            hint="an admission controller, a quota or a field that this server does not know; its own words are in the message",
        )  # fmt: skip
    if status == 429:
        raise Busy(f"the API server has too much to do: {message}")
    raise KubernetesUnavailable(f"the API server answered {status}: {message}")


def _message(said: bytes) -> str:
    try:
        return str(json.loads(said)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return said[:200].decode(errors="replace").strip()


def _of_another(said: bytes) -> bool:
    """How a server says that the UID of a patch is not the pod's (seen with 1.20.2): that nobody may change it."""
    try:
        return any(cause["field"] == "metadata.uid" for cause in json.loads(said)["details"]["causes"])
    except (ValueError, KeyError, TypeError):
        return False


def _replaced(namespace: str, name: str, uid: str, found: str) -> NotFound:
    return NotFound(
        f"pod {namespace}/{name} is another one now: {found}, not {uid}", hint="it was deleted and made anew", uid=uid
    )


def _path(namespace: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{quote(namespace, safe='')}/pods" + (f"/{quote(name, safe='')}" if name else "")


def in_cluster(environ: Mapping[str, str] = os.environ) -> str:
    """The address that every pod's environment has of its own API server; "" where this is none."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://{f'[{host}]' if ':' in host else host}:{port}" if host else ""


def connect(settings: config.Kubernetes, environ: Mapping[str, str] = os.environ) -> Kubernetes | None:
    """By `settings`, or as a pod of the cluster; None where neither says anything of an API server. Raises Refused("config")."""
    if settings.api_server:
        return Kubernetes(settings)
    if not (address := in_cluster(environ)):
        return None
    mounted = Path(settings.mounted)
    filled = {"token_file": settings.token_file or str(mounted / "token"), "ca_file": settings.ca_file or str(mounted / "ca.crt")}
    return Kubernetes(settings.model_copy(update={"api_server": address, **filled}))
