"""The messages of CRIU's page server (criu/page-xfer.c), pure. Native endian, x86-64.

CRIU 4.2 widened `nr_pages`: before it a header has 24 bytes, since then 32. A wrong size shows as garbage commands under a dump that
still reports success, which is why `Wire` is chosen by version and a capture is compared with CRIU's statistics.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

OPEN2, PARENT, ADD_F, GET = 4, 5, 6, 7
CLOSE, FORCE_CLOSE = 0x1023, 0x1024
HAS_PARENT, LAZY, PRESENT = 1, 2, 4  # flags of a segment
TASK, SHMEM = 1, 2  # low byte of dst_id; the rest is the pid, or the shared memory's id

NO_PARENT_IMAGE = b"\0"  # answer to OPEN2
NO_PARENT = struct.pack("=i", 0)  # answer to PARENT
CLOSED = struct.pack("=i", 0)  # answer to CLOSE; anything else fails the dump and the tree runs on


class Header(NamedTuple):  # made for each segment while a workload is frozen: a third of what a frozen dataclass costs
    command: int
    flags: int
    pages: int
    vaddr: int
    dst_id: int


class Wire:
    """Headers of one CRIU version (40201 is 4.2.1)."""

    def __init__(self, criu_version: int) -> None:
        self._struct = struct.Struct("=I4xQQQ" if criu_version >= 40200 else "=IIQQ")
        self.size = self._struct.size

    def decode(self, data: bytes | bytearray | memoryview) -> Header:
        command, pages, vaddr, dst_id = self._struct.unpack(data)
        return Header(command & 0xFFFF, command >> 16, pages, vaddr, dst_id)

    def encode(self, header: Header) -> bytes:
        return self._struct.pack(header.flags << 16 | header.command, header.pages, header.vaddr, header.dst_id)
