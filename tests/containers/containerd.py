"""A containerd of our own: private root, state, socket, network and images; no registry, and no service of the machine is touched.

What of the machine is used beside them: the places of `SHARED`, where a containerd of the machine may have its own; cgroups below one of
ours; and one bridge of ours with a subnet that nobody else has. Pods reach each other and this machine by it, and nothing else: no address
is translated and nothing forwarded, so no firewall rule is made. At the end all of it must be gone, and nothing of others is touched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from hibernode._pb import cri_pb2 as pb
from hibernode._pb import cri_pb2_grpc as pb_grpc
from tests.containers import images
from tests.keeper import Kept, describe, wait_until

ROOT = Path(__file__).resolve().parents[2]
CNI = Path("/usr/lib/cni")
NAMESPACE = "k8s.io"  # of containerd: where all that the CRI makes lives
# What containerd and its CNI cannot be told to have elsewhere: sockets of shims, states of runc, results of CNI.
SHIMS, STATES, RESULTS = Path("/run/containerd/s"), Path(f"/run/containerd/runc/{NAMESPACE}"), Path("/var/lib/cni/results")
SHARED = (SHIMS, STATES, STATES.parent, SHIMS.parent, RESULTS, RESULTS.parent)

# runc looks for criu there; ours comes first.
PATH = f"{ROOT}/.criu/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

PATIENCE = 2.0  # seconds for the end of shims, which nobody waits for when their pod is removed
START_LIMIT = 20.0  # seconds until it must answer; a fifth of one is usual
STOP_LIMIT = 20.0
CALL_LIMIT = 60.0  # seconds for one call, which no test may need

# The snapshotters and the rest that nobody asks for here; each of them looks at the machine when containerd starts.
_DISABLED = [f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs", "blockfile", "native")]
_DISABLED += ["io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]

_CONFIG = """\
version = 2
root = "{home}/root"
state = "{home}/state"
disabled_plugins = {disabled}
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{home}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true # a container without CAP_SYS_RESOURCE cannot lower it
  enable_unprivileged_ports = false
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni}"
    conf_dir = "{home}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
"""

_HANDLER = """\
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = {annotations}
      container_annotations = {annotations}
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}.options]
        BinaryName = "{binary}"
        SystemdCgroup = false
"""


class Containerd(contextlib.AbstractContextManager["Containerd"]):
    """`with Containerd() as containerd:` gives a CRI at `containerd.address` that knows the images `wanted` of `images.py`.

    It has two runtime handlers: `runc`, and `hibernode`, whose program is `wrapper` (runc itself where none is given) and which gets to
    see the annotations `hibernode.io/*`. `env` is for containerd, its shims and what they call. CRIU is found where the checkout has it.
    A pod that is left at the end fails the test, as everything does that outlives it; unless the test has failed already: then the log
    is printed, and all is killed. With `beside` it shares the network of another one, which must outlive it: pods of both reach each other.
    """

    def __init__(
        self,
        *,
        wrapper: Path | None = None,
        env: Mapping[str, str] | None = None,
        wanted: Collection[str] = images.ALL,
        beside: Containerd | None = None,
    ) -> None:
        self.runc = found("runc")
        self.home = Path(tempfile.mkdtemp(prefix="hn-", dir=real_directory()))  # short: a unix socket's path has 107 bytes
        self.token = uuid.uuid4().hex[:8]
        self.socket, self.log_path = self.home / "c.sock", self.home / "log"
        self.bridge, self.subnet = f"hn{self.token}", ipaddress.IPv4Network("0.0.0.0/32")
        self._beside = beside
        self.cgroup = f"/hibernode-test-{self.token}"
        self._wrapper, self._wanted = wrapper or self.runc, wanted
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HIBERNODE_")},
            "PATH": PATH,
            **(env or {}),
        }
        self.sandboxes: set[str] = set()  # all that there ever were
        self._missing = [place for place in SHARED if not place.exists()]
        self._kept: Kept | None = None
        self._befores: list[Kept] = []  # keepers of containerds that have ended, whose shims may live on
        self._channel: grpc.Channel | None = None

    # --- life -----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            if not (ROOT / ".criu/bin/criu").exists():
                raise RuntimeError("there is no .criu/bin/criu: scripts/setup makes it")
            self.images = images.build(self.home / "images", self._wanted)
            self._make_network()
            self._configure()
            self.start()
            self._import(list(self.images.values()))
        except BaseException:
            self._print_log()
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            self._print_log()
            self._remove()
            return
        try:
            left = self._leave()
        finally:
            self._remove()
        assert not left, left

    def start(self) -> None:
        """Start it, again after `stop` with the pods it had; returns when it answers."""
        self._kept = Kept([str(found("containerd")), "--config", str(self.home / "config.toml")], self.log_path, env=self._env)
        again = [(f"grpc.{which}_reconnect_backoff_ms", 50) for which in ("initial", "max")]
        options = [("grpc.default_authority", "localhost"), *again]  # Go's HTTP/2 refuses the default, which is the socket's path
        self._channel = grpc.insecure_channel(f"unix:{self.socket}", options=options)
        deadline = time.monotonic() + START_LIMIT
        while why := self._silent():
            if time.monotonic() > deadline:
                raise RuntimeError(f"containerd did not start: {why}\n{self.log[-3000:]}")
            time.sleep(0.02)

    def _silent(self) -> str:
        """Why it does not answer yet: its CRI is there a moment after its socket."""
        try:
            self.cri.Version(pb.VersionRequest(), timeout=START_LIMIT)
        except grpc.RpcError as e:
            return str(e)
        return ""

    def stop(self, *, kill: bool = False) -> int:
        """End containerd, and nothing else: shims and containers live on. Its exit code."""
        assert self._kept is not None
        kept, self._kept = self._kept, None
        self._befores.append(kept)
        if self._channel is not None:
            self._channel.close()
        os.kill(kept.pid, signal.SIGKILL if kill else signal.SIGTERM)
        return kept.exit_code(STOP_LIMIT)

    def _leave(self) -> list[str]:
        """End everything in order; what should not have been there any more."""
        if self._kept is None:
            return []
        left = [f"a pod: {name}" for name in self.remove_pods()]
        self.stop()
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(kept.left() for kept in self._befores), PATIENCE, "the end of its shims")
        return left + self.leftovers() + [f"a process: {describe(pid)}" for kept in self._befores for pid in kept.left()]

    def _remove(self) -> None:
        """By force, whatever is still there."""
        for kept in [*self._befores, *filter(None, [self._kept])]:
            kept.kill()
        unmount(self.home)
        for link in [*self.ports(), self.bridge] if self._beside is None else []:
            subprocess.run(["ip", "link", "delete", link], check=False, stderr=subprocess.DEVNULL)
        remove_cgroup(self.cgroup)
        for place in self._shared():
            shutil.rmtree(place) if place.is_dir() else place.unlink()
        for place in self._missing:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                place.rmdir()
        shutil.rmtree(self.home, ignore_errors=True)

    def leftovers(self) -> list[str]:
        """What pods of ours have left on the machine: nothing, a moment after the last of them was removed."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self.remains(), PATIENCE, "nothing to be left")
        return self.remains()

    def remains(self) -> list[str]:
        """What pods of ours have on the machine now."""
        # those of pods and above them are a kubelet's to remove, and ours
        pods = [place for cgroup in cgroups(self.cgroup) for place in cgroup.glob("kubepods/*/*")]
        of_containers = [str(place) for pod in pods if pod.is_dir() for place in pod.iterdir() if place.is_dir()]
        names = (
            ("a mount", mounts(self.home)),
            ("a state", self._shared()),
            ("a cgroup", of_containers),
            ("a port of the bridge", self.ports()),
        )
        return [f"{name}: {place}" for name, places in names for place in places]

    def _shared(self) -> list[Path]:
        """What in the shared places is ours: named after our pods' ids, or with our directory in it."""
        sockets = [hashlib.sha256(f"{self.socket}/{NAMESPACE}/{sandbox}".encode()).hexdigest() for sandbox in self.sandboxes]
        results = [f"*-{sandbox}-*" for sandbox in self.sandboxes]
        states = []
        for state in STATES.glob("*/state.json"):
            with contextlib.suppress(FileNotFoundError):
                if f"{self.home}/" in state.read_text():
                    states.append(state.parent)
        named = [found for name in results for found in RESULTS.glob(name)]
        return [*(SHIMS / name for name in sockets if (SHIMS / name).exists()), *named, *states]

    def ports(self) -> list[str]:
        """Of our bridge, to pods' network namespaces."""
        if self._beside is not None:
            return []
        ports = Path(f"/sys/class/net/{self.bridge}/brif")
        return os.listdir(ports) if ports.exists() else []

    def _print_log(self) -> None:
        print(f"--- log of containerd:\n{self.log[-8000:]}", file=sys.stderr)

    # --- making it ------------------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        text = _CONFIG.format(home=self.home, socket=self.socket, pause=images.PAUSE, cni=CNI, disabled=json.dumps(_DISABLED))
        for name, binary, passed in (("runc", self.runc, []), ("hibernode", self._wrapper, ["hibernode.io/*"])):
            text += _HANDLER.format(name=name, binary=binary, annotations=json.dumps(passed))
        (self.home / "config.toml").write_text(text)

    def _make_network(self) -> None:
        """The bridge is made here, and has this machine's address: as a gateway of CNI's it would make the machine forward packets."""
        missing = [name for name in ("bridge", "host-local", "loopback") if not (CNI / name).exists()]
        if missing:
            raise RuntimeError(f"{CNI} lacks {missing}: scripts/test installs Debian's containernetworking-plugins")
        if self._beside is not None:
            self.bridge, self.subnet = self._beside.bridge, self._beside.subnet
            shutil.copytree(self._beside.home / "cni", self.home / "cni")
            return
        self.subnet = _free_subnet()
        address = f"{self.subnet[1]}/{self.subnet.prefixlen}"
        for words in (["add", self.bridge, "type", "bridge"], ["set", self.bridge, "up"]):
            subprocess.run(["ip", "link", *words], check=True)
        subprocess.run(["ip", "address", "add", address, "dev", self.bridge], check=True)
        plugin = {
            "type": "bridge",
            "bridge": self.bridge,
            "isGateway": False,
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.home / "addresses"),
                "ranges": [[{"subnet": str(self.subnet), "rangeStart": str(self.subnet[2])}]],
            },
        }
        network = {"cniVersion": "0.4.0", "name": self.bridge, "plugins": [plugin]}
        (self.home / "cni").mkdir()
        (self.home / "cni/10-test.conflist").write_text(json.dumps(network))

    def _import(self, made: Sequence[images.Image]) -> None:
        packed = self.home / "images.tar"
        images.pack(made, packed)
        ctr = [str(found("ctr")), "--address", str(self.socket), "--namespace", NAMESPACE, "images", "import", str(packed)]
        subprocess.run(ctr, check=True, stdout=subprocess.DEVNULL)
        packed.unlink()
        stub = pb_grpc.ImageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        deadline = time.monotonic() + START_LIMIT  # the CRI hears of it by an event
        for image in made:
            while not stub.ImageStatus(pb.ImageStatusRequest(image=pb.ImageSpec(image=image.name)), timeout=CALL_LIMIT).image.id:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"containerd does not know {image.name}")
                time.sleep(0.01)

    def count_addresses_anew(self) -> None:
        """The next pod gets the lowest address that is free, which may be that of one that has gone."""
        (self.home / "addresses" / self.bridge / "last_reserved_ip.0").unlink(missing_ok=True)

    # --- asking ---------------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._kept is not None, "containerd does not run"
        return self._kept.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def address(self) -> str:
        return f"unix://{self.socket}"

    @property
    def cri(self) -> pb_grpc.RuntimeServiceStub:
        """As a kubelet has it, which makes and removes pods."""
        assert self._channel is not None
        return pb_grpc.RuntimeServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def remove_pods(self) -> list[str]:
        """End and remove every pod that is there; their names."""
        there = self.cri.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=CALL_LIMIT).items
        for sandbox in there:
            self.remove_sandbox(sandbox.id)
        return [sandbox.metadata.name for sandbox in there]

    def remove_pods_if_up(self) -> None:
        if self._kept is not None:
            self.remove_pods()

    def remove_sandbox(self, sandbox: str) -> None:
        """With its containers, which are killed. Harmless when repeated."""
        self.sandboxes.add(sandbox)
        self.cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=CALL_LIMIT)
        self.cri.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=CALL_LIMIT)


def found(program: str) -> Path:
    """Where this machine has it: runc is where only root looks."""
    place = shutil.which(program, path=PATH)
    if place is None:
        raise RuntimeError(f"there is no {program}: scripts/test installs it")
    return Path(place).resolve()


def real_directory() -> Path:
    """Where an overlay's upper directory may be: not on an overlay, which is what a container of a CI has for its /tmp."""
    for place in (tempfile.gettempdir(), "/var/tmp", "/dev/shm"):
        kind = subprocess.run(["stat", "--file-system", "--format=%T", place], capture_output=True, text=True, check=True).stdout
        if kind.strip() != "overlayfs":
            return Path(place)
    raise RuntimeError("containers need a directory that is not on an overlay: set TMPDIR to one")


def _free_subnet() -> ipaddress.IPv4Network:
    """Of the private ones, from where few begin to count, one that no route of this machine meets."""
    said = subprocess.run(["ip", "-j", "route", "show", "table", "all"], capture_output=True, check=True).stdout
    taken = []
    for route in json.loads(said):
        with contextlib.suppress(ValueError):  # "default", and what is of version 6
            taken.append(ipaddress.IPv4Network(route["dst"]))
    first = uuid.uuid4().int % 100  # two that start at once should not find the same
    for third in itertools.chain(range(first, 100), range(first)):
        subnet = ipaddress.IPv4Network(f"10.213.{third}.0/24")
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise RuntimeError("no subnet of 10.213.0.0/16 is free")


def mounts(home: Path) -> list[str]:
    """Mount points below `home`, the deepest first."""
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted((place for place in places if place.startswith(f"{home}/")), key=len, reverse=True)


def unmount(home: Path) -> None:
    """All of them, used or not."""
    for place in mounts(home):
        subprocess.run(["umount", "--lazy", place], check=False)


def cgroups(name: str) -> list[Path]:
    """The cgroup of this name in every hierarchy that has it."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    tops = {Path(line[1]) for line in lines if line[2] in ("cgroup", "cgroup2")}
    return [place for top in sorted(tops) if (place := top / name.lstrip("/")).exists()]


def remove_cgroup(name: str) -> None:
    """With those below it. What lived in them must have ended; the kernel may need a moment to see it."""
    deadline = time.monotonic() + STOP_LIMIT
    for place in cgroups(name):
        for inner, _, _ in os.walk(place, topdown=False):
            while True:
                try:
                    os.rmdir(inner)
                except OSError as e:
                    if e.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
                else:
                    break
