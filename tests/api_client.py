"""Asking the API as anybody would, over HTTP; and an API server as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hibernode.api.guard import hashed, new_token
from tests import keeper
from tests.daemon import ROOT
from tests.keeper import Kept
from tests.nats_server import free_port

LIMIT = 30.0  # seconds a server may take to start, to answer, to end


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable one, of an ApiError."""
        return str(self.json()["details"]["code"])


def ask(
    port: int, method: str, path: str, body: object = None, *, token: str | None = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """`body` goes as it is if it is bytes, else as JSON."""
    named = dict(headers or {})
    if token is not None:
        named["Authorization"] = f"Bearer {token}"
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
    if data is not None:
        named.setdefault("Content-Type", "application/json")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    try:
        connection.request(method, path, data, named)
        answer = connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


class ApiServer:
    """`with ApiServer(nats.url) as api`: a process `hibernode api`. It keeps its port and its token when it is started again."""

    def __init__(self, bus: str, *, database: str = "", cluster: str = "default", settings: str = "") -> None:
        """`database`: an address; empty: SQLite of its own. `settings`: further lines of the table [api]."""
        self._home = Path(tempfile.mkdtemp(prefix="hn-api-"))
        self.token, self.port = new_token(), free_port()
        self.config, self._log = self._home / "hibernode.toml", self._home / "log"
        self.config.write_text(
            f'cluster = "{cluster}"\nstate_dir = "{self._home}/state"\n[bus]\nurl = "{bus}"\nack_wait = 2.0\n[log]\nformat = "json"\n'
            f'[api]\nlisten = "127.0.0.1:{self.port}"\ndatabase = "{database}"\ntokens = ["tests:{hashed(self.token)}"]\n{settings}\n'
        )
        self._kept: Kept | None = None
        self._befores: list[Kept] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        assert self._kept is not None, "the server does not run"
        return self._kept.pid

    def start(self) -> None:
        """Returns when it answers; broker and database may still be away."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("HIBERNODE_")}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "daemon"), *filter(None, [env.get("PYTHONPATH")])])
        self._kept = Kept([sys.executable, "-m", "hibernode", "api", "--config", str(self.config)], self._log, env=env)
        deadline = time.monotonic() + LIMIT
        while not self._answers():
            if not keeper.alive(self.pid) or time.monotonic() > deadline:
                raise RuntimeError(f"the API server did not start: {self.log[-3000:]}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return self.ask("GET", "/healthz").status == 200
        except OSError:
            return False

    def stop(self) -> int:
        """SIGTERM, and wait for its end; its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """As a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> int:
        assert self._kept is not None
        kept, self._kept = self._kept, None
        self._befores.append(kept)
        os.kill(kept.pid, number)
        return kept.exit_code(LIMIT)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            code = self.stop() if self._kept is not None else 0
            if error is not None:
                print(f"--- log of the API server:\n{self.log[-8000:]}", file=sys.stderr)
            else:
                assert code == 0, f"the server ended with {code}:\n{self.log[-3000:]}"
                assert '"defect"' not in self.log, self.log[-8000:]
        finally:
            for kept in self._befores:
                kept.kill()
            shutil.rmtree(self._home, ignore_errors=True)

    # --- asking -------------------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Reply:
        return ask(self.port, method, path, body, token=self.token, headers=headers)

    def get(self, path: str) -> Any:
        """What it answers, which must be well."""
        reply = self.ask("GET", path)
        assert reply.status == 200, f"{path}: {reply.status} {reply.text}"
        return reply.json() if "json" in reply.headers["content-type"] else reply.text

    def post(self, path: str, body: object) -> str:
        """File something; the action's id."""
        reply = self.ask("POST", path, body)
        assert reply.status == 200, f"{path}: {reply.status} {reply.text}"
        return reply.text

    def status(self, action_id: str) -> str:
        return str(self.get(f"/v2/checkpoint/status/{action_id}")["status"])

    def until(self, action_id: str, *statuses: str, limit: float = 60.0) -> dict[str, Any]:
        """Wait for one of these; the action as it is then. Another end fails."""
        deadline = time.monotonic() + limit
        while True:
            found: dict[str, Any] = {}
            with contextlib.suppress(OSError):  # it may be away for a moment
                found = self.get(f"/v2/actions/{action_id}")
                if found["status"] in statuses:
                    return found
                assert found["status"] not in ("ready", "error") or found["provisional"], found
            assert time.monotonic() < deadline, f"{action_id} is {found.get('status')}, not {statuses}, after {limit} s"
            time.sleep(0.05)
