"""Real CRIU, as root."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon import Daemon


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running
