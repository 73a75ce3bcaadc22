"""Who comes in, how often, and with how much: tokens, rates, the size of a body; and what every answer has on it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog

from hibernode.api.db import Database, Token, dumps
from hibernode.config import Api
from hibernode.errors import Refused
from hibernode.loop import in_thread

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

REMEMBERED = 30.0  # seconds a token that was in the database needs not be looked up again; so long a removed one still opens
PER_ADDRESS = 10  # times the rate of a token that one address has
BUCKETS = 10_000  # callers whose rate is remembered; the one that came longest ago is forgotten first
PREFIX = "hn_"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_log = structlog.get_logger("hibernode.api")


def new_token() -> str:
    """256 random bits, in a form that scanners for leaked secrets can know."""
    return PREFIX + secrets.token_urlsafe(32)


def hashed(token: str) -> str:
    """How it is kept. It is random and long: nobody guesses it, and a slow hash would only slow us."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """Those of the configuration and those of the database."""

    def __init__(self, settings: Api, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.wanted = settings.auth == "token"
        self._database, self._clock = database, clock
        self._fixed = {token.sha256: token for token in map(_configured, settings.tokens)}
        self._known: dict[str, tuple[Token, float]] = {}

    async def holder(self, secret: str) -> Token | None:
        """Whose it is; None for one that opens nothing. May raise DatabaseUnavailable."""
        sha256, now = hashed(secret), self._clock()
        if (fixed := self._fixed.get(sha256)) is not None:
            return fixed
        known = self._known.get(sha256)
        if known is None or known[1] < now:
            found = await in_thread(self._database.token, sha256)
            if found is None:
                self._known.pop(sha256, None)
                return None
            known = self._known[sha256] = (found, now + REMEMBERED)
        token = known[0]
        return None if token.expires_at and token.expires_at < now else token


def _configured(text: str) -> Token:
    name, _, sha256 = text.partition(":")
    if not name or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise Refused(
            "config", "api.tokens has an entry that is no token", prop="api.tokens", found="(hidden)", wanted="name:sha256 in hex",
            hint="`hibernode api token new NAME` prints one",
        )  # fmt: skip
    return Token(name=name, sha256=sha256)


class Rates:
    """So many at once, and so many each second in the long run, of each caller."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> (left, when)

    def wait(self, caller: str) -> float:
        """0: it may; else the seconds until it may."""
        now = self._clock()
        left, then = self._left.pop(caller, (float(self._burst), now))
        left = min(float(self._burst), left + (now - then) * self._rate)
        allowed = left >= 1
        self._left[caller] = (left - 1 if allowed else left, now)
        while len(self._left) > BUCKETS:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._rate


class TooLarge(Exception):
    """A body of more bytes than are taken."""


class Guard:
    """Stands before the whole application."""

    def __init__(self, app: App, settings: Api, observe: Callable[[str, str, int, float], None]) -> None:
        self._app, self._limit, self._observe = app, int(settings.body_limit), observe
        # Many may come from one address, by a proxy: who a token belongs to is asked later, and has a rate of its own (`problems.door`).
        self._rates = Rates(PER_ADDRESS * settings.rate, PER_ADDRESS * settings.burst)
        self._hosts = ("127.0.0.1", "localhost", "::1") if settings.auth == "none" else ()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else str(uuid.uuid4())
        began, status = time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name for name, _ in message["headers"]}
                more = [(name, value) for name, value in _HEADERS if name not in names]
                message["headers"] = [*message["headers"], *more, (b"x-request-id", request_id.encode())]
            await send(message)

        structlog.contextvars.bind_contextvars(request=request_id)
        try:
            await self._guarded(scope, receive, answer, headers)
        finally:
            structlog.contextvars.unbind_contextvars("request")
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "operation_id", None) or "other"
            self._observe(scope["method"], route, status, seconds)
            _say(status, scope["method"])(
                "request", request=request_id, method=scope["method"], path=scope["path"], status=status,
                seconds=round(seconds, 4), by=scope.get("state", {}).get("caller"),
            )  # fmt: skip

    async def _guarded(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, headers: dict[bytes, str]) -> None:
        if self._hosts and headers.get(b"host", "").rpartition(":")[0].strip("[]") not in self._hosts:
            await _refuse(
                send, 400, "host", "without tokens only this machine's own names are answered"
            )  # DNS can be made to name us
            return
        if wait := self._rates.wait(str((scope.get("client") or ("",))[0])):
            await _refuse(send, 429, "too_many_requests", "too many requests", retry_after=wait)
            return
        with contextlib.suppress(ValueError):
            if int(headers.get(b"content-length", "0")) > self._limit:
                await self._too_large(send)
                return
        size, started, too_large = 0, False, False

        async def counted() -> Message:
            nonlocal size, too_large
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                too_large = True  # the application may take the error for one of its own
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if too_large and not started:
                return  # what the application makes of it: a body that cannot be read
            started = True
            await send(message)

        with contextlib.suppress(TooLarge):
            await self._app(scope, counted, noted)
        if too_large and not started:
            await self._too_large(send)

    async def _too_large(self, send: Send) -> None:
        await _refuse(send, 413, "too_large", f"the body has more than {self._limit} bytes")


def _say(status: int, method: str) -> Callable[..., None]:
    """What changes something is told; who only looks, as the page does every other second, only to who wants to know."""
    if status >= 500:
        return _log.warning  # type: ignore[no-any-return]
    return _log.info if status >= 400 or method != "GET" else _log.debug  # type: ignore[no-any-return]


async def _refuse(send: Send, status: int, code: str, message: str, retry_after: float = 0.0) -> None:
    body = dumps({"code": str(status), "message": message, "details": {"code": code}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after:
        headers.append((b"retry-after", str(max(1, round(retry_after))).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
