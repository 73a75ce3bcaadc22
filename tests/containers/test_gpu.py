"""GPU state of containers, on a driver that is not NVIDIA's (`tests/fakes/cuda`): real bindings, real containerd, runc and CRIU."""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernode._pb import hibernode_pb2 as pb
from tests.containers.containerd import STATES, Containerd
from tests.containers.images import CUDA, CUDA_JOB
from tests.containers.pods import Container, Mount, Pod, counter, shell
from tests.containers.restoring import FROM, SOCKET, again, of, restores
from tests.containers.test_checkpoints import ready
from tests.daemon import Daemon
from tests.fakes.cuda import GPU0, GPU1, MIB, FakeGpus
from tests.keeper import wait_until
from tests.node.programs.cuda_job import sequence

pytestmark = [pytest.mark.containers, pytest.mark.timeout(180)]

MIB_USED = 8
KILL = '{"leave_running": false}'
OTHER = "GPU-0f0f0f0f-1111-2222-3333-444444444444"  # of another kind


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    made = FakeGpus(tmp_path / "gpus")
    monkeypatch.setenv("FAKE_CUDA_ROOT", str(made.root))  # of the daemon, for its helper
    return made


@pytest.fixture
def daemon(node: Containerd, gpus: FakeGpus) -> Iterator[Daemon]:
    with running(node, gpus) as made:
        yield made


def running(node: Containerd, gpus: FakeGpus, design: str = "lock") -> Daemon:
    gpu = {"libcuda": str(gpus.libcuda), "nvml": str(gpus.libnvml), "lock_timeout": 2.0, "design": design}
    containers = {"cri": node.address, "roots": [str(STATES)], "socket": str(SOCKET)}
    return Daemon(settings={"containers": containers, "limits": {"restore": 15.0}, "gpu": gpu})


def training(gpus: FakeGpus, name: str = "app", at: str = "0", **env: str) -> Container:
    """A training on the first GPU that it sees, which is the machine's number `at`. It has the node of that alone."""
    inside = {
        "LD_LIBRARY_PATH": "/driver",
        "FAKE_CUDA_ROOT": "/machine",
        "FAKE_CUDA_DEVICE": "/dev/nvidia%d",
        "CUDA_VISIBLE_DEVICES": "0",
        **env,
    }
    mounts = [Mount(str(gpus.build), "/driver", readonly=True), Mount(str(gpus.root), "/machine")]
    return Container(
        name,
        CUDA,
        [*CUDA_JOB, "/dev/stdout", "--mib", str(MIB_USED)],
        inside,
        mounts,
        devices={str(gpus.node()): f"/dev/nvidia{at}"},
    )


def steps(pod: Pod, name: str = "app") -> list[tuple[int, int, str]]:
    found = [line.split() for line in pod.lines(name)]
    return [(int(step), int(value), token) for step, value, token in found]


def goes_on(pod: Pod, name: str = "app", more: int = 5) -> tuple[int, str]:
    """Every value is what a program that nobody has touched would have; the number of its last step, and its token."""
    before = len(pod.lines(name))
    wait_until(lambda: len(pod.lines(name)) >= before + more, 20, f"{more} steps of {name}")
    said = steps(pod, name)
    wanted = dict(enumerate(itertools.islice(sequence(1, MIB_USED), said[-1][0]), 1))
    assert [(step, value) for step, value, _ in said] == [(step, wanted[step]) for step in range(said[0][0], said[-1][0] + 1)]
    (token,) = {token for *_, token in said}
    return said[-1][0], token


def test_a_training_goes_on_after_its_checkpoint_and_comes_back_as_another_pod(
    node: Containerd, daemon: Daemon, gpus: FakeGpus
) -> None:
    with Pod(node, [training(gpus)]) as old:
        goes_on(old)
        used = gpus.used(GPU0)
        assert used > MIB_USED * MIB
        ready(daemon, pb.Target(pod_id=old.uid))
        goes_on(old)
        assert gpus.used(GPU0) == used
        made = again(node, daemon, old, [training(gpus)], KILL)
        wait_until(lambda: old.state() == "EXITED", 20, "its end")
        assert gpus.used(GPU0) == 0
        last, _, token = steps(old)[-1]
    with made as new:
        assert goes_on(new)[1] == token
        assert steps(new)[0][0] == last + 1
        assert gpus.used(GPU0) == used
        wait_until(lambda: restores(daemon) == ["ready"], 20, "the restore to be told")


def test_a_training_comes_back_on_another_gpu_whose_node_only_the_new_pod_has(
    node: Containerd, daemon: Daemon, gpus: FakeGpus
) -> None:
    """On another machine, where the second GPU is of its kind."""
    with Pod(node, [training(gpus)]) as old:
        goes_on(old)
        event = ready(daemon, pb.Target(pod_id=old.uid))
        _, token = goes_on(old)
    daemon.stop()
    gpus.say(OTHER, "name", "Another GPU")
    gpus.replug([OTHER, GPU1])
    daemon.start()
    with of(node, event.checkpoint_id, [training(gpus, at="1")]) as new:
        assert goes_on(new)[1] == token
        assert gpus.used(GPU1) > MIB_USED * MIB
        assert stat.S_ISCHR(Path(f"/proc/{new.pid()}/root/dev/nvidia1").stat().st_mode)


@pytest.mark.parametrize("share", [False, True])
def test_gpus_are_there_again_when_all_containers_of_the_pod_are(
    node: Containerd, daemon: Daemon, gpus: FakeGpus, share: bool
) -> None:
    """Two trainings, each the first process of its container, and somebody who has nothing to do with GPUs."""
    three = [training(gpus, "a"), training(gpus, "b"), counter("c")]
    with Pod(node, three, share=share) as old:
        tokens = {name: goes_on(old, name)[1] for name in "ab"}
        before = old.beat("c")
        made = again(node, daemon, old, three, share=share)
        for name in "ab":
            goes_on(old, name)
        assert old.next_beat(old.beat("c"), "c").token == before.token
        manifest = daemon.manifest(made.annotations[FROM])
        assert sorted(each["image"] for each in manifest["gpu"]["processes"]) == ["a", "b"]
    made.run_sandbox()
    try:
        for container in three[:2]:
            made.start(made.create(container))
        assert not made.lines("a"), "it stands in a call of the driver"
        made.start(made.create(three[2]))
        for name in "ab":
            assert goes_on(made, name)[1] == tokens[name]
        assert made.next_beat(made.beat("c"), "c").token == before.token
        wait_until(lambda: restores(daemon) == ["ready"], 20, "the restore to be told")
    finally:
        made.remove()


def test_a_checkpoint_that_fails_gives_everything_back(node: Containerd, daemon: Daemon, gpus: FakeGpus) -> None:
    """Another container's dump fails when the GPU is free already; a device stays open; the daemon dies."""
    holds = "dd if=/dev/zero of=/tmp/big bs=1M count=2 2>/dev/null; exec 3</tmp/big; rm /tmp/big; exec /bin/counter"
    with Pod(node, [training(gpus, "a"), shell("b", holds)]) as pod:
        goes_on(pod, "a")
        first = pod.beat("b")
        used = gpus.used(GPU0)
        assert daemon.checkpoint(pb.Target(pod_id=pod.uid), criu_opts='{"ghost_limit": 1000}')[-1].code == "dump_failed"
        goes_on(pod, "a")
        assert pod.next_beat(first, "b").token == first.token
        gpus.arm("any", "checkpoint", "300ms once")
        answers = daemon.begin_checkpoint(pb.Target(pod_id=pod.uid))
        journal = daemon.state_dir / "gpu" / "journal"
        wait_until(lambda: journal.exists() and '"checkpointing"' in journal.read_text(), 20, "a helper in its checkpoint")
        daemon.kill()
        del answers
        daemon.start()
        goes_on(pod, "a")
        assert gpus.used(GPU0) == used
        daemon.insist_clean()
    with Pod(node, [training(gpus, FAKE_CUDA_LEFTOVER="fd")]) as pod:
        goes_on(pod)
        assert daemon.checkpoint(pb.Target(pod_id=pod.uid))[-1].code == "gpu_leftover"
        goes_on(pod)
        daemon.insist_clean()


def test_a_restore_whose_gpu_state_does_not_come_back_leaves_nothing(node: Containerd, daemon: Daemon, gpus: FakeGpus) -> None:
    with Pod(node, [training(gpus)]) as old:
        goes_on(old)
        event = ready(daemon, pb.Target(pod_id=old.uid))
        _, token = goes_on(old)
    gpus.arm("any", "restore", "2 once")
    with of(node, event.checkpoint_id, [training(gpus)]) as new:
        wait_until(lambda: restores(daemon) == ["gpu_failed"], 20, "the restore to fail")
        wait_until(lambda: new.state() == "EXITED", 20, "its end")
        assert not new.lines()
    assert gpus.used(GPU0) == 0
    with of(node, event.checkpoint_id, [training(gpus)]) as new:
        assert goes_on(new)[1] == token


def test_a_container_is_not_saved_while_it_stands_still(node: Containerd, gpus: FakeGpus) -> None:
    with running(node, gpus, "stop") as daemon, Pod(node, [training(gpus)]) as pod:
        goes_on(pod)
        assert daemon.checkpoint(pb.Target(pod_id=pod.uid))[-1].code == "gpu_design"
        goes_on(pod)
