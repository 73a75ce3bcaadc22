"""What is done to a checkpoint: one change in one of its objects, or in those of another that it refers to, drawn from a seed and a number,
with an id to do it again. An object whose name ends with `/` is a checkpoint that it refers to, as a whole."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from tests.damage.stored import Objects, Stored

FLIP, CUT = "flip", "cut"
OTHERS = ("overwrite", "append", "swap", "replace", "remove", "add")
DEEDS = (FLIP, CUT, *OTHERS)
TURN = (FLIP, FLIP, FLIP, CUT, "")  # of five numbers that follow each other, four are flips and truncations, one is of the others
EDGE = 64  # bytes at both ends of an object, where its headers and tables are: half of all places lie there
_OTHERS = {
    "overwrite": 9,
    "append": 6,
    "swap": 4,
    "replace": 5,
    "remove": 1,
    "add": 1,
}  # how often each: there are few ways to remove an object
_WHOLE = {"swap": 1, "replace": 1, "remove": 1}  # of what can be done to a checkpoint as a whole
_WHOLES = 0.2  # how often, where it refers to others, one of these is what is damaged, and not an object
_EMPTY = ("append", "swap", "replace", "remove")  # what can be done to an object of no bytes
MARKS = ("removing", "unwanted", "attempt", "refs/00000000-0000-4000-8000-000000000000")  # of others, put into what it refers to


@dataclass(frozen=True)
class Harm:
    """One change. `at` is where, of a cut the length that is left; `what` is hex (the bits to turn, the bytes) or an object's name."""

    stored: str
    object: str
    deed: str
    at: int = 0
    what: str = ""

    @property
    def id(self) -> str:
        return ":".join([self.stored, self.object, self.deed, str(self.at), self.what])


def parse(text: str) -> Harm:
    stored, name, deed, at, what = text.split(":", 4)
    if deed not in DEEDS:
        raise ValueError(f"{text}: {deed!r} is none of {', '.join(DEEDS)}")
    return Harm(stored, name, deed, int(at), what)


def draw(everything: Mapping[str, Stored], seed: int, number: int) -> tuple[Harm, Objects]:
    """The `number`-th change that a seed stands for, and the objects after it: never the same as before. Each checkpoint and each of its
    objects comes as often as any other, however small; but of a chain, which takes longer, half as often."""
    chance, names = random.Random(f"{seed}/{number}"), sorted(everything)
    while True:
        (name,) = chance.choices(names, [1 if everything[name].bases else 2 for name in names])
        stored = everything[name]
        deed = TURN[number % len(TURN)] or _other(chance, stored)
        harm = _draw(chance, everything, stored, deed)
        if (
            after := done(harm, everything)
        ) != stored.objects:  # not so of what was overwritten by itself, or swapped with its like
            return harm, after


def _other(chance: random.Random, stored: Stored) -> str:
    possible = [deed for deed in OTHERS if deed != "add" or stored.bases]
    return chance.choices(possible, [_OTHERS[deed] for deed in possible])[0]


def _draw(chance: random.Random, everything: Mapping[str, Stored], stored: Stored, deed: str) -> Harm:
    if deed == "add":
        return Harm(stored.name, f"{chance.choice(sorted(stored.bases))}/{chance.choice(MARKS)}", deed)
    if deed in _WHOLE and stored.bases and chance.random() < _WHOLES:
        return _draw_whole(chance, everything, stored, chance.choice(sorted(_WHOLE)))
    name = chance.choice(sorted(name for name, data in stored.objects.items() if data or deed in _EMPTY))
    size, at, what = len(stored.objects[name]), 0, ""
    match deed:
        case "flip":
            at, what = _place(chance, size), f"{chance.randrange(1, 256):02x}"
        case "cut":
            at = chance.choice((0, size - 1, *[chance.randrange(size) for _ in range(8)]))
        case "overwrite":
            at = _place(chance, size)
            length = chance.randint(1, min(size - at, chance.choice((4, 64, 256))))
            what = chance.choice((bytes(length), chance.randbytes(length))).hex()
        case "append":
            length = chance.randint(1, 64)
            what = chance.choice((bytes(length), chance.randbytes(length))).hex()
        case "swap":
            what = chance.choice(sorted(stored.objects.keys() - {name}))
        case "replace":
            other = everything[chance.choice(sorted(everything.keys() - {stored.name}) or [stored.name])]
            what = f"{other.name}:{name if name in other.objects else chance.choice(sorted(other.objects))}"
    return Harm(stored.name, name, deed, at, what)


def _draw_whole(chance: random.Random, everything: Mapping[str, Stored], stored: Stored, deed: str) -> Harm:
    """All of a checkpoint that it refers to is gone, changes places with the next, or is another one's, which is whole."""
    base, what = chance.choice(sorted(stored.bases)), ""
    match deed:
        case "swap":
            what = f"{chance.choice(sorted(stored.bases.keys() - {base}))}/"
        case "replace":
            chains = sorted(each.name for each in everything.values() if each.bases and each != stored) or [stored.name]
            what = f"{chance.choice(chains)}:{base}/"
    return Harm(stored.name, f"{base}/", deed, 0, what)


def _place(chance: random.Random, size: int) -> int:
    edge = min(EDGE, size)
    return chance.choice(
        (chance.randrange(size), chance.randrange(size), chance.randrange(edge), size - 1 - chance.randrange(edge))
    )


def done(harm: Harm, everything: Mapping[str, Stored]) -> Objects:
    """The objects of that checkpoint after the deed."""
    objects = dict(everything[harm.stored].objects)
    if harm.object.endswith("/"):
        return _done_to_all(harm, objects, everything)
    if harm.deed == "add":
        return {**objects, harm.object: b""}
    data = objects.pop(harm.object)
    match harm.deed:
        case "flip":
            objects[harm.object] = data[: harm.at] + bytes([data[harm.at] ^ int(harm.what, 16)]) + data[harm.at + 1 :]
        case "cut":
            objects[harm.object] = data[: harm.at]
        case "overwrite":
            run = bytes.fromhex(harm.what)
            objects[harm.object] = data[: harm.at] + run + data[harm.at + len(run) :]
        case "append":
            objects[harm.object] = data + bytes.fromhex(harm.what)
        case "swap":
            objects[harm.object], objects[harm.what] = objects[harm.what], data
        case "replace":
            other, _, name = harm.what.partition(":")
            objects[harm.object] = everything[other].objects[name]
    return objects


def _done_to_all(harm: Harm, objects: Objects, everything: Mapping[str, Stored]) -> Objects:
    """Of one that it refers to."""
    base = harm.object.removesuffix("/")
    rest = {name: data for name, data in objects.items() if not name.startswith(harm.object)}
    match harm.deed:
        case "remove":
            return rest
        case "replace":
            other, _, folder = harm.what.partition(":")
            return rest | {f"{base}/{name}": data for name, data in everything[other].folder(folder.removesuffix("/")).items()}
    exchanged = {harm.object: harm.what, harm.what: harm.object}
    return {_moved(name, exchanged): data for name, data in objects.items()}


def _moved(name: str, exchanged: Mapping[str, str]) -> str:
    folder, slash, rest = name.partition("/")
    return exchanged.get(folder + slash, folder + slash) + rest
