"""How many nodes do one broker and one control plane hold, and what gives in first?

What a node says is recorded from a real daemon: at rest, and around one checkpoint that comes by the bus. Then a crowd (`crowd.py`) of more
and more nodes says the same to one real broker, each on a connection of its own, and one `hibernode api` after the other (SQLite,
PostgreSQL) keeps them. For each size: what it takes to be made ready, what the broker needs at rest, how long the lists and a request for
a checkpoint take, and a drain: a tenth of the nodes, 1,000 at most, are told to checkpoint at once. Beside that each node checkpoints once
an hour. Broker, servers, database and crowd share this machine: seconds of processor time and bytes are what to take along.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks import crowd, held
from benchmarks.control import LIMIT, Api, cpu, serving
from benchmarks.tables import table
from hibernode import wire
from hibernode.api.db import Database
from hibernode.api.migrate import migrate
from hibernode.config import Bus, Config
from hibernode.drivers.nats import NatsControl
from hibernode.errors import BusUnavailable
from hibernode.model import CheckpointCommand, Target
from tests.daemon import Daemon
from tests.keeper import wait_until
from tests.nats_server import NatsServer
from tests.postgres import PostgresServer

NAME = "nodes"
CLUSTER, RECORDED = "crowd", "node-recorded"
SIZES = (100, 1_000, 3_000, 10_000)
DRAIN, PART = 1_000, 10  # nodes at most, and one of so many
HOURLY = 1  # checkpoints of each node
_TIME = "1700000000.125"
_KINDS = (
    ("command", r"hibernode\.cmd\."), ("event", r"hibernode\.evt\."), ("progress", r"hibernode\.progress\."),
    ("find", r"hibernode\.find\."),
    ("record", r"\$KV\."), ("pull", r"\$JS\.API\.CONSUMER\.MSG\.NEXT\."), ("acknowledgement", r"\$JS\.ACK\."),
    ("request to JetStream", r"\$JS\.API\."), ("answer", r"_INBOX\."),
)  # fmt: skip


def measure(*, quick: bool) -> dict[str, Any]:
    sizes, rest = ((100, 300), 6.0) if quick else (SIZES, 12.0)
    recorded, templates = _recorded(rest=12.0 if quick else 30.0)
    found: dict[str, Any] = {"node_interval": Config().limits.node_interval, "hourly": HOURLY, "recorded": recorded, "stages": []}
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-", dir="/var/tmp")))
        broker = stack.enter_context(NatsServer(home / "nats"))
        driver = stack.enter_context(_Driver(broker.url))
        postgres = stack.enter_context(PostgresServer(durable=True, under="/var/tmp"))
        databases = {"sqlite": f"sqlite:///{home}/api.sqlite", "postgresql": postgres.database("api")}
        for url in databases.values():
            with contextlib.closing(Database(url)) as database:
                migrate(database)
        (home / "templates").write_text(json.dumps(templates))
        people = stack.enter_context(_Crowd(broker, home / "templates"))
        memory = _rss(broker.pid)
        for nodes in sizes:
            stage: dict[str, Any] = {"nodes": nodes, "load_before": os.getloadavg()[0]}
            began = cpu(broker.pid)
            stage["ready"] = people.ask(f"grow {nodes}")
            stage["ready"]["broker_cpu"] = cpu(broker.pid) - began
            stage["rest"] = _rest(broker, people, rest)
            stage["broker_bytes_each"] = (_rss(broker.pid) - memory) / nodes
            print(f"{nodes} nodes: {stage}", flush=True)
            for name, url in databases.items():
                processes = {"broker": broker.pid} | ({"database": postgres.pid} if name == "postgresql" else {})
                with serving(home / f"{name}-{nodes}", broker.url, url, CLUSTER) as api:
                    stage[name] = _served(api, driver, processes | {"api": api.pid}, nodes, rest)
                    print(f"{nodes} nodes, {name}: {stage[name]}", flush=True)
            stage["again"] = _again(broker, people)
            print(f"{nodes} nodes, again: {stage['again']}", flush=True)
            stage["load_after"] = os.getloadavg()[0]
            found["stages"].append(stage)
    return found


# --- what a daemon says -----------------------------------------------------------------------------------------------------------


class _Said(NamedTuple):
    at: float
    subject: str
    data: bytes


def _recorded(rest: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes and rates of one node's messages, and its own words."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-")))
        broker = stack.enter_context(NatsServer(home / "nats"))
        program = held.build(home / "held")
        driver = stack.enter_context(_Driver(broker.url))
        daemon = stack.enter_context(
            Daemon(bus=broker.url, node=RECORDED, settings={"cluster": CLUSTER, "limits": {"progress_interval": 0.25}})
        )
        job = daemon.run("trainer", [str(program), "24"])
        said = stack.enter_context(_Listening(broker.url)).said
        wait_until(lambda: _of("record", said), LIMIT, "a record")
        began = time.time()
        time.sleep(rest)
        at_rest = [each for each in said if each.at >= began]
        action, began = str(uuid.uuid4()), time.time()
        driver.checkpoint(RECORDED, action, compression="zstd:15", streams=1)  # a second or two: there is progress
        wait_until(lambda: any(b'"ready"' in each.data for each in _of("event", said)), LIMIT, "the end of it")
        wait_until(lambda: _of("acknowledgement", [s for s in said if s.at >= began]), LIMIT, "its acknowledgement")
        around = [each for each in said if each.at >= began]
        events, progress = _of("event", around), _of("progress", around)
        records = _of("record", said)
    with_time = re.compile(r'"time":\s*[0-9.]+')
    templates = {
        "node": RECORDED, "action": action, "pod": job.uid, "time": _TIME, "progress": progress[-1].data.decode(),
        "record": with_time.sub(f'"time":{_TIME}', records[-1].data.decode()),
        "events": [with_time.sub(f'"time":{_TIME}', each.data.decode()) for each in events],
    }  # fmt: skip
    if len(events) != 3 or not progress:
        raise RuntimeError(f"{len(events)} events and {len(progress)} of progress")
    return {"at_rest_each_minute": _counted(at_rest, 60 / rest), "one_checkpoint": _counted(around, 1)}, templates


def _kind(subject: str) -> str:
    return next((kind for kind, pattern in _KINDS if re.match(pattern, subject)), "another")


def _of(kind: str, said: Sequence[_Said]) -> list[_Said]:
    return [each for each in list(said) if _kind(each.subject) == kind]


def _counted(said: Sequence[_Said], factor: float) -> dict[str, dict[str, float]]:
    sizes = defaultdict[str, list[int]](list)
    for each in said:
        sizes[_kind(each.subject)].append(len(each.data))
    return {
        kind: {"count": round(len(of) * factor, 1), "bytes": statistics.median(of), "bytes_all": round(sum(of) * factor)}
        for kind, of in sorted(sizes.items())
    }


class _Listening(contextlib.AbstractContextManager["_Listening"]):
    """Hears all that goes through a broker."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("nats://").split(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.sendall(b'CONNECT {"verbose":false,"headers":true}\r\nSUB > 1\r\n')
        self._file = self._socket.makefile("rb")
        self.said = list[_Said]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := self._file.readline():
                words = line.split()
                if words[:1] == [b"PING"]:
                    self._socket.sendall(b"PONG\r\n")
                elif words[:1] in ([b"MSG"], [b"HMSG"]):
                    data = self._file.read(int(words[-1]) + 2)[:-2]
                    head = int(words[-2]) if words[0] == b"HMSG" else 0
                    self.said.append(_Said(time.time(), words[1].decode(), data[head:]))

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._file.close()
        self._socket.close()


# --- who is asked -------------------------------------------------------------------------------------------------------------------


class _Driver(contextlib.AbstractContextManager["_Driver"]):
    """A control plane's end of the bus, in a loop of its own: it files commands, and reads records."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._bus = NatsControl(Bus(url=url), CLUSTER)
        self.late = 0  # commands that the broker did not confirm in time, and that were sent again

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._bus.start())
        self._do(self._bus.admit(RECORDED))
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._bus.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT)

    def checkpoint(self, node: str, action: str, **overrides: Any) -> None:
        self._do(self._send(node, action, overrides))

    def checkpoints(self, nodes: Sequence[str]) -> None:
        """All at once, 100 on their way to the stream."""

        async def all_of_them() -> None:
            places = asyncio.Semaphore(100)

            async def one(node: str) -> None:
                async with places:
                    await self._send(node, str(uuid.uuid4()), {})

            await asyncio.gather(*(one(node) for node in nodes))

        self._do(all_of_them())

    async def _send(self, node: str, action: str, overrides: Mapping[str, Any]) -> None:
        target = Target(namespace="default", pod_name="trainer")
        command = CheckpointCommand.model_validate(
            {
                "action_id": action,
                "checkpoint_id": action,
                "target": target,
                "overrides": overrides,
                "expires_at": time.time() + LIMIT,
            }
        )
        try:
            await self._bus.send(node, "checkpoint", action, wire.encode_command(command))
        except BusUnavailable:  # it may be in the stream already; the second time it is stored once
            self.late += 1
            await self._bus.send(node, "checkpoint", action, wire.encode_command(command))

    def nodes(self) -> tuple[float, int]:
        """Seconds to read all records, and how many there are."""
        began = time.perf_counter()
        found = self._do(self._bus.nodes())
        return time.perf_counter() - began, len(found)


class _Crowd(contextlib.AbstractContextManager["_Crowd"]):
    def __init__(self, broker: NatsServer, templates: Path) -> None:
        words = ["127.0.0.1", broker.port, CLUSTER, Config().limits.node_interval, templates]
        argv = [sys.executable, "-m", "benchmarks.crowd", *map(str, words)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, order: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"the crowd ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    @property
    def pid(self) -> int:
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


# --- what is measured ---------------------------------------------------------------------------------------------------------------


def _rest(broker: NatsServer, people: _Crowd, seconds: float) -> dict[str, Any]:
    """Nobody asks for anything, no server runs."""
    time.sleep(max(2.0, Config().limits.node_interval))  # until each has told its record once
    people.ask("count")
    began, used, theirs = time.monotonic(), cpu(broker.pid), cpu(people.pid)
    time.sleep(seconds)
    counts = people.ask("count")
    took = time.monotonic() - began
    return {
        "broker_cores": (cpu(broker.pid) - used) / took,
        "crowd_cores": (cpu(people.pid) - theirs) / took,
        "broker_mebibytes": _rss(broker.pid) / (1 << 20),
        "each_second": {kind: count / took for kind, count in sorted(counts.items())},
    }


def _again(broker: NatsServer, people: _Crowd) -> dict[str, Any]:
    """All lose their connection, as when a broker is started anew."""
    used = cpu(broker.pid)
    found = people.ask("again")
    people.ask("count")
    return {**found, "broker_cpu": cpu(broker.pid) - used}


def _served(api: Api, driver: _Driver, pids: Mapping[str, int], nodes: int, rest: float) -> dict[str, Any]:
    seconds, known = driver.nodes()
    found: dict[str, Any] = {"records_s": seconds, "records": known}
    found["rest"] = _cores(pids, lambda: _hourly(driver, nodes, rest))
    found["nodes_s"], found["nodes_bytes"] = _timed(api, "/v2/nodes", 3)
    found["actions_s"] = _timed(api, "/v2/actions?limit=200", 20)[0]
    found["request_s"], found["requests_without_answer"] = _requests(
        api, [crowd.pod_of(f"node-{n * 37 % nodes:05}") for n in range(1, 6)]
    )
    found["drain"] = _drain(api, driver, pids, min(DRAIN, nodes // PART))
    found["api_mebibytes"], found["commands_late"] = _rss(api.pid) / (1 << 20), driver.late
    return found


def _hourly(driver: _Driver, nodes: int, seconds: float) -> None:
    """The checkpoints of the hour, in their time."""
    count = max(1, round(nodes * HOURLY * seconds / 3600))
    for n in range(count):
        driver.checkpoints([f"node-{n * 61 % nodes:05}"])
        time.sleep(seconds / count)


def _drain(api: Api, driver: _Driver, pids: Mapping[str, int], count: int) -> dict[str, Any]:
    """Until the last of their events is in the database."""
    time.sleep(crowd.SHIPS + 1)  # what was begun before is over
    before, began = api.applied(), time.monotonic()
    filed = list[float]()

    def all_of_it() -> None:
        driver.checkpoints([f"node-{n:05}" for n in range(count)])
        filed.append(time.monotonic() - began)
        wait_until(lambda: time.sleep(0.05) or api.applied() >= before + 3 * count, LIMIT, f"the events of {count} checkpoints")

    cores = _cores(pids, all_of_it)
    took = time.monotonic() - began
    return {"nodes": count, "filed_s": filed[0], "kept_s": took, "behind_s": took - filed[0] - crowd.SHIPS, "cores": cores}


def _cores(pids: Mapping[str, int], work: Callable[[], None]) -> dict[str, float]:
    used, began = {name: cpu(pid) for name, pid in pids.items()}, time.monotonic()
    work()
    took = time.monotonic() - began
    return {name: (cpu(pid) - used[name]) / took for name, pid in pids.items()}


def _timed(api: Api, path: str, times: int) -> tuple[list[float], int]:
    seconds, size = list[float](), 0
    for _ in range(times):
        began = time.perf_counter()
        status, body, _ = api.get(path)
        seconds.append(time.perf_counter() - began)
        size = len(body)
        if status != 200:
            raise RuntimeError(f"{path}: {status} {body[:300]!r}")
    return seconds, size


def _requests(api: Api, pods: Sequence[str]) -> tuple[list[float], int]:
    """Of a checkpoint, by the UID of a pod: the nodes are asked who has it. And how often none has answered within `api.find_timeout`: one
    process speaks for all of them here, and has other things to do."""
    seconds, without = list[float](), 0
    for pod in pods:
        body = json.dumps({"pod_id": pod})
        began = time.perf_counter()
        api.connection.request("POST", "/v2/checkpoint/pod", body, {"content-type": "application/json"})
        reply = api.connection.getresponse()
        said = reply.read()
        seconds.append(time.perf_counter() - began)
        without += reply.status == 404
        if reply.status not in (200, 404):
            raise RuntimeError(f"a checkpoint: {reply.status} {said[:300]!r}")
    return seconds, without


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


# --- words --------------------------------------------------------------------------------------------------------------------------


def render(found: Mapping[str, Any]) -> str:
    lines = []
    for title, key in (("at rest, each minute", "at_rest_each_minute"), ("around one checkpoint", "one_checkpoint")):
        rows = {
            kind: [f"{of['count']:g}", f"{of['bytes']:.0f}", f"{of['bytes_all']:.0f}"]
            for kind, of in found["recorded"][key].items()
        }
        lines += [f"a real node {title}:", *table("message", ("count", "bytes of one", "bytes of all"), rows), ""]
    stages = found["stages"]
    rows = {name: [cell(stage) for stage in stages] for name, cell in _CELLS.items()}
    return "\n".join([*lines, *table("nodes", [str(stage["nodes"]) for stage in stages], rows)])


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f} ms"


def _both(cell: Callable[[Mapping[str, Any]], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda stage: f"{cell(stage['sqlite'])}, {cell(stage['postgresql'])}"


def _said(cores: Mapping[str, float]) -> str:
    return " ".join(f"{name[0]} {of:.2f}" for name, of in cores.items())


_CELLS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "made ready: seconds": lambda s: f"{s['ready']['seconds']:.1f}",
    "made ready: requests/s": lambda s: f"{s['ready']['requests'] / s['ready']['seconds']:.0f}",
    "made ready: broker's CPU seconds": lambda s: f"{s['ready']['broker_cpu']:.1f}",
    "all come back at once: seconds": lambda s: f"{s['again']['seconds']:.1f}",
    "all come back: broker's CPU seconds": lambda s: f"{s['again']['broker_cpu']:.1f}",
    "broker at rest: cores": lambda s: f"{s['rest']['broker_cores']:.2f}",
    "broker: MiB": lambda s: f"{s['rest']['broker_mebibytes']:.0f}",
    "broker: KiB for each node": lambda s: f"{s['broker_bytes_each'] / 1024:.0f}",
    "at rest: messages to the broker/s": lambda s: (
        f"{sum(n for kind, n in s['rest']['each_second'].items() if 'sent' in kind):.0f}"
    ),
    "all records, by the bus": _both(lambda of: f"{of['records_s'] * 1e3:.0f} ms"),
    "GET /v2/nodes": _both(lambda of: _median(of["nodes_s"])),
    "GET /v2/actions": _both(lambda of: _median(of["actions_s"])),
    "POST /v2/checkpoint/pod": _both(lambda of: _median(of["request_s"])),
    "of five, without an answer": _both(lambda of: f"{of['requests_without_answer']}"),
    "cores, once an hour: SQLite": lambda s: _said(s["sqlite"]["rest"]),
    "cores, once an hour: PostgreSQL": lambda s: _said(s["postgresql"]["rest"]),
    "drain: nodes": lambda s: f"{s['sqlite']['drain']['nodes']}",
    "drain: filed after": _both(lambda of: f"{of['drain']['filed_s']:.1f} s"),
    "drain: all kept after": _both(lambda of: f"{of['drain']['kept_s']:.1f} s"),
    "server: MiB": _both(lambda of: f"{of['api_mebibytes']:.0f}"),
    "load before, after": lambda s: f"{s['load_before']:.1f}, {s['load_after']:.1f}",
}
