"""A command can only name stores under those of the configuration, whatever it writes into a URL."""

from __future__ import annotations

import pytest

from hibernode.config import Config
from hibernode.errors import Refused
from hibernode.service import store_opener

SETTINGS = Config.model_validate(
    {
        "store": {
            "url": "file:///srv/store",
            "allowed": ["s3://bucket/pre/fix", "s3://whole", "file:///mnt/more/"],
            "s3": {"region": "us-east-1", "access_key_id": "a", "secret_access_key": "b", "endpoint_url": "http://127.0.0.1:9"},
        }
    }
)


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("", "file:///srv/store"),
        ("file:///srv/store", "file:///srv/store"),
        ("file:///srv/store/", "file:///srv/store"),
        ("file:///srv/store/team a/x-1", "file:///srv/store/team a/x-1"),
        ("file:///srv//store///x", "file:///srv/store/x"),
        ("file:///srv/store/..x/y..z", "file:///srv/store/..x/y..z"),
        ("file:///mnt/more", "file:///mnt/more"),
        ("s3://bucket/pre/fix", "s3://bucket/pre/fix"),
        ("s3://bucket/pre/fix/deeper", "s3://bucket/pre/fix/deeper"),
        ("s3://whole", "s3://whole"),
        ("s3://whole/any/thing", "s3://whole/any/thing"),
    ],
)
def test_what_is_allowed_is_opened_where_it_says(url: str, location: str) -> None:
    assert store_opener(SETTINGS)(url).location == location


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "file:///srv",
        "file:///",
        "file:///srv/storehouse",
        "file:///srv/store2/x",
        "file:///SRV/store",
        "file:///srv/store/../../etc",
        "file:///srv/store/..",
        "file:///srv/store/./x",
        "file:///store/../srv/store",
        *(f"file:///srv/store/.{c}./.{c}./etc" for c in "\t\r\n\x00\x0b\x1f\x7f\x85\u2028\u200b\xad\ufeff"),
        *(f"file:///srv/store/x{c}" for c in "\t\r\n \x00\xa0"),
        *(f"{c}file:///srv/store" for c in "\t\r\n \x00\x1f"),
        "file:///srv/store/%2e%2e/%2e%2e/etc",
        "file:///srv/store?/../../etc",
        "file:///srv/store#/../../etc",
        "file:///srv/store/..\\..\\etc",
        "file://localhost/srv/store",
        "file://etc/srv/store",
        "file:/srv/store",
        "file:srv/store",
        "FILE:///srv/store",
        "/srv/store",
        "srv/store",
        "http://srv/store",
        "s3://bucket",
        "s3://bucket/pre",
        "s3://bucket/pre/fixture",
        "s3://bucket/pre/fix/../../other",
        "s3://bucket/pre/fix/.\t./x",
        "s3://other/pre/fix",
        "s3://BUCKET/pre/fix",
        "s3://user@whole",
        "s3://user:password@whole/x",
        "s3://whole:80/x",
        "s3://whole@evil",
        "s3:///whole",
        "s3://",
        "s3://whole?x",
    ],
    ids=ascii,
)
def test_what_is_not_allowed_is_refused(url: str) -> None:
    with pytest.raises(Refused) as refused:
        store_opener(SETTINGS)(url)
    assert refused.value.code == "directory"
    assert refused.value.hint


@pytest.mark.parametrize("setting", [{"url": "relative/path"}, {"url": ""}, {"allowed": ["file:///a/../b"]}, {"allowed": [""]}])
def test_a_configured_store_that_is_none_is_told_at_the_start(setting: dict[str, object]) -> None:
    with pytest.raises(Refused) as refused:
        store_opener(Config.model_validate({"store": setting}))
    assert refused.value.code == "directory"


def test_one_store_is_opened_once() -> None:
    opener = store_opener(SETTINGS)
    assert opener("") is opener("file:///srv/store") is opener("file:///srv//store/")
