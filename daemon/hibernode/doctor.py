"""What this machine can do, check by check, each with how to mend it. Looks only, changes nothing but a probe object in the store."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hibernode import locks
from hibernode.config import without_secrets
from hibernode.errors import HibernodeError
from hibernode.model import Check, Gpu, GpuInventory
from hibernode.node import Node

_PTRACE, _RESOURCE, _RESTORE = 19, 24, 40  # include/uapi/linux/capability.h
_TMPFS = "tmpfs"


def checks(node: Node, *, bus_connected: bool | None) -> list[Check]:
    """All of them. `bus_connected` None: there is no bus by configuration."""
    return [
        *_capabilities(),
        _tried("criu", lambda: f"{node.criu.facts().path}, version {node.criu.facts()}"),
        _criu_check(node),
        _filler(node),
        _work_dir(node),
        _tried("store", lambda: _store(node)),
        _room(node),
        _bus(bus_connected, without_secrets(node.config.bus.url)),
        _watchdog(node),
        *_containers(node),
        *_gpus(node.inventory.gpus()),
        *_kernel(),
    ]


def _capabilities() -> Iterator[Check]:
    held = int(next(line for line in _lines("/proc/self/status") if line.startswith("CapEff:")).split()[1], 16)
    yield _has(held, _PTRACE, "CAP_SYS_PTRACE", "run the daemon as root, in a container with SYS_PTRACE", required=True)
    yield _has(
        held,
        _RESTORE,
        "CAP_CHECKPOINT_RESTORE",
        "run the daemon as root; needed to restore the same pids",
        required=True,
    )
    yield _has(held, _RESOURCE, "CAP_SYS_RESOURCE", "without it workloads of other users cannot be dumped", required=False)


def _has(held: int, bit: int, name: str, hint: str, *, required: bool) -> Check:
    ok = bool(held >> bit & 1)
    return Check(name=name, ok=ok, found="held" if ok else "missing", hint="" if ok else hint, required=required)


def _tried(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name=name, ok=True, found=look())
    except HibernodeError as e:
        return Check(name=name, ok=False, found=e.message, hint=e.hint)


def _criu_check(node: Node) -> Check:
    said = node.criu.check()
    hint = "a kernel with CONFIG_CHECKPOINT_RESTORE, and root, are needed; `criu check` says what is missing"
    return Check(name="criu check", ok=not said, found=said or "looks good", hint=hint if said else "")


def _filler(node: Node) -> Check:
    why = node.criu.unfit()
    hint = "restores are done by files, which takes longer, and none is lazy; Linux 5.18, userfaultfd and ptrace are needed"
    found = "can bring pages to processes" + (
        "" if node.config.criu.filler else ", and does only for lazy restores: `criu.filler`"
    )
    return Check(name="filler", ok=not why, found=why or found, hint=hint if why else "", required=False)


def _store(node: Node) -> str:
    store = node.open_store("")
    store.check()
    return store.location


def _work_dir(node: Node) -> Check:
    kind, where = _file_system(node.config.work_dir), node.config.work_dir
    ok = kind == _TMPFS
    hint = "set `work_dir` to a directory on tmpfs: restores stage memory pages there"
    return Check(name="work_dir", ok=ok, found=f"{where} on {kind}", hint="" if ok else hint, required=False)


def _file_system(path: Path) -> str:
    mounts = [line.split()[1:3] for line in _lines("/proc/self/mounts")]
    fitting = [(where, kind) for where, kind in mounts if path.is_relative_to(where)]
    return max(fitting, key=lambda mount: len(mount[0]))[1]


def _room(node: Node) -> Check:
    room, load = node.host.room(node.config.work_dir), node.host.load()
    found = f"{room >> 20} MiB in work_dir, {load.memory_available >> 20} MiB of memory available"
    ok = room > 64 << 20
    return Check(name="room for restores", ok=ok, found=found, hint="" if ok else "make the tmpfs larger", required=False)


def _bus(connected: bool | None, url: str) -> Check:
    if connected is None:
        hint = "set `url` in [bus] for commands from JetStream; gRPC works without"
        return Check(name="event stream", ok=False, found="not configured", hint=hint, required=False)
    hint = "" if connected else "is nats-server running, with JetStream (-js)?"
    return Check(name="event stream", ok=connected, found=url if connected else f"no connection to {url}", hint=hint)


def _watchdog(node: Node) -> Check:
    try:
        pid = locks.holder(node.config.state_dir / "watchdog.lock")
    except PermissionError as e:
        return Check(name="watchdog", ok=False, found=f"cannot be seen: {e}", hint="CAP_SYS_PTRACE", required=False)
    hint = "systemctl enable --now hibernode-watchdog: should this daemon hang, it lets frozen workloads go"
    return Check(
        name="watchdog", ok=bool(pid), found=f"pid {pid}" if pid else "none runs", hint="" if pid else hint, required=False
    )


def _containers(node: Node) -> Iterator[Check]:
    """None of them is needed on a node without pods."""
    cri, runc = node.workloads.runtimes()
    address, program = node.config.containers.cri, node.config.containers.runc
    nobody = f"nobody answers at {address}" if address else "not configured"
    hint = "" if cri else "for pods: is containerd up, and is `containers.cri` its socket?"
    yield Check(name="container runtime", ok=bool(cri), found=cri or nobody, hint=hint, required=False)
    hint = "" if runc else "for pods and containers: install runc, or set `containers.runc`"
    yield Check(name="runc", ok=bool(runc), found=runc or f"no {program} that could be run", hint=hint, required=False)
    yield _cluster(node)
    where, writable = _freezers()
    hint = "" if writable else "the daemon must see the machine's cgroups, writable: the containers of a pod are frozen by them"
    yield Check(name="cgroup freezer", ok=writable, found=where or "not mounted", hint=hint, required=False)


def _cluster(node: Node) -> Check:
    """A node of no cluster restores pods that somebody else makes."""
    try:
        found, hint = node.workloads.cluster(), ""
    except HibernodeError as e:
        return Check(name="Kubernetes", ok=False, found=e.message, hint=e.hint, required=False)
    if not found:
        hint = "for a node of a cluster: `kubernetes.api_server`, in a pod a mounted service account's token"
    return Check(name="Kubernetes", ok=bool(found), found=found or "no API server is configured", hint=hint, required=False)


def _freezers() -> tuple[str, bool]:
    """Where cgroups are frozen, v1's hierarchy before v2's, and whether that can be written to."""
    mounts = [line.split()[1:4] for line in _lines("/proc/self/mounts")]
    v1 = [mount for mount in mounts if mount[1] == "cgroup" and "freezer" in mount[2].split(",")]
    for where, _, options in (*v1, *(mount for mount in mounts if mount[1] == "cgroup2")):
        return where, "rw" in options.split(",") and os.access(where, os.W_OK)
    return "", False


_NVML_HINTS = {
    "bindings": "install hibernode with its extra `gpu`: pip install 'hibernode[gpu]'",
    "library": "it comes with the driver (into a container with NVIDIA_DRIVER_CAPABILITIES=utility), or set `gpu.nvml`",
    "mismatch": "the driver was replaced: restart this daemon; reboot, if the kernel still has the old one",
    "unloaded": "modprobe nvidia; does dmesg say why it is not there?",
    "silent": "a GPU may be lost: dmesg | grep -i xid",
}


def _gpus(found: GpuInventory) -> Iterator[Check]:
    """No GPU is no defect. What a GPU does not tell is said, and never guessed."""
    driver = f"{found.driver}, CUDA {found.cuda}" if found.cuda else found.driver
    hint = "" if found.known else _NVML_HINTS.get(found.state, "does nvidia-smi say more?")
    said = "; ".join(part for part in (driver, found.reason) if part)
    yield Check(name="GPU driver", ok=found.known, found=said, hint=hint, required=False)
    if found.state == "absent":
        return
    yield Check(name="GPUs", ok=found.known, found=_listed(found.gpus), hint=hint, required=False)
    faults: dict[tuple[str, str], list[str]] = {}
    for gpu in found.gpus if found.known else []:
        for fault in _faults(gpu):
            faults.setdefault(fault, []).append(str(gpu.index))
    for (what, mend), those in faults.items():
        yield Check(name="GPU condition", ok=False, found=f"{', '.join(those)}: {what}", hint=mend, required=False)
    if found.known and not faults:
        yield Check(name="GPU condition", ok=True, found="nothing against them", required=False)


def _listed(gpus: Sequence[Gpu]) -> str:
    """`8 × NVIDIA H100, 12 of 640 GiB used, 3 processes`, as far as it is known."""
    counts = Counter(gpu.name or "unknown GPU" for gpu in gpus)
    parts = [f"{count} × {name}" for name, count in counts.items()] or ["none"]
    memory = [(gpu.memory_used, gpu.memory_total) for gpu in gpus if gpu.memory_used is not None and gpu.memory_total is not None]
    if memory:
        used, total = (sum(column) >> 20 for column in zip(*memory, strict=True))
        parts.append(f"{used} of {total} MiB used")
    processes = [gpu.processes for gpu in gpus if gpu.processes is not None]
    if processes:
        parts.append(f"{sum(processes)} {'process' if sum(processes) == 1 else 'processes'}")
    silent = Counter(name for gpu in gpus for name in gpu.unknown)
    if silent:
        parts.append(f"not told: {', '.join(silent)}")
    return ", ".join(parts)


def _faults(gpu: Gpu) -> Iterator[tuple[str, str]]:
    """What this GPU has against a checkpoint or a restore, each with how to mend it."""
    if gpu.mig:
        yield "MIG is on: the driver saves no process that uses a part of a GPU", "nvidia-smi -mig 0, if nothing needs it"
    if gpu.mps_processes:
        yield "a process uses it through MPS: the driver saves none of these", "echo quit | nvidia-cuda-mps-control"
    if gpu.compute_mode == "prohibited":
        yield "its compute mode is prohibited: nothing can run on it", "nvidia-smi -c DEFAULT"
    if gpu.persistence is False:
        yield "persistence is off: the driver sleeps while nothing uses it", "systemctl enable --now nvidia-persistenced"
    if gpu.ecc_uncorrected:
        yield "uncorrected memory errors: a checkpoint may hold what they damaged", "nvidia-smi -q -d ECC shows them"
    if gpu.rows_pending:
        yield "rows of its memory wait to be remapped", "nvidia-smi -r, when nothing uses it"
    if gpu.rows_failed:
        yield "rows of its memory could not be remapped", "have it replaced"


def _kernel() -> Iterator[Check]:
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = thp.read_text().strip() if thp.exists() else "[never]"
    ok = "[never]" not in mode
    hint = "" if ok else "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: pauses are three times longer without"
    yield Check(name="transparent huge pages", ok=ok, found=mode, hint=hint, required=False)
    disabled = Path("/proc/sys/kernel/io_uring_disabled")
    uring = disabled.read_text().strip() if disabled.exists() else "0"
    found = {"0": "allowed", "1": "restricted", "2": "disabled"}.get(uring, uring)
    yield Check(name="io_uring", ok=True, found=f"{found}; workloads that use it are refused", required=False)


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
