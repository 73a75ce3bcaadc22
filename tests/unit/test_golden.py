"""A released format version is read for ever: what comes out of each golden checkpoint is what went in when it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hibernode import catalog
from hibernode.config import Signing
from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.notary import Notary
from hibernode.errors import Refused
from hibernode.model import FORMAT_VERSION, Cancel, Verdict
from tests import keys
from tests.golden import HERE, keyring, reader, restored

VERSIONS = sorted(path.parent for path in HERE.glob("v*/golden.json"))


def test_every_version_so_far_has_one() -> None:
    assert [path.name for path in VERSIONS] == [
        f"v{n}{kind}" for n in range(1, FORMAT_VERSION + 1) for kind in ("", "-encrypted")
    ]


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
    (image,) = catalog.read(LocalDir(place), golden["checkpoint_id"], reader(place, tmp_path)).images
    assert len(image.streams) == 2
    assert 0 < image.zero_pages < image.pages
    assert len([name for name in golden["files"] if "/pages-" in name]) >= 2
