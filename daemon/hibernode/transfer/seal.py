"""AES-256-GCM for the objects of an image, pure: what is between the compressor and the store's own bytes. `docs/image-format.md` says
it in words.

One data key per attempt at a checkpoint, out of which each object gets a key of its own; so a number, the nonce, is only used once
with a key. A piece (a frame of a stream, or 1 MiB of a small object) says with its tag whose it is: of which checkpoint, which object,
which number, and of a small object whether it is the last. Nothing can be put into another's place, left out or cut off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hibernode.errors import Corrupt
from hibernode.model import WrappedKey

KEY = 32  # bytes
TAG = 16  # bytes that a piece is longer sealed than open
PIECE = 1 << 20  # bytes of a small object that are sealed together
ROOM = 15  # bytes that the cipher asks for beyond what it writes: a block less one

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Seal:
    """Of one checkpoint. Without a data key everything stays as it is: nothing is encrypted."""

    checkpoint_id: str
    data_key: bytes | None = field(default=None, repr=False)
    wrapped: WrappedKey | None = None  # what the manifest says of it
    bases: Mapping[str, Seal] = field(default_factory=dict)  # of those of its bases that are encrypted, by checkpoint id

    def base(self, checkpoint_id: str) -> Seal:
        return self.bases.get(checkpoint_id) or Seal(checkpoint_id)

    def of(self, key: str) -> ObjectSeal:
        """For the object of that key, which is relative to its checkpoint."""
        name = f"{self.checkpoint_id}/{key}".encode()
        if self.data_key is None:
            return ObjectSeal(None, name)
        derive = HKDF(SHA256(), length=KEY, salt=None, info=b"hibernode object v1\0" + name)
        return ObjectSeal(algorithms.AES(derive.derive(self.data_key)), name)


def new_key() -> bytes:
    return os.urandom(KEY)


class ObjectSeal:
    """Of one object. Thread-safe: what is made goes into the caller's memory."""

    def __init__(self, cipher: algorithms.AES | None, name: bytes) -> None:
        self._cipher, self._name = cipher, name
        self.extra = TAG if cipher is not None else 0  # bytes that each piece is longer in the store

    def scratch(self, size: int) -> memoryview:
        """What `into` has to be for pieces of at most `size` bytes in the store; nothing where nothing is encrypted."""
        return memoryview(bytearray(size + ROOM)) if self.extra else memoryview(b"")

    def close(self, number: int, pieces: list[Buffer], into: memoryview, *, last: bool = False) -> list[Buffer]:
        """Piece `number` as it is stored, in `into` if it is encrypted. No number is ever closed twice."""
        if self._cipher is None:
            return pieces
        encryptor = Cipher(self._cipher, modes.GCM(_nonce(number))).encryptor()
        encryptor.authenticate_additional_data(self._said(number, last))
        at = 0
        for piece in pieces:  # the blocks of a raw frame stay where they are: no copy before this one
            at += encryptor.update_into(piece, into[at : at + len(piece) + ROOM])
        encryptor.finalize()
        into[at : at + TAG] = encryptor.tag
        return [into[: at + TAG]]

    def open(self, number: int, stored: memoryview, into: memoryview, *, last: bool = False) -> memoryview:
        """The way back; Corrupt for anything that was not closed just so."""
        if self._cipher is None:
            return stored
        size = len(stored) - TAG
        if size < 0:
            raise Corrupt("an encrypted piece is too short to be one")
        decryptor = Cipher(self._cipher, modes.GCM(_nonce(number), bytes(stored[size:]))).decryptor()
        decryptor.authenticate_additional_data(self._said(number, last))
        decryptor.update_into(stored[:size], into[: size + ROOM])
        try:
            decryptor.finalize()
        except InvalidTag as e:
            raise Corrupt(f"{self._name.decode()}: piece {number} is not what was encrypted") from e
        return into[:size]

    def _said(self, number: int, last: bool) -> bytes:
        return number.to_bytes(8, "big") + bytes([last]) + self._name


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


class Closer:
    """A small object on its way out, written piece by piece as it comes; `end` writes the last piece."""

    def __init__(self, seal: ObjectSeal, write: Callable[[Buffer], None]) -> None:
        self._seal, self._write = seal, write
        self._waiting, self._number = bytearray(), 0
        self._into = seal.scratch(PIECE + TAG)

    def write(self, data: Buffer) -> None:
        if not self._seal.extra:
            return self._write(data)
        self._waiting += data
        while len(self._waiting) > PIECE:  # what fills a piece may be the last one
            self._close(bytes(self._waiting[:PIECE]), last=False)
            del self._waiting[:PIECE]
        return None

    def end(self) -> None:
        if self._seal.extra:
            self._close(bytes(self._waiting), last=True)

    def _close(self, piece: bytes, *, last: bool) -> None:
        for part in self._seal.close(self._number, [piece], self._into, last=last):
            self._write(part)
        self._number += 1


def opened(seal: ObjectSeal, size: int, read: Callable[[int, int], memoryview]) -> Iterable[memoryview]:
    """A small object of `size` bytes on its way in: `read` is given offset and length of what is stored. What comes is good until the
    next. Corrupt for any other object than was written."""
    if size < seal.extra:
        raise Corrupt("an encrypted object is too short to be one")  # of nothing it has a tag
    step, into = PIECE + seal.extra, seal.scratch(PIECE + TAG)
    for number, at in enumerate(range(0, size, step)):
        length = min(step, size - at)
        yield seal.open(number, read(at, length), into, last=at + length == size)
