"""The chart: the plain manifests are what it makes, the little renderer does what Helm does, and what it must say is said."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from hibernode import config

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("render", ROOT / "kubernetes/render.py")
assert _spec is not None
assert _spec.loader is not None
render = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(render)

DEFAULTS = render.defaults()
EVERYTHING = {
    "node": {"runtimeClassName": "nvidia", "nodeSelector": {"gpu": "yes"}},
    "uninstall": {"enabled": True},
    "api": {"claim": "api"},
    "nats": {"enabled": True, "claim": "nats"},
    "imagePullSecrets": [{"name": "pull"}],
}


def objects(changes: dict[str, Any] | None = None) -> dict[tuple[str, str], Any]:
    found = list(yaml.safe_load_all(render.rendered(render.changed(DEFAULTS, changes or {}))))
    made = {(each["kind"], each["metadata"]["name"]): each for each in found}
    assert len(made) == len(found), "two objects of one name"
    return made


def pod_specs(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        name: each["spec"]["template"]["spec"]
        for (_, name), each in objects(changes).items()
        if "template" in each.get("spec", {})
    }


def test_the_plain_manifests_are_what_the_chart_makes() -> None:
    written = (ROOT / "kubernetes/hibernode.yaml").read_text()
    assert written == render.rendered(DEFAULTS), "kubernetes/render.py > kubernetes/hibernode.yaml"
    namespace = yaml.safe_load((ROOT / "kubernetes/namespace.yaml").read_text())
    assert namespace["metadata"]["name"] == render.NAMESPACE


def test_parts_can_be_left_out_and_added() -> None:
    kinds = {"Deployment", "DaemonSet"}

    def workloads(changes: dict[str, Any]) -> set[str]:
        return {name for kind, name in objects(changes) if kind in kinds}

    assert workloads({}) == {"hibernode-node", "hibernode-api"}
    assert workloads(EVERYTHING) == {"hibernode-node", "hibernode-api", "hibernode-nats", "hibernode-uninstall"}
    assert workloads({"node": {"enabled": False}, "api": {"enabled": False}}) == set()


def test_the_configuration_is_one_that_the_daemon_takes(tmp_path: Path) -> None:
    text = objects()["ConfigMap", "hibernode"]["data"]["hibernode.toml"]
    assert tomllib.loads(text) == tomllib.loads(DEFAULTS["config"])
    (tmp_path / "hibernode.toml").write_text(text)
    found = config.load(tmp_path / "hibernode.toml", {"HIBERNODE_KUBERNETES__NODE_NAME": "a.b"})
    assert (found.node, found.api.listen) == ("a-b", "0.0.0.0:9466")


def test_every_variable_is_a_key_of_the_configuration() -> None:
    for spec in pod_specs(EVERYTHING).values():
        for container in spec["containers"]:
            values = {each["name"]: each.get("value", "a") for each in container.get("env", ())}
            assert config.load(None, values)


def test_no_pod_gets_variables_that_the_configuration_would_refuse() -> None:
    """Of a service hibernode-api a pod beside it gets HIBERNODE_API_PORT, unless it says no."""
    for name, spec in pod_specs(EVERYTHING).items():
        assert spec["enableServiceLinks"] is False, name


def test_the_directories_are_those_of_the_configuration_and_the_same_on_the_node() -> None:
    spec = pod_specs()["hibernode-node"]
    found = config.load(None, {})
    hosts = {each["name"]: each["hostPath"]["path"] for each in spec["volumes"] if "hostPath" in each}
    daemon, watchdog = spec["containers"]
    for container in (daemon, watchdog):
        mounts = {each["mountPath"]: hosts[each["name"]] for each in container["volumeMounts"] if each["name"] in hosts}
        assert all(inside == outside for inside, outside in mounts.items())
        assert {str(found.state_dir), str(found.work_dir), "/sys/fs/cgroup"} <= mounts.keys()
    mounted = {each["mountPath"]: each for each in daemon["volumeMounts"]}
    assert {str(found.socket.parent), str(found.containers.socket.parent), "/run/containerd"} <= mounted.keys()
    assert mounted["/run/containerd"]["mountPropagation"] == "HostToContainer"
    assert found.containers.cri == "unix:///run/containerd/containerd.sock"
    assert spec["hostPID"] is True


def test_the_watchdog_has_what_its_unit_has_and_no_more() -> None:
    watchdog = pod_specs()["hibernode-node"]["containers"][1]["securityContext"]
    unit = (ROOT / "systemd/hibernode-watchdog.service").read_text()
    bounding = re.search(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert bounding is not None
    assert {f"CAP_{name}" for name in watchdog["capabilities"]["add"]} == set(bounding[1].split())
    assert watchdog["capabilities"]["drop"] == ["ALL"]
    assert "privileged" not in watchdog


def test_only_the_node_has_a_token_and_only_it_and_the_installer_are_privileged() -> None:
    for name, spec in pod_specs(EVERYTHING).items():
        assert spec["automountServiceAccountToken"] is (name == "hibernode-node")
        assert spec["serviceAccountName"] == ("hibernode-node" if name == "hibernode-node" else "hibernode")
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            allowed = container["name"] in ("daemon", "install", "uninstall")
            assert bool(container["securityContext"].get("privileged")) is allowed, container["name"]


def test_the_rights_are_those_of_the_guide() -> None:
    guide = (ROOT / "docs/kubernetes.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", guide, re.MULTILINE)
    rules = objects()["ClusterRole", "hibernode-node"]["rules"]
    assert set(rows) == {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert all(rule["apiGroups"] == [""] for rule in rules)


def test_labels_select_the_pods_that_they_are_to_select() -> None:
    for (kind, name), each in objects(EVERYTHING).items():
        if kind in ("Deployment", "DaemonSet"):
            wanted = each["spec"]["selector"]["matchLabels"]
            assert wanted.items() <= each["spec"]["template"]["metadata"]["labels"].items(), name


# --- the renderer ---------------------------------------------------------------------------------------------------------------

GIVEN = {"Values": {"a": {"b": "x: y"}, "no": "", "list": [{"k": 1}], "n": 3, "yes": True}, "Release": {"Namespace": "ns"}}


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("a: {{ .Values.a.b }}", "a: x: y"),
        ("a: {{ .Values.a.b | quote }}", 'a: "x: y"'),
        ("a: {{ .Values.list | toJson }}", 'a: [{"k":1}]'),
        ("{{ .Values.n }} {{ .Values.yes }} {{ .Release.Namespace }}", "3 true ns"),
        ("a: |\n  {{- .Values.a.b | nindent 2 }}\nb", "a: |\n  x: y\nb"),
        ("a\n{{- if .Values.yes }}\nb\n{{- end }}\nc", "a\nb\nc"),
        ("a\n{{- if .Values.no }}\nb\n{{- end }}\nc", "a\nc"),
        ("a\n{{- if not .Values.no }}\nb\n{{- else }}\nc\n{{- end }}\nd", "a\nb\nd"),
        ("a\n{{- if .Values.no }}\nb\n{{- if .Values.yes }}\nx\n{{- end }}\n{{- else }}\nc\n{{- end }}\nd", "a\nc\nd"),
    ],
)
def test_it_renders_as_helm_does(text: str, made: str) -> None:
    assert render.template(text, GIVEN) == made


@pytest.mark.parametrize(
    "text",
    [
        "{{ .Values.nobody }}",
        "{{ .Values.a.b.c }}",
        "{{ .Values.a }}",
        "{{ .Chart.Name }}",
        '{{ include "x" . }}',
        "{{ .Values.n | default 3 }}",
        "{{- range .Values.list }}",
        "{{- if .Values.yes }}",
        "{{- end }}",
        "{{- else }}",
    ],
)
def test_what_it_does_not_know_it_refuses(text: str) -> None:
    with pytest.raises(render.Unknown):
        render.template(text, GIVEN)
