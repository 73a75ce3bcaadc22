"""Does the control plane keep up with a storm of events, and how fast are its lists after it? A real broker, databases and servers.

A process of its own publishes `rate` events in a second for `seconds`, three for each action, those of thousands of actions in turns. One
`hibernode api` follows them into SQLite, one into PostgreSQL, then two into PostgreSQL. All of them, the broker and the database share this
machine, and every commit waits for the disk. Compared with what the database takes in plain inserts of such rows, 500 in a transaction, by
its driver alone, and with what comes out of the stream when nobody keeps it. Last, a backlog: what was published while no server ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks import storm
from benchmarks.control import LIMIT, Api, cpu, serving
from hibernode.api.db import Database, tables
from hibernode.api.migrate import migrate
from hibernode.config import Bus
from hibernode.drivers.nats import NatsControl
from hibernode.model import Status
from tests.nats_server import NatsServer
from tests.postgres import PostgresServer

NAME = "events"
CLUSTER = "storm"
VARIANTS = {"sqlite": ("sqlite", 1), "postgresql": ("postgresql", 1), "postgresql, 2 servers": ("postgresql", 2)}
HISTORY = 50_000  # actions of the days before
PODS = 500
WATCHED = 300  # actions whose status is asked for again and again
REQUESTS = 100  # of each list
BATCH = 500  # rows of a plain insert
GOAL = 0.1  # seconds that a list may take
_DISK = "/var/tmp"
_SEED = 20


def measure(*, quick: bool) -> dict[str, Any]:
    rate, seconds = (2000, 10) if quick else (5000, 60)
    actions = rate * seconds // len(storm.STATUSES)
    found: dict[str, Any] = {"rate": rate, "seconds": seconds, "actions": actions, "history": HISTORY, "nodes": storm.NODES}
    found["disk"] = {"filesystem": _filesystem(_DISK), "fsync_ms": _fsync()}
    found["variants"] = {name: _variant(*how, rate, actions) for name, how in VARIANTS.items()}
    return found


def _variant(kind: str, servers: int, rate: int, actions: int) -> dict[str, Any]:
    load = os.getloadavg()
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-", dir=_DISK)))
        broker = stack.enter_context(NatsServer(home / "nats"))
        url, processes = f"sqlite:///{home}/api.sqlite", {"broker": [broker.pid]}
        if kind == "postgresql":
            postgres = stack.enter_context(PostgresServer(durable=True, under=_DISK))
            url, processes["database"] = postgres.database("api"), [postgres.pid]
        database = Database(url)
        stack.callback(database.close)
        migrate(database)
        ceilings = {"inserts_per_s": _plain_inserts(database)}
        _remember(database)
        with contextlib.ExitStack() as running:
            apis = [running.enter_context(serving(home / str(n), broker.url, url, CLUSTER)) for n in range(servers)]
            processes["api"] = [api.pid for api in apis]
            found = _storm(broker.url, apis, processes, rate, actions)
            found["verdict"] = _verdict(database, actions) | {"went_back": found.pop("went_back")}
            found["lists_ms"] = _lists(apis[0])
            found["backlog_per_s"] = _backlog(broker.url, apis, rate, actions // 6)
        ceilings["followed_per_s"] = asyncio.run(_followed(broker.url, actions * len(storm.STATUSES)))
        return {"load_before": load, "load_after": os.getloadavg(), **found, "ceilings": ceilings}


# --- the storm ----------------------------------------------------------------------------------------------------------------


def _storm(url: str, apis: Sequence[Api], processes: Mapping[str, Sequence[int]], rate: int, actions: int) -> dict[str, Any]:
    total = actions * len(storm.STATUSES)
    applied, watch = [(time.time(), 0)], _Watch(apis, storm.ids(actions, _SEED))
    used = {name: sum(map(cpu, pids)) for name, pids in processes.items()}
    publisher = subprocess.Popen(_publishing(url, actions, rate, _SEED), stdout=subprocess.PIPE, text=True)
    published = list[tuple[float, int]]()
    try:
        reader = threading.Thread(target=lambda: published.extend(_line(line) for line in publisher.stdout or ()), daemon=True)
        reader.start()
        while applied[-1][1] < total and time.time() - applied[0][0] < LIMIT:
            if publisher.poll():
                raise RuntimeError(f"the publisher ended with {publisher.returncode}")
            watch.look(published[-1][1] if published else 0)
            if time.time() - applied[-1][0] > 0.25:
                applied.append((time.time(), sum(api.applied() for api in apis)))
        took = time.time() - published[0][0]
        cores = {name: (sum(map(cpu, pids)) - used[name]) / took for name, pids in processes.items()}
        watch.finish()
    finally:
        publisher.kill()
        publisher.wait()
    began, ended = published[0][0], published[-1][0]
    lags = [at - _when(published, count) for at, count in applied if began < at <= ended and count]
    return {
        "published_per_s": total / (ended - began),
        "applied_per_s": total / took,
        "lag_at_end_s": max(0.0, applied[-1][0] - ended),
        "lag_max_s": max(lags, default=0.0),
        "cores": cores,
        "status_ms": _spread(watch.seconds),
        "statuses_seen": len(watch.seconds),
        "went_back": watch.went_back,
        "applied": [(round(at - began, 2), count) for at, count in applied],
    }


def _publishing(url: str, actions: int, rate: int, seed: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.storm", url, CLUSTER, str(actions), str(rate), str(seed)]


def _backlog(url: str, apis: Sequence[Api], rate: int, actions: int) -> float:
    """Events kept each second, of those that were published while the servers stood still."""
    before, total = sum(api.applied() for api in apis), actions * len(storm.STATUSES)
    for api in apis:
        os.kill(api.pid, signal.SIGSTOP)
    try:
        subprocess.run(_publishing(url, actions, rate, _SEED + 1), stdout=subprocess.DEVNULL, check=True)
    finally:
        for api in apis:
            os.kill(api.pid, signal.SIGCONT)
    began = time.perf_counter()
    while sum(api.applied() for api in apis) < before + total and time.perf_counter() - began < LIMIT:
        time.sleep(0.2)
    return total / (time.perf_counter() - began)


def _line(line: str) -> tuple[float, int]:
    at, count = line.split()
    return float(at), int(count)


def _when(published: Sequence[tuple[float, int]], count: int) -> float:
    """The moment at which so many were published; events are applied before their publisher hears of them."""
    return next((at for at, so_many in published if so_many >= count), published[-1][0])


class _Watch:
    """Asks for the status of some actions from their first event to their last, and remembers any that went back."""

    def __init__(self, apis: Sequence[Api], ids: Sequence[str]) -> None:
        step = max(1, len(ids) // WATCHED)
        self._left = [
            (n * len(storm.STATUSES), ids[n]) for n in range(0, len(ids), step)
        ]  # from when so many events were published
        self._turns, self._open = itertools.cycle(apis), dict[str, int]()
        self.seconds, self.went_back = list[float](), 0

    def look(self, published: int) -> None:
        """At one of them, every 20th of a second."""
        began = time.time()
        while self._left and self._left[0][0] <= published:
            self._open[self._left.pop(0)[1]] = -1
        if self._open:
            action_id, rank = next(iter(self._open.items()))
            found = self._ask(action_id)
            self.went_back += found < rank
            del self._open[action_id]  # to the end of the row
            if found < Status.READY.rank:
                self._open[action_id] = found
        time.sleep(max(0.0, 0.05 - (time.time() - began)))

    def finish(self) -> None:
        for action_id, rank in self._open.items():
            found = self._ask(action_id)
            self.went_back += found < rank or found != Status.READY.rank

    def _ask(self, action_id: str) -> int:
        began = time.perf_counter()
        status, body, _ = next(self._turns).get(f"/v2/checkpoint/status/{action_id}")
        self.seconds.append(time.perf_counter() - began)
        said = json.loads(body)["status"] if status == 200 else ""
        return Status(said).rank if said in set(Status) else -1


def _verdict(database: Database, actions: int) -> dict[str, Any]:
    """Of the tables: is everything there, once, and each action where its last event says?"""
    kept, events = tables.tables["actions"], tables.tables["events"]
    of_each = sa.func.count().label("n"), sa.func.min(events.c.seq).label("first"), sa.func.max(events.c.seq).label("last")
    each = sa.select(*of_each).group_by(events.c.action_id).subquery()
    whole = sa.and_(each.c.n == 3, each.c.first == 1, each.c.last == 3)
    ended = (kept.c.pod_name == "", kept.c.status == "ready", kept.c.seq == 3, kept.c.location.endswith(kept.c.action_id))
    with database.writing() as connection:
        told = dict(connection.execute(sa.select(events.c.seq, sa.func.count()).group_by(events.c.seq, events.c.status)).all())
        found = {
            "events": connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one(),
            "actions_with_all_events": connection.execute(sa.select(sa.func.count()).select_from(each).where(whole)).scalar_one(),
            "actions_ready": connection.execute(sa.select(sa.func.count()).select_from(kept).where(*ended)).scalar_one(),
        }
    right = found["actions_with_all_events"] == found["actions_ready"] == actions and set(told.values()) == {actions}
    return {**found, "nothing_lost": right and found["events"] == 3 * actions}


# --- what it is compared with ---------------------------------------------------------------------------------------------------


def _plain_inserts(database: Database) -> float:
    """Rows each second, of the table of events, by the driver's own executemany; the best of three."""
    columns = [column.name for column in tables.tables["events"].columns]
    mark = "?" if database.url.startswith("sqlite") else "%s"
    insert = f"INSERT INTO plain ({', '.join(columns)}) VALUES ({', '.join(mark for _ in columns)})"
    details = json.dumps({"location": f"s3://bucket/checkpoints/{uuid.uuid4()}"})
    with database.writing() as connection:
        connection.exec_driver_sql("CREATE TABLE plain AS SELECT * FROM events")
        connection.exec_driver_sql("CREATE UNIQUE INDEX plain_key ON plain (action_id, seq)")
    best = 0.0
    for _ in range(3):
        batches = [
            [(str(uuid.uuid4()), 1, "ready", "node-00", 1.5, "ok", "", "", details) for _ in range(BATCH)] for _ in range(20)
        ]
        began = time.perf_counter()
        for rows in batches:
            with database.writing() as connection:
                connection.exec_driver_sql(insert, rows)
        best = max(best, BATCH * len(batches) / (time.perf_counter() - began))
    with database.writing() as connection:
        connection.exec_driver_sql("DROP TABLE plain")
    return best


async def _followed(url: str, total: int) -> float:
    """Events each second out of the stream, acknowledged and not kept."""
    bus = NatsControl(Bus(url=url), CLUSTER)
    await bus.start()
    count, began = 0, time.perf_counter()
    async for batch in bus.follow_batches("nobody"):
        count += len(batch.events)
        await batch.done()
        if count >= total:
            break
    await bus.stop()
    return count / (time.perf_counter() - began)


# --- lists ----------------------------------------------------------------------------------------------------------------------


def _remember(database: Database) -> None:
    """Actions of the days before, so that every filter finds something."""
    chance, now, profile = random.Random(7), time.time(), storm.profile().model_dump()
    rows = []
    for n in range(HISTORY):
        pod, at, action_id = n % PODS, now - 86400 * (1 + chance.random()), str(uuid.UUID(int=chance.getrandbits(128), version=4))
        rows.append({
            "action_id": action_id, "checkpoint_id": action_id, "type": "restore" if n % 10 == 0 else "checkpoint",
            "status": "error" if n % 50 == 7 else "ready", "created_at": at, "updated_at": at + 3, "completed_at": at + 3,
            "cluster": CLUSTER, "node": f"node-{n % storm.NODES:02}", "reason": "manual", "kind": "simple", "namespace": "default",
            "pod_name": f"trainer-{pod}", "pod_id": _pod(pod), "seq": 3, "profile": profile, "location": f"s3://b/{action_id}",
            "details": {},
        })  # fmt: skip
    for first in range(0, HISTORY, BATCH):
        with database.writing() as connection:
            connection.execute(tables.tables["actions"].insert(), rows[first : first + BATCH])


def _pod(n: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(n)))


def _lists(api: Api) -> dict[str, dict[str, float]]:
    filters = {
        "all": "", "status=ready": "&status=ready", "status=error": "&status=error", "status=processing": "&status=processing",
        "type=checkpoint": "&type=checkpoint", "type=restore": "&type=restore", "node": "&node=node-07", "pod_name": "&pod_name=trainer-7",
        "pod_id": f"&pod_id={_pod(7)}",
    }  # fmt: skip
    found = {
        name: _spread([_timed(api, f"/v2/actions?limit=200{more}")[0] for _ in range(REQUESTS)]) for name, more in filters.items()
    }
    seconds, path = list[float](), "/v2/actions?limit=200"
    while path and len(seconds) < REQUESTS:
        took, path = _timed(api, path)
        seconds.append(took)
    return found | {"following pages": _spread(seconds)}


def _timed(api: Api, path: str) -> tuple[float, str]:
    """Seconds, and the page after this one."""
    began = time.perf_counter()
    status, body, headers = api.get(path)
    took = time.perf_counter() - began
    if status != 200:
        raise RuntimeError(f"{path}: {status} {body[:300]!r}")
    link = re.match(r"<([^>]+)>", headers.get("link", ""))
    return took, link[1] if link else ""


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"median": round(statistics.median(ordered) * 1e3, 1), "p99": round(p99 * 1e3, 1)}


# --- the disk -------------------------------------------------------------------------------------------------------------------


def _filesystem(path: str) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    found = [(where, kind) for where, kind in mounts if Path(path).is_relative_to(where)]
    return max(found, key=lambda each: len(each[0]))[1]


def _fsync() -> float:
    """Milliseconds until a page that was appended is on disk: the median of 50."""
    seconds = list[float]()
    with tempfile.TemporaryFile(dir=_DISK) as file:
        for _ in range(50):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds) * 1e3, 2)


# --- words ------------------------------------------------------------------------------------------------------------------------


def render(found: Mapping[str, Any]) -> str:
    disk = f"{found['disk']['filesystem']}, fsync {found['disk']['fsync_ms']} ms"
    lines = [
        f"{found['rate']} events/s for {found['seconds']} s, {found['actions']} actions beside {found['history']} of before; {disk}"
    ]
    rows: dict[str, list[str]] = {}
    for each in found["variants"].values():
        verdict, ceilings = each["verdict"], each["ceilings"]
        cells = {
            "published/s": f"{each['published_per_s']:.0f}",
            "applied/s": f"{each['applied_per_s']:.0f}",
            "lag at the end, greatest": f"{each['lag_at_end_s']:.1f} s, {each['lag_max_s']:.1f} s",
            "cores": ", ".join(f"{name} {cores:.2f}" for name, cores in each["cores"].items()),
            "nothing lost, statuses that went back": f"{verdict['nothing_lost']}, {verdict['went_back']} of {each['statuses_seen']}",
            "a status meanwhile, median, p99": _cell(each["status_ms"]),
            "load of the machine before, after": f"{each['load_before'][0]:.1f}, {each['load_after'][0]:.1f}",
            "out of a backlog/s": f"{each['backlog_per_s']:.0f}",
            "share of plain inserts": f"{each['applied_per_s'] / ceilings['inserts_per_s']:.2f} of {ceilings['inserts_per_s']:.0f}/s",
            "share of following alone": f"{each['applied_per_s'] / ceilings['followed_per_s']:.2f} of {ceilings['followed_per_s']:.0f}/s",
            **{f"list {name}": _cell(spread) for name, spread in each["lists_ms"].items()},
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    table = {" " * 38: list(found["variants"]), "-" * 38: ["-" * 40] * len(found["variants"]), **rows}
    lines += [f"| {name:38} |" + "".join(f" {cell:40} |" for cell in cells) for name, cells in table.items()]
    slow = Counter(name for each in found["variants"].values() for name, ms in each["lists_ms"].items() if ms["p99"] > GOAL * 1e3)
    return "\n".join([*lines, "", f"lists over {GOAL * 1e3:.0f} ms: {dict(slow) or 'none'}"])


def _cell(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.1f} ms, {spread['p99']:.1f} ms"
