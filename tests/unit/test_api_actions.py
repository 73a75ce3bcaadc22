"""The rules by which the control plane moves a status: pure, so every order of what may happen can be tried."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from hibernode.api import actions
from hibernode.api.actions import LATE, NEVER_BEGUN, NEVER_TOLD, NODE_SILENT, Action
from hibernode.model import Event, Profile, Status

NOW = 1_000_000.0
ID = "00000000-0000-4000-8000-000000000001"
STATUSES = (Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY)


def action(**changes: object) -> Action:
    base = Action(ID, ID, "checkpoint", Status.INITIALIZED, NOW, NOW, "c", node="n", expires_at=NOW + 3600)
    return replace(base, **changes)  # type: ignore[arg-type] # whatever a test says


def event(seq: int, status: Status, **more: object) -> Event:
    facts: dict[str, object] = {"node": "n", "time": NOW + seq, **more}
    return Event(action_id=ID, seq=seq, type="checkpoint", status=status, checkpoint_id=ID, **facts)  # type: ignore[arg-type]


def after(told: Action, events: Sequence[Event], now: float) -> Action:
    return replace(told, **actions.changes(told, events, now))


STORY = [event(n, status) for n, status in enumerate(STATUSES, 1)]
FAILURE = [event(1, Status.PROCESSING), event(2, Status.ERROR, code="dump_failed", message="no", hint="look")]


@pytest.mark.parametrize("story", [STORY, FAILURE], ids=["ready", "error"])
def test_whatever_order_and_however_often_events_come_the_end_is_the_same(story: list[Event]) -> None:
    wanted = after(action(), story, NOW + 100)
    for order in itertools.permutations(story):
        found = action()
        ranks = [found.status.rank]
        for each in (*order, *order):
            found = after(found, [each], NOW + 100)
            ranks.append(found.status.rank)
        assert (found.status, found.seq, found.code) == (wanted.status, wanted.seq, wanted.code)
        assert ranks == sorted(ranks), "a status went back"


def test_one_batch_is_as_good_as_many() -> None:
    shuffled = random.Random(3).sample(STORY, len(STORY))
    assert after(action(), shuffled, NOW + 100) == after(action(), STORY, NOW + 100)


def test_ready_fills_what_is_known_of_a_checkpoint() -> None:
    profile = Profile(total_duration=7, total_io=8, pause_ns=9)
    found = after(action(), [event(3, Status.READY, code="ok", profile=profile, details={"location": "s3://b/x"})], NOW + 100)
    assert (found.completed_at, found.location, found.code) == (NOW + 3, "s3://b/x", "")
    assert found.profile == profile


def test_a_restore_that_is_ready_completes_no_checkpoint() -> None:
    assert after(action(type="restore"), [event(3, Status.READY)], NOW + 100).completed_at == 0.0


def test_an_event_of_another_node_counts_nothing() -> None:
    assert after(action(), [event(1, Status.READY, node="other")], NOW + 100) == action()


def test_a_node_s_clock_is_not_believed_to_be_ahead() -> None:
    assert after(action(), [event(1, Status.PROCESSING, time=NOW + 10_000)], NOW + 1).updated_at == NOW + 1


# --- when a node is silent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "seen_at", "now", "code"),
    [
        ({}, NOW + 100, NOW + 200, ""),
        ({}, 0.0, NOW + 119, ""),
        ({}, 0.0, NOW + 121, NODE_SILENT),
        ({"status": Status.PROCESSING, "seq": 1}, NOW + 5, NOW + 126, NODE_SILENT),
        ({"status": Status.PROCESSING, "seq": 1, "updated_at": NOW + 50}, NOW + 5, NOW + 126, ""),
        ({"status": Status.READY, "seq": 3}, 0.0, NOW + 9999, ""),
        ({}, NOW + 3600 + LATE, NOW + 3600 + LATE, ""),
        ({}, NOW + 3601 + LATE, NOW + 3601 + LATE, NEVER_BEGUN),
        ({"status": Status.PROCESSING}, NOW + 3601 + LATE, NOW + 3601 + LATE, NEVER_BEGUN),  # by an upload: no node has said so
        ({"status": Status.PROCESSING, "seq": 1}, NOW + 3601 + LATE, NOW + 3601 + LATE, ""),
    ],
)
def test_who_is_not_waited_for_any_more(changes: dict[str, object], seen_at: float, now: float, code: str) -> None:
    found = actions.overdue(action(**changes), seen_at, now, 120.0)
    assert found.code == code
    assert found.provisional is bool(code)
    assert (found.status == Status.ERROR) is bool(code)


@pytest.mark.parametrize(("seq", "idle_for", "code"), [(1, 121.0, NEVER_TOLD), (1, 119.0, ""), (0, 121.0, "")])
def test_a_node_with_nothing_to_do_has_lost_what_it_has_begun(seq: int, idle_for: float, code: str) -> None:
    """What it has not begun waits, and expires."""
    begun = action(status=Status.PROCESSING if seq else Status.INITIALIZED, seq=seq)
    found = actions.overdue(begun, NOW + 200, NOW + 200, 120.0, idle_for)
    assert (found.code, found.provisional) == (code, bool(code))


@pytest.mark.parametrize("truth", [STORY[0], STORY[2], FAILURE[1]], ids=["processing", "ready", "error"])
def test_what_the_node_says_takes_the_place_of_our_own_word(truth: Event) -> None:
    silent = actions.overdue(action(), 0.0, NOW + 500, 120.0)
    found = after(silent, [truth], NOW + 600)
    assert (found.status, found.provisional, found.code) == (truth.status, False, truth.code)


def test_what_came_before_the_silence_does_not_end_it() -> None:
    silent = actions.overdue(after(action(), STORY[:2], NOW), 0.0, NOW + 500, 120.0)
    assert silent.code == NODE_SILENT
    assert after(silent, STORY[:2], NOW + 600) == silent
    assert after(silent, STORY, NOW + 600).status == Status.READY


def test_what_has_ended_does_not_fail() -> None:
    ready = after(action(), STORY, NOW)
    assert actions.failed(ready, "x", "y", "z", NOW) == ready


# --- uploads ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "said", "then"),
    [
        (Status.INITIALIZED, Status.PROCESSING, Status.PROCESSING),
        (Status.PROCESSING, Status.INITIALIZED, Status.PROCESSING),
        (Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.CHECKPOINT_CREATED),
        (Status.PROCESSING, Status.READY, Status.PROCESSING),
        (Status.PROCESSING, Status.ERROR, Status.PROCESSING),
        (Status.READY, Status.ERROR, Status.READY),
        (Status.ERROR, Status.READY, Status.ERROR),
    ],
)
def test_an_upload_moves_a_status_forward_and_never_to_its_end(at: Status, said: Status, then: Status) -> None:
    assert actions.uploaded(action(status=at), said).status == then
