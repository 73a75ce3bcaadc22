"""The event stream into the database. Any number of servers share one place in it: each event comes to one of them, is kept, and only then
acknowledged; one that dies in between leaves it to the others. What comes twice changes nothing."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import structlog

from hibernode import wire
from hibernode.api.writer import Letter, Writer, Written
from hibernode.bus import Batch, ControlBus
from hibernode.errors import BadCommand, BusUnavailable, DatabaseUnavailable
from hibernode.loop import end, in_thread
from hibernode.model import Progress

DURABLE = "api"  # the name of that place
BATCH = 1000  # events of one transaction, which has a cost of its own: `benchmarks/run events`
AT_ONCE = 2  # batches that are being kept, or wait for their turn
AGAIN = 0.5  # seconds until a database that did not answer is asked again
_PROGRESS = 10_000  # actions whose progress is remembered
_log = structlog.get_logger("hibernode.api")


async def follow(bus: ControlBus, writers: Sequence[Writer], observe: Callable[[Written], None]) -> None:
    """For ever. `observe` is told of what was kept. While some are kept the next are read."""
    lanes = [_Lane(writer) for writer in writers]
    keeping = set[asyncio.Task[None]]()
    try:
        async for batch in bus.follow_batches(DURABLE, limit=BATCH):
            while len(keeping) >= AT_ONCE:
                kept, keeping = await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
                for each in kept:
                    each.result()
            keeping.add(asyncio.create_task(_keep(batch, lanes, observe)))
    finally:
        await end(keeping)
        for writer in writers:
            await in_thread(writer.close)


async def _keep(batch: Batch, lanes: Sequence[_Lane], observe: Callable[[Written], None]) -> None:
    """A node's events all have one lane, and an action's are its node's: so no lane waits for what another holds."""
    by_lane = defaultdict[int, list[Letter]](list)
    for node, data in zip(batch.nodes, batch.events, strict=True):
        by_lane[hash(node) % len(lanes)].append((node, data))
    for kept in await asyncio.gather(*(lanes[number].keep(some) for number, some in by_lane.items())):
        for facts in kept.dropped:
            _log.error("an event is dropped", **facts)
        observe(kept)
    try:
        await batch.done()
    except BusUnavailable as e:  # they come again, and change nothing
        _log.warning("could not acknowledge events", error=e.message)


class _Lane:
    """A way into the database: what is put on it is kept in that order, one after the other."""

    def __init__(self, writer: Writer) -> None:
        self._writer, self._turn = writer, asyncio.Lock()

    async def keep(self, letters: Sequence[Letter]) -> Written:
        """However long the database is away; meanwhile the broker may give the batch to another server."""
        async with self._turn:
            while True:
                try:
                    return await in_thread(self._writer.write, letters)
                except DatabaseUnavailable as e:
                    _log.warning("events wait", waiting=len(letters), error=e.message)
                    await asyncio.sleep(AGAIN)


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

    def forget(self, actions: Iterable[str]) -> None:
        for action_id in actions:
            self._last.pop(action_id, None)
