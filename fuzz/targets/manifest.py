"""`manifest.json`: Corrupt or Refused, or a manifest that its writer would write again. What is built gets past the digest of its envelope,
because an enemy can compute that one too; a signature he has to make up."""

from __future__ import annotations

import json
import re

from fuzz.edits import edited
from fuzz.feed import Feed
from fuzz.guard import guarded, require
from fuzz.targets import golden
from hibernode.errors import Corrupt, Refused
from hibernode.model import PAGE, Signature
from hibernode.transfer import format

MAX_LENGTH = 8192
_RAW, _SEALED, _EDITED, _SIGNED = 0, 1, 2, 3
_ID = json.loads(golden.manifest())["checkpoint_id"]
_ENVELOPE = re.compile(rb'\{"digest":"[0-9a-f]{64}",\n(?:"signature":\{[^}]*\},\n)?')
_BODY = b"{" + _ENVELOPE.sub(b"", golden.manifest()).removeprefix(b"{")


class _Anybody:
    """A node without keys: believes everybody, signs nothing."""

    def sign(self, message: bytes) -> Signature | None:
        return None

    def check(self, message: bytes, signature: Signature | None) -> None:
        require(len(message) < 256, "more is signed than a digest")


def one(data: bytes) -> None:
    feed = Feed(data)
    how = feed.below(4)
    if how == _RAW:
        raw = feed.rest()
    elif how == _SEALED:
        raw = sealed(feed.rest())
    elif how == _EDITED:
        raw = sealed(edited(json.loads(_BODY), feed))
    else:
        key, mark = feed.take(32).ljust(32, b"\0").hex(), feed.take(64).ljust(64, b"\0").hex()
        raw = sealed(
            b'{"signature":{"key":"%s","ed25519":"%s"},\n' % (key.encode(), mark.encode()) + edited(json.loads(_BODY), feed)[1:]
        )
    with guarded(Corrupt, Refused):
        _check(raw)


def sealed(body: bytes) -> bytes:
    """`body`, which begins with a brace, in an envelope with the right digest."""
    rest = body.removeprefix(b"{")
    return b'{"digest":"%s",\n' % format.digest(rest).hex().encode() + rest


def _check(raw: bytes) -> None:
    anybody = _Anybody()
    manifest = format.decode_manifest(raw, _ID, anybody)
    again = format.decode_manifest(format.encode_manifest(manifest, anybody), _ID, anybody)
    require(again == manifest, "what was read does not come back")
    require(manifest.checkpoint_id == _ID, "the manifest of another checkpoint")
    for image in manifest.images:
        require(".." not in image.name and "/" not in image.name, f"an image named {image.name!r}")
        require(format.index_limit(image) <= format.MAX_INDEX, "an index without a limit")
        require(0 <= image.zero_pages * PAGE <= image.pages * PAGE < 1 << 63, "more memory than can be counted")
        for ref in (*image.streams, image.index, image.files):
            require(ref.key.startswith(f"{image.name}/") and ".." not in ref.key.split("/"), f"an object at {ref.key!r}")


def seeds() -> dict[str, bytes]:
    return {
        "golden": bytes([_RAW]) + sealed(_BODY),
        "sealed": bytes([_SEALED]) + _BODY,
        "newer": bytes([_SEALED]) + re.sub(rb'"format_version": ?1', b'"format_version": 2', _BODY, count=1),
        "compact": bytes([_SEALED]) + json.dumps(json.loads(_BODY), separators=(",", ":")).encode(),
        "edited": bytes([_EDITED]) + bytes(range(64)),
        "signed": bytes([_SIGNED]) + bytes(160),
    }
