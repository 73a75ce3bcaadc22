"""What an image may have in a new container: one row per demand that the container's own specification does not give."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from hibernode.drivers.workloads import rights
from hibernode.drivers.workloads.rights import CAPABILITIES, insist_within
from hibernode.errors import Refused
from hibernode.ports import Demands, MountFacts, TaskRights

NAMES = ["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_NET_RAW"]
BITS = sum(CAPABILITIES[name] for name in NAMES)
ROOT = TaskRights(1, frozenset({0}), frozenset({0}), BITS, BITS, filtered=True, no_new_privs=False, label="")
SPEC: dict[str, Any] = {
    "process": {"user": {"uid": 0, "gid": 0}, "capabilities": {"bounding": NAMES, "permitted": NAMES}},
    "root": {"path": "rootfs"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "options": ["nosuid", "nodev"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "options": ["ro"]},
        {"destination": "/data", "type": "bind", "options": ["rbind", "ro"]},
    ],
    "linux": {"maskedPaths": ["/proc/keys"], "readonlyPaths": ["/proc/sys"], "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
}
MOUNTS = [
    MountFacts("/", "overlayfs", "", 0),
    MountFacts("/proc", "proc", "", 6),
    MountFacts("/proc/keys", "tmpfs", "/dev/null", 2),
    MountFacts("/proc/sys", "proc", "", 1),
    MountFacts("/sys/fs/cgroup", "tmpfs", "", 0),
    MountFacts("/sys/fs/cgroup/cpu", "cgroup", "/sys/fs/cgroup/cpu", 1),
    MountFacts("/data", "unsupported", "/data", 1),
]
WANTS = Demands([ROOT], MOUNTS, ["/dev/null", "/dev/pts/0"])


def spec(**process: Any) -> dict[str, Any]:
    made = copy.deepcopy(SPEC)
    made["process"].update(process)
    return made


def task(**changes: Any) -> Demands:
    return replace(WANTS, tasks=[ROOT, replace(ROOT, pid=7, **changes)])


def mounted(*changed: MountFacts, without: str = "") -> Demands:
    places = {mount.place: mount for mount in (*MOUNTS, *changed) if mount.place != without}
    return replace(WANTS, mounts=list(places.values()))


USER = {"user": {"uid": 1000, "gid": 1000, "additionalGids": [5]}, "capabilities": {"bounding": NAMES}}
MINE = replace(ROOT, uids=frozenset({1000}), gids=frozenset({1000, 5}), permitted=0)


@pytest.mark.parametrize(
    ("prop", "of", "wants"),
    [
        ("capabilities of task 7", SPEC, task(permitted=BITS | CAPABILITIES["CAP_SYS_ADMIN"])),
        ("capabilities of task 7", SPEC, task(permitted=1 << 63)),
        ("bounding capabilities of task 7", SPEC, task(bounding=BITS | CAPABILITIES["CAP_SYS_PTRACE"])),
        ("capabilities of task 1", spec(**USER), replace(WANTS, tasks=[replace(MINE, permitted=1)])),
        ("uid of task 1", spec(**USER), replace(WANTS, tasks=[replace(MINE, uids=frozenset({1000, 0}))])),
        ("gid of task 1", spec(**USER), replace(WANTS, tasks=[replace(MINE, gids=frozenset({1000, 42}))])),
        ("uid of task 7", spec(capabilities={"bounding": NAMES[3:]}), replace(WANTS, tasks=[replace(MINE, pid=7, bounding=0)])),
        ("seccomp of task 7", SPEC, task(filtered=False)),
        ("no_new_privs of task 1", spec(noNewPrivileges=True), WANTS),
        ("label of task 1", spec(apparmorProfile="cri-containerd.apparmor.d"), WANTS),
        ("label of task 7", SPEC, task(label="unconfined_t")),
        ("a mount", SPEC, mounted(MountFacts("/mnt", "proc", "", 0))),
        ("a mount", SPEC, mounted(MountFacts("/proc", "debugfs", "", 6))),
        ("mount /proc", SPEC, mounted(MountFacts("/proc", "proc", "", 2))),
        ("mount /data", SPEC, mounted(MountFacts("/data", "unsupported", "/data", 0))),
        ("mount /proc/sys", SPEC, mounted(MountFacts("/proc/sys", "proc", "", 0))),
        ("mount /proc/sys", SPEC, mounted(without="/proc/sys")),
        ("mount /proc/keys", SPEC, mounted(without="/proc/keys")),
        ("mount /sys/fs/cgroup/cpu", SPEC, mounted(MountFacts("/sys/fs/cgroup/cpu", "cgroup", "/sys/fs/cgroup/cpu", 0))),
        ("mount /", {**SPEC, "root": {"readonly": True}}, WANTS),
        ("an open device", SPEC, replace(WANTS, devices=["/dev/sda"])),
        ("an open device", SPEC, replace(WANTS, devices=["deleted"])),
    ],
)
def test_more_than_the_specification_gives_is_refused(
    prop: str, of: dict[str, Any], wants: Demands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rights, "_is_there", lambda path: True)
    with pytest.raises(Refused) as raised:
        insist_within("app", of, wants)
    assert (raised.value.code, raised.value.details["property"]) == ("privileges", prop)
    assert raised.value.details["found"] != raised.value.details["wanted"]
    assert "'app'" in raised.value.message


@pytest.mark.parametrize(
    ("of", "wants"),
    [
        (SPEC, WANTS),
        (SPEC, task(uids=frozenset({1000}), gids=frozenset({1000}), permitted=0, bounding=0, no_new_privs=True)),
        (spec(**USER), replace(WANTS, tasks=[MINE])),
        (spec(apparmorProfile="unconfined"), WANTS),
        ({**SPEC, "linux": {}}, mounted(without="/proc/sys")),
        ({**SPEC, "linux": {**SPEC["linux"], "devices": [{"path": "/dev/fuse"}]}}, replace(WANTS, devices=["/dev/fuse"])),
    ],
)
def test_what_the_specification_gives_may_be_had(of: dict[str, Any], wants: Demands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "_is_there", lambda path: True)
    if not of["linux"]:
        wants = replace(wants, mounts=[mount for mount in wants.mounts if mount.place != "/proc/keys"])
    insist_within("app", of, wants)


def test_a_path_that_the_machine_has_not_need_not_be_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "_is_there", lambda path: False)
    insist_within("app", SPEC, mounted(without="/proc/keys"))


def test_a_mount_from_outside_that_the_new_container_has_not_has_a_code_of_its_own() -> None:
    with pytest.raises(Refused) as raised:
        insist_within("app", SPEC, mounted(MountFacts("/gone", "unsupported", "/gone", 0)))
    assert (raised.value.code, raised.value.details["wanted"]) == ("container_mounts", "/gone")


def test_in_a_user_namespace_device_nodes_are_those_of_the_machine() -> None:
    """runc mounts them, each at its own path, and a device that the new container has not is none of them."""
    linux = {"namespaces": [{"type": "user"}, {"type": "mount"}], "devices": [{"path": "/dev/fuse"}]}
    of = {**SPEC, "linux": {**SPEC["linux"], **linux}}
    there = [MountFacts(path, "unsupported", path, 0) for path in ("/dev/null", "/dev/urandom", "/dev/fuse")]
    insist_within("app", of, mounted(*there))
    for wanting, given in ((there[1], SPEC), (there[2], {**of, "linux": {**of["linux"], "devices": []}})):
        with pytest.raises(Refused, match=wanting.place):
            insist_within("app", given, mounted(wanting))
    own = {**of, "mounts": [*of["mounts"], {"destination": "/dev/null", "type": "bind", "options": ["bind", "ro"]}]}
    with pytest.raises(Refused, match="without ro"):
        insist_within("app", own, mounted(there[0]))
    for source in ("/dev/mem", "/data"):
        with pytest.raises(Refused):
            insist_within("app", of, mounted(MountFacts("/dev/null", "unsupported", source, 0)))


def test_who_may_mount_may_have_mounted() -> None:
    names = [*NAMES, "CAP_SYS_ADMIN"]
    of = {**spec(capabilities={"bounding": names, "permitted": names}), "linux": {}}
    insist_within("app", of, replace(mounted(MountFacts("/mnt", "fuse", "", 0), without="/proc/keys"), devices=["/dev/fuse"]))
