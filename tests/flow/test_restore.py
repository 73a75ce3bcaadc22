"""The page `restore` on fakes: what it asks of an image before CRIU sees it, and of the tree afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hibernode.errors import Corrupt, Refused, RestoreFailed
from hibernode.model import Status
from tests.envelope import opened, seal
from tests.fakes.machine import CHILD, ROOT, memory
from tests.fakes.script import Script
from tests.flow.rig import Rig

pytestmark = pytest.mark.timeout(30)


def made(directory: Path, dead: frozenset[int] = frozenset()) -> tuple[Rig, str]:
    """A checkpoint, whose original has ended."""
    rig = Rig(directory, memory(20))
    rig.machine.dead = dead
    checkpoint_id = rig.checkpoint()
    rig.end_of_original()
    return rig, checkpoint_id


@pytest.mark.parametrize("states", [{}, {CHILD: ""}, {CHILD: "Z"}, {CHILD: "T"}, {ROOT: "T"}, {ROOT: "R", CHILD: "D"}])
@pytest.mark.parametrize("dead", [frozenset(), frozenset({CHILD})])
def test_a_tree_that_goes_on_is_restored(tmp_path: Path, states: dict[int, str], dead: frozenset[int]) -> None:
    """Children end by themselves, at any time; a zombie stays one until its parent waits for it."""
    rig, checkpoint_id = made(tmp_path, dead)
    rig.machine.states = {pid: state for pid, state in states.items() if pid not in dead or state in ("", "Z")}
    rig.restore(checkpoint_id)
    assert rig.statuses == [Status.READY]


@pytest.mark.parametrize("states", [{ROOT: ""}, {ROOT: "Z"}, {ROOT: "X"}, {ROOT: "t"}, {CHILD: "t"}])
def test_a_tree_without_its_root_or_still_held_is_not(tmp_path: Path, states: dict[int, str]) -> None:
    rig, checkpoint_id = made(tmp_path)
    rig.machine.states = states
    with pytest.raises(RestoreFailed):
        rig.restore(checkpoint_id)
    assert not rig.machine.restored


def test_who_was_dead_and_is_alive_is_another(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path, frozenset({CHILD}))
    rig.machine.states = {CHILD: "S"}
    with pytest.raises(RestoreFailed):
        rig.restore(checkpoint_id)


# --- before CRIU sees it --------------------------------------------------------------------------------------------------------


def doctored(rig: Rig, checkpoint_id: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Somebody changes the first image of the manifest."""
    key = f"{checkpoint_id}/manifest.json"
    manifest = opened(rig.store.objects[key])
    change(manifest["images"][0])
    rig.store.objects[key] = seal(manifest)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image["tasks"].pop(),
        lambda image: image["tasks"].append({"pid": 77}),
        lambda image: image["tasks"].reverse(),
        lambda image: image["tasks"][0].update(pid=ROOT + 1000),
        lambda image: image["tasks"][1].update(ppid=77),
        lambda image: image["tasks"][0].update(threads=[]),
        lambda image: image["tasks"][0]["threads"].append(78),
    ],
)
def test_a_manifest_that_names_other_tasks_is_corrupt(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The pids it names are those that are looked for, and killed if it fails: they must be those of the image."""
    rig, checkpoint_id = made(tmp_path)
    doctored(rig, checkpoint_id, change)
    with pytest.raises(Corrupt):
        rig.restore(checkpoint_id)
    assert not rig.criu.restores


@pytest.mark.parametrize(
    "change", [lambda image: [task.pop("dead") for task in image["tasks"]], lambda image: image["tasks"][1].update(threads=[99])]
)
def test_a_manifest_of_before_zombies_were_known_is_read(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rig, checkpoint_id = made(tmp_path, frozenset({CHILD}))
    doctored(rig, checkpoint_id, change)
    rig.restore(checkpoint_id)
    assert rig.statuses == [Status.READY]


def test_a_cpu_that_lacks_something_is_refused_before_the_fetch(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path)
    rig.machine.cpu_flags = ["sse2", "avx2"]
    rig.rescript(Script())
    with pytest.raises(Refused) as refused:
        rig.restore(checkpoint_id)
    assert (refused.value.code, refused.value.details["missing"]) == ("cpu_features", ["avx512f"])
    assert [step for step in rig.script.calls if step.startswith(("store.", "workloads.", "criu.restore"))] == [
        "store.get manifest.json"
    ]
    rig.machine.cpu_flags = ["sse2", "avx2", "avx512f", "amx_tile"]
    rig.restore(checkpoint_id)
    assert rig.statuses == [Status.READY]


def test_a_manifest_of_before_cpu_flags_were_written_is_restored_anywhere(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path)
    key = f"{checkpoint_id}/manifest.json"
    manifest = opened(rig.store.objects[key])
    del manifest["host"]["cpu_flags"]
    rig.store.objects[key] = seal(manifest)
    rig.machine.cpu_flags = []
    rig.restore(checkpoint_id)
    assert rig.statuses == [Status.READY]


def test_a_name_that_is_taken_is_refused_before_the_fetch(tmp_path: Path) -> None:
    rig, checkpoint_id = made(tmp_path)
    rig.rescript(Script())
    rig.restore(checkpoint_id)
    order = rig.script.notes
    assert order.index("workloads.insist_free") < order.index("store.read images.tar.zst")
