"""Wraps data keys: with a key in a file, or by a program that asks a key management service. The only file that knows either.

A data key is wrapped with AES-256-GCM; the checkpoint's id is authenticated with it, so that nobody can put one checkpoint's wrapped
key into another's manifest. A program is given one JSON object on its standard input and answers with one:

    {"operation": "wrap", "checkpoint_id": ..., "data_key": ...}            ->  {"key": ..., "wrapped": ...}
    {"operation": "unwrap", "checkpoint_id": ..., "key": ..., "wrapped": ...}  ->  {"data_key": ...}

`data_key` and `wrapped` in base64; `key` is the service's name of the key that wraps. Exit status 3: it has no such key; any other
but 0: it could not, and its last line of standard error says why.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import ValidationError

from hibernode import keyfile
from hibernode.children import Children
from hibernode.config import Encryption
from hibernode.errors import Corrupt, KeyService, Refused
from hibernode.model import WrappedKey

_CIPHER: Literal["AES-256-GCM"] = "AES-256-GCM"
_KEY, _NONCE = 32, 12  # bytes
_DOMAIN = b"hibernode data key v1\0"  # what is wrapped is a data key, and nothing else that a key may be used for
_TIMEOUT = 30.0  # seconds a program has
_UNKNOWN = 3  # its exit status for a key that it has not
_ANSWER = 64 << 10  # bytes of an answer that are read
_MAKE = "`openssl rand -hex 32 > FILE` makes one, with mode 0600 under `umask 077`"


class Keyring:
    """ports.Keyring. Reads its files once: new keys need a restart. Refused("config") for a file that is not as it must be."""

    def __init__(self, encryption: Encryption, children: Children, *, patience: float = _TIMEOUT) -> None:
        """`patience`: seconds that a program has."""
        if encryption.key and encryption.command:
            raise Refused(
                "config",
                "encryption.key and encryption.command both say how data keys are wrapped",
                prop="encryption.command",
                found=encryption.command[0],
                wanted="one of them",
                hint="a key that wrapped older checkpoints goes into encryption.former",
            )
        own = [_key("encryption.key", Path(encryption.key))] if encryption.key else []
        former = [_key(f"encryption.former[{n}]", Path(path)) for n, path in enumerate(encryption.former)]
        self._own = own[0] if own else None
        self._keys = {_name(key): key for key in (*own, *former)}
        self._program = _program(encryption.command, children, patience) if encryption.command else None

    def wrap(self, data_key: bytes, checkpoint_id: str) -> WrappedKey | None:
        if self._program is not None:
            return self._program.wrap(data_key, checkpoint_id)
        if self._own is None:
            return None
        nonce = os.urandom(_NONCE)
        sealed = nonce + AESGCM(self._own).encrypt(nonce, data_key, _DOMAIN + checkpoint_id.encode())
        return WrappedKey(cipher=_CIPHER, key=_name(self._own), wrapped=base64.b64encode(sealed).decode())

    def unwrap(self, wrapped: WrappedKey, checkpoint_id: str) -> bytes:
        if (key := self._keys.get(wrapped.key)) is not None:
            return _unwrapped(key, wrapped, checkpoint_id)
        if self._program is not None:
            return self._program.unwrap(wrapped, checkpoint_id)
        raise _unknown(wrapped.key, " or ".join(sorted(self._keys)) or "none: this node has no key")


def _unwrapped(key: bytes, wrapped: WrappedKey, checkpoint_id: str) -> bytes:
    sealed = _decoded(wrapped.wrapped)
    try:
        data_key = AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], _DOMAIN + checkpoint_id.encode())
    except (InvalidTag, ValueError) as e:  # ValueError: too short for a nonce
        raise Corrupt("manifest: the wrapped data key is not what was wrapped for this checkpoint") from e
    return _measured(data_key)


def _program(argv: tuple[str, ...], children: Children, patience: float) -> _Program:
    if not os.path.isabs(argv[0]) or shutil.which(argv[0]) is None:
        wanted = "the absolute path of a program"
        raise keyfile.bad("encryption.command", Path(argv[0]), "nothing that can be executed there", wanted)
    return _Program(argv, children, patience)


class _Program:
    """A key management service, behind a program of the operator's."""

    def __init__(self, argv: tuple[str, ...], children: Children, patience: float) -> None:
        self._argv, self._children, self._patience = argv, children, patience

    def wrap(self, data_key: bytes, checkpoint_id: str) -> WrappedKey:
        request = {"operation": "wrap", "checkpoint_id": checkpoint_id, "data_key": base64.b64encode(data_key).decode()}
        answer = self._ask(request)
        try:
            return WrappedKey.model_validate({"cipher": _CIPHER, "key": answer["key"], "wrapped": answer["wrapped"]})
        except (KeyError, ValidationError) as e:
            raise self._failed("its answer has no `key` and `wrapped`, as text") from e

    def unwrap(self, wrapped: WrappedKey, checkpoint_id: str) -> bytes:
        request = {"operation": "unwrap", "checkpoint_id": checkpoint_id, "key": wrapped.key, "wrapped": wrapped.wrapped}
        data_key = self._ask(request, wrapped.key).get("data_key")
        if not isinstance(data_key, str):
            raise self._failed("its answer has no `data_key`, as text")
        return _measured(_decoded(data_key))

    def _ask(self, request: Mapping[str, str], key: str = "") -> dict[str, object]:
        """Files in memory and no pipes: nothing has to be read while it runs, and no key reaches a disk."""
        with _memory() as given, _memory(_ANSWER) as out, _memory(_ANSWER) as err:
            os.pwrite(given, json.dumps(request).encode() + b"\n", 0)
            code = self._run(given, out, err)
            said = _said(err).decode(errors="replace").strip().rpartition("\n")[2][:300]
            if code == _UNKNOWN and key:
                raise _unknown(key, f"one that {self._argv[0]} has")
            if code:
                raise self._failed(said or f"exit status {code}")
            try:
                answer = json.loads(_said(out))
            except (ValueError, RecursionError):
                answer = None
        if not isinstance(answer, dict):
            raise self._failed("its answer is no JSON object")
        return answer

    def _run(self, given: int, out: int, err: int) -> int:
        try:
            child = self._children.spawn(self._argv, env=os.environ, given=given, out=out, err=err)
        except OSError as e:
            raise self._failed((e.strerror or str(e)).lower()) from e
        try:
            return self._children.wait(child, self._patience)
        except subprocess.TimeoutExpired as e:
            os.killpg(child.pid, signal.SIGKILL)  # with what it has started: that has the data key on its standard input
            self._children.wait(child)
            raise self._failed(f"no answer within {self._patience:.0f} s") from e

    def _failed(self, why: str) -> KeyService:
        return KeyService(
            f"the key service does not answer as it must: {self._argv[0]}: {why}",
            hint="run it by hand; what it is given and answers is in docs/operations.md",
        )


@contextmanager
def _memory(size: int = 0) -> Iterator[int]:
    """A file in memory. With a `size` it has that many zeros, and never gets larger: who writes more gets an error."""
    descriptor = os.memfd_create("hibernode-key", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if size:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        yield descriptor
    finally:
        os.close(descriptor)


def _said(descriptor: int) -> bytes:
    return os.pread(descriptor, _ANSWER, 0).rstrip(b"\0")


def _name(key: bytes) -> str:
    """What a manifest calls the key; nothing can be learned from it about the key."""
    return hashlib.sha256(b"hibernode key name v1\0" + key).hexdigest()[:32]


def _key(prop: str, path: Path) -> bytes:
    data = keyfile.read(prop, path, forbidden=0o077, hint=f"`chmod 600 {path}`; a new one, if others may have read it")
    if len(data) == _KEY and not data.isascii():  # 32 letters are the hex of half a key, cut short
        return data
    text = data.strip()
    for decode in (binascii.unhexlify, lambda said: base64.b64decode(said, validate=True)):
        try:
            key = decode(text)
        except ValueError:
            continue
        if len(key) == _KEY:
            return key
    raise keyfile.bad(prop, path, f"{len(data)} bytes of something else", "32 bytes, raw, in hex or in base64", _MAKE)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as e:
        raise Corrupt("a wrapped data key is no base64") from e


def _measured(data_key: bytes) -> bytes:
    if len(data_key) != _KEY:
        raise Corrupt(f"a data key of {len(data_key)} bytes, and not {_KEY}")
    return data_key


def _unknown(found: str, wanted: str) -> Refused:
    return Refused(
        "key_unknown",
        f"the checkpoint is encrypted, and this node has not the key {found!r} that its data key was wrapped with",
        prop="encryption.key",
        found=found,
        wanted=wanted,
        hint="add that key to encryption.former",
    )
