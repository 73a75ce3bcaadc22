"""Encrypted checkpoints through both pages: they come back, nothing in the store can be read, and who has not the key touches nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hibernode import catalog
from hibernode.errors import Corrupt, KeyService, Refused
from hibernode.model import PAGE, Cancel, Verdict
from hibernode.transfer import codec
from tests import keys
from tests.fakes.machine import ROOT, Run
from tests.flow.rig import Rig
from tests.flow.test_pages import memory

WORD = b"the password is swordfish"


def encrypting(directory: Path, **more: object) -> Rig:
    """Memory of every kind: pages of zeros, pages that compress, pages that do not (their frames are raw), and a word to look for."""
    page = (WORD + bytes(PAGE))[:PAGE]
    secret = Run(ROOT << 8 | 1, 0x7F0000000000, page + os.urandom(1500 * PAGE))
    return Rig(directory, [*memory(2500), secret], encryption={"key": keys.wrapper(directory)}, **more)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_it_comes_back(tmp_path: Path, compression: str) -> None:
    rig = encrypting(tmp_path)
    made = rig.checkpoint(streams=3, compression=compression)
    assert catalog.read(rig.store, made, rig.node.notary).encryption is not None
    rig.end_of_original()
    rig.restore(made)
    assert rig.machine.restored
    assert not rig.leftovers(made)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_nothing_in_the_store_can_be_read(tmp_path: Path, compression: str) -> None:
    rig = encrypting(tmp_path)
    made = rig.checkpoint(streams=2, compression=compression)
    for name, data in rig.store.objects.items():
        assert WORD not in data
        if not name.endswith("manifest.json"):
            assert b"pstree" not in data
            with pytest.raises(Corrupt):
                codec.inflate(data, limit=1 << 30)
    plain = Rig(tmp_path / "plain", [Run(ROOT << 8 | 1, 0x400000, (WORD + bytes(PAGE))[:PAGE])])
    plain.checkpoint(compression="none")
    assert any(WORD in data for data in plain.store.objects.values()), "the word is looked for in the right place"
    assert made


def test_two_checkpoints_of_the_same_memory_have_nothing_in_common(tmp_path: Path) -> None:
    rig = encrypting(tmp_path)
    one, two = rig.checkpoint(streams=1), rig.checkpoint(streams=1)
    first, second = (catalog.read(rig.store, each, rig.node.notary) for each in (one, two))
    assert first.encryption != second.encryption
    blocks = [
        {data[at : at + 64] for name, data in rig.store.objects.items() if f"{each}/main/pages" in name for at in range(0, 4096, 64)}
        for each in (one, two)
    ]  # fmt: skip
    assert not blocks[0] & blocks[1]


def test_verify_decrypts(tmp_path: Path) -> None:
    rig = encrypting(tmp_path)
    made, told = rig.checkpoint(streams=2), list[Verdict]()
    assert catalog.verify(rig.store, made, rig.node.notary, rig.node.keyring, 2, Cancel(), told.append).ok


def test_who_has_not_the_key_touches_nothing(tmp_path: Path) -> None:
    rig = encrypting(tmp_path)
    made = rig.checkpoint()
    for encryption in ({}, {"key": keys.wrapper(tmp_path, "other")}):
        stranger = Rig(tmp_path / f"stranger{len(encryption)}", encryption=encryption)
        stranger.store.objects.update(rig.store.objects)
        with pytest.raises(Refused) as refused:
            stranger.restore(made)
        assert refused.value.code == "key_unknown"
        with pytest.raises(Refused):
            catalog.verify(stranger.store, made, stranger.node.notary, stranger.node.keyring, 2, Cancel(), list[Verdict]().append)
        assert not [note for note in stranger.script.notes if note.startswith(("criu.restore", "workloads.prepare"))]
        assert catalog.read(stranger.store, made, stranger.node.notary).encryption, "it is listed and inspected all the same"


def test_objects_of_two_checkpoints_cannot_be_mixed(tmp_path: Path) -> None:
    """Not even by one who makes the digests right: an encrypted piece says of which checkpoint and object it is."""
    rig = encrypting(tmp_path)
    one, two = rig.checkpoint(streams=1), rig.checkpoint(streams=1)
    ours, theirs = (catalog.read(rig.store, each, rig.node.notary) for each in (one, two))
    mixed = ours.model_copy(update={"images": theirs.images})
    for name in ("pages-0.zst", "index.zst", "images.tar.zst"):
        rig.store.objects[f"{one}/main/{name}"] = rig.store.objects[f"{two}/main/{name}"]
    rig.store.objects.pop(f"{one}/manifest.json")
    catalog.commit(rig.store, mixed, rig.node.notary, Cancel())
    rig.end_of_original()
    with pytest.raises(Corrupt):
        rig.restore(one)
    assert not rig.machine.restored


def test_another_checkpoints_wrapped_key_is_refused(tmp_path: Path) -> None:
    rig = encrypting(tmp_path)
    one, two = (catalog.read(rig.store, rig.checkpoint(streams=1), rig.node.notary) for _ in range(2))
    rig.store.objects.pop(f"{one.checkpoint_id}/manifest.json")
    catalog.commit(rig.store, one.model_copy(update={"encryption": two.encryption}), rig.node.notary, Cancel())
    with pytest.raises(Corrupt, match="data key"):
        rig.restore(one.checkpoint_id)


def test_a_key_service_that_lies_freezes_nobody(tmp_path: Path) -> None:
    """What comes back from it is another key: a checkpoint that nobody could decrypt must not be made."""
    program = tmp_path / "service"
    program.write_text("""#!/bin/sh
read request
case $request in
*unwrap*) echo '{"data_key": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}' ;;
*) echo '{"key": "k", "wrapped": "AAAA"}' ;;
esac
""")
    program.chmod(0o700)
    rig = Rig(tmp_path, memory(10), encryption={"command": [str(program)]})
    with pytest.raises(KeyService, match="another key"):
        rig.checkpoint()
    assert "workload.freeze" not in rig.script.notes
    assert not rig.store.objects
