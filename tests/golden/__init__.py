"""Checkpoints of every released format version, and how to read one without anything but the store."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hibernode import catalog
from hibernode.flow import Threads
from hibernode.model import Cancel, Meter
from hibernode.ports import Store
from hibernode.transfer.receive import Receiver

HERE = Path(__file__).resolve().parent


def restored(store: Store, checkpoint_id: str, directory: Path) -> dict[str, str]:
    """What a restore hands to CRIU: SHA-256 of every file, by `<image>/<name>`."""
    for image in catalog.read(store, checkpoint_id).images:
        place = directory / image.name
        place.mkdir(parents=True)
        receiver = Receiver(store, checkpoint_id, image, 2, Meter())
        receiver.fetch_files(directory / "packed", place)
        with Threads(Cancel()) as threads:
            receiver.fetch_pages(receiver.fetch_index(), place, threads)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
