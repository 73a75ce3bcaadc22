"""Files that hold keys: small, plain, and nobody else's. What is not so keeps the daemon from starting."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hibernode.errors import Refused

_LIMIT = 64 << 10  # bytes; a key in PEM has 120


def read(prop: str, path: Path, *, forbidden: int, hint: str) -> bytes:
    """A small plain file, of root's or of ours, that allows nobody else what is `forbidden` (mode bits). Refused("config") names `prop`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a FIFO would wait for a writer
    except OSError as e:
        raise bad(prop, path, (e.strerror or str(e)).lower(), "a file that can be read") from e
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _LIMIT:
            raise bad(prop, path, "something else, or too large", "a plain file with a key")
        if facts.st_mode & forbidden or facts.st_uid not in (0, os.geteuid()):
            found = f"mode {stat.S_IMODE(facts.st_mode):04o} of user {facts.st_uid}"
            raise bad(prop, path, found, f"its owner's alone: no mode bit of {forbidden:04o}", hint)
        return os.read(fd, _LIMIT)
    finally:
        os.close(fd)


def bad(prop: str, path: Path, found: str, wanted: str, hint: str = "") -> Refused:
    """What to raise for a file that holds no such key; no word of what is in it."""
    return Refused("config", f"{prop}: {path}: {found}, and not {wanted}", prop=prop, found=found, wanted=wanted, hint=hint)
