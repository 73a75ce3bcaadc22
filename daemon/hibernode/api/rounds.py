"""What a server looks at again and again: which nodes are there, and which actions nobody is to be waited for any more.

Every server makes these rounds; what one does twice, or two do at once, comes to the same.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from hibernode.api import actions
from hibernode.api.control import Control
from hibernode.api.db import Database
from hibernode.config import Config
from hibernode.errors import HibernodeError
from hibernode.loop import in_thread

INTERVAL = 5.0  # seconds between two rounds; a node's record lives for three of its own intervals, 30 s by default
FRESH = 3 * INTERVAL  # seconds for which a record is taken for how its node is
_log = structlog.get_logger("hibernode.api")


class Rounds:
    """One server's. `clock` gives seconds since the epoch."""

    def __init__(
        self,
        settings: Config,
        database: Database,
        control: Control,
        more: Sequence[Callable[[], Awaitable[None]]] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`more`: what else each round does."""
        self._settings, self._database, self._control, self._clock = settings, database, control, clock
        self._works = (self._see_nodes, self._end_overdue, *more)
        self._stream_since = 0.0  # since when the event stream has answered; 0: it does not
        self._idle_since: dict[
            str, float
        ] = {}  # of open actions: since when their node has been seen, each time with nothing to do

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.once()
            await asyncio.sleep(INTERVAL)

    async def once(self) -> None:
        """What fails is said, and tried in the next round; it does not keep the rest from being done."""
        for work in self._works:
            try:
                await work()
            except HibernodeError as e:
                _log.warning("a round was cut short", work=work.__qualname__, code=e.code, error=e.message)
            except Exception:  # noqa: BLE001 - a defect in one work must not end all rounds
                _log.exception("defect", work=work.__qualname__)

    @property
    def heard_since(self) -> float:
        """Since when the event stream has answered without a break; 0: it does not."""
        return self._stream_since

    async def _see_nodes(self) -> None:
        try:
            records = await self._control.nodes()
        except HibernodeError:
            self._stream_since = 0.0
            raise
        now = self._clock()
        self._stream_since = self._stream_since or now
        seen = {name: record.model_dump() for name, record in records.items()}
        await in_thread(self._database.see, self._settings.cluster, seen, now)

    async def _end_overdue(self) -> None:
        """Who could not hear cannot say that somebody was silent: the time counts from when the stream answered."""
        if not self._stream_since:
            return
        now, silent_after = self._clock(), self._settings.api.silent_after
        seen = await in_thread(self._database.nodes, self._settings.cluster)
        late = await in_thread(self._database.overdue, now - silent_after, now - actions.LATE)
        idle = {name for name, (at, record) in seen.items() if now - at < FRESH and not record.get("actions", 1)}
        self._idle_since = {a.action_id: self._idle_since.get(a.action_id, now) for a in late if a.node in idle}
        for action in late:
            seen_at = max(seen.get(action.node, (0.0, {}))[0], self._stream_since)
            idle_for = now - self._idle_since.get(action.action_id, now)
            rule = functools.partial(actions.overdue, node_seen_at=seen_at, now=now, silent_after=silent_after, idle_for=idle_for)
            if rule(action) != action:
                moved = await in_thread(self._database.move, action.action_id, rule)
                if moved is not None and moved.provisional:
                    _log.warning("nobody is waited for any more", action=moved.action_id, node=moved.node, code=moved.code)
