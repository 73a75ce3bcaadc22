"""In which order things happen: ready before the kill, the manifest last; what fails or is cancelled lets the workload go on."""

from __future__ import annotations

import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests import keeper
from tests.daemon import Daemon, details, events, failed, pid_target, ready
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Program, Untouched, beats, python

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """A small arena, so that a dump of more is as slow as its compression."""
    with Daemon(arena="16MiB") as running:
        yield running


def test_the_workload_dies_only_after_ready(daemon: Daemon, tmp_path: Path) -> None:
    """Until the manifest is there it is held, not killed."""
    with Program(tmp_path, python("counter.py", 0.01, "128")) as program:
        before = program.beat()
        manifests, states = [], []
        stopped = threading.Event()

        def look() -> None:
            while not stopped.is_set():
                state = keeper.state(program.pid)  # first: what is committed now was committed when it still lived
                manifests.append(bool(list(daemon.store_dir.glob("*/manifest.json"))))
                states.append(state)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            done = ready(daemon.checkpoint(program.target, criu_opts={"leave_running": False}))
            restored = daemon.restore(done.checkpoint_id)
        finally:
            stopped.set()
            watcher.join()
        ready(restored)
        dead = [at for at, state in enumerate(states) if state in ("", "Z", "X")]
        assert dead, "it should have died"
        assert manifests[dead[0]], "it was dead before there was a manifest"
        program.next_beat(after=before)
        counters = [beat.counter for beat in beats(program.lines())]
        assert counters == list(range(1, len(counters) + 1)), "it ran between the dump and its end"


def test_a_restore_waits_for_the_end_of_the_old_tree(tmp_path: Path) -> None:
    """Its parent takes its time to wait for it, so the checkpoint that said `ready` is still killing it when the restore comes."""
    with Daemon() as daemon:
        with open(tmp_path / "output", "ab") as out:
            child = subprocess.Popen(python("counter.py", 0.01), stdin=subprocess.DEVNULL, stdout=out, start_new_session=True)
        try:
            wait_until((tmp_path / "output").read_bytes, LIMIT, "a beat")
            done = ready(daemon.checkpoint(pid_target(child.pid), criu_opts={"leave_running": False}))
            restore = daemon.stub.Restore(pb.RestoreCommand(checkpoint_id=done.checkpoint_id), timeout=LIMIT)
            wait_until(lambda: "waits for another action" in daemon.log, LIMIT, "a restore that waits")
            wait_until(lambda: keeper.state(child.pid) == "Z", LIMIT, "its end, for which nobody has waited yet")
        finally:
            child.kill()
            child.wait()
        ready(list(events(restore)))


def test_a_store_that_fails_at_the_commit(daemon: Daemon, tmp_path: Path) -> None:
    """A directory stands where the manifest would be. The workload that was to be killed goes on."""
    checkpoint_id = "00000000-0000-0000-0000-00000000000c"
    (daemon.store_dir / checkpoint_id / "manifest.json").mkdir(parents=True)
    with Program(tmp_path, python("counter.py", 0.01, "16")) as program:
        with Untouched(program):
            found = daemon.checkpoint(program.target, checkpoint_id=checkpoint_id, criu_opts={"leave_running": False})
            last = failed(found, found[-1].code)
            assert "committing" in last.profile.phases
            assert last.code in ("exists", "store_unavailable")
        daemon.insist_clean()


def until(updates: Iterator[pb.Update], phase: str) -> str:
    """Read until an action is in this phase and has moved some bytes; its id."""
    for update in updates:
        if update.HasField("progress") and update.progress.phase == phase and update.progress.bytes_done:
            return update.progress.action_id
    raise AssertionError(f"it ended before it was {phase}")


def test_a_cancel_in_the_middle_of_a_dump(daemon: Daemon, tmp_path: Path) -> None:
    """32 MiB that are slow to compress, through 16: CRIU waits for us with the workload frozen."""
    with Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        with Untouched(program):
            updates = iter(daemon.begin_checkpoint(program.target, compression="zstd:12", streams=1))
            action = until(updates, "dumping")
            wait_until(lambda: keeper.state(program.pid) in ("T", "t"), LIMIT, "a frozen workload")
            assert daemon.stub.Cancel(pb.ActionId(action_id=action), timeout=10).found
            wait_until(lambda: keeper.state(program.pid) in ("R", "S"), 2, "a workload that runs, whatever the streams still do")
            cancelled = failed(list(events(updates)), "cancelled")
            assert "dumping" in cancelled.profile.phases
            assert "shipping" not in cancelled.profile.phases
        daemon.insist_clean()
        ready(daemon.checkpoint(program.target, compression="none"))


def test_a_cancel_while_shipping(daemon: Daemon, tmp_path: Path) -> None:
    """Everything is in the arena, the workload runs, the streams still work."""
    with Program(tmp_path, python("counter.py", 0.01, "slow:8")) as program:
        with Untouched(program):
            updates = iter(daemon.begin_checkpoint(program.target, compression="zstd:19"))
            created = next(event for event in events(updates) if event.status == "checkpoint_created")
            assert daemon.stub.Cancel(pb.ActionId(action_id=created.action_id), timeout=10).found
            cancelled = failed(list(events(updates)), "cancelled")
            assert "committing" not in cancelled.profile.phases
        daemon.insist_clean()


def test_two_actions_on_one_workload_take_turns(daemon: Daemon, tmp_path: Path) -> None:
    """The second waits until the first is through with the workload; a third can be cancelled meanwhile, and does not wait for either."""
    with Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        program.beat()
        updates = iter(daemon.begin_checkpoint(program.target, compression="zstd:9", streams=1))
        first = until(updates, "dumping")
        second, third = (daemon.begin_checkpoint(program.target, action_id=str(uuid.uuid4())) for _ in range(2))
        waiting = next(iter(third)).event
        wait_until(lambda: daemon.log.count(f"another action at work: {first}") == 2, LIMIT, "two that wait")
        assert daemon.stub.Cancel(pb.ActionId(action_id=waiting.action_id), timeout=10).found
        failed(list(events(third)), "cancelled")
        done = list(events(updates))[-1]
        assert done.status == "ready"
        assert ready(list(events(second))).time > done.time


def test_a_second_action_on_one_workload_is_refused_where_that_is_wished(tmp_path: Path) -> None:
    """It is told that the workload is busy, and by whom; the first is not disturbed."""
    settings = {"limits": {"second": "refuse", "attempts": 100, "retry_delay": 100}}
    with Daemon(arena="16MiB", settings=settings) as daemon, Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        program.beat()
        updates = iter(daemon.begin_checkpoint(program.target, compression="zstd:9", streams=1))
        first = until(updates, "dumping")
        busy = failed(daemon.checkpoint(program.target), "busy")
        assert busy.retry
        assert details(busy)["action"] == first
        assert busy.hint
        assert next(event for event in events(updates) if event.status in ("ready", "error")).status == "ready"


def test_a_workload_that_is_killed_in_the_middle_of_a_dump(daemon: Daemon, tmp_path: Path) -> None:
    """The reason is CRIU's, not what its end made of our side."""
    with Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        program.beat()
        updates = iter(daemon.begin_checkpoint(program.target, compression="zstd:9", streams=1))
        until(updates, "dumping")
        program.kill()
        broken = failed(list(events(updates)), "dump_failed")
        assert details(broken)["criu_log"]
        daemon.insist_clean()


def test_a_stop_in_the_middle_of_a_dump_waits_for_it(tmp_path: Path) -> None:
    """SIGTERM drains: what is at work is finished, and so is the daemon."""
    with Daemon(arena="16MiB") as daemon, Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        with Untouched(program):
            until(iter(daemon.begin_checkpoint(program.target, compression="zstd:9", streams=1)), "dumping")
            assert daemon.stop() == 0
        daemon.start()
        (action,) = daemon.stub.ListActions(pb.Empty(), timeout=10).actions
        assert action.status == "ready"
        assert len(daemon.stub.ListCheckpoints(pb.Empty(), timeout=10).checkpoints) == 1
