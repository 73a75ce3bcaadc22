"""Keys for tests: of ed25519 as `openssl genpkey` would write them, and what data keys are wrapped with."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def pair(directory: Path, name: str = "node") -> tuple[str, str]:
    """A new private key and its public half: the paths of two files in PEM."""
    key, private, public = Ed25519PrivateKey.generate(), directory / f"{name}.key", directory / f"{name}.pub"
    fd = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    public.chmod(0o644)
    return str(private), str(public)


def wrapper(directory: Path, name: str = "wrapper") -> str:
    """A new key that wraps data keys: the path of its file."""
    path = directory / f"{name}.key"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w") as file:
        file.write(os.urandom(32).hex() + "\n")
    return str(path)


def closed(directory: Path) -> dict[str, dict[str, object]]:
    """Settings of a node that encrypts, signs, and believes only itself."""
    private, public = pair(directory)
    return {"encryption": {"key": wrapper(directory)}, "signing": {"key": private, "trusted": [public]}}
