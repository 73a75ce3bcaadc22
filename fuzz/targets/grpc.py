"""Requests of gRPC: the bytes that a client sends, the service that decodes them, and the desk behind it with a real store in a directory.

Answered, or refused with a documented code in headers that fit. `internal` is a finding: it is how the service says that it has a defect.
Only submitting is played: no action begins, so that one input is like the next.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from fuzz.edits import edited
from fuzz.feed import Feed
from fuzz.guard import guarded, require, root
from hibernode._pb import hibernode_pb2 as pb
from hibernode.children import Children
from hibernode.config import Config
from hibernode.desk import Desk
from hibernode.dispatch import Dispatcher
from hibernode.drivers.workloads.process import Jobs, ProcessWorkloads, insist_startable
from hibernode.errors import NotFound
from hibernode.model import ActionCommand, Event, JobSpec, Progress, Status, WorkloadView
from hibernode.node import Node
from hibernode.rpc import _Node
from hibernode.service import store_opener
from tests.flow.rig import Rig

MAX_LENGTH = 8192
_RAW, _EDITED = 0, 1
_ID, _OTHER = "0b1f7a52-3c44-4f0e-8a6b-5d9e1c2f3a40", "6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10"
_OVERRIDES = {"compression": "zstd:3", "streams": 4, "criu_opts": '{"tcp": "close"}', "directory": "file:///x", "pod_name": "p"}
_HEADERS = 7500  # bytes of all headers of an answer: a client takes 8 KiB
_COMMAND = {"action_id": _ID, "checkpoint_id": _OTHER, "overrides": _OVERRIDES, "reason": "manual", "expires_at": 1764000000.5}
_JOB = {"name": "trainer", "namespace": "default"}
_CALLS: tuple[tuple[str, type[Message], dict[str, Any]], ...] = (
    (
        "Checkpoint",
        pb.CheckpointCommand,
        {**_COMMAND, "kind": "simple", "target": {"pod_name": "trainer", "namespace": "default"}},
    ),
    ("Restore", pb.RestoreCommand, _COMMAND),
    ("Cancel", pb.ActionId, {"action_id": _ID}),
    ("GetAction", pb.ActionId, {"action_id": _ID}),
    ("WatchActions", pb.ActionId, {"action_id": _ID}),
    ("FindWorkloads", pb.Target, {"pod_name": "trainer"}),
    ("RunJob", pb.RunRequest, {**_JOB, "argv": ["python", "train.py"], "cwd": "/srv", "env": {"A": "b"}}),
    ("StopJob", pb.StopRequest, {**_JOB, "signal": "TERM"}),
    ("Inspect", pb.CheckpointId, {"checkpoint_id": _OTHER}),
    ("Verify", pb.CheckpointId, {"checkpoint_id": _OTHER}),
    ("DeleteCheckpoint", pb.CheckpointId, {"checkpoint_id": _OTHER}),
    (
        "CollectGarbage",
        pb.GarbageRequest,
        {"apply": True, "directory": f"file://{root()}/store", "grace": 1.5, "keep_last": 2, "keep_days": 3.5},
    ),
)


class _Played(Desk):
    """The real desk, but for the actions: one that is submitted is over at once."""

    submitted: ActionCommand | None = None

    async def submit(self, command: ActionCommand) -> None:
        self.submitted = command

    def watch(self, action_id: str) -> AsyncIterator[Event | Progress]:
        command = self.submitted
        if command is not None and command.action_id == action_id:
            self.submitted = None
            return self._over(command)
        return super().watch(action_id) if action_id else self._never()

    async def _over(self, command: ActionCommand) -> AsyncIterator[Event | Progress]:
        yield Event(
            action_id=command.action_id, seq=1, type=command.type, status=Status.READY, checkpoint_id=command.checkpoint_id,
            node="node", time=1.0, details={"overrides": command.overrides.model_dump()},
        )  # fmt: skip

    async def _never(self) -> AsyncIterator[Event | Progress]:
        raise NotFound("all actions are watched without end")
        yield


class _Jobs(ProcessWorkloads):
    """The real, empty book of jobs, but nothing is started: what the kernel would be handed is looked at."""

    def run(self, spec: JobSpec) -> WorkloadView:
        insist_startable(spec)
        strings = [*spec.argv, spec.cwd, *spec.env, *spec.env.values()]
        require(not any("\0" in text for text in strings), f"no program can be given {strings!r}")
        require(not any("=" in name or not name for name in spec.env), f"no environment can hold {list(spec.env)!r}")
        return WorkloadView(kind="job", namespace=spec.namespace, name=spec.name, command=" ".join(spec.argv))


class _Aborted(Exception):
    """What `abort` raises in grpc too."""


class _Call:
    """The part of a ServicerContext that the service uses, with grpc's own limits."""

    async def abort(self, code: object, details: str, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        said = dict(metadata)
        require(said.get("hibernode-code") not in (None, "internal"), f"a defect: {details}")
        self._headers((("grpc-message", details), *metadata))
        raise _Aborted

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._headers(metadata)

    async def write(self, message: Message) -> None:
        require(len(message.SerializeToString()) < 4 << 20, "an answer longer than grpc takes")

    def _headers(self, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        size = 0
        for key, value in metadata:
            size += len(key) + (len(value) * 4 // 3 if isinstance(value, bytes) else len(value.encode()))
            printable = key == "grpc-message" or isinstance(value, bytes) or (value.isascii() and value.isprintable())
            require(printable, f"header {key} is {value!r}")
            require(isinstance(value, str) or key.endswith("-bin"), f"header {key} is no text")
        require(size <= _HEADERS, f"headers of {size} bytes")


class _Service:
    """Made once: a node of fakes with a real, empty store, its desk and the service, on a loop of their own."""

    def __init__(self) -> None:
        logging.getLogger("hibernode.rpc").addHandler(logging.NullHandler())
        logging.getLogger("hibernode.rpc").propagate = False
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(1))
        self.loop.run_until_complete(self.loop.run_in_executor(None, int))
        opener = store_opener(Config.model_validate({"store": {"url": f"file://{root()}/store"}}))
        children = Children()
        rig = Rig(root() / "node")
        jobs = _Jobs(Jobs(root() / "jobs", children), rig.criu, children)
        node = replace(rig.node, open_store=opener, jobs=jobs)
        self.node = self.loop.run_until_complete(self._made(node))

    async def _made(self, node: Node) -> _Node:
        return _Node(cast(Any, _Played(Dispatcher(node), node, None)))

    def call(self, method: str, request: Message) -> None:
        self.loop.run_until_complete(self._answered(method, request))

    async def _answered(self, method: str, request: Message) -> None:
        answer = await getattr(self.node, method)(request, _Call())
        if answer is not None:
            require(isinstance(answer.SerializeToString(), bytes), "no answer")
            require(method not in ("Inspect", "Verify"), "a checkpoint in an empty store")


@functools.cache
def _service() -> _Service:
    return _Service()


def one(data: bytes) -> None:
    feed = Feed(data)
    (method, message, good), how = feed.pick(_CALLS), feed.below(2)
    try:
        request = message.FromString(feed.rest()) if how == _RAW else _parsed(message, edited(good, feed))
    except (DecodeError, json_format.ParseError, ValueError, TypeError, AttributeError, RecursionError):
        return  # grpc says no to the bytes; the text is only our way to make some
    service = _service()
    with guarded(_Aborted):
        service.call(method, request)


def _parsed(message: type[Message], text: bytes) -> Message:
    """What an edited document has that the proto has too: the rest falls away, half characters first, of which protobuf's parser dies."""
    request, table = message(), json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace")
    json_format.ParseDict(json.loads(table), request, ignore_unknown_fields=True, max_recursion_depth=20)
    return request


def seeds() -> dict[str, bytes]:
    made = {}
    for n, (method, message, good) in enumerate(_CALLS):
        made[f"{method}-raw"] = bytes([n, _RAW]) + json_format.ParseDict(good, message()).SerializeToString()
        made[f"{method}-edited"] = bytes([n, _EDITED]) + bytes(range(40))
    return made
