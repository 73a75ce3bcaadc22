"""Where a peer's objects lie, a directory or an S3 server, and the words of a shell that bring them there and back."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.held import LIMIT
from tests.daemon import ROOT
from tests.servers import S3Server, beside_python

_CRIU = ROOT / ".criu" / "bin"  # where scripts/setup puts it
STORES = ("directory", "S3")


@dataclass(frozen=True)
class Stores:
    disk: Path
    server: S3Server

    def put(self, store: str, name: str, packed: Path) -> str:
        """Takes the object from a pipe. To S3 by a file: `rclone rcat`, straight from the pipe, took twice as long."""
        if store == "directory":
            return f"| {self._written(name)}"
        return f">{packed} && {self.upload(store, name, packed)}"

    def upload(self, store: str, name: str, file: Path) -> str:
        """Takes it from a file."""
        if store == "directory":
            return f"{self._written(name)} if={file}"
        return f"{beside_python('rclone')} copyto {file} peer:{self.server.bucket}/{name}"

    def stream(self, store: str, name: str) -> str:
        """Takes the object from a pipe, and begins before it has all of it."""
        if store == "directory":
            return f"| {self._written(name)}"
        return f"| {beside_python('rclone')} rcat peer:{self.server.bucket}/{name}"

    def get(self, store: str, name: str) -> str:
        if store == "directory":
            return f"cat {self.disk}/{name}"
        return f"{beside_python('rclone')} cat peer:{self.server.bucket}/{name}"

    def _written(self, name: str) -> str:
        return f"dd of={self.disk}/{name} bs=4M iflag=fullblock conv=fsync status=none"

    def place(self, store: str, name: str) -> Path:
        """Where it is on this machine. MinIO makes a directory of an object."""
        return self.server.root / self.server.bucket / name if store == "S3" else self.disk / name

    def size(self, store: str, name: str) -> int:
        place = self.place(store, name)
        place.stat()  # that it is there
        return sum(path.stat().st_size for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file())

    def remove(self, store: str, name: str) -> None:
        place = self.place(store, name)
        if place.is_file():
            place.unlink()
        else:
            shutil.rmtree(place)

    def shell(self, line: str) -> None:
        self.run(words(line))

    def run(self, argv: Sequence[str]) -> None:
        """Until its end, which must be a good one."""
        done = subprocess.run(
            argv, env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def environment(self) -> Mapping[str, str]:
        rclone = {
            "TYPE": "s3", "PROVIDER": self.server.name.capitalize(), "ENDPOINT": self.server.endpoint_url,
            "ACCESS_KEY_ID": self.server.access_key_id,
            "SECRET_ACCESS_KEY": self.server.secret_access_key, "NO_CHECK_BUCKET": "true", "CHUNK_SIZE": "8Mi",
        }  # fmt: skip
        path = os.pathsep.join([str(_CRIU), os.environ.get("PATH", os.defpath)])
        said = {"RCLONE_CONFIG": "", "RCLONE_LOG_LEVEL": "ERROR"}
        return {"PATH": path, **said, **{f"RCLONE_CONFIG_PEER_{name}": value for name, value in rclone.items()}}


def words(line: str) -> list[str]:
    return ["bash", "-c", f"set -o pipefail; {line}"]
