"""A control plane with something in it: nodes that take what is filed for them, checkpoints, restores, a heartbeat. For whoever asks it
everything that its document allows (test_api_schemathesis.py)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hibernode import wire
from hibernode.model import CheckpointCommand, Progress, RestoreCommand, Status
from tests.flow.api_rig import ApiRig, FakeNode

TRAINER, BROKEN, ENDLESS, LEAVING, GONE = "trainer", "broken", "endless", "leaving", "gone"


@dataclass(frozen=True)
class World:
    """`rig` is the server. The rest is what a valid request can name."""

    rig: ApiRig
    uids: dict[str, str]  # of the pods
    ready: str  # a checkpoint that is ready, of a pod that has ended
    running: str  # one that never ends, of `ENDLESS`
    restored: str  # a restore that is ready
    heartbeat: str


@contextlib.asynccontextmanager
async def world(directory: Path, database: str = "") -> AsyncIterator[World]:
    async with ApiRig(directory, database=database) as rig, asyncio.TaskGroup() as group:
        nodes = [await rig.node("n1", TRAINER, BROKEN, GONE), await rig.node("n2", ENDLESS), await rig.node("n3", LEAVING)]
        works = [group.create_task(_work(node)) for node in nodes]
        try:
            ready = await _ready(rig, await rig.checkpoint(GONE))
            nodes[0].pods = [pod for pod in nodes[0].pods if pod.name != GONE]  # what runs is not restored
            await nodes[0].tell()
            await _ready(rig, await rig.checkpoint(TRAINER))
            restored = await _ready(rig, await rig.restore(ready))
            failed, running = await rig.checkpoint(BROKEN), await rig.checkpoint(ENDLESS)
            await rig.until_status(failed, "error")
            await rig.until_status(running, "processing")
            made = await rig.ask("POST", "/v2/heartbeats", {"pod_name": TRAINER, "interval": 3600, "keep_last": 3})
            assert made.status == 200, made.text
            uids = {pod.name: pod.uid for node in nodes for pod in node.pods}
            yield World(rig, uids, ready=ready, running=running, restored=restored, heartbeat=made.text)
        finally:
            for work in works:
                work.cancel()


async def _ready(rig: ApiRig, action_id: str) -> str:
    await rig.until_status(action_id, "ready")
    return action_id


async def _work(node: FakeNode) -> None:
    """Takes what is filed, for ever: checkpoints and restores end well, but those of two pods."""
    node.end._record_ttl = float("inf")  # it says once and for all that it is there
    await node.tell()
    async for delivery in node._commands:
        command = wire.decode_command(delivery.verb, delivery.data)
        await delivery.done()
        match command:
            case CheckpointCommand() if command.target.pod_name == BROKEN or command.target.pod_id == _uid(node, BROKEN):
                await node.say(command, Status.PROCESSING)
                await node.say(command, Status.ERROR, code="dump_failed", message="it cannot be dumped", hint="look")
            case CheckpointCommand() if command.target.pod_name == ENDLESS or command.target.pod_id == _uid(node, ENDLESS):
                await node.say(command, Status.PROCESSING)
                far = Progress(
                    action_id=command.action_id, phase="dumping", bytes_done=1, bytes_total=4, stored_bytes=1, seconds=0.5
                )
                await node.end.publish_progress(command.action_id, wire.encode_progress(far))
            case CheckpointCommand() | RestoreCommand():
                await node.complete(command)


def _uid(node: FakeNode, pod: str) -> str:
    return next((each.uid for each in node.pods if each.name == pod), "none")
