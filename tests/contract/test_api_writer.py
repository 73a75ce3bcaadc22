"""The process that writes events: real databases, a real child. What it is killed in is written when it is asked again, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode import wire
from hibernode.api.db import Database
from hibernode.api.migrate import migrate
from hibernode.api.writer import Letter, Writer
from hibernode.errors import DatabaseUnavailable
from hibernode.model import Event, Status
from tests.keeper import alive, wait_until

CLUSTER, NODE = "c", "n"
TOLD = (Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path}/api.sqlite")
    migrate(made)
    yield made
    made.close()


@pytest.fixture
def writer(database: Database) -> Iterator[Writer]:
    made = Writer(database.url, CLUSTER)
    yield made
    made.close()


def letters(action_id: str, **changes: object) -> list[Letter]:
    """All that a node tells of an action."""
    facts: dict[str, object] = {
        "action_id": action_id,
        "checkpoint_id": action_id,
        "type": "checkpoint",
        "node": NODE,
        "time": 1.0,
    }
    events = [Event(**{**facts, "seq": seq, "status": status, **changes}) for seq, status in enumerate(TOLD, 1)]  # type: ignore[arg-type]
    return [(NODE, wire.encode_event(event)) for event in events]


def children() -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "hibernode.api.writer"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def test_what_it_says_is_what_is_in_the_tables(writer: Writer, database: Database) -> None:
    action_id = str(uuid.uuid4())
    written = writer.write([*letters(action_id), ("another", letters(action_id)[2][1]), (NODE, b"{")])
    assert written.counts == {("checkpoint", status.value): 1 for status in TOLD}
    assert written.ended == [action_id]
    assert [facts["what"] for facts in written.dropped] == ["cannot be read"] * 2
    action = database.find(action_id)
    assert action is not None
    assert (action.status, action.seq) == (Status.READY, 3)


def test_one_that_is_killed_is_started_anew_and_nothing_is_written_twice(writer: Writer, database: Database) -> None:
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    writer.write(letters(first))
    (child,) = children()
    os.kill(child, signal.SIGKILL)
    with pytest.raises(DatabaseUnavailable, match="has died"):
        writer.write(letters(second))
    writer.write([*letters(first), *letters(second)])
    assert children() not in ([], [child])
    for action_id in (first, second):
        assert [event["status"] for event in database.events(action_id)] == list(TOLD)


def test_a_signal_to_the_whole_group_does_not_end_it(writer: Writer) -> None:
    writer.write(letters(str(uuid.uuid4())))
    (child,) = children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child, number)
    assert writer.write(letters(str(uuid.uuid4()))).ended
    assert children() == [child]


def test_none_is_left(writer: Writer) -> None:
    writer.write(letters(str(uuid.uuid4())))
    assert children()
    writer.close()
    assert not children()


def test_none_is_left_by_a_server_that_is_killed(database: Database) -> None:
    program = (
        "import os, signal, subprocess, sys; from hibernode.api.writer import Writer\n"
        f"writer = Writer({database.url!r}, {CLUSTER!r}); writer.write([]); print(writer._child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    wait_until(lambda: not alive(int(ended.stdout)), 10, "it to end with its parent")


def test_a_database_that_does_not_answer_is_said_and_may_be_asked_again(tmp_path: Path) -> None:
    writer = Writer("postgresql://nobody@127.0.0.1:9/none", CLUSTER)
    try:
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable, match="does not answer"):
                writer.write(letters(str(uuid.uuid4())))
        assert len(children()) == 1
    finally:
        writer.close()
