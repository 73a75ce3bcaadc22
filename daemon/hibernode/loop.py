"""The event loop's side of things: tasks that nobody forgets, and the only crossing from the loop to threads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import ParamSpec, TypeVar

from hibernode.errors import HibernodeError

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger("hibernode")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread and wait for it. If this call is cancelled it still waits: a thread abandoned while a workload is frozen
    is the worst thing that can happen here."""
    future = asyncio.get_running_loop().run_in_executor(None, functools.partial(work, *args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        raise


async def end(tasks: Iterable[asyncio.Task[None]], patience: float = 3.0) -> None:
    """Cancel these, and every `patience` seconds again until they have ended: once may not be enough, because `asyncio.wait_for` of Python
    3.11, which nats-py is full of, loses a cancellation that comes together with what it waits for."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=patience)


class Tasks:
    """Tasks that belong to somebody: what one of them dies of is logged, and none outlives `cancel`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            known = isinstance(error, HibernodeError)
            _log.error("a task of the daemon ended: %s", error, exc_info=None if known else error)

    async def finish(self, seconds: float) -> None:
        """Give them so long to end by themselves."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)

    async def cancel(self) -> None:
        await end(self._tasks)
