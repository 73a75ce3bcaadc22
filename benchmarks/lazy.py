"""Lazy restores out of S3, by how much memory comes back: until the tree runs, until all of it is there, against an eager one.

One process of float32 weights for each size; one checkpoint of it, restored again and again, lazily and (but for `--quick`) eagerly in
turns. The first turn is not counted. Running is the first beat of the old process, by its own clock; complete is `ready`; afterwards all of
its memory is looked at by itself, and must be what was written. What it touches of it until then it does not choose: its thread wakes every
millisecond.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import memory
from benchmarks.tables import spread, table
from tests.daemon import ready

NAME = "lazy"
_SIZES, _QUICK_SIZES = (512, 8192), (512, 2048)  # MiB
_ARENA = 640  # MiB: nothing is measured of the checkpoint
_KIND = "float32"
_EAGER_COPIES = 3.2  # of the memory at once, while it is restored eagerly: the process, and what is staged, and the store's cache


@dataclass
class Restored:
    """Seconds."""

    running: float
    complete: float
    load: float  # of the machine, before


def measure(*, quick: bool, rounds: int = 0) -> dict[str, Any]:
    """Every round: size -> mode -> what was taken."""
    rounds = rounds or (3 if quick else 5)
    taken = {str(size): _of(size, rounds, eager=not quick) for size in (_QUICK_SIZES if quick else _SIZES)}
    worst = max(statistics.median(one["running"] for one in modes["lazy"]) for modes in taken.values())
    return {"rounds": rounds, "taken": taken, "ratios": {"lazy_to_running_seconds": round(worst, 3)}}


def _of(size: int, rounds: int, *, eager: bool) -> dict[str, list[Any]]:
    modes = ("lazy", "eager") if eager and memory.room() > size * _EAGER_COPIES else ("lazy",)
    taken: dict[str, list[Any]] = {mode: [] for mode in modes}
    with memory.bench(size, arena=_ARENA) as bench, bench.running(_KIND) as tree:
        checkpoint_id, planted = tree.saved(bench.url)
        for turn in range(rounds + 1):
            for mode in modes if turn % 2 else modes[::-1]:
                one = _restored(bench, tree, checkpoint_id, mode, planted)
                print(f"{size} MiB: round {turn}: {mode}: running {one.running:.3f} s, complete {one.complete:.2f} s", flush=True)
                if turn:
                    taken[mode].append(vars(one))
        shutil.rmtree(bench.stores.place("S3", "ours") / checkpoint_id)
    return taken


def _restored(bench: memory.Bench, tree: memory.Tree, checkpoint_id: str, mode: str, planted: Mapping[str, Any]) -> Restored:
    os.sync()
    load, began = os.getloadavg()[0], time.time()
    ready(bench.daemon.restore(checkpoint_id, directory=bench.url, criu_opts={"restore": mode}))
    complete = time.time() - began
    running = tree.back(planted, began)
    tree.insist_whole(planted)
    tree.end()
    return Restored(running, complete, load)


def render(found: Mapping[str, Any]) -> str:
    rows = {
        f"{size} MiB, {mode}": [spread([one[each] for one in rounds]) for each in ("running", "complete")]
        for size, modes in found["taken"].items()
        for mode, rounds in modes.items()
    }
    return "\n".join([f"{found['rounds']} rounds", *table("restore from S3", ["running", "complete"], rows)])
