"""The streaming peer: `criu --stream` and criu-image-streamer, which deals an image out to pipes, or puts it together from them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.held import LIMIT
from benchmarks.peer import words


def program() -> str | None:
    """Where it is, if it is in PATH. benchmarks/README.md says how to get it."""
    return shutil.which("criu-image-streamer")


def stream(
    how: Literal["capture", "serve"], images: Path, lines: Sequence[str], env: Mapping[str, str], criu: Callable[[], None]
) -> None:
    """`criu` runs when the streamer is there for it. Each of the shell's `lines` takes a share of the image from its pipe, or gives it.
    Returns when all of them have ended well; none is left in any case."""
    found = program()
    assert found is not None
    with contextlib.ExitStack() as stack:
        running = list[subprocess.Popen[bytes]]()
        stack.callback(_end, running)
        with _ends() as ours:  # the streamer's ends of the pipes: nobody else may hold them, or nobody sees an end
            for line in lines:
                reading, writing = os.pipe()
                mine, other = (writing, reading) if how == "capture" else (reading, writing)
                ours.append(mine)
                with open(other, "rb" if how == "capture" else "wb") as end:
                    given, taken = (end, None) if how == "capture" else (subprocess.DEVNULL, end)
                    running.append(subprocess.Popen(words(line), env=env, stdin=given, stdout=taken))
            told, telling = os.pipe()
            progress = stack.enter_context(open(told))
            argv = [
                found,
                "--images-dir",
                str(images),
                "--shard-fds",
                ",".join(map(str, ours)),
                "--progress-fd",
                str(telling),
                how,
            ]
            ours.append(telling)
            running.append(subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, pass_fds=ours))
        if "socket-init\n" not in iter(progress.readline, ""):
            raise RuntimeError(f"criu-image-streamer is not there for a {how}")
        criu()
        for process in running:
            if code := process.wait(LIMIT):
                raise RuntimeError(f"{process.args!r}: {code}")


@contextlib.contextmanager
def _ends() -> Iterator[list[int]]:
    descriptors = list[int]()
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.kill()
        process.wait()
