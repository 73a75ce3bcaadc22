"""The command `gc`: what a store holds that nobody needs."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

import click

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli import text
from hibernode.cli.failure import Answered
from hibernode.cli.screen import Cell, Column
from hibernode.cli.session import Session, command

_REASONS = {
    "orphaned_upload": "an upload nobody ended",
    "no_manifest": "never became a checkpoint",
    "beyond_last": "there are newer ones",
    "too_old": "too old",
    "unwanted": "deleted while others needed it",
    "no_referrer": "says that one needs it which is gone",
    "unreadable": "its manifest cannot be read",
    "foreign": "holds what hibernode did not write",
}
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _seconds(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
    """A time: `90`, `30m`, `12h`, `2d`."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhdw]?)", value)
    if found is None:
        raise click.BadParameter(f"{text.shown(value)[:60]} is not a time like 90, 30m, 12h or 2d", context, option)
    return float(found[1]) * _UNITS[found[2]]


@command("gc")
@click.option("--apply", is_flag=True, help="Remove it. Without this, it is only shown.")
@click.option("--keep-last", type=click.IntRange(0, 1 << 30), metavar="N", help="The N last checkpoints of each workload stay.")
@click.option("--keep-days", type=click.FloatRange(0, 1e6), metavar="D", help="Checkpoints stay for D days.")
@click.option("--grace", callback=_seconds, metavar="TIME", help="Nothing younger goes: 90 (seconds), 30m, 12h, 2d.")
@click.option("--directory", default="", metavar="URL", help="Another store, of those the node allows.")
def gc(
    session: Session, apply: bool, keep_last: int | None, keep_days: float | None, grace: float | None, directory: str
) -> None:
    """Show what a store holds that nobody needs, and with --apply remove it.

    That is: uploads nobody has ended, objects that never became a checkpoint, and checkpoints that are neither among the
    last N of their workload nor younger than D days. Rules that are not given are the node's own, from [gc] in its
    configuration. What is in use, younger than the grace time, or cannot be read always stays.

    \b
    Examples:
      hibernode gc
      hibernode gc --keep-last 3 --apply
      hibernode gc --keep-days 30 --directory s3://bucket/archive --json | jq -s 'map(.bytes) | add'
    """
    request = pb.GarbageRequest(apply=apply, directory=directory, grace=grace, keep_last=keep_last, keep_days=keep_days)
    replies: Iterator[pb.Garbage] = session.client.stream(session.client.stub.CollectGarbage(request))
    found = [_told(session, each, apply=apply) for each in replies]
    if not session.screen.as_json:
        _summed_up(session, found, apply=apply)
    _insist_removed(found)


def _told(session: Session, garbage: pb.Garbage, *, apply: bool) -> pb.Garbage:
    """Where something happens, as it happens."""
    if session.screen.as_json:
        session.screen.record(text.plain(garbage))
    elif apply and garbage.state == "removed":
        session.screen.good("removed ", _words(garbage))
    elif apply and garbage.state in ("in_use", "failed"):
        session.screen.bad(f"{garbage.state.replace('_', ' ')}: ", _words(garbage), ": ", text.shown(garbage.message))
    return garbage


def _words(garbage: pb.Garbage) -> str:
    return f"{garbage.what} {text.shown(garbage.key or garbage.checkpoint_id)}"


def _summed_up(session: Session, found: Sequence[pb.Garbage], *, apply: bool) -> None:
    planned = [each for each in found if each.state == "found"]
    if planned:
        columns = [
            Column("WHAT"),
            Column("CHECKPOINT"),
            Column("OF", keep=3, flexible=True),
            Column("AGE", right=True),
            Column("SIZE", right=True, keep=4),
            Column("WHY", keep=5, flexible=True),
        ]
        session.screen.table(columns, [_row(each) for each in planned], empty="")
        session.screen.say()
    _tell_what_stays(session, [each for each in found if each.state == "kept"])
    removed = [each for each in found if each.state == "removed"]
    if apply:
        session.screen.say(f"removed: {_totals(removed)}" if removed else "nothing was removed")
    elif planned:
        session.screen.say(f"would go: {_totals(planned)}")
        session.screen.say("nothing is removed yet; to do it: ", (_again(), "bold"))
    else:
        session.screen.good("there is nothing to remove")


def _row(garbage: pb.Garbage) -> list[Cell]:
    return [
        garbage.what,
        text.shown(garbage.checkpoint_id),
        text.shown(garbage.workload.removeprefix("default/")),
        text.duration(max(0.0, garbage.age)),
        text.size(garbage.bytes) if garbage.what not in ("upload", "mark") else "",
        _REASONS.get(garbage.reason, text.shown(garbage.reason)),
    ]


def _tell_what_stays(session: Session, kept: Sequence[pb.Garbage]) -> None:
    for each in kept:
        if each.reason == "unreadable":
            session.screen.bad(f"checkpoint {text.shown(each.checkpoint_id)} stays: {text.shown(each.message)} [{each.code}]")
    if foreign := sum(each.reason == "foreign" for each in kept):
        session.screen.say(f"left alone, because hibernode did not write all of it: {_count(foreign, 'id')}")


def _totals(found: Sequence[pb.Garbage]) -> str:
    counts = Counter(each.what for each in found)
    words = ", ".join(_count(counts[what], what) for what in ("checkpoint", "attempt", "upload") if counts[what])
    size = sum(each.bytes for each in found)
    return f"{words} ({text.size(size)})" if size else words


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _again() -> str:
    """The command line that does it."""
    context = click.get_current_context()
    given = [f"--{name.replace('_', '-')} {shlex.quote(_said(value))}" for name, value in _chosen(context)]
    return " ".join(["hibernode gc", *given, "--apply"])


def _chosen(context: click.Context) -> Iterator[tuple[str, object]]:
    for name in ("keep_last", "keep_days", "grace", "directory", "socket"):
        if (value := context.params.get(name)) not in (None, ""):
            yield name, value


def _said(value: object) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _insist_removed(found: Sequence[pb.Garbage]) -> None:
    failed = [each for each in found if each.state == "failed"]
    if failed:
        raise Answered(
            failed[0].code or "internal",
            f"{len(failed)} of {sum(each.state != 'kept' for each in found)} could not be removed; the first: {failed[0].message}",
            hint="what is left is found again: repeat the command",
        )
