"""The daemon's client of the Container Runtime Interface, on a real containerd; and on what is no container runtime at all."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from hibernode._pb import cri_pb2 as pb
from hibernode._pb import cri_pb2_grpc as pb_grpc
from hibernode.drivers.workloads.cri import Cri, Mount
from hibernode.errors import CriUnavailable, NotFound, Refused
from tests.containers import images
from tests.containers.containerd import Containerd
from tests.containers.pods import Pod, counter, shell

pytestmark = pytest.mark.containers


# --- what is there ------------------------------------------------------------------------------------------------------------


def test_a_pod_is_found_by_uid_and_by_namespace_and_name(containerd: Containerd, cri: Cri) -> None:
    with Pod(containerd, [counter()], name="x", namespace="one", annotations={"k": "v"}) as pod, Pod(
        containerd, [], name="x", namespace="two"
    ) as other:  # fmt: skip
        (found,) = cri.sandboxes(uid=pod.uid)
        assert (found.id, found.uid, found.namespace, found.name) == (pod.sandbox, pod.uid, "one", "x")
        assert (found.state, found.attempt, found.handler) == ("ready", 0, "runc")
        assert found.labels["io.kubernetes.pod.uid"] == pod.uid
        assert found.annotations == {"k": "v"}
        assert cri.sandboxes(namespace="one", name="x") == [found]
        assert [sandbox.id for sandbox in cri.sandboxes(name="x")] == [other.sandbox, pod.sandbox]
        assert cri.sandboxes(uid=pod.uid, namespace="two") == []
        assert cri.sandboxes(uid=pod.uid[:-1]) == []
        assert len(cri.sandboxes()) == 2


def test_a_pod_that_is_gone_is_found_until_it_is_removed(containerd: Containerd, cri: Cri) -> None:
    with Pod(containerd, [counter()]) as pod:
        assert cri.sandbox(pod.sandbox).pid
        pod.stop()
        (found,) = cri.sandboxes(uid=pod.uid)
        assert found.state == "notready"
        assert cri.sandbox(pod.sandbox).pid == 0
        assert [container.state for container in cri.containers(pod.sandbox)] == ["exited"]
        gone, container = pod.sandbox, pod.ids["app"]
    assert cri.sandboxes(uid=pod.uid) == []
    assert cri.containers(gone) == []
    for asked, identity in ((cri.sandbox, gone), (cri.container, container)):
        with pytest.raises(NotFound, match="does not know it"):
            asked(identity)


def test_containers_of_a_pod_have_their_names_states_and_images(containerd: Containerd, cri: Cri) -> None:
    with Pod(containerd, [counter("first"), shell("second", "exit 3")]) as pod, Pod(containerd, [counter("elsewhere")]):
        created = pod.create(counter("third", annotations={"k": "v"}, attempt=2))
        first, second, third = cri.containers(pod.sandbox)
        assert [(c.name, c.sandbox_id) for c in (first, second, third)] == [
            ("first", pod.sandbox), ("second", pod.sandbox), ("third", pod.sandbox),
        ]  # fmt: skip
        assert (first.id, first.state, first.attempt, first.image) == (pod.ids["first"], "running", 0, images.COUNTER)
        assert first.image_ref.startswith("sha256:")
        assert first.image_ref == third.image_ref != second.image_ref
        assert first.labels["io.kubernetes.container.name"] == "first"
        assert (third.id, third.state, third.attempt, third.annotations) == (created, "created", 2, {"k": "v"})
        deadline = time.monotonic() + 20
        while cri.container(second.id).state != "exited" and time.monotonic() < deadline:
            time.sleep(0.01)
        ended = cri.container(second.id)
        assert (ended.state, ended.exit_code, ended.pid, ended.message) == ("exited", 3, 0, "Error")


def test_details_are_what_a_dump_needs(containerd: Containerd, cri: Cri) -> None:
    with Pod(containerd, [counter()], handler="hibernode", annotations={"hibernode.io/x": "y"}) as pod:
        pod.beat()
        found = cri.container(pod.ids["app"])
        assert (found.id, found.state, found.pid, found.message) == (pod.ids["app"], "running", pod.pid(), "")
        assert Path(found.log_path) == pod.logs / "app/0.log"
        assert (found.snapshotter, found.snapshot) == ("overlayfs", found.id)
        assert (found.binary, found.runtime_root) == (str(containerd.runc), "")
        assert Mount("/scratch", f"{pod.kubelet}/scratch", readonly=False) in found.mounts
        assert found.spec["process"]["args"][0] == "/bin/counter"
        assert found.spec["annotations"]["hibernode.io/x"] == "y"
        sandbox = cri.sandbox(pod.sandbox)
        assert sandbox.sandbox == cri.sandboxes(uid=pod.uid)[0]
        assert sandbox.addresses == (pod.ip,)
        assert sandbox.sandbox.handler == "hibernode"
        outside = {space["type"]: space["path"] for space in found.spec["linux"]["namespaces"] if "path" in space}
        assert outside["network"] == f"/proc/{sandbox.pid}/ns/net"


def test_a_pod_in_the_machines_network_has_no_address_of_its_own(containerd: Containerd, cri: Cri) -> None:
    with Pod(containerd, [], host_network=True) as pod:
        assert cri.sandbox(pod.sandbox).addresses == ()


def test_what_nobody_knows_is_not_found(cri: Cri) -> None:
    for asked in (cri.sandbox, cri.container):
        with pytest.raises(NotFound):
            asked("0" * 64)
    assert cri.containers("0" * 64) == []


def test_the_runtime_says_who_it_is_and_a_plain_path_is_an_address(containerd: Containerd) -> None:
    client = Cri(str(containerd.socket))
    assert client.version().startswith("containerd ")
    client.close()
    client.close()


# --- a runtime that comes and goes ----------------------------------------------------------------------------------------------


def test_a_runtime_that_is_down_is_unavailable_and_found_again(containerd: Containerd, cri: Cri) -> None:
    with Pod(containerd, [counter()]) as pod:
        assert cri.sandboxes(uid=pod.uid)
        containerd.stop(kill=True)
        with pytest.raises(CriUnavailable, match="UNAVAILABLE"):
            cri.sandboxes(uid=pod.uid)
        containerd.start()
        deadline = time.monotonic() + 5  # until it is tried again
        while not _found(cri, pod) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert _found(cri, pod)


def _found(cri: Cri, pod: Pod) -> bool:
    try:
        return bool(cri.sandboxes(uid=pod.uid))
    except CriUnavailable:
        return False


# --- what is no runtime -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(disk: Path) -> Path:
    return disk / "s"


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        yield listening


def refused(client: Cri) -> Refused:
    with pytest.raises(Refused) as caught:
        client.version()
    client.close()
    return caught.value


def unavailable(client: Cri) -> str:
    with pytest.raises(CriUnavailable) as caught:
        client.version()
    client.close()
    assert caught.value.retry
    return caught.value.message


def test_a_socket_that_is_not_there_is_refused(path: Path) -> None:
    error = refused(Cri(f"unix://{path}"))
    assert (error.code, error.details["found"]) == ("no_cri", "nothing")
    assert str(path) in error.message


def test_a_file_is_refused(path: Path) -> None:
    path.touch()
    assert refused(Cri(str(path))).code == "no_cri"


@pytest.mark.parametrize("address", ["", "containerd.sock", "tcp://127.0.0.1:1", "unix://relative"])
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    with pytest.raises(Refused) as caught:
        Cri(address)
    assert caught.value.code == "no_cri"


def test_a_socket_that_nobody_listens_on_is_unavailable(path: Path, listener: socket.socket) -> None:
    listener.close()
    assert "UNAVAILABLE" in unavailable(Cri(str(path)))


@pytest.mark.parametrize("accepts", [True, False])
def test_a_runtime_that_says_nothing_is_unavailable_in_time(path: Path, listener: socket.socket, accepts: bool) -> None:
    with contextlib.ExitStack() as held:
        if accepts:
            threading.Thread(target=lambda: held.enter_context(listener.accept()[0]), daemon=True).start()
        began = time.monotonic()
        assert "did not answer within 0.3 s" in unavailable(Cri(str(path), timeout=0.3))
        assert time.monotonic() - began < 2


def test_one_that_speaks_something_else_is_unavailable(path: Path, listener: socket.socket) -> None:
    def speak() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.close()

    threading.Thread(target=speak, daemon=True).start()
    assert "CRI" not in unavailable(Cri(str(path), timeout=2))


class _Answers(pb_grpc.RuntimeServiceServicer):
    """A runtime whose details are whatever it was given."""

    def __init__(self, info: str) -> None:
        self._info = info

    def ContainerStatus(self, request: pb.ContainerStatusRequest, context: object) -> pb.ContainerStatusResponse:
        status = pb.ContainerStatus(id=request.container_id, state=9)  # type: ignore[arg-type] # of a newer interface
        return pb.ContainerStatusResponse(status=status, info={"info": self._info} if self._info else {})


@pytest.fixture
def server() -> Iterator[grpc.Server]:
    made = grpc.server(futures.ThreadPoolExecutor(1))
    yield made
    made.stop(None).wait()


def test_one_that_serves_no_cri_is_refused(path: Path, server: grpc.Server) -> None:
    server.add_insecure_port(f"unix:{path}")
    server.start()
    error = refused(Cri(str(path)))
    assert error.code == "no_cri"
    assert "no CRI v1" in error.message


@pytest.mark.parametrize("info", ["{", "[]", "3"])
def test_details_that_make_no_sense_are_unavailable(path: Path, server: grpc.Server, info: str) -> None:
    pb_grpc.add_RuntimeServiceServicer_to_server(_Answers(info), server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    client = Cri(str(path))
    with pytest.raises(CriUnavailable, match="does not answer as it must"):
        client.container("one")
    client.close()


def test_a_runtime_without_details_and_with_a_new_state_is_understood(path: Path, server: grpc.Server) -> None:
    pb_grpc.add_RuntimeServiceServicer_to_server(_Answers(""), server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    client = Cri(str(path))
    found = client.container("one")
    assert (found.id, found.state, found.pid, found.spec, found.runtime_root) == ("one", "unknown", 0, {}, "")
    client.close()
