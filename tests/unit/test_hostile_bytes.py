"""The fuzzers' targets in CI: good input with a few bytes changed, cut out or put in, and input of nothing but choices. `scripts/fuzz` does
the same for hours, and looks at which code it reaches."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import targets

pytestmark = pytest.mark.timeout(50)  # the limit of an endless wait

SEEDS = {name: sorted(targets.load(name).seeds().values(), key=len) for name in targets.NAMES}
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

offsets = st.floats(0, 1, exclude_max=True)  # of the length
edits = st.one_of(
    st.tuples(st.just("change"), offsets, st.integers(1, 255)),
    st.tuples(st.just("cut"), offsets, st.integers(1, 40)),
    st.tuples(st.just("put"), offsets, st.binary(min_size=1, max_size=12)),
)


def spoilt(seed: bytes, changes: list[tuple[str, float, int | bytes]]) -> bytes:
    data = bytearray(seed)
    for deed, where, what in changes:
        at = int(where * len(data))
        if isinstance(what, bytes):
            data[at:at] = what
        elif deed == "cut":
            del data[at : at + what]
        elif data:
            data[at] ^= what
    return bytes(data)


@pytest.mark.parametrize("name", targets.NAMES)
@EXAMPLES
@given(data=st.data())
def test_good_input_that_was_spoilt_is_no_finding(name: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SEEDS[name]))
    targets.load(name).one(spoilt(seed, data.draw(st.lists(edits, min_size=1, max_size=6))))


@pytest.mark.parametrize("name", targets.NAMES)
@EXAMPLES
@given(how=st.integers(0, 11), choices=st.binary(max_size=300))
def test_input_made_of_choices_is_no_finding(name: str, how: int, choices: bytes) -> None:
    targets.load(name).one(bytes([how]) + choices)
