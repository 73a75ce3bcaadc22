"""What was measured on: facts of this machine, and its ceilings, taken in the same run as what is compared with them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BLOCK = 4 << 20  # bytes: a frame


def facts() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    memory = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory) >> 10,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def ceilings() -> dict[str, float]:
    """GB/s of one thread, over blocks of 4 MiB: the best of five."""
    block = np.random.default_rng(0).integers(0, 255, BLOCK, np.uint8)
    into = np.empty_like(block)
    cipher, nonce, data = AESGCM(bytes(32)), bytes(12), block.tobytes()
    return {
        "copy": _rate(lambda: np.copyto(into, block)),
        "blake3": _rate(lambda: blake3(data).digest()),
        "aes-256-gcm": _rate(lambda: cipher.encrypt(nonce, data, None)),
    }


def _rate(work: Callable[[], object], rounds: int = 32) -> float:
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(rounds):
            work()
        best = max(best, rounds * BLOCK / (time.perf_counter() - began) / 1e9)
    return round(best, 2)
