"""What the OCI runtime in front of runc (`runtime/hibernode_runc.py`) asks this node: JSON, one line each way, on a socket of its own.

    create    {"call": "create", "id", "root", "bundle", "annotations"}  ->  {"do": "restore", "images", "flags", "env"}
                                                                             {"do": "start"}     make it as you would without us
                                                                             {"do": "fail", "code", "message", "hint"}
              after a restore, on the same connection: {"ok": true} or {"ok": false, "log": [...]}  ->  {"do": "done"}
    start     {"call": "start", "id"}                                    ->  {"do": "start"}, or {"do": "fail", ...}
              when it runs, on the same connection: {"ok": true}         ->  {"do": "done"}

Instead of `done` it may hear `fail`: then its restore has ended meanwhile, and it is not to run.

A pod that is to be restored names the checkpoint in an annotation. The first of its containers that is made begins the restore, as an
action like any other, unless whoever made the pod has begun it; the others join it. The action's id is made of the pod's UID and the
checkpoint's, so that it is the same after a restart of the daemon, and a container that ends later and is made again is simply started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hibernode.arrivals import Arrival, Arrivals, Order
from hibernode.door import bound, caller
from hibernode.errors import BadCommand, HibernodeError, Interrupted, NotFound, RestoreFailed
from hibernode.loop import Tasks
from hibernode.model import ActionView, Overrides, RestoreCommand, Status
from hibernode.pods import ACTION, CHECKPOINT, CRIU_OPTS, STORE

_POD, _NAME, _NAMESPACE = "io.kubernetes.cri.sandbox-uid", "io.kubernetes.cri.sandbox-name", "io.kubernetes.cri.sandbox-namespace"
_CONTAINER = "io.kubernetes.cri.container-name"
_LINE = 1 << 20  # bytes of one
_TRIES = 100  # actions of one pod, where each but the last has ended with something that passes
_ACTIONS = uuid.UUID("5b0a7d1e-4f0c-5d7b-9a53-6f1a6f3c3b11")  # names the space of their ids
_log = logging.getLogger("hibernode.runtime")


class Desk(Protocol):
    """Called on the event loop; raises only HibernodeError."""

    async def submit(self, command: RestoreCommand) -> None: ...
    async def action(self, action_id: str) -> ActionView: ...
    async def ended(self, action_id: str) -> ActionView:
        """When it has."""

    async def was_restored(self, action_id: str) -> bool:
        """A restore that was ready, also if nothing else is known of it any more."""


class RuntimeServer:
    """One socket at `path`, for root alone. The event loop's thread."""

    def __init__(self, desk: Desk, arrivals: Arrivals, path: Path) -> None:
        self._desk, self._arrivals, self._path = desk, arrivals, path
        self._guests = Tasks()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._meet, sock=bound(self._path), limit=_LINE)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        await self._guests.cancel()

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, uid = caller(writer)
        if uid not in (0, os.geteuid()):
            writer.transport.abort()
            return
        self._guests.spawn(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await _line(reader)
            match asked.get("call"):
                case "create":
                    await self._create(asked, reader, writer)
                case "start":
                    await self._start(str(asked.get("id", "")), reader, writer)
                case other:
                    raise BadCommand(f"no call: {other!r}", property="call", found=str(other), wanted="create or start")
        except HibernodeError as e:
            with contextlib.suppress(OSError):
                await _say(writer, _failure(e, untouched=True))
        except (OSError, asyncio.IncompleteReadError):
            return  # it has gone
        finally:
            writer.close()

    async def _create(self, asked: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        notes = {str(key): str(value) for key, value in dict(asked.get("annotations") or {}).items()}
        action_id = await self._action_of(notes)
        if not action_id:
            return await _say(writer, {"do": "start"})
        arrival = Arrival(
            action_id, notes.get(_CONTAINER, "main"), str(asked["id"]), Path(str(asked["root"])), Path(str(asked["bundle"])),
            notes.get(_POD, ""), notes.get(_NAMESPACE, ""),
        )  # fmt: skip
        self._arrivals.arrive(arrival)
        ending = asyncio.ensure_future(self._end(arrival))
        gone = asyncio.ensure_future(_line(reader))  # what it says next is how it went; or it ends
        try:
            ordering = asyncio.wrap_future(arrival.order)
            waiting: list[asyncio.Future[Any]] = [ordering, gone]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not ordering.done():
                ordering.cancel()
                return arrival.end(RestoreFailed(f"the runtime gave up on container {arrival.name!r}"))
            order = ordering.result()
            if order.images is None:
                await _say(writer, {"do": "start"})
                return arrival.made.set_result(None)
            order_said = {"do": "restore", "images": str(order.images), "flags": list(order.flags), "env": dict(order.env)}
            await _say(writer, order_said)
            self._note(arrival, await gone)
            arrival.made.result()  # else it is not to run: what the action says is what it hears
            await _say(writer, {"do": "done"})
        except HibernodeError as e:
            arrival.end(e)
            await _say(writer, _failure(e, untouched=not arrival.touched))
        except (OSError, asyncio.IncompleteReadError):
            arrival.end(RestoreFailed(f"the runtime died while it restored container {arrival.name!r}"))
        finally:
            for each in (ending, gone):
                each.cancel()
            self._arrivals.leave(arrival)
        return None

    async def _start(self, container_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Who was restored for an action that has ended since, or for a daemon before this one, does not run."""
        if not self._arrivals.awaits(container_id):
            raise RestoreFailed("its restore has ended before it was started", hint="`hibernode status` says how; make it anew")
        await _say(writer, {"do": "start"})
        if (await _line(reader)).get("ok") is True:
            self._arrivals.started(container_id)
        await _say(writer, {"do": "done"})

    def _note(self, arrival: Arrival, said: Mapping[str, Any]) -> None:
        if arrival.made.done():
            return
        if said.get("ok") is True:
            arrival.made.set_result(None)
            return
        log = [str(line) for line in said.get("log") or ()][-40:]
        errors = (
            line for line in log if "Error" in line and "RLIMIT_NOFILE" not in line
        )  # which CRIU says of itself, and goes on
        first = next(errors, log[-1] if log else "runc restore failed")
        arrival.made.set_exception(
            RestoreFailed(f"CRIU could not restore container {arrival.name!r}: {first}", container=arrival.name, criu_log=log)
        )

    async def _end(self, arrival: Arrival) -> None:
        """Whatever becomes of the action, nobody waits for it for ever."""
        view = await self._desk.ended(arrival.action_id)
        if view.status == Status.READY:
            arrival.give(Order())  # it came when all that is in the checkpoint was there
        else:
            arrival.end(_told(view))

    async def _action_of(self, notes: Mapping[str, str]) -> str:
        """The restore that this container is for; begun now, if it was not. "": none, it has to be started. Raises as that has ended."""
        if not notes.get(CHECKPOINT):
            return ""
        if not (action_id := notes.get(ACTION, "")):
            return await self._of_its_own(notes)
        try:
            return await self._joined(action_id)
        except NotFound:  # nobody remembers it: it has ended long ago, and this container is made anew
            _log.warning("action %s of pod %s is not known any more: its container is started", action_id, notes.get(_NAME, ""))
            return ""

    async def _of_its_own(self, notes: Mapping[str, str]) -> str:
        """Of a pod that nobody else has begun a restore for."""
        checkpoint_id, pod_id = notes[CHECKPOINT], notes.get(_POD, "")
        tries = [str(uuid.uuid5(_ACTIONS, f"{pod_id} {checkpoint_id} {number}")) for number in range(_TRIES)]
        for action_id in tries:
            if await self._desk.was_restored(action_id):
                return ""  # it has ended since, and is made anew
        for action_id in tries:
            try:
                view = await self._desk.action(action_id)
            except NotFound:
                overrides = Overrides(
                    directory=notes.get(STORE, ""), criu_opts=notes.get(CRIU_OPTS, ""), pod_name=notes.get(_NAME, "")
                )
                await self._desk.submit(
                    RestoreCommand(action_id=action_id, checkpoint_id=checkpoint_id, pod_id=pod_id, overrides=overrides)
                )
                _log.info("pod %s/%s is restored", notes.get(_NAMESPACE, ""), notes.get(_NAME, ""))
                return action_id
            if not (view.last and (view.last.retry or view.last.code == Interrupted.code)):
                return await self._joined(action_id)
        return ""

    async def _joined(self, action_id: str) -> str:
        view = await self._desk.action(action_id)
        if not view.status.terminal:
            return action_id
        if view.status == Status.READY:
            return ""  # it was restored once, has ended, and is made anew
        raise _told(view)


def _told(view: ActionView) -> HibernodeError:
    """How an action has ended, for whoever makes the pod."""
    if view.last is None:
        return RestoreFailed("the restore has ended")
    error = RestoreFailed(view.last.message, hint=view.last.hint)
    error.code = view.last.code
    return error


def _failure(error: HibernodeError, *, untouched: bool) -> dict[str, Any]:
    """`untouched`: nothing was begun with this container, so that it may be made without us."""
    return {"do": "fail", "code": error.code, "message": error.message, "hint": error.hint, "untouched": untouched}


async def _line(reader: asyncio.StreamReader) -> dict[str, Any]:
    try:
        found = json.loads(await reader.readuntil(b"\n"))
    except (ValueError, asyncio.LimitOverrunError) as e:
        raise BadCommand(f"no line of JSON: {e}", property="line", found="something else", wanted="one object in a line") from e
    if not isinstance(found, dict):
        raise BadCommand("no JSON object", property="line", found=type(found).__name__, wanted="an object")
    return found


async def _say(writer: asyncio.StreamWriter, answer: Mapping[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()
