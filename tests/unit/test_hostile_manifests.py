"""A manifest that is small for its bytes and large for its values is refused before it becomes objects."""

from __future__ import annotations

import pytest

from fuzz.guard import guarded
from fuzz.targets import golden
from fuzz.targets.manifest import sealed
from hibernode.errors import Corrupt
from hibernode.model import MAX_TASKS, Manifest, Signature, TaskFacts
from hibernode.transfer import format

TEN_THREADS = 10


class Anybody:
    """ports.Notary of a node without keys."""

    def sign(self, message: bytes) -> Signature | None:
        return None

    def check(self, message: bytes, signature: Signature | None) -> None:
        return


@pytest.fixture
def manifest() -> Manifest:
    raw = b"{" + golden.manifest().partition(b'"format_version"')[1] + golden.manifest().partition(b'"format_version"')[2]
    return Manifest.model_validate_json(raw)


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0", b'""', b"[0]"])
def test_very_many_values_take_no_room(manifest: Manifest, value: bytes) -> None:
    body = format.encode_manifest(manifest, Anybody()).partition(b"\n")[2].rstrip().removesuffix(b"}")
    count = (24 << 20) // (len(value) + 1)
    raw = sealed(body + b',"x":[' + b",".join([value] * count) + b"]}")
    with guarded(), pytest.raises(Corrupt, match="too large"):
        format.decode_manifest(raw, manifest.checkpoint_id, Anybody())


def test_the_largest_honest_one_is_read(manifest: Manifest) -> None:
    """100,000 tasks of ten threads; a hundredth of them here, and the rest by multiplication."""
    part = MAX_TASKS // 100
    tasks = [TaskFacts(pid=n, ppid=1, comm="python", threads=[1 << 20] * TEN_THREADS) for n in range(1, part + 1)]
    large = manifest.model_copy(update={"images": [manifest.images[0].model_copy(update={"tasks": tasks})]})
    data = format.encode_manifest(large, Anybody())
    assert format.decode_manifest(data, large.checkpoint_id, Anybody()) == large
    assert 100 * sum(data.count(mark) for mark in (b",", b"[", b"{")) <= format._MAX_VALUES
    assert 100 * len(data) <= format.MAX_MANIFEST
