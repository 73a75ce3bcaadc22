"""`gc` on real stores, beside real actions: what a dead daemon left goes, what anybody uses stays, and without --apply nothing goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.s3 import S3
from hibernode.ports import Store
from tests import keeper
from tests.daemon import Daemon, events, ready, refusals
from tests.fakes.s3_faults import FaultProxy, Hold
from tests.keeper import wait_until
from tests.node.test_order import until
from tests.node.workload import LIMIT, Program, Untouched, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

OLD = 1e-9  # days: any checkpoint is older
PART = 5 << 20


def collected(daemon: Daemon, **rules: object) -> list[pb.Garbage]:
    """By rules that spare nothing, but for what is in use."""
    with refusals():
        return list(daemon.stub.CollectGarbage(pb.GarbageRequest(**{"grace": 0, **rules}), timeout=60))  # type: ignore[arg-type]


def said(garbage: list[pb.Garbage]) -> set[tuple[str, str, str]]:
    return {(each.what, each.checkpoint_id, each.state) for each in garbage}


def contents(store: Store) -> tuple[list[str], list[str]]:
    """Keys of objects, and of uploads that nobody has ended."""
    return sorted(facts.key for facts in store.list()), sorted(upload.key for upload in store.open_uploads())


def at_rest(store: Store) -> tuple[list[str], list[str]]:
    """Its contents when no action writes any more: one takes back its mark after it has said `ready`."""
    wait_until(lambda: not any(key.endswith("/attempt") for key in contents(store)[0]), LIMIT, "the end of the action")
    return contents(store)


def verified(daemon: Daemon, checkpoint_id: str) -> bool:
    with refusals():
        return bool(list(daemon.stub.Verify(pb.CheckpointId(checkpoint_id=checkpoint_id), timeout=30))[-1].ok)


@dataclass(frozen=True)
class Shared:
    """A store that two nodes have, and how each is told of it. `proxy`: what the first one's requests go through."""

    store: Store
    url: str
    first: Mapping[str, Any]
    second: Mapping[str, Any]
    proxy: FaultProxy | None = None


@contextmanager
def in_s3() -> Iterator[Shared]:
    with S3Server() as server, FaultProxy(server.endpoint_url) as proxy:
        s3 = {
            **server.settings(part_size=PART).model_dump(exclude_defaults=True),
            "secret_access_key": server.secret_access_key,
            "part_size": PART,
        }
        through = {"store": {"s3": {**s3, "endpoint_url": proxy.url}}}
        store = S3(server.bucket, "shared", server.settings(part_size=PART))
        yield Shared(store, f"s3://{server.bucket}/shared", through, {"store": {"s3": s3}}, proxy)


@contextmanager
def in_a_directory(path: Path) -> Iterator[Shared]:
    yield Shared(LocalDir(path), f"file://{path}", {}, {})


@contextmanager
def held(shared: Shared, operation: str, key: str, after: int = 0) -> Iterator[Hold]:
    """The first node's request of this kind waits inside until it is released."""
    assert shared.proxy is not None
    hold = Hold()
    shared.proxy.play(operation, hold, times=1, after=after, key=key)
    try:
        yield hold
    finally:
        hold.release()
        shared.proxy.heal()


def killed_while_it_ships(first: Daemon, program: Program) -> None:
    """16 MiB of arena, and a compression that is slower than CRIU: pages are in the store before the dump is over."""
    updates = iter(first.begin_checkpoint(program.target, compression="zstd:12", streams=1))
    until(updates, "dumping")
    first.kill()
    wait_until(lambda: keeper.state(program.pid) in ("R", "S"), LIMIT, "a workload that runs")


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_what_a_killed_daemon_left_is_shown_then_removed(tmp_path: Path, kind: str) -> None:
    """By another node, before the first one comes back. A checkpoint of the same workload, beside it, stays whole."""
    shares = in_s3() if kind == "s3" else in_a_directory(tmp_path / "store")
    with (
        shares as shared,
        Program(tmp_path, python("counter.py", 0.01, "slow:32")) as program,
        Daemon(node="first", store=shared.url, arena="16MiB", settings=shared.first) as first,
        Daemon(node="second", store=shared.url, settings=shared.second) as second,
    ):
        good = str(ready(first.checkpoint(program.target)).checkpoint_id)
        mine, _ = at_rest(shared.store)
        with Untouched(program):
            if kind == "s3":
                with held(shared, "UploadPart", "pages-0.zst", after=1) as hold:
                    call = first.begin_checkpoint(program.target, compression="none", streams=1)
                    assert hold.held.wait(LIMIT)
                    first.kill()
                del call
            else:
                killed_while_it_ships(first, program)
        objects, uploads = contents(shared.store)
        (left,) = {key.partition("/")[0] for key in uploads}
        assert left != good

        assert collected(second, grace=3600) == [], "too young for anybody but who is told otherwise"
        shown = collected(second)
        assert contents(shared.store) == (objects, uploads)
        assert {each.checkpoint_id for each in shown} == {left}
        assert [each.key for each in shown if each.what == "upload"] == uploads
        assert {each.state for each in shown} == {"found"}

        removed = collected(second, apply=True)
        assert [(each.what, each.key) for each in removed] == [(each.what, each.key) for each in shown]
        assert {each.state for each in removed} == {"removed"}
        assert contents(shared.store) == (mine, [])
        assert verified(second, good)
        assert collected(second) == []
        first.start()  # and recovers, though what it would tidy up is gone
        assert contents(shared.store) == (mine, [])
        assert verified(first, good)


def test_a_daemon_that_comes_back_takes_away_what_it_left_itself(tmp_path: Path) -> None:
    """Killed in the middle of a checkpoint, then in the middle of a restore: neither uploads nor objects nor marks stay, without `gc`."""
    with (
        in_s3() as shared,
        Program(tmp_path, python("memory.py", "large", "16")) as program,
        Daemon(store=shared.url, settings=shared.first) as daemon,
    ):
        before = program.beat()
        with held(shared, "UploadPart", "pages-0.zst", after=1) as hold:
            call = daemon.begin_checkpoint(program.target, compression="none", streams=1)
            assert hold.held.wait(LIMIT)
            daemon.kill()
        del call
        assert contents(shared.store)[1]
        daemon.start()
        assert contents(shared.store) == ([], [])

        made = str(ready(daemon.checkpoint(program.target, streams=1, criu_opts={"leave_running": False})).checkpoint_id)
        program.kill()
        whole = at_rest(shared.store)
        with held(shared, "GetObject", "pages-0.zst") as hold:
            restore = daemon.stub.Restore(pb.RestoreCommand(checkpoint_id=made), timeout=60)
            assert hold.held.wait(LIMIT)
            daemon.kill()
        del restore
        assert any("/uses/" in key for key in contents(shared.store)[0])
        daemon.start()
        assert contents(shared.store) == whole
        ready(daemon.restore(made))
        goes_on(program, before)


def test_what_an_action_writes_or_reads_stays(tmp_path: Path) -> None:
    """A checkpoint that is made, and one that is restored, each in the middle: neither this node nor another removes anything of it."""
    with (
        in_s3() as shared,
        Program(tmp_path, python("memory.py", "large", "16")) as program,
        Daemon(node="first", store=shared.url, settings=shared.first) as first,
        Daemon(node="second", store=shared.url, settings=shared.second) as second,
    ):
        before = program.beat()
        with held(shared, "UploadPart", "pages-0.zst", after=1) as hold:
            updates = first.begin_checkpoint(program.target, compression="none", streams=1, criu_opts={"leave_running": False})
            assert hold.held.wait(LIMIT)
            assert contents(shared.store)[1]
            assert collected(first, apply=True) == []
            assert collected(second, apply=True, grace=60) == []
            hold.release()
            made = str(ready(list(events(updates))).checkpoint_id)
        program.kill()

        with held(shared, "GetObject", "pages-0.zst") as hold:
            updates = first.stub.Restore(pb.RestoreCommand(checkpoint_id=made), timeout=60)
            assert hold.held.wait(LIMIT)
            assert collected(first, apply=True, keep_days=OLD) == []
            assert collected(second, apply=True, keep_days=OLD) == []
            hold.release()
            ready(list(events(updates)))
        goes_on(program, before)
        assert said(collected(second, apply=True, keep_days=OLD)) == {("checkpoint", made, "removed")}
        assert contents(shared.store) == ([], [])


def test_the_last_checkpoints_of_each_workload_stay_and_restore(daemon: Daemon, tmp_path: Path) -> None:
    with Program(tmp_path, python("counter.py", 0.01)) as program, Program(tmp_path, python("counter.py", 0.01)) as other:
        program.beat()
        ids = [str(ready(daemon.checkpoint(program.target)).checkpoint_id) for _ in range(3)]
        alone = str(ready(daemon.checkpoint(other.target)).checkpoint_id)
        assert said(collected(daemon, keep_last=2)) == {("checkpoint", ids[0], "found")}
        damaged = daemon.store_dir / ids[1] / "manifest.json"
        damaged.write_bytes(damaged.read_bytes()[:-2])
        told = collected(daemon, keep_last=1, apply=True)
        assert said(told) == {("checkpoint", ids[0], "removed"), ("checkpoint", ids[1], "kept")}
        assert {each.code for each in told} == {"", "corrupt"}
        assert sorted(path.name for path in daemon.store_dir.iterdir() if path.name != ".uploads") == sorted([*ids[1:], alone])
        assert verified(daemon, ids[2])
        assert verified(daemon, alone)


def test_another_store_is_collected_if_it_is_allowed(tmp_path: Path) -> None:
    """The one that is asked for, and no other."""
    allowed = f"file://{tmp_path}/archive"
    for place in ("archive", "store"):
        LocalDir(tmp_path / place).put("6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10/main/index.zst", b"left")
    with Daemon(tmp_path, settings={"store": {"allowed": [allowed]}}) as daemon:
        assert [each.what for each in collected(daemon, apply=True, directory=allowed)] == ["attempt"]
        assert not list(LocalDir(tmp_path / "archive").list())
        assert list(LocalDir(tmp_path / "store").list())
        with pytest.raises(Exception, match="not allowed") as refused:
            collected(daemon, apply=True, directory=f"file://{tmp_path}/elsewhere")
        assert refused.value.code == "directory"  # type: ignore[attr-defined]


def test_the_configured_rules_hold_where_none_are_asked_for(tmp_path: Path) -> None:
    rules = {"gc": {"grace": 0, "keep_last": 1}}
    with Daemon(tmp_path, settings=rules) as daemon, Program(tmp_path, python("counter.py", 0.01)) as program:
        program.beat()
        ids = [str(ready(daemon.checkpoint(program.target)).checkpoint_id) for _ in range(2)]
        configured = list(daemon.stub.CollectGarbage(pb.GarbageRequest(), timeout=30))
        assert said(configured) == {("checkpoint", ids[0], "found")}
        assert abs(configured[0].age - (time.time() - daemon.manifest(ids[0])["created_at"])) < 5
        assert collected(daemon, keep_last=0) == []
