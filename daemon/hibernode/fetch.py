"""The images of one checkpoint on their way out of the store, into directories that CRIU reads. Twin: `capture.py`."""

from __future__ import annotations

import functools
from contextlib import closing
from pathlib import Path

from hibernode.errors import Corrupt
from hibernode.flow import Threads
from hibernode.model import ImageRef, LayerRef, Manifest, TaskFacts
from hibernode.node import Attempt, Node
from hibernode.ports import Fetched, Store
from hibernode.transfer.apply import apply
from hibernode.transfer.receive import LayerReceiver, Receiver
from hibernode.transfer.seal import Seal


def fetch(node: Node, store: Store, seal: Seal, manifest: Manifest, work: Path, attempt: Attempt) -> Fetched:
    """Each image into a directory of its own below `work`. Corrupt for what is damaged, or is not what the manifest says. A writable layer
    has no place here: it is read when there is a root file system for it."""
    images = {}
    for image in manifest.images:
        _fetch(store, seal, image, work, attempt)
        images[image.name] = work / image.name
        _compare(image, node.criu.tasks(images[image.name]))
    return Fetched(images, {layer.name: functools.partial(_apply, store, seal, layer, attempt) for layer in manifest.layers})


def _fetch(store: Store, seal: Seal, image: ImageRef, work: Path, attempt: Attempt) -> None:
    """One image into `work/<name>`: small images, pagemaps, pages; every byte of it compared with its digest."""
    receiver = Receiver(store, seal, image, max(2, len(image.streams)), attempt.meter)
    (directory := work / image.name).mkdir()
    receiver.fetch_files(work / f"{image.name}.tar.zst", directory)
    with Threads(attempt.cancel) as threads:
        receiver.fetch_pages(receiver.fetch_index(), directory, threads)


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
