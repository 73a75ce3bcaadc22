"""Runs each command once, and tells how it goes. asyncio; the work itself runs in threads (`loop.in_thread`).

One action's life: journal it; wait for a slot of the node; run its page (`checkpoint.py`, `restore.py`) in a thread; where another action
has the workload, wait for its end (`limits.second`); on a transient error before anything was frozen, try again; keep the outcome in the
journal, its event in the outbox; only then is a delivery acked. An action id that is known is never run again: it is answered from the
journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import ParamSpec, TypeVar

import structlog

from hibernode import __version__, gc, preflight
from hibernode.checkpoint import checkpoint
from hibernode.errors import (
    GpuBusy,
    HibernodeError,
    Internal,
    NotFound,
    Refused,
    Stuck,
    Transient,
)
from hibernode.flow import trim
from hibernode.journal import Entry, Record, mark_of
from hibernode.loop import Tasks, in_thread
from hibernode.model import (
    ActionCommand,
    ActionView,
    Cancel,
    CheckpointCommand,
    Event,
    Meter,
    NodeRecord,
    Outcome,
    Progress,
    Status,
)
from hibernode.node import Attempt, Node, Taken, is_full, no_room
from hibernode.recovery import finish_kill, recover, to_be_killed
from hibernode.restore import restore

P = ParamSpec("P")
T = TypeVar("T")

# Asynchronous checkpoints that ship without a slot, for each slot. Each has buffers, uploads and a thread of its own: without a bound, a
# store that stands still would collect them until memory ends. Chosen, not measured: the arena is full before so many large ones are.
BEHIND = 4
_UNTOUCHED = ("starting", "preflight", "fetching")  # phases in which trying again is harmless
_FORESTALLED = 1000  # cancels without a command that are remembered; the oldest are forgotten first
_WATCHER_QUEUE = 1000  # updates a slow watcher may lag behind before it loses progress (never events)
_BREATH, _LONGEST = 0.05, 60.0  # seconds between two tries of what is tried without end
_KILLS = 4  # workloads at a time that are to be killed at last
_log = structlog.get_logger("hibernode")


class _Running:
    """One action at work."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.cancel, self.meter = entry, Cancel(), Meter()
        self.slot_free = asyncio.Event()  # the next action may start
        self.reached = Status.INITIALIZED  # in truth, also where the disk would not take it
        self.task: asyncio.Task[None] | None = None


class Dispatcher:
    """Where every command comes to, from the bus (`courier.py`) and from gRPC (`desk.py`). Lives on one event loop."""

    def __init__(self, node: Node, observe: Callable[[Event | Progress], None] = lambda _: None) -> None:
        self._node, self._observe = node, observe
        self._running: dict[str, _Running] = {}
        self._slots = asyncio.Semaphore(node.config.limits.actions)
        self._behind = asyncio.Semaphore(BEHIND * node.config.limits.actions)
        self._forestalled: dict[str, None] = {}  # actions that were cancelled before they came
        self._watchers: set[asyncio.Queue[Event | Progress]] = set()
        self._tasks = Tasks()
        self._posted: Callable[[], None] | None = None
        self._progressed: Callable[[Progress], Awaitable[None]] | None = None
        self._changed: Callable[[], None] = lambda: None
        self.stopping = False
        self._hurry = asyncio.Event()  # stopping, and nothing is waited for any more
        self._loop = asyncio.get_running_loop()

    # --- life ---------------------------------------------------------------------------------------------------------------

    def posts_to(
        self, posted: Callable[[], None], progressed: Callable[[Progress], Awaitable[None]], changed: Callable[[], None]
    ) -> None:
        """There is a bus: `posted` is called when an event lies in the outbox, `progressed` with every progress, `changed` when an action
        or a child of the daemon has ended."""
        self._posted, self._progressed, self._changed = posted, progressed, changed

    async def start(self) -> None:
        """Recover what a crash left; before the first command is taken."""
        open_entries = [
            (entry, entry.record) for entry in self._node.journal.all() if not entry.settled and not entry.record.done
        ]
        await asyncio.gather(*(self._recover(entry) for entry, _ in open_entries))  # a store that hangs holds up its own only
        for _, record in open_entries:  # when every workload is free: a store may be slow
            await in_thread(gc.tidy, self._node, record)
        self._tasks.spawn(self._reap_forever())
        self._tasks.spawn(self._finish_kills())

    async def _recover(self, entry: Entry) -> None:
        try:
            self.end(entry, await in_thread(recover, self._node, entry))
        except Exception:  # noqa: BLE001 - one that cannot be recovered must not keep the others frozen; it stays open
            _log.exception("could not recover", action=entry.action_id)

    async def _finish_kills(self) -> None:
        """Whoever stands still for good, because he could not be killed, is not left to the next start. Some at a time: each may wait for
        an API server in a thread; and ever more seldom, for as long as it takes."""
        first = max(_BREATH, self._node.config.limits.retry_delay)
        pause = first
        while True:
            await asyncio.sleep(pause)
            left = [entry for entry in self._node.journal.all() if self._is_left(entry)]
            pause = min(2 * pause, _LONGEST) if left else first
            for at in range(0, len(left), _KILLS):
                await asyncio.gather(*(self._finish_kill(entry) for entry in left[at : at + _KILLS]))

    def _is_left(self, entry: Entry) -> bool:
        return not entry.settled and entry.action_id not in self._running and to_be_killed(entry.record)

    async def _finish_kill(self, entry: Entry) -> None:
        try:
            await in_thread(finish_kill, self._node, entry.record)
            entry.update(phase="done", ended_at=time.time())
        except (HibernodeError, OSError) as e:
            _log.warning("a workload stands still, and cannot be killed yet", action=entry.action_id, error=str(e))
        except Exception:  # noqa: BLE001 - of ours: the others stand still no longer for it
            _log.exception("defect", action=entry.action_id)
        else:
            _log.info("nobody of its workload is left", action=entry.action_id)

    async def stop(self, grace: float = 30.0) -> None:
        """Take nothing new, give running actions `grace` seconds, then cancel them; returns when all have ended and been told."""
        self.stopping = True
        running = [action.task for action in self._running.values() if action.task]
        if running:
            _log.info("draining", actions=len(running), grace=grace)
            await asyncio.wait(running, timeout=grace)
        self.cancel_all("the daemon is stopping")
        await asyncio.gather(*running, return_exceptions=True)
        await self._tasks.cancel()
        self._reap()  # who ended until now; the next daemon is not their parent and cannot see it

    def cancel_all(self, reason: str) -> None:
        """The daemon stops, and its patience is over."""
        self._hurry.set()
        for action in self._running.values():
            self._tasks.spawn(in_thread(action.cancel.set, reason))

    # --- actions --------------------------------------------------------------------------------------------------------------

    def accept(self, command: ActionCommand, about: Mapping[str, str] | None = None) -> asyncio.Task[None] | None:
        """Begin an action, unless its id is known. The task that ends with it; None: it has ended before. `about`: as `Record` has it."""
        if self._node.journal.find(command.action_id) is None:
            action = _Running(self._node.journal.begin(command, about))
            if command.action_id in self._forestalled:
                del self._forestalled[command.action_id]
                action.cancel.set("cancelled by a command that came before it")
            self._running[command.action_id] = action
            action.task = self._tasks.spawn(self._act(command, action))
        running = self._running.get(command.action_id)
        return running.task if running else None

    async def _act(self, command: ActionCommand, action: _Running) -> None:
        try:
            async with contextlib.AsyncExitStack() as slot:
                outcome = await self._outcome(command, action, slot)
            await self._end_surely(action.entry, outcome)
        finally:
            del self._running[command.action_id]
            self._changed()

    async def _outcome(self, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack) -> Outcome:
        """How it ended. Whatever happens, there is an answer."""
        try:
            await self._wait_for_slot(command, action, slot)
            await self._tried(command, action, slot)
        except HibernodeError as e:
            if action.reached != Status.READY:
                return Outcome.of(_stuck_in(e) or e, action.meter.profile())
            _log.error("after it was ready", action=command.action_id, code=e.code, error=str(e))  # nobody else hears of it
            return Outcome(Status.READY, profile=action.meter.profile(), unfinished=isinstance(_stuck_in(e) or e, Stuck))
        except Exception as e:  # noqa: BLE001 - the last line: a defect of ours must not take the daemon with it
            if isinstance(e, OSError) and is_full(e) and action.reached != Status.READY:  # of the journal: the page minds its own
                return Outcome.of(no_room(e), action.meter.profile())
            _log.exception("defect", action=command.action_id)
            if action.reached != Status.READY:
                internal = Internal("an internal error; the daemon's log has it")
                return Outcome.of(_stuck_in(e) or internal, action.meter.profile())
        return Outcome(Status.READY, profile=action.meter.profile())

    async def _wait_for_slot(self, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack) -> None:
        async with _in_time(command):
            await self._unless_cancelled(action, _take(self._slots, slot))
        self._report(action, Status.PROCESSING)

    async def _tried(self, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack) -> None:
        """Run the page; again after a transient error, as long as nothing was touched, or no more than GPUs that had too much to do: they
        are unlocked again. Waiting for another action is no attempt."""
        limits = self._node.config.limits
        ticker, left = self._tasks.spawn(self._tick(action)), limits.attempts
        try:
            while True:
                try:
                    preflight.expired(command.expires_at, time.time())
                    return await self._run_page(command, action, slot)
                except Taken as e:
                    if limits.second == "refuse":
                        raise
                    await self._wait_for_other(e, command, action, slot)
                except Transient as e:
                    left -= 1
                    if not left or not (action.entry.record.phase in _UNTOUCHED or isinstance(e, GpuBusy)):
                        raise
                    _log.info("will try again", action=command.action_id, code=e.code, error=str(e), delay=limits.retry_delay)
                    await self._unless_cancelled(action, asyncio.sleep(limits.retry_delay))
                action.meter = Meter()
        finally:
            ticker.cancel()

    async def _wait_for_other(
        self, taken: Taken, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack
    ) -> None:
        """Until nobody has what it wants. Without its slot: else those who wait for one workload would keep all others out."""
        _log.info("waits for another action", action=command.action_id, why=taken.message)
        action.entry.enter("starting")
        await slot.aclose()
        free = asyncio.Event()

        def wake() -> None:
            self._loop.call_soon_threadsafe(free.set)

        self._node.claims.when_free(taken.key, wake)
        async with _in_time(command):
            await self._unless_cancelled(action, free.wait())
        await self._wait_for_slot(command, action, slot)

    async def _run_page(self, command: ActionCommand, action: _Running, slot: contextlib.AsyncExitStack) -> None:
        attempt = Attempt(action.entry, action.meter, action.cancel, functools.partial(self._report, action))
        if isinstance(command, CheckpointCommand):
            page = self._spawn_page(checkpoint, command, attempt)
            if command.overrides.asynchronous:
                stepping_back = asyncio.ensure_future(self._step_back(action, slot))
                await asyncio.wait([page, stepping_back], return_when=asyncio.FIRST_COMPLETED)
                stepping_back.cancel()
            await page
        else:
            await self._spawn_page(restore, command, attempt)

    async def _step_back(self, action: _Running, slot: contextlib.AsyncExitStack) -> None:
        """Nothing of it will be tried again, and it need not keep others waiting: its slot for a place among those who ship behind. As
        long as there is none it keeps the slot."""
        await action.slot_free.wait()
        async with contextlib.AsyncExitStack() as place:
            await _take(self._behind, place)
            await slot.aclose()
            slot.push_async_exit(place.pop_all())

    def _spawn_page(self, page: Callable[[Node, T, Attempt], None], command: T, attempt: Attempt) -> asyncio.Task[None]:
        return asyncio.ensure_future(in_thread(_run, page, self._node, command, attempt))

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
            if self._progressed is not None:
                await self._progressed(progress)

    # --- events ---------------------------------------------------------------------------------------------------------------

    def _report(self, action: _Running, status: Status, pod_spec: str = "") -> None:
        """A status was reached. Any thread; durable when it returns, but that it is `ready` need not be: where the disk is full the
        rest is done all the same, and `_end_surely` says it."""
        action.reached = status
        profile = action.meter.profile() if status != Status.PROCESSING else None
        try:
            code = "ok" if status == Status.READY else ""
            self._emit(action.entry, Outcome(status, code=code, profile=profile, pod_spec=pod_spec))
        except OSError as e:
            if status != Status.READY:
                raise
            _log.error("cannot write down that it is ready", action=action.entry.action_id, error=str(e))
        if status == Status.CHECKPOINT_CREATED:
            self._loop.call_soon_threadsafe(action.slot_free.set)

    def end(self, entry: Entry, outcome: Outcome) -> None:
        """Told, and over; but where a workload may stand still the entry stays open: for `_finish_kills`, or for the next start."""
        self._emit(entry, outcome)
        mark_of(self._node.config.work_dir, entry.action_id).unlink(missing_ok=True)  # `ready` is on disk
        stays = outcome.unfinished or outcome.code == Stuck.code
        entry.update(phase=entry.record.phase if stays else "done", ended_at=time.time())

    async def _end_surely(self, entry: Entry, outcome: Outcome) -> None:
        """An outcome that is not on disk is not acknowledged: a full disk is waited for, and tried a last time when the daemon may wait no
        longer, because the next one would take a restored tree that runs for one that is half done."""
        while True:
            last = self._hurry.is_set()
            try:
                return self.end(entry, outcome)
            except ValueError:  # it cannot be written in JSON at all
                _log.exception("defect: an outcome that cannot be encoded", action=entry.action_id)
                outcome = Outcome.of(Internal("how it ended cannot be written down; the daemon's log has it"))
                continue
            except OSError as e:
                _log.error("cannot write down how it ended", action=entry.action_id, status=outcome.status.value, error=str(e))
                if last:
                    return None  # it stays open: the next start finds it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._node.config.limits.retry_delay):
                    await self._hurry.wait()

    def _emit(self, entry: Entry, outcome: Outcome) -> None:
        record = entry.record
        details = {
            **outcome.details,
            **({"about": record.about} if record.about else {}),
            **self._whereabouts(record, outcome.status),
        }

        def make(seq: int) -> Event | None:
            if outcome.status.rank <= entry.record.status.rank:
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
                details=details,
                retry=outcome.retry,
                profile=outcome.profile,
                pod_spec=outcome.pod_spec,
            )

        if (event := entry.emit(make)) is not None:
            if self._posted is None:
                entry.update(published=event.seq)
            else:
                self._loop.call_soon_threadsafe(self._posted)
            self._loop.call_soon_threadsafe(self._tell, event)

    def _whereabouts(self, record: Record, status: Status) -> dict[str, object]:
        """Of a checkpoint that is ready: the address of its objects. Addresses of stores have no secrets in them."""
        if (record.type, status) != ("checkpoint", Status.READY):
            return {}
        try:
            return {"location": f"{self._node.open_store(record.location).location}/{record.checkpoint_id}"}
        except HibernodeError as e:  # it is ready all the same
            _log.warning("cannot say where it is", action=record.action_id, error=str(e))
            return {}

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

    async def _reap_forever(self) -> None:
        while True:
            self._reap()
            await asyncio.sleep(1)

    def _reap(self) -> None:
        try:
            if self._node.jobs.reap():
                self._changed()
        except (HibernodeError, OSError) as e:
            _log.error("could not write down how a job ended", error=str(e))

    # --- what the courier and the desk ask ---------------------------------------------------------------------------------------------

    async def submit(self, command: ActionCommand, about: Mapping[str, str] | None = None) -> None:
        """Begin an action; one whose id is known is not begun again. NoRoom if it cannot be written down: then it is not begun."""
        if self.stopping:
            raise Refused("stopping", "the daemon is stopping", prop="state", found="stopping", wanted="running")
        try:
            self.accept(command, about)
        except OSError as e:
            if is_full(e):
                raise no_room(e) from e
            raise

    async def watch(self, action_id: str) -> AsyncIterator[Event | Progress]:
        """Updates: of one action (its last event first, until its terminal one), or of all without end."""
        queue: asyncio.Queue[Event | Progress] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            entry = self._node.journal.find(action_id) if action_id else None
            if action_id and entry is None:
                raise NotFound(f"no action {action_id} on this node", hint="`hibernode status` lists them")
            last = entry.record.last if entry is not None else None  # read once: the next may be written while this one is sent
            if last is not None:
                yield last
                if last.status.terminal:
                    return
            seen = last.seq if last is not None else 0
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
        """Ask a running action to stop; False if there is none: it has ended, or nobody knows it."""
        action = self._running.get(action_id)
        if action is not None:
            # In a thread: a workload that is held is let go on at once, and what it has on GPUs takes its time.
            await asyncio.wait({self._tasks.spawn(in_thread(action.cancel.set, "cancelled by command"))}, timeout=1)
        return action is not None

    def forestall(self, action_id: str) -> None:
        """A cancel has overtaken its command, as a broker that gives it out again may let it: it ends as cancelled when it comes."""
        if self._node.journal.find(action_id) is None:
            self._forestalled[action_id] = None
            while len(self._forestalled) > _FORESTALLED:
                del self._forestalled[next(iter(self._forestalled))]

    async def action(self, action_id: str) -> ActionView:
        entry = self._node.journal.find(action_id)
        if entry is None:
            raise NotFound(f"no action {action_id} on this node", hint="`hibernode status` lists them")
        return _view(entry)

    async def actions(self) -> list[ActionView]:
        return [_view(entry) for entry in self._node.journal.all()]

    async def record(self) -> NodeRecord:
        """What this node tells the others about itself, but for what runs there."""
        gpus = await in_thread(self._node.inventory.gpus)  # a driver may take its time
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
            gpu_inventory=gpus,
            cpu_flags=facts.cpu_flags,
            makes_pods=node.workloads.makes_pods,
        )

    @property
    def running(self) -> int:
        return len(self._running)


@contextlib.asynccontextmanager
async def _in_time(command: ActionCommand) -> AsyncIterator[None]:
    """What is waited for inside is not waited for any longer than the command holds: Refused("expired")."""
    expires_at = command.expires_at
    try:
        async with asyncio.timeout(max(0.0, expires_at - time.time()) if expires_at else None):
            yield
    except TimeoutError:
        preflight.expired(expires_at, max(time.time(), math.nextafter(expires_at, math.inf)))  # this clock may be a little behind


async def _take(places: asyncio.Semaphore, held: contextlib.AsyncExitStack) -> None:
    """One of the places, held from the moment it is taken: who waits for this call may be told to stop in the very turn of the loop in
    which it ends, and would not know that there is something to give back."""
    await places.acquire()
    held.callback(places.release)


def _run(page: Callable[[Node, T, Attempt], None], node: Node, command: T, attempt: Attempt) -> None:
    try:
        page(node, command, attempt)
    finally:
        trim()  # now: what the page had is let go, and nobody has been told yet that it is over


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


def _stuck_in(error: BaseException) -> Stuck | None:
    """What says that somebody may stand still, if that was raised before this error: an undo that failed later must not hide it, for its
    entry stays open. What another Stuck says in its own words (`raise ... from`: nobody stands still for a manifest) is not meant."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, Stuck) and seen.code == Stuck.code:
            return seen
        told = seen.__cause__ if isinstance(seen, Stuck) and isinstance(seen.__cause__, Stuck) else seen
        seen = told.__context__
    return None
