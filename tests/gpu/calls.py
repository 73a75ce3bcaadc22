"""Steps in which the driver's calls are made one by one, without CRIU: T0 to T4, T8, T10, T12, T13."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from concurrent.futures import TimeoutError as LateError
from functools import partial
from pathlib import Path
from typing import Any

from hibernode.drivers.gpu.cuda import State
from hibernode.drivers.workloads import cgroup, proc
from tests import keeper
from tests.gpu.programs.kinds import KINDS
from tests.gpu.rig import MIB, PLAIN, PROGRAMS, Rig, Target, Unable, insist, timed

NOT_READY = 600
CALLS: tuple[tuple[Any, ...], ...] = (("state",), ("restore_thread",), ("lock", 500), ("checkpoint",), ("restore",), ("unlock",))
NOBODY = "GPU-12345678-1234-1234-1234-123456789abc"


def ask(argv: list[str], rig: Rig, env: dict[str, str] | None = None) -> str:
    """What a program says, or why it could not."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, timeout=min(60.0, rig.left), check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)
    return (done.stdout if not done.returncode else done.stderr[-400:]).strip()


def text(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return "?"


def t0(rig: Rig) -> None:
    """What this machine is."""
    memory = dict(line.split(":", 1) for line in text("/proc/meminfo").splitlines())
    status = dict(line.split(":\t", 1) for line in text("/proc/self/status").splitlines() if ":\t" in line)
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    rig.note(
        fake=rig.options.fake,
        kernel=platform.release(),
        cpus=os.cpu_count(),
        memory_mib={key: int(memory[key].split()[0]) >> 10 for key in ("MemTotal", "MemAvailable") if key in memory},
        cgroup_memory_max=text("/sys/fs/cgroup/memory.max"),
        shm_mib=[shm.total >> 20, shm.free >> 20] if shm else None,
        thp=text("/sys/kernel/mm/transparent_hugepage/enabled"),
        uid=os.geteuid(),
        capabilities=status.get("CapEff", "?"),
        seccomp=status.get("Seccomp", "?"),
        yama=text("/proc/sys/kernel/yama/ptrace_scope"),
        majors=[line.strip() for line in text("/proc/devices").splitlines() if "nvidia" in line or "gdrdrv" in line],
        nodes=sorted(str(path) for path in Path("/dev").glob("nvidia*")),
        driver_module=text("/proc/driver/nvidia/version").splitlines()[:1],
        python=platform.python_version(),
        libc=" ".join(platform.libc_ver()),
    )
    rig.note(criu=" ".join(ask([rig.options.criu, "--version"], rig).split()), criu_check=rig.check_criu() or "looks good")
    found = rig.nvml.gpus()
    rig.note(nvml={"state": found.state, "reason": found.reason, "driver": found.driver, "cuda": found.cuda})
    rig.note(gpus=[gpu.model_dump(exclude_defaults=True) for gpu in found.gpus])
    if rig.torch:
        say = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.get_device_name(0)]))"
        rig.note(torch=ask([rig.options.python, "-c", say], rig, rig.env()))
    else:
        rig.note(torch="none: ctypes programs do instead")
    copies = ask([*PLAIN, str(PROGRAMS / "copies.py"), "64" if rig.fake else "1024"], rig, rig.env())
    with contextlib.suppress(ValueError):
        copies = json.loads(copies)
    rig.note(pinned_gb_per_s=copies)
    insist(found.state == "ok", f"NVML: {found.reason}")
    gpu = found.gpus[0]
    total = f"{(gpu.memory_total or 0) >> 20} MiB"
    rig.note(say=f"{len(found.gpus)} x {gpu.name} {total}, driver {found.driver}, CRIU: {rig.detail['criu_check'][:40]}")


def t1(rig: Rig) -> None:
    """The six calls are there; what the first ones cost."""
    job = rig.target("job", kind="cuda")
    began = time.monotonic()
    control = rig.controller(init=False)  # Cuda.open looks for all six, and is Unusable without one
    rig.note(open_ms=round((time.monotonic() - began) * 1e3, 1), cuda=control.version, can_remap=control.can_remap)
    first = control.start("state", job.pid).result(rig.left)
    rig.note(first_state_without_init={"ms": round(first.ms, 2), "value": first.value, "error": first.error})
    rig.note(init_ms=rig.call("init", control=control))
    rig.note(state_ms=[rig.call("state", job.pid, control=control) for _ in range(3)])
    rig.note(restore_thread_ms=rig.call("restore_thread", job.pid, control=control))
    again = rig.controller(init=False)
    rig.note(second_process={"init": rig.call("init", control=again), "state": rig.call("state", job.pid, control=again)})
    newer = "import ctypes; l = ctypes.CDLL('libcuda.so.1'); print(hasattr(l, 'cuCheckpointOperationComplete'))"
    rig.note(custom_storage=ask([*PLAIN, "-c", newer], rig, rig.env()))
    rig.note(say=f"CUDA {control.version}, remap {control.can_remap}, cuInit {rig.detail['init_ms']:.0f} ms")


def t2(rig: Rig) -> None:
    """What it answers for who is no CUDA process. The table is for the fake driver."""
    table: dict[str, dict[str, int | str]] = {}

    def row(name: str, pid: int, calls: tuple[tuple[Any, ...], ...] = CALLS) -> None:
        table[name] = codes = {}
        for call in calls:
            codes[call[0]] = rig.code(call[0], pid, *call[1:], limit=4)
            rig.note(codes=table)
            if codes[call[0]] == "hangs":
                break

    def other(program: str) -> subprocess.Popen[bytes]:
        argv = [*PLAIN, "-c", program]
        made = subprocess.Popen(argv, env=rig.env(), stdin=subprocess.DEVNULL, start_new_session=True, stdout=subprocess.PIPE)
        assert made.stdout
        made.stdout.readline()
        rig.held.callback(made.wait)
        rig.held.callback(made.kill)
        return made

    for pid in (0, -1):
        row(str(pid), pid)
    gone = other("print()")
    gone.wait()
    row("absent", gone.pid)
    row("no CUDA", other("import time; print(flush=True); time.sleep(600)").pid)
    loaded = "import ctypes, time; ctypes.CDLL('libcuda.so.1'); print(flush=True); time.sleep(600)"
    row("before cuInit", other(loaded).pid)
    job = rig.target("job", kind="cuda")
    thread = rig.control.start("restore_thread", job.pid).result(rig.left).insist()
    row("a thread of one", thread, CALLS[:2])
    job.goes_on()
    zombie = rig.target("zombie", kind="cuda")
    os.kill(zombie.pid, signal.SIGKILL)
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    row("a zombie", zombie.pid)
    hangs = [f"{name}: {call}" for name, codes in table.items() for call, code in codes.items() if code == "hangs"]
    rig.note(say="; ".join(f"{name} {codes['state']}" for name, codes in table.items()))
    insist(not hangs, f"no answer: {', '.join(hangs)}")
    takes = [name for name, codes in table.items() if name != "a thread of one" and 0 in codes.values()]
    insist(not takes, f"taken for CUDA processes: {takes}")


def t3(rig: Rig) -> None:
    """A training, three times suspended and resumed in place, is its twin's equal, bit by bit."""
    before = rig.used
    job = rig.target("train")
    holds = rig.used - before
    rig.note(program=job.kind, holds_mib=holds >> 20, devices_running=len(job.devices()))
    cycles = []
    for _ in range(3):
        job.goes_on(20)
        used = rig.used
        cycle: dict[str, Any] = rig.suspend(job.pid)
        job.cycled = True
        cycle["freed_mib"] = rig.freed(holds * 9 // 10, used) >> 20
        cycle["devices"], cycle["memory_mib"], cycle["still"] = job.devices(), job.memory(), job.stands_still()
        cycle |= rig.resume(job.pid)
        cycles.append(cycle)
        rig.note(cycles=cycles)
        job.goes_on(20)
    rig.note(steps=job.steps(), compared=job.compared)
    for cycle in cycles:
        insist(not cycle["devices"], f"still open while checkpointed: {cycle['devices']}")
        insist(cycle["still"], "it went on while it was checkpointed")
        insist(cycle["freed_mib"] << 20 >= holds * 8 // 10, f"{cycle['freed_mib']} MiB freed of {holds >> 20}")
    rig.note(say=f"{job.compared} values of {job.kind} equal, {cycles[0]['freed_mib']} of {holds >> 20} MiB freed")


def t4(rig: Rig) -> None:
    """A lock gives up after its time, and waits for a kernel if it may."""
    busy = 1200 if rig.options.quick or rig.fake else 5000
    job = rig.target("busy", kind="cuda", busy_ms=busy, interval_ms=0)
    for _ in range(3):
        began = job.steps()
        keeper.wait_until(lambda began=began: job.steps() > began, busy / 1e3 + 10, "a kernel's end")  # the next has just begun
        answer = rig.control.start("lock", job.pid, 500).result(rig.left)
        code, state = (answer.error or {}).get("code", 0), rig.state(job.pid)
        if code:
            break
        rig.call("unlock", job.pid)  # this machine was slow, and the kernel nearly over
    rig.note(kernel_ms=busy, short={"code": code, "ms": round(answer.ms, 1), "state": state.name, "ticks": answer.ticks})
    insist(code == NOT_READY, f"a lock of 500 ms answers {code}")
    insist(state is State.RUNNING, f"it is {state.name} then")
    long = rig.call("lock", job.pid, 60_000)
    rig.note(long_ms=long)
    rig.call("checkpoint", job.pid)
    job.cycled = True
    rig.resume(job.pid)
    job.goes_on(2)
    insist(long < 2 * busy + 5000, f"the lock took {long} ms")
    rig.note(say=f"600 and RUNNING after {answer.ms:.0f} ms; then locked in {long:.0f} ms of a {busy} ms kernel")


def t8(rig: Rig) -> None:
    """Maps: identity, one that nobody can follow, and then none."""
    if not rig.control.can_remap:
        raise Unable("this driver takes no map")
    own = rig.gpu.uuid
    job = rig.target("job", kind="cuda")
    rig.suspend(job.pid)
    job.cycled = True
    rig.note(identity=rig.resume(job.pid, [(own, own)]))
    job.goes_on()
    refused: dict[str, Any] = {}
    rig.suspend(job.pid)
    for name, pair in {"onto nobody": (own, NOBODY), "from nobody": (NOBODY, own)}.items():
        refused[name] = {"code": rig.code("restore", job.pid, [pair]), "state": rig.state(job.pid).name}
        rig.note(refused=refused)
    insist(rig.state(job.pid) is State.CHECKPOINTED, "a refused map has changed its state")
    rig.note(then_without=rig.resume(job.pid))
    job.goes_on()
    everything = [gpu.uuid for gpu in rig.gpus()]
    narrow = {}
    for name, uuids in {"visible": [own], "all": everything}.items():
        rig.suspend(job.pid)
        code = rig.code("restore", job.pid, [(each, each) for each in uuids])
        narrow[name] = {"pairs": len(uuids), "code": code, "state": rig.state(job.pid).name}
        rig.note(one_visible=narrow)
        if rig.state(job.pid) is State.CHECKPOINTED:
            rig.call("restore", job.pid)
        rig.call("unlock", job.pid)
        job.goes_on()
    same = [gpu for gpu in rig.gpus()[1:] if (gpu.name, gpu.memory_total) == (rig.gpu.name, rig.gpu.memory_total)]
    if same:
        rig.note(another_gpu=_moved(rig, own, same[0].uuid))
    else:
        rig.note(another_gpu="there is no second one of its kind")
    insist(all(each["code"] == 1 for each in refused.values()), f"refused with {refused}")
    rig.note(say=f"identity, 1 and CHECKPOINTED, none; another GPU: {'yes' if same else 'there is none'}")


def _moved(rig: Rig, own: str, other: str) -> dict[str, Any]:
    job = rig.target("mover", kind="cuda", env=rig.env(visible=f"{own},{other}"))
    rig.suspend(job.pid)
    job.cycled = True
    found = rig.resume(job.pid, [(own, other), (other, own)])
    job.goes_on()
    return found


def t10(rig: Rig) -> None:
    """The thread that serves the calls, in a pid namespace too; who stands still keeps a call waiting."""
    job = rig.target("job", kind="cuda")
    rig.note(thread=_thread(rig, job.pid))
    rig.note(namespace=_in_namespace(rig))

    os.kill(job.pid, signal.SIGSTOP)
    keeper.wait_until(lambda: proc.thread_states(job.pid) == {"T"}, 5, "all its threads to stop")
    rig.note(stopped=_waits(rig, job, lambda: os.kill(job.pid, signal.SIGCONT)))
    rig.note(frozen=_frozen(rig, job))
    for name in ("stopped", "frozen"):
        found = rig.detail[name]
        insist(isinstance(found, str) or (found["hangs"] and found["then"] == "RUNNING"), f"{name}: {found}")
    insist(rig.detail["thread"]["comm"].startswith("cuda"), f"its name: {rig.detail['thread']}")
    state = "no freezer here" if isinstance(rig.detail["frozen"], str) else "frozen waits"
    rig.note(say=f"{rig.detail['thread']['comm']}; stopped waits; {state}; namespace: {str(rig.detail['namespace'])[:60]}")


def _thread(rig: Rig, pid: int) -> dict[str, Any]:
    tid = rig.control.start("restore_thread", pid).result(rig.left).insist()
    task = Path(f"/proc/{pid}/task/{tid}")
    found: dict[str, Any] = {"tid": tid, "comm": text(str(task / "comm")), "is_its": task.exists()}
    inner = [line for line in text(str(task / "status")).splitlines() if line.startswith("NSpid")]
    return {**found, "nspid": inner[0].split()[1:] if inner else []}


def _in_namespace(rig: Rig) -> dict[str, Any] | str:
    if shutil.which("unshare") is None:
        return "no unshare here"
    outer = rig.target("inner", kind="cuda", wrap=("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"))
    pid = next((pid for pid in keeper.descendants(outer.pid) if "cuda_job" in keeper.describe(pid)), 0)
    if not pid:
        return "it is not to be found from outside"
    found = {"pid": pid, **_thread(rig, pid), **rig.suspend(pid), **rig.resume(pid)}
    outer.goes_on()
    with contextlib.suppress(Exception):
        rig.suspend(pid)  # it is killed at the end
    return found


def _waits(rig: Rig, job: Target, go_on: Callable[[], object]) -> dict[str, Any]:
    asked = rig.control.start("state", job.pid)
    try:
        asked.result(1.0)
        hangs = False
    except LateError:
        hangs = True
    finally:
        took = timed(go_on)
    answer = asked.result(min(20.0, rig.left))
    job.goes_on()
    return {"hangs": hangs, "then": State(answer.value).name if answer.error is None else answer.error, "thaw_ms": took}


def _frozen(rig: Rig, job: Target) -> dict[str, Any] | str:
    uid = f"verify-{uuid.uuid4().hex[:8]}"
    procs = cgroup.create(uid)
    try:
        for place in (Path(each).parent for each in procs):
            for file, freeze, thaw in (("cgroup.freeze", "1", "0"), ("freezer.state", "FROZEN", "THAWED")):
                switch = place / file
                if switch.exists():
                    (place / "cgroup.procs").write_text(str(job.pid))
                    switch.write_text(freeze)
                    time.sleep(0.2)
                    try:
                        return {"by": file, **_waits(rig, job, partial(switch.write_text, thaw))}
                    finally:
                        switch.write_text(thaw)
                        (place.parent.parent / "cgroup.procs").write_text(str(job.pid))
    except OSError as e:
        return f"no freezer here: {e}"
    finally:
        cgroup.remove(uid)
    return "no freezer here"


def t12(rig: Rig) -> None:
    """A restore onto a GPU that is full, and again when it is free: the codes. The last step: a driver may be the worse for it."""
    mib = 64 if rig.fake else 512
    job = rig.target("victim", kind="cuda", mib=8, spare_mib=mib)
    full = rig.used
    rig.suspend(job.pid)
    need = max(rig.freed(mib * MIB, full), mib * MIB)
    free = rig.gpu.memory_free or 0
    # the filler has a context of its own, of about the size that the victim's had
    spare = (free - need // 2 - max(0, need - mib * MIB)) // MIB - 8
    rig.note(need_mib=need >> 20, free_mib=free >> 20, filler_mib=spare)
    insist(spare > 0, "no room for the filler")
    filler = rig.target("filler", kind="cuda", mib=8, spare_mib=spare)
    rig.note(free_beside_filler_mib=(rig.gpu.memory_free or 0) >> 20)
    rig.note(full={"code": rig.code("restore", job.pid, limit=60), "state": _state(rig, job.pid)})
    filler.end()
    keeper.wait_until(lambda: (rig.gpu.memory_free or 0) > free - 64 * MIB, 10, "the filler's memory")
    retries: list[dict[str, Any]] = []
    for _ in range(2):
        retries.append({"code": rig.code("restore", job.pid, limit=60), "state": _state(rig, job.pid)})
        rig.note(retries=retries)
    if retries[-1]["state"] == "LOCKED" or retries[0]["state"] == "LOCKED":
        rig.note(unlock=rig.code("unlock", job.pid))
        job.cycled = True
    codes = [rig.detail["full"]["code"], *(each["code"] for each in retries)]
    insist("hangs" not in codes, f"no answer: {codes}")
    insist(codes[0] != 0, "it was restored: the GPU was not full")
    rig.note(say=f"full {codes[0]}, then with room {codes[1]}, {codes[2]}; at last {retries[-1]['state']}")


def _state(rig: Rig, pid: int) -> str:
    try:
        return rig.state(pid).name
    except Exception as e:
        return str(e)[:100]


def t13(rig: Rig) -> None:
    """Kinds of memory and work: which of them are saved, and which answer 801."""
    table: dict[str, Any] = {}
    for kind in KINDS:
        table[kind] = _kind(rig, kind)
        rig.note(kinds=table)
    if rig.torch:
        table["torch graph"] = _cycle(rig, rig.target("graph", graph=True, twin=False))
        rig.note(kinds=table)
        segments = {
            **rig.env(),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        table["torch expandable segments"] = _cycle(rig, rig.target("expandable", env=segments, twin=False))
        rig.note(kinds=table)
    saved = [kind for kind, found in table.items() if isinstance(found, dict) and found.get("goes_on") is True]
    refused = {kind: found.get("checkpoint") for kind, found in table.items() if isinstance(found, dict) and kind not in saved}
    untried = [kind for kind, found in table.items() if isinstance(found, str)]
    rig.note(say=f"saved: {', '.join(saved)}; refused: {refused}" + (f"; not tried: {', '.join(untried)}" if untried else ""))
    insist("plain" in saved, "not even plain memory")
    lost = [kind for kind, found in table.items() if isinstance(found, dict) and found.get("goes_on") not in (True, None)]
    insist(not lost, f"saved, and not right afterwards: {lost}")


class _Kind(Target):
    """kinds.py: its values are its steps' numbers."""

    def __init__(self, rig: Rig, kind: str) -> None:
        super().__init__(rig, rig.place / f"{kind}.out", "cuda", {})
        self.argv = [*PLAIN, str(PROGRAMS / "kinds.py"), str(self.out), kind]

    def check(self) -> None:
        lines = self.lines()
        insist(all(line[0] == line[1] == str(n) for n, line in enumerate(lines, 1)), "values are not right")
        insist(len({line[2] for line in lines}) == 1, "it began again")


def _kind(rig: Rig, kind: str) -> dict[str, Any] | str:
    target = _Kind(rig, kind)
    rig.held.callback(target.end)
    try:
        target.start(None, (), rig.env())
    except Exception as e:
        said = Path(f"{target.out}.err").read_text(errors="replace").strip()[-200:]
        return f"not tried: {said or e}"
    return _cycle(rig, target)


def _cycle(rig: Rig, target: Target) -> dict[str, Any]:
    """Once there and back; what the driver refuses is told, and the program ended."""
    pid = target.pid
    found: dict[str, Any] = {"lock": rig.code("lock", pid, 10_000, limit=20)}
    if not found["lock"]:
        found["checkpoint"] = rig.code("checkpoint", pid, limit=30)
        found["state"] = _state(rig, pid)
    if found.get("checkpoint") == 0:
        target.cycled = True
        found["restore"] = rig.code("restore", pid, limit=30)
        found["unlock"] = rig.code("unlock", pid)
        try:
            target.goes_on()
            found["goes_on"] = True
        except Exception as e:
            found["goes_on"] = str(e)[:200]
    elif found.get("state") == "LOCKED":
        found["unlock"] = rig.code("unlock", pid)
    target.end()
    return found
