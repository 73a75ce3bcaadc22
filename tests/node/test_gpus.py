"""A daemon on a machine with GPUs: who asks sees them, and a driver that hangs or goes costs the daemon nothing else. Fake NVML."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests.daemon import ROOT, Daemon
from tests.nats_server import free_port

pytestmark = pytest.mark.node

UUID = "GPU-11111111-0000-4000-8000-000000000001"


def inventory(daemon: Daemon) -> pb.GpuInventory:
    (record,) = daemon.stub.ListNodes(pb.Empty(), timeout=20).nodes
    return record.gpu_inventory


def doctor(daemon: Daemon) -> dict[str, pb.Check]:
    return {check.name: check for check in daemon.stub.Doctor(pb.Empty(), timeout=20).checks}


def test_a_daemon_tells_of_its_gpus_and_outlives_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, root, port = tmp_path / "libnvidia-ml.so.1", tmp_path / "root", free_port()
    source = ROOT / "tests" / "fakes" / "cuda" / "fakenvml.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", str(library), str(source)], check=True)
    (root / "nvml").mkdir(parents=True)
    (root / "devices").write_text(f"{UUID} {80 << 30}\n")
    monkeypatch.setenv("FAKE_CUDA_ROOT", str(root))

    def metrics() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
            return str(page.read().decode())

    settings = {"gpu": {"nvml": str(library)}}
    with Daemon(tmp_path / "home", metrics=f"127.0.0.1:{port}", settings=settings) as daemon:
        found = inventory(daemon)
        assert (found.state, found.driver, [gpu.uuid for gpu in found.gpus]) == ("ok", "580.159.04", [UUID])
        assert doctor(daemon)["GPUs"].found == "1 × Fake GPU, 0 of 81920 MiB used, 0 processes"
        assert f'hibernode_gpu_memory_bytes{{gpu="0",name="Fake GPU",uuid="{UUID}"}} 8.58993459' in metrics()
        (root / "nvml" / "errors").write_text("nvmlDeviceGetName hang\n")
        assert inventory(daemon).state == "silent"
        began = time.monotonic()
        assert not doctor(daemon)["GPU driver"].ok
        assert 'hibernode_gpu_inventory{state="silent"} 1.0' in metrics()
        assert [gpu.uuid for gpu in inventory(daemon).gpus] == [UUID]
        assert time.monotonic() - began < 2  # the patience of one question: nobody waits for it a second time
        (root / "devices").unlink()  # the driver goes, and the call comes back
        (root / "nvml" / "errors").write_text("nvmlDeviceGetName 9\n")
        deadline = time.monotonic() + 20
        while inventory(daemon).state != "unloaded":
            assert time.monotonic() < deadline
        assert doctor(daemon)["GPU driver"].hint.startswith("modprobe nvidia")


def test_a_machine_without_gpus_is_as_good_as_any(daemon: Daemon) -> None:
    checks = doctor(daemon)
    assert checks["GPU driver"].ok
    absent = checks["GPU driver"].found == "no NVIDIA driver"
    assert inventory(daemon).state == ("absent" if absent else "ok")
