"""Device nodes that a container gets after its restore: those of its new specification, and nothing that is not a device is touched."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from hibernode.drivers.workloads import devices
from hibernode.errors import RestoreFailed

NULL, ZERO = (1, 3), (1, 5)


def spec(path: Path | str, device: tuple[int, int] = NULL, **more: object) -> dict[str, Any]:
    return {"linux": {"devices": [{"path": str(path), "type": "c", "major": device[0], "minor": device[1], **more}]}}


def give(what: dict[str, Any], *, needed: bool = True) -> None:
    paths = [each.get("path") for each in what.get("linux", {}).get("devices", ())]
    devices.give("app", what, os.getpid(), paths if needed else ())


def found(path: Path) -> tuple[int, int]:
    facts = path.stat()
    assert stat.S_ISCHR(facts.st_mode)
    return os.major(facts.st_rdev), os.minor(facts.st_rdev)


def test_a_node_that_is_missing_is_made_and_one_of_another_device_is_made_anew(tmp_path: Path) -> None:
    node = tmp_path / "dev" / "nvidia1"
    give(spec(node, fileMode=0o622, uid=7, gid=8))
    facts = node.stat()
    assert (found(node), stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid) == (NULL, 0o622, 7, 8)
    give(spec(node))
    assert node.stat().st_ino == facts.st_ino, "it is there"
    give(spec(node, ZERO))
    assert found(node) == ZERO


def test_what_is_no_device_stays_and_no_link_is_followed(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path)
    give(spec(file))
    give(spec(link))
    assert (file.read_text(), link.is_symlink()) == ("mine", True)
    for bad in (link / "nvidia0", file / "nvidia0"):
        with pytest.raises(RestoreFailed, match="cannot be given the device"):
            give(spec(bad))
        give(spec(bad), needed=False)  # nobody has it open: the container goes on without
    give(spec("/dev/../etc/nvidia0"))
    give({})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link"]
