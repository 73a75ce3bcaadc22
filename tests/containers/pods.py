"""Pods as a kubelet makes them: a sandbox, containers with a kubelet's labels and mounts, logs where the kubelet has them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from hibernode._pb import cri_pb2 as pb
from tests.containers.containerd import CALL_LIMIT, Containerd
from tests.containers.images import BUSYBOX, COUNTER
from tests.keeper import wait_until
from tests.node.workload import Beat, beats

LIMIT = 20.0  # seconds for a program to do what takes it a few milliseconds
PORT = 8080

_MASKED = [f"/proc/{name}" for name in ("acpi", "asound", "kcore", "keys", "latency_stats", "sched_debug", "scsi", "timer_list")]
_READONLY = [f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")]


@dataclass(frozen=True)
class Mount:
    host: str
    container: str
    readonly: bool = False


@dataclass(frozen=True)
class Container:
    """What a pod's manifest says of one container. `security` are fields of the CRI's LinuxContainerSecurityContext."""

    name: str
    image: str
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[Mount] = ()
    devices: Mapping[str, str] = field(default_factory=dict)  # nodes inside, by those of the machine
    annotations: Mapping[str, str] = field(default_factory=dict)
    security: Mapping[str, Any] = field(default_factory=dict)
    memory_limit: int = 0  # bytes
    tty: bool = False
    stdin: bool = False
    attempt: int = 0


def counter(name: str = "app", *, memory: int = 1, port: int = 0, file: str = "", image: str = COUNTER, **more: Any) -> Container:
    """The program that can prove that it was not started again; in the image `BUSYBOX` it has a shell beside it."""
    words = ["/bin/counter", "-m", str(memory)]
    words += ["-p", str(port)] if port else []
    words += ["-f", file] if file else []
    return Container(name, image, words, **more)


def shell(name: str, script: str, **more: Any) -> Container:
    """A script, in an image with a shell, its tools and the counter."""
    return Container(name, BUSYBOX, ["/bin/sh", "-c", script], **more)


def ask(address: str, port: int) -> Beat:
    """A counter's answer over TCP, after a look at all of its memory."""
    with socket.create_connection((address, port), timeout=LIMIT) as connection:
        connection.sendall(b"?\n")
        return beats([connection.makefile().readline()])[0]


class Pod(contextlib.AbstractContextManager["Pod"]):
    """`with Pod(containerd, [counter()]) as pod:` runs it; after the `with` it is gone.

    `annotations` are the pod's, and each container gets them too, as from a kubelet. `share` makes its containers one pid namespace.
    """

    def __init__(
        self,
        containerd: Containerd,
        containers: Sequence[Container],
        *,
        name: str = "",
        namespace: str = "default",
        uid: str = "",
        handler: str = "runc",
        annotations: Mapping[str, str] | None = None,
        share: bool = False,
        host_network: bool = False,
    ) -> None:
        self.uid = uid or str(uuid.uuid4())
        self.name, self.namespace = name or f"pod-{self.uid[:8]}", namespace
        self.sandbox = self.ip = ""
        self.ids: dict[str, str] = {}  # by container name
        self._containerd, self._containers, self._handler = containerd, containers, handler
        self._namespaces = pb.NamespaceOption(
            network=pb.NODE if host_network else pb.POD, pid=pb.POD if share else pb.CONTAINER, ipc=pb.POD
        )
        self.annotations = dict(annotations or {})
        self._labels = {
            "io.kubernetes.pod.name": self.name,
            "io.kubernetes.pod.namespace": self.namespace,
            "io.kubernetes.pod.uid": self.uid,
        }
        self.logs = containerd.home / "logs" / f"{self.namespace}_{self.name}_{self.uid}"
        self.kubelet = containerd.home / "kubelet" / self.uid  # what a kubelet mounts into its containers

    # --- life -----------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.run()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            for container in self._containers:
                print(f"--- log of {self.name}/{container.name}:\n" + "\n".join(self.lines(container.name)[-20:]))
        self.remove()

    def run(self) -> None:
        """The sandbox, then each container."""
        self.run_sandbox()
        for container in self._containers:
            self.start(self.create(container))

    def run_sandbox(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._make_mounts()
        request = pb.RunPodSandboxRequest(config=self._config(), runtime_handler=self._handler)
        self.sandbox = self._cri.RunPodSandbox(request, timeout=CALL_LIMIT).pod_sandbox_id
        self._containerd.sandboxes.add(self.sandbox)
        status = self._cri.PodSandboxStatus(pb.PodSandboxStatusRequest(pod_sandbox_id=self.sandbox), timeout=CALL_LIMIT).status
        self.ip = status.network.ip

    def create(self, container: Container) -> str:
        """One container, which does not run yet; its id."""
        (self.logs / container.name).mkdir(exist_ok=True)
        request = pb.CreateContainerRequest(
            pod_sandbox_id=self.sandbox, config=self._container(container), sandbox_config=self._config()
        )
        made: str = self._cri.CreateContainer(request, timeout=CALL_LIMIT).container_id
        self.ids[container.name] = made
        return made

    def start(self, container_id: str) -> None:
        self._cri.StartContainer(pb.StartContainerRequest(container_id=container_id), timeout=CALL_LIMIT)

    def stop(self, name: str = "", *, grace: int = 5) -> None:
        """SIGTERM to one container and SIGKILL after `grace` seconds; without a name the whole pod, which stays in the CRI's list."""
        if name:
            self._cri.StopContainer(pb.StopContainerRequest(container_id=self.ids[name], timeout=grace), timeout=CALL_LIMIT)
        else:
            self._cri.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=self.sandbox), timeout=CALL_LIMIT)

    def remove(self) -> None:
        """All of it, running or not. Harmless when repeated."""
        sandbox, self.sandbox = self.sandbox, ""
        if sandbox:
            self._containerd.remove_sandbox(sandbox)

    # --- asking ---------------------------------------------------------------------------------------------------------------

    @property
    def _cri(self) -> Any:
        return self._containerd.cri

    def status(self, name: str = "app") -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=self.ids[name])
        found: pb.ContainerStatus = self._cri.ContainerStatus(request, timeout=CALL_LIMIT).status
        return found

    def state(self, name: str = "app") -> str:
        """RUNNING, EXITED, ..."""
        return str(pb.ContainerState.Name(self.status(name).state)).removeprefix("CONTAINER_")

    def pid(self, name: str = "app") -> int:
        """Of its first process, as this machine sees it."""
        request = pb.ContainerStatusRequest(container_id=self.ids[name], verbose=True)
        return int(json.loads(self._cri.ContainerStatus(request, timeout=CALL_LIMIT).info["info"])["pid"])

    def lines(self, name: str = "app") -> list[str]:
        """What a container has said, in whole lines, without what the log says of each."""
        file = self.logs / name / "0.log"
        text = file.read_text(errors="replace") if file.exists() else ""
        return [line.split(" ", 3)[3] for line in text.rpartition("\n")[0].splitlines()]

    def beat(self, name: str = "app") -> Beat:
        """The counter's last one; waits for the first."""
        wait_until(lambda: beats(self.lines(name)) or self.state(name) != "RUNNING", LIMIT, f"a beat of {self.name}/{name}")
        return beats(self.lines(name))[-1]

    def next_beat(self, after: Beat, name: str = "app") -> Beat:
        """Two beats after `after`, so that one of them was begun after it."""
        wait_until(lambda: self.beat(name).counter > after.counter + 1, LIMIT, f"a beat of {self.name}/{name} after {after}")
        return self.beat(name)

    def ask(self, port: int = PORT) -> Beat:
        """The answer of the pod's counter, on the pod's address."""
        return ask(self.ip or "127.0.0.1", port)

    def exec(self, name: str, *argv: str, check: bool = True) -> str:
        """What a command inside says on both its outputs; it must succeed, unless nobody asks."""
        request = pb.ExecSyncRequest(container_id=self.ids[name], cmd=argv, timeout=20)
        done = self._cri.ExecSync(request, timeout=CALL_LIMIT)
        said = (done.stdout + done.stderr).decode(errors="replace")
        assert done.exit_code == 0 or not check, f"{' '.join(argv)}: {done.exit_code}\n{said}"
        return said

    # --- what a kubelet would say ---------------------------------------------------------------------------------------------

    def _make_mounts(self) -> None:
        files = {"hosts": f"127.0.0.1 localhost\n# {self.uid}\n", "termination-log": "", "secret/token": self.uid}
        for name, text in files.items():
            path = self.kubelet / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (self.kubelet / "scratch").mkdir(exist_ok=True)
        os.chmod(self.kubelet / "scratch", 0o777)

    def _mounts(self) -> list[Mount]:
        """The ones that every container of every pod has: their places on the machine differ in each."""
        return [
            Mount(f"{self.kubelet}/hosts", "/etc/hosts"),
            Mount(f"{self.kubelet}/termination-log", "/dev/termination-log"),
            Mount(f"{self.kubelet}/scratch", "/scratch"),
            Mount(f"{self.kubelet}/secret", "/var/run/secrets/kubernetes.io/serviceaccount", readonly=True),
        ]

    def _config(self) -> pb.PodSandboxConfig:
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=self.name, uid=self.uid, namespace=self.namespace),
            hostname="" if self._namespaces.network == pb.NODE else self.name,
            log_directory=str(self.logs),
            dns_config=pb.DNSConfig(servers=[str(self._containerd.subnet[1])]),
            labels=self._labels,
            annotations=self.annotations,
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=f"{self._containerd.cgroup}/kubepods/burstable/pod{self.uid}",
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=self._namespaces),
            ),
        )

    def _container(self, container: Container) -> pb.ContainerConfig:
        security = {"masked_paths": _MASKED, "readonly_paths": _READONLY, **container.security}
        mounts = [*self._mounts(), *container.mounts]
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=container.name, attempt=container.attempt),
            image=pb.ImageSpec(image=container.image),
            args=container.args,
            envs=[pb.KeyValue(key=key, value=value) for key, value in container.env.items()],
            mounts=[pb.Mount(host_path=m.host, container_path=m.container, readonly=m.readonly) for m in mounts],
            devices=[
                pb.Device(host_path=host, container_path=place, permissions="rwm") for host, place in container.devices.items()
            ],
            labels={**self._labels, "io.kubernetes.container.name": container.name},
            annotations={**self.annotations, **container.annotations},
            log_path=f"{container.name}/0.log",
            tty=container.tty,
            stdin=container.stdin,
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(memory_limit_in_bytes=container.memory_limit, cpu_shares=102),
                security_context=pb.LinuxContainerSecurityContext(namespace_options=self._namespaces, **security),
            ),
        )
