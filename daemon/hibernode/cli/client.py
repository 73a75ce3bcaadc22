"""Talks to the daemon. Only this file of the command line knows gRPC; what it raises is a HibernodeError."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import quote, unquote

import grpc

from hibernode._pb import hibernode_pb2 as pb
from hibernode._pb.hibernode_pb2_grpc import NodeStub
from hibernode.cli.failure import Answered, Unreachable

ANSWER_LIMIT = 256 << 20  # bytes; the manifest of a large pod is longer than the 4 MiB grpc allows by default
PATIENCE = 600.0  # seconds for an answer that is not a stream: a stop with its grace time, a store with its retries


class Client:
    """One connection, made when it is first needed. Use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel is not None:
            self._channel.close()

    @property
    def stub(self) -> NodeStub:
        """Raises Unreachable, with what to do about it."""
        if self._channel is None:
            _knock(self._path)
            options = [("grpc.max_receive_message_length", ANSWER_LIMIT), ("grpc.enable_http_proxy", 0)]
            self._channel = grpc.insecure_channel(f"unix:{quote(str(self._path.absolute()))}", options=options)
        return NodeStub(self._channel)

    def ask(self, method: Callable[..., Any], request: object, *, timeout: float = PATIENCE) -> Any:
        """One question, one answer."""
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as e:
            raise _understood(e) from e

    def stream(self, call: Any) -> Iterator[Any]:
        """The answers of a call that has many. Leaving early ends the call, not the action behind it."""
        try:
            yield from call
        except grpc.RpcError as e:
            raise _understood(e) from e
        finally:
            call.cancel()

    def submit(self, command: pb.CheckpointCommand | pb.RestoreCommand) -> Iterator[pb.Update]:
        """File the command; return when the daemon has accepted it, or raise what it says. The updates follow."""
        checkpoint = isinstance(command, pb.CheckpointCommand)
        call = self.stub.Checkpoint(command) if checkpoint else self.stub.Restore(command)
        try:
            accepted = {key for key, _ in call.initial_metadata() or ()}
        except grpc.RpcError as e:
            raise _understood(e) from e
        if "hibernode-action-id" not in accepted:
            for _ in self.stream(call):  # raises the refusal
                pass
        return self.stream(call)


def _knock(path: Path) -> None:
    """Find out at once, and in words, why nobody would answer; grpc would try for a while and say "unavailable"."""
    start = "start it with `hibernode node`, or `systemctl start hibernode`"
    elsewhere = "; if it runs elsewhere, give its socket with --socket or HIBERNODE_SOCKET_PATH"
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)
            probe.connect(os.fspath(path))
    except FileNotFoundError:
        raise Unreachable(f"no daemon: there is no socket {path}", hint=start + elsewhere) from None
    except ConnectionRefusedError:
        raise Unreachable(f"no daemon: nobody answers on {path}", hint=start) from None
    except PermissionError:
        who = "only root and the user of the daemon may talk to it; try sudo"
        raise Unreachable(f"not allowed to use {path}", hint=who) from None
    except OSError as e:
        raise Unreachable(f"cannot use {path}: {(e.strerror or str(e)).lower()}", hint=start + elsewhere) from None


def _understood(error: grpc.RpcError) -> Answered | Unreachable:
    """The daemon's error out of grpc's. Without a code of ours it is not the daemon that spoke."""
    assert isinstance(error, grpc.Call)
    metadata = dict(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()))
    message = error.details() or "no reason given"
    if "hibernode-code" in metadata:
        details = json.loads(metadata.get("hibernode-details-bin", b"{}"))
        hint = unquote(str(metadata.get("hibernode-hint", "")))
        return Answered(str(metadata["hibernode-code"]), message, hint=hint, details=details)
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unreachable("the daemon did not answer in time", hint="its log says what it does")
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return Unreachable("the daemon does not know this call", hint="is it of the same version as this command line?")
    return Unreachable(f"the daemon went away: {message.lower()}", hint="its log says why; actions are in its journal")
