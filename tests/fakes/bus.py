"""A broker in memory: the same contract as NATS, faults at will. One loop.

`MemoryBus` is the broker; `node()` and `control()` give its two ends. Faults: `away` (every call fails, `connected` is
False, readers wait), `lose_acks` and `lose_sends` (so many confirmations of deliveries, of commands get lost),
`refuse_sends` (so many commands are not taken), `redeliver()` (everything that is out comes again).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from hibernode.bus import Batch, Delivery
from hibernode.errors import BadCommand, BusUnavailable

Answer = Callable[[bytes], Awaitable[bytes | None]]
FOR_EVER = float("inf")


class MemoryBus:
    """The broker. What its ends sent is there for tests: `events`, `progress`, `records`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, bytes, str]] = []  # cluster, action id, data, node
        self.progress: list[tuple[str, str, bytes, str]] = []
        self.lose_acks = self.lose_sends = self.refuse_sends = 0
        self.given_out = self.sent_back = 0  # deliveries; how many of them were answered with `later`
        self._away = False
        self._ids: set[str] = set()
        self._queues: dict[tuple[str, str], _Queue] = {}
        self._durables: dict[tuple[str, str], _Queue] = {}
        self._records: dict[tuple[str, str], tuple[bytes, float]] = {}
        self._answers: dict[MemoryNode, Answer] = {}
        self._changed = asyncio.Event()

    def node(self, cluster: str, node: str, *, ack_wait: float = 30.0, record_ttl: float = 30.0) -> MemoryNode:
        return MemoryNode(self, cluster, node, ack_wait, record_ttl)

    def control(self, cluster: str, *, ack_wait: float = 30.0) -> MemoryControl:
        return MemoryControl(self, cluster, ack_wait)

    @property
    def away(self) -> bool:
        return self._away

    @away.setter
    def away(self, away: bool) -> None:
        self._away = away
        self._notify()

    def redeliver(self) -> None:
        """Every command and event that is out, unanswered, is given out again."""
        for queue in (*self._queues.values(), *self._durables.values()):
            for item in queue.items:
                item.again_at = 0.0
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, limit: float = FOR_EVER) -> None:
        """Until something changed, or `limit` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(None if limit == FOR_EVER else max(0.0, limit)):
                await self._changed.wait()

    def _check(self) -> None:
        if self._away:
            raise BusUnavailable("the broker is away")

    def _once(self, message_id: str) -> bool:
        new = message_id not in self._ids
        self._ids.add(message_id)
        return new

    def _queue(self, cluster: str, node: str) -> _Queue:
        return self._queues.setdefault((cluster, node), _Queue())

    def _durable(self, cluster: str, name: str) -> _Queue:
        if (cluster, name) not in self._durables:
            self._durables[cluster, name] = _Queue([_Item(node, data) for c, _, data, node in self.events if c == cluster])
        return self._durables[cluster, name]

    def _store_event(self, cluster: str, action_id: str, data: bytes, node: str) -> None:
        self.events.append((cluster, action_id, data, node))
        for (of, _), queue in self._durables.items():
            if of == cluster:
                queue.items.append(_Item(node, data))
        self._notify()

    def _last_event(self, cluster: str, action_id: str) -> int:
        """Its place; 0 if there is none."""
        return max((at for at, (c, a, *_) in enumerate(self.events, 1) if (c, a) == (cluster, action_id)), default=0)

    def _nodes(self, cluster: str) -> dict[str, bytes]:
        self._check()
        now = _now()
        return {node: data for (c, node), (data, until) in self._records.items() if c == cluster and until > now}


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(eq=False)
class _Item:
    """A stored message: of a command its verb, of an event its node. `again_at`: when it may be given out; moved ahead while somebody has
    it."""

    word: str
    data: bytes
    attempt: int = 0
    again_at: float = 0.0


class _Queue:
    def __init__(self, items: list[_Item] | None = None) -> None:
        self.items = items or []

    def take(self, ack_wait: float, limit: int = 1) -> list[_Item]:
        """The next that may be given out: those that come again first."""
        ready = [item for item in self.items if item.again_at <= _now()]
        ready.sort(key=lambda item: item.attempt == 0)
        for item in ready[:limit]:
            item.attempt += 1
            item.again_at = _now() + ack_wait
        return ready[:limit]

    def due(self) -> float:
        """Seconds until one may be given out."""
        return min((item.again_at for item in self.items), default=FOR_EVER) - _now()


class _Delivery:
    def __init__(self, bus: MemoryBus, queue: _Queue, item: _Item, ack_wait: float) -> None:
        self._bus, self._queue, self._item, self._ack_wait = bus, queue, item, ack_wait
        self.verb, self.data, self.attempt = item.word, item.data, item.attempt

    async def done(self) -> None:
        self._bus._check()
        if self._bus.lose_acks > 0:
            self._bus.lose_acks -= 1
            raise BusUnavailable("the broker did not confirm it")
        await self.drop()

    async def later(self, delay: float) -> None:
        self._bus._check()
        self._bus.sent_back += 1
        self._item.again_at = _now() + delay
        self._bus._notify()

    async def drop(self) -> None:
        self._bus._check()
        if self._item in self._queue.items:
            self._queue.items.remove(self._item)

    async def working(self) -> None:
        self._bus._check()
        self._item.again_at = _now() + self._ack_wait


class _Batch:
    def __init__(self, end: _End, queue: _Queue, items: list[_Item]) -> None:
        self._end, self._queue, self._items = end, queue, set(items)
        in_order = [item for item in queue.items if item in self._items]
        self.events, self.nodes = [item.data for item in in_order], [item.word for item in in_order]

    async def done(self) -> None:
        self._end._check()
        if self._end._bus.lose_acks > 0:
            self._end._bus.lose_acks -= 1
            raise BusUnavailable("the broker did not confirm it")
        self._queue.items[:] = [item for item in self._queue.items if item not in self._items]


class _End:
    """What both ends share: a start that waits for the broker, a stop that ends every reader."""

    def __init__(self, bus: MemoryBus, cluster: str, ack_wait: float) -> None:
        self._bus, self._cluster, self._ack_wait = bus, cluster, ack_wait
        self._started = self._stopped = False

    @property
    def connected(self) -> bool:
        return self._started and not self._stopped and not self._bus.away

    async def start(self) -> None:
        while self._bus.away:
            await self._bus._wait()
        self._started = True
        self._bus._notify()

    async def stop(self) -> None:
        self._stopped = True
        self._bus._notify()

    async def nodes(self, node: str = "") -> dict[str, bytes]:
        self._check()
        found = self._bus._nodes(self._cluster)
        return {name: data for name, data in found.items() if node in ("", name)}

    def _check(self) -> None:
        if not self.connected:
            raise BusUnavailable("not connected to the broker")

    async def _taken(self, queue: _Queue, limit: int = 1) -> AsyncIterator[list[_Item]]:
        while not self._stopped:
            if not self.connected:
                await self._bus._wait()
            elif items := queue.take(self._ack_wait, limit):
                self._bus.given_out += len(items)
                yield items
            else:
                await self._bus._wait(queue.due())

    async def _read(self, log: Sequence[tuple[str, str, bytes, str]], action_id: str, place: int) -> AsyncIterator[bytes]:
        while not self._stopped:
            if self.connected and place < len(log):
                cluster, action, data, _ = log[place]
                place += 1
                if cluster == self._cluster and action_id in ("", action):
                    yield data
            else:
                await self._bus._wait()


class MemoryNode(_End):
    def __init__(self, bus: MemoryBus, cluster: str, node: str, ack_wait: float, record_ttl: float) -> None:
        super().__init__(bus, cluster, ack_wait)
        self._node, self._record_ttl = node, record_ttl

    async def commands(self) -> AsyncIterator[Delivery]:
        queue = self._bus._queue(self._cluster, self._node)
        async for items in self._taken(queue):
            for item in items:
                yield _Delivery(self._bus, queue, item, self._ack_wait)

    async def publish_event(self, action_id: str, message_id: str, data: bytes, *, after: int | None = None) -> int:
        self._check()
        last = self._bus._last_event(self._cluster, _token(action_id, "action_id"))
        if self._bus._once(f"event {message_id}") and (after is None or last <= after):
            self._bus._store_event(self._cluster, action_id, data, self._node)
        return self._bus._last_event(self._cluster, action_id)

    async def publish_progress(self, action_id: str, data: bytes) -> None:
        if self.connected:
            self._bus.progress.append((self._cluster, _token(action_id, "action_id"), data, self._node))
            self._bus._notify()

    async def put_node(self, data: bytes) -> None:
        self._check()
        self._bus._records[self._cluster, self._node] = (data, _now() + self._record_ttl)

    async def answer_find(self, answer: Answer) -> None:
        self._bus._answers[self] = answer


class MemoryControl(_End):
    async def admit(self, node: str) -> None:
        self._check()
        self._bus._queue(self._cluster, _token(node, "node"))

    async def send(self, node: str, verb: str, action_id: str, data: bytes) -> None:
        self._check()
        if verb not in ("checkpoint", "restore", "cancel", "delete"):
            raise BadCommand(f"there is no command {verb!r}", property="verb", found=verb, wanted="checkpoint, ...")
        queue = self._bus._queue(self._cluster, _token(node, "node"))
        if self._bus.refuse_sends > 0:
            self._bus.refuse_sends -= 1
            raise BusUnavailable("the broker did not take it")
        if self._bus._once(f"command {_token(action_id, 'action_id')}.{verb}"):
            queue.items.append(_Item(verb, data))
            self._bus._notify()
        if self._bus.lose_sends > 0:
            self._bus.lose_sends -= 1
            raise BusUnavailable("the broker did not confirm it")

    def follow(self, action_id: str = "") -> AsyncIterator[bytes]:
        return self._read(self._bus.events, action_id, 0)

    def follow_batches(self, durable: str, *, limit: int = 500) -> AsyncIterator[Batch]:
        return self._follow_batches(_token(durable, "durable"), limit)

    async def _follow_batches(self, durable: str, limit: int) -> AsyncIterator[Batch]:
        queue = self._bus._durable(self._cluster, durable)
        async for items in self._taken(queue, limit):
            yield _Batch(self, queue, items)

    def follow_progress(self, action_id: str) -> AsyncIterator[bytes]:
        return self._read(self._bus.progress, action_id, len(self._bus.progress))

    async def find(self, data: bytes, timeout: float, *, enough: int = 0) -> list[bytes]:
        self._check()
        answers, ends = list[bytes](), _now() + timeout

        async def ask(answer: Answer) -> None:
            if (found := await answer(data)) is not None:
                answers.append(found)

        asked = {asyncio.create_task(ask(each)) for end, each in self._bus._answers.items() if self._hears(end)}
        while asked and (left := ends - _now()) > 0 and not 0 < enough <= len(answers):
            _, asked = await asyncio.wait(asked, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        for late in asked:
            late.cancel()
        return answers

    def _hears(self, end: MemoryNode) -> bool:
        return end.connected and end._cluster == self._cluster


def _token(text: str, what: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text):
        raise BadCommand(f"{what} is not one token of a subject: {text!r}", property=what, found=text, wanted="a token")
    return text
