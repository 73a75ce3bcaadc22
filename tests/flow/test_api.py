"""The API from HTTP to the broker and back: every endpoint of the contract, every status code of each, on a broker in memory."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hibernode import wire
from hibernode.api.db import Token
from hibernode.api.guard import hashed, new_token
from hibernode.api.rounds import Rounds
from hibernode.errors import BusUnavailable, DatabaseUnavailable, Refused
from hibernode.model import CheckpointCommand, Event, Gpu, GpuInventory, HeartbeatWish, Profile, Status, Target, WorkloadView
from tests.fakes.machine import GPUS
from tests.flow.api_rig import PROFILE, STORE, ApiRig, FakeNode

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ApiRig]:
    async with ApiRig(tmp_path) as running:
        yield running


async def ready_checkpoint(rig: ApiRig, node: FakeNode, pod: str, **body: object) -> str:
    action_id = await rig.checkpoint(pod, **body)
    await node.complete(await node.take_checkpoint())
    await rig.until_status(action_id, "ready")
    return action_id


# --- checkpoint -----------------------------------------------------------------------------------------------------------------


async def test_a_checkpoint_goes_to_its_node_and_its_status_comes_back(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    before = time.time()
    action_id = await rig.checkpoint(
        "trainer", kind="simple", reason="heartbeat",
        overrides={"asynchronous": True, "compression": "zstd:3", "criu_opts": '{"tcp": "close"}', "streams": 4,
                   "directory": "s3://bucket/prefix/other"},
    )  # fmt: skip
    assert await rig.status(action_id) == "initialized"
    command = await node.take_checkpoint()
    assert (command.action_id, str(command.target)) == (action_id, "pod default/trainer")
    assert (command.kind, command.reason) == ("simple", "heartbeat")
    assert command.overrides.model_dump() == {
        "asynchronous": True, "compression": "zstd:3", "criu_opts": '{"tcp": "close"}', "streams": 4,
        "directory": "s3://bucket/prefix/other", "pod_name": "",
    }  # fmt: skip
    assert before + 3600 <= command.expires_at <= time.time() + 3600
    for status in (Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY):
        await node.say(command, status)
        await rig.until_status(action_id, status.value)
    (listed,) = (await rig.get("/v2/actions")).json()
    assert listed["node_name"] == "n1"
    assert (listed["namespace"], listed["pod_name"], listed["pod_id"]) == ("default", "trainer", node.pods[0].uid)
    assert (listed["total_duration"], listed["total_io"], listed["pause_ns"]) == (5_000_000, 77, 1_000)
    assert (listed["platform"], listed["gpu"], listed["reason"], listed["details"]) == (
        "linux/x86_64", "2 × NVIDIA H100", "heartbeat", None,
    )  # fmt: skip
    assert listed["action_timestamp"] <= listed["checkpoint_completed_timestamp"]
    found = await rig.action(action_id)
    assert [event["status"] for event in found["events"]] == ["processing", "checkpoint_created", "ready"]


async def test_a_pod_is_found_by_its_uid(rig: ApiRig) -> None:
    await rig.node("n1", "other")
    node = await rig.node("n2", "trainer")
    uid = node.pods[0].uid
    reply = await rig.ask("POST", "/v2/checkpoint/pod", {"pod_id": uid})
    assert reply.status == 200
    assert (await node.take_checkpoint()).target.pod_id == uid
    assert (await rig.get(f"/v2/actions/from_pod/{uid}")).text == reply.text
    found = await rig.action(reply.text)
    assert (found["pod_name"], found["node_name"]) == ("trainer", "n2")


@pytest.mark.parametrize(
    ("body", "prop"),
    [
        ({}, "pod_id, pod_name"),
        ({"pod_name": "no name"}, "target.pod_name"),
        ({"pod_id": "a/b"}, "target.pod_id"),
        ({"pod_name": "p", "kind": "whole"}, "kind"),
        ({"pod_name": "p", "reason": "because"}, "reason"),
        ({"pod_name": "p", "cluster_id": "elsewhere"}, "cluster_id"),
        ({"pod_name": "p", "action_id": str(uuid.uuid4())}, "action_id"),
        ({"pod_name": "p", "steams": 3}, "steams"),
        ({"pod_name": 7}, "pod_name"),
        ({"pod_name": "p", "overrides": {"streams": 65}}, "overrides.streams"),
        ({"pod_name": "p", "overrides": {"streams": -1}}, "overrides.streams"),
        ({"pod_name": "p", "overrides": {"streams": 1 << 31}}, "overrides.streams"),
        ({"pod_name": "p", "overrides": {"streams": "4"}}, "overrides.streams"),
        ({"pod_name": "p", "overrides": {"compression": "gzip"}}, "overrides.compression"),
        ({"pod_name": "p", "overrides": {"directory": "/tmp"}}, "overrides.directory"),
        ({"pod_name": "p", "overrides": {"directory": "s3://\ud800"}}, "overrides.directory"),
        ({"pod_name": "p", "overrides": {"directory": "file:///\0"}}, "overrides.directory"),
        ({"pod_name": "p", "overrides": {"criu_opts": "{"}}, "overrides.criu_opts"),
        ({"pod_name": "p", "overrides": {"criu_opts": '{"tcp": "maybe"}'}}, "overrides.criu_opts.tcp"),
        ({"pod_name": "p", "overrides": {"criu_opts": '{"action-script": "/bin/sh"}'}}, "overrides.criu_opts.action-script"),
        ({"pod_name": "p", "overrides": {"threads": 1}}, "overrides.threads"),
        ([], "body"),
        (b"{", "1"),
        (b'{"pod_name": "\\ud800"}', "target.pod_name"),
    ],
)
async def test_bad_parameters_are_a_400_that_names_them_and_nothing_is_filed(rig: ApiRig, body: object, prop: str) -> None:
    await rig.node("n1", "p")
    reply = await rig.ask("POST", "/v2/checkpoint/pod", body)
    found = reply.json()
    assert (reply.status, found["code"]) == (400, "400"), found
    assert found["details"]["property"] == prop, found
    assert found["message"]
    assert (await rig.get("/v2/actions")).json() == []


async def test_a_pod_that_nobody_has_is_a_404(rig: ApiRig) -> None:
    await rig.node("n1", "p")
    for body in ({"pod_name": "trainer"}, {"pod_id": str(uuid.uuid4())}, {"namespace": "other", "pod_name": "p"}):
        reply = await rig.ask("POST", "/v2/checkpoint/pod", body)
        assert (reply.status, reply.code) == (404, "not_found")
    assert (await rig.get("/v2/actions")).json() == []


async def test_a_name_that_is_there_twice_is_a_400_that_says_where(rig: ApiRig) -> None:
    await rig.node("n1", "trainer")
    await rig.node("n2", "trainer")
    reply = await rig.ask("POST", "/v2/checkpoint/pod", {"pod_name": "trainer"})
    assert (reply.status, reply.code) == (400, "ambiguous")
    assert [place[:2] for place in reply.json()["details"]["found"]] == ["n1", "n2"]


async def test_a_uid_with_another_name_is_a_400(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    reply = await rig.ask("POST", "/v2/checkpoint/pod", {"pod_id": node.pods[0].uid, "pod_name": "other"})
    assert (reply.status, reply.json()["details"]["property"]) == (400, "pod_name")


async def test_the_same_key_again_is_the_same_action_filed_once(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    body = {"pod_name": "trainer"}
    first = await rig.ask("POST", "/v2/checkpoint/pod", body, Idempotency_Key="k")
    second = await rig.ask("POST", "/v2/checkpoint/pod", body, Idempotency_Key="k")
    other = await rig.ask("POST", "/v2/checkpoint/pod", body, Idempotency_Key="other")
    assert first.text == second.text != other.text
    assert {(await node.take()).action_id, (await node.take()).action_id} == {first.text, other.text}
    assert len((await rig.get("/v2/actions")).json()) == 2


async def test_a_key_is_its_caller_s_and_for_one_request(tmp_path: Path) -> None:
    other = new_token()
    async with ApiRig(tmp_path) as rig:
        assert rig.server.database.add_token(Token("other", hashed(other)))
        await rig.node("n1", "trainer", "second")
        mine = (await rig.ask("POST", "/v2/checkpoint/pod", {"pod_name": "trainer"}, Idempotency_Key="1")).text
        theirs = (await rig.ask("POST", "/v2/checkpoint/pod", {"pod_name": "trainer"}, Idempotency_Key="1", token=other)).text
        another = (await rig.ask("POST", "/v2/checkpoint/pod", {"pod_name": "second"}, Idempotency_Key="1")).text
        assert len({mine, theirs, another}) == 3


@pytest.mark.parametrize("when", ["while it is looked for", "when it is filed"])
async def test_the_same_key_after_a_failure_files_it(rig: ApiRig, when: str) -> None:
    node = await rig.node("n1", "trainer")
    body = {"pod_name": "trainer"}
    if when == "when it is filed":
        rig.bus.refuse_sends = 1
    else:
        rig.bus.away = True
    assert (await rig.ask("POST", "/v2/checkpoint/pod", body, Idempotency_Key="k")).status == 500
    rig.bus.away = False
    await rig.eventually(_answers(rig), "the broker")
    reply = await rig.ask("POST", "/v2/checkpoint/pod", body, Idempotency_Key="k")
    assert reply.status == 200, reply.text
    command = await node.take_checkpoint()
    assert command.action_id == reply.text
    found = await rig.action(reply.text)
    assert (found["status"], found["provisional"], found["node_name"], found["pod_name"]) == (
        "initialized",
        False,
        "n1",
        "trainer",
    )
    await node.complete(command)
    await rig.until_status(reply.text, "ready")


async def test_without_the_event_stream_a_checkpoint_is_a_500_and_its_action_an_error(rig: ApiRig) -> None:
    await rig.node("n1", "trainer")
    rig.bus.away = True
    reply = await rig.ask("POST", "/v2/checkpoint/pod", {"pod_name": "trainer"})
    assert (reply.status, reply.code) == (500, "bus_unavailable")
    told = reply.json()["details"]
    assert told["status"] == "error"
    found = (await rig.get(f"/v2/checkpoint/status/{told['action_id']}")).json()
    assert found["status"] == "error"
    assert "broker" in found["details"]
    assert (await rig.get("/readyz")).status == 503
    rig.bus.away = False

    async def is_ready() -> bool:
        return (await rig.get("/readyz")).status == 200

    await rig.eventually(is_ready, "readiness")


async def test_a_command_that_the_broker_took_and_did_not_confirm_is_told_as_its_node_tells_it(rig: ApiRig) -> None:
    """The action is an error to its caller; when its node begins it all the same, that is what is said."""
    node = await rig.node("n1", "trainer")
    rig.bus.lose_sends = 1
    reply = await rig.ask("POST", "/v2/checkpoint/pod", {"pod_name": "trainer"})
    assert reply.status == 500
    action_id = reply.json()["details"]["action_id"]
    assert (await rig.action(action_id))["provisional"]
    await node.complete(await node.take_checkpoint())
    await rig.until_status(action_id, "ready")
    assert not (await rig.action(action_id))["provisional"]


# --- restore --------------------------------------------------------------------------------------------------------------------


async def test_a_restore_is_a_new_action_on_the_node_that_made_the_checkpoint(rig: ApiRig) -> None:
    await rig.node("n0")
    node = await rig.node("n1", "trainer")
    made = await ready_checkpoint(rig, node, "trainer")
    restored = await rig.restore(
        made, reason="nodeUnschedulable", overrides={"pod_name": "again", "criu_opts": '{"tcp":"close"}'}
    )
    assert restored != made
    command = await node.take_restore()
    assert (command.action_id, command.checkpoint_id, command.reason) == (restored, made, "nodeUnschedulable")
    assert (command.overrides.pod_name, command.overrides.criu_opts) == ("again", '{"tcp":"close"}')
    await node.complete(command)
    await rig.until_status(restored, "ready")
    found = await rig.action(restored)
    assert (found["type"], found["source_action_id"], found["pod_name"], found["checkpoint_id"]) == (
        "restore",
        made,
        "again",
        made,
    )
    assert found["checkpoint_completed_timestamp"] is None


async def test_a_restore_goes_elsewhere_where_its_node_is_gone_and_to_who_has_least_to_do(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    made = await ready_checkpoint(rig, node, "trainer")
    rig.bus._records.clear()  # its time is over
    await rig.node("busy", load=8.0)
    calm = await rig.node("calm", load=0.1)
    await rig.node("arm", arch="aarch64", load=0.0)
    await rig.node("old", criu="3.17", load=0.0)
    await rig.node("far", store="s3://another/place", load=0.0)
    await rig.node("full", memory_available=1000, load=0.0)
    restored = await rig.restore(made)
    assert (await calm.take_restore()).action_id == restored


async def test_what_was_on_gpus_goes_where_driver_and_gpus_are_the_same(rig: ApiRig) -> None:
    on_gpus = GPUS.model_dump()
    node = await rig.node("n1", "trainer", gpu_inventory=on_gpus)
    action_id = await rig.checkpoint("trainer")
    await node.say(await node.take_checkpoint(), Status.READY, profile=PROFILE.model_copy(update={"gpu_ns": 5}))
    await rig.until_status(action_id, "ready")
    rig.bus._records.clear()
    await rig.node("none", load=0.0, gpu_inventory={})
    await rig.node("older", load=0.0, gpu_inventory={**on_gpus, "driver": "570.1"})
    other = [{**gpu, "name": "NVIDIA A100"} for gpu in on_gpus["gpus"]]
    await rig.node("other", load=0.0, gpu_inventory={**on_gpus, "gpus": other})
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": action_id, "reason": "manual"})
    assert (reply.status, reply.code) == (400, "no_node")
    whynot = reply.json()["details"]["found"]
    assert {name: why.split()[1] for name, why in whynot.items()} == {"none": "NVIDIA", "older": "NVIDIA", "other": "GPUs"}
    same = await rig.node("same", load=4.0, gpu_inventory=on_gpus)
    restored = await rig.restore(action_id)
    assert (await same.take_restore()).action_id == restored


async def test_a_pod_is_made_of_what_its_node_told_and_of_no_upload(rig: ApiRig) -> None:
    """Who may upload may not choose what a pod is that is made with the rights of a node."""
    node = await rig.node("n1", "trainer", makes_pods=True)
    action_id = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    told = json.dumps({"metadata": {"name": "trainer"}, "spec": {"containers": ["told"]}})
    await node.say(command, Status.CHECKPOINT_CREATED, pod_spec=told)
    await node.say(command, Status.READY)
    await rig.until_status(action_id, "ready")
    node.pods = []
    await node.tell()
    upload = {"action_id": action_id, "status": "ready", "pod_spec": {"containers": ["uploaded"]}}
    assert (await rig.ask("POST", "/v2/actions/upload", upload)).status == 200
    restored = await rig.restore(action_id)
    command = await node.take_restore()
    assert (command.action_id, command.pod_spec) == (restored, told)


async def test_a_pod_goes_where_pods_are_made(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer", makes_pods=True)
    action_id = await rig.checkpoint("trainer")
    await node.say(await node.take_checkpoint(), Status.CHECKPOINT_CREATED, Status.READY, pod_spec='{"metadata":{},"spec":{}}')
    await rig.until_status(action_id, "ready")
    rig.bus._records.clear()
    await rig.node("plain", load=0.0)
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": action_id, "reason": "manual"})
    assert (reply.status, reply.code) == (400, "no_node")
    assert reply.json()["details"]["found"] == {"plain": "it makes no pods: it knows no API server"}
    able = await rig.node("able", load=5.0, makes_pods=True)
    restored = await rig.restore(action_id)
    assert (await able.take_restore()).action_id == restored


async def test_a_restore_goes_where_the_cpu_has_all_that_it_had(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer", cpu_flags=["sse2", "avx2", "avx512f", "smep"])
    made = await ready_checkpoint(rig, node, "trainer")
    rig.bus._records.clear()
    await rig.node("small", load=0.0, cpu_flags=["sse2", "avx2"])
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": made, "reason": "manual"})
    assert (reply.status, reply.code) == (400, "no_node")
    assert reply.json()["details"]["found"] == {"small": "its CPU lacks avx512f"}
    large = await rig.node("large", load=4.0, cpu_flags=["sse2", "avx2", "avx512f", "amx_tile"])
    restored = await rig.restore(made)
    assert (await large.take_restore()).action_id == restored


async def test_a_node_that_does_not_say_what_its_cpu_has_decides_itself(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer", cpu_flags=["avx512f"])
    made = await ready_checkpoint(rig, node, "trainer")
    rig.bus._records.clear()
    older = await rig.node("older", cpu_flags=[])
    restored = await rig.restore(made)
    assert (await older.take_restore()).action_id == restored


async def test_no_node_that_fits_is_a_400_that_says_why_of_each(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    made = await ready_checkpoint(rig, node, "trainer")
    rig.bus._records.clear()
    await rig.node("arm", arch="aarch64")
    await rig.node("far", store="s3://another/place")
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": made, "reason": "manual"})
    assert (reply.status, reply.code) == (400, "no_node")
    assert set(reply.json()["details"]["found"]) == {"arm", "far"}


async def test_what_made_no_checkpoint_cannot_be_restored(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    running = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    made = await ready_checkpoint(rig, node, "trainer")
    restored = await rig.restore(made, overrides={"pod_name": "again"})
    for action_id, code in (
        (running, "not_restorable"), (restored, "not_restorable"), (str(uuid.uuid4()), "bad_command"), ("x", "bad_command"),
    ):  # fmt: skip
        reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": action_id, "reason": "manual"})
        assert (reply.status, reply.code) == (400, code), action_id
    await node.say(command, Status.ERROR, code="dump_failed", message="no", hint="look")
    await rig.until_status(running, "error")
    found = (await rig.get(f"/v2/checkpoint/status/{running}")).json()
    assert found["details"] == "no (hint: look)"
    assert (await rig.action(running))["details"]["code"] == "dump_failed"


@pytest.mark.parametrize(
    "body", [{}, {"action_id": "x"}, {"action_id": "x", "reason": "heartbeat"}, {"action_id": 1, "reason": "manual"}]
)
async def test_a_restore_with_bad_parameters_is_a_400(rig: ApiRig, body: object) -> None:
    assert (await rig.ask("POST", "/v2/restore/pod", body)).status == 400


async def test_without_the_event_stream_a_restore_is_a_500_and_its_action_an_error(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    made = await ready_checkpoint(rig, node, "trainer")
    rig.bus.away = True
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": made, "reason": "manual"})
    assert (reply.status, reply.code) == (500, "bus_unavailable")
    assert await rig.status(reply.json()["details"]["action_id"]) == "error"
    rig.bus.away = False


# --- looking --------------------------------------------------------------------------------------------------------------------


async def test_a_list_is_filtered_and_comes_in_pages(rig: ApiRig) -> None:
    node = await rig.node("n1", "a", "b")
    made = [await rig.checkpoint(pod) for pod in ("a", "b", "a")]
    for _ in made:
        await node.complete(await node.take_checkpoint())
    for action_id in made:
        await rig.until_status(action_id, "ready")
    restored = await rig.restore(made[0], overrides={"pod_name": "again"})
    assert [each["action_id"] for each in (await rig.get("/v2/actions")).json()] == [restored, *reversed(made)]
    assert [each["action_id"] for each in (await rig.get("/v2/actions?type=restore")).json()] == [restored]
    assert len((await rig.get("/v2/actions?type=checkpoint&pod_name=a&status=ready&node=n1&namespace=default")).json()) == 2
    assert (await rig.get("/v2/actions?node=n2")).json() == []
    found, path = list[str](), "/v2/actions?limit=3&type=checkpoint"
    found += [each["action_id"] for each in (await rig.get("/v2/actions?limit=2&type=checkpoint")).json()]
    link = (await rig.get("/v2/actions?limit=2&type=checkpoint")).headers["link"]
    assert link.endswith('; rel="next"')
    following = await rig.get(link[1 : link.index(">")])
    found += [each["action_id"] for each in following.json()]
    assert found == list(reversed(made))
    assert "link" not in following.headers
    assert "link" not in (await rig.get(path)).headers
    assert [each["action_id"] for each in (await rig.get("/v2/checkpoints")).json()] == list(reversed(made))


@pytest.mark.parametrize("query", ["type=pod", "status=done", "limit=0", "limit=x", "before=nonsense", "node=a%00b"])
async def test_a_list_with_bad_parameters_is_a_400(rig: ApiRig, query: str) -> None:
    reply = await rig.get(f"/v2/actions?{query}")
    assert (reply.status, reply.json()["code"]) == (400, "400")


async def test_the_path_of_the_latest_checkpoint(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    old, new = [await ready_checkpoint(rig, node, "trainer") for _ in range(2)]
    for name, made in (("trainer", new), ("default/trainer", new), (node.pods[0].uid, new), (old, old)):
        assert (await rig.get(f"/v2/checkpoint/path?name={name}")).text == f"{STORE}/{made}"
    for query in ("", "?name=", "?name=nobody", "?name=other/trainer", "?name=a%00"):
        reply = await rig.get(f"/v2/checkpoint/path{query}")
        assert (reply.status, reply.json()["code"]) == (400, "400"), query


async def test_what_is_not_there_is_a_404(rig: ApiRig) -> None:
    for path in (
        f"/v2/checkpoint/status/{uuid.uuid4()}", "/v2/checkpoint/status/x", "/v2/checkpoint/status/a%00", "/v2/actions/from_pod/nobody",
        "/v2/actions/from_pod/%00", f"/v2/actions/{uuid.uuid4()}", "/v2/actions/x", "/v2/nothing", "/nothing",
    ):  # fmt: skip
        reply = await rig.get(path)
        assert (reply.status, reply.json()["code"]) == (404, "404"), path


async def test_a_method_that_is_not_there_is_a_405(rig: ApiRig) -> None:
    for method, path in (("GET", "/v2/actions/upload"), ("DELETE", "/v2/actions"), ("POST", "/v2/checkpoint/path")):
        reply = await rig.ask(method, path)
        assert (reply.status, reply.json()["code"]) == (405, "405"), path
        assert reply.headers["allow"]
    for path, methods in (("/v2/heartbeats", "GET, POST"), (f"/v2/actions/{uuid.uuid4()}", "GET"), ("/", "GET, HEAD")):
        assert (await rig.ask("OPTIONS", path)).headers["allow"] == methods


@pytest.mark.parametrize(
    ("inventory", "gpu", "listed", "reason"),
    [
        (GpuInventory(), "unknown", [], "the node does not say"),
        (GpuInventory(state="absent", reason="no NVIDIA driver"), "none", [], "no NVIDIA driver"),
        (GpuInventory(state="silent", reason="why", gpus=[Gpu(index=0, name="A")]), "unknown", ["A"], "why"),
        (
            GpuInventory(state="ok", reason="", gpus=[Gpu(index=n, name=name) for n, name in enumerate("ABA")]),
            "2 × A, 1 × B",
            ["A", "B", "A"],
            "",
        ),
    ],
)
async def test_an_action_has_the_gpus_of_its_node_and_a_node_says_why_it_has_none(
    rig: ApiRig, inventory: GpuInventory, gpu: str, listed: list[str], reason: str
) -> None:
    await rig.node("n1", "trainer", gpu_inventory=inventory)
    assert (await rig.action(await rig.checkpoint("trainer")))["gpu"] == gpu
    await rounds(rig).once()
    (node,) = (await rig.get("/v2/nodes")).json()
    assert ([each["name"] for each in node["gpus"]], node["gpu_reason"]) == (listed, reason)


async def test_what_a_node_says_of_itself_is_listed_and_stays_when_it_is_silent(rig: ApiRig) -> None:
    await rig.node("n1", "trainer", load=1.5)
    await rounds(rig).once()
    (node,) = (await rig.get("/v2/nodes")).json()
    assert (node["name"], node["alive"], node["load"], node["gpu_driver"], node["gpu_reason"]) == (
        "n1",
        True,
        1.5,
        "580.65.06",
        "",
    )
    assert node["gpus"][1] == {
        "index": 1, "uuid": "GPU-00000001", "name": "NVIDIA H100", "compute_capability": "9.0", "memory_total": 80 << 30,
        "memory_used": 1 << 30, "mig": False, "processes": 1, "unknown": {},
    }  # fmt: skip
    assert [each["name"] for each in node["workloads"]] == ["trainer"]
    rig.bus._records.clear()
    (node,) = (await rig.get("/v2/nodes")).json()
    assert (node["name"], node["alive"]) == ("n1", False)


# --- upload -----------------------------------------------------------------------------------------------------------------------


async def test_an_upload_is_kept_and_moves_the_status_where_that_is_legal(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    spec = {"containers": [{"name": "a\0"}]}
    body = {
        "action_id": action_id,
        "status": "processing",
        "pod_id": "uid-1",
        "pod_spec": spec,
        "pod_metadata_spec": {"name": "x"},
    }
    reply = await rig.ask("POST", "/v2/actions/upload", body)
    assert (reply.status, reply.text) == (200, action_id)
    assert await rig.status(action_id) == "processing"
    for status in ("ready", "error", "initialized"):
        assert (await rig.ask("POST", "/v2/actions/upload", {"action_id": action_id, "status": status})).status == 200
        assert await rig.status(action_id) == "processing"
    kept = rig.server.database.uploaded(action_id)
    assert kept is not None
    assert json.loads(kept.pod_spec or "") == spec
    assert kept.persistent_volume_claim is None
    assert (await rig.get("/v2/actions/from_pod/uid-1")).text == action_id
    await node.complete(await node.take_checkpoint())
    await rig.until_status(action_id, "ready")


@pytest.mark.parametrize(
    "body",
    [
        {"action_id": str(uuid.uuid4()), "status": "ready"},
        {"action_id": "x", "status": "ready"},
        {},
        [],
        b"{",
        {"status": "ready"},
    ],
)
async def test_an_upload_to_no_action_is_a_404(rig: ApiRig, body: object) -> None:
    reply = await rig.ask("POST", "/v2/actions/upload", body)
    assert (reply.status, reply.json()["code"]) == (404, "404")


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
async def test_an_upload_with_a_number_that_json_has_not_is_refused(rig: ApiRig, number: str) -> None:
    await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    body = f'{{"action_id": "{action_id}", "status": "processing", "pod_spec": {{"x": {number}}}}}'
    reply = await rig.ask("POST", "/v2/actions/upload", body.encode())
    assert (reply.status, reply.json()["details"]["property"]) == (404, "pod_spec")
    assert rig.server.database.uploaded(action_id) is None


async def test_an_id_may_be_spelled_in_upper_case(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    action_id = await ready_checkpoint(rig, node, "trainer")
    for path in (f"/v2/actions/{action_id.upper()}", f"/v2/checkpoint/status/{action_id.upper()}"):
        assert (await rig.get(path)).json()["status"] == "ready"
    body = {"action_id": action_id.upper(), "status": "ready", "pod_id": "uid-1"}
    assert (await rig.ask("POST", "/v2/actions/upload", body)).text == action_id
    node.pods.clear()
    await node.tell()
    await rig.restore(action_id.upper())
    assert (await node.take_restore()).checkpoint_id == action_id


# --- cancel -----------------------------------------------------------------------------------------------------------------------


async def test_a_cancel_goes_to_the_node_that_has_the_action(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    reply = await rig.ask("POST", f"/v2/actions/{action_id}/cancel")
    assert (reply.status, reply.text) == (202, action_id)
    assert (await node.take_cancel()).action_id == action_id
    await node.say(command, Status.ERROR, code="cancelled", message="cancelled by command")
    await rig.until_status(action_id, "error")
    reply = await rig.ask("POST", f"/v2/actions/{action_id}/cancel")
    assert (reply.status, reply.code) == (400, "ended")
    assert (await rig.ask("POST", f"/v2/actions/{uuid.uuid4()}/cancel")).status == 404


# --- silent nodes -------------------------------------------------------------------------------------------------------------------


def rounds(rig: ApiRig, ahead: float = 0.0) -> Rounds:
    """Rounds of a server whose clock is so far ahead."""
    return Rounds(rig.config, rig.server.database, rig.server.control, clock=lambda: time.time() + ahead)


async def test_an_action_of_a_node_that_is_silent_is_an_error_until_the_node_tells_the_truth(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    await node.say(command, Status.PROCESSING)
    await rig.until_status(action_id, "processing")
    late = rounds(rig)
    await late.once()
    rig.bus._records.clear()
    await late.once()
    assert await rig.status(action_id) == "processing"
    late._clock = lambda: time.time() + 121
    await late.once()
    found = await rig.action(action_id)
    assert (found["status"], found["details"]["code"], found["provisional"]) == ("error", "node_silent", True)
    await node.say(command, Status.CHECKPOINT_CREATED)
    await rig.until_status(action_id, "checkpoint_created")
    await node.say(command, Status.READY)
    await rig.until_status(action_id, "ready")
    assert not (await rig.action(action_id))["provisional"]


async def test_an_action_whose_end_was_lost_does_not_wait_for_ever(rig: ApiRig) -> None:
    """Its node is there and has nothing to do: the time counts from the first round that saw it so, and anew when it works again."""
    node = await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    await node.say(command, Status.PROCESSING)
    await rig.until_status(action_id, "processing")
    late = rounds(rig, ahead=200.0)
    for ahead, busy in ((200, 0), (310, 1), (320, 0), (430, 0), (445, 0)):
        assert await rig.status(action_id) == "processing"
        node._facts["actions"] = busy
        await node.tell()
        late._clock = lambda ahead=ahead: time.time() + ahead
        await late.once()
    found = await rig.action(action_id)
    assert (found["status"], found["details"]["code"], found["provisional"]) == ("error", "never_told", True)
    await node.say(command, Status.CHECKPOINT_CREATED, Status.READY)
    await rig.until_status(action_id, "ready")


async def test_who_cannot_hear_says_of_nobody_that_he_is_silent(rig: ApiRig) -> None:
    await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    deaf = rounds(rig, ahead=1000.0)
    rig.bus.away = True
    await deaf.once()
    assert await rig.status(action_id) == "initialized"
    rig.bus.away = False
    rig.bus._records.clear()
    await rig.eventually(_answers(rig), "the broker")
    await deaf.once()  # it hears since this moment only
    assert await rig.status(action_id) == "initialized"


def _answers(rig: ApiRig):  # type: ignore[no-untyped-def]
    async def answers() -> bool:
        return rig.server.control._bus.connected

    return answers


async def test_a_command_that_nobody_took_until_it_expired_is_an_error(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    late = rounds(rig, ahead=3600 + 61)
    await node.tell()
    await late.once()
    assert (await rig.action(action_id))["details"]["code"] == "never_begun"


# --- heartbeats -----------------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_checkpoints_a_pod_again_and_again_and_keeps_the_newest(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    reply = await rig.ask("POST", "/v2/heartbeats", {"pod_name": "trainer", "interval": 60, "keep_last": 1})
    assert reply.status == 200, reply.text
    heartbeats = rig.server._heartbeats
    await heartbeats.round()
    first = await node.take_checkpoint()
    assert first.reason == "heartbeat"
    await heartbeats.round()  # not its turn yet
    heartbeats._clock = lambda: time.time() + 61
    await heartbeats.round()  # its turn, but the first is at work
    (listed,) = (await rig.get("/v2/heartbeats")).json()
    assert listed["message"] == f"left out: action {first.action_id} is at work"
    await node.complete(first)
    await rig.until_status(first.action_id, "ready")
    heartbeats._clock = lambda: time.time() + 121
    await heartbeats.round()
    second = await node.take_checkpoint()
    await heartbeats.round()
    assert len((await rig.get("/v2/checkpoints")).json()) == 1, "the only one that is ready stays"
    await node.complete(second)
    await rig.until_status(second.action_id, "ready")
    await heartbeats.round()
    assert (await node.take_delete()).checkpoint_id == first.checkpoint_id
    assert [each["action_id"] for each in (await rig.get("/v2/checkpoints")).json()] == [second.action_id]
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": first.action_id, "reason": "manual"})
    assert (reply.status, reply.code) == (400, "not_restorable")
    assert (await rig.ask("DELETE", f"/v2/heartbeats/{listed['heartbeat_id']}")).status == 200
    assert (await rig.ask("DELETE", f"/v2/heartbeats/{listed['heartbeat_id']}")).status == 404
    assert (await rig.get("/v2/heartbeats")).json() == []


async def test_a_delete_that_nobody_can_take_holds_up_no_other(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node is gone, and its store with it."""
    node = await rig.node("n1", "trainer")
    made = [await ready_checkpoint(rig, node, "trainer", reason="heartbeat") for _ in range(3)]
    heartbeats, control = rig.server._heartbeats, rig.server.control

    async def nobody(*_: object) -> None:
        raise BusUnavailable("away")

    with monkeypatch.context() as away:
        away.setattr(control._bus, "send", nobody)
        await rig.ask("POST", "/v2/heartbeats", {"pod_name": "trainer", "interval": 60, "keep_last": 1})
        await heartbeats.round()
    purge, tried = control.purge, list[str]()

    async def one_cannot(action: Any) -> None:
        tried.append(action.action_id)
        if len(tried) == 1:
            raise Refused("no_node", "nobody has its store", prop="node", found="none", wanted="one")
        await purge(action)

    monkeypatch.setattr(control, "purge", one_cannot)
    await heartbeats.round()
    assert sorted(tried) == sorted(made[:2])
    assert (await node.take_delete()).checkpoint_id == tried[1]


async def test_what_a_database_says_of_itself_is_told_to_nobody(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise DatabaseUnavailable('the database does not answer: connection to server at "db.internal", user "hibernode" failed')

    monkeypatch.setattr(rig.server.database, "find", away)
    reply = await rig.get(f"/v2/actions/{uuid.uuid4()}")
    assert (reply.status, "db.internal" in reply.text, "does not answer" in reply.text) == (500, False, True)


async def test_what_a_restore_reads_stays(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    made = [await ready_checkpoint(rig, node, "trainer", reason="heartbeat") for _ in range(3)]
    await rig.restore(made[0], overrides={"pod_name": "again"})
    await rig.ask("POST", "/v2/heartbeats", {"pod_name": "trainer", "interval": 60, "keep_last": 1})
    heartbeats = rig.server._heartbeats
    await heartbeats.round()
    assert [each["action_id"] for each in (await rig.get("/v2/checkpoints")).json()] == [made[2], made[0]]


async def test_two_servers_take_one_turn(tmp_path: Path, rig: ApiRig) -> None:
    await rig.node("n1", "trainer")
    await rig.ask("POST", "/v2/heartbeats", {"pod_name": "trainer", "interval": 60})
    database = f"sqlite:///{tmp_path}/api.sqlite"
    async with ApiRig(tmp_path, rig.bus, database) as other:
        await asyncio.gather(rig.server._heartbeats.round(), other.server._heartbeats.round())

        async def filed() -> bool:  # by a round of these, or by one that a server had begun by itself
            return bool((await rig.get("/v2/actions")).json())

        await rig.eventually(filed, "a checkpoint")
        await asyncio.gather(rig.server._heartbeats.round(), other.server._heartbeats.round())
        assert len((await rig.get("/v2/actions")).json()) == 1


async def test_heartbeats_of_the_configuration_are_there_and_go_with_it(tmp_path: Path) -> None:
    heartbeats = [{"pod_name": "trainer", "interval": 60}]
    async with ApiRig(tmp_path, heartbeats=heartbeats) as rig:
        await rig.server._heartbeats.configure()
        (listed,) = (await rig.get("/v2/heartbeats")).json()
        assert listed["configured"]
    async with ApiRig(tmp_path) as rig:
        await rig.server._heartbeats.configure()
        assert (await rig.get("/v2/heartbeats")).json() == []


def wish(node: FakeNode, **changes: object) -> HeartbeatWish:
    """What the node's first pod asks for: it was made 90 s ago, and wants one each minute."""
    pod = node.pods[0]
    known: dict[str, object] = {"namespace": pod.namespace, "name": pod.name, "uid": pod.uid, "since": time.time() - 90}
    return HeartbeatWish.model_validate({**known, "interval": 60.0, "keep_last": 1, **changes})


async def told(rig: ApiRig, *nodes: FakeNode) -> None:
    """Its record is known to the server, which is how a round begins."""
    for node in nodes:
        await node.tell()
    await rounds(rig)._see_nodes()


async def test_a_pod_s_annotations_ask_for_heartbeats_and_keep_the_newest(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    node.wishes = [wish(node)]
    await told(rig, node)
    heartbeats = rig.server._heartbeats
    await heartbeats.round()
    (listed,) = (await rig.get("/v2/heartbeats")).json()
    pod = node.pods[0]
    assert (listed["annotated"], listed["configured"], listed["interval"], listed["keep_last"]) == (True, False, 60, 1)
    assert (listed["namespace"], listed["pod_name"], listed["pod_id"]) == (pod.namespace, pod.name, pod.uid)
    assert (await rig.get("/v2/actions")).json() == [], "the first turn is a whole interval after the pod's start"
    made = []
    for later in (31, 91):
        heartbeats._clock = lambda later=later: time.time() + later  # type: ignore[misc]
        await heartbeats.round()
        command = await node.take_checkpoint()
        assert (command.reason, command.target.pod_id) == ("heartbeat", pod.uid)
        await node.complete(command)
        await rig.until_status(command.action_id, "ready")
        made.append(command)
    await heartbeats.round()
    assert (await node.take_delete()).checkpoint_id == made[0].checkpoint_id
    refused = await rig.ask("DELETE", f"/v2/heartbeats/{listed['heartbeat_id']}")
    assert (refused.status, refused.code) == (400, "annotated")


async def test_with_the_pod_its_heartbeats_go_and_its_checkpoints_stay(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    node.wishes = [wish(node, since=0.0)]
    await ready_checkpoint(rig, node, "trainer", reason="heartbeat")
    await ready_checkpoint(rig, node, "trainer", reason="heartbeat")
    node.wishes = [wish(node, keep_last=2)]
    await told(rig, node)
    await rig.server._heartbeats.round()
    node.wishes, pods, node.pods = [], node.pods, []
    await told(rig, node)
    await rig.server._heartbeats.round()
    assert (await rig.get("/v2/heartbeats")).json() == []
    assert len((await rig.get("/v2/checkpoints")).json()) == 2
    node.pods = [pods[0].model_copy(update={"uid": str(uuid.uuid4())})]  # it was restored
    node.wishes = [wish(node, keep_last=1)]
    await told(rig, node)
    await rig.server._heartbeats.round()
    (listed,) = (await rig.get("/v2/heartbeats")).json()
    assert listed["pod_id"] == node.pods[0].uid
    assert len((await rig.get("/v2/checkpoints")).json()) == 1, "those of the old one count: it is of the name"


async def test_a_pod_that_is_restored_at_once_goes_on_with_its_turns(rig: ApiRig) -> None:
    node, other = await rig.node("n1", "trainer"), await rig.node("n2", "trainer")
    node.wishes = [wish(node)]
    await told(rig, node)
    await rig.server._heartbeats.round()
    (before,) = (await rig.get("/v2/heartbeats")).json()
    other.pods = [other.pods[0].model_copy(update={"uid": str(uuid.uuid4())})]
    other.wishes = [wish(other, since=time.time())]  # while the old one is still told of
    await told(rig, other)
    await rig.server._heartbeats.round()
    (after,) = (await rig.get("/v2/heartbeats")).json()
    assert (after["pod_id"], after["next_timestamp"]) == (other.pods[0].uid, before["next_timestamp"])


@pytest.mark.parametrize(
    "bad", [{"problem": "it says soon"}, {"interval": 1.0}, {"name": "no/name"}, {"uid": ""}, {"keep_last": -1}]
)
async def test_what_a_pod_asks_for_and_makes_no_sense_is_shown_and_keeps_nobody_else_waiting(
    rig: ApiRig, bad: dict[str, object]
) -> None:
    node = await rig.node("n1", "trainer", "other")
    other = wish(node, name="other", uid=node.pods[1].uid)
    node.wishes = [wish(node, **bad), other]
    await told(rig, node)
    await rig.server._heartbeats.round()
    assert [each["pod_name"] for each in (await rig.get("/v2/heartbeats")).json()] == ["other"]
    (shown,) = (await rig.get("/v2/nodes")).json()
    assert [each["problem"] for each in shown["heartbeats"]] == [bad.get("problem", ""), ""]


@pytest.mark.parametrize("by", ["name", "uid"])
async def test_an_operator_s_heartbeat_stands_before_the_pod_s_own(rig: ApiRig, by: str) -> None:
    node = await rig.node("n1", "trainer")
    node.wishes = [wish(node)]
    await told(rig, node)
    heartbeats = rig.server._heartbeats
    await heartbeats.round()
    body = {"pod_name": "trainer"} if by == "name" else {"pod_id": node.pods[0].uid}
    made = await rig.ask("POST", "/v2/heartbeats", {**body, "interval": 3600})
    heartbeats._clock = lambda: time.time() + 61
    await heartbeats.round()
    (listed,) = (await rig.get("/v2/heartbeats")).json()
    assert (listed["heartbeat_id"], listed["annotated"], listed["interval"]) == (made.text, False, 3600)
    assert len((await rig.get("/v2/actions")).json()) == 1, "the operator's first turn, and none of the pod's"
    assert (await rig.ask("DELETE", f"/v2/heartbeats/{made.text}")).status == 200
    await heartbeats.round()
    (listed,) = (await rig.get("/v2/heartbeats")).json()
    assert listed["annotated"]


async def test_a_node_that_is_silent_for_long_is_not_asked_and_comes_again_with_the_same_turns(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    node.wishes = [wish(node)]
    await told(rig, node)
    heartbeats = rig.server._heartbeats
    await heartbeats.round()
    (before,) = (await rig.get("/v2/heartbeats")).json()
    now = time.time()
    heartbeats._clock = lambda: now + 121
    await heartbeats._ask_pods()
    assert (await rig.get("/v2/heartbeats")).json() == []
    heartbeats._clock = time.time
    await told(rig, node)
    await heartbeats._ask_pods()
    (after,) = (await rig.get("/v2/heartbeats")).json()
    assert after["next_timestamp"] == before["next_timestamp"]


async def test_annotations_can_be_turned_off(tmp_path: Path) -> None:
    for on in (True, False):
        async with ApiRig(tmp_path, annotations=on) as rig:
            node = await rig.node("n1", "trainer")
            node.wishes = [wish(node)]
            await told(rig, node)
            await rig.server._heartbeats.round()
            assert bool((await rig.get("/v2/heartbeats")).json()) == on
            (listed,) = (await rig.get("/v2/nodes")).json()
            assert len(listed["heartbeats"]) == 1


async def test_two_servers_take_one_turn_of_an_annotation(tmp_path: Path, rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    node.wishes = [wish(node)]
    await told(rig, node)
    async with ApiRig(tmp_path, rig.bus, f"sqlite:///{tmp_path}/api.sqlite") as other:
        both = (rig.server._heartbeats, other.server._heartbeats)
        await asyncio.gather(*(each.round() for each in both))
        for each in both:
            each._clock = lambda: time.time() + 31
        for _ in range(3):
            await asyncio.gather(*(each.round() for each in both))
        assert len((await rig.get("/v2/heartbeats")).json()) == 1
        assert len((await rig.get("/v2/actions")).json()) == 1


@pytest.mark.parametrize(
    "body", [{}, {"interval": 60}, {"pod_name": "a", "pod_id": "b", "interval": 60}, {"pod_name": "a", "interval": 1}]
)
async def test_a_heartbeat_of_nobody_is_a_400(rig: ApiRig, body: object) -> None:
    assert (await rig.ask("POST", "/v2/heartbeats", body)).status == 400


# --- a node leaves ------------------------------------------------------------------------------------------------------------------


async def test_the_pods_of_a_node_that_leaves_go_elsewhere(rig: ApiRig) -> None:
    leaving, staying = await rig.node("n1", "trainer"), await rig.node("n2")
    reply = await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})
    assert reply.status == 202, reply.text
    (move,) = reply.json()
    assert (move["pod_name"], move["state"]) == ("trainer", "checkpointing")
    saving = await leaving.take_checkpoint()
    assert (saving.reason, json.loads(saving.overrides.criu_opts)) == ("nodeUnschedulable", {"leave_running": False})
    (again,) = (await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})).json()
    assert again["checkpoint_action_id"] == saving.action_id, "a pod that is going does not go twice"
    await leaving.complete(saving)
    await rig.until_status(saving.action_id, "ready")
    await departures(rig).round()
    restoring = await staying.take_restore()
    assert (restoring.checkpoint_id, restoring.reason) == (saving.checkpoint_id, "nodeUnschedulable")
    await staying.complete(restoring)
    await rig.until_status(restoring.action_id, "ready")
    await departures(rig).round()
    assert [move.state for move in rig.server.database.moves("c", "n1")] == ["done"]


async def test_a_pod_that_was_saved_though_nobody_could_write_it_down_goes_on_elsewhere(
    rig: ApiRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker has the command, its answer is lost; when the next round comes the node has killed the pod and does not know it."""
    leaving, staying = await rig.node("n1", "trainer"), await rig.node("n2")
    bus, sent = rig.server.control._bus, list[str]()

    async def lose_the_answer(*command: Any) -> None:
        await send(*command)
        sent.append(command[2])
        monkeypatch.undo()
        raise BusUnavailable("no answer")

    send = bus.send
    monkeypatch.setattr(bus, "send", lose_the_answer)
    await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})
    saving = await leaving.take_checkpoint()
    assert sent == [saving.action_id]
    await leaving.complete(saving)
    leaving.pods = []
    await leaving.tell()
    await rig.until_status(saving.action_id, "ready")
    for _ in range(2):
        await departures(rig).round()
    assert (await staying.take_restore()).checkpoint_id == saving.checkpoint_id


async def test_a_move_whose_command_never_came_is_filed_again_under_its_id(rig: ApiRig, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving, _ = await rig.node("n1", "trainer"), await rig.node("n2")

    async def refuse(*_: Any) -> None:
        raise BusUnavailable("nobody there")

    with monkeypatch.context() as away:
        away.setattr(rig.server.control._bus, "send", refuse)
        (move,) = (await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})).json()
    assert move["checkpoint_action_id"] in (None, "")
    await departures(rig).round()
    saving = await leaving.take_checkpoint()
    (open_,) = rig.server.database.moves("c", "n1")
    assert open_.checkpoint_action_id == saving.action_id
    assert (saving.reason, json.loads(saving.overrides.criu_opts)) == ("nodeUnschedulable", {"leave_running": False})


def departures(rig: ApiRig):  # type: ignore[no-untyped-def]
    return rig.server.departures


async def test_a_node_that_is_silent_and_ends_gives_its_pods_latest_checkpoint(rig: ApiRig) -> None:
    gone, staying = await rig.node("n1", "trainer"), await rig.node("n2")
    made = await ready_checkpoint(rig, gone, "trainer")
    await falls_silent(rig, gone, staying)
    (move,) = (await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeTermination"})).json()
    assert move["state"] == "checkpointing", "it may only be late"
    departures(rig)._clock = lambda: time.time() + 121
    await departures(rig).round()
    assert (await staying.take_restore()).checkpoint_id == made


async def test_a_silent_node_that_does_not_end_keeps_its_pods(rig: ApiRig) -> None:
    """Or its pods would run twice when it comes back."""
    gone, staying = await rig.node("n1", "trainer"), await rig.node("n2")
    await ready_checkpoint(rig, gone, "trainer")
    await falls_silent(rig, gone, staying)
    departures(rig)._clock = lambda: time.time() + 121
    (move,) = (await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})).json()
    assert move["state"] == "failed"
    assert "n1" in move["message"]


async def falls_silent(rig: ApiRig, gone: FakeNode, *others: FakeNode) -> None:
    await rounds(rig).once()
    await rig.until(lambda: bool(rig.server._rounds.heard_since), "a server that hears")
    await gone.end.stop()
    rig.bus._records.clear()
    for node in others:
        await node.tell()


async def test_of_a_clusters_pods_those_go_that_ask_for_it(rig: ApiRig) -> None:
    """The others are made anew by whoever made them, or belong to the node, as the daemon's own."""
    old = await rig.node("n1")
    asks = [WorkloadView(kind="pod", namespace="ml", name=name, uid=name, moves=name == "asks") for name in ("asks", "does-not")]
    old.pods = [*asks, WorkloadView(kind="job", namespace="default", name="job", uid="job", pid=7)]
    await old.tell()
    await rig.node("n2")
    moves = (await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})).json()
    told = {move["pod_name"]: (move["state"], move["message"]) for move in moves}
    assert told.keys() == {"asks", "job"}
    assert told["job"][0] == "checkpointing"
    assert told["asks"][0] == "failed"
    assert "it makes no pods" in told["asks"][1] or "no node can restore" in told["asks"][1]
    await rig.node("n3", makes_pods=True)
    moves = (await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeUnschedulable"})).json()
    assert {move["pod_name"]: move["state"] for move in moves if move["state"] != "failed"} == {
        "asks": "checkpointing", "job": "checkpointing",
    }  # fmt: skip


async def test_a_pod_goes_once_however_often_and_at_once_its_node_leaves(rig: ApiRig) -> None:
    leaving, staying = await rig.node("n1", "trainer"), await rig.node("n2")
    leave = "/v2/nodes/n1/leave", {"reason": "nodeTermination"}
    await asyncio.gather(*(rig.ask("POST", *leave) for _ in range(3)))
    saving = await leaving.take_checkpoint()
    await leaving.complete(saving)
    await rig.until_status(saving.action_id, "ready")
    await asyncio.gather(*(departures(rig).round() for _ in range(3)))
    restoring = await staying.take_restore()
    await staying.complete(restoring)
    await rig.until_status(restoring.action_id, "ready")
    await departures(rig).round()
    (move,) = (await rig.ask("POST", *leave)).json()  # the node's record still has the pod
    assert move["state"] == "done"
    assert len((await rig.get("/v2/actions")).json()) == 2


async def test_a_pod_that_nobody_else_could_take_is_not_ended(rig: ApiRig) -> None:
    leaving = await rig.node("n1", "trainer")
    await rig.node("n2", arch="aarch64")
    await rig.node("n3", store="s3://bucket")  # its own root is another store than ours under it
    (move,) = (await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeTermination"})).json()
    assert move["state"] == "failed"
    assert "runs on" in move["message"]
    assert (await rig.get("/v2/actions")).json() == []
    assert not rig.bus._queue("c", "n1").items
    assert leaving.pods


async def test_a_move_goes_on_after_the_broker_was_away(rig: ApiRig) -> None:
    leaving, staying = await rig.node("n1", "trainer"), await rig.node("n2")
    await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeTermination"})
    saving = await leaving.take_checkpoint()
    await leaving.complete(saving)
    await rig.until_status(saving.action_id, "ready")
    rig.bus.refuse_sends = 1
    await departures(rig).round()
    await departures(rig).round()
    await departures(rig).round()
    restoring = await staying.take_restore()
    assert restoring.checkpoint_id == saving.checkpoint_id
    await staying.complete(restoring)
    await rig.until_status(restoring.action_id, "ready")


async def test_a_pod_that_runs_is_not_restored_a_second_time(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    made = await ready_checkpoint(rig, node, "trainer")
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": made, "reason": "manual"})
    assert (reply.status, reply.code) == (400, "running")
    node.pods.clear()  # its record says otherwise for some seconds yet
    first = await rig.restore(made)
    reply = await rig.ask("POST", "/v2/restore/pod", {"action_id": made, "reason": "manual"})
    assert (reply.status, reply.code) == (400, "restoring")
    assert (await node.take_restore()).action_id == first


async def test_a_pod_that_could_not_be_checkpointed_stays_where_it_is(rig: ApiRig) -> None:
    leaving = await rig.node("n1", "trainer")
    await rig.node("n2")
    await ready_checkpoint(rig, leaving, "trainer")
    await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeTermination"})
    saving = await leaving.take_checkpoint()
    await leaving.say(saving, Status.PROCESSING)
    await leaving.say(saving, Status.ERROR, code="dump_failed", message="no")
    await rig.until_status(saving.action_id, "error")
    await departures(rig).round()
    (move,) = rig.server.database.moves("c", "n1")
    assert (move.state, move.restore_action_id) == ("failed", "")
    assert "dump_failed" in move.message


async def test_a_node_that_falls_silent_while_it_ends_gives_its_latest_checkpoint(rig: ApiRig) -> None:
    leaving, staying = await rig.node("n1", "trainer"), await rig.node("n2")
    made = await ready_checkpoint(rig, leaving, "trainer")
    late = rounds(rig)
    await late.once()
    await rig.ask("POST", "/v2/nodes/n1/leave", {"reason": "nodeTermination"})
    saving = await leaving.take_checkpoint()
    rig.bus._records.clear()
    await staying.tell()
    late._clock = lambda: time.time() + 121
    await late.once()
    assert (await rig.action(saving.action_id))["details"]["code"] == "node_silent"
    await departures(rig).round()
    assert (await staying.take_restore()).checkpoint_id == made


async def test_a_node_that_nobody_has_seen_is_a_404(rig: ApiRig) -> None:
    assert (await rig.ask("POST", "/v2/nodes/n9/leave", {"reason": "nodeTermination"})).status == 404


# --- who may, and how much ------------------------------------------------------------------------------------------------------


async def test_without_a_token_nothing_is_told(rig: ApiRig) -> None:
    for token in (None, "nonsense", "hn_" + "A" * 43):
        for method, path in (("GET", "/v2/actions"), ("POST", "/v2/checkpoint/pod"), ("GET", "/v2/nodes")):
            reply = await rig.ask(method, path, token=token)
            assert (reply.status, reply.code) == (401, "unauthorized"), path
            assert reply.headers["www-authenticate"] == "Bearer"


async def test_probes_page_and_document_need_no_token(rig: ApiRig) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/"):
        assert (await rig.get(path, token=None)).status == 200, path


async def test_a_token_of_the_database_opens_until_its_end_and_one_that_reads_changes_nothing(rig: ApiRig) -> None:
    from hibernode.api import tokens

    reading = tokens.make(rig.server.database, "reader", read_only=True, days=0)
    ended = tokens.make(rig.server.database, "ended", read_only=False, days=-1)
    assert (await rig.get("/v2/actions", token=reading)).status == 200
    reply = await rig.ask("POST", "/v2/heartbeats", {"pod_name": "p", "interval": 60}, token=reading)
    assert (reply.status, reply.code) == (403, "read_only")
    assert (await rig.get("/v2/actions", token=ended)).status == 401


async def test_tokens_are_kept_as_hashes_alone(tmp_path: Path) -> None:
    from hibernode.api import tokens

    async with ApiRig(tmp_path) as rig:
        secret = tokens.make(rig.server.database, "ops2", read_only=False, days=1)
        assert (await rig.get("/v2/actions", token=secret)).status == 200
    assert not [path.name for path in files_of(tmp_path) if secret.encode() in path.read_bytes()]


def files_of(directory: Path) -> list[Path]:
    return list(directory.glob("api.sqlite*"))


async def test_too_many_requests_are_a_429_that_says_when(tmp_path: Path) -> None:
    async with ApiRig(tmp_path, rate=0.05, burst=3) as rig:
        found = [await rig.get("/v2/actions") for _ in range(4)]
        assert [reply.status for reply in found] == [200, 200, 200, 429]
        assert int(found[-1].headers["retry-after"]) >= 1
        assert (await rig.get("/healthz", token=None)).status == 200, "others are not held up"
        statuses = [(await rig.get("/v2/actions", token=f"guess{n}")).status for n in range(30)]
        assert statuses[0] == 401
        assert statuses[-1] == 429, "of one address, whatever it says who it is"


async def test_a_body_that_is_too_large_is_a_413(tmp_path: Path) -> None:
    async with ApiRig(tmp_path, body_limit=2048) as rig:
        reply = await rig.ask("POST", "/v2/checkpoint/pod", b"x" * 2049)
        assert (reply.status, reply.code) == (413, "too_large")
        reply = await rig.ask("POST", "/v2/checkpoint/pod", {"pod_name": "p" * 1900})
        assert reply.status == 400
        chunked = await asyncio.to_thread(_chunked, rig.port, rig.token, b"x" * 2049)
        assert chunked == 413


def _chunked(port: int, token: str, body: bytes) -> int:
    """A body whose length nobody has said before."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection.request("POST", "/v2/checkpoint/pod", iter([body[:1000], body[1000:]]), headers, encode_chunked=True)
    status = connection.getresponse().status
    connection.close()
    return status


async def test_without_tokens_only_this_machine_s_own_names_are_answered(tmp_path: Path) -> None:
    async with ApiRig(tmp_path, auth="none") as rig:
        assert (await rig.get("/v2/actions", token=None)).status == 200
        assert (await rig.get("/v2/actions", token=None, Host="evil.example:80")).status == 400


async def test_every_answer_has_a_request_id_and_the_page_its_policy(rig: ApiRig) -> None:
    reply = await rig.get("/v2/actions", X_Request_ID="mine-1")
    assert reply.headers["x-request-id"] == "mine-1"
    for hostile in ("a b", "x" * 65, "é"):
        assert uuid.UUID((await rig.get("/", X_Request_ID=hostile)).headers["x-request-id"])
    assert "default-src 'self'" in (await rig.get("/")).headers["content-security-policy"]
    assert "access-control-allow-origin" not in (await rig.get("/v2/actions", Origin="http://evil.example")).headers


async def test_metrics_count_requests_and_events(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    await ready_checkpoint(rig, node, "trainer")
    page = ""
    for _ in range(200):  # who reads the database may see it before the server has counted it
        page = (await rig.get("/metrics")).text
        if 'hibernode_api_events_total{status="ready",type="checkpoint"} 1.0' in page:
            break
        await asyncio.sleep(0.05)
    assert 'hibernode_api_events_total{status="ready",type="checkpoint"} 1.0' in page
    assert 'hibernode_api_request_seconds_count{method="POST",operation="checkpoint_pod",status="200"} 1.0' in page
    assert "hibernode_api_bus_connected 1.0" in page


# --- events that nobody wants -----------------------------------------------------------------------------------------------------


async def test_events_that_cannot_be_read_hold_up_nothing(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    await node.end.publish_event(action_id, "x1", b"nonsense")
    await node.end.publish_event(action_id, "x2", b'{"action_id": 7}')
    await node.say(command, Status.PROCESSING, message="odd \0 text", code="c")
    await node.say(command, Status.READY)
    await rig.until_status(action_id, "ready")


async def test_a_node_speaks_for_itself_alone(rig: ApiRig) -> None:
    node, other = await rig.node("n1", "trainer"), await rig.node("n2")
    action_id = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    for name in ("n1", "n2"):  # in the name of another, and in its own
        false = Event(
            action_id=action_id,
            seq=1,
            type="checkpoint",
            status=Status.ERROR,
            checkpoint_id=action_id,
            node=name,
            time=time.time(),
        )
        await other.end.publish_event(action_id, f"{name}-1", wire.encode_event(false))
    await node.complete(command)
    await rig.until_status(action_id, "ready")
    told = (await rig.action(action_id))["events"]
    assert [event["status"] for event in told] == ["processing", "checkpoint_created", "ready"]


async def test_an_action_that_was_begun_on_its_node_is_known_by_its_events(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    action_id = str(uuid.uuid4())
    await node.complete(CheckpointCommand(action_id=action_id, checkpoint_id=action_id, target=Target(pid=7)))

    async def known() -> bool:
        return (await rig.get(f"/v2/actions/{action_id}")).status == 200

    await rig.eventually(known, "the action")
    await rig.until_status(action_id, "ready")
    assert (await rig.get(f"/v2/checkpoint/path?name={action_id}")).text == f"{STORE}/{action_id}"


async def stopped(
    rig: ApiRig, node: FakeNode, on_stop: str = "migrate", profile: Profile = PROFILE, **about: object
) -> CheckpointCommand:
    """The node has checkpointed its first pod by itself, because that is ending."""
    action_id, pod = str(uuid.uuid4()), node.pods[0]
    said = {
        "namespace": pod.namespace, "pod_name": pod.name, "pod_id": pod.uid, "kind": "simple", "reason": "nodeTermination",
        "on_stop": on_stop, **about,
    }  # fmt: skip
    command = CheckpointCommand(action_id=action_id, checkpoint_id=action_id, target=Target(pod_id=pod.uid))
    await node.say(command, Status.PROCESSING, Status.CHECKPOINT_CREATED, details={"about": said})
    await node.say(command, Status.READY, details={"about": said, "location": f"{STORE}/{action_id}"}, profile=profile)

    async def known() -> bool:
        return (await rig.get(f"/v2/actions/{action_id}")).status == 200

    await rig.eventually(known, "the action")
    await rig.until_status(action_id, "ready")
    return command


async def test_what_a_node_says_of_an_action_that_it_has_begun_is_known(rig: ApiRig) -> None:
    node = await rig.node("n1", "trainer")
    made = await stopped(rig, node, "checkpoint")
    found = await rig.action(made.action_id)
    names = (found["namespace"], found["pod_name"], found["pod_id"], found["reason"])
    assert names == ("default", "trainer", node.pods[0].uid, "nodeTermination")
    assert (await rig.get("/v2/checkpoint/path?name=default/trainer")).text == f"{STORE}/{made.checkpoint_id}"
    odd = await stopped(rig, node, "checkpoint", pod_name="a\u0000b", namespace={"x": 1}, reason="heartbeat", kind="none")
    found = await rig.action(odd.action_id)
    assert (found["namespace"], found["pod_name"], found["reason"], found["kind"]) == (None, None, "manual", "simple")


async def test_a_pod_that_is_evicted_and_asks_for_it_goes_on_elsewhere_when_it_has_ended(rig: ApiRig) -> None:
    old, new = await rig.node("n1", "trainer"), await rig.node("n2")
    made = await stopped(rig, old)
    await departures(rig).round()
    (move,) = rig.server.database.moves("c")
    assert (move.state, move.message) == ("restoring", "the pod has not ended yet")
    (uid,) = [pod.uid for pod in old.pods]
    old.pods = []
    await departures(rig).round()
    command = await new.take_restore()
    assert command.checkpoint_id == made.checkpoint_id
    await new.complete(command)
    await rig.until_status(command.action_id, "ready")
    await departures(rig).round()
    await departures(rig).round()
    assert [(move.state, move.pod_id) for move in rig.server.database.moves("c")] == [("done", uid)]
    assert len((await rig.get("/v2/actions?type=restore")).json()) == 1


async def test_what_a_node_has_begun_is_placed_by_what_that_node_has(rig: ApiRig) -> None:
    on_gpus = GPUS.model_dump()
    old = await rig.node("n1", "trainer", gpu_inventory=on_gpus)
    await rig.node("none", load=0.0, gpu_inventory={})
    same = await rig.node("same", load=4.0, gpu_inventory=on_gpus)
    made = await stopped(rig, old, profile=PROFILE.model_copy(update={"gpu_ns": 5}))
    old.pods = []
    await departures(rig).round()
    assert (await same.take_restore()).checkpoint_id == made.checkpoint_id


async def test_a_pod_that_is_evicted_is_moved_once_by_two_servers_and_never_back(tmp_path: Path, rig: ApiRig) -> None:
    old = await rig.node("n1", "trainer")
    await stopped(rig, old)
    old.pods = []
    async with ApiRig(tmp_path, rig.bus, f"sqlite:///{tmp_path}/api.sqlite") as other:
        for _ in range(2):
            await asyncio.gather(departures(rig).round(), departures(other).round())
        (move,) = rig.server.database.moves("c")
        assert move.message.startswith("waits: no_node"), "its own node is no other"
        new = await rig.node("n2")
        for _ in range(2):
            await asyncio.gather(departures(rig).round(), departures(other).round())
        await new.take_restore()
        assert len((await rig.get("/v2/actions?type=restore")).json()) == 1


async def test_a_pod_that_asks_for_a_checkpoint_alone_is_not_moved(rig: ApiRig) -> None:
    old, _ = await rig.node("n1", "trainer"), await rig.node("n2")
    await stopped(rig, old, "checkpoint")
    old.pods = []
    await departures(rig).round()
    assert rig.server.database.moves("c") == []


async def test_an_operator_can_forbid_pods_to_move(tmp_path: Path) -> None:
    async with ApiRig(tmp_path, annotations=False) as rig:
        old, _ = await rig.node("n1", "trainer"), await rig.node("n2")
        await stopped(rig, old)
        old.pods = []
        await departures(rig).round()
        assert rig.server.database.moves("c") == []


async def test_an_eviction_that_was_long_ago_is_not_made_good(rig: ApiRig) -> None:
    old, _ = await rig.node("n1", "trainer"), await rig.node("n2")
    departures(rig)._clock = lambda: time.time() + 3601
    await stopped(rig, old)
    await departures(rig).round()
    assert rig.server.database.moves("c") == []


async def test_progress_is_shown_while_an_action_runs(rig: ApiRig) -> None:
    from hibernode import wire
    from hibernode.model import Progress

    node = await rig.node("n1", "trainer")
    action_id = await rig.checkpoint("trainer")
    command = await node.take_checkpoint()
    await node.say(command, Status.PROCESSING)
    progress = Progress(action_id=action_id, phase="dumping", bytes_done=1, bytes_total=4, stored_bytes=1, seconds=0.5)

    async def shown() -> bool:
        await node.end.publish_progress(action_id, wire.encode_progress(progress))
        return (await rig.action(action_id))["progress"] is not None

    await rig.eventually(shown, "the progress")
    assert (await rig.action(action_id))["progress"]["phase"] == "dumping"
    await node.say(command, Status.READY)
    await rig.until_status(action_id, "ready")
    assert (await rig.action(action_id))["progress"] is None


def test_a_token_is_long_and_its_hash_says_nothing_of_it() -> None:
    first, second = new_token(), new_token()
    assert first != second
    assert len(first) > 40
    assert hashed(first) != hashed(second)
