"""`scripts/damage`: its words."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import keys
from tests.daemon import Daemon
from tests.damage import harm, real, stored, table
from tests.damage.harm import TURN, Harm
from tests.damage.real import Real
from tests.damage.stored import Objects
from tests.damage.trial import Bench, Trial
from tests.matrix.table import machine

COUNT = 10_000  # flips and truncations
LIVE = 200  # cases that the real daemon is asked to restore; of a chain there are half as many, and a tenth for the next of it
_SAY = 1000  # cases between two lines

Cases = Iterable[tuple[Harm, Objects]]


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    if os.geteuid():
        sys.stderr.write("damage: it needs root, as the daemon does\n")
        return 2
    say = functools.partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hn-damage-") as directory, _real(Path(directory)) as real_ones:
        result = _run(arguments, Path(directory), *real_ones, say)
    print(json.dumps(result, indent=1) if arguments.json else table.render(result))
    return 0 if table.good(result) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "damage",
        description="Change one thing in a stored checkpoint, and look that it is refused before anybody runs: the golden one, "
        "some made on fakes, and one of a real process. Each is restored by the page on a node of fakes and verified; "
        f"{LIVE} more of the real one by the real daemon. About two minutes on two cores.",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=COUNT,
        help=f"flips and truncations (default {COUNT}); a quarter as many of other kinds come with them",
    )
    parser.add_argument("--live", type=int, default=LIVE, help=f"cases for the real daemon (default {LIVE})")
    parser.add_argument("--seed", type=int, default=1, help="decides all cases (default 1)")
    parser.add_argument(
        "--case", action="append", default=[], metavar="ID", help="only this one, as a failure prints it; may be repeated"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put the objects of each case that is not refused there")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


@contextlib.contextmanager
def _real(directory: Path) -> Iterator[tuple[Real, Real]]:
    """One alone, and the third of a chain, each with a daemon of its own; that of the chain encrypts and signs."""
    for place in ("program", "changing", "chain"):
        (directory / place).mkdir()
    settings = keys.closed(directory)
    with (
        Daemon() as daemon, real.program(directory / "program") as running,
        Daemon(settings=settings) as closed, real.changing(directory / "changing") as changing,
    ):  # fmt: skip
        yield real.real(daemon, running), real.chain(closed, changing, directory / "chain", **settings)


def _run(arguments: argparse.Namespace, directory: Path, alone: Real, chain: Real, say: Callable[[str], None]) -> dict[str, Any]:
    for place in ("made", "bench"):
        (directory / place).mkdir()
    real_ones = {each.stored.name: each.stored for each in (alone, chain)}
    everything = {**stored.make(directory / "made"), **real_ones}
    bench, began = Bench(directory / "bench", everything), time.monotonic()
    for each in everything.values():
        bench.insist_restores(each)
    if arguments.case:
        harms = [harm.parse(text) for text in arguments.case]
        bench = Bench(directory / "bench", everything, followed=1)
        trials = _played(bench.play, [(each, harm.done(each, everything)) for each in harms], arguments.keep, say)
        return table.summary(trials, seconds=round(time.monotonic() - began, 1))
    count = arguments.count * len(TURN) // sum(map(bool, TURN))
    trials = _played(bench.play, (harm.draw(everything, arguments.seed, n) for n in range(count)), arguments.keep, say)
    live = [
        _played(play, (harm.draw({one.stored.name: one.stored}, arguments.seed, n) for n in range(count)), arguments.keep, say)
        for play, one, count in (
            (alone.play, alone, arguments.live),
            (chain.play, chain, arguments.live // 2),
            (chain.follow, chain, arguments.live // 10),
        )
    ]
    for one in (alone, chain):
        one.still_restores()
    return table.summary(
        [*trials, *live[0], *live[1]],
        live[2],
        asked_of_real_daemon=sum(map(len, live)),
        seed=arguments.seed,
        seconds=round(time.monotonic() - began, 1),
        machine=machine(),
    )


def _played(play: Callable[[Harm, Objects], Trial], cases: Cases, keep: Path | None, say: Callable[[str], None]) -> list[Trial]:
    trials: list[Trial] = []
    for one, after in cases:
        trials.append(play(one, after))
        if trials[-1].wrong:
            say(f"wrong: {one.id}: {trials[-1].wrong}")
            if keep is not None:
                stored.write(keep / str(len(trials)), after)
        if len(trials) % _SAY == 0:
            say(f"{len(trials)} cases")
    return trials


if __name__ == "__main__":
    sys.exit(main())
