"""What the installer writes into containerd's configuration, as containerd itself reads it."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.containers.containerd import found
from tests.unit.test_install_node import CRI, KUBEADM, Node

pytestmark = pytest.mark.containers


def read(config: Path) -> Any:
    """The section of the plugin that makes pods."""
    words = [str(found("containerd")), "--config", str(config), "config", "dump"]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return tomllib.loads(said)["plugins"][CRI]


def test_it_reads_the_handler_and_all_that_was_there(tmp_path: Path) -> None:
    node = Node(tmp_path)
    before = read(node.config)
    node.install()
    after = read(node.config)
    handler = after["containerd"]["runtimes"].pop("hibernode")
    assert after == before
    assert after["sandbox_image"] == "pause:3.9"
    assert handler["options"] == {"BinaryName": "/opt/hibernode/bin/hibernode-runc", "SystemdCgroup": True}
    assert (handler["pod_annotations"], handler["container_annotations"]) == (["hibernode.io/*"], ["hibernode.io/*"])


def test_a_file_that_is_imported_would_take_the_place_of_what_was_there(tmp_path: Path) -> None:
    """Why the handler is appended to the configuration itself, and an import with that section is refused."""
    node = Node(tmp_path)
    node.install()
    block = "version = 2\n" + node.config.read_text().removeprefix(KUBEADM)
    (tmp_path / "beside.toml").write_text(block)
    node.config.write_text(f'imports = ["{tmp_path}/beside.toml"]\n' + KUBEADM)
    found_there = read(node.config)
    assert found_there["containerd"]["runtimes"].keys() == {"hibernode"}
    assert found_there["sandbox_image"] != "pause:3.9"
