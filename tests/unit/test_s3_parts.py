"""How an object of any size fits into 10,000 parts."""

from __future__ import annotations

import pytest

from hibernode.drivers.s3 import MAX_PART, MAX_PARTS, part_size
from hibernode.errors import NoRoom

MIB = 1 << 20
TIB = 1 << 40
BASES = [5 * MIB, 8 * MIB, 64 * MIB, MAX_PART]


@pytest.mark.parametrize("base", BASES)
def test_ten_thousand_parts_hold_what_s3_allows(base: int) -> None:
    assert sum(part_size(n, base) for n in range(1, MAX_PARTS + 1)) >= 5 * TIB


@pytest.mark.parametrize("base", BASES)
def test_parts_grow_never_shrink_and_stay_within_the_limits(base: int) -> None:
    sizes = [part_size(n, base) for n in range(1, MAX_PARTS + 1)]
    assert sizes == sorted(sizes)
    assert sizes[:1000] == [base] * 1000
    assert sizes[-1] <= min(MAX_PART, base + 1200 * MIB)


def test_there_is_no_part_after_the_last() -> None:
    with pytest.raises(NoRoom):
        part_size(MAX_PARTS + 1, 8 * MIB)
