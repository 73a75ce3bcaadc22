"""Restores that fail leave nothing running, and restores of trees that live on meanwhile do not fail."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests import keeper
from tests.daemon import Daemon, failed, pb, pid_target, ready
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Program, checkpointed, goes_on, python

pytestmark = pytest.mark.node


def below(daemon: Daemon) -> list[str]:
    """What lives below the daemon."""
    return [keeper.describe(pid) for pid in keeper.descendants(daemon.pid) if keeper.alive(pid)]


@contextlib.contextmanager
def criu_dies_when(daemon: Daemon, pid: int) -> Iterator[None]:
    """CRIU is SIGKILLed as soon as `pid` is there: in the middle of a restore."""

    def kill() -> None:
        wait_until(lambda: keeper.fields(pid), LIMIT, f"pid {pid}")
        for worker in keeper.descendants(daemon.pid):
            if "restore --rpc" in keeper.describe(worker) and worker != pid:
                os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        killer.join()


def test_a_zombie_is_restored_as_one(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01, "zombie")) as program:
        zombie = int(program.said("zombie")[0])
        before = program.beat()
        done = checkpointed(daemon, program)
        image = daemon.manifest(done.checkpoint_id)["images"][0]
        assert {task["pid"]: task["dead"] for task in image["tasks"]} == {program.pid: False, zombie: True}
        ready(daemon.restore(done.checkpoint_id))
        assert keeper.state(zombie) == "Z"
        goes_on(program, before)


def test_children_that_come_and_go_do_not_fail_a_restore(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, ["/bin/bash", "-c", "while :; do sleep 0.01; echo beat token $((++n)) same; done"]) as program:
        for _ in range(3):
            before = program.beat()
            done = checkpointed(daemon, program)
            ready(daemon.restore(done.checkpoint_id))
            goes_on(program, before)


def test_a_restored_process_cannot_signal_the_group_of_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    """It led no session: it is in that of CRIU, which restored it. Once its `kill(0, SIGKILL)` ended the daemon."""
    command = " ".join(python("counter.py", 0.01)) + " & wait"
    with Program(tmp_path, ["/bin/sh", "-c", command]) as program:
        program.beat()
        (child,) = keeper.descendants(program.pid)
        done = ready(daemon.checkpoint(pid_target(child)))
        program.kill()
        ready(daemon.restore(done.checkpoint_id))
        assert os.getpgid(child) != os.getpgid(daemon.pid)
        assert os.getsid(child) != os.getsid(daemon.pid)
        os.killpg(os.getpgid(child), signal.SIGKILL)
        wait_until(lambda: not below(daemon), LIMIT, "the end of the restored process")
        assert keeper.alive(daemon.pid)
        assert daemon.manifest(done.checkpoint_id)


def test_a_restore_whose_criu_is_killed_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01, "300")) as program:
        program.beat()
        done = checkpointed(daemon, program, compression="none")
        with criu_dies_when(daemon, program.pid):
            failed(daemon.restore(done.checkpoint_id), "restore_failed")
        assert not below(daemon)
        ready(daemon.restore(done.checkpoint_id))


def test_a_daemon_that_dies_while_criu_restores_leaves_nothing_to_the_next(daemon: Daemon, tmp_path: Path) -> None:
    """What lives in the restore's place is of it, CRIU too: nobody has to look at it by hand."""
    with Program(tmp_path, python("counter.py", 0.01, "300")) as program:
        program.beat()
        done = checkpointed(daemon, program, compression="none")
        command = pb.RestoreCommand(action_id=str(uuid.uuid4()), checkpoint_id=done.checkpoint_id)
        updates = daemon.stub.Restore(command, timeout=LIMIT)
        wait_until(lambda: keeper.fields(program.pid), LIMIT, f"pid {program.pid}")
        daemon.kill()
        with contextlib.suppress(grpc.RpcError):
            list(updates)
        daemon.start()
        (action,) = [a for a in daemon.stub.ListActions(pb.Empty(), timeout=10).actions if a.action_id == command.action_id]
        assert action.last.code == "interrupted", action.last.message
        assert not keeper.alive(program.pid)
        ready(daemon.restore(done.checkpoint_id))


def test_a_restored_tree_whose_root_ends_at_once_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("orphans.py", tmp_path / "end")) as program:
        program.beat()
        done = checkpointed(daemon, program)
        (tmp_path / "end").touch()
        for _ in range(10):  # it may be looked at before it ends: then it was restored, and what it leaves behind is its own
            last = daemon.restore(done.checkpoint_id)[-1]
            if last.status == "error":
                break
            for pid in filter(keeper.alive, keeper.descendants(daemon.pid)):
                keeper.kill_tree(pid)
        failed([last], "restore_failed")
        assert not below(daemon)
