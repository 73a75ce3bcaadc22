"""One daemon per node: a second one goes before it has touched anything, and one that comes while the first is stopping waits for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests import keeper
from tests.daemon import ROOT, Daemon, events, job_target, ready
from tests.keeper import wait_until
from tests.node.test_order import until
from tests.node.workload import LIMIT, Program, Untouched, python

pytestmark = pytest.mark.node

EXIT_CONFIG = 78
EXIT_RUNNING = 75  # systemd tries again; 78 would end it for good


@contextmanager
def second(first: Daemon, place: Path, *, shares: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Another daemon, with a socket of its own, that shares these directories with the first; and where its log is."""
    place.mkdir()
    own = {"socket": place / "d.sock", "state_dir": place / "state", "work_dir": place / "work"}
    lines = first.config.read_text().splitlines()
    changed = [f"{key} = {json.dumps(str(path))}" for key, path in own.items() if key not in shares]
    kept = [line for line in lines if line.partition(" = ")[0] not in own.keys() - shares]
    (place / "hibernode.toml").write_text("\n".join(changed + kept))
    env = {name: value for name, value in os.environ.items() if not name.startswith("HIBERNODE_")}
    env["PYTHONPATH"] = str(ROOT / "daemon")
    argv = [sys.executable, "-m", "hibernode", "node", "--config", str(place / "hibernode.toml")]
    with open(place / "log", "ab") as log:
        process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process, place / "log"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("shares", [("state_dir",), ("work_dir",), ("state_dir", "work_dir")], ids="+".join)
def test_a_second_daemon_goes_before_it_has_touched_anything(tmp_path: Path, shares: tuple[str, ...]) -> None:
    """The first is in the middle of a dump, which a recovery would call interrupted and whose directory it would empty."""
    with Daemon(arena="16MiB") as first, Program(tmp_path, python("counter.py", 0.01, "slow:64")) as program:
        with Untouched(program):
            updates = iter(first.begin_checkpoint(program.target, compression="zstd:12", streams=1))
            action = until(updates, "dumping")
            with second(first, tmp_path / "second", shares=shares) as (other, log):
                assert other.wait(LIMIT) == EXIT_RUNNING
            assert f"pid {first.pid}" in log.read_text()
            assert str(getattr(first, shares[0])) in log.read_text()
            (entry,) = first.stub.ListActions(pb.Empty(), timeout=10).actions
            assert (entry.action_id, entry.status) == (action, "processing"), "it should still be dumping"
            done = list(events(updates))[-1]
            assert (done.status, done.code) == ("ready", "ok")
        first.settled(done)
        verdicts = list(first.stub.Verify(pb.CheckpointId(checkpoint_id=done.checkpoint_id), timeout=30))
        assert verdicts[-1].ok


def test_one_that_is_stopping_is_waited_for(tmp_path: Path) -> None:
    """It drains, until a second signal cancels what is left, and tells: only then the next daemon reads the journal."""
    with Daemon(arena="16MiB") as first, Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        program.beat()  # its memory is there
        updates = iter(first.begin_checkpoint(program.target, compression="zstd:19", streams=1))
        until(updates, "dumping")
        pid = first.pid
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: "stopping" in (first.state_dir / "lock").read_text(), LIMIT, "a daemon that says that it stops")
        with second(first, tmp_path / "second", shares=("state_dir", "work_dir")) as (other, log):
            wait_until(lambda: "waiting for the end" in log.read_text() or not keeper.alive(pid), LIMIT, "a daemon that waits")
            assert keeper.alive(pid), "the dump should have taken longer"
            assert str(pid) in log.read_text()
            assert '"ready"' not in log.read_text()
            assert first.stop() == 0
            wait_until(lambda: '"event": "ready"' in log.read_text(), LIMIT, "the second daemon")
            assert "recovering" not in log.read_text()
            assert str(other.pid) in (first.state_dir / "lock").read_text()
            other.terminate()
            assert other.wait(LIMIT) == 0
        first.start()
        (action,) = first.stub.ListActions(pb.Empty(), timeout=10).actions
        assert action.last.code == "cancelled", "by the first; the second would have called it interrupted"


def open_files(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(link))
    return found


def test_no_child_holds_the_locks(tmp_path: Path) -> None:
    """Jobs and restored trees outlive the daemon, and a worker of CRIU may: the next daemon must be able to start all the same."""
    with Daemon(arena="16MiB") as daemon:
        locks = {str(daemon.state_dir / "lock"), str(daemon.work_dir / ".lock")}
        job = daemon.run("trainer", python("counter.py", 0.01))
        done = ready(daemon.checkpoint(job_target("trainer"), criu_opts={"leave_running": False}))
        wait_until(lambda: not keeper.fields(job.pid), LIMIT, "its end")
        ready(daemon.restore(done.checkpoint_id))
        daemon.run("other", python("counter.py", 0.01, "slow:32"))
        wait_until(lambda: daemon.job_lines("other"), LIMIT, "a beat")
        updates = iter(daemon.begin_checkpoint(job_target("other"), compression="zstd:19", streams=1))
        until(updates, "dumping")
        children = keeper.descendants(daemon.pid)
        assert locks <= open_files(daemon.pid)
        assert any("criu" in keeper.describe(pid) for pid in children)
        assert len(children) >= 3
        for pid in children:
            assert not locks & open_files(pid), keeper.describe(pid)
        daemon.kill()
        daemon.start()
        assert {name for name, each in daemon.jobs().items() if each.pid} == {"trainer", "other"}


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ('state_dir = "{file}/state"', "state_dir"),
        ('work_dir = "{file}/work"', "work_dir"),
        ('socket = "{file}/d.sock"', "cannot listen on"),
        ('arena.size = "400TiB"', "arena.size"),  # more than an address space
        ('arena.size = "16EiB"', "arena.size"),
        ('state_dir = "{taken}"', "state_dir"),
    ],
)
def test_what_the_system_does_not_give_is_one_line_and_no_traceback(tmp_path: Path, setting: str, code: str) -> None:
    """With 78 the unit does not start it again: it would not help."""
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir(mode=0o700)
    (tmp_path / "taken" / "jobs").touch()
    own = {name: json.dumps(str(tmp_path / name)) for name in ("state_dir", "work_dir", "socket")}
    own["arena.size"], own["store.url"] = '"16MiB"', json.dumps(f"file://{tmp_path}/store")
    key, _, value = setting.format(file=tmp_path / "file", taken=tmp_path / "taken").partition(" = ")
    config = tmp_path / "hibernode.toml"
    config.write_text("\n".join(f"{name} = {each}" for name, each in (own | {key: value}).items()))
    env = {name: found for name, found in os.environ.items() if not name.startswith("HIBERNODE_")}
    env["PYTHONPATH"] = str(ROOT / "daemon")
    argv = [sys.executable, "-m", "hibernode", "node", "--config", str(config)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert code in done.stderr
    assert "Traceback" not in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
