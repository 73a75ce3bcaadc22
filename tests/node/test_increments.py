"""Checkpoints that store only what is new, of real processes: small, and whole without anything but the store."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.transfer.send import memory_bound
from tests import keys
from tests.daemon import Daemon, Refusal, events, failed, ready, refusals
from tests.keeper import wait_until
from tests.node.test_bound import status
from tests.node.test_stores import s3_settings
from tests.node.workload import LIMIT, Program, Untouched, change, checkpointed, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

AUTO = {"increment": "auto"}
MIB, PAGE = 1 << 20, 4096


def delete(daemon: Daemon, checkpoint_id: str) -> None:
    with refusals():
        daemon.stub.DeleteCheckpoint(pb.CheckpointId(checkpoint_id=checkpoint_id), timeout=10)


def verified(daemon: Daemon, checkpoint_id: str) -> pb.VerifyReply:
    *_, verdict = daemon.stub.Verify(pb.CheckpointId(checkpoint_id=checkpoint_id), timeout=60)
    return verdict  # type: ignore[no-any-return]


def bases(daemon: Daemon, checkpoint_id: str) -> list[str]:
    (image,) = daemon.manifest(checkpoint_id)["images"]
    return [base["checkpoint_id"] for base in image.get("bases", ())]


def size_of(daemon: Daemon, checkpoint_id: str) -> int:
    """Bytes of everything that lies under its id."""
    place = Path(daemon.store.removeprefix("file://")) / checkpoint_id
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["noise", "text"])
def test_it_is_small_and_comes_back_on_another_machine_that_has_only_the_store(kind: str, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    with Program(tmp_path, python("changing.py", 64, kind, 5)) as program:
        program.beat()
        with Daemon(tmp_path / "first", node="first", store=store) as first:
            full = ready(first.checkpoint(program.target, criu_opts=AUTO))
            change(program)
            before = program.beat()
            done = checkpointed(first, program, criu_opts=AUTO)
            assert bases(first, full.checkpoint_id) == []
            assert bases(first, done.checkpoint_id) == [full.checkpoint_id]
            assert size_of(first, done.checkpoint_id) <= 0.1 * size_of(first, full.checkpoint_id)
            assert done.profile.stored_bytes <= 0.1 * full.profile.stored_bytes
            assert done.profile.raw_bytes >= 64 * MIB
        with Daemon(tmp_path / "second", node="second", store=store) as second:
            assert verified(second, done.checkpoint_id).ok
            ready(second.restore(done.checkpoint_id))
            goes_on(program, before)


def test_through_s3(tmp_path: Path) -> None:
    with S3Server() as server, Program(tmp_path, python("changing.py", 16, "text", 5)) as program:
        store = f"s3://{server.bucket}/some/prefix"
        with Daemon(store=store, settings={"store": {"s3": s3_settings(server)}}) as daemon:
            program.beat()
            full = ready(daemon.checkpoint(program.target, criu_opts=AUTO)).checkpoint_id
            change(program)
            before = program.beat()
            done = checkpointed(daemon, program, criu_opts=AUTO)
            assert bases(daemon, done.checkpoint_id) == [full]
            with pytest.raises(Refusal, match="could not be restored without it"):
                delete(daemon, full)
            ready(daemon.restore(done.checkpoint_id))
            goes_on(program, before)
            for each in (done.checkpoint_id, full):
                delete(daemon, each)
            assert not [path for path in server.root.rglob("*") if path.is_file()]


def test_a_chain_begins_anew_where_it_is_long_enough_and_goes_on_after_a_restore(tmp_path: Path) -> None:
    """Two bases at most: full, one, two, full. Then what was restored is the next one's origin, on another node that has its keys."""
    wrapper, pair, store = keys.wrapper(tmp_path, "wrapper"), keys.pair(tmp_path), f"file://{tmp_path}/store"
    settings: dict[str, Any] = {
        "increments": {"bases": 2}, "encryption": {"key": wrapper}, "signing": {"key": pair[0], "trusted": [pair[1]]}
    }  # fmt: skip
    with Program(tmp_path, python("changing.py", 16, "noise", 5)) as program:
        with Daemon(store=store, settings=settings) as daemon:
            ids: list[str] = []
            for _ in range(4):
                program.beat()
                ids.append(ready(daemon.checkpoint(program.target, reason="heartbeat")).checkpoint_id)
                change(program)
            assert [bases(daemon, each) for each in ids] == [[], ids[:1], ids[:2], []]
            refused = failed(daemon.checkpoint(program.target, criu_opts={"increment": ids[2]}), "increment_bases")
            assert "auto" in refused.hint
            before = program.beat()
            ids.append(checkpointed(daemon, program, criu_opts=AUTO).checkpoint_id)
            assert bases(daemon, ids[4]) == ids[3:4]
            assert before.token.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*.zst"))
        with Daemon(store=store, settings=settings) as other:
            ready(other.restore(ids[4]))
            goes_on(program, before)
            change(program)
            before = program.beat()
            done = checkpointed(other, program, criu_opts=AUTO)
            assert bases(other, done.checkpoint_id) == ids[3:5]
            ready(other.restore(done.checkpoint_id))
            goes_on(program, before)


def test_who_others_refer_to_stays_until_they_go(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("changing.py", 16, "noise", 5)) as program:
        program.beat()
        ids = []
        for _ in range(3):
            ids.append(ready(daemon.checkpoint(program.target, criu_opts=AUTO)).checkpoint_id)
            change(program)
        with pytest.raises(Refusal) as refused:
            delete(daemon, ids[0])
        assert refused.value.code == "referenced"
        assert sorted(refused.value.details["found"]) == sorted(ids[1:])
        told = list(daemon.stub.CollectGarbage(pb.GarbageRequest(apply=True, grace=0, keep_last=1), timeout=30))
        assert not told, "the last one needs both others"
        for each in reversed(ids):
            assert verified(daemon, each).ok
        delete(daemon, ids[2])
        told = list(daemon.stub.CollectGarbage(pb.GarbageRequest(apply=True, grace=0, keep_last=1), timeout=30))
        assert not told, "now the second is the last, and needs the first"
        delete(daemon, ids[1])
        delete(daemon, ids[0])
        assert not [path for path in daemon.store_dir.rglob("*") if path.is_file()]


def test_damage_of_a_base_is_said_before_anything_is_restored(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("changing.py", 16, "noise", 5)) as program:
        program.beat()
        full = ready(daemon.checkpoint(program.target, criu_opts=AUTO))
        change(program)
        before = program.beat()
        done = checkpointed(daemon, program, criu_opts=AUTO, streams=1)
        path = next((daemon.store_dir / full.checkpoint_id).rglob("pages-0.zst"))
        whole = path.read_bytes()
        path.write_bytes(whole[:100_000] + bytes([whole[100_000] ^ 1]) + whole[100_001:])
        error = failed(daemon.restore(done.checkpoint_id), "corrupt")
        assert f"{full.checkpoint_id}/main/pages-0.zst" in error.message
        with pytest.raises(Refusal, match=full.checkpoint_id), refusals():
            verified(daemon, done.checkpoint_id)
        path.unlink()
        assert full.checkpoint_id in failed(daemon.restore(done.checkpoint_id), "corrupt").message
        path.write_bytes(whole)
        ready(daemon.restore(done.checkpoint_id))
        goes_on(program, before)


def test_what_verify_has_found_damaged_is_not_referred_to_any_more(daemon: Daemon, tmp_path: Path) -> None:
    """A byte of a stream is not read before an increment is made; once it is known, what would need it is refused, or a full one."""
    with Program(tmp_path, python("changing.py", 4, "noise", 5)) as program:
        ids = []
        for _ in range(2):
            program.beat()
            ids.append(ready(daemon.checkpoint(program.target, reason="heartbeat")).checkpoint_id)
            change(program)
        path = next((daemon.store_dir / ids[0]).rglob("pages-0.zst"))
        whole = path.read_bytes()
        path.write_bytes(whole[:100_000] + bytes([whole[100_000] ^ 1]) + whole[100_001:])
        ids.append(daemon.settled(ready(daemon.checkpoint(program.target, reason="heartbeat"))).checkpoint_id)
        assert bases(daemon, ids[2]) == ids[:2]
        with pytest.raises(Refusal, match=ids[0]), refusals():
            verified(daemon, ids[2])
        with Untouched(program):
            failed(daemon.checkpoint(program.target, criu_opts={"increment": ids[2]}), "corrupt")
        full = ready(daemon.checkpoint(program.target, reason="heartbeat")).checkpoint_id
        assert bases(daemon, full) == []
        change(program)
        before = program.beat()
        done = checkpointed(daemon, program, reason="heartbeat").checkpoint_id
        assert bases(daemon, done) == [full]
        assert verified(daemon, done).ok
        ready(daemon.restore(done))
        goes_on(program, before)
        path.write_bytes(whole)
        assert verified(daemon, ids[2]).ok
        ready(daemon.checkpoint(program.target, criu_opts={"increment": ids[2]}))


def test_what_cannot_be_referred_to_is_refused_by_name_and_nobody_was_frozen(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with (
        Program(tmp_path, python("changing.py", 1, "noise", 5)) as program,
        Program(tmp_path / "other", python("changing.py", 1, "noise", 5)) as other,
    ):
        program.beat(), other.beat()
        plain = ready(daemon.checkpoint(program.target)).checkpoint_id
        whole = ready(daemon.checkpoint(program.target, criu_opts=AUTO)).checkpoint_id
        unknown = "00000000-0000-4000-8000-000000000000"
        with Untouched(program), Untouched(other):
            for target, increment, code in (
                (program.target, unknown, "increment_unknown"),
                (program.target, plain, "increment_digests"),
                (other.target, whole, "increment_other_workload"),
                (program.target, "latest", "criu_opts"),
            ):
                error = failed(daemon.checkpoint(target, criu_opts={"increment": increment}), code)
                assert error.hint
        there = {path.parent.name for path in daemon.store_dir.rglob("manifest.json")}
        assert there == {plain, whole}
        assert not [path for path in daemon.store_dir.rglob("refs/*") if path.is_file()]


def test_memory_for_it_is_bounded(tmp_path: Path) -> None:
    """Digests, what is known, references: an image of 512 MiB through an arena of 64, the second time with that much already there."""
    size, arena = 512 * MIB, 64 * MIB
    with (
        Program(tmp_path, python("changing.py", size // MIB, "noise", 5)) as program,
        Daemon(store=f"file://{tmp_path}/store", arena=f"{arena // MIB}MiB") as daemon,
    ):
        program.beat()
        idle = status(daemon.pid, "VmRSS") - arena
        for _ in range(2):
            change(program)
            done = ready(daemon.checkpoint(program.target, criu_opts=AUTO, streams=2))
        needed = status(daemon.pid, "VmHWM") - idle
        pages, changed = done.profile.raw_bytes // PAGE, done.profile.stored_bytes // PAGE
        assert changed < 0.1 * pages, "it was an increment"
        bound = memory_bound(arena, 2, 0, 0, segments=pages // 4, frames=pages // 1024 + 4, pages=pages, references=2 * changed)
        print(
            f"needed {needed} of {bound}, {bound - memory_bound(arena, 2, 0, 0, pages // 4, pages // 1024 + 4)} of it for increments"
        )
        assert needed <= bound


def caught_in_the_middle(daemon: Daemon, program: Program, base: str) -> str:
    """A checkpoint that has said that it refers to `base`, and is not committed; its daemon stands still."""
    marks = daemon.store_dir / base / "refs"
    for _ in range(10):
        before = {path.name for path in marks.glob("*")}
        running = daemon.begin_checkpoint(program.target, criu_opts={"increment": base})
        wait_until(lambda: {path.name for path in marks.glob("*")} - before, LIMIT, "its mark")  # noqa: B023
        os.kill(daemon.pid, signal.SIGSTOP)
        (new,) = {path.name for path in marks.glob("*")} - before
        if not (daemon.store_dir / new / "manifest.json").exists():
            return new
        os.kill(daemon.pid, signal.SIGCONT)
        ready(list(events(running)))
    raise AssertionError("it was always done already")


def test_a_crash_in_the_middle_leaves_a_mark_that_keeps_nothing_and_that_gc_removes(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("changing.py", 64, "noise", 5)) as program:
        program.beat()
        full = ready(daemon.checkpoint(program.target, criu_opts=AUTO)).checkpoint_id
        change(program)
        lost = caught_in_the_middle(daemon, program, full)
        daemon.kill()
        before = program.beat()
        daemon.start()
        program.next_beat(after=before)
        assert (daemon.store_dir / full / "refs" / lost).exists()
        told = list(daemon.stub.CollectGarbage(pb.GarbageRequest(apply=True, grace=0), timeout=30))
        assert [(each.what, each.key, each.state) for each in told if each.what == "mark"] == [
            ("mark", f"{full}/refs/{lost}", "removed")
        ]
        lost = caught_in_the_middle(daemon, program, full)
        daemon.kill()
        daemon.start()
        for each in [path.parent.name for path in daemon.store_dir.rglob("manifest.json") if path.parent.name != full]:
            delete(daemon, each)
        delete(daemon, full)
        list(
            daemon.stub.CollectGarbage(pb.GarbageRequest(apply=True, grace=0), timeout=30)
        )  # the crash may have come while a mark was put
        assert not [path for path in daemon.store_dir.rglob("*") if path.is_file()]
