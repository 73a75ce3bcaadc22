"""A job on GPUs whose output shows whether a byte of device memory was lost, mixed up or stale. ctypes on libcuda.so.1 alone.

Each step reads a value from the end of the first GPU's memory and 64 KiB of one of its megabytes, makes the next value of both, and writes
it to both places; then it appends `<step> <value> <token>` to OUT. The token exists only in this process's memory. `sequence` says
what the values have to be, without a GPU.

usage: cuda_job.py OUT [--mib 8] [--seed 1] [--gpus 0,1] [--interval-ms 10] [--busy-ms 0] [--steps 0] [--spare-mib 0] [--managed] [--ipc]
                   [--fork-child] [--tick FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from itertools import count

MIB = 1 << 20
PART = 64 << 10  # bytes of a megabyte that a step reads

# Spins for `ns` nanoseconds.
BUSY = b"""
.version 6.3
.target sm_75
.address_size 64
.visible .entry busy(.param .u64 ns)
{
    .reg .pred %p;
    .reg .u64 %limit, %began, %now;
    ld.param.u64 %limit, [ns];
    mov.u64 %began, %globaltimer;
again:
    mov.u64 %now, %globaltimer;
    sub.u64 %now, %now, %began;
    setp.lt.u64 %p, %now, %limit;
    @%p bra again;
    ret;
}
\0"""


def content(seed: int, gpu: int) -> bytes:
    """What a megabyte of that GPU holds at first, behind the number of the megabyte."""
    return random.Random(f"{seed} {gpu}").randbytes(MIB)[8:]


def following(value: int, part: bytes) -> int:
    return ((value ^ zlib.crc32(part)) * 6364136223846793005 + 1442695040888963407) % 2**64


def sequence(seed: int, mib: int, gpus: int = 1) -> Iterator[int]:
    """The values of the steps, from step 1 on, of a job with those options on so many GPUs."""
    value, bodies, heads = seed, [content(seed, gpu)[: PART - 8] for gpu in range(gpus)], dict[tuple[int, int], int]()
    for step in count(1):
        place = step % gpus, step // gpus % mib
        value = following(value, struct.pack("<Q", heads.get(place, place[1])) + bodies[place[0]])
        heads[place] = value
        yield value


class Gpu:
    """One device: a context on it, and `mib` megabytes and a cell of 8 bytes."""

    def __init__(self, cuda: Cuda, ordinal: int, mib: int, seed: int) -> None:
        self._cuda, self._context, device = cuda, ctypes.c_void_p(), ctypes.c_int()
        cuda("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        cuda("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        cuda("cuCtxSetCurrent", self._context)
        self.base = self.allocate(mib * MIB + 8)
        self.cell = mib * MIB
        body = content(seed, ordinal)
        for number in range(mib):
            self.write(number * MIB, struct.pack("<Q", number) + body)
        self.write(self.cell, struct.pack("<Q", seed))

    def allocate(self, size: int) -> int:
        base = ctypes.c_uint64()
        self._cuda("cuMemAlloc_v2", ctypes.byref(base), ctypes.c_size_t(size))
        return base.value

    def write(self, offset: int, data: bytes) -> None:
        self._cuda("cuCtxSetCurrent", self._context)
        self._cuda("cuMemcpyHtoD_v2", ctypes.c_uint64(self.base + offset), data, ctypes.c_size_t(len(data)))

    def read(self, offset: int, size: int) -> bytes:
        into = ctypes.create_string_buffer(size)
        self._cuda("cuCtxSetCurrent", self._context)
        self._cuda("cuMemcpyDtoH_v2", into, ctypes.c_uint64(self.base + offset), ctypes.c_size_t(size))
        return into.raw


class Cuda:
    """Calls by name; any answer but success ends the program."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)

    def __call__(self, name: str, *args: object) -> None:
        if code := getattr(self._library, name)(*args):
            raise SystemExit(f"{name} answers {code}")


class Kernel:
    """A spin on the GPU that is current when it is made."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, module, self._function = cuda, ctypes.c_void_p(), ctypes.c_void_p()
        cuda("cuModuleLoadData", ctypes.byref(module), BUSY)
        cuda("cuModuleGetFunction", ctypes.byref(self._function), module, b"busy")

    def launch(self, ms: int) -> None:
        """Returns at once; the next copy waits for it."""
        ns = ctypes.c_uint64(ms * 1_000_000)
        params = (ctypes.c_void_p * 1)(ctypes.addressof(ns))
        self._cuda("cuLaunchKernel", self._function, 1, 1, 1, 1, 1, 1, 0, None, params, None)


def tick(path: str, slot: int) -> None:
    """Count in memory of our own, and show it in the file."""
    with open(path, "r+b") as file:
        shown = mmap.mmap(file.fileno(), 16)
    for number in count(1):
        struct.pack_into("<Q", shown, slot * 8, number)
        time.sleep(0.001)


def begin_ticking(path: str) -> None:
    """A thread, slot 0, and a child, slot 1, that have nothing to do with a GPU."""
    with open(path, "wb") as file:
        file.write(bytes(16))
    if not os.fork():
        tick(path, 1)
    threading.Thread(target=tick, args=(path, 0), daemon=True).start()


def main() -> None:
    options = _options()
    if options.tick:
        begin_ticking(options.tick)
    token = os.urandom(8).hex()
    cuda = Cuda()
    gpus = [Gpu(cuda, int(ordinal), options.mib, options.seed) for ordinal in options.gpus.split(",")]
    first = gpus[0]
    first.read(0, 8)  # and so its context is the current one
    if options.spare_mib:
        first.allocate(options.spare_mib * MIB)
    if options.managed:
        cuda("cuMemAllocManaged", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(MIB), ctypes.c_uint(1))
    if options.ipc:
        cuda("cuIpcGetMemHandle", ctypes.create_string_buffer(64), ctypes.c_uint64(first.base))
    kernel = Kernel(cuda) if options.busy_ms else None
    if options.fork_child and not os.fork():
        while True:
            time.sleep(3600)  # with every descriptor of the driver's, and without its threads
    with open(options.out, "a", buffering=1) as out:
        for step in count(1):
            if kernel:
                first.read(0, 8)
                kernel.launch(options.busy_ms)
            gpu, megabyte = gpus[step % len(gpus)], step // len(gpus) % options.mib
            (value,) = struct.unpack("<Q", first.read(first.cell, 8))
            value = following(value, gpu.read(megabyte * MIB, PART))
            gpu.write(megabyte * MIB, struct.pack("<Q", value))
            first.write(first.cell, struct.pack("<Q", value))
            out.write(f"{step} {value} {token}\n")
            if step == options.steps:
                return
            time.sleep(options.interval_ms / 1e3)


def _options() -> argparse.Namespace:
    say = argparse.ArgumentParser()
    say.add_argument("out", help="file that lines are appended to")
    say.add_argument("--mib", type=int, default=8, help="device memory on each GPU, filled from the seed")
    say.add_argument("--seed", type=int, default=1)
    say.add_argument("--gpus", default="0", help="ordinals of those that are visible")
    say.add_argument("--interval-ms", type=int, default=10, help="pause between steps")
    say.add_argument("--busy-ms", type=int, default=0, help="an uninterruptible kernel of that length in each step")
    say.add_argument("--steps", type=int, default=0, help="end after so many; 0: never")
    say.add_argument("--spare-mib", type=int, default=0, help="further memory on the first GPU, allocated and not used")
    say.add_argument("--managed", action="store_true", help="have a megabyte of managed memory, too")
    say.add_argument("--ipc", action="store_true", help="have the memory's handle made, as for another process")
    say.add_argument("--fork-child", action="store_true", help="have a child that only inherited, as a DataLoader's worker")
    say.add_argument("--tick", help="file where a thread and a child that use no GPU count milliseconds, 8 bytes each")
    return say.parse_args()


if __name__ == "__main__":
    main()
