"""The golden checkpoint of the tests, as seeds: real objects, written once by a released writer."""

from __future__ import annotations

import functools
from pathlib import Path

_STORE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "v1"


@functools.cache
def _object(pattern: str) -> bytes:
    (path,) = _STORE.glob(f"*/{pattern}")
    return path.read_bytes()


def manifest() -> bytes:
    return _object("manifest.json")


def index() -> bytes:
    return _object("main/index.zst")


def small_images() -> bytes:
    return _object("main/images.tar.zst")


def stream(n: int) -> bytes:
    return _object(f"main/pages-{n}.zst")
