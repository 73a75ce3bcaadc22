"""The writable layer of containers, saved and brought back: what was changed, deleted, replaced is so in the new pod, byte for byte."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.workloads.cri import Cri
from hibernode.drivers.workloads.pod import Containers
from hibernode.drivers.workloads.runc import keeping_times
from hibernode.model import Target
from tests.containers.containerd import Containerd
from tests.containers.pods import Pod, counter, shell
from tests.containers.restoring import of
from tests.containers.test_checkpoints import ready
from tests.daemon import Daemon

pytestmark = [pytest.mark.containers, pytest.mark.timeout(180)]

CHANGES = """
echo changed >/etc/base; rm /etc/gone; rm -r /full; mkdir /full; echo new >/full/third
mkdir -p /data; echo hard >/data/one; ln /data/one /data/two; ln -s one /data/soft; mkfifo /data/pipe
dd if=/dev/zero of=/data/sparse bs=1 count=1 seek=10000000 2>/dev/null; chown 12:34 /data/one; chmod 4755 /data/one
touch -d '2001-02-03 04:05:06' /data/one
echo open >/data/deleted; exec 5</data/deleted; rm /data/deleted
exec /bin/counter -m 4 -f /data/last
"""


def upper(containerd: Containerd, pod: Pod) -> Path:
    """Of its only container, as the daemon finds it."""
    cri = Cri(containerd.address)
    try:
        nobody = None
        containers = Containers(cri, (), "runc", nobody, nobody, nobody)  # type: ignore[arg-type] # none of them is asked
        workload = containers.pod(Target(pod_id=pod.uid))
        assert workload is not None
        (layer,) = workload.layers().values()
        return layer.upper
    finally:
        cri.close()


def content(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a layer: kind, mode, owner, time, content, attributes."""
    found: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for path in sorted(root.rglob("*")):
        name, facts = str(path.relative_to(root)), path.lstat()
        kind = stat.S_IFMT(facts.st_mode)
        first = inodes.setdefault(facts.st_ino, name)
        data: object = None
        if stat.S_ISREG(facts.st_mode):
            data = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(facts.st_mode):
            data = os.readlink(path)
        elif stat.S_ISCHR(facts.st_mode):
            data = facts.st_rdev
        attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}
        attributes.pop("trusted.overlay.origin", None)
        attributes.pop("trusted.overlay.impure", None)
        time = 0 if stat.S_ISCHR(facts.st_mode) else facts.st_mtime_ns
        found[name] = (kind, stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid, time, data, first, attributes)
    return found


def test_the_layer_comes_back_with_the_processes(node: Containerd, restorer: Daemon) -> None:
    changes = CHANGES.replace("-f /data/last", "")  # which it writes on and on
    with Pod(node, [shell("app", changes)]) as old:
        before = old.beat()
        event = ready(restorer, pb.Target(pod_id=old.uid), kind="rootfs")
        was = content(upper(node, old))
    manifest = restorer.manifest(event.checkpoint_id)
    assert [layer["name"] for layer in manifest["layers"]] == ["app"]
    with of(node, event.checkpoint_id, [shell("app", changes)]) as new:
        assert new.next_beat(new.beat()).token == before.token
        assert new.exec("app", "cat", "/etc/base") == "changed\n"
        assert "No such file" in new.exec("app", "ls", "/etc/gone", check=False)
        assert new.exec("app", "ls", "/full") == "third\n"
        assert new.exec("app", "cat", "/proc/1/fd/5") == "open\n", "opened, then deleted"
        now = content(upper(node, new))
        assert {name: facts for name, facts in now.items() if facts != was.get(name)} == {}
        assert was.keys() == now.keys()


def test_a_file_that_is_written_is_as_it_was_then(node: Containerd, restorer: Daemon) -> None:
    with Pod(node, [shell("app", CHANGES)]) as old:
        before = old.beat()
        event = ready(restorer, pb.Target(pod_id=old.uid), kind="rootfs")
    with of(node, event.checkpoint_id, [shell("app", CHANGES)]) as new:
        assert new.next_beat(new.beat()).token == before.token
        assert before.token in new.exec("app", "cat", "/data/last")


def test_the_layer_alone_and_a_process_that_begins_anew(node: Containerd, restorer: Daemon) -> None:
    once = "test -e /data/token || { mkdir -p /data; echo made once >/data/token; }; rm -f /etc/gone; exec /bin/counter"
    with Pod(node, [shell("app", once)]) as old:
        before = old.beat()
        event = ready(restorer, pb.Target(pod_id=old.uid), kind="rootfsonly")
        assert old.next_beat(old.beat()).token == before.token
    manifest = restorer.manifest(event.checkpoint_id)
    assert (manifest["images"], [layer["name"] for layer in manifest["layers"]]) == ([], ["app"])
    assert manifest["pause_ns"] > 0
    with of(node, event.checkpoint_id, [shell("app", "exec /bin/counter")]) as new:
        assert new.beat().token != before.token
        assert new.exec("app", "cat", "/data/token") == "made once\n"
        assert "No such file" in new.exec("app", "ls", "/etc/gone", check=False)


def test_layers_of_three_containers(node: Containerd, restorer: Daemon) -> None:
    containers = [shell(name, f"echo {name} >/etc/base; exec /bin/counter -m 2") for name in ("a", "b")] + [counter("c")]
    with Pod(node, containers) as old:
        before = {name: old.beat(name) for name in "abc"}
        event = ready(restorer, pb.Target(pod_id=old.uid), kind="rootfs")
    with of(node, event.checkpoint_id, containers) as new:
        for name, first in before.items():
            assert new.next_beat(new.beat(name), name).token == first.token
        assert [new.exec(name, "cat", "/etc/base") for name in "ab"] == ["a\n", "b\n"]


def test_a_process_has_no_layer(restorer: Daemon) -> None:
    restorer.run("sleeper", ["sleep", "60"])
    event = restorer.checkpoint(pb.Target(pod_name="sleeper", namespace="default"), kind="rootfs")[-1]
    assert event.code == "kind"


def test_no_time_of_a_directory_outside_is_touched(tmp_path: Path) -> None:
    """Of names that an image has, and of links that a layer has."""
    inside, outside = tmp_path / "rootfs", tmp_path / "outside"
    for place in (inside / "here", outside):
        place.mkdir(parents=True)
    (inside / "link").symlink_to(outside)
    with keeping_times(inside, ["/here/file", "/link/file", "/../outside/file", "/missing/file"]):
        for place in (inside / "here", outside):
            os.utime(place, ns=(1, 1))
    assert (inside / "here").stat().st_mtime_ns > 1
    assert outside.stat().st_mtime_ns == 1
