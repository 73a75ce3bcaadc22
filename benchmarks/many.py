"""Many workloads of one node checkpointed at once, one of them large: pauses, the time until all are ready, memory; against one by one.

Two real daemons with as many `limits.actions` as there are workloads: the arena of one takes the large workload, that of the other, the
default, just not. The store is a directory on tmpfs. Workloads are `programs/held.c`. At once: the large one is asked for first, all
others in the same moment. One by one: the large one first as well, the next when the one before is ready. All ways take turns. A pause is
what the daemon says; beside it the longest time that a thread of the program that wakes every millisecond did not, which counts waiting
for a processor as well. Last, each of them is killed and restored from the last round, and has to go on with all of its memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks import held
from benchmarks.held import LIMIT, Beat
from benchmarks.tables import spread, table
from hibernode._pb import hibernode_pb2 as pb
from tests import keeper
from tests.daemon import Daemon, pid_target, ready
from tests.keeper import Kept, wait_until
from tests.nats_server import free_port

NAME = "many"
SMALL, LARGE = 24, 512  # MiB
WAYS = {"at once": 1.25, "one by one": 1.25, "at once, arena too small": 1.0}  # and the arena, in sizes of the large one
_LOOK = 0.05  # seconds between two looks at the arena


def measure(*, quick: bool) -> dict[str, Any]:
    count, large, rounds = (8, 128, 1) if quick else (32, LARGE, 3)
    taken: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-", dir="/dev/shm")))
        program = held.build(home / "held")
        limits = {"limits": {"actions": count + 1, "progress_interval": 0.25}}
        daemons = {
            part: stack.enter_context(
                Daemon(
                    store=f"file://{home}/store", arena=f"{int(part * large)}MiB", metrics=f"127.0.0.1:{free_port()}",
                    call_limit=LIMIT, start_limit=LIMIT, settings=limits,
                )
            )
            for part in set(WAYS.values())
        }  # fmt: skip
        sizes = [large] + [SMALL] * count
        workloads = [_Workload(stack, program, home / f"{n}.log", size) for n, size in enumerate(sizes)]
        for workload in workloads:
            wait_until(workload.beats, LIMIT, "a program to fill its memory")
        planted = [workload.beats()[-1] for workload in workloads]
        done: Sequence[pb.Event] = ()
        for turn in range(rounds + 1):
            for way in [*WAYS][turn % len(WAYS) :] + [*WAYS][: turn % len(WAYS)]:
                for event in done:
                    shutil.rmtree(home / "store" / event.checkpoint_id)
                done, one = _round(daemons[WAYS[way]], workloads, way, int(WAYS[way] * large) << 20)
                print(f"round {turn}: {way}: {_told(one)}", flush=True)
                if turn:  # the first is for the caches
                    taken[way].append(one)
        _insist_on_restores(daemons[max(WAYS.values())], workloads, done, planted)
    return {"small": count, "small_mebibytes": SMALL, "large_mebibytes": large, "arenas": WAYS, "rounds": rounds, "taken": taken}


class _Workload:
    """A program, and what it says. Restored, it writes on into the same file."""

    def __init__(self, stack: contextlib.ExitStack, program: Path, log: Path, size: int) -> None:
        self._log, self._mark = log, 0
        self._kept = Kept([str(program), str(size)], log)
        stack.callback(self._kept.kill)
        self.pid = self._kept.pid

    def lines(self) -> list[str]:
        with self._log.open("rb") as log:
            log.seek(self._mark)
            return log.read().rpartition(b"\n")[0].decode().splitlines()

    def beats(self) -> list[Beat]:
        return held.beats(self.lines())

    def kill(self) -> None:
        keeper.kill_tree(self.pid)
        self._kept.kill()
        self._mark = self._log.stat().st_size


def _round(daemon: Daemon, workloads: Sequence[_Workload], way: str, arena: int) -> tuple[list[pb.Event], dict[str, Any]]:
    load, cpu = os.getloadavg()[0], _cpu(daemon.pid)
    Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")  # VmHWM begins anew
    with _Look(daemon) as look:
        began = time.time()
        if way != "one by one":
            with ThreadPoolExecutor(len(workloads)) as pool:
                calls = []
                for workload in workloads:  # in this order: a call is on its way when the next one is made
                    calls.append(pool.submit(lambda pid: ready(daemon.checkpoint(pid_target(pid))), workload.pid))
                    time.sleep(0.005 if workload is workloads[0] else 0)
                done = [call.result() for call in calls]
        else:
            done = [ready(daemon.checkpoint(pid_target(workload.pid))) for workload in workloads]
        took = time.time() - began
    seen = [held.pause(workload.lines, began) for workload in workloads]
    pauses = [event.profile.pause_ns / 1e9 for event in done]
    return done, {
        "load": load,
        "all_ready": took,
        "small_pauses": pauses[1:],
        "large_pause": pauses[0],
        "small_seen": seen[1:],
        "large_seen": seen[0],
        "large_ready": done[0].profile.total_duration / 1e9,
        "small_ready": [event.profile.total_duration / 1e9 for event in done[1:]],
        "arena_peak": look.arena / arena,
        "waiting_peak": look.waiting,
        "daemon_mebibytes": (_peak(daemon.pid) - arena) / (1 << 20),
        "daemon_cpu": _cpu(daemon.pid) - cpu,
    }


class _Look(contextlib.AbstractContextManager["_Look"]):
    """The most that the arena held, and that waited for a part of it, as its metrics have them."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon, self._over = daemon, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.arena, self.waiting = 0.0, 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_LOOK):
            with urllib.request.urlopen(f"http://{self._daemon.metrics}/metrics", timeout=LIMIT) as page:
                text = page.read().decode()
            self.arena = max(self.arena, _metric(text, "hibernode_arena_used_bytes"))
            self.waiting = max(self.waiting, _metric(text, 'hibernode_queue_depth{queue="arena"}'))


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _insist_on_restores(
    daemon: Daemon, workloads: Sequence[_Workload], done: Sequence[pb.Event], planted: Sequence[Beat]
) -> None:
    """What goes on are the old processes, with all of their memory."""
    for workload, event, beat in zip(workloads, done, planted, strict=True):
        began = time.time()
        workload.kill()
        ready(daemon.restore(event.checkpoint_id))
        held.goes_on(workload.lines, beat, began)
        os.kill(workload.pid, signal.SIGUSR1)
        wait_until(lambda w=workload, b=beat: w.beats()[-1].checks > b.checks, LIMIT, "a look at its memory")
        held.insist_whole({beat.token: beat}, {beat.token: workload.beats()[-1]})
        keeper.kill_tree(workload.pid)


def _cpu(pid: int) -> float:
    """Seconds of processor time that it has used, with those of its children that have ended: CRIU."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _peak(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


@dataclass(frozen=True)
class _Of:
    """The rounds of one way."""

    rounds: Sequence[Mapping[str, Any]]

    def all(self, name: str) -> list[float]:
        found = [each[name] for each in self.rounds]
        return [value for each in found for value in each] if isinstance(found[0], list) else found


def render(found: Mapping[str, Any]) -> str:
    sizes = f"{found['small']} workloads of {found['small_mebibytes']} MiB and one of {found['large_mebibytes']}"
    lines = [f"{sizes}, {found['rounds']} rounds", ""]
    rows: dict[str, list[str]] = {}
    for way in WAYS:
        of = _Of(found["taken"][way])
        small, seen = sorted(of.all("small_pauses")), sorted(of.all("small_seen"))
        cells = {
            "small: pause, median": f"{_part(small, 0.5) * 1e3:.0f} ms",
            "small: pause, p99": f"{_part(small, 0.99) * 1e3:.0f} ms",
            "small: pause, worst": f"{small[-1] * 1e3:.0f} ms",
            "small: seen by itself, median": f"{_part(seen, 0.5) * 1e3:.0f} ms",
            "small: seen by itself, worst": f"{seen[-1] * 1e3:.0f} ms",
            "large: pause": spread(of.all("large_pause")),
            "large: ready after": spread(of.all("large_ready")),
            "small: ready after": spread(of.all("small_ready")),
            "all ready after": spread(of.all("all_ready")),
            "arena, most of it used": f"{max(of.all('arena_peak')):.2f} of {found['arenas'][way] * found['large_mebibytes']:.0f} MiB",
            "waiting for a part, at most": f"{max(of.all('waiting_peak')):.0f}",
            "daemon beside its arena": spread(of.all("daemon_mebibytes"), " MiB"),
            "CPU time of daemon and CRIU": spread(of.all("daemon_cpu")),
            "load before": spread(of.all("load"), ""),
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return "\n".join([*lines, *table("", WAYS, rows)])


def _part(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def _told(one: Mapping[str, Any]) -> str:
    small = sorted(one["small_pauses"])
    pauses = f"pauses: small {_part(small, 0.5):.3f} to {small[-1]:.3f} s, large {one['large_pause']:.2f} s"
    memory = f"arena {one['arena_peak']:.2f}, waiting {one['waiting_peak']:.0f}, daemon {one['daemon_mebibytes']:.0f} MiB"
    return f"all ready {one['all_ready']:.2f} s, {pauses}, {memory}"
