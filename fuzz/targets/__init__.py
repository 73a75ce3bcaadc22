"""One module per format. Each has `one(data)`, which reads `data` as an enemy's and lets a `Finding`, or any exception that the reader
does not document, out; and `seeds()`, good input by name, made by our own writers, for the fuzzer to begin with.

The first byte of the input says how the rest is meant: as the bytes themselves, or as choices out of which well-formed but hostile input
is built, with lengths and checksums that fit, as an enemy would write it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast

NAMES = ("manifest", "index", "frame", "images_tar", "layer", "criu_images", "pagesocket", "seal", "command", "grpc")


class Target(Protocol):
    MAX_LENGTH: int  # bytes of input that the fuzzer makes at most

    def one(self, data: bytes) -> None: ...

    def seeds(self) -> dict[str, bytes]: ...


def load(name: str) -> Target:
    return cast(Target, importlib.import_module(f"fuzz.targets.{name}"))


def regressions(name: str) -> list[Path]:
    """Inputs that found something once."""
    return sorted((Path(__file__).resolve().parents[1] / "regressions" / name).glob("*"))
