"""The machine: /proc, uname, statvfs."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from pathlib import Path

from hibernode import __version__
from hibernode.model import HostFacts
from hibernode.ports import Load


class LinuxHost:
    """ports.Host."""

    def facts(self) -> HostFacts:
        uname = os.uname()
        return HostFacts(
            arch=uname.machine,
            kernel=uname.release,
            page_size=os.sysconf("SC_PAGE_SIZE"),
            criu_version=0,
            cpu_model=_of_cpu("model name"),
            cpu_flags=_of_cpu("flags").split(),
            hibernode=__version__,
        )

    def load(self) -> Load:
        memory = _meminfo()
        return Load(
            cpus=os.cpu_count() or 1,
            memory_total=memory.get("MemTotal", 0),
            memory_available=memory.get("MemAvailable", 0),
            load=os.getloadavg()[0],
        )

    def memory_room(self, pid: int) -> int:
        room = _meminfo().get("MemAvailable", 0)
        for place in _memory_groups(pid):
            limit = _number(place, "memory.max", "memory.limit_in_bytes")
            used = _number(place, "memory.current", "memory.usage_in_bytes")
            if limit is not None and used is not None:
                room = min(room, limit - used + _given_way(place))
        return max(0, room)

    def lacks_pages(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/smaps", "rb") as file:
                return any(line.startswith(b"VmFlags:") and b"um" in line.split() for line in file)
        except (FileNotFoundError, ProcessLookupError):
            return False

    def room(self, path: Path) -> int:
        while not path.exists():
            path = path.parent
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


def _memory_groups(pid: int) -> list[Path]:
    """The memory cgroup that it is in and those above, of either version; where there are none, none."""
    try:
        lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    except OSError:
        return []
    for _, controllers, path in sorted(lines, key=lambda line: "memory" not in line[1].split(",")):
        for mount in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
            place = mount / path.strip("/")
            places = [place, *(above for above in place.parents if above.is_relative_to(mount))]
            if (not controllers or "memory" in controllers.split(",")) and any(map(_has_limit, places)):
                return places  # one below may have no files of its own, in version 2, and is bounded all the same
    return []


def _has_limit(place: Path) -> bool:
    return any((place / name).exists() for name in ("memory.max", "memory.limit_in_bytes"))


def _number(place: Path, *names: str) -> int | None:
    """Of the first of these files that is there; None if none has a number (`max`)."""
    for name in names:
        try:
            return int((place / name).read_text())
        except (OSError, ValueError):
            continue
    return None


def _given_way(place: Path) -> int:
    """Page cache that a process which needs memory gets at once."""
    try:
        lines = (place / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    numbers = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}


def _of_cpu(field: str) -> str:
    """Of the first CPU: Linux wants them all alike, and leaves out of `flags` what one of them has not."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


_NEWNET = 0x40000000  # <linux/sched.h>
_libc = ctypes.CDLL(None, use_errno=True)


def on_node(address: str, network: str = "/proc/1/ns/net") -> socket.socket:
    """A TCP socket that listens at `address` (host:port, IPv4) in the machine's own network, also where this process has another one: that
    of a pod. `network` is the machine's: process 1's, where the pod has the machine's pids. OSError."""
    host, _, port = address.rpartition(":")
    made: list[socket.socket] = []
    failed: list[Exception] = []

    def make() -> None:
        try:
            _join(network)
            made.append(socket.create_server((host, int(port))))
        except (OSError, OverflowError) as e:
            failed.append(e)

    thread = threading.Thread(target=make, name="network of the node")  # which ends with it: a thread has one network
    thread.start()
    thread.join()
    for error in failed:
        raise OSError(f"{address}: {error}") from error
    return made[0]


def _join(place: str) -> None:
    """This thread, and whatever it opens from now on. Where we may not even look, this is no pod of ours, which is privileged: then the
    network is the one that we have."""
    try:
        same = os.stat(place).st_ino == os.stat("/proc/thread-self/ns/net").st_ino
    except PermissionError:
        return
    if same:
        return
    network = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(network, _NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot join the network of the machine: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(network)
