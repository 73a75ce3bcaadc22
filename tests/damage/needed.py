"""What of a checkpoint is looked at, and by whom. Where that is as it was, nobody may complain; where it is not, somebody has to.

Worked out page by page from the indexes, not by the code that is judged: which frame of which checkpoint has a page of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hibernode import catalog
from hibernode.model import BaseRef, ImageRef, Manifest, Meter
from hibernode.transfer.receive import Receiver
from tests.damage.stored import Objects, Stored
from tests.flow.rig import Rig

Look = Callable[[bytes], object]  # what is seen of an object
Looks = Mapping[str, Look]  # by the names of objects


def _all(data: bytes) -> object:
    return data


def _there(_: bytes) -> object:
    return True


@dataclass(frozen=True)
class Needed:
    """By a restore, by `verify`, and by the next increment before it freezes anybody."""

    restore: Looks
    verify: Looks
    following: Looks


def differing(looks: Looks, before: Objects, after: Objects) -> list[str]:
    """Those of which something has changed that is looked at."""

    def seen(name: str, objects: Objects) -> object:
        return looks[name](objects[name]) if name in objects else None

    return [name for name in looks if seen(name, before) != seen(name, after)]


def of(stored: Stored, rig: Rig) -> Needed:
    """In the store of `rig` there is at least its manifest, and the indexes."""
    manifest = catalog.read(rig.store, stored.checkpoint_id, rig.node.notary)
    restore: dict[str, Look] = {"manifest.json": _all}
    following: dict[str, Look] = {"manifest.json": _all}
    digests: list[str] = []
    for image in manifest.images:
        restore |= {ref.key: _all for ref in image.objects} | dict(_lent(stored, rig, manifest, image))
        digests += [image.digests.key] if image.digests else []
        following |= {ref.key: _all if ref in (image.index, image.digests) else len for ref in image.objects}
    for base in manifest.bases:
        folder = _folder(stored, base)
        following |= {f"{folder}/manifest.json": _there, f"{folder}/removing": _there}
        following |= {f"{folder}/{ref.key}": _all if ref == base.index else len for ref in base.objects if ref != base.digests}
        following |= {f"{folder}/{base.digests.key}": _first(base.digests.size)} if base.digests else {}
    return Needed(restore | dict.fromkeys(digests, len), restore, following)


def _folder(stored: Stored, base: BaseRef) -> str:
    return next(name for name, checkpoint_id in stored.bases.items() if checkpoint_id == base.checkpoint_id)


def _first(size: int) -> Look:
    """What may be longer."""
    return lambda data: data[:size]


def _cut(frames: Sequence[np.void]) -> Look:
    """These of a stream, and how long it is."""
    cuts = [(int(frame["offset"]), int(frame["offset"] + frame["stored"])) for frame in frames]
    return lambda data: (len(data), [data[start:end] for start, end in cuts])


def _lent(stored: Stored, rig: Rig, manifest: Manifest, image: ImageRef) -> Iterator[tuple[str, Look]]:
    """What an image needs of its bases: their indexes, and of their streams the frames that have a page of it."""
    receiver = Receiver(rig.store, catalog.seal_of(manifest, rig.node.keyring), image, 1, Meter())
    references = receiver.fetch_index().references
    for number, (base, source) in enumerate(zip(image.bases, receiver.sources[1:], strict=True)):
        mine = references[references["source"] == number]
        pages = {page for each in mine for page in _run(each["source_page"], each["pages"])}
        frames = [frame for frame in source.index.frames if not pages.isdisjoint(_run(frame["first_page"], frame["pages"]))]
        yield f"{_folder(stored, base)}/{base.index.key}", _all
        for n, stream in enumerate(base.streams):
            yield f"{_folder(stored, base)}/{stream.key}", _cut([frame for frame in frames if frame["stream"] == n])


def _run(first: int, pages: int) -> range:
    return range(int(first), int(first) + int(pages))
