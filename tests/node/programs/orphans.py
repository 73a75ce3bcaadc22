"""A root that ends at once when the file of the argument is there, and a child that counts like `counter.py`, for ever."""

from __future__ import annotations

import os
import sys
import time


def main(end: str) -> None:
    if not os.fork():
        token, counter = os.urandom(16).hex(), 0
        while True:
            counter += 1
            print("beat", token, counter, 0, flush=True)
            time.sleep(0.01)
    while not os.path.exists(end):
        pass
    os._exit(0)  # at once: before anybody has looked at it


if __name__ == "__main__":
    main(sys.argv[1])
