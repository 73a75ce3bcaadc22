"""The demo: a NumPy training job is checkpointed by command, killed and restored, and the old process goes on.

It starts what it needs on this machine (a NATS server, for `--store s3` an S3 server, the daemon), files commands on JetStream as
any control plane would, shows statuses and progress as they come back, and ends everything it started.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hibernode import wire  # noqa: E402 - after the path
from hibernode.config import Bus  # noqa: E402
from hibernode.drivers.nats import NatsControl  # noqa: E402
from hibernode.model import CheckpointCommand, Profile, RestoreCommand, Status, Target  # noqa: E402
from tests.nats_server import NatsServer  # noqa: E402
from tests.servers import S3Server  # noqa: E402

NODE, JOB = "demo-node", "trainer"
LINE = re.compile(r"step=(\d+) .* token=([0-9a-f]+)")


class DemoFailed(Exception):
    """Said in one line; what was started is ended first."""


@dataclass
class Screen:
    """Everything a person reads, on stderr when stdout is for JSON."""

    quiet: bool
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"[{time.monotonic() - self.began:6.2f} s] {text}", file=sys.stderr if self.quiet else sys.stdout, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", choices=("local", "s3"), default="local", help="where the checkpoint goes (default: local)")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="memory of the training job (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    screen = Screen(arguments.json)
    try:
        with tempfile.TemporaryDirectory(prefix="hibernode-demo-") as directory:
            result = asyncio.run(demo(Path(directory), arguments, screen))
    except DemoFailed as e:
        print(f"demo: {e}", file=sys.stderr)
        sys.exit(1)
    result["seconds"] = round(time.time() - arguments.began, 3)
    if arguments.json:
        print(json.dumps(result))
    else:
        summary(result)
    sys.exit(0 if result["token_matches"] and result["counter_after"] > result["counter_before"] else 1)


async def demo(directory: Path, arguments: argparse.Namespace, screen: Screen) -> dict[str, object]:
    with ExitStack() as running:
        nats = running.enter_context(NatsServer(directory / "nats"))
        screen.say(f"nats-server with JetStream at {nats.url}")
        daemon = Daemon(directory, nats.url, store_settings(arguments.store, directory, running, screen), screen)
        running.callback(daemon.stop)
        daemon.start()
        running.callback(daemon.stop_job)
        log = daemon.run_job(arguments.size)
        async with control(nats.url) as bus:
            counter_before, token_before = await next_step(log, 20)
            command = CheckpointCommand(
                action_id=new_id(), checkpoint_id=new_id(), target=Target(namespace="default", pod_name=JOB)
            )
            statuses, saved = await act(bus, command, screen)
            counter_killed, _ = await next_step(log, lines(log))
            daemon.stop_job()
            before_restore = lines(log)
            screen.say(f"killed {JOB!r} at step {counter_killed}; its token was {token_before}")
            restore_statuses, restored = await act(
                bus, RestoreCommand(action_id=new_id(), checkpoint_id=command.checkpoint_id), screen
            )
            resumed_at, _ = await next_step(log, before_restore)
            counter_after, token_after = await next_step(log, before_restore + 5)
            screen.say(f"the old process goes on: from step {resumed_at}, now at {counter_after}, token {token_after}")
    return {
        "statuses": statuses,
        "restore_statuses": restore_statuses,
        "pause_ns": saved.pause_ns,
        "raw_bytes": saved.raw_bytes,
        "zero_bytes": saved.zero_bytes,
        "stored_bytes": saved.stored_bytes,
        "streams": saved.streams,
        "token_matches": token_after == token_before,
        "counter_before": counter_before,
        "counter_killed": counter_killed,
        "counter_resumed": resumed_at,
        "counter_after": counter_after,
        "checkpoint_seconds": round(saved.total_duration / 1e9, 3),
        "restore_seconds": round(restored.total_duration / 1e9, 3),
        "store": arguments.store,
    }


def summary(result: dict[str, Any]) -> None:
    mib = 1 << 20
    raw, stored, zero = result["raw_bytes"] / mib, result["stored_bytes"] / mib, result["zero_bytes"] / mib
    steps = "saved after step {counter_before}, killed at {counter_killed}, resumed at {counter_resumed}, seen at {counter_after}"
    for what, how in (
        ("the old process goes on", f"{'yes, same token' if result['token_matches'] else 'NO'}; {steps.format(**result)}"),
        ("pause", f"{result['pause_ns'] / 1e6:.0f} ms"),
        ("memory", f"{raw:.0f} MiB, of which {zero:.0f} MiB zero pages that are not stored"),
        ("stored", f"{stored:.0f} MiB in {result['streams']} streams, ratio {raw / stored:.2f}"),
        ("checkpoint until ready", f"{result['checkpoint_seconds']:.2f} s, {raw / result['checkpoint_seconds']:.0f} MiB/s"),
        ("restore", f"{result['restore_seconds']:.2f} s, {raw / result['restore_seconds']:.0f} MiB/s"),
        ("everything", f"{result['seconds']:.1f} s"),
    ):
        print(f"{what:<26}{how}")


# --- what it starts -----------------------------------------------------------------------------------------------------------


def store_settings(kind: str, directory: Path, running: ExitStack, screen: Screen) -> str:
    """The `[store]` part of the configuration; an S3 server is started for it."""
    if kind == "local":
        return f'[store]\nurl = "file://{directory}/store"\n'
    server = running.enter_context(S3Server())
    screen.say(f"S3 server at {server.endpoint_url}")
    return (
        f'[store]\nurl = "s3://{server.bucket}/demo"\n[store.s3]\nendpoint_url = "{server.endpoint_url}"\naddressing = "path"\n'
        f'region = "us-east-1"\naccess_key_id = "{server.access_key_id}"\nsecret_access_key = "{server.secret_access_key}"\n'
    )


class Daemon:
    """A node daemon of its own, with everything it writes under `directory`."""

    def __init__(self, directory: Path, nats: str, store: str, screen: Screen) -> None:
        self._directory, self._screen = directory, screen
        self._socket, self._out = directory / "node.sock", directory / "daemon.log"
        self._work = Path("/dev/shm") / directory.name
        self._config = directory / "hibernode.toml"
        self._process: subprocess.Popen[bytes] | None = None
        write_private(
            self._config,
            f'node = "{NODE}"\nstate_dir = "{directory}/state"\nwork_dir = "{self._work}"\nsocket = "{self._socket}"\n'
            f'[bus]\nurl = "{nats}"\n[metrics]\nlisten = ""\n{store}',
        )

    def start(self) -> None:
        command = [sys.executable, "-m", "hibernode", "node", "--config", str(self._config)]
        with open(self._out, "wb") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT)
        deadline = time.monotonic() + 30
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DemoFailed(f"the daemon did not start:\n{self._out.read_text()[-2000:]}")
            time.sleep(0.05)
        self._screen.say(f"daemon of node {NODE!r} runs as pid {self._process.pid}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        shutil.rmtree(self._work, ignore_errors=True)

    def run_job(self, mib: int) -> Path:
        """Start the training job; its log."""
        train = [sys.executable, str(ROOT / "examples" / "train.py"), "--mib", str(mib)]
        started = json.loads(self._cli("--json", "run", "--name", JOB, "--cwd", "/", "--", *train))
        self._screen.say(f"$ hibernode run --name {JOB} -- python examples/train.py --mib {mib}   (pid {started['pid']})")
        return Path(started["log"])

    def stop_job(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self._cli("--json", "stop", JOB, "--signal", "KILL")

    def _cli(self, *words: str) -> str:
        command = [sys.executable, "-m", "hibernode", "--socket", str(self._socket), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def write_private(path: Path, text: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600), encoding="utf-8") as file:
        file.write(text)


# --- the control plane's side ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def control(url: str) -> AsyncIterator[NatsControl]:
    bus = NatsControl(Bus(url=url), "default")
    await asyncio.wait_for(bus.start(), 15)
    try:
        yield bus
    finally:
        await bus.stop()


def new_id() -> str:
    return str(uuid.uuid4())


async def act(bus: NatsControl, command: CheckpointCommand | RestoreCommand, screen: Screen) -> tuple[list[str], Profile]:
    """File a command, show what comes back, until its terminal event: the statuses in order, and the profile."""
    verb = wire.verb_of(command)
    watching = asyncio.ensure_future(show_progress(bus, command.action_id, screen))
    try:
        await bus.send(NODE, verb, command.action_id, wire.encode_command(command))
        screen.say(f"{verb}: initialized (the command is in JetStream, action {command.action_id})")
        statuses = [Status.INITIALIZED.value]
        async with asyncio.timeout(120):
            async for data in bus.follow(command.action_id):
                event = wire.decode_event(data)
                statuses.append(event.status.value)
                screen.say(f"{verb}: {event.status.value}" + (f"   {event.code}: {event.message}" if event.message else ""))
                if event.status == Status.ERROR:
                    raise DemoFailed(f"{verb} failed: {event.code}: {event.message} {event.hint} {event.details}")
                if event.status == Status.READY:
                    return statuses, event.profile or Profile()
    except TimeoutError:
        raise DemoFailed(f"{verb} did not end in time") from None
    finally:
        watching.cancel()
    raise DemoFailed(f"{verb}: the events ended before the action did")


async def show_progress(bus: NatsControl, action_id: str, screen: Screen) -> None:
    async for data in bus.follow_progress(action_id):
        progress = wire.decode_progress(data)
        percent = 100 * progress.bytes_done // max(1, progress.bytes_total)
        moved = f"{progress.bytes_done >> 20} MiB of memory, {progress.stored_bytes >> 20} MiB stored"
        screen.say(f"    {progress.phase:<11}{percent:3} %  {moved}")


# --- the job's log --------------------------------------------------------------------------------------------------------------


def lines(log: Path) -> int:
    return len(log.read_text().splitlines())


async def next_step(log: Path, after: int) -> tuple[int, str]:
    """(step, token) of the first complete line after the `after`-th."""
    deadline = time.monotonic() + 60
    while True:
        written = await asyncio.to_thread(log.read_text)
        for line in written.splitlines(keepends=True)[after:]:
            if (found := LINE.search(line)) and line.endswith("\n"):
                return int(found[1]), found[2]
        if time.monotonic() > deadline:
            raise DemoFailed(f"the job wrote nothing more:\n{written[-1000:]}")
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
