"""The fuzzers' targets without the fuzzer: every seed is taken, and nothing that was found once is found again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz import guard, targets
from fuzz.edits import edited
from fuzz.feed import Feed
from fuzz.guard import Finding, guarded
from hibernode.errors import Corrupt

pytestmark = pytest.mark.timeout(30)  # the limit of an endless wait

SEEDS = [(name, seed) for name in targets.NAMES for seed in targets.load(name).seeds()]
FOUND = [(name, path) for name in targets.NAMES for path in targets.regressions(name)]


@pytest.mark.parametrize(("name", "seed"), SEEDS)
def test_a_seed_is_no_finding(name: str, seed: str) -> None:
    targets.load(name).one(targets.load(name).seeds()[seed])


@pytest.mark.parametrize(("name", "path"), FOUND, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_what_was_found_once_is_not_found_again(name: str, path: Path) -> None:
    targets.load(name).one(path.read_bytes())


def test_every_folder_of_cases_belongs_to_a_target() -> None:
    folders = {path.name for path in (Path(targets.__file__).parents[1] / "regressions").iterdir()}
    assert folders <= set(targets.NAMES)


@pytest.mark.parametrize("name", targets.NAMES)
def test_the_first_bytes_of_anything_are_no_finding(name: str) -> None:
    target = targets.load(name)
    for how in range(12):
        for second in range(4):
            target.one(bytes([how, second]))
    target.one(b"")


# --- a fuzzer that cannot fail finds nothing --------------------------------------------------------------------------------


def _write_outside() -> None:
    Path(guard.root().parent, "hibernode-fuzz-escaped").write_bytes(b"")


def _read_outside() -> None:
    Path("/root/.profile").read_bytes()


def _rename_outside() -> None:
    os.rename(guard.root() / "place", guard.root().parent / "hibernode-fuzz-escaped")


def _write_through_a_link() -> None:
    link = guard.root() / "place" / "link"
    link.symlink_to("..")
    (link / ".." / "hibernode-fuzz-escaped").write_bytes(b"")


def _start_something() -> None:
    os.system("true")


def _burn() -> None:
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass


def _bloat() -> None:
    assert len(bytearray(b"x") * (100 << 20))


def _keep_open() -> None:
    KEPT.append(socket.socket())


def _leave_a_thread() -> None:
    ending = threading.Event()
    KEPT.append(ending)
    threading.Thread(target=ending.wait, daemon=True).start()


def _swallow() -> None:
    try:
        _write_outside()
    except BaseException:
        return


def _undocumented() -> None:
    raise KeyError("x")


KEPT: list[object] = []


@pytest.mark.parametrize(
    ("deed", "what"),
    [
        (_write_outside, "writes"),
        (_read_outside, "reads"),
        (_rename_outside, "os.rename of"),
        (_write_through_a_link, "os.symlink of|writes"),
        (_start_something, "os.system"),
        (_burn, "of processor time"),
        (_bloat, "of memory"),
        (_keep_open, "descriptors"),
        (_leave_a_thread, "threads"),
        (_swallow, "writes"),
    ],
)
def test_what_must_not_happen_is_found(deed: Callable[[], None], what: str) -> None:
    try:
        with pytest.raises(Finding, match=what), guarded(Corrupt, seconds=0.3, memory=50 << 20):
            deed()
    finally:
        for kept in KEPT:
            kept.close() if isinstance(kept, socket.socket) else kept.set()  # type: ignore[attr-defined]
        KEPT.clear()
    assert not (guard.root().parent / "hibernode-fuzz-escaped").exists()


def test_an_undocumented_error_is_let_out() -> None:
    with pytest.raises(KeyError), guarded(Corrupt):
        _undocumented()


def test_a_documented_one_is_not() -> None:
    with guarded(Corrupt):
        raise Corrupt("as it should be")


def test_the_same_bytes_choose_the_same() -> None:
    data = bytes(range(200))
    assert edited({"a": [1, {"b": "c"}]}, Feed(data)) == edited({"a": [1, {"b": "c"}]}, Feed(data))


HOLDS = """
from fuzz.guard import Finding, guarded
try:
    with guarded():
        cycle = [bytearray(b"x") * (40 << 20)]
        cycle.append(cycle)
        del cycle
except Finding as e:
    print(e)
"""


def test_memory_that_a_cycle_holds_is_found() -> None:
    """In a process of its own: in one that has had much memory, new memory may be old, and nothing is seen to grow or to shrink."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", HOLDS], env=env, capture_output=True, text=True, timeout=30, check=True)
    assert "held until" in ran.stdout, ran.stderr
