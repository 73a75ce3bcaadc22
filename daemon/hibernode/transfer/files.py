"""CRIU's small images, log and statistics as one object: `pack` a directory into `images.tar.zst`, `unpack` it again.

A tar because anybody can open it. The way back trusts nothing: plain files only, plain names only, counts and sizes bounded.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from hibernode.errors import Corrupt
from hibernode.model import ObjectRef
from hibernode.ports import Store
from hibernode.transfer import codec
from hibernode.transfer.format import Digester

MAX_FILES = 500_000
MAX_BYTES = 64 << 30  # ghost files (deleted but open) are in here, each up to `criu.ghost_limit`
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_PIECE = 1 << 20


def pack(directory: Path, write: Callable[[bytes], None]) -> None:
    """Every plain file of `directory`, as a tar in one zstd frame, handed to `write` piece by piece."""
    with codec.Deflater(write) as out, tarfile.open(fileobj=out, mode="w|", bufsize=_PIECE) as tar:
        for path in sorted(directory.iterdir()):
            if path.is_file() and not path.is_symlink() and _NAME.fullmatch(path.name):
                tar.add(path, arcname=path.name, recursive=False, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def fetch(store: Store, prefix: str, ref: ObjectRef, to: Path) -> None:
    """Copy a small object into the new file `to`, and compare size and digest: Corrupt if they are not the manifest's."""
    with open(to, "xb") as file:
        _read(store, prefix, ref, file.write)


def verify(store: Store, prefix: str, ref: ObjectRef) -> None:
    """Read it, compare size and digest, keep nothing."""
    _read(store, prefix, ref, len)


def _read(store: Store, prefix: str, ref: ObjectRef, keep: Callable[[memoryview], object]) -> None:
    digester, buffer = Digester(), memoryview(bytearray(_PIECE))
    while digester.size < ref.size:
        piece = buffer[: min(_PIECE, ref.size - digester.size)]
        store.read_into(f"{prefix}/{ref.key}", digester.size, piece)
        digester.update(piece)
        keep(piece)
    if digester.hex() != ref.digest:
        raise Corrupt(f"{ref.key} is damaged: its digest is not the manifest's", key=ref.key)


def unpack(packed: Path, directory: Path) -> None:
    """The files of a verified `images.tar.zst`, in `directory`. Corrupt for anything that `pack` would not write."""
    left, count = MAX_BYTES, 0
    try:
        with open(packed, "rb") as raw, tarfile.open(fileobj=codec.inflating(raw), mode="r|") as tar:
            for member in tar:
                count, left = count + 1, left - member.size
                plain = member.isreg() and member.size >= 0 and _NAME.fullmatch(member.name)
                if not plain or left < 0 or count > MAX_FILES:
                    raise Corrupt(f"images.tar: member {member.name!r} cannot be: not a plain file, or too many, or too large")
                _extract(tar, member, directory)
    except (tarfile.TarError, codec.DamagedError, EOFError, FileExistsError) as e:
        raise Corrupt(f"images.tar: {e}") from e


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, directory: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise Corrupt(f"images.tar: member {member.name!r} has no content")
    descriptor = os.open(directory / member.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        shutil.copyfileobj(source, file, _PIECE)
