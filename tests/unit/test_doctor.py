"""What doctor says of GPUs: that there is none is well, that nobody knows is not, and what stands against a checkpoint has a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from hibernode import doctor
from hibernode.model import Check, Gpu, GpuInventory
from tests.fakes.machine import GPUS
from tests.flow.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def checks(rig: Rig, found: GpuInventory) -> list[Check]:
    rig.machine.gpus = found
    told = [check for check in doctor.checks(rig.node, bus_connected=None) if check.name.startswith("GPU")]
    assert not any(check.required for check in told)  # a node without GPUs does its work
    assert all(bool(check.hint) != check.ok for check in told)
    return told


def test_gpus_are_listed(rig: Rig) -> None:
    assert [(check.name, check.ok, check.found) for check in checks(rig, GPUS)] == [
        ("GPU driver", True, "580.65.06, CUDA 13.0"),
        ("GPUs", True, "2 × NVIDIA H100, 1024 of 163840 MiB used, 1 process"),
        ("GPU condition", True, "nothing against them"),
    ]


def test_no_driver_is_well(rig: Rig) -> None:
    (driver,) = checks(rig, GpuInventory(state="absent", reason="no NVIDIA driver"))
    assert (driver.ok, driver.found) == (True, "no NVIDIA driver")


def test_no_gpu_is_well(rig: Rig) -> None:
    driver, gpus, _ = checks(rig, GpuInventory(state="ok", reason="", driver="580.65.06", cuda="13.0"))
    assert (driver.ok, gpus.ok, gpus.found) == (True, True, "none")


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        ("bindings", "hibernode[gpu]"),
        ("library", "`gpu.nvml`"),
        ("mismatch", "restart this daemon"),
        ("unloaded", "modprobe nvidia"),
        ("silent", "xid"),
        ("failed", "nvidia-smi"),
        ("of a newer version", "nvidia-smi"),
    ],
)
def test_what_keeps_nvml_from_answering_has_a_remedy(rig: Rig, state: str, hint: str) -> None:
    why = GPUS.model_copy(update={"state": state, "reason": "so it is", "cuda": ""})
    driver, gpus = checks(rig, why)
    assert (driver.ok, driver.found) == (False, "580.65.06; so it is")
    assert hint in driver.hint
    assert not gpus.ok


@pytest.mark.parametrize(
    ("facts", "found", "hint"),
    [
        ({"mig": True}, "MIG is on", "-mig 0"),
        ({"mps_processes": 1}, "MPS", "nvidia-cuda-mps-control"),
        ({"compute_mode": "prohibited"}, "prohibited", "-c DEFAULT"),
        ({"persistence": False}, "persistence is off", "nvidia-persistenced"),
        ({"ecc_uncorrected": 3}, "uncorrected memory errors", "-d ECC"),
        ({"rows_pending": True}, "wait to be remapped", "nvidia-smi -r"),
        ({"rows_failed": True}, "could not be remapped", "replaced"),
    ],
)
def test_what_stands_against_a_checkpoint_has_a_remedy(rig: Rig, facts: dict[str, object], found: str, hint: str) -> None:
    one, other = GPUS.gpus
    _, _, condition = checks(rig, GPUS.model_copy(update={"gpus": [one, other.model_copy(update=facts)]}))
    assert condition.found.startswith("1: ")
    assert found in condition.found
    assert hint in condition.hint
    _, _, both = checks(rig, GPUS.model_copy(update={"gpus": [gpu.model_copy(update=facts) for gpu in (one, other)]}))
    assert both.found == condition.found.replace("1: ", "0, 1: ")


def test_what_a_gpu_does_not_tell_is_said_and_is_no_fault(rig: Rig) -> None:
    told = checks(
        rig,
        GpuInventory(state="ok", reason="", driver="440.1", gpus=[Gpu(index=0, name="A", unknown={"mig": "Function Not Found"})]),
    )
    assert [(check.ok, check.found) for check in told] == [
        (True, "440.1"),
        (True, "1 × A, not told: mig"),
        (True, "nothing against them"),
    ]


def test_a_node_without_containers_does_its_work(rig: Rig) -> None:
    told = {check.name: check for check in doctor.checks(rig.node, bus_connected=None)}
    runtime, runc, freezer = (told[name] for name in ("container runtime", "runc", "cgroup freezer"))
    assert (runtime.ok, runtime.found) == (True, "containerd 1.6.20")
    assert (runc.ok, runc.found) == (False, "no runc that could be run")
    assert "`containers.runc`" in runc.hint
    assert not any(check.required for check in (runtime, runc, freezer))
    assert bool(freezer.hint) != freezer.ok


@pytest.mark.parametrize("why", ["", "no userfaultfd"])
def test_whether_the_filler_works_here(rig: Rig, why: str) -> None:
    rig.criu.unable = why
    (found,) = [check for check in doctor.checks(rig.node, bus_connected=None) if check.name == "filler"]
    assert (found.ok, found.required) == (not why, False)
    assert ("by files" in found.hint, why in found.found) == (bool(why), True)
