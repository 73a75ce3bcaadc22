"""The local gRPC service: decode, ask the desk, encode; and who may call it.

Who may call: root, and the user the daemon runs as. The socket is made with mode 0600 (and its directory, where we make
it, with 0700), so the kernel lets in nobody else; and whoever gets a connection all the same, because somebody has changed a
mode, is asked for by his uid (`door.py`).

Watching is not owning: a client that goes away ends its stream and nothing else; the action goes on.
"""

# ruff: noqa: N802, ARG002 - the proto names the methods, and grpc hands each a request and a context

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import logging
import os
import socket
import stat
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hibernode import wire
from hibernode._pb import hibernode_pb2 as pb
from hibernode._pb import hibernode_pb2_grpc as pb_grpc
from hibernode.door import Door
from hibernode.errors import BadCommand, Cancelled, HibernodeError, Internal, NotFound, Refused, Transient
from hibernode.model import (
    ActionView,
    Check,
    CheckpointCommand,
    Event,
    Garbage,
    GarbageRequest,
    JobSpec,
    Manifest,
    NodeRecord,
    Progress,
    RestoreCommand,
    Target,
    Verdict,
    WorkloadView,
)

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Node"].full_name

# Everything an error says travels in HTTP/2 headers, of which a client takes 8 KiB by default and 16 KiB at most,
# quoting and base64 included; one byte more and the caller sees RESOURCE_EXHAUSTED instead of the error.
_MESSAGE_LIMIT = 1000  # characters
_HINT_LIMIT = 1000  # bytes, quoted
_DETAILS_LIMIT = 2500  # bytes, before base64
_SUN_PATH = 107  # bytes of a path that fit into a unix socket's address

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Desk(Protocol):
    """What answers: the dispatcher. Called on the event loop; raises only HibernodeError; cancelling a call to it never
    stops an action."""

    async def submit(self, command: CheckpointCommand | RestoreCommand) -> None:
        """Returns when the command is accepted; the same action id again is no second action."""

    def watch(self, action_id: str) -> AsyncIterator[Event | Progress]:
        """All actions for "", without end; else one, its past events first, its terminal event last."""

    async def cancel(self, action_id: str) -> bool: ...

    async def action(self, action_id: str) -> ActionView: ...

    async def actions(self) -> list[ActionView]: ...

    async def workloads(self, target: Target | None) -> list[WorkloadView]: ...

    async def run_job(self, spec: JobSpec) -> WorkloadView: ...

    async def stop_job(self, namespace: str, name: str, signal: str) -> WorkloadView: ...

    async def inspect(self, checkpoint_id: str) -> tuple[Manifest, str]:
        """The manifest, and where the checkpoint is."""

    def verify(self, checkpoint_id: str) -> AsyncIterator[Verdict]:
        """How far it is, and last what was found."""

    async def checkpoints(self) -> list[Manifest]: ...

    async def delete(self, checkpoint_id: str) -> None: ...

    def collect_garbage(self, request: GarbageRequest) -> AsyncIterator[Garbage]:
        """What would be removed, or, if asked so, how each removal went; then what stays and should be looked at."""

    async def doctor(self) -> list[Check]: ...

    async def nodes(self) -> list[NodeRecord]: ...


class RpcServer:
    """One gRPC server on one unix socket. `start` and `stop` are called once each, on the loop the desk lives on."""

    def __init__(self, desk: Desk, path: Path) -> None:
        self._path = path
        self._node = _Node(desk)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined] # "aio" is its public name
        self._held = contextlib.ExitStack()  # the lock on the socket's name
        self._server: grpc.aio.Server | None = None
        self._door = Door(path)

    async def start(self) -> None:
        """Answer calls. Raises Refused("daemon_running" | "socket_path") and leaves what it found as it was."""
        self._held.enter_context(_claimed(self._path))
        try:
            server = grpc.aio.server()
            pb_grpc.add_NodeServicer_to_server(self._node, server)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
            with _refused(self._path):
                self._door.build(server.add_insecure_port)
                await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
                await server.start()
                await self._door.open()
        except BaseException:
            await self._door.close()
            self._held.close()
            raise
        self._server = server

    async def stop(self, grace: float = 5.0) -> None:
        """Take no more calls, end the streams at once, give other calls `grace` seconds. Harmless when repeated."""
        server, self._server = self._server, None
        if server is not None:
            self._door.shut()
            await self._health.enter_graceful_shutdown()
            self._node.end_streams()
            await server.stop(grace)
            await self._door.close()
            self._held.close()


# --- the socket -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """While inside, `path` is ours to bind: a lock beside it keeps a second daemon out, and nothing stands there."""
    with _refused(path):
        _check_path(path)
        lock = open(path.with_name(path.name + ".lock"), "ab", opener=_private)  # noqa: SIM115 - closed below
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise _running(path) from e
        _remove_stale(path)
        yield


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _check_path(path: Path) -> None:
    if len(os.fsencode(path)) > _SUN_PATH or not path.is_absolute():
        raise Refused(
            "socket_path",
            f"not a path for a unix socket: {path}",
            prop="socket",
            found=str(path),
            wanted=f"an absolute path of at most {_SUN_PATH} bytes",
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = path.parent.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        raise Refused(
            "socket_path",
            f"others can write to {path.parent} and put a socket of their own there",
            prop="mode",
            found=f"{stat.S_IMODE(mode):04o}",
            wanted="0700",
            hint=f"chmod go-w {path.parent}, or set `socket` to a path in a directory of its own",
        )


def _remove_stale(path: Path) -> None:
    """Remove the socket of a dead daemon. One that somebody answers, or a file that is no socket, is Refused.
    grpc itself would remove both kinds of socket without asking."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Refused(
            "socket_path",
            f"{path} is there and is not a socket",
            prop="socket",
            found="a file",
            wanted="nothing, or the socket of a dead daemon",
            hint="move it away, or set `socket` to another path",
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:  # full backlog: somebody listens
            pass
    raise _running(path)


def _running(path: Path) -> Refused:
    return Refused(
        "daemon_running",
        f"another daemon answers on {path}",
        prop="socket",
        found="in use",
        wanted="free",
        hint="one daemon per node; `hibernode doctor` asks the one that runs",
    )


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """A socket that cannot be made, as Refused."""
    try:
        yield
    except (RuntimeError, OSError) as e:  # grpc's, ours
        raise Refused("socket_path", f"cannot listen on {path}: {e}", prop="socket", found=str(path), wanted="bound") from e


# --- errors -----------------------------------------------------------------------------------------------------------


def _unary(method: Callable[[_Node, M, Context], Awaitable[T]]) -> Callable[[_Node, M, Context], Awaitable[T]]:
    """A call with one answer: what it raises becomes a status."""

    @functools.wraps(method)
    async def call(self: _Node, request: M, context: Context) -> T:
        try:
            return await method(self, request, context)
        except HibernodeError as e:
            await _abort(context, e)
        except Exception as e:  # noqa: BLE001 - the last line of this edge: a defect of ours is logged, and told apart
            await _abort(context, _defect(method.__name__, e))
        raise AssertionError("abort returned")

    return call


def _stream(
    method: Callable[[_Node, M, Context], AsyncIterator[Message]],
) -> Callable[[_Node, M, Context], Awaitable[None]]:
    """A call with many answers: what it raises becomes a status, and `end_streams` can end it. Answers are written here
    instead of yielded to grpc, so that the desk's iterator is closed before the call is over, however it ends."""

    @functools.wraps(method)
    async def call(self: _Node, request: M, context: Context) -> None:
        with self.streaming():
            try:
                async with _closing(method(self, request, context)) as answers:
                    async for answer in answers:
                        await context.write(answer)
            except HibernodeError as e:
                await _abort(context, e)
            except asyncio.CancelledError:
                if not self.ending:
                    raise  # the client went away
                # No hibernode-code: to the caller this is a daemon that is not there, and no answer about the action.
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon is stopping")
            except Exception as e:  # noqa: BLE001 - as above
                await _abort(context, _defect(method.__name__, e))

    return call


@contextlib.asynccontextmanager
async def _closing(iterator: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    try:
        yield iterator
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


def _defect(method: str, error: Exception) -> Internal:
    log.error("a defect in gRPC method %s", method, exc_info=error)
    return Internal("a defect of the daemon", hint="the daemon's log has the details")


def status_of(error: HibernodeError) -> grpc.StatusCode:
    for kind, status in (
        (BadCommand, grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound, grpc.StatusCode.NOT_FOUND),
        (Refused, grpc.StatusCode.FAILED_PRECONDITION),
        (Transient, grpc.StatusCode.UNAVAILABLE),
        (Cancelled, grpc.StatusCode.ABORTED),
    ):
        if isinstance(error, kind):
            return status
    return grpc.StatusCode.INTERNAL


async def _abort(context: Context, error: HibernodeError) -> None:
    metadata: list[tuple[str, str | bytes]] = [("hibernode-code", error.code)]
    if error.hint:
        # Header values are printable ASCII; anything else is quoted as grpc itself quotes a message.
        metadata.append(("hibernode-hint", quote(error.hint, safe=_READABLE)[:_HINT_LIMIT]))
    metadata.append(("hibernode-details-bin", _fitting(error.details)))
    await context.abort(status_of(error), error.message[:_MESSAGE_LIMIT], tuple(metadata))


_READABLE = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%")


def _fitting(details: Mapping[str, object]) -> bytes:
    """`details` as JSON of at most `_DETAILS_LIMIT` bytes: long values keep their end, where logs have their reason."""
    keep = _DETAILS_LIMIT
    while len(text := _json(details)) > _DETAILS_LIMIT and keep > 16:
        keep //= 2
        details = {k: _end(v, keep) for k, v in details.items()}
    return text if len(text) <= _DETAILS_LIMIT else b"{}"


def _end(value: object, keep: int) -> object:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return value if len(text) <= keep else "…" + text[-keep:]


def _json(details: Mapping[str, object]) -> bytes:
    return json.dumps(dict(details), default=str, ensure_ascii=False).encode(errors="replace")


# --- the service ------------------------------------------------------------------------------------------------------


class _Node(pb_grpc.NodeServicer):
    """`hibernode.v1.Node`: each method decodes, asks the desk, encodes."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._streams: set[asyncio.Task[Any]] = set()
        self.ending = False

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            yield
        finally:
            self._streams.discard(task)

    def end_streams(self) -> None:
        """Now: a watch over all actions never ends by itself, and would use up every grace."""
        self.ending = True
        for task in self._streams:
            task.cancel()

    @_stream
    def Checkpoint(self, request: pb.CheckpointCommand, context: Context) -> AsyncIterator[pb.Update]:
        request.action_id = request.action_id or str(uuid.uuid4())
        request.checkpoint_id = request.checkpoint_id or str(uuid.uuid4())
        return self._submitted(request, context)

    @_stream
    def Restore(self, request: pb.RestoreCommand, context: Context) -> AsyncIterator[pb.Update]:
        request.action_id = request.action_id or str(uuid.uuid4())
        return self._submitted(request, context)

    async def _submitted(self, request: pb.CheckpointCommand | pb.RestoreCommand, context: Context) -> AsyncGenerator[pb.Update]:
        command = wire.command_from_pb(request)
        assert isinstance(command, CheckpointCommand | RestoreCommand)
        await self._desk.submit(command)
        # Headers go out when the action is accepted, so that a caller who does not want to wait knows it at once.
        ids = (("hibernode-action-id", command.action_id), ("hibernode-checkpoint-id", command.checkpoint_id))
        await context.send_initial_metadata(ids)
        async with _closing(self._watched(command.action_id)) as updates:
            async for update in updates:
                yield update

    async def _watched(self, action_id: str) -> AsyncGenerator[pb.Update]:
        async with _closing(self._desk.watch(action_id)) as changes:
            async for change in changes:
                yield _update(change)

    @_stream
    def WatchActions(self, request: pb.ActionId, context: Context) -> AsyncIterator[pb.Update]:
        return self._watched(request.action_id)

    @_stream
    async def Verify(self, request: pb.CheckpointId, context: Context) -> AsyncGenerator[pb.VerifyReply]:
        async with _closing(self._desk.verify(request.checkpoint_id)) as verdicts:
            async for verdict in verdicts:
                yield wire.verdict_to_pb(verdict)

    @_unary
    async def Cancel(self, request: pb.ActionId, context: Context) -> pb.CancelReply:
        return pb.CancelReply(found=await self._desk.cancel(request.action_id))

    @_unary
    async def GetAction(self, request: pb.ActionId, context: Context) -> pb.Action:
        return wire.action_to_pb(await self._desk.action(request.action_id))

    @_unary
    async def ListActions(self, request: pb.Empty, context: Context) -> pb.Actions:
        return pb.Actions(actions=[wire.action_to_pb(a) for a in await self._desk.actions()])

    @_unary
    async def FindWorkloads(self, request: pb.Target, context: Context) -> pb.Workloads:
        target = wire.target_from_pb(request) if request != pb.Target() else None
        return pb.Workloads(workloads=[wire.workload_to_pb(w) for w in await self._desk.workloads(target)])

    @_unary
    async def RunJob(self, request: pb.RunRequest, context: Context) -> pb.Workload:
        return wire.workload_to_pb(await self._desk.run_job(wire.job_from_pb(request)))

    @_unary
    async def StopJob(self, request: pb.StopRequest, context: Context) -> pb.Workload:
        where = request.namespace or "default"
        return wire.workload_to_pb(await self._desk.stop_job(where, request.name, request.signal or "TERM"))

    @_unary
    async def Inspect(self, request: pb.CheckpointId, context: Context) -> pb.InspectReply:
        manifest, location = await self._desk.inspect(request.checkpoint_id)
        return pb.InspectReply(manifest=manifest.model_dump_json(), location=location)

    @_unary
    async def ListCheckpoints(self, request: pb.Empty, context: Context) -> pb.Checkpoints:
        return pb.Checkpoints(checkpoints=[_summary(m) for m in await self._desk.checkpoints()])

    @_unary
    async def DeleteCheckpoint(self, request: pb.CheckpointId, context: Context) -> pb.Empty:
        await self._desk.delete(request.checkpoint_id)
        return pb.Empty()

    @_stream
    async def CollectGarbage(self, request: pb.GarbageRequest, context: Context) -> AsyncGenerator[pb.Garbage]:
        async with _closing(self._desk.collect_garbage(wire.garbage_request_from_pb(request))) as found:
            async for each in found:
                yield wire.garbage_to_pb(each)

    @_unary
    async def Doctor(self, request: pb.Empty, context: Context) -> pb.DoctorReply:
        return pb.DoctorReply(checks=[wire.check_to_pb(c) for c in await self._desk.doctor()])

    @_unary
    async def ListNodes(self, request: pb.Empty, context: Context) -> pb.Nodes:
        return pb.Nodes(nodes=[wire.node_to_pb(n) for n in await self._desk.nodes()])


def _update(change: Event | Progress) -> pb.Update:
    if isinstance(change, Event):
        return pb.Update(event=wire.event_to_pb(change))
    return pb.Update(progress=wire.progress_to_pb(change))


def _summary(manifest: Manifest) -> pb.Checkpoint:
    """A manifest on one line."""
    workload = manifest.workload
    return pb.Checkpoint(
        checkpoint_id=manifest.checkpoint_id,
        workload=f"{workload.namespace}/{workload.name}" if workload.kind == "job" else workload.name,
        kind=manifest.kind,
        node=manifest.node,
        created_at=manifest.created_at,
        raw_bytes=manifest.raw_bytes,
        stored_bytes=manifest.stored_bytes,
        pause_ns=manifest.pause_ns,
        images=len(manifest.images),
        streams=sum(len(part.streams) for part in manifest.parts),
        bases=sorted({base.checkpoint_id for base in manifest.bases}),
    )
