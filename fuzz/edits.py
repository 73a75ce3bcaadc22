"""Hostile JSON: a good document with a few things done to it that a reader may not expect. Bytes alone rarely get past the first brace."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from fuzz.feed import EDGES, Feed

_TEXTS = (
    "", "..", "../../etc/passwd", "/etc/passwd", "a/../b", "a/b", ".hidden", "a\0b", "\ud800", "ä" * 40, "x" * 300, "-1", "1e3", "NaN",
    "0x10", "a\n", "main/index.zst", "0" * 64, "00000000-0000-0000-0000-000000000000", "9" * 400, "%n", "pages-0.zst", "zstd:3", "{}",
)  # fmt: skip
_NUMBERS = (-1, -(1 << 31) - 1, -(1 << 63) - 1, 1 << 64, 10**30, 1.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"))
_MANY = 300  # places of a document
_NEST = re.compile(r'"@nest:(\d+)@"')


def edited(document: object, feed: Feed) -> bytes:
    """`document` as JSON, with one to eight edits that `feed` chooses."""
    whole = {"": copy.deepcopy(document)}
    for _ in range(1 + feed.below(8)):
        _edit(whole, feed)
    text = _NEST.sub(lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(whole[""]))
    return _torn(text.encode(), feed)


def _edit(whole: dict[str, Any], feed: Feed) -> None:
    slots = _slots(whole)
    holder, key = slots[feed.below(len(slots))]
    deed = feed.below(8)
    if deed <= 2:
        holder[key] = _value(feed)
    elif deed == 3 and (holder is not whole):
        del holder[key]
    elif deed == 4:
        other, there = slots[feed.below(len(slots))]
        if there in other if isinstance(other, dict) else there < len(other):
            holder[key] = copy.deepcopy(other[there])
    elif deed == 5 and isinstance(holder[key], list) and len(slots) < _MANY:  # else a few of them fill the memory
        holder[key] = holder[key] * (1 + feed.below(300))
    elif deed == 6 and isinstance(holder[key], dict):
        name = feed.pick(list(holder[key]) or [""]) if feed.byte() % 2 else feed.text()
        holder[key][name.upper() if feed.byte() % 2 else name] = _value(feed)
    elif deed == 7 and isinstance(holder[key], list):
        holder[key].append(_value(feed))


def _slots(value: Any) -> list[tuple[Any, Any]]:
    """Every place of the document, as (who holds it, under which key)."""
    found: list[tuple[Any, Any]] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in pairs:
        found.append((value, key))
        if isinstance(each, dict | list) and len(found) < 2000:
            found += _slots(each)
    return found


def _value(feed: Feed) -> object:
    kind = feed.below(12)
    if kind <= 2:
        return feed.pick(_TEXTS)
    if kind <= 4:
        return feed.pick(EDGES)
    if kind == 5:
        return feed.pick(_NUMBERS)
    if kind == 6:
        return feed.text()
    if kind == 7:
        return f"@nest:{feed.below(1100)}@"
    if kind == 8:
        return {feed.text(): feed.pick(_TEXTS) for _ in range(feed.below(4))}
    if kind == 9:
        return [feed.pick(EDGES)] * feed.below(400)
    return feed.pick((None, True, False, {}, [], feed.number()))


def _torn(data: bytes, feed: Feed) -> bytes:
    """Mostly as it is; else a run of bytes is replaced, so that keys come twice and texts end early."""
    if feed.byte() < 192:
        return data
    at, cut = feed.below(len(data) + 1), feed.below(32)
    return data[:at] + feed.rest() + data[at + cut :]
