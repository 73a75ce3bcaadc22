"""`manifest.json`: Corrupt or Refused, or a manifest that its writer would write again. What is built gets past the digest of its envelope,
because an enemy can compute that one too. A node that trusts one key takes what that key signed, to the byte, and nothing else.
"""

from __future__ import annotations

import functools
import json
import re

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fuzz.edits import edited
from fuzz.feed import Feed
from fuzz.guard import MEMORY, guarded, require, root
from fuzz.targets import golden
from hibernode import ports
from hibernode.config import Signing
from hibernode.drivers.notary import Notary
from hibernode.errors import Corrupt, Refused
from hibernode.model import PAGE, Signature
from hibernode.transfer import format

MAX_LENGTH = 8192
_PER_BYTE = 8  # of memory: what pydantic makes of JSON. Edits that multiply lists make 20 MB of some bytes, which take 223
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
        _forge(feed)
        return
    with guarded(Corrupt, Refused, memory=MEMORY + _PER_BYTE * len(raw)):
        _check(raw, _Anybody())


def _forge(feed: Feed) -> None:
    """What a trusted node signed, with something done to it; or a document of one's own with a signature that was made up."""
    notary, signed = _trusting()
    if feed.byte() % 4:
        forged = bytearray(signed.partition(b"\n")[2])  # all but the digest, which is made right
        for _ in range(1 + feed.below(4)):
            at = feed.below(len(forged))
            if feed.byte() % 2:
                forged[at : at + 1] = bytes([feed.pick(b"0123456789abcdef")])  # often a manifest still
                continue
            cut = feed.below(40)
            forged[at : at + cut] = feed.take(cut if feed.byte() % 4 else feed.byte() % 40)
        raw = sealed(bytes(forged))
    else:
        key, mark = feed.take(32).ljust(32, b"\0").hex(), feed.take(64).ljust(64, b"\0").hex()
        key = key if feed.byte() % 2 else signed.partition(b'"key":"')[2][:64].decode()
        line = f'{{"signature":{{"key":"{key}","ed25519":"{mark}"}},\n'.encode()
        raw = sealed(line + edited(json.loads(_BODY), feed)[1:])
    with guarded(Corrupt, Refused):
        _check(raw, notary)
        require(raw == signed, "a forgery is believed")


@functools.cache
def _trusting() -> tuple[Notary, bytes]:
    """A node that believes nobody but itself, and the golden manifest as it signed it."""
    key, path, public = Ed25519PrivateKey.from_private_bytes(bytes(range(32))), root() / "key.pem", root() / "public.pem"
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.touch(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    notary = Notary(Signing(key=str(path), trusted=(str(public),)))
    return notary, format.encode_manifest(format.decode_manifest(sealed(_BODY), _ID, _Anybody()), notary)


def sealed(body: bytes) -> bytes:
    """`body`, which begins with a brace, in an envelope with the right digest."""
    rest = body.removeprefix(b"{")
    return b'{"digest":"%s",\n' % format.digest(rest).hex().encode() + rest


def _check(raw: bytes, notary: ports.Notary) -> None:
    manifest = format.decode_manifest(raw, _ID, notary)
    again = format.decode_manifest(format.encode_manifest(manifest, notary), _ID, notary)
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
        "newer": bytes([_SEALED]) + re.sub(rb'"format_version": ?1', b'"format_version": 3', _BODY, count=1),
        "compact": bytes([_SEALED]) + json.dumps(json.loads(_BODY), separators=(",", ":")).encode(),
        "edited": bytes([_EDITED]) + bytes(range(64)),
        "forged": bytes([_SIGNED, 1, 0, 0, 3, 4, 1, 9, 9, 9]),
        "forged-key": bytes([_SIGNED, 0]) + bytes(160),
    }
