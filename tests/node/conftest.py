"""Real CRIU, as root. Starting a daemon takes a second, so the tests of a module share one, which is emptied after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon import Daemon

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[misc,assignment]
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report  # type: ignore[return-value]


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running


@pytest.fixture
def daemon(shared_daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon with an empty store and no jobs."""
    at = len(shared_daemon.log)
    yield shared_daemon
    if request.node.stash.get(_FAILED, False):
        print(f"--- the daemon's log of this test:\n{shared_daemon.log[at:]}")
    shared_daemon.empty()
