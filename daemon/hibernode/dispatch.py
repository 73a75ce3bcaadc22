"""Takes commands, runs each once, tells how it goes. asyncio; the work itself runs in threads, and `_in_thread` is the only way there.

One action's life: journal it; wait for a slot of the node; run its page (`checkpoint.py`, `restore.py`) in a thread; on a transient
error before anything was frozen, try again; keep the outcome in the journal, its event in the outbox; only then is a delivery acked. An
action id that is known is never run again: it is answered from the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import ParamSpec, TypeVar

import structlog

from hibernode import __version__, catalog, doctor, preflight, wire
from hibernode.bus import Delivery, NodeBus
from hibernode.checkpoint import checkpoint
from hibernode.errors import (
    BadCommand,
    BusUnavailable,
    HibernodeError,
    Internal,
    Interrupted,
    NotFound,
    Refused,
    Stuck,
    Transient,
)
from hibernode.journal import Entry
from hibernode.model import (
    ActionCommand,
    ActionView,
    Cancel,
    CancelCommand,
    Check,
    CheckpointCommand,
    Event,
    JobSpec,
    Manifest,
    Meter,
    NodeRecord,
    Outcome,
    Progress,
    Status,
    Target,
    Verdict,
    WorkloadView,
)
from hibernode.node import Attempt, Node
from hibernode.outbox import Outbox
from hibernode.recovery import recover
from hibernode.restore import restore

P = ParamSpec("P")
T = TypeVar("T")

_UNTOUCHED = ("starting", "preflight", "fetching")  # phases in which trying again is harmless
_BUS_RETRY = 30.0  # seconds until a broker that refused us is asked again
_WATCHER_QUEUE = 1000  # updates a slow watcher may lag behind before it loses progress (never events)
_log = structlog.get_logger("hibernode")


class _Running:
    """One action at work."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.cancel, self.meter = entry, Cancel(), Meter()
        self.slot_free = asyncio.Event()  # the next action may start
        self.reached = Status.INITIALIZED  # in truth, also where the disk would not take it
        self.task: asyncio.Task[None] | None = None


class Dispatcher:
    """The desk everything comes to: deliveries from the bus, calls from gRPC. Lives on one event loop."""

    def __init__(
        self,
        node: Node,
        outbox: Outbox,
        bus: NodeBus | None,
        observe: Callable[[Event | Progress], None] = lambda _: None,
    ) -> None:
        self._node, self._outbox, self._bus, self._observe = node, outbox, bus, observe
        self._running: dict[str, _Running] = {}
        self._slots = asyncio.Semaphore(node.config.limits.actions)
        self._watchers: set[asyncio.Queue[Event | Progress]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox_filled = asyncio.Event()
        self._stopping = False
        self._loop = asyncio.get_running_loop()

    # --- life ---------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Recover what a crash left, then take commands. Returns at once when the broker is away: it is waited for behind this."""
        for entry in self._node.journal.all():
            if not entry.record.done:
                await self._recover(entry)
        self._spawn(self._reap_forever())
        if self._bus is not None:
            self._spawn(self._serve_bus(self._bus))

    async def _recover(self, entry: Entry) -> None:
        try:
            self._end(entry, await self._in_thread(recover, self._node, entry))
        except Exception:  # noqa: BLE001 - one that cannot be recovered must not keep the others frozen; it stays open
            _log.exception("could not recover", action=entry.action_id)

    async def stop(self, grace: float = 30.0) -> None:
        """Take nothing new, give running actions `grace` seconds, then cancel them; returns when all have ended and been told."""
        self._stopping = True
        running = [action.task for action in self._running.values() if action.task]
        if running:
            _log.info("draining", actions=len(running), grace=grace)
            await asyncio.wait(running, timeout=grace)
        self.cancel_all("the daemon is stopping")
        await asyncio.gather(*running, return_exceptions=True)
        await self._flush_outbox(deadline=5.0)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._reap()  # who ended until now; the next daemon is not their parent and cannot see it
        if self._bus is not None:
            await self._bus.stop()

    def cancel_all(self, reason: str) -> None:
        for action in self._running.values():
            action.cancel.set(reason)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            known = isinstance(error, HibernodeError)
            _log.error("a task of the daemon ended", error=str(error), exc_info=None if known else error)

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The only crossing from loop to thread. If this call is cancelled it still waits for the thread: a thread abandoned while a
        workload is frozen is the worst thing that can happen here."""
        future = self._loop.run_in_executor(None, functools.partial(work, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            raise

    # --- commands from the bus ------------------------------------------------------------------------------------------------

    async def _serve_bus(self, bus: NodeBus) -> None:
        await self._connect(bus)
        with contextlib.suppress(BusUnavailable):  # it answers when it is connected again
            await bus.answer_find(self._find)
        for work in (self._publish_outbox(bus), self._publish_node(bus)):
            self._spawn(work)
        async for delivery in bus.commands():
            if self._stopping:
                await delivery.later(0)
                continue
            self._spawn(self._take(delivery))

    async def _connect(self, bus: NodeBus) -> None:
        """Wait for the broker. A login or a certificate that it refuses is for a person to mend, perhaps there and not here, so that
        the daemon does not end for it: it says so and tries again."""
        while True:
            try:
                return await bus.start()
            except Refused as e:
                _log.error("the broker refuses this node", code=e.code, error=e.message, hint=e.hint, again_in=_BUS_RETRY)
                await asyncio.sleep(_BUS_RETRY)

    async def _take(self, delivery: Delivery) -> None:
        try:
            try:
                command = wire.decode_command(delivery.verb, delivery.data)
            except BadCommand as e:
                await self._refuse_unreadable(delivery, e)
                return
            if isinstance(command, CancelCommand):
                await self.cancel(command.action_id)
            else:
                await self._run_delivered(command, delivery)
            await delivery.done()
        except BusUnavailable as e:  # not acked: it comes again, and is answered from the journal
            _log.warning("could not acknowledge", verb=delivery.verb, error=str(e))
        except OSError as e:  # the journal's disk: what is not written down is not begun
            _log.error("could not begin", verb=delivery.verb, error=str(e))
            with contextlib.suppress(BusUnavailable):
                await delivery.later(self._node.config.limits.retry_delay)

    async def _run_delivered(self, command: ActionCommand, delivery: Delivery) -> None:
        if delivery.attempt > self._node.config.bus.max_deliver and self._node.journal.find(command.action_id) is None:
            why = Interrupted(f"delivered {delivery.attempt} times and never begun", hint="the daemon's log says why")
            self._end(self._node.journal.begin(command), Outcome.of(why))
        self._accept(command)
        if (action := self._running.get(command.action_id)) is None or action.task is None:
            self._say_again(command.action_id)
            return
        while not action.task.done():
            await asyncio.wait([action.task], timeout=self._node.config.bus.ack_wait / 3)
            with contextlib.suppress(BusUnavailable):
                await delivery.working()

    def _say_again(self, action_id: str) -> None:
        """A command that was answered before: its last event once more, under the same message id."""
        if (entry := self._node.journal.find(action_id)) is not None:
            self._outbox.again(entry)
            self._outbox_filled.set()

    async def _refuse_unreadable(self, delivery: Delivery, error: BadCommand) -> None:
        """Answer it if it says which action it is; drop it either way. A cancel is no action: nobody waits for its end."""
        _log.warning(
            "malformed command",
            verb=delivery.verb,
            error=str(error),
            start=delivery.data[:200].decode(errors="replace"),
        )
        if delivery.verb != "cancel":
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError, BadCommand):
                self._answer_unreadable(delivery, error)
        with contextlib.suppress(BusUnavailable):
            await delivery.drop()

    def _answer_unreadable(self, delivery: Delivery, error: BadCommand) -> None:
        found = json.loads(delivery.data)
        known = {"action_id": found["action_id"], "checkpoint_id": found.get("checkpoint_id") or found["action_id"]}
        stand_in = wire.decode_command("restore", json.dumps(known).encode())
        if not isinstance(stand_in, CancelCommand) and self._node.journal.find(stand_in.action_id) is None:
            entry = self._node.journal.begin(stand_in)
            entry.update(type="restore" if delivery.verb == "restore" else "checkpoint")
            self._end(entry, Outcome.of(error))

    async def _find(self, request: bytes) -> bytes | None:
        try:
            found = await self.workloads(wire.decode_find(request))
        except HibernodeError:
            return None
        alive = [view for view in found if view.pid]
        return wire.encode_found(self._node.config.node, alive) if alive else None

    # --- actions --------------------------------------------------------------------------------------------------------------

    def _accept(self, command: ActionCommand) -> None:
        """Begin an action, unless its id is known."""
        if self._node.journal.find(command.action_id) is not None:
            return
        action = _Running(self._node.journal.begin(command))
        self._running[command.action_id] = action
        action.task = self._spawn(self._act(command, action))

    async def _act(self, command: ActionCommand, action: _Running) -> None:
        try:
            async with contextlib.AsyncExitStack() as slot:
                outcome = await self._outcome(command, action, slot)
            await self._end_surely(action.entry, outcome)
        finally:
            del self._running[command.action_id]

    async def _outcome(self, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack) -> Outcome:
        """How it ended. Whatever happens, there is an answer."""
        try:
            await self._wait_for_slot(action, slot)
            await self._tried(command, action, slot)
        except HibernodeError as e:
            if action.reached != Status.READY:
                return Outcome.of(e, action.meter.profile())
            _log.error("after it was ready", action=command.action_id, code=e.code, error=str(e))  # nobody else hears of it
            if isinstance(e, Stuck) and action.entry.record.status == Status.READY:
                return Outcome.of(e)  # no event any more, but the entry stays open for recovery
        except Exception:  # noqa: BLE001 - the last line: a defect of ours must not take the daemon with it
            _log.exception("defect", action=command.action_id)
            if action.reached != Status.READY:
                return Outcome.of(Internal("an internal error; the daemon's log has it"), action.meter.profile())
        return Outcome(Status.READY, profile=action.meter.profile())

    async def _wait_for_slot(self, action: _Running, slot: contextlib.AsyncExitStack) -> None:
        await self._unless_cancelled(action, self._slots.acquire())
        slot.callback(self._slots.release)
        self._report(action, Status.PROCESSING)

    async def _tried(self, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack) -> None:
        """Run the page; again after a transient error, as long as nothing was touched."""
        limits = self._node.config.limits
        ticker = self._spawn(self._tick(action))
        try:
            for left in reversed(range(limits.attempts)):
                try:
                    preflight.expired(command.expires_at, time.time())
                    return await self._run_page(command, action, slot)
                except Transient as e:
                    if not left or action.entry.record.phase not in _UNTOUCHED:
                        raise
                    _log.info("will try again", action=command.action_id, code=e.code, error=str(e), delay=limits.retry_delay)
                await self._unless_cancelled(action, asyncio.sleep(limits.retry_delay))
                action.meter = Meter()
        finally:
            ticker.cancel()

    async def _run_page(self, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack) -> None:
        attempt = Attempt(action.entry, action.meter, action.cancel, functools.partial(self._report, action))
        if isinstance(command, CheckpointCommand):
            page = self._spawn_page(checkpoint, command, attempt)
            if command.overrides.asynchronous:
                waiting = asyncio.ensure_future(action.slot_free.wait())
                await asyncio.wait([page, waiting], return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                if not page.done():  # else it may have to be tried again, and needs its slot
                    await slot.aclose()
            await page
        else:
            await self._spawn_page(restore, command, attempt)

    def _spawn_page(self, page: Callable[[Node, T, Attempt], None], command: T, attempt: Attempt) -> asyncio.Task[None]:
        return asyncio.ensure_future(self._in_thread(page, self._node, command, attempt))

    async def _unless_cancelled(self, action: _Running, work: Coroutine[object, object, object]) -> None:
        """Wait for it, or raise Cancelled as soon as somebody asks for that."""
        waiting = asyncio.ensure_future(work)

        def wake() -> None:
            self._loop.call_soon_threadsafe(waiting.cancel)

        try:
            with action.cancel.waking(wake):
                await waiting
        except asyncio.CancelledError:
            action.cancel.check()
            raise
        finally:
            waiting.cancel()

    async def _tick(self, action: _Running) -> None:
        while True:
            await asyncio.sleep(self._node.config.limits.progress_interval)
            progress = action.meter.progress(action.entry.action_id)
            self._tell(progress)
            if self._bus is not None and self._bus.connected:
                with contextlib.suppress(BusUnavailable):
                    await self._bus.publish_progress(progress.action_id, wire.encode_progress(progress))

    # --- events ---------------------------------------------------------------------------------------------------------------

    def _report(self, action: _Running, status: Status) -> None:
        """A status was reached. Any thread; durable when it returns."""
        action.reached = status
        profile = action.meter.profile() if status != Status.PROCESSING else None
        self._emit(action.entry, Outcome(status, code="ok" if status == Status.READY else "", profile=profile))
        if status == Status.CHECKPOINT_CREATED:
            self._loop.call_soon_threadsafe(action.slot_free.set)

    def _end(self, entry: Entry, outcome: Outcome) -> None:
        """Told, and over; but where a workload may need a person the entry stays open, and the next start tries to recover it."""
        self._emit(entry, outcome)
        entry.update(phase=entry.record.phase if outcome.code == Stuck.code else "done", ended_at=time.time())

    async def _end_surely(self, entry: Entry, outcome: Outcome) -> None:
        """An outcome that is not on disk is not acknowledged: a full disk is waited for."""
        while True:
            try:
                return self._end(entry, outcome)
            except ValueError:  # it cannot be written in JSON at all
                _log.exception("defect: an outcome that cannot be encoded", action=entry.action_id)
                outcome = Outcome.of(Internal("how it ended cannot be written down; the daemon's log has it"))
                continue
            except OSError as e:
                _log.error("cannot write down how it ended", action=entry.action_id, status=outcome.status.value, error=str(e))
                if self._stopping:
                    return None  # it stays open: the next start finds it
            await asyncio.sleep(self._node.config.limits.retry_delay)

    def _emit(self, entry: Entry, outcome: Outcome) -> None:
        record = entry.record

        def make(seq: int) -> Event | None:
            if _RANK[outcome.status] <= _RANK[entry.record.status]:
                return None  # forward only, and one terminal event
            return Event(
                action_id=record.action_id,
                seq=seq,
                type=record.type,
                status=outcome.status,
                checkpoint_id=record.checkpoint_id,
                node=self._node.config.node,
                time=time.time(),
                code=outcome.code,
                message=outcome.message,
                hint=outcome.hint,
                details=dict(outcome.details),
                retry=outcome.retry,
                profile=outcome.profile,
            )

        if (event := entry.emit(make)) is not None:
            if self._bus is None:
                entry.update(published=event.seq)
            self._loop.call_soon_threadsafe(self._outbox_filled.set)
            self._loop.call_soon_threadsafe(self._tell, event)

    def _tell(self, update: Event | Progress) -> None:
        self._observe(update)
        if isinstance(update, Event):
            _log.info(
                "status", action=update.action_id, type=update.type, status=update.status.value, code=update.code,
                message=update.message, seconds=round(update.profile.total_duration / 1e9, 3) if update.profile else None,
                bytes=update.profile.raw_bytes if update.profile else None,
            )  # fmt: skip
        for queue in self._watchers:
            if isinstance(update, Event) or queue.qsize() < _WATCHER_QUEUE:
                queue.put_nowait(update)

    async def _publish_outbox(self, bus: NodeBus) -> None:
        while True:
            self._outbox_filled.clear()
            try:
                await self._publish_waiting(bus)
                await self._outbox_filled.wait()
            except (HibernodeError, OSError) as e:
                _log.warning("events wait", waiting=len(self._outbox), error=str(e))
                await asyncio.sleep(1)

    async def _publish_waiting(self, bus: NodeBus) -> None:
        for entry, event in self._outbox.waiting():
            await bus.publish_event(event.action_id, wire.message_id(event), wire.encode_event(event))
            self._outbox.sent(entry, event)

    async def _flush_outbox(self, deadline: float) -> None:
        if self._bus is not None and self._bus.connected:
            with contextlib.suppress(BusUnavailable, OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._publish_waiting(self._bus), deadline)

    async def _publish_node(self, bus: NodeBus) -> None:
        while True:
            with contextlib.suppress(BusUnavailable):
                await bus.put_node(wire.encode_node(self._record()))
            await asyncio.sleep(self._node.config.limits.node_interval)

    def _record(self) -> NodeRecord:
        node, facts, load = self._node, self._node.host.facts(), self._node.host.load()
        return NodeRecord(
            node=node.config.node,
            cluster=node.config.cluster,
            version=__version__,
            arch=facts.arch,
            kernel=facts.kernel,
            criu=str(node.criu.facts()),
            store=node.open_store("").location,
            cpus=load.cpus,
            memory_total=load.memory_total,
            memory_available=load.memory_available,
            load=load.load,
            actions=len(self._running),
            time=time.time(),
            arena_bytes=node.arena.total_bytes,
        )

    async def _reap_forever(self) -> None:
        while True:
            self._reap()
            await asyncio.sleep(1)

    def _reap(self) -> None:
        try:
            self._node.jobs.reap()
        except (HibernodeError, OSError) as e:
            _log.error("could not write down how a job ended", error=str(e))

    # --- what people ask (rpc.Desk) ---------------------------------------------------------------------------------------------

    async def submit(self, command: ActionCommand) -> None:
        """Begin an action; one whose id is known is not begun again."""
        if self._stopping:
            raise Refused("stopping", "the daemon is stopping", prop="state", found="stopping", wanted="running")
        self._accept(command)

    async def watch(self, action_id: str) -> AsyncIterator[Event | Progress]:
        """Updates: of one action (its last event first, until its terminal one), or of all without end."""
        queue: asyncio.Queue[Event | Progress] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            entry = self._node.journal.find(action_id) if action_id else None
            if action_id and entry is None:
                raise NotFound(f"no action {action_id} on this node", hint="`hibernode status` lists them")
            seen = 0
            if entry is not None and entry.record.last is not None:
                seen = entry.record.last.seq
                yield entry.record.last
                if entry.record.last.status.terminal:
                    return
            while True:
                update = await queue.get()
                if (action_id and update.action_id != action_id) or (
                    isinstance(update, Event) and update.seq <= seen and action_id
                ):
                    continue
                yield update
                if action_id and isinstance(update, Event) and update.status.terminal:
                    return
        finally:
            self._watchers.discard(queue)

    async def cancel(self, action_id: str) -> bool:
        action = self._running.get(action_id)
        if action is not None:
            action.cancel.set("cancelled by command")
        return action is not None

    async def action(self, action_id: str) -> ActionView:
        entry = self._node.journal.find(action_id)
        if entry is None:
            raise NotFound(f"no action {action_id} on this node", hint="`hibernode status` lists them")
        return _view(entry)

    async def actions(self) -> list[ActionView]:
        return [_view(entry) for entry in self._node.journal.all()]

    async def workloads(self, target: Target | None) -> list[WorkloadView]:
        return await self._in_thread(self._node.jobs.views, target)

    async def run_job(self, spec: JobSpec) -> WorkloadView:
        return await self._in_thread(self._node.jobs.run, spec)

    async def stop_job(self, namespace: str, name: str, signal: str) -> WorkloadView:
        return await self._in_thread(self._node.jobs.stop, namespace, name, signal)

    async def inspect(self, checkpoint_id: str) -> tuple[Manifest, str]:
        store = self._node.open_store("")
        return await self._in_thread(catalog.read, store, checkpoint_id), f"{store.location}/{checkpoint_id}"

    async def verify(self, checkpoint_id: str) -> AsyncIterator[Verdict]:
        queue: asyncio.Queue[Verdict] = asyncio.Queue()
        cancel, store = Cancel(), self._node.open_store("")

        def tell(verdict: Verdict) -> None:
            self._loop.call_soon_threadsafe(queue.put_nowait, verdict)

        work = asyncio.ensure_future(
            self._in_thread(catalog.verify, store, checkpoint_id, self._node.host.load().cpus, cancel, tell)
        )
        try:
            while not work.done():
                getting = asyncio.ensure_future(queue.get())
                await asyncio.wait([work, getting], return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    yield getting.result()
                getting.cancel()
            yield work.result()
        finally:
            cancel.set("nobody waits for it any more")
            await asyncio.wait([work])

    async def checkpoints(self) -> list[Manifest]:
        return await self._in_thread(lambda: list(catalog.manifests(self._node.open_store(""))))

    async def delete(self, checkpoint_id: str) -> None:
        """Remove it; Busy while an action writes it or reads it."""
        with self._node.claims.claim(f"checkpoint {checkpoint_id}", f"delete {uuid.uuid4()}"):
            await self._in_thread(catalog.delete, self._node.open_store(""), checkpoint_id)

    async def doctor(self) -> list[Check]:
        connected = self._bus.connected if self._bus is not None else None
        return await self._in_thread(functools.partial(doctor.checks, self._node, bus_connected=connected))

    async def nodes(self) -> list[NodeRecord]:
        if self._bus is None or not self._bus.connected:
            return [self._record()]
        return [wire.decode_node(data) for data in (await self._bus.nodes()).values()]

    @property
    def running(self) -> int:
        return len(self._running)


_RANK = {Status.INITIALIZED: 0, Status.PROCESSING: 1, Status.CHECKPOINT_CREATED: 2, Status.READY: 3, Status.ERROR: 3}


def _view(entry: Entry) -> ActionView:
    record = entry.record
    return ActionView(
        action_id=record.action_id,
        checkpoint_id=record.checkpoint_id,
        type=record.type,
        status=record.status,
        phase=record.phase,
        target=record.target,
        began_at=record.began_at,
        ended_at=record.ended_at,
        last=record.last,
    )
