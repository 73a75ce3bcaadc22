"""Everything that can be wrong with a command, a workload, a store or an image: each has its code and a hint, and changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pty
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.model import FORMAT_VERSION
from tests import keeper
from tests.daemon import Daemon, Refusal, details, events, failed, job_target, pid_target, ready
from tests.envelope import opened, seal
from tests.keeper import Kept, wait_until
from tests.node.workload import LIMIT, Beat, Program, Untouched, checkpointed, goes_on, python

pytestmark = pytest.mark.node

CLOSED_PORT = 9  # discard: nobody listens there


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where further stores of these tests are."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def shared_daemon(places: Path) -> Iterator[Daemon]:
    """One that may also write under `places`, and to a bucket nobody serves, and gives up on it soon."""
    s3 = {
        "endpoint_url": f"http://127.0.0.1:{CLOSED_PORT}", "region": "x", "access_key_id": "x", "secret_access_key": "x",
        "attempts": 1, "connect_timeout": 1.0,
    }  # fmt: skip
    with Daemon(settings={"store": {"allowed": [f"file://{places}", "s3://nobody"], "s3": s3}}) as running:
        yield running


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with Program(tmp_path, python("counter.py", 0.01)) as running:
        running.beat()  # it is what it will be: before that it may still be on its way to its program
        yield running


# --- commands -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (pb.CheckpointCommand(), "target"),
        (pb.CheckpointCommand(target=pb.Target(pid=7, pod_name="x")), "target"),
        (pb.CheckpointCommand(target=pb.Target(pid=-7)), "target.pid"),
        (pb.CheckpointCommand(target=pb.Target(pod_name="../../etc")), "target.pod_name"),
        (pb.CheckpointCommand(target=pb.Target(pid=7), action_id="mine"), "action_id"),
        (pb.CheckpointCommand(target=pb.Target(pid=7), checkpoint_id="../x"), "checkpoint_id"),
        (pb.CheckpointCommand(target=pb.Target(pid=7), kind="everything"), "kind"),
        (pb.CheckpointCommand(target=pb.Target(pid=7), overrides=pb.Overrides(streams=1000)), "overrides.streams"),
    ],
    ids=lambda given: given if isinstance(given, str) else None,
)
def test_a_malformed_command_is_told_at_once(daemon: Daemon, command: pb.CheckpointCommand, found: str) -> None:
    with pytest.raises(Refusal) as refused:
        list(events(daemon.stub.Checkpoint(command, timeout=10)))
    assert refused.value.code == "bad_command"
    assert refused.value.status is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details["property"] == found
    daemon.insist_clean()


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        ({"criu_opts": {"tcp_close": True}}, "criu_opts", "tcp_close"),
        ({"criu_opts": {"leave_running": "yes"}}, "criu_opts", "leave_running"),
        ({"criu_opts": '{"tcp": '}, "criu_opts", "json"),
        ({"criu_opts": '["tcp"]'}, "criu_opts", "criu_opts"),
        ({"compression": "zip"}, "compression", "zip"),
        ({"compression": "zstd:99"}, "compression", "zstd:99"),
        ({"directory": "file:///etc"}, "directory", "allowed"),
        ({"directory": "s3://somebody-else"}, "directory", "allowed"),
        ({"kind": "rootfs"}, "kind", "rootfs"),
        ({"expires_at": 1.0}, "expired", "too late"),
    ],
    ids=lambda given: str(given).replace("/", "") if not isinstance(given, str) else None,
)
def test_what_a_command_may_not_ask_for(
    daemon: Daemon, program: Program, overrides: dict[str, Any], code: str, said: str
) -> None:
    with Untouched(program):
        refused = failed(daemon.checkpoint(program.target, **overrides), code)
    assert said in (refused.message + refused.hint).lower()
    assert refused.hint
    assert {"found", "wanted"} <= details(refused).keys()
    daemon.insist_clean()


# --- workloads ----------------------------------------------------------------------------------------------------------------


def test_there_is_no_such_pod(daemon: Daemon) -> None:
    for target in (pb.Target(pod_name="nobody", namespace="default"), pb.Target(pod_id=str(uuid.uuid4()))):
        assert "hibernode jobs" in failed(daemon.checkpoint(target), "not_found").hint


def test_a_pid_that_is_gone(daemon: Daemon) -> None:
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    assert failed(daemon.checkpoint(pid_target(child.pid)), "not_found").hint


def test_a_thread_is_named_with_its_process(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01, "thread")) as program, Untouched(program):
        refused = failed(daemon.checkpoint(pid_target(int(program.said("thread")[0]))), "pid_is_thread")
        assert str(program.pid) in refused.hint


def test_a_kernel_thread(daemon: Daemon) -> None:
    assert failed(daemon.checkpoint(pid_target(2)), "kernel_thread").hint


def test_init_and_the_daemon_are_no_workloads(daemon: Daemon) -> None:
    for pid in (1, daemon.pid, int(keeper.fields(daemon.pid)[1])):  # the last: what started it, so the daemon is in its tree
        assert failed(daemon.checkpoint(pid_target(pid)), "not_a_workload").hint


def test_a_zombie(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01, "zombie")) as program, Untouched(program):
        refused = failed(daemon.checkpoint(pid_target(int(program.said("zombie")[0]))), "zombie")
        assert "wait" in refused.hint


def test_a_process_with_io_uring(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01, "io_uring")) as program, Untouched(program):
        refused = failed(daemon.checkpoint(program.target), "io_uring")
        assert "io_uring" in refused.hint
        assert "[io_uring]" in details(refused)["found"]
        daemon.insist_clean()


def test_a_process_that_is_traced(daemon: Daemon, program: Program, tmp_path: Path) -> None:
    seize = "import ctypes,sys,time; assert not ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None); time.sleep(60)"
    tracer = Kept([sys.executable, "-IS", "-c", seize, str(program.pid)], tmp_path / "tracer")
    try:
        status = Path(f"/proc/{program.pid}/status")
        wait_until(lambda: f"TracerPid:\t{tracer.pid}\n" in status.read_text(), LIMIT, "the tracer")
        with Untouched(program):
            refused = failed(daemon.checkpoint(program.target), "traced")
            assert details(refused)["found"] == tracer.pid
            assert refused.hint
            daemon.insist_clean()
    finally:
        tracer.kill()


def test_a_process_that_holds_a_terminal(daemon: Daemon, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        with Program(tmp_path, python("counter.py", 0.01), stdin=theirs) as program, Untouched(program):
            refused = failed(daemon.checkpoint(program.target), "terminal")
            assert "/dev/pts/" in details(refused)["found"]
            assert "hibernode run" in refused.hint
            daemon.insist_clean()
    finally:
        os.close(ours)
        os.close(theirs)


# --- stores -------------------------------------------------------------------------------------------------------------------


def test_a_store_that_nobody_serves(daemon: Daemon, program: Program) -> None:
    with Untouched(program):
        refused = failed(daemon.checkpoint(program.target, directory="s3://nobody/here"), "store_unavailable")
    assert refused.retry
    assert refused.hint
    assert failed(daemon.restore(str(uuid.uuid4()), directory="s3://nobody/here"), "store_unavailable").hint
    daemon.insist_clean()


@contextlib.contextmanager
def tiny_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tiny", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_in_the_middle(daemon: Daemon, places: Path, tmp_path: Path) -> None:
    with tiny_disk(places / "tiny", "20m") as disk, Program(tmp_path, python("counter.py", 0.01, "128")) as program:
        with Untouched(program):
            refused = failed(daemon.checkpoint(program.target, directory=f"file://{disk}"), "no_room")
            assert refused.profile.stored_bytes > 4 << 20, "it should have begun to write"
        assert refused.retry
        assert "free" in refused.hint
        daemon.insist_clean(disk)
        daemon.insist_clean()


def test_a_disk_that_is_too_small_is_refused_before(daemon: Daemon, places: Path, tmp_path: Path) -> None:
    with tiny_disk(places / "small", "1m") as disk, Program(tmp_path, python("counter.py", 0.01, "128")) as program:
        with Untouched(program):
            refused = failed(daemon.checkpoint(program.target, directory=f"file://{disk}"), "no_room")
        assert "dumping" not in refused.profile.phases
        assert refused.hint
        daemon.insist_clean(disk)


def test_a_checkpoint_id_that_is_there_already(daemon: Daemon, program: Program) -> None:
    done = ready(daemon.checkpoint(program.target))
    manifest = daemon.manifest(done.checkpoint_id)
    with Untouched(program):
        refused = failed(daemon.checkpoint(program.target, checkpoint_id=done.checkpoint_id), "exists")
    assert refused.hint
    assert daemon.manifest(done.checkpoint_id) == manifest


# --- restores -----------------------------------------------------------------------------------------------------------------


def insist_nothing_restored(daemon: Daemon, pid: int) -> None:
    assert not keeper.fields(pid)
    assert not keeper.descendants(daemon.pid)
    assert not daemon.at_work()


def test_there_is_no_such_checkpoint(daemon: Daemon) -> None:
    assert "hibernode list" in failed(daemon.restore(str(uuid.uuid4())), "not_found").hint


def test_a_pid_that_is_taken_by_a_process(daemon: Daemon, program: Program) -> None:
    done = ready(daemon.checkpoint(program.target))
    with Untouched(program):
        refused = failed(daemon.restore(done.checkpoint_id), "pid_taken")
    assert details(refused)["pids"] == [program.pid]
    assert f"{program.pid}: '" in details(refused)["found"]
    assert "python" in details(refused)["found"]
    assert "stop" in refused.hint
    assert not daemon.at_work()


def test_a_pid_that_is_taken_by_a_zombie(daemon: Daemon, tmp_path: Path) -> None:
    """The parent of this process does not wait for it."""
    with open(tmp_path / "output", "ab") as out:
        child = subprocess.Popen(python("counter.py", 0.01), stdin=subprocess.DEVNULL, stdout=out, start_new_session=True)
    wait_until((tmp_path / "output").read_bytes, LIMIT, "a beat")
    done = ready(daemon.checkpoint(pid_target(child.pid)))
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: keeper.state(child.pid) == "Z", LIMIT, "a zombie")
    refused = failed(daemon.restore(done.checkpoint_id), "pid_taken")
    assert "zombie" in details(refused)["found"]
    assert str(os.getpid()) in details(refused)["found"]
    child.wait()
    ready(daemon.restore(done.checkpoint_id))


def test_a_job_whose_name_runs_already(daemon: Daemon) -> None:
    job = daemon.run("trainer", python("counter.py", 0.01))
    done = ready(daemon.checkpoint(job_target("trainer"), criu_opts={"leave_running": False}))
    wait_until(lambda: not keeper.fields(job.pid), LIMIT, "its end")
    other = daemon.run("trainer", python("counter.py", 0.01))
    refused = failed(daemon.restore(done.checkpoint_id), "name_taken")
    assert refused.hint
    assert keeper.alive(other.pid)
    assert not daemon.at_work()
    ready(daemon.restore(done.checkpoint_id, pod_name="trainer-2"))
    assert daemon.jobs()["trainer-2"].pid == job.pid


def edited(**host_or_top: Any) -> Callable[[Path], None]:
    """Who can write to the store can make a manifest that is not signed say anything."""

    def edit(place: Path) -> None:
        path = place / "manifest.json"
        manifest = opened(path.read_bytes())
        for name, value in host_or_top.items():
            (manifest["host"] if name in manifest["host"] else manifest)[name] = value
        path.write_bytes(seal(manifest))

    return edit


def flipped(name: str, at: float) -> Callable[[Path], None]:
    """One bit of an object is turned over, at this part of its length."""

    def flip(place: Path) -> None:
        with open(place / name, "r+b") as file:
            offset = int(file.seek(0, os.SEEK_END) * at)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))

    return flip


def cut(name: str, by: int) -> Callable[[Path], None]:
    def truncate(place: Path) -> None:
        os.truncate(place / name, (place / name).stat().st_size - by)

    return truncate


def without(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


@dataclasses.dataclass(frozen=True)
class Stored:
    """A checkpoint of a process that has ended, and what brings it back."""

    place: Path
    checkpoint_id: str
    program: Program
    before: Beat


@pytest.fixture(scope="module")
def stored(shared_daemon: Daemon, places: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    with Program(tmp_path_factory.mktemp("stored"), python("counter.py", 0.01, "16")) as program:
        before = program.beat()
        done = checkpointed(shared_daemon, program, streams=2, directory=f"file://{places}/whole")
        yield Stored(places / "whole" / done.checkpoint_id, done.checkpoint_id, program, before)


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (flipped("main/pages-0.zst", 0.3), "corrupt", "pages-0.zst"),
        (flipped("main/pages-1.zst", 0.9), "corrupt", "pages-1.zst"),
        (flipped("main/index.zst", 0.5), "corrupt", "index.zst"),
        (flipped("main/images.tar.zst", 0.5), "corrupt", "images.tar.zst"),
        (flipped("manifest.json", 0.5), "corrupt", "manifest"),
        (cut("main/pages-0.zst", 1), "corrupt", "pages-0.zst"),
        (cut("main/index.zst", 1), "corrupt", "index.zst"),
        (cut("main/images.tar.zst", 1), "corrupt", "images.tar.zst"),
        (cut("manifest.json", 100), "corrupt", "manifest"),
        (without("main/pages-1.zst"), "corrupt", "pages-1.zst"),
        (without("manifest.json"), "not_found", "no checkpoint"),
        (edited(format_version=FORMAT_VERSION + 1), "format_version", f"version {FORMAT_VERSION + 1}"),
        (edited(arch="aarch64"), "arch", "aarch64"),
        (edited(page_size=65536), "page_size", "65536"),
        (edited(criu_version=50000), "criu_too_old", "criu"),
        (edited(checkpoint_id=str(uuid.UUID(int=7))), "corrupt", "manifest"),
        (edited(surprise=1), "corrupt", "surprise"),
    ],
    ids=[
        "stream 0", "stream 1", "index", "files", "manifest", "cut stream", "cut index", "cut files", "cut manifest", "no stream",
        "no manifest", "format", "arch", "page size", "criu", "other checkpoint", "unknown key",
    ],
)  # fmt: skip
def test_an_image_that_is_damaged_or_does_not_fit(
    daemon: Daemon, stored: Stored, places: Path, damage: Callable[[Path], None], code: str, said: str
) -> None:
    """CRIU sees nothing of it; where pages are damaged it may hold the process by then (the filler brings them), and nobody has run."""
    place = places / "damaged" / stored.checkpoint_id
    shutil.copytree(stored.place, place)
    written = stored.program.log.stat().st_size
    try:
        damage(place)
        refused = failed(daemon.restore(stored.checkpoint_id, directory=f"file://{places}/damaged"), code)
        assert said in refused.message.lower()
        if not said.startswith("pages"):
            assert "restoring" not in refused.profile.phases, "CRIU must not see any of it"
        assert stored.program.log.stat().st_size == written, "a process ran, and wrote a beat"
        insist_nothing_restored(daemon, stored.program.pid)
    finally:
        shutil.rmtree(place)


def test_what_was_damaged_above_can_be_restored(daemon: Daemon, stored: Stored, places: Path) -> None:
    """Else those refusals would prove nothing."""
    ready(daemon.restore(stored.checkpoint_id, directory=f"file://{places}/whole"))
    goes_on(stored.program, stored.before)
