"""Lazy restores with real CRIU: the old process goes on before its memory is there, and never sees a byte that is not its own, whatever
dies meanwhile.

The store is a real S3 server behind a proxy that holds its answers back: so some of the memory is missing for as long as a test wants,
and the tree runs, or waits for it. Its program looks at all of its memory all the time, and says if a piece is ever wrong.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests import keeper, keys
from tests.daemon import Daemon, details, failed, pid_target, ready
from tests.fakes.s3_faults import FOREVER, Answer, FaultProxy, FlipAnswer, Hold
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Program, beats, checkpointed, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

LAZY = {"restore": "lazy"}
ON = {"lazy": True}  # of [criu]
SIZE = 128  # MiB of private memory: 32 frames
SOME = 20  # frames that come before the others are held back; those that CRIU itself needs are among them
PAGES = "pages-"


class Yard:
    """A daemon, its store, and the proxy between them."""

    def __init__(self, daemon: Daemon, proxy: FaultProxy) -> None:
        self.daemon, self.proxy = daemon, proxy

    @contextmanager
    def held(self, after: int = SOME) -> Iterator[Hold]:
        """So many frames come; the others wait until it is released, or this is left."""
        hold = Hold()
        self.proxy.play("GetObject", hold, times=FOREVER, after=after, key=PAGES)
        try:
            yield hold
        finally:
            hold.release()
            self.proxy.heal()

    def begin(self, checkpoint_id: str) -> Restore:
        return Restore(self.daemon, checkpoint_id)


class Restore:
    """A lazy restore that goes on beside the test."""

    def __init__(self, daemon: Daemon, checkpoint_id: str) -> None:
        self.action_id = str(uuid.uuid4())
        self.phases: list[str] = []
        self.seen: list[pb.Event] = []
        command = pb.RestoreCommand(
            checkpoint_id=checkpoint_id, action_id=self.action_id, overrides=pb.Overrides(criu_opts='{"restore": "lazy"}')
        )
        self._updates = daemon.stub.Restore(command, timeout=60)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        with contextlib.suppress(grpc.RpcError):  # the daemon was killed
            for update in self._updates:
                if update.HasField("event"):
                    self.seen.append(update.event)
                else:
                    self.phases.append(update.progress.phase)

    def filling(self) -> None:
        """Returns when it is in that phase."""
        wait_until(lambda: "filling" in self.phases or self.ended, LIMIT, "filling")
        assert not self.ended, self.seen

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def end(self) -> list[pb.Event]:
        self._thread.join(60)
        assert self.ended
        return self.seen


@pytest.fixture(scope="module")
def shared_yard() -> Iterator[Yard]:
    with S3Server() as server, FaultProxy(server.endpoint_url) as proxy:
        s3 = {
            **server.settings().model_dump(exclude_defaults=True), "secret_access_key": server.secret_access_key,
            "endpoint_url": proxy.url, "attempts": 2, "read_timeout": 50.0,
        }  # fmt: skip
        settings = {"store": {"s3": s3}, "limits": {"outage": 20.0, "second": "refuse"}, "criu": ON}
        with Daemon(store=f"s3://{server.bucket}/lazy", arena="256MiB", settings=settings) as daemon:
            yield Yard(daemon, proxy)


@pytest.fixture
def yard(shared_yard: Yard) -> Iterator[Yard]:
    yield shared_yard
    shared_yard.proxy.heal()
    shared_yard.daemon.empty()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with Program(tmp_path, python("watcher.py", SIZE)) as running:
        running.beat()
        yield running


def lazy_pages(daemon: Daemon) -> int:
    (found,) = [pid for pid in keeper.descendants(daemon.pid) if "criu lazy-pages" in keeper.describe(pid)]
    return found


def keeper_of(daemon: Daemon) -> int:
    (found,) = [pid for pid in keeper.descendants(daemon.pid) if "hibernode/keeper.py" in keeper.describe(pid)]
    return found


def insist_never_wrong(program: Program) -> None:
    assert not [line for line in program.log.read_text().splitlines() if line.startswith("wrong")]


def looks_at_all(program: Program) -> None:
    """Once more through all of its memory, and none of it is wrong."""
    until = program.beat().counter + SIZE + 1
    wait_until(lambda: program.beat().counter > until, LIMIT, "a look at all of its memory")
    insist_never_wrong(program)


def insist_gone(daemon: Daemon, program: Program) -> None:
    """Nobody of it is left, nor of what restored it."""
    wait_until(lambda: not keeper.alive(program.pid), LIMIT, "the end of the tree")
    wait_until(lambda: not [pid for pid in keeper.descendants(daemon.pid) if keeper.alive(pid)], LIMIT, "the end of all others")
    assert not daemon.at_work()
    insist_never_wrong(program)


# --- it goes on ----------------------------------------------------------------------------------------------------------------


def test_the_old_process_goes_on_before_its_memory_is_there(yard: Yard, program: Program) -> None:
    before = program.beat()
    done = checkpointed(yard.daemon, program, streams=3)
    with yard.held() as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        program.beat()  # it looks at what has come
        wait_until(hold.held.is_set, LIMIT, "a read that is held back")
        assert [event.status for event in restore.seen] == ["processing"]
        assert not restore.ended
        hold.release()
        last = ready(restore.end())
    goes_on(program, before)
    insist_never_wrong(program)
    assert {"fetching", "restoring", "filling", "probing"} <= set(last.profile.phases)
    assert last.profile.raw_bytes == yard.daemon.manifest(done.checkpoint_id)["raw_bytes"]
    after = beats(program.lines())
    assert {beat.content for beat in after} == {("good",)}
    looks_at_all(program)
    before = program.beat()
    again = checkpointed(yard.daemon, program)  # and it is as good as any other
    ready(yard.daemon.restore(again.checkpoint_id))
    goes_on(program, before)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_several_processes_with_shared_memory_and_a_memfd(yard: Yard, tmp_path: Path, compression: str) -> None:
    with Program(tmp_path, python("watcher.py", 32, "shared", "memfd")) as program:
        wait_until(lambda: len({beat.token for beat in beats(program.lines())}) == 2, LIMIT, "two processes")
        tokens = {beat.token for beat in beats(program.lines())}
        done = checkpointed(yard.daemon, program, compression=compression)
        ready(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY))
        seen = len(program.lines())
        wait_until(lambda: len(program.lines()) > seen + 200, LIMIT, "both, once through all of it")
        assert {beat.token for beat in beats(program.lines())} == tokens
        insist_never_wrong(program)


def test_what_is_staged_for_criu_is_held_once(yard: Yard, tmp_path: Path) -> None:
    """Shared memory comes before the tree runs: CRIU frees it of its files as it reads, and it is not held twice for the whole fill."""
    with Program(tmp_path, python("watcher.py", SIZE, "shared", "memfd")) as program:
        wait_until(lambda: len({beat.token for beat in beats(program.lines())}) == 2, LIMIT, "two processes")
        done = checkpointed(yard.daemon, program, compression="none")
        with yard.held() as hold:
            restore = yard.begin(done.checkpoint_id)
            restore.filling()
            staged = [path.stat() for path in yard.daemon.work_dir.rglob("pages-*.img")]
            assert sum(each.st_size for each in staged) >= 32 << 20, "shared memory and the memfd"
            assert sum(each.st_blocks * 512 for each in staged) < 1 << 20
            hold.release()
            ready(restore.end())
        looks_at_all(program)


def test_an_encrypted_checkpoint(tmp_path: Path) -> None:
    settings = {"encryption": {"key": keys.wrapper(tmp_path, "key")}, "criu": ON}
    with Program(tmp_path, python("watcher.py", 16)) as program, Daemon(settings=settings) as daemon:
        before = program.beat()
        done = checkpointed(daemon, program)
        ready(daemon.restore(done.checkpoint_id, criu_opts=LAZY))
        goes_on(program, before)
        insist_never_wrong(program)


def test_a_job_keeps_its_name_and_its_log(yard: Yard) -> None:
    job = yard.daemon.run("trainer", python("watcher.py", 16))
    wait_until(lambda: beats(yard.daemon.job_lines("trainer")), LIMIT, "a beat")
    done = ready(yard.daemon.checkpoint(pb.Target(pod_name="trainer"), criu_opts={"leave_running": False}))
    wait_until(lambda: yard.daemon.jobs()["trainer"].state != "running", LIMIT, "its end")
    at = len(yard.daemon.job_lines("trainer"))
    ready(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY))
    assert yard.daemon.jobs()["trainer"].pid == job.pid
    wait_until(lambda: len(yard.daemon.job_lines("trainer")) > at + 20, LIMIT, "more beats")
    assert len({beat.token for beat in beats(yard.daemon.job_lines("trainer"))}) == 1
    assert not [line for line in yard.daemon.job_lines("trainer") if line.startswith("wrong")]


def test_two_at_once(yard: Yard, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        programs = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            programs.append(stack.enter_context(Program(tmp_path / name, python("watcher.py", 48))))
        befores = [program.beat() for program in programs]
        made = [checkpointed(yard.daemon, program).checkpoint_id for program in programs]
        with yard.held(after=SOME) as hold:
            restores = [yard.begin(checkpoint_id) for checkpoint_id in made]
            wait_until(hold.held.is_set, LIMIT, "a read that is held back")
            hold.release()
            for restore in restores:
                ready(restore.end())
        for program, before in zip(programs, befores, strict=True):
            goes_on(program, before)
            insist_never_wrong(program)


# --- it changes while it is filled ---------------------------------------------------------------------------------------------


def test_a_child_that_is_forked_meanwhile_has_all_of_it(yard: Yard, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Program(tmp_path, python("watcher.py", SIZE, "fork", go)) as program:
        program.said("waits")
        done = checkpointed(yard.daemon, program)
        go.touch()
        with yard.held() as hold:
            restore = yard.begin(done.checkpoint_id)
            restore.filling()
            wait_until(lambda: [pid for pid in keeper.descendants(program.pid) if keeper.alive(pid)], LIMIT, "the child")
            (child,) = keeper.descendants(program.pid)
            failed(yard.daemon.checkpoint(pid_target(child)), "filling")  # its pid is in no image
            hold.release()
            ready(restore.end())
        assert program.said("child") == [str(SIZE), "0"]
        insist_never_wrong(program)


def test_a_tree_that_empties_moves_and_unmaps_memory_meanwhile(yard: Yard, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Program(tmp_path, python("watcher.py", SIZE, "change", go)) as program:
        program.said("waits")
        done = checkpointed(yard.daemon, program)
        go.touch()
        with yard.held() as hold:
            restore = yard.begin(done.checkpoint_id)
            restore.filling()
            assert program.said("emptied") == ["True"]  # without a byte from the store
            hold.release()
            ready(restore.end())
        assert program.said("moved") == ["True"]
        looks_at_all(program)


# --- something dies --------------------------------------------------------------------------------------------------------------


def kill_lazy_pages(daemon: Daemon) -> None:
    os.kill(lazy_pages(daemon), signal.SIGKILL)


def kill_lazy_pages_twice(daemon: Daemon) -> None:
    pid = lazy_pages(daemon)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def end_lazy_pages(daemon: Daemon) -> None:
    os.kill(lazy_pages(daemon), signal.SIGTERM)


def kill_the_keeper(daemon: Daemon) -> None:
    os.kill(keeper_of(daemon), signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (kill_lazy_pages, "lazy_pages"),
        (kill_lazy_pages_twice, "lazy_pages"),
        (end_lazy_pages, "lazy_pages"),
        (kill_the_keeper, "lazy_keeper"),
    ],
)
def test_whoever_dies_the_tree_is_killed(yard: Yard, program: Program, end: Callable[[Daemon], None], reason: str) -> None:
    before = program.beat()
    done = checkpointed(yard.daemon, program)
    with yard.held() as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        wait_until(hold.held.is_set, LIMIT, "a read that is held back")
        end(yard.daemon)
        wait_until(lambda: not keeper.alive(program.pid), LIMIT, "the end of the tree, though the store still does not answer")
        hold.release()
        last = failed(restore.end(), "restore_failed")
        assert details(last)["reason"] == reason
        insist_gone(yard.daemon, program)
    program.kill()  # it is dead: what it says from now on, it says restored again
    ready(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY))
    goes_on(program, before)
    insist_never_wrong(program)


@pytest.mark.parametrize("with_lazy_pages", [False, True])
def test_the_daemon_dies_and_the_tree_is_killed(yard: Yard, program: Program, *, with_lazy_pages: bool) -> None:
    before = program.beat()
    done = checkpointed(yard.daemon, program)
    with yard.held() as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        wait_until(hold.held.is_set, LIMIT, "a read that is held back")
        keeping, serving = keeper_of(yard.daemon), lazy_pages(yard.daemon)
        yard.daemon.kill()
        if with_lazy_pages:
            with contextlib.suppress(ProcessLookupError):
                os.kill(serving, signal.SIGKILL)
        wait_until(lambda: not any(map(keeper.alive, (program.pid, keeping, serving))), LIMIT, "the end of them")
        insist_never_wrong(program)
        restore.end()
    yard.daemon.start()
    (action,) = [a for a in yard.daemon.stub.ListActions(pb.Empty(), timeout=10).actions if a.action_id == restore.action_id]
    assert action.last.code == "interrupted", action.last.message
    insist_gone(yard.daemon, program)
    program.kill()  # it is dead: what it says from now on, it says restored again
    ready(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY))
    goes_on(program, before)
    insist_never_wrong(program)


def test_one_that_hangs_is_found_out(yard: Yard, program: Program) -> None:
    """Nothing waits for the store, and nobody asks for what is missing: half a minute of that is enough."""
    done = checkpointed(yard.daemon, program)
    with yard.held() as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        os.kill(lazy_pages(yard.daemon), signal.SIGSTOP)
        hold.release()
        last = failed(restore.end(), "restore_failed")
        assert details(last)["reason"] == "lazy_stuck"
        insist_gone(yard.daemon, program)


def test_a_forked_child_dies_with_it(yard: Yard, tmp_path: Path) -> None:
    """Its userfaultfd is one that nobody but `criu lazy-pages` was ever given."""
    go = tmp_path / "go"
    with Program(tmp_path, python("watcher.py", SIZE, "fork", go)) as program:
        program.said("waits")
        done = checkpointed(yard.daemon, program)
        go.touch()
        with yard.held() as hold:
            restore = yard.begin(done.checkpoint_id)
            restore.filling()
            wait_until(lambda: [pid for pid in keeper.descendants(program.pid) if keeper.alive(pid)], LIMIT, "the child")
            (child,) = keeper.descendants(program.pid)
            kill_lazy_pages(yard.daemon)
            wait_until(lambda: not keeper.alive(child) and not keeper.alive(program.pid), LIMIT, "the end of both")
            hold.release()
            failed(restore.end(), "restore_failed")
            insist_gone(yard.daemon, program)
        assert not [line for line in program.log.read_text().splitlines() if line.startswith("child")]


def test_a_tree_that_ends_by_itself_meanwhile_was_restored(yard: Yard, program: Program) -> None:
    done = checkpointed(yard.daemon, program)
    with yard.held() as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        os.kill(program.pid, signal.SIGKILL)
        hold.release()
        ready(restore.end())
        wait_until(lambda: not yard.daemon.at_work(), LIMIT, "that its mark is removed: `ready` is on disk")
        insist_gone(yard.daemon, program)


# --- the store, people ------------------------------------------------------------------------------------------------------------


def test_a_store_that_does_not_answer_for_a_while_is_asked_again(yard: Yard, program: Program) -> None:
    before = program.beat()
    done = checkpointed(yard.daemon, program)
    yard.proxy.play("GetObject", Answer(503, "SlowDown"), times=12, after=SOME, key=PAGES)
    ready(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY))
    goes_on(program, before)
    insist_never_wrong(program)


def test_a_store_that_stays_away_ends_it(yard: Yard, program: Program) -> None:
    done = checkpointed(yard.daemon, program)
    with Daemon(
        store=yard.daemon.store,
        settings={"store": yard.daemon._settings["store"], "limits": {"outage": 0.3, "attempts": 1}, "criu": ON},
    ) as daemon:
        yard.proxy.play("GetObject", Answer(503, "SlowDown"), times=FOREVER, after=SOME, key=PAGES)
        failed(daemon.restore(done.checkpoint_id, criu_opts=LAZY), "store_unavailable")
        insist_gone(daemon, program)


def test_a_damaged_frame_is_not_handed_out(yard: Yard, program: Program) -> None:
    done = checkpointed(yard.daemon, program)
    yard.proxy.play("GetObject", FlipAnswer(), times=FOREVER, after=SOME, key=PAGES)
    last = failed(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY), "corrupt")
    assert "filling" in last.profile.phases
    insist_gone(yard.daemon, program)


def test_a_cancel_leaves_nothing(yard: Yard, program: Program) -> None:
    done = checkpointed(yard.daemon, program)
    with yard.held() as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        wait_until(hold.held.is_set, LIMIT, "a read that is held back")
        assert yard.daemon.stub.Cancel(pb.ActionId(action_id=restore.action_id), timeout=10).found
        wait_until(lambda: not keeper.alive(program.pid), LIMIT, "the end of the tree, though the store still does not answer")
        hold.release()
        failed(restore.end(), "cancelled")
        insist_gone(yard.daemon, program)


def test_a_tree_that_is_filled_is_nobodys_to_checkpoint(yard: Yard, tmp_path: Path) -> None:
    with Program(tmp_path, python("watcher.py", SIZE, "shared")) as program:
        wait_until(lambda: len({beat.token for beat in beats(program.lines())}) == 2, LIMIT, "two processes")
        done = checkpointed(yard.daemon, program)
        with yard.held() as hold:
            restore = yard.begin(done.checkpoint_id)
            restore.filling()
            for pid in (program.pid, *keeper.descendants(program.pid)):
                failed(yard.daemon.checkpoint(pid_target(pid)), "busy")
            hold.release()
            ready(restore.end())
        ready(yard.daemon.checkpoint(program.target))
        insist_never_wrong(program)


def test_a_process_with_very_many_mappings_is_refused(yard: Yard, tmp_path: Path) -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    with Program(tmp_path, python("memory.py", "mappings", most + 100)) as program:
        before = program.beat()
        done = checkpointed(yard.daemon, program)
        failed(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY), "lazy_mappings")
        insist_gone(yard.daemon, program)
        ready(yard.daemon.restore(done.checkpoint_id))
        goes_on(program, before)


def test_a_checkpoint_does_not_make_its_restores_lazy(yard: Yard, program: Program) -> None:
    refused = failed(yard.daemon.checkpoint(program.target, criu_opts=LAZY), "criu_opts")
    assert "restore" in refused.message
    done = ready(yard.daemon.checkpoint(program.target, criu_opts={"restore": "eager"}))
    assert "restore" not in yard.daemon.manifest(done.checkpoint_id)["criu_opts"]
