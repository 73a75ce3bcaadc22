"""The journal: on disk when a call returns, read again by the next daemon; and the rule of what is left to do."""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from pathlib import Path

import pytest

from hibernode.journal import Entry, Journal, Record, Tree, remedy
from hibernode.model import ActionCommand, CheckpointCommand, Event, Overrides, Profile, RestoreCommand, Status, Target


def checkpoint() -> CheckpointCommand:
    return CheckpointCommand(
        action_id=str(uuid.uuid4()), checkpoint_id=str(uuid.uuid4()), target=Target(pod_name="a"), overrides=Overrides(streams=3)
    )


def restore() -> RestoreCommand:
    return RestoreCommand(action_id=str(uuid.uuid4()), checkpoint_id=str(uuid.uuid4()))


def event(record: Record, seq: int, status: Status = Status.PROCESSING) -> Event:
    return Event(
        action_id=record.action_id, seq=seq, type=record.type, status=status, checkpoint_id=record.checkpoint_id, node="n", time=1.5,
        details={"pids": [1], "found": None, "text": "ü\n"}, profile=Profile(pause_ns=5),
    )  # fmt: skip


@pytest.mark.parametrize("command", [checkpoint(), restore()])
def test_what_was_written_is_there_for_the_next_daemon(tmp_path: Path, command: ActionCommand) -> None:
    entry = Journal(tmp_path, clock=lambda: 7.0).begin(command)
    entry.enter("dumping")
    entry.update(trees=(Tree(pid=5, start_time=99),), kill=True, location="file:///x")
    entry.emit(lambda seq: event(entry.record, seq))
    found = Journal(tmp_path).find(command.action_id)
    assert found is not None
    assert found.record == entry.record
    assert type(command).model_validate_json(found.record.command) == command
    assert (found.record.phase, found.record.seq, found.record.began_at) == ("dumping", 1, 7.0)


def test_who_is_born_in_a_place_is_not_what_an_older_restore_has_left_open_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    left, elsewhere, saved, ours = (
        journal.begin(restore()),
        journal.begin(restore()),
        journal.begin(checkpoint()),
        journal.begin(restore()),
    )
    for entry, place in ((left, "uid-1"), (elsewhere, "uid-2"), (saved, "uid-1")):
        entry.enter("restoring")
        entry.update(place=place)
    journal.take_place(ours, "uid-1", (Tree(pid=5, start_time=0),))
    found = {entry.action_id: entry.record for entry in Journal(tmp_path).all()}
    assert [found[each.action_id].done for each in (left, elsewhere, saved, ours)] == [True, False, False, False]
    assert (found[ours.action_id].place, found[ours.action_id].trees) == ("uid-1", (Tree(pid=5, start_time=0),))
    journal.take_place(elsewhere, "", ())
    assert not Journal(tmp_path).find(saved.action_id).record.done  # type: ignore[union-attr]


def test_every_change_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    entry = Journal(tmp_path).begin(checkpoint())
    for phase in ("preflight", "dumping", "shipping", "committing", "killing", "done"):
        entry.enter(phase)
        (found,) = Journal(tmp_path).all()
        assert found.record.phase == phase


def test_reading_writes_nothing(tmp_path: Path) -> None:
    """A daemon whose disk is full still has to know what is frozen."""
    entry = Journal(tmp_path).begin(checkpoint())
    path = tmp_path / f"{entry.action_id}.json"
    before = path.stat()
    os.chmod(tmp_path, 0o500)
    assert len(Journal(tmp_path).all()) == 1
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    Journal(tmp_path / "journal").begin(checkpoint())
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "journal").iterdir()] == [0o600]


def test_sequence_numbers_count_and_nothing_is_kept_when_no_event_is_due(tmp_path: Path) -> None:
    entry = Journal(tmp_path).begin(checkpoint())
    assert entry.emit(lambda seq: event(entry.record, seq)) is not None
    before = entry.record
    assert entry.emit(lambda _: None) is None
    assert entry.record is before
    made = entry.emit(lambda seq: event(entry.record, seq, Status.READY))
    assert made is not None
    assert (made.seq, entry.record.seq, entry.record.status, entry.record.last) == (2, 2, Status.READY, made)


def test_of_many_threads_that_end_an_action_one_does(tmp_path: Path) -> None:
    entry = Journal(tmp_path).begin(checkpoint())
    made: list[Event | None] = []

    def end() -> None:
        made.append(entry.emit(lambda seq: None if entry.record.status.terminal else event(entry.record, seq, Status.READY)))

    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([e for e in made if e is not None]) == 1
    assert entry.record.seq == 1


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    entry = journal.begin(checkpoint())
    (tmp_path / "journal").rename(tmp_path / "away")
    with pytest.raises(OSError, match="No such file"):
        entry.enter("dumping")
    command = checkpoint()
    with pytest.raises(OSError, match="No such file"):
        journal.begin(command)
    assert entry.record.phase == "starting"
    assert journal.find(command.action_id) is None
    (tmp_path / "away").rename(tmp_path / "journal")
    entry.enter("dumping")
    assert len(Journal(tmp_path / "journal").all()) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"action_id": 1}', b"\xff\xff", b"\x00" * 100])
def test_one_unreadable_page_does_not_hide_the_others(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    entry = Journal(tmp_path).begin(checkpoint())
    bad = tmp_path / f"{uuid.uuid4()}.json"
    bad.write_bytes(data)
    (tmp_path / "left.tmp").write_bytes(b"half")
    found = {page.action_id: page.record for page in Journal(tmp_path).all()}
    assert set(found) == {entry.action_id, bad.stem}
    assert bad.with_suffix(".unreadable").read_bytes() == data, "somebody may want to look at it"
    assert str(bad) in caplog.text, "and is told"
    unknown = found[bad.stem]
    assert unknown.done, "a command that comes again is answered, and not run again"
    assert unknown.last is not None
    assert (unknown.last.status, unknown.last.code, unknown.published) == (Status.ERROR, "outcome_unknown", 0)
    assert bad.stem in [page.action_id for page in Journal(tmp_path).all()]


def test_old_finished_ones_are_removed_and_open_ones_never(tmp_path: Path) -> None:
    clock = itertools.count(1.0)
    journal = Journal(tmp_path, clock=lambda: next(clock), keep=3)
    opened = journal.begin(checkpoint())
    finished: list[Entry] = []
    for _ in range(6):
        entry = journal.begin(checkpoint())
        entry.enter("done")
        finished.append(entry)
    last = journal.begin(checkpoint())
    kept = [opened, *finished[-3:], last]
    for found in (journal, Journal(tmp_path)):
        assert [entry.action_id for entry in found.all()] == [entry.action_id for entry in kept]
    assert len(os.listdir(tmp_path)) == 5


def test_what_was_restored_once_is_known_longer_than_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of a pod that ends a thousand actions later is started, and not restored anew."""
    monkeypatch.setattr("hibernode.journal._REMEMBERED", 2)
    clock = itertools.count(1.0)
    journal = Journal(tmp_path, clock=lambda: next(clock), keep=0)
    pages: list[Entry] = []
    for command, status in [
        (restore(), Status.READY),
        (restore(), Status.ERROR),
        (checkpoint(), Status.READY),
        (restore(), Status.READY),
        (restore(), Status.READY),
    ]:
        pages.append(entry := journal.begin(command))
        entry.emit(lambda seq: event(entry.record, seq, status))  # noqa: B023
        entry.update(published=1, phase="done")
        assert journal.was_restored(entry.action_id) == (command.type == "restore" and status == Status.READY)
    journal.begin(checkpoint())
    for found in (journal, Journal(tmp_path)):
        assert [found.find(page.action_id) for page in pages] == [None] * 5
        assert [found.was_restored(page.action_id) for page in pages] == [False, False, False, True, True], (
            "the oldest is forgotten"
        )
    assert not journal.was_restored(str(uuid.uuid4()))


def test_nothing_fails_because_it_cannot_be_remembered(tmp_path: Path) -> None:
    journal = Journal(tmp_path, keep=0)
    (tmp_path / "restored").write_bytes(b"somebody else's")
    (entry := journal.begin(restore())).emit(lambda seq: event(entry.record, seq, Status.READY))
    entry.update(published=1, phase="done")
    journal.begin(checkpoint())
    assert journal.find(entry.action_id) is None
    assert journal.was_restored(entry.action_id)
    (tmp_path / "restored").unlink()
    (tmp_path / "restored/directory").mkdir(parents=True)
    (tmp_path / "restored/nowhere").symlink_to("gone")
    assert not Journal(tmp_path).was_restored("directory")


# --- the rule ---------------------------------------------------------------------------------------------------------------

P, C, R, E = Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY, Status.ERROR
RULE = [
    ("checkpoint", "starting", P, "nothing"),
    ("checkpoint", "preflight", P, "nothing"),
    ("checkpoint", "dumping", P, "thaw"),
    ("checkpoint", "dumping", E, "thaw"),
    ("checkpoint", "shipping", C, "thaw"),
    ("checkpoint", "shipping", E, "thaw"),
    ("checkpoint", "committing", C, "settle"),
    ("checkpoint", "committing", E, "settle"),
    ("checkpoint", "committing", R, "finish_kill"),
    ("checkpoint", "killing", R, "finish_kill"),
    ("checkpoint", "killing", E, "settle"),
    ("checkpoint", "done", R, "nothing"),
    ("checkpoint", "done", E, "nothing"),
    ("restore", "starting", P, "nothing"),
    ("restore", "preflight", P, "nothing"),
    ("restore", "fetching", P, "nothing"),
    ("restore", "restoring", P, "kill_restored"),
    ("restore", "holding", P, "kill_restored"),
    ("restore", "restoring", E, "kill_restored"),
    ("restore", "filling", P, "kill_restored"),
    ("restore", "filling", E, "kill_restored"),
    ("restore", "probing", P, "kill_restored"),
    ("restore", "probing", R, "nothing"),
    ("restore", "done", R, "nothing"),
    ("restore", "a phase of a later version", P, "kill_restored"),
]


@pytest.mark.parametrize(("kind", "phase", "status", "wanted"), RULE)
def test_what_is_left_to_do(kind: str, phase: str, status: Status, wanted: str) -> None:
    record = Record.model_validate(
        {
            "action_id": "a",
            "checkpoint_id": "c",
            "type": kind,
            "target": "t",
            "command": "{}",
            "began_at": 1.0,
            "phase": phase,
            "status": status,
        }
    )
    assert remedy(record) == wanted
