"""How a command ends badly: which error a person sees, and which exit code a script sees."""

from __future__ import annotations

import json
from collections.abc import Mapping

from hibernode.cli.text import shown
from hibernode.errors import HibernodeError

LOG_LINES = 12  # of the end of a log that comes with an error
OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130


class Answered(HibernodeError):
    """The daemon's own error, as it came over the wire; or the error an action ended with."""

    def __init__(self, code: str, message: str, *, hint: str = "", details: Mapping[str, object] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.details = dict(details or {})


class Unreachable(HibernodeError):
    """No daemon answers, or it went away in the middle."""

    code = "daemon_unreachable"


class LeftRunning(HibernodeError):
    """The person at the keyboard stopped watching; the action goes on."""

    code = "interrupted_watch"


class Usage(HibernodeError):
    """Something on the command line makes no sense."""

    code = "usage"


def exit_code(error: HibernodeError) -> int:
    for kind, code in ((Unreachable, UNREACHABLE), (LeftRunning, INTERRUPTED), (Usage, USAGE)):
        if isinstance(error, kind):
            return code
    return FAILED


def as_json(error: HibernodeError) -> str:
    body = {"code": error.code, "message": error.message, "hint": error.hint, "details": error.details}
    return json.dumps({"error": body}, ensure_ascii=False, default=str)


def as_text(error: HibernodeError) -> str:
    """One line that says what is wrong, then what to do about it, then the end of a log where there is one."""
    lines = [f"error: {shown(error.message)} [{error.code}]"]
    if error.hint:
        lines.append(f"hint: {shown(error.hint)}")
    for name, value in error.details.items():
        if isinstance(value, str) and "\n" in value.strip():
            lines.append(f"{name}:")
            lines.extend(f"  {shown(line)}" for line in value.strip().splitlines()[-LOG_LINES:])
    return "\n".join(lines)
