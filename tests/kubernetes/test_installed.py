"""All pods of the chart, run by a real kubelet: installer, daemon and watchdog, control plane, broker. A pod is checkpointed by REST, and
comes back in a new one.

Nobody builds an image here. In its place is one of empty directories, into which this machine's `/usr`, Python and this checkout are
mounted; everything else is as the chart has it, but that directories of the node are private ones, and that pods and the API
server are named by their addresses: nobody resolves names here, or gives services an address.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hibernode.api.guard import hashed, new_token
from hibernode.drivers.kubernetes import Kubernetes
from tests.containers import images
from tests.containers.containerd import PATH, ROOT, STATES
from tests.containers.pods import PORT, ask
from tests.keeper import wait_until
from tests.kubernetes.cluster import NODE, ApiError, Cluster, Member
from tests.kubernetes.conftest import RUN, SOCKET
from tests.kubernetes.test_chart import PLACES
from tests.kubernetes.test_restore import last, manifest, there
from tests.node.workload import Beat, beats
from tests.unit.test_chart import DEFAULTS, render

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(300)]

IMAGE = "localhost/hibernode/machine:1"
LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # into /usr
LIMIT = 60.0
CONTAINERS = {
    "hibernode-nats": ["nats"],
    "hibernode-node": ["install", "daemon", "watchdog"],
    "hibernode-api": ["api"],
    "hibernode-uninstall": ["uninstall"],
}
CONFIG = """
state_dir = "{home}/state"
work_dir = "{work}"
socket = "{run}/hibernode.sock"
[bus]
url = "nats://{broker}:4222"
[store]
url = "file://{store}"
[arena]
size = "64MiB"
[containers]
cri = "{cri}"
socket = "{socket}"
roots = ["{states}"]
[kubernetes]
api_server = "{server}"
token_file = "/var/run/secrets/kubernetes.io/serviceaccount/token"
ca_file = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
[criu]
tcp = "close"
[limits]
node_interval = 1.0
[metrics]
listen = ""
[api]
listen = "0.0.0.0:9466"
shared_file_stores = true
[log]
format = "json"
"""


class Installed:
    """The chart on one node, by hand: there is no controller that would make pods of its templates. Each pod has its template's name, on
    further nodes with their own behind it."""

    def __init__(self, cluster: Cluster, member: Member, run: Path = RUN) -> None:
        self.cluster, self.member, self.run, self.home = cluster, member, run, member.containerd.home / "node"
        self.work, self.host = Path(f"/dev/shm/hn-{member.containerd.token}"), self.home / "host"
        self.store = cluster.containerd.home / "store"  # of all nodes
        self._token, self._api, self._broker = new_token(), "", ""

    def start(self) -> None:
        """All of it."""
        self._prepare()
        self._broker = self._run("hibernode-nats", "")["status"]["podIP"]
        config = self._config(self._broker)
        for (kind, _), each in self._chart(config).items():
            if kind in ("ConfigMap", "RuntimeClass", "ServiceAccount", "ClusterRole", "ClusterRoleBinding"):
                self.cluster.make(PLACES[kind], each)
        tokens = base64.b64encode(f"ops:{hashed(self._token)}".encode()).decode()
        secret = {
            "kind": "Secret",
            "apiVersion": "v1",
            "metadata": {"name": "hibernode-api"},
            "data": {"HIBERNODE_API__TOKENS": tokens},
        }
        self.cluster.make("/api/v1/namespaces/hibernode/secrets", secret)
        self._run("hibernode-node", config)
        self._api = self._run("hibernode-api", config)["status"]["podIP"]

    def join(self, first: Installed) -> None:
        """The daemon and its watchdog, on a further node."""
        self._prepare()
        config = self._config(first._broker)
        name = f"hibernode-node-config-{self.member.name}"
        self.cluster.make(PLACES["ConfigMap"], self._renamed(config, name))
        self._run("hibernode-node", config, of_node=name)

    def _renamed(self, config: str, name: str) -> Any:
        made = next(each for (kind, _), each in self._chart(config).items() if kind == "ConfigMap")
        return {**made, "metadata": {**made["metadata"], "name": name}}

    def _prepare(self) -> None:
        (self.host / "usr/bin").mkdir(parents=True)
        (self.host / "usr/bin/python3").touch()
        self.store.mkdir(exist_ok=True)
        self._import()

    def _config(self, broker: str) -> str:
        return CONFIG.format(
            broker=broker, home=self.home, store=self.store, work=self.work, run=self.run, cri=self.member.containerd.address,
            socket=self.run / SOCKET.name, states=STATES, server=self.cluster.url,
        )  # fmt: skip

    def _import(self) -> None:
        rootfs = self.home / "image"
        for name in ("dev", "etc/alternatives", "proc", "sys", "tmp", "run", "usr", "var", "opt"):
            (rootfs / name).mkdir(parents=True)
        for name in LINKS:
            (rootfs / name).symlink_to(f"usr/{name}")
        self.member.containerd._import([images.Image(IMAGE, rootfs, ("/bin/false",))])

    def _chart(self, config: str) -> dict[tuple[str, str], Any]:
        home = self.member.containerd.home
        values = {
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "config": config,
            "installer": {"restart": "touch /host/restarted"},
            "containerd": {"state": str(home), "root": str(home / "root")},
            "nats": {"enabled": True, "image": IMAGE},
            "uninstall": {"enabled": True},
        }
        text = render.rendered(render.changed(DEFAULTS, values))
        for theirs, ours in (
            ("/var/lib/hibernode\n", f"{self.home}/state\n"),
            ("/run/hibernode\n", f"{self.run}\n"),
            ("/dev/shm/hibernode\n", f"{self.work}\n"),
            ("/opt/hibernode/", f"{ROOT}/"),
        ):
            assert theirs in text
            text = text.replace(theirs, ours)
        return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}

    def uninstall(self) -> None:
        self._run("hibernode-uninstall", "")

    def _run(self, name: str, config: str, *, of_node: str = "") -> Any:
        """`of_node`: the ConfigMap of a further one."""
        chart = self._chart(config)
        template = next(
            each["spec"]["template"] for (_, named), each in chart.items() if named == name and "template" in each["spec"]
        )
        for (kind, _), each in chart.items():
            if kind == "ServiceAccount":
                self.cluster.make(PLACES[kind], each)
        spec = template["spec"]
        self._mount_the_machine(spec)
        for volume in spec["volumes"] if of_node else ():
            if "configMap" in volume:
                volume["configMap"]["name"] = of_node
        metadata = {"name": f"{name}-{self.member.name}" if of_node else name, "labels": template["metadata"]["labels"]}
        placed = {**spec, "nodeName": self.member.name}
        return self.cluster.run_pod({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": placed}, "hibernode")

    def _mount_the_machine(self, spec: dict[str, Any]) -> None:
        wanted = {Path("/usr"), Path("/etc/alternatives"), Path(sys.base_prefix), ROOT}
        wanted |= {(ROOT / name).resolve() for name in (".venv", ".criu")}
        places = sorted(place for place in wanted if not wanted & set(place.parents))
        if spec.get("hostPID"):
            places += [STATES, self.store]  # of runc; on a node it is below containerd's directory
        for number, place in enumerate(places):
            spec["volumes"].append({"name": f"machine-{number}", "hostPath": {"path": str(place)}})
        for volume in spec["volumes"]:
            if volume["name"] == "host":
                volume["hostPath"]["path"] = str(self.host)
        variables = {"PATH": f"{ROOT}/.venv/bin:{PATH}", "PYTHONPATH": f"{ROOT}/daemon", "PYTHONDONTWRITEBYTECODE": "1"}
        if spec.get("hostPID"):
            variables["HIBERNODE_SOCKET"] = f"{self.run}/hibernode.sock"
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            container.setdefault("volumeMounts", []).extend(
                {
                    "name": f"machine-{number}",
                    "mountPath": str(place),
                    "readOnly": place not in (STATES, self.store),  # runc notes in the former that it has dumped
                }
                for number, place in enumerate(places)
            )
            container["imagePullPolicy"] = "Never"
            if container["name"] == "nats":
                container["command"] = [f"{ROOT}/.venv/bin/nats-server"]  # its own image has an entry point
            container.setdefault("env", []).extend({"name": name, "value": value} for name, value in variables.items())

    def print_logs(self) -> None:
        for name, containers in CONTAINERS.items():
            with contextlib.suppress(ApiError):  # it was not made
                for container in containers:
                    lines = self.cluster.log_lines(name, container, "hibernode")[-30:]
                    print(f"--- {name}/{container}:\n" + "\n".join(lines))

    def api(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection(self._api, 9466, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status < 300, said
            return json.loads(said) if answer.headers["Content-Type"] == "application/json" else said.decode()
        finally:
            connection.close()

    def ended(self, action_id: str) -> Any:
        """The action, when it is ready."""

        def status() -> str:
            return str(self.api("GET", f"/v2/checkpoint/status/{action_id}")["status"])

        wait_until(lambda: status() in ("ready", "error"), LIMIT, "the end of an action")
        found = self.api("GET", f"/v2/actions/{action_id}")
        assert found["status"] == "ready", found["events"]
        return found


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> Iterator[Installed]:
    cluster.namespace("hibernode")
    made = Installed(cluster, cluster.members[0])
    try:
        try:
            made.start()
            yield made
        finally:
            made.print_logs()
    finally:
        left = cluster.remove_pods()
        shutil.rmtree(made.work, ignore_errors=True)
        assert not left


def test_a_pod_is_checkpointed_by_rest_and_comes_back_in_a_new_one(
    cluster: Cluster, client: Kubernetes, installed: Installed
) -> None:
    assert (installed.host / "opt/hibernode/bin/hibernode-runc").exists(), "its installer has been there"
    assert (installed.host / "restarted").exists()
    assert "hibernode-runc" in (installed.host / "etc/containerd/config.toml").read_text()

    def watchdog_says() -> list[str]:
        return [json.loads(line)["event"] for line in cluster.log_lines("hibernode-node", "watchdog", "hibernode")]

    wait_until(lambda: "watching" in watchdog_says(), LIMIT, "the watchdog to begin")
    wait_until(
        lambda: [node["name"] for node in installed.api("GET", "/v2/nodes")] == [NODE.replace(".", "-")], LIMIT, "the node"
    )

    namespace = cluster.namespace("installed")
    old = cluster.run_pod(manifest("old"), namespace)
    before = last(cluster, "old", namespace)
    action = installed.ended(installed.api("POST", "/v2/checkpoint/pod", {"pod_id": old["metadata"]["uid"], "reason": "manual"}))
    client.delete(namespace, "old", uid=old["metadata"]["uid"])
    wait_until(lambda: not there(cluster, "old", namespace), LIMIT, "the end of the pod")

    wanted = {"action_id": action["action_id"], "cluster_id": "default", "reason": "manual", "overrides": {"pod_name": "new"}}
    began = time.monotonic()
    installed.ended(installed.api("POST", "/v2/restore/pod", wanted))
    print(f"restored after {time.monotonic() - began:.1f} s")
    new = cluster.ready_pod("new", namespace)
    assert [each["restartCount"] for each in new["status"]["containerStatuses"]] == [0]
    assert ask(new["status"]["podIP"], PORT).token == before.token
    after = last(cluster, "new", namespace)
    assert (after.token, after.content) == (before.token, ("16", "whole"))
    assert after.counter > before.counter
    bundles = cluster.containerd.home / "state/io.containerd.runtime.v2.task/k8s.io"
    notes = [note.read_text() for note in bundles.glob("*/runtime")]
    assert str(ROOT / "runtime/hibernode_runc.py") in notes, "what the installer looks for before it takes a runtime away"


def test_a_daemon_that_dies_is_started_again_and_its_watchdog_stays(cluster: Cluster, installed: Installed) -> None:
    lock = installed.home / "state/lock"
    before = int(lock.read_text().split()[0])
    os.kill(before, signal.SIGKILL)

    def restarts() -> dict[str, int]:
        statuses = cluster.pod("hibernode-node", "hibernode")["status"]["containerStatuses"]
        return {each["name"]: each["restartCount"] for each in statuses if each["ready"]}

    wait_until(lambda: restarts() == {"daemon": 1, "watchdog": 0}, LIMIT, "the daemon to be ready again")
    assert int(lock.read_text().split()[0]) != before
    namespace = cluster.namespace("again")
    pod = cluster.run_pod(manifest("a"), namespace)
    installed.ended(installed.api("POST", "/v2/checkpoint/pod", {"pod_id": pod["metadata"]["uid"]}))


@pytest.fixture(scope="module")
def further(cluster: Cluster, installed: Installed) -> Iterator[Installed]:
    """A second node, with its daemon."""
    run = RUN.with_name(f"{RUN.name}-2")
    env = {"HIBERNODE_RUNTIME_SOCKET": str(run / SOCKET.name)}
    wanted = (images.PAUSE, images.COUNTER)
    with cluster.joined("node-2.test", wrapper=ROOT / "runtime/hibernode_runc.py", env=env, images=wanted) as member:
        made = Installed(cluster, member, run)
        try:
            made.join(installed)
            wait_until(lambda: alive(installed) == 2, LIMIT, "the second node")
            yield made
        finally:
            shutil.rmtree(made.work, ignore_errors=True)
            shutil.rmtree(run, ignore_errors=True)


def alive(installed: Installed) -> int:
    return sum(node["alive"] for node in installed.api("GET", "/v2/nodes"))


def on(member: Member, **metadata: Any) -> dict[str, Any]:
    made = manifest("job", nodeName=member.name, nodeSelector={"kubernetes.io/hostname": member.name})
    made["metadata"].update(metadata)
    return made


def goes_on(cluster: Cluster, namespace: str, old: Any, before: Beat) -> None:
    """On the first node, as a pod of its own."""
    new = cluster.ready_pod("job", namespace)
    assert new["spec"]["nodeName"] == NODE
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    after = ask(new["status"]["podIP"], PORT)
    assert (after.token, after.content) == (before.token, before.content)
    assert after.counter > before.counter
    assert {beat.token for beat in beats(cluster.log_lines("job", "app", namespace))} == {before.token}


def test_a_node_leaves_and_its_pod_goes_on_elsewhere(cluster: Cluster, installed: Installed, further: Installed) -> None:
    """One call: checkpoint, end by its kubelet, a new pod on the other node. Who does not ask for it stays, as the daemon's own pod."""
    namespace = cluster.namespace("leaves")
    old = cluster.run_pod(on(further.member, annotations={"hibernode.io/on-stop": "migrate"}), namespace)
    before = ask(old["status"]["podIP"], PORT)
    left = f"/v2/nodes/{further.member.name.replace('.', '-')}/leave", {"reason": "nodeUnschedulable"}

    def moved() -> list[str]:
        return [move["state"] for move in installed.api("POST", *left)]

    wait_until(lambda: moved() != [], LIMIT, "the node to tell of its pod")
    wait_until(lambda: moved()[0] in ("done", "failed"), LIMIT, "the move")
    (move,) = installed.api("POST", *left)
    assert (move["pod_name"], move["state"]) == ("job", "done"), move
    goes_on(cluster, namespace, old, before)
    assert cluster.pod(f"hibernode-node-{further.member.name}", "hibernode")["status"]["phase"] == "Running"


def test_a_node_is_lost_and_its_pod_goes_on_elsewhere(cluster: Cluster, installed: Installed, further: Installed) -> None:
    """A pod that was checkpointed by REST; its machine is off, and its node object deleted."""
    lost, namespace = further.member, cluster.namespace("lost")
    old = cluster.run_pod(on(lost), namespace)
    before = ask(old["status"]["podIP"], PORT)
    action = installed.ended(installed.api("POST", "/v2/checkpoint/pod", {"pod_id": old["metadata"]["uid"]}))
    assert action["node_name"] == lost.name.replace(".", "-")
    lost.kill()
    cluster.api("DELETE", f"/api/v1/nodes/{lost.name}")
    for name, of in (("job", namespace), (f"hibernode-node-{lost.name}", "hibernode")):  # as a controller does for whom it misses
        cluster.api("DELETE", f"/api/v1/namespaces/{of}/pods/{name}?gracePeriodSeconds=0")
    wait_until(lambda: alive(installed) == 1, LIMIT, "the node to be missed")

    began = time.monotonic()
    installed.ended(installed.api("POST", "/v2/restore/pod", {"action_id": action["action_id"], "reason": "manual"}))
    print(f"restored on another node after {time.monotonic() - began:.1f} s")
    goes_on(cluster, namespace, old, before)


def test_what_was_put_on_the_node_is_taken_away_again(installed: Installed) -> None:
    (installed.host / "restarted").unlink()
    installed.uninstall()
    assert (installed.host / "restarted").exists()
    assert not (installed.host / "opt/hibernode").exists()
    assert not (installed.host / "etc/containerd/config.toml").exists(), "there was none"
