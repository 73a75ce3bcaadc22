"""The images of one checkpoint on their way into the store: streams opened before the freeze, one dump per tree, then references.

Between CRIU's socket and the store's uploads there are only threads and the arena; what fails first stops all of them, and closes the
page socket, so that CRIU rolls back and the tree runs on.
"""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from hibernode import preflight
from hibernode.errors import DumpFailed, OutcomeUnknown
from hibernode.flow import Threads
from hibernode.model import PAGE, Cancel, ImageRef, Kind, LayerRef, Meter
from hibernode.node import Attempt, Node
from hibernode.ports import ProcessFacts, Store, Workload
from hibernode.preflight import Options
from hibernode.transfer import files, layer
from hibernode.transfer.arena import Share
from hibernode.transfer.collect import Collector, page_sockets
from hibernode.transfer.filling import Held
from hibernode.transfer.known import Known
from hibernode.transfer.layer import LayerCollector
from hibernode.transfer.pageproto import Wire
from hibernode.transfer.receive import LayerReceiver, Receiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.send import LayerSender, Packing, Sender

_LACKING = ("restoring", "holding", "probing", "filling")  # phases in which a tree may run and lack pages
_NOTHING_KNOWN: Mapping[str, Known] = {}


class Captured(NamedTuple):
    images: list[ImageRef]
    layers: list[LayerRef]


def survey(workload: Workload, kind: Kind, cancel: Cancel) -> int:
    """Bytes of the writable layers that are to be captured, about: they may change until it is frozen. Refused where one could not be."""
    size = 0
    for facts in workload.layers().values() if kind != "simple" else ():
        layer.check_mount(facts.options)
        size += layer.survey(facts.upper, cancel).bytes
    return size


def living(node: Node, workload: Workload) -> Sequence[ProcessFacts]:
    """Of the workload, now. Refused where pages of one are still missing, which a checkpoint would take for zeros: of a lazy restore, which
    has claimed only who is in its image, and not who was forked since. Asked only while there is one: it takes time."""
    processes = workload.processes()
    if any(not entry.settled and entry.record.phase in _LACKING for entry in node.journal.all()):
        preflight.whole([process for process in processes if node.host.lacks_pages(process.pid)])
    return processes


class Capture(AbstractContextManager["Capture"]):
    """One image per tree, and the writable layers of containers, as `kind` says. Entered, all streams are open and their threads wait.
    Left without `keep`, nothing stays in the store."""

    def __init__(
        self,
        node: Node,
        share: Share,
        store: Store,
        seal: Seal,
        workload: Workload,
        kind: Kind,
        options: Options,
        attempt: Attempt,
        work: Path,
        known: Mapping[str, Known] = _NOTHING_KNOWN,
    ) -> None:
        """`known`: by image, pages that need not be stored; of an image that is not there no digests are kept."""
        self._node, self._workload, self._options, self._work = node, workload, options, work
        self._layers = workload.layers() if kind != "simple" else {}
        self._store, self._seal = store, seal
        self._wire = Wire(node.criu.facts().version)
        self._threads = Threads(attempt.cancel)
        packing = Packing(options.streams, options.level)
        to = (packing, share, self._threads, attempt.meter)
        names = workload.roots() if kind != "rootfsonly" else ()
        self._senders = {name: Sender(store, seal, name, *to, known.get(name)) for name in names}
        self._layer_senders = {name: LayerSender(store, seal, name, *to) for name in self._layers}
        self._held = Held(share)  # of all: each alone could wait for room that the others hold
        self._collected: dict[str, Collector] = {}
        self._read: dict[str, LayerCollector] = {}
        self._stack = ExitStack()
        self._meter = attempt.meter
        self._meter.streams = options.streams * len([*self._senders, *self._layers])

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._threads)
            stack.callback(self._held.discard)
            for sender in (*self._senders.values(), *self._layer_senders.values()):
                stack.enter_context(sender)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool | None:
        return self._stack.__exit__(kind, error, tb)

    def dump(self, since: int) -> int:
        """Dump every tree; the nanoseconds they were held, `since` then or (0) by CRIU. When it returns all pages are in the arena or
        beyond."""
        held_ns = sum(self._dump(name) for name in self._senders)
        for name, facts in self._layers.items():
            self._read[name] = LayerCollector(facts.upper, self._layer_senders[name].chunks, self._threads, self._held)
            self._read[name].run()
        self._held.release()
        self._held.share.full()
        pages = [each.pages for each in self._collected.values()] + [each.pages for each in self._read.values()]
        self._meter.bytes_total = sum(pages) * PAGE
        return time.monotonic_ns() - since if since else held_ns

    def _dump(self, name: str) -> int:
        (self._work / name).mkdir()
        ours, theirs = page_sockets()
        collecting = self._threads.start(f"{name} collect", self._collect, name, ours)
        ending = Cancel()  # also of what no cancel has ended: a stream that failed, the page socket
        self._threads.on_stop(lambda: ending.set("the transfer has ended"))
        try:
            with theirs:
                stats = self._workload.dump(name, self._work / name, theirs, self._options.criu, ending)
        finally:
            self._threads.join([collecting])  # if our side failed first, that is the reason
        collector = self._collected.get(name)
        if collector is None or not collector.closed or collector.pages != stats.pages_written:
            arrived = collector.pages if collector is not None else 0
            raise DumpFailed(f"CRIU wrote {stats.pages_written} pages, {arrived} arrived")
        return stats.freezing_ns + stats.frozen_ns

    def _collect(self, name: str, pages: socket.socket) -> None:
        collector = Collector(pages, self._wire, self._senders[name].chunks, self._threads, self._held)
        self._collected[name] = collector
        collector.run()

    def finish(self) -> Captured:
        """Wait for the last bytes of everything; what the manifest says of it."""
        images = [self._finish(name, sender) for name, sender in self._senders.items()]
        return Captured(images, [self._finish_layer(name, sender) for name, sender in self._layer_senders.items()])

    def _finish_layer(self, name: str, sender: LayerSender) -> LayerRef:
        read = self._read[name]
        found = sender.finish(read.pages, read.bytes, read.entries)
        LayerReceiver(self._store, self._seal, found, 1, Meter()).fetch_index()  # as of an image
        return found

    def _finish(self, name: str, sender: Sender) -> ImageRef:
        collector, tasks = self._collected[name], self._node.criu.tasks(self._work / name)
        image = sender.finish(collector.table, collector.pages, tasks, functools.partial(files.pack, self._work / name))
        Receiver(self._store, self._seal, image, 1, Meter()).fetch_index()  # what could not be read must never be `ready`
        return image

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """The checkpoint is committed inside. Afterwards nothing of it is undone: nor if nobody knows whether it was, because a
        manifest that can be seen must not name what is gone."""
        try:
            yield
        except OutcomeUnknown:
            self._keep()
            raise
        self._keep()

    def _keep(self) -> None:
        for sender in (*self._senders.values(), *self._layer_senders.values()):
            sender.keep()
