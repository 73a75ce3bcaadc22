"""The outbox: nothing that was added is lost, nothing is out of order, two readers do not trip over each other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hibernode.outbox import Outbox


def ids(outbox: Outbox) -> list[str]:
    return [message_id for _, message_id, _ in outbox.waiting()]


def test_events_wait_in_order_until_they_are_sent(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    for n in range(12):
        outbox.add(f"0123abcd-0123-4567-89ab-0123456789ab.{n}", b"%d" % n)
    assert [(message_id.rpartition(".")[2], data) for _, message_id, data in outbox.waiting()] == [
        (str(n), b"%d" % n) for n in range(12)
    ]
    assert len(outbox) == 12
    for token, _, _ in list(outbox.waiting())[:5]:
        outbox.sent(token)
        outbox.sent(token)
    assert len(outbox) == 7
    assert ids(outbox)[0].endswith(".5")


def test_the_next_daemon_goes_on_behind_what_waits(tmp_path: Path) -> None:
    first = Outbox(tmp_path)
    for n in range(11):
        first.add(f"a.{n}", b"")
    for token, _, _ in list(first.waiting())[:9]:
        first.sent(token)
    second = Outbox(tmp_path)
    second.add("b.1", b"")
    assert ids(second) == ["a.9", "a.10", "b.1"]


def test_what_was_half_written_when_the_power_went_is_not_there(tmp_path: Path) -> None:
    (tmp_path / ".0000000000000001-a.1.json").write_bytes(b"ha")
    outbox = Outbox(tmp_path)
    assert (len(outbox), ids(outbox)) == (0, [])
    outbox.add("a.1", b"whole")
    assert [data for *_, data in outbox.waiting()] == [b"whole"]


def test_what_another_reader_has_sent_is_passed_over(tmp_path: Path) -> None:
    """The flush at a stop runs beside the publisher."""
    outbox = Outbox(tmp_path)
    for n in range(3):
        outbox.add(f"a.{n}", b"")
    reading = outbox.waiting()
    next(reading)
    for token, *_ in list(outbox.waiting())[:2]:
        outbox.sent(token)
    assert [message_id for _, message_id, _ in reading] == ["a.2"]


def test_many_threads_may_add(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    threads = [threading.Thread(target=lambda n=n: [outbox.add(f"{n}.{i}", b"") for i in range(20)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = ids(outbox)
    assert len(found) == 80
    for n in range(4):
        assert [each for each in found if each.startswith(f"{n}.")] == [f"{n}.{i}" for i in range(20)]


def test_nobody_else_reads_it(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.add("a.1", b"")
    assert (tmp_path / "outbox").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "outbox").iterdir()] == [0o600]


def test_a_failed_add_says_so(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    (tmp_path / "outbox").rmdir()
    with pytest.raises(OSError, match="No such file"):
        outbox.add("a.1", b"")
