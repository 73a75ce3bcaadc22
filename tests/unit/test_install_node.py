"""The installer of a node, on a node that is a directory: what it puts there, that it can be repeated and interrupted, and what is left."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "kubernetes/install_node.py"
_spec = importlib.util.spec_from_file_location("install_node", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
install_node = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(install_node)

CRI = "io.containerd.grpc.v1.cri"
KUBEADM = f"""\
version = 2
[plugins."{CRI}"]
  sandbox_image = "pause:3.9"
  [plugins."{CRI}".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."{CRI}".containerd.runtimes.runc.options]
      SystemdCgroup = true
"""


class Node:
    """A node's file system, and what is installed on it."""

    def __init__(self, home: Path, config: str | None = KUBEADM) -> None:
        self.root, self.criu, self.restarts = home / "root", home / "criu", 0
        self.config = self.root / "etc/containerd/config.toml"
        (self.root / "usr/bin").mkdir(parents=True)
        (self.root / "usr/bin/python3").touch()
        self.config.parent.mkdir(parents=True)
        if config is not None:
            self.config.write_text(config)
        (self.criu / "bin").mkdir(parents=True)
        (self.criu / "bin/criu").write_text("a program")
        (self.criu / "bin/criu").chmod(0o755)
        (self.criu / "lib").symlink_to("bin")
        self.machine = install_node.Machine(self.root, self._restart)
        self.fails = False

    def _restart(self) -> None:
        if self.fails:
            raise install_node.Failed("no", "no")
        self.restarts += 1

    def install(self) -> list[str]:
        return list(self.machine.install(ROOT / "runtime/hibernode_runc.py", self.criu))

    def handler(self, plugin: str = CRI) -> Any:
        return tomllib.loads(self.config.read_text())["plugins"][plugin]["containerd"]["runtimes"]["hibernode"]

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_it_puts_runtime_criu_and_handler_there(node: Node) -> None:
    assert len(node.install()) == 4
    runtime = node.root / "opt/hibernode/bin/hibernode-runc"
    assert runtime.read_bytes() == (ROOT / "runtime/hibernode_runc.py").read_bytes()
    assert runtime.stat().st_mode & 0o777 == 0o755
    criu = node.root / "opt/hibernode/.criu"
    assert (criu / "bin/criu").stat().st_mode & 0o777 == 0o755
    assert (criu / "lib").is_symlink()
    assert node.handler() == {
        "runtime_type": "io.containerd.runc.v2",
        "pod_annotations": ["hibernode.io/*"],
        "container_annotations": ["hibernode.io/*"],
        "options": {"BinaryName": "/opt/hibernode/bin/hibernode-runc", "SystemdCgroup": True},
    }
    assert node.config.read_text().startswith(KUBEADM)
    assert node.restarts == 1


def test_again_it_does_nothing(node: Node) -> None:
    node.install()
    before = node.files()
    assert node.install() == []
    assert (node.files(), node.restarts) == (before, 1)


@pytest.mark.parametrize("config", [KUBEADM, KUBEADM.rstrip("\n"), "", "version = 2\n", None])
def test_uninstalled_the_node_is_what_it_was(tmp_path: Path, config: str | None) -> None:
    node = Node(tmp_path, config)
    before = node.files()
    node.install()
    assert node.machine.uninstall() != []
    assert node.files() == before
    assert not (node.root / "opt/hibernode").exists()
    assert node.restarts == 2
    assert node.machine.uninstall() == []
    assert node.restarts == 2


def test_an_upgrade_replaces_what_has_changed(node: Node) -> None:
    node.install()
    (node.criu / "bin/criu").write_text("a newer program")
    (node.criu / "bin/more").write_text("x")
    assert node.install() == ["put /opt/hibernode/.criu there"]
    assert (node.root / "opt/hibernode/.criu/bin/criu").read_text() == "a newer program"
    assert node.restarts == 1, "containerd need not know"


def test_a_configuration_that_its_owner_has_changed_keeps_the_change(node: Node) -> None:
    node.install()
    changed = (
        node.config.read_text().replace("SystemdCgroup = true", "SystemdCgroup = false", 1).replace("pause:3.9", "pause:3.10")
    )
    node.config.write_text(changed)
    assert "added the handler to /etc/containerd/config.toml" in node.install()
    assert node.handler()["options"]["SystemdCgroup"] is False, "as the default handler has it now"
    node.machine.uninstall()
    assert node.config.read_text() == KUBEADM.replace("pause:3.9", "pause:3.10").replace("= true", "= false")


def test_a_restart_that_failed_is_tried_again(node: Node) -> None:
    node.fails = True
    with pytest.raises(install_node.Failed):
        node.install()
    node.fails = False
    assert node.install() == ["restarted containerd"]
    node.fails = True
    with pytest.raises(install_node.Failed):
        node.machine.uninstall()
    assert (node.root / "opt/hibernode/bin/hibernode-runc").exists(), "a containerd that has not been restarted calls it"
    node.fails = False
    assert node.machine.uninstall()[0] == "restarted containerd"
    assert not (node.root / "opt/hibernode").exists()


@pytest.mark.parametrize(
    ("config", "plugin"),
    [('version = 3\n[plugins."io.containerd.cri.v1.runtime"]\n', "io.containerd.cri.v1.runtime"), ("[plugins.cri]\n", "cri")],
)
def test_it_speaks_all_versions_of_the_configuration(tmp_path: Path, config: str, plugin: str) -> None:
    node = Node(tmp_path, config)
    node.install()
    assert node.handler(plugin)["options"]["SystemdCgroup"] is False


def test_the_default_handler_says_who_makes_cgroups(tmp_path: Path) -> None:
    mine = f'[plugins."{CRI}".containerd]\n  default_runtime_name = "nvidia"\n'
    mine += f'[plugins."{CRI}".containerd.runtimes.nvidia.options]\n  SystemdCgroup = false\n'
    node = Node(tmp_path, KUBEADM + mine)
    node.install()
    assert node.handler()["options"]["SystemdCgroup"] is False


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("version = 2\n[plugins", "no TOML"),
        ("version = 9\n", "version 9"),
        ('version = 2\ndisabled_plugins = ["cri"]\n', "disables"),
        (f'version = 2\n[plugins."{CRI}".containerd.runtimes.hibernode]\n', "somebody else"),
        (f'version = 2\n[plugins]\n"{CRI}" = {{containerd = {{runtimes = {{}}}}}}\n', "cannot be added"),
    ],
)
def test_what_it_cannot_do_it_says_before_it_does_anything(tmp_path: Path, config: str, why: str) -> None:
    node = Node(tmp_path, config)
    before = node.files()
    with pytest.raises(install_node.Failed, match=why):
        node.install()
    assert (node.files(), node.restarts) == (before, 0)


def test_a_node_without_python_is_refused(node: Node) -> None:
    (node.root / "usr/bin/python3").unlink()
    with pytest.raises(install_node.Failed, match="python3"):
        node.install()
    assert not (node.root / "opt").exists()


def test_a_file_that_takes_the_place_of_the_section_is_named(tmp_path: Path) -> None:
    node = Node(tmp_path, 'version = 2\nimports = ["/etc/containerd/conf.d/*.toml"]\n')
    drop = node.config.parent / "conf.d/99-nvidia.toml"
    drop.parent.mkdir()
    drop.write_text("version = 2\n[debug]\n")
    node.install()
    drop.write_text(f'version = 2\n[plugins."{CRI}"]\n')
    with pytest.raises(install_node.Failed, match="99-nvidia"):
        node.install()


def test_while_a_container_has_the_handler_it_stays(node: Node) -> None:
    node.install()
    for name, runtime in (("one", "/opt/hibernode/bin/hibernode-runc"), ("two", "/usr/bin/runc")):
        bundle = node.root / "run/containerd/io.containerd.runtime.v2.task/k8s.io" / name
        bundle.mkdir(parents=True)
        (bundle / "runtime").write_text(runtime)
    before = node.files()
    with pytest.raises(install_node.Failed, match=r"1 containers .*: one"):
        node.machine.uninstall()
    assert node.files() == before
    assert node.machine.uninstall(force=True) != []


def test_links_of_the_node_stay_on_the_node(node: Node) -> None:
    real = node.root / "mnt/data"
    real.mkdir(parents=True)
    (node.root / "opt").symlink_to("/mnt/data")
    node.install()
    assert (real / "hibernode/bin/hibernode-runc").exists()
    (node.root / "a").symlink_to("/b")
    (node.root / "b").symlink_to("../../../a")
    with pytest.raises(install_node.Failed, match="circle"):
        node.machine.at("/a/x")


def test_from_the_command_line(node: Node) -> None:
    (node.root / "source/runtime").mkdir(parents=True)
    (node.root / "source/runtime/hibernode_runc.py").write_text("#!/usr/bin/python3\n")
    (node.root / "source/.criu").symlink_to(node.criu)
    told = node.root / "told"
    words = [
        sys.executable,
        SCRIPT,
        "install",
        "--root",
        node.root,
        "--source",
        node.root / "source",
        "--restart",
        f"touch {told}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "install-node: restarted containerd" in done.stdout
    assert told.exists()
    node.config.write_text("no TOML")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "hint: " in done.stderr
