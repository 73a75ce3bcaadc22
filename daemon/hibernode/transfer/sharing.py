"""Who may have how many chunks of the arena. The rule alone: no memory, no threads.

An action asks for a part before anything is frozen, and has it when as much is free, in the order in which they asked: whoever is small
does not pass whoever is large, so nobody waits for ever. What it was given is its own until it is full, so nobody who stands still waits
for what others ship. What is nobody's may be borrowed, but for what the first in the line waits for. Full, it keeps what it uses,
and less with each chunk that is shipped.

What does not fit into the arena at all stands still for a store whatever it is given: it has half, and borrows the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_TENTH = 10  # what is expected is a guess: a part is that much larger, and begins to run low when no more than that is left
_ENDS = 2  # chunks that are not full: the last ones of an image and of a layer


@dataclass(eq=False)
class Part:
    """What one action has, in chunks."""

    wanted: int
    given: Callable[[], None]
    own: int = 0  # that nobody else gets, used or not
    used: int = 0
    filling: bool = False  # it was given, and is not full yet

    @property
    def taken(self) -> int:
        """That nobody else can have."""
        return max(self.own, self.used)


class Sharing:
    """Of `total` chunks, among any number of actions, of which `at_once` fill their parts at the same time: those stand still, and more of
    them than there are processors stand still for each other."""

    def __init__(self, total: int, at_once: int) -> None:
        self._total, self._at_once = total, at_once
        self._parts: list[Part] = []
        self._line: deque[Part] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def free(self) -> int:
        """Chunks that are in nobody's part."""
        return self._total - sum(part.taken for part in self._parts)

    def ask(self, expected: int, given: Callable[[], None]) -> Part:
        """A place in the line, for an action that expects to fill so many. `given` is called when it has its part: at once, or in a call
        of somebody else's."""
        fits = expected <= self._total
        wanted = min(self._total, expected + expected // _TENTH + _ENDS) if fits else max(1, self._total // 2)
        self._line.append(part := Part(wanted, given))
        self._go_on()
        return part

    def left(self, part: Part) -> int:
        """Chunks that it may take now: what is its own, and what is nobody's, but for what the first in the line waits for."""
        next_one = self._line[0].wanted if self._line else 0
        return max(0, part.own - part.used) + max(0, self.free - next_one)

    def low(self, part: Part) -> bool:
        """It had better let go of what it has."""
        return self.left(part) <= part.wanted // _TENTH

    def take(self, part: Part) -> bool:
        """One more chunk for it; False if it may have none now."""
        if not self.left(part):
            return False
        part.used += 1
        return True

    def give_back(self, part: Part) -> None:
        part.used -= 1
        self._go_on()

    def full(self, part: Part) -> None:
        """It will take no more. Harmless when repeated."""
        part.own, part.filling = 0, False
        self._go_on()

    def leave(self, part: Part) -> None:
        """Out of the line, or full. Chunks that it still has are given back one by one."""
        if part in self._line:
            self._line.remove(part)
        self.full(part)

    def _go_on(self) -> None:
        self._parts = [part for part in self._parts if part.filling or part.used]
        while self._line and self._line[0].wanted <= self.free and sum(p.filling for p in self._parts) < self._at_once:
            part = self._line.popleft()
            part.own, part.filling = part.wanted, True
            self._parts.append(part)
            part.given()
