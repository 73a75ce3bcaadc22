"""Memory of every shape comes back byte for byte, in the process that had it."""

from __future__ import annotations

import os
import random
import signal
import zlib
from pathlib import Path

import pytest

from tests import keeper
from tests.daemon import Daemon, ready
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Program, checkpointed, goes_on, python

pytestmark = pytest.mark.node

PAGE = 4096


def counts(program: Program) -> list[int]:
    """What the four children and their threads have counted to."""
    return [int(word) for word in program.said("counts")[1:]]


def test_a_family_of_five_with_all_they_share(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("family.py")) as program:
        children = [int(pid) for pid in program.said("children")]
        wait_until(lambda: min(counts(program)) > 5, LIMIT, "every child and every thread to count")
        before = program.beat()
        counted = counts(program)
        done = checkpointed(daemon, program)
        ready(daemon.restore(done.checkpoint_id))

        goes_on(program, before)
        assert keeper.descendants(program.pid) == sorted(children)
        assert [len(os.listdir(f"/proc/{pid}/task")) for pid in children] == [3] * 4
        wait_until(lambda: all(new > old for new, old in zip(counts(program), counted, strict=True)), LIMIT, "all to count on")
        os.kill(program.pid, signal.SIGUSR1)
        in_pipe, in_socket, *sent = program.said("flight")
        assert [in_pipe, in_socket] == sent
        assert program.said("untouched") == [f"{3 << 20}:0", f"{5 << 20}:0"]


def test_twenty_thousand_mappings(daemon: Daemon, tmp_path: Path) -> None:
    number = 20_000
    assert int(Path("/proc/sys/vm/max_map_count").read_text()) > number + 1000
    with Program(tmp_path, python("memory.py", "mappings", number)) as program:
        before = program.beat()
        assert len(Path(f"/proc/{program.pid}/maps").read_text().splitlines()) > number
        done = checkpointed(daemon, program)
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)
        assert len(Path(f"/proc/{program.pid}/maps").read_text().splitlines()) > number


def test_zero_pages_are_counted_not_stored_and_come_back(daemon: Daemon, tmp_path: Path) -> None:
    half = 32 << 20
    with Program(tmp_path, python("memory.py", "half-zero", 64)) as program:
        before = program.beat()
        assert int(before.content[1]) == 2 * half + PAGE, "an odd number of pages"
        done = checkpointed(daemon, program, compression="none")
        assert half <= done.profile.zero_bytes < half + (4 << 20)
        assert done.profile.stored_bytes < done.profile.raw_bytes - half + (1 << 20)
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)


def test_a_page_of_zeros_over_a_file_is_not_the_file_s_page(daemon: Daemon, tmp_path: Path) -> None:
    """A zero page that was left out would come back as what the file holds there."""
    content = random.Random(1).randbytes(1 << 20)
    (tmp_path / "file").write_bytes(content)
    zeroed = content[: 7 * PAGE] + bytes(PAGE) + content[8 * PAGE : 9 * PAGE] + b"dirty" + content[9 * PAGE + 5 :]
    with Program(tmp_path, python("memory.py", "file", tmp_path / "file")) as program:
        before = program.beat()
        assert before.content == (str(zlib.crc32(zeroed)), str(1 << 20))
        done = checkpointed(daemon, program)
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)
        assert (tmp_path / "file").read_bytes() == content
