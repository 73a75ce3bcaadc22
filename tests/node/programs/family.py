"""Five processes with everything that is hard to dump between them. The root prints `beat <token> <counter> <checksums>`; the checksums are
made anew each time from what the family holds:

- anonymous memory that all share, in which every child counts
- a memfd that all have mapped, and one that is only open
- shared memory in which nobody has ever touched a page: anonymous, and of a memfd
- a pipe with bytes in flight, written before anybody dumps and read only when SIGUSR1 asks for it
- a file that is open and deleted
- a pair of unix sockets with a datagram in flight, likewise
- threads: each child has two more

After SIGUSR1 the root prints `flight <what was in the pipe> <what was in the socket>` as checksums, and what they were sent as.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
import zlib

CHILDREN = 4
SHARED = 4 << 20
SLOT = struct.Struct("<QQ")  # a child's counter, and its threads'


def main() -> None:
    token = os.urandom(16).hex()
    shared = mmap.mmap(-1, SHARED)  # MAP_SHARED | MAP_ANONYMOUS
    shared[4096:] = os.urandom(SHARED - 4096)
    memfd = os.memfd_create("family")
    os.write(memfd, os.urandom(1 << 20))
    mapped = mmap.mmap(memfd, 1 << 20)
    only_open = os.memfd_create("only-open")
    os.write(only_open, os.urandom(300_000))
    untouched = [mmap.mmap(-1, 3 << 20), mmap.mmap(truncated(), 5 << 20)]
    deleted = os.open("deleted", os.O_RDWR | os.O_CREAT)
    os.write(deleted, os.urandom(500_000))
    os.unlink("deleted")
    reading, writing = os.pipe()
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    piped, sent = os.urandom(30_000), os.urandom(20_000)
    os.write(writing, piped)
    near.send(sent)

    children = [child for n in range(CHILDREN) if (child := fork(n, shared))]
    asked = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    print("children", *children, flush=True)
    counter = 0
    while True:
        counter += 1
        sums = [zlib.crc32(shared[4096:]), zlib.crc32(mapped[:]), zlib.crc32(os.pread(only_open, 1 << 20, 0))]
        sums.append(zlib.crc32(os.pread(deleted, 1 << 20, 0)))
        print("beat", token, counter, *sums, flush=True)
        print("counts", counter, *(count for n in range(CHILDREN) for count in SLOT.unpack_from(shared, n * 64)), flush=True)
        if asked.is_set():
            asked.clear()
            got = os.read(reading, 1 << 16), far.recv(1 << 16)
            print("flight", *map(zlib.crc32, got), *map(zlib.crc32, (piped, sent)), flush=True)
            print("untouched", *(f"{len(each)}:{sum(bytes(each))}" for each in untouched), flush=True)
        time.sleep(0.02)


def truncated() -> int:
    memfd = os.memfd_create("untouched")
    os.ftruncate(memfd, 5 << 20)
    return memfd


def fork(n: int, shared: mmap.mmap) -> int:
    if child := os.fork():
        return child
    ticks = [0, 0]

    def tick(thread: int) -> None:
        while True:
            ticks[thread] += 1
            time.sleep(0.01)

    for thread in range(2):
        threading.Thread(target=tick, args=[thread], daemon=True).start()
    count = 0
    while os.getppid() > 1:
        count += 1
        SLOT.pack_into(shared, n * 64, count, min(ticks))
        time.sleep(0.01)
    sys.exit()


if __name__ == "__main__":
    main()
