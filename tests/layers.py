"""A writable layer through the whole of the transfer, and real overlay mounts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hibernode.flow import Threads
from hibernode.model import Cancel, LayerRef, Meter
from hibernode.ports import Store
from hibernode.transfer.apply import apply
from hibernode.transfer.arena import Arena
from hibernode.transfer.filling import Held
from hibernode.transfer.layer import LayerCollector
from hibernode.transfer.receive import LayerReceiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.send import LayerSender, Packing

ID = "0123abcd-0123-4567-89ab-0123456789ab"
PLAIN = Seal(ID)
ARENA = Arena(32 << 20)


def captured(upper: Path, arena: Arena = ARENA) -> tuple[bytes, LayerRef]:
    """The tar of a layer, and what a manifest would say of it, streams left out. It has to fit into the arena."""
    with Threads(Cancel()) as threads, arena.share(arena.total_bytes, Cancel()) as share:
        held, chunks = Held(share), threads.channel(1 << 16)
        collector = LayerCollector(upper, chunks, threads, held)
        pages = bytearray()
        try:
            collector.run()
        finally:
            if not threads.stopping:
                held.release()
            held.discard()
            for chunk in chunks.drain():
                assert chunk.first_page * 4096 == len(pages)
                pages += chunk.data
                share.give_back(chunk)
    assert len(pages) == collector.pages * 4096
    assert not any(pages[collector.bytes :])
    return bytes(pages[: collector.bytes]), described(collector.bytes, collector.entries)


def described(size: int, entries: int) -> LayerRef:
    index = {"key": "main/layer-index.zst", "size": 0, "digest": "0" * 64}
    return LayerRef.model_validate(
        {
            "name": "main",
            "pages": -(-size // 4096),
            "zero_pages": 0,
            "streams": [],
            "index": index,
            "bytes": size,
            "entries": entries,
        }
    )


def applied(data: bytes, ref: LayerRef, root: Path, piece: int = 1 << 22) -> None:
    whole = memoryview(data + bytes(-len(data) % 4096))
    apply((whole[at : at + piece] for at in range(0, len(whole), piece)), root, ref)


def sent(
    upper: Path, store: Store, *, streams: int = 2, level: int | None = 1, seal: Seal = PLAIN, arena: Arena = ARENA
) -> LayerRef:
    """As a checkpoint does it: everything open before, read while frozen, shipped when it runs again."""
    with (
        arena.share(arena.total_bytes, Cancel()) as share,
        Threads(Cancel()) as threads,
        LayerSender(store, seal, "main", Packing(streams, level), share, threads, Meter()) as sender,
    ):
        held = Held(share)
        try:
            collector = LayerCollector(upper, sender.chunks, threads, held)
            collector.run()
            held.release()
            ref = sender.finish(collector.pages, collector.bytes, collector.entries)
            sender.keep()
        finally:
            held.discard()
    return ref


def received(store: Store, ref: LayerRef, root: Path, *, threads: int = 2, seal: Seal = PLAIN) -> None:
    """As a restore does it."""
    receiver = LayerReceiver(store, seal, ref, threads, Meter())
    index = receiver.fetch_index()
    with Threads(Cancel()) as scope, closing(receiver.pieces(index, scope)) as pieces:
        apply(pieces, root, ref)


@dataclass(frozen=True)
class Overlay:
    lower: Path
    upper: Path
    merged: Path


@contextmanager
def overlay(place: Path, lower: Path, options: str = "") -> Iterator[Overlay]:
    """A mount in the new directory `place`; unmounted, not removed, on the way out."""
    for name in ("upper", "work", "merged"):
        (place / name).mkdir(parents=True)
    what = f"lowerdir={lower},upperdir={place}/upper,workdir={place}/work{options}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", what, place / "merged"], check=True, timeout=20)
    try:
        yield Overlay(lower, place / "upper", place / "merged")
    finally:
        subprocess.run(["umount", place / "merged"], check=True, timeout=20)


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All that can be seen of a tree: kinds, modes, owners, times, contents, attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, _, _ in os.walk(os.fsencode(root)):
        for name in [b".", *os.listdir(folder)]:
            path = os.path.join(folder, name)
            facts = os.lstat(path)
            attributes = {
                each: os.getxattr(path, each, follow_symlinks=False) for each in os.listxattr(path, follow_symlinks=False)
            }
            content: object = os.readlink(path) if os.path.islink(path) else None
            if os.path.isfile(path) and not os.path.islink(path):
                content = Path(os.fsdecode(path)).read_bytes()
            found[os.fsdecode(os.path.relpath(path, os.fsencode(root)))] = (
                facts.st_mode, facts.st_uid, facts.st_gid, facts.st_rdev, facts.st_mtime_ns, facts.st_size, content, attributes,
            )  # fmt: skip
    return found
