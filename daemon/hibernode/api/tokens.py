"""`hibernode api token ...`: who may ask. Works on the database; no server needs to run."""

from __future__ import annotations

import time

from hibernode.api.db import Database, Token
from hibernode.api.guard import hashed, new_token
from hibernode.errors import BadCommand, NotFound
from hibernode.wire import NAME


def make(database: Database, name: str, *, read_only: bool, days: float) -> str:
    """A new token; it is shown once, and kept as its SHA-256."""
    if not NAME.fullmatch(name):
        raise BadCommand(f"{name[:100]!r} is no name for a token", property="name", found=name[:100], wanted=NAME.pattern)
    secret, now = new_token(), time.time()
    token = Token(name, hashed(secret), read_only=read_only, created_at=now, expires_at=now + days * 86400 if days else 0.0)
    if not database.add_token(token):
        raise BadCommand(f"there is a token {name!r}", hint="remove it first", property="name", found=name, wanted="a new name")
    return secret


def remove(database: Database, name: str) -> None:
    if not database.remove_token(name):
        raise NotFound(f"there is no token {name!r}", hint="`hibernode api token list`")
