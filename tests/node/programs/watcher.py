"""Looks at its whole memory all the time, and says what it saw: `beat <token> <counter> good` for each piece of a MiB whose checksum is
what it was, `wrong <piece>` for one that is not. Arguments: MiB, and what else there is:

shared      16 MiB more, shared with a child that looks at them, too
memfd       16 MiB more in a memfd
fork        it looks once at all of it, says `waits`, and looks at nothing until there is the file of the next argument; then it forks a
            child that looks at all of it, says `child <good> <wrong>`, and ends
change      likewise, and then it empties, moves and unmaps parts of its memory, and goes on with the rest
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
import zlib

MIB = 1 << 20
PIECE = 1 << 20
MADV_DONTNEED = 4
MREMAP_MAYMOVE = 1
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mremap.restype = ctypes.c_void_p


def main(mebibytes: str, *wishes: str) -> None:
    token = os.urandom(16).hex()
    held = [noise(mmap.mmap(-1, int(mebibytes) * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))]
    if "shared" in wishes:
        held.append(noise(mmap.mmap(-1, 16 * MIB)))
    if "memfd" in wishes:
        descriptor = os.memfd_create("held")
        os.ftruncate(descriptor, 16 * MIB)
        held.append(noise(mmap.mmap(descriptor, 16 * MIB)))
    pieces = [memoryview(each)[at : at + PIECE] for each in held for at in range(0, len(each), PIECE)]
    sums = [zlib.crc32(piece) for piece in pieces]
    if "shared" in wishes and not os.fork():
        token = f"{token}-child"
    go = next((wish for wish in wishes if "/" in wish), "")
    counter, gone = 0, set[int]()
    while True:
        for n, (piece, wanted) in enumerate(zip(pieces, sums, strict=True)):
            if n in gone:
                continue
            counter += 1
            if zlib.crc32(piece) == wanted:
                os.write(1, f"beat {token} {counter} good\n".encode())
            else:
                os.write(1, f"wrong {n}\n".encode())
        time.sleep(0.02)
        if go:
            wait_for(go)
            go = ""
            if "fork" in wishes:
                fork(pieces, sums)
            else:
                gone = change(held[0], sums[-2])


def noise(held: mmap.mmap) -> mmap.mmap:
    content = os.urandom(MIB) * 2
    for at in range(0, len(held), MIB):
        shift = at // MIB * 4099 % MIB
        held[at : at + MIB] = content[shift : shift + MIB]
    return held


def wait_for(file: str) -> None:
    os.write(1, b"waits\n")
    while not os.path.exists(file):
        time.sleep(0.01)


def fork(pieces: list[memoryview], sums: list[int]) -> None:
    child = os.fork()
    if not child:
        good = sum(zlib.crc32(piece) == wanted for piece, wanted in zip(pieces, sums, strict=True))
        os.write(1, f"child {good} {len(pieces) - good}\n".encode())
        os._exit(0)
    os.waitpid(child, 0)


def change(held: mmap.mmap, moving: int) -> set[int]:
    """The last of its pieces, without looking at them before: emptied, moved, unmapped."""
    count = len(held) // PIECE
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    place = [ctypes.c_void_p(start + (count - n) * PIECE) for n in (1, 2, 3)]
    assert LIBC.madvise(place[0], ctypes.c_size_t(PIECE), MADV_DONTNEED) == 0
    empty = zlib.crc32(memoryview(held)[(count - 1) * PIECE :])
    os.write(1, f"emptied {empty == zlib.crc32(bytes(PIECE))}\n".encode())
    wanted = ctypes.c_size_t(2 * PIECE)
    moved = LIBC.mremap(place[1], ctypes.c_size_t(PIECE), wanted, MREMAP_MAYMOVE)
    content = ctypes.string_at(moved, PIECE)
    os.write(1, f"moved {zlib.crc32(content) == moving}\n".encode())
    assert LIBC.munmap(place[2], ctypes.c_size_t(PIECE)) == 0
    return {count - 1, count - 2, count - 3}


if __name__ == "__main__":
    main(*sys.argv[1:])
