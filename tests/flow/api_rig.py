"""A real API server on a port of its own, before a broker in memory and nodes that do what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import uvicorn

from hibernode import wire
from hibernode.api.guard import hashed, new_token
from hibernode.api.server import Server
from hibernode.bus import Delivery
from hibernode.config import Config
from hibernode.model import (
    CancelCommand,
    CheckpointCommand,
    Command,
    DeleteCommand,
    Event,
    HeartbeatWish,
    NodeRecord,
    Profile,
    RestoreCommand,
    Status,
    WorkloadView,
)
from tests import api_client
from tests.api_client import Reply
from tests.fakes.bus import MemoryBus
from tests.fakes.machine import GPUS

CLUSTER = "c"
LIMIT = 20.0  # seconds, for whatever is waited for
STORE = "s3://bucket/prefix"


class FakeNode:
    """A node that is there, has these pods, and says what a test wants."""

    def __init__(self, bus: MemoryBus, name: str, *pods: str, **facts: object) -> None:
        self.name, self.end = name, bus.node(CLUSTER, name)
        self.pods = [
            WorkloadView(kind="job", namespace="default", name=pod, uid=str(uuid.uuid5(uuid.NAMESPACE_OID, pod)), pid=7)
            for pod in pods
        ]
        self.wishes: list[HeartbeatWish] = []
        self._facts = facts
        self._commands = self.end.commands()
        self._seq: dict[str, int] = {}

    async def start(self) -> None:
        await self.end.start()
        await self.end.answer_find(self._find)
        await self.tell()

    async def tell(self) -> None:
        await self.end.put_node(wire.encode_node(self.record()))

    def record(self) -> NodeRecord:
        facts: dict[str, object] = {
            "version": "0", "arch": "x86_64", "kernel": "6", "criu": "4.2.1", "store": STORE, "cpus": 2, "memory_total": 1 << 34,
            "memory_available": 1 << 33, "load": 0.5, "actions": 0, "time": time.time(), "arena_bytes": 1 << 29, "gpu_inventory": GPUS,
            **self._facts,
        }  # fmt: skip
        return NodeRecord(node=self.name, cluster=CLUSTER, workloads=self.pods, heartbeats=self.wishes, **facts)  # type: ignore[arg-type]

    async def _find(self, request: bytes) -> bytes | None:
        target = wire.decode_find(request)
        found = [
            pod
            for pod in self.pods
            if pod.uid == target.pod_id or (pod.name == target.pod_name and pod.namespace == (target.namespace or "default"))
        ]
        return wire.encode_found(self.name, found) if found else None

    async def take(self) -> Command:
        """The next command that was filed for it."""
        delivery: Delivery = await asyncio.wait_for(anext(self._commands), LIMIT)
        command = wire.decode_command(delivery.verb, delivery.data)
        await delivery.done()
        return command

    async def take_checkpoint(self) -> CheckpointCommand:
        command = await self.take()
        assert isinstance(command, CheckpointCommand)
        return command

    async def take_restore(self) -> RestoreCommand:
        command = await self.take()
        assert isinstance(command, RestoreCommand)
        return command

    async def take_cancel(self) -> CancelCommand:
        command = await self.take()
        assert isinstance(command, CancelCommand)
        return command

    async def take_delete(self) -> DeleteCommand:
        command = await self.take()
        assert isinstance(command, DeleteCommand)
        return command

    async def say(self, command: CheckpointCommand | RestoreCommand, *statuses: Status, **more: object) -> None:
        """Events of this action, one after the other."""
        for status in statuses:
            seq = self._seq[command.action_id] = self._seq.get(command.action_id, 0) + 1
            facts: dict[str, object] = dict(more)
            if status == Status.READY and command.type == "checkpoint":
                facts.setdefault("details", {"location": f"{STORE}/{command.checkpoint_id}"})
                facts.setdefault("profile", PROFILE)
            event = Event(
                action_id=command.action_id, seq=seq, type=command.type, status=status, checkpoint_id=command.checkpoint_id,
                node=self.name, time=time.time(), **facts,  # type: ignore[arg-type] # as a test wants it
            )  # fmt: skip
            await self.end.publish_event(command.action_id, wire.message_id(event), wire.encode_event(event))

    async def complete(self, command: CheckpointCommand | RestoreCommand) -> None:
        statuses = [Status.PROCESSING, *([Status.CHECKPOINT_CREATED] if command.type == "checkpoint" else []), Status.READY]
        await self.say(command, *statuses)


PROFILE = Profile(
    total_duration=5_000_000, total_io=77, pause_ns=1_000, raw_bytes=1 << 20, zero_bytes=1 << 10, stored_bytes=1 << 19
)


class ApiRig:
    """`async with ApiRig(directory) as rig`. `bus` is the broker; `now` is added to the clock of everything that looks at time."""

    def __init__(self, directory: Path, bus: MemoryBus | None = None, database: str = "", **api: object) -> None:
        self.bus = bus or MemoryBus()
        self.token, self.reader = new_token(), new_token()
        settings: dict[str, object] = {
            "tokens": [f"ops:{hashed(self.token)}"], "find_timeout": 5.0, "rate": 10_000, "burst": 10_000, "database": database, **api,
        }  # fmt: skip
        self.config = Config.model_validate(
            {"cluster": CLUSTER, "state_dir": directory, "bus": {"url": "nats://memory"}, "api": settings}
        )
        self.server = Server(self.config, self.bus.control(CLUSTER))
        self._nodes: list[FakeNode] = []
        self._stack = contextlib.AsyncExitStack()
        self.port = 0

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.server.migrate)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(self.server.asgi, log_config=None, access_log=False, lifespan="on", server_header=False)
        server = uvicorn.Server(config)
        running = asyncio.ensure_future(server._serve([listener]))  # without its signal handlers
        await self.until(lambda: server.started, "the server")

        async def stop() -> None:
            server.should_exit = True
            await asyncio.wait_for(running, LIMIT)
            listener.close()

        self._stack.push_async_callback(stop)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def node(self, name: str, *pods: str, **facts: object) -> FakeNode:
        node = FakeNode(self.bus, name, *pods, **facts)
        await node.start()
        self._nodes.append(node)
        return node

    # --- asking -------------------------------------------------------------------------------------------------------------

    async def ask(self, method: str, path: str, body: object = None, *, token: str | None = "", **headers: str) -> Reply:
        """`token`: "" is the one that may write, None is none. Headers with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        secret = self.token if token == "" else token
        return await asyncio.to_thread(api_client.ask, self.port, method, path, body, token=secret, headers=named)

    async def get(self, path: str, **more: Any) -> Reply:
        return await self.ask("GET", path, **more)

    async def checkpoint(self, pod: str, **body: object) -> str:
        """File one; the action's id."""
        reply = await self.ask("POST", "/v2/checkpoint/pod", {"namespace": "default", "pod_name": pod, **body})
        assert reply.status == 200, reply.text
        return reply.text

    async def restore(self, action_id: str, **body: object) -> str:
        reply = await self.ask("POST", "/v2/restore/pod", {"action_id": action_id, "reason": "manual", **body})
        assert reply.status == 200, reply.text
        return reply.text

    async def status(self, action_id: str) -> str:
        reply = await self.get(f"/v2/checkpoint/status/{action_id}")
        assert reply.status == 200, reply.text
        return str(reply.json()["status"])

    async def action(self, action_id: str) -> dict[str, Any]:
        reply = await self.get(f"/v2/actions/{action_id}")
        assert reply.status == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    async def until_status(self, action_id: str, wanted: str) -> None:
        async def there() -> bool:
            return await self.status(action_id) == wanted

        await self.eventually(there, f"status {wanted}")

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async def there() -> bool:
            return condition()

        await self.eventually(there, what)

    async def eventually(self, condition: Callable[[], Awaitable[bool]], what: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not await condition():
            assert time.monotonic() < deadline, f"{what}: not within {LIMIT} s"
            await asyncio.sleep(0.01)
