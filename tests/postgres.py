"""A real PostgreSQL for tests: own directory, own port, stopped and started at will. Runs as another user: it refuses root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.nats_server import free_port

READY = 30.0  # seconds a server may take to be ready; it takes less than one on an idle machine
USER = "hibernode"


class PostgresServer:
    """`with PostgresServer() as server:` gives a server; `server.database(name)` makes a database in it and gives its address. `durable`:
    whether a commit waits for the disk, as it must where power can fail; else it waits for the kernel. `under`: where its files are."""

    def __init__(self, *, durable: bool = False, under: str | None = None) -> None:
        self._durable, self.port = durable, free_port()
        self._home = Path(tempfile.mkdtemp(prefix="hn-pg-", dir=under))
        self._process: subprocess.Popen[bytes] | None = None
        self._password = "only-for-tests"
        who = pwd.getpwnam("postgres")
        self._as = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
        os.chown(self._home, who.pw_uid, who.pw_gid)

    @property
    def log(self) -> str:
        path = self._home / "log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    @property
    def pid(self) -> int:
        """While it runs; its other processes are children of this one."""
        assert self._process is not None
        return self._process.pid

    def database(self, name: str) -> str:
        """A new, empty one."""
        self._psql("postgres", f'CREATE DATABASE "{name}"')
        return f"postgresql://{USER}:{self._password}@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        """Returns when it takes connections."""
        data = self._home / "data"
        if not data.exists():
            self._initialize(data)
        settings = {"unix_socket_directories": "", "fsync": "on" if self._durable else "off"}
        argv = [str(_program("postgres")), "-D", str(data), "-h", "127.0.0.1", "-p", str(self.port)]
        argv += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with open(self._home / "log", "ab") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._home, **self._as)
        deadline = time.monotonic() + READY
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"postgres did not start:\n{self.log}")
            time.sleep(0.05)

    def _initialize(self, data: Path) -> None:
        secret = self._home / "password"
        secret.write_text(self._password)
        argv = [str(_program("initdb")), "-D", str(data), "-U", USER, "--pwfile", str(secret), "--auth", "scram-sha-256"]
        argv += ["--encoding", "UTF8", "--locale", "C", *([] if self._durable else ["--no-sync"])]
        found = subprocess.run(argv, capture_output=True, text=True, cwd=self._home, check=False, **self._as)
        if found.returncode:
            raise RuntimeError(f"initdb failed:\n{found.stdout}{found.stderr}")

    def _answers(self) -> bool:
        return self._psql("postgres", "SELECT 1", check=False).returncode == 0

    def _psql(self, database: str, statement: str, *, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        argv = [str(_program("psql")), "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-d", database, "-Xqc", statement]
        return subprocess.run(
            argv, env={"PGPASSWORD": self._password, "PGCONNECT_TIMEOUT": "5"}, capture_output=True, check=check
        )

    def stop(self, *, kill: bool = False) -> None:
        """End it, connections and all; as a crash would with `kill`. Harmless when repeated."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT if kill else signal.SIGINT)  # PostgreSQL's own words for: at once, and fast
            process.wait(30)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        shutil.rmtree(self._home, ignore_errors=True)


def _program(name: str) -> Path:
    """Debian keeps each version's programs in a folder of its own, off PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise RuntimeError(f"no {name}; hint: scripts/debian-packages postgresql")
    return found[-1]
