"""The routes: read what is asked, ask `control` or the database, write the answer. Which error is which status stands in one place."""

from __future__ import annotations

import base64
import binascii
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import structlog
from fastapi import APIRouter, FastAPI, Header, Query, Request, Security
from fastapi.responses import FileResponse, PlainTextResponse, Response

from hibernode import __version__
from hibernode.api import heartbeats, openapi, problems, schema
from hibernode.api.actions import Action
from hibernode.api.control import Control
from hibernode.api.db import Database, Filters
from hibernode.api.follow import Progresses
from hibernode.api.guard import Rates, Tokens, hashed
from hibernode.api.leave import Departures
from hibernode.api.metrics import Metrics
from hibernode.errors import BadCommand, NotFound, Refused
from hibernode.loop import in_thread
from hibernode.model import NodeRecord, Status

PAGE = 200  # rows of a list, unless more or fewer are asked for
PAGE_LIMIT = 1000
_log = structlog.get_logger("hibernode.api")

Limit = Annotated[int, Query(ge=1, le=PAGE_LIMIT, description="Rows at most; the header Link says where the next ones are")]
Before = Annotated[str | None, Query(max_length=200, description="Only what is older: from the header Link of the page before")]
Key = Annotated[
    str, Header(alias="Idempotency-Key", max_length=200, description="The same key again: the same action, which is filed once")
]


@dataclass(frozen=True)
class Parts:
    """What the routes ask."""

    control: Control
    database: Database
    departures: Departures
    tokens: Tokens
    rates: Rates
    progresses: Progresses
    metrics: Metrics
    ready: Callable[[], Awaitable[dict[str, str]]]  # what is wrong, by part; "ok" where nothing is


def make(parts: Parts) -> FastAPI:
    """The application, without what stands before it (`guard.Guard`)."""
    app = FastAPI(
        title="hibernode Actions API", version=__version__, openapi_url="/openapi.json", docs_url=None, redoc_url=None,
        summary="Checkpoint and restore of workloads on GPU nodes", separate_input_output_schemas=False, redirect_slashes=False,
    )  # fmt: skip
    app.include_router(_v2(parts))
    app.include_router(_health(parts))
    problems.install(app)
    openapi.install(app)
    _serve_page(app)
    return app


def _serve_page(app: FastAPI) -> None:
    """Each of its files by name. Nothing is mounted at `/`: it would answer for every path that has another method."""
    for file in sorted((Path(__file__).parent / "page").iterdir()):
        serve = functools.partial(_file, file)
        for path in ("/", "/index.html") if file.name == "index.html" else (f"/{file.name}",):
            app.router.add_route(path, serve, methods=["GET"], include_in_schema=False)


async def _file(file: Path, _request: Request) -> Response:
    return FileResponse(file, headers={"Cache-Control": "no-cache"})  # it is asked whether it has changed


# --- the routes -------------------------------------------------------------------------------------------------------------


def _v2(parts: Parts) -> APIRouter:
    router = APIRouter(prefix="/v2", tags=["Actions"], dependencies=[Security(problems.door(parts.tokens, parts.rates))])
    for add in (_add_actions, _add_checkpoints, _add_nodes, _add_heartbeats):
        add(router, parts)
    return router


def _add_actions(router: APIRouter, parts: Parts) -> None:
    control, database = parts.control, parts.database

    @router.get("/actions", operation_id="list", summary="List actions")
    async def list_actions(
        request: Request, response: Response, type: str | None = None, status: str | None = None, node: str | None = None,  # noqa: A002
        namespace: str | None = None, pod_name: str | None = None, pod_id: str | None = None, limit: Limit = PAGE,
        before: Before = None,
    ) -> list[schema.Action]:  # fmt: skip
        """The newest first."""
        _insist_known("type", type, ("checkpoint", "restore"))
        _insist_known("status", status, tuple(Status))
        given = {"type": type, "status": status, "node": node, "namespace": namespace, "pod_name": pod_name, "pod_id": pod_id}
        filters = Filters(**{name: _storable(name, value) for name, value in given.items() if value})
        rows = await in_thread(database.newest, filters, limit + 1, _place(before))
        return [schema.action(row, parts.progresses.get(row.action_id)) for row in _paged(request, response, rows, limit)]

    @router.get("/actions/from_pod/{id}", operation_id="latest_pod_action_id", response_class=PlainTextResponse,
                summary="Get latest action belonging to a pod")  # fmt: skip
    async def from_pod(id: str) -> str:  # noqa: A002 - the contract's name
        """By the pod's UID."""
        found = await in_thread(database.latest_of_pod, id) if id.isprintable() else ""
        if not found:
            raise NotFound(
                f"no action belongs to a pod with UID {id[:100]!r}", property="id", found=id[:100], wanted="a pod's UID"
            )
        return found

    @router.post("/actions/upload", operation_id="upload_podspec", response_class=PlainTextResponse, summary="Upload pod spec")
    async def upload(given: schema.CheckpointStatusWithPodSpec) -> str:
        """Keep a pod's spec, metadata and volume claim with an action. Its status moves where that is a step forward that is not the
        node's alone to say: never to `ready` or `error`."""
        return await control.upload(given)

    @router.get("/actions/{action_id:uuid}", operation_id="action_details", summary="Get one action with its events and phases")
    async def details(action_id: UUID) -> schema.ActionDetails:
        row = await control.action(str(action_id))
        events = await in_thread(database.events, row.action_id)
        return schema.action_details(row, events, parts.progresses.get(row.action_id))

    @router.post("/actions/{action_id:uuid}/cancel", operation_id="cancel_action", status_code=202,
                 response_class=PlainTextResponse, summary="Cancel an action")  # fmt: skip
    async def cancel(action_id: UUID) -> str:
        """Its node is asked to stop it; the workload runs on. How it ended is told by the action's status."""
        await control.cancel(str(action_id))
        return str(action_id)

    @router.get("/checkpoint/status/{action_id}", operation_id="get_checkpoint_status", summary="Get status of checkpoint action")
    async def status_of(action_id: str) -> schema.StatusResponse:
        """Returns the current status of a checkpoint action; or of a restore."""
        row = await control.action(action_id)
        said = f"{row.message} (hint: {row.hint})" if row.hint else row.message
        return schema.StatusResponse(status=row.status.value, details=said or None)


def _add_checkpoints(router: APIRouter, parts: Parts) -> None:
    control, database = parts.control, parts.database

    @router.get("/checkpoint/path", operation_id="get_latest_checkpoint_for_container_in_action",
                response_class=PlainTextResponse, summary="Get path of latest checkpoint")  # fmt: skip
    async def path(
        name: Annotated[str, Query(description="A pod: its name, namespace/name or UID; or the id of an action")],
    ) -> str:
        """Returns the path of the latest successful checkpoint for a given checkpoint name."""
        found = await in_thread(database.latest_checkpoint, _storable("name", name))
        if found is None or not found.location:
            raise BadCommand(
                f"no checkpoint of {name[:100]!r} is ready", property="name", found=name[:100],
                wanted="a pod's name, namespace/name or UID, or an action", hint="`GET /v2/checkpoints` lists them",
            )  # fmt: skip
        return found.location

    @router.get("/checkpoints", operation_id="list_checkpoints", summary="List what can be restored")
    async def checkpoints(
        request: Request, response: Response, limit: Limit = PAGE, before: Before = None
    ) -> list[schema.Checkpoint]:
        """The newest first."""
        rows = await in_thread(database.checkpoints, limit + 1, _place(before))
        return [schema.checkpoint(row) for row in _paged(request, response, rows, limit)]

    @router.post("/checkpoint/pod", operation_id="checkpoint_pod", response_class=PlainTextResponse, summary="Checkpoint pod")
    async def checkpoint_pod(request: Request, wanted: schema.CheckpointPod, idempotency_key: Key = "") -> str:
        """Checkpoint a running pod; it goes on. The answer is the id of the action, which has begun when this returns, not ended."""
        return await control.checkpoint_pod(wanted, _key(request, idempotency_key, wanted))

    @router.post("/restore/pod", operation_id="restore_pod", response_class=PlainTextResponse, summary="Restore pod")
    async def restore_pod(request: Request, wanted: schema.RestorePod, idempotency_key: Key = "") -> str:
        """Restore what an action has saved, on the node that suits it best. The answer is the id of a new action."""
        return await control.restore_pod(wanted, _key(request, idempotency_key, wanted))


def _add_nodes(router: APIRouter, parts: Parts) -> None:
    control, database = parts.control, parts.database

    @router.get("/nodes", operation_id="list_nodes", summary="List nodes")
    async def nodes() -> list[schema.NodeView]:
        """Every node that was ever seen, with what it last said of itself."""
        alive = await control.nodes()
        return await in_thread(_listed, alive, await in_thread(database.nodes, control.cluster))

    @router.post("/nodes/{node}/leave", operation_id="leave_node", status_code=202, summary="Move the pods of a node elsewhere")
    async def leave(node: str, wanted: schema.NodeLeave) -> list[schema.Move]:
        """Begin to move every managed pod of this node: each is checkpointed, ended, and restored on another. Where the node is silent and
        the reason is `nodeTermination`, the pod's latest ready checkpoint is restored. Asking again shows how far they are."""
        return [schema.move(each) for each in await parts.departures.leave(node, wanted.reason)]


def _add_heartbeats(router: APIRouter, parts: Parts) -> None:
    control, database = parts.control, parts.database

    @router.get("/heartbeats", operation_id="list_heartbeats", summary="List periodic checkpoints")
    async def list_heartbeats() -> list[schema.Heartbeat]:
        """Those of the configuration, those made here, and those that pods ask for by their annotations."""
        return [schema.heartbeat(each) for each in await in_thread(database.heartbeats, control.cluster)]

    @router.post(
        "/heartbeats", operation_id="put_heartbeat", response_class=PlainTextResponse, summary="Checkpoint a pod periodically"
    )
    async def put(wanted: schema.HeartbeatPolicy) -> str:
        """Make one for this pod, or give the one it has other settings. The first checkpoint is made at once."""
        made = heartbeats.of_policy(wanted, control.cluster, time.time())
        await in_thread(database.put_heartbeat, made)
        return made.heartbeat_id

    @router.delete("/heartbeats/{heartbeat_id:uuid}", operation_id="remove_heartbeat", response_class=PlainTextResponse,
                   summary="End periodic checkpoints of a pod")  # fmt: skip
    async def remove(heartbeat_id: UUID) -> str:
        """Its checkpoints stay. What a pod's annotations ask for cannot be ended here."""
        found = await in_thread(database.heartbeat, str(heartbeat_id))
        if found is not None and found.annotated:
            raise Refused(
                "annotated", f"pod {found.namespace}/{found.pod_name} asks for it by its annotations", prop="heartbeat_id",
                found="by annotation", wanted="one of the table",
                hint="make the pod without hibernode.io/heartbeat, make a heartbeat of your own for it, or set api.annotations = false",
            )  # fmt: skip
        if not await in_thread(database.remove_heartbeat, str(heartbeat_id)):
            raise NotFound(f"there is no heartbeat {heartbeat_id}", hint="`GET /v2/heartbeats` lists them")
        return str(heartbeat_id)


def _health(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["Health"])

    @router.get("/healthz", operation_id="health", response_class=PlainTextResponse, summary="Is this process alive?")
    async def health() -> str:
        return "ok"

    @router.get("/readyz", operation_id="readiness", summary="Do database and event stream answer?")
    async def readiness(response: Response) -> schema.Health:
        checks = await parts.ready()
        ready = all(check == "ok" for check in checks.values())
        response.status_code = 200 if ready else 503
        return schema.Health(ready=ready, checks=checks)

    @router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse, summary="For Prometheus")
    async def metrics() -> Response:
        return Response(parts.metrics.page(), media_type="text/plain; version=0.0.4")

    return router


# --- what is asked for ---------------------------------------------------------------------------------------------------------


def _key(request: Request, key: str, wanted: schema.Request) -> str:
    """One caller's, for one request: nobody gets another's action by guessing, nor his own for something else."""
    return f"{request.state.caller} {key} {hashed(wanted.model_dump_json())}" if key else ""


def _insist_known(name: str, value: str | None, known: Sequence[str]) -> None:
    if value is not None and value not in known:
        raise BadCommand(f"{name} is not known", property=name, found=value[:100], wanted=", ".join(known))


def _storable(name: str, value: str) -> str:
    """No database of ours holds a NUL."""
    if "\0" in value:
        raise BadCommand(f"{name} has a character that no name has", property=name, found=value[:100], wanted="a name")
    return value


def _listed(alive: dict[str, NodeRecord], seen: dict[str, tuple[float, dict[str, Any]]]) -> list[schema.NodeView]:
    """Those that are alive as they are, the others as they were."""
    known = {name: (record.time, record) for name, record in alive.items()}
    for name in seen.keys() - alive.keys():
        at, said = seen[name]
        if (record := _record(said)) is not None:
            known[name] = at, record
    return [schema.node(record, at, alive=name in alive) for name, (at, record) in sorted(known.items())]


def _record(said: dict[str, Any]) -> NodeRecord | None:
    """None for one that another version has written."""
    try:
        return NodeRecord.model_validate(said)
    except ValueError:
        return None


# --- pages of a list ----------------------------------------------------------------------------------------------------------


def _paged(request: Request, response: Response, rows: list[Action], limit: int) -> list[Action]:
    """The first `limit` of one more than that, and where the next ones are."""
    if len(rows) > limit:
        last = rows[limit - 1]
        mark = base64.urlsafe_b64encode(f"{last.created_at!r} {last.action_id}".encode()).decode()
        url = request.url.include_query_params(before=mark)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return rows[:limit]


def _place(before: str | None) -> tuple[float, str] | None:
    if not before:
        return None
    try:
        moment, _, action_id = base64.urlsafe_b64decode(before.encode()).decode().partition(" ")
        place = (float(moment), action_id)
        if place[0] != place[0] or "\0" in action_id:
            raise ValueError(before)
    except (ValueError, binascii.Error) as e:
        raise BadCommand(
            "before is no place in a list", property="before", found=before[:100], wanted="from a header Link"
        ) from e
    return place
