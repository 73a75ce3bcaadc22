"""Containers of runc: what its state says of them, how they are frozen together and dumped. runc does the dump, because it owns the
namespaces, cgroups and mounts; the pages come to our own page server.

State: `<root>/<id>/state.json`, written by runc (seen with 1.1.5). `--leave-running` always: who is to be killed is killed by us, after
the commit, and whoever watches runc (containerd's shim) would take the end of a container for a crash.

runc has no flags for many of CRIU's options; CRIU reads them from a file that its environment names (CRIU_CONFIG_FILE, its config.c).
/etc/criu/runc.conf, where a machine has one, comes after it and wins.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hibernode.children import Children
from hibernode.drivers.workloads import freezer, network, proc, trees
from hibernode.drivers.workloads.kubelet import Kubelet, place_of
from hibernode.drivers.workloads.process import facts_of
from hibernode.errors import NotFound, Refused
from hibernode.model import Cancel, WorkloadFacts
from hibernode.ports import Criu, CriuOptions, DumpStats, Identity, LayerFacts, ProcessFacts

_ROLLBACK = 10.0  # seconds a dump that has to end gets to put everything back, before it is killed
_ID = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_+.-]{0,1023}")  # as runc takes it
# runc gives CRIU the address of a page server, and nothing else; CRIU prefers a socket that its settings name (page-xfer.c), and runc, as
# every Go program does, leaves to its children what it was left, but for the first few numbers, which are its own to give.
_NOWHERE, _HANDED = "127.0.0.1:1", 64
_OCTAL = re.compile(r"\\([0-7]{3})")  # as the kernel writes what is odd in a path
_log = logging.getLogger("hibernode.runc")


@dataclass(frozen=True)
class Container:
    """One that runs."""

    name: str  # of its image: the container's name in its pod
    id: str
    root: Path  # of runc's states
    bundle: Path
    rootfs: Path  # where it is mounted, in the host's file system
    init: Identity
    freezer: str

    @property
    def alive(self) -> bool:
        return proc.alive(*self.init)

    def layer(self) -> LayerFacts:
        """Its writable layer. Refused where its root file system is no overlay with one."""
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, place, kind, options, *_ = line.split(" ")
            if kind == "overlay" and _unescaped(place) == str(self.rootfs):
                given = tuple(map(_unescaped, options.split(",")))
                for option in given:
                    if option.startswith("upperdir="):
                        return LayerFacts(Path(option.removeprefix("upperdir=")), given)
        raise Refused(
            "no_layer", f"container {self.name!r} has no writable layer that could be saved", prop="rootfs", found=str(self.rootfs),
            wanted="an overlay mount with an upper directory", hint='kind "simple" saves its processes alone',
        )  # fmt: skip


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)


def find(roots: Collection[Path], container_id: str) -> Container:
    """In one of these. NotFound; Refused("ambiguous") if it is in two."""
    there = [root for root in roots if _ID.fullmatch(container_id) and (root / container_id / "state.json").exists()]
    if len(there) > 1:
        raise Refused(
            "ambiguous", f"container {container_id!r} is in {len(there)} state directories of runc", prop="container",
            found=", ".join(map(str, there)), wanted="one", hint="name its pod by UID instead",
        )  # fmt: skip
    if not there:
        places = ", ".join(map(str, roots))
        raise NotFound(f"no container {container_id!r} on this node", hint=f"looked in {places}: `roots` in [containers]")
    return load(there[0], container_id)


def load(root: Path, container_id: str, name: str = "") -> Container:
    """By runc's own state. NotFound if there is none of that id, or it has ended; Refused("runc_state") if it cannot be read."""
    state_file = root / container_id / "state.json"
    try:
        if not _ID.fullmatch(container_id):
            raise FileNotFoundError
        state = json.loads(state_file.read_bytes())
        config, cgroups = state["config"], state["cgroup_paths"]
        labels = dict(label.partition("=")[::2] for label in config.get("labels") or ())
        found = Container(
            name=name or container_id,
            id=container_id,
            root=root,
            bundle=Path(labels.get("bundle", "")),
            rootfs=Path(config["rootfs"]),
            init=(int(state["init_process_pid"]), int(state["init_process_start"])),
            freezer=str(cgroups.get("freezer") or cgroups[""]),
        )
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"runc has no container {container_id!r} in {root}", hint="`runc --root ROOT list` shows them") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Refused(
            "runc_state", f"the state of container {container_id!r} cannot be read: {e}", prop=str(state_file), found=type(e).__name__,
            wanted="a state as runc writes it", hint="is it of another OCI runtime (crun, runsc)?",
        ) from e  # fmt: skip
    if not found.alive:
        raise NotFound(f"container {container_id!r} has ended", hint="it exited, or is about to be deleted", id=container_id)
    return found


def spec_of(bundle: Path) -> Mapping[str, Any]:
    """The OCI specification of the container that is made of this bundle. Refused("runc_state")."""
    try:
        found = json.loads((bundle / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise _unreadable(bundle, e) from e
    if not isinstance(found, dict):
        raise _unreadable(bundle, TypeError("no object"))
    return found


def rootfs_of(bundle: Path) -> Path:
    """Where the root file system of the container that is made of this bundle is mounted. Refused("runc_state")."""
    try:
        return bundle / str(spec_of(bundle)["root"]["path"])
    except (KeyError, TypeError) as e:
        raise _unreadable(bundle, e) from e


@contextmanager
def keeping_times(rootfs: Path, files: Collection[str]) -> Iterator[None]:
    """The directories of these have the times afterwards that they had before: CRIU makes a deleted file anew in its place, and deletes it
    again. No symlink is followed: what is in there may be an enemy's."""
    with ExitStack() as stack:
        for folder in {Path(name).parent for name in files if ".." not in Path(name).parts}:
            with contextlib.suppress(OSError):
                descriptor = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                for part in folder.parts:
                    if part in ("/", "."):
                        continue
                    above = descriptor
                    try:
                        descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
                    finally:
                        os.close(above)
                stack.callback(os.close, descriptor)
                facts = os.fstat(descriptor)
                stack.callback(os.utime, descriptor, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        yield


def _unreadable(bundle: Path, error: Exception) -> Refused:
    return Refused(
        "runc_state", f"the bundle of the container cannot be read: {error}", prop=str(bundle), found=type(error).__name__,
        wanted="a bundle with an absolute cgroupsPath", hint="is it containerd that made it?",
    )  # fmt: skip


def freezer_of(bundle: Path) -> str:
    """Where the container that is made of this bundle will live, as runc (1.1) finds it, and nobody else. Refused("runc_state"), also
    where somebody lives there before it is made: whoever is there is killed if its restore fails."""
    try:
        named = str(spec_of(bundle)["linux"]["cgroupsPath"])
        slice_, _, scope = named.partition(":")
        if scope:  # systemd's: a-b.slice is below a.slice, and what is in it is <prefix>-<name>.scope
            parts = slice_.removesuffix(".slice").split("-")
            above = [f"{'-'.join(parts[: n + 1])}.slice" for n in range(len(parts))] if slice_ else ["system.slice"]
            named = "/".join(["", *above, f"{scope.replace(':', '-')}.scope"])
        if not named.startswith("/") or ".." in named.split("/"):
            raise ValueError(f"cgroupsPath: {named!r}")
    except (ValueError, KeyError, TypeError) as e:
        raise _unreadable(bundle, e) from e
    if members := freezer.members(place := f"{_freezers()}{named}"):
        raise Refused(
            "runc_state", f"somebody lives in the cgroup of the container already: pid {members[0]}", prop=place, found=members[:100],
            wanted="nobody", hint="each container needs a cgroup of its own",
        )  # fmt: skip
    return place


def _freezers() -> str:
    """Where the hierarchy is mounted that freezes: v1's, where there is one."""
    mounts = [line.split(" ") for line in Path("/proc/self/mounts").read_text().splitlines()]
    v1 = [where for _, where, kind, options, *_ in mounts if kind == "cgroup" and "freezer" in options.split(",")]
    v2 = [where for _, where, kind, *_ in mounts if kind == "cgroup2"]
    return (v1 or v2 or ["/sys/fs/cgroup"])[0]


class ContainersWorkload:
    """ports.Workload: one container, or all of a pod."""

    def __init__(
        self,
        facts: WorkloadFacts,
        key: str,
        containers: Sequence[Container],
        runc: str,
        criu: Criu,
        children: Children,
        kubelet: Kubelet | None = None,
    ) -> None:
        """`kubelet`: who starts anew what ends in this pod, and has to end it; where there is nobody who could tell it, None."""
        self._facts, self._key, self._runc, self._criu, self._children = facts, key, runc, criu, children
        self._kubelet = kubelet
        self._containers = {container.name: container for container in containers}
        self._frozen = False
        self._within: dict[int, tuple[str, int]] = {}

    @property
    def facts(self) -> WorkloadFacts:
        return self._facts

    @property
    def key(self) -> str:
        return self._key

    @property
    def place(self) -> str:
        return place_of(self._facts) if self._kubelet is not None else ""

    @property
    def endable(self) -> bool:
        return self._kubelet is not None or not self._facts.kubelet

    def pod_spec(self) -> str:
        return self._kubelet.spec(self._facts) if self._kubelet is not None else ""

    def roots(self) -> Mapping[str, int]:
        for container in self._containers.values():
            if not container.alive:
                raise NotFound(
                    f"container {container.name!r} has ended", hint="it exited after the command was given", id=container.id
                )
        return {name: container.init[0] for name, container in self._containers.items()}

    def processes(self) -> Sequence[ProcessFacts]:
        """Of the trees. Who was brought in by `exec` stands still with them, and is in no image."""
        found = []
        for container in self._containers.values():
            for pid, _ in proc.forest([container.init]):
                with contextlib.suppress(*proc.GONE, IndexError):
                    inside = proc.pids_inside(pid)[len(proc.pids_inside(container.init[0])) - 1]
                    facts = facts_of(pid)
                    tcp = proc.connections(pid, facts.fds)
                    found.append(replace(facts, tcp=tcp, image=container.name, inside=inside))
                    self._within[pid] = container.name, inside
        return found

    def within(self, pid: int) -> tuple[str, int]:
        return self._within[pid]

    def layers(self) -> Mapping[str, LayerFacts]:
        return {name: container.layer() for name, container in self._containers.items()}

    def freezers(self) -> tuple[str, ...]:
        return tuple(container.freezer for container in self._containers.values())

    def freeze(self) -> int:
        if paused := [container for container in self._containers.values() if freezer.is_asked(container.freezer)]:
            raise Refused(
                "paused", f"container {paused[0].name!r} is paused", prop="state", found="paused", wanted="running",
                hint="resume it: whoever paused it would find it running afterwards",
            )  # fmt: skip
        places = [place for place in self.freezers() if freezer.hides_stopped(place)]
        if stopped := [pid for place in places for pid in freezer.members(place) if proc.stops(pid)]:
            raise Refused(
                "stopped", f"process {stopped[0]} of a container is stopped, and CRIU would wait for it for ever", prop="state", found="T",
                wanted="running", hint="send it SIGCONT; or end it", pids=stopped[:100],
            )  # fmt: skip
        began, self._frozen = time.monotonic_ns(), True
        freezer.freeze(self.freezers())
        return began

    def thaw(self) -> None:
        if self._frozen:  # not what its owner has paused
            freezer.thaw(self.freezers())

    def dump(self, image: str, into: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        container = self._containers[image]
        settings = into.with_name(f"{into.name}.conf")
        words = [self._runc, "--root", str(container.root), "checkpoint", "--leave-running", *flags(options)]
        words += ["--image-path", str(into), "--work-path", str(into), "--page-server", _NOWHERE, container.id]
        with tempfile.TemporaryFile() as said:
            env = {**self._criu.environment(), "CRIU_CONFIG_FILE": str(settings)}
            handed = fcntl.fcntl(pages, fcntl.F_DUPFD_CLOEXEC, _HANDED)
            try:
                settings.write_text("".join(f"{line}\n" for line in [*criu_settings(options), f"ps-socket {handed}"]))
                cancel.check()
                made = self._children.spawn(words, env=env, out=said.fileno(), pass_fds=[handed])
            finally:
                os.close(handed)
                pages.close()  # else its end would not be seen
            with _killed_if_stuck(made, cancel):
                code = self._children.wait(made)
            said.seek(0)
            text = said.read()[-2000:].decode(errors="replace").strip()
        if code:
            if options.tcp == "established":
                network.reopen(freezer.members(container.freezer), self._children)
            raise self._criu.why(f"runc could not dump container {image!r}", RuntimeError(text), into / "dump.log")
        return self._criu.stats(into)

    def kill(self) -> None:
        """Whoever lives in their cgroups, too: what `exec` has brought in, and what has left its tree."""
        inits = [container.init for container in self._containers.values()]
        if self._kubelet is not None:
            self._kubelet.end(
                self._facts.namespace, self._facts.name, self._facts.uid, lambda: not any(proc.alive(*init) for init in inits)
            )
        trees.empty(self.freezers(), lambda members: trees.kill([*inits, *members], self._children))


def insist_foreign(containers: Sequence[Container], what: str) -> None:
    """Refuse what the daemon itself lives in, as it does where it is a pod: frozen, it could not let go."""
    ours = next((each for each in containers if os.getpid() in freezer.members(each.freezer)), None)
    if ours is not None:
        raise Refused(
            "not_a_workload", f"{what} has the daemon in it", prop="target", found=what, container=ours.name,
            wanted="a pod or container without the daemon", hint="the daemon's own pod is made anew by its DaemonSet",
        )  # fmt: skip


def criu_settings(options: CriuOptions) -> list[str]:
    """What runc has no flag for, as lines of a configuration file of CRIU. A dump locks the network of the container's namespace, and a
    killed CRIU leaves it locked for all that are in it (`network.reopen`): only where connections have to be kept, as with processes.
    Connections that the workload has not accepted yet are never of the image: a kubelet's probe that comes meanwhile would fail every
    other dump."""
    lines = [f"ghost-limit {options.ghost_limit}", f"timeout {options.timeout}", "skip-in-flight"]
    lines += ["tcp-close"] * (options.tcp == "close") + ["network-lock skip"] * (options.tcp != "established")
    return lines + ["link-remap"] * options.link_remap


def flags(options: CriuOptions) -> list[str]:
    wanted = {
        "--tcp-established": options.tcp == "established",
        "--ext-unix-sk": options.ext_unix_sk,
        "--file-locks": options.file_locks,
    }
    return [flag for flag, given in wanted.items() if given]


@contextmanager
def _killed_if_stuck(child: subprocess.Popen[bytes], cancel: Cancel) -> Iterator[None]:
    """When it is cancelled its page connection is closed, and CRIU rolls back by itself; what has not ended then is killed."""
    timers: list[threading.Timer] = []

    def kill() -> None:
        if child.returncode is None:
            _log.error("runc (pid %d) does not end, and is killed", child.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def soon() -> None:
        timer = threading.Timer(_ROLLBACK, kill)
        timer.daemon = True
        timers.append(timer)
        timer.start()

    try:
        with cancel.waking(soon):
            yield
    finally:
        for timer in timers:
            timer.cancel()
            timer.join()
