"""CRIU's page messages: fixed bytes, both header sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibernode.transfer import pageproto
from hibernode.transfer.pageproto import Header, Wire

headers = st.builds(
    Header, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
)  # fmt: skip


@given(headers, st.sampled_from([40100, 40199, 40200, 40201, 50000]))
def test_a_header_comes_back(header: Header, version: int) -> None:
    wire = Wire(version)
    assert wire.decode(wire.encode(header)) == header
    assert len(wire.encode(header)) == wire.size


@pytest.mark.parametrize(("version", "size"), [(30000, 24), (40100, 24), (40199, 24), (40200, 32), (40201, 32), (50000, 32)])
def test_the_header_grew_with_criu_4_2(version: int, size: int) -> None:
    assert Wire(version).size == size


def test_the_bytes_are_those_of_page_xfer_c() -> None:
    """`struct page_server_iov`: u32 cmd (flags in the upper half), u64 nr_pages (u32 before 4.2), u64 vaddr, u64 dst_id."""
    header = Header(pageproto.ADD_F, pageproto.PRESENT, 0x11, 0x7F0000001000, 4242 << 8 | pageproto.TASK)
    tail = bytes.fromhex("001000000" + "07f0000" + "0192100000000000")
    assert Wire(40201).encode(header) == bytes.fromhex("06000400000000001100000000000000") + tail
    assert Wire(40100).encode(header) == bytes.fromhex("0600040011000000") + tail


def test_the_answers() -> None:
    assert (pageproto.NO_PARENT_IMAGE, pageproto.NO_PARENT, pageproto.CLOSED) == (b"\0", b"\0\0\0\0", b"\0\0\0\0")
