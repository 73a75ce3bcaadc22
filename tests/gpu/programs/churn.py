"""cuda_job with company: threads that never rest while the GPU's driver moves memory about. Same words, same output.

One maps and unmaps memory, one allocates and has the heap trimmed, one reads pinned memory and compares it. An error ends the program with
status 70; `ready` in OUT.churn says what runs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "node" / "programs"))
import cuda_job

MIB = 1 << 20
PINNED = 16 * MIB


def map_and_unmap() -> None:
    for turn in range(1 << 60):
        with mmap.mmap(-1, (1 + turn % 64) * MIB) as place:
            place[0] = place[len(place) - 1] = 1
        time.sleep(0)


def trim() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    while True:
        held = [libc.malloc(ctypes.c_size_t(200_000)) for _ in range(64)]
        for each in held:
            ctypes.memset(each, 1, 200_000)
            libc.free(ctypes.c_void_p(each))
        libc.malloc_trim(0)
        time.sleep(0)


def read_pinned(out: Path) -> None:
    while not out.exists() or not out.stat().st_size:  # cuInit has been made then
        time.sleep(0.01)
    cuda = ctypes.CDLL("libcuda.so.1")
    if not hasattr(cuda, "cuMemHostAlloc"):
        return say(out, "mapper, trimmer; this driver has no pinned memory")
    context, device, place = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_void_p()
    calls = (
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        cuda.cuCtxSetCurrent(context),
        cuda.cuMemHostAlloc(ctypes.byref(place), ctypes.c_size_t(PINNED), 0),
    )
    if any(calls):
        return say(out, f"mapper, trimmer; no pinned memory: {calls}")
    assert place.value
    ctypes.memset(place, 0x5A, PINNED)
    say(out, "mapper, trimmer, pinned reader")
    wanted = b"\x5a" * MIB
    while True:
        for offset in range(0, PINNED, MIB):
            if ctypes.string_at(place.value + offset, MIB) != wanted:
                Path(f"{out}.churn").write_text("pinned memory has changed\n")
                os._exit(70)
        time.sleep(0)


def say(out: Path, what: str) -> None:
    Path(f"{out}.churn").write_text(f"ready: {what}\n")


def main() -> None:
    out = Path(sys.argv[1])
    for target, args in ((map_and_unmap, ()), (trim, ()), (read_pinned, (out,))):
        threading.Thread(target=target, args=args, daemon=True).start()
    cuda_job.main()


if __name__ == "__main__":
    main()
