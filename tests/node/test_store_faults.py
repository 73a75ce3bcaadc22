"""The twelve faults of a store, each by its name: a real S3 server behind a proxy that plays them, a real daemon, real CRIU.

While a checkpoint is made (of a workload that is to be killed when it is `ready`): what comes once is overcome, and the checkpoint
restores; what stays ends the action with one `error` of a stable code, the workload runs on with its data, and nothing is left: no object,
no open upload, no file at work. While a checkpoint is restored: refused before anybody runs. Afterwards all works again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.s3 import S3
from tests import keeper
from tests.daemon import Daemon, details, failed, ready
from tests.fakes.s3_faults import Answer, DropPart, Fault, FaultProxy, Flip, FlipAnswer, Hold, Reset, Rewrite, Stall, Truncate
from tests.node.workload import LIMIT, Beat, Program, Untouched, goes_on, python
from tests.servers import S3Server

pytestmark = pytest.mark.node

PART = 5 << 20
PATIENCE = 0.4  # seconds the daemon waits for an answer
STREAM, MANIFEST = "pages-0.zst", "manifest.json"
KILL = {"leave_running": False}


class Bench:
    """A daemon, its store, and the proxy between them."""

    def __init__(self, daemon: Daemon, server: S3Server, proxy: FaultProxy) -> None:
        self.daemon, self.proxy = daemon, proxy
        self._store = S3(server.bucket, "faults", server.settings())  # not through the proxy
        self._bucket = boto3.resource(
            "s3", endpoint_url=server.endpoint_url, region_name="us-east-1", aws_access_key_id=server.access_key_id,
            aws_secret_access_key=server.secret_access_key,
        ).Bucket(server.bucket)  # fmt: skip

    def left(self) -> list[str]:
        """What is in the store, seen or unseen, and at work."""
        found = [f"an open upload of {upload.key}" for upload in self._store.open_uploads()]
        return found + [facts.key for facts in self._store.list()] + [str(path) for path in self.daemon.at_work()]

    def change(self, name: str, change: Callable[[bytes], bytes]) -> Callable[[], None]:
        """Give the one object of this name other bytes, behind everybody's back; what undoes it."""
        (found,) = [each for each in self._bucket.objects.all() if each.key.endswith(name)]
        answer = found.get()
        good, metadata = answer["Body"].read(), answer["Metadata"]
        found.put(Body=change(good), Metadata=metadata)
        return lambda: found.put(Body=good, Metadata=metadata)

    @contextmanager
    def changed(self, name: str, change: Callable[[bytes], bytes]) -> Iterator[None]:
        undo = self.change(name, change)
        try:
            yield
        finally:
            undo()

    def empty(self) -> None:
        """For the next test; nothing unseen may be left."""
        self.daemon.empty()
        for facts in list(self._store.list()):
            self._store.delete(facts.key)
        assert not self.left()

    def checkpoint(self, program: Program, **command: object) -> list[pb.Event]:
        """One stream of some parts, and the workload killed when it is ready."""
        return self.daemon.checkpoint(program.target, streams=1, compression="none", criu_opts=KILL, **command)

    @contextmanager
    def playing(self, operation: str, fault: Fault, *, times: int = 1 << 30, after: int = 0, key: str = "") -> Iterator[None]:
        """Inside, requests meet it; and some must have been there to meet it."""
        before = self._met(operation, key)
        self.proxy.play(operation, fault, times=times, after=after, key=key)
        try:
            yield
        finally:
            self.proxy.heal()
        assert self._met(operation, key) > before + after, f"no {operation} met {fault}"

    def _met(self, operation: str, key: str) -> int:
        return sum(key in request.path for request in self.proxy.seen(operation))

    def checkpointed(self, program: Program) -> str:
        """Without a fault; it is killed. The checkpoint's id."""
        done = ready(self.checkpoint(program))
        self.killed(program)
        return str(done.checkpoint_id)

    def killed(self, program: Program) -> None:
        """By its checkpoint, after `ready`; what it says from now on, it says restored."""
        keeper.wait_until(lambda: not keeper.alive(program.pid), LIMIT, "its end")
        program.kill()

    # --- what every fault has to stand ---

    def ends(self, program: Program, code: str, operation: str, fault: Fault, **where: object) -> pb.Event:
        """The fault stays: the action ends with this code, the workload is as it was, and nothing is left."""
        with Untouched(program), self.playing(operation, fault, **where):  # type: ignore[arg-type]
            last = the_end(self.checkpoint(program))
        failed([last], code)
        assert not self.left()
        return last

    def ends_unread(self, program: Program, fault: Fault) -> None:
        """The manifest cannot be read back. What is left, if that could not be withdrawn either, is whole, and a person can remove it."""
        with Untouched(program), self.playing("GetObject", fault, key=MANIFEST):
            last = the_end(self.checkpoint(program))
        assert (last.status, last.code in ("store_unavailable", "outcome_unknown")) == ("error", True), last
        if self.left():
            checkpoint = pb.CheckpointId(checkpoint_id=last.checkpoint_id)
            assert list(self.daemon.stub.Verify(checkpoint, timeout=30))[-1].ok
            self.daemon.stub.DeleteCheckpoint(checkpoint, timeout=10)
        assert not self.left()

    def ends_unknown(self, program: Program, fault: Fault) -> None:
        """The manifest was sent, and nobody said what became of it: it may come yet, so all that it names stays, for `gc`."""
        with Untouched(program), self.playing("PutObject", fault, key=MANIFEST):
            last = the_end(self.checkpoint(program))
        failed([last], "outcome_unknown")
        left = self.left()
        assert any(STREAM in key for key in left)
        assert not any(MANIFEST in key for key in left)
        failed(self.daemon.checkpoint(program.target, checkpoint_id=last.checkpoint_id), "exists")
        told = list(self.daemon.stub.CollectGarbage(pb.GarbageRequest(apply=True, grace=0), timeout=60))
        assert [(each.what, each.checkpoint_id, each.state) for each in told] == [("attempt", last.checkpoint_id, "removed")]
        assert not self.left()

    def overcomes(self, program: Program, operation: str, fault: Fault, **where: object) -> str:
        """The fault comes once: `ready`, the workload killed. The checkpoint's id."""
        with self.playing(operation, fault, times=1, **where):  # type: ignore[arg-type]
            last = the_end(self.checkpoint(program))
        assert last.status == "ready", f"{last.code}: {last.message}"
        self.killed(program)
        assert not [key for key in self.left() if "upload" in key]
        return str(last.checkpoint_id)

    def refuses(
        self, checkpoint_id: str, code: str, operation: str = "", fault: Fault | None = None, **where: object
    ) -> pb.Event:
        """A restore ends with this code, and nobody has run: that is from the phase `probing` on."""
        if fault is None:
            last = the_end(self.daemon.restore(checkpoint_id))
        else:
            with self.playing(operation, fault, **where):  # type: ignore[arg-type]
                last = the_end(self.daemon.restore(checkpoint_id))
        failed([last], code)
        assert "probing" not in last.profile.phases
        assert not keeper.descendants(self.daemon.pid)
        assert not self.daemon.at_work()
        return last

    def restores(self, program: Program, checkpoint_id: str, before: Beat) -> None:
        ready(self.daemon.restore(checkpoint_id))
        goes_on(program, before)


def the_end(found: Sequence[pb.Event]) -> pb.Event:
    """The one terminal event, which is the last of all."""
    assert [event.seq for event in found] == list(range(1, len(found) + 1))
    assert [event.status in ("ready", "error") for event in found] == [False] * (len(found) - 1) + [True]
    return found[-1]


@pytest.fixture(scope="module")
def shared_bench() -> Iterator[Bench]:
    with S3Server() as server, FaultProxy(server.endpoint_url) as proxy:
        s3 = {
            **server.settings().model_dump(exclude_defaults=True), "secret_access_key": server.secret_access_key,
            "endpoint_url": proxy.url, "part_size": PART, "attempts": 2, "read_timeout": PATIENCE,
        }  # fmt: skip
        with Daemon(store=f"s3://{server.bucket}/faults", settings={"store": {"s3": s3}, "limits": {"attempts": 1}}) as daemon:
            yield Bench(daemon, server, proxy)


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    """With an empty store. The proxy is healed after each test."""
    yield shared_bench
    shared_bench.proxy.heal()
    shared_bench.empty()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """Its beats sum up all of its memory, which fills four parts."""
    with Program(tmp_path, python("memory.py", "large", "16")) as running:
        running.beat()
        yield running


# --- it says no ---------------------------------------------------------------------------------------------------------------


def test_store_answers_500(bench: Bench, program: Program) -> None:
    fault = Answer(500, "InternalError")
    for operation, where in (("UploadPart", {"after": 1}), ("CreateMultipartUpload", {}), ("CompleteMultipartUpload", {})):
        bench.ends(program, "store_unavailable", operation, fault, **where)
    before = program.beat()
    done = bench.overcomes(program, "UploadPart", fault, after=1)
    bench.refuses(done, "store_unavailable", "GetObject", fault, key=STREAM)
    bench.restores(program, done, before)


def test_store_answers_503_slow_down(bench: Bench, program: Program) -> None:
    fault = Answer(503, "SlowDown")
    last = bench.ends(program, "store_unavailable", "UploadPart", fault, after=2)
    assert "SlowDown" in last.message
    before = program.beat()
    done = bench.overcomes(program, "CompleteMultipartUpload", fault)
    bench.refuses(done, "store_unavailable", "GetObject", fault, key="index.zst")
    bench.restores(program, done, before)


def test_store_answers_403_half_way(bench: Bench, program: Program) -> None:
    """Its rights are taken away: no trying again helps, and the hint names them."""
    fault = Answer(403, "AccessDenied")
    last = bench.ends(program, "store_unavailable", "UploadPart", fault, after=2)
    assert "AccessDenied" in last.message
    assert "credentials" in last.hint
    before = program.beat()
    done = bench.checkpointed(program)
    bench.refuses(done, "store_unavailable", "GetObject", fault, key=STREAM)
    bench.restores(program, done, before)


# --- it breaks off ------------------------------------------------------------------------------------------------------------


def test_store_resets_the_connection_after_the_body_was_sent(bench: Bench, program: Program) -> None:
    """It has obeyed, and nobody heard. Of the whole object's commit that is no harm: what is there is found to be ours."""
    bench.ends(program, "store_unavailable", "UploadPart", Reset(), after=1)
    bench.ends(program, "store_unavailable", "CreateMultipartUpload", Reset())
    before = program.beat()
    done = bench.overcomes(program, "CompleteMultipartUpload", Reset())
    bench.refuses(done, "store_unavailable", "GetObject", Reset(), key=STREAM)
    bench.restores(program, done, before)


def test_store_stalls(bench: Bench, program: Program) -> None:
    bench.ends(program, "store_unavailable", "UploadPart", Stall(), after=1)
    before = program.beat()
    done = bench.overcomes(program, "UploadPart", Stall(), after=1)
    bench.refuses(done, "store_unavailable", "GetObject", Truncate(1 << 20, stall=True), key=STREAM)
    bench.restores(program, done, before)


def test_store_truncates_a_body(bench: Bench, program: Program) -> None:
    """Of an answer: the manifest when it is read back, a stream when it is restored. Once is resumed where it broke."""
    bench.ends_unread(program, Truncate(100))
    before = program.beat()
    done = bench.overcomes(program, "GetObject", Truncate(100), key=MANIFEST)
    bench.refuses(done, "store_unavailable", "GetObject", Truncate(1000), key=STREAM)
    with bench.playing("GetObject", Truncate(1000), times=1, key=STREAM):
        bench.restores(program, done, before)


# --- its bytes are wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [{"etag": '"00112233445566778899aabbccddeeff"'}, {"x-amz-checksum-crc32": "AAAAAA=="}], ids=["etag", "crc32"]
)
def test_store_answers_a_wrong_checksum(bench: Bench, program: Program, header: dict[str, str]) -> None:
    fault = Rewrite(header)
    bench.ends(program, "store_unavailable", "UploadPart", fault, after=1)
    before = program.beat()
    done = bench.overcomes(program, "UploadPart", fault, after=1)
    bench.restores(program, done, before)


def test_store_flips_a_byte(bench: Bench, program: Program) -> None:
    """On the way there, on the way back, and on its disk."""
    bench.ends(program, "store_unavailable", "UploadPart", Flip(), after=1)
    bench.ends(program, "store_unavailable", "PutObject", Flip(), key="index.zst")
    before = program.beat()
    done = bench.checkpointed(program)
    for key in (STREAM, "index.zst", "images.tar.zst", MANIFEST):
        bench.refuses(done, "corrupt", "GetObject", FlipAnswer(), key=key)
    for key in (STREAM, "index.zst", "images.tar.zst"):
        with bench.changed(key, flipped):
            assert details(bench.refuses(done, "corrupt"))["key"].endswith(key)
    bench.restores(program, done, before)


def test_store_truncates_an_object(bench: Bench, program: Program) -> None:
    """After it had all of it: before the manifest is written, and after."""
    with Untouched(program), truncated_before_the_manifest(bench):
        last = failed(bench.checkpoint(program), "corrupt")
    assert details(last)["key"] == f"main/{STREAM}"
    assert not bench.left()
    before = program.beat()
    done = bench.checkpointed(program)
    for key in (STREAM, "index.zst", "images.tar.zst"):
        with bench.changed(key, lambda data: data[:-100]):
            bench.refuses(done, "corrupt")
    with bench.changed(MANIFEST, lambda data: data[: len(data) // 2]):
        bench.refuses(done, "corrupt")
    bench.restores(program, done, before)


def test_store_drops_a_part(bench: Bench, program: Program) -> None:
    """It has made the object of one part less than it was told to, and said that all is well."""
    bench.ends(program, "store_unavailable", "CompleteMultipartUpload", DropPart())
    before = program.beat()
    done = bench.checkpointed(program)
    with bench.changed(STREAM, lambda data: data[:PART] + data[2 * PART :]):
        bench.refuses(done, "corrupt")
    with bench.changed(STREAM, lambda data: data[:PART] + data[2 * PART :] + bytes(PART)):
        bench.refuses(done, "corrupt")  # of the right size
    bench.restores(program, done, before)


def test_store_lies_about_a_size(bench: Bench, program: Program) -> None:
    """When the object was committed; and only later, before the manifest."""
    lie = Rewrite({"content-length": "17"})
    bench.ends(program, "store_unavailable", "HeadObject", lie, after=1, key=STREAM)
    assert details(bench.ends(program, "corrupt", "HeadObject", lie, after=2, key=STREAM))["key"] == f"main/{STREAM}"
    before = program.beat()
    done = bench.checkpointed(program)
    bench.refuses(done, "corrupt", "HeadObject", lie, key=STREAM)
    bench.refuses(done, "corrupt", "GetObject", Rewrite({"content-range": "bytes 0-99/100"}), key=STREAM)
    bench.restores(program, done, before)


# --- the last step ------------------------------------------------------------------------------------------------------------


def test_store_fails_at_the_last_step(bench: Bench, program: Program) -> None:
    """The manifest's put, or its way back. What was to be killed runs on: everything of it was in the store, but not said to be."""
    bench.ends(program, "store_unavailable", "PutObject", Answer(500, "InternalError"), key=MANIFEST)
    bench.ends_unknown(program, Stall())
    bench.ends(program, "corrupt", "GetObject", FlipAnswer(), key=MANIFEST)
    bench.ends_unread(program, Answer(500, "InternalError"))
    before = program.beat()
    done = bench.overcomes(program, "PutObject", Reset(), key=MANIFEST)
    bench.restores(program, done, before)


# --- a disk that goes bad -----------------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@contextmanager
def truncated_before_the_manifest(bench: Bench) -> Iterator[None]:
    """When the daemon asks for the stream's size the last time, it has lost its end."""
    hold = Hold()

    def cut() -> None:
        assert hold.held.wait(LIMIT)
        bench.change(STREAM, lambda data: data[:-100])
        hold.release()

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        with bench.playing("HeadObject", hold, times=9, after=2, key=STREAM):  # whoever loses patience asks again
            yield
    finally:
        cutter.join()
