"""`python -m fuzz.engine TARGET CORPUS [libFuzzer's arguments]`: one target under atheris, in this process, until it is told to stop or
finds something. The only file that knows atheris. Only the daemon's own code is watched for coverage, not the libraries it calls."""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris  # type: ignore[import-untyped]

from fuzz import targets

_QUICK = 0.2  # seconds of processor time
_ADDRESS_SPACE = 4 << 30  # bytes; what would take more gets a MemoryError, as on a full machine


def main() -> None:
    name, corpus, *arguments = sys.argv[1:]
    logging.disable(logging.CRITICAL)  # what a target has to say it says as a finding
    with atheris.instrument_imports(include=["hibernode"]):
        target = targets.load(name)
    seeds = _write(
        target.seeds()
        | {f"regression-{path.name}": path.read_bytes() for path in targets.regressions(name) if _quick(target, path)}
    )
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    atheris.Setup([sys.argv[0], f"-max_len={target.MAX_LENGTH}", *arguments, corpus, seeds], target.one)
    atheris.Fuzz()


def _quick(target: targets.Target, path: Path) -> bool:
    """Whether it is worth being varied a million times; the tests run the others."""
    began = time.process_time()
    target.one(path.read_bytes())
    return time.process_time() - began < _QUICK


def _write(seeds: dict[str, bytes]) -> str:
    """A directory of them, in the temporary directory of whoever started this."""
    directory = Path(tempfile.mkdtemp(prefix="seeds-"))
    for name, data in seeds.items():
        (directory / name).write_bytes(data)
    return str(directory)


if __name__ == "__main__":
    main()
