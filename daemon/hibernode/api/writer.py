"""Events become rows in a process of their own. Reading them out of JSON and writing them takes all that one Python can do when thousands
come each second, and whoever asks the server something would wait for it.

A writer is a child of the server, started when the first events come, and again should it die. It ends when the server does, however that
ends: its end of the connection is then closed.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from hibernode import wire
from hibernode.api.db import Database, Unkeepable
from hibernode.errors import BadCommand, DatabaseUnavailable
from hibernode.model import Event

NAME_LIMIT = 253  # characters of what an index holds, which has its own
PATIENCE = 3.0  # seconds for it to end
# Not by -m: its classes would be others than the server's.
_CHILD = "import sys; from hibernode.api.writer import main; sys.exit(main(sys.argv[1:]))"
Letter = tuple[str, bytes]  # (node that it came from: the broker knows, whatever is in it; an event as it came)


@dataclass
class Written:
    """What became of some events."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by type and status
    ended: list[str] = field(default_factory=list)  # actions that have
    dropped: list[Mapping[str, object]] = field(default_factory=list)  # of those that nobody can ever keep: facts for the log


class Writer:
    """For one caller at a time. Blocking."""

    def __init__(self, database: str, cluster: str) -> None:
        self._database, self._cluster = database, cluster
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def write(self, letters: Sequence[Letter]) -> Written:
        """Each once, and in this order; those that came before change nothing. DatabaseUnavailable: nothing of it was done, or all of it,
        and the same may be asked again."""
        try:
            connection = self._connected()
            connection.send(letters)
            answer = connection.recv()
        except (OSError, EOFError) as e:
            self.close()
            raise DatabaseUnavailable(
                "the process that writes events has died", hint="was it killed, or was memory short?"
            ) from e
        if isinstance(answer, Written):
            return answer
        if isinstance(answer, DatabaseUnavailable):
            raise answer
        raise RuntimeError(answer)

    def close(self) -> None:
        """Harmless when repeated. The next `write` starts another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(PATIENCE)
            self._child.kill()
            self._child.wait()
            self._child = None

    def _connected(self) -> Connection:
        if self._connection is None:
            ours, theirs = socket.socketpair()
            with theirs:
                words = [sys.executable, "-c", _CHILD, str(theirs.fileno())]
                self._child = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            self._connection = Connection(ours.detach())
            self._connection.send((self._database, self._cluster))  # not among its words, which anybody on the machine may read
        return self._connection


def write(database: Database, cluster: str, letters: Sequence[Letter]) -> Written:
    """As `Writer.write`, here. One that no database of ours can hold is dropped: it must not hold up all that come after it."""
    written = Written()
    events = [event for node, data in letters if (event := _read(node, data, written)) is not None]
    _apply(database, cluster, events, written)
    written.counts.update((event.type, event.status.value) for event in events)
    written.ended += [event.action_id for event in events if event.status.terminal]
    return written


def _apply(database: Database, cluster: str, events: Sequence[Event], written: Written) -> None:
    try:
        database.apply(events, cluster, time.time())
    except Unkeepable as e:
        if len(events) == 1:
            written.dropped.append(
                {"what": "cannot be kept", "action": events[0].action_id, "seq": events[0].seq, "error": str(e)}
            )
            return
        half = len(events) // 2
        _apply(database, cluster, events[:half], written)
        _apply(database, cluster, events[half:], written)


def _read(node: str, data: bytes, written: Written) -> Event | None:
    try:
        event = wire.decode_event(data)
        if event.node != node:
            raise BadCommand(f"node {node} speaks as {event.node}", property="node", found=event.node, wanted=node)
        for name in ("node", "checkpoint_id"):
            if len(getattr(event, name)) > NAME_LIMIT:
                raise BadCommand(f"{name} is too long", property=name, found=len(getattr(event, name)), wanted=NAME_LIMIT)
        return _without_nul(event) if b"\\u0000" in data else event
    except BadCommand as e:
        written.dropped.append({"what": "cannot be read", "size": len(data), "error": str(e)})
        return None


def _without_nul(event: Event) -> Event:
    """JSON can hold it, PostgreSQL's texts cannot."""
    texts = {name: getattr(event, name) for name in ("node", "checkpoint_id", "code", "message", "hint", "pod_spec")}
    update: dict[str, object] = {name: text.replace("\0", "\ufffd") for name, text in texts.items()}
    if "location" in event.details:  # it becomes one
        update["details"] = {**event.details, "location": str(event.details["location"]).replace("\0", "\ufffd")}
    return event.model_copy(update=update)


def main(words: Sequence[str]) -> int:
    """The child: answers until its parent has gone. Only that ends it: a signal to the whole group is for the parent to obey."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()
    with contextlib.suppress(EOFError, OSError), Connection(int(words[0])) as parent:
        url, cluster = parent.recv()
        database = Database(url)
        while True:
            letters = parent.recv()
            try:
                answer: object = write(database, cluster, letters)
            except DatabaseUnavailable as e:
                answer = e
            except Exception:  # noqa: BLE001 - a defect, for the server's log
                answer = traceback.format_exc()
            parent.send(answer)
    return 0
