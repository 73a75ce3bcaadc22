"""A checkpoint is not torn away under an action that writes or reads it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hibernode.errors import Busy, NotFound
from hibernode.model import Status
from tests.flow.rig import checkpoint_command
from tests.flow.test_dispatch import KILL, Gate, eventually, node, restore_command, running

pytestmark = pytest.mark.timeout(60)


async def test_not_while_it_is_restored(tmp_path: Path) -> None:
    rig = node(tmp_path)
    made = rig.checkpoint(streams=1)  # of two, one may get everything
    rig.end_of_original()
    gate = Gate("store.read pages-0.zst")
    rig.rescript(gate)
    async with running(rig) as desk:
        command = restore_command(made)
        await desk.dispatcher.submit(command)
        await eventually(gate.reached.is_set, "a restore that reads")
        with pytest.raises(Busy, match=command.action_id) as busy:
            await desk.answers.delete(made)
        assert busy.value.retry
        gate.open.set()
        assert (await desk.end(command.action_id)).status == Status.READY
        await desk.answers.delete(made)
        assert not rig.store.objects


async def test_not_while_it_is_made(tmp_path: Path) -> None:
    """The manifest is there, but the workload is not yet told to end: that a checkpoint said `ready` must stay true."""
    gate = Gate("report ready", "workload.kill")
    rig = node(tmp_path, gate)
    async with running(rig) as desk:
        command = checkpoint_command(criu_opts=KILL)
        await desk.dispatcher.submit(command)
        await eventually(gate.reached.is_set, "a checkpoint before its end")
        with pytest.raises(Busy):
            await desk.answers.delete(command.checkpoint_id)
        gate.open.set()
        await desk.end(command.action_id)
        await eventually(lambda: not desk.dispatcher.running, "the end of the action")
        await desk.answers.delete(command.checkpoint_id)


async def test_two_deletes_are_two(tmp_path: Path) -> None:
    """One removes it, the other is told that it is busy or gone; neither takes the claim of the other with it."""
    gate = Gate("store.delete manifest.json")
    rig = node(tmp_path)
    made = rig.checkpoint()
    rig.rescript(gate)
    async with running(rig) as desk:
        first = asyncio.ensure_future(desk.answers.delete(made))
        await eventually(gate.reached.is_set, "a delete at work")
        with pytest.raises(Busy):
            await desk.answers.delete(made)
        gate.open.set()
        await first
        with pytest.raises(NotFound):
            await desk.answers.delete(made)
    assert not rig.node.claims._taken
