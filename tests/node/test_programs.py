"""Programs that people run: dumped, killed, restored, and shown to be the old process with its data."""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from tests import keeper
from tests.daemon import Daemon, details, failed, ready
from tests.keeper import wait_until
from tests.node.workload import LIMIT, PROGRAMS, Program, checkpointed, goes_on

pytestmark = pytest.mark.node


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- redis --------------------------------------------------------------------------------------------------------------------

KEYS, VALUE = 50_000, 4096  # 200 MB


class Redis(contextlib.AbstractContextManager["Redis"]):
    """A client: requests in RESP, many at once."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
        self._file = self._socket.makefile("rb")

    def ask(self, *requests: Sequence[bytes]) -> list[bytes | int | list[bytes | None] | None]:
        """The answers to these commands, sent in one go."""
        self._socket.sendall(b"".join(self._request(words) for words in requests))
        return [self._answer() for _ in requests]

    def _request(self, words: Sequence[bytes]) -> bytes:
        return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)

    def _answer(self) -> bytes | int | list[bytes | None] | None:
        line = self._file.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            return None if rest == b"-1" else self._file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self._answer() for _ in range(int(rest))]  # type: ignore[misc]
        if kind == b":":
            return int(rest)
        assert kind == b"+", line
        return rest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()


def redis_values() -> Iterator[tuple[bytes, bytes]]:
    """All keys, each with a value no other has."""
    noise = random.Random(4).randbytes(1 << 22)
    for i in range(KEYS):
        at = i * 7919 % (len(noise) - VALUE)
        yield b"key:%d" % i, b"%08d" % i + noise[at : at + VALUE - 8]


def batches(pairs: Iterator[tuple[bytes, bytes]], size: int = 1000) -> Iterator[dict[bytes, bytes]]:
    everything = list(pairs)
    for at in range(0, len(everything), size):
        yield dict(everything[at : at + size])


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[tuple[Program, int]]:
    """As a plain process that saves nothing by itself."""
    port = free_port()
    said = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no"]
    with Program(directory, ["redis-server", *said, "--dir", str(directory)]) as program:
        wait_until(lambda: any("Ready to accept" in line for line in program.lines()), LIMIT, "redis")
        yield program, port


def test_redis_comes_back_with_all_its_keys(daemon: Daemon, tmp_path: Path) -> None:
    token = secrets.token_bytes(16)
    with redis(tmp_path) as (program, port):
        with Redis(port) as client:
            client.ask([b"SET", b"token", token])
            for batch in batches(redis_values()):
                client.ask([b"MSET", *(word for pair in batch.items() for word in pair)])
            before = client.ask(*[[b"INCR", b"counter"]] * 5)[-1]
            run_id = [line for line in str(client.ask([b"INFO", b"server"])[0]).split("\\r\\n") if line.startswith("run_id")]

        done = checkpointed(daemon, program)
        assert done.profile.raw_bytes > KEYS * VALUE
        ready(daemon.restore(done.checkpoint_id))

        with Redis(port) as client:
            assert client.ask([b"GET", b"token"]) == [token]
            assert client.ask([b"INCR", b"counter"]) == [before + 1]  # type: ignore[operator]
            assert client.ask([b"DBSIZE"]) == [KEYS + 2]
            for batch in batches(redis_values()):
                assert client.ask([b"MGET", *batch]) == [list(batch.values())]
            assert run_id[0] in str(client.ask([b"INFO", b"server"])[0]), "another server answers"


def test_an_open_connection_is_refused_unless_it_may_be_closed(daemon: Daemon, tmp_path: Path) -> None:
    with redis(tmp_path) as (program, port), Redis(port) as client:
        client.ask([b"SET", b"token", b"old"])
        refused = failed(daemon.checkpoint(program.target), "tcp_established")
        assert '{"tcp": "close"}' in refused.hint
        assert details(refused)["wanted"] == "none"
        daemon.insist_clean()
        assert client.ask([b"GET", b"token"]) == [b"old"], "the connection of a workload that was refused is as it was"

        done = ready(daemon.checkpoint(program.target, criu_opts={"tcp": "close"}))
        assert client.ask([b"SET", b"token", b"new"]) == [b"OK"], "closed when restored, not when dumped"
        program.kill()
        ready(daemon.restore(done.checkpoint_id))
        with Redis(port) as again:
            assert again.ask([b"GET", b"token"]) == [b"old"]


# --- nginx --------------------------------------------------------------------------------------------------------------------

NGINX = """
daemon off;
worker_processes 2;
pid {home}/nginx.pid;
error_log {home}/error.log;
{user}
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    keepalive_timeout 0;
    server {{
        listen 127.0.0.1:{port};
        root {home}/html;
        location = /token {{ return 200 {token}; }}
        location = /pid {{ return 200 $pid; }}
        location = /status {{ stub_status; }}
    }}
}}
"""


def http(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=LIMIT) as answer:
        return str(answer.read().decode())


def handled(port: int) -> int:
    """How many requests all workers have handled: in memory they share."""
    return int(http(port, "/status").splitlines()[2].split()[2])


def test_nginx_comes_back_with_its_workers(daemon: Daemon, tmp_path: Path) -> None:
    """Its configuration is gone when it is restored: who answers with the token has read it before."""
    token, port, page = secrets.token_hex(16), free_port(), secrets.token_hex(50_000)
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "page").write_text(page)
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(home=tmp_path, port=port, token=token, user="user root;"))
    with Program(tmp_path, ["nginx", "-p", str(tmp_path), "-c", str(config), "-e", str(tmp_path / "error.log")]) as program:
        wait_until(lambda: len(keeper.descendants(program.pid)) == 2 and (tmp_path / "nginx.pid").exists(), LIMIT, "nginx")
        workers = keeper.descendants(program.pid)
        wait_until(lambda: answers(port), LIMIT, "nginx to answer")
        before = handled(port)
        done = checkpointed(daemon, program)
        config.unlink()
        ready(daemon.restore(done.checkpoint_id))

        assert keeper.descendants(program.pid) == workers
        assert http(port, "/token") == token
        assert http(port, "/page") == page
        assert {int(http(port, "/pid")) for _ in range(20)} <= set(workers)
        assert before < handled(port) < before + 40


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(http(port, "/status"))
    return False


# --- Node.js and Java ---------------------------------------------------------------------------------------------------------


def test_a_node_js_server_counts_on(daemon: Daemon, tmp_path: Path) -> None:
    """UV_USE_IO_URING=0: some versions of libuv open an io_uring, which CRIU cannot save (we refuse it by name)."""
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "UV_USE_IO_URING": "0"}
    with Program(tmp_path, ["node", str(PROGRAMS / "server.js")], env=env) as program:
        port = int(program.said("port")[0])
        before = [json.loads(http(port, "/")) for _ in range(3)][-1]
        wait_until(lambda: not established(port), LIMIT, "the end of our connections")
        done = checkpointed(daemon, program)
        ready(daemon.restore(done.checkpoint_id))
        assert json.loads(http(port, "/")) == {**before, "requests": before["requests"] + 1}


def established(port: int) -> bool:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_a_jvm_keeps_its_heap(daemon: Daemon, tmp_path: Path) -> None:
    """-XX:-UsePerfData: the JVM's shared file in /tmp is removed by any other JVM that finds its process gone."""
    assert shutil.which("javac"), "javac is needed"
    subprocess.run(["javac", "-d", str(tmp_path), str(PROGRAMS / "Heap.java")], check=True, timeout=60)
    argv = ["java", "-XX:-UsePerfData", "-Xmx256m", "-XX:+UseSerialGC", "-cp", str(tmp_path), "Heap"]
    with Program(tmp_path, argv) as program:
        before = program.beat()
        done = checkpointed(daemon, program)
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)
