"""ed25519 signatures with keys in PEM files, and the only file that makes or checks one.

A node believes its own key without being told: what it wrote it must be able to read. So trust may be given one step at a time: first
every node signs, and nobody asks; then every node names the keys of all.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from hibernode import keyfile
from hibernode.config import Signing
from hibernode.errors import Refused
from hibernode.model import Signature

_MAKE = "`openssl genpkey -algorithm ed25519 -out FILE` makes one, with mode 0600 under `umask 077`"
_PUBLIC = "`openssl pkey -in KEY -pubout -out FILE` writes the public half of a private key"


class Notary:
    """ports.Notary. Reads its files once: new keys need a restart. Refused("config") for a file that is not as it must be."""

    def __init__(self, signing: Signing) -> None:
        trusted = [_public(f"signing.trusted[{n}]", Path(path)) for n, path in enumerate(signing.trusted)]
        self._key = _private("signing.key", Path(signing.key)) if signing.key else None
        self._name = ""
        if self._key is not None:
            self._name = _name(self._key.public_key())
        if trusted and self._key is None:
            raise Refused(
                "config",
                "with trusted keys and no key of its own this node would refuse what it wrote itself",
                prop="signing.key",
                found="",
                wanted="path of a private key, where signing.trusted is not empty",
                hint=_MAKE,
            )
        own = [self._key.public_key()] if trusted and self._key else []
        self._trusted = {_name(key): key for key in (*trusted, *own)}

    def sign(self, message: bytes) -> Signature | None:
        return Signature(key=self._name, ed25519=self._key.sign(message).hex()) if self._key else None

    def check(self, message: bytes, signature: Signature | None) -> None:
        if not self._trusted:
            return
        if signature is None:
            raise Refused(
                "unsigned", "the manifest is not signed, and this node asks for a signature", **self._values("none"),
                hint="was it made by a node that does not sign?",
            )  # fmt: skip
        key = self._trusted.get(signature.key)
        if key is None:
            raise Refused(
                "signer", "the manifest is signed by a key that this node does not trust", **self._values(signature.key),
                hint="if that key is one of yours, add its public half to signing.trusted",
            )  # fmt: skip
        try:
            key.verify(bytes.fromhex(signature.ed25519), message)
        except InvalidSignature as e:
            raise Refused(
                "signature", "the manifest is not what its signature was made for", **self._values(signature.ed25519),
                hint="do not trust it; look who can write to the store",
            ) from e  # fmt: skip

    def _values(self, found: str) -> dict[str, str]:
        return {"prop": "signature", "found": found, "wanted": f"one by {' or '.join(sorted(self._trusted))}"}


def _name(key: Ed25519PublicKey) -> str:
    """What a signature calls its key: `openssl pkey -pubin -in FILE -outform DER | tail -c 32 | sha256sum` says it too."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _private(prop: str, path: Path) -> Ed25519PrivateKey:
    data = keyfile.read(prop, path, forbidden=0o077, hint=f"`chmod 600 {path}`; a new one, if others may have read it")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise keyfile.bad(prop, path, "another thing", "a private ed25519 key in PEM, without a passphrase", _MAKE)
    return key


def _public(prop: str, path: Path) -> Ed25519PublicKey:
    data = keyfile.read(prop, path, forbidden=0o022, hint=f"`chmod go-w {path}`; see that it is still the right one")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise keyfile.bad(prop, path, "another thing", "a public ed25519 key in PEM", _PUBLIC)
    return key
