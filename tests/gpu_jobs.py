"""Runs `tests/node/programs/cuda_job.py`, and reads what it wrote."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from tests.node.programs import cuda_job

LIMIT = 20.0  # seconds for what takes some hundredths


def until(what: Callable[[], bool], why: str) -> None:
    """Wait for it, and fail after LIMIT."""
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, f"waited {LIMIT} s: {why}"
        time.sleep(0.005)


class Job:
    """A running cuda_job, in a session of its own. `options` are its own, underscores for dashes; True for those without a value."""

    def __init__(
        self,
        out: Path,
        env: Mapping[str, str],
        *,
        mib: int = 8,
        seed: int = 1,
        gpus: str = "0",
        wrap: tuple[str, ...] = (),
        **options: object,
    ) -> None:
        self.out, self._mib, self._seed, self._gpus = out, mib, seed, len(gpus.split(","))
        words = [
            word
            for name, value in {"mib": mib, "seed": seed, "gpus": gpus, **options}.items()
            for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
        ]
        with open(f"{out}.err", "wb") as err:
            self.process = subprocess.Popen(
                [*wrap, sys.executable, cuda_job.__file__, str(out), *words],
                env=os.environ | env, stdin=subprocess.DEVNULL, stdout=err, stderr=err, start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid
        try:
            until(lambda: self.steps() > 0 or self.process.poll() is not None, "the job makes its first step")
            assert self.process.poll() is None, Path(f"{out}.err").read_text()
        except BaseException:
            self.kill()
            raise

    def lines(self) -> list[list[str]]:
        """Of whole lines, their words: step, value, token."""
        text = self.out.read_text() if self.out.exists() else ""
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self) -> int:
        return len(self.lines())

    def goes_on(self, steps: int = 3) -> None:
        """It makes so many more, and all it ever wrote is as if nobody had touched it."""
        aim = self.steps() + steps
        until(lambda: self.steps() >= aim, "the job goes on")
        self.check()

    def check(self) -> None:
        """Numbers without a gap, one token, and the values of a job that nobody touched."""
        lines = self.lines()
        expected = islice(cuda_job.sequence(self._seed, self._mib, self._gpus), len(lines))
        assert [line[:2] for line in lines] == [[str(step), str(value)] for step, value in enumerate(expected, 1)]
        assert len({line[2] for line in lines}) == 1

    def stands_still(self, seconds: float = 0.15) -> None:
        """It makes no step; one takes a hundredth. But the line of its last one may come late: it is written between two calls."""
        time.sleep(0.03)
        before = self.steps()
        time.sleep(seconds)
        if self.steps() == before + 1:
            before += 1
            time.sleep(seconds)
        assert self.steps() == before

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def wait_stopped(self) -> None:
        """After a SIGSTOP: all its threads are."""
        tasks = Path(f"/proc/{self.pid}/task")
        until(
            lambda: {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()} == {"T"}, "it stops"
        )

    def kill(self) -> None:
        """With its whole session. Harmless when repeated."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
