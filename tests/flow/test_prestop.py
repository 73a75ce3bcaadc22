"""A preStop hook from HTTP to the journal and the broker: the API server's answers are a test's, the node's memory is a fake's."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from hibernode import config
from hibernode.drivers.host import on_node
from hibernode.drivers.kubernetes import Kubernetes
from hibernode.model import Status
from hibernode.prestop import Asking, PrestopServer
from tests.fakes.bus import MemoryBus
from tests.fakes.machine import FACTS
from tests.flow.rig import Rig
from tests.flow.test_dispatch import Desk, Gate, eventually, node, running
from tests.unit.test_kubernetes import Server

pytestmark = pytest.mark.timeout(60)

NODE = {"metadata": {"name": "n"}, "spec": {"unschedulable": True}, "status": {}}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


def pods(*, left: float = 30.0) -> dict[str, Any]:
    """The node's one pod, which is being deleted."""
    ends = datetime.fromtimestamp(time.time() + left, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    meta = {
        "namespace": "ml", "name": "a", "uid": FACTS.uid, "deletionTimestamp": ends, "deletionGracePeriodSeconds": 60,
        "annotations": {"hibernode.io/prestop": "trainer", "hibernode.io/on-stop": "migrate"},
    }  # fmt: skip
    return {"items": [{"metadata": meta, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}}]}


def answer(handler: BaseHTTPRequestHandler) -> None:
    """Two may ask at once, and in any order."""
    said = json.dumps(NODE if "/nodes/" in handler.path else pods()).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(said)))
    handler.end_headers()
    handler.wfile.write(said)


@asynccontextmanager
async def hooked(rig: Rig, server: Server, bus: MemoryBus | None = None) -> AsyncIterator[tuple[Desk, str]]:
    """A running node, and where its hooks ask."""
    cluster = Kubernetes(config.Kubernetes(api_server=server.url))
    asking = Asking(lambda: cluster.pods(node="n"), lambda: not cluster.node("n").schedulable)
    async with running(rig, bus) as desk:
        prestop = PrestopServer(desk.answers, asking, lambda: on_node("127.0.0.1:0"))
        prestop.start()
        await eventually(lambda: prestop.place, "the place")
        assert prestop.place is not None
        try:
            yield desk, f"http://127.0.0.1:{prestop.place[1]}//prestop/ml/trainer"
        finally:
            await prestop.stop()
    cluster.close()


async def get(url: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url, timeout=50) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as e:
            return e.code, e.read().decode()

    return await asyncio.to_thread(ask)


async def test_a_hook_waits_for_an_action_like_any_other_which_says_what_it_is_about(tmp_path: Path, server: Server) -> None:
    rig = node(tmp_path, Gate("workloads.find"))
    server.answers = [answer] * 4
    async with hooked(rig, server) as (desk, url):
        both = []
        for asked in (2, 4):  # of its pods and of the node, each; those who come at once may share an answer
            both.append(asyncio.ensure_future(get(url)))
            await eventually(lambda: len(server.asked) == asked, "it to be heard")  # noqa: B023
        await asyncio.sleep(0.1)
        assert not any(each.done() for each in both)
        assert isinstance(rig.script, Gate)
        rig.script.open.set()
        for status, text in await asyncio.gather(*both):
            assert (status, text.endswith(": ready\n")) == (200, True)
        (entry,) = rig.node.journal.all()
        events = desk.events(entry.action_id)
        assert [event.status for event in events] == [Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY]
        for event in events:
            assert event.details["about"] == {
                "namespace": "ml", "pod_name": "a", "pod_id": FACTS.uid, "kind": "simple", "reason": "nodeTermination",
                "on_stop": "migrate",
            }  # fmt: skip
        assert "location" in events[-1].details
    assert (rig.criu.dumps, rig.machine.killed) == (1, []), "its kubelet ends it"


async def test_a_pod_that_cannot_be_checkpointed_goes_on_to_its_end(tmp_path: Path, server: Server) -> None:
    rig = node(tmp_path)
    rig.machine.alive = False
    server.answers = [(200, pods()), (200, NODE)]
    async with hooked(rig, server) as (_, url):
        status, text = await get(url)
    assert (status, "not_found" in text) == (500, True)


async def test_a_hook_of_a_pod_whose_time_is_over_is_told_so_and_its_checkpoint_goes_on(tmp_path: Path, server: Server) -> None:
    rig = node(tmp_path, Gate("store.upload manifest.json", "workloads.find"))
    server.answers = [(200, pods(left=5.5)), (200, NODE)]
    async with hooked(rig, server) as (desk, url):
        status, text = await get(url)
        assert (status, text.endswith("not ready yet\n")) == (504, True)
        assert isinstance(rig.script, Gate)
        rig.script.open.set()
        (entry,) = rig.node.journal.all()
        assert (await desk.end(entry.action_id)).status == Status.READY


async def test_what_it_is_about_is_told_after_a_crash(tmp_path: Path, server: Server) -> None:
    rig = node(tmp_path)
    rig.machine.alive = False
    server.answers = [(200, pods()), (200, NODE)]
    bus = MemoryBus()
    bus.away = True
    async with hooked(rig, server, bus) as (_, url):
        await get(url)
        (entry,) = rig.node.journal.all()
    bus.away = False
    async with running(rig, bus) as desk:
        last = await desk.end(entry.action_id)
        assert last.details["about"]["on_stop"] == "migrate"  # type: ignore[index]
