"""What this machine can do, check by check, each with how to mend it. Looks only, changes nothing but a probe object in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from hibernode import locks
from hibernode.config import without_secrets
from hibernode.errors import HibernodeError
from hibernode.model import Check
from hibernode.node import Node

_PTRACE, _RESOURCE, _RESTORE = 19, 24, 40  # include/uapi/linux/capability.h
_TMPFS = "tmpfs"


def checks(node: Node, *, bus_connected: bool | None) -> list[Check]:
    """All of them. `bus_connected` None: there is no bus by configuration."""
    return [
        *_capabilities(),
        _tried("criu", lambda: f"{node.criu.facts().path}, version {node.criu.facts()}"),
        _criu_check(node),
        _work_dir(node),
        _tried("store", lambda: _store(node)),
        _room(node),
        _bus(bus_connected, without_secrets(node.config.bus.url)),
        _watchdog(node),
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
