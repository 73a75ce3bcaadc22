"""The outbox: what the journal holds and the broker has not confirmed; in order, nothing lost, nothing told without its status."""

from __future__ import annotations

import uuid
from pathlib import Path

from hibernode.journal import Entry, Journal
from hibernode.model import CheckpointCommand, Event, Status, Target
from hibernode.outbox import Outbox

STATUSES = (Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY)


def action(journal: Journal, statuses: tuple[Status, ...] = STATUSES) -> Entry:
    """One that has reached these statuses."""
    command = CheckpointCommand(action_id=str(uuid.uuid4()), checkpoint_id=str(uuid.uuid4()), target=Target(pid=7))
    entry = journal.begin(command)
    for status in statuses:
        reach(entry, status)
    return entry


def reach(entry: Entry, status: Status) -> None:
    record = entry.record
    made = entry.emit(
        lambda seq: Event(
            action_id=record.action_id,
            seq=seq,
            type=record.type,
            status=status,
            checkpoint_id=record.checkpoint_id,
            node="n",
            time=1.0,
        )
    )
    assert made is not None


def waiting(outbox: Outbox) -> list[tuple[str, int]]:
    return [(event.action_id, event.seq) for _, event in outbox.waiting()]


def test_every_event_of_every_action_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path, clock=iter(range(100)).__next__)
    actions = [action(journal) for _ in range(3)]
    outbox = Outbox(journal)
    assert waiting(outbox) == [(entry.action_id, seq) for entry in actions for seq in (1, 2, 3)]
    assert len(outbox) == 9


def test_what_was_sent_is_not_sent_again_by_the_next_daemon_either(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    entry, outbox = action(journal), Outbox(journal)
    for number, (_, event) in enumerate(list(outbox.waiting())[:2], 1):
        outbox.sent(entry, event)
        assert len(outbox) == 3 - number
    assert waiting(Outbox(Journal(tmp_path))) == [(entry.action_id, 3)]


def test_a_confirmation_that_comes_late_takes_nothing_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    entry, outbox = action(journal), Outbox(journal)
    first, _, last = entry.record.events
    outbox.sent(entry, last)
    outbox.sent(entry, first)
    assert len(outbox) == 0


def test_the_last_event_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    entry, outbox = action(journal), Outbox(journal)
    outbox.sent(entry, entry.record.events[-1])
    outbox.again(entry)
    assert waiting(outbox) == [(entry.action_id, 3)]
    silent = action(journal, ())
    outbox.again(silent)
    assert waiting(outbox) == [(entry.action_id, 3)]


def test_the_last_event_again_leaves_out_none_that_waits(tmp_path: Path) -> None:
    """A command comes again as soon as the broker is back, before what it missed was sent."""
    journal = Journal(tmp_path)
    entry, outbox = action(journal), Outbox(journal)
    outbox.sent(entry, entry.record.events[0])
    outbox.again(entry)
    assert waiting(outbox) == [(entry.action_id, 2), (entry.action_id, 3)]


def test_the_place_of_the_last_one_sent(tmp_path: Path) -> None:
    """0: of none. Whoever sends the last one again has to say so: a broker that has it has something after that."""
    journal = Journal(tmp_path)
    entry, outbox = action(journal), Outbox(journal)
    first, second, last = entry.record.events
    assert entry.record.stored_at == 0
    outbox.sent(entry, first, 7)
    outbox.again(entry)
    assert entry.record.stored_at == 7
    outbox.sent(entry, second, 8)
    outbox.sent(entry, last, 11)
    outbox.sent(entry, first, 7)
    assert entry.record.stored_at == 11
    outbox.again(entry)
    assert entry.record.stored_at == 0


def test_an_event_and_its_status_are_one_write(tmp_path: Path) -> None:
    """Whatever a crash leaves, both are there or neither."""
    journal = Journal(tmp_path / "journal")
    entry = action(journal, STATUSES[:1])
    before = waiting(Outbox(Journal(tmp_path / "journal")))
    (tmp_path / "journal").rename(tmp_path / "away")
    try:
        reach(entry, Status.READY)
    except OSError:
        pass
    else:
        raise AssertionError("there was no disk")
    (tmp_path / "away").rename(tmp_path / "journal")
    again = Journal(tmp_path / "journal")
    assert waiting(Outbox(again)) == waiting(Outbox(journal)) == before
    assert again.all()[0].record.status == entry.record.status == Status.PROCESSING


def test_an_action_with_something_to_tell_is_not_pruned(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep=1)
    told, untold, latest = (action(journal) for _ in range(3))
    for entry in (told, untold, latest):
        entry.update(phase="done")
    outbox = Outbox(journal)
    for entry in (told, latest):
        outbox.sent(entry, entry.record.events[-1])
    action(journal)
    assert journal.find(told.action_id) is None
    assert journal.find(untold.action_id) is not None
