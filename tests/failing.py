"""Whether a test has failed: for fixtures that print more then. A conftest that imports the hook has it for its folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[misc,assignment]
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report  # type: ignore[return-value]


def failed(request: pytest.FixtureRequest) -> bool:
    """The test of this fixture, so far."""
    return bool(request.node.stash.get(_FAILED, False))
