"""Schemathesis against the real server: whatever a document allows is asked, and every answer is held against it. Once with the contract,
once with the server's own document, each over SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.contract.api_world import BROKEN, ENDLESS, LEAVING, TRAINER, World, world
from tests.flow.api_rig import CLUSTER, STORE
from tests.postgres import PostgresServer

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parent
CONTRACT = HERE.parents[1] / "proto" / "actions.openapi.json"
EXAMPLES = 15  # of each operation, in each phase that draws them
NOBODY = "00000000-0000-4000-8000-000000000000"
PHASES = ("examples", "coverage", "fuzzing", "stateful")
WALKS = 6  # of the stateful phase alone, at most: which links a walk takes hangs on what is ready when it asks (CI has seen one missed)
CHECKS = {
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "positive_data_acceptance", "missing_required_header", "unsupported_method",
    "allow_header_conformance", "use_after_free", "ensure_resource_availability", "ignored_auth", "object_level_authorization",
}  # fmt: skip


# --- what is asked ------------------------------------------------------------------------------------------------------------------


def amended(contract: dict[str, Any]) -> dict[str, Any]:
    """The contract, with two things that it means and does not write."""
    document = copy.deepcopy(contract)
    refused = {
        "description": "No valid token",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ApiError"}}},
    }
    for operation in operations(document).values():
        operation["responses"]["401"] = refused  # it asks for a token everywhere, and does not say what is without one
    path = document["paths"]["/v2/checkpoint/path"]["get"]
    path["parameters"] = [{"name": "name", "in": "query", "schema": {"type": "string"}}]  # "for a given checkpoint name"
    return document


def with_examples(document: dict[str, Any], there: World) -> dict[str, Any]:
    """Requests that this world grants, and some that are well formed and name nothing that is there: random ones are all of the latter
    kind, or nearly."""
    document = copy.deepcopy(document)
    actions: list[object] = [there.ready, there.running, there.restored, NOBODY]
    parameters: dict[str, dict[str, list[object]]] = {
        "list": {"type": ["checkpoint", "restore", "pod"]},
        "latest_pod_action_id": {"id": [there.uids[TRAINER], NOBODY]},
        "get_latest_checkpoint_for_container_in_action": {
            "name": [TRAINER, f"default/{TRAINER}", there.uids[TRAINER], there.ready, "nobody"]
        },
        "get_checkpoint_status": {"action_id": actions},
        "action_details": {"action_id": actions},
        "cancel_action": {"action_id": actions},
        "leave_node": {"node": ["n3", "n9"]},
        "remove_heartbeat": {"heartbeat_id": [there.heartbeat, NOBODY]},
    }
    bodies: dict[str, list[object]] = {
        "upload_podspec": [
            {"action_id": there.ready, "status": "ready", "pod_spec": {"containers": []}},
            {"action_id": NOBODY, "status": "ready"},
        ],
        "checkpoint_pod": [
            {"pod_name": TRAINER}, {"pod_id": there.uids[BROKEN]}, {"namespace": "default", "pod_name": ENDLESS},
            {"pod_name": TRAINER, "kind": "rootfs", "reason": "heartbeat", "overrides": {
                "asynchronous": True, "compression": "zstd:3", "criu_opts": '{"tcp": "close"}', "directory": f"{STORE}/x", "streams": 4,
            }},
            {"pod_name": "nobody"}, {"pod_id": there.uids[BROKEN], "pod_name": TRAINER},
        ],
        "restore_pod": [
            {"action_id": there.ready, "reason": "manual"},
            {"action_id": there.ready, "reason": "nodeTermination", "overrides": {"pod_name": "again", "criu_opts": "{}"}},
            {"action_id": there.running, "reason": "manual"}, {"action_id": NOBODY, "reason": "manual"},
        ],
        "leave_node": [{"reason": "nodeUnschedulable"}, {"reason": "nodeTermination"}],
        "put_heartbeat": [
            {"pod_name": TRAINER, "interval": 60}, {"pod_id": there.uids[LEAVING], "interval": 3600, "keep_last": 2}, {"interval": 60},
        ],
    }  # fmt: skip
    for name, operation in operations(document).items():
        for parameter in operation.get("parameters", ()):
            if values := parameters.get(name, {}).get(parameter["name"]):
                parameter["examples"] = {f"e{at}": {"value": value} for at, value in enumerate(values)}
        if values := bodies.get(name, []):
            content = operation["requestBody"]["content"]["application/json"]
            content["examples"] = {f"e{at}": {"value": value} for at, value in enumerate(values)}
    return document


def dictionaries(there: World) -> dict[str, list[str]]:
    """An empty one stands for whatever there is."""
    pods, nodes = [TRAINER, BROKEN, ENDLESS, LEAVING], ["n1", "n2", "n3"]
    return {
        "pods": pods,
        "names": [*pods, f"default/{TRAINER}", there.uids[TRAINER], there.ready],
        "uids": list(there.uids.values()),
        "actions": [there.ready, there.running, there.restored],
        "heartbeats": [there.heartbeat],
        "nodes": nodes,
        "clusters": ["", CLUSTER],
        "types": ["checkpoint", "restore"],
        "statuses": ["ready", "ready", "initialized", "processing", "checkpoint_created", "error"],
        "any_pod": ["", "", TRAINER],
        "any_uid": ["", "", "", there.uids[TRAINER]],
        "any_namespace": ["", "default"],
        "any_node": ["", "", "n1"],
        "places": [*[""] * 12, "MWU5OSAA", "MS4wIHg=", "bmFuIHg=", "aW5mIA==", "LTFlMzA4IA=="],  # some at the ends of the world
        "compressions": ["zstd", "zstd:-7", "zstd:19", "none", "zstd:20"],
        "criu_opts": ["{}", '{"tcp": "close"}', '{"leave_running": false}', "null"],
        "directories": [STORE, f"{STORE}/a\\b", "file:///tmp/x", "s3://", "file:///\0"],
    }


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        operation["operationId"]: operation
        for path in document["paths"].values()
        for operation in path.values()
    }  # fmt: skip


# --- a run --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a run did. An operation goes by its `METHOD /path`."""

    rc: int
    said: str
    statuses: dict[str, Counter[int]] = field(default_factory=dict)  # of the answers that were held against the document
    phases: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    followed: Counter[str] = field(default_factory=Counter)  # links that gave a request its values
    granted: Counter[str] = field(default_factory=Counter)  # those whose request was granted


async def run(there: World, document: dict[str, Any], directory: Path, *more: str) -> Found:
    """Every phase, the same requests each time, as far as the answers are the same."""
    config = (HERE / "schemathesis.toml").read_text()
    return await _run(there, document, directory, config, *more, "--phases", ",".join(PHASES))


async def walk(there: World, document: dict[str, Any], directory: Path, seed: int) -> Found:
    """The stateful phase alone, on ways of its own."""
    config = (HERE / "schemathesis.toml").read_text().replace("deterministic = true", "deterministic = false")
    return await _run(there, document, directory, config, "--phases", "stateful", "--seed", str(seed))


async def _run(there: World, document: dict[str, Any], directory: Path, settings: str, *more: str) -> Found:
    """Schemathesis as from a shell: a process of its own."""
    values = "\n".join(f"[dictionaries.{name}]\nvalues = {json.dumps(each)}" for name, each in dictionaries(there).items())
    config, schema, report = directory / "schemathesis.toml", directory / "openapi.json", directory / "report.ndjson"
    config.write_text(settings + values)
    schema.write_text(json.dumps(with_examples(document, there)))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", str(schema),
        "--url", f"http://127.0.0.1:{there.rig.port}", "--checks", "all",
        "--max-examples", str(EXAMPLES), "--no-color", "--continue-on-failure",
        "--report", "ndjson", "--report-ndjson-path", str(report), *more,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=directory,
        env={**os.environ, "HIBERNODE_TOKEN": there.rig.token, "SCHEMATHESIS_HOOKS": str(HERE / "schemathesis_hooks.py")},
    )  # fmt: skip
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    found = Found(process.returncode, said.decode(errors="replace"))
    for line in report.read_text().splitlines():
        if scenario := json.loads(line).get("ScenarioFinished"):
            _read(found, scenario)
    return found


def _read(found: Found, scenario: Mapping[str, Any]) -> None:
    recorder = scenario["recorder"]
    for case_id, checks in recorder.get("checks", {}).items():
        found.phases[scenario["phase"]] += 1
        found.checks.update(check["name"] for check in checks)
        case, answer = recorder["cases"][case_id], recorder["interactions"][case_id]["response"]
        if answer is None:
            continue
        sent = case["value"]
        status = int(answer["status_code"])
        found.statuses.setdefault(f"{sent['method']} {sent['path']}", Counter())[status] += 1
        if case["is_transition_applied"]:
            link = case["transition"]["id"]
            found.followed[link] += 1
            found.granted[link] += status < 300


# --- the tests ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return ""
    server: PostgresServer = request.getfixturevalue("server")
    return server.database(f"t{uuid.uuid4().hex}")


async def test_the_server_keeps_to_the_contract(tmp_path: Path, database: str) -> None:
    contract = amended(json.loads(CONTRACT.read_text()))
    with capture_logs() as logged:
        async with world(tmp_path, database) as there:
            found = await run(there, contract, tmp_path)
    insist(found, contract, logged)


async def test_the_server_keeps_to_its_own_document(tmp_path: Path, database: str) -> None:
    with capture_logs() as logged:
        async with world(tmp_path, database) as there:
            document = (await there.rig.get("/openapi.json")).json()
            found = await run(there, document, tmp_path)
            followed, granted = found.followed, found.granted
            for seed in range(WALKS):
                if not untaken(document, followed):
                    break
                walked = await walk(there, document, tmp_path, seed)
                assert walked.rc == 0, walked.said
                followed, granted = followed + walked.followed, granted + walked.granted
    insist(found, document, logged)
    assert untaken(document, followed) == set()
    for link in links(document) & followed.keys():
        if " -> GET " in link:
            assert granted[link] == followed[link], f"{link}: what is named is not there"


def insist(found: Found, document: dict[str, Any], logged: Sequence[Mapping[str, Any]]) -> None:
    """No failure, and that it looked: every phase, every check, every operation, and every answer that can be had."""
    print(found.said, found)
    assert found.rc == 0
    assert [line for line in logged if line["log_level"] == "error"] == []
    assert found.phases.keys() == set(PHASES)
    assert found.checks.keys() >= CHECKS
    seen = {(place, status) for place, statuses in found.statuses.items() for status in statuses}
    wanted = {
        (f"{method.upper()} {path}", int(status))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for status in operation["responses"]
        if status in {"200", "202", "400", "401", "404"}
    }
    assert wanted - seen == set()


def untaken(document: dict[str, Any], followed: Mapping[str, int]) -> set[str]:
    """Answers that lead on and led nowhere, and operations that can be led to and were not: not every link is asked for, every end is."""
    wanted, taken = links(document), links(document) & followed.keys()
    assert wanted
    return _ends(wanted) - _ends(taken)


def _ends(links: Iterable[str]) -> set[str]:
    return {f"{end} {link.split(' -> ')[at]}" for at, end in ((0, "from"), (-1, "to")) for link in links}


def links(document: dict[str, Any]) -> set[str]:
    places = {
        operation["operationId"]: f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    return {
        f"{places[name]} -> [{status}] {link} -> {places[to['operationId']]}"
        for name, operation in operations(document).items()
        for status, answer in operation["responses"].items()
        for link, to in answer.get("links", {}).items()
    }
