"""`Cuda` in a process of its own, since a process has one libcuda for good: JSON lines in, JSON lines out, each call in its own thread.

-> {"id": 1, "do": "lock", "args": [4711, 500]}
<- {"id": 1, "value": null, "error": null, "ms": 3.1, "ticks": 0}

`ticks`: how often another thread came to run during the call, every 2 ms if nobody keeps it from it. The first line tells how `open` went.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hibernode.drivers.gpu.cuda import Cuda, CudaError, Unusable

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 20.0  # seconds for a call that is not meant to wait


@dataclass(frozen=True)
class Answer:
    value: Any
    error: dict[str, Any] | None
    ms: float
    ticks: int

    def insist(self) -> Any:
        """The value, or the exception that the call raised there."""
        if self.error is None:
            return self.value
        match self.error:
            case {"kind": "CudaError", "call": call, "code": code, "name": name}:
                raise CudaError(call, code, name)
            case {"kind": "Unusable", "code": code, "text": text, "found": found, "wanted": wanted}:
                raise Unusable(code, text, found=found, wanted=wanted)
            case {"kind": "ValueError", "text": text}:
                raise ValueError(text)
        raise AssertionError(f"the controller: {self.error}")


class Controller:
    """The near side. Raises what `Cuda.open` raises there. `env` is added to this process's; `path` comes before everything else that
    Python looks for modules in."""

    def __init__(self, library: str = "", *, env: Mapping[str, str] | None = None, path: str = "") -> None:
        known = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (path, f"{ROOT}/daemon", str(ROOT), os.environ.get("PYTHONPATH"))))
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, library], env=known | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._waiting: dict[int, Future[Answer]] = {0: (opened := Future())}
        self._last, self._lock = 0, threading.Lock()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.version, self.can_remap = opened.result(LIMIT).insist()
        except BaseException:
            self.close()
            raise

    def start(self, do: str, *args: object) -> Future[Answer]:
        with self._lock:
            self._last += 1
            self._waiting[self._last] = future = Future[Answer]()
            assert self._process.stdin
            self._process.stdin.write(json.dumps({"id": self._last, "do": do, "args": args}) + "\n")
            self._process.stdin.flush()
        return future

    def ask(self, do: str, *args: object) -> Answer:
        return self.start(do, *args).result(LIMIT)

    def __call__(self, do: str, *args: object) -> Any:
        return self.ask(do, *args).insist()

    def close(self) -> None:
        """End it, whatever hangs there."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            told = json.loads(line)
            self._waiting.pop(told.pop("id")).set_result(Answer(**told))
        for future in self._waiting.values():
            future.set_exception(EOFError("the controller has ended"))


class _Far:
    """The far side."""

    def __init__(self) -> None:
        self._ticks, self._lock = 0, threading.Lock()
        threading.Thread(target=self._tick, daemon=True).start()

    def run(self, library: str) -> None:
        opened: list[Cuda] = []

        def open_it() -> tuple[int, bool]:
            opened.append(Cuda.open(library))
            return opened[0].version, opened[0].can_remap

        self._answer(0, open_it)
        for line in sys.stdin:
            told = json.loads(line)
            call = getattr(opened[0], told["do"])
            args = [told["id"], call, *told["args"]]
            threading.Thread(target=self._answer, args=args, daemon=True).start()

    def _tick(self) -> None:
        while True:
            time.sleep(0.002)
            self._ticks += 1

    def _answer(self, number: int, call: Any, *args: Any) -> None:
        value = error = None
        ticks, began = self._ticks, time.monotonic()
        try:
            value = call(*args)
        except Exception as e:
            error = {"kind": type(e).__name__, "text": str(e), **vars(e)}
        took, ticks = time.monotonic() - began, self._ticks - ticks
        with self._lock:
            print(json.dumps({"id": number, "value": value, "error": error, "ms": took * 1e3, "ticks": ticks}), flush=True)


if __name__ == "__main__":
    _Far().run(sys.argv[1])
    os._exit(0)  # also past a call that hangs
