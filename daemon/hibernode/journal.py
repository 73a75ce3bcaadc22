"""What this node was about to do: the phase of every action, durable before the step it names.

One file per action (temporary file, fsync, rename). Phases are gerunds written before their step, so that a crash undoes too much and
never too little. `remedy` is the pure rule for what recovery has to do; `recovery.py` does it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from hibernode.errors import OutcomeUnknown
from hibernode.model import ActionCommand, ActionType, CheckpointCommand, Event, Status, Value

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
_RESTORED = "restored"  # directory of the journal: an empty file for each restore that was ready and whose page is gone
_REMEMBERED = 10_000  # of them; the oldest are forgotten first
_LAST_SEQ = 1000  # above what any action reaches: its terminal event is told once, whatever was told before
_log = logging.getLogger("hibernode.journal")

Remedy = Literal["nothing", "thaw", "settle", "finish_kill", "kill_restored"]


class Tree(Value):
    """A process somebody has to answer for: pid and start time, because pids come again."""

    pid: int
    start_time: int
    stopped: bool = False  # by its owner, before anything was done to it: it stays so


class Record(Value):
    """One action, as the journal keeps it."""

    action_id: str
    checkpoint_id: str
    type: ActionType
    target: str
    command: str  # JSON of the model, for whoever has to finish it
    phase: str = "starting"
    until: float = 0.0  # CLOCK_BOOTTIME, seconds, by which the daemon will have left this phase; 0: it has no deadline
    boot: str = ""  # the kernel's boot id: pids, start times and `until` mean nothing in another boot
    status: Status = Status.INITIALIZED
    seq: int = 0
    began_at: float
    ended_at: float = 0.0
    location: str = ""  # the store's
    trees: tuple[Tree, ...] = ()  # being dumped, or restored
    freezers: tuple[
        str, ...
    ] = ()  # cgroups: frozen for the dump, as `Workload.freezers` has them; of a restore, where all is of it
    place: str = ""  # where a restored tree is born, and nobody else
    kill: bool = False  # the workload is to be killed when the checkpoint is ready
    events: tuple[Event, ...] = ()  # every status it reached, written together with it
    published: int = 0  # the sequence number up to which the broker has confirmed them
    about: Mapping[str, str] = Field(
        default_factory=dict
    )  # what the control plane is to know of an action that it has not filed, with every event
    stored_at: int | None = None  # the place of the last confirmed one in the broker's stream, 0: of none; None: not known

    @property
    def last(self) -> Event | None:
        return self.events[-1] if self.events else None

    @property
    def done(self) -> bool:
        return self.phase == "done"


def remedy(record: Record) -> Remedy:
    """What is left to do for an action whose daemon died. Repeating it is harmless. The store alone knows of `settle`; of another boot
    no process is left, whatever its phase."""
    match record.type, record.phase:
        case _, "done" | "starting" | "preflight" | "fetching":
            return "nothing"
        case "checkpoint", "suspending" | "dumping" | "resuming" | "shipping":
            return "thaw"
        case "checkpoint", "committing" | "killing":
            return "finish_kill" if record.status == Status.READY else "settle"
        case _:
            return "nothing" if record.status == Status.READY else "kill_restored"


def mark_of(work_dir: Path, action_id: str) -> Path:
    """An empty file while a restored tree has passed its probe and its `ready` is not yet on disk: recovery says it then. In `work_dir`,
    because the disk of the journal may be full."""
    return work_dir / f"{action_id}.stays"


def stays(work_dir: Path, record: Record) -> bool:
    """A restored tree of this boot that is whole, whatever else its page says."""
    return record.boot == BOOT and mark_of(work_dir, record.action_id).exists()


class Entry:
    """One action's page of the journal, open for writing. Thread-safe; every change is on disk when the call returns."""

    __slots__ = ("_file", "_lock", "_packed", "_record", "action_id", "began_at")

    def __init__(self, path: Path, record: Record) -> None:
        self._file, self._lock = str(path), threading.Lock()
        self.action_id, self.began_at = record.action_id, record.began_at
        self._hold(record, record.model_dump_json())

    @property
    def record(self) -> Record:
        return self._record or Record.model_validate_json(zlib.decompress(self._packed))

    @property
    def settled(self) -> bool:
        """It has ended, and whoever waits for its events has them."""
        return self._record is None

    def _hold(self, record: Record, text: str) -> None:
        """A thousand settled ones are kept, and seldom asked for: packed they have 1 KiB each, as objects 13."""
        settled = record.done and record.published >= record.seq
        self._packed = zlib.compress(text.encode()) if settled else b""
        self._record = None if settled else record

    def enter(self, phase: str, limit: float = 0.0) -> None:
        """A phase begins, which its action leaves after `limit` seconds at most: written down for whoever has to act if it does not."""
        self.update(phase=phase, until=boottime() + limit if limit else 0.0, boot=BOOT)

    def update(self, **changes: object) -> None:
        with self._lock:
            self._write(self.record.model_copy(update=changes))

    def emit(self, make: Callable[[int], Event | None]) -> Event | None:
        """Give the next sequence number to `make` and keep the event it returns; None (no event is due) changes nothing.
        Statuses move forward only: `make` sees the record as it is under the lock."""
        with self._lock:
            record = self.record
            event = make(record.seq + 1)
            if event is not None:
                events = (*record.events, event)
                self._write(record.model_copy(update={"seq": event.seq, "status": event.status, "events": events}))
        return event

    def _write(self, record: Record) -> None:
        path, text = Path(self._file), record.model_dump_json()
        temporary = path.with_suffix(".tmp")
        with open(temporary, "w", opener=_private, encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        directory = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(directory)  # else the new name may be lost with the power
        finally:
            os.close(directory)
        self._hold(record, text)


class Journal:
    """All of them, in one directory. `keep` finished ones are kept for redelivered commands and for people."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time, keep: int = 1000) -> None:
        self._directory, self._clock, self._keep = directory, clock, keep
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._entries: dict[str, Entry] = {}
        old = [path for path in (directory / _RESTORED).glob("*") if path.is_file()]
        self._restored = dict.fromkeys(path.name for path in sorted(old, key=lambda path: path.stat().st_mtime))
        for path in directory.glob("*.json"):
            try:
                record = Record.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as e:
                _log.error("cannot read %s: %s", path, e)
                self._stand_in(path)
            else:
                self._entries[record.action_id] = Entry(path, record)

    def _stand_in(self, path: Path) -> None:
        """An entry nobody can read is kept beside, and its action answered with `outcome_unknown`: its id stays known, so that a
        command that comes again is not run again over what it left."""
        path.rename(path.with_suffix(".unreadable"))
        unknown = OutcomeUnknown(
            "the journal of this action cannot be read", hint=f"look at its workload; see {path.stem}.unreadable"
        )
        now = self._clock()
        event = Event(
            action_id=path.stem,
            seq=_LAST_SEQ,
            type="checkpoint",
            status=Status.ERROR,
            checkpoint_id=path.stem,
            node="",
            time=now,
            code=unknown.code,
            message=unknown.message,
            hint=unknown.hint,
        )
        record = Record(
            action_id=path.stem,
            checkpoint_id=path.stem,
            type="checkpoint",
            target="unknown",
            command="",
            phase="done",
            status=Status.ERROR,
            seq=event.seq,
            began_at=now,
            ended_at=now,
            events=(event,),
        )
        entry = Entry(path, record)
        entry.update()
        self._entries[path.stem] = entry

    def find(self, action_id: str) -> Entry | None:
        return self._entries.get(action_id)

    def was_restored(self, action_id: str) -> bool:
        """It is a restore that was ready, also if its page has been removed since."""
        entry = self._entries.get(action_id)
        if entry is None:
            return action_id in self._restored
        record = entry.record
        return (record.type, record.status) == ("restore", Status.READY)

    def all(self) -> list[Entry]:
        return sorted(self._entries.values(), key=lambda entry: entry.began_at)

    def begin(self, command: ActionCommand, about: Mapping[str, str] | None = None) -> Entry:
        """The page of a new action. The action id must be new. `about`: as `Record` has it."""
        target = str(command.target) if isinstance(command, CheckpointCommand) else f"checkpoint {command.checkpoint_id}"
        record = Record(
            action_id=command.action_id,
            checkpoint_id=command.checkpoint_id,
            type=command.type,
            target=target,
            command=command.model_dump_json(),
            began_at=self._clock(),
            stored_at=0,
            about=dict(about or {}),
        )
        self._prune()
        entry = Entry(self._directory / f"{command.action_id}.json", record)
        entry.update()
        self._entries[command.action_id] = entry
        return entry

    def take_place(self, entry: Entry, place: str, trees: tuple[Tree, ...]) -> None:
        """Whoever is born in `place` from now on is of this entry. What an older restore has left open there (somebody who could not be
        killed then) is over: the place is empty now, and what is left to do for that one must not be done to this."""
        for other in [each for each in self.all() if place and each is not entry and not each.settled]:
            if (other.record.type, other.record.place) == ("restore", place):
                other.update(phase="done")
        entry.update(place=place, trees=trees)

    def _prune(self) -> None:
        settled = [entry for entry in self.all() if entry.settled]
        for entry in settled[: max(0, len(settled) - self._keep)]:
            record = entry.record
            del self._entries[entry.action_id]
            (self._directory / f"{entry.action_id}.json").unlink(missing_ok=True)  # first: it makes room
            if record.type == "restore" and record.status == Status.READY:
                self._remember(entry.action_id)

    def _remember(self, action_id: str) -> None:
        """As well as the disk lets it: no action fails for it."""
        place = self._directory / _RESTORED
        self._restored[action_id] = None
        try:
            place.mkdir(exist_ok=True, mode=0o700)
            (place / action_id).touch(mode=0o600)
            while len(self._restored) > _REMEMBERED:
                oldest = next(iter(self._restored))
                del self._restored[oldest]
                (place / oldest).unlink(missing_ok=True)
        except OSError as e:
            _log.warning("that %s was restored is known to this daemon alone: %s", action_id, e)


def boottime() -> float:
    """Seconds since boot, asleep or awake: no clock that anybody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
