"""Messages to bytes and back: the values of `model.py`, the protobufs of `proto/`, and their JSON form on NATS.

Pure. Names are snake_case as in the proto file; camelCase, which other protobuf libraries write, is read as well.
Protobuf's JSON writes a 64-bit integer as a string, because JavaScript cannot hold it: we write it so, and read both
forms. What is absent has the proto's default, or the model's where it has one of its own (`kind`, `reason`).

Everything that comes from outside, JSON or binary, passes one gate (`_build`), and the only error that leaves is
BadCommand, whose details name the property, what was found and what was wanted.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.struct_pb2 import Value as PbValue
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hibernode._pb import hibernode_pb2 as pb
from hibernode.errors import BadCommand
from hibernode.model import (
    MAX_STREAMS,
    ActionView,
    CancelCommand,
    Check,
    CheckpointCommand,
    Command,
    DeleteCommand,
    Event,
    Garbage,
    GarbageRequest,
    JobSpec,
    NodeRecord,
    Progress,
    RestoreCommand,
    Target,
    Value,
    Verdict,
    WorkloadView,
)

COMMAND_LIMIT = 512 << 10  # bytes; a command is well under 4 KiB, unless it has a pod's spec (256 KiB, before it is text in JSON)
MESSAGE_LIMIT = 1 << 20  # bytes; what a NATS server takes by default
EVENT_LIMIT = MESSAGE_LIMIT // 2  # bytes we write at most: headers and subject must fit beside it
DETAIL_DEPTH = 16  # levels of `details`; protobuf's parsers stop at 100, and a level of a Struct is up to three
TEXT_LIMIT = 4096  # characters of `message` and `hint` in an event that would be too long
LATEST = 1e11  # seconds since the epoch, year 5138: a greater number is milliseconds
EXACT = 1 << 53  # the integers a double can hold

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DIGITS = re.compile(r"-?[0-9]{1,19}")
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")  # model.Name
COMMANDS: dict[str, tuple[type[Message], type[Command]]] = {
    "checkpoint": (pb.CheckpointCommand, CheckpointCommand),
    "restore": (pb.RestoreCommand, RestoreCommand),
    "cancel": (pb.CancelCommand, CancelCommand),
    "delete": (pb.DeleteCommand, DeleteCommand),
}

V = TypeVar("V", bound=Value)
M = TypeVar("M", bound=Message)


# --- commands ---------------------------------------------------------------------------------------------------------


def verb_of(command: Command) -> str:
    """checkpoint, restore, cancel or delete."""
    if isinstance(command, DeleteCommand):
        return "delete"
    return "cancel" if isinstance(command, CancelCommand) else command.type


def encode_command(command: Command) -> bytes:
    return _to_json(command_to_pb(command))


def decode_command(verb: str, data: bytes) -> Command:
    """The command in `data`, or BadCommand. Sizes are checked before anything is parsed."""
    if verb not in COMMANDS:
        _bad(f"there is no command {verb!r}", "verb", verb, ", ".join(COMMANDS))
    message, model = COMMANDS[verb]
    return _checked(_build(model, _read(message, data, COMMAND_LIMIT)))


PbCommand = pb.CheckpointCommand | pb.RestoreCommand | pb.CancelCommand | pb.DeleteCommand


def command_to_pb(command: Command) -> PbCommand:
    if isinstance(command, CheckpointCommand):
        return _fill(pb.CheckpointCommand(), command)
    if isinstance(command, RestoreCommand):
        return _fill(pb.RestoreCommand(), command)
    if isinstance(command, DeleteCommand):
        return _fill(pb.DeleteCommand(), command)
    return _fill(pb.CancelCommand(), command)


def command_from_pb(message: PbCommand) -> Command:
    """As `decode_command`, for a message that is a protobuf already."""
    if message.ByteSize() > COMMAND_LIMIT:
        _too_long(message.ByteSize(), COMMAND_LIMIT)
    model = next(m for p, m in COMMANDS.values() if isinstance(message, p))
    return _checked(_build(model, _plain(message)))


def _checked(command: Command) -> Command:
    """What the types of a command cannot say."""
    if isinstance(command, CancelCommand | DeleteCommand):
        return command
    if not 0 <= command.expires_at < LATEST:
        _bad("expires_at is not a time in seconds since the epoch", "expires_at", command.expires_at, "0 or seconds")
    if not 0 <= command.overrides.streams <= MAX_STREAMS:
        _bad("overrides.streams is out of range", "overrides.streams", command.overrides.streams, f"0 to {MAX_STREAMS}")
    _check_name("overrides.pod_name", command.overrides.pod_name)
    if isinstance(command, CheckpointCommand):
        _check_target(command.target, "target")
    return command


def _check_target(target: Target, path: str) -> Target:
    given = [name for name in ("pod_id", "pod_name", "pid", "container") if getattr(target, name)]
    wanted = "exactly one of pod_id, pod_name, pid, container"
    if not given:
        _bad(f"{path} is empty: it names no pod, no container and no process", path, "nothing", wanted)
    if len(given) > 1:
        _bad(f"{path} is ambiguous: it has {' and '.join(given)}", path, ", ".join(given), wanted)
    if target.namespace and not target.pod_name:
        _bad(
            f"{path}.namespace means nothing without pod_name",
            f"{path}.namespace",
            target.namespace,
            "pod_name with it",
        )
    if target.pid < 0:
        _bad(f"{path}.pid is negative", f"{path}.pid", target.pid, "a process id")
    for name in ("pod_id", "namespace", "pod_name"):
        _check_name(f"{path}.{name}", getattr(target, name))
    return target


def _check_name(path: str, value: str) -> None:
    if value and not NAME.fullmatch(value):
        wanted = "letters, digits and . _ - inside, 253 characters at most"
        _bad(f"{path} is not a valid name: {_short(value)!r}", path, value, wanted)


# --- events, progress, node records, finding a pod --------------------------------------------------------------------


def message_id(event: Event) -> str:
    """The id under which the stream stores an event once."""
    return f"{event.action_id}.{event.seq}"


def encode_event(event: Event) -> bytes:
    """Never longer than EVENT_LIMIT: an event that no broker takes would hold up all that come after it."""
    data = _to_json(event_to_pb(event))
    if len(data) <= EVENT_LIMIT:
        return data
    texts = {"message": event.message[:TEXT_LIMIT], "hint": event.hint[:TEXT_LIMIT], "pod_spec": ""}
    return _to_json(event_to_pb(event.model_copy(update={**texts, "details": {"dropped": f"{len(data)} bytes"}})))


def decode_event(data: bytes) -> Event:
    """The control plane reads thousands in a second: what a node of ours writes is taken as it comes, in a third of the time that the
    gate takes. The gate has what is left, and knows how to say no."""
    return _plainly(data) or _build(Event, _read(pb.Event, data, MESSAGE_LIMIT, newer=True))


def _plainly(data: bytes) -> Event | None:
    """The event, if there is nothing in it to be put right. It may say a name twice, or `true` for 1, which the gate refuses."""
    if len(data) > MESSAGE_LIMIT:
        return None
    try:
        event = Event.model_validate_json(data, strict=False)
    except ValidationError:
        return None
    plain = not event.details or event.details == _json_able(event.details, DETAIL_DEPTH)
    return event if plain and event.checkpoint_id == event.checkpoint_id.lower() else None


def event_to_pb(event: Event) -> pb.Event:
    return _fill(pb.Event(), event)


def event_from_pb(message: pb.Event) -> Event:
    return _build(Event, _plain(message))


def encode_progress(progress: Progress) -> bytes:
    return _to_json(progress_to_pb(progress))


def decode_progress(data: bytes) -> Progress:
    return _build(Progress, _read(pb.Progress, data, MESSAGE_LIMIT, newer=True))


def progress_to_pb(progress: Progress) -> pb.Progress:
    return _fill(pb.Progress(), progress)


def progress_from_pb(message: pb.Progress) -> Progress:
    return _build(Progress, _plain(message))


def encode_node(record: NodeRecord) -> bytes:
    return _to_json(node_to_pb(record))


def decode_node(data: bytes) -> NodeRecord:
    return _build(NodeRecord, _read(pb.NodeRecord, data, MESSAGE_LIMIT, newer=True))


def node_to_pb(record: NodeRecord) -> pb.NodeRecord:
    return _fill(pb.NodeRecord(), record)


def node_from_pb(message: pb.NodeRecord) -> NodeRecord:
    return _build(NodeRecord, _plain(message))


def encode_find(target: Target) -> bytes:
    """A request to all nodes: who has it?"""
    return _to_json(pb.FindRequest(target=target_to_pb(target)))


def decode_find(data: bytes) -> Target:
    request = _read(pb.FindRequest, data, COMMAND_LIMIT)
    return _check_target(_build(Target, _table(request.get("target", {})), "target"), "target")


def encode_found(node: str, workloads: Iterable[WorkloadView]) -> bytes:
    """The answer of one node that has it."""
    return _to_json(pb.FindReply(node=_clean(node), workloads=[workload_to_pb(w) for w in workloads]))


def decode_found(data: bytes) -> tuple[str, list[WorkloadView]]:
    reply = _read(pb.FindReply, data, MESSAGE_LIMIT, newer=True)
    found = cast(Sequence[object], reply.get("workloads", []))
    views = [_build(WorkloadView, _table(each), f"workloads[{i}]") for i, each in enumerate(found)]
    return str(reply.get("node", "")), views


# --- the rest of the gRPC messages ------------------------------------------------------------------------------------


def target_to_pb(target: Target) -> pb.Target:
    return _fill(pb.Target(), target)


def target_from_pb(message: pb.Target) -> Target:
    return _check_target(_build(Target, _plain(message)), "target")


def workload_to_pb(view: WorkloadView) -> pb.Workload:
    return _fill(pb.Workload(), view)


def workload_from_pb(message: pb.Workload) -> WorkloadView:
    return _build(WorkloadView, _plain(message))


def action_to_pb(view: ActionView) -> pb.Action:
    return _fill(pb.Action(), view)


def action_from_pb(message: pb.Action) -> ActionView:
    return _build(ActionView, _plain(message))


def check_to_pb(check: Check) -> pb.Check:
    return _fill(pb.Check(), check)


def check_from_pb(message: pb.Check) -> Check:
    return _build(Check, _plain(message))


def verdict_to_pb(verdict: Verdict) -> pb.VerifyReply:
    return _fill(pb.VerifyReply(), verdict)


def verdict_from_pb(message: pb.VerifyReply) -> Verdict:
    return _build(Verdict, _plain(message))


def garbage_request_to_pb(request: GarbageRequest) -> pb.GarbageRequest:
    return _fill(pb.GarbageRequest(), request)


def garbage_request_from_pb(message: pb.GarbageRequest) -> GarbageRequest:
    return _build(GarbageRequest, _plain(message))


def garbage_to_pb(garbage: Garbage) -> pb.Garbage:
    return _fill(pb.Garbage(), garbage)


def garbage_from_pb(message: pb.Garbage) -> Garbage:
    return _build(Garbage, _plain(message))


def job_to_pb(job: JobSpec) -> pb.RunRequest:
    return _fill(pb.RunRequest(), job)


def job_from_pb(message: pb.RunRequest) -> JobSpec:
    return _build(JobSpec, _plain(message))


# --- model to protobuf to JSON ----------------------------------------------------------------------------------------


def _to_json(message: Message) -> bytes:
    table = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()


def _fill(message: M, value: Value) -> M:
    """Copy the fields of `value` into the message, whose fields have the same names."""
    for name, content in value:
        _put(message, name, content)
    return message


def _put(message: Message, name: str, content: object) -> None:
    if isinstance(content, Value):
        getattr(message, name).SetInParent()  # an empty message is not an absent one
        _fill(getattr(message, name), content)
    elif isinstance(content, Mapping):
        _put_table(getattr(message, name), content)
    elif isinstance(content, list):
        field = getattr(message, name)
        for each in content:
            if isinstance(each, Value):
                _fill(field.add(), each)
            else:
                field.append(_clean(each) if isinstance(each, str) else each)
    elif content is not None:
        setattr(message, name, _clean(content) if isinstance(content, str) else content)


def _put_table(field: object, content: Mapping[str, object]) -> None:
    if isinstance(field, Struct):
        field.update(cast(dict[str, Any], _json_able(content, DETAIL_DEPTH)))
        return
    table = cast(dict[str, object], field)
    for key, each in content.items():
        if isinstance(each, Value):
            _fill(cast(Message, table[_clean(key)]), each)
        else:
            table[_clean(key)] = _clean(str(each))


def _json_able(value: object, depth: int) -> object:
    """`value` as JSON can hold it without loss; anything else becomes its str."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and type(value) in (int, float):
        return value if math.isfinite(value) and (isinstance(value, float) or abs(value) <= EXACT) else str(value)
    if depth > 0 and isinstance(value, Mapping):
        return {_clean(str(key)): _json_able(each, depth - 1) for key, each in value.items()}
    if depth > 0 and isinstance(value, list | tuple):
        return [_json_able(each, depth - 1) for each in value]
    return _clean(str(value))


def _clean(text: str) -> str:
    """Without what UTF-8 cannot hold: names of files may come with half characters (surrogateescape)."""
    return text.encode("utf-8", "replace").decode()


# --- JSON or protobuf to model ----------------------------------------------------------------------------------------


def _read(message: type[Message], data: bytes, limit: int, *, newer: bool = False) -> dict[str, object]:
    """The table in `data`, with every name and type as the proto says. A name that it does not know is an error: somebody asks for what
    we would not do. But what a node tells may come from one that is `newer` than we, and knows more to tell: that is passed over."""
    if len(data) > limit:
        _too_long(len(data), limit)
    try:
        value = _JSON.decode(data.decode("utf-8"))
        return _table_of(_shape(message.DESCRIPTOR, newer), value, "")  # which may have to show a value that is nested as deep
    except (ValueError, RecursionError) as e:
        raise BadCommand(f"the message is not JSON: {e}", property="message", found=_start(data), wanted="JSON") from e


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)  # there may be a hundred thousand
        twice = next(key for key, count in counts.items() if count > 1)
        _bad(f"{_short(twice)} is there twice", twice, "twice", "once")
    return table


def _not_finite(text: str) -> NoReturn:
    _bad(f"{text} is not a number in JSON", "message", text, "a finite number")


_JSON = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_not_finite)
_Reader = Callable[[object, str], object]  # of a value that was found at a path


@dataclass(frozen=True)
class _Shape:
    """What is asked of a descriptor for every message, asked once: the control plane reads thousands in a second."""

    fields: Mapping[str, tuple[str, _Reader]]  # by both spellings: the name, and what reads its value
    names: str
    zeros: Mapping[str, object]  # what an absent scalar means, where its absence means nothing else (`optional`)
    newer: bool  # as in `_read`


@functools.cache
def _shape(descriptor: Descriptor, newer: bool) -> _Shape:
    readers = {field.name: _reader(field, newer) for field in descriptor.fields}
    both = {name: (field.name, readers[field.name]) for field in descriptor.fields for name in (field.name, field.json_name)}
    scalars = (f for f in descriptor.fields if f.message_type is None and not f.is_repeated and not f.has_presence)
    return _Shape(both, ", ".join(readers), {field.name: field.default_value for field in scalars}, newer)


def _table_of(shape: _Shape, value: object, path: str) -> dict[str, object]:
    if not isinstance(value, dict):
        _wrong_type(path or "message", value, "an object")
    table: dict[str, object] = {}
    for key, each in value.items():
        where = f"{path}.{key}" if path else key
        if key not in shape.fields:
            if shape.newer:
                continue
            _bad(f"there is no property {_short(where)}", where, key, shape.names)
        name, read = shape.fields[key]
        if name in table:
            _bad(f"{_short(where)} is there twice, once in each spelling", where, "twice", "once")
        if each is not None:
            table[name] = read(each, where)
    return {**shape.zeros, **table}


def _reader(field: FieldDescriptor, newer: bool) -> _Reader:
    if _is_map(field):
        return functools.partial(_map_of, _reader_of_one(_inner(field).fields_by_name["value"], newer))
    one = _reader_of_one(field, newer)
    return functools.partial(_list_of, one) if field.is_repeated else one


def _map_of(read: _Reader, value: object, path: str) -> object:
    if not isinstance(value, dict):
        _wrong_type(path, value, "an object")
    return {_text(key, path): read(each, f"{path}.{key}") for key, each in value.items()}


def _list_of(read: _Reader, value: object, path: str) -> object:
    if not isinstance(value, list):
        _wrong_type(path, value, "a list")
    return [read(each, f"{path}[{i}]") for i, each in enumerate(value)]


def _inner(field: FieldDescriptor) -> Descriptor:
    return cast(Descriptor, field.message_type)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _reader_of_one(field: FieldDescriptor, newer: bool) -> _Reader:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        inner = _inner(field)
        return _details if inner.full_name == Struct.DESCRIPTOR.full_name else functools.partial(_table_of, _shape(inner, newer))
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return _text
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return _bool
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return _number
    return functools.partial(_integer, 31 if kind == FieldDescriptor.CPPTYPE_INT32 else 63)


def _bool(value: object, path: str) -> bool:
    return value if isinstance(value, bool) else _wrong_type(path, value, "true or false")


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        _wrong_type(path, value, "a string")
    if not value.isascii() and _clean(value) != value:
        _bad(f"{_short(path)} has half a character in it", path, _clean(value), "unicode text")
    return value


def _number(value: object, path: str) -> float:
    """A double; protobuf's JSON allows it in a string. Only finite ones mean something here."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _wrong_type(path, value, "a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        _bad(f"{_short(path)} is not a finite number", path, str(value), "a finite number")
    return number


def _integer(bits: int, value: object, path: str) -> int:
    """An integer, in a string as protobuf's JSON writes 64-bit ones, or bare; 3.0 is 3."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        _wrong_type(path, value, "an integer")
    if not -(1 << bits) <= value < 1 << bits:
        _bad(f"{_short(path)} is out of range", path, value, f"an integer of {bits + 1} bits")
    return value


def _details(value: object, path: str) -> object:
    if not isinstance(value, dict):
        _wrong_type(path, value, "an object")
    return _json_able(value, DETAIL_DEPTH)


def _plain(message: Message) -> dict[str, object]:
    """A protobuf as the table its JSON would give: absent is absent."""
    given = {field.name: _plain_field(field, content) for field, content in message.ListFields()}
    return {**_shape(message.DESCRIPTOR, newer=False).zeros, **given}


def _plain_field(field: FieldDescriptor, content: object) -> object:
    if isinstance(content, Struct):
        return {key: _plain_value(each) for key, each in content.fields.items()}
    if isinstance(content, Message):
        return _plain(content)
    if _is_map(field):
        table = cast(Mapping[str, object], content)
        return {key: _plain_field(_inner(field).fields_by_name["value"], table[key]) for key in table}
    if field.is_repeated:
        return [_plain(each) if isinstance(each, Message) else each for each in cast(Sequence[object], content)]
    return _number(content, field.name) if isinstance(content, float) else content


def _plain_value(value: PbValue) -> object:
    """A Struct knows only doubles: whole ones were integers."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {key: _plain_value(each) for key, each in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain_value(each) for each in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        whole = number.is_integer() and abs(number) <= EXACT
        return int(number) if whole else _json_able(number, 0)
    return None if kind in (None, "null_value") else getattr(value, str(kind))


def _build(model: type[V], table: Mapping[str, object], path: str = "") -> V:
    """The one gate: a value of `model`, or BadCommand that names the property."""
    try:
        return model.model_validate(_complete(model, table), strict=False)  # types are right; enums come as text
    except ValidationError as e:
        _explain(e.errors(include_url=False)[0], path, e)


def _complete(model: type[Value], table: Mapping[str, object]) -> dict[str, object]:
    """Empty text is absent where the model has a default; ids are lower case; an absent target is an empty one."""
    full = dict(table)
    for key in [k for k, each in table.items() if each == "" and _has_default(model, k)]:
        del full[key]
    for key in ("action_id", "checkpoint_id", "pod_id"):
        if key in full:
            full[key] = _lower(str(full[key]))
    if model is CheckpointCommand:
        full["target"] = _complete(Target, _table(table.get("target", {})))
    if model is NodeRecord:
        listed = cast(Sequence[object], table.get("workloads", []))
        full["workloads"] = [_complete(WorkloadView, _table(each)) for each in listed]
    return full


@functools.cache
def _has_default(model: type[Value], key: str) -> bool:
    return not model.model_fields[key].is_required() and bool(model.model_fields[key].default)


def _lower(text: str) -> str:
    """UUIDs are compared as text: one spelling only. Other uids (of static pods) stay as they are."""
    return text.lower() if UUID.fullmatch(text.lower()) else text


def _table(value: object) -> Mapping[str, object]:
    return cast(Mapping[str, object], value)


# --- saying no --------------------------------------------------------------------------------------------------------


def _explain(error: ErrorDetails, path: str, cause: ValidationError) -> NoReturn:
    where = ".".join(part for part in (path, *map(str, error["loc"])) if part)
    found = error["input"]
    if error["type"] == "string_pattern_mismatch" and where.endswith("_id"):
        wanted = "a UUID"
    else:
        wanted = str(error.get("ctx", {}).get("expected", error["msg"][:1].lower() + error["msg"][1:]))
    message = f"{where} is missing" if found == "" else f"{where} is not valid: {_short(found)!r}"
    raise BadCommand(message, property=where, found=_short(found), wanted=wanted) from cause


def _wrong_type(path: str, value: object, wanted: str) -> NoReturn:
    _bad(f"{_short(path)} is not {wanted}", path, value, wanted)


def _too_long(size: int, limit: int) -> NoReturn:
    _bad(f"the message is too long: {size} bytes", "size", size, f"at most {limit} bytes")


def _bad(message: str, prop: str, found: object, wanted: str) -> NoReturn:
    raise BadCommand(message, property=_short(prop), found=_short(found), wanted=wanted)


def _short(value: object) -> object:
    """For a message people read: long values are cut."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= 200 and isinstance(value, str | int | float | bool):
        return value
    return _clean(text[:200]) + ("..." if len(text) > 200 else "")


def _start(data: bytes) -> str:
    return data[:60].decode("utf-8", "replace")
