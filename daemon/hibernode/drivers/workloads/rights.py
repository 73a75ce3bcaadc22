"""What an image may have in the container that it comes back in: no more than that container's own specification gives. Pure.

CRIU gives every task the credentials that the image has, and makes its mounts, as root; the specification (OCI, config.json) is what the
new pod's owner may have, and what admission has looked at. So they are compared before runc is asked.

What is not compared, because nobody can from outside: which seccomp filter a task has (only that it has one), what lies in the tmpfs
mounts of the image (files of the container's own, device nodes among them: the devices cgroup of the new container says whether they can
be opened), and the memory. An image whose maker is not trusted is refused by its signature.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hibernode.errors import Refused
from hibernode.ports import Demands, MountFacts, TaskRights

# include/uapi/linux/capability.h, in its order
_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
    "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE",
    "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ",
    "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)  # fmt: skip
CAPABILITIES = {f"CAP_{name}": 1 << bit for bit, name in enumerate(_NAMES)}
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}  # of mount(2)
_KERNEL = {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}  # none of them has a source on the machine
_BOUND = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty")}
_DEVICES = _BOUND | {"/dev/console", "/dev/ptmx"}  # every container's


def insist_within(name: str, spec: Mapping[str, Any], wants: Demands) -> None:
    """Refused("privileges") for the first task, mount or device of container `name` that the specification does not give, and
    Refused("container_mounts") for a mount from outside that it has not."""
    for task in wants.tasks:
        _task(name, spec, task)
    _mounts(name, spec, wants.mounts)
    if not _bounding(spec) & CAPABILITIES["CAP_SYS_ADMIN"]:
        given = {str(device.get("path")) for device in (spec.get("linux") or {}).get("devices") or ()}
        for path in wants.devices:
            if path not in _DEVICES | given and not path.startswith("/dev/pts/"):
                raise _refused(name, "an open device", path, "one that every container has, or its specification gives")


def _refused(name: str, prop: str, found: object, wanted: object) -> Refused:
    return Refused(
        "privileges", f"the checkpoint of container {name!r} has more than the new container may have: {prop} {found}", prop=prop,
        found=found, wanted=wanted, hint="give the new pod the security context, volumes and devices that the old one had",
    )  # fmt: skip


def _task(name: str, spec: Mapping[str, Any], task: TaskRights) -> None:
    """A container of root may become whoever its capabilities let it. One that is not root stays who it is: also where a program with
    setuid has made it root, because nobody sees in an image how that came."""
    process = spec.get("process") or {}
    user, bounding = process.get("user") or {}, _bounding(spec)
    uid, gid = int(user.get("uid", 0)), int(user.get("gid", 0))
    gids = {gid, *map(int, user.get("additionalGids") or ())}
    capabilities = process.get("capabilities") or {}
    own = bounding if uid == 0 else _bits(capabilities.get("permitted")) | _bits(capabilities.get("ambient"))
    filtered, no_new = bool((spec.get("linux") or {}).get("seccomp")), bool(process.get("noNewPrivileges"))
    label = str(process.get("apparmorProfile") or process.get("selinuxLabel") or "")
    for prop, found, wanted, ok in (
        ("uid", sorted(task.uids), uid, task.uids <= {uid} or (uid == 0 and bounding & CAPABILITIES["CAP_SETUID"])),
        ("gid", sorted(task.gids), sorted(gids), task.gids <= gids or (uid == 0 and bounding & CAPABILITIES["CAP_SETGID"])),
        ("capabilities", _named(task.permitted), _named(own), not task.permitted & ~own),
        ("bounding capabilities", _named(task.bounding), _named(bounding), not task.bounding & ~bounding),
        ("seccomp", "none", "a filter", task.filtered or not filtered),
        ("no_new_privs", task.no_new_privs, no_new, task.no_new_privs or not no_new),
        ("label", task.label or "none", label or "none", task.label == label or (not task.label and label == "unconfined")),
    ):
        if not ok:
            raise _refused(name, f"{prop} of task {task.pid}", found, wanted)


def _bounding(spec: Mapping[str, Any]) -> int:
    return _bits(((spec.get("process") or {}).get("capabilities") or {}).get("bounding"))


def _bits(names: Collection[str] | None) -> int:
    return sum(CAPABILITIES.get(name, 0) for name in set(names or ()))


def _named(bits: int) -> str:
    known = [name for name, bit in CAPABILITIES.items() if bits & bit]
    more = bits & ~sum(CAPABILITIES.values())
    return ", ".join([*known, *([hex(more)] if more else [])]) or "none"


def _mounts(name: str, spec: Mapping[str, Any], mounts: Collection[MountFacts]) -> None:
    linux, root = spec.get("linux") or {}, spec.get("root") or {}
    masked, readonly = set(linux.get("maskedPaths") or ()), set(linux.get("readonlyPaths") or ())
    given = {str(mount["destination"]).rstrip("/"): mount for mount in spec.get("mounts") or ()}
    groups = [place for place, mount in given.items() if mount.get("type") in ("cgroup", "cgroup2")]
    may_mount = bool(_bounding(spec) & CAPABILITIES["CAP_SYS_ADMIN"])  # it could have done all of it by itself
    devices = _bound_devices(linux)
    for mount in mounts:
        if mount.key == mount.place and mount.place in devices and mount.place not in given:
            continue
        below_groups = any(mount.place.startswith(f"{place}/") for place in groups)
        if mount.key and mount.key not in given and not below_groups and not (mount.key == "/dev/null" and mount.place in masked):
            raise Refused(
                "container_mounts", f"the checkpoint of container {name!r} has a mount at {mount.place}, and the new one has not",
                prop="mounts", found="none", wanted=mount.place, hint="give the new container the volumes that the old one had",
            )  # fmt: skip
        of = given.get(mount.key) or given.get(mount.place)  # a place may have been reached by a link
        if mount.place == "/":
            wanted = {"ro"} if root.get("readonly") else set()
        elif mount.place in readonly or below_groups:
            wanted = {"ro"} if mount.place in readonly or "ro" in _options(given, groups, mount.place) else set()
        elif of is not None:
            tmpfs_of_v1 = of.get("type") == "cgroup" and mount.kind == "tmpfs"  # runc makes it anew each time
            wanted = set() if tmpfs_of_v1 else set(of.get("options") or ()) & _FLAGS.keys()
        elif mount.place in masked or mount.place == "/dev/console" or may_mount:
            wanted = set()
        else:
            raise _refused(name, "a mount", f"{mount.kind} at {mount.place}", "one of its specification")
        own = not mount.key and mount.place != "/"
        if own and mount.kind not in _KERNEL and not may_mount:
            raise _refused(name, "a mount", f"{mount.kind} at {mount.place}", "a file system without a source")
        if missing := [flag for flag in sorted(wanted) if not mount.flags & _FLAGS[flag]]:
            raise _refused(name, f"mount {mount.place}", f"without {', '.join(missing)}", ", ".join(sorted(wanted)))
    there = {mount.place for mount in mounts}
    for path in sorted((masked | readonly) - there):
        if path.startswith(("/proc/", "/sys/")) and _is_there(path):  # runc leaves out what the machine has not
            raise _refused(name, f"mount {path}", "none", "masked" if path in masked else "read-only")


def _bound_devices(linux: Mapping[str, Any]) -> set[str]:
    """In a user namespace nobody makes device nodes: runc mounts those of the machine, each at its own path, in the new container too."""
    if not any(space.get("type") == "user" for space in linux.get("namespaces") or ()):
        return set()
    return _BOUND | {str(device.get("path")) for device in linux.get("devices") or ()}


def _options(given: Mapping[str, Mapping[str, Any]], groups: Collection[str], place: str) -> set[str]:
    return {option for group in groups if place.startswith(f"{group}/") for option in given[group].get("options") or ()}


def _is_there(path: str) -> bool:
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) or stat.S_ISREG(mode)
