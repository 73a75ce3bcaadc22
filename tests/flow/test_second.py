"""Two commands for one workload: the second waits for the first, or is refused (`limits.second`)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from hibernode.errors import DumpFailed
from hibernode.model import CheckpointCommand, Status
from tests.fakes.machine import ROOT
from tests.flow.rig import Rig, checkpoint_command
from tests.flow.test_dispatch import Desk, FailsTimes, Gate, eventually, for_nobody, node, restore_command, running

pytestmark = pytest.mark.timeout(60)

PROCESSING, CREATED, READY, ERROR = Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY, Status.ERROR
NEVER = {"attempts": 1, "retry_delay": 1000}  # whoever uses up an attempt for waiting fails


async def waits(desk: Desk, command: CheckpointCommand) -> None:
    """It is sent, and has found that another action has the workload."""
    with capture_logs() as logs:
        await desk.send(command)
        await eventually(
            lambda: any(line["event"] == "waits for another action" and line["action"] == command.action_id for line in logs),
            "an action that waits",
        )


async def test_they_take_turns(tmp_path: Path) -> None:
    rig = node(tmp_path, **NEVER)
    rig.criu.gate.clear()
    async with running(rig) as desk:
        first, second = checkpoint_command(), checkpoint_command()
        await desk.send(first)
        await eventually(rig.criu.dumping.is_set, "the first dump")
        await waits(desk, second)
        rig.criu.gate.set()
        assert (await desk.end(first.action_id)).status == READY
        assert (await desk.end(second.action_id)).status == READY
        assert desk.statuses(second.action_id) == [PROCESSING, CREATED, READY]
    assert rig.criu.dumps == 2


async def test_a_first_that_fails_gives_way_to_the_second(tmp_path: Path) -> None:
    rig = node(tmp_path, FailsTimes("criu.dump half", 1, lambda: DumpFailed("no")), **NEVER)
    rig.criu.gate.clear()
    async with running(rig) as desk:
        first, second = checkpoint_command(), checkpoint_command()
        await desk.send(first)
        await eventually(rig.criu.dumping.is_set, "the first dump")
        await waits(desk, second)
        rig.criu.gate.set()
        assert (await desk.end(first.action_id)).code == "dump_failed"
        assert (await desk.end(second.action_id)).status == READY


@pytest.mark.parametrize(("slots", "asynchronous"), [(2, False), (1, True)])
async def test_who_waits_keeps_nobody_else_out(tmp_path: Path, slots: int, asynchronous: bool) -> None:
    """Of a first that has given its slot back while it ships, the only slot; else the other one."""
    rig = node(tmp_path, Gate("store.commit index.zst"), actions=slots, **NEVER)
    async with running(rig) as desk:
        first, second, third, other = (
            checkpoint_command(asynchronous=asynchronous), checkpoint_command(), checkpoint_command(), for_nobody(),
        )  # fmt: skip
        await desk.send(first)
        await eventually(rig.script.reached.is_set, "shipping")
        await waits(desk, second)
        await waits(desk, third)
        assert (await desk.end(await desk.send(other))).code == "not_found", "it has nothing to do with them"
        assert desk.record_status(first.action_id) == CREATED
        rig.script.open.set()
        for command in (first, second, third):
            assert (await desk.end(command.action_id)).status == READY
    assert rig.criu.dumps == 3


async def test_of_many_each_has_its_turn(tmp_path: Path) -> None:
    rig = node(tmp_path, pages=20, actions=2, **NEVER)
    async with running(rig) as desk:
        commands = [checkpoint_command() for _ in range(8)]
        for command in commands:
            await desk.send(command)
        for command in commands:
            assert (await desk.end(command.action_id)).status == READY
        assert not rig.node.claims._waiting
        await eventually(lambda: desk.dispatcher._slots._value == 2, "every slot")
    assert rig.criu.dumps == 8


async def test_who_waits_can_be_cancelled(tmp_path: Path) -> None:
    rig = node(tmp_path, actions=1, **NEVER)
    with rig.node.claims.claim(f"pid {ROOT}", "somebody else"):
        async with running(rig) as desk:
            command = checkpoint_command()
            await waits(desk, command)
            assert (await desk.dispatcher.action(command.action_id)).status == PROCESSING
            assert await desk.dispatcher.cancel(command.action_id)
            assert (await desk.end(command.action_id)).code == "cancelled"
            await eventually(lambda: desk.dispatcher._slots._value == 1, "the slot")


async def test_who_waits_is_cancelled_when_the_daemon_stops(tmp_path: Path) -> None:
    rig = node(tmp_path, **NEVER)
    with rig.node.claims.claim(f"pid {ROOT}", "somebody else"):
        async with running(rig) as desk:
            command = checkpoint_command()
            await waits(desk, command)
            await desk.stop(0.01)
            assert desk.events(command.action_id)[-1].code == "cancelled"


def soon() -> CheckpointCommand:
    return checkpoint_command().model_copy(update={"expires_at": time.time() + 0.3})


async def test_who_waits_waits_no_longer_than_the_command_holds(tmp_path: Path) -> None:
    rig = node(tmp_path, actions=1, **NEVER)
    with rig.node.claims.claim(f"pid {ROOT}", "somebody else"):
        async with running(rig) as desk:
            last = await desk.end(await desk.send(soon()))
            assert (last.code, last.retry) == ("expired", False)
            await eventually(lambda: desk.dispatcher._slots._value == 1, "the slot")


async def test_nor_does_who_waits_for_a_slot(tmp_path: Path) -> None:
    rig = node(tmp_path, Gate("criu.dump"), actions=1)
    async with running(rig) as desk:
        first, second = checkpoint_command(), soon()
        await desk.send(first)
        await eventually(rig.script.reached.is_set, "the dump")
        assert (await desk.end(await desk.send(second))).code == "expired"
        assert desk.statuses(second.action_id) == [ERROR]
        rig.script.open.set()
        assert (await desk.end(first.action_id)).status == READY
        await eventually(lambda: desk.dispatcher._slots._value == 1, "the slot")


async def test_the_second_is_refused_where_that_is_wished(tmp_path: Path) -> None:
    """At once, however many attempts there would be; the first does not notice."""
    rig = node(tmp_path, second="refuse", attempts=100, retry_delay=1000)
    rig.criu.gate.clear()
    async with running(rig) as desk:
        first, second = checkpoint_command(), checkpoint_command()
        await desk.send(first)
        await eventually(rig.criu.dumping.is_set, "the first dump")
        last = await desk.end(await desk.send(second))
        assert (last.code, last.retry, last.details["action"]) == ("busy", True, first.action_id)
        rig.criu.gate.set()
        assert (await desk.end(first.action_id)).status == READY
    assert rig.criu.dumps == 1


async def test_a_restore_waits_for_a_removal(tmp_path: Path) -> None:
    """Which is no action: then there is nothing to restore."""
    rig: Rig = node(tmp_path, **NEVER)
    made = rig.checkpoint()
    rig.end_of_original()
    gate = Gate("store.delete manifest.json")
    rig.rescript(gate)
    async with running(rig) as desk:
        removing = asyncio.ensure_future(desk.answers.delete(made))
        await eventually(gate.reached.is_set, "a removal at work")
        command = restore_command(made)
        with capture_logs() as logs:
            await desk.send(command)
            await eventually(lambda: any(line["event"] == "waits for another action" for line in logs), "a restore that waits")
        gate.open.set()
        await removing
        assert (await desk.end(command.action_id)).code == "not_found"
