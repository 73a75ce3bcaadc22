"""What takes longer than it may is ended, and the workload runs on: a real CRIU that was stopped, a real store that does not answer. No
watchdog is here: this is the daemon alone. Every call of every phase is in `tests/flow/test_deadlines.py`."""

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
from tests.daemon import Daemon, details, events, failed, ready
from tests.keeper import wait_until
from tests.node.stalls import KILL, Bench, runs
from tests.node.test_watchdog import FAMILY, criu_of, page
from tests.node.workload import LIMIT, Program, Untouched, checkpointed, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

SOON = 3.0  # seconds beyond a deadline; a tenth of one is usual


def remaining(daemon: Daemon, action: str) -> float:
    """Seconds until the deadline of the phase that this action is in."""
    return float(page(daemon, action)["until"]) - time.clock_gettime(time.CLOCK_BOOTTIME)


def is_late(daemon: Daemon, action: str) -> bool:
    return remaining(daemon, action) < -0.1  # the alarm is no faster than the clock


def test_criu_is_stopped_in_a_dump(tmp_path: Path) -> None:
    """At the deadline its page socket closes, and it is let go on: it rolls back."""
    with Daemon(arena="16MiB", settings={"limits": {"pause": 1}}) as daemon, Program(tmp_path, python(*FAMILY)) as program:
        with Untouched(program):
            action = str(uuid.uuid4())
            updates = daemon.begin_checkpoint(program.target, action_id=action, compression="zstd:15", streams=1)
            criu: list[int] = []
            wait_until(lambda: criu.extend(filter(None, [criu_of(daemon)])) or criu, LIMIT, "a criu that holds a tree")
            os.kill(criu[0], signal.SIGSTOP)
            runs(program, remaining(daemon, action) + SOON, "at the deadline")
            late = failed(list(events(iter(updates))), "deadline")
            assert details(late)["phase"] == "dumping"
            assert "limits.pause" in late.hint
        daemon.insist_clean()


def test_criu_is_stopped_in_a_restore(tmp_path: Path) -> None:
    """It is killed, with all that it has made; and the checkpoint is as good as before."""
    short = {"limits": {"restore": 0.2}}
    with Daemon(settings=short) as daemon, Program(tmp_path, python("counter.py", 0.01, "96", "thread")) as program:
        before = program.beat()
        done = checkpointed(daemon, program, compression="none")
        updates = daemon.stub.Restore(pb.RestoreCommand(checkpoint_id=done.checkpoint_id), timeout=LIMIT)
        wait_until(lambda: keeper.fields(program.pid), LIMIT, "a tree that is being restored")
        (criu, *_) = [pid for pid in keeper.descendants(daemon.pid) if "criu" in keeper.describe(pid)]
        os.kill(criu, signal.SIGSTOP)
        late = failed(list(events(updates)), "deadline")
        assert details(late)["phase"] == "restoring"
        assert not keeper.fields(program.pid)
        assert not keeper.descendants(daemon.pid)
        assert not daemon.at_work()
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)


# --- a store that does not answer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_bench() -> Iterator[Bench]:
    with S3Server() as server, Bench(server, {"preflight": 2, "transfer": 0.1, "commit": 1.0}).running() as bench:
        yield bench


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    yield shared_bench
    shared_bench.empty()


@pytest.mark.parametrize("phase", ["preflight", "shipping", "committing"])
def test_a_store_stalls_while_a_workload_is_to_be_killed(bench: Bench, tmp_path: Path, phase: str) -> None:
    """The workload goes on while the store still does not answer, and is not killed when it does: nobody was told `ready`."""
    with Program(tmp_path, python("counter.py", 0.01)) as program:
        with Untouched(program):
            with bench.held(phase) as hold:
                action, updates = bench.begin(program, phase, hold, criu_opts=KILL)
                held = phase != "preflight"
                assert (keeper.state(program.pid) == "T") is held
                runs(program, remaining(bench.daemon, action) + SOON, "at the deadline")
                wait_until(lambda: is_late(bench.daemon, action), LIMIT, "the deadline")
                assert page(bench.daemon, action)["phase"] == phase
            late = failed(list(events(updates)), "deadline")
            assert details(late)["phase"] == phase
        assert not bench.left()


def test_a_store_stalls_while_it_is_read(bench: Bench, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01)) as program:
        before = program.beat()
        done = checkpointed(bench.daemon, program)
        with bench.held("fetching") as hold:
            action, updates = bench.begin_restore(done.checkpoint_id, hold)
            wait_until(lambda: is_late(bench.daemon, action), LIMIT, "the deadline")
        late = failed(list(events(updates)), "deadline")
        assert details(late)["phase"] == "fetching"
        assert not keeper.fields(program.pid)
        assert not bench.daemon.at_work()
        ready(bench.daemon.restore(done.checkpoint_id))
        goes_on(program, before)
