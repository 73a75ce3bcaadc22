"""What the NATS driver does when the server is away, dies, hangs, or will not have us. Real servers only."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import nats
import pytest
from nats.aio.msg import Msg
from nats.js.api import RetentionPolicy, StreamConfig

from hibernode.bus import ControlBus, NodeBus
from hibernode.config import Bus
from hibernode.drivers.nats import COMMANDS, EVENTS, MOST_NODES, NatsControl, NatsNode
from hibernode.errors import BusUnavailable, Refused
from tests.nats_server import NatsServer

T = TypeVar("T")

LIMIT = 20.0  # seconds until a test gives up on something that should have come


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(tmp_path / "nats") as running:
        yield running


@asynccontextmanager
async def ends(url: str) -> AsyncIterator[tuple[NatsNode, NatsControl]]:
    node, control = NatsNode(Bus(url=url, ack_wait=10.0), "c", "n"), NatsControl(Bus(url=url), "c")
    try:
        await asyncio.wait_for(asyncio.gather(node.start(), control.start()), LIMIT)
        yield node, control
    finally:
        await node.stop()
        await control.stop()


def new_id() -> str:
    return str(uuid.uuid4())


async def take(iterator: AsyncIterator[T]) -> T:
    return await asyncio.wait_for(anext(iterator), LIMIT)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT):
        while not await condition():  # noqa: ASYNC110 - the condition asks a broker
            await asyncio.sleep(0.02)


async def connection(end: NatsNode | NatsControl, *, is_there: bool) -> None:
    async def as_wanted() -> bool:
        return end.connected == is_there

    await until(as_wanted)


@pytest.mark.parametrize("kill", [False, True])
async def test_a_broker_that_is_away_for_a_while(server: NatsServer, kill: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with ends(server.url) as (node, control):
        action = new_id()
        commands, events, batches = node.commands(), control.follow(), control.follow_batches("api")
        await control.send("n", "checkpoint", action, b"before")
        await node.publish_event(action, f"{action}.1", b"1")
        held = await take(commands)
        assert await take(events) == b"1"
        batch = await take(batches)
        assert batch.events == [b"1"]
        waiting = asyncio.create_task(take(commands))
        following, next_batch = asyncio.create_task(take(events)), asyncio.create_task(take(batches))

        await asyncio.to_thread(server.stop, kill=kill)
        await connection(node, is_there=False)
        await connection(control, is_there=False)
        for call in (
            node.publish_event(action, f"{action}.2", b"never stored"),
            node.put_node(b""),
            held.done(),
            held.working(),
            batch.done(),
            control.send("n", "checkpoint", new_id(), b"never stored"),
            control.find(b"", 1.0),
        ):
            with pytest.raises(BusUnavailable):
                await asyncio.wait_for(call, 6)
        await node.publish_progress(action, b"lost, and nobody minds")
        assert not any(task.done() for task in (waiting, following, next_batch))

        await asyncio.to_thread(server.start)
        await connection(node, is_there=True)
        await connection(control, is_there=True)
        await held.done()  # on another connection than it came by
        await batch.done()
        await node.publish_event(action, f"{action}.2", b"2")
        await control.send("n", "checkpoint", new_id(), b"after")
        after = await asyncio.wait_for(waiting, LIMIT)
        if after.data == b"before":  # a server that was down counts that time, and gave it out again before it was done
            assert after.attempt == 2
            after = await take(commands)
        assert after.data == b"after"
        assert await asyncio.wait_for(following, LIMIT) == b"2"
        assert (await asyncio.wait_for(next_batch, LIMIT)).events[-1] == b"2"  # with 1 before it, if that came again
        assert [await take(control.follow(action)), node.connected] == [b"1", True]
    lines = [record for record in caplog.records if record.name == "hibernode.bus"]
    assert len([r for r in lines if r.getMessage().startswith("lost the broker")]) == 2  # two ends, one line each
    assert len([r for r in lines if r.getMessage().startswith("connected")]) == 4
    assert len(lines) <= 10
    assert not any(record.exc_info for record in caplog.records)


async def test_a_broker_that_comes_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = NatsServer(tmp_path / "nats")
    node = NatsNode(Bus(url=server.url), "c", "n")
    starting = asyncio.create_task(node.start())
    with pytest.raises(BusUnavailable):
        await node.publish_event(new_id(), "1", b"")

    async def tried() -> bool:
        return any("cannot use the broker" in record.getMessage() for record in caplog.records)

    await until(tried)
    assert not starting.done()
    assert not node.connected
    await asyncio.to_thread(server.start)
    try:
        await asyncio.wait_for(starting, LIMIT)
        assert node.connected
    finally:
        await node.stop()
        await asyncio.to_thread(server.stop)


async def test_waiting_for_the_broker_can_be_ended() -> None:
    node = NatsNode(Bus(url="nats://127.0.0.1:9"), "c", "n")
    starting = asyncio.create_task(node.start())
    await asyncio.wait([starting], timeout=0.1)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(starting, LIMIT)

    node = NatsNode(Bus(url="nats://127.0.0.1:9"), "c", "n")
    starting = asyncio.create_task(node.start())
    await asyncio.wait([starting], timeout=0.1)
    await node.stop()
    with pytest.raises(BusUnavailable, match="stopped"):
        await asyncio.wait_for(starting, LIMIT)


async def test_a_broker_that_hangs_fails_calls_in_time_and_is_noticed(server: NatsServer) -> None:
    async with ends(server.url) as (node, control):
        server.pause()
        try:
            clock = asyncio.get_running_loop().time
            began = clock()
            with pytest.raises(BusUnavailable):
                await node.publish_event(new_id(), "1", b"")
            assert clock() - began < 10, "it has a limit of 5"
            await connection(node, is_there=False)
            with pytest.raises(BusUnavailable):
                await asyncio.wait_for(node.publish_event(new_id(), "1", b""), 1)
        finally:
            server.resume()
        await connection(node, is_there=True)
        await connection(control, is_there=True)
        await node.publish_event(new_id(), "2", b"2")
        assert await take(control.follow()) in (b"", b"2")


async def test_stop_does_not_wait_for_a_broker_that_hangs(server: NatsServer) -> None:
    async with ends(server.url) as (node, _):
        reader = asyncio.create_task(take(node.commands()))
        await asyncio.wait([reader], timeout=0.1)
        server.pause()
        try:
            await asyncio.wait_for(node.stop(), 5)
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(reader, 5)
        finally:
            server.resume()


async def test_stop_does_not_wait_until_a_broker_that_hangs_takes_what_is_left(server: NatsServer) -> None:
    async with ends(server.url) as (node, _):

        async def flood() -> None:
            while node.connected:
                await node.publish_progress(new_id(), bytes(256 << 10))

        server.pause()
        flooding = asyncio.create_task(flood())
        try:
            await asyncio.wait([flooding], timeout=1.0)  # it stands: every buffer on the way is full
            await asyncio.wait_for(node.stop(), 5)
        finally:
            flooding.cancel()
            server.resume()


async def test_a_consumer_that_somebody_deleted_is_made_anew(server: NatsServer) -> None:
    async with ends(server.url) as (node, control):
        waiting = asyncio.create_task(take(node.commands()))
        await asyncio.wait([waiting], timeout=0.2)
        admin = await nats.connect(server.url)
        await admin.jetstream().delete_consumer(COMMANDS, "c=n")
        await admin.close()
        await control.send("n", "checkpoint", new_id(), b"x")
        assert (await asyncio.wait_for(waiting, 5)).data == b"x"


async def test_a_place_that_somebody_deleted_is_made_anew_at_the_beginning(server: NatsServer) -> None:
    async with ends(server.url) as (node, control):
        batches = control.follow_batches("api")
        await node.publish_event(new_id(), "1", b"1")
        await (await take(batches)).done()
        waiting = asyncio.create_task(take(batches))
        await asyncio.wait([waiting], timeout=0.2)
        admin = await nats.connect(server.url)
        await admin.jetstream().delete_consumer(EVENTS, "c=api")
        await admin.close()
        assert (await asyncio.wait_for(waiting, 5)).events == [b"1"]


async def delete_streams(server: NatsServer) -> None:
    admin = await nats.connect(server.url)
    for stream in (COMMANDS, EVENTS):
        await admin.jetstream().delete_stream(stream)
    await admin.close()


async def test_readers_make_streams_anew_that_somebody_deleted(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    async with ends(server.url) as (node, control):
        commands, events = node.commands(), control.follow()
        await node.publish_event(new_id(), "1", b"1")
        await node.publish_event(new_id(), "2", b"2")
        assert [await take(events), await take(events)] == [b"1", b"2"]
        waiting, following = asyncio.create_task(take(commands)), asyncio.create_task(take(events))
        await asyncio.wait([waiting, following], timeout=0.2)
        await delete_streams(server)
        admin = await nats.connect(server.url)

        async def both_there() -> bool:
            return {COMMANDS, EVENTS} <= {info.config.name for info in await admin.jetstream().streams_info()}

        await until(both_there)
        await admin.close()
        await control.send("n", "checkpoint", new_id(), b"x")
        await node.publish_event(new_id(), "3", b"3")
        assert (await asyncio.wait_for(waiting, LIMIT)).data == b"x"
        assert await asyncio.wait_for(following, LIMIT) == b"3"
    assert len([r for r in caplog.records if r.name == "hibernode.bus"]) <= 10


async def test_writers_make_streams_anew_that_somebody_deleted(server: NatsServer) -> None:
    async with ends(server.url) as (node, control):
        writes: list[Callable[[], Awaitable[None]]] = [
            lambda: control.send("n", "checkpoint", new_id(), b"x"),
            lambda: node.publish_event(new_id(), new_id(), b"3"),
        ]
        for write in writes:
            await delete_streams(server)
            with pytest.raises(BusUnavailable):
                await write()
            await write()


async def test_a_stream_made_anew_takes_an_event_whose_place_was_in_the_old_one(server: NatsServer) -> None:
    async with ends(server.url) as (node, control):
        action = new_id()
        for other in range(3):
            place = await node.publish_event(action, f"{action}.{other}", b"old")
        await delete_streams(server)
        with pytest.raises(BusUnavailable):
            await node.publish_event(action, f"{action}.4", b"4", after=place)
        first = await node.publish_event(action, f"{action}.4", b"4", after=place)
        assert first < place
        assert await node.publish_event(action, f"{action}.5", b"5", after=first) > first
        events = control.follow(action)
        assert [await take(events), await take(events)] == [b"4", b"5"]


async def test_commands_outlive_the_server(server: NatsServer) -> None:
    async with ends(server.url) as (_, control):
        await control.send("n", "checkpoint", new_id(), b"x")
    await asyncio.to_thread(server.stop, kill=True)
    await asyncio.to_thread(server.start)
    async with ends(server.url) as (node, _):
        assert (await take(node.commands())).data == b"x"


async def test_many_ends_that_start_together_agree_on_the_streams(server: NatsServer) -> None:
    nodes = [NatsNode(Bus(url=server.url), "c", f"n{i}") for i in range(10)]
    controls = [NatsControl(Bus(url=server.url), "c") for _ in range(3)]
    every: list[NodeBus | ControlBus] = [*nodes, *controls]
    await asyncio.wait_for(asyncio.gather(*(end.start() for end in every)), LIMIT)
    await asyncio.gather(*(end.stop() for end in every))


async def test_an_existing_stream_is_brought_to_our_settings_and_keeps_its_own(server: NatsServer) -> None:
    admin = await nats.connect(server.url)
    stream = admin.jetstream()
    await stream.add_stream(StreamConfig(name=EVENTS, subjects=["hibernode.evt.>"], max_msgs=77, max_age=1000))
    async with ends(server.url):
        config = (await stream.stream_info(EVENTS)).config
        assert (config.max_age, config.max_msgs) == (Bus().events_max_age, 77)
    await admin.close()


async def test_more_nodes_than_a_server_gives_a_stream_by_itself(server: NatsServer) -> None:
    """1,000 consumers, since 2.15; a stream that an older one of us has made is told of more."""
    admin = await nats.connect(server.url)
    stream = admin.jetstream()
    await stream.add_stream(
        StreamConfig(name=COMMANDS, subjects=["hibernode.cmd.>"], retention=RetentionPolicy.WORK_QUEUE, duplicate_window=3600)
    )
    async with ends(server.url) as (_, control):
        for n in range(1001):
            await control.admit(f"n{n}")
        info = await stream.stream_info(COMMANDS)
        assert info.state.consumer_count > 1000
        assert info.config.max_consumers == MOST_NODES
    await stream.update_stream(info.config.evolve(max_consumers=5000))
    async with ends(server.url):
        assert (await stream.stream_info(COMMANDS)).config.max_consumers == 5000, "an operator's own number stays"
    await admin.close()


async def test_a_consumer_that_is_as_it_should_be_is_not_made_again(server: NatsServer) -> None:
    """With thousands of them the server takes long to make one; one with other settings is changed."""
    admin, made = await nats.connect(server.url), list[str]()

    async def count(message: Msg) -> None:
        made.append(json.loads(message.data)["config"]["name"])

    await admin.subscribe("$JS.API.CONSUMER.CREATE.>", cb=count)
    for ack_wait, times in ((1.0, 1), (1.0, 1), (2.0, 2)):
        node = NatsNode(Bus(url=server.url, ack_wait=ack_wait), "c", "n")
        await asyncio.wait_for(node.start(), LIMIT)
        await node.stop()
        await admin.flush()
        assert made == ["c=n"] * times
    assert (await admin.jetstream().consumer_info(COMMANDS, "c=n")).config.ack_wait == 2.0
    await admin.close()


async def test_an_existing_stream_that_cannot_be_ours_is_a_clear_error(server: NatsServer) -> None:
    admin = await nats.connect(server.url)
    await admin.jetstream().add_stream(
        StreamConfig(name=COMMANDS, subjects=["hibernode.cmd.>"], retention=RetentionPolicy.LIMITS)
    )
    await admin.close()
    with pytest.raises(Refused) as caught:
        await refused(NatsNode(Bus(url=server.url), "c", "n"))
    assert caught.value.code == "bus_stream"
    assert COMMANDS in caught.value.message
    assert "nats stream info" in caught.value.hint


async def test_replicas_that_one_server_cannot_give_are_a_clear_error(server: NatsServer) -> None:
    with pytest.raises(Refused) as caught:
        await refused(NatsNode(Bus(url=server.url, replicas=3), "c", "n"))
    assert caught.value.code == "bus_stream"


@pytest.mark.parametrize("url", ["", "nats://", "http://127.0.0.1:4222", "nats://host:port", "nats://a,ftp://b"])
async def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(Refused) as caught:
        await refused(NatsNode(Bus(url=url), "c", "n"))
    assert caught.value.code == "config"
    assert caught.value.details["property"] == "bus.url"


async def refused(node: NatsNode) -> None:
    try:
        await asyncio.wait_for(node.start(), LIMIT)
    finally:
        await node.stop()


# --- logins -----------------------------------------------------------------------------------------------------------

USERS = 'authorization { users: [{ user: "me", password: "s3cret:/@" }] }'


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(tmp_path / "nats", settings=USERS) as running:
        yield running


async def test_the_right_password_in_the_configuration_or_in_the_address(guarded: NatsServer) -> None:
    for config in (
        Bus.model_validate({"url": guarded.url, "user": "me", "password": "s3cret:/@"}),
        Bus(url=guarded.url.replace("//", "//me:s3cret%3A%2F%40@")),
    ):
        node = NatsNode(config, "c", "n")
        await asyncio.wait_for(node.start(), LIMIT)
        assert node.connected
        await node.stop()


@pytest.mark.parametrize("login", [{}, {"user": "me", "password": "wrong-one"}, {"user": "you", "password": "s3cret:/@"}])
async def test_a_wrong_login_is_a_clear_error(
    guarded: NatsServer, login: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Refused) as caught:
        await refused(NatsNode(Bus.model_validate({"url": guarded.url} | login), "c", "n"))
    assert caught.value.code == "bus_login"
    assert "bus.user" in caught.value.hint
    assert "wrong-one" not in f"{caught.value} {caught.value.details} {caplog.text}"


async def test_a_login_that_is_taken_away_is_tried_again_for_ever(tmp_path: Path) -> None:
    open_server = NatsServer(tmp_path / "nats")
    guarded = NatsServer(tmp_path / "nats", settings=USERS, port=open_server.port)
    with open_server:
        async with ends(open_server.url) as (node, _):
            await asyncio.to_thread(open_server.stop)
            await asyncio.to_thread(guarded.start)
            await connection(node, is_there=False)
            await asyncio.to_thread(guarded.stop)
            await asyncio.to_thread(open_server.start)
            await connection(node, is_there=True)


@pytest.mark.parametrize("text", [None, "", "nonsense\n"])
async def test_a_credentials_file_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "user.creds"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Refused) as caught:
        await refused(NatsNode(Bus(url="nats://127.0.0.1:9", credentials=str(path)), "c", "n"))
    assert caught.value.details["property"] == "bus.credentials"
