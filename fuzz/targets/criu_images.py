"""CRIU's own small images, as we read them: who the tasks are, and the statistics of a dump. Corrupt (DumpFailed), or tasks that can be."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

from pycriu.images import core_pb2, magic, pstree_pb2, stats_pb2

from fuzz.feed import Feed
from fuzz.guard import guarded, require
from hibernode.children import Children
from hibernode.drivers import criu
from hibernode.errors import Corrupt, DumpFailed

MAX_LENGTH = 8192
_RAW, _ENTRIES, _BUILT, _MANY = 0, 1, 2, 3
_PIDS = (1, 2, 7, 0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(4)
    made = {_RAW: _raw, _ENTRIES: _entries, _BUILT: _built, _MANY: _many}[how](feed)
    with guarded(Corrupt, DumpFailed) as place:
        images = place / "images"
        images.mkdir()
        for name, content in made.items():
            (images / name).write_bytes(content)
        _read(images, place)


def _read(images: Path, place: Path) -> None:
    with contextlib.suppress(DumpFailed):
        stats = criu.read_stats(images)
        require(min(stats.freezing_ns, stats.frozen_ns, stats.pages_written) >= 0, "negative statistics")
    criu.log_tail(images / "dump.log")
    tasks = criu.Criu("/nowhere/criu", Children(), place / "plugins").tasks(images)
    require(all(0 < task.pid < 1 << 31 and len(task.comm) <= 64 for task in tasks), "a task that cannot be")


def _raw(feed: Feed) -> dict[str, bytes]:
    """Three files and a log, cut out of the bytes."""
    cuts = [feed.below(1 << 12) for _ in range(3)]
    return {
        "pstree.img": feed.take(cuts[0]),
        "core-1.img": feed.take(cuts[1]),
        "stats-dump": feed.take(cuts[2]),
        "dump.log": feed.rest(),
    }


def _entries(feed: Feed) -> dict[str, bytes]:
    """Right magic numbers and lengths, and any bytes as the messages."""
    return {
        "pstree.img": _image("PSTREE", *(feed.take(feed.byte()) for _ in range(feed.below(6)))),
        "core-1.img": _image("CORE", *(feed.take(feed.byte()) for _ in range(feed.below(3)))),
        "stats-dump": _image("STATS", *(feed.take(feed.byte()) for _ in range(feed.below(3)))),
    }


def _built(feed: Feed) -> dict[str, bytes]:
    """Real messages with hostile values: pids that cannot be, a task that comes twice, names of files, very many threads."""
    trees, made = [], {}
    for _ in range(feed.below(8)):
        pid = feed.pick(_PIDS)
        threads = [feed.number() % (1 << 32) for _ in range(feed.below(6))] * (
            1 + feed.below(1 << 12) if feed.byte() > 200 else 1
        )
        tree = pstree_pb2.pstree_entry(pid=pid, ppid=feed.pick(_PIDS), pgid=1, sid=1, threads=threads)
        trees.append(tree.SerializeToString())
        core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
        core.tc.task_state = feed.number() % (1 << 32)
        core.tc.comm = feed.pick(("train", "", "x" * 300, "\0", "a\nb", "\u202e", feed.text()))
        if feed.byte() % 8:
            made[f"core-{pid}.img"] = _image("CORE", core.SerializePartialToString())
    stats = stats_pb2.stats_entry()
    for field in stats.dump.DESCRIPTOR.fields:
        setattr(stats.dump, field.name, feed.number() % (1 << (32 if field.cpp_type == field.CPPTYPE_UINT32 else 64)))
    return made | {"pstree.img": _image("PSTREE", *trees), "stats-dump": _image("STATS", stats.SerializePartialToString())}


def _many(feed: Feed) -> dict[str, bytes]:
    """Very many entries, or one very long one: what unpacks to that much is small in a store."""
    count = feed.very_many(1 << 23, 1 << 8)
    entry = struct.pack("<I", 0) if feed.byte() % 2 else struct.pack("<I", 2) + b"\x08\x01"
    made = {name: _image(kind) + entry * count for name, kind in (("pstree.img", "PSTREE"), ("stats-dump", "STATS"))}
    return made | {"core-1.img": _image("CORE") + struct.pack("<I", count) + bytes(count)}


def _image(kind: str, *entries: bytes) -> bytes:
    head = struct.pack("<II", magic.by_name["IMG_SERVICE" if kind == "STATS" else "IMG_COMMON"], magic.by_name[kind])
    return head + b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)


def seeds() -> dict[str, bytes]:
    made = _built(Feed(bytes([2, 0, 1, 2, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0])))
    pstree, core, stats = made["pstree.img"], made.get("core-1.img", _image("CORE", b"")), made["stats-dump"]
    cuts = b"".join(struct.pack("<H", len(part)) for part in (pstree, core, stats))
    log = b"(00.001) Error (criu/x.c:1): it failed\n(00.002) Warn  (criu/y.c:2): so so\n"
    return {
        "raw": bytes([_RAW]) + cuts + pstree + core + stats + log,
        "entries": bytes([_ENTRIES]) + b"".join(bytes([1, len(file) - 12]) + file[12:] for file in (pstree, core, stats)),
        "built": bytes([_BUILT, 2, 0, 1, 2, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0]),
        "many": bytes([_MANY, 9, 1]),
        "built-more": bytes([_BUILT, 7]) + bytes(range(120)),
    }
