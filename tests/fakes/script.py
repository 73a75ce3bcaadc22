"""Fault injection by counting: every fake tells its steps to one `Script`, and the n-th step fails.

Run once with a plain `Script()` and look at `calls`: that is how many places can fail. Then once per place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from hibernode.errors import StoreUnavailable


class Script:
    """Shared by all fakes of one test. Thread-safe. `error` makes the exception from the name of the failing step."""

    def __init__(
        self,
        fail_at: int | None = None,
        error: Callable[[str], BaseException] = lambda name: StoreUnavailable(f"scripted failure of {name}"),
    ) -> None:
        self._lock = threading.Lock()
        self._fail_at = fail_at
        self._error = error
        self.calls: list[str] = []  # names of the steps that can fail, in order; step n is calls[n - 1]
        self.notes: list[str] = []  # everything, in order, also what by its contract never raises
        self.failed = ""  # the step that did

    def step(self, name: str) -> None:
        """A call on a fake begins. Raises, before it has any effect, if it is the `fail_at`-th."""
        with self._lock:
            self.calls.append(name)
            self.notes.append(name)
            if len(self.calls) != self._fail_at:
                return
            self.failed = name
        raise self._error(name)

    def note(self, name: str) -> None:
        """A call that never raises: recorded, not counted."""
        with self._lock:
            self.notes.append(name)

    def fail_next(self) -> None:
        """The next step fails."""
        with self._lock:
            self._fail_at = len(self.calls) + 1
