"""The fake driver under stock CRIU: a job on a GPU is refused, and lives on; once the driver has taken it off the device it is dumped,
killed, restored, and goes on on another GPU. hibernode has no part in it but the driver's calls."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode.drivers.gpu.cuda import State
from tests.cuda_controller import Controller
from tests.fakes.cuda import CONTEXT, GPU0, GPU1, MIB, FakeGpus
from tests.gpu_jobs import Job
from tests.servers import beside_python

pytestmark = pytest.mark.node


class Place:
    """A machine with two GPUs, a controller on it, one job, and CRIU with no plugins."""

    def __init__(self, root: Path) -> None:
        self.gpus, self.images, self._plugins = FakeGpus(root / "machine"), root / "images", root / "plugins"
        self.images.mkdir()
        self._plugins.mkdir()
        self.call = Controller(str(self.gpus.libcuda), env=self.gpus.env(None))
        self._out = root / "out"
        self.job: Job | None = None

    def start(self, **faults: str) -> Job:
        self.job = Job(self._out, self.gpus.env("0", **faults), mib=16)
        return self.job

    def criu(self, action: str, *args: str) -> str:
        """Its errors; "" if all went well."""
        log = self.images / f"{action}.log"
        done = subprocess.run(
            [beside_python("criu"), action, "-D", str(self.images), "-o", log.name, "-v4", *args],
            env=os.environ | {"CRIU_LIBS_DIR": str(self._plugins)}, stdin=subprocess.DEVNULL, check=False, capture_output=True, timeout=60,
        )  # fmt: skip
        if not done.returncode:
            return ""
        return "\n".join(line for line in log.read_text(errors="replace").splitlines() if "Error" in line) or str(done)

    def close(self) -> None:
        self.call.close()
        if self.job:
            self.job.kill()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


@pytest.mark.parametrize("node", [True, False], ids=["device node", "descriptor"])
def test_criu_refuses_a_job_that_has_the_device_open(place: Place, node: bool) -> None:
    job = place.start(**({"device": str(place.gpus.node())} if node else {}))
    said = place.criu("dump", "-t", str(job.pid), "-R")
    assert "Can't dump file" in said
    assert not node or f"(chr {os.major(place.gpus.node().stat().st_rdev)}:" in said
    job.goes_on()


@pytest.mark.parametrize("pairs", [[], [(GPU0, GPU1), (GPU1, GPU0)]], ids=["same GPU", "another GPU"])
def test_off_the_device_it_is_dumped_and_goes_on_where_it_is_restored(place: Place, pairs: list[tuple[str, str]]) -> None:
    job = place.start(device=str(place.gpus.node()))
    place.call("lock", job.pid, 5000)
    place.call("checkpoint", job.pid)
    assert place.criu("dump", "-t", str(job.pid)) == ""
    assert job.process.wait(10) == -signal.SIGKILL
    assert place.criu("restore", "-d") == ""
    assert place.call("state", job.pid) == State.CHECKPOINTED
    job.stands_still()
    place.call("restore", job.pid, pairs)
    place.call("unlock", job.pid)
    job.goes_on(10)
    assert place.gpus.users(pairs[0][1] if pairs else GPU0) == {str(job.pid): CONTEXT + 16 * MIB + 8}


def test_a_dump_that_leaves_it_running(place: Place) -> None:
    job = place.start()
    for _ in range(2):
        place.call("lock", job.pid, 5000)
        place.call("checkpoint", job.pid)
        assert place.criu("dump", "-t", str(job.pid), "-R") == ""
        place.call("restore", job.pid)
        place.call("unlock", job.pid)
        job.goes_on()
