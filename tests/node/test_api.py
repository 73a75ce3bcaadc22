"""The whole path: PostgreSQL, two API servers, a broker and the daemons of two nodes, all real; and what happens when parts of it go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests.api_client import ApiServer
from tests.daemon import Daemon
from tests.keeper import wait_until
from tests.nats_server import NatsServer
from tests.node.workload import Beat, beats, python
from tests.postgres import PostgresServer

pytestmark = [pytest.mark.node, pytest.mark.timeout(240)]

LIMIT = 30.0
KILL = {"criu_opts": '{"leave_running": false}'}
SETTINGS = {"limits": {"node_interval": 2.0, "retry_delay": 0.1, "attempts": 2}}  # a node is missed after 6 s


@dataclass
class World:
    """Two of everything that there may be two of."""

    nats: NatsServer
    postgres: PostgresServer
    apis: list[ApiServer]
    daemons: list[Daemon]
    store: Path

    def beat(self, node: int, name: str) -> Beat:
        """The last thing that this job has said on that node."""
        wait_until(lambda: beats(self.daemons[node].job_lines(name)), LIMIT, f"a beat of {name}")
        return beats(self.daemons[node].job_lines(name))[-1]

    def insist_goes_on(self, node: int, name: str, before: Beat) -> None:
        """On that node: the old token, and a higher counter."""
        wait_until(lambda: self.beat(node, name).counter > before.counter + 1, LIMIT, f"{name} to go on")
        assert {beat.token for beat in beats(self.daemons[node].job_lines(name))} == {before.token}

    def alive(self) -> set[str]:
        return {node["name"] for node in self.apis[0].get("/v2/nodes") if node["alive"]}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        nats = stack.enter_context(NatsServer(tmp_path / "nats"))
        postgres = stack.enter_context(PostgresServer())
        url = postgres.database("hibernode")
        apis = [
            stack.enter_context(ApiServer(nats.url, database=url, settings="find_timeout = 1.0\nshared_file_stores = true"))
            for _ in range(2)
        ]
        daemons = [
            stack.enter_context(Daemon(bus=nats.url, node=node, store=f"file://{tmp_path}/store", settings=SETTINGS))
            for node in ("n1", "n2")
        ]
        found = World(nats, postgres, apis, daemons, tmp_path / "store")
        wait_until(lambda: found.alive() == {"n1", "n2"}, LIMIT, "both nodes")
        yield found


def test_checkpoint_through_one_server_restore_through_the_other_on_the_other_node(world: World) -> None:
    one, other = world.apis
    world.daemons[0].run("trainer", python("counter.py", 0.02))
    first = world.beat(0, "trainer")
    made = one.post("/v2/checkpoint/pod", {"namespace": "default", "pod_name": "trainer", "kind": "simple", "reason": "manual"})
    ready = other.until(made, "ready")
    told = ["processing", "checkpoint_created", "ready"]  # each by the one server or the other, and so in any order
    wait_until(lambda: [event["status"] for event in one.get(f"/v2/actions/{made}")["events"]] == told, LIMIT, "all its events")
    assert (ready["node_name"], ready["reason"], ready["pod_name"]) == ("n1", "manual", "trainer")
    assert ready["pause_ns"] > 0
    assert ready["total_io"] > 0
    manifest = world.daemons[0].manifest(ready["checkpoint_id"])
    assert (manifest["reason"], manifest["action_id"]) == ("manual", made)
    assert other.get("/v2/checkpoint/path?name=default/trainer") == ready["location"]
    assert ready["location"] == f"{world.daemons[0].store}/{ready['checkpoint_id']}"
    before = world.beat(0, "trainer")
    assert before.token == first.token

    world.daemons[0].stub.StopJob(pb.StopRequest(name="trainer", signal="KILL"), timeout=20)
    world.daemons[0].stop()
    wait_until(lambda: world.alive() == {"n2"}, LIMIT, "the first node to be missed")
    restored = other.post("/v2/restore/pod", {"action_id": made, "reason": "manual"})
    done = one.until(restored, "ready")
    assert (done["node_name"], done["source_action_id"], done["type"]) == ("n2", made, "restore")
    world.insist_goes_on(1, "trainer", first)


def _stop(name: str):  # type: ignore[no-untyped-def]
    from tests.daemon import pb

    return pb.StopRequest(name=name, signal="KILL")


def test_a_node_that_leaves_gives_its_pod_to_the_other(world: World) -> None:
    one = world.apis[0]
    world.daemons[0].run("mover", python("counter.py", 0.02))
    before = world.beat(0, "mover")

    def listed() -> bool:
        nodes = {node["name"]: node for node in one.get("/v2/nodes")}
        return [pod["name"] for pod in nodes["n1"]["workloads"]] == ["mover"]

    wait_until(listed, LIMIT, "the node to say what it has")
    reply = one.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})
    assert reply.status == 202, reply.text
    (move,) = reply.json()
    one.until(move["checkpoint_action_id"], "ready")

    def restored() -> list[str]:
        found = one.get("/v2/actions?type=restore&node=n2")
        return [action["action_id"] for action in found if action["status"] == "ready"]

    wait_until(restored, LIMIT, "the restore")
    world.insist_goes_on(1, "mover", before)
    assert world.daemons[0].jobs()["mover"].pid == 0, "it must not run twice"
    (action,) = one.get("/v2/actions?type=restore&node=n2")
    assert action["reason"] == "nodeUnschedulable"


def test_statuses_end_right_though_broker_database_and_servers_go(world: World) -> None:
    """While an action runs: the broker is restarted, the database crashes, one server is killed and one stopped."""
    one, other = world.apis
    world.daemons[0].run("trainer", python("counter.py", 0.02))
    before = world.beat(0, "trainer")
    body = {"pod_name": "trainer", "overrides": {"compression": "zstd:1"}}

    made = one.post("/v2/checkpoint/pod", body)
    one.kill()
    world.nats.stop(kill=True)
    world.nats.start()
    assert other.until(made, "ready")["status"] == "ready"

    world.postgres.stop(kill=True)
    for method, path, asked in (
        ("GET", "/v2/actions", None),
        ("GET", "/v2/actions/from_pod/uid", None),
        ("POST", "/v2/actions/upload", {"action_id": made, "status": "processing"}),
        ("GET", "/v2/checkpoint/path?name=trainer", None),
        ("POST", "/v2/checkpoint/pod", body),
        ("GET", f"/v2/checkpoint/status/{made}", None),
        ("POST", "/v2/restore/pod", {"action_id": made, "reason": "manual"}),
    ):
        reply = other.ask(method, path, asked)
        assert (reply.status, reply.code) == (500, "database_unavailable"), f"{method} {path}: {reply.text}"
        assert "only-for-tests" not in reply.text, "the database's password"
    assert other.ask("GET", "/readyz").status == 503
    assert other.ask("GET", "/healthz").status == 200
    world.postgres.start()
    wait_until(lambda: other.ask("GET", "/readyz").status == 200, LIMIT, "readiness")

    second = other.post("/v2/checkpoint/pod", body)
    world.postgres.stop(kill=True)  # its events come while nobody can keep them
    wait_until((world.store / second / "manifest.json").exists, LIMIT, "the checkpoint")
    world.postgres.start()
    assert other.until(second, "ready")["status"] == "ready"

    third = other.post("/v2/checkpoint/pod", body)
    other.stop()
    one.start()
    one.until(third, "ready")
    other.start()
    for action_id in (made, second, third):  # also what a server had in hand when it ended

        def told(action_id: str = action_id) -> bool:
            return [event["seq"] for event in other.get(f"/v2/actions/{action_id}")["events"]] == [1, 2, 3]

        wait_until(told, LIMIT, "all its events")
    world.insist_goes_on(0, "trainer", before)


def test_a_command_waits_for_a_node_that_is_down_and_so_does_its_cancel(world: World) -> None:
    """The daemon dies, and before anybody misses it two restores are filed there, and one of them is cancelled."""
    one, daemon = world.apis[0], world.daemons[1]
    for name in ("late", "unwanted"):
        daemon.run(name, python("counter.py", 0.02))
    before = {name: world.beat(1, name) for name in ("late", "unwanted")}
    made = {name: one.post("/v2/checkpoint/pod", {"pod_name": name, "overrides": KILL}) for name in before}
    for action_id in made.values():
        one.until(action_id, "ready")
    daemon.kill()
    filed = {name: one.post("/v2/restore/pod", {"action_id": made[name], "reason": "manual"}) for name in made}
    assert one.ask("POST", f"/v2/actions/{filed['unwanted']}/cancel").status == 202
    daemon.start()
    assert one.until(filed["late"], "ready")["node_name"] == "n2"
    world.insist_goes_on(1, "late", before["late"])
    assert one.until(filed["unwanted"], "error")["details"]["code"] == "cancelled"
    assert daemon.jobs()["unwanted"].pid == 0
