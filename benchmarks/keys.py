"""What signing and encryption cost: a whole checkpoint and a whole restore by the real daemon, with each and without.

The store is a directory on tmpfs: with any real store the share of encryption is smaller. The four daemons take turns, round by round,
so that a machine whose speed drifts drifts for all of them; a ratio is of one round, what is shown the median of the rounds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hibernode._pb import hibernode_pb2 as pb
from tests import keeper, keys
from tests.daemon import Daemon, pid_target, ready
from tests.keeper import Kept, wait_until

NAME = "keys"
KINDS = ("float32", "text")
VARIANTS = ("plain", "signed", "encrypted", "both")
MEASURES = ("until ready", "pause", "cpu", "restore")
_WORKLOAD = Path(__file__).parent / "programs" / "weights.py"
_LIMIT = 120.0  # seconds for anything


def measure(*, quick: bool) -> dict[str, Any]:
    """Seconds of each round: workload -> variant -> measure -> list."""
    size, rounds = (256, 3) if quick else (512, 5)
    with tempfile.TemporaryDirectory(prefix="hn-bench-") as home:
        store = Path(tempfile.mkdtemp(prefix="hn-bench-", dir="/dev/shm"))
        try:
            found = {kind: _workload(kind, size, rounds, Path(home), store) for kind in KINDS}
        finally:
            shutil.rmtree(store, ignore_errors=True)
    return {"mebibytes": size, "rounds": rounds, "store": "a directory on tmpfs", "seconds": found}


def _workload(kind: str, size: int, rounds: int, home: Path, store: Path) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {variant: {name: [] for name in MEASURES} for variant in VARIANTS}
    with contextlib.ExitStack() as stack:
        settings = _settings(home / kind)
        daemons = {
            name: stack.enter_context(Daemon(store=f"file://{store}/{name}", arena="512MiB", settings=settings[name]))
            for name in VARIANTS
        }
        with _running(kind, size, home / f"{kind}.log") as pid:
            for turn in range(rounds + 1):
                for name in VARIANTS[turn % len(VARIANTS) :] + VARIANTS[: turn % len(VARIANTS)]:
                    taken = _once(daemons[name], pid)
                    for each, seconds in taken.items():
                        if turn:  # the first is for the caches
                            found[name][each].append(seconds)
    return found


def _once(daemon: Daemon, pid: int) -> Mapping[str, float]:
    """One checkpoint, the end of the workload, one restore."""
    cpu, began = _cpu(daemon.pid), time.perf_counter()
    done = ready(daemon.checkpoint(pid_target(pid), streams=2))
    until, cpu = time.perf_counter() - began, _cpu(daemon.pid) - cpu
    keeper.kill_tree(pid)
    began = time.perf_counter()
    ready(daemon.restore(done.checkpoint_id))
    restore = time.perf_counter() - began
    daemon.stub.DeleteCheckpoint(pb.CheckpointId(checkpoint_id=done.checkpoint_id), timeout=_LIMIT)
    return {"until ready": until, "pause": done.profile.pause_ns / 1e9, "cpu": cpu, "restore": restore}


def _settings(directory: Path) -> dict[str, dict[str, Any]]:
    directory.mkdir()
    private, public = keys.pair(directory)
    wrapper = directory / "wrapper.key"
    wrapper.write_bytes(os.urandom(32).hex().encode())
    wrapper.chmod(0o600)
    signing = {"signing": {"key": private, "trusted": [public]}}
    encryption = {"encryption": {"key": str(wrapper)}}
    return {"plain": {}, "signed": signing, "encrypted": encryption, "both": signing | encryption}


@contextlib.contextmanager
def _running(kind: str, size: int, log: Path) -> Iterator[int]:
    program = Kept([sys.executable, str(_WORKLOAD), kind, str(size)], log, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    try:
        wait_until(lambda: b"beat" in log.read_bytes(), _LIMIT, "the workload")
        yield program.pid
    finally:
        program.kill()


def _cpu(pid: int) -> float:
    """Seconds of processor time that it has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def render(found: Mapping[str, Any]) -> str:
    """Medians in seconds, and beside them the median of the rounds' ratios to `plain`."""
    head = "".join(f" {name:>22} |" for name in MEASURES)
    lines = [f"{found['mebibytes']} MiB, {found['rounds']} rounds, store: {found['store']}", ""]
    lines += [f"| {'memory':8} | {'variant':9} |{head}", f"|{'-' * 10}|{'-' * 11}|" + f"{'-' * 24}|" * len(MEASURES)]
    for kind, variants in found["seconds"].items():
        for name, measures in variants.items():
            cells = [_cell(measures[each], variants["plain"][each]) for each in MEASURES]
            lines.append(f"| {kind:8} | {name:9} |" + "".join(f" {cell:>22} |" for cell in cells))
    return "\n".join(lines)


def _cell(seconds: list[float], plain: list[float]) -> str:
    ratios = [a / b for a, b in zip(seconds, plain, strict=True) if b]
    ratio = statistics.median(ratios) if ratios else 0.0
    return f"{statistics.median(seconds):.3f} s  x {ratio:.2f}"
