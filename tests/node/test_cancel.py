"""`hibernode cancel`, by gRPC, from the command line and by the bus, of what a real daemon is at: a running workload soon, nothing left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode import wire
from hibernode._pb import hibernode_pb2 as pb
from hibernode.config import Bus
from hibernode.drivers.nats import NatsControl
from hibernode.model import CancelCommand, CheckpointCommand, Target
from tests import keeper
from tests.daemon import ROOT, Daemon, events, failed, ready
from tests.keeper import wait_until
from tests.nats_server import NatsServer
from tests.node.stalls import KILL, Bench, runs
from tests.node.test_order import until
from tests.node.workload import LIMIT, Program, Untouched, checkpointed, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

SOON = 3.0  # seconds until a workload runs again; a tenth of one is usual
SLOW = {"compression": "zstd:15", "streams": 1}  # through an arena of 16 MiB: CRIU waits for zstd, with the workload stopped
UNKNOWN = "00000000-0000-0000-0000-00000000dead"


def cancel(daemon: Daemon, action: str) -> None:
    assert daemon.stub.Cancel(pb.ActionId(action_id=action), timeout=10).found


def hibernode(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line, asking this daemon."""
    argv = [sys.executable, "-m", "hibernode", *words, "--socket", str(daemon.socket)]
    env = os.environ | {"PYTHONPATH": str(ROOT / "daemon")}
    return subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=False, env=env)


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """One action at a time."""
    with Daemon(arena="16MiB", settings={"limits": {"actions": 1}}) as running:
        yield running


def test_from_the_command_line(daemon: Daemon, tmp_path: Path) -> None:
    """Of a dump; and of what has ended by then, or was never there."""
    with Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program:
        with Untouched(program):
            updates = iter(daemon.begin_checkpoint(program.target, **SLOW))
            action = until(updates, "dumping")
            said = hibernode(daemon, "cancel", action)
            assert said.returncode == 0, said.stderr
            runs(program, SOON, "after a cancel")
            failed(list(events(updates)), "cancelled")
        daemon.insist_clean()
        for nothing in (action, UNKNOWN):
            said = hibernode(daemon, "cancel", nothing, "--json")
            assert said.returncode == 1
            assert json.loads(said.stderr)["error"]["code"] == "not_found"
        assert not daemon.stub.Cancel(pb.ActionId(action_id=UNKNOWN), timeout=10).found


def test_of_what_waits_for_a_slot(daemon: Daemon, tmp_path: Path) -> None:
    """It has touched nothing, and does not wait for the one before it, which goes on."""
    with Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program, Untouched(program):
        updates = iter(daemon.begin_checkpoint(program.target, compression="zstd:9", streams=1))
        until(updates, "dumping")
        queued = str(uuid.uuid4())
        second = daemon.begin_checkpoint(program.target, action_id=queued)
        waiting = pb.ActionId(action_id=queued)
        wait_until(
            lambda: queued in {each.action_id for each in daemon.stub.ListActions(pb.Empty(), timeout=10).actions}, LIMIT, "it"
        )
        assert daemon.stub.GetAction(waiting, timeout=10).status == "initialized"
        cancel(daemon, queued)
        assert [event.code for event in events(second)] == ["cancelled"]
        assert list(events(updates))[-1].status == "ready"


def test_of_a_restore_that_criu_makes(daemon: Daemon, tmp_path: Path) -> None:
    """CRIU is stopped in the middle of it: it is killed, with what it has made."""
    with Program(tmp_path, python("counter.py", 0.01, "96", "thread")) as program:
        before = program.beat()
        done = checkpointed(daemon, program, compression="none")
        action = str(uuid.uuid4())
        updates = daemon.stub.Restore(pb.RestoreCommand(action_id=action, checkpoint_id=done.checkpoint_id), timeout=LIMIT)
        wait_until(lambda: keeper.fields(program.pid), LIMIT, "a tree that is being restored")
        (criu, *_) = [pid for pid in keeper.descendants(daemon.pid) if "criu" in keeper.describe(pid)]
        os.kill(criu, signal.SIGSTOP)
        cancel(daemon, action)
        failed(list(events(updates)), "cancelled")
        assert not keeper.fields(program.pid)
        assert not daemon.at_work()
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)


# --- a store that does not answer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_bench() -> Iterator[Bench]:
    with S3Server() as server, Bench(server, {}).running() as bench:
        yield bench


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    yield shared_bench
    shared_bench.empty()


@pytest.mark.parametrize("phase", ["shipping", "committing"])
def test_of_a_checkpoint_whose_workload_is_held_to_be_killed(bench: Bench, tmp_path: Path, phase: str) -> None:
    """It runs at once, while the store still does not answer; and is not killed when it does."""
    with Program(tmp_path, python("counter.py", 0.01)) as program:
        with Untouched(program):
            with bench.held(phase) as hold:
                action, updates = bench.begin(program, phase, hold, criu_opts=KILL)
                assert keeper.state(program.pid) == "T"
                cancel(bench.daemon, action)
                runs(program, SOON, "after a cancel")
            failed(list(events(updates)), "cancelled")
        assert not bench.left()


def test_of_a_restore_that_reads(bench: Bench, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01)) as program:
        before = program.beat()
        done = checkpointed(bench.daemon, program)
        with bench.held("fetching") as hold:
            action, updates = bench.begin_restore(done.checkpoint_id, hold)
            cancel(bench.daemon, action)
        failed(list(events(updates)), "cancelled")
        assert not keeper.fields(program.pid)
        assert not bench.daemon.at_work()
        ready(bench.daemon.restore(done.checkpoint_id))
        goes_on(program, before)


# --- by the bus -------------------------------------------------------------------------------------------------------------------


def test_by_the_bus(tmp_path: Path) -> None:
    """Of a dump; and of an action whose command comes after its cancel."""
    with (
        NatsServer(tmp_path / "bus") as server, Daemon(arena="16MiB", bus=server.url) as daemon,
        Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program,
    ):  # fmt: skip
        with Untouched(program):
            updates = iter(daemon.begin_checkpoint(program.target, **SLOW))
            action = until(updates, "dumping")
            late = CheckpointCommand(action_id=str(uuid.uuid4()), checkpoint_id=str(uuid.uuid4()), target=Target(pid=program.pid))

            async def send() -> None:
                control = NatsControl(Bus(url=server.url), "default")
                await control.start()
                try:
                    for command in (CancelCommand(action_id=action), CancelCommand(action_id=late.action_id), late):
                        verb, data = wire.verb_of(command), wire.encode_command(command)
                        await control.send("test-node", verb, command.action_id, data)
                finally:
                    await control.stop()

            asyncio.run(send())
            runs(program, SOON, "after a cancel")
            failed(list(events(updates)), "cancelled")
        wait_until(lambda: ended(daemon, late.action_id), LIMIT, "the late command")
        entry = daemon.stub.GetAction(pb.ActionId(action_id=late.action_id), timeout=10)
        assert (entry.status, entry.last.code) == ("error", "cancelled")
        daemon.insist_clean()


def ended(daemon: Daemon, action: str) -> bool:
    found = {each.action_id: each.status for each in daemon.stub.ListActions(pb.Empty(), timeout=10).actions}
    return found.get(action) in ("ready", "error")
