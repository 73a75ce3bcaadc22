"""Digests of single pages, by which a checkpoint knows what an earlier one of its workload has stored; the only file that knows xxhash.

Not cryptographic, and it need not be: XXH3 takes 0.2 s a GiB on one core here, BLAKE3 of pages 0.6 s, beside a copy of 0.1 s. Who wants
two pages to be taken for one has to know the seed, which is random, one for each chain of checkpoints, stored among what is encrypted, and
in no memory of the workload; and would only change its own memory, because no chain is of two workloads. By chance two of 2^32 pages (16
TiB) share one of these 128 bits with a probability of 2^-65. Damage is not for these to find: every frame has its BLAKE3.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hibernode.model import PAGE

DIGEST = 16  # bytes
Digests = npt.NDArray[np.uint64]  # (pages, 2)


def new_seed() -> int:
    return secrets.randbits(64)


def digests(pages: npt.NDArray[Any], wanted: npt.NDArray[np.bool_], seed: int) -> Digests:
    """Of the pages, each a row, that are wanted."""
    rows: Iterable[Any] = itertools.compress(pages.view(np.uint8).reshape(-1, PAGE), wanted)
    found = b"".join(map(xxhash.xxh3_128_digest, rows, itertools.repeat(seed)))
    return np.frombuffer(found, np.uint64).reshape(-1, 2)
