"""The page socket, read by a `Collector`: whatever is sent, it ends, closes its socket, gives every chunk back, and says Corrupt."""

from __future__ import annotations

import contextlib
import socket
from itertools import pairwise

from fuzz.feed import Feed
from fuzz.guard import guarded, require
from hibernode.errors import Corrupt
from hibernode.flow import Channel, Threads
from hibernode.model import FRAME_PAGES, PAGE, Cancel
from hibernode.transfer import pageproto
from hibernode.transfer.arena import Arena, Chunk, Share
from hibernode.transfer.collect import Collector, page_sockets
from hibernode.transfer.filling import Held
from hibernode.transfer.pageproto import PRESENT, Header, Wire

MAX_LENGTH = 4096
_RAW, _BUILT = 0, 1
_ARENA = Arena(8 << 20)  # two chunks: whoever takes them away is waited for
_MOST_PAGES = 2100  # that one run sends: a little more than the arena holds
_COMMANDS = (
    pageproto.ADD_F, pageproto.ADD_F, pageproto.ADD_F, pageproto.OPEN2, pageproto.PARENT, pageproto.CLOSE, pageproto.FORCE_CLOSE,
    pageproto.GET,
)  # fmt: skip
_LENGTHS = (1, 2, FRAME_PAGES, FRAME_PAGES + 1, 3, 500)  # pages of a segment
_PATIENCE = 10.0  # seconds in which a collector ends once its peer has said all


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(2)
    wire = Wire(40201 if feed.byte() % 4 else 40100)
    sent = [feed.rest()] if how == _RAW else _built(feed, wire)
    with guarded(Corrupt):
        try:
            _collect(wire, sent)
        finally:
            require(_ARENA.used_bytes == 0, f"{_ARENA.used_bytes} bytes of the arena are not given back")


def _collect(wire: Wire, sent: list[bytes]) -> None:
    ours, theirs = page_sockets()
    with theirs, _ARENA.share(_ARENA.total_bytes, Cancel()) as share, Threads(Cancel()) as threads:
        chunks: Channel[Chunk] = threads.channel(4)
        taken: list[tuple[int, int]] = []
        held = Held(share)
        collector = Collector(ours, wire, chunks, threads, held)
        threads.start("take", _take, share, chunks, taken)
        work = threads.start("collect", collector.run)
        try:
            _play(theirs, sent)
            work.join(_PATIENCE)
            require(not work.is_alive() and ours.fileno() == -1, "the collector is still there, with its socket open")
            with contextlib.suppress(Exception):
                held.release()
            chunks.close()
        finally:
            _close(held, chunks)
        threads.join([])
    if collector.closed:
        _check(collector, taken)


def _close(held: Held, chunks: Channel[Chunk]) -> None:
    chunks.close()
    held.discard()
    for chunk in chunks.drain() if chunks._stopped else ():
        held.share.give_back(chunk)


def _take(share: Share, chunks: Channel[Chunk], taken: list[tuple[int, int]]) -> None:
    for chunk in chunks:
        taken.append((chunk.first_page, chunk.pages))
        share.give_back(chunk)


def _play(theirs: socket.socket, sent: list[bytes]) -> None:
    """Say all, then wait for the other side to close. It may have closed long before."""
    theirs.settimeout(_PATIENCE)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in sent:
            theirs.sendall(piece)
        theirs.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
        while theirs.recv(1 << 16):
            pass


def _check(collector: Collector, taken: list[tuple[int, int]]) -> None:
    table = collector.table
    present = table["flags"] & PRESENT != 0
    require(int(table["pages"][present].sum()) == collector.pages, "the segments name other pages than came")
    runs = sorted(taken)
    require(sum(pages for _, pages in runs) == collector.pages, "pages are lost")
    require(all(first + pages == after for (first, pages), (after, _) in pairwise(runs)), "chunks do not follow each other")


def _built(feed: Feed, wire: Wire) -> list[bytes]:
    """Headers that can be, mostly, with the pages that they announce, mostly."""
    sent, left = [], _MOST_PAGES
    for _ in range(feed.below(24)):
        command = feed.pick((*_COMMANDS, feed.byte()))
        any_pages = feed.byte() % 8 == 0
        pages = feed.number() % (1 << (64 if wire.size == 32 else 32)) if any_pages else feed.pick(_LENGTHS)
        flags = feed.pick((PRESENT, 0, PRESENT, 2, 6, 1, 0xFFFF))
        vaddr = feed.below(1 << 16) * PAGE if feed.byte() % 8 else feed.number()
        sent.append(wire.encode(Header(command, flags, pages, vaddr, feed.byte() << 8 | feed.below(3))))
        if command == pageproto.ADD_F and flags & PRESENT:
            announced = min(pages, left)
            left -= announced
            sent.append(bytes(announced * PAGE if feed.byte() % 16 else feed.below(1 << 14)))
    return [*sent, wire.encode(Header(pageproto.CLOSE, 0, 0, 0, 0)), feed.rest()]


def seeds() -> dict[str, bytes]:
    wire = Wire(40201)
    space = 1 << 8 | pageproto.TASK
    dump = b"".join(
        (
            wire.encode(Header(pageproto.OPEN2, 0, 0, 0, space)),
            wire.encode(Header(pageproto.PARENT, 0, 0, 0, space)),
            wire.encode(Header(pageproto.ADD_F, 0, 3, 0x400000, 0)),
            wire.encode(Header(pageproto.ADD_F, PRESENT, 0, 0x400000, 0)),
            wire.encode(Header(pageproto.CLOSE, 0, 0, 0, 0)),
        )
    )
    return {
        "raw": bytes([_RAW, 1]) + dump,
        "raw-older": bytes([_RAW, 0]) + dump,
        "built": bytes(
            [_BUILT, 1, 3, 3, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 3, 0, 1, 0, 0, 1, 1]
        ),
        "built-more": bytes([_BUILT, 1, 9]) + bytes(range(1, 120)),
    }
