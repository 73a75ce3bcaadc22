"""The document of the API: what FastAPI makes of the routes, with what it cannot know: which errors there are, which answer leads where,
and the contract's way to write that something may be null. A test compares it with the contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from hibernode.api.schema import ApiError

_READ = {401: "No valid token", 429: "Too many requests"}
_WRITE = {**_READ, 403: "The token may only read", 413: "The body is too large"}
_BUS = "The event stream or the database does not answer"
ERRORS: dict[str, dict[int, str]] = {
    "list": {**_READ, 400: "Failed list", 500: "Failed to connect/fetch from jobs table from database"},
    "latest_pod_action_id": {
        **_READ,
        404: "Failed to get action_id for the given pod_id",
        500: "Failed to connect/fetch from pods_to_actions table from database",
    },
    "upload_podspec": {
        **_WRITE,
        404: "Failed to get action_id within the db",
        500: "Failed to connect/fetch from pods_to_actions table from database",
    },
    "get_latest_checkpoint_for_container_in_action": {
        **_READ,
        400: "Failed to get action for request",
        500: "Failed to connect/fetch from jobs table from database",
    },
    "checkpoint_pod": {
        **_WRITE,
        400: "Invalid request parameters",
        404: "Failed to find checkpointable resource",
        500: "Failed to create checkpoint or connect to eventstream",
    },
    "get_checkpoint_status": {**_READ, 404: "Action ID not found", 500: "Failed to retrieve status from database"},
    "restore_pod": {
        **_WRITE,
        400: "Invalid action_id or request parameters",
        500: "Failed to create restore or connect to eventstream",
    },
    "action_details": {**_READ, 404: "Action ID not found", 500: "The database does not answer"},
    "cancel_action": {**_WRITE, 400: "The action has ended", 404: "Action ID not found", 500: _BUS},
    "list_checkpoints": {**_READ, 400: "Failed list", 500: "The database does not answer"},
    "leave_node": {**_WRITE, 400: "Invalid request parameters", 404: "Nobody has seen this node", 500: _BUS},
    "list_heartbeats": {**_READ, 500: "The database does not answer"},
    "put_heartbeat": {**_WRITE, 400: "Invalid request parameters", 500: "The database does not answer"},
    "remove_heartbeat": {**_WRITE, 404: "There is no such heartbeat", 500: "The database does not answer"},
    "list_nodes": {**_READ, 500: _BUS},
}
_FILES_ACTION = ("checkpoint_pod", "restore_pod")  # the answer is an action's id


def install(app: FastAPI) -> None:
    """`/openapi.json` gives this document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # as FastAPI wants it done


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(
        title=app.title, version=app.version, summary=app.summary, openapi_version="3.1.0", routes=app.routes,
        tags=[{"name": "Actions", "description": "Checkpoint and restore"}, {"name": "Health", "description": "For probes"}],
    )  # fmt: skip
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["ApiError"] = ApiError.model_json_schema()
    found["security"] = [{"Token": []}]
    for operation in _operations(found):
        responses = operation["responses"]
        responses.pop("422", None)
        for status, what in sorted(ERRORS.get(operation["operationId"], {}).items()):
            responses[str(status)] = {"description": what, "content": _json_content("ApiError")}
    for operation in _operations(found):
        _link(operation)
        if "Health" in operation["tags"]:
            operation["security"] = []  # for probes, which have no token
    return _plain(found)  # type: ignore[no-any-return]


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def _json_content(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _link(operation: dict[str, Any]) -> None:
    """Whose answer names something that can be asked for next."""
    name = operation["operationId"]
    links: dict[str, Any] = {}
    if name == "list_nodes":
        links["checkpoint_pod"] = {
            "operationId": "checkpoint_pod",
            "requestBody": {"pod_id": "$response.body#/0/workloads/0/uid"},
        }
    elif name == "put_heartbeat":
        links["remove_heartbeat"] = {"operationId": "remove_heartbeat", "parameters": {"heartbeat_id": "$response.body"}}
    elif name in (*_FILES_ACTION, "list", "list_checkpoints"):
        place = "$response.body" if name in _FILES_ACTION else "$response.body#/0/action_id"
        targets = ("get_checkpoint_status", "action_details", *(("cancel_action",) if name in _FILES_ACTION else ()))
        links |= {target: {"operationId": target, "parameters": {"action_id": place}} for target in targets}
        if name == "list_checkpoints":
            links["restore_pod"] = {"operationId": "restore_pod", "requestBody": {"action_id": place, "reason": "manual"}}
    if links:
        operation["responses"]["200"]["links"] = links


def _plain(value: Any) -> Any:
    """Without generated titles, and nullable things as the contract writes them."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    named = {
        key: _plain(each)
        for key, each in value.items()
        if not (key == "title" and isinstance(each, str) and "version" not in value)
    }
    choices = named.get("anyOf")
    if isinstance(choices, list) and len(choices) == 2 and {"type": "null"} in choices:
        (other,) = (choice for choice in choices if choice != {"type": "null"})
        rest = {
            key: each for key, each in named.items() if key not in ("anyOf", "default") or (key == "default" and each is not None)
        }
        if "$ref" in other:
            return {**rest, "oneOf": [{"type": "null"}, other]}
        return {**rest, **other, "type": [other["type"], "null"]}
    return named
