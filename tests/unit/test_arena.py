"""The arena as the kernel sees it."""

from __future__ import annotations

import re
from pathlib import Path

from hibernode.transfer.arena import Arena


def test_a_core_dump_of_the_daemon_holds_nothing_of_the_arena() -> None:
    """`dd` in VmFlags is MADV_DONTDUMP: what the arena holds is other people's memory."""
    size = 48 << 20  # no other mapping has it
    arena = Arena(size)
    assert arena.total_bytes == size
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    (flags,) = [re.search(r"^VmFlags: (.*)$", m, re.MULTILINE) for m in mappings if f"Size:{size >> 10:>19} kB" in m]  # fmt: skip
    assert flags is not None
    assert "dd" in flags[1].split()
