"""The client of the Kubernetes API against a server that answers whatever a test wants: what it asks, and what it makes of bad answers.
That a real API server understands it is asked in tests/kubernetes."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hibernode import config
from hibernode.drivers import kubernetes
from hibernode.drivers.kubernetes import Kubernetes
from hibernode.errors import Busy, HibernodeError, KubernetesUnavailable, NotFound, Refused
from hibernode.pods import ACTION

POD = {"metadata": {"namespace": "ml", "name": "a", "uid": "u-1"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}}
TIMEOUT = 0.5  # seconds, where a server fails; else it is not to count


class Server:
    """Answers the requests one after the other with what is in `answers`: (status, body), or a function of the handler. It keeps what was
    asked: (method, path, headers, body)."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.command, self.path, dict(self.headers), json.loads(body) if body else None))
                what = outer.answers.pop(0)
                if callable(what):
                    what(self)
                    self.close_connection = True
                    return
                status, said = what
                raw = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_DELETE = do_PATCH = answer  # noqa: N815 - as the library calls them

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Iterator[Kubernetes]:
    (tmp_path / "token").write_text("first\n")
    client = Kubernetes(config.Kubernetes(api_server=server.url, token_file=str(tmp_path / "token"), timeout=20))
    yield client
    client.close()


@pytest.fixture
def impatient(server: Server) -> Iterator[Kubernetes]:
    client = Kubernetes(config.Kubernetes(api_server=server.url, timeout=TIMEOUT))
    yield client
    client.close()


def status(code: int, reason: str = "", message: str = "its own words") -> tuple[int, Any]:
    return code, {"kind": "Status", "code": code, "reason": reason, "message": message}


# --- what it asks -------------------------------------------------------------------------------------------------------------


def test_it_reads_a_pod(server: Server, client: Kubernetes) -> None:
    server.answers = [(200, POD)]
    pod = client.pod("ml", "a")
    assert (pod.namespace, pod.name, pod.uid, pod.node, pod.phase, pod.deleting) == ("ml", "a", "u-1", "n", "Running", False)
    assert pod.manifest == POD
    method, path, headers, body = server.asked[0]
    assert (method, path, body) == ("GET", "/api/v1/namespaces/ml/pods/a", None)
    assert headers["Authorization"] == "Bearer first"


def test_the_token_is_read_for_each_call(server: Server, client: Kubernetes, tmp_path: Path) -> None:
    server.answers = [(200, POD)] * 2
    client.pod("ml", "a")
    (tmp_path / "token").write_text("second")
    client.pod("ml", "a")
    assert [headers["Authorization"] for _, _, headers, _ in server.asked] == ["Bearer first", "Bearer second"]


def test_a_name_cannot_leave_its_place_in_the_path(server: Server, client: Kubernetes) -> None:
    server.answers = [(200, POD)] * 2
    client.pod("../nodes", "a?b#c/d")
    assert server.asked[0][1] == "/api/v1/namespaces/..%2Fnodes/pods/a%3Fb%23c%2Fd"


def test_a_pod_is_found_by_its_uid_among_those_of_a_node(server: Server, client: Kubernetes) -> None:
    server.answers = [(200, {"items": [{**POD, "metadata": {**POD["metadata"], "uid": "other"}}, POD]})]
    assert client.pod_by_uid("u-1", node="n").name == "a"
    assert server.asked[0][1] == "/api/v1/pods?fieldSelector=spec.nodeName%3Dn"


def test_a_pod_is_deleted_by_its_uid(server: Server, client: Kubernetes) -> None:
    server.answers = [(200, POD)]
    client.delete("ml", "a", uid="u-1", grace=0)
    method, path, _, body = server.asked[0]
    assert (method, path) == ("DELETE", "/api/v1/namespaces/ml/pods/a")
    assert (body["preconditions"], body["gracePeriodSeconds"]) == ({"uid": "u-1"}, 0)


def test_a_pod_is_annotated_by_its_uid(server: Server, client: Kubernetes) -> None:
    server.answers = [(200, POD)]
    client.annotate("ml", "a", {"x": "1", "y": None}, uid="u-1")
    method, _, headers, body = server.asked[0]
    assert (method, headers["Content-Type"]) == ("PATCH", "application/merge-patch+json")
    assert body == {"metadata": {"uid": "u-1", "annotations": {"x": "1", "y": None}}}


def test_a_node_is_ready_and_schedulable_or_not(server: Server, client: Kubernetes) -> None:
    ready = {
        "metadata": {"name": "n", "labels": {"a": "b"}},
        "spec": {},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    server.answers = [(200, ready), (200, {**ready, "spec": {"unschedulable": True}, "status": {}})]
    assert client.node("n") == kubernetes.KubeNode("n", ready=True, schedulable=True, labels={"a": "b"})
    assert client.node("n") == kubernetes.KubeNode("n", ready=False, schedulable=False, labels={"a": "b"})


# --- what may be repeated -----------------------------------------------------------------------------------------------------


def of_action(action: str, **more: Any) -> dict[str, Any]:
    return {**POD, "metadata": {**POD["metadata"], "annotations": {ACTION: action}, **more}}


def test_a_pod_that_was_made_for_this_action_before_is_that_pod(server: Server, client: Kubernetes) -> None:
    """The answer to the first try was lost."""
    server.answers = [status(409, "AlreadyExists"), (200, of_action("act"))]
    assert client.create("ml", of_action("act")).uid == "u-1"


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        (of_action("act"), of_action("another")),
        (of_action("act"), POD),
        (POD, POD),
        (of_action("act"), of_action("act", deletionTimestamp="2026-11-28T12:00:00Z")),
    ],
)
def test_a_name_that_is_anothers_is_refused(server: Server, client: Kubernetes, wanted: Any, there: Any) -> None:
    server.answers = [status(409, "AlreadyExists"), (200, there)]
    with pytest.raises(Refused) as refused:
        client.create("ml", wanted)
    assert refused.value.code == "pod_exists"


@pytest.mark.parametrize("code", [404, 409])
def test_a_pod_that_has_gone_or_is_another_is_deleted_already(server: Server, client: Kubernetes, code: int) -> None:
    server.answers = [status(code)]
    client.delete("ml", "a", uid="u-1")
    assert server.answers == []


def test_who_is_another_by_now_is_not_found(server: Server, client: Kubernetes) -> None:
    immutable = (422, {"message": "immutable", "details": {"causes": [{"field": "metadata.uid"}]}})
    server.answers = [(200, POD), status(409, "Conflict"), immutable, (200, {"items": [POD]})]
    with pytest.raises(NotFound):
        client.pod("ml", "a", uid="u-2")
    for _ in range(2):
        with pytest.raises(NotFound):
            client.annotate("ml", "a", {"x": "1"}, uid="u-2")
    with pytest.raises(NotFound):
        client.pod_by_uid("u-2")


# --- bad answers --------------------------------------------------------------------------------------------------------------


def test_each_refusal_has_its_code_and_the_servers_words(server: Server, client: Kubernetes) -> None:
    expected: list[tuple[int, type[HibernodeError], str]] = [
        (401, Refused, "kubernetes_rights"),
        (403, Refused, "pod_refused"),  # by admission
        (422, Refused, "pod_refused"),
        (400, Refused, "pod_refused"),
        (429, Busy, "busy"),
        (500, KubernetesUnavailable, "kubernetes_unavailable"),
        (503, KubernetesUnavailable, "kubernetes_unavailable"),
        (302, KubernetesUnavailable, "kubernetes_unavailable"),
    ]
    for code, kind, name in expected:
        server.answers = [status(code)]
        with pytest.raises(kind, match="its own words") as raised:
            client.create("ml", POD)
        assert raised.value.code == name
    for call in (lambda: client.create("ml", POD), lambda: client.pod("ml", "a")):
        server.answers = [status(403, message='pods is forbidden: User "x" cannot create resource "pods"')]
        with pytest.raises(Refused, match="cannot create") as refused:
            call()
        assert refused.value.code == "kubernetes_rights"
    server.answers = [status(404)]
    with pytest.raises(NotFound, match="pod ml/a"):
        client.pod("ml", "a")


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>no</html>"),
        (200, b"\xff\xfe"),
        (200, b""),
        (200, []),
        (200, {}),
        (200, {"metadata": None, "spec": {}}),
        (200, {"metadata": {"namespace": "ml", "name": "a"}, "spec": {}}),
        (200, {**POD, "spec": []}),
        (200, {**POD, "metadata": {**POD["metadata"], "annotations": 7}}),
        (500, b"\xff\xfe not json"),
        (502, b""),
        (503, {"message": None}),
        (503, [1]),
    ],
)
def test_garbage_is_no_answer(server: Server, client: Kubernetes, answer: Any) -> None:
    server.answers = [answer]
    with pytest.raises(KubernetesUnavailable):
        client.pod("ml", "a")


def test_a_list_that_is_none_is_no_answer(server: Server, client: Kubernetes) -> None:
    server.answers = [(200, POD), (200, {"items": None})]
    for _ in range(2):
        with pytest.raises(KubernetesUnavailable):
            client.pods()


def _silent(handler: Any) -> None:
    time.sleep(4 * TIMEOUT)


def _hangs_up(handler: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def _half(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")


def _trickles(handler: Any) -> None:
    """Never silent for long, and never done."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    try:
        for _ in range(1000):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(TIMEOUT / 5)
    except OSError:
        pass


def _endless(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while True:
            handler.wfile.write(bytes(1 << 20))
    except OSError:
        pass


@pytest.mark.parametrize("fault", [_silent, _hangs_up, _half, _trickles, _endless])
def test_a_server_that_fails_costs_no_more_than_the_time_that_is_set(server: Server, impatient: Kubernetes, fault: Any) -> None:
    server.answers = [fault, (200, POD)]
    began = time.monotonic()
    with pytest.raises(KubernetesUnavailable):
        impatient.pod("ml", "a")
    assert time.monotonic() - began < 2 * TIMEOUT + 1
    assert impatient.pod("ml", "a").uid == "u-1", "the next call has a connection of its own"


def test_nobody_there_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        client = Kubernetes(config.Kubernetes(api_server=f"http://127.0.0.1:{taken.getsockname()[1]}", timeout=TIMEOUT))
        with pytest.raises(KubernetesUnavailable):
            client.pod("ml", "a")


# --- settings -----------------------------------------------------------------------------------------------------------------


def test_a_token_that_is_not_there_is_said(server: Server) -> None:
    client = Kubernetes(config.Kubernetes(api_server=server.url, token_file="/nowhere/token"))
    with pytest.raises(Refused) as refused:
        client.pod("ml", "a")
    assert refused.value.code == "kubernetes_rights"
    assert server.asked == []


@pytest.mark.parametrize("content", ["secret-of-two\nlines-of-it", "secret with spaces", "", "secret-\u00e4"])
def test_a_token_that_is_none_is_not_quoted(server: Server, tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    client = Kubernetes(config.Kubernetes(api_server=server.url, token_file=str(tmp_path / "token")))
    with pytest.raises(Refused) as refused:
        client.pod("ml", "a")
    assert refused.value.code == "kubernetes_rights"
    assert "secret" not in f"{refused.value}{refused.value.details}"
    assert server.asked == []


@pytest.mark.parametrize(
    "settings",
    [{"api_server": "broker:4222"}, {"api_server": "https://"}, {"api_server": "https://h:1", "ca_file": "/nowhere/ca"}],
)
def test_an_address_or_a_ca_that_is_none_is_refused_at_the_start(settings: dict[str, str]) -> None:
    with pytest.raises(Refused) as refused:
        Kubernetes(config.Kubernetes(**settings))
    assert refused.value.code == "config"


def test_outside_of_a_cluster_there_is_none() -> None:
    assert kubernetes.connect(config.Kubernetes(), {}) is None


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}, "https://10.96.0.1:6443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1"}, "https://[fd00::1]:443"),
        ({}, ""),
    ],
)
def test_a_pod_finds_its_own_api_server(environ: dict[str, str], address: str) -> None:
    assert kubernetes.in_cluster(environ) == address


def test_settings_come_before_what_a_pods_environment_says(server: Server) -> None:
    server.answers = [(200, POD)]
    client = kubernetes.connect(config.Kubernetes(api_server=server.url), {"KUBERNETES_SERVICE_HOST": "10.96.0.1"})
    assert client is not None
    assert client.pod("ml", "a").uid == "u-1"


def test_in_a_pod_the_mounted_ca_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=str(tmp_path)):
        kubernetes.connect(config.Kubernetes(mounted=str(tmp_path)), {"KUBERNETES_SERVICE_HOST": "10.96.0.1"})
