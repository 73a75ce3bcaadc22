"""What every action leans on: claims, undos that are insisted on, a work directory that is gone afterwards."""

from __future__ import annotations

import errno
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest

from hibernode.errors import Busy, Cancelled, DeadlineExceeded, DumpFailed, NoRoom, Stuck
from hibernode.journal import Entry, Journal
from hibernode.model import Cancel, Meter, RestoreCommand
from hibernode.node import Attempt, Claims, Taken, insist, on_error


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    command = RestoreCommand(action_id=str(uuid.uuid4()), checkpoint_id=str(uuid.uuid4()))
    entry: Entry = Journal(tmp_path / "journal").begin(command)
    return Attempt(entry, Meter(), Cancel(), lambda _: None)


def test_a_claim_is_one_action_s(attempt: Attempt) -> None:
    claims = Claims()
    with claims.claim("pid 5", "a"):
        with pytest.raises(Busy, match="a") as busy, claims.claim("pid 5", "b"):
            pass
        assert busy.value.retry
        with claims.claim("pid 6", "b"):
            pass
    with claims.claim("pid 5", "b"):
        pass


def test_a_claim_ends_with_whatever_happens() -> None:
    claims = Claims()
    with pytest.raises(DumpFailed), claims.claim("pid 5", "a"):
        raise DumpFailed("no")
    with claims.claim("pid 5", "b"):
        pass


def test_who_waits_for_a_claim_is_told_once_when_it_is_free() -> None:
    claims, told = Claims(), list[str]()
    claims.when_free("pid 5", lambda: told.append("at once"))
    with claims.claim("pid 5", "a"), claims.claim("pid 6", "a"):
        with pytest.raises(Taken) as taken, claims.claim("pid 5", "b"):
            pass
        claims.when_free(taken.value.key, lambda: told.append("first"))
        claims.when_free(taken.value.key, lambda: told.append("second"))
        assert told == ["at once"]
    assert told == ["at once", "first", "second"]
    with claims.claim("pid 5", "b"):
        pass
    assert len(told) == 3


def test_of_many_that_claim_one_gets_it() -> None:
    claims, got, go = Claims(), [], threading.Barrier(8)

    def claim(n: int) -> None:
        go.wait(10)
        try:
            with claims.claim("pid 5", str(n)):
                got.append(n)
                done.wait(10)
        except Busy:
            refused.append(n)
            if len(refused) == 7:
                done.set()

    refused: list[int] = []
    done = threading.Event()
    threads = [threading.Thread(target=claim, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_an_undo_is_tried_again(failures: int) -> None:
    calls = []

    def undo() -> None:
        calls.append(1)
        if len(calls) <= failures:
            raise OSError("not now")

    insist("undoing it", undo)
    assert len(calls) == failures + 1


def test_an_undo_that_never_works_is_stuck() -> None:
    calls = []

    def undo() -> None:
        calls.append(1)
        raise DumpFailed("not ever")

    with pytest.raises(Stuck, match="undoing it failed: not ever") as stuck:
        insist("undoing it", undo)
    assert len(calls) == 3
    assert stuck.value.hint


def test_an_undo_on_error_is_done_only_then() -> None:
    for fails in (False, True):
        done: list[int] = []
        try:
            with ExitStack() as outer:
                with ExitStack() as held:
                    held.callback(done.append, 1)
                    outer.push(on_error(held.pop_all()))
                assert not done
                if fails:
                    raise DumpFailed("no")
        except DumpFailed:
            pass
        assert bool(done) is fails


def test_a_work_directory_is_private_empty_and_gone_afterwards(attempt: Attempt, tmp_path: Path) -> None:
    left = tmp_path / "work" / attempt.entry.action_id
    left.mkdir(parents=True)
    (left / "of an attempt that a crash ended").touch()
    with attempt.work_directory(tmp_path / "work") as work:
        assert list(work.iterdir()) == []
        assert work.stat().st_mode & 0o777 == 0o700
        (work / "a").mkdir()
        (work / "a" / "b").touch()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_work_directory_is_gone_after_a_failure(attempt: Attempt, tmp_path: Path) -> None:
    with pytest.raises(DumpFailed), attempt.work_directory(tmp_path / "work"):
        raise DumpFailed("no")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, NoRoom), (errno.EDQUOT, NoRoom), (errno.EIO, OSError)])
def test_a_disk_that_fills_up_is_no_room(attempt: Attempt, tmp_path: Path, number: int, error: type[Exception]) -> None:
    with pytest.raises(error) as raised, attempt.work_directory(tmp_path / "work"):
        raise OSError(number, "the disk")
    assert type(raised.value) is error


def test_a_phase_is_written_down_and_counted_and_none_begins_after_a_cancel(attempt: Attempt) -> None:
    with attempt.phase("dumping", 60):
        assert attempt.entry.record.phase == "dumping"
    attempt.cancel.set("enough")
    with pytest.raises(Cancelled), attempt.phase("shipping", 60):
        pytest.fail("it began")
    assert attempt.entry.record.phase == "dumping"
    assert attempt.meter.profile().phases.keys() == {"dumping"}


def test_a_phase_within_another_has_a_limit_and_a_time_of_its_own(attempt: Attempt) -> None:
    """The outer one's limit stands still meanwhile, and begins anew: here it would have ended the action otherwise."""
    with attempt.phase("restoring", 2.0):
        with attempt.within("holding", 60):
            assert attempt.entry.record.phase == attempt.meter.phase_name == "holding"
            time.sleep(2.1)
        assert attempt.entry.record.phase == attempt.meter.phase_name == "restoring"
        attempt.cancel.check()
    found = attempt.meter.profile().phases
    assert found["holding"].seconds >= 2.1
    assert found["restoring"].seconds < 2.0, "the time within is not counted twice"


def test_the_limit_of_a_phase_holds_again_after_one_within(attempt: Attempt) -> None:
    def held() -> None:
        with attempt.within("holding", 60):
            pass
        until_it_is_late(attempt)

    with pytest.raises(DeadlineExceeded) as late, attempt.phase("restoring", 0.2):
        held()
    assert late.value.details["phase"] == "restoring"


def test_a_phase_within_may_be_too_late_itself(attempt: Attempt) -> None:
    with pytest.raises(DeadlineExceeded) as late, attempt.phase("restoring", 60), attempt.within("holding", 0.1):
        until_it_is_late(attempt)
    assert late.value.details["phase"] == "holding"


def until_it_is_late(attempt: Attempt) -> None:
    woken = threading.Event()
    with attempt.cancel.waking(woken.set):
        assert woken.wait(20)
    attempt.cancel.check()
