"""A cluster of our own on this machine: etcd, a kube-apiserver, a kubelet over a private containerd; no registry, nothing of the machine's.

The programs are those of `scripts/k8s-build`. There is no scheduler and no controller: who makes a pod names its node, and nobody makes
service accounts for namespaces but `namespace`. The API server authorizes by RBAC and admits as a real one does, so tokens get mounted.

A kubelet has places that it cannot be told to have elsewhere (`_SHARED`) and sets kernel parameters (`_SYSCTLS`): at the end the former
have nothing of ours, and the latter are as they were.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.containers import images
from tests.containers.containerd import PATH, ROOT, STOP_LIMIT, Containerd, cgroups, unmount
from tests.keeper import Kept, wait_until
from tests.nats_server import free_port

NODE = "node-1.test"  # with a dot, which a NATS subject cannot have
START_LIMIT = 120.0  # seconds, of all three; 20 s are usual
POD_LIMIT = 60.0

_SHARED = (Path("/var/lib/kubelet"), Path("/var/log/pods"), Path("/var/log/containers"))
_SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)

_KUBELET = """\
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: {address}
port: {port}
readOnlyPort: 0
healthzPort: 0
cgroupDriver: cgroupfs
cgroupRoot: {cgroup}
failSwapOn: false
oomScoreAdj: 0 # a container without CAP_SYS_RESOURCE cannot lower it
makeIPTablesUtilChains: false
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
clusterDNS: ["{address}"]
evictionHard: {{memory.available: "50Mi"}}
imageGCHighThresholdPercent: 100
syncFrequency: 1s
nodeStatusUpdateFrequency: 2s
volumePluginDir: {home}/plugins
"""


class ApiError(Exception):
    """What the API server says when it says no."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body[:2000]}")
        self.status = status


class Member:
    """One node: a kubelet over a containerd."""

    def __init__(self, name: str, containerd: Containerd, kubelet: Kept) -> None:
        self.name, self.containerd, self.kubelet = name, containerd, kubelet

    def kill(self) -> None:
        """As a machine that loses its power: nobody there does anything any more."""
        os.kill(self.kubelet.pid, signal.SIGKILL)
        self.containerd.stop(kill=True)
        for place in cgroups(self.containerd.cgroup):
            for procs in place.rglob("cgroup.procs"):
                for pid in procs.read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)


class Cluster(contextlib.AbstractContextManager["Cluster"]):
    """`with Cluster() as cluster:` has one node, `NODE`, that is ready. `kubelet=False`: an API server alone, in a third of the time.

    `api` asks it anything with every right. `wrapper` and `env` are `Containerd`'s.
    """

    def __init__(self, *, kubelet: bool = True, wrapper: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.programs = built()
        self.containerd = Containerd(wrapper=wrapper, env=env, wanted=(images.PAUSE, images.COUNTER))
        self.home = self.containerd.home / "k8s"
        self.token, self.ca = "test", self.home / "pki/apiserver.crt"  # it holds its own CA
        self._with_kubelet = kubelet
        self.members: list[Member] = []
        self._kept: list[tuple[str, Kept]] = []
        self._uids: set[str] = set()  # of every pod that there ever was: its logs are named after it
        self._missing = [place for place in _SHARED if not place.exists()]
        self._sysctls = {name: place.read_text() for name in _SYSCTLS if (place := Path("/proc/sys", name)).exists()}

    # --- life -----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        _share(self.containerd.home)
        try:
            self.containerd.__enter__()
        except BaseException:
            _unshare(self.containerd.home)
            raise
        try:
            self.address = str(self.containerd.subnet[1])  # this machine's, for pods, too
            (self.home / "pki").mkdir(parents=True)
            self._start_api()
            if self._with_kubelet:
                self.members.append(Member(NODE, self.containerd, self._start_kubelet(NODE, self.containerd)))
        except BaseException as error:
            self._print_logs()
            self._remove()
            self.containerd.__exit__(type(error), error, None)
            _unshare(self.containerd.home)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        left: list[str] = []
        try:
            if error is not None:
                self._print_logs()
            else:
                left = self.remove_pods()
        finally:
            self._remove()
            try:
                self.containerd.__exit__(kind, error, tb)
            finally:
                _unshare(self.containerd.home)
        assert not left, left

    @contextlib.contextmanager
    def joined(self, name: str, *, wrapper: Path, env: Mapping[str, str], images: Collection[str]) -> Iterator[Member]:
        """Another node, on this machine too, until the `with` ends: then it is taken out of the cluster with all its pods, by force."""
        containerd = Containerd(wrapper=wrapper, env=env, wanted=images, beside=self.containerd)
        _share(containerd.home)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(containerd)
                stack.callback(containerd.remove_pods_if_up)
                member = Member(name, containerd, self._start_kubelet(name, containerd))
                self.members.append(member)
                stack.callback(self._leave, member)
                try:
                    yield member
                except BaseException:
                    self._print_logs()
                    raise
        finally:
            _unshare(containerd.home)

    def _leave(self, member: Member) -> None:
        self.members.remove(member)
        for pod in self.api("GET", f"/api/v1/pods?fieldSelector=spec.nodeName={member.name}")["items"]:
            self._uids.add(pod["metadata"]["uid"])
            place = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
            with contextlib.suppress(ApiError):
                self.api("DELETE", f"{place}?gracePeriodSeconds=0")
        self._end(member.kubelet)
        self._kept = [(program, kept) for program, kept in self._kept if kept is not member.kubelet]
        unmount(self.home / member.name)
        with contextlib.suppress(ApiError):
            self.api("DELETE", f"/api/v1/nodes/{member.name}")

    def _start_api(self) -> None:
        etcd, peer, self._port = free_port(), free_port(), free_port()
        self.url = f"https://{self.address}:{self._port}"
        store = f"http://127.0.0.1:{etcd}"
        subprocess.run(["openssl", "genrsa", "-out", self.home / "sa.key", "2048"], check=True, stderr=subprocess.DEVNULL)
        (self.home / "tokens.csv").write_text(f'{self.token},admin,1,"system:masters"\n')
        self._run(
            "etcd",
            "--data-dir", self.home / "etcd",
            "--listen-client-urls", store,
            "--advertise-client-urls", store,
            "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--unsafe-no-fsync",
        )  # fmt: skip
        self._run(
            "kube-apiserver",
            "--etcd-servers", store,
            "--bind-address", self.address,
            "--advertise-address", self.address,
            "--secure-port", self._port,
            "--insecure-port", 0,
            "--cert-dir", self.home / "pki",
            "--authorization-mode", "RBAC",
            "--token-auth-file", self.home / "tokens.csv",
            "--service-account-issuer", "https://cluster.test",
            "--service-account-key-file", self.home / "sa.key",
            "--service-account-signing-key-file", self.home / "sa.key",
            "--service-cluster-ip-range", "10.99.0.0/16",
            "--feature-gates", "BoundServiceAccountTokenVolume=true",  # what all later versions do
            "--allow-privileged",
        )  # fmt: skip
        self._until(lambda: self.api("GET", "/readyz") == "ok", "the API server")
        self._until(lambda: bool(self.api("GET", "/api/v1/namespaces/default")), "its namespaces")
        self.account("default", "default")

    def _start_kubelet(self, name: str, containerd: Containerd) -> Kept:
        _make_cgroup(containerd.cgroup)
        home = self.home / name
        (home / "kubelet").mkdir(parents=True)
        (home / "plugins").mkdir()
        config = _KUBELET.format(address=self.address, port=free_port(), cgroup=containerd.cgroup, home=home)
        (home / "kubelet.yaml").write_text(config)
        access = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url, "certificate-authority": str(self.ca)}}],
            "users": [{"name": "u", "user": {"token": self.token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }
        (home / "kubeconfig").write_text(json.dumps(access))
        socket = containerd.address
        kept = self._run(
            "kubelet",
            "--config", home / "kubelet.yaml",
            "--kubeconfig", home / "kubeconfig",
            "--hostname-override", name,
            "--node-ip", self.address,
            "--root-dir", home / "kubelet",
            "--cert-dir", home / "pki",
            "--container-runtime", "remote",
            "--container-runtime-endpoint", socket,
            "--image-service-endpoint", socket,
            "--pod-infra-container-image", images.PAUSE,
            "--v", 2,
        )  # fmt: skip
        self._until(lambda: self._ready(name), "the node")
        return kept

    def _ready(self, name: str) -> bool:
        conditions = self.api("GET", f"/api/v1/nodes/{name}")["status"].get("conditions", [])
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def _run(self, program: str, *words: object) -> Kept:
        env = {**os.environ, "PATH": PATH, "KUBE_CACHE_MUTATION_DETECTOR": "false"}
        log = self.home / f"{program}-{sum(name == program for name, _ in self._kept)}.log"
        kept = Kept([str(self.programs / program), *map(str, words)], log, env=env, cwd=self.home)
        self._kept.append((program, kept))
        return kept

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Who ends meanwhile is not waited for."""
        deadline, why = time.monotonic() + START_LIMIT, "no answer"
        while True:
            try:
                if condition():
                    return
            except (OSError, ApiError) as e:
                why = str(e)
            for name, kept in self._kept:
                if not kept.left():
                    raise RuntimeError(f"{name} has ended: {self.log(name)[-3000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} is not ready after {START_LIMIT} s: {why}")
            time.sleep(0.1)

    def _remove(self) -> None:
        for _, kept in reversed(self._kept):
            self._end(kept)
        self._kept.clear()
        unmount(self.home)  # a kubelet mounts its directory on itself
        with contextlib.suppress(OSError, Exception):
            self.containerd.remove_pods()  # a kubelet leaves dead sandboxes for a minute
        for uid in self._uids:
            for place in (*Path("/var/log/pods").glob(f"*_{uid}"), *Path("/var/log/containers").glob("*.log")):
                if place.is_symlink() and not place.exists():
                    place.unlink()
                elif place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
        for place in self._missing:
            shutil.rmtree(place, ignore_errors=True)
        for name, value in self._sysctls.items():
            if (place := Path("/proc/sys", name)).read_text() != value:
                place.write_text(value)

    def _end(self, kept: Kept) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(kept.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            kept.wait(STOP_LIMIT)
        kept.kill()

    def _print_logs(self) -> None:
        for name in dict.fromkeys(name for name, _ in self._kept):
            print(f"--- log of {name}:\n{self.log(name)[-6000:]}", file=sys.stderr)

    def log(self, program: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.home.glob(f"{program}-*.log")))

    # --- asking ---------------------------------------------------------------------------------------------------------------

    def api(self, method: str, path: str, body: object = None, *, kind: str = "application/json", token: str = "") -> Any:
        """The answer: JSON, or text where it is none. Raises ApiError, or OSError while nobody answers."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token or self.token}", "Content-Type": kind},
        )
        try:
            context = ssl.create_default_context(cafile=str(self.ca)) if self.ca.exists() else ssl.create_default_context()
            with urllib.request.urlopen(request, context=context, timeout=30) as answer:
                said = answer.read()
        except urllib.error.HTTPError as e:
            raise ApiError(e.code, e.read().decode(errors="replace")) from None
        except ssl.SSLError as e:
            raise OSError(str(e)) from e
        with contextlib.suppress(ValueError):
            return json.loads(said)
        return said.decode()

    def account(self, namespace: str, name: str) -> None:
        """A service account, and what its tokens are mounted with: a real cluster has a controller for both."""
        bundle = {
            "kind": "ConfigMap",
            "apiVersion": "v1",
            "metadata": {"name": "kube-root-ca.crt"},
            "data": {"ca.crt": self.ca.read_text()},
        }
        account = {"kind": "ServiceAccount", "apiVersion": "v1", "metadata": {"name": name}}
        for kind, body in (("configmaps", bundle), ("serviceaccounts", account)):
            self.make(f"/api/v1/namespaces/{namespace}/{kind}", body)

    def namespace(self, name: str) -> str:
        self.make("/api/v1/namespaces", {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}})
        self.account(name, "default")
        return name

    def make(self, path: str, body: object) -> None:
        """Unless it is there."""
        try:
            self.api("POST", path, body)
        except ApiError as e:
            if e.status != 409:
                raise

    def token_of(self, namespace: str, account: str) -> str:
        """As the kubelet mounts one into a pod of that account."""
        request = {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": {}}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        return str(self.api("POST", path, request)["status"]["token"])

    def pod(self, name: str, namespace: str = "default") -> Any:
        found = self.api("GET", f"/api/v1/namespaces/{namespace}/pods/{name}")
        self._uids.add(found["metadata"]["uid"])
        return found

    def run_pod(self, body: Mapping[str, Any], namespace: str = "default") -> Any:
        """Make it and wait until it is ready. Raises TimeoutError with its status."""
        made = self.api("POST", f"/api/v1/namespaces/{namespace}/pods", body)
        return self.ready_pod(made["metadata"]["name"], namespace)

    def ready_pod(self, name: str, namespace: str = "default") -> Any:
        """Wait until it is ready. Raises TimeoutError with its status."""
        deadline = time.monotonic() + POD_LIMIT
        while True:
            found = self.pod(name, namespace)
            ready = [
                each for each in found["status"].get("conditions", ()) if each["type"] == "Ready" and each["status"] == "True"
            ]
            if ready:
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(f"pod {name} is not ready: {json.dumps(found['status'])}")
            time.sleep(0.1)

    def remove_pods(self) -> list[str]:
        """Delete every pod of every namespace and wait for it; who does not go."""

        def there() -> list[Any]:
            return list(self.api("GET", "/api/v1/pods")["items"])

        for pod in there():
            meta = pod["metadata"]
            self._uids.add(meta["uid"])
            scheduled = pod["spec"].get("nodeName") in [member.name for member in self.members]
            with contextlib.suppress(ApiError):
                grace = "" if scheduled else "?gracePeriodSeconds=0"  # nobody but a kubelet would end it
                self.api("DELETE", f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}{grace}")
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not there(), POD_LIMIT, "the end of all pods")
        return [f"pod {pod['metadata']['name']}" for pod in there()]

    def log_lines(self, name: str, container: str, namespace: str = "default") -> Sequence[str]:
        """What it said, of all attempts, without the kubelet's times."""
        uid = self.pod(name, namespace)["metadata"]["uid"]
        files = sorted(Path(f"/var/log/pods/{namespace}_{name}_{uid}/{container}").glob("*.log"))
        return [line.split(" ", 3)[3] for file in files for line in file.read_text().splitlines()]


def _share(home: Path) -> None:
    """So that what is mounted below it is seen by pods that have it. On a node systemd shares all mounts."""
    for words in (["--bind", home, home], ["--make-shared", home]):
        subprocess.run(["mount", *words], check=True)


def _unshare(home: Path) -> None:
    subprocess.run(["umount", home], check=True)
    home.rmdir()


def _make_cgroup(name: str) -> None:
    """The kubelet insists that it is there in every hierarchy; a new cpuset has no CPUs, which nobody can run on."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, top, kind, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            place = Path(top, name.lstrip("/"))
            place.mkdir(exist_ok=True)
            for file in ("cpuset.cpus", "cpuset.mems"):
                if kind == "cgroup" and (place / file).exists():
                    (place / file).write_text((place.parent / file).read_text())


def built() -> Path:
    """Where the programs are; the first time it takes minutes, so `scripts/k8s-e2e` does it before any test's clock runs."""
    said = subprocess.run([ROOT / "scripts/k8s-build"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(said.splitlines()[-1])
