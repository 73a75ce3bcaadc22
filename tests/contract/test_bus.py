"""One suite for the bus port: the broker in memory and a real NATS server keep the same promises."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TypeVar

import pytest

from hibernode.bus import Batch, ControlBus, Delivery, NodeBus
from hibernode.config import Bus
from hibernode.drivers.nats import NatsControl, NatsNode
from hibernode.errors import BadCommand, BusUnavailable
from tests.fakes.bus import MemoryBus
from tests.nats_server import NatsServer

End = TypeVar("End", bound=NodeBus | ControlBus)
T = TypeVar("T")

LIMIT = 15.0  # seconds until a test gives up on something that should have come


class Bench:
    """Makes ends of one bus, and stops them all. Every test has a cluster of its own."""

    def __init__(self, node: Callable[[str, str, float], NodeBus], control: Callable[[str, float], ControlBus]) -> None:
        self._node, self._control = node, control
        self._ends: list[NodeBus | ControlBus] = []
        self.cluster = f"c-{uuid.uuid4()}"

    async def node(self, name: str = "n1", *, ack_wait: float = 30.0) -> NodeBus:
        return await self._started(self._node(self.cluster, name, ack_wait))

    async def control(self, *, ack_wait: float = 30.0) -> ControlBus:
        return await self._started(self._control(self.cluster, ack_wait))

    async def _started(self, end: End) -> End:
        await asyncio.wait_for(end.start(), LIMIT)
        self._ends.append(end)
        return end

    async def close(self) -> None:
        for end in self._ends:
            await end.stop()
            await end.stop()  # harmless when repeated


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("nats")) as running:
        yield running


@pytest.fixture(params=["memory", "nats"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    if request.param == "memory":
        broker = MemoryBus()
        made = Bench(
            lambda cluster, name, wait: broker.node(cluster, name, ack_wait=wait, record_ttl=3.0),
            lambda cluster, wait: broker.control(cluster, ack_wait=wait),
        )
    else:
        url = request.getfixturevalue("server").url
        made = Bench(
            lambda cluster, name, wait: NatsNode(Bus(url=url, ack_wait=wait), cluster, name, record_ttl=3.0),
            lambda cluster, wait: NatsControl(Bus(url=url, ack_wait=wait), cluster),
        )
    yield made
    await made.close()


def new_id() -> str:
    return str(uuid.uuid4())


async def take(iterator: AsyncIterator[T]) -> T:
    return await asyncio.wait_for(anext(iterator), LIMIT)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT):
        while not await condition():  # noqa: ASYNC110 - the condition asks a broker
            await asyncio.sleep(0.05)


# --- commands ---------------------------------------------------------------------------------------------------------


async def test_commands_sent_before_the_node_ever_started_arrive_in_order(bench: Bench) -> None:
    control = await bench.control()
    for i in range(5):
        await control.send("n1", "checkpoint", new_id(), b"%d" % i)
    commands = (await bench.node()).commands()
    got = []
    for _ in range(5):
        delivery = await take(commands)
        got.append((delivery.verb, delivery.data, delivery.attempt))
        await delivery.done()
    assert got == [("checkpoint", b"%d" % i, 1) for i in range(5)]


async def test_a_node_can_be_admitted_again_and_again(bench: Bench) -> None:
    """Before it was ever there, and with commands on their way to it."""
    control = await bench.control()
    await control.admit("n1")
    await control.send("n1", "checkpoint", new_id(), b"x")
    await control.admit("n1")
    assert (await take((await bench.node()).commands())).data == b"x"
    with pytest.raises(BadCommand):
        await control.admit("n1.>")


async def test_commands_sent_while_the_node_listens_arrive(bench: Bench) -> None:
    control, commands = await bench.control(), (await bench.node()).commands()
    waiting = asyncio.create_task(take(commands))
    await control.send("n1", "restore", new_id(), b"x")
    delivery = await waiting
    assert (delivery.verb, delivery.data) == ("restore", b"x")


async def test_several_commands_can_be_out_at_once(bench: Bench) -> None:
    control, commands = await bench.control(), (await bench.node()).commands()
    for data in (b"1", b"2", b"3"):
        await control.send("n1", "checkpoint", new_id(), data)
    out = [await take(commands) for _ in range(3)]
    assert [delivery.data for delivery in out] == [b"1", b"2", b"3"]
    for delivery in reversed(out):
        await delivery.done()


@pytest.mark.parametrize("answer", ["done", "drop"])
async def test_what_is_done_or_dropped_never_comes_again(bench: Bench, answer: str) -> None:
    control, first = await bench.control(), await bench.node(ack_wait=1.0)
    await control.send("n1", "checkpoint", new_id(), b"once")
    delivery = await take(first.commands())
    await (delivery.done() if answer == "done" else delivery.drop())
    await first.stop()
    await asyncio.sleep(1.2)  # longer than the ack wait: what was not answered would be ready again
    await control.send("n1", "checkpoint", new_id(), b"marker")
    assert (await take((await bench.node(ack_wait=1.0)).commands())).data == b"marker"


async def test_later_brings_it_again_after_the_delay(bench: Bench) -> None:
    control, commands = await bench.control(), (await bench.node()).commands()
    await control.send("n1", "checkpoint", new_id(), b"x")
    clock = asyncio.get_running_loop().time
    delivery, began = await take(commands), clock()
    await delivery.later(0.4)
    delivery = await take(commands)
    assert (delivery.data, delivery.attempt) == (b"x", 2)
    assert clock() - began >= 0.39
    await delivery.later(0)
    assert (await take(commands)).attempt == 3


async def test_a_command_nobody_answered_goes_to_the_next_instance_of_the_node(bench: Bench) -> None:
    control, first = await bench.control(), await bench.node(ack_wait=1.0)
    await control.send("n1", "checkpoint", new_id(), b"x")
    assert (await take(first.commands())).attempt == 1
    await first.stop()
    delivery = await take((await bench.node(ack_wait=1.0)).commands())
    assert (delivery.data, delivery.attempt) == (b"x", 2)
    await delivery.done()


async def test_working_keeps_a_command(bench: Bench) -> None:
    control, commands = await bench.control(), (await bench.node(ack_wait=3.0)).commands()
    await control.send("n1", "checkpoint", new_id(), b"long")
    delivery = await take(commands)
    for _ in range(9):  # 7.2 seconds of work
        await asyncio.sleep(0.8)
        await delivery.working()
    await control.send("n1", "checkpoint", new_id(), b"marker")
    assert (await take(commands)).data == b"marker"
    await delivery.done()


async def test_a_command_without_a_sign_of_life_comes_again(bench: Bench) -> None:
    control, commands = await bench.control(), (await bench.node(ack_wait=1.0)).commands()
    await control.send("n1", "checkpoint", new_id(), b"x")
    late = await take(commands)
    again = await take(commands)
    assert (again.data, again.attempt) == (b"x", 2)
    await late.done()  # too late, and harmless
    await again.done()


async def test_the_same_action_and_verb_is_stored_once(bench: Bench) -> None:
    control, commands = await bench.control(), (await bench.node()).commands()
    action = new_id()
    for verb, data in (("checkpoint", b"1"), ("checkpoint", b"1 again"), ("cancel", b"2"), ("cancel", b"2 again")):
        await control.send("n1", verb, action, data)
    await control.send("n1", "checkpoint", new_id(), b"3")
    got = []
    for _ in range(3):
        delivery = await take(commands)
        got.append((delivery.verb, delivery.data))
        await delivery.done()
    assert got == [("checkpoint", b"1"), ("cancel", b"2"), ("checkpoint", b"3")]


async def test_commands_of_one_node_never_reach_another(bench: Bench) -> None:
    control = await bench.control()
    nodes = {name: (await bench.node(name)).commands() for name in ("a", "a-b", "b")}
    for name in ("a", "a-b", "b"):
        await control.send(name, "checkpoint", new_id(), name.encode())
        await control.send(name, "checkpoint", new_id(), b"last of " + name.encode())
    names = ["b", "a-b", "a"]  # not in the order of sending: what somebody else could take, he would
    first = await asyncio.gather(*(take(nodes[name]) for name in names))
    second = await asyncio.gather(*(take(nodes[name]) for name in names))
    assert [delivery.data for delivery in first] == [name.encode() for name in names]
    assert [delivery.data for delivery in second] == [b"last of " + name.encode() for name in names]


@pytest.mark.parametrize("bad", ["a.b", "*", ">", "", "a b", "a\n"])
async def test_names_that_would_reach_others_are_refused(bench: Bench, bad: str) -> None:
    control, node = await bench.control(), await bench.node()
    with pytest.raises(BadCommand):
        await control.send(bad, "checkpoint", new_id(), b"")
    with pytest.raises(BadCommand):
        await control.send("n1", "checkpoint", bad, b"")
    with pytest.raises(BadCommand):
        await control.send("n1", bad or "explode", new_id(), b"")
    with pytest.raises(BadCommand):
        await node.publish_event(bad, "id", b"")


# --- events -----------------------------------------------------------------------------------------------------------


async def test_an_event_is_stored_once_per_message_id(bench: Bench) -> None:
    control, node, action = await bench.control(), await bench.node(), new_id()
    for seq, data in ((1, b"1"), (1, b"1 again"), (2, b"2"), (1, b"1 again"), (3, b"3")):
        await node.publish_event(action, f"{action}.{seq}", data)
    events = control.follow(action)
    assert [await take(events) for _ in range(3)] == [b"1", b"2", b"3"]


async def test_an_event_is_stored_once_per_place_however_late_it_comes_again(bench: Bench) -> None:
    """Another message id is what an old one is to a broker that has forgotten it."""
    control, node, action = await bench.control(), await bench.node(), new_id()
    first = await node.publish_event(action, new_id(), b"1", after=0)
    assert await node.publish_event(action, new_id(), b"1 again", after=0) == first
    await node.publish_event(new_id(), new_id(), b"of another action", after=0)
    second = await node.publish_event(action, message := new_id(), b"2", after=first)
    assert second > first
    assert await node.publish_event(action, new_id(), b"2 again", after=first) == second
    assert await node.publish_event(action, message, b"2 again", after=first) == second
    assert await node.publish_event(action, new_id(), b"3", after=second) > second
    events = control.follow(action)
    assert [await take(events) for _ in range(3)] == [b"1", b"2", b"3"]


async def test_following_begins_at_the_beginning_and_goes_on_live(bench: Bench) -> None:
    control, nodes = await bench.control(), [await bench.node("a"), await bench.node("b")]
    action, other = new_id(), new_id()

    async def publish(seq: int) -> None:
        for each in (action, other):
            await nodes[seq % 2].publish_event(each, f"{each}.{seq}", f"{each} {seq}".encode())

    for seq in range(20):
        await publish(seq)
    one, all_ = control.follow(action), control.follow()
    assert [await take(one) for _ in range(20)] == [f"{action} {seq}".encode() for seq in range(20)]
    waiting = asyncio.create_task(take(one))
    for seq in range(20, 40):
        await publish(seq)
    got = [await waiting] + [await take(one) for _ in range(19)]
    assert got == [f"{action} {seq}".encode() for seq in range(20, 40)]
    assert [await take(all_) for _ in range(80)] == [f"{a} {s}".encode() for s in range(40) for a in (action, other)]


async def test_a_long_history_is_read_whole(bench: Bench) -> None:
    control, node, action = await bench.control(), await bench.node(), new_id()
    for seq in range(600):  # more than is asked for at once
        await node.publish_event(action, f"{action}.{seq}", b"%d" % seq)
    events = control.follow(action)
    assert [await take(events) for _ in range(600)] == [b"%d" % seq for seq in range(600)]


# --- events in batches ------------------------------------------------------------------------------------------------


async def publish(node: NodeBus, numbers: range) -> list[bytes]:
    told = [b"%d" % number for number in numbers]
    for data in told:
        await node.publish_event(new_id(), new_id(), data)
    return told


async def take_all(batches: AsyncIterator[Batch], number: int) -> list[bytes]:
    """So many events, each batch done when it is there."""
    got: list[bytes] = []
    while len(got) < number:
        batch = await take(batches)
        got += batch.events
        await batch.done()
    return got


async def test_a_long_history_comes_in_batches_no_longer_than_was_asked_for(bench: Bench) -> None:
    told = await publish(await bench.node(), range(600))
    batches = (await bench.control()).follow_batches("api", limit=100)
    lengths, got = list[int](), list[bytes]()
    while len(got) < 600:
        batch = await take(batches)
        await batch.done()
        lengths.append(len(batch.events))
        got += batch.events
    assert got == told
    assert max(lengths) <= 100
    assert len(lengths) < 100, "what is there comes together"


async def test_of_every_event_is_known_who_sent_it(bench: Bench) -> None:
    batches, told = (await bench.control()).follow_batches("api"), list[tuple[bytes, str]]()
    for name, numbers in (("node-1", range(2)), ("node-2", range(2, 4))):
        told += [(data, name) for data in await publish(await bench.node(name), numbers)]
    found = list[tuple[bytes, str]]()
    while len(found) < 4:
        batch = await take(batches)
        found += zip(batch.events, batch.nodes, strict=True)
        await batch.done()
    assert found == told


async def test_no_event_is_held_back_for_those_to_come(bench: Bench) -> None:
    control, node = await bench.control(), await bench.node()
    batches, clock = control.follow_batches("api"), asyncio.get_running_loop().time
    waiting = asyncio.create_task(take(batches))
    slowest = 0.0
    for number in range(10):
        await asyncio.wait([waiting], timeout=0.1)  # it waits, or its request is older than the event
        began = clock()
        await publish(node, range(number, number + 1))
        batch = await waiting
        slowest = max(slowest, clock() - began)
        assert batch.events == [b"%d" % number]
        waiting = asyncio.create_task(take(batches))
        await batch.done()
    waiting.cancel()
    assert slowest < 5.0, "held back it would take 10"


async def test_batches_go_on_where_they_were(bench: Bench) -> None:
    """Another follower of the name gets what was not done, and nothing else."""
    first, node = await bench.control(ack_wait=1.0), await bench.node()
    told = await publish(node, range(6))
    batches = first.follow_batches("api", limit=2)
    assert await take_all(batches, 2) == told[:2]
    kept = await take(batches)
    assert kept.events == told[2 : 2 + len(kept.events)]
    await first.stop()
    with pytest.raises(BusUnavailable):
        await kept.done()
    await asyncio.sleep(1.2)  # longer than the ack wait: what was not acknowledged would be ready again
    assert sorted(await take_all((await bench.control(ack_wait=1.0)).follow_batches("api"), 4)) == told[2:]


async def test_a_batch_that_is_not_done_comes_again_among_newer_ones_in_order(bench: Bench) -> None:
    control, node = await bench.control(ack_wait=1.0), await bench.node()
    told = await publish(node, range(2))
    batches, got = control.follow_batches("api"), list[bytes]()
    while len(got) < 2:
        got += (await take(batches)).events
    await asyncio.sleep(1.2)
    told += await publish(node, range(2, 4))
    again: set[bytes] = set()
    while len(again) < 4:
        batch = await take(batches)
        assert list(batch.events) == sorted(set(batch.events), key=int)
        again.update(batch.events)
        await batch.done()
    assert sorted(again) == told


async def test_a_batch_done_late_or_twice_is_done(bench: Bench) -> None:
    control, node = await bench.control(ack_wait=1.0), await bench.node()
    told = await publish(node, range(1))
    batches = control.follow_batches("api")
    late, again = await take(batches), await take(batches)
    assert late.events == again.events == told
    for batch in (late, late, again):
        await batch.done()
    told = await publish(node, range(1, 2))
    assert (await take(batches)).events == told


async def test_followers_of_one_name_share_the_events_and_another_name_has_them_all(bench: Bench) -> None:
    node, got = await bench.node(), dict[str, list[bytes]](api=[], other=[])

    async def read(control: ControlBus, name: str) -> None:
        async for batch in control.follow_batches(name, limit=3):
            await batch.done()
            got[name] += batch.events

    async def all_there() -> bool:
        return min(map(len, got.values())) >= 30

    async with asyncio.TaskGroup() as group:
        for name in ("api", "api", "other"):
            group.create_task(read(await bench.control(), name))
        told = await publish(node, range(30))
        await until(all_there)
        await bench.close()
    assert sorted(got["api"], key=int) == sorted(got["other"], key=int) == told


async def test_a_follower_whose_name_would_reach_others_is_refused(bench: Bench) -> None:
    control = await bench.control()
    for bad in ("", "a.b", ">"):
        with pytest.raises(BadCommand):
            control.follow_batches(bad)


# --- progress, finding, node records ----------------------------------------------------------------------------------


async def test_progress_reaches_a_live_follower(bench: Bench) -> None:
    control, node, action = await bench.control(), await bench.node(), new_id()
    waiting = asyncio.create_task(take(control.follow_progress(action)))

    async def arrived() -> bool:
        await node.publish_progress(new_id(), b"of another action")
        await node.publish_progress(action, b"half")
        return waiting.done()

    await until(arrived)
    assert await waiting == b"half"


async def test_progress_of_all_actions_reaches_a_live_follower(bench: Bench) -> None:
    control, nodes = await bench.control(), [await bench.node("a"), await bench.node("b")]
    told, got = {b"of a", b"of b"}, set[bytes]()

    async def read() -> None:
        async for data in control.follow_progress(""):
            got.add(data)

    async def arrived() -> bool:
        for node, data in zip(nodes, sorted(told), strict=True):
            await node.publish_progress(new_id(), data)
        return got == told

    reading = asyncio.create_task(read())
    await until(arrived)
    reading.cancel()


async def test_the_nodes_that_have_it_answer(bench: Bench) -> None:
    control = await bench.control()
    asked: list[bytes] = []

    def answering(name: bytes) -> Callable[[bytes], Awaitable[bytes | None]]:
        async def answer(data: bytes) -> bytes | None:
            asked.append(data)
            return name if name != b"silent" else None

        return answer

    for name in (b"a", b"b", b"silent"):
        await (await bench.node(name.decode())).answer_find(answering(name))
    await bench.node("deaf")

    async def both() -> bool:
        asked.clear()
        return sorted(await control.find(b"who?", 0.5)) == [b"a", b"b"]

    await until(both)
    assert asked == [b"who?"] * 3


async def test_finding_ends_when_enough_have_answered(bench: Bench) -> None:
    control, never = await bench.control(), asyncio.Event()

    async def answer(data: bytes) -> bytes | None:
        if data != b"all?":
            return data
        await never.wait()
        return None

    for name in ("a", "b", "c"):
        await (await bench.node(name)).answer_find(answer)

    async def all_hear() -> bool:
        return len(await control.find(b"who?", 0.5)) == 3

    await until(all_hear)
    clock = asyncio.get_running_loop().time
    began = clock()
    assert set(await control.find(b"one?", LIMIT, enough=1)) == {b"one?"}
    assert await control.find(b"three?", LIMIT, enough=3) == [b"three?"] * 3
    assert clock() - began < LIMIT / 2
    assert await control.find(b"all?", 0.3, enough=1) == []
    never.set()


async def test_finding_does_not_wait_for_the_slow(bench: Bench) -> None:
    control, node = await bench.control(), await bench.node()
    never = asyncio.Event()

    async def answer(data: bytes) -> bytes | None:
        await never.wait()
        return b"late"

    await node.answer_find(answer)
    assert await asyncio.wait_for(control.find(b"who?", 0.3), 5) == []
    never.set()


async def test_finding_where_nobody_listens_finds_nothing(bench: Bench) -> None:
    assert await asyncio.wait_for((await bench.control()).find(b"who?", 0.3), 5) == []


async def test_node_records_appear_and_vanish(bench: Bench) -> None:
    control, a, b = await bench.control(), await bench.node("a"), await bench.node("b")
    assert await control.nodes() == {}
    await a.put_node(b"old")
    await a.put_node(b"1")
    await b.put_node(b"2")
    assert await control.nodes() == await a.nodes() == {"a": b"1", "b": b"2"}
    assert await control.nodes("b") == await a.nodes("b") == {"b": b"2"}
    assert await control.nodes("nobody") == await control.nodes("no.token") == {}

    async def only_b() -> bool:
        await b.put_node(b"3")
        return await control.nodes() == {"b": b"3"}

    await until(only_b)


# --- stopping ---------------------------------------------------------------------------------------------------------


async def test_stop_ends_every_iterator(bench: Bench) -> None:
    control, node, action = await bench.control(), await bench.node(), new_id()

    async def drain(iterator: AsyncIterator[Delivery | Batch | bytes]) -> None:
        async for _ in iterator:
            pass

    readers = [
        asyncio.create_task(drain(each))
        for each in (
            node.commands(),
            control.follow(),
            control.follow(action),
            control.follow_batches("x"),
            control.follow_progress(action),
            control.follow_progress(""),
        )
    ]
    _, waiting = await asyncio.wait(readers, timeout=0.3)
    assert len(waiting) == len(readers)
    await bench.close()
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*readers)


async def test_a_reader_can_be_cancelled(bench: Bench) -> None:
    commands = (await bench.node()).commands()
    reader = asyncio.create_task(take(commands))
    await asyncio.wait([reader], timeout=0.2)
    reader.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(reader, LIMIT)
    assert reader.cancelled()


async def test_after_stop_every_call_says_so(bench: Bench) -> None:
    control, node, action = await bench.control(), await bench.node(), new_id()
    await bench.close()
    for call in (
        lambda: node.publish_event(action, "1", b""),
        lambda: node.put_node(b""),
        node.nodes,
        lambda: control.send("n1", "checkpoint", action, b""),
        lambda: control.find(b"", 1.0),
        control.nodes,
    ):
        with pytest.raises(BusUnavailable):
            await call()
    await node.publish_progress(action, b"lost, and nobody minds")
