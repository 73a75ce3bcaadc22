"""Processes that may share GPU memory by NCCL are refused before anything is touched: the driver says no when it is too late."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hibernode.drivers.gpu.nvidia import _insist_no_peers
from hibernode.drivers.workloads import proc
from hibernode.errors import Refused
from hibernode.ports import ProcessFacts

MAPS = """\
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("there", flush=True)
sys.stdin.read()
"""
OFF = {"NCCL_P2P_DISABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_SHM_DISABLE": "1"}


@contextmanager
def processes(library: Path, *envs: dict[str, str]) -> Iterator[list[ProcessFacts]]:
    """One for each environment, with that library in its memory."""
    with ExitStack() as stack:
        facts = []
        for env in envs:
            argv = [sys.executable, "-c", MAPS, str(library)]
            process = stack.enter_context(subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            facts.append(proc.facts(process.pid))
        yield facts


@pytest.fixture
def nccl(tmp_path: Path) -> Path:
    library = tmp_path / "libnccl.so.2"
    library.write_bytes(bytes(4096))
    return library


def test_two_with_nccl_are_refused(nccl: Path) -> None:
    with processes(nccl, {}, OFF) as peers, pytest.raises(Refused) as caught:
        _insist_no_peers(peers)
    assert caught.value.code == "gpu_peers"
    assert caught.value.details["pids"] == [peer.pid for peer in peers]


def test_one_alone_and_those_whose_transports_are_off_are_not(nccl: Path, tmp_path: Path) -> None:
    other = tmp_path / "libother.so"
    other.write_bytes(bytes(4096))
    with processes(nccl, {}) as alone, processes(other, {}, {}) as others, processes(nccl, OFF, OFF) as off:
        _insist_no_peers([*alone, *others])
        _insist_no_peers(off)
