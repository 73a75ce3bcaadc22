#!/usr/bin/env python3
"""render: the chart's manifests without Helm, on standard output. `kubernetes/hibernode.yaml` is what it makes of the chart's own values.

It knows as much of Helm's language as the chart uses, which is little on purpose: values, `if`, `else`, `end`, `not`, and a few functions.
Anything else is an error, so that a template cannot come to mean one thing here and another there. Needs PyYAML.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "chart"
NAMESPACE = "hibernode"
_ACTION = re.compile(r"(\s*)\{\{-\s*(.*?)\s*\}\}|\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_VALUE = re.compile(r"\.(Values|Release)((?:\.\w+)+)")


class Unknown(Exception):
    """The template says what this program does not know."""


def rendered(values: Mapping[str, Any], namespace: str = NAMESPACE) -> str:
    """All manifests, the files in the order of their names, each with the name of its template before it. Raises Unknown."""
    texts = []
    for file in sorted((CHART / "templates").glob("*.yaml")):
        try:
            text = template(file.read_text(), {"Values": values, "Release": {"Namespace": namespace}}).strip()
        except Unknown as e:
            raise Unknown(f"{file.name}: {e}") from None
        if text:
            texts.append(f"---\n# Source: kubernetes/chart/templates/{file.name}\n{text}\n")
    return "".join(texts)


def template(text: str, given: Mapping[str, Any]) -> str:
    """One of them. As with Helm, `{{-` takes the white space before it away."""
    made: list[str] = []
    taken = [True]  # for each `if` that is open: is this branch wanted?
    at = 0
    for action in _ACTION.finditer(text):
        trims = action[2] is not None
        if all(taken):
            made.append(text[at : action.start()] + ("" if trims else action[1] or ""))
        at = action.end()
        words = (action[2] if trims else action[3]).split()
        match words:
            case ["if", "not", value]:
                taken.append(not _value(value, given))
            case ["if", value]:
                taken.append(bool(_value(value, given)))
            case ["else"] if len(taken) > 1:
                taken.append(not taken.pop())
            case ["end"] if len(taken) > 1:
                taken.pop()
            case _:
                if all(taken):
                    made.append(_evaluated(words, given))
    if len(taken) > 1:
        raise Unknown("an `if` without its `end`")
    return "".join(made) + text[at:]


def _evaluated(words: Sequence[str], given: Mapping[str, Any]) -> str:
    first, *calls = " ".join(words).split(" | ")
    found = _value(first, given)
    for call in calls:
        name, *arguments = call.split()
        if name not in _FUNCTIONS or len(arguments) > 1:
            raise Unknown(call)
        found = _FUNCTIONS[name](found, *map(int, arguments))
    if isinstance(found, bool):
        return str(found).lower()
    if not isinstance(found, str | int):
        raise Unknown(f"{first} is no text: toJson?")
    return str(found)


def _value(word: str, given: Mapping[str, Any]) -> Any:
    named = _VALUE.fullmatch(word)
    if named is None:
        raise Unknown(word)
    found: Any = given[named[1]]
    for part in named[2].strip(".").split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise Unknown(f"{word} has no value")
        found = found[part]
    return found


def _indented(text: str, width: int) -> str:
    return "\n".join(" " * width + line for line in text.split("\n"))


_FUNCTIONS: Mapping[str, Callable[..., str]] = {
    "quote": json.dumps,
    "toJson": lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")),
    "indent": _indented,
    "nindent": lambda text, width: "\n" + _indented(text, width),
    "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
}


def defaults() -> dict[str, Any]:
    return dict(yaml.safe_load((CHART / "values.yaml").read_text()))


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm does it: tables are merged, everything else is replaced."""
    made = dict(values)
    for key, value in changes.items():
        there = made.get(key)
        made[key] = changed(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else value
    return made


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("render", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--values", type=Path, action="append", default=[], help="a file of values of yours, in YAML")
    parser.add_argument("--namespace", default=NAMESPACE)
    given = parser.parse_args(words)
    values = defaults()
    for file in given.values:
        values = changed(values, yaml.safe_load(file.read_text()) or {})
    sys.stdout.write(rendered(values, given.namespace))


if __name__ == "__main__":
    main(sys.argv[1:])
