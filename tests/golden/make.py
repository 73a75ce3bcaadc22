"""Writes `tests/golden/v<n>` and `v<n>-encrypted`: one checkpoint each of the format version this tree writes, and the digests of what
has to come out of it.

    python -m tests.golden.make        from the project's root, with daemon/ on PYTHONPATH

Run once when a format version is released; never again for that version. The memory is scripted (tests/fakes), the format is real:
two address spaces and a shared memory, segments that lie in two frames, zero pages inside a frame and in a frame's place, raw frames
and compressed ones, two streams. The manifest is signed, by a key that nobody has any more: its public half lies beside it.
"""

from __future__ import annotations

import json
import random
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from hibernode.drivers.localdir import LocalDir
from hibernode.model import FORMAT_VERSION, PAGE
from hibernode.transfer.pageproto import SHMEM, TASK
from tests import keys
from tests.fakes.machine import CHILD, ROOT, Run
from tests.flow.rig import Rig
from tests.golden import HERE, SIGNER, WRAPPER, restored


def scripted() -> list[Run]:
    """Three chunks of 1024 pages or less: text with holes of zeros, nothing but zeros, random."""
    text = b"".join(bytes(PAGE) if n % 5 == 0 else n.to_bytes(4, "little") * (PAGE // 4) for n in range(1000))
    return [
        Run(ROOT << 8 | TASK, 0x400000, text[: 300 * PAGE]),
        Run(ROOT << 8 | TASK, 0x900000, None, pages=3),
        Run(77 << 8 | SHMEM, 0, text[300 * PAGE : 301 * PAGE]),
        Run(CHILD << 8 | TASK, 0x400000, text[301 * PAGE :]),
        Run(CHILD << 8 | TASK, 0xA00000, bytes(1050 * PAGE)),
        Run(ROOT << 8 | TASK, 0xB00000, random.Random(7).randbytes(9 * PAGE)),
    ]


def main() -> None:
    for place in (HERE / f"v{FORMAT_VERSION}", HERE / f"v{FORMAT_VERSION}-encrypted"):
        if place.exists():
            sys.stderr.write(f"{place} is there: a released version never changes\n")
        else:
            make(place, encrypted=place.name.endswith("-encrypted"))


def make(place: Path, *, encrypted: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        key, public = keys.pair(Path(directory))
        place.mkdir()
        shutil.copy(public, place / SIGNER)
        encryption = {}
        if encrypted:
            (wrapper := place / WRAPPER).write_text(secrets.token_hex(32) + "\n")
            wrapper.chmod(0o600)
            encryption = {"key": str(wrapper)}
        rig = Rig(Path(directory), scripted(), signing={"key": key}, encryption=encryption)
        store = LocalDir(place)
        rig.store = store  # type: ignore[assignment]
        checkpoint_id = rig.checkpoint(streams=2)
        (place / "golden.json").write_text(
            json.dumps({"checkpoint_id": checkpoint_id, "files": restored(place, checkpoint_id, Path(directory))}, indent=1)
        )
    shutil.rmtree(place / ".uploads", ignore_errors=True)


if __name__ == "__main__":
    main()
