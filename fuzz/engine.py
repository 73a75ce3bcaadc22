"""`python -m fuzz.engine TARGET [libFuzzer's arguments]`: one target under atheris, in this process, until it is told to stop or finds
something. The only file that knows atheris. Only the daemon's own code is watched for coverage, not the libraries it calls."""

from __future__ import annotations

import logging
import resource
import sys

import atheris

from fuzz import targets

_ADDRESS_SPACE = 4 << 30  # bytes; what would take more gets a MemoryError, as on a full machine


def main() -> None:
    name, *arguments = sys.argv[1:]
    logging.disable(logging.CRITICAL)  # what a target has to say it says as a finding
    with atheris.instrument_imports(include=["hibernode"]):
        target = targets.load(name)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    atheris.Setup([sys.argv[0], f"-max_len={target.MAX_LENGTH}", *arguments], target.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
