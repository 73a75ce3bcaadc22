"""What planes of floats, and LZ4, give and cost: the codec's frames of several kinds of memory, against zstd alone. No daemon.

One thread, frames of 4 MiB, the processor time of that thread: other work on the machine slows it, but is not counted. What is compared
takes turns in an order that is drawn anew each time; whoever comes first finds other caches and another heap.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard

from hibernode.transfer import codec

NAME = "frames"
_FRAME = codec.FRAME_BYTES
_FRAMES = 3  # of each kind
_WORTH = 0.97  # as the codec has it
_VARIANTS = ("alone", "planes", "lz4")


def measure(*, quick: bool) -> dict[str, Any]:
    """kind -> variant -> stored bytes, and seconds of each round and frame for packing and unpacking."""
    rounds = 5 if quick else 15
    return {"rounds": rounds, "kinds": {name: _kind(make, rounds) for name, make in _KINDS.items()}}


def render(found: dict[str, Any]) -> str:
    lines = ["| memory | times smaller | | | pack, MB/s | | | | | unpack, MB/s | | | | |", "|---" * 14 + "|"]
    for kind, variants in found["kinds"].items():
        smaller = [_FRAMES * _FRAME / sum(variants[name]["stored"]) for name in _VARIANTS]
        cells = [kind, *(f"{each:.3f}" for each in smaller)]
        for deed in ("pack", "unpack"):
            rates = [_FRAME / 1e6 / statistics.median(variants[name][deed]) for name in _VARIANTS]
            cells += [*(f"{each:,.0f}" for each in rates), *(f"{each / rates[0]:.2f}" for each in rates[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Of each three: zstd level 1 alone, the codec, the codec with `lz4`; then the latter two over the first."]
    )


def _kind(make: Callable[[np.random.Generator], bytes], rounds: int) -> dict[str, dict[str, list[float]]]:
    generator, order = np.random.default_rng(1), random.Random(1)
    frames = [memoryview(bytearray(make(generator))) for _ in range(_FRAMES)]
    pack = {"alone": _alone(), "planes": codec.Packer(codec.DEFAULT_LEVEL).pack, "lz4": codec.Packer("lz4").pack}
    unpack = {name: codec.Unpacker().unpack for name in _VARIANTS}
    stored = {name: [memoryview(b"".join(pack[name](frame))) for frame in frames] for name in _VARIANTS}
    found: dict[str, dict[str, list[float]]] = {
        name: {"stored": [len(each) for each in stored[name]], "pack": [], "unpack": []} for name in _VARIANTS
    }
    for turn in range(rounds + 1):
        for n, frame in enumerate(frames):
            for name in order.sample(_VARIANTS, len(_VARIANTS)):
                np.bitwise_or.reduce(np.frombuffer(frame, np.uint64))  # a sender has just looked for zeros
                packed = _seconds(lambda: pack[name](frame))  # noqa: B023
                unpacked = _seconds(lambda: unpack[name](stored[name][n], _FRAME))  # noqa: B023
                if turn:  # the first is for the caches
                    found[name]["pack"].append(packed)
                    found[name]["unpack"].append(unpacked)
    return found


def _seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    result = work()
    taken = time.thread_time() - began
    del result  # giving memory back is not counted
    return taken


def _alone() -> Callable[[memoryview], list[codec.Buffer]]:
    """As frames were packed before there were planes."""
    zstd, raw = zstandard.ZstdCompressor(level=codec.DEFAULT_LEVEL, write_checksum=False), codec.Packer(None)

    def pack(data: memoryview) -> list[codec.Buffer]:
        packed = zstd.compress(data)
        return [packed] if len(packed) <= len(data) * _WORTH else raw.pack(data)

    return pack


def _normal(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.standard_normal(count, np.float32) * np.float32(0.02)


def _bfloat16(words: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, as a conversion does it."""
    bits = words.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _text(generator: np.random.Generator) -> bytes:
    rows = (json.dumps({"step": n, "name": f"layer.{n % 97}.weight", "loss": x}) for n, x in enumerate(generator.random(70_000)))
    return "\n".join(rows).encode()[:_FRAME]


def _half_zeros(generator: np.random.Generator) -> bytes:
    return b"".join(generator.bytes(2048) + bytes(2048) for _ in range(_FRAME // 4096))


_KINDS: dict[str, Callable[[np.random.Generator], bytes]] = {
    "JSON text": _text,
    "float32, normal": lambda generator: _normal(generator, _FRAME // 4).tobytes(),
    "bfloat16, normal": lambda generator: _bfloat16(_normal(generator, _FRAME // 2)).tobytes(),
    "random bytes": lambda generator: generator.bytes(_FRAME),
    "half zeros": _half_zeros,
    "float16, normal": lambda generator: _normal(generator, _FRAME // 2).astype(np.float16).tobytes(),
    "float32, squares": lambda generator: (_normal(generator, _FRAME // 4) ** 2).tobytes(),
    "float32 that was bfloat16": lambda generator: (_bfloat16(_normal(generator, _FRAME // 4)).astype(np.uint32) << 16).tobytes(),
    "float64, normal": lambda generator: (generator.standard_normal(_FRAME // 8) * 0.02).tobytes(),
}
