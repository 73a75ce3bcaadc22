"""A program that lacks its pages, and does with its memory what it is told: a userfaultfd of its own, handed over as CRIU does.

Arguments: the socket of the filler, and how many pages it has, from page BASE on. Commands come on stdin, one a line, and pages are counted
from BASE: `touch P` reads a word in a thread of its own, and says `P <word>` when it has it; `fork P` likewise, in a child; `empty P N`,
`unmap P N`, `move P TO N` change its memory, and say `done`; `finished` is CRIU's word that all are restored. Standard library only, so
that it starts fast.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
import threading
from collections.abc import Sequence

PAGE, BASE = 4096, 0x200000000 // 4096
_PRIVATE, _ANONYMOUS, _NORESERVE, _FIXED_NOREPLACE = 0x02, 0x20, 0x4000, 0x100000
_MAYMOVE, _FIXED, _DONTNEED = 1, 2, 4
_USERFAULTFD, _API, _REGISTER = 323, 0xC018AA3F, 0xC020AA00
_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6
FINISHED = 0x52535446

_libc = ctypes.CDLL(None, use_errno=True)
_word = ctypes.c_size_t
for _name, _count in {"mmap": 6, "mremap": 5, "munmap": 2, "madvise": 3, "memcpy": 3}.items():
    getattr(_libc, _name).restype, getattr(_libc, _name).argtypes = _word, [_word] * _count


def _at(page: str) -> int:
    return (BASE + int(page)) * PAGE


def _look(page: str) -> None:
    """The interpreter's lock is free meanwhile: others may look, too."""
    found = ctypes.c_uint64()
    _libc.memcpy(ctypes.addressof(found), _at(page), 8)
    os.write(1, f"{page} {found.value}\n".encode())


def _do(what: str, words: Sequence[str], criu: socket.socket) -> None:
    if what == "touch":
        threading.Thread(target=_look, args=words, daemon=True).start()
    elif what == "fork":
        if not os.fork():
            _look(*words)
            os._exit(0)
    elif what == "finished":
        criu.sendall(struct.pack("=i", FINISHED))
    else:
        failed = {
            "empty": lambda page, pages: _libc.madvise(_at(page), int(pages) * PAGE, _DONTNEED),
            "unmap": lambda page, pages: _libc.munmap(_at(page), int(pages) * PAGE),
            "move": lambda page, to, pages: (
                _libc.mremap(_at(page), int(pages) * PAGE, int(pages) * PAGE, _MAYMOVE | _FIXED, _at(to)) != _at(to)
            ),
        }[what](*words)
        os.write(1, b"failed\n" if failed else b"done\n")


def main(path: str, pages: int) -> None:
    size = pages * PAGE
    if _libc.mmap(BASE * PAGE, size, 3, _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED_NOREPLACE, (1 << 64) - 1, 0) != BASE * PAGE:
        raise OSError(ctypes.get_errno(), "mmap")
    uffd = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(uffd, _API, struct.pack("=QQQ", 0xAA, _EVENTS, 0))
    fcntl.ioctl(uffd, _REGISTER, struct.pack("=QQQQ", BASE * PAGE, size, 1, 0))
    with socket.socket(socket.AF_UNIX) as criu:
        criu.connect(path)
        criu.sendall(struct.pack("=i", os.getpid()))
        socket.send_fds(criu, [b"\0"], [uffd])
        os.close(uffd)
        for line in sys.stdin:
            what, *words = line.split()
            _do(what, words, criu)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
