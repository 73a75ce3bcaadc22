"""Between the node and the bus: commands come in and are acknowledged after their outcome is on disk, events and records go out.

What comes in goes to the dispatcher; a command whose id is known is answered from the journal. What goes out lies in the outbox until
the broker has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math

import structlog

from hibernode import gc, wire
from hibernode.bus import Delivery, NodeBus
from hibernode.dispatch import Dispatcher
from hibernode.errors import (
    BadCommand,
    BusUnavailable,
    HibernodeError,
    Interrupted,
    NotFound,
    Permanent,
    Refused,
    Transient,
)
from hibernode.loop import Tasks, in_thread
from hibernode.model import (
    MAX_LISTED,
    MAX_WISHES,
    ActionCommand,
    CancelCommand,
    DeleteCommand,
    HeartbeatWish,
    NodeRecord,
    Outcome,
    Progress,
    RestoreCommand,
    WorkloadView,
)
from hibernode.node import Node
from hibernode.outbox import Outbox

_BUS_RETRY = 30.0  # seconds until a broker that refused us is asked again
_NODE_PAUSE = 0.5  # seconds between two records of this node at least: what changes together is told together
_LAST_WORDS = 5.0  # seconds for acknowledgements and events when the daemon stops
_log = structlog.get_logger("hibernode")


class Courier:
    """One node's end of the bus. Lives on the dispatcher's loop."""

    def __init__(self, dispatcher: Dispatcher, node: Node, outbox: Outbox, bus: NodeBus) -> None:
        self._dispatcher, self._node, self._outbox, self._bus = dispatcher, node, outbox, bus
        self._filled, self._stale = asyncio.Event(), asyncio.Event()  # there are events to send; the record is not true any more
        self._listed: list[WorkloadView] = []
        self._wishes: list[HeartbeatWish] = []
        self._serving, self._taking, self._deliveries = Tasks(), Tasks(), Tasks()
        self._leaving: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # what is still kept goes back
        dispatcher.posts_to(self._filled.set, self._progress, self.refresh)

    def start(self) -> None:
        """Take commands and send events from now on. Returns at once when the broker is away: it is waited for behind this."""
        self._serving.spawn(self._serve())

    async def stop(self) -> None:
        """After the dispatcher has stopped: take nothing more, give back what was not begun, acknowledge what has ended, send what
        waits, leave. Harmless when repeated."""
        await self._taking.cancel()  # first: what is given back must not come again to us
        if not self._leaving.done():
            self._leaving.set_result(None)
        await self._deliveries.finish(_LAST_WORDS)
        if self._bus.connected:
            with contextlib.suppress(BusUnavailable, OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._publish_waiting(), _LAST_WORDS)
        await self._deliveries.cancel()
        await self._serving.cancel()
        await self._bus.stop()

    @property
    def connected(self) -> bool:
        return self._bus.connected

    async def nodes(self) -> list[NodeRecord]:
        """Every node of the cluster that says who it is; only this one while the broker is away."""
        if not self._bus.connected:
            return [await self._own_record()]
        records = ((name, _record(name, data)) for name, data in (await self._bus.nodes()).items())
        return [record for name, record in records if record is not None and record.node == name]

    async def _serve(self) -> None:
        await self._connect()
        with contextlib.suppress(BusUnavailable):  # it answers when it is connected again
            await self._bus.answer_find(self._find)
        for work in (self._publish_outbox(), self._publish_node()):
            self._serving.spawn(work)
        if not self._leaving.done():
            self._taking.spawn(self._take_all())

    async def _take_all(self) -> None:
        async for delivery in self._bus.commands():
            self._deliveries.spawn(self._take(delivery))

    async def _connect(self) -> None:
        """Wait for the broker. A login or a certificate that it refuses is for a person to mend, perhaps there and not here, so that
        the daemon does not end for it: it says so and tries again."""
        while True:
            try:
                return await self._bus.start()
            except Refused as e:
                _log.error("the broker refuses this node", code=e.code, error=e.message, hint=e.hint, again_in=_BUS_RETRY)
                await asyncio.sleep(_BUS_RETRY)

    async def _take(self, delivery: Delivery) -> None:
        """Until it is answered it is kept: what the broker gives out again it counts, and that count is to tell of crashes only. What
        could not be begun until we leave is the next daemon's."""
        try:
            while not self._leaving.done():
                try:
                    if await self._answered(delivery):
                        return
                    patience = None
                except BusUnavailable:
                    raise
                except Transient as e:  # of a delete: it is tried until it is done
                    _log.warning("could not delete", code=e.code, error=str(e))
                    patience = self._node.config.limits.retry_delay
                except OSError as e:  # the journal's disk: what is not written down is not begun
                    _log.error("could not begin", verb=delivery.verb, error=str(e))
                    patience = self._node.config.limits.retry_delay
                await self._keep(delivery, self._leaving, patience)
            await delivery.later(0)
        except BusUnavailable as e:  # not acked: it comes again, and is answered from the journal
            _log.warning("could not acknowledge", verb=delivery.verb, error=str(e))

    async def _answered(self, delivery: Delivery) -> bool:
        """False while we are stopping and it is of an action that nobody knows yet: a command, or a cancel that has overtaken one."""
        try:
            command = wire.decode_command(delivery.verb, delivery.data)
        except BadCommand as e:
            await self._refuse_unreadable(delivery, e)
            return True
        if isinstance(command, DeleteCommand):
            if self._dispatcher.stopping:
                return False
            await self._delete(command)
            await delivery.done()
            return True
        if self._dispatcher.stopping and self._node.journal.find(command.action_id) is None:
            return False
        if isinstance(command, CancelCommand):
            if not await self._dispatcher.cancel(command.action_id):
                self._dispatcher.forestall(command.action_id)
        else:
            await self._run_delivered(command, delivery)
        await delivery.done()
        return True

    async def _delete(self, command: DeleteCommand) -> None:
        """Transient while somebody uses it, or the store is away; to which others refer goes with the last of them. What nobody can do is
        said and over."""
        key, who = f"checkpoint {command.checkpoint_id}", f"delete {command.action_id}"
        try:
            with self._node.claims.claim(key, who):
                store = self._node.open_store(command.directory)
                await in_thread(functools.partial(gc.remove, later=True), store, self._node.notary, command.checkpoint_id)
        except NotFound:
            pass  # it was done before
        except Permanent as e:
            _log.error("cannot delete", checkpoint=command.checkpoint_id, code=e.code, error=str(e))
        else:
            _log.info("deleted by command", checkpoint=command.checkpoint_id)

    async def _run_delivered(self, command: ActionCommand, delivery: Delivery) -> None:
        if delivery.attempt > self._node.config.bus.max_deliver and self._node.journal.find(command.action_id) is None:
            why = Interrupted(f"delivered {delivery.attempt} times and never begun", hint="the daemon's log says why")
            self._dispatcher.end(self._node.journal.begin(command), Outcome.of(why))
        if (running := self._dispatcher.accept(command)) is None:
            self._say_again(command.action_id)
            return
        await self._keep(delivery, running)

    async def _keep(self, delivery: Delivery, until: asyncio.Future[None], seconds: float | None = None) -> None:
        """Until that is done, or for so many seconds, the broker gives it to nobody else."""
        ends = asyncio.get_running_loop().time() + (math.inf if seconds is None else seconds)
        while not until.done() and (left := ends - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait([until], timeout=min(left, self._node.config.bus.ack_wait / 3))
            if not until.done():
                with contextlib.suppress(BusUnavailable):
                    await delivery.working()

    def _say_again(self, action_id: str) -> None:
        """A command that was answered before: its last event once more, under the same message id."""
        if (entry := self._node.journal.find(action_id)) is not None:
            self._outbox.again(entry)
            self._filled.set()

    async def _refuse_unreadable(self, delivery: Delivery, error: BadCommand) -> None:
        """Answer it if it says which action it is; drop it either way. A cancel or a delete is no action: nobody waits for its end.
        Nothing of it is logged but what is wrong with it: what somebody has put into a wrong place may be secret."""
        _log.warning("malformed command", verb=delivery.verb, error=str(error), size=len(delivery.data))
        if delivery.verb not in ("cancel", "delete"):
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, BadCommand):
                self._answer_unreadable(delivery, error)
        with contextlib.suppress(BusUnavailable):
            await delivery.drop()

    def _answer_unreadable(self, delivery: Delivery, error: BadCommand) -> None:
        found = json.loads(delivery.data)
        known = {"action_id": found["action_id"], "checkpoint_id": found.get("checkpoint_id") or found["action_id"]}
        stand_in = wire.decode_command("restore", json.dumps(known).encode())
        if isinstance(stand_in, RestoreCommand) and self._node.journal.find(stand_in.action_id) is None:
            entry = self._node.journal.begin(stand_in)
            entry.update(type="restore" if delivery.verb == "restore" else "checkpoint")
            self._dispatcher.end(entry, Outcome.of(error))

    async def _find(self, request: bytes) -> bytes | None:
        try:
            found = await in_thread(self._node.jobs.views, wire.decode_find(request))
        except HibernodeError:
            return None
        alive = [view for view in found if view.pid]
        return wire.encode_found(self._node.config.node, alive) if alive else None

    async def _publish_outbox(self) -> None:
        while True:
            self._filled.clear()
            try:
                await self._publish_waiting()
                await self._filled.wait()
            except (HibernodeError, OSError) as e:
                _log.warning("events wait", waiting=len(self._outbox), error=str(e))
                await asyncio.sleep(1)

    async def _publish_waiting(self) -> None:
        for entry, event in self._outbox.waiting():
            place = await self._bus.publish_event(
                event.action_id, wire.message_id(event), wire.encode_event(event), after=entry.record.stored_at
            )
            self._outbox.sent(entry, event, place)

    def refresh(self) -> None:
        """What runs here may have changed: the others are told soon."""
        self._stale.set()

    async def _publish_node(self) -> None:
        interval = self._node.config.limits.node_interval
        pause = min(_NODE_PAUSE, interval)
        while True:
            self._stale.clear()
            try:
                await self._bus.put_node(wire.encode_node(await self._own_record()))
            except BusUnavailable:
                pass  # it is said where it is noticed
            except (HibernodeError, OSError) as e:  # this node's own facts: the others are told when they can be had again
                _log.warning("cannot say how this node is", error=str(e))
            await asyncio.sleep(pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval - pause):
                    await self._stale.wait()

    async def _own_record(self) -> NodeRecord:
        told = {"workloads": await self._workloads(), "heartbeats": await self._heartbeats()}
        return (await self._dispatcher.record()).model_copy(update=told)

    async def _heartbeats(self) -> list[HeartbeatWish]:
        """What pods ask for; what they asked for last, where the container runtime does not answer. Those that are wrong are logged once,
        and are the first to be left out where there are too many."""
        try:
            wishes = await in_thread(self._node.jobs.heartbeats)
        except Exception as e:  # noqa: BLE001 - whatever it is, the node is there
            _log.warning("cannot say what pods ask for", error=str(e))
            return self._wishes[:MAX_WISHES]
        for wish in wishes:
            if wish.problem and wish not in self._wishes:
                _log.warning("no heartbeat", pod=f"{wish.namespace}/{wish.name}", uid=wish.uid, why=wish.problem)
        self._wishes = sorted(wishes, key=lambda wish: (bool(wish.problem), wish.since))
        return self._wishes[:MAX_WISHES]

    async def _workloads(self) -> list[WorkloadView]:
        """Those that run; as they were last seen, where they cannot be looked at. Their command lines may hold secrets, and are long."""
        try:
            views = await in_thread(self._node.jobs.views, None)
        except Exception as e:  # noqa: BLE001 - whatever it is, the node is there
            _log.warning("cannot say what runs here", error=str(e))
        else:
            alive = sorted(
                (view for view in views if view.pid or view.kind == "pod"), key=lambda view: (view.kind == "pod", not view.moves)
            )
            self._listed = [view.model_copy(update={"command": "", "log": ""}) for view in alive[:MAX_LISTED]]
        return self._listed

    async def _progress(self, progress: Progress) -> None:
        if self._bus.connected:
            with contextlib.suppress(BusUnavailable):
                await self._bus.publish_progress(progress.action_id, wire.encode_progress(progress))


def _record(name: str, data: bytes) -> NodeRecord | None:
    """What another node has written down of itself: the others are not to be missed for one that writes nonsense."""
    try:
        return wire.decode_node(data)
    except BadCommand as e:
        _log.warning("a node's record cannot be read", node_of_record=name, error=str(e))
        return None
