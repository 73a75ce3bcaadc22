"""The local socket's door: the kernel says who stands before it (SO_PEERCRED), and only root and our own user come in.

grpc for Python shows nobody's uid and takes no connection that somebody else has accepted. So it listens on a socket of its own that has
lost its name: only this process reaches it, through a descriptor. Whoever may come in is connected with that, and his bytes are passed
on as they are. The event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from hibernode.loop import Tasks

_PIECE = 1 << 16  # bytes passed on at once
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_log = logging.getLogger("hibernode.door")


def bound(path: Path) -> socket.socket:
    """A socket at `path` that nobody else can open. OSError if it cannot be made there."""
    listener = socket.socket(socket.AF_UNIX)
    # The mask is the process's: for this moment every thread makes files that are private, which harms nobody.
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def caller(writer: asyncio.StreamWriter) -> tuple[int, int]:
    """Who is at the other end, as the kernel says: pid and uid."""
    connection = writer.get_extra_info("socket")
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


class Door:
    """One socket at `path`, with mode 0600. `build`, `open`, `shut` and `close` are called once each, in this order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._within = -1  # the socket behind the door
        self._server: asyncio.Server | None = None
        self._guests = Tasks()
        self._turned_away: set[int] = set()  # uids the log has named

    def build(self, bind: Callable[[str], object]) -> None:
        """`bind` is given the address of grpc's own socket. It has a name for this moment, in a directory that nobody else can enter."""
        with tempfile.TemporaryDirectory(prefix=".door-", dir=self._path.parent) as private:
            directory = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                bind(f"unix:/proc/self/fd/{directory}/behind")  # as long as any path may be
                self._within = os.open("behind", os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
            finally:
                os.close(directory)

    async def open(self) -> None:
        """From now on callers come in. OSError if the socket cannot be made there."""
        self._server = await asyncio.start_unix_server(self._meet, sock=bound(self._path))

    def shut(self) -> None:
        """Nobody comes in any more; who is in may stay."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def close(self) -> None:
        """After grpc has stopped: what it has said is passed on, to who still listens."""
        await self._guests.finish(1.0)
        await self._guests.cancel()
        if self._within >= 0:
            os.close(self._within)

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = caller(writer)
        if uid in (0, os.geteuid()):
            self._guests.spawn(self._connect(reader, writer))
            return
        if uid not in self._turned_away:
            _log.warning("user %d (pid %d) is turned away from the socket; said once", uid, pid)
        self._turned_away.add(uid)
        writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_unix_connection(f"/proc/self/fd/{self._within}")
        except OSError:  # it is stopping
            writer.close()
            return
        await asyncio.gather(_pass_on(reader, inner_writer), _pass_on(inner_reader, writer))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one of them ends; no faster than the other side takes it."""
    try:
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE):
                writer.write(data)
                await writer.drain()
        writer.close()
    except asyncio.CancelledError:
        writer.transport.abort()
        raise
