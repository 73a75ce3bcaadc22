"""Memory of which some is changed when asked: changing.py <MiB> <kind> <percent>

Kind: `noise`, or `text`, which compresses. It says `beat <token> <counter> <checksum>` again and again; the checksum is taken anew for each
beat. SIGUSR1 changes so many percent of its pages, at random, between two beats, and says `changed <times> <checksum>`.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
import zlib

PAGE = 4096
WORDS = [f"layer.{n}.weight={n * 7919 % 1000}; ".encode() for n in range(64)]


def page(kind: str, chance: random.Random) -> bytes:
    if kind == "noise":
        return chance.randbytes(PAGE)
    return b"".join(chance.choices(WORDS, k=PAGE // 16)).ljust(PAGE, b".")[:PAGE]


def main(mebibytes: str, kind: str, percent: str) -> None:
    token, chance = os.urandom(16).hex(), random.Random(os.urandom(8))
    size = int(mebibytes) << 20
    held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, PAGE):
        held[at : at + PAGE] = page(kind, chance)
    wanted = []
    signal.signal(signal.SIGUSR1, lambda number, frame: wanted.append(number))
    counter = times = 0
    while True:
        if wanted:
            wanted.pop()
            for number in chance.sample(range(size // PAGE), size // PAGE * int(percent) // 100):
                held[number * PAGE : (number + 1) * PAGE] = page(kind, chance)
            times += 1
            print("changed", times, zlib.crc32(held), flush=True)
        counter += 1
        print("beat", token, counter, zlib.crc32(held), flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])
