"""What CRIU's images say, read without CRIU: who the tasks are; and images that say nothing are Corrupt."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from pycriu.images import core_pb2, magic, pstree_pb2

from hibernode.children import Children
from hibernode.drivers.criu import Criu
from hibernode.errors import Corrupt
from hibernode.model import TaskFacts

ALIVE, DEAD, STOPPED = 1, 2, 3


@pytest.fixture
def criu(tmp_path: Path) -> Criu:
    return Criu("/nowhere/criu", Children(), tmp_path / "plugins")


def image(kind: str, *entries: bytes) -> bytes:
    head = struct.pack("<II", magic.by_name["IMG_COMMON"], magic.by_name[kind])
    return head + b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)


def dumped(directory: Path) -> None:
    """A root with a thread, a zombie as CRIU writes it, and a helper, which has no core."""
    tree = [(7, 0, [7, 9]), (8, 7, [0xF0042BC0]), (10, 7, [10])]
    (directory / "pstree.img").write_bytes(
        image(
            "PSTREE",
            *(pstree_pb2.pstree_entry(pid=p, ppid=pp, pgid=7, sid=7, threads=t).SerializeToString() for p, pp, t in tree),
        )
    )
    for pid, comm, state in ((7, "train", STOPPED), (8, "ended", DEAD)):
        core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
        core.tc.task_state, core.tc.comm = state, comm
        (directory / f"core-{pid}.img").write_bytes(image("CORE", core.SerializePartialToString()))


def test_the_tasks_of_an_image(criu: Criu, tmp_path: Path) -> None:
    dumped(tmp_path)
    assert criu.tasks(tmp_path) == [
        TaskFacts(pid=7, comm="train", threads=[9]),
        TaskFacts(pid=8, ppid=7, comm="ended", dead=True),
        TaskFacts(pid=10, ppid=7),
    ]


@pytest.mark.parametrize("name", ["pstree.img", "core-7.img"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:3],
        lambda data: b"\0" * len(data),
        lambda data: data[:12] + b"\xff" * (len(data) - 12),
    ],
)
def test_images_that_cannot_be_read_are_corrupt(criu: Criu, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    dumped(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Corrupt):
        criu.tasks(tmp_path)
