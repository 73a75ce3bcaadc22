"""Memory is bounded whatever the size of the workload: three gigabytes through an arena of half of one, in a cgroup that has no more."""

from __future__ import annotations

import re
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


def test_three_gigabytes_through_an_arena_of_half_a_gigabyte(tmp_path: Path, record_property: pytest.FixtureRequest) -> None:
    store = f"file://{tmp_path}/store"
    with Program(tmp_path, python("memory.py", "large", WORKLOAD // MIB, 0.05)) as program:
        before = program.beat()
        with MemoryGroup("hibernode-bound", ARENA + BESIDE) as group:
            with Daemon(store=store, arena=f"{ARENA // MIB}MiB", join=[group.procs]) as limited:
                idle = status(limited.pid, "VmRSS")
                done = checkpointed(limited, program, streams=STREAMS)
                peak, hidden = status(limited.pid, "VmHWM"), group.oom_kills
                print(f"idle {idle >> 20} MiB, peak {peak >> 20} MiB, cgroup {group.peak >> 20} of {(ARENA + BESIDE) >> 20} MiB")
                print(done.profile)
        assert hidden == 0
        assert done.profile.raw_bytes > WORKLOAD
        bound = memory_bound(ARENA, STREAMS, parts_in_flight=0, part_size=0, segments=done.profile.raw_bytes // (16 << 10))
        assert peak - (idle - ARENA) <= bound

        with Daemon(store=store) as unlimited:
            ready(unlimited.restore(done.checkpoint_id))
            goes_on(program, before)
