"""A message nested as deep as can just be parsed, or of as many keys as fit, is a bad command and nothing else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from hibernode import wire
from hibernode.errors import BadCommand

ID = "0b1f7a52-3c44-4f0e-8a6b-5d9e1c2f3a40"
DEPTHS = range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 20)  # where parsing works and showing may not
EVENT = '{"action_id":"%s","seq":"1","type":"checkpoint","status":"ready","checkpoint_id":"","node":"n","time":1.0,"details":{"x":%s}}'


def read_command(nested: str) -> object:
    return wire.decode_command("cancel", f'{{"action_id":{nested}}}'.encode())


def read_event(nested: str) -> object:
    return wire.decode_event((EVENT % (ID, nested)).encode())


@pytest.mark.parametrize("read", [read_command, read_event])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_a_depth_that_can_be_parsed_and_not_shown(read: Callable[[str], object], opening: str, closing: str) -> None:
    refused = 0
    for depth in DEPTHS:
        try:
            read(opening * depth + ("1" if closing == "}" else "") + closing * depth)
        except BadCommand:
            refused += 1
    assert refused


def test_a_key_that_comes_twice_among_very_many_is_found_at_once() -> None:
    keys = [f'"{n:06}":0' for n in range(90_000)]
    data = ("{" + ",".join([*keys, keys[-1]]) + "}").encode()
    assert len(data) < wire.MESSAGE_LIMIT
    began = time.process_time()
    with pytest.raises(BadCommand, match="089999 is there twice"):
        wire.decode_event(data)
    assert time.process_time() - began < 5  # it was a minute
