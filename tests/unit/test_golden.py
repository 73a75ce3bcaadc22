"""A released format version is read for ever: what comes out of each golden checkpoint is what went in when it was written."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from hibernode import catalog, gc
from hibernode.config import Retention, Signing
from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.notary import Notary
from hibernode.errors import Corrupt, Refused
from hibernode.model import FORMAT_VERSION, Cancel, ImageRef, Meter, Verdict
from hibernode.transfer import tar
from hibernode.transfer.receive import Receiver
from tests import keys
from tests.golden import HERE, keyring, reader, restored

VERSIONS = sorted(path.parent for path in HERE.glob("v*/golden.json"))


def test_every_version_so_far_has_one() -> None:
    both = [f"v{n}{kind}" for n in (1, 2) for kind in ("", "-encrypted", "-layer")]
    assert [path.name for path in VERSIONS] == [*both, "v3", "v3-encrypted", "v3-lz4"]
    assert int(VERSIONS[-1].name[1]) == FORMAT_VERSION


@pytest.mark.parametrize("place", VERSIONS, ids=lambda path: path.name)
def test_it_comes_out_as_it_went_in(place: Path, tmp_path: Path) -> None:
    golden = json.loads((place / "golden.json").read_text())
    verified, told = tmp_path / "verified", list[Verdict]()
    verified.mkdir()
    notary, keys_of = reader(place, verified), keyring(place, verified)
    assert catalog.verify(LocalDir(place), golden["checkpoint_id"], notary, keys_of, 2, Cancel(), told.append).ok
    assert restored(place, golden["checkpoint_id"], tmp_path) == golden["files"]


@pytest.mark.parametrize("place", VERSIONS, ids=lambda path: path.name)
def test_its_signature_is_asked_for(place: Path, tmp_path: Path) -> None:
    golden = json.loads((place / "golden.json").read_text())
    key, public = keys.pair(tmp_path)
    with pytest.raises(Refused) as refused:
        catalog.read(LocalDir(place), golden["checkpoint_id"], Notary(Signing(key=key, trusted=(public,))))
    assert refused.value.code == "signer"


@pytest.mark.parametrize("place", VERSIONS, ids=lambda path: path.name)
def test_it_holds_what_a_reader_can_get_wrong(place: Path, tmp_path: Path) -> None:
    golden = json.loads((place / "golden.json").read_text())
    manifest = catalog.read(LocalDir(place), golden["checkpoint_id"], reader(place, tmp_path))
    (part,) = manifest.parts
    assert len(part.streams) == 2
    assert 0 < part.zero_pages < part.pages
    assert len([name for name in golden["files"] if "/pages-" in name]) >= 2 or list(golden["files"]) == ["main/layer.tar"]
    assert sum(stream.frames for stream in part.streams) > 1


@pytest.mark.parametrize("place", VERSIONS, ids=lambda path: path.name)
def test_from_version_2_on_it_has_frames_in_planes(place: Path, tmp_path: Path) -> None:
    golden = json.loads((place / "golden.json").read_text())
    manifest = catalog.read(LocalDir(place), golden["checkpoint_id"], reader(place, tmp_path))
    (part,) = manifest.parts
    assert manifest.format_version == int(place.name[1])
    lz4 = place.name.endswith("-lz4")
    whole = part.bases[0] if isinstance(part, ImageRef) and part.bases else part
    assert whole.in_planes == (0 if manifest.format_version == 1 or lz4 else 1 if part in manifest.layers else 2)
    assert bool(part.in_lz4) is lz4


@pytest.mark.parametrize(
    "place", [place for place in VERSIONS if place.name in ("v3", "v3-encrypted")], ids=lambda path: path.name
)
def test_from_version_3_on_it_refers_to_others(place: Path, tmp_path: Path) -> None:
    """To two, of which one refers to the other; and under other numbers than the pages have there."""
    golden = json.loads((place / "golden.json").read_text())
    store, notary = LocalDir(place), reader(place, tmp_path)
    manifest = catalog.read(store, golden["checkpoint_id"], notary)
    (image,) = manifest.images
    seal = catalog.seal_of(manifest, keyring(place, tmp_path))
    index = Receiver(store, seal, image, 1, Meter()).fetch_index()
    assert len(image.bases) == 2
    assert image.bases[1].referenced
    assert 0 < image.referenced < image.pages - image.zero_pages
    assert set(index.references["source"].tolist()) == {0, 1}
    assert (index.references["first_page"] != index.references["source_page"]).any()


def test_the_layer_has_one_entry_of_each_kind(tmp_path: Path) -> None:
    place = HERE / "v1-layer"
    golden = json.loads((place / "golden.json").read_text())
    restored(place, golden["checkpoint_id"], tmp_path)
    kinds = set()
    with open(tmp_path / "files/main/layer.tar", "rb") as file:
        while (entry := tar.decode(file.read)) is not None:
            kinds.add(entry.kind)
            size = sum(length for _, length in entry.data)
            file.seek(size + len(tar.padding(size)), 1)
    assert kinds == set(tar.Kind)


def test_verify_compares_layers_and_delete_removes_them(tmp_path: Path) -> None:
    """Of kind rootfsonly: there is nothing else. gc can tell whose it is."""
    place = tmp_path / "v1-layer"
    shutil.copytree(HERE / "v1-layer", place)
    checkpoint_id = json.loads((place / "golden.json").read_text())["checkpoint_id"]
    store, notary, keyring_of = LocalDir(place), reader(place, tmp_path), keyring(place, tmp_path)
    manifest = catalog.read(store, checkpoint_id, notary)
    names = [ref.key for part in manifest.parts for ref in part.objects]
    assert sorted(names) == ["main/layer-0.zst", "main/layer-1.zst", "main/layer-index.zst"]
    for name in names:
        path = place / checkpoint_id / name
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:5] + bytes([whole[5] ^ 1]) + whole[6:], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(Corrupt):
                catalog.verify(store, checkpoint_id, notary, keyring_of, 2, Cancel(), list[Verdict]().append)
            path.write_bytes(whole)
    assert catalog.verify(store, checkpoint_id, notary, keyring_of, 2, Cancel(), list[Verdict]().append).frames > 2
    (found,) = gc.look(store, notary)
    assert not gc.plan([found], time.time(), Retention(keep_last=1, keep_days=1), set()), "the last of its workload"
    catalog.delete(store, checkpoint_id)
    assert not list(store.list(f"{checkpoint_id}/"))
