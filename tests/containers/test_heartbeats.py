"""A pod that asks for heartbeats by its annotations: a real containerd tells the daemon, a real broker the API, which files checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hibernode import wishes
from tests.api_client import ApiServer
from tests.containers.containerd import STATES, Containerd
from tests.containers.pods import Pod, counter
from tests.containers.restoring import SOCKET, of
from tests.daemon import Daemon
from tests.keeper import wait_until
from tests.nats_server import NatsServer

pytestmark = [pytest.mark.containers, pytest.mark.timeout(180)]

ASKS = {wishes.HEARTBEAT: "10s", wishes.KEEP: "1"}
LIMIT = 60.0


def made(api: ApiServer) -> list[dict[str, Any]]:
    """Ready checkpoints, the newest first."""
    found: list[dict[str, Any]] = api.get("/v2/checkpoints")
    return found


def test_a_pod_has_the_heartbeats_that_its_annotations_ask_for_and_goes_on_with_them(node: Containerd, tmp_path: Path) -> None:
    settings = {
        "containers": {"cri": node.address, "roots": [str(STATES)], "socket": str(SOCKET)},
        "limits": {"node_interval": 1.0},
        "increments": {"bases": 1},  # the second refers to the first, which so stays until the third, a full one, is there
    }
    with (
        NatsServer(tmp_path / "nats") as nats,
        ApiServer(nats.url) as api,
        Daemon(bus=nats.url, settings=settings) as daemon,
        Pod(node, [counter()], name="wrong", annotations={wishes.HEARTBEAT: "soon"}),
    ):
        with Pod(node, [counter()], name="trainer", annotations=ASKS) as old:
            old.beat()
            wait_until(lambda: api.get("/v2/heartbeats"), LIMIT, "its policy")
            (policy,) = api.get("/v2/heartbeats")
            assert (policy["pod_name"], policy["pod_id"], policy["interval"], policy["keep_last"]) == ("trainer", old.uid, 10, 1)
            wait_until(lambda: made(api), LIMIT, "a heartbeat")
            first = made(api)[0]
            assert (first["reason"], first["pod_id"]) == ("heartbeat", old.uid)
            wait_until(lambda: [each for each in made(api) if each["action_id"] != first["action_id"]], LIMIT, "the next")
            wait_until(lambda: not (daemon.store_dir / first["checkpoint_id"]).exists(), LIMIT, "the first to go")
            before = old.next_beat(old.beat())
        wait_until(lambda: not api.get("/v2/heartbeats"), LIMIT, "its policy to go")
        assert len(made(api)) == 1, "what was made stays"
        last = made(api)[0]["checkpoint_id"]
        with of(node, last, [counter()], notes=ASKS, name="trainer") as new:
            assert new.next_beat(new.beat()).token == before.token
            wait_until(lambda: [each["pod_id"] for each in api.get("/v2/heartbeats")] == [new.uid], LIMIT, "its policy again")
            wait_until(
                lambda: [each["pod_id"] for each in made(api)] == [new.uid], LIMIT, "a heartbeat of the restored pod alone"
            )
        (said,) = api.get("/v2/nodes")
        (wrong,) = [each for each in said["heartbeats"] if each["pod_name"] == "wrong"]
        assert wrong["problem"].startswith('hibernode.io/heartbeat is "soon"')
        assert daemon.log.count('is \\"soon\\"') + daemon.log.count('is \\\\\\"soon') == 1, "it is logged once"
