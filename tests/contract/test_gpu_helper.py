"""The GPU helper's process and its client, without a daemon and without CRIU: who dies, stops, comes twice or finds no disk, nobody stays
suspended. On the fake driver, with the real bindings, and real signals, cgroups and mounts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hibernode import locks
from hibernode.children import Children
from hibernode.config import Gpu as Settings
from hibernode.drivers.gpu import nvidia
from hibernode.drivers.gpu.nvidia import Nvidia, Tree
from hibernode.drivers.workloads import proc
from hibernode.errors import GpuFailed, GpuWedged, Refused
from hibernode.ports import Identity, ProcessFacts
from tests import keeper
from tests.fakes.cuda import GPU0, Call, FakeGpus
from tests.gpu_jobs import Job, until

ROOT = Path(__file__).resolve().parents[2]
PAGE = os.sysconf("SC_PAGE_SIZE")
_SUBREAPER = 36  # prctl(2)
LOCK = 0.5  # seconds of patience with a lock
UNDO = 0.5  # seconds of a helper that is as impatient as a test


class Place:
    """A node's directory for its helper, clients of that, and jobs."""

    def __init__(self, root: Path, gpus: FakeGpus) -> None:
        self._root, self.gpus, self.directory = root, gpus, root / "gpu"
        self.jobs, self._trees = list[Job](), list[Tree]()
        self.directory.mkdir(mode=0o700)

    def client(self, design: str = "lock") -> Nvidia:
        """One daemon's."""
        return Nvidia(Settings(libcuda=str(self.gpus.libcuda), lock_timeout=LOCK, design=design), self.directory, Children())

    def job(self, **options: Any) -> Job:
        job = Job(self._root / f"job-{len(self.jobs)}", self.gpus.env("0"), **options)
        self.jobs.append(job)
        return job

    def tree(self, client: Nvidia | None = None, action: str = "") -> Tree:
        """Of all jobs that run now."""
        tree = (client or self.client()).find(action or str(uuid.uuid4()), self.everybody())
        self._trees.append(tree)
        return tree

    def everybody(self) -> list[ProcessFacts]:
        return [proc.facts(job.pid) for job in self.jobs if proc.state(job.pid)]

    @property
    def helper(self) -> int:
        """Its pid; 0 where there is none."""
        return locks.holder(self.directory / "lock")

    @property
    def helpers(self) -> list[int]:
        """All that have begun to serve here: exactly one may."""
        return [int(line.rpartition("pid ")[2]) for line in self._log() if "serving" in line]

    def _log(self) -> list[str]:
        log = self.directory / "log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def journal(self) -> str:
        return (self.directory / "journal").read_text()

    def begun(self, call: Call) -> bool:
        """The helper is about to make that call, or in the middle of it."""
        return f'"{call.removesuffix("e")}ing"' in self.journal

    def ends(self, helper: int) -> None:
        """A helper that this process has adopted."""
        until(lambda: bool(os.waitpid(helper, os.WNOHANG)[0]), "the helper ends")

    def leave(self) -> None:
        for tree in self._trees:
            tree.close()
        for job in self.jobs:
            job.kill()
        if helper := self.helper:
            os.kill(helper, signal.SIGKILL)
            self.ends(helper)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    gpus = FakeGpus(tmp_path / "machine")
    monkeypatch.setenv("FAKE_CUDA_ROOT", str(gpus.root))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "daemon"))
    Children().adopt_orphans()  # a helper is nobody's child, and somebody has to see it end
    made = Place(tmp_path, gpus)
    try:
        yield made
    finally:
        made.leave()
        ctypes.CDLL(None).prctl(_SUBREAPER, 0, 0, 0, 0)


def identity(job: Job) -> Identity:
    return job.pid, proc.start_time(job.pid)


def die(job: Job, *, reaped: bool) -> None:
    """Killed; a zombie, unless somebody waits for it."""
    os.kill(job.pid, signal.SIGKILL)
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        job.process.wait()


# --- a helper that does not answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "look"), [("lock", 0), ("halt", 2), ("checkpoint", 1), ("resume", 0)])
def test_a_helper_that_is_stopped_is_given_up_and_what_it_held_goes_on_when_it_does(
    place: Place, monkeypatch: pytest.MonkeyPatch, at: str, look: int
) -> None:
    """Stopped at that look at the processes, or before the question. A question of one phase is given up after its own time and a
    margin: before a watchdog, whose grace is longer than that, takes the daemon for one that hangs."""
    for name in ("_MARGIN", "_MORE", "_STOP", "_OWN"):
        monkeypatch.setattr(nvidia, name, 0.5)
    job = place.job()
    tree = place.tree(place.client("stop" if at == "halt" else "lock"))
    looks, began = 0, 0.0

    def stop() -> None:
        nonlocal began
        os.kill(place.helper, signal.SIGSTOP)
        began = time.monotonic()

    def everybody() -> Sequence[ProcessFacts]:
        nonlocal looks
        looks += 1
        if looks == look:
            stop()
        return place.everybody()

    if at == "resume":
        tree.suspend(everybody, 1.0)
    if not look:
        stop()
    ask = functools.partial(tree.resume, limit=1.0) if at == "resume" else functools.partial(tree.suspend, everybody, 1.0)
    with pytest.raises(GpuWedged, match=f"the GPU helper does not answer: {at}"):
        ask()
    assert time.monotonic() - began < (4.0 if at == "resume" else 2.9)
    tree.close()
    assert job.process.poll() is None
    os.kill(place.helper, signal.SIGCONT)
    job.goes_on()
    until(lambda: not place.journal, "everything is given back")
    job.goes_on()


# --- a journal that cannot be written -------------------------------------------------------------------------------------------


@contextmanager
def tmpfs(directory: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(place: Place, room: int) -> None:
    """No file there has a page more, and the journal's last one has room for so many bytes: for less than a line."""
    with contextlib.suppress(OSError), open(place.directory / "filler", "ab", buffering=0) as filler:
        while filler.write(bytes(PAGE)) == PAGE:
            pass
    journal = place.directory / "journal"
    if rest := -journal.stat().st_size % PAGE:
        with open(journal, "ab") as file:
            file.write(b"\n" * (rest - room))


@pytest.fixture
def small_disk(place: Place) -> Iterator[Place]:
    with tmpfs(place.directory, 8 * PAGE):
        yield place
        place.leave()


@pytest.mark.parametrize(
    ("design", "call", "look", "room"),
    [
        ("lock", "lock", 0, 0),
        ("lock", "checkpoint", 1, 0),
        ("lock", "checkpoint", 1, 50),
        ("stop", "halt", 2, 50),
        ("stop", "checkpoint", 3, 0),
    ],
)
def test_nothing_is_taken_away_that_cannot_be_noted(small_disk: Place, design: str, call: str, look: int, room: int) -> None:
    """The disk is full from that look at the processes on. The call after it would kill the job; what was done before it is given back,
    on a full disk as well."""
    place = small_disk
    job = place.job()
    used = place.gpus.used(GPU0)
    tree = place.tree(place.client(design))
    looks = 0

    def everybody() -> Sequence[ProcessFacts]:
        nonlocal looks
        looks += 1
        if looks == look:
            fill(place, room)
        return place.everybody()

    if not look:
        fill(place, room)
    harm: Call = "lock" if call == "lock" else "checkpoint"
    place.gpus.arm(job.pid, harm, "die")
    with pytest.raises(GpuFailed, match=f"process {job.pid}: the journal cannot be written: No space left on device") as told:
        tree.suspend(everybody, 5.0)
    assert told.value.code == "gpu_failed"
    assert looks == look
    place.gpus.disarm(job.pid, harm)
    tree.resume(limit=5.0)
    assert "T" not in proc.thread_states(job.pid)
    job.goes_on()
    assert place.gpus.used(GPU0) == used
    (place.directory / "filler").unlink()
    tree.suspend(place.everybody, 5.0)
    assert place.gpus.used(GPU0) == 0
    tree.resume(limit=5.0)
    job.goes_on()


# --- more than one helper -------------------------------------------------------------------------------------------------------


def test_two_that_are_started_at_the_same_moment_are_one_and_both_clients_are_answered(place: Place) -> None:
    job = place.job()
    clients = [place.client() for _ in range(2)]
    together = threading.Barrier(len(clients))

    def ask(client: Nvidia) -> list[int]:
        together.wait()
        with contextlib.closing(client.find(str(uuid.uuid4()), place.everybody())) as tree:
            return tree.pids

    for _ in range(3):
        if helper := place.helper:
            os.kill(helper, signal.SIGKILL)
            place.ends(helper)
        before = len(place.helpers)
        with ThreadPoolExecutor(len(clients)) as pool:
            assert list(pool.map(ask, clients)) == [[job.pid]] * len(clients)
        assert place.helpers[before:] == [place.helper]


def test_one_that_is_about_to_end_when_another_is_wanted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the lock, and serves nobody any more: who finds that there is one is not left to wait for it."""
    monkeypatch.setattr(nvidia, "_START", 8.0)
    job = place.job()
    ending = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nprint(flush=True)\nsys.stdin.read()"
    )
    argv = [sys.executable, "-c", ending, str(place.directory / "lock")]
    with (
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as last,
        ThreadPoolExecutor(1) as pool,
    ):
        assert last.stdout is not None
        assert last.stdin is not None
        last.stdout.read(1)
        asked = pool.submit(place.tree)
        until((place.directory / "log").exists, "a helper is started, and finds the lock taken")
        until(lambda: not starting(place), "it leaves")
        last.stdin.close()
        assert asked.result().pids == [job.pid]
    assert len(place.helpers) == 1


def starting(place: Place) -> bool:
    """A helper that is about to find out whether there is one."""
    return any(f"gpu-helper --directory {place.directory}" in keeper.describe(pid) for pid in keeper.descendants(os.getpid()))


# --- one that is told to end ----------------------------------------------------------------------------------------------------

IMPATIENT = f"import sys; from hibernode.drivers.gpu import helper; helper.UNDO = {UNDO}; sys.exit(helper.main(sys.argv[1:]))"


def start_impatient(place: Place) -> None:
    """A helper that waits not a minute but a moment for what it undoes."""
    words = ["--directory", str(place.directory), "--libcuda", str(place.gpus.libcuda)]
    subprocess.run([sys.executable, "-c", IMPATIENT, *words], check=True)


def end(place: Place) -> int:
    """Told to: its pid."""
    helper = place.helper
    os.kill(helper, signal.SIGTERM)
    return helper


def test_who_is_suspended_for_nobody_goes_on_before_a_helper_ends(place: Place) -> None:
    job = place.job()
    tree = place.tree()
    tree.suspend(place.everybody, 5.0)
    tree.close()
    assert place.gpus.used(GPU0) == 0
    place.ends(end(place))
    assert not place.helper
    assert not place.journal
    job.goes_on()


def test_who_is_suspended_for_somebody_is_brought_back_by_the_next_helper(place: Place) -> None:
    job = place.job()
    tree = place.tree()
    tree.suspend(place.everybody, 5.0)
    place.ends(end(place))
    job.stands_still()
    tree.resume(limit=5.0)
    job.goes_on()
    assert len(place.helpers) == 2


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_call_that_has_begun_is_answered_before_a_helper_ends(place: Place, call: Call) -> None:
    job = place.job()
    tree = place.tree()
    place.gpus.arm(job.pid, call, "hang once")
    with ThreadPoolExecutor(1) as pool:
        suspended = pool.submit(tree.suspend, place.everybody, 20.0)
        until(lambda: place.begun(call), f"a helper is in its {call}")
        helper = end(place)
        time.sleep(0.2)  # it has had its chance to leave too early
        assert place.helper == helper
        place.gpus.disarm(job.pid, call)
        if call == "checkpoint":  # it was the last question
            suspended.result()
        elif failure := suspended.exception():  # it may end between its answer and the next question
            assert str(failure).startswith("the GPU helper ended while it was asked to checkpoint")
    place.ends(helper)
    tree.resume(limit=5.0)
    job.goes_on()


@pytest.mark.parametrize("call", ["checkpoint", "restore"])
def test_a_call_that_hangs_for_nobody_is_waited_for_and_undone_before_a_helper_ends(place: Place, call: Call) -> None:
    """Also where it takes longer than an undoing has patience."""
    start_impatient(place)
    job = place.job()
    tree = place.tree()
    place.gpus.arm(job.pid, call, "hang once")
    if call == "checkpoint":
        with pytest.raises(GpuWedged):
            tree.suspend(place.everybody, 0.5)
    else:
        tree.suspend(place.everybody, 5.0)
    tree.close()
    helper = end(place)
    until(lambda: place.begun(call), f"a helper is in its {call}")
    time.sleep(3 * UNDO)
    assert place.helper == helper
    place.gpus.disarm(job.pid, call)
    place.ends(helper)
    assert not place.journal
    job.goes_on()


# --- who cannot answer, or has ended --------------------------------------------------------------------------------------------


def freezers() -> dict[int, Path]:
    """Where the cgroups of this machine are that freeze, by their version."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    first = [(1, Path(where)) for _, where, kind, options, *_ in mounts if kind == "cgroup" and "freezer" in options.split(",")]
    return dict([*first, *((2, Path(where)) for _, where, kind, *_ in mounts if kind == "cgroup2")])


@contextmanager
def frozen(pid: int, version: int) -> Iterator[None]:
    """In a cgroup of that version, whose parent is frozen."""
    root = freezers()[version]
    above = root / f"hibernode-test-{uuid.uuid4().hex[:8]}"
    inside = above / "inside"
    state, freeze, thaw = ("cgroup.freeze", "1", "0") if version == 2 else ("freezer.state", "FROZEN", "THAWED")
    before = Path(f"/proc/{pid}/cgroup").read_text()
    above.mkdir()
    inside.mkdir()
    try:
        (inside / "cgroup.procs").write_text(str(pid))
        assert Path(f"/proc/{pid}/cgroup").read_text() != before
        (above / state).write_text(freeze)
        until(lambda: is_frozen(inside), "a frozen process")
        yield
    finally:
        (above / state).write_text(thaw)
        (root / "cgroup.procs").write_text(str(pid))
        inside.rmdir()
        above.rmdir()


def is_frozen(group: Path) -> bool:
    events = group / "cgroup.events"
    return "frozen 1" in events.read_text() if events.exists() else (group / "freezer.state").read_text() == "FROZEN\n"


@pytest.mark.parametrize("version", sorted(freezers()))
def test_a_process_in_a_frozen_cgroup_is_refused_and_its_driver_is_not_asked(place: Place, version: int) -> None:
    job = place.job()
    with frozen(job.pid, version):
        began = time.monotonic()
        with pytest.raises(Refused) as told:
            place.tree()
        assert time.monotonic() - began < nvidia._PROBE / 2, "who asks waits until it is thawed"
        assert told.value.code == "target_frozen"
        assert (told.value.details["found"], told.value.details["wanted"]) == ("frozen", "running")
    tree = place.tree()
    tree.suspend(place.everybody, 5.0)
    tree.resume(limit=5.0)
    job.goes_on()


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
@pytest.mark.parametrize("when", ["found", "locked", "suspended"])
def test_one_of_two_ends_and_the_other_is_saved_and_goes_on(place: Place, when: str, reaped: bool) -> None:
    job, ended = place.job(seed=1), place.job(seed=2)
    tree = place.tree()
    if when == "found":
        die(ended, reaped=reaped)

    def everybody() -> Sequence[ProcessFacts]:
        if when == "locked" and ended.process.returncode is None and proc.alive(*identity(ended)):
            die(ended, reaped=reaped)
        return place.everybody()

    tree.suspend(everybody, 5.0)
    assert place.gpus.used(GPU0) == 0
    if when == "suspended":
        die(ended, reaped=reaped)
    else:
        assert tree.pids == [job.pid]
    job.stands_still()
    tree.resume(limit=5.0)
    job.goes_on()
    assert not place.journal


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_zombie_is_no_user_of_a_gpu(place: Place, reaped: bool) -> None:
    job, ended = place.job(seed=1), place.job(seed=2)
    facts = place.everybody()
    die(ended, reaped=reaped)
    for seen in (facts, place.everybody()):  # as it was a moment ago, and as it is
        with contextlib.closing(place.client().find("a", seen)) as tree:
            assert tree.pids == [job.pid]


def test_who_ends_while_he_is_asked_is_no_user_of_a_gpu(place: Place) -> None:
    job, ended = place.job(seed=1), place.job(seed=2)
    place.gpus.arm(ended.pid, "state", "die")
    assert place.tree().pids == [job.pid]
    assert ended.process.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_of_what_was_restored_nobody_runs_if_one_has_ended(place: Place, reaped: bool) -> None:
    """Who asks kills them then; until that none of them goes on without the other."""
    job, ended = place.job(seed=1), place.job(seed=2)
    users = [identity(job), identity(ended)]
    saved = place.tree()
    saved.suspend(place.everybody, 5.0)
    die(ended, reaped=reaped)
    with contextlib.closing(place.client().restored(saved._action_id, users)) as tree:
        with pytest.raises(GpuFailed, match=f"bring back process {ended.pid}: it has ended"):
            tree.resume(strict=True, limit=5.0)
        job.stands_still()
        tree.resume(limit=5.0)
        job.goes_on()


# --- more than one round --------------------------------------------------------------------------------------------------------


def test_each_round_of_a_large_tree_has_its_own_patience(place: Place) -> None:
    """Twelve processes are two rounds: eight at once, then four."""
    jobs = [place.job(mib=1, seed=seed) for seed in range(12)]
    tree = place.tree()
    assert sorted(tree.pids) == sorted(job.pid for job in jobs)
    place.gpus.arm("any", "checkpoint", "1500ms")
    began = time.monotonic()
    tree.suspend(place.everybody, 2.8)
    assert 3.0 < time.monotonic() - began < 12 * 1.5
    assert place.gpus.used(GPU0) == 0
    tree.resume(limit=5.0)
    for job in jobs:
        job.goes_on()
    assert not place.journal
