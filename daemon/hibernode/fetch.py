"""The images of one checkpoint on their way out of the store, into directories that CRIU reads. Twin: `capture.py`. Where the filler can
bring them, most pages stay in the store: a `Supply` brings them when CRIU has made the tree, before it runs, or, lazily, while it does.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from hibernode import preflight
from hibernode.errors import Corrupt, RestoreFailed
from hibernode.flow import Stopped, Threads
from hibernode.model import PAGE, ImageRef, LayerRef, Manifest, TaskFacts
from hibernode.node import Attempt, Node
from hibernode.ports import CriuOptions, Fetched, Keeper, Store, Workload
from hibernode.transfer.apply import apply
from hibernode.transfer.collect import shut
from hibernode.transfer.format import SegmentTable
from hibernode.transfer.receive import LayerReceiver, Receiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.serve import Plan, Server, Shelf, inherited, turn_sockets

_READERS = 4  # threads of a supply at least: a store is asked for so many frames at a time
# Bytes for each stream, of two at least, and each of its reads in flight, where nobody's wishes have to be met: some frames. Twice as much
# made no difference here (a directory, and an S3 server beside it), but is resident.
_HELD_ROOM = 10 << 20
_SHARED = 16  # one page of so many may be its own process's where it was shared before, and take memory that it did not take
_SILENCE = 30.0  # seconds in which nothing is given out of what is here: a frame takes 3 ms


def fetch(
    node: Node, store: Store, seal: Seal, manifest: Manifest, work: Path, attempt: Attempt, supply: Supply | None = None
) -> Fetched:
    """Each image into a directory of its own below `work`. Corrupt for what is damaged, or is not what the manifest says. A writable layer
    has no place here: it is read when there is a root file system for it. With a `supply` pages that may come later do."""
    images = {}
    for image in manifest.images:
        if supply is None:
            _fetch(store, seal, image, work, attempt)
        else:
            supply.fetch(image, work / image.name)
        images[image.name] = work / image.name
        _compare(image, node.criu.tasks(images[image.name]))
    layers = {layer.name: functools.partial(_apply, store, seal, layer, attempt) for layer in manifest.layers}
    if supply is None or not supply.fills:
        return Fetched(images, layers)
    return Fetched(images, layers, supply.begin, None if supply.lazy else supply)


def by_filler(node: Node, manifest: Manifest, options: CriuOptions) -> bool:
    """Whether most pages go from the store straight to their processes: lazily, or before they run, which is half the work of files that
    CRIU reads (docs/performance.md). Refused for a lazy restore of what cannot be restored so; any other is done by files then. So is
    what CRIU takes away as it makes the tree, so that it would not be there for another try if the pages do not come: connections that
    are to go on, and the names of deleted files (`link_remap`). Whatever is said here, `Supply.fetch` may find that files are better."""
    if options.lazy:
        preflight.lazy(manifest, allowed=node.config.criu.lazy)
        return True
    once = options.tcp == "established" or options.link_remap
    if once or not node.config.criu.filler or len(manifest.images) > 1 or manifest.layers or manifest.gpu is not None:
        return False
    return not node.criu.unfit() and node.workloads.fills(manifest.workload)


def _fetch(store: Store, seal: Seal, image: ImageRef, work: Path, attempt: Attempt) -> None:
    """One image into `work/<name>`: small images, pagemaps, pages; every byte of it compared with its digest."""
    receiver = Receiver(store, seal, image, max(2, len(image.streams)), attempt.meter)
    (directory := work / image.name).mkdir()
    receiver.fetch_files(work / f"{image.name}.tar.zst", directory)
    with Threads(attempt.cancel) as threads:
        receiver.fetch_pages(receiver.fetch_index(), directory, threads)


class Supply(AbstractContextManager["Supply"]):
    """The pages that come when CRIU has made the tree: threads that bring them, and the keeper, which starts when this is entered. `lazy`:
    the tree runs meanwhile. Left before all is in, it has seen to it that nobody of the tree is left."""

    def __init__(self, node: Node, store: Store, seal: Seal, attempt: Attempt, streams: int, *, lazy: bool) -> None:
        self._node, self._store, self._seal, self._attempt, self.lazy = node, store, seal, attempt, lazy
        self._threads = Threads(attempt.cancel)
        reads = max(2, streams) * store.reads_in_flight
        self._readers = max(_READERS, streams if lazy else reads + 1)
        self._unpackers = self._readers if lazy else max(2, streams)  # as by files, where nobody waits for one page
        most = node.config.transfer.lazy_room
        self._room = most if lazy else min(most, reads * _HELD_ROOM)
        self.fills = True
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._shelf = Shelf(self._room, self._readers, self._threads, runs=self.lazy)
            stack.callback(self._shelf.free)
            self._ours, theirs = turn_sockets()
            stack.callback(self._ours.close)
            stack.enter_context(self._threads)
            stack.callback(shut, self._ours)
            self._keeper: Keeper = self._node.criu.keeper(theirs, self._shelf.file)
            stack.callback(self._keeper.close)  # first of all when it ends: what it still holds up ends with it
            self._threads.on_stop(self._keeper.wake)
            self._threads.on_stop(functools.partial(shut, self._ours))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool | None:
        return self._stack.__exit__(kind, error, tb)

    def fetch(self, image: ImageRef, directory: Path) -> None:
        """All but the pages that may come later, into `directory`; from then on those can be asked for. Not lazily, and where the filler
        would take longer, or the tree more memory than it had: all of them, and it has nothing to do (`fills`)."""
        self._image, self._directory = image, directory
        meter = self._attempt.meter
        receiver = Receiver(self._store, self._seal, image, self._unpackers, meter)
        directory.mkdir()
        receiver.fetch_files(directory.with_suffix(".tar.zst"), directory)
        index = receiver.fetch_index()
        plan = Plan(receiver.sources)
        if not self.lazy and (plan.scattered or self._shares(index.segments)):
            self.fills = False
            self._insist_room(directory, (image.pages - image.zero_pages) * PAGE)
            with Threads(self._attempt.cancel) as threads:
                receiver.fetch_pages(index, directory, threads)
            return
        self._insist_room(directory, (image.pages - image.zero_pages) * PAGE - plan.late)
        self._shelf.begin(plan)
        self._table = directory.with_suffix(".table")
        self._table.write_bytes(plan.table.tobytes())
        limits = self._node.config.limits  # held, nobody runs who would be lost: no longer than the attempts that files have
        outage = limits.outage if self.lazy else limits.retry_delay * (limits.attempts - 1)
        self._server = Server(self._ours, self._store, plan, self._shelf, meter, outage=outage, unpackers=self._unpackers)
        with Threads(self._attempt.cancel) as threads:
            receiver.fetch_fixed(index, directory, threads, self._server.keep, tables=not self.lazy)
        work = {"serve": self._server.run} | {f"fill {number}": self._server.read for number in range(self._readers)}
        self._working = [self._threads.start(f"{image.name} {what}", run) for what, run in work.items()]

    def _shares(self, segments: SegmentTable) -> bool:
        """What a process shares with its parent since it was forked CRIU lets them share again (criu/mem.c); by the filler each would get
        its own. Nobody knows which pages that are: so all count that it could be."""
        shared, of = inherited(segments, {task.pid: task.ppid for task in self._image.tasks})
        return shared * _SHARED > of

    def _insist_room(self, directory: Path, fixed: int) -> None:
        """For what CRIU itself reads, which is staged."""
        preflight.insist_room(preflight.WORK_ROOM, self._node.host.room(directory), fixed)

    def begin(self, procs: Sequence[str], own: Sequence[str]) -> None:
        """As `Keeper.begin`."""
        with self._reasoned():
            self._keeper.begin(self._directory, self._table, procs, own)

    def hold(self, criu: int) -> None:
        """ports.Held"""
        self._keeper.hold(criu)

    def fill(self) -> None:
        """ports.Held"""
        with self._attempt.within("holding", self._node.config.limits.transfer_of(self._image.pages * PAGE)):
            self._wait()
            self._attempt.cancel.check()

    def fill_running(self, workload: Workload) -> None:
        """Wait until all is in, with a tree that runs. Whatever is raised, it may still be there."""
        self._keeper.told([(process.pid, process.start_time) for process in workload.processes()])
        self._wait()

    def _wait(self) -> None:
        """When this returns the threads have said what they have to say: nothing of them ends the action afterwards."""
        self._server.heard = time.monotonic()
        with self._reasoned():
            while not self._keeper.wait(1.0):
                if self._shelf.given and time.monotonic() > self._server.heard + _SILENCE:
                    raise RestoreFailed(
                        f"for {_SILENCE:.0f} s nothing was given out of what is here for the tree", reason="lazy_stuck",
                        hint="has somebody stopped the filler, or the machine? It is a child of the keeper",
                    )  # fmt: skip
            self._threads.join(self._working)
        self._attempt.meter.fill(self._image.pages * PAGE, self._image.zero_pages * PAGE)

    def _reasoned(self) -> _Reasoned:
        return _Reasoned(self._threads)


class _Reasoned(AbstractContextManager["_Reasoned"]):
    """What went wrong in a thread is the reason of what failed here: CRIU has only seen the end of its socket."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, RestoreFailed | Stopped):
            self._threads.join(())


def _apply(store: Store, seal: Seal, layer: LayerRef, attempt: Attempt, root: Path) -> None:
    """Through the mount at `root`, as it comes: each frame is compared before, the last may be read when the first is there already."""
    receiver = LayerReceiver(store, seal, layer, max(2, len(layer.streams)), attempt.meter)
    index = receiver.fetch_index()
    with Threads(attempt.cancel) as threads, closing(receiver.pieces(index, threads)) as pieces:
        apply(pieces, root, layer)


def _compare(image: ImageRef, found: list[TaskFacts]) -> None:
    """What was asked for (are these pids free? who is killed if it fails?) must be what CRIU will make."""
    zombies = {task.pid for task in found if task.dead}  # whose threads an older manifest may have made up

    def pids(tasks: list[TaskFacts]) -> list[tuple[int, int, list[int]]]:
        return [(task.pid, task.ppid, [] if task.pid in zombies else sorted(task.threads)) for task in tasks]

    if pids(image.tasks) != pids(found):
        raise Corrupt(
            f"image {image.name!r}: the manifest names other tasks than CRIU's images hold", hint="take another checkpoint"
        )
