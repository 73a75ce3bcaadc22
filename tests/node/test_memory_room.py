"""How much memory a process may still take: in real cgroups of whichever version limits memory here, and in made-up files of version 2
behind a real group's name, mounted where a machine has them."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from hibernode.drivers.host import LinuxHost
from tests.keeper import wait_until
from tests.node.memory_group import MemoryGroup

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.node, pytest.mark.timeout(50)]

HOLDS = "import sys; held = bytearray(int(sys.argv[1])); print('there', flush=True); sys.stdin.read()"
ASKS = """\
import subprocess, sys
subprocess.run(["mount", "--bind", sys.argv[1], "/sys/fs/cgroup"], check=True)
from hibernode.drivers.host import LinuxHost
print(LinuxHost().memory_room(int(sys.argv[2])))
"""


@contextmanager
def process(size: int, procs: Path) -> Iterator[int]:
    """One that holds so many bytes, in that group from before it took them."""
    born = "import os, sys\nopen(sys.argv[1], 'w').write('0')\nos.execv(sys.executable, [sys.executable, '-c', *sys.argv[2:]])"
    argv = [sys.executable, "-c", born, str(procs), HOLDS, str(size)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == b"there\n"
        yield made.pid


def test_a_group_leaves_what_its_limit_does() -> None:
    with MemoryGroup("hibernode-room", 256 * MIB) as group, process(64 * MIB, group.procs) as pid:
        assert 128 * MIB < LinuxHost().memory_room(pid) < 192 * MIB
        assert LinuxHost().memory_room(os.getpid()) > 256 * MIB


def test_page_cache_gives_way(tmp_path: Path) -> None:
    """A file that was written counts as used, and is no less room."""
    with MemoryGroup("hibernode-room", 256 * MIB) as group, process(MIB, group.procs) as pid:
        before = LinuxHost().memory_room(pid)
        write = f"open({str(group.procs)!r}, 'w').write('0'); open({str(tmp_path / 'file')!r}, 'wb').write(bytes({96 * MIB}))"
        subprocess.run([sys.executable, "-c", write], check=True)
        (tmp_path / "file").open("rb").close()
        os.sync()
        wait_until(lambda: LinuxHost().memory_room(pid) > before - 32 * MIB, 10, "room beside what gives way")
        assert group.peak > 96 * MIB


def test_a_group_above_counts_too() -> None:
    with MemoryGroup("hibernode-room", 128 * MIB) as group:
        inside = group.procs.parent / "inside"
        inside.mkdir()
        try:
            with process(32 * MIB, inside / "cgroup.procs") as pid:
                assert 32 * MIB < LinuxHost().memory_room(pid) < 96 * MIB
        finally:
            inside.rmdir()


# --- version 2 ------------------------------------------------------------------------------------------------------------------


def room_of(directory: Path, files: Mapping[str, str], inside: str) -> int:
    """Of a process in the group `<name>/inside` of version 2, on a machine that says this in the files of `<name>` and below."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = Path(next(where for _, where, kind, *_ in mounts if kind == "cgroup2"))
    group = root / f"hibernode-test-{uuid.uuid4().hex[:8]}"
    places = [group, group / inside]
    made = directory / "sys"
    for name, text in files.items():
        (file := made / group.name / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for place in places:
        place.mkdir()
    try:
        with process(0, places[-1] / "cgroup.procs") as pid:
            argv = ["unshare", "--mount", sys.executable, "-c", ASKS, str(made), str(pid)]
            env = os.environ | {"PYTHONPATH": str(ROOT / "daemon")}
            return int(subprocess.run(argv, env=env, check=True, capture_output=True).stdout)
    finally:
        for place in reversed(places):
            place.rmdir()


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"in/memory.max": "1000\n", "in/memory.current": "300\n"}, 700),
        ({"in/memory.max": "1000\n", "in/memory.current": "900\n", "in/memory.stat": "anon 5\ninactive_file 500\n"}, 600),
        ({"in/memory.max": "1000\n", "in/memory.current": "300\n", "memory.max": "500\n", "memory.current": "400\n"}, 100),
        ({"in/memory.max": "max\n", "in/memory.current": "300\n", "memory.max": "500\n", "memory.current": "400\n"}, 100),
        ({"memory.max": "500\n", "memory.current": "400\n"}, 100),
        ({"in/memory.max": "100\n", "in/memory.current": "300\n"}, 0),
    ],
    ids=["a limit", "cache gives way", "a smaller one above", "only one above", "not counted for itself", "over it"],
)
def test_version_2(tmp_path: Path, files: dict[str, str], room: int) -> None:
    assert room_of(tmp_path, files, "in") == room


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    files = {"in/memory.max": "max\n", "in/memory.current": "300\n"}
    assert room_of(tmp_path, files, "in") > 64 * MIB, "the machine's own"
