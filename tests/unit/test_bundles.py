"""What a bundle says of the container that will be made of it: where it will live, and what it may have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hibernode.drivers.workloads import runc
from hibernode.errors import Refused

MOUNTED = runc._freezers()


def bundle(directory: Path, cgroups_path: object) -> Path:
    (directory / "config.json").write_text(json.dumps({"linux": {"cgroupsPath": cgroups_path}}))
    return directory


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("/kubepods/burstable/pod1/abc", "/kubepods/burstable/pod1/abc"),
        (
            "kubepods-burstable-pod1_2.slice:cri-containerd:abc",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope",
        ),
        ("system.slice:runc:abc", "/system.slice/runc-abc.scope"),
        (":runc:abc", "/system.slice/runc-abc.scope"),
    ],
)
def test_where_a_container_will_live(tmp_path: Path, given: str, place: str) -> None:
    """The names of slices and scopes are systemd's (systemd.slice(5)); that runc takes them so was read, not tried, for want of systemd."""
    assert runc.freezer_of(bundle(tmp_path, given)) == f"{MOUNTED}{place}"


def test_the_hierarchy_is_there() -> None:
    assert any((Path(MOUNTED) / name).exists() for name in ("cgroup.procs", "cgroup.controllers"))


@pytest.mark.parametrize("given", ["", "relative", "/up/../../..", None, 7])
def test_a_place_that_is_none_is_refused(tmp_path: Path, given: object) -> None:
    """Everybody in it would be killed if the restore failed."""
    with pytest.raises(Refused) as raised:
        runc.freezer_of(bundle(tmp_path, given))
    assert raised.value.code == "runc_state"


def test_a_place_where_somebody_lives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="somebody lives"):
        runc.freezer_of(bundle(tmp_path, "/"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"linux": 7}'])
def test_a_bundle_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Refused):
        runc.freezer_of(tmp_path)
