"""Which pods and containers a container runtime has, by the Container Runtime Interface, and the only file that speaks it.

It reads and changes nothing. Who a pod is (namespace, name, UID) is what its sandbox was made with, not its labels, which only a kubelet
sets. Of a container the interface has too little for a checkpoint: the rest is in `info`, JSON of the runtime's own, which is
containerd's here (1.6 to 2.x).
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import grpc

from hibernode._pb import cri_pb2 as pb
from hibernode._pb import cri_pb2_grpc as pb_grpc
from hibernode.errors import CriUnavailable, NotFound, Refused

_ANSWER_LIMIT = 16 << 20  # bytes of one answer, as a kubelet has it: a node's containers, some hundreds, take a tenth
_RECONNECT = 500  # milliseconds at most until it is tried again: a runtime that was restarted is back within seconds


@dataclass(frozen=True)
class Sandbox:
    """A pod, or what an earlier attempt at it left: the newest is the one with the highest `attempt`."""

    id: str
    uid: str
    namespace: str
    name: str
    attempt: int
    state: str  # ready, notready
    created: int  # nanoseconds since the epoch
    handler: str  # the name of its runtime; "" is the default
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class SandboxDetails:
    """What one sandbox is like. It may have ended meanwhile."""

    sandbox: Sandbox
    pid: int  # of the process that holds the namespaces; 0 where it has ended
    addresses: tuple[str, ...]  # none in the machine's network
    spec: Mapping[str, Any]  # its OCI config.json


@dataclass(frozen=True)
class Container:
    id: str
    sandbox_id: str
    name: str
    attempt: int  # how often the pod had one of this name before
    image: str  # as the pod's manifest names it
    image_ref: str  # as the runtime knows it, by digest
    state: str  # created, running, exited, unknown
    created: int  # nanoseconds since the epoch
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Mount:
    container_path: str
    host_path: str
    readonly: bool


@dataclass(frozen=True)
class ContainerDetails:
    """What one container is like. It may have ended meanwhile."""

    id: str
    state: str  # as Container.state
    pid: int  # of its first process, seen from this machine; 0 where it has ended
    exit_code: int
    message: str  # why it did not start, or ended, where the runtime knows
    log_path: str
    mounts: tuple[Mount, ...]  # those that the pod's manifest and the kubelet asked for
    spec: Mapping[str, Any]  # its OCI config.json
    binary: str  # the OCI runtime's program; "" is containerd's default
    runtime_root: str  # the OCI runtime's directory of states, without the namespace; "" is containerd's default
    snapshotter: str
    snapshot: str


class Cri:
    """A client of the runtime that listens at `address`: a path, or `unix://` and a path. Any thread may call.

    Nothing is asked before the first call. Each call takes `timeout` seconds at most, and raises Refused("no_cri") where no runtime listens
    or it is none of version v1, CriUnavailable where it does not answer in time or as it must, NotFound for what it does not know.
    """

    def __init__(self, address: str, *, timeout: float = 10.0) -> None:
        self._address, self._timeout = address, timeout
        self._path = Path(address.removeprefix("unix://"))
        if not self._path.is_absolute():
            raise self._refused(f"no address of a container runtime: {address!r}", address, "unix:// and an absolute path")
        options = [
            ("grpc.default_authority", "localhost"),  # Go's HTTP/2 refuses the default, which is the socket's path
            ("grpc.max_receive_message_length", _ANSWER_LIMIT),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", _RECONNECT),
            ("grpc.enable_http_proxy", 0),
        ]
        self._channel = grpc.insecure_channel(f"unix:{quote(str(self._path))}", options=options)
        self._stub = pb_grpc.RuntimeServiceStub(self._channel)

    def close(self) -> None:
        """No call after it. Harmless when repeated."""
        self._channel.close()

    def version(self) -> str:
        """Name and version of the runtime: "containerd 1.6.20"."""
        said = self._call(self._stub.Version, pb.VersionRequest(version="v1"))
        return f"{said.runtime_name} {said.runtime_version}"

    def sandboxes(self, *, uid: str = "", namespace: str = "", name: str = "") -> list[Sandbox]:
        """Those that fit everything that is given, ready or not, the newest first."""
        wanted = [(key, value) for key, value in (("uid", uid), ("namespace", namespace), ("name", name)) if value]
        answer = self._call(self._stub.ListPodSandbox, pb.ListPodSandboxRequest())
        found = [_sandbox(item) for item in answer.items]
        fitting = [sandbox for sandbox in found if all(getattr(sandbox, key) == value for key, value in wanted)]
        return sorted(fitting, key=lambda sandbox: (sandbox.attempt, sandbox.created), reverse=True)

    def sandbox(self, sandbox_id: str) -> SandboxDetails:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        answer = self._call(self._stub.PodSandboxStatus, request)
        info = self._info(answer)
        network = answer.status.network
        addresses = tuple(ip for ip in (network.ip, *(more.ip for more in network.additional_ips)) if ip)
        return SandboxDetails(_sandbox(answer.status), int(info.get("pid", 0)), addresses, info.get("runtimeSpec") or {})

    def containers(self, sandbox_id: str) -> list[Container]:
        """All that the sandbox has, of whatever state, in the order in which they were made."""
        wanted = pb.ContainerFilter(pod_sandbox_id=sandbox_id)
        answer = self._call(self._stub.ListContainers, pb.ListContainersRequest(filter=wanted))
        return sorted(map(_container, answer.containers), key=lambda container: container.created)

    def listed(self, container_id: str) -> Container | None:
        """One by its id, also while it is being made."""
        wanted = pb.ContainerFilter(id=container_id)
        answer = self._call(self._stub.ListContainers, pb.ListContainersRequest(filter=wanted))
        return next(map(_container, answer.containers), None)

    def container(self, container_id: str) -> ContainerDetails:
        request = pb.ContainerStatusRequest(container_id=container_id, verbose=True)
        answer = self._call(self._stub.ContainerStatus, request)
        status, info = answer.status, self._info(answer)
        options = info.get("runtimeOptions") or {}
        return ContainerDetails(
            id=status.id,
            state=_container_state(status.state),
            pid=int(info.get("pid", 0)),
            exit_code=status.exit_code,
            message=": ".join(filter(None, (status.reason, status.message))),
            log_path=status.log_path,
            mounts=tuple(Mount(mount.container_path, mount.host_path, mount.readonly) for mount in status.mounts),
            spec=info.get("runtimeSpec") or {},
            binary=options.get("binary_name", ""),
            runtime_root=options.get("root", ""),
            snapshotter=info.get("snapshotter", ""),
            snapshot=info.get("snapshotKey", ""),
        )

    # --- one call -------------------------------------------------------------------------------------------------------------

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as e:
            if not isinstance(e, grpc.Call):
                raise
            raise self._understood(e.code(), e.details() or "") from e

    def _understood(self, code: grpc.StatusCode, said: str) -> NotFound | Refused | CriUnavailable:
        if code == grpc.StatusCode.NOT_FOUND:
            return NotFound(f"the container runtime does not know it: {said}")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return self._refused(f"what listens on {self._path} speaks no CRI v1", said, "a container runtime with CRI v1")
        if code == grpc.StatusCode.UNAVAILABLE and not self._is_socket():
            return self._refused(f"no container runtime: {self._path} is no socket", "nothing", "its socket")
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return CriUnavailable(f"the container runtime on {self._path} did not answer within {self._timeout:g} s")
        return CriUnavailable(f"the container runtime on {self._path} does not answer as it must: {code.name}: {said}")

    @property
    def there(self) -> bool:
        """Whether anything could listen: a node without container runtime is a normal node."""
        return self._is_socket()

    def _is_socket(self) -> bool:
        try:
            return stat.S_ISSOCK(self._path.stat().st_mode)
        except OSError:
            return False

    def _refused(self, message: str, found: str, wanted: str) -> Refused:
        return Refused(
            "no_cri", message, prop="cri", found=found, wanted=wanted,
            hint="is containerd here, with its CRI plugin? `ctr --address SOCKET plugins ls` tells",
        )  # fmt: skip

    def _info(self, answer: Any) -> Mapping[str, Any]:
        """What a verbose answer holds beside the interface's own."""
        try:
            info = json.loads(answer.info.get("info", "{}"))
        except ValueError as e:
            raise CriUnavailable(f"the container runtime on {self._path} does not answer as it must: {e}") from e
        if not isinstance(info, dict):
            raise CriUnavailable(f"the container runtime on {self._path} does not answer as it must: {str(info)[:100]}")
        return info


def _sandbox(found: pb.PodSandbox | pb.PodSandboxStatus) -> Sandbox:
    return Sandbox(
        id=found.id,
        uid=found.metadata.uid,
        namespace=found.metadata.namespace,
        name=found.metadata.name,
        attempt=found.metadata.attempt,
        state="ready" if found.state == pb.SANDBOX_READY else "notready",
        created=found.created_at,
        handler=found.runtime_handler,
        labels=MappingProxyType(dict(found.labels)),
        annotations=MappingProxyType(dict(found.annotations)),
    )


def _container(found: pb.Container) -> Container:
    return Container(
        id=found.id,
        sandbox_id=found.pod_sandbox_id,
        name=found.metadata.name,
        attempt=found.metadata.attempt,
        image=found.image.image,
        image_ref=found.image_ref,
        state=_container_state(found.state),
        created=found.created_at,
        labels=MappingProxyType(dict(found.labels)),
        annotations=MappingProxyType(dict(found.annotations)),
    )


_STATES = {pb.CONTAINER_CREATED: "created", pb.CONTAINER_RUNNING: "running", pb.CONTAINER_EXITED: "exited"}


def _container_state(state: pb.ContainerState) -> str:
    return _STATES.get(state, "unknown")
