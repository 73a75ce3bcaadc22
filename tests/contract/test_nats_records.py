"""The records of more nodes than are read at once, on a real server, while they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client

from hibernode.config import Bus
from hibernode.drivers.nats import NODES, RECORDS, RECORDS_AT_ONCE, NatsControl
from hibernode.errors import BusUnavailable
from tests.nats_server import NatsServer

pytestmark = pytest.mark.timeout(60)

LIMIT = 20.0
NAMES = [f"n{n}" for n in range(2 * RECORDS_AT_ONCE + 200)]


@asynccontextmanager
async def bus(directory: Path) -> AsyncIterator[tuple[NatsServer, NatsControl, Client]]:
    """A broker, an end of the control plane, and somebody who writes the records of all nodes."""
    with NatsServer(directory) as server:
        control = NatsControl(Bus(url=server.url), "c")
        await asyncio.wait_for(control.start(), LIMIT)
        writer = await nats.connect(server.url)
        try:
            await control.admit("n0")
            yield server, control, writer
        finally:
            await writer.close()
            await control.stop()


async def write(writer: Client, value: bytes) -> None:
    for name in NAMES:
        await writer.publish(f"{RECORDS}.c.{name}", value)
    await writer.publish(f"{RECORDS}.another.stranger", value)
    await writer.jetstream().publish(f"{RECORDS}.c.{NAMES[-1]}", value)  # answered when the stream has all before it


async def test_all_of_them_and_nothing_is_left_at_the_broker(tmp_path: Path) -> None:
    async with bus(tmp_path) as (_, control, writer):
        await write(writer, b"1")
        assert await control.nodes() == dict.fromkeys(NAMES, b"1")
        await writer.jetstream().publish(f"{RECORDS}.c.n7", b"", headers={"KV-Operation": "DEL"})
        assert await control.nodes("n7") == {}
        assert set(NAMES) - set(await control.nodes()) == {"n7"}
        assert (await writer.jetstream().stream_info(NODES)).state.consumer_count == 0


async def test_each_as_it_was_or_as_it_became(tmp_path: Path) -> None:
    """A record that is written anew while they are read moves to the end of the stream: it is there once, and never missing."""
    async with bus(tmp_path) as (_, control, writer):
        await write(writer, b"0")
        for turn in range(1, 6):
            writing = asyncio.ensure_future(write(writer, b"%d" % turn))
            found = await asyncio.wait_for(control.nodes(), LIMIT)
            assert set(found) == set(NAMES)
            assert set(found.values()) <= {b"%d" % (turn - 1), b"%d" % turn}
            await writing


async def test_a_broker_that_stops_meanwhile_is_no_empty_cluster(tmp_path: Path) -> None:
    """Who is taken for dead has his pods restored elsewhere."""
    async with bus(tmp_path) as (server, control, writer):
        await write(writer, b"1")
        server.stop(kill=True)
        for node in ("", "n7"):
            with pytest.raises(BusUnavailable):
                await control.nodes(node)
