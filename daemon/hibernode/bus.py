"""The event stream, as both ends see it. Bytes in and out; `wire.py` knows what they mean. asyncio, one loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol


class Delivery(Protocol):
    """One command, delivered at least once. Exactly one of done, later, drop ends this delivery; until then `working` keeps it."""

    @property
    def verb(self) -> str:
        """checkpoint, restore, cancel or delete."""

    @property
    def data(self) -> bytes: ...

    @property
    def attempt(self) -> int:
        """1 for the first delivery."""

    async def done(self) -> None:
        """Never again. Raises BusUnavailable if the broker did not confirm it (then it may come again)."""

    async def later(self, delay: float) -> None:
        """Again, after `delay` seconds."""

    async def drop(self) -> None:
        """Never again, and nobody could read it."""

    async def working(self) -> None:
        """Still at it: do not give it to anybody else."""


class Batch(Protocol):
    """Events, delivered at least once. Those of a batch that is not done come again, to anybody, after `ack_wait`."""

    @property
    def events(self) -> Sequence[bytes]:
        """At least one, in the order of the stream, none twice."""

    @property
    def nodes(self) -> Sequence[str]:
        """Of each of them, who sent it: the broker knows, whatever is in it."""

    async def done(self) -> None:
        """Never again, all of them. Raises BusUnavailable if the broker did not confirm it (then some may come again)."""


class NodeBus(Protocol):
    """The node's side. All calls may raise BusUnavailable. It reconnects by itself for ever; `connected` says how it is now."""

    @property
    def connected(self) -> bool: ...

    async def start(self) -> None:
        """Connect (waiting for the broker is fine), make streams and the consumer if they are not there and it may."""

    def commands(self) -> AsyncIterator[Delivery]:
        """Commands for this node, for ever, those sent while it was down first. Ends after `stop`."""

    async def publish_event(self, action_id: str, message_id: str, data: bytes, *, after: int | None = None) -> int:
        """Returns when the stream has stored it: its place there. The same message id twice within the window is stored once.

        `after` is the place of the action's event before it, 0 if it is the first: then it is stored once however late it comes
        again, and the place is the one that it has already. A stream that was made anew stores it after what there is."""

    async def publish_progress(self, action_id: str, data: bytes) -> None:
        """Best effort: lost when nobody listens or the broker is away."""

    async def put_node(self, data: bytes) -> None:
        """The node's record, with a time to live."""

    async def answer_find(self, answer: Callable[[bytes], Awaitable[bytes | None]]) -> None:
        """From now on, answer find requests of this cluster; None = not here, stay silent."""

    async def nodes(self, node: str = "") -> dict[str, bytes]:
        """All node records of the cluster; or the one of `node`, if there is one."""

    async def stop(self) -> None:
        """Take no more commands, flush, disconnect. Harmless when repeated."""


class ControlBus(Protocol):
    """The control plane's side (REST API, demo, tests). It reconnects as a node does."""

    @property
    def connected(self) -> bool: ...

    async def start(self) -> None: ...

    async def admit(self, node: str) -> None:
        """Make what a node needs that may make nothing itself. Harmless when repeated. Before its first start."""

    async def send(self, node: str, verb: str, action_id: str, data: bytes) -> None:
        """File a command; returns when the stream has stored it. The same action id and verb twice is stored once."""

    def follow(self, action_id: str = "") -> AsyncIterator[bytes]:
        """Events in order, from the beginning: of one action, or of all."""

    def follow_batches(self, durable: str, *, limit: int = 500) -> AsyncIterator[Batch]:
        """All events of the cluster, each to one of those who follow under the name `durable`, from where they are together.

        A batch has what is there, `limit` events at most; none is held back for the next. What was not done before comes again among
        newer events, so that batches may overlap and go back; one whose place the broker has lost begins at the beginning."""

    def follow_progress(self, action_id: str) -> AsyncIterator[bytes]:
        """From now on: of one action, or of all (""). Lossy."""

    async def find(self, data: bytes, timeout: float, *, enough: int = 0) -> list[bytes]:
        """Ask all nodes of the cluster; the answers that came within `timeout` seconds, or until there were `enough` (0: never)."""

    async def nodes(self, node: str = "") -> dict[str, bytes]: ...

    async def stop(self) -> None: ...
