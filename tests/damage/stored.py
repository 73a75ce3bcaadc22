"""The checkpoints that are damaged: the golden one, and some that the page `checkpoint` makes on fakes. One of a process is in `real`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hibernode.model import PAGE
from hibernode.transfer.pageproto import SHMEM, TASK
from tests import golden, keys
from tests.fakes.machine import CHILD, ROOT, Run
from tests.flow.rig import Rig
from tests.golden.make import floats, scripted

Objects = Mapping[str, bytes]  # by name: the key below the checkpoint's id
MakeRig = Callable[[Path], Rig]  # a node that would restore it; the directory is empty


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint whose original has ended."""

    name: str
    checkpoint_id: str
    objects: Objects
    rig: MakeRig


def _sparse() -> list[Run]:
    """Few bytes in many frames: pages of one number among many of zeros, whole frames of zeros, random pages, known pages not sent."""
    numbers = b"".join(n.to_bytes(4, "little") * (PAGE // 4) if n % 40 == 7 else bytes(PAGE) for n in range(3500))
    return [
        Run(ROOT << 8 | TASK, 0x400000, numbers[: 1500 * PAGE]),
        Run(ROOT << 8 | TASK, 0xA00000, None, pages=3),
        Run(77 << 8 | SHMEM, 0, numbers[1500 * PAGE : 1501 * PAGE]),
        Run(CHILD << 8 | TASK, 0x400000, bytes(2100 * PAGE)),
        Run(CHILD << 8 | TASK, 0x1400000, numbers[1501 * PAGE :]),
        Run(ROOT << 8 | TASK, 0x1400000, random.Random(7).randbytes(5 * PAGE)),
    ]


def _few() -> list[Run]:
    return [Run(ROOT << 8 | TASK, 0x400000, b"".join(bytes([n]) * PAGE for n in range(9)))]


def _zeros() -> list[Run]:
    return [Run(ROOT << 8 | TASK, 0x400000, bytes(1100 * PAGE))]


def _floats() -> list[Run]:
    return [Run(ROOT << 8 | TASK, 0x400000, floats(2)), Run(CHILD << 8 | TASK, 0x400000, bytes(1008 * PAGE) + floats(4))]


def _dumped(
    name: str, directory: Path, runs: Callable[[], list[Run]], overrides: Mapping[str, object], **settings: object
) -> Stored:
    """Made by the page `checkpoint`, on a node with these `settings`; a node with the same would restore it."""

    def rig(place: Path) -> Rig:
        return Rig(place, runs(), **settings)

    maker = rig(directory)
    checkpoint_id = maker.checkpoint(**overrides)
    prefix = f"{checkpoint_id}/"
    return Stored(name, checkpoint_id, {key.removeprefix(prefix): data for key, data in maker.store.objects.items()}, rig)


def _golden(name: str, directory: Path) -> Stored:
    place = golden.HERE / "v1"
    checkpoint_id = json.loads((place / "golden.json").read_text())["checkpoint_id"]
    return Stored(name, checkpoint_id, read(place / checkpoint_id), lambda work: Rig(work, scripted()))


def _signed(name: str, directory: Path) -> Stored:
    key, public = keys.pair(directory)
    return _dumped(name, directory, _few, {"streams": 2}, signing={"key": key, "trusted": [public]})


def _encrypted(name: str, directory: Path) -> Stored:
    return _dumped(name, directory, _few, {"streams": 2}, encryption={"key": keys.wrapper(directory)})


KINDS: Mapping[str, Callable[[str, Path], Stored]] = {
    "golden": _golden,
    "sparse": lambda name, directory: _dumped(name, directory, _sparse, {"streams": 3}),
    "raw": lambda name, directory: _dumped(name, directory, _few, {"streams": 1, "compression": "none"}),
    "zeros": lambda name, directory: _dumped(name, directory, _zeros, {"streams": 2}),
    "planes": lambda name, directory: _dumped(name, directory, _floats, {"streams": 2}),
    "signed": _signed,
    "encrypted": _encrypted,
}


def make(directory: Path) -> dict[str, Stored]:
    """One of each kind that needs no CRIU, by name; what they need later lies in `directory`."""
    found = {}
    for name, kind in KINDS.items():
        (directory / name).mkdir()
        found[name] = kind(name, directory / name)
    return found


def read(place: Path) -> Objects:
    """Every object of a checkpoint in a local store."""
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def write(place: Path, objects: Objects) -> None:
    """Make the folder of a checkpoint be these objects and nothing else; what is so already is left alone."""
    there = read(place)
    for name in there.keys() - objects.keys():
        (place / name).unlink()
    for name, data in objects.items():
        if there.get(name) != data:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
