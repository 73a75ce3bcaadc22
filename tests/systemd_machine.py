"""A real systemd as PID 1 of namespaces of its own: boots in half a second, starts only our unit, and is gone with its init.

What of the machine underneath it can change: nothing. `/`, `/dev`, `/sys` and `/proc/sys` are read-only in it, `/run`, `/tmp` and
`/dev/shm` are fresh, `/var/lib` and the directory of the test are the test's, the network is a loopback, and its cgroups are below
one of ours in the cgroup2 hierarchy. It knows no unit but those it was given.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

T = TypeVar("T")

BOOT = 20.0  # seconds until the manager answers; half a second is usual
SYSTEMD = "/lib/systemd/systemd"

ROOT = Path(__file__).resolve().parent.parent

# Runs as PID 1 of the new namespaces and becomes systemd. $1: the directory of the test, $2: systemd, $3: the checkout, which may lie
# under a place that is made fresh here.
_BOOT = r"""
set -e
dir=$1
checkout=$3
exec 3<"$checkout"
mount --bind "$dir" /mnt
while umount /sys/fs/cgroup/* 2>/dev/null; do :; done
umount /sys/fs/cgroup
for place in / /dev /sys; do mount -o remount,bind,ro "$place"; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount --bind /proc/sys/kernel/ns_last_pid /proc/sys/kernel/ns_last_pid
mount -o remount,bind,ro /proc/sys
for place in /run /tmp /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$place"; done
if [ ! -e "$checkout/pyproject.toml" ]; then
    mkdir -p "$checkout"
    mount --no-canonicalize --bind /proc/self/fd/3 "$checkout"
    mount -o remount,bind,ro "$checkout"
fi
exec 3<&-
mkdir -p "$dir"
mount --move /mnt "$dir"
mount --bind "$dir/var-lib" /var/lib
mount --bind /dev/null /dev/console
mount --bind "$dir/kmsg" /dev/kmsg
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test SYSTEMD_UNIT_PATH="$dir/units" \
    SYSTEMD_GENERATOR_PATH=/nonexistent SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/nonexistent \
    "$2" --system --unit=machine.target --log-target=kmsg --log-level=info --show-status=no
"""

_TARGETS = ("machine.target", "sysinit.target", "basic.target", "shutdown.target", "final.target")


def until(condition: Callable[[], T], what: str, seconds: float = 20.0, why: Callable[[], str] = str) -> T:
    """What `condition` returns once it is true; AssertionError with `why` if that takes longer."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}\n{why()}")
        time.sleep(0.02)
    return found


class Machine:
    """`with Machine(directory, units) as machine:`; `units` are the texts of unit files and drop-ins by their relative path."""

    def __init__(self, directory: Path, units: Mapping[str, str]) -> None:
        self._directory = directory
        self._cgroup = _cgroup2() / f"hibernode-test-{uuid.uuid4().hex[:12]}"
        self._process: subprocess.Popen[bytes] | None = None
        self.pid = 0  # of its init, seen from outside
        for place in ("units", "var-lib"):
            (directory / place).mkdir(parents=True)
        (directory / "kmsg").touch()
        for name in _TARGETS:
            (directory / "units" / name).write_text("[Unit]\nDefaultDependencies=no\n")
        for name, text in units.items():
            self.write(f"units/{name}", text)

    def write(self, name: str, text: str) -> Path:
        path = self._directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def __enter__(self) -> Self:
        self._cgroup.mkdir()
        inside = ["unshare", "--fork", "--kill-child", "--pid", "--mount", "--net", "--ipc", "--uts", "--cgroup"]
        boot = ["sh", "-c", _BOOT, "boot", str(self._directory), SYSTEMD, str(ROOT)]
        # pdeathsig: should the test be killed, unshare dies with it, its child with that, and the pid namespace with its init
        enter = ["sh", "-c", 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"', "enter", str(self._cgroup)]
        try:
            with (self._directory / "boot.log").open("wb") as log:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *enter, *inside, *boot], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self.pid = until(self._init, "an init", BOOT, self.story)
            until(self._answers, "a manager that answers", BOOT, self.story)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # --kill-child: its init goes too, and with that everything in the pid namespace
            process.wait()
        with contextlib.suppress(FileNotFoundError):
            until(lambda: "populated 0" in (self._cgroup / "cgroup.events").read_text(), "an empty machine")
            for place, _, _ in os.walk(self._cgroup, topdown=False):
                os.rmdir(place)

    def _init(self) -> int:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"it did not boot: {self.story()}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _answers(self) -> bool:
        if Path(f"/proc/{self.pid}/comm").read_text() != "systemd\n":
            return False
        return self.run("systemctl", "is-active", "machine.target", check=False).returncode == 0

    def run(self, *argv: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        enter = ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--net", "--ipc", "--uts", "--cgroup", "--"]
        done = subprocess.run([*enter, *argv], capture_output=True, text=True, timeout=timeout, check=False, cwd="/")
        if check and done.returncode:
            raise AssertionError(f"{' '.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.story()}")
        return done

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit."""
        said = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names)).stdout
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    def json(self, *argv: str) -> Any:
        return json.loads(self.run(*argv).stdout)

    def story(self) -> str:
        """What systemd and the unit have said so far."""
        logs = [self._directory / name for name in ("boot.log", "kmsg", "unit.log")]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}" for log in logs if log.exists())


def _cgroup2() -> Path:
    """Where the unified hierarchy is mounted: at the top, or beside the controllers of version 1."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return Path(next(where for _, where, kind, *_ in mounts if kind == "cgroup2"))
