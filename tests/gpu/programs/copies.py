"""How fast pinned memory is copied to a GPU and back: one line of JSON, GB/s. ctypes alone."""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "node" / "programs"))
from cuda_job import MIB, Cuda


def main() -> None:
    size = ctypes.c_size_t(int(sys.argv[1]) * MIB)
    cuda, device, context, place, base = Cuda(), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    cuda("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
    cuda("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    cuda("cuCtxSetCurrent", context)
    cuda("cuMemAlloc_v2", ctypes.byref(base), size)
    try:
        cuda("cuMemHostAlloc", ctypes.byref(place), size, ctypes.c_uint(0))
    except AttributeError:
        print(json.dumps({"copies": "this driver has no pinned memory"}))
        return
    assert place.value
    ctypes.memset(place, 1, size.value)
    ways = {
        "to_gpu": lambda: cuda("cuMemcpyHtoD_v2", base, place, size),
        "from_gpu": lambda: cuda("cuMemcpyDtoH_v2", place, base, size),
    }
    found = {}
    for name, copy in ways.items():
        took = []
        for _ in range(4):
            began = time.monotonic()
            copy()
            took.append(time.monotonic() - began)
        found[name] = round(size.value / min(took) / 1e9, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
