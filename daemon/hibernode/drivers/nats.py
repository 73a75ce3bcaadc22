"""The bus on NATS: commands in a work queue, events in a stream, node records in a bucket, the rest on core NATS.

What only this file knows: the names of streams, consumers and subjects, and how nats-py and the server behave.

- `HIBERNODE_COMMANDS`, work queue: `hibernode.cmd.<cluster>.<node>.{checkpoint,restore,cancel,delete}`. Each node has one
  durable pull consumer, so that commands wait for a node that is down. A delivery nobody answers within `ack_wait`
  comes again. The server is told to deliver without end (`max_deliver` -1): it would fall silent after the last one,
  whereas whoever takes the commands sees `attempt`, compares it with `bus.max_deliver` and gives up with an answer.
  Every answer to a delivery is confirmed by the server, or raises BusUnavailable.
- `HIBERNODE_EVENTS`, kept for `events_max_age`: `hibernode.evt.<cluster>.<node>.<action_id>`.
- `HIBERNODE_NODES`, a key-value bucket whose keys `<cluster>.<node>` live for `record_ttl` seconds.
- `hibernode.progress.<cluster>.<node>.<action_id>` and `hibernode.find.<cluster>`: not stored.
- `_INBOX.<cluster>.<node>.>`: where a node is answered, so that its login can be kept from reading what others are told.
  `examples/nats-users.conf` has all that a node needs where it makes nothing itself (`bus.make_streams`).

nats-py's own reconnect is off. It keeps what is published meanwhile and sends it later, also after the caller was told
that it failed; it ends for good on some errors of the server; and it can wait for ever on a half-open connection. Here
a `_Link` makes one client after the other and asks each for a sign of life, and a call without a connection fails at
once.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import random
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, BadRequestError, NoStreamResponseError, NotFoundError

from hibernode.bus import Batch, Delivery
from hibernode.config import Bus
from hibernode.errors import BadCommand, BusUnavailable, HibernodeError, Refused
from hibernode.loop import end

COMMANDS = "HIBERNODE_COMMANDS"
EVENTS = "HIBERNODE_EVENTS"
NODES = "KV_HIBERNODE_NODES"  # a bucket is a stream with this prefix and the settings of `_bucket`
RECORDS = "$KV.HIBERNODE_NODES"
VERBS = ("checkpoint", "restore", "cancel", "delete")

CALL = 5.0  # seconds a call may take before it is BusUnavailable
DIAL = 10.0  # seconds to connect: TCP, TLS, login, against the slowest link we mean to serve
ALIVE = 5.0  # seconds between two signs of life; a dead connection is noticed within two of them
PULL = 10.0  # seconds a request for messages waits at the server; the price of losing one unnoticed
PAUSE = 0.2  # seconds until something that failed on a live connection is tried again
RETRY = (0.2, 5.0)  # seconds between two attempts to connect: the first, the longest
DUPLICATES = 3600.0  # seconds the server remembers message ids: of commands; events have their place as well
FOLLOW = 256  # events asked for at once by a follower that does not acknowledge
RECORDS_AT_ONCE = 1000  # node records asked for at once
MOST_NODES = 100_000  # of one broker. A server of 2.15 or later lets a stream have 1,000 consumers, unless the stream says more
GATHER = 0.005  # seconds in which events come together to a batch: each has its cost, and what the broker sends at once is read in parts
OUT = 20  # batches that all servers of one name may have together: more than a few servers, each with one in hand and one on its way
FORGET = 300.0  # seconds until the server removes the place of a follower that is gone
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")
PERMANENT = {10052, 10058, 10065, 10069, 10074}  # the server's codes for settings it will never take

T = TypeVar("T")
log = logging.getLogger("hibernode.bus")

_SLIPS = (AssertionError, AttributeError, LookupError, TypeError, ValueError)  # nats-py's, when a connection ends badly
_TROUBLE = (NatsError, OSError, TimeoutError, HibernodeError, *_SLIPS)


class NatsNode:
    """The node's end: a `bus.NodeBus`. Its records live for `record_ttl` seconds; one loop, like all of this file."""

    def __init__(self, config: Bus, cluster: str, node: str, *, record_ttl: float = 30.0) -> None:
        self._config, self._cluster, self._node = config, _token(cluster, "cluster"), _token(node, "node")
        self._record_ttl = record_ttl
        self._answer: Callable[[bytes], Awaitable[bytes | None]] | None = None
        self._answering: Subscription | None = None
        self._link = _Link(config, f"hibernode node {cluster}.{node}", self._prepare, inbox=f"_INBOX.{cluster}.{node}")

    @property
    def connected(self) -> bool:
        return self._link.connected

    async def start(self) -> None:
        """Wait, for ever if need be, until the broker is there and has our streams. Refused: only a person can help."""
        await self._link.start()

    async def stop(self) -> None:
        await self._link.stop()

    async def _prepare(self, client: Client) -> None:
        if self._config.make_streams:
            for stream in (*_streams(self._config), _bucket(self._config, self._record_ttl)):
                await _ensure(client, stream)
            await _ensure_consumer(client, COMMANDS, self._consumer())
        await self._listen(client)

    def _consumer(self) -> ConsumerConfig:
        return _taker(self._config, self._cluster, self._node)

    async def commands(self) -> AsyncIterator[Delivery]:
        config = self._consumer()
        async for client in self._link.clients():
            with self._link.logged(client, "commands"):
                if self._config.make_streams:
                    await _ensure_consumer(client, COMMANDS, config)
                async with aclosing(_pull(client, COMMANDS, str(config.name), batch=1)) as batches:
                    async for batch in batches:
                        for message in batch:
                            yield _Delivery(self._link, message)

    async def publish_event(self, action_id: str, message_id: str, data: bytes, *, after: int | None = None) -> int:
        subject = f"hibernode.evt.{self._cluster}.{self._node}.{_token(action_id, 'action_id')}"
        return await self._link.store(subject, data, message_id, after)

    async def publish_progress(self, action_id: str, data: bytes) -> None:
        subject = f"hibernode.progress.{self._cluster}.{self._node}.{_token(action_id, 'action_id')}"
        with suppress(BusUnavailable):
            await self._link.publish(subject, data)

    async def put_node(self, data: bytes) -> None:
        await self._link.store(f"{RECORDS}.{self._cluster}.{self._node}", data, "")

    async def nodes(self, node: str = "") -> dict[str, bytes]:
        return await _records(self._link, self._cluster, node)

    async def answer_find(self, answer: Callable[[bytes], Awaitable[bytes | None]]) -> None:
        self._answer = answer
        if self._link.connected:
            with self._link.translated() as client:
                await self._listen(client)

    async def _listen(self, client: Client) -> None:
        """Answer find requests on this connection; the one before took its subscription with it."""
        if self._answer is None or (self._answering is not None and self._answering._conn is client):
            return

        async def reply(message: Msg) -> None:
            if self._answer is not None and (found := await self._answer(message.data)) is not None:
                await client.publish(message.reply, found)

        self._answering = await client.subscribe(f"hibernode.find.{self._cluster}", cb=reply)


class NatsControl:
    """The control plane's end: a `bus.ControlBus`."""

    def __init__(self, config: Bus, cluster: str) -> None:
        self._config, self._cluster = config, _token(cluster, "cluster")
        self._link = _Link(config, f"hibernode control {cluster}", self._prepare)

    @property
    def connected(self) -> bool:
        return self._link.connected

    async def start(self) -> None:
        """Wait, for ever if need be, until the broker is there and has our streams. Refused: only a person can help."""
        await self._link.start()

    async def stop(self) -> None:
        await self._link.stop()

    async def _prepare(self, client: Client) -> None:
        for stream in _streams(self._config):
            await _ensure(client, stream)

    async def admit(self, node: str, *, record_ttl: float = 30.0) -> None:
        consumer = _taker(self._config, self._cluster, _token(node, "node"))
        with self._link.translated() as client:
            await _ensure(client, _bucket(self._config, record_ttl))
            await _ensure_consumer(client, COMMANDS, consumer)

    async def send(self, node: str, verb: str, action_id: str, data: bytes) -> None:
        if verb not in VERBS:
            raise BadCommand(f"there is no command {verb!r}", property="verb", found=verb, wanted=", ".join(VERBS))
        subject = f"hibernode.cmd.{self._cluster}.{_token(node, 'node')}.{verb}"
        await self._link.store(subject, data, f"{_token(action_id, 'action_id')}.{verb}")

    def follow(self, action_id: str = "") -> AsyncIterator[bytes]:
        part = f"*.{_token(action_id, 'action_id')}" if action_id else ">"
        return self._follow(f"hibernode.evt.{self._cluster}.{part}")

    async def _follow(self, subject: str) -> AsyncIterator[bytes]:
        """From the beginning, then live. The place is kept here; every connection gets a consumer of its own."""
        last = 0
        async for client in self._link.clients():
            with self._link.logged(client, "events"):
                consumer = await _follower(client, subject, last)
                async with aclosing(_pull(client, EVENTS, consumer, batch=FOLLOW)) as batches:
                    async for message in _in_order(batches):
                        last = message.metadata.sequence.stream
                        yield message.data

    def follow_batches(self, durable: str, *, limit: int = 500) -> AsyncIterator[Batch]:
        return self._follow_batches(f"{self._cluster}={_token(durable, 'durable')}", limit)

    async def _follow_batches(self, name: str, limit: int) -> AsyncIterator[Batch]:
        """The server keeps the place."""
        config = ConsumerConfig(
            name=name,
            durable_name=name,
            filter_subject=f"hibernode.evt.{self._cluster}.>",
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self._config.ack_wait,
            max_deliver=-1,
            max_ack_pending=OUT * limit,  # of all servers together; beyond it none is given any
        )
        async for client in self._link.clients():
            with self._link.logged(client, "events"):
                await _ensure_consumer(client, EVENTS, config)
                async with aclosing(_pull(client, EVENTS, name, batch=limit, gather=GATHER)) as batches:
                    async for batch in batches:
                        yield _Batch(self._link, batch)

    async def follow_progress(self, action_id: str) -> AsyncIterator[bytes]:
        subject = f"hibernode.progress.{self._cluster}.*.{_token(action_id, 'action_id') if action_id else '*'}"
        async for client in self._link.clients():
            with self._link.logged(client, "progress"):
                subscription = await client.subscribe(subject)
                try:
                    while client.is_connected:
                        for message in await _some(subscription, PULL):
                            yield message.data
                finally:
                    await _unsubscribe(subscription)

    async def find(self, data: bytes, timeout: float, *, enough: int = 0) -> list[bytes]:
        """Without `enough` it waits the whole time, as nobody knows how many nodes there are; ends at once where none listens at all."""
        answers: list[bytes] = []
        ends = asyncio.get_running_loop().time() + timeout
        with self._link.translated() as client:
            inbox = client.new_inbox()
            subscription = await client.subscribe(inbox)
            try:
                await client.publish(f"hibernode.find.{self._cluster}", data, reply=inbox)
                while (left := ends - asyncio.get_running_loop().time()) > 0 and not 0 < enough <= len(answers):
                    messages = await _some(subscription, left)
                    answers += [message.data for message in messages if not _status(message)]
                    if not messages or _status(messages[-1]):
                        break
            finally:
                await _unsubscribe(subscription)
            if not answers and not client.is_connected:
                raise BusUnavailable("the connection to the broker was lost while nodes were asked")
        return answers

    async def nodes(self, node: str = "") -> dict[str, bytes]:
        return await _records(self._link, self._cluster, node)


class _Delivery:
    """A command. Answers go out on whatever connection there is then."""

    def __init__(self, link: _Link, message: Msg) -> None:
        self._link = link
        self._reply = message.reply
        self.verb = message.subject.rpartition(".")[2]
        self.data = message.data
        self.attempt = message.metadata.num_delivered

    async def done(self) -> None:
        await self._link.ask(b"+ACK", self._reply)

    async def later(self, delay: float) -> None:
        when = b" " + json.dumps({"delay": int(delay * 1e9)}).encode() if delay > 0 else b""
        await self._link.ask(b"-NAK" + when, self._reply)

    async def drop(self) -> None:
        await self._link.ask(b"+TERM", self._reply)

    async def working(self) -> None:
        await self._link.ask(b"+WPI", self._reply)


class _Batch:
    """What came together, in the order of the stream and each once: what comes again comes among newer ones."""

    def __init__(self, link: _Link, messages: Sequence[Msg]) -> None:
        places = {_place(message): message for message in messages}
        in_order = [places[place] for place in sorted(places)]
        self._link = link
        self._replies = [message.reply for message in in_order]
        self.events = [message.data for message in in_order]
        self.nodes = [message.subject.split(".")[3] for message in in_order]  # a login may send as one node only

    async def done(self) -> None:
        await self._link.ask(b"+ACK", *self._replies)


def _place(message: Msg) -> int:
    """In its stream. `metadata` says it too, beside all that it reads for it: a tenth of what a batch costs."""
    words = message.reply.split(
        "."
    )  # $JS.ACK, then domain and account where the server is a newer one, ... , and something at the end
    return int(words[5] if len(words) == 9 else words[7])


# --- one connection after the other -----------------------------------------------------------------------------------


class _Link:
    """Makes a client, prepares it, watches it, and makes another when it is lost, until `stop`."""

    def __init__(self, config: Bus, name: str, prepare: Callable[[Client], Awaitable[None]], *, inbox: str = "_INBOX") -> None:
        self._config, self._name, self._prepare, self._inbox = config, name, prepare, inbox
        self._where = ", ".join(_hide(url) for url in config.url.split(","))
        self._client: Client | None = None
        self._lost = asyncio.Event()  # of the client of now
        self._up = asyncio.Event()  # there is a client, or there will never be one again
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[HibernodeError | None] | None = None
        self._said: set[str] = set()  # the troubles logged since the last connection

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    async def start(self) -> None:
        """Returns with the first connection. Cancelling it stops the link."""
        if self._stopped:
            raise BusUnavailable("the bus was stopped")
        if self._first is None or (self._task is not None and self._task.done()):
            self._first = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._run(self._first), name=self._name)
        try:
            error = await asyncio.shield(self._first)
        except asyncio.CancelledError:
            await self.stop()
            raise
        if error is not None:
            raise error

    async def stop(self) -> None:
        self._stopped = True
        if self._task is not None:
            await end({self._task})
        if self._first is not None and not self._first.done():
            self._first.set_result(BusUnavailable("the bus was stopped before it was connected"))
        client, self._client = self._client, None
        self._up.set()
        if client is not None:
            await _discard(client)

    async def _run(self, first: asyncio.Future[HibernodeError | None]) -> None:
        while True:
            try:
                client, lost = await self._reach(refuse=not first.done())
            except Refused as e:
                first.set_result(e)
                return
            self._client, self._lost = client, lost
            self._up.set()
            if not first.done():
                first.set_result(None)
            await _watch(client, lost)
            self._client = None
            self._up.clear()
            log.warning("lost the broker at %s, trying again", self._where)
            await _discard(client)

    async def _reach(self, *, refuse: bool) -> tuple[Client, asyncio.Event]:
        """A connected client whose streams are there. Tries for ever; `refuse`: not where only a person can help."""
        delay, longest = RETRY
        while True:
            try:
                client, lost = await self._dial()
                log.info("connected to the broker at %s", self._where)
                self._said.clear()
                return client, lost
            except _TROUBLE as e:
                if refuse and isinstance(e, Refused):
                    raise
                self._log_once("cannot use", e)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # spread: all nodes lose a broker in the same moment
            delay = min(delay * 2, longest)

    def _log_once(self, what: str, error: Exception) -> None:
        """One line for one trouble until the next connection."""
        line = f"{what} the broker at {self._where}, trying again: {_describe(error)}"
        if line not in self._said:
            log.warning("%s", line)
        self._said.add(line)

    async def _dial(self) -> tuple[Client, asyncio.Event]:
        client, lost, causes = Client(), asyncio.Event(), list[Exception]()

        async def on_error(error: Exception) -> None:
            causes[:] = [error]
            log.debug("broker at %s: %s", self._where, error)

        async def on_closed() -> None:
            lost.set()

        try:
            async with asyncio.timeout(DIAL):
                await client.connect(
                    **_options(self._config, client),
                    name=self._name,
                    inbox_prefix=self._inbox,
                    error_cb=on_error,
                    closed_cb=on_closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # of the first connection, too: 0 and less mean for ever
                    reconnect_time_wait=0,
                    connect_timeout=int(CALL),
                    ping_interval=3600,  # `_watch` does that
                )
            _insist_on_tls(self._config, client)
            await self._prepare(client)
        except _TROUBLE as e:
            await _discard(client)
            raise _refusal(self._config, causes[0] if causes and not isinstance(e, HibernodeError) else e, self._where) from e
        except asyncio.CancelledError:
            await _discard(client)
            raise
        return client, lost

    async def clients(self) -> AsyncIterator[Client]:
        """The client of now, and the next one when the caller comes back for it; ends after `stop`."""
        while True:
            await self._up.wait()
            client = self._client
            if self._stopped:
                return
            if client is not None:
                yield client
                await asyncio.sleep(PAUSE)
                if client is self._client:  # it did not work and is still there: our streams may be gone
                    with self.logged(client, "streams"):
                        await self._prepare(client)

    @contextmanager
    def translated(self) -> Iterator[Client]:
        """The client of now; what goes wrong inside is BusUnavailable."""
        client = self._client
        if client is None or not client.is_connected:
            raise BusUnavailable(f"not connected to the broker at {self._where}")
        try:
            yield client
        except (NatsError, OSError, TimeoutError, *_SLIPS) as e:
            raise BusUnavailable(f"the broker at {self._where} did not answer as it should: {_describe(e)}") from e

    @contextmanager
    def logged(self, client: Client, what: str) -> Iterator[None]:
        """Trouble inside ends the work on this connection; one line, and none where the connection is lost anyway."""
        try:
            yield
        except _TROUBLE as e:
            if client.is_connected:
                self._log_once(f"cannot use the {what} of", e)

    async def publish(self, subject: str, data: bytes) -> None:
        with self.translated() as client:
            await client.publish(subject, data)

    async def store(self, subject: str, data: bytes, message_id: str, after: int | None = None) -> int:
        """Returns when a stream has it: its place. `after`: of the message before it on this subject, which nobody else writes to."""
        with self.translated() as client:
            try:
                return await self._store(client, subject, data, message_id, after)
            except NoStreamResponseError:
                await self._prepare(client)  # for the next attempt
                raise
            except APIError as e:
                if after is None or (last := _wrong_last(e)) is None:
                    raise
                if last > after:  # it got there before, and nobody heard of it
                    return last
                return await self._store(client, subject, data, message_id, last)  # the stream was made anew

    async def _store(self, client: Client, subject: str, data: bytes, message_id: str, after: int | None) -> int:
        headers: dict[str, Any] = {"Nats-Msg-Id": message_id} if message_id else {}
        if after is not None:
            headers["Nats-Expected-Last-Subject-Sequence"] = str(after)
        publishing = client.jetstream(timeout=CALL).publish(subject, data, headers=headers or None)
        return (await self._answered(publishing)).seq

    async def ask(self, data: bytes, *subjects: str) -> None:
        """Send it to all of them; returns when the last has answered. By then the server has read the others: it is one connection."""
        with self.translated() as client:
            for subject in subjects[:-1]:
                await client.publish(subject, data)
            await self._answered(client.request(subjects[-1], data, timeout=CALL))

    async def _answered(self, call: Coroutine[Any, Any, T]) -> T:
        """Its answer, or BusUnavailable as soon as the connection is lost: nats-py would wait for its whole time."""
        calling, losing = asyncio.ensure_future(call), asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({calling, losing}, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                raise BusUnavailable(f"the connection to the broker at {self._where} was lost")
            return calling.result()
        finally:
            for each in (calling, losing):
                each.cancel()


async def _watch(client: Client, lost: asyncio.Event) -> None:
    """Returns when the connection is lost, or shows no sign of life."""
    while client.is_connected:
        with suppress(TimeoutError):
            await asyncio.wait_for(lost.wait(), ALIVE)
        try:
            await client.rtt(timeout=ALIVE)  # type: ignore[arg-type] # any number of seconds does
        except (NatsError, OSError, TimeoutError, *_SLIPS):
            return


async def _discard(client: Client) -> None:
    """Close, and do not wait long: nats-py wants to hand over what is left, and a half-open connection never takes it."""
    closing = asyncio.create_task(client.close())
    await asyncio.wait({closing}, timeout=2.0)
    writer = getattr(client._transport, "_io_writer", None)
    if not closing.done() and writer is not None:
        writer.transport.abort()  # nats-py has no call for it, and the socket would stay for many minutes
    closing.cancel()
    closing.add_done_callback(lambda task: task.cancelled() or task.exception())  # best effort: nobody needs to know


def _options(config: Bus, client: Client) -> dict[str, Any]:
    """What the configuration means to nats-py. Login data are handed over when asked for, after TLS."""
    urls = [url.strip() for url in config.url.split(",")]
    options: dict[str, Any] = {"servers": [_bare(url) for url in urls], "tls": _tls(config)}
    user, password = config.user, config.password.get_secret_value()
    if not user and (url := urlsplit(urls[0])).username is not None:
        user, password = unquote(url.username), unquote(url.password or "")
    if config.credentials:
        options["user_credentials"] = _credentials(config.credentials)
    elif user:

        def secret() -> str:
            _insist_on_tls(config, client)
            return password

        options |= {"user": user, "password": secret}
    return options


def _bare(url: str) -> str:
    """The address without login data. Raises Refused where there is none."""
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("nats", "tls") or not parts.hostname:
        raise Refused(
            "config",
            f"bus.url is not the address of a broker: {_hide(url)!r}",
            prop="bus.url",
            found=_hide(url),
            wanted="nats://host:port or tls://host:port, several with commas between",
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port or 4222}"


def _hide(url: str) -> str:
    scheme, slashes, rest = url.strip().rpartition("://")
    return f"{scheme}{slashes}{rest.rpartition('@')[2]}"


def _tls(config: Bus) -> ssl.SSLContext | None:
    if not _wants_tls(config):
        return None
    try:
        context = ssl.create_default_context(cafile=config.tls_ca or None)
        if config.tls_cert:
            context.load_cert_chain(config.tls_cert, config.tls_key or None)
    except OSError as e:
        files = ", ".join(name for name in (config.tls_ca, config.tls_cert, config.tls_key) if name)
        raise _bad_file("bus.tls_*", files, f"cannot be used: {e}", "PEM files the daemon can read") from e
    return context


def _wants_tls(config: Bus) -> bool:
    return bool(config.tls_ca or config.tls_cert) or "tls://" in config.url


def _insist_on_tls(config: Bus, client: Client) -> None:
    """nats-py goes on in the clear, password included, when a server (or somebody before it) does not ask for TLS."""
    if _wants_tls(config) and not client._server_info.get("tls_required"):
        raise Refused(
            "bus_tls",
            "the broker does not offer TLS, and the configuration asks for it",
            prop="bus.url",
            found="no TLS",
            wanted="TLS",
            hint="configure TLS at the broker, or remove tls:// and bus.tls_* here",
        )


def _credentials(path: str) -> str:
    """A .creds file with both its parts: nats-py reads for ever in one that has none."""
    if importlib.util.find_spec("nkeys") is None:
        raise Refused(
            "config",
            "bus.credentials needs the package nkeys, which is not installed",
            prop="bus.credentials",
            found="no nkeys",
            wanted="nkeys",
            hint="pip install nkeys",
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise _bad_file("bus.credentials", path, f"cannot be read: {e}", "a readable file") from e
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise _bad_file("bus.credentials", path, "is no credentials file", "a file made by `nsc generate creds`")
    return path


def _bad_file(prop: str, path: str, why: str, wanted: str) -> Refused:
    return Refused("config", f"{prop}: {path} {why}", prop=prop, found=path, wanted=wanted)


def _refusal(config: Bus, error: Exception, where: str) -> Exception:
    """What only a person can mend is Refused; everything else may pass."""
    text = str(error)
    if "authorization violation" in text.lower():
        return Refused(
            "bus_login",
            f"the broker at {where} refused the login",
            prop="bus.credentials" if config.credentials else "bus.user",
            found=config.credentials or config.user or "no login",
            wanted="a login the broker knows",
            hint="check bus.user and bus.password, or bus.credentials, against the broker's accounts",
        )
    if isinstance(error, ssl.SSLError):
        return Refused(
            "bus_tls",
            f"no secure connection to the broker at {where}: {text.lower()}",
            prop="bus.tls_ca",
            found=config.tls_ca or "the system's certificates",
            wanted="the authority that signed the broker's certificate",
            hint="set bus.tls_ca, and bus.tls_cert and bus.tls_key where the broker asks for a certificate",
        )
    return error


def _wrong_last(error: APIError) -> int | None:
    """The place of the last message on a subject, where it is not the one that was expected."""
    found = re.fullmatch(r"wrong last sequence: (\d+)", error.description or "")
    return int(found[1]) if found and error.err_code == 10071 else None


def _describe(error: BaseException) -> str:
    if isinstance(error, APIError):
        return f"{error.description or type(error).__name__} ({error.err_code or error.code})"
    return str(error).removeprefix("nats: ") or type(error).__name__


# --- streams and consumers --------------------------------------------------------------------------------------------


def _streams(config: Bus) -> tuple[StreamConfig, StreamConfig]:
    commands = StreamConfig(
        name=COMMANDS,
        subjects=["hibernode.cmd.>"],
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        num_replicas=config.replicas,
        duplicate_window=DUPLICATES,
        max_age=0.0,
        max_consumers=MOST_NODES,
    )
    events = StreamConfig(
        name=EVENTS,
        subjects=["hibernode.evt.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        num_replicas=config.replicas,
        duplicate_window=min(DUPLICATES, config.events_max_age),  # the server takes no longer one
        max_age=config.events_max_age,
    )
    return commands, events


def _bucket(config: Bus, ttl: float) -> StreamConfig:
    """As every NATS client makes a bucket that keeps one value per key; but nobody who may write a key may empty it (`rollup`)."""
    return StreamConfig(
        name=NODES,
        subjects=[f"{RECORDS}.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        num_replicas=config.replicas,
        duplicate_window=min(120.0, ttl),
        max_age=ttl,
        max_msgs_per_subject=1,
        discard=DiscardPolicy.NEW,
        allow_rollup_hdrs=False,
        allow_direct=True,
        deny_delete=True,
    )


def _taker(config: Bus, cluster: str, node: str) -> ConsumerConfig:
    """The consumer of one node."""
    return ConsumerConfig(
        name=f"{cluster}={node}",  # "=" is in no token: a-b + c is not a + b-c
        durable_name=f"{cluster}={node}",
        filter_subject=f"hibernode.cmd.{cluster}.{node}.>",
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=config.ack_wait,
        max_deliver=-1,
    )


_OURS = ("subjects", "retention", "num_replicas", "duplicate_window", "max_age", "max_msgs_per_subject", "allow_rollup_hdrs")


async def _ensure(client: Client, wanted: StreamConfig) -> None:
    """Make the stream, or bring an existing one to our settings; what an operator set beside them stays.

    Any number of nodes may do so at the same time. Refused names the stream and what is in the way.
    """
    jetstream, name = client.jetstream(timeout=CALL), str(wanted.name)
    try:
        found = await _found(client, name)
        if found is None:
            with suppress(BadRequestError):  # somebody else was first, with other settings
                await jetstream.add_stream(wanted)
            found = await jetstream.stream_info(name)
        other = {key: getattr(wanted, key) for key in _OURS if getattr(wanted, key) != getattr(found.config, key)}
        if wanted.max_consumers and (found.config.max_consumers or 0) <= 0 and _limits_consumers(client):
            other["max_consumers"] = wanted.max_consumers  # a stream of before; older servers neither limit it nor change it
        if other:
            await jetstream.update_stream(found.config.evolve(**other))
    except APIError as e:
        if e.err_code not in PERMANENT:
            raise
        raise Refused(
            "bus_stream",
            f"the broker cannot give stream {name} the settings it needs: {_describe(e)}",
            prop=name,
            found="other settings",
            wanted=", ".join(f"{key}={getattr(wanted, key)}" for key in _OURS[1:3]),
            hint=f"see `nats stream info {name}`; if nothing in it is needed, remove it, and it is made anew",
        ) from e


def _limits_consumers(client: Client) -> bool:
    version = client.connected_server_version
    return (version.major, version.minor) >= (2, 15)


async def _found(client: Client, name: str) -> StreamInfo | None:
    try:
        return await client.jetstream(timeout=CALL).stream_info(name)
    except NotFoundError:
        return None


async def _ensure_consumer(client: Client, stream: str, config: ConsumerConfig) -> None:
    """Make the consumer, or change an existing one; its place in the stream stays. One that is as it should be is left alone: the server
    compares a new one with all that the stream has, and 10,000 nodes that lost a broker come back in the same moment."""
    jetstream = client.jetstream(timeout=CALL)
    with suppress(NotFoundError):
        found = (await jetstream.consumer_info(stream, str(config.name))).config
        if all(getattr(found, key) == wanted for key, wanted in vars(config).items() if wanted is not None):
            return
    await jetstream.add_consumer(stream, config)


async def _follower(client: Client, subject: str, last: int) -> str:
    """A consumer that begins after message `last`; from the beginning if the stream was made anew since."""
    jetstream = client.jetstream(timeout=CALL)
    if last > (await jetstream.stream_info(EVENTS)).state.last_seq:
        last = 0
    config = ConsumerConfig(
        filter_subject=subject,
        deliver_policy=DeliverPolicy.BY_START_SEQUENCE if last else DeliverPolicy.ALL,
        opt_start_seq=last + 1 if last else None,
        ack_policy=AckPolicy.NONE,
        inactive_threshold=FORGET,
        mem_storage=True,
        num_replicas=1,
    )
    return (await jetstream.add_consumer(EVENTS, config)).name


async def _pull(
    client: Client, stream: str, consumer: str, *, batch: int, gather: float = 0.0
) -> AsyncGenerator[list[Msg], None]:
    """What is there and what comes `gather` seconds later, `batch` messages at most, for as long as the connection and the consumer live;
    then an error.

    nats-py's own fetch tells only when its time is over that the consumer is gone, and holds a batch back until it is
    full.
    """
    inbox = client.new_inbox()
    subscription = await client.subscribe(inbox)
    request = json.dumps({"batch": batch, "expires": int(PULL * 1e9)}).encode()
    try:
        while True:
            await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", request, reply=inbox)
            left = batch
            while left and (came := await _some(subscription, PULL + CALL, left, gather=gather)):
                messages = [message for message in came if not _status(message)]
                left -= len(messages)
                if messages:
                    yield messages
                if (over := next((message for message in came if _status(message)), None)) is None:
                    continue
                if _status(over) in ("404", "408"):  # nothing there, time is over
                    break
                reason = (over.headers or {}).get("Description", "no consumer")
                if "shutdown" in reason.lower():  # the connection ends next, and has a line of its own
                    return
                raise BusUnavailable(f"the broker ended the request: {reason} ({_status(over)})")
    finally:
        await _unsubscribe(subscription)


async def _in_order(batches: AsyncIterator[list[Msg]]) -> AsyncIterator[Msg]:
    """Nobody acknowledges these, so a lost one is seen only by the gap in the consumer's count."""
    expected = 1
    async for batch in batches:
        for message in batch:
            if message.metadata.sequence.consumer != expected:
                raise BusUnavailable("a message was lost on its way from the broker")
            expected += 1
            yield message


async def _some(subscription: Subscription, seconds: float, most: int = FOLLOW, *, gather: float = 0.0) -> list[Msg]:
    """What is there, `most` messages at most, `gather` seconds after there is one; none after `seconds`, or when the connection is gone.

    nats-py makes a task for each message that it is asked for, which costs more than all the rest: 17,000 in a second of CPU. Those
    that wait are taken from its queue, as its own iterator takes them: 60,000.
    """
    queue, taken = subscription._pending_queue, list[Msg]()
    if queue.empty():
        try:
            async with asyncio.timeout(seconds):
                taken.append(await anext(subscription.messages))
        except (TimeoutError, StopAsyncIteration):
            return []
    if gather and len(taken) + queue.qsize() < most:
        await asyncio.sleep(gather)
    while len(taken) < most and not queue.empty():
        taken.append(message := queue.get_nowait())
        queue.task_done()
        subscription._pending_size -= len(message.data)
    return taken


async def _unsubscribe(subscription: Subscription) -> None:
    with suppress(NatsError):  # best effort: it dies with the connection anyway
        await subscription.unsubscribe()


def _status(message: Msg) -> str:
    """What the server says about a request; empty for a message somebody published, whatever headers that has."""
    return "" if message.reply or not message.headers else message.headers.get("Status", "")


async def _records(link: _Link, cluster: str, node: str) -> dict[str, bytes]:
    """One is asked for by its key. All are read as a stream: asked for one by one, those of 10,000 nodes took many seconds."""
    prefix = f"{RECORDS}.{cluster}."
    found: dict[str, bytes] = {}
    with link.translated() as client, suppress(NotFoundError):  # no node was ever here; or the time of this one is over
        if TOKEN.fullmatch(node):
            message = await client.jetstream(timeout=CALL).get_last_msg(NODES, prefix + node)
            if "KV-Operation" not in (message.headers or {}) and message.data is not None:
                found[node] = message.data
        elif not node:
            async with aclosing(_kept(client, NODES, f"{prefix}*")) as records:
                async for each in records:
                    if "KV-Operation" not in (each.headers or {}):
                        found[each.subject.removeprefix(prefix)] = each.data  # of two the later one
    return found


async def _kept(client: Client, stream: str, subject: str) -> AsyncGenerator[Msg, None]:
    """What a stream has now, in its order. NotFoundError if there is no such stream."""
    jetstream, inbox = client.jetstream(timeout=CALL), client.new_inbox()
    config = ConsumerConfig(
        filter_subject=subject,
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.NONE,
        inactive_threshold=3 * CALL,
        mem_storage=True,
        num_replicas=1,
    )
    consumer = await jetstream.add_consumer(stream, config)
    left = consumer.num_pending or 0
    subscription = await client.subscribe(inbox)
    request = json.dumps({"batch": RECORDS_AT_ONCE, "no_wait": True}).encode()
    try:
        while left:
            await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer.name}", request, reply=inbox)
            asked = RECORDS_AT_ONCE
            while left and asked:
                if not (came := await _some(subscription, CALL, asked)):
                    raise BusUnavailable("the broker stopped in the middle of what it has")
                for message in came:
                    if status := _status(message):
                        if status in ("404", "408"):  # the time of those to come was over just now
                            return
                        raise BusUnavailable(f"the broker ended the request ({status})")
                    yield message
                asked, left = asked - len(came), _behind(came[-1])
    finally:
        await _unsubscribe(subscription)
        with suppress(NatsError):  # best effort: it is forgotten soon
            await jetstream.delete_consumer(stream, consumer.name)


def _behind(message: Msg) -> int:
    """How many more of its consumer's the stream had, when this one was sent."""
    words = message.reply.split(".")
    return int(words[8] if len(words) == 9 else words[10])


def _token(text: str, what: str) -> str:
    """One token of a subject: no dots, no wildcards."""
    if not TOKEN.fullmatch(text):
        raise BadCommand(
            f"{what} is not one token of a subject: {text[:100]!r}",
            property=what,
            found=text[:100],
            wanted="letters, digits, - and _",
        )
    return text
