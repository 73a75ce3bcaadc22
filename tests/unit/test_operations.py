"""docs/operations.md and the example configuration say what the code says: every table is compared with its source."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from pydantic import BaseModel

from hibernode import config, errors
from hibernode.drivers import criu
from hibernode.metrics import Metrics, Readings
from hibernode.transfer.send import memory_bound
from tests.fakes.machine import GPUS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "daemon" / "hibernode"
GUIDE = (ROOT / "docs" / "operations.md").read_text()
EXAMPLE = ROOT / "systemd" / "hibernode.toml.example"


def table(head: str, text: str = GUIDE) -> dict[str, list[str]]:
    """The rows of the table whose first line begins with `| head |`: name -> its other cells. A name twice is an error."""
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows: dict[str, list[str]] = {}
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        name = name.strip("` |")
        assert name not in rows, f"{name} stands there twice"
        rows[name] = cells
    return rows


def keys(section: BaseModel, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the configuration with its value."""
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from keys(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


DEFAULTS = config.load(None, {})


def test_the_configuration_table_has_every_key_and_its_default() -> None:
    shown = tomllib.loads(config.render(DEFAULTS))

    def default(key: str) -> Any:
        value: Any = shown
        for part in key.split("."):
            value = value[part]
        return value

    rows = table("key")
    assert rows.keys() == {key for key, _ in keys(DEFAULTS)}
    found = {key: tomllib.loads(f"value = {cells[0].strip('`')}")["value"] for key, cells in rows.items() if key != "node"}
    assert found == {key: default(key) for key in rows if key != "node"}


def test_the_example_is_the_defaults_and_names_every_key() -> None:
    assert config.load(EXAMPLE, {}) == DEFAULTS
    named, section = set(), ""
    for line in EXAMPLE.read_text().splitlines():
        if found := re.match(r"\[([\w.]+)\]", line):
            section = found[1] + "."
        elif found := re.match(r"(?:# )?(\w+) = ", line):
            assert "# " in line.removeprefix("# "), f"no comment: {line}"
            named.add(section + found[1])
    assert named == {key for key, _ in keys(DEFAULTS)}


def test_an_example_that_differs_would_be_seen(tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(EXAMPLE.read_text().replace('size = "512MiB"', 'size = "256MiB"'))
    assert config.load(other, {}) != DEFAULTS


def test_the_metrics_table_is_the_registry() -> None:
    metrics = Metrics("1")
    metrics.read_from(Readings(*[lambda: 0.0] * 4, bus_connected=lambda: True, queues={"chunks": lambda: 0.0}, gpus=lambda: GPUS))

    def shown(family: Metric) -> str:
        return f"{family.name}_total" if family.type == "counter" else family.name

    ours = [family for family in metrics.registry.collect() if family.name.startswith("hibernode_")]
    rows = table("name")
    assert {name: cells[0] for name, cells in rows.items()} == {shown(family): family.type for family in ours}
    for family in ours:
        for sample in family.samples:
            for label in sample.labels.keys() - {"le"}:
                assert f"`{label}`" in rows[shown(family)][1], f"{family.name} has the label {label}"


def subclasses(kind: type[errors.HibernodeError]) -> Iterator[type[errors.HibernodeError]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


def refused(source: str) -> set[str]:
    """The first arguments of every `Refused(...)`: literal, or a loop's variable over literal rows."""
    tree, found = ast.parse(source), set()
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Refused":
            reason = call.args[0]
            if isinstance(reason, ast.Constant):
                found.add(str(reason.value))
            else:
                assert isinstance(reason, ast.Name), f"line {call.lineno}: what is its code?"
                found |= _rows_of(reason.id, call, loops)
    return found


def _rows_of(name: str, call: ast.Call, loops: list[ast.For]) -> set[str]:
    for loop in loops:
        names = [e.id for e in ast.walk(loop.target) if isinstance(e, ast.Name)]
        if call in ast.walk(loop) and name in names and isinstance(loop.iter, ast.Tuple):
            return {str(ast.literal_eval(row.elts[names.index(name)])) for row in loop.iter.elts if isinstance(row, ast.Tuple)}
    raise AssertionError(f"line {call.lineno}: where does {name} come from?")


def codes() -> set[str]:
    """Every code that can reach a person: of the tree of errors, of refusals, of the command line."""
    found = {kind.code for kind in subclasses(errors.HibernodeError) if kind.__module__ == errors.__name__}
    for file in PACKAGE.rglob("*.py"):
        source = file.read_text()
        found |= refused(source)
        found |= set(re.findall(r'^    code = "(\w+)"$', source, re.MULTILINE))
    return found


def test_the_error_table_has_every_code() -> None:
    assert table("code").keys() == codes()


def test_every_reason_of_criu_has_a_row() -> None:
    assert table("reason").keys() == {reason for _, reason, _ in criu._KNOWN}


def test_every_check_of_the_doctor_has_a_row() -> None:
    source = (PACKAGE / "doctor.py").read_text()
    found = set(re.findall(r'Check\(\s*name="([^"]+)"', source)) | set(re.findall(r'_tried\("([^"]+)"', source))
    found |= set(re.findall(r'"(CAP_\w+)"', source))
    assert table("check").keys() == found


def test_the_memory_bound_is_the_codes_own() -> None:
    s3, mib = DEFAULTS.store.s3, 1 << 20
    for streams in (2, 8):
        bound = memory_bound(DEFAULTS.arena.size, streams, s3.parts_in_flight, s3.part_size, 100_000, 5_000)
        assert f"{bound // mib} MiB for {streams}" in GUIDE
        by_hand = DEFAULTS.arena.size + streams * (5 * 4 * mib + 8 * mib + (s3.parts_in_flight + 1) * s3.part_size) + 16 * mib
        assert bound == by_hand + 4 * 32 * 100_000 + 768 * 5_000


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise Refused("one", "text")', {"one"}),
        ('for code, x in (("a", 1), ("b", 2)):\n    raise Refused(code, "text")', {"a", "b"}),
    ],
)
def test_codes_are_found_in_source(source: str, found: set[str]) -> None:
    assert refused(source) == found


def test_a_table_that_lacks_a_row_or_has_one_twice_is_seen() -> None:
    text = "| code | meaning |\n|---|---|\n| `one` | 1 |\n| `two` | 2 |\n"
    assert table("code", text) == {"one": ["1"], "two": ["2"]}
    with pytest.raises(AssertionError, match="twice"):
        table("code", text + "| `one` | 1 |\n")
