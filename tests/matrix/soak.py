"""Many checkpoints and restores of one workload by one daemon: what the daemon has of this machine at the end, and had after the tenth."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.matrix import checks, programs, room, table
from tests.matrix.act import Player
from tests.matrix.bench import Bench
from tests.matrix.run import forked

SETTLED = 10  # cycles after which nothing may grow any more
RSS_SLACK = 0.05  # of the daemon's resident memory: allocators are not exact
SAY = 50  # cycles between two lines


def soak(cycles: int, subject: str, criu: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The result as JSON; `good` in it says whether nothing grew and every cycle brought the same workload back."""
    home = Path(tempfile.mkdtemp(prefix="hn-soak-"))
    work = Path("/dev/shm") / home.name
    began = time.monotonic()
    try:
        with forked(_in_room, home / "bench", work, programs.build(home), criu, cycles, subject) as runner:
            result: dict[str, Any] = {}
            while "good" not in result:
                said = runner.recv()
                if isinstance(said, str):
                    say(said)
                else:
                    result = said
    finally:
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    return {**result, "seconds": round(time.monotonic() - began, 1), "machine": table.machine()}


def render(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"| {'of the daemon':20} | after {SETTLED:4} | after {result['cycles']:4} |",
        f"|{'-' * 22}|------------|------------|",
    ]
    names = sorted({*result["settled"], *result["end"]})
    lines += [f"| {name:20} | {result['settled'].get(name, 0):10} | {result['end'].get(name, 0):10} |" for name in names]
    lines += [
        "",
        *(f"{name:20} {result[name]}" for name in ("cycles", "good", "wrong", "seconds", "checkpoint_ms", "restore_ms")),
    ]
    return "\n".join(lines)


def _in_room(runner: Connection, home: Path, work: Path, binary: Path, criu: str, cycles: int, kind: str) -> None:
    room.enter(f"{home.parent.name}-{home.name}", [runner.fileno()])
    try:
        with Bench(home, work, binary, criu) as bench:
            runner.send(_cycles(runner, bench, cycles, kind))
    except Exception:
        empty = {"cycles": 0, "settled": {}, "end": {}, "checkpoint_ms": 0, "restore_ms": 0}
        runner.send({**empty, "good": False, "wrong": [traceback.format_exc()]})


def _cycles(runner: Connection, bench: Bench, cycles: int, kind: str) -> dict[str, Any]:
    player, subject = Player(bench, 0), bench.subjects[kind]
    assert bench.daemon is not None
    pid, settled, wrong = bench.daemon.pid, Counter[str](), []
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(1, cycles + 1):
        for part, step in zip(seconds, (player.put_away, player.take_out), strict=True):
            began = time.monotonic()
            wrong += [f"cycle {number}: {found.text}" for found in step(subject)]
            part.append(time.monotonic() - began)
        if wrong or bench.daemon is None or bench.daemon.pid != pid:
            break
        if number == SETTLED:
            settled = _measure(bench, work=bench.work)
        if number % SAY == 0:
            runner.send(f"{number} of {cycles}: {dict(_measure(bench, work=bench.work))}")
    end = _measure(bench, work=bench.work)
    wrong += [
        f"{name}: {settled[name]} after {SETTLED} cycles, {end[name]} now" for name in end if end[name] > _allowed(name, settled)
    ]
    shown = {
        f"{name}_ms": round(statistics.median(part) * 1000) for name, part in zip(("checkpoint", "restore"), seconds, strict=True)
    }
    return {"cycles": number, "good": not wrong and number == cycles, "wrong": wrong, "settled": settled, "end": end, **shown}


def _measure(bench: Bench, *, work: Path) -> Counter[str]:
    """What can leak, in numbers."""
    found = checks.census(bench)
    assert bench.daemon is not None
    proc = Path(f"/proc/{bench.daemon.pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    tmpfs = sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())
    return Counter(
        {
            "descriptors": sum(found.descriptors.values()),
            "threads": len(os.listdir(proc / "task")),
            "mounts": found.mounts,
            "rss_kib": int(status["VmRSS"].split()[0]) - int(status["RssShmem"].split()[0]),
            "tmpfs_bytes": tmpfs,
            "tmpfs_files": len(bench.at_work()),
            "children": len((proc / "task" / str(bench.daemon.pid) / "children").read_text().split()),
        }
    )


def _allowed(name: str, settled: Counter[str]) -> float:
    return settled[name] * (1 + RSS_SLACK) if name == "rss_kib" else settled[name]
