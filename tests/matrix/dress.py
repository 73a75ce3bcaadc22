"""The real node with something before each of its ports that passes every call by the script: `dress(script)(node)`.

Nothing is changed but time and errors: what the script lets through reaches the real driver as it came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hibernode.journal import Entry
from hibernode.model import Event
from hibernode.node import Node
from tests.matrix.script import Script


def dress(script: Script) -> Callable[[Node], Node]:
    def dressed(node: Node) -> Node:
        script.lives_on(asyncio.get_running_loop())
        return replace(
            node,
            open_store=lambda url: _Port(node.open_store(url), "store", script),  # type: ignore[arg-type]
            criu=_Port(node.criu, "criu", script),  # type: ignore[arg-type]
            gpu=_Port(node.gpu, "gpu", script),  # type: ignore[arg-type]
            workloads=_Port(node.workloads, "workloads", script),  # type: ignore[arg-type]
            journal=_Book(node.journal, script),  # type: ignore[arg-type]
        )

    return dressed


# Of a process it is CRIU that does these, and nobody else stands before it.
_CRIUS = {("workload", "dump"): "criu.dump", ("place", "restore"): "criu.restore"}


class _Port:
    """Any port: each call is a point before it and one after it."""

    def __init__(self, inner: Any, name: str, script: Script) -> None:
        self._inner, self._name, self._script = inner, name, script

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._inner, attribute)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            point = self._point(attribute, arguments)
            self._script.pass_by(f"{point}.before")
            result = value(*arguments, **options)
            self._script.pass_by(f"{point}.after")
            return self._dressed(attribute, arguments, result)

        return call

    def _point(self, attribute: str, arguments: tuple[Any, ...]) -> str:
        if (self._name, attribute) in _CRIUS:
            return _CRIUS[self._name, attribute]
        what = _kind(arguments[0]) if self._name == "store" and arguments else ""
        return ".".join(filter(None, (self._name, attribute, what)))

    def _dressed(self, attribute: str, arguments: tuple[Any, ...], result: Any) -> Any:
        match self._name, attribute:
            case "store", "upload":
                return _Upload(result, _kind(arguments[0]), self._script)
            case "gpu", "find" | "restored":
                return _Port(result, "tree", self._script)
            case "workloads", "find":
                return _Port(result, "workload", self._script)
            case "workloads", "prepare":
                return _Port(result, "place", self._script)
            case "place", "restore":
                return _Port(result, "workload", self._script)
        return result


class _Upload(_Port):
    def __init__(self, inner: Any, kind: str, script: Script) -> None:
        super().__init__(inner, "store", script)
        self._what = kind

    def _point(self, attribute: str, arguments: tuple[Any, ...]) -> str:
        return f"store.{attribute}.{self._what}"


def _kind(key: object) -> str:
    """Which of a checkpoint's objects it is; "" where it is none."""
    folder, _, name = str(key).rpartition("/")
    known = {"manifest.json": "manifest", "index.zst": "index", "images.tar.zst": "files", "digests.zst": "digests"}
    if folder.endswith("/refs"):
        return "reference"
    if name == "attempt":
        return "attempt"
    return known.get(name, "stream" if name.startswith("pages-") else "")


class _Book:
    """The journal: what is written down in it are the points."""

    def __init__(self, inner: Any, script: Script) -> None:
        self._inner, self._script = inner, script

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._inner, attribute)

    def begin(self, command: Any, about: Any = None) -> Any:
        self._script.pass_by("journal.begin.before")
        entry = self._inner.begin(command, about)
        self._script.pass_by("journal.begin.after")
        return _Page(entry, self._script)

    def find(self, action_id: str) -> Any:
        entry = self._inner.find(action_id)
        return None if entry is None else _Page(entry, self._script)

    def all(self) -> list[Any]:
        return [_Page(entry, self._script) for entry in self._inner.all()]


class _Page:
    """One action's entry."""

    def __init__(self, inner: Entry, script: Script) -> None:
        self._inner, self._script = inner, script

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._inner, attribute)

    def enter(self, phase: str, *more: Any, **options: Any) -> None:
        with _Around(self._script, f"journal.{phase}"):
            self._inner.enter(phase, *more, **options)

    def update(self, **changes: Any) -> None:
        with _Around(self._script, f"journal.{changes.get('phase') or '+'.join(sorted(changes))}"):
            self._inner.update(**changes)

    def emit(self, make: Callable[[int], Event | None]) -> Event | None:
        made: list[Event] = []

        def noted(seq: int) -> Event | None:
            event = make(seq)
            if event is not None:
                made.append(event)
                self._script.pass_by(f"event.{event.status.value}.before")
            return event

        event = self._inner.emit(noted)
        if made:
            self._script.pass_by(f"event.{made[0].status.value}.after")
        return event


class _Around:
    """A point before what is inside, and one after it if it came to its end."""

    def __init__(self, script: Script, point: str) -> None:
        self._script, self._point = script, point

    def __enter__(self) -> None:
        self._script.pass_by(f"{self._point}.before")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        if error is None:
            self._script.pass_by(f"{self._point}.after")
