"""What tests of restores share: a checkpoint of one pod as another one that is to be made, and ways to hold what our runtime does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from hibernode._pb import hibernode_pb2 as pb
from tests.containers.containerd import ROOT, Containerd
from tests.containers.pods import Container, Pod
from tests.containers.test_checkpoints import ready
from tests.daemon import Daemon
from tests.keeper import wait_until

WRAPPER = ROOT / "runtime" / "hibernode_runc.py"
SOCKET = Path(f"/run/hibernode-test-{os.getpid()}.sock")
HOLD = Path(f"/run/hibernode-test-{os.getpid()}.hold")  # a directory: a file of a verb's name in it holds that call of runc
FROM, ON_FAILURE = "hibernode.io/restore-from", "hibernode.io/on-failure"

# In place of runc, for what the wrapper asks of it: the wrapper's own words come first, so the verb is looked for.
RUNC = """#!/bin/sh
for word do
    if [ -e "{hold}/$word" ]; then
        touch "{hold}/$word.held"
        while [ -e "{hold}/$word" ]; do sleep 0.02; done
    fi
done
exec runc "$@"
"""


def again(node: Containerd, daemon: Daemon, old: Pod, containers: list[Container], criu_opts: str = "", **more: Any) -> Pod:
    """A pod that is to be the checkpoint of `old`, taken now; not made yet."""
    event = ready(daemon, pb.Target(pod_id=old.uid), criu_opts=criu_opts)
    return of(node, event.checkpoint_id, containers, **more)


def of(
    node: Containerd, checkpoint_id: str, containers: list[Container], notes: dict[str, str] | None = None, **more: Any
) -> Pod:
    """A pod that is to be that checkpoint; not made yet."""
    return Pod(node, containers, handler="hibernode", annotations={FROM: checkpoint_id, **(notes or {})}, **more)


def restores(daemon: Daemon) -> list[str]:
    """How restores have gone, the oldest first: their statuses, or the codes of their errors."""
    actions = daemon.stub.ListActions(pb.Empty(), timeout=10).actions
    ended = [(action.status, action.last.code) for action in actions if action.type == "restore"]
    return [code if status == "error" else status for status, code in ended]


def refused(pod: Pod, container: Container) -> str:
    """What somebody reads who looks why a container did not start: both words that the container runtime has for it."""
    with pod_failure() as said:
        pod.start(pod.create(container))
    status = pod.status(container.name)
    assert pod.state(container.name) == "EXITED"
    assert status.reason == "StartError"
    assert said[0].removeprefix("failed to create containerd task: ") in status.message
    return said[0]


@contextlib.contextmanager
def pod_failure() -> Iterator[list[str]]:
    """What is done inside fails in the container runtime; what it says."""
    said: list[str] = []
    try:
        yield said
    except grpc.RpcError as e:
        said.append(str(e.details()))  # type: ignore[attr-defined]
        return
    raise AssertionError("it did not fail")


@contextlib.contextmanager
def held(verb: str) -> Iterator[Path]:
    """The next call of runc of this verb by our runtime waits until the end of this, or until the file is removed."""
    HOLD.mkdir(exist_ok=True)
    (HOLD / verb).touch()
    try:
        yield HOLD / verb
    finally:
        for name in (verb, f"{verb}.held"):
            (HOLD / name).unlink(missing_ok=True)


def wait_held(hold: Path) -> None:
    wait_until(lambda: hold.with_name(f"{hold.name}.held").exists(), 30, f"runc {hold.name}")


def wrappers(pod: Pod, name: str) -> list[int]:
    """Processes of our runtime that are at work on this container."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(WRAPPER.name.encode()) for word in words[:3]) and pod.ids[name].encode() in words:
                found.append(int(pid))
    return found
