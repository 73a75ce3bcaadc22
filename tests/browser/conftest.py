"""Starting Chromium takes a second, so the tests of a module share one; each has its own storage, and its own server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.browser import Browser, View
from tests.browser.stub import Stub


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as started:
        yield started


@pytest.fixture
def view(browser: Browser, stub: Stub) -> Iterator[View]:
    with browser.view(stub.base) as opened:
        yield opened
