"""The demo: a NumPy training job is checkpointed by the REST API, killed and restored, and the old process goes on.

It starts what it needs on this machine (a NATS server, for `--store s3` an S3 server, the API, the daemon), asks the API as any client
would, shows statuses and progress as they come, and ends everything it started; with `--keep` not before you say so.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hibernode.api.guard import hashed, new_token  # noqa: E402 - after the path
from tests.nats_server import NatsServer, free_port  # noqa: E402
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
    parser.add_argument("--keep", action="store_true", help="leave it all running, for a look at the page, until Ctrl-C")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    screen = Screen(arguments.json)
    try:
        with tempfile.TemporaryDirectory(prefix="hibernode-demo-") as directory:
            result = demo(Path(directory), arguments, screen)
    except DemoFailed as e:
        print(f"demo: {e}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0 if result["token_matches"] and result["counter_after"] > result["counter_before"] else 1)


def demo(directory: Path, arguments: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    with ExitStack() as running:
        nats = running.enter_context(NatsServer(directory / "nats"))
        screen.say(f"nats-server with JetStream at {nats.url}")
        api = Api(directory, nats.url, screen)
        running.callback(api.stop)
        api.start()
        daemon = Daemon(directory, nats.url, store_settings(arguments.store, directory, running, screen), screen)
        running.callback(daemon.stop)
        daemon.start()
        running.callback(daemon.stop_job)
        log = daemon.run_job(arguments.size)
        counter_before, token_before = next_step(log, 20)
        checkpoint = {"namespace": "default", "pod_name": JOB, "kind": "simple", "reason": "manual"}
        made, saved = act(api, "checkpoint", checkpoint, screen)
        counter_killed, _ = next_step(log, lines(log))
        daemon.stop_job()
        before_restore = lines(log)
        screen.say(f"killed {JOB!r} at step {counter_killed}; its token was {token_before}")
        _, restored = act(api, "restore", {"action_id": made, "reason": "manual"}, screen)
        resumed_at, _ = next_step(log, before_restore)
        counter_after, token_after = next_step(log, before_restore + 5)
        screen.say(f"the old process goes on: from step {resumed_at}, now at {counter_after}, token {token_after}")
        result = {
            "statuses": statuses_of(saved),
            "restore_statuses": statuses_of(restored),
            **{key: saved[key] for key in ("pause_ns", "raw_bytes", "zero_bytes", "stored_bytes", "streams")},
            "token_matches": token_after == token_before,
            "counter_before": counter_before,
            "counter_killed": counter_killed,
            "counter_resumed": resumed_at,
            "counter_after": counter_after,
            "checkpoint_seconds": round(saved["total_duration"] / 1e9, 3),
            "restore_seconds": round(restored["total_duration"] / 1e9, 3),
            "store": arguments.store,
            "page": api.page,
            "seconds": round(time.time() - arguments.began, 3),
        }
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            summary(result)
        if arguments.keep:
            keep(api, daemon, screen)
        return result


def keep(api: Api, daemon: Daemon, screen: Screen) -> None:
    """Until Ctrl-C, or SIGTERM."""
    screen.say(f"all of it runs on, the job as well: look at {api.page}")
    screen.say(f"or ask the daemon: hibernode --socket {daemon.socket} jobs")
    screen.say("Ctrl-C ends it")
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    signal.sigwait(ends)
    screen.say("ending")


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


def started(words: list[str], out: Path, ready: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """`hibernode ...`, when it is ready. It is not in our process group: Ctrl-C is for us, and we end it in order."""
    with open(out, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "hibernode", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            process_group=0,
        )
    deadline = time.monotonic() + 30
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise DemoFailed(f"hibernode {words[0]} did not start:\n{out.read_text()[-2000:]}")
        time.sleep(0.05)
    return process


def ended(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


class Api:
    """The control plane, with its database under `directory`; and its client."""

    def __init__(self, directory: Path, nats: str, screen: Screen) -> None:
        self._directory, self._screen = directory, screen
        self._port, self._token = free_port(), new_token()
        self._config = directory / "api.toml"
        self._process: subprocess.Popen[bytes] | None = None
        write_private(
            self._config,
            f'state_dir = "{directory}/api"\n[bus]\nurl = "{nats}"\n'
            f'[api]\nlisten = "127.0.0.1:{self._port}"\ntokens = ["demo:{hashed(self._token)}"]\n',
        )

    @property
    def page(self) -> str:
        """Where a browser sees it all; the token is taken out of the address by the page."""
        return f"http://127.0.0.1:{self._port}/#token={self._token}"

    def start(self) -> None:
        self._process = started(["api", "--config", str(self._config)], self._directory / "api.log", self._is_ready)
        self._screen.say(f"API as pid {self._process.pid}; its page: {self.page}")

    def _is_ready(self) -> bool:
        try:
            self.ask("GET", "/readyz")
        except (OSError, DemoFailed):
            return False
        return True

    def stop(self) -> None:
        ended(self._process)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """What it answers; an error of the API ends the demo in its words."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status >= 400:
            raise DemoFailed(f"{method} {path}: {answer.status} {text}")
        return json.loads(text) if "json" in str(answer.getheader("Content-Type")) else text


class Daemon:
    """A node daemon of its own, with everything it writes under `directory`."""

    def __init__(self, directory: Path, nats: str, store: str, screen: Screen) -> None:
        self._directory, self._screen = directory, screen
        self.socket = directory / "node.sock"
        self._work = Path("/dev/shm") / directory.name
        self._config = directory / "hibernode.toml"
        self._process: subprocess.Popen[bytes] | None = None
        write_private(
            self._config,
            f'node = "{NODE}"\nstate_dir = "{directory}/state"\nwork_dir = "{self._work}"\nsocket = "{self.socket}"\n'
            f'[bus]\nurl = "{nats}"\n[metrics]\nlisten = ""\n{store}',
        )

    def start(self) -> None:
        self._process = started(["node", "--config", str(self._config)], self._directory / "daemon.log", self.socket.exists)
        self._screen.say(f"daemon of node {NODE!r} runs as pid {self._process.pid}")

    def stop(self) -> None:
        ended(self._process)
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
        command = [sys.executable, "-m", "hibernode", "--socket", str(self.socket), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def write_private(path: Path, text: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600), encoding="utf-8") as file:
        file.write(text)


# --- a client of the API --------------------------------------------------------------------------------------------------------


def act(api: Api, verb: str, body: dict[str, str], screen: Screen) -> tuple[str, dict[str, Any]]:
    """File an action, show how it goes, until it has ended: its id, and the action as the API knows it then."""
    deadline, said = time.monotonic() + 120, ""
    while True:  # a node that has just started is not known yet
        try:
            action_id: str = api.ask("POST", f"/v2/{verb}/pod", body)
            break
        except DemoFailed:
            if time.monotonic() > deadline - 110:
                raise
            time.sleep(0.2)
    screen.say(f"POST /v2/{verb}/pod {json.dumps(body)}: action {action_id}")
    while True:
        action: dict[str, Any] = api.ask("GET", f"/v2/actions/{action_id}")
        if action["status"] != said:
            said = action["status"]
            screen.say(f"GET /v2/checkpoint/status/{action_id[:8]}...: {said}")
        elif (progress := action["progress"]) is not None:
            percent = 100 * progress["bytes_done"] // max(1, progress["bytes_total"])
            moved = f"{progress['bytes_done'] >> 20} MiB of memory, {progress['stored_bytes'] >> 20} MiB stored"
            screen.say(f"    {progress['phase']:<11}{percent:3} %  {moved}")
        if said == "error":
            raise DemoFailed(f"{verb} failed: {action['details']}")
        if said == "ready":
            return action_id, action
        if time.monotonic() > deadline:
            raise DemoFailed(f"{verb} did not end in time: it is {said}")
        time.sleep(0.1)


def statuses_of(action: dict[str, Any]) -> list[str]:
    return ["initialized", *(event["status"] for event in action["events"])]


# --- the job's log --------------------------------------------------------------------------------------------------------------


def lines(log: Path) -> int:
    return len(log.read_text().splitlines())


def next_step(log: Path, after: int) -> tuple[int, str]:
    """(step, token) of the first complete line after the `after`-th."""
    deadline = time.monotonic() + 60
    while True:
        written = log.read_text()
        for line in written.splitlines(keepends=True)[after:]:
            if (found := LINE.search(line)) and line.endswith("\n"):
                return int(found[1]), found[2]
        if time.monotonic() > deadline:
            raise DemoFailed(f"the job wrote nothing more:\n{written[-1000:]}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
