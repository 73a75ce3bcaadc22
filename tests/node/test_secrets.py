"""No secret in logs, events, answers, metrics, or files that others can read (P12): planted ones are looked for in all that comes out."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import stat
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToJson

from hibernode import wire
from hibernode._pb import hibernode_pb2 as pb
from hibernode.config import Bus
from hibernode.drivers.nats import NatsControl
from tests import keys
from tests.daemon import ROOT, Daemon, failed, ready
from tests.fakes.s3_faults import Answer, FaultProxy
from tests.keeper import wait_until
from tests.nats_server import NatsServer
from tests.node.test_programs import free_port
from tests.node.workload import LIMIT, Program, checkpointed, python
from tests.servers import S3Server

pytestmark = pytest.mark.node


class Planted:
    """Every secret that a node can be given, and those that a command brings in wrong places; all of them random."""

    def __init__(self, directory: Path, s3: S3Server) -> None:
        self.bus_password, self.in_url, self.unknown = (secrets.token_hex(20) for _ in range(3))
        self.signing, self.trusted = keys.pair(directory)
        self.encryption = directory / "encryption.key"
        self.encryption.write_text(secrets.token_hex(32))
        self.encryption.chmod(0o600)
        body = [line for line in Path(self.signing).read_text().splitlines() if not line.startswith("-")]
        self._all = {
            "the bus's password": self.bus_password,
            "the password in the bus's url": self.in_url,
            "the store's secret": s3.secret_access_key,
            "the signing key": body[0],
            "the encryption key": self.encryption.read_text(),
            "what a command had in a wrong place": self.unknown,
        }

    def insist_absent(self, what: str, text: str) -> None:
        assert text, f"{what}: nothing to look at"
        for name, secret in self._all.items():
            assert secret not in text, f"{name} is in {what}"


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[tuple[Planted, Daemon, FaultProxy, NatsServer]]:
    """A node with all of them: its bus and its store want them."""
    with S3Server() as s3, FaultProxy(s3.endpoint_url) as proxy:
        found = Planted(tmp_path, s3)
        login = f'authorization {{ user: "hibernode", password: "{found.bus_password}" }}'
        settings = {
            "bus": {"user": "hibernode", "password": found.bus_password},
            "store": {
                "s3": {
                    **s3.settings().model_dump(exclude_defaults=True), "secret_access_key": s3.secret_access_key,
                    "endpoint_url": proxy.url, "attempts": 1,
                }
            },
            "signing": {"key": found.signing, "trusted": [found.trusted]},
            "encryption": {"key": str(found.encryption)},
            "log": {"level": "debug"},
        }  # fmt: skip
        port = free_port()
        with (
            NatsServer(tmp_path / "nats", settings=login) as bus,
            Daemon(
                tmp_path / "home", store=f"s3://{s3.bucket}/secrets", bus=bus.url, metrics=f"127.0.0.1:{port}", settings=settings
            ) as daemon,
        ):
            yield found, daemon, proxy, bus


def commands(daemon: Daemon, bus: NatsServer, planted: Planted, pid: int) -> list[str]:
    """Send what nobody can accept, with a secret where it does not belong; the events of it, as they stand on the bus."""
    told: list[str] = []
    nonsense: list[tuple[str, dict[str, object]]] = [
        ("checkpoint", {"api_token": planted.unknown}),
        ("checkpoint", {"target": {"pid": pid, "token": planted.unknown}}),
        ("checkpoint", {"overrides": {"criu_opts": json.dumps({"token": planted.unknown})}}),
        ("checkpoint", {"overrides": {"criu_opts": planted.unknown}}),
        ("restore", {"overrides": {"token": planted.unknown}}),
        ("restore", {"overrides": {"streams": -1, "token": planted.unknown}}),
    ]

    def command(verb: str, action: str, more: dict[str, object]) -> bytes:
        target = {"target": {"pid": pid}} if verb == "checkpoint" else {}
        return json.dumps({**more, "action_id": action, "checkpoint_id": action, **target, **more}).encode()

    async def send() -> None:
        control = NatsControl(Bus(url=bus.url, user="hibernode", password=planted.bus_password), "default")
        await control.start()
        try:
            await control.send("test-node", "checkpoint", str(uuid.uuid4()), planted.unknown.encode())
            await control.send("test-node", "cancel", str(uuid.uuid4()), json.dumps({"token": planted.unknown}).encode())
            waiting = set()
            for verb, more in nonsense:
                waiting.add(action := str(uuid.uuid4()))
                await control.send("test-node", verb, action, command(verb, action, more))
            async with asyncio.timeout(LIMIT):
                async for data in control.follow():
                    told.append(data.decode())
                    event = wire.decode_event(data)
                    if event.status.terminal:
                        waiting.discard(event.action_id)
                    if not waiting:
                        return
        finally:
            await control.stop()

    asyncio.run(send())
    unread = 2 + len(nonsense) - 2  # `criu_opts` is read later, and refused
    wait_until(lambda: daemon.log.count("malformed command") == unread, LIMIT, "what cannot be read")
    return told


def test_what_comes_out_of_a_node(planted: tuple[Planted, Daemon, FaultProxy, NatsServer], tmp_path: Path) -> None:
    secret, daemon, proxy, bus = planted
    work = tmp_path / "program"
    work.mkdir()
    with Program(work, python("counter.py", 0.01)) as program:
        program.beat()
        wait_until(lambda: "bus" in daemon.log and connected(daemon), LIMIT, "the bus")
        proxy.play("PutObject", Answer(403, "SignatureDoesNotMatch", f"of {secret.unknown}"), times=1, key="manifest.json")
        failed(daemon.checkpoint(program.target), "store_unavailable")
        told = commands(daemon, bus, secret, program.pid)
        done = checkpointed(daemon, program)
        ready(daemon.restore(done.checkpoint_id))
        verdicts = list(daemon.stub.Verify(pb.CheckpointId(checkpoint_id=done.checkpoint_id), timeout=30))
    answers = [
        *verdicts,
        daemon.stub.ListActions(pb.Empty(), timeout=10),
        daemon.stub.ListCheckpoints(pb.Empty(), timeout=10),
        daemon.stub.Doctor(pb.Empty(), timeout=30),
        daemon.stub.ListNodes(pb.Empty(), timeout=10),
        daemon.stub.Inspect(pb.CheckpointId(checkpoint_id=done.checkpoint_id), timeout=10),
    ]
    secret.insist_absent("its answers", "".join(MessageToJson(answer) for answer in answers))
    secret.insist_absent("its events", "".join(told))
    with urllib.request.urlopen(f"http://{daemon.metrics}/metrics", timeout=10) as page:
        secret.insist_absent("its metrics", page.read().decode())
    env = os.environ | {"PYTHONPATH": str(ROOT / "daemon"), "HIBERNODE_BUS__URL": f"nats://me:{secret.in_url}@127.0.0.1:1"}
    argv = [sys.executable, "-m", "hibernode", "check-config", "--config", str(daemon.config)]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=True, env=env)
    secret.insist_absent("check-config", shown.stdout + shown.stderr)
    assert "(hidden)" in shown.stdout
    with daemon.halted():
        for path in [daemon.state_dir, *daemon.state_dir.rglob("*"), daemon.socket, daemon.work_dir, *daemon.work_dir.rglob("*")]:
            assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, f"others can open {path}"
    secret.insist_absent("its log", daemon.log)


def connected(daemon: Daemon) -> bool:
    checks = daemon.stub.Doctor(pb.Empty(), timeout=30).checks
    return any(check.name == "event stream" and check.ok for check in checks)


def test_what_is_said_of_a_login_that_is_refused(tmp_path: Path) -> None:
    """The broker's url has the password, and the library quotes urls."""
    with S3Server() as s3:
        secret = Planted(tmp_path, s3)
        with NatsServer(tmp_path / "nats", settings='authorization { user: "hibernode", password: "another" }') as bus:
            url = bus.url.replace("nats://", f"nats://hibernode:{secret.in_url}@")
            with Daemon(bus=url, settings={"log": {"level": "debug"}}) as daemon:
                wait_until(lambda: "the broker refuses this node" in daemon.log, LIMIT, "a refusal")
                secret.insist_absent("its answers", MessageToJson(daemon.stub.Doctor(pb.Empty(), timeout=30)))
            secret.insist_absent("its log", daemon.log or "gone with the daemon")
