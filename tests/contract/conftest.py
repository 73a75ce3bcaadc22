"""Servers that several suites share: started once, stopped at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server
