"""What CRIU's images say, read without CRIU: who the tasks are; and images that say nothing are Corrupt. And workers that hang."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pycriu.images import core_pb2, fdinfo_pb2, ghost_file_pb2, magic, mnt_pb2, pstree_pb2, regfile_pb2

from hibernode.children import Children
from hibernode.drivers.criu import Criu
from hibernode.errors import Corrupt, DumpFailed, Refused, RestoreFailed
from hibernode.model import Cancel, TaskFacts
from hibernode.ports import CriuOptions, MountFacts, Prepared
from tests import keeper

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


# --- workers that hang ------------------------------------------------------------------------------------------------------------

PATIENCE = 0.2
# Takes the request and never answers; says its pid first. `stop`: it waits for a child that is stopped until somebody lets it go on.
WORKER = """#!{python} -SE
import os, signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
peer = socket.socket(fileno=int(sys.argv[2]))
child = os.fork() if {stop} else -1
if child > 0:
    os.waitpid(child, 0)
    sys.exit(1)
open({pid!r}, "w").write(str(os.getpid()) + " ")
if not child:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
peer.recv(1 << 20)
while True:
    signal.pause()
"""


def worker(directory: Path, patience: float = PATIENCE, *, stop: bool = False) -> tuple[Criu, Path]:
    """A driver whose CRIU hangs, and where that writes its pid."""
    program, pid = directory / "criu", directory / "pid"
    program.write_text(WORKER.format(python=sys.executable, pid=str(pid), stop=stop))
    program.chmod(0o700)
    return Criu(str(program), Children(), directory / "plugins", patience), pid


def cancel_when_it_hangs(pid: Path, cancel: Cancel, state: str) -> threading.Thread:
    def hangs() -> bool:
        return pid.exists() and pid.read_text().endswith(" ") and keeper.state(int(pid.read_text())) == state

    def wait() -> None:
        try:
            keeper.wait_until(hangs, 20, "a worker that hangs")
        finally:
            cancel.set("enough")

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def dump(criu: Criu, directory: Path, cancel: Cancel) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        criu.dump(1, directory, theirs, CriuOptions(), cancel)


def restore(criu: Criu, directory: Path, cancel: Cancel) -> None:
    criu.restore(directory, CriuOptions(), Prepared(), cancel)


def demanding(directory: Path) -> None:
    """A tree with a thread that may more than its process, two mounts, a device that is open and one that was deleted."""
    entry = pstree_pb2.pstree_entry(pid=7, ppid=0, pgid=7, sid=7, threads=[7, 9])
    (directory / "pstree.img").write_bytes(image("PSTREE", entry.SerializeToString()))
    for pid, uid, bits in ((7, 0, [3, 0]), (9, 1000, [1, 256])):
        core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
        creds = core.thread_core.creds
        for name in ("uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid"):
            setattr(creds, name, uid)
        creds.groups.append(5)
        creds.cap_prm.extend(bits)
        creds.cap_bnd.extend([7, 0])
        creds.no_new_privs = 1
        if pid == 7:
            core.thread_core.seccomp_mode = core_pb2.filter
        (directory / f"core-{pid}.img").write_bytes(image("CORE", core.SerializePartialToString()))
    mounts = [
        mnt_pb2.mnt_entry(fstype=mnt_pb2.PROC, mountpoint="/proc", flags=6, sb_flags=1),
        mnt_pb2.mnt_entry(mountpoint="/data", ext_key="/data", flags=1),
    ]
    (directory / "mountpoints-13.img").write_bytes(image("MNTS", *(mount.SerializePartialToString() for mount in mounts)))
    files = [
        fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=n, reg=regfile_pb2.reg_file_entry(name=name, mode=mode))
        for n, (name, mode) in enumerate((("/bin/train", 0o100755), ("/dev/sda", stat.S_IFBLK | 0o600)))
    ]
    (directory / "files.img").write_bytes(image("FILES", *(file.SerializePartialToString() for file in files)))
    ghost = ghost_file_pb2.ghost_file_entry(mode=stat.S_IFCHR | 0o666).SerializePartialToString()
    (directory / "ghost-file-1.img").write_bytes(image("GHOST_FILE", ghost) + b"what was in it")


def test_what_an_image_would_have_of_the_machine(criu: Criu, tmp_path: Path) -> None:
    demanding(tmp_path)
    found = criu.demands(tmp_path)
    main, thread = found.tasks
    assert (main.pid, main.uids, main.gids) == (7, {0}, {0, 5})
    assert (main.permitted, main.bounding, main.filtered, main.no_new_privs) == (3, 7, True, True)
    assert (thread.pid, thread.uids, thread.permitted, thread.filtered) == (9, {1000}, 1 | 1 << 40, False)
    assert found.mounts == [MountFacts("/proc", "proc", "", 7), MountFacts("/data", "unsupported", "/data", 1)]
    assert found.devices == ["/dev/sda", "deleted"]


@pytest.mark.parametrize("name", ["pstree.img", "core-9.img", "mountpoints-13.img", "files.img", "ghost-file-1.img"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:10], lambda data: b"\0" * len(data), lambda data: data[:12] + b"\xff" * 30]
)
def test_images_that_do_not_say_what_they_would_have_are_corrupt(
    criu: Criu, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    demanding(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(Corrupt):
        criu.demands(tmp_path)


def test_a_thread_that_does_not_say_whose_it_is_is_corrupt(criu: Criu, tmp_path: Path) -> None:
    demanding(tmp_path)
    core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    (tmp_path / "core-9.img").write_bytes(image("CORE", core.SerializePartialToString()))
    with pytest.raises(Corrupt):
        criu.demands(tmp_path)


def test_what_a_worker_has_forked_is_killed_with_it(tmp_path: Path) -> None:
    (criu, pid), cancel = worker(tmp_path, stop=True), Cancel()
    cancelling = cancel_when_it_hangs(pid, cancel, "T")
    with pytest.raises(RestoreFailed):
        restore(criu, tmp_path, cancel)
    cancelling.join()
    keeper.wait_until(lambda: not keeper.alive(int(pid.read_text())), 20, "the end of its child")


@pytest.mark.parametrize(("act", "error", "least"), [(dump, DumpFailed, PATIENCE), (restore, RestoreFailed, 0.0)])
def test_a_worker_that_hangs_is_killed(
    tmp_path: Path, act: Callable[[Criu, Path, Cancel], None], error: type[Exception], least: float
) -> None:
    """One that dumps after its patience; one that restores at once, because what it has made is killed anyway."""
    (criu, pid), cancel, threads = worker(tmp_path), Cancel(), set(threading.enumerate())
    cancelling = cancel_when_it_hangs(pid, cancel, "S")
    began = time.monotonic()
    with pytest.raises(error):
        act(criu, tmp_path, cancel)
    assert time.monotonic() - began >= least
    cancelling.join()
    assert not set(threading.enumerate()) - threads
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_worker_that_is_stopped_is_let_go_on(tmp_path: Path) -> None:
    """And what it has forked: it ends by itself, long before a patience that would kill it."""
    (criu, pid), cancel = worker(tmp_path, patience=1000, stop=True), Cancel()
    cancelling = cancel_when_it_hangs(pid, cancel, "T")
    with pytest.raises(DumpFailed):
        dump(criu, tmp_path, cancel)
    cancelling.join()


def test_what_a_dead_daemons_worker_has_left_goes_on(tmp_path: Path) -> None:
    """Only what has something of that action open, and only CRIU's."""
    mine, others = tmp_path / "mine" / "main", tmp_path / "others" / "main"
    program, stranger = tmp_path / "criu", tmp_path / "stranger"
    for each in (program, stranger):
        shutil.copy("/bin/sleep", each)
    left = []
    for argv, place in ((program, mine), (program, others), (stranger, mine)):
        place.mkdir(parents=True, exist_ok=True)
        directory = os.open(place, os.O_DIRECTORY)
        left.append(subprocess.Popen([argv, "60"], pass_fds=[directory]))
        os.close(directory)
    try:
        for each in left:
            each.send_signal(signal.SIGSTOP)
            keeper.wait_until(lambda each=each: keeper.state(each.pid) == "T", 10, "a stopped process")
        criu = Criu(str(program), Children(), tmp_path)
        going = threading.Thread(target=criu.let_go, args=[tmp_path / "mine"])
        going.start()
        keeper.wait_until(lambda: keeper.state(left[0].pid) == "S", 10, "a worker that goes on")
        going.join()
        assert left[0].wait(10) == -signal.SIGKILL, "it holds nobody, and does not end"
        assert [keeper.state(each.pid) for each in left[1:]] == ["T", "T"]
    finally:
        for each in left:
            each.kill()
            each.wait()


@pytest.mark.parametrize("made", [False, True])  # none could be made; one was, and nobody gets in
def test_a_keeper_that_has_no_cgroup_of_its_own_begins_nothing(tmp_path: Path, made: bool) -> None:
    (tmp_path / "file").touch()
    own = [str(tmp_path / "file" / "cgroup.procs")] if made else []
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as memory:
        kept = Criu("/nowhere/criu", Children(), tmp_path / "plugins").keeper(theirs, memory.fileno())
        try:
            with pytest.raises(Refused) as refused:
                kept.begin(tmp_path, tmp_path / "table", [str(tmp_path / "cgroup.procs")], own)
        finally:
            kept.close()
    assert refused.value.code == "lazy_cgroup"
