"""The API server: builds its parts by hand, in order, and runs them until SIGTERM. The bus comes from `__main__`, which knows the
drivers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

from hibernode import __version__
from hibernode.api import app
from hibernode.api.app import Parts
from hibernode.api.control import Control
from hibernode.api.db import Database
from hibernode.api.follow import Progresses, follow
from hibernode.api.guard import Guard, Rates, Tokens
from hibernode.api.heartbeats import Heartbeats
from hibernode.api.leave import Departures
from hibernode.api.metrics import Metrics
from hibernode.api.migrate import migrate
from hibernode.api.rounds import Rounds
from hibernode.api.writer import Writer, Written
from hibernode.bus import ControlBus
from hibernode.config import Api, Config
from hibernode.errors import DatabaseUnavailable, Refused
from hibernode.loop import Tasks, in_thread

GRACE = 10  # seconds for requests that are being answered, when the server stops
TURN = (
    0.0005  # seconds a thread computes while another one waits; Python's own 0.005 is what each answer of the database then costs
)
_BUS_RETRY = 30.0  # seconds until a broker that refused us is asked again
_DATABASE_RETRY = 1.0  # seconds
_log = structlog.get_logger("hibernode.api")


def run(settings: Config, bus: ControlBus) -> None:
    """Until SIGTERM or SIGINT. Raises what keeps it from starting."""
    host, port = _place(settings)
    server = Server(settings, bus)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    server.migrate()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ended)  # uvicorn stops in order for either, and raises it again when it has: that is no failure
    sys.setswitchinterval(TURN)
    gc.collect()
    gc.freeze()  # what is there now stays: without this each full collection looks at all of it, and an answer waits 0.1 s
    uvicorn.run(
        server.asgi, host=host, port=port, log_config=None, access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=GRACE, ssl_certfile=settings.api.tls_cert or None, ssl_keyfile=settings.api.tls_key or None,
    )  # fmt: skip


def _ended(_number: int, _frame: object) -> None:
    pass


def document() -> dict[str, Any]:
    """Of the API, without a server."""
    nobody: Any = None  # is asked
    return app.make(Parts(nobody, nobody, nobody, Tokens(Api(), nobody), nobody, nobody, nobody, nobody)).openapi()


def database_of(settings: Config) -> Database:
    return Database(settings.api.database.get_secret_value() or f"sqlite:///{settings.state_dir}/api.sqlite")


class Server:
    """One of any number on one database and one event stream."""

    def __init__(self, settings: Config, bus: ControlBus) -> None:
        self._settings, self._bus = settings, bus
        self.database = database_of(settings)
        self.control = Control(settings, self.database, bus)
        self._writers = [Writer(self.database.url, settings.cluster) for _ in range(self.database.writers)]
        self._progresses = Progresses()
        self._metrics = Metrics(__version__, lambda: bus.connected)
        self._heartbeats = Heartbeats(settings, self.database, self.control)
        self.departures = Departures(settings, self.database, self.control, lambda: self._rounds.heard_since)
        self._rounds = Rounds(settings, self.database, self.control, (self._heartbeats.round, self.departures.round))
        parts = Parts(
            control=self.control,
            database=self.database,
            departures=self.departures,
            tokens=Tokens(settings.api, self.database),
            rates=Rates(settings.api.rate, settings.api.burst),
            progresses=self._progresses,
            metrics=self._metrics,
            ready=self.ready,
        )
        self.application = app.make(parts)
        self.application.router.lifespan_context = self._life
        self.asgi = Guard(self.application, settings.api, self._metrics.request)

    def migrate(self) -> None:
        """Bring the database to this version, as soon as it is there. Refused if it is another cluster's."""
        while True:
            try:
                _log.info("database", version=migrate(self.database))
                others = self.database.clusters() - {self._settings.cluster}
                break
            except DatabaseUnavailable as e:
                _log.warning("the database is waited for", error=e.message)
                time.sleep(_DATABASE_RETRY)
        if others:
            raise Refused(
                "config", "the database has the actions of another cluster", prop="cluster", found=", ".join(sorted(others)),
                wanted=self._settings.cluster, hint="a database of its own for each cluster",
            )  # fmt: skip

    @contextlib.asynccontextmanager
    async def _life(self, _app: FastAPI) -> AsyncIterator[None]:
        tasks = Tasks()
        tasks.spawn(self._serve(tasks))
        _log.info("ready", cluster=self._settings.cluster, listen=self._settings.api.listen, version=__version__)
        try:
            yield
        finally:
            await tasks.cancel()
            await self._bus.stop()
            self.database.close()

    async def _serve(self, tasks: Tasks) -> None:
        """Once the broker is there; until then questions that need only the database are answered."""
        while True:
            try:
                await self._bus.start()
                break
            except Refused as e:
                _log.error("the broker refuses this server", code=e.code, error=e.message, hint=e.hint, again_in=_BUS_RETRY)
                await asyncio.sleep(_BUS_RETRY)
        await self._configure()
        for work in (
            lambda: follow(self._bus, self._writers, self._kept),
            lambda: self._progresses.follow(self._bus),
            self._rounds.run,
        ):
            tasks.spawn(_for_ever(work))

    async def _configure(self) -> None:
        while True:
            try:
                return await self._heartbeats.configure()
            except DatabaseUnavailable as e:
                _log.warning("the database is waited for", error=e.message)
                await asyncio.sleep(_DATABASE_RETRY)

    def _kept(self, kept: Written) -> None:
        self._metrics.events(kept.counts)
        self._progresses.forget(kept.ended)

    async def ready(self) -> dict[str, str]:
        """What is wrong, by part."""
        checks = {"database": "ok", "event_stream": "ok" if self._bus.connected else "not connected"}
        try:
            await in_thread(self.database.ping)
        except DatabaseUnavailable as e:
            _log.warning("not ready", error=e.message)  # for us: anybody may ask
            checks["database"] = "does not answer"
        return checks


async def _for_ever(work: Callable[[], Coroutine[None, None, None]]) -> None:
    """Begin it again when it ends, which only a defect makes it do: a server that answers and hears nothing would be the worse one."""
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - see above
            _log.exception("defect", work="begun again")
        await asyncio.sleep(_DATABASE_RETRY)


def _place(settings: Config) -> tuple[str, int]:
    host, colon, port = settings.api.listen.rpartition(":")
    host = host.strip("[]")
    if not colon or not port.isdigit() or not host:
        raise Refused(
            "config", "api.listen is no address", prop="api.listen", found=settings.api.listen, wanted="host:port",
            hint="127.0.0.1:9466, or 0.0.0.0:9466 for all",
        )  # fmt: skip
    if not settings.bus.url:
        raise Refused(
            "config", "the API needs the event stream", prop="bus.url", found="nothing", wanted="nats://host:port",
            hint="set `url` in [bus]: commands go to nodes by it",
        )  # fmt: skip
    if settings.api.auth == "none" and not _is_loopback(host):
        raise Refused(
            "config", "without tokens anybody who reaches this address could stop workloads", prop="api.auth", found="none",
            wanted="token, or a loopback address in api.listen", hint="`hibernode api token new NAME` makes a token",
        )  # fmt: skip
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
