"""Increments on fakes: whatever fails, and at whichever step, what others refer to is whole, and no mark keeps it for nothing."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from hibernode import catalog, gc
from hibernode.checkpoint import checkpoint
from hibernode.config import Retention
from hibernode.errors import Corrupt, HibernodeError, OutcomeUnknown, Refused, StoreUnavailable
from hibernode.flow import Threads
from hibernode.model import PAGE, Cancel, DeleteCommand, Garbage, Meter, Status, Verdict
from hibernode.transfer.receive import Receiver
from tests import keys
from tests.fakes.machine import CHILD, ROOT, Run, memory
from tests.fakes.script import Script
from tests.flow.rig import Rig, checkpoint_command, fitting_error, new_id, nothing_outlives
from tests.flow.test_dispatch import eventually, node, running
from tests.flow.test_failures import Cancels, Outage, raised_by

pytestmark = pytest.mark.timeout(120)

AUTO = '{"increment": "auto"}'


def of(checkpoint_id: str) -> str:
    return json.dumps({"increment": checkpoint_id})


def changed(runs: list[Run], seed: int, share: float = 0.05) -> list[Run]:
    """Some of its pages are others, and everything has moved by some pages."""
    chance = random.Random(seed)

    def content(run: Run) -> bytes | None:
        if run.content is None:
            return None
        pages = [run.content[at : at + PAGE] for at in range(0, len(run.content), PAGE)]
        return b"".join(chance.randbytes(PAGE) if chance.random() < share else page for page in pages)

    moved = Run(CHILD << 8 | 1, 0x70000000 + seed * 0x100000, chance.randbytes((seed + 1) * PAGE))
    return [moved, *(dataclasses.replace(run, content=content(run)) for run in runs)]


def copied(here: Rig, there: Rig) -> None:
    """What is in one store is in the other, too."""
    for key, data in here.store.objects.items():
        there.store.put(key, data)


def marks(rig: Rig) -> list[str]:
    return [key for key in rig.store.objects if "/refs/" in key]


def collected(rig: Rig) -> list[Garbage]:
    """What a collection of everything that is not needed does."""
    told: list[Garbage] = []
    for entry in rig.node.journal.all():
        entry.update(phase="done")
    gc.collect(rig.node, rig.store, Retention(grace=0), told.append, Cancel(), apply=True)
    return told


def insist_restorable(rig: Rig, checkpoint_id: str) -> None:
    """The page brings it back: the fake CRIU compares every page. For that it must be of the memory as it is."""
    alive, rig.machine.alive, rig.machine.stopped = rig.machine.alive, False, False
    rig.restore(checkpoint_id)
    assert rig.machine.restored
    rig.machine.alive, rig.machine.restored, rig.machine.adopted = alive, False, False


def verify(rig: Rig, checkpoint_id: str) -> Verdict:
    told = list[Verdict]()
    return catalog.verify(rig.store, checkpoint_id, rig.node.notary, rig.node.keyring, 2, Cancel(), told.append)


@pytest.mark.parametrize("how", ["plain", "encrypted and signed"])
def test_a_chain_comes_back_each_of_it_and_stores_what_is_new(tmp_path: Path, how: str) -> None:
    settings = {}
    if how != "plain":
        private, public = keys.pair(tmp_path)
        settings = {
            "encryption": {"key": keys.wrapper(tmp_path)}, "signing": {"key": private, "trusted": [public]}
        }  # fmt: skip
    rig = Rig(tmp_path, memory(6000), **settings)
    made = [(rig.checkpoint(criu_opts=AUTO, streams=2), rig.machine.runs)]
    for seed in range(5):
        rig.machine.runs = changed(rig.machine.runs, seed)
        made.append((rig.checkpoint(criu_opts=of(made[-1][0]), streams=3), rig.machine.runs))
    stored = [catalog.read(rig.store, each, rig.node.notary).stored_bytes for each, _ in made]
    assert all(size < 0.2 * stored[0] for size in stored[1:]), "what is random here was text before, in part"
    for (each, runs), count in zip(made, range(6), strict=True):
        manifest = catalog.read(rig.store, each, rig.node.notary)
        assert (manifest.format_version, len(manifest.bases)) == (3, count)
        assert verify(rig, each).ok
        rig.machine.runs = runs
        insist_restorable(rig, each)
    assert not rig.at_work()


def test_what_has_not_changed_at_all_is_a_checkpoint_without_frames(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(2000))
    first = rig.checkpoint(criu_opts=AUTO)
    second = rig.checkpoint(criu_opts=of(first))
    third = rig.checkpoint(criu_opts=of(second))
    (image,) = catalog.read(rig.store, third, rig.node.notary).images
    assert [base.checkpoint_id for base in image.bases] == [first], "of the second there is nothing to be had"
    assert sum(stream.frames for stream in image.streams) == 0
    assert marks(rig) == [f"{first}/refs/{second}", f"{first}/refs/{third}"]
    gc.remove(rig.store, rig.node.notary, second)
    insist_restorable(rig, third)


def test_nothing_but_zeros_and_nothing_at_all(tmp_path: Path) -> None:
    for runs in ([], [Run(ROOT << 8 | 1, 0x1000, bytes(2000 * PAGE))]):
        rig = Rig(tmp_path / str(len(runs)), runs)
        first = rig.checkpoint(criu_opts=AUTO)
        second = rig.checkpoint(criu_opts=of(first))
        assert not catalog.read(rig.store, second, rig.node.notary).bases
        assert not marks(rig)
        insist_restorable(rig, second)


def test_a_plain_checkpoint_is_of_the_version_that_it_was(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(100))
    for opts in ("", '{"increment": "none"}'):
        manifest = catalog.read(rig.store, rig.checkpoint(criu_opts=opts), rig.node.notary)
        assert manifest.format_version == 1
        assert b'"increment"' not in rig.store.objects[f"{manifest.checkpoint_id}/manifest.json"]
    assert not [key for key in rig.store.objects if "digests" in key]


def rigged(directory: Path, script: Script | None = None) -> tuple[Rig, str]:
    """With a base, and memory that has changed since; `script` counts from here."""
    rig = Rig(directory, memory(1100))
    base = rig.checkpoint(criu_opts=AUTO)
    rig.machine.runs = changed(rig.machine.runs, 1)
    rig.rescript(script or Script())
    rig.machine.gpu = ""
    return rig, base


def steps(directory: Path) -> int:
    rig, base = rigged(directory / "counting")
    rig.checkpoint(criu_opts=of(base), streams=2)
    return len(rig.script.calls)


def insist_whole(rig: Rig, base: str, made: str) -> None:
    """After a try, however it ended: what is there can be restored, the base stays restorable, and marks are those of what is there."""
    where, script = f"after a failure at {rig.script.failed}", Script()
    rig.rescript(script)
    assert verify(rig, base).ok, where
    if f"{made}/manifest.json" in rig.store.objects:
        assert f"{base}/refs/{made}" in marks(rig), where
        with pytest.raises(Refused):
            gc.remove(rig.store, rig.node.notary, base)
        assert verify(rig, made).ok, where
        insist_restorable(rig, made)


def test_an_increment_fails_at_every_step(tmp_path: Path) -> None:
    for n in range(1, steps(tmp_path) + 1):
        script, made = Script(n, fitting_error), new_id()
        rig, base = rigged(tmp_path / str(n), script)
        with nothing_outlives():
            raised = raised_by(lambda: rig.checkpoint(made, criu_opts=of(base), streams=2))  # noqa: B023
        assert not (left := rig.leftovers(made)), f"{script.failed}: {left}"
        if raised is not None and Status.READY not in rig.statuses and f"{made}/manifest.json" not in rig.store.objects:
            assert not marks(rig), f"{script.failed}: {marks(rig)}"
            assert not rig.machine.stopped
        insist_whole(rig, base, made)


def test_the_store_goes_away_at_every_step_of_an_increment(tmp_path: Path) -> None:
    """Marks that could not be taken back keep nothing, and a collection takes them."""
    stale = 0
    for n in range(1, steps(tmp_path) + 1):
        script, made = Outage(n, fitting_error), new_id()
        rig, base = rigged(tmp_path / str(n), script)
        raised_by(lambda: rig.checkpoint(made, criu_opts=of(base), streams=2))  # noqa: B023
        insist_whole(rig, base, made)
        if f"{made}/manifest.json" not in rig.store.objects:
            stale += bool(marks(rig))
            told = collected(rig)
            assert not marks(rig), f"{script.failed}: {told}"
            gc.remove(rig.store, rig.node.notary, base)
            assert not rig.store.objects, f"{script.failed}: {rig.store.objects.keys()}"
    assert stale > 10


def test_an_increment_is_cancelled_at_every_step(tmp_path: Path) -> None:
    for n in range(1, steps(tmp_path) + 1):
        rigs: list[Rig] = []
        script, made = Cancels(n, lambda: rigs[0].cancel), new_id()  # noqa: B023
        rig, base = rigged(tmp_path / str(n), script)
        rigs.append(rig)
        with nothing_outlives():
            raised_by(lambda: rig.checkpoint(made, criu_opts=of(base), streams=2))  # noqa: B023
        assert not (left := rig.leftovers(made)), f"{script.failed}: {left}"
        if Status.READY not in rig.statuses:
            assert not marks(rig), script.failed
        insist_whole(rig, base, made)


def test_of_a_commit_that_nobody_knows_of_the_marks_stay(tmp_path: Path) -> None:
    class Lost(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name in ("store.get manifest.json", "store.delete manifest.json") and "report checkpoint_created" in self.calls:
                raise StoreUnavailable("no answer")

    rig, base = rigged(tmp_path, Lost())
    made = new_id()
    assert isinstance(raised_by(lambda: rig.checkpoint(made, criu_opts=of(base))), OutcomeUnknown)
    assert marks(rig) == [f"{base}/refs/{made}"]
    insist_whole(rig, base, made)


def test_damage_anywhere_in_a_base_is_found_by_name_and_no_other_frame_is_read(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(3000))
    base = rig.checkpoint(criu_opts=AUTO, streams=1)
    rig.machine.runs = rig.machine.runs[:3]  # nothing of the later frames is needed any more
    made = rig.checkpoint(criu_opts=of(base), streams=1)
    rig.end_of_original()
    for name in ("pages-0.zst", "index.zst"):
        key = f"{base}/main/{name}"
        whole = rig.store.objects[key]
        for damaged in (whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], whole[:-1], None):
            rig.store.objects.pop(key)
            if damaged is not None:
                rig.store.objects[key] = damaged
            for work in (lambda: rig.restore(made), lambda: verify(rig, made)):
                error = raised_by(work)
                assert isinstance(error, Corrupt)
                assert key in str(error)
        rig.store.objects[key] = whole
    key = f"{base}/main/pages-0.zst"
    whole = rig.store.objects[key]
    seek_table = 8 + 8 * 4 + 9
    rig.store.objects[key] = whole[: -seek_table - 5] + b"\0\0\0\0\0" + whole[-seek_table:]
    assert verify(rig, made).ok, "of the last frame it has nothing"
    with pytest.raises(Corrupt):
        verify(rig, base)
    insist_restorable(rig, made)


def test_what_a_restore_has_found_damaged_is_not_referred_to_by_whoever_shares_a_base(tmp_path: Path) -> None:
    """The damage is in the base of two: whoever finds it by the one says it of all that it may be in."""
    rig = Rig(tmp_path, memory(3000))
    base = rig.checkpoint(criu_opts=AUTO, streams=1)
    made = []
    for n in range(2):
        rig.machine.runs = changed(rig.machine.runs, n)
        made.append(rig.checkpoint(criu_opts=of(base), streams=1))
    key = f"{base}/main/pages-0.zst"
    whole = rig.store.objects[key]
    rig.store.objects[key] = whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]
    rig.end_of_original()
    with pytest.raises(Corrupt):
        rig.restore(made[0])
    assert rig.node.suspected == {base, made[0]}
    rig.machine.alive = True
    with pytest.raises(Corrupt, match=base):
        rig.checkpoint(criu_opts=of(made[1]))
    full = rig.checkpoint(criu_opts=AUTO)
    assert catalog.read(rig.store, full, rig.node.notary).bases == ()
    rig.node.clear(base)  # as a verify of it does, which has read all of it
    assert rig.node.suspected == {made[0]}
    rig.node.clear(made[0])
    assert not rig.node.suspected


def test_who_cannot_read_a_base_is_refused_by_name(tmp_path: Path) -> None:
    """Encrypted by a key that this node has not, not encrypted at all, or damaged."""
    rig = Rig(tmp_path, memory(200))
    plain = rig.checkpoint(criu_opts=AUTO)
    encrypting = Rig(tmp_path / "encrypting", memory(200), encryption={"key": keys.wrapper(tmp_path)})
    copied(rig, encrypting)
    error = raised_by(lambda: encrypting.checkpoint(criu_opts=of(plain)))
    assert isinstance(error, Refused)
    assert error.code == "increment_encryption"
    closed = encrypting.checkpoint(criu_opts=AUTO)
    other = Rig(tmp_path / "other", memory(200), encryption={"key": keys.wrapper(tmp_path, "other")})
    copied(encrypting, other)
    error = raised_by(lambda: other.checkpoint(criu_opts=of(closed)))
    assert isinstance(error, Refused)
    assert error.code == "key_unknown"
    key = f"{plain}/main/digests.zst"
    rig.store.objects[key] = rig.store.objects[key][:-1] + b"\0"
    error = raised_by(lambda: rig.checkpoint(criu_opts=of(plain)))
    assert isinstance(error, Corrupt)
    assert not any(map(marks, (rig, encrypting, other)))


async def test_auto_is_the_last_of_the_same_processes_and_a_full_one_where_that_cannot_be_had(tmp_path: Path) -> None:
    rig = node(tmp_path)
    rig.machine.runs = memory(200)

    async with running(rig) as desk:

        async def made(**overrides: str) -> list[str]:
            command = checkpoint_command(**({"criu_opts": AUTO} | overrides))
            await desk.dispatcher.submit(command)
            assert (await desk.end(command.action_id)).status == Status.READY
            ids.append(command.checkpoint_id)
            return [base.checkpoint_id for base in catalog.read(rig.store, command.checkpoint_id, rig.node.notary).bases]

        ids: list[str] = []
        assert await made() == []
        assert await made() == ids[:1]
        assert await made(criu_opts='{"increment": "none"}') == []
        assert await made() == ids[:1], "the one before has no digests; the one before that had nothing of its own"
        await desk.send(DeleteCommand(action_id=new_id(), checkpoint_id=ids[0]))
        await desk.acked()
        assert f"{ids[0]}/unwanted" in rig.store.objects
        assert rig.whole(ids[1])
        for each in (ids[3], ids[1], ids[2]):
            await desk.send(DeleteCommand(action_id=new_id(), checkpoint_id=each))
            await desk.acked()
        await eventually(lambda: not rig.store.objects, "all to be gone, the unwanted one with the last that needed it")
        assert await made() == []


def test_each_image_of_a_pod_refers_to_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two containers, and then of a third that was not there before; the third of the chain has pages in both others."""
    memories = {name: memory(300, seed=n) for n, name in enumerate(("main", "beside", "late"))}
    names = ["main", "beside"]

    def dump(self: Any, image: str, into: Path, *more: Any) -> Any:
        self._machine.runs = memories[image]
        return self._criu.dump(ROOT, into, *more)

    monkeypatch.setattr("tests.fakes.machine.FakeWorkload.roots", lambda self: dict.fromkeys(names, ROOT))
    monkeypatch.setattr("tests.fakes.machine.FakeWorkload.dump", dump)
    rig, ids = Rig(tmp_path), []
    for seed in range(3):
        ids.append(rig.checkpoint(criu_opts=of(ids[-1]) if ids else AUTO, streams=2))
        memories |= {name: changed(runs, seed) for name, runs in memories.items()}
        names[2:] = ["late"]
    images = {image.name: image for image in catalog.read(rig.store, ids[2], rig.node.notary).images}
    assert {name: [base.checkpoint_id for base in image.bases] for name, image in images.items()} == {
        "main": ids[:2], "beside": ids[:2], "late": ids[1:2]
    }  # fmt: skip
    assert all(base.name == name for name, image in images.items() for base in image.bases)
    assert verify(rig, ids[2]).ok
    seal = catalog.seal_of(catalog.read(rig.store, ids[2], rig.node.notary), rig.node.keyring)
    last = {name: changed(memory(300, seed=n), 0) for n, name in enumerate(memories)}
    last = {name: changed(runs, 1) for name, runs in last.items()}
    for name, image in images.items():
        (directory := tmp_path / name).mkdir()
        receiver = Receiver(rig.store, seal, image, 2, Meter())
        with Threads(Cancel()) as threads:
            receiver.fetch_pages(receiver.fetch_index(), directory, threads)
        found = b"".join(path.read_bytes() for path in sorted(directory.glob("pages-*.img")))
        assert sorted(found[at : at + PAGE] for at in range(0, len(found), PAGE)) == sorted(
            run.content[at : at + PAGE] for run in last[name] if run.content for at in range(0, len(run.content), PAGE)
        )


def test_an_increment_of_what_has_no_memory_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(20))
    base = rig.checkpoint(criu_opts=AUTO)
    command = checkpoint_command(criu_opts=of(base)).model_copy(update={"kind": "rootfsonly"})
    error = raised_by(lambda: checkpoint(rig.node, command, rig._attempt(command)))
    assert isinstance(error, Refused)
    assert error.code == "kind"


def test_errors_are_ours(tmp_path: Path) -> None:
    rig = Rig(tmp_path, memory(20))
    error = raised_by(lambda: rig.checkpoint(criu_opts=of(new_id())))
    assert isinstance(error, HibernodeError)
    assert error.code == "increment_unknown"
