"""What other nodes say of themselves is read as from strangers: one that writes nonsense hides nobody, and nobody speaks for another."""

from __future__ import annotations

from pathlib import Path

import pytest

from hibernode import wire
from hibernode.courier import Courier
from hibernode.dispatch import Dispatcher
from hibernode.outbox import Outbox
from tests.fakes.bus import MemoryBus
from tests.flow.rig import Rig


@pytest.mark.parametrize("nonsense", [b"", b"junk", b"{}", b"[" * 5000, b'{"node":"a","node":"b"}', b"\xff\xfe"])
async def test_one_bad_record_hides_no_other_node(tmp_path: Path, nonsense: bytes) -> None:
    rig, bus = Rig(tmp_path, node="n", cluster="c"), MemoryBus()
    dispatcher = Dispatcher(rig.node)
    courier = Courier(dispatcher, rig.node, Outbox(rig.node.journal), end := bus.node("c", "n"))
    good, stranger = await dispatcher.record(), bus.node("c", "stranger")
    await end.start()
    await stranger.start()
    await end.put_node(wire.encode_node(good))
    await stranger.put_node(nonsense)
    assert [record.node for record in await courier.nodes()] == ["n"]
    await stranger.put_node(wire.encode_node(good))  # says that it is n, in its own place
    assert [record.node for record in await courier.nodes()] == ["n"]
    await stranger.put_node(wire.encode_node(good.model_copy(update={"node": "stranger"})))
    assert [record.node for record in await courier.nodes()] == ["n", "stranger"]
    await courier.stop()
    await stranger.stop()
