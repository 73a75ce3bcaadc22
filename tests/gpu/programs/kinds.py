"""A CUDA program that uses one kind of memory or work, by ctypes alone: which of them does a driver save?

usage: kinds.py OUT KIND. Appends `<step> <value> <token>` to OUT; the value is read back from the GPU and is the step's number, or the
program ends. Its last words say so where the driver does not have the calls.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "node" / "programs"))
from cuda_job import MIB, Cuda

Write = Callable[[int], int]  # a step's number to where it is found again


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint), ("id", ctypes.c_int)]


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_uint),
        ("handles", ctypes.c_uint),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class Access(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_uint)]


def allocate(cuda: Cuda) -> int:
    base = ctypes.c_uint64()
    cuda("cuMemAlloc_v2", ctypes.byref(base), ctypes.c_size_t(MIB))
    return base.value


def stream(cuda: Cuda) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    cuda("cuStreamCreate", ctypes.byref(made), ctypes.c_uint(1))
    return made


def set_on(cuda: Cuda, base: int, value: int, on: ctypes.c_void_p) -> None:
    cuda("cuMemsetD32Async", ctypes.c_uint64(base), ctypes.c_uint(value), ctypes.c_size_t(MIB // 4), on)


def plain(cuda: Cuda, base: int) -> Write:
    def write(value: int) -> int:
        cuda("cuMemcpyHtoD_v2", ctypes.c_uint64(base), value.to_bytes(4, "little"), ctypes.c_size_t(4))
        return base

    return write


def streams(cuda: Cuda) -> Write:
    base, made = allocate(cuda), [stream(cuda) for _ in range(4)]

    def write(value: int) -> int:
        on = made[value % len(made)]
        set_on(cuda, base, value, on)
        cuda("cuStreamSynchronize", on)
        return base

    return write


def graphs(cuda: Cuda) -> Write:
    """One graph for each of a hundred values, replayed round and round."""
    base, on, ready = allocate(cuda), stream(cuda), []
    for value in range(100):
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        cuda("cuStreamBeginCapture_v2", on, ctypes.c_uint(0))
        set_on(cuda, base, value, on)
        cuda("cuStreamEndCapture", on, ctypes.byref(graph))
        cuda("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        ready.append(executable)
    write = plain(cuda, base)

    def replay(value: int) -> int:
        cuda("cuGraphLaunch", ready[value % 100], on)
        cuda("cuStreamSynchronize", on)
        if (found := read(cuda, base)) != value % 100:
            raise SystemExit(f"a graph wrote {found}, not {value % 100}")
        return write(value)

    return replay


def managed(cuda: Cuda) -> Write:
    base = ctypes.c_uint64()
    cuda("cuMemAllocManaged", ctypes.byref(base), ctypes.c_size_t(MIB), ctypes.c_uint(1))
    return plain(cuda, base.value)


def pinned(cuda: Cuda) -> Write:
    place, base = ctypes.c_void_p(), allocate(cuda)
    cuda("cuMemHostAlloc", ctypes.byref(place), ctypes.c_size_t(MIB), ctypes.c_uint(0))
    assert place.value

    def write(value: int) -> int:
        ctypes.memmove(place, value.to_bytes(4, "little"), 4)
        cuda("cuMemcpyHtoD_v2", ctypes.c_uint64(base), place, ctypes.c_size_t(MIB))
        return base

    return write


def ipc(cuda: Cuda) -> Write:
    base = allocate(cuda)
    cuda("cuIpcGetMemHandle", ctypes.create_string_buffer(64), ctypes.c_uint64(base))
    return plain(cuda, base)


def segments(cuda: Cuda, handles: int) -> Write:
    wanted = Properties(type=1, handles=handles, location=Location(type=1, id=0))
    size, base, handle = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64()
    cuda("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(wanted), ctypes.c_uint(0))
    cuda("cuMemAddressReserve", ctypes.byref(base), size, ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_ulonglong(0))
    cuda("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(wanted), ctypes.c_ulonglong(0))
    cuda("cuMemMap", base, size, ctypes.c_size_t(0), handle, ctypes.c_ulonglong(0))
    may = Access(location=Location(type=1, id=0), flags=3)
    cuda("cuMemSetAccess", base, size, ctypes.byref(may), ctypes.c_size_t(1))
    if handles:
        descriptor = ctypes.c_int()
        cuda("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, ctypes.c_uint(handles), ctypes.c_ulonglong(0))
    return plain(cuda, base.value)


KINDS: dict[str, Callable[[Cuda], Write]] = {
    "plain": lambda cuda: plain(cuda, allocate(cuda)),
    "streams": streams,
    "graphs": graphs,
    "pinned": pinned,
    "vmm": lambda cuda: segments(cuda, 0),
    "vmm-export": lambda cuda: segments(cuda, 1),
    "ipc": ipc,
    "managed": managed,
}


def read(cuda: Cuda, base: int) -> int:
    into = ctypes.create_string_buffer(4)
    cuda("cuMemcpyDtoH_v2", into, ctypes.c_uint64(base), ctypes.c_size_t(4))
    return int.from_bytes(into.raw, "little")


def main() -> None:
    cuda, token, device, context = Cuda(), os.urandom(8).hex(), ctypes.c_int(), ctypes.c_void_p()
    cuda("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
    cuda("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    cuda("cuCtxSetCurrent", context)
    try:
        write = KINDS[sys.argv[2]](cuda)
        with open(sys.argv[1], "a", buffering=1) as out:
            for step in count(1):
                if (found := read(cuda, write(step))) != step:
                    raise SystemExit(f"step {step} reads {found}")
                out.write(f"{step} {step} {token}\n")
                time.sleep(0.01)
    except AttributeError as e:
        raise SystemExit(f"this driver has no {str(e).rpartition(' ')[2]}") from e


if __name__ == "__main__":
    main()
