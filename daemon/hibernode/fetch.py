"""The images of one checkpoint on their way out of the store, into directories that CRIU reads. Twin: `capture.py`. Of a lazy restore most
pages stay in the store: a `Supply` brings them when the tree runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from hibernode.errors import Corrupt, RestoreFailed
from hibernode.flow import Stopped, Threads
from hibernode.model import FRAME_PAGES, PAGE, ImageRef, LayerRef, Manifest, TaskFacts
from hibernode.node import Attempt, Node
from hibernode.ports import Fetched, Keeper, Store, Workload
from hibernode.transfer.apply import apply
from hibernode.transfer.collect import shut
from hibernode.transfer.pageproto import Wire
from hibernode.transfer.receive import LayerReceiver, Receiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.serve import Server, Shelf, question_sockets

_READERS = 4  # threads of a supply at least: a store is asked for so many frames at a time
_SILENCE = 30.0  # seconds without a question while all are answered: `criu lazy-pages` asks hundreds of times a second


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
    return Fetched(images, layers, supply.begin if supply is not None else None)


def _fetch(store: Store, seal: Seal, image: ImageRef, work: Path, attempt: Attempt) -> None:
    """One image into `work/<name>`: small images, pagemaps, pages; every byte of it compared with its digest."""
    receiver = Receiver(store, seal, image, max(2, len(image.streams)), attempt.meter)
    (directory := work / image.name).mkdir()
    receiver.fetch_files(work / f"{image.name}.tar.zst", directory)
    with Threads(attempt.cancel) as threads:
        receiver.fetch_pages(receiver.fetch_index(), directory, threads)


class Supply(AbstractContextManager["Supply"]):
    """The pages of a lazy restore that come when the tree runs: threads that bring them, and the keeper, which starts when this is entered.
    Left before all is in, it has seen to it that nobody of the tree is left."""

    def __init__(self, node: Node, store: Store, seal: Seal, attempt: Attempt, streams: int) -> None:
        self._node, self._store, self._seal, self._attempt = node, store, seal, attempt
        self._threads = Threads(attempt.cancel)
        self._room, self._readers = node.config.transfer.lazy_room // (FRAME_PAGES * PAGE), max(_READERS, streams)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._shelf = Shelf(self._room, self._readers, self._threads)
            stack.callback(self._shelf.free)
            self._ours, theirs = question_sockets()
            stack.callback(self._ours.close)
            stack.enter_context(self._threads)
            stack.callback(shut, self._ours)
            self._keeper: Keeper = self._node.criu.keeper(theirs)
            stack.callback(self._keeper.close)  # first of all when it ends: what it still holds up ends with it
            self._threads.on_stop(self._keeper.wake)
            self._threads.on_stop(functools.partial(shut, self._ours))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool | None:
        return self._stack.__exit__(kind, error, tb)

    def fetch(self, image: ImageRef, directory: Path) -> None:
        """All but the pages that may come later, into `directory`; from then on those can be asked for."""
        self._image, self._directory = image, directory
        meter = self._attempt.meter
        receiver = Receiver(self._store, self._seal, image, self._readers, meter)
        directory.mkdir()
        receiver.fetch_files(directory.with_suffix(".tar.zst"), directory)
        index, wire = receiver.fetch_index(), Wire(self._node.criu.facts().version)
        self._server = Server(
            self._ours, wire, self._store, self._seal, image, index, self._shelf, meter, outage=self._node.config.limits.outage
        )
        with Threads(self._attempt.cancel) as threads:
            receiver.fetch_fixed(index, directory, threads, self._server.keep)
        work = {"serve": self._server.run} | {f"fill {number}": self._server.read for number in range(self._readers)}
        self._working = [self._threads.start(f"{image.name} {what}", run) for what, run in work.items()]

    def begin(self, procs: Sequence[str], own: Sequence[str]) -> None:
        """As `Keeper.begin`."""
        with self._reasoned():
            self._keeper.begin(self._directory, procs, own)

    def fill(self, workload: Workload) -> None:
        """Wait until all is in. Whatever is raised, the tree may still be there. When this returns the threads have said what they have to
        say: nothing of them ends the action afterwards."""
        self._keeper.told([(process.pid, process.start_time) for process in workload.processes()])
        self._server.heard = time.monotonic()
        with self._reasoned():
            while not self._keeper.wait(1.0):
                if not self._server.waiting and time.monotonic() > self._server.heard + _SILENCE:
                    raise RestoreFailed(
                        f"criu lazy-pages has not asked for a page for {_SILENCE:.0f} s, and not all are in", reason="lazy_stuck",
                        hint="the tree has changed its memory in a way that CRIU does not follow: restore it without `lazy`",
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
