"""The bench's end of the event stream: a broker of its own that it may stop, commands out, every event in."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import nats

from hibernode import wire
from hibernode.config import Bus as Settings
from hibernode.drivers.nats import COMMANDS, EVENTS, NatsControl
from hibernode.errors import BusUnavailable
from hibernode.model import CancelCommand, CheckpointCommand, Event, RestoreCommand
from tests.nats_server import NatsServer

T = TypeVar("T")
CLUSTER = "matrix"
CALL = 30.0  # seconds

Command = CheckpointCommand | RestoreCommand | CancelCommand


class Bus:
    """A real broker, and a loop in a thread of its own that follows all events. Everything else is called from the bench's thread."""

    def __init__(self, directory: Path, node: str) -> None:
        self._node = node
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

    def close(self) -> None:
        self._following.cancel()
        with contextlib.suppress(Exception):  # best effort: it ends with the process
            self._do(self._control.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
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

    async def _publish(self, verb: str, data: bytes) -> None:
        client = await nats.connect(self.url, allow_reconnect=False)
        await client.jetstream().publish(f"hibernode.cmd.{CLUSTER}.{self._node}.{verb}", data)
        await client.close()

    async def _count_commands(self) -> int:
        client = await nats.connect(self.url, allow_reconnect=False)
        info = await client.jetstream().stream_info(COMMANDS)
        await client.close()
        return int(info.state.messages)

    async def _read_all(self) -> list[Event]:
        client = await nats.connect(self.url, allow_reconnect=False)
        stream = client.jetstream()
        state = (await stream.stream_info(EVENTS)).state
        messages = [await stream.get_msg(EVENTS, seq) for seq in range(state.first_seq, state.last_seq + 1)]
        await client.close()
        return [wire.decode_event(message.data or b"") for message in messages]
