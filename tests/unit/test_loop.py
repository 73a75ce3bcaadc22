"""Tasks that somebody ends: also those that lose a cancellation."""

from __future__ import annotations

import asyncio
import contextlib

from hibernode.loop import Tasks, end


async def losing(times: int, lost: list[int]) -> None:
    """A task that goes on after as many cancellations, as one does whose library has swallowed them."""
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        lost.append(len(lost))
        if len(lost) > times:
            raise asyncio.CancelledError


async def test_a_task_that_loses_a_cancellation_is_cancelled_again() -> None:
    lost: list[int] = []
    task = asyncio.ensure_future(losing(2, lost))
    await asyncio.sleep(0)
    await end([task], patience=0.01)
    assert task.cancelled()
    assert lost == [0, 1, 2]


async def test_one_that_cleans_up_is_left_in_peace_meanwhile() -> None:
    cleaned = asyncio.Event()

    async def cleaning() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.02)
            cleaned.set()

    tasks = Tasks()
    task = tasks.spawn(cleaning())
    await asyncio.sleep(0)
    await tasks.cancel()
    assert task.done()
    assert cleaned.is_set()
