"""Encrypted pieces, and wrapped data keys: Corrupt or Refused, or just what was encrypted. An enemy can write any bytes, and has seen many
that are good; a key he has not.
"""

from __future__ import annotations

import base64
import functools

from pydantic import ValidationError

from fuzz.feed import Feed
from fuzz.guard import guarded, require, root
from fuzz.targets import golden
from hibernode.children import Children
from hibernode.config import Encryption
from hibernode.drivers.keyring import Keyring
from hibernode.errors import Corrupt, Refused
from hibernode.model import WrappedKey
from hibernode.transfer.seal import PIECE, TAG, Closer, ObjectSeal, Seal, opened

MAX_LENGTH = 8192
_FRAME, _OBJECT, _KEY = 0, 1, 2
_ID = "0d1cbd6c-2b9f-4b5a-9b43-7a3c1f6fd2a0"
_SEAL = Seal(_ID, bytes(range(32)))
_STREAM, _SMALL = _SEAL.of("main/pages-0.zst"), _SEAL.of("main/index.zst")


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(3)
    {_FRAME: _frame, _OBJECT: _object, _KEY: _key}[how](feed)


def _frame(feed: Feed) -> None:
    """One piece of a stream, at a number where it may not belong."""
    number, at = feed.below(4), feed.below(4) if feed.byte() % 2 else feed.number()
    good = _pieces()[number]
    stored = _changed(good, feed) if feed.byte() % 4 else feed.rest()
    with guarded(Corrupt):
        found = bytes(_STREAM.open(at, memoryview(stored), _STREAM.scratch(len(stored) + TAG)))
        require((stored, at) == (good, number), "a forged piece is opened")
        require(found == _content()[number], "other bytes than were encrypted")


def _object(feed: Feed) -> None:
    """A small object whose pieces are changed, left out, doubled or in another order."""
    good, step = _stored(), PIECE + TAG
    pieces = [good[at : at + step] for at in range(0, len(good), step)]
    stored = b"".join(pieces[feed.below(len(pieces))] for _ in range(feed.below(5)))
    stored = _changed(stored or good, feed) if feed.byte() % 2 else stored
    view = memoryview(stored)
    with guarded(Corrupt):
        found = b"".join(bytes(piece) for piece in opened(_SMALL, len(stored), lambda at, size: view[at : at + size]))
        require(stored == good, "a forged object is opened")
        require(found == _whole(), "other bytes than were encrypted")


def _key(feed: Feed) -> None:
    """What a manifest says of its data key."""
    ring, good = _ring()
    raw = base64.b64decode(good.wrapped)
    text = base64.b64encode(_changed(raw, feed)).decode() if feed.byte() % 4 else feed.rest().decode(errors="replace")
    name = good.key if feed.byte() % 4 else feed.take(16).decode(errors="replace")
    checkpoint = _ID if feed.byte() % 4 else _ID.replace("0d1c", "0d1d")
    with guarded(Corrupt, Refused, ValidationError):
        wrapped = WrappedKey(cipher="AES-256-GCM", key=name, wrapped=text)
        found = ring.unwrap(wrapped, checkpoint)
        require((base64.b64decode(text), name, checkpoint) == (raw, good.key, _ID), "a forged key is unwrapped")
        require(found == bytes(range(32)), "another key than was wrapped")


def _changed(good: bytes, feed: Feed) -> bytes:
    """A few bytes of it, anywhere, or its length."""
    stored = bytearray(good)
    for _ in range(feed.below(4)):
        if stored:
            stored[feed.number() % len(stored)] ^= feed.byte()
    cut = feed.below(40)
    return bytes(stored[: len(stored) - cut]) + (feed.take(cut) if feed.byte() % 2 else b"")


@functools.cache
def _content() -> tuple[bytes, ...]:
    stream = golden.stream(1)
    return tuple(stream[n * 1000 : (n + 1) * 1000] for n in range(4))


@functools.cache
def _pieces() -> tuple[bytes, ...]:
    return tuple(_closed(_STREAM, n, content) for n, content in enumerate(_content()))


def _closed(seal: ObjectSeal, number: int, content: bytes) -> bytes:
    return b"".join(seal.close(number, [content], seal.scratch(len(content) + TAG)))


@functools.cache
def _whole() -> bytes:
    return bytes(range(250)) * (2 * PIECE // 250) + b"the end of it"


@functools.cache
def _stored() -> bytes:
    out: list[bytes] = []
    closer = Closer(_SMALL, lambda piece: out.append(bytes(piece)))
    closer.write(_whole())
    closer.end()
    return b"".join(out)


@functools.cache
def _ring() -> tuple[Keyring, WrappedKey]:
    path = root() / "wrapper.key"
    path.touch(0o600)
    path.write_bytes(bytes(range(100, 132)).hex().encode())
    ring = Keyring(Encryption(key=str(path)), Children())
    good = ring.wrap(bytes(range(32)), _ID)
    assert good is not None
    return ring, good


def seeds() -> dict[str, bytes]:
    return {
        "piece": bytes([_FRAME, 1, 0, 1, 0, 1, 0, 0, 0, 0]),
        "moved": bytes([_FRAME, 1, 1, 2, 1, 0, 0, 0]),
        "bytes": bytes([_FRAME, 0, 1, 0, 0]) + bytes(range(100)),
        "object": bytes([_OBJECT, 3, 0, 1, 2, 0]),
        "doubled": bytes([_OBJECT, 4, 0, 1, 1, 2, 0]),
        "changed": bytes([_OBJECT, 0, 1, 2, 9, 9, 9, 9, 9, 9, 9, 9, 1, 8, 8, 8, 8, 8, 8, 8, 8, 1, 5, 1]),
        "key": bytes([_KEY, 1, 1, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1]),
        "text": bytes([_KEY, 0]) + b"AAAA" * 15,
    }
