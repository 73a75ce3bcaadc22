#!/usr/bin/env python3
"""install-node: put on a node what containers are restored with, and take it away again. Both may be repeated, and interrupted, any time.

    install     /opt/hibernode/bin/hibernode-runc, /opt/hibernode/.criu, and the runtime handler `hibernode` in containerd's configuration
    uninstall   takes all of it away; the configuration is then what it was, byte for byte. Not while a container has that handler: nobody
                could end it without its runtime

The handler is appended to the configuration itself. A file of its own beside it, which the configuration imports, looks cleaner; but
containerd (seen with 1.6.20) takes a plugin's whole section from the last file that has one, so the machine's own would be lost.

Standard library only, Python 3.11 or newer: it runs in an init container with the node's root at --root, or on the node itself.
"""

from __future__ import annotations

import argparse
import filecmp
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PREFIX = "/opt/hibernode"
RUNTIME, CRIU, RESTART = f"{PREFIX}/bin/hibernode-runc", f"{PREFIX}/.criu", f"{PREFIX}/restart-containerd"
PYTHON = "/usr/bin/python3"  # what hibernode-runc's first line names
CONFIG = "/etc/containerd/config.toml"
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"

# Of the configuration's versions: how each names the plugin that makes pods.
_PLUGINS = {1: "cri", 2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
_BEGIN, _END = "# >>> hibernode", "# <<< hibernode"
_BLOCK = re.compile(rf"\n{_BEGIN}[^\n]*\n.*?{_END}\n", re.DOTALL)
_MADE = ", with this file"
_TEXT = """
{begin}: made by install-node, which takes it away again{made}
[{plugin}.containerd.runtimes.hibernode]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = ["hibernode.io/*"]
  container_annotations = ["hibernode.io/*"]
  [{plugin}.containerd.runtimes.hibernode.options]
    BinaryName = "{runtime}"
    SystemdCgroup = {systemd}
{end}
"""


class Failed(Exception):
    """Nothing was changed that was not finished. `hint` says what a person can do."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class Machine:
    """The node whose file system is at `root`. `restart`: what makes containerd read its configuration anew."""

    def __init__(self, root: Path, restart: Callable[[], None], config: str = CONFIG) -> None:
        self.root, self._restart, self._config = root, restart, config

    def at(self, path: str) -> Path:
        """Where it is from here: a link of the node means a place on the node."""
        parts, found, links = [part for part in path.split("/") if part][::-1], self.root, 0
        while parts:
            part = parts.pop()
            if part == "..":
                found = found.parent if found != self.root else found
                continue
            found /= part
            if found.is_symlink():
                links += 1
                if links > 40:
                    raise Failed(f"{path} is a circle of links", "mend it on the node")
                target = os.readlink(found)
                found = self.root if target.startswith("/") else found.parent
                parts += [each for each in target.split("/") if each and each != "."][::-1]
        return found

    # --- install ----------------------------------------------------------------------------------------------------------------

    def install(self, runtime: Path, criu: Path) -> list[str]:
        """What was changed. Raises Failed before anything is, if the handler cannot be."""
        if not self.at(PYTHON).exists():
            raise Failed(f"the node has no {PYTHON}", "hibernode-runc runs on the node itself: install Python 3.8 or newer there")
        text, wanted = self._configured()
        done = [f"put {RUNTIME} there"] if self._put(runtime, self.at(RUNTIME)) else []
        done += [f"put {CRIU} there"] if _mirror(criu, self.at(CRIU)) else []
        return done + self._configure(text, wanted)

    def _configured(self) -> tuple[str | None, str]:
        """The configuration as it is (None: there is none), and as it has to be."""
        path = self.at(self._config)
        text = path.read_text() if path.exists() else None
        bare = _BLOCK.sub("", text or "")
        made = text is None or (f"{_BEGIN}: " in text and _MADE in text)
        if made:
            bare = "version = 2\n"
        found = self._parsed(bare)
        version = int(found.get("version", 1))
        if version not in _PLUGINS:
            raise Failed(
                f"{self._config} is of version {version}", f"known are {', '.join(map(str, _PLUGINS))}: upgrade hibernode"
            )
        plugin = _PLUGINS[version]
        self._insist_used(found, plugin)
        block = _TEXT.format(
            begin=_BEGIN, end=_END, made=_MADE if made else "", plugin=f'plugins."{plugin}"', runtime=RUNTIME,
            systemd=str(_systemd_cgroup(found, plugin)).lower(),
        )  # fmt: skip
        wanted = bare + block
        try:
            tomllib.loads(wanted)
        except tomllib.TOMLDecodeError as e:
            raise Failed(f"the handler cannot be added at the end of {self._config}: {e}", f"add this by hand:\n{block}") from e
        return text, wanted

    def _parsed(self, text: str) -> Mapping[str, Any]:
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:
            raise Failed(f"{self._config} is no TOML: {e}", "mend it first; containerd cannot read it either") from e

    def _insist_used(self, found: Mapping[str, Any], plugin: str) -> None:
        """That containerd would read the section of this file, and that the name is free in it."""
        off = {"cri", plugin} & set(found.get("disabled_plugins", ()))
        if off:
            raise Failed(
                f"{self._config} disables the plugin {off.pop()}", "a kubelet needs it: take it out of `disabled_plugins`"
            )
        if "hibernode" in _runtimes(found, plugin):
            raise Failed(f"{self._config} has a handler `hibernode` that somebody else wrote", "take it out, and try again")
        for pattern in found.get("imports", ()):
            place = pattern if pattern.startswith("/") else f"{Path(self._config).parent}/{pattern}"
            for file in sorted(glob.glob(str(self.at(str(Path(place).parent)) / Path(place).name))):
                if file != str(self.at(self._config)) and plugin in self._parsed(Path(file).read_text()).get("plugins", {}):
                    raise Failed(
                        f"{self._config} imports {file}, whose section of the plugin {plugin} takes the place of its own",
                        "name that file with --config",
                    )

    def _configure(self, text: str | None, wanted: str) -> list[str]:
        path, due = self.at(self._config), self.at(RESTART)
        done = []
        if text != wanted:
            due.parent.mkdir(parents=True, exist_ok=True)
            due.touch()  # first: whoever is interrupted after the next line finds nothing to change, and must still restart it
            _write(path, wanted.encode(), path.stat().st_mode & 0o777 if text is not None else 0o644)
            done = [f"added the handler to {self._config}"]
        return done + self._restarted()

    def _restarted(self) -> list[str]:
        due = self.at(RESTART)
        if not due.exists():
            return []
        self._restart()
        due.unlink()
        return ["restarted containerd"]

    def _put(self, source: Path, target: Path) -> bool:
        there = target.exists() and filecmp.cmp(source, target, shallow=False) and target.stat().st_mode & 0o777 == 0o755
        if not there:
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, source.read_bytes(), 0o755)
        return not there

    # --- uninstall --------------------------------------------------------------------------------------------------------------

    def uninstall(self, *, force: bool = False) -> list[str]:
        """What was changed. Failed while containers have the handler, unless `force`: then nobody can end them but by hand."""
        users = sorted(self._users())
        if users and not force:
            raise Failed(
                f"{len(users)} containers have the handler hibernode: {', '.join(users)[:300]}",
                "delete their pods first; --force leaves containers behind that no runtime can end",
            )
        done, path = [], self.at(self._config)
        text = path.read_text() if path.exists() else ""
        if found := _BLOCK.search(text):
            self.at(RESTART).parent.mkdir(parents=True, exist_ok=True)
            self.at(RESTART).touch()
            if _MADE in found[0].splitlines()[1]:
                path.unlink()
            else:
                _write(path, _BLOCK.sub("", text).encode(), path.stat().st_mode & 0o777)
            done.append(f"took the handler out of {self._config}")
        done += self._restarted()
        for place in (RUNTIME, CRIU):
            if (there := self.at(place)).exists():
                shutil.rmtree(there) if there.is_dir() else there.unlink()
                done.append(f"removed {place}")
        for place in (f"{PREFIX}/bin", PREFIX):
            if (there := self.at(place)).is_dir() and not any(there.iterdir()):
                there.rmdir()
        return done

    def _users(self) -> Iterator[str]:
        """Containers whose shim calls our runtime: it writes its name down beside each."""
        for note in self.at(BUNDLES).glob("*/runtime"):
            if note.read_text().strip() == RUNTIME:
                yield note.parent.name


def _runtimes(found: Mapping[str, Any], plugin: str) -> Mapping[str, Any]:
    return dict(found.get("plugins", {}).get(plugin, {}).get("containerd", {}).get("runtimes", {}))


def _systemd_cgroup(found: Mapping[str, Any], plugin: str) -> bool:
    """As the handler has it that pods have by default: a kubelet and all runtimes of a node agree on who makes cgroups."""
    default = found.get("plugins", {}).get(plugin, {}).get("containerd", {}).get("default_runtime_name", "runc")
    return bool(_runtimes(found, plugin).get(default, {}).get("options", {}).get("SystemdCgroup", False))


def _mirror(source: Path, target: Path) -> bool:
    """A directory as it is. The new one is complete before it takes the name; who looks in between finds none, and tries again."""
    if _same(source, target):
        return False
    new, old = target.with_name(f"{target.name}.new"), target.with_name(f"{target.name}.old")
    for each in (new, old):
        shutil.rmtree(each, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, new, symlinks=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return True


def _same(one: Path, other: Path) -> bool:
    def files(top: Path) -> dict[str, Path]:
        return {path.relative_to(top).as_posix(): path for path in top.rglob("*") if path.is_symlink() or not path.is_dir()}

    def equal(a: Path, b: Path) -> bool:
        if a.is_symlink() or b.is_symlink():
            return a.is_symlink() and b.is_symlink() and os.readlink(a) == os.readlink(b)
        return filecmp.cmp(a, b, shallow=False) and a.stat().st_mode == b.stat().st_mode

    ours, theirs = files(one), files(other)
    return other.is_dir() and ours.keys() == theirs.keys() and all(equal(path, theirs[name]) for name, path in ours.items())


def _write(path: Path, content: bytes, mode: int) -> None:
    """All of it or nothing, also if the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def _restarter(words: str) -> Callable[[], None]:
    def restart() -> None:
        if not words:
            print("install-node: restart containerd now: it reads its configuration only when it starts", file=sys.stderr)
            return
        try:
            subprocess.run(shlex.split(words), check=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as e:
            raise Failed(f"containerd could not be restarted: {e}", "it is tried again by the next run") from e

    return restart


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("install-node", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("install", "uninstall"))
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the node's file system is")
    parser.add_argument(
        "--source", type=Path, default=Path(__file__).resolve().parent.parent, help="a checkout after scripts/setup"
    )
    parser.add_argument("--config", default=CONFIG, help="containerd's configuration, on the node")
    parser.add_argument("--restart", default="", metavar="COMMAND", help="what restarts containerd; without, a person has to")
    parser.add_argument("--force", action="store_true", help="uninstall although containers have the handler")
    given = parser.parse_args(words)
    machine = Machine(given.root, _restarter(given.restart), given.config)
    try:
        if given.what == "install":
            done = machine.install(given.source / "runtime/hibernode_runc.py", given.source / ".criu")
        else:
            done = machine.uninstall(force=given.force)
    except (Failed, OSError) as e:
        print(
            f"install-node: {e}\nhint: {getattr(e, 'hint', 'does it run as root, with the whole node at --root?')}",
            file=sys.stderr,
        )
        return 1
    print("\n".join(f"install-node: {each}" for each in done or ["nothing to do"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
