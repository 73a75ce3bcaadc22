"""The workload with state on a GPU: a root and a child, each a `cuda_job` of its own, which says in its slot of a file of fixed length what
`workload.c` says in its own. `wrong` counts the steps whose value, read back from the device, is not the one that the sequence has there.

usage: python -m tests.matrix.cuda_workload FILE
"""

from __future__ import annotations

import os
import struct
import sys
import time

from tests.node.programs import cuda_job
from tests.node.programs.cuda_job import Cuda, Gpu

SLOT = 96  # bytes, as in workload.c
MIB = 2  # of device memory, beside the context
INTERVAL = 0.01  # seconds between beats


def main(path: str) -> None:
    file = os.open(path, os.O_WRONLY)
    slot = 0 if os.fork() else 1  # before either has begun with CUDA, which survives no fork
    seed, token, wrong = slot + 1, os.urandom(8).hex(), 0
    gpu = Gpu(Cuda(), 0, MIB, seed)
    for step, wanted in enumerate(cuda_job.sequence(seed, MIB), 1):
        megabyte = step % MIB * cuda_job.MIB
        (value,) = struct.unpack("<Q", gpu.read(gpu.cell, 8))
        value = cuda_job.following(value, gpu.read(megabyte, cuda_job.PART))
        gpu.write(megabyte, struct.pack("<Q", value))
        gpu.write(gpu.cell, struct.pack("<Q", value))
        wrong += value != wanted
        said = f"{token} {step} {wrong} 0 {os.getpid()}"
        os.pwrite(file, f"{said:{SLOT - 1}}\n".encode(), slot * SLOT)
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main(sys.argv[1])
