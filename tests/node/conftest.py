"""Real CRIU, as root. Starting a daemon takes a second, so the tests of a module share one, which is emptied after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon import Daemon
from tests.failing import failed, pytest_runtest_makereport  # noqa: F401 - pytest finds the hook here


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running


@pytest.fixture
def daemon(shared_daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon with an empty store and no jobs."""
    at = len(shared_daemon.log)
    yield shared_daemon
    if failed(request):
        print(f"--- the daemon's log of this test:\n{shared_daemon.log[at:]}")
    shared_daemon.empty()
