"""Memory of a given shape, whose whole content is summed up again for every `beat <token> <counter> <checksum> <bytes>`.

mappings <n>       n mappings of one page: every second one of a run can only be read, so that the kernel cannot join them
half-zero <MiB>    every second page was written and is zero again; and an odd page at the end
file <path>        a private mapping of a file of 1 MiB, of which one page was overwritten with zeros
large <MiB>        what no compressor can shorten: each block is one block of noise, shifted by another amount
floats <MiB>       the same of weights as bfloat16: noise, and before it one of a few exponents
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
import zlib

PAGE = 4096
BLOCK = 16 << 20


def main(shape: str, argument: str, interval: float = 0.02) -> None:
    token = os.urandom(16).hex()
    maps = {"mappings": mappings, "half-zero": half_zero, "file": private_file, "floats": floats, "large": large}[shape](argument)
    counter = 0
    while True:
        counter += 1
        total, size = 0, 0
        for each in maps:
            total, size = zlib.crc32(each, total), size + len(each)
        print("beat", token, counter, total, size, flush=True)
        time.sleep(interval)


def mappings(count: str) -> list[memoryview]:
    n = int(count)
    held = mmap.mmap(-1, n * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(n):
        held[page * PAGE : page * PAGE + 16] = os.urandom(16)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in range(1, n, 2):
        if libc.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "mprotect")
    return [memoryview(held)]


def half_zero(mebibytes: str) -> list[memoryview]:
    size = (int(mebibytes) << 20) + PAGE
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(size // PAGE):
        held[page * PAGE : (page + 1) * PAGE] = os.urandom(PAGE)
        if page % 2:
            held[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
    return [memoryview(held)]


def private_file(path: str) -> list[memoryview]:
    with open(path, "rb") as file:
        held = mmap.mmap(file.fileno(), 1 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    held[7 * PAGE : 8 * PAGE] = bytes(PAGE)
    held[9 * PAGE : 9 * PAGE + 5] = b"dirty"
    print("page", zlib.crc32(held[7 * PAGE : 8 * PAGE]), zlib.crc32(bytes(PAGE)), flush=True)
    return [memoryview(held)]


def floats(mebibytes: str) -> list[memoryview]:
    few = bytes(0x3C - (n & 0x7F).bit_length() % 4 | n & 0x80 for n in range(256))  # sign, and what is likely of an exponent
    block = bytearray(BLOCK)
    block[0::2], block[1::2] = os.urandom(BLOCK // 2), os.urandom(BLOCK // 2).translate(few)
    return shifted(bytes(block), mebibytes, 4098)


def large(mebibytes: str) -> list[memoryview]:
    return shifted(os.urandom(BLOCK), mebibytes, 4099)


def shifted(content: bytes, mebibytes: str, step: int) -> list[memoryview]:
    twice = content * 2
    held = []
    for n in range((int(mebibytes) << 20) // BLOCK):
        block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        at = n * step % BLOCK
        block[:] = twice[at : at + BLOCK]
        held.append(memoryview(block))
    return held


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
