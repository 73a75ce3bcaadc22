"""Counts, for ever: each line is `beat <token> <counter> <checksum of a megabyte that it holds>`. Arguments: seconds between lines, what
to do to oneself first (`io_uring`, `zombie`, `thread`), or MiB of memory to hold as well: `64` that nothing compresses, `slow:64` that
takes a high level of zstd long."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import zlib

IO_URING_SETUP = 425


def main(interval: float, *wishes: str) -> None:
    token, content = os.urandom(16).hex(), os.urandom(1 << 20)
    held = [do(wish) for wish in wishes]
    counter = 0
    while True:
        counter += 1
        print("beat", token, counter, zlib.crc32(content), len(held), flush=True)
        time.sleep(interval)


def do(wish: str) -> object:
    match wish:
        case "io_uring":
            ring = ctypes.CDLL(None, use_errno=True).syscall(IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
            if ring < 0:
                raise OSError(ctypes.get_errno(), "io_uring_setup")
            return ring
        case "zombie":
            if not (child := os.fork()):
                os._exit(0)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            print("zombie", child, flush=True)
            return child
        case "thread":
            thread = threading.Thread(target=threading.Event().wait, daemon=True)
            thread.start()
            print("thread", thread.native_id, flush=True)
            return thread
        case size if size.startswith("slow:"):
            return os.urandom(int(size[5:]) << 19).hex()
        case size:
            return os.urandom(int(size) << 20)


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
