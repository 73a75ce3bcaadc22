"""The machine: /proc, uname, statvfs."""

from __future__ import annotations

import os
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
            cpu_model=_cpu_model(),
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

    def room(self, path: Path) -> int:
        while not path.exists():
            path = path.parent
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""
