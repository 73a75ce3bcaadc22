"""What pods ask for by annotation, and what is said of those that ask for nonsense."""

from __future__ import annotations

import pytest

from hibernode import wishes
from hibernode.api.schema import HeartbeatPolicy
from hibernode.model import HeartbeatWish

EVERY, KEEP = "hibernode.io/heartbeat", "hibernode.io/heartbeat-keep"


def asked(**annotations: str) -> HeartbeatWish | None:
    given = {{"every": EVERY, "keep": KEEP}[key]: value for key, value in annotations.items()}
    return wishes.heartbeat("ml", "trainer", "u-1", 5.0, {"other": "1", **given})


def test_a_pod_that_says_nothing_of_heartbeats_asks_for_nothing() -> None:
    assert asked() is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("1d2h3m4s", 93784), ("600s", 600), ("366d", 366 * 86400)],
)
def test_an_interval_is_read_as_go_writes_it_and_with_days(text: str, seconds: float) -> None:
    wish = asked(every=text, keep="5")
    assert wish == HeartbeatWish(namespace="ml", name="trainer", uid="u-1", since=5.0, interval=seconds, keep_last=5)
    HeartbeatPolicy(pod_name="trainer", interval=wish.interval, keep_last=wish.keep_last)  # the control plane takes it


def test_three_are_kept_where_a_pod_does_not_say_how_many() -> None:
    wish = asked(every="10m")
    assert wish is not None
    assert (wish.keep_last, wish.problem) == (3, "")


@pytest.mark.parametrize(
    "text",
    ["soon", "", "10", "-10m", "10 m", "1m1h", "9s", "0s", "367d", "1e3s", "١٠m", "10M", "999999999999m", "10m\n", "\x1b[31m"],
)
def test_an_interval_that_makes_no_sense_is_told_and_asks_for_nothing(text: str) -> None:
    wish = asked(every=text)
    assert wish is not None
    assert (wish.interval, wish.keep_last) == (0, 0)
    assert wish.problem.startswith(f"{EVERY} is ")
    assert wish.problem.isprintable()


@pytest.mark.parametrize("text", ["0", "", "-1", "many", "1.5", "10001", "9" * 500])
def test_a_number_to_keep_that_makes_no_sense_is_told(text: str) -> None:
    wish = asked(every="10m", keep=text)
    assert wish is not None
    assert wish.interval == 0
    assert wish.problem.startswith(f"{KEEP} is ")
    assert len(wish.problem) < 200


def test_a_number_to_keep_alone_is_told() -> None:
    wish = asked(keep="3")
    assert wish is not None
    assert wish.problem == f"{KEEP} says nothing without {EVERY}"
