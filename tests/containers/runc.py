"""Containers of plain runc: no containerd, no pod. A bundle over an image's files, a state directory of its own, pipes for its output."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.containers.containerd import PATH, cgroups, found, remove_cgroup, unmount
from tests.containers.images import Image
from tests.keeper import Kept, wait_until
from tests.node.workload import Beat, beats

LIMIT = 20.0  # seconds for runc, or a program, to do what takes it a fraction of one


class RuncContainer(contextlib.AbstractContextManager["RuncContainer"]):
    """`with RuncContainer(directory, image, argv) as container:` runs it, detached; after the `with` it is gone.

    `directory` gets the bundle and runc's state (`root`): not on an overlay, since the bundle is one. Its network has a loopback, unless it
    has the machine's (`host_network`). `annotations` go into its config.json. It is restored into the same bundle, by `restore`. Where
    `user` is not root, it has a user namespace in which everybody is who he is outside. `program`, and `env` for it beside PATH: a runtime
    in front of runc.
    """

    def __init__(
        self,
        directory: Path,
        image: Image,
        argv: Sequence[str] = (),
        *,
        annotations: Mapping[str, str] | None = None,
        host_network: bool = False,
        user: int = 0,
        program: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.id = f"hn-{uuid.uuid4().hex[:12]}"
        self.root, self.bundle = directory / "runc", directory / "bundle"
        self.upper = directory / "upper"  # the writable layer
        self.cgroup = f"/hibernode-test-{self.id}"
        self.lines: list[str] = []  # what it has said since it was started or restored
        self._directory, self._runc, self._env = directory, program or found("runc"), {"PATH": PATH, **(env or {})}
        self._pipe: threading.Thread | None = None
        self._kept: list[Kept] = []
        self._make_bundle(image, argv or image.command, annotations or {}, host_network, user)

    # --- life -----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.run()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            print("--- output of the container:", *self.lines[-20:], sep="\n", file=sys.stderr)
        left = self._remove()
        if error is None:
            assert not left, left

    def run(self) -> None:
        """In two steps, as a container runtime does it."""
        self._detached("create", "--bundle", str(self.bundle), self.id)
        self.runc("start", self.id)

    def checkpoint(self, images: Path, *flags: str) -> None:
        """By runc itself: CRIU's images go into the directory `images`. It runs on if a flag says so."""
        self.runc("checkpoint", "--image-path", str(images), "--work-path", str(self._work()), *flags, self.id)

    def restore(self, images: Path, *flags: str) -> None:
        """By runc itself, into the same bundle, once the container is deleted."""
        places = ["--bundle", str(self.bundle), "--image-path", str(images), "--work-path", str(self._work())]
        self._detached("restore", "--detach", *places, *flags, self.id)

    def kill(self) -> None:
        """All its processes; runc knows it no more, the bundle with its writable layer stays."""
        self.runc("delete", "--force", self.id)

    def _remove(self) -> list[str]:
        """By force; what was there that `runc delete` should have removed."""
        with contextlib.suppress(subprocess.CalledProcessError):
            self.kill()
        left = [f"a cgroup: {place}" for place in cgroups(self.cgroup)]
        for kept in self._kept:
            left += [f"a process: {pid}" for pid in kept.left()]
            kept.kill()
        if self._pipe is not None:
            self._pipe.join(LIMIT)
        unmount(self._directory)
        remove_cgroup(self.cgroup)
        return left

    # --- asking ---------------------------------------------------------------------------------------------------------------

    def runc(self, *words: str) -> str:
        """What `runc WORDS` says; it must succeed."""
        done = subprocess.run(self._words(*words), env=self._env, capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode:
            print(f"runc {' '.join(words)}: {done.stderr}{self._criu_logs()}", file=sys.stderr)
            done.check_returncode()
        return done.stdout

    @property
    def state(self) -> dict[str, Any]:
        """As runc tells it: `status` is created, running, paused or stopped; `pid`, `bundle`, ..."""
        told: dict[str, Any] = json.loads(self.runc("state", self.id))
        return told

    @property
    def pid(self) -> int:
        return int(self.state["pid"])

    def exec(self, *argv: str) -> str:
        return self.runc("exec", self.id, *argv)

    def beat(self) -> Beat:
        """The counter's last one; waits for the first."""
        wait_until(lambda: beats(self.lines), LIMIT, f"a beat of {self.id}")
        return beats(self.lines)[-1]

    def next_beat(self, after: Beat) -> Beat:
        """Two beats after `after`, so that one of them was begun after it."""
        wait_until(lambda: self.beat().counter > after.counter + 1, LIMIT, f"a beat of {self.id} after {after}")
        return self.beat()

    # --- inside ---------------------------------------------------------------------------------------------------------------

    def _words(self, *words: str) -> list[str]:
        return [str(self._runc), "--root", str(self.root), *words]

    def _work(self) -> Path:
        """Where CRIU has its logs."""
        work = self._directory / "criu"
        work.mkdir(exist_ok=True)
        return work

    def _criu_logs(self) -> str:
        logs = sorted(self._directory.glob("criu/*.log"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def _detached(self, *words: str) -> None:
        """runc leaves the container to whoever adopts it. Its output is a pipe, which CRIU can hand over: of a file it asks to see the path
        from inside."""
        if self._pipe is not None:
            self._pipe.join(LIMIT)
        self.lines = lines = []
        reading, writing = os.pipe()
        log = self._directory / "runc.log"
        try:
            # a descriptor of its own, since the keeper's outputs are the log
            argv = ["sh", "-c", f'exec "$@" </dev/null >/proc/{os.getpid()}/fd/{writing} 2>&1', "sh", *self._words(*words)]
            kept = Kept(argv, log, env=self._env)
            self._kept.append(kept)
            code = kept.exit_code(LIMIT)
        finally:
            os.close(writing)
        self._pipe = threading.Thread(target=_read_lines, args=(reading, lines), daemon=True)
        self._pipe.start()
        if code:
            self._pipe.join(LIMIT)
            raise AssertionError(f"runc {words[0]}: {code}\n{lines}{self._criu_logs()}")

    def _make_bundle(
        self, image: Image, argv: Sequence[str], annotations: Mapping[str, str], host_network: bool, user: int
    ) -> None:
        rootfs, work = self.bundle / "rootfs", self._directory / "overlay-work"
        for place in (rootfs, self.upper, work):
            place.mkdir(parents=True)
        layers = f"lowerdir={image.rootfs},upperdir={self.upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, rootfs], check=True)
        self.runc("spec", "--bundle", str(self.bundle))
        config = self.bundle / "config.json"
        spec = json.loads(config.read_text())
        spec["process"].update(terminal=False, args=list(argv))
        spec["root"]["readonly"] = False
        spec["annotations"] = dict(annotations)
        spec["linux"]["cgroupsPath"] = self.cgroup
        if host_network:
            spec["linux"]["namespaces"] = [space for space in spec["linux"]["namespaces"] if space["type"] != "network"]
        if user:
            spec["process"]["user"] = {"uid": user, "gid": user}
            spec["linux"]["namespaces"].append({"type": "user"})
            same = [{"containerID": 0, "hostID": 0, "size": 1 << 16}]
            spec["linux"].update(uidMappings=same, gidMappings=same)
        config.write_text(json.dumps(spec))


def _read_lines(pipe: int, lines: list[str]) -> None:
    with open(pipe, errors="replace") as stream:
        lines.extend(line.rstrip("\n") for line in stream)
