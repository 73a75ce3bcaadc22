"""`benchmarks/run`: its words."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import containers, events, frames, increments, keys, lazy, machine, many, memory, nodes

QUESTIONS = {each.NAME: each for each in (keys, events, containers, memory, lazy, increments, frames, many, nodes)}
SPEED = (memory.NAME, lazy.NAME, increments.NAME)  # what is measured if nothing is asked for: all of the ratios
ALL = "all"
RATIOS = (
    "pause_vs_criu_dump",
    "durable_vs_tar_zstd",
    "durable_vs_streamer",
    "restore_vs_tar_zstd",
    "lazy_complete_vs_tar_zstd",
    "lazy_to_running_seconds",
    "increment_bytes",
    "increment_time",
    "pipeline_efficiency",
)
_OF_KINDS = ("size", "rounds", "kinds")
_OPTIONS = {
    containers.NAME: ("size", "rounds"),
    memory.NAME: (*_OF_KINDS, "only"),
    increments.NAME: _OF_KINDS,
    lazy.NAME: ("rounds",),
}  # what else they can be told


def main(words: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    if unknown := [name for name in arguments.names if name not in (*QUESTIONS, ALL)]:
        sys.stderr.write(f"run: no question {', '.join(unknown)}; there are {', '.join(QUESTIONS)}, and {ALL}\n")
        return 2
    names = [*QUESTIONS] if ALL in arguments.names else arguments.names or SPEED
    if os.geteuid():
        sys.stderr.write("run: it needs root, as the daemon does\n")
        return 2
    told = {"date": datetime.now(UTC).date().isoformat(), "quick": arguments.quick, "machine": machine.facts()}
    told["gb_per_s_of_one_thread"] = machine.ceilings()
    print(f"{told['machine']}\nGB/s of one thread: {told['gb_per_s_of_one_thread']}", flush=True)
    told["ratios"] = ratios = dict.fromkeys(RATIOS)  # where others look for them; None: nobody has asked
    for name in names:
        began = time.monotonic()
        more = {option: getattr(arguments, option) for option in _OPTIONS.get(name, ())}
        told[name] = found = QUESTIONS[name].measure(quick=arguments.quick, **more)
        ratios |= found.get("ratios", {})
        print(f"\n{name} ({time.monotonic() - began:.0f} s)\n{QUESTIONS[name].render(found)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks/run",
        description="Measure, with the real daemon and real CRIU on this machine, and print tables of medians and ratios. Questions: "
        + "; ".join(f"{name}: {(module.__doc__ or '').split(chr(10))[0]}" for name, module in QUESTIONS.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SPEED)} if none is named; {ALL}: every question")
    parser.add_argument("--quick", action="store_true", help="less memory, fewer rounds: a look, and no figure to quote")
    parser.add_argument(
        "--size", type=int, default=0, metavar="MIB", help="containers, memory, increments: what the workload holds"
    )
    parser.add_argument(
        "--rounds", type=int, default=0, metavar="N", help="containers, memory, increments: how often each variant has its turn"
    )
    parser.add_argument("--kinds", default="", metavar="KIND,...", help=f"memory, increments: some of {', '.join(memory.KINDS)}")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT",
        help=f"memory: only variants whose name contains it; can be given again. They are: {'; '.join(memory.VARIANTS)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there, with facts of the machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
