"""Steps that take the whole path: suspend, CRIU, store, and back, by a real daemon: T5, T6, T7, T9, T11."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hibernode.drivers.workloads import proc
from tests import keeper
from tests.daemon import Daemon, Refusal, job_target, ready
from tests.gpu.rig import GIB, MIB, PLAIN, Rig, Target, Unable, insist, lay_down, outcome, seconds, timed

KILL = {"leave_running": False}


def t5(rig: Rig) -> None:
    """Checkpointed twice while it runs on, then killed, restored, and still its twin's equal."""
    with rig.daemon() as daemon:
        before = rig.used
        job = rig.target("train", daemon=daemon)
        holds = rig.used - before
        rig.note(program=job.kind, holds_mib=holds >> 20)
        for turn in ("first", "second"):
            job.goes_on(10)
            rig.note(**{turn: seconds(ready(daemon.checkpoint(job_target(job.out.stem))))})
            job.cycled = True
            job.goes_on(10)
        used = rig.used
        done = ready(daemon.checkpoint(job_target(job.out.stem), criu_opts=KILL))
        rig.note(killed=seconds(done))
        keeper.wait_until(lambda: not keeper.alive(job.pid), 10, "its end")
        rig.note(freed_mib=rig.freed(holds * 9 // 10, used) >> 20)
        steps = job.steps()
        rig.note(restored=seconds(ready(daemon.restore(done.checkpoint_id))))
        job.goes_on(10, limit=30)
        rig.note(steps=job.steps(), steps_when_killed=steps, compared=job.compared, used_again_mib=(rig.used - before) >> 20)
        insist(rig.detail["freed_mib"] << 20 >= holds * 8 // 10, f"{rig.detail['freed_mib']} MiB freed of {holds >> 20}")
        done = ready(daemon.checkpoint(job_target(job.out.stem)))  # of a restored one
        job.goes_on(10)
        job.end()
    killed, restored = rig.detail["killed"], rig.detail["restored"]
    rig.note(
        say=f"{job.compared} values of {job.kind} equal; pause {rig.detail['second']['pause']} s, "
        f"until ready {killed['total']} s, restore {restored['total']} s"
    )


def t6(rig: Rig) -> None:
    """CRIU refuses who was not suspended; a dump that fails after the suspend is undone."""
    rig.insist_criu()
    job = rig.target("job", kind="cuda")
    images, plugins = rig.place / "images", rig.place / "plugins"
    for each in (images, plugins):
        each.mkdir()
    argv = [
        rig.options.criu,
        "dump",
        "-t",
        str(job.pid),
        "-D",
        str(images),
        "-o",
        "log",
        "--leave-running",
        "--network-lock",
        "skip",
    ]
    done = subprocess.run(
        argv, env={**os.environ, "CRIU_LIBS_DIR": str(plugins)}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=min(60.0, rig.left), check=False,
    )  # fmt: skip
    log = (images / "log").read_text(errors="replace") if (images / "log").exists() else done.stderr
    rig.note(without=[line[:200] for line in log.splitlines() if "Error" in line][:6], status=done.returncode)
    insist(done.returncode, "CRIU dumped a process with a GPU open")
    job.goes_on()
    job.end()
    with rig.daemon() as daemon:
        # a deleted file that is longer than CRIU may take along
        ghost = rig.place / "ghost"
        wrap = ("/bin/sh", "-c", f'exec 9>{ghost}; head -c 2000000 /dev/zero >&9; rm {ghost}; exec "$@"', "sh")
        job = rig.target("rolled", kind="cuda", daemon=daemon, wrap=wrap)
        events = daemon.checkpoint(job_target(job.out.stem), criu_opts={"ghost_limit": 4096})
        rig.note(dump_fails=outcome(events))
        insist(events[-1].code == "dump_failed", f"it ended with {outcome(events)}")
        job.cycled = True
        job.goes_on()
        ready(daemon.checkpoint(job_target(job.out.stem)))
        job.goes_on()
        job.end()
    rig.note(say="refused, alive; after a failed dump resumed, and saved at the next try")


def t7(rig: Rig) -> None:
    """Two in one tree: at the same time and one after the other; one dies midway; workers that inherited the driver's descriptors."""
    pair = [rig.target(f"one-{seed}", kind="cuda", seed=seed) for seed in (1, 2)]
    rig.control("init")  # not in the first one's time
    rig.note(serial=_serial(rig, pair))
    rig.note(parallel=_parallel(rig, pair))
    first, victim = pair[0], rig.target("victim", kind="cuda")  # which was never restored: see Target.end
    for job in (first, victim):
        rig.call("lock", job.pid, 10_000)
    rig.call("checkpoint", first.pid)
    os.kill(victim.pid, signal.SIGKILL)
    victim.end()
    rig.note(of_the_dead={call: rig.code(call, victim.pid) for call in ("state", "checkpoint")})
    rig.resume(first.pid)
    first.goes_on()
    first.end()
    rig.note(by_hand="the other one goes on")
    try:
        _in_one_tree(rig)
    except Unable as e:
        rig.note(tree=f"not tried: {e}", workers=f"not tried: {e}")
        raise Unable(f"without CRIU only the driver's half: {rig.detail['parallel']} ms; {e}") from e
    rig.note(say=f"serial {rig.detail['serial']} ms, parallel {rig.detail['parallel']} ms; {rig.detail['midway']}"[:200])


def _serial(rig: Rig, pair: Sequence[Target]) -> dict[str, float]:
    def both() -> None:
        for job in pair:
            rig.suspend(job.pid)
            job.cycled = True

    down = timed(both)
    up = timed(lambda: [rig.resume(job.pid) for job in pair])
    for job in pair:
        job.goes_on()
    return {"suspend": down, "resume": up}


def _parallel(rig: Rig, pair: Sequence[Target]) -> dict[str, float]:
    def all_at_once(do: str, *args: object) -> None:
        for asked in [rig.control.start(do, job.pid, *args) for job in pair]:
            asked.result(rig.left).insist()

    down = timed(lambda: (all_at_once("lock", 10_000), all_at_once("checkpoint")))
    up = timed(lambda: (all_at_once("restore"), all_at_once("unlock")))
    for job in pair:
        job.goes_on()
    return {"suspend": down, "resume": up}


class _Two:
    """Two jobs in one tree, under a shell, as one managed job."""

    def __init__(self, rig: Rig, daemon: Daemon, name: str) -> None:
        self.name, self._daemon = name, daemon
        self.both = [Target(rig, rig.place / f"{name}-{seed}.out", "cuda", {"seed": seed, "mib": 8}) for seed in (3, 4)]
        words = " & ".join(" ".join(job.argv) for job in self.both)
        self.root = daemon.run(name, ["/bin/sh", "-c", f"{words} & wait"], env=rig.env()).pid
        for job in self.both:
            keeper.wait_until(lambda job=job: job.steps() > 3, min(60, rig.left), f"steps of {job.out.name}")
            job.pid = next(pid for pid in keeper.descendants(self.root) if str(job.out) in keeper.describe(pid))


def _in_one_tree(rig: Rig) -> None:
    with rig.daemon() as daemon:
        two = _Two(rig, daemon, "two")
        done = ready(daemon.checkpoint(job_target(two.name), criu_opts=KILL))
        rig.note(tree={"killed": seconds(done)})
        keeper.wait_until(lambda: not keeper.alive(two.root), 10, "its end")
        rig.note(tree={**rig.detail["tree"], "restored": seconds(ready(daemon.restore(done.checkpoint_id)))})
        for job in two.both:
            job.goes_on()
            job.cycled = True
            job.end()
        two = _Two(rig, daemon, "doomed")
        victim, other = two.both
        if rig.fake:
            rig.fake.arm(victim.pid, "checkpoint", "200ms once")  # it is too fast to be hit
        journal = daemon.state_dir / "gpu" / "journal"
        known = journal.read_text()  # of the one before, for some seconds
        events = daemon.begin_checkpoint(job_target(two.name))
        with contextlib.suppress(TimeoutError):
            keeper.wait_until(lambda: _begun(journal.read_text(), known, victim.pid), 10, "the driver's checkpoint")
        os.kill(victim.pid, signal.SIGKILL)
        last = [update.event for update in events if update.HasField("event")]
        rig.note(midway=f"one killed in the middle: {outcome(last)}")
        other.cycled = True
        other.goes_on()
        other.end()
        _workers(rig, daemon)


def _begun(journal: str, known: str, pid: int) -> bool:
    new = journal.removeprefix(known).splitlines()
    return any(f'"pid": {pid},' in line and "checkpointing" in line for line in new)


def _workers(rig: Rig, daemon: Daemon) -> None:
    """Children that were forked when CUDA was in use: a DataLoader's, or the like of them."""
    options: Mapping[str, object] = {"workers": 2} if rig.torch else {"fork_child": True}
    job = rig.target("workers", daemon=daemon, twin=not rig.torch, **options)
    found = {}
    for pid in keeper.descendants(job.pid):
        with contextlib.suppress(OSError):
            found[str(pid)] = sorted(
                {name for _, what in proc.descriptors(pid) if (name := Path(what).name).startswith("nvidia")}
            )
    try:
        said = outcome(daemon.checkpoint(job_target(job.out.stem)))
    except Refusal as e:
        said = f"{e.code}: {e.message}"
    rig.note(workers={"program": job.kind, "descriptors": found, "checkpoint": said})
    job.cycled = True
    job.goes_on()
    job.end()


def t9(rig: Rig) -> None:
    """Threads that map, unmap, trim and read pinned memory, while device memory is on its way: does it crash?"""
    job = rig.target("churn", kind="churn")
    company = Path(f"{job.out}.churn")
    keeper.wait_until(company.exists, 10, "its company")
    rig.note(company=company.read_text().strip(), cycles=0)
    ends = time.monotonic() + min(3.0 if rig.fake or rig.options.quick else 12.0, rig.left / 3)
    while time.monotonic() < ends:
        rig.suspend(job.pid)
        job.cycled = True
        time.sleep(0.2)  # the window: its threads run, its device memory is not there
        rig.resume(job.pid)
        job.goes_on(2)
        rig.note(cycles=rig.detail["cycles"] + 1)
    insist("has changed" not in company.read_text(), company.read_text())
    job.end()
    try:
        with rig.daemon() as daemon:
            job = rig.target("churned", kind="churn", daemon=daemon)
            for turn in range(3):
                ready(daemon.checkpoint(job_target(job.out.stem)))
                job.cycled = True
                job.goes_on(2)
                rig.note(whole_path=turn + 1)
            done = ready(daemon.checkpoint(job_target(job.out.stem), criu_opts=KILL))
            keeper.wait_until(lambda: not keeper.alive(job.pid), 10, "its end")
            ready(daemon.restore(done.checkpoint_id))
            job.goes_on(2)
            rig.note(restored=True)
            job.end()
    except Unable as e:
        rig.note(whole_path=f"not tried: {e}")
    rig.note(
        design_c="not tried: the daemon has design A only",
        say=f"{rig.detail['cycles']} cycles, no crash ({rig.detail['company']}); whole path {rig.detail['whole_path']}",
    )


def t11(rig: Rig) -> None:
    """How long each call takes, by size; the same through CRIU and a store."""
    table: list[dict[str, Any]] = []
    speed = 0.3e9  # bytes a second; the slowest that was ever told
    room = _room(rig)
    rig.note(thp=Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(), room_mib=room >> 20)
    for size in _sizes(rig):
        if size * 1.15 > room:
            table.append({"mib": size >> 20, "skipped": f"{room >> 20} MiB of host or GPU memory"})
        elif 2 * size / speed > rig.left - _WHOLE:
            table.append({"mib": size >> 20, "skipped": f"{rig.left:.0f} s are left"})
        else:
            table.append(_measured(rig, size, table, thp=True))
            took = [each[call] for each in table[-1]["cycles"] for call in ("checkpoint", "restore")]
            speed = size / (max(took) / 1e3)
        rig.note(sizes=table)
    if (small := next((row["mib"] for row in table if "cycles" in row), 0)) and rig.left > _WHOLE + 20:
        rig.note(without_huge_pages=_measured(rig, small << 20, [], thp=False))
    whole: list[dict[str, Any]] = []
    for size in _sizes(rig, whole=True):
        try:
            whole.append(_through_criu(rig, size))
        except Unable as e:
            whole.append({"mib": size >> 20, "skipped": str(e)})
        rig.note(whole=whole)
    best = [row for row in table if "cycles" in row]
    insist(best, "no size could be measured")
    cycle = best[-1]["cycles"][-1]
    through = [
        f"{row['mib']} MiB: {row['checkpoint']['total']} s, back {row['restore']['total']} s" for row in whole if "restore" in row
    ]
    rig.note(say=f"{best[-1]['mib']} MiB: {cycle['gb_per_s']} GB/s; through CRIU {'; '.join(through) or 'not tried'}")


_WHOLE = 60.0  # seconds that are kept for CRIU


def _sizes(rig: Rig, *, whole: bool = False) -> list[int]:
    if rig.fake:
        return [size * MIB for size in ((64,) if rig.options.quick else (64, 256))]
    if whole:
        return [size * GIB for size in ((1,) if rig.options.quick else (1, 8))]
    return [size * GIB for size in ((1, 4) if rig.options.quick else (1, 4, 8, 16, 40))]


def _room(rig: Rig) -> int:
    """Bytes that may be on the GPU and, as a copy, in this machine's memory."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    host = int(memory["MemAvailable"].split()[0]) << 10
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            host = min(host, int(Path(limit).read_text()))
    return min(int(host * 0.8), rig.gpu.memory_free or 0)


def _sized(rig: Rig, name: str, size: int, daemon: Daemon | None = None, wrap: Sequence[str] = ()) -> Target:
    if rig.torch:
        return rig.target(name, daemon=daemon, wrap=wrap, ballast_mib=size >> 20, interval_ms=50)
    return rig.target(name, kind="cuda", daemon=daemon, wrap=wrap, mib=size >> 20, interval_ms=50)


def _measured(rig: Rig, size: int, before: Sequence[object], *, thp: bool) -> dict[str, Any]:
    """Two cycles in place: the second finds what the first has left of host memory."""
    say = "import ctypes, os, sys; ctypes.CDLL(None).prctl(41, 1, 0, 0, 0); os.execvp(sys.argv[1], sys.argv[1:])"
    job = _sized(rig, f"size-{size >> 20}", size, wrap=() if thp else (*PLAIN, "-c", say))
    row: dict[str, Any] = {"mib": size >> 20, "program": job.kind, "memory_running_mib": job.memory(), "cycles": []}
    for _ in range(2):
        used = rig.used
        cycle: dict[str, Any] = rig.suspend(job.pid)
        job.cycled = True
        cycle["memory_mib"], cycle["freed_mib"] = job.memory(), rig.freed(size * 9 // 10, used) >> 20
        cycle["anon_huge_mib"] = _huge(job.pid)
        cycle |= rig.resume(job.pid)
        cycle["gb_per_s"] = {
            call: round(size / (cycle[call] / 1e3) / 1e9, 2) for call in ("checkpoint", "restore") if cycle[call]
        }
        row["cycles"].append(cycle)
        rig.note(running=row)
        job.goes_on(2, limit=30)
        if rig.left < 2 * (cycle["checkpoint"] + cycle["restore"]) / 1e3 + _WHOLE:
            break
    job.end()
    return row


def _huge(pid: int) -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1]) >> 10
    return -1


def _through_criu(rig: Rig, size: int) -> dict[str, Any]:
    host = _room(rig)
    images, disk = shutil.disk_usage(rig.images()).free, shutil.disk_usage(rig.place).free
    if size * 2.3 > host or size * 1.2 > min(images, disk):
        raise Unable(f"{host >> 20} MiB of memory, {images >> 20} for images, {disk >> 20} on disk")
    if rig.left < 30:
        raise Unable(f"{rig.left:.0f} s are left")
    arena = "64MiB" if rig.fake else f"{min(4096, max(512, size >> 21))}MiB"
    with rig.daemon(arena) as daemon:
        job = _sized(rig, f"whole-{size >> 20}", size, daemon)
        done = ready(daemon.checkpoint(job_target(job.out.stem), criu_opts=KILL))
        row: dict[str, Any] = {"mib": size >> 20, "arena": arena, "images": str(rig.images()), "checkpoint": seconds(done)}
        keeper.wait_until(lambda: not keeper.alive(job.pid), 20, "its end")
        row["restore"] = seconds(ready(daemon.restore(done.checkpoint_id)))
        job.cycled = True
        job.goes_on(2, limit=30)
        for name in ("checkpoint", "restore"):
            row[name]["gb_per_s"] = round(size / row[name]["total"] / 1e9, 2)
        lay_down(rig, job.pid)
        job.end()
    return row
