"""What a kubelet hears that asks before it ends a pod, from a node whose API server and actions are a test's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from hibernode.drivers.host import on_node
from hibernode.drivers.kubernetes import read_pod
from hibernode.errors import KubernetesUnavailable, Refused
from hibernode.model import ActionView, CheckpointCommand, Event, Status
from hibernode.ports import Pod
from hibernode.prestop import Asking, PrestopServer, evicted, left
from tests.unit.test_operations import ROOT

NOW = 1_700_000_000.0


async def listening(server: PrestopServer) -> None:
    async with asyncio.timeout(20):
        while server.place is None:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


def pod(name: str = "trainer-1", *, ends: float | None = 30.0, grace: int = 30, note: str = "trainer", **more: Any) -> Pod:
    """One that has `ends` seconds left; None: nobody deletes it."""
    meta: dict[str, Any] = {"namespace": "ml", "name": name, "uid": f"uid-{name}", "annotations": {"hibernode.io/prestop": note}}
    meta["annotations"] |= more.pop("annotations", {})
    if ends is not None:
        at = datetime.fromtimestamp(time.time() + ends, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        meta |= {"deletionTimestamp": at, "deletionGracePeriodSeconds": grace}
    return read_pod({"metadata": {**meta, **more}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}})


@dataclass
class World:
    """The API server's pods of the node, and what became of actions. An action ends when `ends` has its status."""

    pods: list[Pod] = field(default_factory=list)
    cordoned: bool = False
    faults: list[Exception] = field(default_factory=list)  # of the API server, one for each call
    begun: list[tuple[CheckpointCommand, Mapping[str, str]]] = field(default_factory=list)
    ends: dict[str, Status] = field(default_factory=dict)  # by UID
    asked: int = 0
    delay: float = 0.0  # seconds of each answer

    def listed(self) -> list[Pod]:
        self.asked += 1
        found = self.pods
        time.sleep(self.delay)
        if self.faults:
            raise self.faults.pop(0)
        return found

    async def submit(self, command: CheckpointCommand, about: Mapping[str, str]) -> None:
        if all(command.action_id != known.action_id for known, _ in self.begun):
            self.begun.append((command, about))

    async def ended(self, action_id: str) -> ActionView:
        (uid,) = [command.target.pod_id for command, _ in self.begun if command.action_id == action_id]
        while uid not in self.ends:  # noqa: ASYNC110 - a test sets it
            await asyncio.sleep(0.01)
        event = Event(
            action_id=action_id, seq=3, type="checkpoint", status=self.ends[uid], checkpoint_id=action_id, node="n", time=NOW,
            code="dump_failed", message="why",
        )  # fmt: skip
        return ActionView(
            action_id=action_id, checkpoint_id=action_id, type="checkpoint", status=event.status, phase="done", target="", began_at=NOW,
            last=event,
        )  # fmt: skip


@pytest.fixture
async def world() -> AsyncIterator[tuple[World, Callable[..., Any]]]:
    """And a way to ask: status and text of the answer."""
    there = World()
    server = PrestopServer(there, Asking(there.listed, lambda: there.cordoned), lambda: on_node("127.0.0.1:0"))
    server.start()
    await listening(server)

    async def ask(path: str = "/prestop/ml/trainer", *, raw: bytes = b"") -> tuple[int, str]:
        assert server.place is not None
        reader, writer = await asyncio.open_connection(*server.place)
        writer.write(raw or f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: Go-http-client/1.1\r\n\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        return int(head.split(" ")[1]) if head else 0, body.strip()

    yield there, ask
    await server.stop()


Given = tuple[World, Callable[..., Any]]


async def test_it_waits_until_the_pod_s_checkpoint_is_ready(world: Given) -> None:
    there, ask = world
    there.pods = [pod(), pod("trainer-2", ends=None), pod("other", note="other")]
    asking = asyncio.ensure_future(ask())
    async with asyncio.timeout(20):
        while not there.begun:  # noqa: ASYNC110 - a list
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    assert not asking.done()
    ((command, about),) = there.begun
    assert (command.target.pod_id, command.reason, command.kind) == ("uid-trainer-1", "nodeTermination", "simple")
    assert 25 < command.expires_at - time.time() < 31, "it does not begin after the pod's time"
    assert about == {
        "namespace": "ml", "pod_name": "trainer-1", "pod_id": "uid-trainer-1", "kind": "simple", "reason": "nodeTermination",
        "on_stop": "checkpoint",
    }  # fmt: skip
    there.ends["uid-trainer-1"] = Status.READY
    assert await asking == (200, f"pod ml/trainer-1: checkpoint {command.action_id}: ready")


async def test_a_pod_is_checkpointed_once_however_often_its_containers_ask(world: Given) -> None:
    there, ask = world
    there.pods, there.ends = [pod()], {"uid-trainer-1": Status.READY}
    assert {(await ask())[0] for _ in range(3)} == {200}
    assert {status for status, _ in await asyncio.gather(*(ask() for _ in range(20)))} == {200}
    assert len(there.begun) == 1


async def test_many_who_ask_at_once_share_what_the_api_server_says_and_none_hears_what_was_before(world: Given) -> None:
    there, ask = world
    there.pods, there.ends, there.delay = [pod(ends=None)], {"uid-trainer-1": Status.READY}, 0.3
    first = asyncio.ensure_future(ask())
    while not there.asked:  # noqa: ASYNC110 - a thread counts
        await asyncio.sleep(0.01)
    there.pods = [pod()]
    later = await asyncio.gather(*(ask() for _ in range(30)))
    assert (await first)[1].startswith("no such pod is being deleted")
    assert all(text.endswith(": ready") for _, text in later)
    assert there.asked <= 4


async def test_all_pods_of_one_template_that_are_ending_are_waited_for(world: Given) -> None:
    there, ask = world
    there.pods = [pod(), pod("trainer-2")]
    there.ends = {"uid-trainer-1": Status.READY, "uid-trainer-2": Status.ERROR}
    status, text = await ask()
    assert (status, len(there.begun)) == (500, 2)
    assert text.splitlines()[1].endswith("dump_failed: why")


@pytest.mark.parametrize(
    ("pods", "path", "status"),
    [
        ([pod(ends=None)], "/prestop/ml/trainer", 200),  # it is not being deleted: a container of it is started anew
        ([pod(note="other")], "/prestop/ml/trainer", 404),  # it does not ask for it
        ([pod()], "/prestop/prod/trainer", 404),
        ([pod()], "/prestop/ml/trainer-1", 404),  # its name is not what it asks by
        ([], "/prestop/ml/trainer", 404),
        ([pod()], "/prestop/ml", 404),
        ([pod()], "/prestop/ml/", 404),
        ([pod()], "/prestop/ml/trainer/x", 404),
        ([pod()], "/", 404),
    ],
)
async def test_nothing_is_done_to_a_pod_that_does_not_end_or_does_not_ask(
    world: Given, pods: list[Pod], path: str, status: int
) -> None:
    there, ask = world
    there.pods = pods
    assert (await ask(path))[0] == status
    assert there.begun == []


async def test_a_path_with_two_slashes_is_an_older_kubelet_s(world: Given) -> None:
    there, ask = world
    there.pods, there.ends = [pod()], {"uid-trainer-1": Status.READY}
    assert (await ask("//prestop/ml/trainer"))[0] == 200


async def test_it_answers_before_the_pod_s_time_is_over(world: Given) -> None:
    there, ask = world
    there.pods = [pod(ends=4.5)]
    began = time.monotonic()
    status, text = await ask()
    assert (status, text.endswith("not ready yet")) == (504, True)
    assert time.monotonic() - began < 4.5
    assert len(there.begun) == 1, "it goes on"


async def test_a_pod_without_time_for_it_is_not_checkpointed(world: Given) -> None:
    there, ask = world
    there.pods = [pod(ends=1.0, grace=1)]
    assert await ask() == (504, "pod ml/trainer-1: its grace period is too short for a checkpoint")
    assert there.begun == []


async def test_an_api_server_that_is_away_for_a_moment_is_asked_again(world: Given) -> None:
    there, ask = world
    there.pods, there.ends = [pod()], {"uid-trainer-1": Status.READY}
    there.faults = [KubernetesUnavailable("away")]
    assert (await ask())[0] == 200
    there.faults = [Refused("kubernetes_rights", "no", prop="p", found="f", wanted="w")]
    status, text = await ask()
    assert (status, text) == (503, "kubernetes_rights: no")


@pytest.mark.parametrize(
    "head", [b"POST /prestop/ml/trainer HTTP/1.1", b"", b"GET", b"\xff\xfe\x00", b"x" * 9000, b"GET /%00 HTTP/1.1"]
)
async def test_what_is_no_question_does_nothing(world: Given, head: bytes) -> None:
    there, ask = world
    there.pods = [pod()]
    with contextlib.suppress(ConnectionError):
        assert (await ask(raw=head + b"\r\n\r\n"))[0] in (0, 404, 405)
    assert there.begun == []
    assert (await ask("/"))[0] == 404, "it is there"


@pytest.mark.parametrize(
    ("annotation", "cordoned", "condition", "told"),
    [
        ("migrate", True, None, "migrate"),
        ("migrate", False, None, "checkpoint"),  # somebody has deleted it: it is not to come back
        ("migrate", False, {"type": "DisruptionTarget", "status": "True"}, "migrate"),
        ("migrate", False, {"type": "DisruptionTarget", "status": "False"}, "checkpoint"),
        ("checkpoint", True, None, "checkpoint"),
        ("elsewhere", True, None, "checkpoint"),
    ],
)
async def test_it_goes_on_elsewhere_if_it_asks_for_that_and_is_evicted(
    world: Given, annotation: str, cordoned: bool, condition: dict[str, str] | None, told: str
) -> None:
    there, ask = world
    given = pod(annotations={"hibernode.io/on-stop": annotation})
    there.pods = [read_pod({**given.manifest, "status": {"phase": "Running", "conditions": [condition] if condition else None}})]
    there.cordoned, there.ends = cordoned, {given.uid: Status.READY}
    assert (await ask())[0] == 200
    ((_, about),) = there.begun
    assert about["on_stop"] == told


def test_a_clock_that_is_wrong_leaves_a_pod_its_whole_grace_period() -> None:
    assert 19 < left(pod(ends=20), time.time()) <= 20
    for wrong in (-3600.0, 3600.0):
        assert left(pod(ends=wrong), time.time()) == 30
    assert left(pod(ends=20, deletionTimestamp="soon"), time.time()) == 30
    assert left(pod(ends=None), time.time()) == 0
    assert not evicted(pod())


async def test_a_place_that_somebody_has_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hibernode.prestop._RETRY", 0.01)
    with on_node("127.0.0.1:0") as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = PrestopServer(World(), Asking(list, bool), lambda: on_node(address))
        server.start()
        await asyncio.sleep(0.2)
        assert server.place is None
    await listening(server)
    await server.stop()


def test_in_a_network_of_its_own_it_listens_in_the_machine_s() -> None:
    """As in a pod that has the machine's pids, where process 1 is the machine's."""
    code = "from hibernode.drivers.host import on_node; import sys; s = on_node('127.0.0.1:0', sys.argv[1]);"
    code += "print(s.getsockname()[1], flush=True); s.accept()"
    argv = ["unshare", "--net", sys.executable, "-c", code, f"/proc/{os.getpid()}/ns/net"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT / "daemon")}) as apart:
        assert apart.stdout is not None
        port = int(apart.stdout.readline())
        with socket.create_connection(("127.0.0.1", port), 10):
            assert apart.wait(10) == 0
