"""The dispatcher on fakes and a broker in memory: once per id, one terminal event, forward only, whatever breaks on the way."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from hibernode import catalog, wire
from hibernode.courier import Courier
from hibernode.desk import Desk as Answers
from hibernode.dispatch import BEHIND, Dispatcher
from hibernode.errors import DumpFailed, GpuWedged, HibernodeError, NoRoom, NotFound, Refused, StoreUnavailable, Stuck
from hibernode.journal import BOOT, Entry, Journal, Tree
from hibernode.model import (
    MAX_LISTED,
    MAX_WISHES,
    ActionCommand,
    CancelCommand,
    CheckpointCommand,
    Command,
    Event,
    HeartbeatWish,
    Overrides,
    Progress,
    RestoreCommand,
    Status,
    Target,
    WorkloadView,
)
from hibernode.node import Attempt
from hibernode.outbox import Outbox
from hibernode.transfer import format
from tests.fakes.bus import MemoryBus
from tests.fakes.machine import FACTS, ROOT, memory
from tests.fakes.script import Script
from tests.fakes.store import MemoryStore
from tests.flow.rig import DEADLINE, Rig, checkpoint_command, new_id

pytestmark = pytest.mark.timeout(60)

PROCESSING, CREATED, READY, ERROR = Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY, Status.ERROR
KILL = '{"leave_running": false}'


class Gate(Script):
    """Calls of these names wait until `open` is set."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names, self.open, self.reached = names, threading.Event(), threading.Event()

    def step(self, name: str) -> None:
        super().step(name)
        if name in self._names:
            self.reached.set()
            assert self.open.wait(DEADLINE)


class ProbeGate(Gate):
    """The second look at the processes of a restored tree waits: the one of the probe."""

    looks = 0

    def __init__(self) -> None:
        super().__init__("workload.processes")

    def step(self, name: str) -> None:
        self.looks += name == "workload.processes"
        if self.looks > 1:
            super().step(name)


class FailsTimes(Script):
    """A call of this name fails so many times."""

    def __init__(self, name: str, times: int, error: Callable[[], BaseException]) -> None:
        super().__init__()
        self._name, self._times, self._make = name, times, error

    def step(self, name: str) -> None:
        super().step(name)
        if name == self._name and self._times:
            self._times -= 1
            raise self._make()


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE} s"
        await asyncio.sleep(0.002)


async def turns(number: int = 50) -> None:
    """The loop goes round so many times: whatever would come of itself has come."""
    for _ in range(number):
        await asyncio.sleep(0)


def said(logs: list[MutableMapping[str, object]], what: str) -> bool:
    return any(line["event"] == what for line in logs)


@dataclass
class Desk:
    """A running dispatcher, its node, and the broker's two ends."""

    rig: Rig
    dispatcher: Dispatcher
    courier: Courier
    outbox: Outbox
    bus: MemoryBus
    updates: list[Event | Progress]

    def __post_init__(self) -> None:
        self.control = self.bus.control("c")
        self.answers = Answers(self.dispatcher, self.rig.node, self.courier)

    async def stop(self, grace: float) -> None:
        """As the daemon does it."""
        await self.dispatcher.stop(grace)
        await self.courier.stop()

    async def send(self, command: Command, *, again: bool = False) -> str:
        await self.control.start()
        if again:  # past the broker's own memory of ids: from a control plane that was started anew
            self.bus._ids.discard(f"command {command.action_id}.{wire.verb_of(command)}")
        await self.control.send("n", wire.verb_of(command), command.action_id, wire.encode_command(command))
        return command.action_id

    async def send_raw(self, verb: str, data: bytes) -> None:
        await self.control.start()
        await self.control.send("n", verb, new_id(), data)

    def events(self, action_id: str) -> list[Event]:
        return [wire.decode_event(data) for _, action, data, _ in self.bus.events if action == action_id]

    def statuses(self, action_id: str) -> list[Status]:
        return [event.status for event in self.events(action_id)]

    async def end(self, action_id: str) -> Event:
        """The terminal event, from the stream; what the stream has of the action must be in order."""
        await eventually(lambda: any(e.status.terminal for e in self.events(action_id)), f"the end of {action_id}")
        events = self.events(action_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.status.terminal for event in events] == [False] * (len(events) - 1) + [True]
        return events[-1]

    async def acked(self) -> None:
        """No command is left with the broker."""
        await eventually(lambda: not self.bus._queue("c", "n").items, "the acknowledgement")

    def record_status(self, action_id: str) -> Status | None:
        entry = self.rig.node.journal.find(action_id)
        return entry.record.status if entry else None


@asynccontextmanager
async def running(rig: Rig, bus: MemoryBus | None = None, grace: float = 5.0, ack_wait: float = 30.0) -> AsyncIterator[Desk]:
    bus = bus or MemoryBus()
    updates: list[Event | Progress] = []
    outbox = Outbox(rig.node.journal)
    dispatcher = Dispatcher(rig.node, updates.append)
    courier = Courier(dispatcher, rig.node, outbox, bus.node("c", "n", ack_wait=ack_wait))
    await dispatcher.start()
    courier.start()
    try:
        yield Desk(rig, dispatcher, courier, outbox, bus, updates)
    finally:
        rig.criu.gate.set()
        if isinstance(rig.script, Gate):
            rig.script.open.set()
        async with asyncio.timeout(DEADLINE):
            await dispatcher.stop(grace)
            await courier.stop()


def node(directory: Path, script: Script | None = None, *, pages: int = 1100, **limits: object) -> Rig:
    chosen = {"retry_delay": 0.01, "progress_interval": 0.02, **limits}
    return Rig(directory, memory(pages), script, node="n", cluster="c", limits=chosen)


def restore_command(checkpoint_id: str) -> RestoreCommand:
    return RestoreCommand(action_id=new_id(), checkpoint_id=checkpoint_id)


def for_nobody() -> CheckpointCommand:
    return CheckpointCommand(action_id=new_id(), checkpoint_id=new_id(), target=Target(pod_name="nobody"))


# --- the straight way -------------------------------------------------------------------------------------------------------


async def test_a_checkpoint_and_its_restore(tmp_path: Path) -> None:
    rig = node(tmp_path)
    async with running(rig) as desk:
        command = checkpoint_command()
        last = await desk.end(await desk.send(command))
        assert desk.statuses(command.action_id) == [PROCESSING, CREATED, READY]
        assert last.code == "ok"
        assert last.profile is not None
        assert last.profile.pause_ns == 3000
        total = sum(phase.seconds for phase in last.profile.phases.values()) + last.profile.unaccounted
        assert abs(total - last.profile.total_duration / 1e9) < 0.01
        await desk.acked()
        rig.end_of_original()
        again = restore_command(command.checkpoint_id)
        assert (await desk.end(await desk.send(again))).status == READY
        assert desk.statuses(again.action_id) == [PROCESSING, READY]
    assert rig.machine.restored
    assert not rig.leftovers("none")
    assert [e.status for e in desk.updates if isinstance(e, Event)] == [PROCESSING, CREATED, READY, PROCESSING, READY]


async def test_the_end_of_a_checkpoint_says_where_it_is(tmp_path: Path) -> None:
    rig = node(tmp_path)
    other = MemoryStore(rig.script)
    rig.store.location, other.location = "s3://bucket/prefix", "file:///other"
    stores = {"": rig.store, "file:///other": other}
    rig.node = replace(rig.node, open_store=stores.__getitem__)
    async with running(rig) as desk:
        for directory, store in stores.items():
            command = checkpoint_command(directory=directory)
            last = await desk.end(await desk.send(command))
            assert last.details == {"location": f"{store.location}/{command.checkpoint_id}"}
            assert f"{command.checkpoint_id}/manifest.json" in store.objects
            assert not any(event.details for event in desk.events(command.action_id)[:-1])
        rig.end_of_original()
        assert (await desk.end(await desk.send(restore_command(command.checkpoint_id)))).details != last.details
        failed = for_nobody()
        assert "location" not in (await desk.end(await desk.send(failed))).details


async def test_progress_is_told_while_it_runs(tmp_path: Path) -> None:
    rig = node(tmp_path, Gate("criu.dump"))
    async with running(rig) as desk:
        action = await desk.send(checkpoint_command())
        await eventually(
            lambda: any(wire.decode_progress(data).phase == "dumping" for _, _, data, _ in desk.bus.progress), "progress"
        )
        rig.script.open.set()
        await desk.end(action)


async def test_a_watcher_that_is_slow_misses_no_end(tmp_path: Path) -> None:
    """The end comes while the event before it is still being sent: it was lost once, and the stream ended without it."""
    rig = node(tmp_path, Gate("criu.dump"))
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.dispatcher.submit(command)
        await eventually(rig.script.reached.is_set, "the dump")
        watching = desk.dispatcher.watch(command.action_id)
        first = await anext(watching)
        assert isinstance(first, Event)
        assert first.status == PROCESSING
        rig.script.open.set()
        await desk.end(command.action_id)
        assert [u.status async for u in watching if isinstance(u, Event)] == [CREATED, READY]


async def test_a_watcher_sees_the_last_event_and_what_comes_until_the_end(tmp_path: Path) -> None:
    rig = node(tmp_path, Gate("criu.dump"))
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.dispatcher.submit(command)
        await eventually(rig.script.reached.is_set, "the dump")
        seen: list[Status] = []
        async for update in desk.dispatcher.watch(command.action_id):
            if isinstance(update, Event):
                seen.append(update.status)
                rig.script.open.set()
        assert seen == [PROCESSING, CREATED, READY]
        assert [u.status async for u in desk.dispatcher.watch(command.action_id) if isinstance(u, Event)] == [READY]
        with pytest.raises(NotFound):
            await anext(desk.dispatcher.watch(new_id()))


# --- once per id ------------------------------------------------------------------------------------------------------------


async def test_a_command_that_comes_again_is_answered_from_the_journal(tmp_path: Path) -> None:
    rig = node(tmp_path)
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.end(await desk.send(command))
        await desk.acked()
        before = list(desk.bus.events)
        await desk.send(command, again=True)
        await desk.acked()
        desk.bus._ids.clear()  # long after: the broker's window for equal ids is over
        await desk.send(command, again=True)
        await desk.acked()
        await eventually(lambda: not len(desk.outbox), "the answer")
        assert desk.bus.events == before, "it is there, once"
        desk.bus.events.clear()  # longer after: the broker keeps no event for ever
        desk.bus._ids.clear()
        await desk.send(command, again=True)
        await eventually(lambda: desk.bus.events, "the answer")
        assert desk.bus.events == before[-1:], "the same event once more"
    assert rig.criu.dumps == 1


async def test_a_command_that_comes_again_while_it_runs_waits_for_the_one(tmp_path: Path) -> None:
    rig = node(tmp_path)
    rig.criu.gate.clear()
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.criu.dumping.is_set, "the dump")
        for _ in range(3):
            desk.bus.redeliver()
            await asyncio.sleep(0)
        await desk.dispatcher.submit(command)  # the same by gRPC
        rig.criu.gate.set()
        await desk.end(command.action_id)
        await desk.acked()
    assert rig.criu.dumps == 1


async def test_a_lost_acknowledgement_does_nothing_twice(tmp_path: Path) -> None:
    rig = node(tmp_path)
    async with running(rig) as desk:
        desk.bus.lose_acks = 2
        command = checkpoint_command()
        await desk.end(await desk.send(command))
        await eventually(lambda: desk.bus.lose_acks < 2, "the first acknowledgement")
        desk.bus.redeliver()
        await eventually(lambda: desk.bus.lose_acks == 0, "the second")
        desk.bus.redeliver()
        await desk.acked()
        assert len(desk.events(command.action_id)) == 3
    assert rig.criu.dumps == 1


# --- what cannot be done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"target": {}}, {"target": {"pid": 1, "pod_name": "a"}}, {"kind": "nonsense"}, {"surprise": 1}, {"expires_at": "soon"}],
)
@pytest.mark.parametrize("verb", ["checkpoint", "restore"])
async def test_a_malformed_command_that_says_which_action_it_is_gets_an_answer(
    tmp_path: Path, verb: str, change: dict[str, object]
) -> None:
    rig, action = node(tmp_path), new_id()
    text = {"action_id": action, "checkpoint_id": new_id(), "target": {"pod_name": FACTS.name}, **change}
    async with running(rig) as desk:
        await desk.send_raw(verb, json.dumps(text).encode())
        last = await desk.end(action)
        assert (last.status, last.code, last.type) == (ERROR, "bad_command", verb)
        await desk.acked()
        view = await desk.dispatcher.action(action)
        assert view.phase == "done"
    assert "criu.dump" not in rig.script.calls


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[]", b"{}", b"null", b'{"action_id": 7}', b'{"action_id": "x"}', b"[" * 60_000, b"x" * 100_000]
)
@pytest.mark.parametrize("verb", ["checkpoint", "restore", "cancel"])
async def test_what_nobody_can_read_is_dropped(tmp_path: Path, verb: str, data: bytes) -> None:
    async with running(node(tmp_path)) as desk:
        await desk.send_raw(verb, data)
        await desk.acked()
        assert not desk.bus.events
        assert not await desk.dispatcher.actions()
        last = await desk.end(await desk.send(checkpoint_command()))  # and it goes on
        assert last.status == READY


async def test_a_malformed_cancel_ends_no_action(tmp_path: Path) -> None:
    """Nor one that is still to come: its id would be used up."""
    command = checkpoint_command()
    async with running(node(tmp_path)) as desk:
        await desk.send_raw("cancel", json.dumps({"action_id": command.action_id, "surprise": 1}).encode())
        await desk.acked()
        assert (await desk.end(await desk.send(command))).status == READY


async def test_a_malformed_command_with_a_known_id_changes_nothing(tmp_path: Path) -> None:
    rig, command = node(tmp_path), checkpoint_command()
    rig.criu.gate.clear()
    async with running(rig) as desk:
        await desk.send(command)
        await eventually(rig.criu.dumping.is_set, "the dump")
        await desk.send_raw("checkpoint", json.dumps({"action_id": command.action_id, "surprise": 1}).encode())
        await asyncio.sleep(0)
        rig.criu.gate.set()
        assert (await desk.end(command.action_id)).status == READY
        await desk.acked()


async def test_a_command_that_came_too_late(tmp_path: Path) -> None:
    rig = node(tmp_path)
    async with running(rig) as desk:
        late = checkpoint_command().model_copy(update={"expires_at": time.time() - 1})
        last = await desk.end(await desk.send(late))
        assert (last.code, last.retry) == ("expired", False)
    assert "workloads.find" not in rig.script.calls


async def test_a_transient_error_is_tried_again(tmp_path: Path) -> None:
    rig = node(tmp_path, FailsTimes("store.check", 2, lambda: StoreUnavailable("away")))
    async with running(rig) as desk:
        action = await desk.send(checkpoint_command())
        assert (await desk.end(action)).status == READY
        assert desk.statuses(action) == [PROCESSING, CREATED, READY]
    assert rig.script.calls.count("store.check") == 3


async def test_after_so_many_attempts_the_caller_may_try(tmp_path: Path) -> None:
    rig = node(tmp_path, FailsTimes("store.check", 100, lambda: StoreUnavailable("away")), attempts=4)
    async with running(rig) as desk:
        last = await desk.end(await desk.send(checkpoint_command()))
        assert (last.status, last.code, last.retry) == (ERROR, "store_unavailable", True)
    assert rig.script.calls.count("store.check") == 4


async def test_once_a_workload_was_frozen_nothing_is_tried_again(tmp_path: Path) -> None:
    rig = node(tmp_path, FailsTimes("store.commit index.zst", 1, lambda: StoreUnavailable("away")))
    async with running(rig) as desk:
        last = await desk.end(await desk.send(checkpoint_command()))
        assert (last.code, last.retry) == ("store_unavailable", True)
    assert rig.criu.dumps == 1
    assert not rig.machine.stopped


async def test_a_defect_is_one_action_s_end_and_not_the_daemon_s(tmp_path: Path) -> None:
    rig = node(tmp_path, FailsTimes("criu.dump half", 1, lambda: RuntimeError("a bug")))
    async with running(rig) as desk:
        last = await desk.end(await desk.send(checkpoint_command()))
        assert (last.code, last.retry) == ("internal", False)
        assert "a bug" not in last.message
        assert (await desk.end(await desk.send(checkpoint_command()))).status == READY


# --- slots and cancels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_only_an_asynchronous_checkpoint_frees_its_slot_while_it_ships(tmp_path: Path, asynchronous: bool) -> None:
    rig = node(tmp_path, Gate("store.commit index.zst"), actions=1)
    async with running(rig) as desk:
        first, second = checkpoint_command(asynchronous=asynchronous), for_nobody()
        await desk.send(first)
        await eventually(rig.script.reached.is_set, "shipping")
        await desk.send(second)
        if asynchronous:
            assert (await desk.end(second.action_id)).code == "not_found"
            assert desk.statuses(first.action_id) == [PROCESSING, CREATED]
        else:
            await eventually(lambda: desk.record_status(second.action_id), "the second action")
            for _ in range(20):
                await asyncio.sleep(0)
            assert desk.record_status(second.action_id) == Status.INITIALIZED
        rig.script.open.set()
        assert (await desk.end(first.action_id)).status == READY
        assert (await desk.end(second.action_id)).code == "not_found"


async def test_so_many_ship_behind_and_one_more_keeps_its_slot_until_one_is_done(tmp_path: Path) -> None:
    rig = node(tmp_path, Gate("store.commit index.zst"), actions=1)
    async with running(rig) as desk:
        behind, first, second = desk.dispatcher._behind, checkpoint_command(asynchronous=True), for_nobody()
        for _ in range(BEHIND):  # others ship
            await behind.acquire()
        await desk.send(first)
        await eventually(rig.script.reached.is_set, "shipping")
        await desk.send(second)
        await eventually(lambda: desk.record_status(second.action_id), "the second action")
        await turns()
        assert desk.record_status(second.action_id) == Status.INITIALIZED
        behind.release()  # one is done
        assert (await desk.end(second.action_id)).code == "not_found"
        assert desk.statuses(first.action_id) == [PROCESSING, CREATED], "it ships behind now"
        rig.script.open.set()
        assert (await desk.end(first.action_id)).status == READY
        await desk.acked()
        await eventually(lambda: not behind.locked(), "its place is free again")
        for _ in range(BEHIND - 1):
            behind.release()


async def test_a_slot_is_kept_until_ready_where_so_many_ship_behind_and_given_back_once(tmp_path: Path) -> None:
    rig = node(tmp_path, actions=1)
    async with running(rig) as desk:
        for _ in range(BEHIND):
            await desk.dispatcher._behind.acquire()
        for _ in range(2):
            assert (await desk.end(await desk.send(checkpoint_command(asynchronous=True)))).status == READY
        await eventually(lambda: not desk.dispatcher.running, "the end")
        assert (desk.dispatcher._slots._value, desk.dispatcher._behind._value) == (1, 0)


async def test_an_asynchronous_checkpoint_that_tries_again_keeps_its_slot(tmp_path: Path) -> None:
    class BusyThenGate(Gate):
        left = 1

        def step(self, name: str) -> None:
            if name == "store.check" and self.left:
                self.left -= 1
                raise StoreUnavailable("away")
            super().step(name)

    rig = node(tmp_path, BusyThenGate("criu.dump"), actions=1)
    async with running(rig) as desk:
        first, second = checkpoint_command(asynchronous=True), for_nobody()
        await desk.send(first)
        await eventually(rig.script.reached.is_set, "the dump")
        await desk.send(second)
        await eventually(lambda: desk.record_status(second.action_id), "the second action")
        for _ in range(20):
            await asyncio.sleep(0)
        assert desk.record_status(second.action_id) == Status.INITIALIZED, "two actions in one slot"
        rig.script.open.set()
        assert (await desk.end(first.action_id)).status == READY


async def test_a_dump_that_holds_its_workload_too_long_is_ended(tmp_path: Path) -> None:
    rig = node(tmp_path, pause=0.05)
    rig.criu.fault = "hang"
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        last = await desk.end(command.action_id)
        assert (last.status, last.code, last.details["phase"]) == (ERROR, "deadline", "dumping")
        assert "limits.pause" in last.hint
    assert not rig.machine.stopped


async def test_a_running_action_is_cancelled(tmp_path: Path) -> None:
    rig = node(tmp_path)
    rig.criu.fault = "hang"
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.criu.dumping.is_set, "the dump")
        await desk.send(CancelCommand(action_id=command.action_id))
        last = await desk.end(command.action_id)
        assert (last.status, last.code) == (ERROR, "cancelled")
        await desk.acked()
        assert not await desk.dispatcher.cancel(command.action_id), "it has ended"
        assert not await desk.dispatcher.cancel(new_id())
    assert not rig.machine.stopped


async def test_a_waiting_action_is_cancelled(tmp_path: Path) -> None:
    rig = node(tmp_path, Gate("criu.dump"), actions=1)
    async with running(rig) as desk:
        first, second = checkpoint_command(), checkpoint_command()
        await desk.send(first)
        await eventually(rig.script.reached.is_set, "the dump")
        await desk.dispatcher.submit(second)
        assert await desk.dispatcher.cancel(second.action_id)
        assert (await desk.end(second.action_id)).code == "cancelled", "it does not wait for a slot to end"
        rig.script.open.set()
        assert (await desk.end(first.action_id)).status == READY
    assert rig.criu.dumps == 1


async def test_a_slot_that_comes_in_the_moment_in_which_the_command_expires_is_not_lost(tmp_path: Path) -> None:
    rig = node(tmp_path, actions=1)
    async with running(rig) as desk:
        slots = desk.dispatcher._slots
        await slots.acquire()
        late = for_nobody().model_copy(update={"expires_at": time.time() + 2.0})
        await desk.send(late)
        await eventually(lambda: slots._waiters, "one who waits")

        def free_until_it_is_too_late() -> None:
            """The loop is busy past the deadline: who waits and the deadline have their turn together, in this order."""
            slots.release()
            while (left := late.expires_at - time.time()) >= 0:
                time.sleep(left)

        asyncio.get_running_loop().call_soon(free_until_it_is_too_late)
        assert (await desk.end(late.action_id)).code == "expired"
        assert (await desk.end(await desk.send(for_nobody()))).code == "not_found"


async def test_a_slot_that_comes_together_with_a_cancel_is_not_lost(tmp_path: Path) -> None:
    rig = node(tmp_path, actions=1)
    async with running(rig) as desk:
        slots = desk.dispatcher._slots
        for release_first in (True, False):
            await slots.acquire()
            action = await desk.send(for_nobody())
            await eventually(lambda: slots._waiters, "one who waits")
            if release_first:
                slots.release()
            await desk.dispatcher.cancel(action)
            if not release_first:
                slots.release()
            assert (await desk.end(action)).code in ("cancelled", "not_found")
        assert (await desk.end(await desk.send(for_nobody()))).code == "not_found"


async def test_an_action_that_waits_to_try_again_is_cancelled(tmp_path: Path) -> None:
    rig = node(tmp_path, FailsTimes("store.check", 100, lambda: StoreUnavailable("away")), retry_delay=1000, attempts=5)
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(lambda: "store.check" in rig.script.calls, "the first try")
        await desk.dispatcher.cancel(command.action_id)
        assert (await desk.end(command.action_id)).code == "cancelled"


# --- stop -------------------------------------------------------------------------------------------------------------------


async def test_a_stop_lets_running_actions_end(tmp_path: Path) -> None:
    rig = node(tmp_path, Gate("criu.dump"))
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.script.reached.is_set, "the dump")
        stopping = asyncio.ensure_future(desk.stop(DEADLINE))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="stopping"):
            await desk.dispatcher.submit(checkpoint_command())
        rig.script.open.set()
        await stopping
        assert desk.statuses(command.action_id) == [PROCESSING, CREATED, READY], "told before it ends"


async def test_a_stop_cancels_what_does_not_end(tmp_path: Path) -> None:
    rig = node(tmp_path)
    rig.criu.fault = "hang"
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.criu.dumping.is_set, "the dump")
        await desk.stop(0.01)
        assert desk.events(command.action_id)[-1].code == "cancelled"
    assert not rig.machine.stopped


async def test_a_command_that_comes_while_the_daemon_drains_is_kept_for_the_next_one(tmp_path: Path) -> None:
    """Sent back at once it would come again at once, and the next daemon would count the deliveries as crashes."""
    rig, bus = node(tmp_path, Gate("criu.dump")), MemoryBus()
    async with running(rig, bus) as desk:
        first, second = checkpoint_command(), for_nobody()
        await desk.send(first)
        await eventually(rig.script.reached.is_set, "the dump")
        stopping = asyncio.ensure_future(desk.stop(DEADLINE))
        await eventually(lambda: desk.dispatcher.stopping, "the stop")
        await desk.send(second)
        await eventually(lambda: bus.given_out == 2, "the second command")
        await turns()
        assert (bus.given_out, bus.sent_back) == (2, 0)
        rig.script.open.set()
        await stopping
        assert desk.statuses(first.action_id)[-1] == READY
        assert (bus.given_out, bus.sent_back) == (2, 1), "given back once, when nobody is there to get it again"
    async with running(node(tmp_path), bus) as desk:
        assert (await desk.end(second.action_id)).code == "not_found", "the next daemon does it, at once"
        await desk.acked()


async def test_what_is_kept_while_the_daemon_drains_stays_ours(tmp_path: Path) -> None:
    """For longer than the broker waits for an answer."""
    rig, bus = Rig(tmp_path, memory(1100), Gate("criu.dump"), node="n", cluster="c", bus={"ack_wait": 1.0}), MemoryBus()
    async with running(rig, bus, ack_wait=1.0) as desk:
        await desk.send(checkpoint_command())
        await eventually(rig.script.reached.is_set, "the dump")
        stopping = asyncio.ensure_future(desk.stop(DEADLINE))
        await eventually(lambda: desk.dispatcher.stopping, "the stop")
        await desk.send(for_nobody())
        await eventually(lambda: bus.given_out == 2, "the second command")
        began = time.monotonic()
        await eventually(lambda: time.monotonic() - began > 1.5, "more than the broker waits")
        assert (bus.given_out, bus.sent_back) == (2, 0)
        rig.script.open.set()
        await stopping


async def test_a_cancel_is_heard_while_the_daemon_drains(tmp_path: Path) -> None:
    rig = node(tmp_path)
    rig.criu.fault = "hang"
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.criu.dumping.is_set, "the dump")
        stopping = asyncio.ensure_future(desk.stop(DEADLINE))
        await eventually(lambda: desk.dispatcher.stopping, "the stop")
        await desk.send(CancelCommand(action_id=command.action_id))
        await stopping
        last = desk.events(command.action_id)[-1]
        assert (last.status, last.code, last.message) == (ERROR, "cancelled", "cancelled by command")
        await desk.acked()
    assert not rig.machine.stopped


async def test_a_cancel_of_what_the_next_daemon_will_begin_is_the_next_daemons(tmp_path: Path) -> None:
    rig, bus = node(tmp_path, Gate("criu.dump")), MemoryBus()
    async with running(rig, bus) as desk:
        await desk.send(checkpoint_command())
        await eventually(rig.script.reached.is_set, "the dump")
        stopping = asyncio.ensure_future(desk.stop(DEADLINE))
        await eventually(lambda: desk.dispatcher.stopping, "the stop")
        second = for_nobody()
        await desk.send(CancelCommand(action_id=second.action_id))
        await desk.send(second)
        await eventually(lambda: bus.given_out == 3, "both")
        rig.script.open.set()
        await stopping
    async with running(node(tmp_path), bus) as desk:
        assert (await desk.end(second.action_id)).code == "cancelled"
        await desk.acked()


# --- the broker is away -----------------------------------------------------------------------------------------------------


async def test_events_wait_for_the_broker_and_come_in_order(tmp_path: Path) -> None:
    rig, bus = node(tmp_path), MemoryBus()
    async with running(rig, bus) as desk:
        await eventually(lambda: desk.courier.connected, "the connection")
        bus.away = True
        commands = [checkpoint_command(), for_nobody()]
        for command in commands:
            await desk.dispatcher.submit(command)
            await eventually(lambda: (desk.record_status(command.action_id) or PROCESSING).terminal, "the end")  # noqa: B023
        assert not bus.events
        assert len(desk.outbox) == 5
        bus.away = False
        for command in commands:
            await desk.end(command.action_id)
        assert desk.statuses(commands[0].action_id) == [PROCESSING, CREATED, READY]
        await eventually(lambda: not len(desk.outbox), "an empty outbox")


async def test_events_that_a_daemon_could_not_send_are_sent_by_the_next(tmp_path: Path) -> None:
    bus, command = MemoryBus(), checkpoint_command()
    bus.away = True
    async with running(node(tmp_path), bus) as desk:
        await desk.dispatcher.submit(command)
        await eventually(lambda: desk.record_status(command.action_id) == READY, "the end")
    bus.away = False
    async with running(node(tmp_path), bus) as desk:
        await desk.end(command.action_id)


async def test_a_command_filed_while_the_node_was_down_is_done(tmp_path: Path) -> None:
    bus, command = MemoryBus(), checkpoint_command()
    control = bus.control("c")
    await control.start()
    await control.send("n", "checkpoint", command.action_id, wire.encode_command(command))
    async with running(node(tmp_path), bus) as desk:
        assert (await desk.end(command.action_id)).status == READY


async def test_who_has_it_answers_and_the_others_are_silent(tmp_path: Path) -> None:
    async with running(node(tmp_path)) as desk:
        await desk.control.start()
        await eventually(lambda: desk.bus._answers, "the subscription")
        (answer,) = await desk.control.find(wire.encode_find(Target(pod_name=FACTS.name)), 5.0)
        assert b"trainer" in answer
        assert await desk.control.find(wire.encode_find(Target(pod_name="nobody")), 5.0) == []
        desk.rig.end_of_original()
        assert await desk.control.find(wire.encode_find(Target(pod_name=FACTS.name)), 5.0) == []


# --- the disk under journal and outbox --------------------------------------------------------------------------------------


async def test_an_outcome_that_cannot_be_written_down_is_written_when_it_can(tmp_path: Path) -> None:
    """The journal's disk goes away in the middle, and comes back."""
    rig = node(tmp_path, Gate("criu.dump"))
    journal, away = tmp_path / "state" / "journal", tmp_path / "away"
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.script.reached.is_set, "the dump")
        with capture_logs() as logs:
            journal.rename(away)
            rig.script.open.set()
            await eventually(lambda: said(logs, "cannot write down how it ended"), "the failed write")
        assert not rig.machine.stopped
        assert desk.bus._queue("c", "n").items, "it must not be acknowledged before its outcome is on disk"
        away.rename(journal)
        assert (await desk.end(command.action_id)).status == ERROR
        await desk.acked()


async def test_what_is_ready_stays_ready_though_the_disk_does_not_take_the_word(tmp_path: Path) -> None:
    rig = node(tmp_path, Gate("store.get manifest.json"))  # the manifest is read back: after it, the checkpoint is committed
    journal, away = tmp_path / "state" / "journal", tmp_path / "away"
    async with running(rig) as desk:
        command = checkpoint_command()
        await desk.send(command)
        await eventually(rig.script.reached.is_set, "the manifest")
        with capture_logs() as logs:
            journal.rename(away)
            rig.script.open.set()
            await eventually(lambda: said(logs, "cannot write down how it ended"), "the failed write")
        assert desk.statuses(command.action_id) == [PROCESSING, CREATED]
        away.rename(journal)
        last = await desk.end(command.action_id)
        assert (last.status, last.details) == (READY, {"location": f"memory:////{command.checkpoint_id}"})
        assert [event.seq for event in desk.events(command.action_id)] == [1, 2, 3]
        await desk.acked()


@pytest.mark.parametrize("room", ["while it drains", "just before it must end"])
async def test_a_restored_tree_stays_though_the_daemon_stops_on_a_full_disk(tmp_path: Path, room: str) -> None:
    """What the journal calls half restored the next daemon kills: so `ready` is tried as long as there is time, and once more."""
    rig = node(tmp_path, retry_delay=0.01 if room == "while it drains" else 1000.0)
    command = restore_command(rig.checkpoint())
    rig.end_of_original()
    rig.rescript(script := ProbeGate())
    journal, away = tmp_path / "state" / "journal", tmp_path / "away"
    async with running(rig) as desk:
        await desk.send(command)
        await eventually(script.reached.is_set, "the probe")
        stopping = asyncio.ensure_future(desk.stop(DEADLINE))
        await eventually(lambda: desk.dispatcher.stopping, "the stop")
        with capture_logs() as logs:
            journal.rename(away)
            script.open.set()
            await eventually(lambda: said(logs, "cannot write down how it ended"), "the failed write")
        away.rename(journal)
        if room != "while it drains":
            desk.dispatcher.cancel_all("a second signal")
        await stopping
        assert desk.record_status(command.action_id) == READY
    assert rig.machine.restored


async def test_a_restored_tree_stays_though_the_disk_was_full_to_the_end_of_its_daemon(tmp_path: Path) -> None:
    """Not a word of it could be written down: the next daemon knows it by its mark, says `ready`, and leaves nothing in work_dir."""
    rig = node(tmp_path)
    command = restore_command(rig.checkpoint())
    rig.end_of_original()
    rig.rescript(script := ProbeGate())
    journal, away = tmp_path / "state" / "journal", tmp_path / "away"
    async with running(rig) as desk:
        await desk.send(command)
        await eventually(script.reached.is_set, "the probe")
        with capture_logs() as logs:
            journal.rename(away)
            script.open.set()
            await eventually(lambda: said(logs, "cannot write down how it ended"), "the failed write")
        desk.dispatcher.cancel_all("a second signal")
        await desk.stop(DEADLINE)
    away.rename(journal)
    assert rig.machine.restored
    assert os.listdir(rig.node.config.work_dir) == [f"{command.action_id}.stays"]
    async with running(rig) as desk:
        assert desk.record_status(command.action_id) == READY
    assert rig.machine.restored
    assert os.listdir(rig.node.config.work_dir) == []


async def test_an_outcome_that_is_no_text_is_told_all_the_same(tmp_path: Path) -> None:
    def failure() -> DumpFailed:
        return DumpFailed("a file named \udcff", hint="\udcfe", path="/tmp/\udcff", odd=object())

    async with running(node(tmp_path, FailsTimes("criu.dump", 1, failure))) as desk:
        command = checkpoint_command()
        await desk.send(command)
        last = await desk.end(command.action_id)
        assert (last.code, last.message, last.details["path"]) == ("dump_failed", "a file named ?", "/tmp/?")


def times_said(logs: list[MutableMapping[str, object]], what: str) -> int:
    return sum(line["event"] == what for line in logs)


async def test_a_command_of_people_that_a_full_disk_does_not_take_is_told_so(tmp_path: Path) -> None:
    class Full(Journal):
        full = True

        def begin(self, command: ActionCommand, about: Mapping[str, str] | None = None) -> Entry:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().begin(command, about)

    rig = node(tmp_path)
    journal = Full(tmp_path / "state" / "journal")
    rig.node = replace(rig.node, journal=journal)
    async with running(rig) as desk:
        command = checkpoint_command()
        with pytest.raises(NoRoom):
            await desk.answers.submit(command)
        journal.full = False
        await desk.answers.submit(command)
        assert (await desk.end(command.action_id)).status == READY


@pytest.mark.parametrize("readable", [True, False])
async def test_a_command_that_cannot_be_written_down_is_kept_until_it_can(tmp_path: Path, readable: bool) -> None:
    """The broker's count of deliveries is for crashes: a disk that is full for an hour must not use it up."""
    rig = node(tmp_path)
    journal, away = tmp_path / "state" / "journal", tmp_path / "away"
    async with running(rig) as desk:
        journal.rename(away)
        command = checkpoint_command()
        with capture_logs() as logs:
            if readable:
                await desk.send(command)
            else:
                await desk.send_raw("checkpoint", json.dumps({"action_id": command.action_id, "surprise": 1}).encode())
            await eventually(lambda: times_said(logs, "could not begin") > 8, "failed writes, more than max_deliver")
        assert (desk.bus.given_out, desk.bus.sent_back) == (1, 0)
        away.rename(journal)
        assert (await desk.end(command.action_id)).code == ("ok" if readable else "bad_command")
        await desk.acked()
        assert (desk.bus.given_out, desk.bus.sent_back) == (1, 0)
    assert rig.criu.dumps == (1 if readable else 0)


async def test_a_node_whose_proc_cannot_be_read_for_a_while_is_told_again(tmp_path: Path) -> None:
    rig = node(tmp_path, FailsTimes("host.load", 3, lambda: OSError(24, "Too many open files")), node_interval=0.005)
    async with running(rig) as desk:
        await eventually(lambda: desk.bus._records, "the node's record")
    assert rig.script.calls.count("host.load") > 3


def listed(desk: Desk) -> list[WorkloadView]:
    """What the node's record says that runs there; nothing while there is none."""
    found = desk.bus._records.get(("c", "n"))
    return wire.decode_node(found[0]).workloads if found else []


async def test_a_nodes_record_says_what_runs_there(tmp_path: Path) -> None:
    async with running(node(tmp_path)) as desk:
        await eventually(lambda: listed(desk), "the node's record")
        (job,) = listed(desk)
        assert (job.kind, job.namespace, job.name, job.uid, job.pid) == ("job", "default", FACTS.name, FACTS.uid, ROOT)
        assert job.command == job.log == "", "it may be secret, and long"
        assert [each.workloads for each in await desk.answers.nodes()] == [[job]]
        desk.bus.away = True
        assert [each.workloads for each in await desk.answers.nodes()] == [[job]]


async def test_a_nodes_record_is_told_again_soon_after_something_has_changed(tmp_path: Path) -> None:
    async with running(node(tmp_path, node_interval=1000.0)) as desk:
        await eventually(lambda: listed(desk), "the node's record")
        await desk.end(await desk.send(checkpoint_command(criu_opts=KILL)))
        await eventually(lambda: not listed(desk), "a record without what was killed")


async def test_a_nodes_record_has_so_many_workloads_and_no_more(tmp_path: Path) -> None:
    rig = node(tmp_path)
    (job,) = rig.node.jobs.views(None)
    many = [job.model_copy(update={"name": f"job-{number}"}) for number in range(MAX_LISTED + 7)]
    rig.node.jobs.views = lambda _: many  # type: ignore[method-assign]
    async with running(rig) as desk:
        await eventually(lambda: listed(desk), "the node's record")
        assert [each.name for each in listed(desk)] == [each.name for each in many[:MAX_LISTED]]


async def test_a_node_that_cannot_look_at_its_jobs_is_there_all_the_same(tmp_path: Path) -> None:
    rig = node(tmp_path, node_interval=0.01)
    calls: list[Target | None] = []

    def broken(target: Target | None) -> list[WorkloadView]:
        calls.append(target)
        raise ValueError("a line of /proc that nobody knows")

    async with running(rig) as desk:
        await eventually(lambda: listed(desk), "the node's record")
        rig.node.jobs.views = broken  # type: ignore[method-assign]
        await eventually(lambda: len(calls) > 1, "another look, and one more")
        desk.bus._records.clear()
        await eventually(lambda: listed(desk), "a record all the same, with what was there when it was last seen")


def wished(desk: Desk) -> list[HeartbeatWish]:
    """What the node's record says that pods ask for."""
    found = desk.bus._records.get(("c", "n"))
    return wire.decode_node(found[0]).heartbeats if found else []


async def test_a_nodes_record_says_what_pods_ask_for_and_what_is_wrong_is_logged_once(tmp_path: Path) -> None:
    rig = node(tmp_path, node_interval=0.01)
    known = {"namespace": "ml", "uid": "u"}
    well = [HeartbeatWish(name=f"p-{number}", interval=60, keep_last=3, **known) for number in range(MAX_WISHES)]
    rig.machine.wishes = [HeartbeatWish(name="bad", problem="it is soon", **known), *well[1:]]
    with capture_logs() as logs:
        async with running(rig) as desk:
            await eventually(lambda: wished(desk), "the node's record")
            assert wished(desk) == [*well[1:], rig.machine.wishes[0]]
            rig.machine.wishes = [rig.machine.wishes[0], *well]
            await eventually(lambda: wished(desk) == well, "the one that is wrong to be left out, as there are too many")
            rig.node.jobs.heartbeats = lambda: 1 / 0  # type: ignore[method-assign]
            desk.bus._records.clear()
            await eventually(lambda: wished(desk) == well, "a record all the same, with what was asked for last")
            (told,) = await desk.answers.nodes()
            assert told.heartbeats == well
    assert times_said(logs, "no heartbeat") == 1


# --- after a crash ----------------------------------------------------------------------------------------------------------

TREES = (Tree(pid=ROOT, start_time=1000 + ROOT),)


def crashed(rig: Rig, command: ActionCommand, phase: str, status: Status = PROCESSING, **changes: object) -> None:
    """The journal of a daemon that died in `phase`."""
    event = Event(
        action_id=command.action_id,
        seq=2,
        type=command.type,
        status=status,
        checkpoint_id=command.checkpoint_id,
        node="n",
        time=1.0,
    )
    entry = rig.node.journal.begin(command)
    entry.update(phase=phase, status=status, seq=2, events=(event,), published=1, **changes)
    (rig.node.config.work_dir / command.action_id).mkdir(parents=True)


def claimed(rig: Rig, command: CheckpointCommand) -> None:
    """The checkpoint in the store is of this action."""
    manifest = catalog.read(rig.store, command.checkpoint_id, rig.node.notary).model_copy(update={"action_id": command.action_id})
    rig.store.objects[f"{command.checkpoint_id}/manifest.json"] = format.encode_manifest(manifest, rig.node.notary)


def another_daemon(directory: Path, rig: Rig) -> Rig:
    """The same machine and store, started anew: what it knows is what is on disk."""
    new = node(directory)
    new.machine, new.store = rig.machine, rig.store
    new.rescript(Script())
    return new


async def recovered(directory: Path, rig: Rig, command: ActionCommand) -> tuple[Rig, Event]:
    new = another_daemon(directory, rig)
    async with running(new) as desk:
        await eventually(lambda: any(e.status.terminal for e in desk.events(command.action_id)), "the outcome")
        events = desk.events(command.action_id)
        assert sum(e.status.terminal for e in events) == 1
        assert events[-1].seq == 3
        await desk.send(command)
        await desk.acked()
        assert desk.events(command.action_id)[-1] == events[-1], "a redelivery is answered with it"
        assert (await desk.dispatcher.action(command.action_id)).phase == "done"
    assert not any(new.node.config.work_dir.iterdir())
    assert new.criu.dumps == new.criu.restores == 0
    return new, events[-1]


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("phase", ["starting", "preflight", "dumping", "shipping", "committing", "killing"])
async def test_a_crash_in_the_middle_of_a_checkpoint(tmp_path: Path, phase: str, kill: bool) -> None:
    """Without a checkpoint in the store: the workload gets its life back, and the action ends as interrupted."""
    rig, command = node(tmp_path), checkpoint_command()
    rig.machine.stopped = phase not in ("starting", "preflight")
    crashed(rig, command, phase, trees=TREES, kill=kill)
    _, last = await recovered(tmp_path, rig, command)
    assert (last.status, last.code) == (ERROR, "interrupted")
    assert rig.machine.alive
    assert not rig.machine.stopped


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("phase", ["committing", "killing"])
async def test_a_crash_after_the_commit(tmp_path: Path, phase: str, kill: bool) -> None:
    rig, command = node(tmp_path), checkpoint_command()
    rig.checkpoint(command.checkpoint_id)
    claimed(rig, command)
    rig.machine.stopped = kill
    crashed(rig, command, phase, trees=TREES, kill=kill)
    _, last = await recovered(tmp_path, rig, command)
    assert (last.status, last.code) == (READY, "ok")
    assert last.details == {"location": f"memory:////{command.checkpoint_id}"}
    assert rig.machine.alive is not kill
    assert not rig.machine.stopped or kill


async def test_a_crash_before_the_commit_of_what_another_node_has_committed(tmp_path: Path) -> None:
    """The checkpoint under that id is whole, but of another workload: ours must not die for it."""
    rig, command = node(tmp_path), checkpoint_command()
    rig.checkpoint(command.checkpoint_id)
    rig.machine.stopped = True
    crashed(rig, command, "committing", trees=TREES, kill=True)
    _, last = await recovered(tmp_path, rig, command)
    assert (last.status, last.code) == (ERROR, "interrupted")
    assert rig.machine.alive
    assert not rig.machine.stopped
    assert rig.whole(command.checkpoint_id)


@pytest.mark.parametrize("phase", ["committing", "killing"])
async def test_a_crash_after_ready_was_said_needs_no_store(tmp_path: Path, phase: str) -> None:
    rig, command = node(tmp_path), checkpoint_command()
    rig.machine.stopped = True
    crashed(rig, command, phase, READY, trees=TREES, kill=True)
    new = another_daemon(tmp_path, rig)
    new.rescript(FailsTimes("store.get manifest.json", 1000, lambda: StoreUnavailable("away")))
    async with running(new) as desk:
        assert not rig.machine.alive, "the kill is finished"
        await eventually(lambda: desk.statuses(command.action_id) == [READY], "what may not have been told is told")


async def test_a_store_that_is_away_after_a_crash_keeps_nobody_frozen(tmp_path: Path) -> None:
    rig, command = node(tmp_path), checkpoint_command()
    rig.checkpoint(command.checkpoint_id)
    rig.machine.stopped = True
    crashed(rig, command, "committing", trees=TREES, kill=True)
    new = another_daemon(tmp_path, rig)
    new.rescript(FailsTimes("store.get manifest.json", 1000, lambda: StoreUnavailable("away")))
    async with running(new) as desk:
        assert not rig.machine.stopped
        await eventually(lambda: desk.events(command.action_id), "the outcome")
        assert desk.events(command.action_id)[-1].code == "outcome_unknown"
    third = another_daemon(tmp_path, rig)
    async with running(third):
        assert rig.machine.alive, "who was told to live is not killed by a later start"


@pytest.mark.parametrize("phase", ["fetching", "restoring", "probing"])
async def test_a_crash_in_the_middle_of_a_restore(tmp_path: Path, phase: str) -> None:
    rig, command = node(tmp_path), restore_command(new_id())
    rig.end_of_original()
    rig.machine.restored = phase == "probing"
    crashed(rig, command, phase, trees=TREES if phase == "probing" else (Tree(pid=ROOT, start_time=0),))
    _, last = await recovered(tmp_path, rig, command)
    assert (last.status, last.code) == (ERROR, "interrupted")
    assert not rig.machine.restored


async def test_a_restored_tree_that_was_reported_stays(tmp_path: Path) -> None:
    """The daemon died after `ready` and before it closed the page."""
    rig, command = node(tmp_path), restore_command(new_id())
    rig.end_of_original()
    rig.machine.restored = True
    crashed(rig, command, "probing", READY, trees=TREES)
    async with running(another_daemon(tmp_path, rig)) as desk:
        await eventually(lambda: desk.statuses(command.action_id) == [READY], "what may not have been told is told")
        assert (await desk.dispatcher.action(command.action_id)).phase == "done"
    assert rig.machine.restored


async def test_a_tree_that_came_back_while_the_daemon_died_is_told(tmp_path: Path) -> None:
    """Who it is was not written down yet: it is not killed by its pid alone, and not passed over in silence."""
    rig, command = node(tmp_path), restore_command(new_id())
    rig.end_of_original()
    rig.machine.restored = True
    crashed(rig, command, "restoring", trees=(Tree(pid=ROOT, start_time=0),))
    _, last = await recovered(tmp_path, rig, command)
    assert (last.status, last.code) == (ERROR, "outcome_unknown")
    assert str(ROOT) in last.message


async def test_a_restored_tree_is_written_down_before_it_is_probed(tmp_path: Path) -> None:
    rig = node(tmp_path)
    made = rig.checkpoint()
    rig.end_of_original()
    rig.restore(made)
    assert TREES[0] in rig.entry.record.trees


async def test_an_undo_that_fails_is_tried_again_at_the_next_start(tmp_path: Path) -> None:
    rig, command = node(tmp_path), checkpoint_command()
    rig.machine.stopped = True
    crashed(rig, command, "shipping", trees=TREES)
    second = another_daemon(tmp_path, rig)
    second.rescript(FailsTimes("workloads.thaw", 1000, lambda: OSError("not now")))
    async with running(second) as desk:
        await eventually(lambda: desk.events(command.action_id), "the outcome")
        await eventually(lambda: desk.events(command.action_id)[-1].status.terminal, "the outcome")
        assert desk.events(command.action_id)[-1].code == "left_suspended"
        assert rig.machine.stopped
    third = another_daemon(tmp_path, rig)
    async with running(third) as desk:
        assert not rig.machine.stopped
        assert (await desk.dispatcher.action(command.action_id)).phase == "done"
        await asyncio.sleep(0)
    assert not [e for e in desk.events(command.action_id) if e.code == "interrupted"], "one terminal event"


async def test_an_undo_that_fails_later_does_not_hide_that_somebody_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entry stays open: else nobody would ever let it go. With what a stack of undos raises when two of them fail."""
    for error in (GpuWedged("the driver waits for who stands still"), OSError("no descriptor")):

        def both_fail(_node: object, _command: object, attempt: Attempt, error: Exception = error) -> None:
            with attempt.phase("dumping", 60), ExitStack() as undo:
                undo.callback(_raise, error)
                undo.callback(_raise, Stuck("letting the workload go on has failed"))
                raise DumpFailed("no")

        monkeypatch.setattr("hibernode.dispatch.checkpoint", both_fail)
        async with running(node(tmp_path / type(error).__name__)) as desk:
            action = await desk.send(checkpoint_command())
            assert (await desk.end(action)).code == "left_suspended"
            assert (await desk.dispatcher.action(action)).phase == "dumping"


def _raise(error: Exception) -> None:
    raise error


async def test_a_manifest_that_cannot_be_taken_back_leaves_nobody_standing_still(tmp_path: Path) -> None:
    """That is said with a word of its own, and its entry is closed: nobody is to be let go on at the next start."""

    class NoAnswer(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name.startswith(("store.put manifest", "store.delete manifest", "store.get manifest")):
                raise StoreUnavailable("away")

    rig = node(tmp_path, NoAnswer())
    async with running(rig) as desk:
        action = await desk.send(checkpoint_command())
        last = await desk.end(action)
        assert (last.code, last.retry) == ("outcome_unknown", False)
        assert (await desk.dispatcher.action(action)).phase == "done"


async def test_an_action_that_left_its_workload_suspended_is_recovered_at_the_next_start(tmp_path: Path) -> None:
    class ThawFails(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "workload.thaw":
                raise OSError("it does not go on")

    rig = node(tmp_path, ThawFails())
    async with running(rig) as desk:
        command = checkpoint_command()
        last = await desk.end(await desk.send(command))
        assert last.code == "left_suspended"
    rig.machine.stopped = True
    async with running(another_daemon(tmp_path, rig)):
        assert not rig.machine.stopped


class CannotKill(Script):
    """While the cluster is away, nobody can be killed."""

    away = True

    def step(self, name: str) -> None:
        super().step(name)
        if self.away and name in ("workload.kill", "workloads.kill"):
            raise OSError("no")


async def test_who_cannot_be_killed_after_a_crash_is_ready_all_the_same(tmp_path: Path) -> None:
    """The daemon died after the commit and before it said so: the checkpoint is whole, whatever becomes of its workload."""
    rig, command = node(tmp_path), checkpoint_command()
    rig.checkpoint(command.checkpoint_id)
    claimed(rig, command)
    rig.machine.stopped = True
    crashed(rig, command, "committing", CREATED, trees=TREES, kill=True, boot=BOOT)
    second = another_daemon(tmp_path, rig)
    second.rescript(script := CannotKill())
    async with running(second) as desk:
        await eventually(lambda: desk.statuses(command.action_id) == [CREATED, READY], "its outcome")
        await eventually(lambda: script.notes.count("workloads.kill") > 4, "tries")
        assert not rig.machine.killed
        script.away = False
        await eventually(lambda: rig.machine.killed == ["original"], "the kill")
    assert desk.statuses(command.action_id) == [CREATED, READY]


async def test_who_cannot_be_killed_while_the_disk_is_full_is_killed_later(tmp_path: Path) -> None:
    """Neither that it is ready nor that its workload is to be killed could be written down when it was so."""

    class Both(Gate, CannotKill):
        pass

    rig = node(tmp_path, script := Both("store.get manifest.json"))
    journal, away = tmp_path / "state" / "journal", tmp_path / "away"
    async with running(rig) as desk:
        command = checkpoint_command(criu_opts='{"leave_running": false}')
        await desk.send(command)
        await eventually(script.reached.is_set, "the manifest")
        with capture_logs() as logs:
            journal.rename(away)
            script.open.set()
            await eventually(lambda: said(logs, "cannot write down how it ended"), "the failed write")
        assert rig.machine.stopped
        away.rename(journal)
        assert (await desk.end(command.action_id)).status == READY
        tried = script.notes.count("workloads.kill")
        await eventually(lambda: script.notes.count("workloads.kill") > tried + 1, "tries")
        script.away = False
        await eventually(lambda: rig.machine.killed == ["original"], "the kill")
    assert desk.statuses(command.action_id) == [PROCESSING, CREATED, READY]


@pytest.mark.parametrize("daemons", ["the same", "the next"])
async def test_who_could_not_be_killed_is_killed_when_he_can_be(tmp_path: Path, daemons: str) -> None:
    """His checkpoint is ready, and he stands still: not until somebody starts the daemon anew."""
    script = CannotKill()
    rig = node(tmp_path, script)
    command = checkpoint_command(criu_opts='{"leave_running": false}')
    async with running(rig) as desk:
        assert (await desk.end(await desk.send(command))).status == READY
        await eventually(lambda: script.notes.count("workloads.kill") > 2, "tries")
        assert rig.machine.stopped
        if daemons == "the same":
            script.away = False
            await eventually(lambda: rig.machine.killed, "the kill")
            await eventually(lambda: rig.node.journal.find(command.action_id).record.done, "its end")  # type: ignore[union-attr]
    if daemons == "the next":
        second = another_daemon(tmp_path, rig)
        second.rescript(script)
        async with running(second):
            tried = script.notes.count("workloads.kill")
            await eventually(lambda: script.notes.count("workloads.kill") > tried + 3, "recovery, and what follows")
            assert not rig.machine.killed
            script.away = False
            await eventually(lambda: rig.machine.killed, "the kill")
    assert desk.statuses(command.action_id) == [PROCESSING, CREATED, READY]
    assert rig.machine.killed == ["original"]


async def test_one_broken_recovery_does_not_keep_the_others_frozen(tmp_path: Path) -> None:
    rig = node(tmp_path)
    first, second = checkpoint_command(), checkpoint_command()
    for command in (first, second):
        crashed(rig, command, "shipping", trees=TREES)
    rig.machine.stopped = True
    new = another_daemon(tmp_path, rig)
    new.rescript(FailsTimes("workloads.thaw", 1, lambda: RuntimeError("a bug")))
    async with running(new) as desk:
        assert not rig.machine.stopped
        for command in (first, second):
            await eventually(lambda: desk.events(command.action_id), "the outcome")  # noqa: B023


async def test_a_finished_action_is_known_to_the_next_daemon(tmp_path: Path) -> None:
    rig, command = node(tmp_path), checkpoint_command()
    async with running(rig) as desk:
        await desk.end(await desk.send(command))
    new = another_daemon(tmp_path, rig)
    async with running(new) as desk:
        await desk.send(command)
        await desk.acked()
        await eventually(lambda: desk.statuses(command.action_id) == [READY], "the same answer")
        await desk.dispatcher.submit(command)
    assert new.criu.dumps == 0


async def test_a_journal_page_is_readable_after_every_phase(tmp_path: Path) -> None:
    """What recovery depends on: the phase is on disk before its step."""
    seen: list[str] = []

    class Reads(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name in ("store.check", "workload.freeze", "criu.tasks", "store.put manifest.json"):
                (entry,) = Journal(tmp_path / "state" / "journal").all()
                seen.append(f"{name}: {entry.record.phase}")

    async with running(node(tmp_path, Reads())) as desk:
        await desk.end(await desk.send(checkpoint_command()))
    assert seen == [
        "store.check: preflight",
        "workload.freeze: dumping",
        "criu.tasks: shipping",
        "store.put manifest.json: committing",
    ]


async def test_questions_people_ask(tmp_path: Path) -> None:
    rig = node(tmp_path)
    async with running(rig) as desk:
        made = checkpoint_command()
        await desk.end(await desk.send(made))
        await desk.acked()
        (view,) = await desk.answers.actions()
        assert (view.action_id, view.status, view.phase) == (made.action_id, READY, "done")
        assert (await desk.answers.inspect(made.checkpoint_id))[0].checkpoint_id == made.checkpoint_id
        verdicts = [v async for v in desk.answers.verify(made.checkpoint_id)]
        assert verdicts[-1].code == "ok"
        assert [m.checkpoint_id for m in await desk.answers.checkpoints()] == [made.checkpoint_id]
        assert [n.node for n in await desk.answers.nodes()] == ["n"]
        await desk.answers.delete(made.checkpoint_id)
        assert not rig.store.objects
        for question in (desk.answers.inspect(made.checkpoint_id), desk.answers.action(new_id())):
            with pytest.raises(HibernodeError) as raised:
                await question
            assert raised.value.code == "not_found"
        assert Overrides() == made.overrides
