"""10,000 random byte flips and truncations over stored checkpoints, and 2,500 changes of other kinds: every one is refused before CRIU is
called, but for those of what another checkpoint has and this one does not need. `scripts/damage` does as many as anybody likes, and
those of real checkpoints too."""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hibernode import catalog, ports
from hibernode.config import Signing
from hibernode.drivers.notary import Notary
from hibernode.errors import Refused
from hibernode.model import PAGE, Cancel, Manifest, Signature
from hibernode.transfer import codec, format
from hibernode.transfer.pageproto import TASK
from tests import keys
from tests.damage import harm, stored, table
from tests.damage.harm import Harm
from tests.damage.needed import Needed
from tests.damage.stored import FULL, KINDS, MIDDLE, Objects, Stored
from tests.damage.trial import DAMAGED, Bench, Trial
from tests.envelope import opened
from tests.fakes.machine import ROOT, Run
from tests.flow.rig import Rig, nothing_outlives

pytestmark = pytest.mark.timeout(180)

SEED = 1
CASES, BLOCK = 12_500, 500


@pytest.fixture(scope="module")
def tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hn-damage-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    return stored.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def bench(tmpfs: Path, everything: dict[str, Stored]) -> Bench:
    return Bench(tmpfs, everything)


def untouched(name: str) -> Harm:
    return Harm(name, "manifest.json", "flip", 0, "00")


@pytest.mark.parametrize("name", KINDS)
def test_what_is_whole_is_restored(bench: Bench, everything: dict[str, Stored], name: str) -> None:
    bench.insist_restores(everything[name])


CHAINS = ("chain", "raw chain", "its like", "closed chain")


@pytest.mark.parametrize("name", [name for name in KINDS if name not in CHAINS])
def test_a_restore_of_damage_would_be_seen(bench: Bench, everything: dict[str, Stored], name: str) -> None:
    found = bench.play(untouched(name), everything[name].objects).wrong
    assert "CRIU was called" in found
    assert "restore finds nothing wrong" in found
    assert "verify finds nothing wrong" in found


@pytest.mark.parametrize("name", CHAINS)
def test_so_it_would_be_of_a_chain_and_what_the_next_refers_to(tmpfs: Path, everything: dict[str, Stored], name: str) -> None:
    """What is whole is said to be damaged, and the other way round."""
    bench = Bench(tmpfs / "seen", everything, followed=1)
    bench.insist_restores(everything[name])
    assert bench.play(untouched(name), everything[name].objects).wrong == []
    looks = bench.looks[name]
    now = {"manifest.json": lambda _: object()}
    bench.looks[name] = Needed(now, now, now)
    assert {
        "CRIU was called",
        "restore finds nothing wrong",
        "verify finds nothing wrong",
        "an increment of it finds nothing wrong",
    } < {*bench.play(untouched(name), everything[name].objects).wrong}
    one = Harm(name, f"{MIDDLE}/main/index.zst", "flip", 40, "01")
    bench.looks[name] = Needed({}, {}, {})
    found = "\n".join(bench.play(one, harm.done(one, everything)).wrong)
    for what in ("restore ends with corrupt", "verify ends with corrupt", "the next does not refer to it"):
        assert what in found
    bench.looks[name] = looks
    assert bench.play(one, harm.done(one, everything)).wrong == []


def test_what_the_next_cannot_see_is_the_bytes_of_streams_and_no_more(tmpfs: Path, everything: dict[str, Stored]) -> None:
    """It refers to frames of which nobody reads a byte before it is made; `verify` says so, by name."""
    bench, name = Bench(tmpfs / "bytes", everything, followed=1), "raw chain"
    for deed, following in (("flip", DAMAGED), ("cut", "nothing"), ("remove", "nothing")):
        one = Harm(name, f"{FULL}/main/pages-0.zst", deed, 100, "01")
        trial = bench.play(one, harm.done(one, everything))
        assert (trial.wrong, trial.code, trial.following) == ([], "corrupt", following)
    for what in ("main/digests.zst", "main/index.zst", "manifest.json"):
        one = Harm(name, what, "flip", 100, "01")
        trial = bench.play(one, harm.done(one, everything))
        assert (trial.wrong, trial.following) == ([], MIDDLE)


def test_two_of_the_chains_have_streams_of_the_same_lengths(everything: dict[str, Stored]) -> None:
    """So that to put one in the place of the other is no damage that its size gives away."""
    one, other = ({key: len(data) for key, data in everything[name].objects.items() if "/pages-" in key} for name in CHAINS[1:3])
    assert one == other


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_every_damage_is_refused_before_criu(bench: Bench, everything: dict[str, Stored], tmp_path: Path, first: int) -> None:
    wrong = list[str]()
    for number in range(first, first + BLOCK):
        one, after = harm.draw(everything, SEED, number)
        if (trial := bench.play(one, after)).wrong:
            stored.write(tmp_path / str(number), after)
            wrong.append(f"seed {SEED}, number {number}, now in {tmp_path / str(number)}: {one.id}: {'; '.join(trial.wrong)}")
    assert not wrong, "\n".join(wrong)


def test_four_of_five_are_flips_and_truncations_and_every_object_comes(everything: dict[str, Stored]) -> None:
    drawn = [harm.draw(everything, SEED, number)[0] for number in range(4000)]
    deeds = Counter(each.deed for each in drawn)
    assert deeds.keys() == set(harm.DEEDS)
    assert deeds[harm.FLIP] + deeds[harm.CUT] == 3200
    objects = {(each.stored, each.object) for each in drawn if each.deed != "add"}
    single = {(name, each) for name in everything for each in everything[name].objects}
    assert objects >= {(name, each) for name, each in single if everything[name].objects[each]}
    assert objects - single == {(name, f"{base}/") for name in CHAINS for base in (FULL, MIDDLE)}


def test_the_seed_and_the_number_or_the_id_alone_are_enough_to_do_it_again(everything: dict[str, Stored]) -> None:
    for number in range(200):
        one, after = harm.draw(everything, SEED, number)
        assert harm.draw(everything, SEED, number) == (one, after)
        assert harm.parse(one.id) == one
        assert harm.done(harm.parse(one.id), everything) == after
    with pytest.raises(ValueError, match="melt"):
        harm.parse("golden:manifest.json:melt:0:")


def test_a_table_counts_and_says_how_to_do_it_again() -> None:
    trials = [
        Trial(Harm("golden", "main/pages-0.zst", "flip", 7, "ff"), "corrupt"),
        Trial(untouched("signed"), "", ["it was restored"]),
    ]
    result = table.summary(trials, seed=7)
    assert (result["cases"], result["refused"], result["wrong"]) == (2, 1, 1)
    assert result["by_code"] == {"corrupt": 1, "ready": 1}
    assert result["by_object"]["pages-<n>.zst"] == {"cases": 1, "wrong": 0, "corrupt": 1}
    assert not table.good(result)
    assert table.good(table.summary(trials[:1]))
    assert not table.good(table.summary([]))
    assert "again: scripts/damage --case 'signed:manifest.json:flip:0:00'" in table.render(result)


# --- damage that is no accident -------------------------------------------------------------------------------------------------


def forged(objects: Objects, notary: ports.Notary) -> Objects:
    """Whoever can write to the store changes a byte of a page, and makes every digest anew that covers it: of the frame, the stream, the
    index and the manifest. The page's frame is a raw one."""
    manifest = Manifest.model_validate(opened(objects["manifest.json"]))
    (image,) = manifest.images
    index = format.decode_index(codec.inflate(objects["main/index.zst"], limit=1 << 20), image)
    (frame,) = frames = index.frames.copy()
    stream = image.streams[int(frame["stream"])]
    data = bytearray(objects[stream.key])
    data[CONTENT] ^= 1
    frame["digest"] = np.frombuffer(format.digest(bytes(data[: int(frame["stored"])])), np.uint8)
    packed = codec.deflate(format.encode_index(dataclasses.replace(index, frames=frames)))
    table = format.seek_table(frames["stored"], frames["kept"] * PAGE)
    streams = [
        each.model_copy(update={"digest": format.stream_digest([frame["digest"].tobytes()], table)}) if each == stream else each
        for each in image.streams
    ]
    ref = image.index.model_copy(update={"size": len(packed), "digest": format.digest(packed).hex()})
    image = image.model_copy(update={"streams": streams, "index": ref})
    sealed = format.encode_manifest(manifest.model_copy(update={"images": [image]}), notary)
    return {**objects, stream.key: bytes(data), "main/index.zst": packed, "manifest.json": sealed}


CONTENT = 9 + 3  # bytes of a raw frame before its content: header, and header of the first block


class Copied:
    """ports.Notary of somebody without a key: a manifest gets the signature that was there, or none."""

    def __init__(self, manifest: bytes | None = None) -> None:
        self._signature = None if manifest is None else Signature.model_validate(json.loads(manifest)["signature"])

    def sign(self, message: bytes) -> Signature | None:
        return self._signature

    def check(self, message: bytes, signature: Signature | None) -> None:
        return


def made(directory: Path, **settings: object) -> tuple[Rig, str, Objects]:
    runs = [Run(ROOT << 8 | TASK, 0x400000, random.Random(7).randbytes(3 * PAGE))]
    rig = Rig(directory, runs, **settings)
    checkpoint_id = rig.checkpoint(streams=2, compression="none")
    rig.end_of_original()
    prefix = f"{checkpoint_id}/"
    return rig, checkpoint_id, {key.removeprefix(prefix): data for key, data in rig.store.objects.items()}


def put(rig: Rig, checkpoint_id: str, objects: Objects) -> None:
    rig.store.objects = {f"{checkpoint_id}/{name}": data for name, data in objects.items()}


def test_digests_alone_do_not_find_what_was_forged(tmp_path: Path) -> None:
    """So what follows is a forgery without a flaw: it comes as far as CRIU, which here compares the memory."""
    rig, checkpoint_id, objects = made(tmp_path)
    put(rig, checkpoint_id, forged(objects, Copied()))
    with pytest.raises(AssertionError, match="another one"):
        rig.restore(checkpoint_id)
    assert rig.criu.restores == 1


@pytest.mark.parametrize("code", ["signature", "unsigned", "signer"])
def test_a_signature_does(tmp_path: Path, code: str) -> None:
    """The old one kept, none at all, one by another key."""
    key, public = keys.pair(tmp_path)
    rig, checkpoint_id, objects = made(tmp_path, signing={"key": key, "trusted": [public]})
    notaries = {
        "signature": lambda: Copied(objects["manifest.json"]),
        "unsigned": Copied,
        "signer": lambda: Notary(Signing(key=keys.pair(tmp_path, "foreign")[0])),
    }
    put(rig, checkpoint_id, forged(objects, notaries[code]()))
    with nothing_outlives(), pytest.raises(Refused) as refused:
        rig.restore(checkpoint_id)
    assert refused.value.code == code
    assert not rig.criu.restores
    assert not rig.at_work()
    with pytest.raises(Refused) as refused:
        catalog.verify(rig.store, checkpoint_id, rig.node.notary, rig.node.keyring, 2, Cancel(), lambda verdict: None)
    assert refused.value.code == code
