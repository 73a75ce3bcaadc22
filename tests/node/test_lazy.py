"""Restores whose pages the filler brings, with real CRIU. Lazy ones: the old process goes on before its memory is there, and never sees a
byte that is not its own, whatever dies meanwhile. Others: it does not run before all of it is there, whatever dies meanwhile.

The store is a real S3 server behind a proxy that holds its answers back: so some of the memory is missing for as long as a test wants,
and the tree runs, or waits for it. Its program looks at all of its memory all the time, and says if a piece is ever wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.s3 import S3
from hibernode.model import FRAME_PAGES, Manifest, Meter
from hibernode.transfer.receive import Receiver
from hibernode.transfer.seal import Seal
from hibernode.transfer.serve import Plan
from tests import keeper, keys
from tests.daemon import Daemon, details, failed, pid_target, ready
from tests.fakes.s3_faults import FOREVER, Answer, FaultProxy, FlipAnswer, Hold
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Program, beats, checkpointed, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

LAZY = {"restore": "lazy"}
SIZE = 128  # MiB of private memory: 32 frames
# Reads, of four frames at most, before the others are held back. Those of what CRIU itself needs are among them: 2 or 3, with shared
# memory 4 to 6, as its frames happen to lie in the two streams.
SOME = 8
PAGES = "pages-"


class Yard:
    """A daemon, its store, and the proxy between them."""

    def __init__(self, daemon: Daemon, proxy: FaultProxy, store: S3) -> None:
        """`store`: the same, not by the proxy."""
        self.daemon, self.proxy, self._store = daemon, proxy, store
        self._begun: list[Restore] = []

    @contextmanager
    def held(self, after: int = SOME, key: str = PAGES, some: range | None = None) -> Iterator[Hold]:
        """So many reads come; the others, of `some` bytes of that object where that is said, wait until it is released, or this is left."""
        hold = Hold()
        self.proxy.play("GetObject", hold, times=FOREVER, after=after, key=key, some=some)
        try:
            yield hold
        finally:
            hold.release()
            self.proxy.heal()

    def held_in_the_middle(self, checkpoint_id: str, part: float = 0.25) -> AbstractContextManager[Hold]:
        """One frame of what the program looks at, by `part` from its beginning: neither CRIU nor who is being restored needs it, and it is
        not all in without it. A quarter: of two processes it is the first one's."""
        manifest = Manifest.model_validate_json(json.dumps(self.daemon.manifest(checkpoint_id)))
        (image,) = manifest.images
        receiver = Receiver(self._store, Seal(checkpoint_id), image, 2, Meter())
        index = receiver.fetch_index()
        plan = Plan(receiver.sources)
        whole = [row for row in plan.rows.tolist() if plan.pages(row) == index.frames["pages"][row] == FRAME_PAGES]
        frame = index.frames[whole[int(len(whole) * part)]]
        start = int(frame["offset"])
        key = f"{checkpoint_id}/{image.streams[int(frame['stream'])].key}"
        return self.held(0, key, range(start, start + int(frame["stored"])))

    def begin(self, checkpoint_id: str, how: str = "lazy") -> Restore:
        self._begun.append(Restore(self.daemon, checkpoint_id, how))
        return self._begun[-1]

    def empty(self) -> None:
        """For the next test: a restore that a failed one has left is none of its business."""
        self.proxy.heal()
        begun, self._begun = self._begun, []
        for restore in begun:
            restore.end()
        self.daemon.empty()


class Restore:
    """A restore that goes on beside the test."""

    def __init__(self, daemon: Daemon, checkpoint_id: str, how: str) -> None:
        self.action_id = str(uuid.uuid4())
        self.phases: list[str] = []
        self.seen: list[pb.Event] = []
        command = pb.RestoreCommand(
            checkpoint_id=checkpoint_id, action_id=self.action_id, overrides=pb.Overrides(criu_opts=json.dumps({"restore": how}))
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
        settings = {"store": {"s3": s3}, "limits": {"outage": 20.0, "second": "refuse"}}
        with Daemon(store=f"s3://{server.bucket}/lazy", arena="256MiB", settings=settings) as daemon:
            yield Yard(daemon, proxy, S3(server.bucket, "lazy", server.settings()))


@pytest.fixture
def yard(shared_yard: Yard) -> Iterator[Yard]:
    yield shared_yard
    shared_yard.empty()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with Program(tmp_path, python("watcher.py", SIZE)) as running:
        running.beat()
        yield running


def keeper_of(daemon: Daemon) -> int:
    found, *_ = [pid for pid in keeper.descendants(daemon.pid) if "hibernode.keeper" in keeper.describe(pid)]
    return found


def filler_of(daemon: Daemon) -> int:
    (found,) = keeper.descendants(keeper_of(daemon))
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
    program.beat()
    done = checkpointed(yard.daemon, program, criu_opts={"leave_running": False})
    before = beats(program.log.read_text().splitlines())[-1]  # after which it has said nothing more
    at = before.counter % SIZE / SIZE  # it looks there next
    with yard.held_in_the_middle(done.checkpoint_id, 0.75 if at < 0.375 else 0.25) as hold:  # what it comes to much later
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        assert (program.beat().token, program.beat().counter > before.counter) == (before.token, True), "what it says now"
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
        with yard.held(after=9) as hold:
            restore = yard.begin(done.checkpoint_id)
            restore.filling()
            staged = [path.stat() for path in yard.daemon.work_dir.rglob("pages-*.img")]
            assert sum(each.st_size for each in staged) >= 32 << 20, "shared memory and the memfd"
            assert sum(each.st_blocks * 512 for each in staged) < 1 << 20
            hold.release()
            ready(restore.end())
        looks_at_all(program)


def test_an_encrypted_checkpoint(tmp_path: Path) -> None:
    settings = {"encryption": {"key": keys.wrapper(tmp_path, "key")}}
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


def kill_the_filler(daemon: Daemon) -> None:
    os.kill(filler_of(daemon), signal.SIGKILL)


def kill_the_filler_twice(daemon: Daemon) -> None:
    pid = filler_of(daemon)
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def end_the_filler(daemon: Daemon) -> None:
    os.kill(filler_of(daemon), signal.SIGTERM)


def kill_the_keeper(daemon: Daemon) -> None:
    os.kill(keeper_of(daemon), signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (kill_the_filler, "lazy_pages"),
        (kill_the_filler_twice, "lazy_pages"),
        (end_the_filler, "lazy_pages"),
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


@pytest.mark.parametrize("with_filler", [False, True])
def test_the_daemon_dies_and_the_tree_is_killed(yard: Yard, program: Program, *, with_filler: bool) -> None:
    before = program.beat()
    done = checkpointed(yard.daemon, program)
    with yard.held() as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        wait_until(hold.held.is_set, LIMIT, "a read that is held back")
        keeping, serving = keeper_of(yard.daemon), filler_of(yard.daemon)
        yard.daemon.kill()
        if with_filler:
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
        os.kill(filler_of(yard.daemon), signal.SIGSTOP)
        hold.release()
        last = failed(restore.end(), "restore_failed")
        assert details(last)["reason"] == "lazy_stuck"
        insist_gone(yard.daemon, program)


def test_a_forked_child_dies_with_it(yard: Yard, tmp_path: Path) -> None:
    """Its userfaultfd is one that nobody but the filler was ever given."""
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
            kill_the_filler(yard.daemon)
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
        settings={"store": yard.daemon._settings["store"], "limits": {"outage": 0.3, "attempts": 1}},
    ) as daemon:
        yard.proxy.play("GetObject", Answer(503, "SlowDown"), times=FOREVER, after=SOME, key=PAGES)
        failed(daemon.restore(done.checkpoint_id, criu_opts=LAZY), "store_unavailable")
        insist_gone(daemon, program)


def test_a_damaged_frame_is_not_handed_out(yard: Yard, program: Program) -> None:
    done = checkpointed(yard.daemon, program)
    yard.proxy.play("GetObject", FlipAnswer(), times=FOREVER, after=SOME, key=PAGES)
    last = failed(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY), "corrupt")
    assert "restoring" in last.profile.phases
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


def test_a_process_with_very_many_mappings(yard: Yard, tmp_path: Path) -> None:
    """More than half of what it may have: CRIU's own `criu lazy-pages` splits them, and meets the limit."""
    most = int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    with Program(tmp_path, python("memory.py", "mappings", most + 100)) as program:
        before = program.beat()
        done = checkpointed(yard.daemon, program)
        ready(yard.daemon.restore(done.checkpoint_id, criu_opts=LAZY))
        goes_on(program, before)


def test_an_increment(yard: Yard, program: Program) -> None:
    """Its pages lie in two checkpoints, and the tree runs before those of either are there."""
    first = yard.daemon.settled(ready(yard.daemon.checkpoint(program.target, criu_opts={"increment": "auto"})))
    before = program.beat()
    done = checkpointed(yard.daemon, program, criu_opts={"increment": "auto"})
    assert yard.daemon.manifest(done.checkpoint_id)["images"][0]["bases"][0]["checkpoint_id"] == first.checkpoint_id
    with yard.held(after=9) as hold:
        restore = yard.begin(done.checkpoint_id)
        restore.filling()
        wait_until(hold.held.is_set, LIMIT, "a read that is held back")
        hold.release()
        ready(restore.end())
    goes_on(program, before)
    looks_at_all(program)


def test_a_checkpoint_does_not_make_its_restores_lazy(yard: Yard, program: Program) -> None:
    refused = failed(yard.daemon.checkpoint(program.target, criu_opts=LAZY), "criu_opts")
    assert "restore" in refused.message
    done = ready(yard.daemon.checkpoint(program.target, criu_opts={"restore": "eager"}))
    assert "restore" not in yard.daemon.manifest(done.checkpoint_id)["criu_opts"]


# --- not lazy: CRIU holds the tree until all is in --------------------------------------------------------------------------------


def tracer_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("TracerPid:"))


@contextmanager
def held_by_criu(yard: Yard, program: Program) -> Iterator[tuple[Restore, Hold, pb.Event]]:
    """A restore that is not lazy: all is made but for pages that the store holds back, and nobody runs. `Program.lines` has nothing yet of
    what it says from now on. When this is left they are gone."""
    pids = [program.pid, *keeper.descendants(program.pid)]
    done = checkpointed(yard.daemon, program)
    with yard.held_in_the_middle(done.checkpoint_id) as hold:
        restore = yard.begin(done.checkpoint_id, "eager")
        until_held(restore, hold, program)
        wait_until(lambda: {keeper.state(pid) for pid in pids} == {"t"}, LIMIT, "all of them, held")
        yield restore, hold, done
        assert not program.lines(), "it has run"
        wait_until(lambda: not any(map(keeper.alive, pids)), LIMIT, "the end of all")


def until_held(restore: Restore, hold: Hold, program: Program) -> None:
    """CRIU waits for an answer; it traces the tree some milliseconds before."""
    wait_until(hold.held.is_set, LIMIT, "a read that is held back")
    wait_until(lambda: "holding" in restore.phases or restore.ended, LIMIT, "a restore that is held")
    wait_until(lambda: keeper.alive(program.pid) and keeper.state(program.pid) == "t", LIMIT, "a tree that is made, and held")


def test_without_lazy_nobody_runs_before_all_is_in(yard: Yard, program: Program) -> None:
    before = program.beat()
    done = checkpointed(yard.daemon, program)
    with yard.held_in_the_middle(done.checkpoint_id) as hold:
        restore = yard.begin(done.checkpoint_id, "eager")
        until_held(restore, hold, program)
        failed(yard.daemon.checkpoint(program.target), "busy")
        assert not program.lines()
        assert not restore.ended
        hold.release()
        last = ready(restore.end())
    assert "filling" not in last.profile.phases
    assert last.profile.raw_bytes == yard.daemon.manifest(done.checkpoint_id)["raw_bytes"]
    goes_on(program, before)
    looks_at_all(program)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (kill_the_filler, "lazy_pages"),
        (end_the_filler, "lazy_pages"),
        (kill_the_keeper, "lazy_keeper"),
    ],
)
def test_whoever_dies_nobody_has_run(yard: Yard, program: Program, end: Callable[[Daemon], None], reason: str) -> None:
    before = program.beat()
    with held_by_criu(yard, program) as (restore, hold, done):
        end(yard.daemon)
        wait_until(lambda: not keeper.alive(program.pid), LIMIT, "the end of the tree, though the store still does not answer")
        hold.release()
        assert details(failed(restore.end(), "restore_failed"))["reason"] == reason
        insist_gone(yard.daemon, program)
    program.kill()
    ready(yard.daemon.restore(done.checkpoint_id))
    goes_on(program, before)
    insist_never_wrong(program)


def test_criu_dies_and_the_tree_is_killed(yard: Yard, program: Program) -> None:
    """That held it: it runs for a moment, as one that is restored lazily does."""
    done = checkpointed(yard.daemon, program)
    with yard.held_in_the_middle(done.checkpoint_id) as hold:
        restore = yard.begin(done.checkpoint_id, "eager")
        until_held(restore, hold, program)
        os.kill(tracer_of(program.pid), signal.SIGKILL)
        wait_until(lambda: not keeper.alive(program.pid), LIMIT, "the end of the tree, though the store still does not answer")
        hold.release()
        assert details(failed(restore.end(), "restore_failed"))["reason"] == "criu_ended"
        insist_gone(yard.daemon, program)


@pytest.mark.parametrize("after", [0.0, 0.01, 0.03])
def test_the_daemon_dies_while_criu_makes_it(yard: Yard, program: Program, after: float) -> None:
    """As soon as the process is there, or some milliseconds later: before CRIU holds it, or after."""
    done = checkpointed(yard.daemon, program)
    with yard.held_in_the_middle(done.checkpoint_id):
        restore = yard.begin(done.checkpoint_id, "eager")
        wait_until(lambda: keeper.alive(program.pid), LIMIT, "a process that is being made")
        others = keeper_of(yard.daemon), filler_of(yard.daemon)
        time.sleep(after)
        yard.daemon.kill()
        wait_until(lambda: not any(map(keeper.alive, (program.pid, *others))), LIMIT, "the end of them")
        restore.end()
    assert not program.lines(), "it has run"
    yard.daemon.start()
    insist_gone(yard.daemon, program)


def test_the_daemon_dies_and_nobody_has_run(yard: Yard, program: Program) -> None:
    """CRIU would let the tree run as soon as its socket is closed: the keeper has it, too."""
    before = program.beat()
    with held_by_criu(yard, program) as (restore, _, done):
        others = keeper_of(yard.daemon), filler_of(yard.daemon), tracer_of(program.pid)
        yard.daemon.kill()
        wait_until(lambda: not any(map(keeper.alive, (program.pid, *others))), LIMIT, "the end of them")
        restore.end()
    yard.daemon.start()
    insist_gone(yard.daemon, program)
    program.kill()
    ready(yard.daemon.restore(done.checkpoint_id))
    goes_on(program, before)


@pytest.mark.parametrize("who", ["program", "pair"])
def test_a_cancel_while_it_is_held_leaves_nothing(yard: Yard, request: pytest.FixtureRequest, who: str) -> None:
    program: Program = request.getfixturevalue(who)
    with held_by_criu(yard, program) as (restore, hold, _):
        assert yard.daemon.stub.Cancel(pb.ActionId(action_id=restore.action_id), timeout=10).found
        wait_until(lambda: not keeper.alive(program.pid), LIMIT, "the end of the tree, though the store still does not answer")
        hold.release()
        failed(restore.end(), "cancelled")
        insist_gone(yard.daemon, program)


@pytest.mark.parametrize("fault", [FlipAnswer(), Answer(503, "SlowDown")], ids=["damaged", "away"])
def test_what_does_not_come_is_told_at_once(yard: Yard, program: Program, fault: FlipAnswer | Answer) -> None:
    done = checkpointed(yard.daemon, program)
    yard.proxy.play("GetObject", fault, times=FOREVER, after=SOME, key=PAGES)
    last = failed(yard.daemon.restore(done.checkpoint_id), "corrupt" if fault == FlipAnswer() else "store_unavailable")
    assert "restoring" in last.profile.phases
    assert last.profile.total_duration < 20e9, "no longer than the attempts of a restore by files"
    insist_gone(yard.daemon, program)
    assert not program.lines()


# --- likewise, several processes ----------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Program]:
    """A shell, and two programs that it has started: nothing of what they have was shared."""
    each = shlex.join(python("watcher.py", SIZE // 2))
    with Program(tmp_path, ["/bin/sh", "-c", f"{each} & {each} & wait"]) as running:
        wait_until(lambda: len(tokens(running)) == 2, LIMIT, "a beat of each")
        assert len(keeper.descendants(running.pid)) == 2
        yield running


def tokens(program: Program) -> set[str]:
    return {beat.token for beat in beats(program.lines())}


def test_without_lazy_nobody_of_a_tree_runs_before_all_is_in(yard: Yard, pair: Program) -> None:
    before, pids = tokens(pair), [pair.pid, *keeper.descendants(pair.pid)]
    done = checkpointed(yard.daemon, pair)
    with yard.held_in_the_middle(done.checkpoint_id) as hold:
        restore = yard.begin(done.checkpoint_id, "eager")
        until_held(restore, hold, pair)
        for pid in pids:
            wait_until(lambda: keeper.state(pid) == "t", LIMIT, "a process that is held")  # noqa: B023 - waited for here
            failed(yard.daemon.checkpoint(pid_target(pid)), "busy")
        assert not pair.lines()
        assert not restore.ended
        hold.release()
        last = ready(restore.end())
    assert "holding" in last.profile.phases
    assert last.profile.raw_bytes == yard.daemon.manifest(done.checkpoint_id)["raw_bytes"]
    wait_until(lambda: len(pair.lines()) > 2 * SIZE, LIMIT, "looks at all of it")
    assert tokens(pair) == before
    insist_never_wrong(pair)


@pytest.mark.parametrize("end", [kill_the_filler, end_the_filler, kill_the_keeper])
def test_whoever_dies_nobody_of_a_tree_has_run(yard: Yard, pair: Program, end: Callable[[Daemon], None]) -> None:
    before = tokens(pair)
    with held_by_criu(yard, pair) as (restore, hold, done):
        end(yard.daemon)
        wait_until(lambda: not keeper.alive(pair.pid), LIMIT, "the end of the tree, though the store still does not answer")
        hold.release()
        failed(restore.end(), "restore_failed")
        insist_gone(yard.daemon, pair)
    pair.kill()
    ready(yard.daemon.restore(done.checkpoint_id))
    wait_until(lambda: tokens(pair) == before, LIMIT, "a beat of each")
    insist_never_wrong(pair)


def test_the_daemon_dies_and_nobody_of_a_tree_has_run(yard: Yard, pair: Program) -> None:
    with held_by_criu(yard, pair) as (restore, _, _):
        others = keeper_of(yard.daemon), filler_of(yard.daemon), tracer_of(pair.pid)
        yard.daemon.kill()
        wait_until(lambda: not any(map(keeper.alive, (pair.pid, *others))), LIMIT, "the end of them")
        restore.end()
    yard.daemon.start()
    insist_gone(yard.daemon, pair)


def test_one_of_a_tree_dies_and_the_others_do_not_run(yard: Yard, pair: Program) -> None:
    """For CRIU would let go of the root, before it sees that it cannot let go of the dead."""
    before = tokens(pair)
    child = keeper.descendants(pair.pid)[0]
    with held_by_criu(yard, pair) as (restore, hold, done):
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not keeper.alive(child), LIMIT, "its end")
        hold.release()
        refused = details(failed(restore.end(), "restore_failed"))
        assert (refused["reason"], refused["pids"]) == ("ended_held", [child])
        insist_gone(yard.daemon, pair)
    pair.kill()
    ready(yard.daemon.restore(done.checkpoint_id))
    wait_until(lambda: tokens(pair) == before, LIMIT, "a beat of each")
    insist_never_wrong(pair)


@pytest.mark.parametrize("fault", [FlipAnswer(), Answer(503, "SlowDown")], ids=["damaged", "away"])
def test_what_does_not_come_leaves_nothing_of_a_tree(yard: Yard, pair: Program, fault: FlipAnswer | Answer) -> None:
    pids = [pair.pid, *keeper.descendants(pair.pid)]
    done = checkpointed(yard.daemon, pair)
    yard.proxy.play("GetObject", fault, times=FOREVER, after=SOME, key=PAGES)
    last = failed(yard.daemon.restore(done.checkpoint_id), "corrupt" if fault == FlipAnswer() else "store_unavailable")
    assert "restoring" in last.profile.phases
    insist_gone(yard.daemon, pair)
    assert not any(map(keeper.alive, pids))
    assert not pair.lines()


def test_what_a_fork_has_left_shared_is_shared_again(yard: Yard, tmp_path: Path) -> None:
    """By the filler each would have its own: it is done by files."""
    with Program(tmp_path, python("watcher.py", SIZE, "shared")) as program:
        wait_until(lambda: len(tokens(program)) == 2, LIMIT, "two processes")
        before, (child,) = tokens(program), keeper.descendants(program.pid)
        took = own(program.pid) + own(child)
        done = checkpointed(yard.daemon, program)
        last = ready(yard.daemon.restore(done.checkpoint_id))
        assert "holding" not in last.profile.phases
        wait_until(lambda: tokens(program) == before, LIMIT, "a beat of each")
        assert own(program.pid) + own(child) < took + (8 << 20)
        insist_never_wrong(program)


def own(pid: int) -> int:
    """Bytes of memory, of what several have a share each."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10
