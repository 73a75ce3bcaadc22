"""A control plane that remembers nothing but what the test tells it: canned JSON that can be changed while a browser looks."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

PAGE = Path(__file__).resolve().parents[2] / "daemon" / "hibernode" / "api" / "page"
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

JSON = dict[str, Any]

MIB = 1 << 20
GIB = 1 << 30


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def action(action_id: str, **fields: Any) -> JSON:
    """A checkpoint that is ready, unless `fields` say otherwise."""
    known: JSON = {
        "action_id": action_id, "checkpoint_id": f"ck-{action_id}", "type": "checkpoint", "status": "ready", "reason": "manual",
        "kind": "simple", "node_name": "gpu-01", "namespace": "ml", "pod_name": "trainer", "pod_id": f"uid-{action_id}",
        "platform": "x86_64", "gpu": None, "action_timestamp": ago(300), "updated_timestamp": ago(290),
        "checkpoint_completed_timestamp": ago(290), "total_duration": 9_700_000_000, "total_io": 3 * GIB, "pause_ns": 412_000_000,
        "raw_bytes": 10 * GIB, "stored_bytes": 3 * GIB, "location": "s3://checkpoints/ml", "source_action_id": None,
        "provisional": False, "details": None, "progress": None, "events": [], "phases": [], "unaccounted": None,
        "zero_bytes": 2 * GIB, "streams": 8, "overrides": {},
    }  # fmt: skip
    return known | fields


def running(action_id: str, *, phase: str = "shipping", share: float = 0.4, **fields: Any) -> JSON:
    total = 10 * GIB
    progress = {
        "phase": phase,
        "bytes_done": int(total * share),
        "bytes_total": total,
        "stored_bytes": int(total * share / 3),
        "seconds": 4.2,
    }
    unknown = dict.fromkeys(
        ("checkpoint_completed_timestamp", "total_duration", "total_io", "raw_bytes", "stored_bytes", "pause_ns", "zero_bytes")
    )
    return action(action_id, **{"status": "processing", "progress": progress, "action_timestamp": ago(5), **unknown, **fields})


def failed(action_id: str, **fields: Any) -> JSON:
    details = {
        "code": "tcp_established", "message": "the workload has 2 TCP connections", "retry": False,
        "hint": 'give criu_opts {"tcp": "close"} to close them in the restored workload',
        "property": "tcp connections", "found": ["10.0.0.7:51234 -> 10.0.0.9:5432", "10.0.0.7:51240 -> 10.0.0.9:6379"], "wanted": "none",
    }  # fmt: skip
    nothing = dict.fromkeys(
        ("checkpoint_completed_timestamp", "total_io", "raw_bytes", "stored_bytes", "pause_ns", "zero_bytes", "streams")
    )
    return action(action_id, **{"status": "error", "details": details, "total_duration": 310_000_000, **nothing, **fields})


def event(seq: int, status: str, at: float, **fields: Any) -> JSON:
    return {
        "seq": seq,
        "status": status,
        "timestamp": ago(300 - at),
        "code": None,
        "message": None,
        "hint": None,
        "details": None,
    } | fields


def told(of: JSON) -> JSON:
    """The same action with the events and phases of one that took all its steps."""
    events = [
        event(1, "initialized", 0),
        event(2, "processing", 0.021),
        event(3, "checkpoint_created", 0.912),
        event(4, "ready", 9.7),
    ]
    phases = [("preflight", 0.31, 0), ("dumping", 0.58, 10 * GIB), ("shipping", 7.4, 3 * GIB), ("committing", 1.2, 42 * MIB)]
    costs = [{"name": name, "seconds": seconds, "bytes": count} for name, seconds, count in phases]
    return of | {"events": events, "phases": costs, "unaccounted": 0.21}


def checkpoint(of: JSON) -> JSON:
    names = (
        "checkpoint_id", "action_id", "namespace", "pod_name", "pod_id", "node_name", "location", "kind", "reason", "raw_bytes",
        "stored_bytes", "zero_bytes", "pause_ns", "checkpoint_completed_timestamp", "platform", "gpu",
    )  # fmt: skip
    return {name: of[name] for name in names}


def node(name: str, **fields: Any) -> JSON:
    known: JSON = {
        "name": name, "cluster": "default", "alive": True, "seen_timestamp": ago(3), "version": "0.1.0", "arch": "x86_64",
        "kernel": "6.18.2", "criu": "4.2", "store": "s3://checkpoints", "cpus": 64, "memory_total": 512 * GIB,
        "memory_available": 300 * GIB, "load": 12.4, "actions": 0, "gpus": ["NVIDIA H100", "NVIDIA H100"],
        "workloads": [workload("trainer")],
    }  # fmt: skip
    return known | fields


def workload(name: str, **fields: Any) -> JSON:
    known = {
        "kind": "job", "namespace": "ml", "name": name, "uid": f"uid-{name}", "pid": 4711, "rss": 11 * GIB, "processes": 9,
        "started_timestamp": ago(7200),
    }  # fmt: skip
    return known | fields


def refusal(status: int, code: str, message: str, **details: Any) -> tuple[int, JSON]:
    return status, {"code": str(status), "message": message, "details": {"code": code, **details}}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    authorization: str
    body: Any


@dataclass
class Stub:
    """With `with`. Tests change `actions`, `checkpoints` and `nodes` as they like; the newest comes first."""

    actions: list[JSON] = field(default_factory=list)
    checkpoints: list[JSON] = field(default_factory=list)
    nodes: list[JSON] = field(default_factory=list)
    left: list[JSON] = field(default_factory=list)  # what becomes of the workloads of a node that leaves
    token: str = ""  # wanted, if there is one
    refusals: dict[str, tuple[int, JSON]] = field(default_factory=dict)  # path -> answer, until it is taken out
    on_post: Callable[[Request], None] | None = None
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On the port it had before, if it was stopped."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="stub")
        self._thread.start()

    def stop(self) -> None:
        """Nobody listens any more. Harmless when repeated."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            assert self._thread is not None
            self._thread.join()

    def posts(self) -> list[tuple[str, Any]]:
        return [(request.path, request.body) for request in list(self.requests) if request.method == "POST"]

    def gets(self, path: str) -> list[Request]:
        return [request for request in list(self.requests) if request.method == "GET" and request.path == path]

    def change(self, action_id: str, **fields: Any) -> None:
        self.actions[:] = [of | fields if of["action_id"] == action_id else of for of in self.actions]

    # Answers: (status, body, headers); a body that is a string is plain text.

    def answer(self, request: Request) -> tuple[int, Any, Mapping[str, str]]:
        if self.token and request.authorization != f"Bearer {self.token}":
            return *refusal(401, "unauthorized", "no token, or one that is not known", hint="give a token of this API"), {}
        if request.path in self.refusals:
            return *self.refusals[request.path], {}
        parts = [unquote(part) for part in request.path.split("/")[2:]]
        match request.method, *parts:
            case "GET", "actions":
                return self._paged([of for of in self.actions if self._fits(of, request.query)], "action_id", request)
            case "GET", "actions", action_id:
                found = [of for of in self.actions if of["action_id"] == action_id]
                return (200, found[0], {}) if found else (*refusal(404, "not_found", f"no action {action_id}"), {})
            case "GET", "checkpoints":
                return self._paged(self.checkpoints, "checkpoint_id", request)
            case "GET", "nodes":
                return 200, self.nodes, {}
            case "POST", *rest:
                return self._post(request, rest)
        return *refusal(404, "not_found", f"nothing at {request.path}"), {}

    def _post(self, request: Request, parts: Sequence[str]) -> tuple[int, Any, Mapping[str, str]]:
        if self.on_post is not None:
            self.on_post(request)
        match parts:
            case ["checkpoint", "pod"]:
                pod = {name: request.body[name] for name in ("namespace", "pod_name", "pod_id", "kind")}
                self.actions.insert(0, running("new-checkpoint", phase="preflight", share=0.0, **pod))
                return 200, "new-checkpoint\n", {}
            case ["restore", "pod"]:
                self.actions.insert(
                    0, running("new-restore", phase="fetching", type="restore", source_action_id=request.body["action_id"])
                )
                return 200, "new-restore\n", {}
            case ["actions", action_id, "cancel"]:
                cancelled = {"code": "cancelled", "message": "somebody asked for it", "hint": "", "retry": False}
                self.change(action_id, status="error", details=cancelled, progress=None, total_duration=6_000_000_000)
                return 202, action_id, {}
            case ["nodes", _, "leave"]:
                return 202, self.left, {}
        return *refusal(404, "not_found", f"nothing at {request.path}"), {}

    @staticmethod
    def _fits(of: JSON, query: Mapping[str, str]) -> bool:
        fields = {"type": "type", "status": "status", "node": "node_name", "namespace": "namespace", "pod_name": "pod_name"}
        return all(of[field] == query[name] for name, field in fields.items() if name in query)

    @staticmethod
    def _paged(found: Sequence[JSON], key: str, request: Request) -> tuple[int, Any, Mapping[str, str]]:
        limit, before = int(request.query.get("limit", "50")), request.query.get("before")
        ids = [of[key] for of in found]
        start = ids.index(before) + 1 if before in ids else 0
        page = found[start : start + limit]
        if start + limit >= len(found):
            return 200, page, {}
        more = urlencode({**request.query, "before": page[-1][key]}, quote_via=quote)
        return 200, page, {"Link": f'<{request.path}?{more}>; rel="next"'}

    def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._serve("GET")

            def do_POST(self) -> None:
                self._serve("POST")

            def _serve(self, method: str) -> None:
                url = urlsplit(self.path)
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if method == "GET" and not url.path.startswith("/v2/"):
                    return self._file(url.path)
                body = json.loads(raw) if raw else None
                request = Request(method, url.path, dict(parse_qsl(url.query)), self.headers.get("Authorization", ""), body)
                stub.requests.append(request)
                status, value, headers = stub.answer(request)
                plain = isinstance(value, str)
                content = value if plain else json.dumps(copy.deepcopy(value))
                return self._send(status, "text/plain" if plain else "application/json", content.encode(), headers)

            def _file(self, path: str) -> None:
                file = PAGE / (path.lstrip("/") or "index.html")
                if not file.is_file() or file.parent != PAGE:
                    return self._send(404, "text/plain", b"no such file", {})
                return self._send(200, TYPES[file.suffix], file.read_bytes(), {"Content-Security-Policy": POLICY})

            def _send(self, status: int, kind: str, content: bytes, headers: Mapping[str, str]) -> None:
                self.send_response(status)
                for name, value in {
                    "Content-Type": kind,
                    "Content-Length": str(len(content)),
                    "X-Content-Type-Options": "nosniff",
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *_: object) -> None:  # noqa: A002
                pass

        return Handler
