"""What the watchdog decides, on pages of a journal and processes made for it. With a real daemon and CRIU: tests/node/test_watchdog.py."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hibernode import config, locks, systemd, watchdog
from hibernode.__main__ import main
from hibernode.drivers.workloads import proc
from hibernode.errors import Refused
from hibernode.journal import BOOT, Record, Tree, boottime, mark_of
from hibernode.model import Status
from hibernode.watchdog import Daemon, Lines, Pages, Watchdog, Worker, abandoned_since, workers
from tests import keeper
from tests.keeper import wait_until

LIMIT = 10.0
ACTION = "00000000-0000-0000-0000-00000000000a"
DAEMON = Daemon((100, 5000), began=50.0)


def record(**more: Any) -> Record:
    given = {
        "action_id": ACTION,
        "checkpoint_id": "",
        "type": "checkpoint",
        "target": "",
        "command": "",
        "began_at": 0.0,
        "boot": BOOT,
    }
    return Record(**{**given, "phase": "dumping", "until": 90.0, **more})


@pytest.mark.parametrize(
    ("page", "daemon", "writer", "since"),
    [
        ({}, None, (100, 5000), 7.0),  # nobody: since it is gone
        ({}, DAEMON, DAEMON.process, None),  # at work
        ({"until": 10.0}, DAEMON, DAEMON.process, 50.0),  # of a deadline before it began: of another one
        ({"until": 0.0}, DAEMON, DAEMON.process, None),  # without a deadline
        ({}, DAEMON, (99, 4000), 50.0),  # first seen under another one
        ({"ended_at": 1.0}, DAEMON, DAEMON.process, 0.0),  # given up
        ({"ended_at": 1.0}, None, DAEMON.process, 7.0),
    ],
)
def test_since_when_nobody_works_at_a_page(page: dict[str, Any], daemon: Daemon | None, writer: Any, since: float | None) -> None:
    assert abandoned_since(record(**page), daemon, 7.0, writer) == since


# --- the journal ----------------------------------------------------------------------------------------------------------------


def put(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "new.tmp").write_text(text)
    (directory / "new.tmp").rename(directory / name)


def test_pages_are_read_whatever_else_stands_in_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pages = Pages(tmp_path)
    tree = {"pid": 7, "start_time": 8, "stopped": True, "of a later version": {}}
    page = json.loads(record().model_dump_json()) | {"trees": [tree], "events": ["what?"], "command": 5, "of a later version": 1}
    put(tmp_path, f"{ACTION}.json", json.dumps(page))
    put(tmp_path, "another-boot.json", json.dumps(page | {"boot": "x"}))
    put(tmp_path, "of-a-version-without-boots.json", json.dumps({key: page[key] for key in page if key != "boot"}))
    assert pages.all() == [record(trees=(Tree(pid=7, start_time=8, stopped=True),))]
    assert not caplog.records
    for name, text in (
        ("torn", "{"),
        ("list", "[1]"),
        ("trees", '{"trees": [1]}'),
        ("status", json.dumps(page | {"status": "new"})),
    ):
        put(tmp_path, f"{name}.json", text)
    assert len(pages.all()) == 1
    assert len(caplog.records) == 4
    assert len(pages.all()) == 1
    assert len(caplog.records) == 4, "each is said once"


def test_a_page_that_changes_is_read_again_and_no_other(tmp_path: Path) -> None:
    pages = Pages(tmp_path)
    put(tmp_path, "a.json", record(phase="dumping").model_dump_json())
    first = pages.all()
    assert pages.all()[0] is first[0]
    put(tmp_path, "a.json", record(phase="shipping").model_dump_json())
    assert [page.phase for page in pages.all()] == ["shipping"]
    (tmp_path / "a.json").unlink()
    assert pages.all() == []
    assert Pages(tmp_path / "never").all() == []


# --- locks ----------------------------------------------------------------------------------------------------------------------

_HOLD = """
import fcntl, sys
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("said", ["", "{pid} running\n", "1 running\n", "nonsense\n"])
def test_who_holds_a_lock(tmp_path: Path, said: str) -> None:
    """Whatever stands in the file: on a full disk, nothing does."""
    lock = tmp_path / "lock"
    assert locks.holder(lock) == 0
    lock.touch()
    assert locks.holder(lock) == 0
    with holding(lock) as first:
        assert first.stdout is not None
        first.stdout.readline()
        lock.write_text(said.format(pid=first.pid))
        assert locks.holder(lock) == first.pid
        with holding(lock) as waiting:
            wait_until(
                lambda: f"-> FLOCK  ADVISORY  WRITE {waiting.pid}" in Path("/proc/locks").read_text(), LIMIT, "one who waits"
            )
            assert locks.holder(lock) == first.pid
    assert locks.holder(lock) == 0


def test_to_ask_is_not_to_take(tmp_path: Path) -> None:
    """Not for a moment: strace would show no flock. Here somebody takes it while others ask without a pause."""
    lock = tmp_path / "lock"
    lock.touch()
    code = f"from pathlib import Path; from hibernode import locks\nwhile True: locks.holder(Path({str(lock)!r}))"
    env = os.environ | {"PYTHONPATH": str(Path(watchdog.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], env=env) as asking, open(lock, "r+") as file:
        try:
            wait_until(
                lambda: b"locks" in Path(f"/proc/{asking.pid}/maps").read_bytes() or proc.stat(asking.pid), LIMIT, "questions"
            )
            for _ in range(300):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            asking.kill()


# --- workers of CRIU ------------------------------------------------------------------------------------------------------------


@contextmanager
def fake_criu(directory: Path, work: Path, file: str, name: str = "criu") -> Iterator[int]:
    """A process called so, with a file open."""
    program = Path(tempfile.mkdtemp(dir=directory)) / name
    shutil.copy("/bin/sleep", program)
    path = work / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as log, subprocess.Popen([name, "60"], executable=program, stdout=log) as process:
        try:
            wait_until(lambda: proc.stat(process.pid).comm == name and proc.command_line(process.pid), LIMIT, "the program")
            path.unlink()  # as a recovery does
            yield process.pid
        finally:
            process.kill()


def test_a_worker_is_a_criu_with_a_file_in_the_work_directory(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with (
        fake_criu(tmp_path, work, f"{ACTION}/main/dump.log") as ours,
        fake_criu(tmp_path, tmp_path / "work-of-another", f"{ACTION}/main/dump.log"),
        fake_criu(tmp_path, work, f"{ACTION}/main/dump.log", "other"),
        fake_criu(tmp_path, work, ".lock"),
    ):
        (found,) = workers(work, None)
        assert found == Worker((ours, proc.start_time(ours)), ACTION, True, ())
        me = os.getpid(), proc.start_time(os.getpid())
        (found,) = workers(work, Daemon(me, 0.0))
        assert not found.orphan
        os.kill(ours, signal.SIGSTOP)
        wait_until(lambda: found.stopped, LIMIT, "a stop")


# --- looks ----------------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@contextmanager
def stopped_process() -> Iterator[tuple[int, int]]:
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: keeper.state(process.pid) == "T", LIMIT, "a stop")
            yield process.pid, proc.start_time(process.pid)
        finally:
            process.kill()


def page_of(state: Path, process: tuple[int, int], **more: Any) -> None:
    tree = Tree(pid=process[0], start_time=process[1])
    put(state / "journal", f"{ACTION}.json", record(**{"trees": (tree,), **more}).model_dump_json())


def runs(process: tuple[int, int]) -> bool:
    return keeper.state(process[0]) not in ("T", "")


def test_nobody_is_let_go_before_the_grace_and_once_he_is_he_is_his_owners(tmp_path: Path) -> None:
    clock = Clock()
    watch = Watchdog(tmp_path, tmp_path / "work", 15.0, clock)
    with stopped_process() as process:
        page_of(tmp_path, process)
        watch.look()
        clock.now += 14.9
        watch.look()
        assert not runs(process)
        clock.now += 0.2
        watch.look()
        assert runs(process)
        os.kill(process[0], signal.SIGSTOP)
        wait_until(lambda: not runs(process), LIMIT, "a stop")
        watch.look()
        assert not runs(process)
        page_of(tmp_path, process, until=91.0)  # held anew
        watch.look()
        assert runs(process)


@pytest.mark.parametrize(
    "page",
    [
        {"phase": "preflight"},
        {"phase": "done"},
        {"phase": "dumping", "type": "restore", "status": Status.READY},
        {"trees": ()},
    ],
)
def test_nothing_is_done_for_a_page_that_has_nothing_to_do(tmp_path: Path, page: dict[str, Any]) -> None:
    watch = Watchdog(tmp_path, tmp_path / "work", 0.0, Clock())
    with stopped_process() as process:
        page_of(tmp_path, process, **page)
        watch.look()
        watch.look()
        assert not runs(process)
        page_of(tmp_path, process, until=91.0)
        watch.look()
        assert runs(process), "else the page would show nothing"


@pytest.mark.parametrize(("phase", "holds"), [("suspending", True), ("dumping", True), ("shipping", False)])
def test_a_daemon_holds_who_stands_still_while_it_does_something_to_him(tmp_path: Path, phase: str, holds: bool) -> None:
    with stopped_process() as process:
        tree = Tree(pid=process[0], start_time=process[1])
        assert watchdog._holds(record(phase=phase, trees=(tree,)), []) == holds
        os.kill(process[0], signal.SIGCONT)
        wait_until(lambda: runs(process), LIMIT, "it to go on")
        assert not watchdog._holds(record(phase=phase, trees=(tree,)), [])


@pytest.mark.parametrize(
    ("page", "killed"),
    [
        ({"phase": "killing", "status": Status.READY, "kill": True}, True),
        ({"phase": "committing", "status": Status.READY, "kill": True}, True),
        ({"phase": "committing", "status": Status.READY, "kill": False}, False),
        ({"phase": "committing", "status": Status.CHECKPOINT_CREATED, "kill": True}, False),
        ({"phase": "killing", "status": Status.ERROR, "kill": True}, False),
        ({"phase": "probing", "type": "restore", "status": Status.PROCESSING}, True),
    ],
)
def test_who_is_killed(tmp_path: Path, page: dict[str, Any], killed: bool) -> None:
    """Of a checkpoint only whose end was told already."""
    watch = Watchdog(tmp_path, tmp_path / "work", 0.0, Clock())
    with stopped_process() as process:
        page_of(tmp_path, process, **page)
        watch.look()
        wait_until(lambda: keeper.alive(process[0]) != killed, LIMIT, "its end" if killed else "its life")


@pytest.mark.parametrize("marked", [True, False])
def test_a_restored_tree_that_has_its_mark_stays(tmp_path: Path, marked: bool) -> None:
    """It has passed its probe; its daemon ended before it could write `ready` down, and the next one does."""
    work = tmp_path / "work"
    work.mkdir()
    if marked:
        mark_of(work, ACTION).touch()
    watch = Watchdog(tmp_path, work, 0.0, Clock())
    with stopped_process() as process:
        page_of(tmp_path, process, phase="probing", type="restore", status=Status.PROCESSING)
        watch.look()
        watch.look()
        wait_until(lambda: keeper.alive(process[0]) == marked, LIMIT, "its life" if marked else "its end")


def test_a_pid_that_came_again_is_nobody(tmp_path: Path) -> None:
    watch = Watchdog(tmp_path, tmp_path / "work", 0.0, Clock())
    with stopped_process() as process:
        for page in ({"phase": "dumping"}, {"phase": "killing", "status": Status.READY, "kill": True}):
            for began in (process[1] - 1, 0):
                page_of(tmp_path, (process[0], began), **page)
                watch.look()
                assert keeper.state(process[0]) == "T"


@pytest.mark.parametrize(
    ("phase", "criu", "killed"),
    [
        ("restoring", False, True),
        ("probing", True, True),  # CRIU is still at it
        ("probing", False, False),  # it runs: that it is `ready` may not go onto a full disk
    ],
)
@pytest.mark.parametrize("stopped", [False, True])  # as a process of the image may have been
def test_a_daemon_is_ended_for_what_is_half_restored_and_not_for_what_runs(
    tmp_path: Path, phase: str, criu: bool, killed: bool, stopped: bool
) -> None:
    clock, work, lock = Clock(), tmp_path / "work", tmp_path / "lock"
    lock.touch()
    with ExitStack() as held:
        process = held.enter_context(stopped_process())
        if not stopped:
            os.kill(process[0], signal.SIGCONT)
            wait_until(lambda: runs(process), LIMIT, "a process that runs")
        daemon = held.enter_context(holding(lock))
        assert daemon.stdout is not None
        daemon.stdout.readline()
        lock.write_text(f"{daemon.pid} running\n")
        if criu:
            held.enter_context(fake_criu(tmp_path, work, f"{ACTION}/main/restore.log"))
        watch = Watchdog(tmp_path, work, 15.0, clock)
        clock.now = boottime()
        watch.look()
        page_of(tmp_path, process, type="restore", phase=phase, until=clock.now + 1, status=Status.PROCESSING)
        for seconds in (0, 17, 16, 16, 16):
            clock.now += seconds
            watch.look()
        if killed:
            assert daemon.wait(LIMIT) == -signal.SIGKILL
        else:
            assert daemon.poll() is None
            assert keeper.alive(process[0])


def test_a_process_of_another_pid_namespace_would_not_be_ours_to_kill(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A daemon that cannot be seen is no daemon that is gone; without pids nothing says who lives in a place."""
    with stopped_process() as process:
        watch = Watchdog(tmp_path, tmp_path / "work", 0.0, Clock())
        page_of(tmp_path, (process[0], 0), type="restore", phase="restoring", place="no-such-place")
        watch.look()
        assert keeper.alive(process[0])


# --- itself ---------------------------------------------------------------------------------------------------------------------


def test_lines_are_the_daemons() -> None:
    line = logging.LogRecord("hibernode.watchdog", logging.WARNING, "", 0, "criu %s", ("goes on",), None)
    line.created, line.facts = 0.5, {"pid": 5, "path": Path("/x")}
    assert json.loads(Lines(as_json=True).format(line)) == {
        "event": "criu goes on", "level": "warning", "logger": "hibernode.watchdog", "timestamp": "1970-01-01T00:00:00.500000Z",
        "pid": 5, "path": "/x",
    }  # fmt: skip
    assert Lines(as_json=False).format(line) == "1970-01-01T00:00:00.500000Z [warning ] criu goes on pid=5 path=/x"


def test_a_second_one_is_refused_and_named(tmp_path: Path) -> None:
    lock = watchdog._alone(tmp_path / "state" / watchdog.LOCK)
    try:
        with pytest.raises(Refused) as refused:
            watchdog._alone(tmp_path / "state" / watchdog.LOCK)
        assert refused.value.code == "watchdog_running"
        assert f"pid {os.getpid()}" in refused.value.message
    finally:
        os.close(lock)
    os.close(watchdog._alone(tmp_path / "state" / watchdog.LOCK))


def test_a_state_dir_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refused) as refused:
        watchdog._alone(tmp_path / "file" / "state" / watchdog.LOCK)
    assert refused.value.code == "config"


def test_a_bad_configuration_ends_it_as_it_ends_the_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("[watchdog]\ninterval = 0\n")
    with pytest.raises(SystemExit) as ended:
        main(["watchdog", "--config", str(tmp_path / "bad.toml")])
    assert ended.value.code == 78
    assert "watchdog.interval" in capsys.readouterr().err


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["watchdog", "--help"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert all(word in said for word in ("--once", "hostPID", "watchdog.grace", "state_dir"))


def test_the_grace_of_the_defaults_is_no_shorter_than_what_the_daemon_gives_criu() -> None:
    """Two of them pass before a daemon that waits for a CRIU is ended: it must have had the time to kill that by itself."""
    from hibernode.drivers import criu

    assert 2 * config.load(None, {}).watchdog.grace > criu._ROLLBACK


def test_systemd_is_pinged_twice_per_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert systemd.ping_interval() is None
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert systemd.ping_interval() == 1.5
