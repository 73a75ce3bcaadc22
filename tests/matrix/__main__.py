"""`scripts/crash-matrix`: its words."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is there: a process with threads must not be forked

from tests.matrix import soak, table
from tests.matrix.bench import SUBJECTS
from tests.matrix.cases import Case, Survey, full, parse, quick
from tests.matrix.run import Settings, default_benches, run

QUICK = 300  # cases


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    if os.geteuid():
        sys.stderr.write("crash-matrix: it needs root, as the daemon does\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is on disk is removed
    say = functools.partial(print, file=sys.stderr, flush=True)
    if arguments.cycles:
        return _soak(arguments, say)
    settings = Settings(
        seed=arguments.seed,
        benches=arguments.benches or default_benches(),
        criu=arguments.criu or _criu(),
        design=arguments.gpu_design,
        choose=functools.partial(_choose, arguments),
        output=arguments.output,
        say=say,
    )
    say(f"seed {settings.seed}, {settings.benches} benches")
    result = run(settings)
    if arguments.output:
        table.write(result, arguments.output)
    if arguments.json:
        print(json.dumps(result if arguments.rows else {name: result[name] for name in result if name != "rows"}, indent=1))
    else:
        print(table.render(result))
    return 0 if table.good(result) and result["complete"] else 1


def _soak(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    result = soak.soak(arguments.cycles, arguments.subject, arguments.criu or _criu(), say)
    if arguments.output:
        table.write(result, arguments.output)
    print(json.dumps(result, indent=1) if arguments.json else soak.render(result))
    return 0 if result["good"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "crash-matrix",
        description="Kill and break everything at every point of a checkpoint and of a restore, and look at what is left. "
        "Without --quick all cases: about three quarters of an hour on two cores.",
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} cases, of every fault and point some: under 5 minutes")
    parser.add_argument(
        "--case", action="append", default=[], metavar="ID", help="only this one, as a failure prints it; may be repeated"
    )
    parser.add_argument("--match", default="", help="only cases with this in their id: /gpu/ are those with a GPU")
    parser.add_argument("--count", type=int, default=0, help="at most so many")
    parser.add_argument("--seed", type=int, default=1, help="decides order and random moments (default 1)")
    parser.add_argument("--gpu-design", choices=("lock", "stop"), default="lock", help="`gpu.design` of the nodes (default lock)")
    parser.add_argument("--benches", type=int, default=0, help="nodes side by side (default: cores and one)")
    parser.add_argument("--criu", default="", help="the binary to use")
    parser.add_argument("--output", type=Path, help="write the JSON there, with all rows; also while the run goes on")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rows", action="store_true", help="with --json: every row too")
    parser.add_argument(
        "--cycles", type=int, default=0, help="instead: so many checkpoints and restores of one workload; what grew"
    )
    parser.add_argument("--subject", choices=SUBJECTS, default="process", help="with --cycles: which workload (default process)")
    parser.add_argument("--list", action="store_true", help="print the ids and play nothing")
    return parser


def _choose(arguments: argparse.Namespace, survey: Survey) -> list[Case]:
    if arguments.case:
        return [parse(text) for text in arguments.case]
    found = [case for case in full(survey, arguments.seed) if arguments.match in case.id]
    if arguments.list:
        print("\n".join(sorted(case.id for case in found)))
        return []
    if arguments.quick:
        return quick(survey, arguments.seed, arguments.count or QUICK)
    return found[: arguments.count or None]


def _criu() -> str:
    beside = Path(sys.executable).parent / "criu"
    found = str(beside) if beside.exists() else shutil.which("criu")
    if found is None:
        raise SystemExit("crash-matrix: there is no criu: run scripts/setup")
    return found


if __name__ == "__main__":
    sys.exit(main())
