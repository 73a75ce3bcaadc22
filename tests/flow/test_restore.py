"""The page `restore` on fakes: what it asks of an image before CRIU sees it, and of the tree afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from hibernode.errors import RestoreFailed
from hibernode.model import Status
from tests.fakes.machine import CHILD, ROOT, memory
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
