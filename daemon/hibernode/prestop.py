"""Where a kubelet asks before it ends a pod: `GET /prestop/NAMESPACE/NAME`, a preStop hook that the pod's author wrote. It hears back when
the pod's checkpoint is `ready`, or has failed, or the pod's time is nearly over; then the pod gets its SIGTERM.

A hook says nothing of the pod that it is of, and whoever reaches a node's loopback can ask as well. So a question only says where to look:
what is checkpointed is a pod of this node that the API server says is being deleted, and whose own annotation `hibernode.io/prestop` has
that name. That is done once for each pod, however often somebody asks, as an action like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from socket import socket
from typing import Any, Protocol

from hibernode import wishes
from hibernode.errors import HibernodeError, NotFound, Transient
from hibernode.loop import Tasks, in_thread
from hibernode.model import ActionView, CheckpointCommand, Kind, Status, Target

_ACTIONS = uuid.UUID("0b6f6a0e-8c3c-5a6b-9f57-3a3f7d1c9e21")  # names the space of their ids
_MARGIN = 2.0  # seconds before the end of a pod's grace period: there is still something to be said
_PATIENCE = 20.0  # seconds for an API server that does not answer
_RETRY = 1.0
_HEAD = 8 << 10  # bytes of a request
_HEAD_LIMIT = 5.0  # seconds until it must be here
_GUESTS = 500  # at once: each container of each pod of a node may have the hook
_KIND: Kind = "simple"
_log = logging.getLogger("hibernode.prestop")


class Desk(Protocol):
    """Called on the event loop; raises only HibernodeError."""

    async def submit(self, command: CheckpointCommand, about: Mapping[str, str]) -> None: ...
    async def ended(self, action_id: str) -> ActionView:
        """When it has."""


class Pod(Protocol):
    """As the API server knows it."""

    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def uid(self) -> str: ...
    @property
    def deleting(self) -> bool: ...
    @property
    def annotations(self) -> Mapping[str, str]: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Asking:
    """Of the API server. Blocking; raises HibernodeError."""

    pods: Callable[[], Sequence[Pod]]  # of this node
    cordoned: Callable[[], bool]  # this node


def left(pod: Pod, now: float) -> float:
    """Seconds of its grace period; all of it, where the server's clock and ours do not agree."""
    meta = pod.manifest.get("metadata") or {}
    grace = float(meta.get("deletionGracePeriodSeconds") or 0)
    with contextlib.suppress(TypeError, ValueError):
        seconds = datetime.fromisoformat(str(meta.get("deletionTimestamp"))).timestamp() - now
        if 0 < seconds < grace:
            return seconds
    return grace


def evicted(pod: Pod) -> bool:
    """Somebody makes room: an eviction, a taint, another pod. From 1.26 on the API server says so."""
    conditions = (pod.manifest.get("status") or {}).get("conditions") or ()
    return any(each.get("type") == "DisruptionTarget" and each.get("status") == "True" for each in conditions)


class _Shared:
    """A blocking question, asked once at a time: who comes while it is on its way waits for the next time, with all others who do. When a
    node is drained all its pods ask at once, and an answer may be megabytes."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask
        self._now: asyncio.Task[Any] | None = None
        self._next: asyncio.Task[Any] | None = None

    async def answer(self) -> Any:
        """Of a time that began after this call."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._after(self._now))
        return await asyncio.shield(self._next)

    async def _after(self, before: asyncio.Task[Any] | None) -> Any:
        if before is not None:
            await asyncio.wait([before])
        self._now, self._next = self._next, None
        return await in_thread(self._ask)


class PrestopServer:
    """Answers on the socket that `listen` makes. The event loop's thread."""

    def __init__(self, desk: Desk, asking: Asking, listen: Callable[[], socket], clock: Callable[[], float] = time.time) -> None:
        self._desk, self._listen, self._clock = desk, listen, clock
        self._pods, self._cordoned = _Shared(asking.pods), _Shared(asking.cordoned)
        self._guests, self._opening = Tasks(), Tasks()
        self._waiting = 0
        self._server: asyncio.Server | None = None

    def start(self) -> None:
        """Returns at once. A place that somebody else has is said, and waited for: checkpoints go on without it."""
        self._opening.spawn(self._open())

    async def stop(self) -> None:
        await self._opening.cancel()
        if self._server is not None:
            self._server.close()
        await self._guests.cancel()

    @property
    def place(self) -> tuple[str, int] | None:
        """Where it answers; None: not yet."""
        return self._server.sockets[0].getsockname()[:2] if self._server is not None else None

    async def _open(self) -> None:
        while self._server is None:
            try:
                self._server = await asyncio.start_server(self._meet, sock=await in_thread(self._listen), limit=_HEAD)
            except OSError as e:
                _log.error("cannot listen for preStop hooks: %s", e)
                await asyncio.sleep(30 * _RETRY)

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._waiting >= _GUESTS:
            writer.transport.abort()
            return
        self._guests.spawn(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._waiting += 1
        try:
            async with asyncio.timeout(_HEAD_LIMIT):
                head = await reader.readuntil(b"\r\n\r\n")
            status, text = await self._answer(head.split(b"\r\n", 1)[0].decode("latin-1"))
            body = f"{text}\n".encode()
            words = [f"HTTP/1.1 {status.value} {status.phrase}", "Content-Type: text/plain; charset=utf-8", "Connection: close"]
            writer.write("\r\n".join([*words, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # it has gone, or is none of ours
        finally:
            self._waiting -= 1
            writer.close()

    async def _answer(self, line: str) -> tuple[HTTPStatus, str]:
        method, _, rest = line.partition(" ")
        words = rest.partition(" ")[0].partition("?")[0].strip("/").split("/")  # older kubelets begin with two slashes
        if method != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, "GET alone"
        if len(words) != 3 or words[0] != "prestop" or not all(words):
            return HTTPStatus.NOT_FOUND, "GET /prestop/NAMESPACE/NAME"
        try:
            return await self._checkpointed(words[1], words[2])
        except HibernodeError as e:
            _log.warning("a preStop hook of %s/%s: %s: %s", words[1], words[2], e.code, e.message)
            return HTTPStatus.NOT_FOUND if isinstance(e, NotFound) else HTTPStatus.SERVICE_UNAVAILABLE, f"{e.code}: {e.message}"

    async def _checkpointed(self, namespace: str, name: str) -> tuple[HTTPStatus, str]:
        """Every pod that is meant, of which there are several where a template has made several."""
        asked = await self._asked(namespace, name)
        stopping = [pod for pod in asked if pod.deleting]
        if not stopping:  # its container is started anew, by its liveness probe
            return HTTPStatus.OK, "no such pod is being deleted: nothing was done"
        cordoned = await self._is_cordoned()
        said = await asyncio.gather(*(self._one(pod, cordoned=cordoned) for pod in stopping))
        return max((status for status, _ in said), key=lambda status: status.value), "\n".join(text for _, text in said)

    async def _asked(self, namespace: str, name: str) -> list[Pod]:
        pods = await self._patiently(self._pods)
        found = [pod for pod in pods if pod.namespace == namespace and pod.annotations.get(wishes.PRESTOP) == name]
        if not found:
            raise NotFound(f"no pod of this node in namespace {namespace} has the annotation {wishes.PRESTOP}: {name}")
        return found

    async def _is_cordoned(self) -> bool:
        """It decides where a pod goes on, and not whether it is saved."""
        try:
            return bool(await self._patiently(self._cordoned))
        except HibernodeError as e:
            _log.warning("cannot say whether this node is cordoned, so no: %s: %s", e.code, e.message)
            return False

    async def _patiently(self, question: _Shared) -> Any:
        """An API server that is being replaced is back in time."""
        until = self._clock() + _PATIENCE
        while True:
            try:
                return await question.answer()
            except Transient:
                if self._clock() >= until:
                    raise
            await asyncio.sleep(_RETRY)

    async def _one(self, pod: Pod, *, cordoned: bool) -> tuple[HTTPStatus, str]:
        action_id = str(uuid.uuid5(_ACTIONS, pod.uid))
        who = f"pod {pod.namespace}/{pod.name}: checkpoint {action_id}"
        until = self._clock() + left(pod, self._clock())
        if (
            until - self._clock() <= _MARGIN
        ):  # as of a pod that this daemon has deleted: its checkpoint is made, and it stands still
            return HTTPStatus.GATEWAY_TIMEOUT, f"pod {pod.namespace}/{pod.name}: its grace period is too short for a checkpoint"
        asks, problem = wishes.on_stop(pod.annotations)
        if problem:
            _log.warning("pod %s/%s: %s", pod.namespace, pod.name, problem)
        command = CheckpointCommand(
            action_id=action_id, checkpoint_id=action_id, target=Target(pod_id=pod.uid), kind=_KIND, reason="nodeTermination",
            expires_at=until,
        )  # fmt: skip
        about = {
            "namespace": pod.namespace, "pod_name": pod.name, "pod_id": pod.uid, "kind": _KIND, "reason": command.reason,
            "on_stop": asks if cordoned or evicted(pod) else wishes.CHECKPOINT,
        }  # fmt: skip
        try:
            await self._desk.submit(command, about)
            async with asyncio.timeout(max(0.0, until - _MARGIN - self._clock())):
                ended = await self._desk.ended(action_id)
        except TimeoutError:
            _log.warning("%s: not ready within the grace period; it goes on", who)
            return HTTPStatus.GATEWAY_TIMEOUT, f"{who}: not ready yet"
        if ended.status == Status.READY:
            return HTTPStatus.OK, f"{who}: ready"
        why = f"{ended.last.code}: {ended.last.message}" if ended.last is not None else "error"
        return HTTPStatus.INTERNAL_SERVER_ERROR, f"{who}: {why}"
