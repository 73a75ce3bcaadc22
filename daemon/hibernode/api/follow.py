"""The event stream into the database. Any number of servers share one place in it: each event comes to one of them, is kept, and only then
acknowledged; one that dies in between leaves it to the others. What comes twice changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from hibernode import wire
from hibernode.api.db import Database, Unkeepable
from hibernode.bus import Batch, ControlBus
from hibernode.errors import BadCommand, BusUnavailable, DatabaseUnavailable
from hibernode.loop import end, in_thread
from hibernode.model import Event, Progress

DURABLE = "api"  # the name of that place
BATCH = 1000  # events of one transaction, which has a cost of its own: `benchmarks/run events`
AGAIN = 0.5  # seconds until a database that did not answer is asked again
NAME_LIMIT = 253  # characters of what an index holds, which has its own
_PROGRESS = 10_000  # actions whose progress is remembered
_log = structlog.get_logger("hibernode.api")


async def follow(bus: ControlBus, database: Database, cluster: str, observe: Callable[[Sequence[Event]], None]) -> None:
    """For ever. `observe` is told of what was kept. One batch is read while the one before it is kept: the database has its own work."""
    keeping: asyncio.Task[None] | None = None
    try:
        async for batch in bus.follow_batches(DURABLE, limit=BATCH):
            events = await in_thread(_read, batch.events)
            if keeping is not None:
                await keeping
            keeping = asyncio.create_task(_keep(batch, events, database, cluster, observe))
    finally:
        if keeping is not None:
            await end({keeping})


async def _keep(
    batch: Batch, events: Sequence[Event], database: Database, cluster: str, observe: Callable[[Sequence[Event]], None]
) -> None:
    """Into the database, however long that is away; meanwhile the broker may give the batch to another server."""
    while True:
        try:
            await in_thread(_apply, database, events, cluster)
            break
        except DatabaseUnavailable as e:
            _log.warning("events wait", waiting=len(events), error=e.message)
            await asyncio.sleep(AGAIN)
    observe(events)
    try:
        await batch.done()
    except BusUnavailable as e:  # they come again, and change nothing
        _log.warning("could not acknowledge events", error=e.message)


def _apply(database: Database, events: Sequence[Event], cluster: str) -> None:
    """One that no database of ours can hold is said, and dropped: it must not hold up all that come after it."""
    try:
        database.apply(events, cluster, time.time())
    except Unkeepable as e:
        if len(events) == 1:
            _log.error("an event cannot be kept", action=events[0].action_id, seq=events[0].seq, error=str(e))
            return
        half = len(events) // 2
        _apply(database, events[:half], cluster)
        _apply(database, events[half:], cluster)


def _read(batch: Sequence[bytes]) -> list[Event]:
    return [event for data in batch if (event := _one(data)) is not None]


def _one(data: bytes) -> Event | None:
    try:
        event = wire.decode_event(data)
        for name in ("node", "checkpoint_id"):
            if len(getattr(event, name)) > NAME_LIMIT:
                raise BadCommand(f"{name} is too long", property=name, found=len(getattr(event, name)), wanted=NAME_LIMIT)
        return _without_nul(event) if b"\\u0000" in data else event
    except BadCommand as e:  # nobody can ever keep it: not to hold up all that come after it
        _log.error("an event cannot be read", size=len(data), error=str(e))
        return None


def _without_nul(event: Event) -> Event:
    """JSON can hold it, PostgreSQL's texts cannot."""
    texts = {name: getattr(event, name) for name in ("node", "checkpoint_id", "code", "message", "hint")}
    update: dict[str, object] = {name: text.replace("\0", "\ufffd") for name, text in texts.items()}
    if "location" in event.details:  # it becomes one
        update["details"] = {**event.details, "location": str(event.details["location"]).replace("\0", "\ufffd")}
    return event.model_copy(update=update)


class Progresses:
    """How far the running actions are, by this server's own ear; lossy as progress is."""

    def __init__(self) -> None:
        self._last: dict[str, Progress] = {}

    def get(self, action_id: str) -> Progress | None:
        return self._last.get(action_id)

    async def follow(self, bus: ControlBus) -> None:
        async for data in bus.follow_progress(""):
            try:
                progress = wire.decode_progress(data)
            except BadCommand as e:
                _log.warning("a progress cannot be read", error=str(e))
                continue
            self._last.pop(progress.action_id, None)
            self._last[progress.action_id] = progress
            while len(self._last) > _PROGRESS:
                del self._last[next(iter(self._last))]

    def forget(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.status.terminal:
                self._last.pop(event.action_id, None)
