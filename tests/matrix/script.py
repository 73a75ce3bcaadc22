"""What is to go wrong in the daemon, and where: a plan, counted hits, one deed. Lives in the daemon; the bench hands it its plans.

A point is `<port>.<method>[.<what>].<before|after>`, such as `store.commit.stream.before` or `journal.dumping.after`. The plan names one
and the hit that is meant. Whoever passes a point calls `pass_by`, from whichever thread.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from hibernode.errors import Corrupt, DumpFailed, GpuFailed, NoRoom, RestoreFailed, StoreUnavailable

MESSAGE = 1 << 20  # bytes, more than any has
WAIT = 60.0  # seconds a held point waits for the bench at most


@dataclass(frozen=True)
class Plan:
    """At the `nth` hit of `point`, and at the `times - 1` after it: die, raise `error`, stall for `seconds`, tell, or hold (tell and
    wait until told to go on)."""

    point: str = ""
    nth: int = 1
    deed: str = ""  # die, raise, stall, tell, hold
    error: str = ""
    seconds: float = 0.0
    times: int = 1


class Script:
    """The plan of this daemon. `channel` is its end of a socket pair with the bench: plans and questions come in, what happened goes
    out."""

    def __init__(self, channel: socket.socket, plan: Plan) -> None:
        self._channel, self._plan = channel, plan
        self._lock = threading.Lock()
        self._hits: Counter[str] = Counter()
        self._go = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self._listen, name="matrix", daemon=True).start()

    def pass_by(self, point: str) -> None:
        """Do here what the plan says. Never returns if it says `die`."""
        with self._lock:
            self._hits[point] += 1
            plan, hit = self._plan, self._hits[point]
        if plan.point == point and plan.nth <= hit < plan.nth + plan.times:
            self._do(plan, hit)

    def _do(self, plan: Plan, hit: int) -> None:
        if plan.deed == "hold":
            self._go.clear()
        self._say("fired", point=plan.point, hit=hit, deed=plan.deed)
        match plan.deed:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(WAIT)
            case "raise":
                raise _error(plan.error)
            case "stall":
                time.sleep(plan.seconds)
            case "hold":
                self._go.wait(WAIT)

    def _listen(self) -> None:
        while message := self._channel.recv(MESSAGE):
            said = json.loads(message)
            match said["say"]:
                case "plan":
                    with self._lock:
                        self._plan, hits = Plan(**said["plan"]), self._hits
                        self._hits = Counter()
                    self._go.set()
                    self._say("planned", hits=dict(hits))
                case "go":
                    self._go.set()
                case "census":
                    gc.collect()  # what only waits for that is late, and no leak
                    threads = sorted(thread.name for thread in threading.enumerate())
                    self._say("census", threads=threads, tasks=self._tasks())

    def lives_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def _tasks(self) -> list[str]:
        """What the daemon's loop has to do: each task by its coroutine and the place where it waits."""
        return sorted(map(_describe, asyncio.all_tasks(self._loop))) if self._loop else []

    def _say(self, what: str, **more: object) -> None:
        self._channel.send(json.dumps({"say": what, **more}).encode())


def _describe(task: asyncio.Task[object]) -> str:
    """Down to the innermost frame that a coroutine has."""
    coroutine: Any = task.get_coro()
    names = []
    while coroutine is not None and len(names) < 20:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "ag_frame", None)
        names.append(f"{getattr(coroutine, '__qualname__', type(coroutine).__name__)}:{frame.f_lineno if frame else ''}")
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)
    return " > ".join(names)


def _error(name: str) -> Exception:
    match name:
        case "store_unavailable":
            return StoreUnavailable("the matrix says that the store is away")
        case "no_room":
            return NoRoom("the matrix says that there is no room")
        case "corrupt":
            return Corrupt("the matrix says that this is damaged")
        case "dump_failed":
            return DumpFailed("the matrix says that CRIU could not dump")
        case "gpu_failed":
            return GpuFailed("the matrix says that the driver could not")
        case "restore_failed":
            return RestoreFailed("the matrix says that CRIU could not restore")
    number = {"enospc": errno.ENOSPC, "eio": errno.EIO}[name]
    return OSError(number, os.strerror(number))


def encode_plan(plan: Plan) -> dict[str, object]:
    return asdict(plan)
