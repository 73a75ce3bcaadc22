"""Manifests that somebody has changed and given a fitting digest: the digest finds damage, and is no secret."""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3


def sealed(rest: bytes) -> bytes:
    """Any bytes under a first line that fits them."""
    return b'{"digest":"%s",\n' % blake3(rest).hexdigest().encode() + rest


def sealed_json(text: bytes) -> bytes:
    """A JSON text as the body of an unsigned manifest. What is no object loses its first byte as one would."""
    return sealed(text[1:])


def seal(value: object) -> bytes:
    """A value as an unsigned manifest; what was its envelope is left out."""
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if key not in ("digest", "signature")}
    return sealed_json(json.dumps(value).encode())


def opened(data: bytes) -> dict[str, Any]:
    """The fields of a manifest, without its envelope."""
    found: dict[str, Any] = json.loads(data)
    return {key: value for key, value in found.items() if key not in ("digest", "signature")}
