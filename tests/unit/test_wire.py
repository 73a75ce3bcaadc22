"""What travels: every message comes back as it was, and nothing from outside raises anything but BadCommand."""

from __future__ import annotations

import json
import math
import uuid
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hibernode import wire, wishes
from hibernode._pb import hibernode_pb2 as pb
from hibernode.errors import BadCommand
from hibernode.model import (
    MAX_GPUS,
    MAX_LISTED,
    MAX_WISHES,
    ActionView,
    CancelCommand,
    Check,
    CheckpointCommand,
    Command,
    DeleteCommand,
    Event,
    Garbage,
    GarbageRequest,
    Gpu,
    GpuInventory,
    HeartbeatWish,
    JobSpec,
    NodeRecord,
    Overrides,
    PhaseCost,
    Profile,
    Progress,
    RestoreCommand,
    Status,
    Target,
    Verdict,
    WorkloadView,
)

ID = "0123abcd-0123-4567-89ab-0123456789ab"

ids = st.uuids().map(str)
names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
longs = st.integers(0, (1 << 63) - 1)
ints = st.integers(0, (1 << 31) - 1)
seconds = st.floats(0, 1e10)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
targets = st.one_of(
    st.builds(Target, pod_id=ids | names),
    st.builds(Target, pod_name=names, namespace=st.just("") | names),
    st.builds(Target, pid=st.integers(1, (1 << 31) - 1)),
)
overrides = st.builds(
    Overrides,
    asynchronous=st.booleans(),
    compression=texts,
    criu_opts=texts,
    directory=texts,
    streams=st.integers(0, 64),
    pod_name=st.just("") | names,
)
reasons = st.sampled_from(["manual", "heartbeat", "nodeTermination", "nodeUnschedulable"])
commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(
        CheckpointCommand,
        action_id=ids,
        checkpoint_id=ids,
        target=targets,
        kind=st.sampled_from(["simple", "rootfs", "rootfsonly"]),
        reason=reasons,
        overrides=overrides,
        expires_at=seconds,
    ),
    st.builds(RestoreCommand, action_id=ids, checkpoint_id=ids, reason=reasons, overrides=overrides, expires_at=seconds),
    st.builds(CancelCommand, action_id=ids),
    st.builds(DeleteCommand, action_id=ids, checkpoint_id=ids, directory=texts),
)
costs = st.builds(PhaseCost, seconds=seconds, bytes=longs)
profiles = st.builds(
    Profile,
    phases=st.dictionaries(texts, costs, max_size=3),
    unaccounted=seconds,
    pause_ns=longs,
    total_duration=longs,
    total_io=longs,
    raw_bytes=longs,
    zero_bytes=longs,
    stored_bytes=longs,
    streams=ints,
)
events = st.builds(
    Event,
    action_id=ids,
    seq=longs,
    type=st.sampled_from(["checkpoint", "restore"]),
    status=st.sampled_from(Status),
    checkpoint_id=ids,
    node=texts,
    time=seconds,
    code=texts,
    message=texts,
    hint=texts,
    details=st.dictionaries(texts, json_values, max_size=3),
    retry=st.booleans(),
    profile=st.none() | profiles,
)
progresses = st.builds(
    Progress, action_id=ids, phase=texts, bytes_done=longs, bytes_total=longs, stored_bytes=longs, seconds=seconds
)
workloads = st.builds(
    WorkloadView,
    kind=st.sampled_from(["process", "job"]),
    namespace=texts,
    name=texts,
    uid=texts,
    pid=ints,
    state=st.sampled_from(["running", "exited", "killed"]),
    command=texts,
    rss=longs,
    processes=ints,
    log=texts,
    started_at=seconds,
)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.none() | st.integers(0, 1 << 53)
numbers = st.none() | st.integers(0, (1 << 31) - 1)
answers = st.none() | st.booleans()
gpus = st.builds(
    Gpu,
    index=st.integers(0, 63),
    uuid=words,
    name=words,
    bus_id=words,
    minor=numbers,
    compute_capability=words,
    memory_total=counts,
    memory_used=counts,
    memory_free=counts,
    mig=answers,
    persistence=answers,
    compute_mode=words,
    processes=numbers,
    mps_processes=numbers,
    ecc_uncorrected=counts,
    rows_pending=answers,
    rows_failed=answers,
    unknown=st.dictionaries(words, words, max_size=3),
)
records = st.builds(
    NodeRecord,
    node=texts,
    cluster=texts,
    version=texts,
    arch=texts,
    kernel=texts,
    criu=texts,
    store=texts,
    cpus=ints,
    memory_total=longs,
    memory_available=longs,
    load=seconds,
    actions=ints,
    time=seconds,
    arena_bytes=longs,
    workloads=st.lists(workloads, max_size=3),
    gpu_inventory=st.builds(GpuInventory, state=words, reason=words, driver=words, cuda=words, gpus=st.lists(gpus, max_size=3)),
    cpu_flags=st.lists(texts, max_size=3),
    heartbeats=st.lists(
        st.builds(
            HeartbeatWish, namespace=texts, name=texts, uid=texts, since=seconds, interval=seconds, keep_last=ints, problem=texts
        ),
        max_size=3,
    ),
)


# --- there and back ---------------------------------------------------------------------------------------------------


@given(commands)
def test_commands_come_back(command: Command) -> None:
    assert wire.decode_command(wire.verb_of(command), wire.encode_command(command)) == command
    assert wire.command_from_pb(wire.command_to_pb(command)) == command


@given(events)
def test_events_come_back(event: Event) -> None:
    assert wire.decode_event(wire.encode_event(event)) == event
    message = pb.Event.FromString(wire.event_to_pb(event).SerializeToString())
    assert wire.event_from_pb(message) == event


@given(progresses)
def test_progress_comes_back(progress: Progress) -> None:
    assert wire.decode_progress(wire.encode_progress(progress)) == progress
    assert wire.progress_from_pb(wire.progress_to_pb(progress)) == progress


@given(records)
def test_node_records_come_back(record: NodeRecord) -> None:
    assert wire.decode_node(wire.encode_node(record)) == record
    assert wire.node_from_pb(wire.node_to_pb(record)) == record


@given(targets, texts, st.lists(workloads, max_size=3))
def test_finding_comes_back(target: Target, node: str, found: list[WorkloadView]) -> None:
    assert wire.decode_find(wire.encode_find(target)) == target
    assert wire.target_from_pb(wire.target_to_pb(target)) == target
    assert wire.decode_found(wire.encode_found(node, found)) == (node, found)


@pytest.mark.parametrize(
    "rules", [{}, {"grace": 0.0}, {"keep_last": 0, "keep_days": 0.0}, {"keep_last": 3, "apply": True}], ids=str
)
def test_a_rule_that_is_absent_is_no_zero(rules: dict[str, float]) -> None:
    request = GarbageRequest.model_validate(rules)
    assert wire.garbage_request_from_pb(wire.garbage_request_to_pb(request)) == request
    for name in ("grace", "keep_last", "keep_days"):
        assert (getattr(request, name) is None) == (name not in rules)


@given(events, texts, st.booleans(), st.lists(texts, min_size=1, max_size=3), names)
def test_views_come_back(event: Event, text: str, flag: bool, argv: list[str], name: str) -> None:
    for last in (None, event):
        action = ActionView(
            action_id=text,
            checkpoint_id=text,
            type="restore",
            status=Status.READY,
            phase=text,
            target=text,
            began_at=0.0,
            last=last,
        )
        assert wire.action_from_pb(wire.action_to_pb(action)) == action
    check = Check(name=text, ok=flag, found=text, required=not flag)
    assert wire.check_from_pb(wire.check_to_pb(check)) == check
    verdict = Verdict(ok=flag, bytes=0, frames=3, seconds=0.0, message=text)
    assert wire.verdict_from_pb(wire.verdict_to_pb(verdict)) == verdict
    garbage = Garbage(what="upload", checkpoint_id=text, key=text, age=-1.5, reason="foreign", state="kept", message=text)
    assert wire.garbage_from_pb(wire.garbage_to_pb(garbage)) == garbage
    job = JobSpec(name=name, argv=argv, env={text: text})
    assert wire.job_from_pb(wire.job_to_pb(job)) == job


# --- the JSON is protobuf's JSON --------------------------------------------------------------------------------------


@given(events)
def test_any_protobuf_library_reads_our_json(event: Event) -> None:
    assert json_format.Parse(wire.encode_event(event), pb.Event()) == wire.event_to_pb(event)


@pytest.mark.parametrize("names_as_in_proto", [True, False])
@given(event=events)
def test_we_read_the_json_of_any_protobuf_library(names_as_in_proto: bool, event: Event) -> None:
    message = wire.event_to_pb(event)
    theirs = json_format.MessageToJson(message, preserving_proto_field_name=names_as_in_proto)
    assert wire.decode_event(theirs.encode()) == event


def test_long_integers_are_read_as_strings_and_as_numbers() -> None:
    progress = Progress(action_id=ID, phase="dump", bytes_done=1 << 60, bytes_total=7, stored_bytes=0, seconds=1.5)
    table = json.loads(wire.encode_progress(progress))
    assert table["bytes_done"] == str(1 << 60)
    table |= {"bytes_done": 1 << 60, "bytes_total": 7.0}
    assert wire.decode_progress(json.dumps(table).encode()) == progress


def test_what_is_absent_has_its_default() -> None:
    command = decode({"kind": None, "reason": "", "overrides": {}})
    assert command == CheckpointCommand(action_id=ID, checkpoint_id=ID, target=Target(pid=7))


def test_what_is_absent_in_a_listed_workload_has_its_default() -> None:
    record = NodeRecord(
        node="n", cluster="c", version="", arch="", kernel="", criu="", store="", cpus=1, memory_total=1, memory_available=1, load=0.0,
        actions=0, time=1.0, arena_bytes=0, workloads=[WorkloadView(kind="job", namespace="", name="trainer")],
    )  # fmt: skip
    table = json.loads(wire.encode_node(record))
    del table["workloads"][0]["state"]
    assert wire.decode_node(json.dumps(table).encode()) == record
    with pytest.raises(BadCommand, match="kind"):
        wire.decode_node(json.dumps(table | {"workloads": [{"name": "x"}] * 50_000}).encode())


_LONGEST_GPU = Gpu(index=63, name="n" * 200, unknown=dict.fromkeys(Gpu.model_fields, "w" * 60))


def test_a_record_of_an_older_node_is_read_and_says_nothing_of_gpus() -> None:
    record = NodeRecord(
        node="n", cluster="c", version="", arch="", kernel="", criu="", store="", cpus=1, memory_total=1, memory_available=1, load=0.0,
        actions=0, time=1.0, arena_bytes=0, gpu_inventory=GpuInventory(state="ok", reason="", gpus=[Gpu(index=0)]),
    )  # fmt: skip
    table = json.loads(wire.encode_node(record))
    del table["gpu_inventory"]
    read = wire.decode_node(as_json(table)).gpu_inventory
    assert (read.state, read.reason, read.known, read.mps, read.gpus) == ("untold", "the node does not say", False, None, [])
    message = wire.node_to_pb(record)
    message.ClearField("gpu_inventory")
    assert wire.node_from_pb(message).gpu_inventory == read


def test_more_gpus_than_there_can_be_are_refused() -> None:
    with pytest.raises(ValidationError):
        GpuInventory(gpus=[Gpu(index=0)] * (MAX_GPUS + 1))


def test_the_longest_record_of_a_node_fits_into_a_message() -> None:
    longest = WorkloadView(
        kind="process", namespace="n" * 253, name="n" * 253, uid="u" * 64, pid=(1 << 31) - 1, state="running", rss=1 << 62,
        processes=(1 << 31) - 1, started_at=1764000000.123456,
    )  # fmt: skip
    record = NodeRecord(
        node="n" * 128, cluster="c" * 128, version="v" * 20, arch="x86_64", kernel="k" * 64, criu="4.2.1", store="s" * 4096, cpus=1 << 10,
        memory_total=1 << 62, memory_available=1 << 62, load=1e6 / 3, actions=99, time=1764000000.123456, arena_bytes=1 << 62,
        workloads=[longest] * MAX_LISTED, gpu_inventory=GpuInventory(gpus=[_LONGEST_GPU] * MAX_GPUS),
    )  # fmt: skip
    assert len(wire.encode_node(record)) < wire.MESSAGE_LIMIT / 2
    wish = wishes.heartbeat("n" * 253, "n" * 253, "u" * 64, 1764000000.123456, {wishes.HEARTBEAT: "\x1b" * 30})
    assert wish is not None
    with_wishes = record.model_copy(update={"heartbeats": [wish] * MAX_WISHES})
    assert len(wire.encode_node(with_wishes)) < wire.MESSAGE_LIMIT * 3 / 4


def test_ids_in_upper_case_are_the_same_ids() -> None:
    command = decode({"action_id": ID.upper(), "checkpoint_id": ID.upper(), "target": {"pod_id": ID.upper()}})
    assert isinstance(command, CheckpointCommand)
    assert {command.action_id, command.checkpoint_id, command.target.pod_id} == {ID}
    message = pb.CancelCommand(action_id=ID.upper())
    assert wire.command_from_pb(message) == CancelCommand(action_id=ID)


def test_the_message_id_of_an_event_is_its_action_and_its_number() -> None:
    assert wire.message_id(event_with({})) == f"{ID}.3"


# --- details hold anything --------------------------------------------------------------------------------------------


class Odd:
    def __str__(self) -> str:
        return "an odd thing"


def test_details_that_are_not_json_become_text() -> None:
    details: dict[str, object] = {
        "odd": Odd(),
        "nan": math.nan,
        "huge": 1 << 80,
        "half": "a\udc80b",
        "tuple": (1, "x"),
        "bytes": b"\x00",
        "set": {3},
    }
    back = wire.decode_event(wire.encode_event(event_with(details))).details
    assert back == {
        "odd": "an odd thing",
        "nan": "nan",
        "huge": str(1 << 80),
        "half": "a?b",
        "tuple": [1, "x"],
        "bytes": "b'\\x00'",
        "set": "{3}",
    }


def test_details_without_end_are_cut() -> None:
    endless: dict[str, object] = {}
    endless["self"] = endless
    assert wire.decode_event(wire.encode_event(event_with(endless))).details
    message = pb.Event.FromString(wire.event_to_pb(event_with(endless)).SerializeToString())
    assert wire.event_from_pb(message).details


def test_whole_numbers_in_details_stay_integers() -> None:
    found = wire.event_from_pb(wire.event_to_pb(event_with({"found": 3, "wanted": 2.5}))).details
    assert found == {"found": 3, "wanted": 2.5}
    assert isinstance(found["found"], int)


def test_an_event_that_no_broker_would_take_is_cut() -> None:
    event = event_with({"log": "x" * wire.MESSAGE_LIMIT}).model_copy(update={"message": "m" * wire.MESSAGE_LIMIT})
    data = wire.encode_event(event)
    assert len(data) < wire.EVENT_LIMIT
    back = wire.decode_event(data)
    assert (back.status, back.seq, len(back.message)) == (event.status, 3, wire.TEXT_LIMIT)
    assert "bytes" in str(back.details["dropped"])


# --- saying no --------------------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any] | bytes, str, str]] = {
    "not json": (b"nonsense", "message", "the message is not JSON"),
    "empty": (b"", "message", "the message is not JSON"),
    "not utf-8": (b"\xff\xfe{\x00}\x00", "message", "the message is not JSON"),
    "a list": (b"[]", "message", "message is not an object"),
    "nested without end": (b"[" * 60_000, "message", "the message is not JSON"),
    "digits without end": (b'{"pid":' + b"1" * 5000 + b"}", "message", "the message is not JSON"),
    "too long": (b" " * (wire.COMMAND_LIMIT + 1), "size", "the message is too long: 524289 bytes"),
    "unknown": ({"colour": "red"}, "colour", "there is no property colour"),
    "unknown inside": ({"overrides": {"stream": 3}}, "overrides.stream", "there is no property overrides.stream"),
    "twice": (b'{"kind":"simple","kind":"rootfs"}', "kind", "kind is there twice"),
    "both spellings": ({"actionId": ID}, "actionId", "actionId is there twice, once in each spelling"),
    "text for a number": ({"target": {"pid": "seven"}}, "target.pid", "target.pid is not an integer"),
    "bool for a number": ({"target": {"pid": True}}, "target.pid", "target.pid is not an integer"),
    "fraction": ({"overrides": {"streams": 1.5}}, "overrides.streams", "overrides.streams is not an integer"),
    "number for a text": ({"kind": 3}, "kind", "kind is not a string"),
    "text for a bool": ({"overrides": {"asynchronous": "yes"}}, "overrides.asynchronous", "is not true or false"),
    "text for an object": ({"target": "trainer"}, "target", "target is not an object"),
    "pid too large": ({"target": {"pid": 1 << 31}}, "target.pid", "target.pid is out of range"),
    "pid negative": ({"target": {"pid": -1}}, "target.pid", "target.pid is negative"),
    "no id": ({"action_id": ""}, "action_id", "action_id is missing"),
    "bad id": ({"checkpoint_id": "latest"}, "checkpoint_id", "checkpoint_id is not valid: 'latest'"),
    "id with a newline": ({"action_id": ID + "\n"}, "action_id", "action_id is not valid"),
    "kind": ({"kind": "full"}, "kind", "kind is not valid: 'full'"),
    "reason": ({"reason": "boredom"}, "reason", "reason is not valid: 'boredom'"),
    "target absent": ({"target": None}, "target", "target is empty"),
    "target empty": ({"target": {}}, "target", "target is empty"),
    "only a namespace": ({"target": {"namespace": "a"}}, "target", "target is empty"),
    "two targets": ({"target": {"pid": 1, "pod_name": "a"}}, "target", "target is ambiguous: it has pod_name and pid"),
    "namespace of a uid": ({"target": {"pod_id": "a", "namespace": "b"}}, "target.namespace", "means nothing without"),
    "a path for a name": ({"target": {"pod_name": "../etc"}}, "target.pod_name", "target.pod_name is not a valid name"),
    "a path for a new name": ({"overrides": {"pod_name": "a/b"}}, "overrides.pod_name", "is not a valid name"),
    "half a character": (b'{"kind":"\\ud800"}', "kind", "kind has half a character in it"),
    "expired in the past of all times": ({"expires_at": -1}, "expires_at", "expires_at is not a time in seconds"),
    "milliseconds": ({"expires_at": 1.7e12}, "expires_at", "expires_at is not a time in seconds"),
    "nan": (b'{"expires_at":NaN}', "message", "NaN is not a number in JSON"),
    "nan as text": ({"expires_at": "NaN"}, "expires_at", "expires_at is not a finite number"),
    "more than a double": (b'{"expires_at":1e999}', "expires_at", "expires_at is not a finite number"),
    "65 streams": ({"overrides": {"streams": 65}}, "overrides.streams", "overrides.streams is out of range"),
    "less than no stream": ({"overrides": {"streams": -1}}, "overrides.streams", "overrides.streams is out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_command_is_told_why(case: str) -> None:
    content, prop, message = BAD[case]
    data = content if isinstance(content, bytes) else encode(content)
    with pytest.raises(BadCommand) as caught:
        wire.decode_command("checkpoint", data)
    assert message in caught.value.message
    assert caught.value.details["property"] == prop
    assert {"property", "found", "wanted"} == set(caught.value.details)
    assert caught.value.message[0].islower() or caught.value.message.startswith("NaN")


def test_what_a_newer_node_tells_besides_is_passed_over() -> None:
    """It is upgraded before the control plane, or after its neighbours; a command is another matter (`BAD`)."""
    event = event_with({"location": "here"})
    told = json.loads(wire.encode_event(event)) | {"mood": "good", "profile": {"pause_ns": "7", "watts": 3}}
    assert wire.decode_event(as_json(told)) == event.model_copy(update={"profile": Profile(pause_ns=7)})
    record = NodeRecord(
        node="n", cluster="c", version="", arch="", kernel="", criu="", store="", cpus=1, memory_total=1, memory_available=1, load=0.0,
        actions=0, time=1.0, arena_bytes=0,
    )  # fmt: skip
    newer = json.loads(wire.encode_node(record)) | {"moods": [1]}
    newer["gpu_inventory"] |= {"gpus": [{"index": 1, "processes": 0, "colour": "green"}], "watts": 7}
    read = wire.decode_node(as_json(newer))
    assert read.model_copy(update={"gpu_inventory": record.gpu_inventory}) == record
    assert read.gpu_inventory.gpus == [Gpu(index=1, processes=0)]  # zero is a number: only what is absent is unknown
    progress = Progress(action_id=ID, phase="dumping", bytes_done=1, bytes_total=2, stored_bytes=1, seconds=0.5)
    assert wire.decode_progress(as_json(json.loads(wire.encode_progress(progress)) | {"mood": "good"})) == progress
    answer = json.loads(wire.encode_found("n", [])) | {"mood": "good"}
    assert wire.decode_found(as_json(answer)) == ("n", [])


@given(events, st.data())
def test_the_short_way_reads_as_the_gate_does(event: Event, data: st.DataObject) -> None:
    """Whatever in an event is put in the place of something else: both say the same, or the short way says nothing."""
    table = json.loads(wire.encode_event(event))
    name = data.draw(st.sampled_from([*sorted(table), "checkpointId", "colour", "seq", "retry", "details"]))
    table[name] = data.draw(
        st.none() | texts | st.floats() | st.integers() | st.lists(st.integers(), max_size=2) | st.just(ID.upper())
    )
    message = as_json(table)
    short = wire._plainly(message)
    if short is not None:
        assert short == wire._build(Event, wire._read(pb.Event, message, wire.MESSAGE_LIMIT, newer=True))
    assert wire._plainly(wire.encode_event(event)) in (event, None)
    usual = event_with({"location": "s3://bucket/x"})
    assert wire._plainly(wire.encode_event(usual)) == usual


def test_a_verb_nobody_knows_is_a_bad_command() -> None:
    with pytest.raises(BadCommand, match="there is no command 'explode'"):
        wire.decode_command("explode", b"{}")


def test_a_message_from_grpc_passes_the_same_gate() -> None:
    good = pb.CheckpointCommand(action_id=ID, checkpoint_id=ID, target=pb.Target(pid=7))
    assert wire.command_from_pb(good).action_id == ID
    for bad in (
        pb.CheckpointCommand(action_id=ID, checkpoint_id=ID),
        pb.CheckpointCommand(action_id=ID, checkpoint_id=ID, target=pb.Target(pid=7), expires_at=math.nan),
        pb.CheckpointCommand(action_id=ID, checkpoint_id=ID, target=pb.Target(pid=7), kind="full"),
        pb.RestoreCommand(action_id=ID, checkpoint_id=ID, overrides=pb.Overrides(criu_opts="x" * wire.COMMAND_LIMIT)),
        pb.RestoreCommand(action_id=ID, checkpoint_id=ID, overrides=pb.Overrides(streams=65)),
        pb.CancelCommand(),
    ):
        with pytest.raises(BadCommand):
            wire.command_from_pb(bad)


@given(st.binary(max_size=200), st.sampled_from(["checkpoint", "restore", "cancel", "delete", ""]))
def test_bytes_raise_only_bad_command(data: bytes, verb: str) -> None:
    expect_value_or_bad_command(data, verb)


pieces = st.recursive(
    json_values | st.sampled_from([ID, ID.upper(), "simple", -1, 1e400, "1", "\ud800"]),
    lambda inner: st.dictionaries(
        st.sampled_from([f.name for m in (pb.Event, pb.CheckpointCommand, pb.Target, pb.Profile) for f in m.DESCRIPTOR.fields]),
        inner,
        max_size=6,
    ),
    max_leaves=12,
)


@given(pieces, st.sampled_from(["checkpoint", "restore", "cancel"]))
def test_json_that_looks_right_raises_only_bad_command(value: object, verb: str) -> None:
    expect_value_or_bad_command(json.dumps(value).encode(), verb)


def expect_value_or_bad_command(data: bytes, verb: str) -> None:
    decoders = (
        lambda: wire.decode_command(verb, data),
        lambda: wire.decode_event(data),
        lambda: wire.decode_progress(data),
        lambda: wire.decode_node(data),
        lambda: wire.decode_find(data),
        lambda: wire.decode_found(data),
    )
    for decode_one in decoders:
        try:
            decode_one()
        except BadCommand as e:
            json.dumps(e.details)
            str(e).encode()


def decode(changes: dict[str, Any]) -> Command:
    return wire.decode_command("checkpoint", encode(changes))


def as_json(table: dict[str, Any]) -> bytes:
    return json.dumps(table).encode()


def encode(changes: dict[str, Any]) -> bytes:
    """A good command, and what the test makes of it."""
    return json.dumps({"action_id": ID, "checkpoint_id": ID, "target": {"pid": 7}} | changes).encode()


def event_with(details: dict[str, object]) -> Event:
    return Event(
        action_id=ID,
        seq=3,
        type="checkpoint",
        status=Status.ERROR,
        checkpoint_id=str(uuid.UUID(int=1)),
        node="n1",
        time=1.0,
        details=details,
    )
