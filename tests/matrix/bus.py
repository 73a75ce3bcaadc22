"""The bench's end of the event stream: a broker of its own that it may stop, commands out, every event in."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nats
from nats.aio.client import Client

from hibernode import wire
from hibernode.config import Bus as Settings
from hibernode.drivers.nats import COMMANDS, EVENTS, NatsControl
from hibernode.errors import BusUnavailable
from hibernode.model import CancelCommand, CheckpointCommand, Event, RestoreCommand
from tests.keeper import wait_until
from tests.nats_server import NatsServer

T = TypeVar("T")
CLUSTER = "matrix"
CALL = 30.0  # seconds

Command = CheckpointCommand | RestoreCommand | CancelCommand


class Bus:
    """A real broker, and a loop in a thread of its own that follows all events. Everything else is called from the bench's thread."""

    def __init__(self, directory: Path, node: str) -> None:
        self._node, self._directory = node, directory
        self.server = NatsServer(directory)
        self.server.start()
        self._events: dict[str, list[Event]] = defaultdict(list)
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bus", daemon=True)
        self._thread.start()
        self._control = self._do(self._connect())
        self._following = asyncio.run_coroutine_threadsafe(self._follow(), self._loop)

    @property
    def url(self) -> str:
        return self.server.url

    def revive(self) -> None:
        """It runs, whatever was done to it."""
        self.server.resume()
        self.server.stop()
        self.server.start()

    def send(self, command: Command) -> None:
        """File it; waits for the broker if it is away."""
        deadline = time.monotonic() + CALL
        while True:
            with contextlib.suppress(BusUnavailable):
                verb = wire.verb_of(command)
                return self._do(self._control.send(self._node, verb, command.action_id, wire.encode_command(command)))
            if time.monotonic() > deadline:
                raise TimeoutError("the broker does not take a command")
            time.sleep(0.05)

    def send_again(self, command: Command) -> None:
        """The same command under another message id: to the broker a new one."""
        self._do(self._publish(wire.verb_of(command), wire.encode_command(command)))

    def events(self, action_id: str) -> list[Event]:
        with self._changed:
            return list(self._events[action_id])

    def stream(self) -> list[Event]:
        """Everything the broker has stored, from its beginning."""
        return self._do(self._read_all())

    def unanswered(self) -> int:
        """Commands that nobody has acknowledged."""
        return self._do(self._count_commands())

    # --- what an administrator, or an accident, does to it ---

    def take_and_forget(self) -> None:
        """Be the daemon for a moment: take the next command, and die with it."""
        self._do(self._take())

    def give_out_again(self) -> None:
        """The command given out last, which nobody has answered yet, comes again at once."""
        self._do(self._refuse_last())

    def delete_streams(self, *names: str) -> None:
        self._do(self._delete(names))

    def delete_consumer(self) -> None:
        """The daemon's."""
        self._do(self._delete((), consumer=True))

    def has(self, *names: str) -> bool:
        """All these streams."""
        return set(names) <= self._do(self._streams())

    def forget_ids(self) -> None:
        """An hour later: it knows the id of no event any more. It reads them when it starts, as many as it has to know."""
        window = 0.1
        self._do(self._keep_ids(window))
        self.server.stop()
        over = time.monotonic() + window
        wait_until(lambda: time.monotonic() > over, CALL, "an hour")
        self.server.start()

    def nodes(self) -> list[str]:
        return sorted(self._do(self._control.nodes()))

    def forget(self) -> None:
        """Stopped, it loses its disk."""
        shutil.rmtree(self._directory / "jetstream")

    def close(self) -> None:
        self._following.cancel()
        with contextlib.suppress(Exception):  # best effort: it ends with the process
            self._do(self._control.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        if not self._thread.is_alive():
            self._loop.close()
        self.server.resume()
        self.server.stop()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL)

    async def _connect(self) -> NatsControl:
        control = NatsControl(Settings(url=self.url), CLUSTER)
        await control.start()
        return control

    async def _follow(self) -> None:
        async for data in self._control.follow():
            event = wire.decode_event(data)
            with self._changed:
                self._events[event.action_id].append(event)
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[Client]:
        """A connection of its own, that knows nothing of our driver."""
        client = await nats.connect(self.url, allow_reconnect=False)
        try:
            yield client
        finally:
            await client.close()

    async def _publish(self, verb: str, data: bytes) -> None:
        async with self._client() as client:
            await client.jetstream().publish(f"hibernode.cmd.{CLUSTER}.{self._node}.{verb}", data)

    async def _count_commands(self) -> int:
        async with self._client() as client:
            return int((await client.jetstream().stream_info(COMMANDS)).state.messages)

    async def _read_all(self) -> list[Event]:
        async with self._client() as client:
            stream = client.jetstream()
            state = (await stream.stream_info(EVENTS)).state
            messages = [await stream.get_msg(EVENTS, seq) for seq in range(max(1, state.first_seq), state.last_seq + 1)]
        return [wire.decode_event(message.data or b"") for message in messages]

    async def _take(self) -> None:
        async with self._client() as client:
            await (await client.jetstream().pull_subscribe_bind(self._consumer, COMMANDS)).fetch(1, timeout=CALL)

    async def _refuse_last(self) -> None:
        async with self._client() as client:
            last = (await client.jetstream().consumer_info(COMMANDS, self._consumer)).delivered
            assert last is not None
            place = f"1.{last.stream_seq}.{last.consumer_seq}.1.0"  # attempt, places, time, how many wait
            await client.request(f"$JS.ACK.{COMMANDS}.{self._consumer}.{place}", b"-NAK", timeout=CALL)

    async def _delete(self, streams: Sequence[str], *, consumer: bool = False) -> None:
        async with self._client() as client:
            for stream in streams:
                await client.jetstream().delete_stream(stream)
            if consumer:
                await client.jetstream().delete_consumer(COMMANDS, self._consumer)

    async def _keep_ids(self, seconds: float) -> None:
        async with self._client() as client:
            stream = client.jetstream()
            await stream.update_stream((await stream.stream_info(EVENTS)).config.evolve(duplicate_window=seconds))

    async def _streams(self) -> set[str]:
        async with self._client() as client:
            return {str(info.config.name) for info in await client.jetstream().streams_info()}

    @property
    def _consumer(self) -> str:
        return f"{CLUSTER}={self._node}"
