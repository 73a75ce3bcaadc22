"""A workload that only holds memory: `weights.py <kind> <MiB>` says `ready`, then `beat <token> <counter>` every 10 ms.

float32   weights as a training job has them: normally distributed, which no compressor can shorten by much
text      a heap of small JSON objects, which shrinks to a few percent
half      half of it zeros, half weights
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np


def main(kind: str, mebibytes: int) -> None:
    held = {"float32": weights, "text": text, "half": half}[kind](mebibytes << 20)
    token = os.urandom(8).hex()
    print("ready", len(held), flush=True)
    counter = 0
    while True:
        counter += 1
        print("beat", token, counter, flush=True)
        time.sleep(0.01)


def weights(size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.standard_normal(1 << 18, np.float32) for _ in range(size >> 20)]


def text(size: int) -> list[bytes]:
    rows = [json.dumps({"step": n, "name": f"layer.{n % 97}.weight", "loss": 1 / (n + 1)}).encode() for n in range(20_000)]
    block = b"\n".join(rows)
    return [block[at % 4096 :] + bytes([at & 255]) for at in range(0, size, len(block))]


def half(size: int) -> list[np.ndarray]:
    return [*weights(size // 2), np.zeros(size // 2, np.uint8) + np.uint8(0)]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
