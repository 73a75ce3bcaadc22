"""A bad network between a daemon and a good broker: a proxy that passes on every byte, until it is told otherwise.

    with BrokerProxy(server.port) as proxy:
        proxy.at(b"+ACK", proxy.reset)  # the next acknowledgement is cut in the middle

Where bytes are cut is said by what they say, not by when they come.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

PATIENCE = 20.0  # seconds until something that was to come has come
_LINGER = struct.pack("ii", 1, 0)  # a socket that is closed says reset, and forgets what it still had to send


@dataclass(eq=False)
class Trap:
    """Something that happens when certain bytes come by; `wait` for its end."""

    marker: bytes
    deed: Callable[[], None]
    down: bool
    whole: bool
    _over: threading.Event = field(default_factory=threading.Event)

    def spring(self) -> None:
        self.deed()
        self._over.set()

    def wait(self) -> None:
        if not self._over.wait(PATIENCE):
            raise TimeoutError(f"nobody said {self.marker!r}")


@dataclass(eq=False)
class _Pair:
    """One connection of the daemon, and ours to the broker for it."""

    client: socket.socket
    server: socket.socket
    deaf: bool = False  # the daemon hears nothing any more

    def close(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
                end.shutdown(socket.SHUT_RDWR)  # wakes whoever reads from it
            end.close()


class BrokerProxy:
    """`with BrokerProxy(port) as proxy:` is a way to the broker at `port`; its own address is `url`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._traps: list[Trap] = []
        self._passing = threading.Event()
        self._passing.set()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._listener.getsockname()[1]}"

    def at(self, marker: bytes, deed: Callable[[], None], *, down: bool = False, whole: bool = False) -> Trap:
        """When these bytes come up to the broker (`down`: from it) for the next time, they are passed on up to their own end, and
        `deed` is done before the rest is. `whole`: the rest is passed on first, and from then the daemon gets no answer on this
        connection."""
        trap = Trap(marker, deed, down, whole)
        with self._lock:
            self._traps.append(trap)
        return trap

    def reset(self) -> None:
        """Every connection is lost, and what was on its way."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.close()

    def stall(self) -> None:
        """Nothing comes through any more, and nobody is told, until `heal`."""
        self._passing.clear()

    def heal(self) -> None:
        """Of everything; traps that nobody went into are taken away."""
        with self._lock:
            self._traps.clear()
        self._passing.set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: it is over
            while True:
                client, _ = self._listener.accept()
                try:
                    pair = _Pair(client, socket.create_connection(("127.0.0.1", self._port), timeout=1))
                except OSError:  # the broker is away
                    client.close()
                    continue
                pair.server.settimeout(None)
                with self._lock:
                    self._pairs.append(pair)
                for down in (False, True):
                    threading.Thread(target=self._pass_on, args=(pair, down), daemon=True).start()

    def _pass_on(self, pair: _Pair, down: bool) -> None:
        source, sink = (pair.server, pair.client) if down else (pair.client, pair.server)
        before = b""  # of a marker that comes in two pieces
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._passing.wait()
                if down and pair.deaf:
                    continue
                trap = self._met(before + data, down)
                if trap is None:
                    sink.sendall(data)
                    before = (before + data)[-100:]
                else:
                    end = (before + data).index(trap.marker) + len(trap.marker) - len(before)
                    self._into(trap, pair, sink, data, len(data) if trap.whole else end)
                    before = b""
        pair.close()

    def _met(self, data: bytes, down: bool) -> Trap | None:
        with self._lock:
            for trap in self._traps:
                if trap.down == down and trap.marker in data:
                    self._traps.remove(trap)
                    return trap
        return None

    def _into(self, trap: Trap, pair: _Pair, sink: socket.socket, data: bytes, end: int) -> None:
        pair.deaf = trap.whole
        sink.sendall(data[:end])
        try:
            trap.spring()
        finally:
            sink.sendall(data[end:])
