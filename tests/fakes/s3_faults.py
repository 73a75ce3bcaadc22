"""A bad network and a bad server, between an S3 client and a good one: a proxy that plays one fault per request as told.

    with FaultProxy(upstream) as proxy:
        proxy.play("UploadPart", Answer(503, "SlowDown"), times=2)

What matches no fault is passed on unchanged, signatures stay valid (the Host header is the client's).
"""

from __future__ import annotations

import http.client
import os
import re
import select
import socket
import ssl
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self
from urllib.parse import parse_qs, urlsplit

STALL_LIMIT = 20.0  # seconds after which a stall ends by itself, if the client never gives up
HOLD_LIMIT = 60.0  # seconds a request is held if nobody releases it
FOREVER = 1 << 30


@dataclass(frozen=True)
class Answer:
    """An error in S3's form, without asking the server behind."""

    status: int
    code: str
    message: str = "a message that nobody should repeat"


@dataclass(frozen=True)
class Reset:
    """The request arrives and is obeyed, the answer is lost in a connection reset."""


@dataclass(frozen=True)
class Truncate:
    """The answer's body ends after so many bytes: the connection is closed, or (`stall`) stays open and silent."""

    size: int
    stall: bool = False


@dataclass(frozen=True)
class Stall:
    """The request arrives and is not answered."""


@dataclass(frozen=True)
class Flip:
    """One bit of the request's body is turned over on its way to the server."""


@dataclass(frozen=True)
class FlipAnswer:
    """One bit of the answer's body is turned over on its way to the client."""


@dataclass(frozen=True)
class DropPart:
    """The server behind is told to make the object without its last part, and says that all is well."""


@dataclass(frozen=True)
class Rewrite:
    """Other headers in the answer; None removes one."""

    headers: Mapping[str, str | None]


@dataclass(frozen=True)
class ListsAsMinio:
    """Of ListMultipartUploads: nothing is found below a prefix, which is taken for a whole key; without one all are (as seen of MinIO's
    sources of 2026-02-12)."""


class Hold:
    """The request waits until `release`, and is then passed on: a fault only to who has no patience. `held`: one waits."""

    def __init__(self) -> None:
        self.held, self._released = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.held.set()
        self._released.wait(HOLD_LIMIT)

    def release(self) -> None:
        self._released.set()


Fault = Answer | Reset | Truncate | Stall | Flip | FlipAnswer | DropPart | Rewrite | ListsAsMinio | Hold


@dataclass
class Request:
    """One request that the proxy saw."""

    operation: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)


class FaultProxy:
    """Listens on a free port of 127.0.0.1. `tls`: a context with a certificate makes it HTTPS."""

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.upstream = upstream
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fault proxy")
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[Request]:
        return self._server.requests

    def seen(self, operation: str) -> list[Request]:
        return [r for r in self.requests if r.operation == operation]

    def play(
        self, operation: str, fault: Fault, *, times: int = FOREVER, after: int = 0, key: str = "", some: range | None = None
    ) -> None:
        """The next `times` requests of `operation`, after letting `after` pass, meet `fault`; only those whose path holds `key`, and that
        ask for `some` of these bytes."""
        self._server.faults.append(_Planned(operation, fault, after, times, key, some))

    def heal(self) -> None:
        """No more faults."""
        self._server.faults.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@dataclass
class _Planned:
    operation: str
    fault: Fault
    skip: int
    times: int
    key: str = ""
    some: range | None = None


class _Server(ThreadingHTTPServer):
    upstream = ""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.lock = threading.Lock()
        self.faults: list[_Planned] = []
        self.requests: list[Request] = []

    def next_fault(self, operation: str, path: str, asked: range) -> Fault | None:
        with self.lock:
            for planned in self.faults:
                if planned.operation != operation or not planned.times or planned.key not in path:
                    continue
                some = planned.some
                if some is not None and not (asked.start < some.stop and some.start < asked.stop):
                    continue
                if planned.skip:
                    planned.skip -= 1
                    continue
                planned.times -= 1
                return planned.fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what this is for."""


def operation_of(method: str, path: str) -> str:
    """The name that S3 gives a request."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    is_object = "/" in parts.path.strip("/")
    for key, names in _BY_QUERY.items():
        if key in query and method in names:
            return names[method]
    return _BY_METHOD[is_object].get(method, method)


def _range_of(header: str) -> range:
    """Bytes that `bytes=<first>-<last>` asks for; none for anything else."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", header)
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


def _without_last_part(body: bytes) -> bytes:
    """CompleteMultipartUpload's list of parts, one shorter."""
    start, end = body.rindex(b"<Part>"), body.rindex(b"</Part>") + len(b"</Part>")
    return body[:start] + body[end:]


_BY_QUERY: dict[str, dict[str, str]] = {
    "uploads": {"POST": "CreateMultipartUpload", "GET": "ListMultipartUploads"},
    "partNumber": {"PUT": "UploadPart"},
    "uploadId": {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"},
    "list-type": {"GET": "ListObjectsV2"},
}
_BY_METHOD: dict[bool, dict[str, str]] = {
    True: {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"},
    False: {"PUT": "CreateBucket", "HEAD": "HeadBucket"},
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    hop_by_hop: ClassVar = {"connection", "transfer-encoding", "keep-alive", "date", "server"}

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        operation = operation_of(self.command, self.path)
        with self.server.lock:
            self.server.requests.append(Request(operation, self.path, {k.lower(): v for k, v in self.headers.items()}))
        fault = self.server.next_fault(operation, self.path, _range_of(self.headers.get("Range", "")))
        if isinstance(fault, Stall):
            return self._stall()
        if isinstance(fault, Answer):
            return self._answer(fault)
        if isinstance(fault, Hold):
            fault.wait()
        if isinstance(fault, Flip):
            body = bytes([body[0] ^ 1]) + body[1:]
        if isinstance(fault, DropPart):
            body = _without_last_part(body)
        status, headers, content = self._forward(body)
        if isinstance(fault, FlipAnswer) and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if isinstance(fault, Reset):
            return self._reset()
        if isinstance(fault, Rewrite):
            headers = {k: v for k, v in headers.items() if k not in fault.headers}
            headers |= {k: v for k, v in fault.headers.items() if v is not None}
        if isinstance(fault, ListsAsMinio):
            if any(parse_qs(urlsplit(self.path).query).get("prefix", [])):
                content = re.sub(rb"(?s)<Upload>.*?</Upload>", b"", content)
            headers["content-length"] = str(len(content))
        self._send(status, headers, content[: fault.size] if isinstance(fault, Truncate) else content)
        if isinstance(fault, Truncate):
            return self._stall() if fault.stall else self._reset(hard=False)
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Ask the server behind; header names in lower case."""
        connection = http.client.HTTPConnection(self.server.upstream.removeprefix("http://"), timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                connection.putheader(key, str(len(body)) if key.lower() == "content-length" else value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            content = answer.read()
            headers = {k.lower(): v for k, v in answer.getheaders() if k.lower() not in self.hop_by_hop}
        finally:
            connection.close()
        if self.command != "HEAD":
            headers["content-length"] = str(len(content))
        return answer.status, headers, content

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, fault: Answer) -> None:
        text = f"<Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>".encode()
        self._send(fault.status, {"content-type": "application/xml", "content-length": str(len(text))}, text)

    def _stall(self) -> None:
        select.select([self.connection], [], [], STALL_LIMIT)  # readable: the client has given up
        self.close_connection = True

    def _reset(self, *, hard: bool = True) -> None:
        self.close_connection = True
        if hard:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def log_message(self, *_: object) -> None:
        """Silent: the test says what went wrong."""
