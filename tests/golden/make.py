"""Writes `tests/golden/v<n>`, `v<n>-encrypted`, `v<n>-layer` and `v<n>-lz4`: one checkpoint each of the newest format version, and the
digests of what has to come out of it.

    python -m tests.golden.make        from the project's root, with daemon/ on PYTHONPATH; as root

Run once when a format version is released; never again for that version. The memory is scripted (tests/fakes), the format is real:
two address spaces and a shared memory, segments that lie in two frames, zero pages inside a frame and in a frame's place, raw frames
and compressed ones, two streams; from version 2 on frames in planes of both widths. From version 3 on it is the third checkpoint of a
chain, with pages in both others, and its memory has moved between them; no layer refers to others, so there is none of version 3. The layer
has entries of each kind. The manifest is signed, by a key that nobody has any more: its public half lies beside it.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from hibernode import catalog
from hibernode.config import Signing
from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.notary import Notary
from hibernode.model import FORMAT_VERSION, FRAME_PAGES, PAGE, Cancel, HostFacts, Manifest, WorkloadFacts
from hibernode.transfer import format, planes
from hibernode.transfer.pageproto import SHMEM, TASK
from hibernode.transfer.seal import Seal
from tests import keys
from tests.fakes.machine import CHILD, ROOT, Run
from tests.flow.rig import Rig, new_id
from tests.golden import HERE, SIGNER, WRAPPER, restored
from tests.layers import sent

KINDS = ("", "-encrypted", "-lz4")  # of version 3; one that all frames may have takes "-layer", too, as 1 and 2 did


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


def floats(width: int, size: int = planes.SMALLEST) -> bytes:
    """Weights as bfloat16 or float32; so many bytes, or as few as are looked at."""
    words = (np.random.default_rng(width).standard_normal(size // width) * 0.02).astype("<f4")
    return (words.view("<u4") >> 16).astype("<u2").tobytes() if width == 2 else words.tobytes()


def with_floats() -> list[Run]:
    """`scripted`, filled up with zeros to whole chunks, then a chunk of floats of each width."""
    runs = scripted()
    fill = bytes(-sum(run.count for run in runs if run.content is not None) % FRAME_PAGES * PAGE)
    room = bytes(FRAME_PAGES * PAGE - planes.SMALLEST)
    return [*runs, Run(ROOT << 8 | TASK, 0x4000000, fill + floats(2) + room), Run(CHILD << 8 | TASK, 0x4000000, floats(4) + room)]


def later(runs: list[Run], seed: int) -> list[Run]:
    """The same memory some time after: a mapping before all others is new, so that every page has another number, and of the rest one page
    of twenty has changed."""
    chance = random.Random(seed)

    def page(content: bytes, at: int) -> bytes:
        return content[at : at + PAGE] if chance.random() > 0.05 else chance.randbytes(64) * (PAGE // 64)

    kept = [
        run if run.content is None
        else replace(run, content=b"".join(page(run.content, at) for at in range(0, len(run.content), PAGE)))
        for run in runs
    ]  # fmt: skip
    return [Run(ROOT << 8 | TASK, 0x10000 * seed, chance.randbytes(seed * PAGE)), *kept]


def main() -> None:
    for kind in KINDS:
        place = HERE / f"v{FORMAT_VERSION}{kind}"
        if place.exists():
            sys.stderr.write(f"{place} is there: a released version never changes\n")
        elif kind == "-layer":
            make_layer(place)
        else:
            make(place, encrypted=kind == "-encrypted", compression="lz4" if kind == "-lz4" else "zstd")


def make(place: Path, *, encrypted: bool, compression: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        key, public = keys.pair(Path(directory))
        place.mkdir()
        shutil.copy(public, place / SIGNER)
        encryption = {}
        if encrypted:
            (wrapper := place / WRAPPER).write_text(secrets.token_hex(32) + "\n")
            wrapper.chmod(0o600)
            encryption = {"key": str(wrapper)}
        rig = Rig(Path(directory), with_floats(), signing={"key": key}, encryption=encryption)
        store = LocalDir(place)
        rig.store = store  # type: ignore[assignment]
        if place.name.endswith("-lz4"):
            return _complete(place, rig.checkpoint(streams=2, compression=compression), Path(directory))
        checkpoint_id = rig.checkpoint(streams=2, criu_opts=json.dumps({"increment": "auto"}))
        for seed in (3, 5):
            rig.machine.runs = later(rig.machine.runs, seed)
            checkpoint_id = rig.checkpoint(streams=2, criu_opts=json.dumps({"increment": checkpoint_id}))
        return _complete(place, checkpoint_id, Path(directory))


def make_layer(place: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        key, public = keys.pair(Path(directory))
        place.mkdir()
        shutil.copy(public, place / SIGNER)
        store, checkpoint_id = LocalDir(place), new_id()
        layer = sent(_upper(Path(directory) / "upper"), store, streams=2, seal=Seal(checkpoint_id))
        manifest = Manifest(
            format_version=format.version_of([layer]), checkpoint_id=checkpoint_id, action_id=new_id(), created_at=1764000000.0,
            node="golden", kind="rootfsonly", reason="manual", workload=WorkloadFacts(kind="job", name="golden"),
            host=HostFacts(arch="x86_64", kernel="6", page_size=PAGE, criu_version=0),
            compression="zstd", pause_ns=0, raw_bytes=layer.pages * PAGE, zero_bytes=layer.zero_pages * PAGE,
            stored_bytes=sum(stream.size for stream in layer.streams), images=[], layers=[layer],
        )  # fmt: skip
        catalog.commit(store, manifest, Notary(Signing(key=key)), Cancel())
        _complete(place, checkpoint_id, Path(directory))


def _upper(root: Path) -> Path:
    """An upper directory: files of several frames, holes, names, attributes, what is deleted and what is hidden."""
    (root / "d/opaque").mkdir(parents=True)
    os.setxattr(root / "d/opaque", "trusted.overlay.opaque", b"y")
    (root / "d/opaque/text").write_bytes(b"".join(b"line %d\n" % n for n in range(1000)))
    (root / "d/noise").write_bytes(random.Random(7).randbytes(9 * PAGE + 5))
    (root / "d/zeros").write_bytes(bytes(1100 * PAGE))
    (root / "d/numbers").write_bytes(
        b"".join(n.to_bytes(4, "little") * (PAGE // 4) if n % 40 == 7 else bytes(PAGE) for n in range(1500))
    )
    (root / "d/weights").write_bytes(bytes(FRAME_PAGES * PAGE) + floats(2, 17 * PAGE) + bytes(FRAME_PAGES * PAGE))
    with open(root / "sparse", "wb") as file:
        os.pwrite(file.fileno(), b"data", 5 << 20)
        file.truncate(7 << 30)
    os.link(root / "d/noise", root / "e-link")
    (root / ("n" * 200)).symlink_to("t" * 150)
    (root / os.fsdecode(b"\xff\n")).write_bytes(b"")
    os.setxattr(root / "d/noise", "user.a=%", b"\0\n")
    os.chown(root / "d/noise", 1000, 4_000_000_000)
    (root / "d/noise").chmod(0o6755)
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    os.mknod(root / "socket", 0o140700)
    os.mknod(root / "whiteout", 0o20000, 0)
    for path in (*root.rglob("*"), root):
        os.utime(path, ns=(0, 1764000000123456789), follow_symlinks=False)
    os.utime(root / "fifo", ns=(0, -1))
    return root


def _complete(place: Path, checkpoint_id: str, directory: Path) -> None:
    told = {"checkpoint_id": checkpoint_id, "files": restored(place, checkpoint_id, directory)}
    (place / "golden.json").write_text(json.dumps(told, indent=1))
    shutil.rmtree(place / ".uploads", ignore_errors=True)


if __name__ == "__main__":
    main()
