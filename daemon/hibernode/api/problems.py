"""Who may come in, and which error is which status: `ApiError` bodies for all of them, no traceback for anybody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match

from hibernode.api import schema
from hibernode.api.guard import Rates, Tokens
from hibernode.errors import DatabaseUnavailable, HibernodeError, NotFound, Permanent

_BEARER = HTTPBearer(scheme_name="Token", auto_error=False)
_log = structlog.get_logger("hibernode.api")


class _Unauthorized(Exception):
    """No token, or one that opens nothing."""


class _Forbidden(Exception):
    """A token that may only read."""


# --- who may ----------------------------------------------------------------------------------------------------------------


class _TooMany(Exception):
    """This token has had its share; `wait` seconds until the next."""

    def __init__(self, wait: float) -> None:
        super().__init__()
        self.wait = wait


def door(tokens: Tokens, rates: Rates) -> Callable[..., Awaitable[None]]:
    async def enter(request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        if not tokens.wanted:
            request.state.caller = "anybody"
            return
        holder = await tokens.holder(given.credentials) if given is not None else None
        if holder is None:
            raise _Unauthorized
        request.state.caller = holder.name
        if wait := rates.wait(holder.name):
            raise _TooMany(wait)
        if holder.read_only and request.method != "GET":
            raise _Forbidden

    return enter


# --- errors -----------------------------------------------------------------------------------------------------------------


def error(status: int, message: str, details: dict[str, Any], **headers: str) -> JSONResponse:
    body = schema.ApiError(code=str(status), message=message, details=details)
    return JSONResponse(body.model_dump(mode="json"), status, headers)


def _status_of(problem: HibernodeError) -> int:
    if isinstance(problem, NotFound):
        return 404
    return 400 if isinstance(problem, Permanent) and problem.code != "internal" else 500


def install(app: FastAPI) -> None:
    @app.exception_handler(HibernodeError)
    async def known(_request: Request, problem: HibernodeError) -> Response:
        details = {"code": problem.code, "hint": problem.hint, "retry": problem.retry, **problem.details}
        message = problem.message
        if isinstance(problem, DatabaseUnavailable):  # what it says of its address and login is for the log alone
            _log.warning("the database does not answer", error=message)
            message = "the database does not answer"
        return error(_status_of(problem), message, schema.sayable(details))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, problem: RequestValidationError) -> Response:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        details = {"code": "bad_command", "property": place, "found": repr(first.get("input"))[:200], "wanted": first["msg"]}
        # The contract has no 400 here: what cannot be read names no action that there is.
        status = 404 if request.url.path == "/v2/actions/upload" else 400
        return error(status, f"{place}: {first['msg'].lower()}", schema.sayable(details))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, problem: HTTPException) -> Response:
        upload = request.url.path == "/v2/actions/upload" and problem.status_code in (400, 415)
        status = 404 if upload else problem.status_code
        headers = {**(problem.headers or {}), **({"Allow": _methods(request)} if status == 405 else {})}
        return error(status, str(problem.detail).lower(), {"code": _CODES.get(status, "http")}, **headers)

    @app.exception_handler(_Unauthorized)
    async def unauthorized(_request: Request, _problem: _Unauthorized) -> Response:
        details = {"code": "unauthorized", "hint": "Authorization: Bearer TOKEN; `hibernode api token new NAME` makes one"}
        return error(401, "no valid token", details, **{"WWW-Authenticate": "Bearer"})

    @app.exception_handler(_Forbidden)
    async def forbidden(_request: Request, _problem: _Forbidden) -> Response:
        return error(403, "this token may only read", {"code": "read_only"})

    @app.exception_handler(_TooMany)
    async def too_many(_request: Request, problem: _TooMany) -> Response:
        details = {"code": "too_many_requests"}
        return error(429, "too many requests", details, **{"Retry-After": str(max(1, round(problem.wait)))})

    @app.exception_handler(Exception)
    async def defect(request: Request, problem: Exception) -> Response:
        _log.error("defect", path=request.url.path, exc_info=problem)
        return error(500, "an internal error; the server's log has it", {"code": "internal"})


def _methods(request: Request) -> str:
    """What this path takes. The error names the methods of one route; a path may have several."""
    scopes = {method: {**request.scope, "method": method} for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")}
    routes = request.app.routes
    return ", ".join(name for name, scope in scopes.items() if any(each.matches(scope)[0] == Match.FULL for each in routes))


_CODES = {400: "bad_command", 404: "no_such_path", 405: "method", 415: "media_type"}
