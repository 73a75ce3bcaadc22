"""Memory is bounded whatever the workload: three gigabytes through an arena of half of one, in a cgroup that has little more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hibernode.transfer.send import memory_bound
from tests.daemon import Daemon, ready
from tests.node.memory_group import MemoryGroup
from tests.node.workload import Program, checkpointed, goes_on, python

pytestmark = pytest.mark.node

MIB = 1 << 20
ARENA, BESIDE, WORKLOAD = 512 * MIB, 200 * MIB, 3072 * MIB
STREAMS = 2


def status(pid: int, key: str) -> int:
    """Bytes of one line of /proc/<pid>/status."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def test_three_gigabytes_through_an_arena_of_half_a_gigabyte(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Daemon and CRIU together fit, page cache and small images included; what the daemon needs is what `memory_bound` says."""
    store = f"file://{tmp_path}/store"
    with Program(tmp_path, python("memory.py", "large", WORKLOAD // MIB, 0.05)) as program:
        before = program.beat()
        with (
            MemoryGroup("hibernode-bound", ARENA + BESIDE) as group,
            Daemon(store=store, arena=f"{ARENA // MIB}MiB", join=[group.procs]) as limited,
        ):
            assert str(limited.pid) in group.procs.read_text().split()
            interpreter = status(limited.pid, "VmRSS") - ARENA
            done = checkpointed(limited, program, streams=STREAMS)
            needed = status(limited.pid, "VmHWM") - interpreter
            figures = {"interpreter": interpreter, "needed": needed, "group_peak": group.peak, "pause_ns": done.profile.pause_ns}
            assert group.oom_kills == 0
        segments = done.profile.raw_bytes // (16 << 10)  # more than there are: large mappings come in segments of a megabyte
        bound = memory_bound(ARENA, STREAMS, parts_in_flight=0, part_size=0, segments=segments, frames=WORKLOAD >> 22)
        for name, figure in (figures | {"bound": bound}).items():
            record_property(name, figure)
            print(name, figure)
        assert done.profile.raw_bytes > WORKLOAD
        assert needed <= bound
        assert interpreter + bound < ARENA + BESIDE, "else the limit would show nothing"

        with Daemon(store=store) as unlimited:
            ready(unlimited.restore(done.checkpoint_id))
            goes_on(program, before)
