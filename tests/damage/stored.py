"""The checkpoints that are damaged: the golden one, and some that the page `checkpoint` makes on fakes; of these some are the third of a
chain. Those of a process are in `real`."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hibernode.model import PAGE
from hibernode.transfer.pageproto import SHMEM, TASK
from tests import golden, keys
from tests.fakes.machine import CHILD, ROOT, Run
from tests.flow.rig import Rig
from tests.golden.make import floats, scripted

Objects = Mapping[
    str, bytes
]  # by name: the key below the checkpoint's id; of another one that it needs, `<which>/<the key there>`
MakeRig = Callable[[Path], Rig]  # a node that would restore it; the directory is empty


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint whose original has ended. `bases`: the ids of those that it refers to, the first of the chain first, by what their
    objects are called here. `runs`: the memory of fakes from which the next increment is made."""

    name: str
    checkpoint_id: str
    objects: Objects
    rig: MakeRig
    bases: Mapping[str, str] = field(default_factory=dict)
    runs: Sequence[Run] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """In the order in which they were made."""
        return (*self.bases.values(), self.checkpoint_id)

    @property
    def own(self) -> list[str]:
        """Its objects that are not its bases'."""
        return [name for name in self.objects if name.partition("/")[0] not in self.bases]

    def keys(self, objects: Objects) -> dict[str, bytes]:
        """As they are in a store."""
        return {self._key(name): data for name, data in objects.items()}

    def named(self, keys: Mapping[str, bytes]) -> Objects:
        """Of a store those that are its own or its bases', as they are called here."""
        folders = {checkpoint_id: f"{name}/" for name, checkpoint_id in self.bases.items()} | {self.checkpoint_id: ""}
        cut = ((*key.partition("/"), data) for key, data in keys.items())
        return {folders[owner] + rest: data for owner, _, rest, data in cut if owner in folders}

    def _key(self, name: str) -> str:
        folder, _, rest = name.partition("/")
        return f"{self.bases[folder]}/{rest}" if folder in self.bases else f"{self.checkpoint_id}/{name}"

    def folder(self, base: str) -> dict[str, bytes]:
        """The objects of one of its bases, by their names there."""
        return {name.removeprefix(f"{base}/"): data for name, data in self.objects.items() if name.startswith(f"{base}/")}


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


FULL, MIDDLE = "full", "middle"  # what the objects of the two that the third of a chain refers to are called
AUTO = '{"increment": "auto"}'


def _chain(name: str, directory: Path, seed: int, overrides: Mapping[str, object], **settings: object) -> Stored:
    """The third of a chain, with pages of both others; of the first some frames are needed no more. Its ids are always the same, so that
    the name of a case is enough to do it again."""
    ids = [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {n}")) for n in range(3)]
    memories = [_grown(seed, time) for time in range(4)]

    def rig(place: Path) -> Rig:
        return Rig(place, memories[2], **settings)

    maker = Rig(directory, **settings)
    for n, checkpoint_id in enumerate(ids):
        maker.machine.runs = memories[n]
        maker.checkpoint(checkpoint_id, criu_opts=json.dumps({"increment": ids[n - 1]}) if n else AUTO, **overrides)
    made = Stored(name, ids[2], {}, rig, {FULL: ids[0], MIDDLE: ids[1]}, memories[3])
    return replace(made, objects=made.named(maker.store.objects))


def _grown(seed: int, time: int) -> list[Run]:
    """What it holds at that time: few pages in each of four frames, of which a quarter is new each time; the last run ends, so that of
    the frames of others that have it nothing is needed any more."""
    spaces = (ROOT << 8 | TASK, CHILD << 8 | TASK, 77 << 8 | SHMEM, CHILD << 8 | TASK)
    runs = [
        Run(space, 0x400000 + n * 0x1000000, b"".join(_page(seed, n, page, time) for page in range(1024)))
        for n, space in enumerate(spaces)
    ]
    return runs if time < 2 else runs[:3]


def _page(seed: int, run: int, number: int, time: int) -> bytes:
    """One of sixteen is no zeros, and of these one of two is text."""
    if number % 16 != 5:
        return bytes(PAGE)
    changed = number // 16 % 4
    chance = random.Random(f"{seed} {run} {number} {changed if changed <= time else 0}")
    return chance.randbytes(PAGE) if number % 32 == 5 else chance.randbytes(4) * (PAGE // 4)


def _golden(name: str, directory: Path) -> Stored:
    place = golden.HERE / "v1"
    checkpoint_id = json.loads((place / "golden.json").read_text())["checkpoint_id"]
    return Stored(name, checkpoint_id, read(place / checkpoint_id), lambda work: Rig(work, scripted()))


def _signed(name: str, directory: Path) -> Stored:
    key, public = keys.pair(directory)
    return _dumped(name, directory, _few, {"streams": 2}, signing={"key": key, "trusted": [public]})


def _encrypted(name: str, directory: Path) -> Stored:
    return _dumped(name, directory, _few, {"streams": 2}, encryption={"key": keys.wrapper(directory)})


_RAW = {"streams": 1, "compression": "none"}  # whatever is in it, its streams are as long
KINDS: Mapping[str, Callable[[str, Path], Stored]] = {
    "golden": _golden,
    "sparse": lambda name, directory: _dumped(name, directory, _sparse, {"streams": 3}),
    "raw": lambda name, directory: _dumped(name, directory, _few, {"streams": 1, "compression": "none"}),
    "zeros": lambda name, directory: _dumped(name, directory, _zeros, {"streams": 2}),
    "planes": lambda name, directory: _dumped(name, directory, _floats, {"streams": 2}),
    "signed": _signed,
    "encrypted": _encrypted,
    "chain": lambda name, directory: _chain(name, directory, 1, {"streams": 2}),
    "raw chain": lambda name, directory: _chain(name, directory, 2, _RAW),
    "its like": lambda name, directory: _chain(name, directory, 4, _RAW),
    "closed chain": lambda name, directory: _chain(name, directory, 3, {"streams": 2}, **keys.closed(directory)),
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
