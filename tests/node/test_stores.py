"""A checkpoint is what is in its store, and nothing else: another daemon brings it back, from a directory or from S3."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests.daemon import Daemon, job_target, ready
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Beat, Program, beats, checkpointed, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node


def job_beats(daemon: Daemon, name: str) -> list[Beat]:
    return beats(daemon.job_lines(name))


def test_a_job_restored_by_a_daemon_that_never_saw_the_first(tmp_path: Path) -> None:
    """Of the first machine only the store is left. The job's log begins anew, in the second daemon's own directory."""
    store = f"file://{tmp_path}/store"
    with Daemon(tmp_path / "first", node="first", store=store) as first:
        job = first.run("trainer", python("counter.py", 0.01))
        wait_until(lambda: job_beats(first, "trainer"), LIMIT, "a beat")
        done = ready(first.checkpoint(job_target("trainer"), criu_opts={"leave_running": False}))
        wait_until(lambda: not first.jobs()["trainer"].pid, LIMIT, "its end")
        before = job_beats(first, "trainer")[-1]
        old_log = Path(job.log)
    old_log.unlink()

    with Daemon(tmp_path / "second", node="second", store=store) as second:
        assert [c.checkpoint_id for c in second.stub.ListCheckpoints(pb.Empty(), timeout=10).checkpoints] == [done.checkpoint_id]
        ready(second.restore(done.checkpoint_id))
        restored = second.jobs()["trainer"]
        assert (restored.pid, restored.uid) == (job.pid, job.uid)
        assert Path(restored.log).is_relative_to(second.state_dir)
        wait_until(lambda: len(job_beats(second, "trainer")) > 2, LIMIT, "beats of the restored job")
        now = job_beats(second, "trainer")
        assert {beat.token for beat in now} == {before.token}
        assert {beat.content for beat in now} == {before.content}
        assert now[0].counter == before.counter + 1
        assert not old_log.exists()


def s3_settings(server: S3Server, *, part_size: int = 8 << 20) -> Mapping[str, Any]:
    """The daemon's configuration for it."""
    settings = server.settings().model_dump(exclude_defaults=True)
    return {**settings, "secret_access_key": server.secret_access_key, "part_size": part_size}


def test_through_s3(tmp_path: Path) -> None:
    with S3Server() as server:
        store = f"s3://{server.bucket}/some/prefix"
        with Daemon(store=store, settings={"store": {"s3": s3_settings(server)}}) as daemon:
            with Program(tmp_path, python("memory.py", "large", "64")) as program:
                before = program.beat()
                done = checkpointed(daemon, program, streams=3)
                place = server.root / server.bucket / "some/prefix" / done.checkpoint_id
                assert sum(path.stat().st_size for path in place.rglob("*.zst")) > 64 << 20
                *_, verdict = daemon.stub.Verify(pb.CheckpointId(checkpoint_id=done.checkpoint_id), timeout=30)
                assert verdict.ok
                ready(daemon.restore(done.checkpoint_id))
                goes_on(program, before)
            daemon.stub.DeleteCheckpoint(pb.CheckpointId(checkpoint_id=done.checkpoint_id), timeout=10)
            assert not [path for path in server.root.rglob("*") if path.is_file()]


def zstd(*arguments: str | Path) -> bytes:
    """The tool of that name, which knows nothing of us."""
    return subprocess.run(["zstd", *map(str, arguments)], check=True, capture_output=True, timeout=60).stdout


def seek_table(data: bytes) -> tuple[int, int]:
    """What the skippable frame at the end says, read as zstd's seekable format has it: bytes of content, and frames."""
    count, descriptor, magic = struct.unpack_from("<IBI", data, len(data) - 9)
    assert (magic, descriptor) == (0x8F92EAB1, 0)
    start = len(data) - 9 - 8 * count - 8
    assert struct.unpack_from("<II", data, start) == (0x184D2A5E, 8 * count + 9)
    entries = list(struct.iter_unpack("<II", data[start + 8 : -9]))
    at = 0
    for stored, _ in entries:
        assert data[at : at + 4] == b"\x28\xb5\x2f\xfd", "each begins where a frame begins"
        at += stored
    assert at == start
    return sum(size for _, size in entries), count


def test_floats_are_stored_in_planes_and_come_back(daemon: Daemon, tmp_path: Path) -> None:
    """The zstd tool finds such streams whole, too: of each frame in planes a mark that it skips, and two frames as long as the pages."""
    with Program(tmp_path, python("memory.py", "floats", "32")) as program:
        before = program.beat()
        done = checkpointed(daemon, program, streams=2)
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)
    manifest = daemon.manifest(done.checkpoint_id)
    (image,) = manifest["images"]
    assert manifest["format_version"] == 2
    assert image["in_planes"] >= 7
    assert done.profile.stored_bytes < 0.75 * done.profile.raw_bytes
    marks, inflated = 0, 0
    for stream in image["streams"]:
        path = daemon.store_dir / done.checkpoint_id / stream["key"]
        zstd("-t", path)
        inflated += len(zstd("-d", "-c", path))
        listed = zstd("-l", "-v", path).decode()
        skipped, frames = (int(re.search(rf"{kind} Frames: (\d+)", listed)[1]) for kind in ("Skippable", "Zstandard"))  # type: ignore[index]
        assert frames - stream["frames"] == skipped - 1
        marks += skipped - 1
    assert marks == image["in_planes"]
    assert inflated == (image["pages"] - image["zero_pages"]) * 4096


def test_lz4_is_of_version_3_comes_back_and_is_read_by_the_zstd_tool(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("memory.py", "half-zero", "32")) as program:
        before = program.beat()
        done = checkpointed(daemon, program, streams=2, compression="lz4")
        *_, verdict = daemon.stub.Verify(pb.CheckpointId(checkpoint_id=done.checkpoint_id), timeout=30)
        assert verdict.ok
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)
    manifest = daemon.manifest(done.checkpoint_id)
    (image,) = manifest["images"]
    assert (manifest["format_version"], manifest["compression"]) == (3, "lz4")
    assert 0 < image["in_lz4"] < sum(stream["frames"] for stream in image["streams"]), "half of the pages are noise, and raw"
    inflated, marks = 0, 0
    for stream in image["streams"]:
        path = daemon.store_dir / done.checkpoint_id / stream["key"]
        zstd("-t", path)
        inflated += len(zstd("-d", "-c", path))
        marks += path.read_bytes().count(bytes.fromhex("04224d18607073"))
    assert inflated == (image["pages"] - image["zero_pages"]) * 4096
    assert marks >= image["in_lz4"]


@pytest.mark.parametrize("compression", ["zstd", "none", "zstd:-5"])
def test_anybody_can_read_the_streams(daemon: Daemon, tmp_path: Path, compression: str) -> None:
    """The zstd tool finds every stream whole, counts its frames (the seek table is one that it skips), and makes the pages of it."""
    with Program(tmp_path, python("memory.py", "half-zero", "32")) as program:
        program.beat()
        done = ready(daemon.checkpoint(program.target, streams=3, compression=compression))
    (image,) = daemon.manifest(done.checkpoint_id)["images"]
    place, inflated = daemon.store_dir / done.checkpoint_id, 0
    assert len(image["streams"]) == 3
    for stream in image["streams"]:
        path = place / stream["key"]
        assert path.stat().st_size == stream["size"]
        zstd("-t", path)
        pages = zstd("-d", "-c", path)
        inflated += len(pages)
        listed = zstd("-l", "-v", path).decode()
        assert int(re.search(r"Zstandard Frames: (\d+)", listed)[1]) == stream["frames"], listed  # type: ignore[index]
        assert seek_table(path.read_bytes()) == (len(pages), stream["frames"])
        assert int(re.search(r"Skippable Frames: (\d+)", listed)[1]) == 1, listed  # type: ignore[index]
    assert inflated == (image["pages"] - image["zero_pages"]) * 4096
    assert (
        b"pstree.img"
        in subprocess.run(
            ["tar", "-t"], input=zstd("-d", "-c", place / "main/images.tar.zst"), capture_output=True, check=True
        ).stdout
    )
    zstd("-t", place / "main/index.zst")
