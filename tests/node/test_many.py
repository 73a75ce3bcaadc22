"""Many workloads of one node at once: they share the arena, nobody stands still for what another ships, and all of it comes back."""

from __future__ import annotations

import contextlib
import re
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests import keeper
from tests.daemon import Daemon, events, failed, ready
from tests.keeper import wait_until
from tests.nats_server import free_port
from tests.node.workload import LIMIT, Program, Untouched, goes_on, python

pytestmark = pytest.mark.node

NAMED = (("frozen", "slow:80"), ("ships", "slow:12"), ("lost", "12"))  # the first has no room in the arena
SLOW = {"compression": "zstd:12", "streams": 1}
SLOWER = {"compression": "zstd:19", "streams": 1}


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """Twelve actions, and an arena in which two of the small workloads have room."""
    with Daemon(arena="64MiB", metrics=f"127.0.0.1:{free_port()}", settings={"limits": {"actions": 12}}) as running:
        yield running


def metric(daemon: Daemon, name: str) -> float:
    with urllib.request.urlopen(f"http://{daemon.metrics}/metrics", timeout=LIMIT) as page:
        found = re.search(rf"^{re.escape(name)} (\S+)$", page.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def waiting(daemon: Daemon) -> float:
    return metric(daemon, 'hibernode_queue_depth{queue="arena"}')


def insist_empty(daemon: Daemon) -> None:
    assert (metric(daemon, "hibernode_arena_used_bytes"), waiting(daemon)) == (0, 0)


def started(stack: contextlib.ExitStack, directory: Path, *wishes: str) -> Program:
    directory.mkdir()
    return stack.enter_context(Program(directory, python("counter.py", 0.01, *wishes)))


def test_nine_at_once_of_which_one_does_not_fit(daemon: Daemon, tmp_path: Path) -> None:
    """Each of them is restored, and goes on."""
    with contextlib.ExitStack() as stack:
        programs = [started(stack, tmp_path / str(n), "12") for n in range(8)] + [started(stack, tmp_path / "large", "96")]
        before = [program.beat() for program in programs]
        with ThreadPoolExecutor(len(programs)) as pool:
            done = [ready(found) for found in pool.map(lambda program: daemon.checkpoint(program.target), programs)]
        insist_empty(daemon)
        for program in programs:
            program.kill()
        for event in done:
            ready(daemon.restore(event.checkpoint_id))
        for program, beat in zip(programs, before, strict=True):
            goes_on(program, beat)


def test_who_waits_for_a_part_runs_on_and_can_be_cancelled(daemon: Daemon, tmp_path: Path) -> None:
    """The arena is full of one that is slow to ship. Of two that wait behind it one is cancelled; the other has its turn."""
    with contextlib.ExitStack() as stack:
        slow, large, small = (started(stack, tmp_path / wish, wish) for wish in ("slow:48", "40", "4"))
        first = iter(daemon.begin_checkpoint(slow.target, **SLOW))
        with Untouched(large):
            assert next(event for event in events(first) if event.status == "checkpoint_created")
            second = str(uuid.uuid4())
            line = daemon.begin_checkpoint(large.target, action_id=second)
            wait_until(lambda: waiting(daemon) == 1, LIMIT, "one that waits")
            last = daemon.begin_checkpoint(small.target)
            wait_until(lambda: waiting(daemon) == 2, LIMIT, "two that wait")
            assert keeper.state(small.pid) in ("R", "S", "D")
            assert daemon.stub.Cancel(pb.ActionId(action_id=second), timeout=LIMIT).found
            assert "dumping" not in failed(list(events(line)), "cancelled").profile.phases
        ready(list(events(last)))
        assert list(events(first))[-1].status == "ready"
    insist_empty(daemon)


def test_whatever_fails_gives_back_what_it_had(daemon: Daemon, tmp_path: Path) -> None:
    """One is cancelled while it stands still, one while it ships, one cannot be committed. Then one that needs all of the arena has it."""
    with contextlib.ExitStack() as stack:
        frozen, ships, lost = (started(stack, tmp_path / name, wish) for name, wish in NAMED)
        ends = [Untouched(program) for program in (frozen, ships, lost)]
        for end in ends:
            stack.enter_context(end)
        checkpoint_id = str(uuid.uuid4())
        (daemon.store_dir / checkpoint_id / "manifest.json").mkdir(parents=True)
        committed = daemon.begin_checkpoint(lost.target, checkpoint_id=checkpoint_id)
        shipping = iter(daemon.begin_checkpoint(ships.target, **SLOWER))  # until it is cancelled
        created = next(event for event in events(shipping) if event.status == "checkpoint_created")
        dumping = iter(daemon.begin_checkpoint(frozen.target, **SLOW))
        action = next(u.progress.action_id for u in dumping if u.HasField("progress") and u.progress.phase == "dumping")
        wait_until(lambda: keeper.state(frozen.pid) in ("T", "t"), LIMIT, "a frozen workload")
        for each in (action, created.action_id):
            assert daemon.stub.Cancel(pb.ActionId(action_id=each), timeout=LIMIT).found
        failed(list(events(dumping)), "cancelled")
        failed(list(events(shipping)), "cancelled")
        assert list(events(committed))[-1].status == "error"
        wait_until(lambda: metric(daemon, "hibernode_arena_used_bytes") == 0, LIMIT, "an empty arena")
        ready(daemon.checkpoint(frozen.target, compression="none"))
    insist_empty(daemon)
