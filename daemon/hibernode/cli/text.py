"""Numbers and messages as people and programs read them. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: float) -> str:
    """Three digits and a binary unit: `512 B`, `1.50 GiB`, `680 MiB`."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{_three(value) if unit else round(value)} {_UNITS[unit]}"


def sizes(done: float, total: float) -> str:
    """`1.24 of 2.00 GiB`: one unit for both."""
    whole = size(total)
    unit = whole.rpartition(" ")[2]
    return f"{_three(done / 1024 ** _UNITS.index(unit))} of {whole}"


def _three(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def ratio(raw: float, stored: float) -> str:
    """How many times smaller; empty while there is nothing to compare."""
    return f"{raw / stored:.1f}x" if raw > 0 and stored > 0 else ""


def pause(nanoseconds: int) -> str:
    """Always in milliseconds, so that two can be compared at a glance."""
    ms = nanoseconds / 1e6
    return f"{ms:.1f} ms" if 0 < ms < 10 else f"{ms:,.0f} ms"


def duration(seconds: float) -> str:
    """`80 ms`, `7.3 s`, `2m 05s`, `3h 12m`, `2d 04h`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def left(seconds: float) -> str:
    """Time left, coarse: nobody wants to see it flicker."""
    return f"{max(1, round(seconds))}s left" if seconds < 59.5 else f"{duration(seconds)} left"


def age(then: float, now: float) -> str:
    seconds = max(0.0, now - then)
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit} ago"
    return f"{seconds:.0f}s ago"


def moment(then: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then))


def clock(then: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(then))


def shown(text: str) -> str:
    """`text` on one line, with nothing in it that a terminal would obey: names and messages come from elsewhere."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def plain(message: Message) -> dict[str, Any]:
    """A message as a JSON document: every field, by its name in the proto, integers as integers."""
    if isinstance(message, Struct):
        return {k: _whole(v) for k, v in MessageToDict(message).items()}
    out: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        out[field.name] = _value(field, getattr(message, field.name))
    return out


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: plain(value[key]) if isinstance(value[key], Message) else value[key] for key in value}
    if field.is_repeated:
        return [plain(each) if isinstance(each, Message) else each for each in value]
    return plain(value) if isinstance(value, Message) else value


def _whole(value: Any) -> Any:
    """A Struct knows only doubles; whole ones were integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {k: _whole(v) for k, v in value.items()}
    return [_whole(v) for v in value] if isinstance(value, list) else value
