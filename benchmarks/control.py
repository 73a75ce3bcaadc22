"""Servers of the control plane, as people run them: `hibernode api`, each a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT = 900.0  # seconds for anything


@dataclass
class Api:
    """One `hibernode api`, asked over one connection."""

    pid: int
    port: int
    connection: http.client.HTTPConnection

    def get(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        try:
            self.connection.request("GET", path)
            reply = self.connection.getresponse()
        except (ConnectionError, http.client.HTTPException):  # it ends one on which nothing was asked for some seconds
            self.connection.close()
            self.connection.request("GET", path)
            reply = self.connection.getresponse()
        return reply.status, reply.read(), {name.lower(): value for name, value in reply.getheaders()}

    def applied(self) -> int:
        page = self.get("/metrics")[1].decode()
        return int(sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("hibernode_api_events_total{")))


@contextlib.contextmanager
def serving(home: Path, broker: str, database: str, cluster: str) -> Iterator[Api]:
    """A server of its own, which answers when this returns."""
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = home / "hibernode.toml"
    config.write_text(
        f'cluster = "{cluster}"\nstate_dir = "{home}"\n[bus]\nurl = "{broker}"\n[log]\nlevel = "warning"\n'
        f'[api]\nlisten = "127.0.0.1:{port}"\ndatabase = "{database}"\nauth = "none"\nrate = 1e6\nburst = 1000000\n'
    )
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "hibernode", "api", "--config", str(config)], stdout=log, stderr=log)
    try:
        api = Api(process.pid, port, http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT))
        deadline = time.monotonic() + 60
        while not _ready(api):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {(home / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield api
    finally:
        process.terminate()
        process.wait(60)
        if said := (home / "log").read_text():
            print(f"a server said:\n{said[-2000:]}", flush=True)


def _ready(api: Api) -> bool:
    try:
        return api.get("/readyz")[0] == 200
    except OSError:
        api.connection.close()
        return False


def cpu(pid: int) -> float:
    """Seconds of processor time that it and its children have used, those that have ended as well."""
    seconds = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(") ")[2].split()
            if stat.parent.name == str(pid):
                seconds += sum(map(int, fields[11:15]))
            elif fields[1] == str(pid):
                seconds += sum(map(int, fields[11:13]))
    return seconds / os.sysconf("SC_CLK_TCK")
