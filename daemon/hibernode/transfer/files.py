"""CRIU's small images, log and statistics as one object: `pack` a directory into `images.tar.zst`, `unpack` it again.

A tar because anybody can open it. GNU's kind of header, because with it no file needs an extended one: it holds sizes over 8 GiB itself,
and pax keeps parts of a second in one per file. So the way back trusts nothing and allocates nothing: it reads header by header, plain
files with plain names only, counts and sizes bounded before a byte is written. `tarfile` itself would read what an extended header
announces, however long, into memory.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from hibernode.errors import Corrupt, DumpFailed, Internal
from hibernode.model import ObjectRef
from hibernode.ports import Store
from hibernode.transfer import codec
from hibernode.transfer.format import Digester
from hibernode.transfer.seal import PIECE, ObjectSeal, opened

MAX_FILES = 500_000
MAX_BYTES = 64 << 30  # ghost files (deleted but open) are in here, each up to `criu.ghost_limit`
UNSAID_BYTES = 1 << 30  # of an image whose manifest does not say how much it is: the first writers' did not
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # more than 100 characters would need an extended header
_TIME = re.compile(rb"[0-9]{2} mtime=[0-9.]{1,40}\n")  # all that the first writers put into an extended header
_BLOCK = tarfile.BLOCKSIZE


def pack(directory: Path, write: Callable[[bytes], None]) -> int:
    """Every plain file of `directory`, as a tar in one zstd frame, handed to `write` piece by piece; how many bytes the files have.
    Internal if they change meanwhile: then what was packed is not what was dumped."""
    files = _plain_files(directory)
    size = sum(files.values())
    if len(files) > MAX_FILES or size > MAX_BYTES:
        raise DumpFailed(
            f"the small images are {len(files)} files of {size} bytes, at most {MAX_FILES} of {MAX_BYTES} can be stored",
            hint="deleted files that are still open are among them: close them, or lower `ghost_limit`",
        )
    with codec.Deflater(write) as out, tarfile.open(fileobj=out, mode="w|", bufsize=PIECE, format=tarfile.GNU_FORMAT) as tar:
        for name in sorted(files):
            try:
                tar.add(directory / name, arcname=name, recursive=False, filter=_anonymous)
            except FileNotFoundError as e:
                raise Internal(f"{name} of the small images went away while they were packed") from e
    if not files or _plain_files(directory) != files:
        raise Internal(f"the small images in {directory} changed while they were packed")
    return size


def _plain_files(directory: Path) -> Mapping[str, int]:
    """Name -> bytes; empty if the directory is gone."""
    try:
        return {
            path.name: path.stat().st_size
            for path in directory.iterdir()
            if path.is_file() and not path.is_symlink() and _NAME.fullmatch(path.name)
        }
    except FileNotFoundError:
        return {}


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def fetch(store: Store, prefix: str, ref: ObjectRef, seal: ObjectSeal, to: Path) -> None:
    """Copy a small object into the new file `to`, and compare size and digest: Corrupt if they are not the manifest's."""
    with open(to, "xb") as file:
        _read(store, prefix, ref, seal, file.write)


def verify(store: Store, prefix: str, ref: ObjectRef, seal: ObjectSeal) -> None:
    """Read it, compare size and digest, keep nothing."""
    _read(store, prefix, ref, seal, len)


def _read(store: Store, prefix: str, ref: ObjectRef, seal: ObjectSeal, keep: Callable[[memoryview], object]) -> None:
    digester, buffer = Digester(), memoryview(bytearray(PIECE + seal.extra))

    def read(offset: int, length: int) -> memoryview:
        piece = buffer[:length]
        store.read_into(f"{prefix}/{ref.key}", offset, piece)
        digester.update(piece)
        return piece

    for piece in opened(seal, ref.size, read):
        keep(piece)
    if digester.hex() != ref.digest:
        raise Corrupt(f"{ref.key} is damaged: its digest is not the manifest's", key=ref.key)


def unpack(packed: Path, directory: Path, *, limit: int = MAX_BYTES) -> None:
    """The files of a verified `images.tar.zst`, in `directory`. Corrupt for anything that `pack` would not write, and for more than
    `limit` bytes: said by a header before any of them is written."""
    left, count = min(limit, MAX_BYTES), 0
    try:
        with open(packed, "rb") as raw, codec.inflating(raw) as tar:
            while (member := _next(tar)) is not None:
                count, left = count + 1, left - member.size
                if left < 0 or count > MAX_FILES:
                    raise Corrupt(f"images.tar: with member {member.name!r} there are too many, or they are too large")
                _extract(tar, member, directory)
            rest = tar.read(3 * tarfile.RECORDSIZE)
    except (tarfile.TarError, codec.DamagedError, FileExistsError) as e:
        raise Corrupt(f"images.tar: {e}") from e
    if len(rest) < _BLOCK or len(rest) > 2 * tarfile.RECORDSIZE or rest.strip(b"\0"):
        raise Corrupt("images.tar: it does not end as a tar ends")


def _next(tar: IO[bytes]) -> tarfile.TarInfo | None:
    """The next file's header; None at the end."""
    member = _header(tar)
    if member is not None and member.type == tarfile.XHDTYPE:
        if member.size > _BLOCK or not _TIME.fullmatch(_exactly(tar, _BLOCK)[: member.size]):
            raise Corrupt("images.tar: an extended header that says more than a time")
        member = _header(tar)
    if member is not None and not (member.type == tarfile.REGTYPE and member.size >= 0 and _NAME.fullmatch(member.name)):
        raise Corrupt(f"images.tar: member {member.name[:200]!r} cannot be: not a plain file of a plain name")
    return member


def _header(tar: IO[bytes]) -> tarfile.TarInfo | None:
    block = _exactly(tar, _BLOCK)
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape") if block.strip(b"\0") else None


def _exactly(tar: IO[bytes], size: int) -> bytes:
    data = tar.read(size)
    while len(data) < size:
        if not (more := tar.read(size - len(data))):
            raise Corrupt("images.tar: it ends in the middle")
        data += more
    return data


def _extract(tar: IO[bytes], member: tarfile.TarInfo, directory: Path) -> None:
    descriptor = os.open(directory / member.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.writelines(_exactly(tar, min(PIECE, member.size - at)) for at in range(0, member.size, PIECE))
    _exactly(tar, -member.size % _BLOCK)
