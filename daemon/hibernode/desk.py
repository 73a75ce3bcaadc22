"""What people ask a node (rpc.Desk): the dispatcher's actions, and the questions that are none: jobs, checkpoints, health, nodes."""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import ParamSpec, TypeVar

from hibernode import catalog, doctor, gc
from hibernode.courier import Courier
from hibernode.dispatch import Dispatcher
from hibernode.errors import Corrupt, HibernodeError
from hibernode.loop import in_thread
from hibernode.model import (
    ActionCommand,
    ActionView,
    Cancel,
    Check,
    Event,
    Garbage,
    GarbageRequest,
    JobSpec,
    Manifest,
    NodeRecord,
    Progress,
    Target,
    Verdict,
    WorkloadView,
)
from hibernode.node import Node

P = ParamSpec("P")
T = TypeVar("T")


class Desk:
    """Answers on the dispatcher's loop; whatever takes time is done in a thread. `courier` None: this node has no bus."""

    def __init__(self, dispatcher: Dispatcher, node: Node, courier: Courier | None) -> None:
        self._dispatcher, self._node, self._courier = dispatcher, node, courier

    async def submit(self, command: ActionCommand, about: Mapping[str, str] | None = None) -> None:
        await self._dispatcher.submit(command, about)

    def watch(self, action_id: str) -> AsyncIterator[Event | Progress]:
        return self._dispatcher.watch(action_id)

    async def cancel(self, action_id: str) -> bool:
        return await self._dispatcher.cancel(action_id)

    async def action(self, action_id: str) -> ActionView:
        return await self._dispatcher.action(action_id)

    async def ended(self, action_id: str) -> ActionView:
        """As it is when it has ended."""
        async for _ in self._dispatcher.watch(action_id):
            pass
        return await self._dispatcher.action(action_id)

    async def was_restored(self, action_id: str) -> bool:
        return self._node.journal.was_restored(action_id)

    async def actions(self) -> list[ActionView]:
        return await self._dispatcher.actions()

    async def workloads(self, target: Target | None) -> list[WorkloadView]:
        return await in_thread(self._node.jobs.views, target)

    async def run_job(self, spec: JobSpec) -> WorkloadView:
        return await self._changing(self._node.jobs.run, spec)

    async def stop_job(self, namespace: str, name: str, signal: str) -> WorkloadView:
        return await self._changing(self._node.jobs.stop, namespace, name, signal)

    async def _changing(self, work: Callable[P, WorkloadView], *args: P.args, **kwargs: P.kwargs) -> WorkloadView:
        """Done in a thread; the others are told soon what runs here then."""
        try:
            return await in_thread(work, *args, **kwargs)
        finally:
            if self._courier is not None:
                self._courier.refresh()

    async def inspect(self, checkpoint_id: str) -> tuple[Manifest, str]:
        store = self._node.open_store("")
        return await in_thread(catalog.read, store, checkpoint_id, self._node.notary), f"{store.location}/{checkpoint_id}"

    def verify(self, checkpoint_id: str) -> AsyncIterator[Verdict]:
        node, store = self._node, self._node.open_store("")

        def work(tell: Callable[[Verdict], None], cancel: Cancel) -> None:
            claim = node.claims.claim(f"checkpoint {checkpoint_id}", f"verify {uuid.uuid4()}")
            with claim, gc.using(store, checkpoint_id, str(uuid.uuid4())):  # what is removed meanwhile would look damaged
                try:
                    tell(catalog.verify(store, checkpoint_id, node.notary, node.keyring, node.host.load().cpus, cancel, tell))
                except Corrupt:
                    node.suspect(checkpoint_id, ())  # first: its bases may be more than the store tells now
                    with suppress(HibernodeError):
                        node.suspect(checkpoint_id, gc.bases_of(store, node.notary, checkpoint_id))
                    raise
                node.clear(checkpoint_id)

        return _told_by(work)

    def collect_garbage(self, request: GarbageRequest) -> AsyncIterator[Garbage]:
        """What goes, or, with `apply`, how it went; then what stays and should be looked at. One at a time is told, none is kept back.
        Whoever stops listening stops it, after the removal at hand."""
        store, policy = self._node.open_store(request.directory), gc.policy(self._node.config.gc, request)

        def work(tell: Callable[[Garbage], None], cancel: Cancel) -> None:
            gc.collect(self._node, store, policy, tell, cancel, apply=request.apply)

        return _told_by(work)

    async def checkpoints(self) -> list[Manifest]:
        return await in_thread(lambda: list(catalog.manifests(self._node.open_store(""), self._node.notary)))

    async def delete(self, checkpoint_id: str) -> None:
        """Remove it; Busy while an action writes it or reads it."""
        with self._node.claims.claim(f"checkpoint {checkpoint_id}", f"delete {uuid.uuid4()}"):
            await in_thread(gc.remove, self._node.open_store(""), self._node.notary, checkpoint_id)

    async def doctor(self) -> list[Check]:
        connected = self._courier.connected if self._courier else None
        return await in_thread(functools.partial(doctor.checks, self._node, bus_connected=connected))

    async def nodes(self) -> list[NodeRecord]:
        return await self._courier.nodes() if self._courier else [await self._dispatcher.record()]


async def _told_by(work: Callable[[Callable[[T], None], Cancel], None]) -> AsyncGenerator[T]:
    """What `work`, in a thread of its own, tells. It is cancelled, and waited for, if nobody listens to its end."""
    queue: asyncio.Queue[T] = asyncio.Queue()
    cancel, loop = Cancel(), asyncio.get_running_loop()

    def tell(told: T) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, told)

    working = asyncio.ensure_future(in_thread(work, tell, cancel))
    try:
        while not working.done():
            getting = asyncio.ensure_future(queue.get())
            await asyncio.wait([working, getting], return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield getting.result()
            getting.cancel()
        while not queue.empty():
            yield queue.get_nowait()
        working.result()
    finally:
        cancel.set("nobody waits for it any more")
        await asyncio.wait([working])
