"""Events the broker has not confirmed: a broker that is away delays a status and never loses one.

They lie in the journal, each written together with the status it tells, so that there is no moment in which one is on disk and the other
is not; what is sent is noted there too, and which place it got. Events of one action go out in order; by the place of the one before, the
broker knows one that comes twice, however late that is.
"""

from __future__ import annotations

from collections.abc import Iterator

from hibernode.journal import Entry, Journal
from hibernode.model import Event


class Outbox:
    """A view of the journal. Any thread; `waiting` and `sent` by one reader at a time."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def waiting(self) -> Iterator[tuple[Entry, Event]]:
        """Every event not sent yet: actions in the order they began, the events of each in theirs."""
        for entry in self._journal.all():
            if not entry.settled:
                yield from ((entry, event) for event in entry.record.events if event.seq > entry.record.published)

    def sent(self, entry: Entry, event: Event, place: int | None = None) -> None:
        """The broker has it, at this place of its stream. Durable when it returns."""
        if event.seq > entry.record.published:
            entry.update(published=event.seq, stored_at=place)

    def again(self, entry: Entry) -> None:
        """Send the last event once more, after those that were not sent yet."""
        last = entry.record.last
        if last is not None and entry.record.published >= last.seq:
            entry.update(published=last.seq - 1, stored_at=0)  # where there is anything of the action, there is its last event

    def __len__(self) -> int:
        return sum(1 for _ in self.waiting())
