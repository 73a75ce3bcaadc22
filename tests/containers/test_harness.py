"""What the tests of containers stand on: containerd, pods and plain containers of our own run, CRIU can dump and restore them on this
machine, and nothing of them is left at the end."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import keeper
from tests.containers import images
from tests.containers.containerd import PATH, STATES, Containerd, cgroups, mounts
from tests.containers.pods import PORT, Container, Mount, Pod, ask, counter, shell
from tests.containers.runc import RuncContainer
from tests.keeper import wait_until
from tests.nats_server import free_port

pytestmark = pytest.mark.containers


def machine() -> dict[str, set[str]]:
    """What of this machine pods could have changed; what has our names is looked for by `_insist_gone`."""

    def said(*argv: str) -> set[str]:
        return set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines())

    rules = {line for line in said("iptables-save") if line.startswith("-")}
    return {
        "places": {str(place) for place in map(Path, ("/opt/containerd", "/var/lib/containerd", "/etc/cni")) if place.exists()},
        "rules": rules,
        "forwarding": {Path("/proc/sys/net/ipv4/ip_forward").read_text()},
        "names of network namespaces": said("ip", "netns", "list"),
    }


# --- pods -------------------------------------------------------------------------------------------------------------------


def test_a_pod_counts_answers_and_has_what_its_manifest_says(containerd: Containerd, disk: Path) -> None:
    (disk / "given").write_text("from outside")
    app = shell(
        "app",
        f"id -u; cat /given; echo; exec /bin/counter -m 4 -p {PORT} -f /tmp/last",
        env={"COLOUR": "blue"},
        mounts=[Mount(str(disk / "given"), "/given", readonly=True)],
        memory_limit=64 << 20,
    )
    with Pod(containerd, [app], name="one", namespace="here") as pod:
        first = pod.beat()
        assert pod.lines()[:2] == ["0", "from outside"]
        assert first.content == ("4", "whole")
        assert pod.ask().token == first.token
        assert pod.next_beat(first).token == first.token
        assert first.token in pod.exec("app", "cat", "/tmp/last")
        assert "COLOUR=blue" in pod.exec("app", "env")
        assert pod.uid in pod.exec("app", "cat", "/etc/hosts", "/var/run/secrets/kubernetes.io/serviceaccount/token")
        assert pod.exec("app", "hostname") == "one\n"
        assert pod.state() == "RUNNING"
        assert Path(f"/proc/{pod.pid()}/exe").resolve().name == "counter"
        assert f"pod{pod.uid}/{pod.ids['app']}" in Path(f"/proc/{pod.pid()}/cgroup").read_text()
        pod.stop("app")
        assert (pod.state(), pod.status().exit_code) == ("EXITED", 0)


@pytest.mark.parametrize("share", [False, True])
def test_three_containers_of_a_pod_share_its_network_and_its_pids_if_it_says_so(containerd: Containerd, share: bool) -> None:
    three = [counter("a", port=PORT), counter("b", memory=2, port=PORT + 1), counter("c", image=images.BUSYBOX)]
    with Pod(containerd, three, share=share) as pod:
        tokens = [pod.beat(name).token for name in "abc"]
        assert len(set(tokens)) == 3
        assert [pod.ask(port).token for port in (PORT, PORT + 1)] == tokens[:2]
        assert tokens[0] in pod.exec("c", "sh", "-c", f"echo | nc 127.0.0.1 {PORT}")
        seen = pod.exec("c", "ps")
        assert ("/bin/pause" in seen) == share
        assert seen.count("/bin/counter") == (3 if share else 1)


def test_a_pod_of_the_other_runtime_shows_it_its_annotations(containerd: Containerd) -> None:
    notes = {"hibernode.io/restore-from": "nowhere", "else.io/x": "y"}
    for handler, shown in (("hibernode", {"hibernode.io/restore-from"}), ("runc", set())):
        with Pod(containerd, [counter()], handler=handler, annotations=notes) as pod:
            bundle = containerd.home / f"state/io.containerd.runtime.v2.task/k8s.io/{pod.ids['app']}"
            told = set(re.findall(r'"((?:hibernode|else)\.io/[\w-]+)"', (bundle / "config.json").read_text()))
            assert told == shown


def test_the_other_runtime_is_the_program_that_a_test_gives(tmp_path: Path) -> None:
    wrapper, calls = tmp_path / "wrapper", tmp_path / "calls"
    wrapper.write_text('#!/bin/sh\necho "$*" >>"$CALLS"\nexec runc "$@"\n')
    wrapper.chmod(0o755)
    with Containerd(wrapper=wrapper, env={"CALLS": str(calls)}, wanted=(images.PAUSE, images.COUNTER)) as containerd:
        with Pod(containerd, [counter()], handler="hibernode") as pod:
            pod.beat()
            assert re.findall(rf" (create|start) .*{pod.ids['app']}$", calls.read_text(), re.MULTILINE) == ["create", "start"]
        said = calls.read_text()
        with Pod(containerd, [counter()]):
            assert calls.read_text() == said


def test_a_container_has_a_terminal_if_its_manifest_says_so(containerd: Containerd) -> None:
    with Pod(containerd, [shell("app", "tty; exec /bin/counter", tty=True, stdin=True)]) as pod:
        pod.beat()
        assert pod.lines()[0].strip() == "/dev/pts/0"


def test_a_container_is_as_safe_as_its_security_context_says(containerd: Containerd) -> None:
    secure = {"run_as_user": {"value": 1000}, "readonly_rootfs": True, "no_new_privs": True}
    script = "id -u; touch /x 2>/dev/null || echo read-only; grep NoNewPrivs /proc/self/status; exec sleep 1000"
    with Pod(containerd, [shell("app", script, security=secure)]) as pod:
        wait_until(lambda: len(pod.lines()) == 3, 20, "its lines")
        assert pod.lines() == ["1000", "read-only", "NoNewPrivs:\t1"]


def test_redis_in_a_container_keeps_what_it_is_told(containerd: Containerd) -> None:
    with Pod(containerd, [Container("redis", images.REDIS)]) as pod:
        wait_until(lambda: any("Ready to accept" in line for line in pod.lines("redis")), 20, "redis")
        assert pod.exec("redis", "redis-cli", "set", "key", "value") == "OK\n"
        assert pod.exec("redis", "redis-cli", "get", "key") == "value\n"
        with Pod(containerd, [shell("client", "exec sleep 1000")]) as other:
            said = other.exec("client", "sh", "-c", f"printf 'get key\\r\\n' | nc -w 1 {pod.ip} 6379", check=False)
            assert "protected mode" in said


def test_pods_outlive_their_containerd(containerd: Containerd) -> None:
    with Pod(containerd, [counter()]) as pod:
        before = pod.beat()
        containerd.stop(kill=True)
        containerd.start()
        assert pod.state() == "RUNNING"
        assert pod.next_beat(pod.beat()).token == before.token


# --- what is left -------------------------------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_containerd_and_its_pods() -> None:
    before = machine()
    with Containerd(wanted=(images.PAUSE, images.COUNTER)) as containerd:
        with Pod(containerd, [counter("a"), counter("b")]):
            assert mounts(containerd.home)
            assert cgroups(containerd.cgroup)
            assert {line.partition(":")[0] for line in containerd.remains()} == {
                "a mount", "a state", "a cgroup", "a port of the bridge",
            }  # fmt: skip
            assert Path(f"/sys/class/net/{containerd.bridge}").exists()
        assert not containerd.leftovers()
    _insist_gone(containerd)
    assert machine() == before


def test_a_pod_that_a_test_forgot_fails_it_and_is_gone_all_the_same() -> None:
    before = machine()
    containerd = Containerd(wanted=(images.PAUSE, images.COUNTER))
    with pytest.raises(AssertionError, match="a pod: forgotten"), containerd:
        Pod(containerd, [counter()], name="forgotten").run()
    _insist_gone(containerd)
    assert machine() == before


def test_nothing_is_left_of_a_containerd_that_died_with_pods(capsys: pytest.CaptureFixture[str]) -> None:
    before = machine()
    containerd = Containerd(wanted=(images.PAUSE, images.COUNTER))

    def die() -> None:
        with containerd:
            Pod(containerd, [counter()]).run()
            containerd.stop(kill=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        die()
    assert "--- log of containerd" in capsys.readouterr().err
    _insist_gone(containerd)
    assert machine() == before


def _insist_gone(containerd: Containerd) -> None:
    assert not containerd.home.exists()
    assert not containerd.remains()
    assert not mounts(containerd.home)
    assert not cgroups(containerd.cgroup)
    assert not Path(f"/sys/class/net/{containerd.bridge}").exists()
    named = [pid for pid in _pids() if containerd.home.name in keeper.describe(pid)]
    assert not named


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


# --- containers of plain runc, and what CRIU can do here ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shared_containerd: Containerd) -> dict[str, images.Image]:
    return shared_containerd.images


def test_a_plain_container_goes_on_from_where_it_was_dumped(made: dict[str, images.Image], disk: Path) -> None:
    """Should this fail, so does all that concerns containers: the machine, its runc or its CRIU cannot do it."""
    with RuncContainer(disk, made[images.COUNTER], ["/bin/counter", "-m", "16", "-f", "/last"]) as container:
        before = container.beat()
        assert container.state["status"] == "running"
        container.checkpoint(disk / "images", "--leave-running")
        after = container.next_beat(container.beat())
        assert after.token == before.token
        container.kill()
        container.restore(disk / "images")
        assert before.counter <= container.beat().counter
        restored = container.next_beat(container.beat())
        assert (restored.token, restored.content) == (before.token, ("16", "whole"))
        assert before.token in (container.upper / "last").read_text()
        assert container.root.joinpath(container.id, "state.json").exists()
    assert not mounts(disk)


def test_a_container_of_a_pod_is_dumped_and_its_network_is_open_again(containerd: Containerd, disk: Path) -> None:
    """CRIU closes the network of a container that has one of its own, with iptables, whether anybody is connected or not."""
    with Pod(containerd, [counter(port=PORT)]) as pod:
        before = pod.beat()  # waits for one: before that it may not listen yet
        places = ["--image-path", str(disk / "images"), "--work-path", str(disk)]
        words = ["--root", str(STATES), "checkpoint", "--leave-running", *places, pod.ids["app"]]
        subprocess.run([containerd.runc, *words], env={"PATH": PATH}, check=True, timeout=60)
        assert "net: Lock network" in (disk / "dump.log").read_text()
        enter = ["nsenter", "--net", f"--target={pod.pid()}"]
        for program in ("iptables-save", "ip6tables-save"):
            assert not subprocess.run([*enter, program], capture_output=True, check=True).stdout.count(b"CRIU")
        assert pod.ask().token == before.token
        assert pod.next_beat(pod.beat()).token == before.token


def test_a_plain_container_may_have_the_machines_network(made: dict[str, images.Image], disk: Path) -> None:
    port = free_port()
    script = f"echo told; exec /bin/counter -p {port}"
    with RuncContainer(disk, made[images.BUSYBOX], ["/bin/sh", "-c", script], host_network=True) as container:
        before = container.beat()  # after it the port is open
        assert ask("127.0.0.1", port).token == before.token
        assert container.lines[0] == "told"
        assert container.exec("cat", "/etc/base") == "etc/base of the image\n"


@pytest.mark.parametrize(("text", "works"), [("log-file other.log\n", True), ("no-such-option\n", False)])
def test_runcs_criu_reads_the_file_that_an_annotation_names(
    made: dict[str, images.Image], disk: Path, text: str, works: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that nobody has to write /etc/criu/runc.conf, which is what it reads otherwise."""
    config = disk / "criu.conf"
    config.write_text(text)
    with RuncContainer(disk, made[images.COUNTER], annotations={"org.criu.config": str(config)}) as container:
        before = container.beat()
        if works:
            container.checkpoint(disk / "images", "--leave-running")
            assert (disk / "criu/other.log").exists()
            container.kill()
            (disk / "criu/other.log").unlink()
            container.restore(disk / "images")
            assert (disk / "criu/other.log").exists()
        else:
            with pytest.raises(subprocess.CalledProcessError):
                container.checkpoint(disk / "images", "--leave-running")
        assert container.next_beat(container.beat()).token == before.token


# --- images -------------------------------------------------------------------------------------------------------------------


def test_the_same_files_give_the_same_image(tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        made = images.build(tmp_path / name, [images.COUNTER])
        images.pack(list(made.values()), tmp_path / f"{name}.tar")
        with tarfile.open(tmp_path / f"{name}.tar") as tar:
            digests.append(sorted(tar.getnames()))
    assert digests[0] == digests[1]
