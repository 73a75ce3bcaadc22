"""What the OCI runtime in front of runc is told, of pods whose restore has ended long ago. The rest: tests/containers."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from hibernode.arrivals import Arrivals
from hibernode.errors import NotFound
from hibernode.model import ActionView, RestoreCommand
from hibernode.runtime import RuntimeServer

pytestmark = pytest.mark.timeout(30)

POD, CHECKPOINT = str(uuid.uuid4()), str(uuid.uuid4())
NOTES = {
    "hibernode.io/restore-from": CHECKPOINT,
    "io.kubernetes.cri.sandbox-uid": POD,
    "io.kubernetes.cri.sandbox-name": "trainer",
    "io.kubernetes.cri.sandbox-namespace": "default",
    "io.kubernetes.cri.container-name": "main",
}


class Forgetful:
    """A desk that knows no action, but which were restored once."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[RestoreCommand] = asyncio.Queue()
        self.restored: set[str] = set()

    async def submit(self, command: RestoreCommand) -> None:
        self.begun.put_nowait(command)

    async def action(self, action_id: str) -> ActionView:
        raise NotFound(f"no action {action_id}")

    async def ended(self, action_id: str) -> ActionView:
        await asyncio.sleep(60)
        raise NotFound(f"no action {action_id}")

    async def was_restored(self, action_id: str) -> bool:
        return action_id in self.restored


async def asked(path: Path, notes: dict[str, str], desk: Forgetful) -> dict[str, Any] | RestoreCommand:
    """What a runtime hears; or the restore that was begun for it, for which it waits."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        question = {"call": "create", "id": "c1", "root": "/run/runc", "bundle": "/b", "annotations": notes}
        writer.write(json.dumps(question).encode() + b"\n")
        hearing, beginning = asyncio.ensure_future(reader.readline()), asyncio.ensure_future(desk.begun.get())
        done, left = await asyncio.wait([hearing, beginning], timeout=10, return_when=asyncio.FIRST_COMPLETED)
        for each in left:
            each.cancel()
        (answer,) = done
        return dict(json.loads(hearing.result())) if answer is hearing else beginning.result()
    finally:
        writer.close()


async def test_a_container_whose_restore_nobody_remembers_but_that_it_was_is_started(tmp_path: Path) -> None:
    """It has run, and ended: the old image is not what it goes on from a thousand actions later."""
    desk = Forgetful()
    server = RuntimeServer(desk, Arrivals(), path := tmp_path / "runtime.sock")
    await server.start()
    try:
        assert os.stat(path).st_mode & 0o777 == 0o600
        begun = await asked(path, NOTES, desk)
        assert isinstance(begun, RestoreCommand)
        assert (begun.checkpoint_id, begun.pod_id) == (CHECKPOINT, POD)
        desk.restored.add(begun.action_id)
        assert await asked(path, NOTES, desk) == {"do": "start"}
        another = await asked(path, {**NOTES, "io.kubernetes.cri.sandbox-uid": str(uuid.uuid4())}, desk)
        assert isinstance(another, RestoreCommand)
        assert another.action_id != begun.action_id
    finally:
        await server.stop()
