"""A cancel at every moment of an action, by command and by people: it ends as cancelled, the workload runs at once, nothing is left."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hibernode.errors import NotFound, StoreUnavailable
from hibernode.model import ActionCommand, Cancel, CancelCommand, Status
from hibernode.transfer.arena import Arena
from tests.fakes.machine import ROOT
from tests.fakes.script import Script
from tests.flow.rig import Rig, checkpoint_command, new_id
from tests.flow.test_dispatch import KILL, Desk, Gate, eventually, node, restore_command, running
from tests.flow.test_second import waits

pytestmark = pytest.mark.timeout(60)

AT_ONCE = 10.0  # seconds until a workload runs again; milliseconds are usual

By = Callable[[Desk, str], Awaitable[object]]


async def by_command(desk: Desk, action_id: str) -> None:
    running = desk.dispatcher._running[action_id]
    await desk.send(CancelCommand(action_id=action_id))
    await eventually(lambda: running.cancel.reason, "the cancel")


async def by_people(desk: Desk, action_id: str) -> None:
    assert await desk.answers.cancel(action_id)


BY = pytest.mark.parametrize("by", [by_command, by_people])


async def insist_on_cancel(desk: Desk, command: ActionCommand, by: By, *, waits_for: Callable[[], object] = lambda: None) -> None:
    """It is cancelled; whatever still hangs, the workload runs; then what hangs comes to its end (`waits_for`), and the action, too."""
    began = time.monotonic()
    await by(desk, command.action_id)
    await eventually(lambda: not desk.rig.machine.stopped, "a workload that runs")
    assert time.monotonic() - began < AT_ONCE
    waits_for()
    last = await desk.end(command.action_id)
    assert (last.status, last.code, last.retry) == (Status.ERROR, "cancelled", False)
    await eventually(lambda: not desk.dispatcher.running, "the end of the action")
    await desk.acked()
    assert not await desk.answers.cancel(command.action_id), "it has ended"
    assert not desk.rig.machine.killed or desk.rig.machine.killed == ["restored"]
    assert not desk.rig.machine.restored
    desk.rig.statuses.clear()
    assert not desk.rig.leftovers(command.checkpoint_id)


@BY
@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize(
    ("phase", "call"),
    [
        ("preflight", "workloads.find"),
        ("preflight", "store.put attempt"),
        ("preflight", "store.check"),
        ("preflight", "store.upload pages-0.zst"),
        ("shipping", "store.commit index.zst"),
        ("committing", "store.stat index.zst"),
        ("committing", "store.put manifest.json"),
        ("committing", "store.get manifest.json"),
    ],
)
async def test_a_checkpoint_is_cancelled_while(tmp_path: Path, by: By, phase: str, call: str, kill: bool) -> None:
    """Also while the store does not answer: the workload does not wait for it."""
    rig = node(tmp_path, gate := Gate(call))
    async with running(rig) as desk:
        command = checkpoint_command(criu_opts=KILL if kill else "", streams=1)
        await desk.send(command)
        await eventually(gate.reached.is_set, call)
        assert rig.machine.stopped is (kill and phase != "preflight")
        entry = rig.node.journal.find(command.action_id)
        assert entry is not None
        assert entry.record.phase == phase
        await insist_on_cancel(desk, command, by, waits_for=gate.open.set)
    assert rig.machine.alive
    assert f"{command.checkpoint_id}/manifest.json" not in rig.store.objects


@BY
@pytest.mark.parametrize("kill", [False, True])
async def test_a_checkpoint_is_cancelled_while_it_dumps(tmp_path: Path, by: By, kill: bool) -> None:
    """CRIU has stopped in the middle, and waits for nothing but the end of its page socket."""
    rig = node(tmp_path)
    rig.criu.fault = "hang"
    async with running(rig) as desk:
        command = checkpoint_command(criu_opts=KILL if kill else "")
        await desk.send(command)
        await eventually(rig.criu.dumping.is_set, "the dump")
        assert rig.machine.stopped
        await insist_on_cancel(desk, command, by)
    assert rig.machine.alive


@BY
@pytest.mark.parametrize(
    ("phase", "call"),
    [
        ("preflight", "store.get manifest.json"),
        ("fetching", "store.read images.tar.zst"),
        ("fetching", "store.read pages-0.zst"),
        ("restoring", "criu.restore"),
        ("restoring", "criu.restore end"),
        ("probing", "workload.processes"),
    ],
)
async def test_a_restore_is_cancelled_while(tmp_path: Path, by: By, phase: str, call: str) -> None:
    rig = node(tmp_path)
    made = rig.checkpoint(streams=1)
    rig.end_of_original()
    rig.rescript(gate := ProbeGate() if phase == "probing" else Gate(call))
    async with running(rig) as desk:
        command = restore_command(made)
        await desk.send(command)
        await eventually(gate.reached.is_set, call)
        entry = rig.node.journal.find(command.action_id)
        assert entry is not None
        assert entry.record.phase == phase
        await by(desk, command.action_id)
        gate.open.set()
        assert (await desk.end(command.action_id)).code == "cancelled"
        await desk.acked()
    assert not rig.machine.restored
    assert not rig.machine.prepared
    assert not any(rig.node.config.work_dir.iterdir())
    assert rig.whole(made), "it can be restored another time"


class ProbeGate(Gate):
    """The second look at the restored tree waits: the first is for the journal."""

    def __init__(self) -> None:
        super().__init__()
        self._left = 2

    def step(self, name: str) -> None:
        super().step(name)
        if name == "workload.processes":
            self._left -= 1
            if not self._left:
                self.reached.set()
                assert self.open.wait(20)


# --- while it waits ---------------------------------------------------------------------------------------------------------------


@BY
async def test_while_it_waits_for_a_slot(tmp_path: Path, by: By) -> None:
    rig = node(tmp_path, gate := Gate("criu.dump"), actions=1)
    async with running(rig) as desk:
        first, second = checkpoint_command(), checkpoint_command()
        await desk.send(first)
        await eventually(gate.reached.is_set, "the dump")
        await desk.send(second)
        await eventually(lambda: desk.record_status(second.action_id), "the second")
        await by(desk, second.action_id)
        assert (await desk.end(second.action_id)).code == "cancelled", "it does not wait for the first"
        assert desk.statuses(second.action_id) == [Status.ERROR]
        gate.open.set()
        assert (await desk.end(first.action_id)).status == Status.READY


@BY
async def test_while_it_waits_for_another_action(tmp_path: Path, by: By) -> None:
    rig = node(tmp_path)
    with rig.node.claims.claim(f"pid {ROOT}", "somebody else"):
        async with running(rig) as desk:
            command = checkpoint_command()
            await waits(desk, command)
            await by(desk, command.action_id)
            assert (await desk.end(command.action_id)).code == "cancelled"


@BY
async def test_while_it_waits_for_room_in_the_arena(tmp_path: Path, by: By) -> None:
    rig, arena = node(tmp_path), Arena(16 << 20)
    rig.node = dataclasses.replace(rig.node, arena=arena)
    with arena.share(arena.total_bytes, Cancel()):
        async with running(rig) as desk:
            command = checkpoint_command()
            await desk.send(command)
            await eventually(lambda: arena.waiting == 1, "its place in the line")
            await insist_on_cancel(desk, command, by)
        assert arena.waiting == 0
    assert not rig.criu.dumps


@BY
async def test_while_it_waits_to_try_again(tmp_path: Path, by: By) -> None:
    class Away(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "store.check":
                raise StoreUnavailable("away")

    rig = node(tmp_path, Away(), retry_delay=1000, attempts=5)
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(lambda: "store.check" in rig.script.calls, "the first try")
        await insist_on_cancel(desk, command, by)


# --- of nothing -------------------------------------------------------------------------------------------------------------------


async def test_of_what_nobody_knows(tmp_path: Path) -> None:
    """People are told so; a command is acknowledged, and no event tells of it."""
    async with running(node(tmp_path)) as desk:
        unknown = new_id()
        assert not await desk.answers.cancel(unknown)
        await desk.send(CancelCommand(action_id=unknown))
        await desk.acked()
        assert not desk.bus.events
        with pytest.raises(NotFound):
            await desk.answers.action(unknown)


async def test_of_what_has_ended(tmp_path: Path) -> None:
    """Its outcome stays, and so does the answer to the same command."""
    rig = node(tmp_path)
    async with running(rig) as desk:
        command = checkpoint_command()
        assert (await desk.end(await desk.send(command))).status == Status.READY
        await eventually(lambda: not desk.dispatcher.running, "the end of the action")
        assert not await desk.answers.cancel(command.action_id)
        await desk.send(CancelCommand(action_id=command.action_id))
        await desk.acked()
        told = len(desk.events(command.action_id))
        await desk.send(command, again=True)
        await desk.acked()
        assert [event.code for event in desk.events(command.action_id)][told:] in ([], ["ok"])
        assert (await desk.answers.action(command.action_id)).status == Status.READY
    assert rig.criu.dumps == 1


async def test_one_that_comes_before_its_command(tmp_path: Path) -> None:
    """It was given out again, and overtook it: nothing is begun. And it is of this action alone."""
    rig = node(tmp_path)
    async with running(rig) as desk:
        command, other = checkpoint_command(), checkpoint_command()
        await desk.send(CancelCommand(action_id=command.action_id))
        await desk.acked()
        last = await desk.end(await desk.send(command))
        assert (last.status, last.code) == (Status.ERROR, "cancelled")
        assert "workloads.find" not in rig.script.calls
        await desk.acked()
        await desk.send(command, again=True)
        await desk.acked()
        assert (await desk.answers.action(command.action_id)).status == Status.ERROR, "the answer stays"
        assert (await desk.end(await desk.send(other))).status == Status.READY
    assert rig.criu.dumps == 1


async def test_those_without_a_command_do_not_pile_up(tmp_path: Path) -> None:
    async with running(node(tmp_path)) as desk:
        for _ in range(1100):
            desk.dispatcher.forestall(new_id())
        assert len(desk.dispatcher._forestalled) == 1000
        command = checkpoint_command()
        desk.dispatcher.forestall(command.action_id)
        assert (await desk.end(await desk.send(command))).code == "cancelled"
        assert len(desk.dispatcher._forestalled) == 999


async def test_two_at_once_are_one(tmp_path: Path) -> None:
    rig: Rig = node(tmp_path)
    rig.criu.fault = "hang"
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.criu.dumping.is_set, "the dump")
        assert await desk.answers.cancel(command.action_id)
        await asyncio.gather(desk.send(CancelCommand(action_id=command.action_id)), desk.answers.cancel(command.action_id))
        assert (await desk.end(command.action_id)).code == "cancelled"
        await desk.acked()
    assert not rig.machine.stopped
