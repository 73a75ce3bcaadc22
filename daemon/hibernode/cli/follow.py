"""Follows actions to their end: as JSON lines, as plain lines, or with a live line for each that runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Protocol

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli import text
from hibernode.cli.failure import Answered
from hibernode.cli.screen import Bar, Board, Cell, Screen, status

TERMINAL = ("ready", "error")
WINDOW = 5.0  # seconds a rate is taken over
QUIET = 2.0  # seconds between two plain lines about the same phase


class View(Protocol):
    """One way to show what happens."""

    def event(self, event: pb.Event) -> None: ...

    def progress(self, progress: pb.Progress) -> None: ...


def follow(screen: Screen, updates: Iterable[pb.Update], *, names: bool = False) -> pb.Event | None:
    """Show `updates` to their end; the last terminal event, if any. `names`: several actions, so say which."""
    last: pb.Event | None = None
    with ExitStack() as stack:
        view: View
        if screen.as_json:
            view = _Json(screen)
        elif screen.live:
            view = _Live(screen, stack.enter_context(screen.watching()), names=names)
        else:
            view = _Plain(screen, names=names)
        for update in updates:
            if update.HasField("event"):
                view.event(update.event)
                last = update.event if update.event.status in TERMINAL else last
            elif update.HasField("progress"):
                view.progress(update.progress)
    return last


def failure_of(event: pb.Event) -> Answered:
    """What a failed action ended with, as an error of this command."""
    again = "the same command may succeed later" if event.retry else ""
    return Answered(
        event.code or "internal",
        event.message or "the action failed",
        hint=event.hint or again,
        details=text.plain(event.details),
    )


class _Json:
    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def event(self, event: pb.Event) -> None:
        self._screen.record({"event": text.plain(event)})

    def progress(self, progress: pb.Progress) -> None:
        self._screen.record({"progress": text.plain(progress)})


class _Plain:
    """A line for each change, and one every few seconds in between."""

    def __init__(self, screen: Screen, *, names: bool) -> None:
        self._screen = screen
        self._names = names
        self._speeds = Speeds()
        self._said: dict[str, tuple[str, float]] = {}  # action id -> phase and seconds of its last line

    def event(self, event: pb.Event) -> None:
        name = f"{event.action_id}  " if self._names else ""
        for line in told(event, names=self._names):
            self._screen.say(f"{text.clock(event.time)}  {name}", *line)
        if event.status in TERMINAL:
            self._said.pop(event.action_id, None)
            self._speeds.forget(event.action_id)

    def progress(self, progress: pb.Progress) -> None:
        speed = self._speeds.of(progress)
        phase, seconds = self._said.get(progress.action_id, ("", 0.0))
        if progress.phase == phase and progress.seconds < seconds + QUIET:
            return
        self._said[progress.action_id] = (progress.phase, progress.seconds)
        name = f"{progress.action_id}  " if self._names else ""
        share = _share(progress)
        percent = f"{share:.0%}" if share is not None else ""
        words = ", ".join(word for word in (percent, *figures(progress, speed)) if word)
        self._screen.say(f"          {name}{text.shown(progress.phase)}  {words}")


class _Live:
    """What changed goes by above; what runs moves below."""

    def __init__(self, screen: Screen, board: Board, *, names: bool) -> None:
        self._screen = screen
        self._board = board
        self._names = names
        self._speeds = Speeds()

    def event(self, event: pb.Event) -> None:
        if event.status in TERMINAL:
            self._board.remove(event.action_id)
            self._speeds.forget(event.action_id)
        elif event.status == "processing":
            self._board.show(event.action_id, Bar(self._label(event.action_id), "starting", None, ()))
        if not self._names and event.status != "checkpoint_created":
            return  # the moving line says so, or the report that follows
        name = f"{event.action_id}  " if self._names else ""
        for line in told(event, names=self._names):
            self._screen.say((name, "dim"), *line)

    def progress(self, progress: pb.Progress) -> None:
        words = figures(progress, self._speeds.of(progress))
        bar = Bar(self._label(progress.action_id), text.shown(progress.phase), _share(progress), words)
        self._board.show(progress.action_id, bar)

    def _label(self, action_id: str) -> str:
        return action_id[:8] if self._names else ""


class Speeds:
    """Bytes per second of each action over the last few seconds."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def of(self, progress: pb.Progress) -> float:
        seen = self._seen.setdefault(progress.action_id, deque())
        if seen and progress.bytes_done < seen[-1][1]:
            seen.clear()  # another attempt
        seen.append((progress.seconds, progress.bytes_done))
        while len(seen) > 2 and seen[-1][0] - seen[0][0] > WINDOW:
            seen.popleft()
        elapsed = seen[-1][0] - seen[0][0]
        if elapsed <= 0:
            return progress.bytes_done / progress.seconds if progress.seconds > 0 else 0.0
        return (seen[-1][1] - seen[0][1]) / elapsed

    def forget(self, action_id: str) -> None:
        self._seen.pop(action_id, None)


def figures(progress: pb.Progress, speed: float) -> list[str]:
    """Bytes, rate, ratio, time left: those that are known."""
    done, total = progress.bytes_done, progress.bytes_total
    missing = max(0, total - done)
    return [
        text.sizes(done, total) if total else text.size(done) if done else text.duration(progress.seconds),
        text.rate(speed) if speed >= 1 else "",
        text.ratio(done, progress.stored_bytes),
        text.left(missing / speed) if speed >= 1 and missing else "",
    ]


def _share(progress: pb.Progress) -> float | None:
    return min(1.0, progress.bytes_done / progress.bytes_total) if progress.bytes_total else None


# --- reports ----------------------------------------------------------------------------------------------------------


def told(event: pb.Event, *, names: bool) -> list[list[Cell]]:
    """An event in words: one line for each that is worth reading."""
    profile = event.profile
    if event.status == "checkpoint_created":
        return [[status(event.status), f": all is captured after a pause of {text.pause(profile.pause_ns)}"]]
    if event.status == "error" and names:
        return [[status(event.status), f": {text.shown(event.message)} [{event.code}]"]]
    if event.status == "ready" and names:
        took = text.duration(profile.total_duration / 1e9)
        return [[status(event.status), f": {event.type} done in {took}"]]
    return [[status(event.status)]]


def costs(profile: pb.Profile) -> list[tuple[str, Cell]]:
    """Where time and bytes went, for a report."""
    total = profile.total_duration / 1e9
    smaller = text.ratio(profile.raw_bytes, profile.stored_bytes)
    streams = f" in {profile.streams} streams" if profile.streams > 1 else ""
    zeros = f", of which {text.size(profile.zero_bytes)} are zeros" if profile.zero_bytes else ""
    return [
        ("took", text.duration(total) if total else ""),
        ("ran after", text.duration(_to_running(profile)) if "filling" in profile.phases else ""),
        ("pause", text.pause(profile.pause_ns) if profile.pause_ns else ""),
        ("memory", f"{text.size(profile.raw_bytes)}{zeros}" if profile.raw_bytes else ""),
        ("stored", f"{text.size(profile.stored_bytes)}, {smaller} smaller{streams}" if smaller else ""),
        ("phases", _phases({name: cost.seconds for name, cost in profile.phases.items()} | _rest(profile))),
    ]


def _to_running(profile: pb.Profile) -> float:
    """Seconds from the command until a tree ran whose pages came later."""
    return sum(cost.seconds for name, cost in profile.phases.items() if name not in ("filling", "probing"))


def _rest(profile: pb.Profile) -> dict[str, float]:
    return {"unaccounted": profile.unaccounted} if profile.unaccounted >= 0.01 else {}


def _phases(seconds: Mapping[str, float]) -> str:
    longest_first = sorted(seconds.items(), key=lambda phase: -phase[1])  # a protobuf map has no order of its own
    return ", ".join(f"{text.shown(name)} {text.duration(spent)}" for name, spent in longest_first)
