"""What each stage of a checkpoint does alone, in GB/s, and what it costs, in CPU s/GB: ceilings, on a sample of the data that is
checkpointed in the same run.

Compression is what our daemon does: frames of 4 MiB, each thread with a context of its own, nothing but memory around it. The stores are
asked by a client that does nothing else.
"""

from __future__ import annotations

import mmap
import os
import resource
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import boto3
import numpy as np
import zstandard
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from benchmarks.peer import STORES, Stores

FRAME = 4 << 20
PACKED = 64 << 20  # bytes of the sample that are compressed: a round of what is mixed (programs/held.c)
SAMPLE = 256 << 20  # bytes of it that are copied and stored
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module yet


class Taken(NamedTuple):
    """`rate`: GB/s. `cpu`: seconds of processor time for a GB, of this process and those it has waited for; no server's."""

    rate: float
    cpu: float


COST = ", CPU s/GB"  # behind the name of a stage


def rates(sample: Path, memory: Path, stores: Stores) -> dict[str, float]:
    """`sample`: a file on tmpfs, `memory`: a directory there. Each stage twice: its rate, and with `COST` behind its name what it takes."""
    data = sample.read_bytes()
    found = {"copy into huge pages": _copy(data)}
    blocks = [data[at : at + FRAME] for at in range(0, min(len(data), PACKED), FRAME)]
    threads = len(os.sched_getaffinity(0))
    for level in (1, 3):
        for count in dict.fromkeys((1, threads)):
            found[f"zstd -{level}, {_threads(count)}"] = _packing(blocks, level, count)
    packed = [zstandard.ZstdCompressor(level=1).compress(block) for block in blocks]
    unpack = _in_threads(packed, threads, lambda: zstandard.ZstdDecompressor().decompress, sum(map(len, blocks)))
    found[f"zstd -d, {_threads(threads)}"] = unpack
    found["copy on tmpfs"] = _timed(len(data), lambda: stores.shell(f"cat {sample} >{memory}/copy"))
    for store in STORES:
        put, get, name = _client(store, stores, sample, memory / "copy")
        found[f"PUT, {store}"] = _timed(len(data), put)
        found[f"GET, {store}"] = _timed(len(data), get)
        stores.remove(store, name)
    (memory / "copy").unlink()
    told = {name: round(taken.rate, 3) for name, taken in found.items()}
    return told | {f"{name}{COST}": round(taken.cpu, 3) for name, taken in found.items()}


def slowest(found: dict[str, float], store: str, stored: float) -> float:
    """GB/s of memory through the narrowest of copy, zstd level 1 on all CPUs, and store. `stored`: bytes there for a byte of memory."""
    packing = found[f"zstd -1, {_threads(len(os.sched_getaffinity(0)))}"]
    return min(found["copy into huge pages"], packing, found[f"PUT, {store}"] / stored)


def _client(store: str, stores: Stores, sample: Path, into: Path) -> tuple[Callable[[], object], Callable[[], object], str]:
    """What stores it, what fetches it, and what it is called meanwhile. To S3 as our daemon does, in parts of 8 MiB, two per CPU at once:
    faster than rclone, which has to start, too."""
    name = f"ceiling-{uuid.uuid4().hex}"
    if store == "directory":
        put, get = stores.upload(store, name, sample), f"{stores.get(store, name)} >{into}"
        return lambda: stores.shell(put), lambda: stores.shell(get), name
    server = stores.server
    client = boto3.client(
        "s3", endpoint_url=server.endpoint_url, region_name="us-east-1", aws_access_key_id=server.access_key_id,
        aws_secret_access_key=server.secret_access_key, config=Config(s3={"addressing_style": "path"}),
    )  # fmt: skip
    parts = TransferConfig(multipart_chunksize=8 << 20, max_concurrency=2 * len(os.sched_getaffinity(0)))
    return (
        lambda: client.upload_file(str(sample), server.bucket, name, Config=parts),
        lambda: client.download_file(server.bucket, name, str(into), Config=parts),
        name,
    )


def _copy(data: bytes) -> Taken:
    arena = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    arena.madvise(mmap.MADV_HUGEPAGE)
    arena.madvise(_MADV_POPULATE_WRITE)
    into, given = np.frombuffer(arena, np.uint8), np.frombuffer(data, np.uint8)
    return max(_timed(len(data), lambda: np.copyto(into, given)) for _ in range(3))


def _packing(blocks: list[bytes], level: int, threads: int) -> Taken:
    size = sum(map(len, blocks))
    return max(_in_threads(blocks, threads, lambda: zstandard.ZstdCompressor(level=level).compress, size) for _ in range(2))


def _in_threads(blocks: list[bytes], threads: int, make: Callable[[], Callable[[bytes], object]], size: int) -> Taken:
    """All blocks, which are `size` bytes; each thread has what `make` makes to itself."""

    def work(first: int) -> None:
        each = make()
        for block in blocks[first::threads]:
            each(block)

    with ThreadPoolExecutor(threads) as pool:
        return _timed(size, lambda: list(pool.map(work, range(threads))))


def _timed(size: int, work: Callable[[], object]) -> Taken:
    began, cpu = time.perf_counter(), _cpu()
    work()
    return Taken(size / (time.perf_counter() - began) / 1e9, (_cpu() - cpu) / size * 1e9)


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
