"""The images of one checkpoint on their way into the store: streams opened before the freeze, one dump per tree, then references.

Between CRIU's socket and the store's uploads there are only threads and the arena; what fails first stops all of them, and closes the
page socket, so that CRIU rolls back and the tree runs on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from hibernode.errors import DumpFailed, OutcomeUnknown
from hibernode.flow import Threads
from hibernode.model import PAGE, Cancel, ImageRef, Meter
from hibernode.node import Attempt, Node
from hibernode.ports import Store
from hibernode.preflight import Options
from hibernode.transfer import files
from hibernode.transfer.collect import Collector, page_sockets
from hibernode.transfer.pageproto import Wire
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.send import Packing, Sender


class Capture(AbstractContextManager["Capture"]):
    """One image per tree. Entered, all streams are open and their threads wait. Left without `keep`, nothing stays in the store."""

    def __init__(
        self, node: Node, store: Store, seal: Seal, roots: Mapping[str, int], options: Options, attempt: Attempt, work: Path
    ) -> None:
        self._node, self._roots, self._options, self._work = node, roots, options, work
        self._store, self._seal = store, seal
        self._wire = Wire(node.criu.facts().version)
        self._threads = Threads(attempt.cancel)
        packing = Packing(options.streams, options.level)
        self._senders = {name: Sender(store, seal, name, packing, node.arena, self._threads, attempt.meter) for name in roots}
        self._collected: dict[str, Collector] = {}
        self._stack = ExitStack()
        self._meter = attempt.meter
        self._meter.streams = options.streams * len(roots)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._threads)
            for sender in self._senders.values():
                stack.enter_context(sender)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool | None:
        return self._stack.__exit__(kind, error, tb)

    def dump(self) -> int:
        """Dump every tree; the nanoseconds CRIU held them. When it returns all pages are in the arena or beyond."""
        held_ns = sum(self._dump(name, pid) for name, pid in self._roots.items())
        for collector in self._collected.values():
            collector.release()
        self._meter.bytes_total = sum(collector.pages for collector in self._collected.values()) * PAGE
        return held_ns

    def _dump(self, name: str, pid: int) -> int:
        ours, theirs = page_sockets()
        collector = Collector(ours, self._wire, self._node.arena, self._senders[name].chunks, self._threads)
        self._stack.callback(collector.discard)
        receiving = self._threads.start(f"{name} collect", collector.run)
        (self._work / name).mkdir()
        ending = Cancel()  # also of what no cancel has ended: a stream that failed, the page socket
        self._threads.on_stop(lambda: ending.set("the transfer has ended"))
        try:
            stats = self._node.criu.dump(pid, self._work / name, theirs, self._options.criu, ending)
        except BaseException:
            theirs.close()
            self._threads.join([receiving])  # if our side failed first, that is the reason
            raise
        self._threads.join([receiving])
        if not collector.closed or collector.pages != stats.pages_written:
            raise DumpFailed(f"CRIU wrote {stats.pages_written} pages, {collector.pages} arrived")
        self._collected[name] = collector
        return stats.freezing_ns + stats.frozen_ns

    def finish(self) -> list[ImageRef]:
        """Wait for the last bytes of every image; what the manifest says of them."""
        return [self._finish(name, sender) for name, sender in self._senders.items()]

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
        for sender in self._senders.values():
            sender.keep()
