"""SIGTERM while something is at work: it comes to its end, or a second signal ends it; either way it is told, and workloads run on."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests import keeper
from tests.daemon import Daemon, ready
from tests.keeper import wait_until
from tests.node.stalls import KILL, Bench, runs
from tests.node.test_order import until
from tests.node.test_watchdog import criu_of, page
from tests.node.workload import LIMIT, Program, Untouched, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

SOON = 3.0  # seconds from a second signal to a workload that runs; a tenth of one is usual
LEAVES = 8.0  # seconds from there to the daemon's end: zstd brings the chunk at hand to its end
SLOW = {"compression": "zstd:12", "streams": 1}  # through an arena of 16 MiB: CRIU waits for zstd, with the workload stopped


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """One action at a time. Each test ends it, and starts it again."""
    with Daemon(arena="16MiB", settings={"limits": {"actions": 1}}) as running:
        yield running


def said_to_stop(daemon: Daemon) -> None:
    """The first signal."""
    os.kill(daemon.pid, signal.SIGTERM)
    wait_until(lambda: "stopping" in (daemon.state_dir / "lock").read_text(), LIMIT, "a daemon that says that it stops")


def outcomes(daemon: Daemon) -> dict[str, tuple[str, str]]:
    """Of every action, as the journal has it for the next daemon; each has one terminal event, its last."""
    daemon.start()
    found = {}
    for action in daemon.stub.ListActions(pb.Empty(), timeout=10).actions:
        ends = [event["status"] in ("ready", "error") for event in page(daemon, action.action_id)["events"]]
        assert ends == [False] * (len(ends) - 1) + [True]
        found[action.action_id] = (action.status, action.last.code)
    return found


def test_what_is_at_work_and_what_waits_for_a_slot_are_finished(daemon: Daemon, tmp_path: Path) -> None:
    """Both were accepted, and both are done within the grace; then it leaves with 0."""
    with Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        first, second = str(uuid.uuid4()), str(uuid.uuid4())
        with Untouched(program):
            updates = iter(daemon.begin_checkpoint(program.target, action_id=first, compression="zstd:9", streams=1))
            until(updates, "dumping")
            queued = daemon.begin_checkpoint(program.target, action_id=second, compression="none")
            wait_until((daemon.state_dir / "journal" / f"{second}.json").exists, LIMIT, "the second action")
            assert page(daemon, second)["status"] == "initialized"
            assert daemon.stop() == 0
            queued.cancel()
        found = outcomes(daemon)
        assert (found[first], found[second]) == (("ready", "ok"), ("ready", "ok"))
        assert len(daemon.stub.ListCheckpoints(pb.Empty(), timeout=10).checkpoints) == 2


def test_a_second_signal_cancels_what_is_at_work_and_what_waits(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01, "slow:64")) as program:
        first, second = str(uuid.uuid4()), str(uuid.uuid4())
        with Untouched(program):
            until(iter(daemon.begin_checkpoint(program.target, action_id=first, **SLOW)), "dumping")
            queued = daemon.begin_checkpoint(program.target, action_id=second)
            wait_until((daemon.state_dir / "journal" / f"{second}.json").exists, LIMIT, "the second action")
            said_to_stop(daemon)
            assert criu_of(daemon), "the first signal disturbs nobody"
            began = time.monotonic()
            os.kill(daemon.pid, signal.SIGTERM)
            runs(program, SOON, "after a second signal")
            assert daemon.stop() == 0
            assert time.monotonic() - began < LEAVES
            queued.cancel()
        found = outcomes(daemon)
        assert (found[first], found[second]) == (("error", "cancelled"), ("error", "cancelled"))
        daemon.insist_clean()


def test_a_restore_is_finished(daemon: Daemon, tmp_path: Path) -> None:
    """The tree runs on without the daemon, and so it does after the next one has started."""
    with Program(tmp_path, python("counter.py", 0.01, "64")) as program:
        before = program.beat()
        done = ready(daemon.checkpoint(program.target, compression="none"))
        program.kill()
        action = str(uuid.uuid4())
        updates = daemon.stub.Restore(pb.RestoreCommand(action_id=action, checkpoint_id=done.checkpoint_id), timeout=LIMIT)
        wait_until(lambda: keeper.fields(program.pid), LIMIT, "a tree that is being restored")
        assert daemon.stop() == 0
        updates.cancel()
        now = goes_on(program, before)
        assert outcomes(daemon)[action] == ("ready", "ok")
        program.next_beat(after=now)


def test_a_second_signal_while_the_store_does_not_answer(tmp_path: Path) -> None:
    """A workload that is held to be killed runs at once; the daemon leaves when the store has answered, or given up."""
    with S3Server() as server, Bench(server, {}).running() as bench, Program(tmp_path, python("counter.py", 0.01)) as program:
        with Untouched(program):
            with bench.held("committing") as hold:
                action, updates = bench.begin(program, "committing", hold, criu_opts=KILL)
                said_to_stop(bench.daemon)
                assert keeper.state(program.pid) == "T"
                os.kill(bench.daemon.pid, signal.SIGTERM)
                runs(program, SOON, "after a second signal")
            assert bench.daemon.stop() == 0
            updates.cancel()  # type: ignore[attr-defined]
        assert outcomes(bench.daemon)[action] == ("error", "cancelled")
        assert not bench.left()
