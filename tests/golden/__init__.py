"""Checkpoints of every released format version, and how to read one without anything but the store."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hibernode import catalog
from hibernode.children import Children
from hibernode.config import Encryption, Signing
from hibernode.drivers.keyring import Keyring
from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.notary import Notary
from hibernode.flow import Threads
from hibernode.model import Cancel, Meter
from hibernode.transfer.receive import LayerReceiver, Receiver
from tests import keys

HERE = Path(__file__).resolve().parent
SIGNER = "signer.pub"  # in the place of each golden checkpoint: who signed it
WRAPPER = "wrapper.key"  # in the place of an encrypted one: what its data key was wrapped with


def reader(place: Path, directory: Path) -> Notary:
    """Who believes the signer of the golden checkpoint in `place`, and beside him only a key of its own, made in `directory`."""
    public = directory / SIGNER
    public.write_bytes((place / SIGNER).read_bytes())  # in a checkout it may be another user's
    public.chmod(0o644)
    return Notary(Signing(key=keys.pair(directory, "reader")[0], trusted=(str(public),)))


def keyring(place: Path, directory: Path) -> Keyring:
    """Who can decrypt the golden checkpoint in `place`; has no key where it is not encrypted."""
    if not (place / WRAPPER).exists():
        return Keyring(Encryption(), Children())
    key = directory / WRAPPER
    key.write_bytes((place / WRAPPER).read_bytes())  # in a checkout others may read it
    key.chmod(0o600)
    return Keyring(Encryption(key=str(key)), Children())


def restored(place: Path, checkpoint_id: str, directory: Path) -> dict[str, str]:
    """What a restore hands to CRIU, and the tars of layers: SHA-256 of every file, by `<image>/<name>`."""
    store, files = LocalDir(place), directory / "files"
    manifest = catalog.read(store, checkpoint_id, reader(place, directory))
    seal = catalog.seal_of(manifest, keyring(place, directory))
    for image in manifest.images:
        (files / image.name).mkdir(parents=True)
        receiver = Receiver(store, seal, image, 2, Meter())
        receiver.fetch_files(directory / "packed", files / image.name)
        with Threads(Cancel()) as threads:
            receiver.fetch_pages(receiver.fetch_index(), files / image.name, threads)
    for layer in manifest.layers:
        (files / layer.name).mkdir(parents=True, exist_ok=True)
        source = LayerReceiver(store, seal, layer, 2, Meter())
        with Threads(Cancel()) as threads, open(files / layer.name / "layer.tar", "wb") as tar:
            tar.writelines(source.pieces(source.fetch_index(), threads))
            tar.truncate(layer.bytes)
    found = sorted(path for path in files.rglob("*") if path.is_file())
    return {path.relative_to(files).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
