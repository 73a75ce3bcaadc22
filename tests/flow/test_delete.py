"""A checkpoint is not torn away under an action that writes or reads it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from hibernode.errors import Busy, NotFound, StoreUnavailable
from hibernode.model import DeleteCommand, Status
from tests.flow.rig import checkpoint_command, new_id
from tests.flow.test_dispatch import KILL, FailsTimes, Gate, eventually, node, restore_command, running, said

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


async def test_a_delete_by_command_waits_for_whoever_reads_it(tmp_path: Path) -> None:
    rig = node(tmp_path)
    made = rig.checkpoint(streams=1)
    rig.end_of_original()
    gate = Gate("store.read pages-0.zst")
    rig.rescript(gate)
    async with running(rig) as desk:
        command = restore_command(made)
        await desk.dispatcher.submit(command)
        await eventually(gate.reached.is_set, "a restore that reads")
        with capture_logs() as logs:
            await desk.send(DeleteCommand(action_id=new_id(), checkpoint_id=made))
            await eventually(lambda: said(logs, "could not delete"), "the delete")
        gate.open.set()
        assert (await desk.end(command.action_id)).status == Status.READY
        await desk.acked()
        assert not rig.store.objects


async def test_a_delete_of_what_is_not_there_or_nobody_may_reach_is_done(tmp_path: Path) -> None:
    async with running(node(tmp_path)) as desk:
        await desk.send(DeleteCommand(action_id=new_id(), checkpoint_id=new_id()))
        await desk.send_raw("delete", b'{"action_id": "x"}')
        await desk.acked()


async def test_a_delete_that_the_store_does_not_take_is_tried_again(tmp_path: Path) -> None:
    rig = node(tmp_path)
    made = rig.checkpoint()
    rig.rescript(FailsTimes("store.stat manifest.json", 2, lambda: StoreUnavailable("away")))
    async with running(rig) as desk:
        await desk.send(DeleteCommand(action_id=new_id(), checkpoint_id=made))
        await desk.acked()
        assert not rig.store.objects
