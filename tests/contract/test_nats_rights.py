"""The logins of `examples/nats-users.conf`, on a real server: a node works with them from end to end, and all else is refused."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import nats
import pytest
from nats.aio.client import Client
from nats.errors import TimeoutError as NoAnswer

from hibernode.config import Bus
from hibernode.drivers.nats import COMMANDS, EVENTS, NODES, NatsControl, NatsNode
from hibernode.errors import BusUnavailable
from tests.nats_server import NatsServer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nats-users.conf"
CLUSTER = "default"
LIMIT = 20.0
SILENCE = 0.3  # seconds within which an answer would have come


@dataclass
class Bench:
    """A broker with the example's logins, the control plane, and the node n1; both on our driver."""

    server: NatsServer
    passwords: dict[str, str]
    control: NatsControl
    node: NatsNode

    def end(self, name: str) -> NatsNode:
        return NatsNode(self._login(name), CLUSTER, name)

    def _login(self, user: str) -> Bus:
        return login(self.server, user, self.passwords[user])

    @asynccontextmanager
    async def stranger(self, user: str = "n1") -> AsyncIterator[tuple[Client, list[str]]]:
        """n1's login in the hands of somebody else, and what the server has refused him."""
        refused: list[str] = []

        async def note(error: Exception) -> None:
            refused.append(str(error).lower())

        client = await nats.connect(
            self.server.url, user=user, password=self.passwords[user], inbox_prefix=f"_INBOX.{CLUSTER}.{user}",
            error_cb=note, allow_reconnect=False,
        )  # fmt: skip
        try:
            yield client, refused
        finally:
            await client.close()

    async def waiting(self, node: str) -> list[bytes]:
        """What the stream has for a node."""
        client = await nats.connect(self.server.url, user="control", password=self.passwords["control"])
        try:
            stream = client.jetstream()
            state = (await stream.stream_info(COMMANDS, subjects_filter=f"hibernode.cmd.{CLUSTER}.{node}.>")).state
            return [subject.encode() for subject in state.subjects or {}]
        finally:
            await client.close()


def login(server: NatsServer, user: str, password: str) -> Bus:
    return Bus.model_validate(
        {"url": server.url, "user": user, "password": password, "ack_wait": 1.0, "make_streams": user == "control"}
    )


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    passwords = {user: f"p-{uuid.uuid4()}" for user in ("control", "n1", "n2")}
    for user, password in passwords.items():
        monkeypatch.setenv(f"HIBERNODE_{user.upper()}_PASSWORD", password)
    with NatsServer(tmp_path / "nats", settings=including(tmp_path / "nats")) as server:
        control = NatsControl(login(server, "control", passwords["control"]), CLUSTER)
        node = NatsNode(login(server, "n1", passwords["n1"]), CLUSTER, "n1")
        try:
            await asyncio.wait_for(control.start(), LIMIT)
            for name in ("n1", "n2"):
                await control.admit(name)
            await asyncio.wait_for(node.start(), LIMIT)
            yield Bench(server, passwords, control, node)
        finally:
            await node.stop()
            await control.stop()


def including(directory: Path) -> str:
    """The example, in a configuration of this directory: the server takes no absolute path."""
    return f'include "{os.path.relpath(EXAMPLE, directory)}"'


def new_id() -> str:
    return str(uuid.uuid4())


async def says_no(refused: list[str], to: str, what: str) -> None:
    """The server does, to this."""
    try:
        async with asyncio.timeout(LIMIT):
            while not any(f"permissions violation for {to.lower()}" in line for line in refused):  # noqa: ASYNC110 - a callback's
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} was not refused") from None


# --- what it may ------------------------------------------------------------------------------------------------------


async def test_a_node_works_with_these_rights(bench: Bench) -> None:
    """With our driver: a command taken, kept and answered; events, progress, record; found by who asks all nodes."""
    node, control, action = bench.node, bench.control, new_id()
    await control.send("n2", "checkpoint", new_id(), b"not yours")
    await control.send("n1", "checkpoint", action, b"first")
    commands = node.commands()
    delivery = await asyncio.wait_for(anext(commands), LIMIT)
    assert (delivery.verb, delivery.data, delivery.attempt) == ("checkpoint", b"first", 1)
    await delivery.working()
    await delivery.later(0)
    again = await asyncio.wait_for(anext(commands), LIMIT)
    assert (again.data, again.attempt) == (b"first", 2)
    await again.done()
    assert not await bench.waiting("n1")
    assert await bench.waiting("n2")

    for _ in range(2):
        await node.publish_event(action, f"{action}.1", b"event")
    assert await asyncio.wait_for(anext(control.follow(action)), LIMIT) == b"event"

    heard = asyncio.create_task(anext(control.follow_progress(action)))
    while not heard.done():
        await node.publish_progress(action, b"progress")
        await asyncio.wait([heard], timeout=0.05)
    assert await heard == b"progress"

    await node.put_node(b"record")
    assert await control.nodes() == {"n1": b"record"}

    async def here(question: bytes) -> bytes:
        return question + b": here"

    await node.answer_find(here)
    while not (found := await control.find(b"where", 0.5)):
        pass  # the server has not heard yet that somebody answers
    assert found == [b"where: here"]
    assert await control.find(b"and now", 0.5) == [b"and now: here"]


async def test_a_node_that_may_make_nothing_waits_for_who_may(bench: Bench) -> None:
    """The broker has lost everything: commands and events go on as soon as the control plane has made it anew."""
    client = await nats.connect(bench.server.url, user="control", password=bench.passwords["control"])
    for stream in (COMMANDS, EVENTS, NODES):
        await client.jetstream().delete_stream(stream)
    await client.close()
    taking = asyncio.ensure_future(anext(bench.node.commands()))
    action = new_id()
    for call in (bench.node.publish_event(action, f"{action}.1", b"event"), bench.node.put_node(b"record")):
        with pytest.raises(BusUnavailable):
            await call
    with pytest.raises(BusUnavailable):
        await bench.control.send("n1", "checkpoint", action, b"a command")  # makes the streams, for its next attempt
    await bench.control.admit("n1")
    await bench.control.send("n1", "checkpoint", action, b"a command")
    assert (await asyncio.wait_for(taking, LIMIT)).data == b"a command"
    await bench.node.publish_event(action, f"{action}.1", b"event")
    await bench.node.put_node(b"record")


# --- what it may not --------------------------------------------------------------------------------------------------

FILTER = f"hibernode.cmd.{CLUSTER}.n2.>"
CONSUMER = {"durable_name": "spy", "name": "spy", "filter_subject": FILTER, "ack_policy": "explicit", "deliver_policy": "all"}
API = "$JS.API"
REQUESTS = {
    "the next command of n2": (f"{API}.CONSUMER.MSG.NEXT.{COMMANDS}.{CLUSTER}=n2", {"batch": 1}),
    "a command by its number": (f"{API}.STREAM.MSG.GET.{COMMANDS}", {"seq": 1}),
    "a command by its subject": (f"{API}.DIRECT.GET.{COMMANDS}.hibernode.cmd.{CLUSTER}.n2.checkpoint", {}),
    "a consumer of n2's commands": (f"{API}.CONSUMER.CREATE.{COMMANDS}.spy.{FILTER}", CONSUMER),
    "a consumer of its own name for n2": (f"{API}.CONSUMER.CREATE.{COMMANDS}.{CLUSTER}=n1.{FILTER}", CONSUMER),
    "a consumer without a filter": (f"{API}.CONSUMER.CREATE.{COMMANDS}.spy", CONSUMER),
    "a consumer as of old": (f"{API}.CONSUMER.DURABLE.CREATE.{COMMANDS}.spy", CONSUMER),
    "a consumer of the events": (f"{API}.CONSUMER.CREATE.{EVENTS}.spy.hibernode.evt.>", CONSUMER),
    "n2's consumer deleted": (f"{API}.CONSUMER.DELETE.{COMMANDS}.{CLUSTER}=n2", {}),
    "its own consumer deleted": (f"{API}.CONSUMER.DELETE.{COMMANDS}.{CLUSTER}=n1", {}),
    "n2's command acknowledged": (f"$JS.ACK.{COMMANDS}.{CLUSTER}=n2.1.1.1.1.0", "+ACK"),
    "a stream deleted": (f"{API}.STREAM.DELETE.{COMMANDS}", {}),
    "a stream emptied": (f"{API}.STREAM.PURGE.{EVENTS}", {}),
    "a stream changed": (f"{API}.STREAM.UPDATE.{EVENTS}", {"name": EVENTS, "subjects": ["hibernode.>"]}),
    "a stream made": (f"{API}.STREAM.CREATE.MINE", {"name": "MINE", "subjects": ["mine.>"]}),
    "a stream's state": (f"{API}.STREAM.INFO.{COMMANDS}", {}),
    "what streams there are": (f"{API}.STREAM.NAMES", {}),
    "an event by its subject": (f"{API}.DIRECT.GET.{EVENTS}.hibernode.evt.{CLUSTER}.n1.x", {}),
    "its own record read": (f"{API}.DIRECT.GET.{NODES}.$KV.HIBERNODE_NODES.{CLUSTER}.n1", {}),
    "a command to n2": (f"hibernode.cmd.{CLUSTER}.n2.checkpoint", {"action_id": "x"}),
    "a command to itself": (f"hibernode.cmd.{CLUSTER}.n1.checkpoint", {"action_id": "x"}),
    "an event of n2": (f"hibernode.evt.{CLUSTER}.n2.x", {}),
    "progress of n2": (f"hibernode.progress.{CLUSTER}.n2.x", {}),
    "n2's record": (f"$KV.HIBERNODE_NODES.{CLUSTER}.n2", {}),
    "a question to all nodes": (f"hibernode.find.{CLUSTER}", {}),
    "something into n2's inbox": (f"_INBOX.{CLUSTER}.n2.x", {}),
    "something into the control plane's inbox": ("_INBOX.x", {}),
}
SUBSCRIPTIONS = (
    "hibernode.cmd.>", f"hibernode.cmd.{CLUSTER}.n2.>", f"hibernode.cmd.{CLUSTER}.n1.>", "hibernode.evt.>", "hibernode.progress.>",
    "_INBOX.>", f"_INBOX.{CLUSTER}.>", f"_INBOX.{CLUSTER}.n2.>", "$KV.>", "$JS.>", ">",
)  # fmt: skip


async def test_a_node_may_ask_for_nothing_else(bench: Bench) -> None:
    """Each is refused by the server itself, which names the subject; and nothing of it has happened."""
    await bench.control.send("n2", "checkpoint", new_id(), b"not yours")
    async with bench.stranger() as (client, refused):
        inbox = await client.subscribe(f"{client.new_inbox()}")
        for what, (subject, body) in REQUESTS.items():
            data = body if isinstance(body, str) else json.dumps(body)
            await client.publish(subject, data.encode(), reply=inbox.subject)
            await says_no(refused, f'publish to "{subject}"', what)
        with pytest.raises(NoAnswer):
            await inbox.next_msg(SILENCE)
    (subject,) = await bench.waiting("n2")
    assert subject == f"hibernode.cmd.{CLUSTER}.n2.checkpoint".encode()
    assert not await bench.waiting("n1")
    assert await bench.control.nodes() == {}
    other = bench.end("n2")
    try:
        await asyncio.wait_for(other.start(), LIMIT)
        assert (await asyncio.wait_for(anext(other.commands()), LIMIT)).attempt == 1, "nobody has had it before"
    finally:
        await other.stop()


async def test_a_node_may_listen_to_nothing_else(bench: Bench) -> None:
    async with bench.stranger() as (client, refused):
        for subject in SUBSCRIPTIONS:
            await client.subscribe(subject)
            await says_no(refused, f'subscription to "{subject}"', subject)


async def test_a_node_may_not_empty_the_bucket(bench: Bench) -> None:
    """By a header, on the one key that it may write."""
    other = bench.end("n2")
    try:
        await asyncio.wait_for(other.start(), LIMIT)
        await other.put_node(b"two")
    finally:
        await other.stop()
    async with bench.stranger() as (client, _):
        answer = await client.request(f"$KV.HIBERNODE_NODES.{CLUSTER}.n1", b"", timeout=5, headers={"Nats-Rollup": "all"})
        assert "rollup not permitted" in json.loads(answer.data)["error"]["description"]
    assert await bench.control.nodes() == {"n2": b"two"}


async def test_an_answer_sent_elsewhere_is_no_command(bench: Bench) -> None:
    """The server lets who asks choose where its answer goes: what arrives there are the server's words, never the node's."""
    async with bench.stranger() as (client, _):
        secret = new_id().encode()
        target = f"hibernode.cmd.{CLUSTER}.n2.checkpoint"
        await client.publish(f"hibernode.evt.{CLUSTER}.n1.x", secret, reply=target)
        await bench.control.send("n1", "checkpoint", new_id(), secret)
        next_of_mine = f"{API}.CONSUMER.MSG.NEXT.{COMMANDS}.{CLUSTER}=n1"
        await client.publish(next_of_mine, b'{"batch": 1}', reply=target)
        await client.publish(next_of_mine, secret, reply=target)
        await client.flush()
    other = bench.end("n2")
    try:
        await asyncio.wait_for(other.start(), LIMIT)
        delivery = await asyncio.wait_for(anext(other.commands()), LIMIT)
        assert delivery.data.startswith(b'{"stream":'), "a confirmation of the server's"
        assert secret not in delivery.data
        await delivery.drop()
        assert not await bench.waiting("n2"), "and nothing else"
    finally:
        await other.stop()
