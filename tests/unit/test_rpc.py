"""The gRPC service over a real unix socket: who gets in, what an error looks like, and that watching is not owning."""

# ruff: noqa: ASYNC110, ASYNC240 - waiting on a condition with a deadline, and files of a test

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import cast
from urllib.parse import unquote

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from hibernode._pb import hibernode_pb2 as pb
from hibernode._pb.hibernode_pb2_grpc import NodeStub
from hibernode.errors import (
    BadCommand,
    Busy,
    Cancelled,
    Corrupt,
    DumpFailed,
    HibernodeError,
    NotFound,
    Refused,
    StoreUnavailable,
    Stuck,
)
from hibernode.model import GarbageRequest, Status
from hibernode.rpc import RpcServer
from tests.fakes.desk import ACTION, CHECKPOINT, ActionCommand, FakeDesk, Lines, Step, failing, holding

DEADLINE = 30.0


@pytest.fixture
def desk() -> FakeDesk:
    return FakeDesk()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "h.sock"


@pytest_asyncio.fixture
async def server(desk: FakeDesk, path: Path) -> AsyncIterator[RpcServer]:
    made = RpcServer(desk, path)
    await made.start()
    yield made
    desk.released.set()
    await made.stop(grace=1.0)


@pytest_asyncio.fixture
async def channel(server: RpcServer, path: Path) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{path}") as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> NodeStub:
    return NodeStub(channel)


def command(**more: object) -> pb.CheckpointCommand:
    return pb.CheckpointCommand(target=pb.Target(pod_name="trainer"), kind="simple", reason="manual", **more)  # type: ignore[arg-type]


def trailers(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata()))


async def until(condition: object) -> None:
    """Wait for `condition()`, at most DEADLINE seconds."""
    assert callable(condition)
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


# --- the socket -------------------------------------------------------------------------------------------------------


async def test_the_socket_is_private_from_its_first_moment(server: RpcServer, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.with_name("h.sock.lock").stat().st_mode) == 0o600


async def test_the_mask_for_new_files_is_as_it_was(desk: FakeDesk, path: Path) -> None:
    def mask() -> str:
        return next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask"))

    before = os.umask(0o022)
    server = RpcServer(desk, path)
    await server.start()
    assert mask().endswith("0022")
    os.umask(before)
    await server.stop(0)


@pytest.mark.node
async def test_another_user_cannot_connect(desk: FakeDesk) -> None:
    """The mode of the socket alone keeps others out, in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "h.sock"
        path.parent.chmod(0o755)
        server = RpcServer(desk, path)
        await server.start()
        program = f"""
import os, socket
os.setgid(65534); os.setuid(65534)
os.stat({str(path)!r})
try:
    socket.socket(socket.AF_UNIX).connect({str(path)!r})
except PermissionError:
    print("kept out")
"""
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
        out, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
        await server.stop(0)
    assert out == b"kept out\n"


@pytest.mark.node
async def test_another_user_is_turned_away_where_the_mode_would_let_him_in(desk: FakeDesk) -> None:
    """The kernel names him, and he hears nothing; root comes in at the same door."""
    with tempfile.TemporaryDirectory() as directory:
        open_to_all = Path(directory) / "h.sock"
        open_to_all.parent.chmod(0o755)
        server = RpcServer(desk, open_to_all)
        await server.start()
        open_to_all.chmod(0o666)
        for uid, outcome in ((65534, b"turned away\n"), (0, b"let in\n")):
            program = f"""
import os, socket
os.setgid({uid}); os.setuid({uid})
caller = socket.socket(socket.AF_UNIX)
caller.settimeout({DEADLINE})
caller.connect({str(open_to_all)!r})
try:
    greeting = caller.recv(1)
except ConnectionResetError:
    greeting = b""
print("let in" if greeting else "turned away")
"""
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
            out, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
            assert out == outcome
        await server.stop(0)


async def test_what_is_behind_the_door_has_no_name(server: RpcServer, path: Path) -> None:
    assert sorted(each.name for each in path.parent.iterdir()) == ["h.sock", "h.sock.lock"]


async def test_who_has_left_leaves_no_descriptor_at_the_door(server: RpcServer, path: Path, stub: NodeStub) -> None:
    """Neither one who asked something, nor one who said nonsense, nor one who only looked in."""
    await stub.Doctor(pb.Empty(), timeout=DEADLINE)
    before = len(os.listdir("/proc/self/fd"))
    for word in (b"", b"nonsense\r\n\r\n") * 5:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(word)
        writer.close()
        await reader.read()
    for _ in range(5):
        async with grpc.aio.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)]) as passing:
            await NodeStub(passing).Doctor(pb.Empty(), timeout=DEADLINE)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_the_socket_of_a_dead_daemon_is_replaced(desk: FakeDesk, path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = RpcServer(desk, path)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{path}") as opened:
        assert (await NodeStub(opened).Doctor(pb.Empty(), timeout=DEADLINE)).checks
    await server.stop()
    assert not path.exists()


async def test_a_second_daemon_is_refused_and_the_first_goes_on(server: RpcServer, path: Path, stub: NodeStub) -> None:
    second = RpcServer(FakeDesk(), path)
    with pytest.raises(Refused, match="another daemon answers on") as caught:
        await second.start()
    assert caught.value.code == "daemon_running"
    assert (await stub.Doctor(pb.Empty(), timeout=DEADLINE)).checks
    await second.stop()
    assert path.exists()


async def test_a_socket_that_a_stranger_answers_is_left_alone(desk: FakeDesk, path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(Refused, match="another daemon answers on"):
            await RpcServer(desk, path).start()
        assert path.exists()


async def test_a_file_that_is_no_socket_is_left_alone(desk: FakeDesk, path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_text("precious")
    with pytest.raises(Refused, match="is not a socket"):
        await RpcServer(desk, path).start()
    assert path.read_text() == "precious"


async def test_a_directory_others_can_write_to_is_refused(desk: FakeDesk, path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(Refused, match="others can write to") as caught:
        await RpcServer(desk, path).start()
    assert caught.value.details["found"] == "0777"


async def test_a_path_too_long_for_a_socket_is_refused(desk: FakeDesk, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not a path for a unix socket"):
        await RpcServer(desk, tmp_path / ("x" * 108)).start()


async def test_a_path_under_a_file_is_refused(desk: FakeDesk, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "d.sock", tmp_path / "file" / "further" / "d.sock"):
        with pytest.raises(Refused, match="cannot listen on") as caught:
            await RpcServer(desk, path).start()
        assert caught.value.code == "socket_path"


async def test_a_path_with_odd_characters_works(desk: FakeDesk, tmp_path: Path) -> None:
    path = tmp_path / "a b%41?#.sock"
    server = RpcServer(desk, path)
    await server.start()
    assert path.is_socket()
    await server.stop(0)


async def test_a_stopped_server_can_be_followed_by_another(desk: FakeDesk, path: Path) -> None:
    for _ in range(2):
        server = RpcServer(desk, path)
        await server.start()
        await server.stop()
        await server.stop()


# --- health and reflection --------------------------------------------------------------------------------------------


async def test_health_answers(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "hibernode.v1.Node"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_names_the_services(channel: grpc.aio.Channel) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = reflection.ServerReflectionInfo(timeout=DEADLINE)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {"hibernode.v1.Node", "grpc.health.v1.Health"}
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="hibernode.v1.Node"))
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.done_writing()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadCommand("no such compression"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("no such pod"), grpc.StatusCode.NOT_FOUND),
        (Refused("gpu_mig", "mig is on", prop="mig", found="on", wanted="off"), grpc.StatusCode.FAILED_PRECONDITION),
        (StoreUnavailable("no answer"), grpc.StatusCode.UNAVAILABLE),
        (Busy("has another action"), grpc.StatusCode.UNAVAILABLE),
        (Cancelled("asked for"), grpc.StatusCode.ABORTED),
        (Corrupt("wrong digest"), grpc.StatusCode.INTERNAL),
        (DumpFailed("criu said no"), grpc.StatusCode.INTERNAL),
        (Stuck("left suspended"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_each_error_has_its_status_and_its_code(
    desk: FakeDesk, stub: NodeStub, error: HibernodeError, status: grpc.StatusCode
) -> None:
    desk.fail["doctor"] = error
    desk.fail["watch"] = error
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await stub.Doctor(pb.Empty(), timeout=DEADLINE)
    with pytest.raises(grpc.aio.AioRpcError) as stream:
        await stub.WatchActions(pb.ActionId(), timeout=DEADLINE).read()
    for caught in (unary.value, stream.value):
        assert caught.code() == status
        assert caught.details() == error.message
        metadata = trailers(caught)
        assert metadata["hibernode-code"] == error.code
        assert json.loads(metadata["hibernode-details-bin"]) == error.details


async def test_a_hint_may_hold_any_character(desk: FakeDesk, stub: NodeStub) -> None:
    desk.fail["doctor"] = NotFound("größe\nzweite", hint="100 % größer\nmachen")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Doctor(pb.Empty(), timeout=DEADLINE)
    assert caught.value.details() == "größe\nzweite"
    assert unquote(str(trailers(caught.value)["hibernode-hint"])) == "100 % größer\nmachen"


async def test_a_long_log_does_not_hide_the_error(desk: FakeDesk, stub: NodeStub) -> None:
    """Trailers have a hard limit in grpc: beyond it the caller would see RESOURCE_EXHAUSTED instead."""
    log = "x" * 50_000 + "\nError (criu/mem.c): can't dump"
    desk.fail["doctor"] = DumpFailed("m" * 9000, hint="ü" * 5000, log=log, more={"deep": ["y" * 9000] * 9}, pid=7)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Doctor(pb.Empty(), timeout=DEADLINE)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    metadata = trailers(caught.value)
    assert metadata["hibernode-code"] == "dump_failed"
    details = json.loads(metadata["hibernode-details-bin"])
    assert details["pid"] == 7
    assert details["log"].endswith("Error (criu/mem.c): can't dump")


async def test_a_defect_is_logged_once_and_never_shown(desk: FakeDesk, stub: NodeStub, caplog: pytest.LogCaptureFixture) -> None:
    desk.fail["doctor"] = ZeroDivisionError("the secret of the house")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Doctor(pb.Empty(), timeout=DEADLINE)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert trailers(caught.value)["hibernode-code"] == "internal"
    assert "secret" not in repr(caught.value)
    assert [r.exc_info[0] for r in caplog.records if r.exc_info] == [ZeroDivisionError]


async def test_what_the_wire_refuses_is_a_bad_command(desk: FakeDesk, stub: NodeStub) -> None:
    both = pb.CheckpointCommand(target=pb.Target(pod_name="a", pid=7), kind="simple", reason="manual")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Checkpoint(both, timeout=DEADLINE).read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert desk.commands == []


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_a_checkpoint_streams_to_its_terminal_event(desk: FakeDesk, stub: NodeStub) -> None:
    updates = [u async for u in stub.Checkpoint(command(), timeout=DEADLINE)]
    events = [u.event for u in updates if u.HasField("event")]
    assert [e.status for e in events] == ["processing", "checkpoint_created", "ready"]
    assert [e.seq for e in events] == [1, 2, 3]
    assert events[-1].profile.pause_ns == 412_300_000
    assert any(u.progress.phase == "shipping" for u in updates)


async def test_empty_ids_are_filled_in_and_told_when_the_action_is_accepted(desk: FakeDesk, stub: NodeStub) -> None:
    desk.script = holding
    call = stub.Checkpoint(command(), timeout=DEADLINE)
    told = dict(await call.initial_metadata())
    assert told["hibernode-action-id"] == desk.commands[0].action_id != ""
    assert told["hibernode-checkpoint-id"] == desk.commands[0].checkpoint_id
    call.cancel()


async def test_the_same_action_again_watches_the_first(desk: FakeDesk, stub: NodeStub) -> None:
    for _ in range(2):
        updates = [u async for u in stub.Checkpoint(command(action_id=ACTION, checkpoint_id=CHECKPOINT))]
        assert updates[-1].event.status == "ready"
    assert len(desk.commands) == 1


async def test_garbage_is_collected_by_the_nodes_own_rules_where_none_are_given(desk: FakeDesk, stub: NodeStub) -> None:
    """And only told, where nobody asked for more: the proto's defaults are the careful ones."""
    told = [each async for each in stub.CollectGarbage(pb.GarbageRequest(), timeout=DEADLINE)]
    assert [(each.what, each.state) for each in told] == [(each.what, "found") for each in desk.garbage]
    rules = pb.GarbageRequest(apply=True, grace=0, keep_last=0, keep_days=1.5, directory="file:///x")
    told = [each async for each in stub.CollectGarbage(rules, timeout=DEADLINE)]
    assert {each.state for each in told} == {"removed"}
    given = GarbageRequest(apply=True, grace=0.0, keep_last=0, keep_days=1.5, directory="file:///x")
    assert desk.collected == [GarbageRequest(), given]


@pytest.mark.parametrize("rules", [{"grace": -1}, {"keep_last": -1}, {"keep_days": -0.5}, {"grace": float("nan")}], ids=str)
async def test_rules_out_of_range_collect_nothing(desk: FakeDesk, stub: NodeStub, rules: dict[str, float]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CollectGarbage(pb.GarbageRequest(**rules), timeout=DEADLINE).read()  # type: ignore[arg-type]
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert desk.collected == []


async def test_a_client_that_goes_away_ends_its_watch_and_not_the_action(desk: FakeDesk, path: Path, server: RpcServer) -> None:
    desk.script = holding
    async with grpc.aio.insecure_channel(f"unix:{path}") as gone:
        call = NodeStub(gone).Checkpoint(command(action_id=ACTION), timeout=DEADLINE)
        assert (await call.read()).event.status == "processing"
        assert desk.watchers == 1
    await until(lambda: desk.watchers == 0)
    assert desk.cancelled == []
    desk.released.set()
    async with grpc.aio.insecure_channel(f"unix:{path}") as back:
        updates = [u async for u in NodeStub(back).WatchActions(pb.ActionId(action_id=ACTION), timeout=DEADLINE)]
    assert updates[-1].event.status == "ready"
    await until(lambda: desk.watchers == 0)


async def test_a_client_that_does_not_read_holds_up_nobody(desk: FakeDesk, stub: NodeStub) -> None:
    def chatty(command: ActionCommand) -> list[Step]:
        lines = Lines(command)
        many: list[Step] = [lines.progress("p" * 1000, n, 1000, n, 1.0) for n in range(1000)]  # a megabyte: no buffer
        return [*many, lines.event(Status.READY)]

    desk.script = chatty
    idle = stub.WatchActions(pb.ActionId())
    await until(lambda: desk.watchers == 1)
    updates = [u async for u in stub.Checkpoint(command(), timeout=DEADLINE)]
    assert updates[-1].event.status == "ready"
    idle.cancel()
    await until(lambda: desk.watchers == 0)


async def test_stopping_ends_an_endless_watch_at_once(desk: FakeDesk, path: Path) -> None:
    server = RpcServer(desk, path)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = NodeStub(channel).WatchActions(pb.ActionId())
        reading = asyncio.ensure_future(call.read())
        await until(lambda: desk.watchers == 1)
        await asyncio.wait_for(server.stop(grace=60.0), DEADLINE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "the daemon is stopping"
    assert desk.watchers == 0


async def test_an_action_that_fails_is_an_event_and_no_broken_call(desk: FakeDesk, stub: NodeStub) -> None:
    desk.script = failing(DumpFailed("criu could not dump pid 7", hint="look at the log", log="line\nlast line"))
    updates = [u async for u in stub.Checkpoint(command(), timeout=DEADLINE)]
    last = updates[-1].event
    assert (last.status, last.code, last.hint) == (Status.ERROR, "dump_failed", "look at the log")
    assert last.details["log"] == "line\nlast line"


# --- the rest of the desk ---------------------------------------------------------------------------------------------


async def test_each_question_reaches_the_desk(desk: FakeDesk, stub: NodeStub) -> None:
    await stub.FindWorkloads(pb.Target())
    await stub.FindWorkloads(pb.Target(pid=7))
    assert [t and t.pid for t in desk.targets] == [None, 7]
    job = await stub.RunJob(pb.RunRequest(name="t", argv=["sleep", "1"], cwd="/", env={"A": "b"}))
    assert (job.name, desk.jobs[0].env, desk.jobs[0].namespace) == ("t", {"A": "b"}, "default")
    await stub.StopJob(pb.StopRequest(name="t"))
    assert desk.stopped == [("default", "t", "TERM")]
    assert not (await stub.Cancel(pb.ActionId(action_id=ACTION))).found
    inspected = await stub.Inspect(pb.CheckpointId(checkpoint_id=CHECKPOINT))
    assert json.loads(inspected.manifest)["checkpoint_id"] == CHECKPOINT
    assert inspected.location.endswith(CHECKPOINT)
    listed = (await stub.ListCheckpoints(pb.Empty())).checkpoints
    assert (listed[0].workload, listed[0].streams, listed[0].images) == ("default/trainer", 8, 1)
    await stub.DeleteCheckpoint(pb.CheckpointId(checkpoint_id=CHECKPOINT))
    assert desk.deleted == [CHECKPOINT]
    assert [n.node for n in (await stub.ListNodes(pb.Empty())).nodes] == ["node-a", "node-b"]
    assert [v.ok async for v in stub.Verify(pb.CheckpointId(checkpoint_id=CHECKPOINT))] == [True] * 4
    await stub.Checkpoint(command(action_id=ACTION)).read()
    assert (await stub.GetAction(pb.ActionId(action_id=ACTION))).type == "checkpoint"
    assert len((await stub.ListActions(pb.Empty())).actions) == 1


def test_the_service_carries_neither_click_nor_rich() -> None:
    """The daemon runs under a tight memory limit."""
    program = "import sys, hibernode.rpc, hibernode.metrics; print([m for m in ('click', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert out.stdout == "[]\n"
