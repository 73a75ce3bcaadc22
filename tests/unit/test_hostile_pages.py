"""An index that names very many address spaces takes no more than its share of the daemon's descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hibernode.errors import NoRoom
from hibernode.transfer.format import SEGMENT
from hibernode.transfer.pagemap import PageFiles
from hibernode.transfer.pageproto import PRESENT, TASK

MOST = 64


@pytest.fixture
def _few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = 1 + max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(2 * MOST, 2 * used), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def spaces(count: int) -> np.ndarray:  # type: ignore[type-arg]
    segments = np.zeros(count, SEGMENT)
    segments["dst_id"], segments["pages"], segments["flags"] = np.arange(1, count + 1) << 8 | TASK, 1, PRESENT
    return segments


@pytest.mark.usefixtures("_few_descriptors")
def test_half_of_the_descriptors_stay_free(tmp_path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NoRoom, match="address spaces") as raised:
        PageFiles(tmp_path, spaces(most + 1))
    assert "LimitNOFILE" in raised.value.hint
    assert not os.listdir(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_many_address_spaces_that_fit_are_laid_out(tmp_path: Path) -> None:
    with PageFiles(tmp_path, spaces(MOST)):
        assert len(os.listdir(tmp_path)) == 2 * MOST
