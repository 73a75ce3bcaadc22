"""The document of our API holds the contract: each of its operations, answers and shapes, under its names; more may be there, less not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hibernode.api.server import document

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parents[2] / "proto" / "actions.openapi.json").read_text())
OURS: dict[str, Any] = document()


def missing(wanted: Any, found: Any, place: str = "") -> Iterator[str]:
    """What of `wanted` is not, or otherwise, in `found`. Words for people may differ."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            yield f"{place}: {found!r} in place of {wanted!r}"
            return
        for key, each in wanted.items():
            if key in ("description", "summary"):
                continue
            if key not in found:
                yield f"{place}.{key} is missing"
            else:
                yield from missing(each, found[key], f"{place}.{key}")
    elif isinstance(wanted, list):
        if not isinstance(found, list) or sorted(map(json.dumps, wanted)) != sorted(map(json.dumps, found)):
            yield f"{place}: {found!r} in place of {wanted!r}"
    elif wanted != found:
        yield f"{place}: {found!r} in place of {wanted!r}"


@pytest.mark.parametrize("name", CONTRACT["components"]["schemas"])
def test_each_schema_of_the_contract_is_ours(name: str) -> None:
    wanted, found = CONTRACT["components"]["schemas"][name], OURS["components"]["schemas"][name]
    assert list(missing({k: v for k, v in wanted.items() if k != "required"}, found)) == []
    assert set(wanted.get("required", ())) <= set(found.get("required", ())) or name not in ANSWERS
    if name not in ANSWERS:
        assert set(found.get("required", ())) == set(wanted.get("required", ())), "who keeps to the contract would be refused"


ANSWERS = {"Action", "ApiError", "StatusResponse", "CheckpointOperationStatus"}


@pytest.mark.parametrize("path", CONTRACT["paths"])
def test_each_operation_of_the_contract_is_ours(path: str) -> None:
    for method, wanted in CONTRACT["paths"][path].items():
        found = OURS["paths"][path][method]
        rest = {key: value for key, value in wanted.items() if key != "parameters"}
        assert list(missing(rest, found, f"{method} {path}")) == []
        ours = {(each["name"], each["in"]): each for each in found.get("parameters", ())}
        for parameter in wanted.get("parameters", ()):
            assert list(missing(parameter, ours[parameter["name"], parameter["in"]])) == []


def test_who_may_ask_is_said_as_in_the_contract() -> None:
    assert OURS["components"]["securitySchemes"] == CONTRACT["components"]["securitySchemes"]
    assert OURS["security"] == CONTRACT["security"]
    for path, operations in OURS["paths"].items():
        for operation in operations.values():
            wanted = CONTRACT["security"] if path.startswith("/v2/") else []  # a probe has no token
            assert operation.get("security", OURS["security"]) == wanted, path


def test_every_operation_says_which_errors_it_has() -> None:
    for path, operations in OURS["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], path
            if path.startswith("/v2/"):
                assert {"401", "429", "500"} <= operation["responses"].keys(), f"{method} {path}"


def test_a_contract_that_is_broken_is_seen() -> None:
    broken = json.loads(json.dumps(CONTRACT["components"]["schemas"]["Action"]))
    del broken["properties"]["gpu"]
    broken["properties"]["status"] = {"type": "integer"}
    found = list(missing(CONTRACT["components"]["schemas"]["Action"], broken))
    assert found == [".properties.gpu is missing", ".properties.status.type: 'integer' in place of 'string'"]
