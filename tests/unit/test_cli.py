"""The command line as people and scripts meet it, against the real gRPC service with a scripted dispatcher behind it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli import cli, text
from hibernode.cli.follow import Speeds
from hibernode.cli.group import DEFAULT_SOCKET, SECTIONS
from hibernode.config import Config
from hibernode.errors import (
    BadCommand,
    Busy,
    Cancelled,
    Corrupt,
    DumpFailed,
    HibernodeError,
    NotFound,
    Refused,
    StoreUnavailable,
    Stuck,
)
from hibernode.model import BaseRef, CheckpointCommand, GarbageRequest, Gpu, GpuInventory, HeartbeatWish, Verdict
from tests.fakes.desk import ACTION, CHECKPOINT, GIB, MIB, FakeDesk, Served, failing, holding, serving, succeeding
from tests.fakes.machine import GPUS

DEADLINE = 20.0
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
PROGRAM = [sys.executable, "-c", "from hibernode.cli import cli; cli(prog_name='hibernode')"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(FakeDesk(), tmp_path / "h.sock") as made:
        yield made


@pytest.fixture
def desk(served: Served) -> FakeDesk:
    return served.desk


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def records(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> Any:
        return json.loads(self.err)["error"]


def hibernode(path: Path, *args: str, answer: str | None = None, **env: str) -> Result:
    """Run it in this process, without a terminal."""
    result = CliRunner().invoke(
        cli, list(args), input=answer, env={"HIBERNODE_SOCKET_PATH": str(path), **env}, prog_name="hibernode"
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return Result(result.exit_code, result.stdout, result.stderr)


class Terminal:
    """It runs in a process of its own, on a terminal of `columns`."""

    def __init__(self, path: Path, *args: str, columns: int = 80, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        settings = {"HIBERNODE_SOCKET_PATH": str(path), "TERM": "xterm-256color", "PYTHONUTF8": "1", **env}
        inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        self.process = subprocess.Popen(
            [*PROGRAM, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | settings,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, pattern: str) -> str:
        end = time.monotonic() + DEADLINE
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if not self._read(0.1) and self.process.poll() is not None:
                break
        assert re.search(pattern, self.seen), f"no {pattern!r} in {self.seen!r}"
        return self.seen

    def end(self) -> int:
        """Its exit code, once it has ended by itself."""
        while self._read(DEADLINE):
            pass
        os.close(self._ours)
        return self.process.wait(timeout=DEADLINE)

    def _read(self, timeout: float) -> bool:
        if not select.select([self._ours], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        self.seen += data.decode()
        return bool(data)

    @property
    def words(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen).replace("\r", "")


# --- each command, for people and for programs ------------------------------------------------------------------------


def test_run_passes_where_and_with_what(served: Served, desk: FakeDesk) -> None:
    result = hibernode(served.path, "run", "--name", "t", "-e", "A=b=c", "--", "python", "x.py", "--json", MINE="yes")
    assert result.code == 0
    job = desk.jobs[0]
    assert (job.name, job.namespace, job.argv, job.cwd) == ("t", "default", ["python", "x.py", "--json"], os.getcwd())
    assert job.env["A"] == "b=c"
    assert job.env["MINE"] == "yes"
    assert "started t\n" in result.out
    assert "hibernode checkpoint t" in result.out
    clean = hibernode(served.path, "run", "--json", "--name", "x/t", "--clean-env", "-e", "A=b", "--cwd", "/tmp", "true")
    assert clean.document["namespace"] == "x"
    assert (desk.jobs[1].env, desk.jobs[1].cwd) == ({"A": "b"}, "/tmp")


def test_options_of_the_job_are_not_ours(served: Served, desk: FakeDesk) -> None:
    desk.fail["run_job"] = NotFound("no program x")
    assert hibernode(served.path, "run", "--name", "t", "--", "x", "--json").err == "error: no program x [not_found]\n"


def test_run_refuses_what_cannot_be_passed(served: Served, desk: FakeDesk) -> None:
    assert hibernode(served.path, "run", "--name", "t", "-e", "nothing", "--", "true").code == 2
    assert hibernode(served.path, "run", "--name", "t").code == 2
    odd = hibernode(served.path, "run", "--name", "t", "-e", "A=\udce4", "--", "true")
    assert odd.code == 2
    assert "variable A is not valid UTF-8" in odd.err
    assert desk.jobs == []


def test_jobs(served: Served) -> None:
    out = hibernode(served.path, "jobs").out
    assert re.search(r"^trainer +job +running +4242 +3\.00 GiB +5 +2h ago +python train\.py --epochs 90$", out, re.MULTILINE)
    assert re.search(r"^preprocess-imagenet +job +exited +2h ago", out, re.MULTILINE)
    workloads = hibernode(served.path, "jobs", "--json").document["workloads"]
    assert workloads[0]["rss"] == 3 * GIB  # a number: int64 in protobuf's own JSON is a string


def test_stop(served: Served, desk: FakeDesk) -> None:
    assert hibernode(served.path, "stop", "trainer").out == "✓ trainer is killed\n"
    stopped = hibernode(served.path, "stop", "trainer", "-n", "x", "--signal", "kill", "--json").document
    assert stopped["state"] == "killed"
    assert desk.stopped == [("default", "trainer", "TERM"), ("x", "trainer", "KILL")]


def test_checkpoint_waits_and_reports(served: Served) -> None:
    result = hibernode(served.path, "checkpoint", "trainer", "--checkpoint-id", CHECKPOINT)
    assert result.code == 0
    assert result.err == ""
    for words in (
        "checkpoint of trainer\n",
        "processing\n",
        "dumping  12%, 0.25 of 2.00 GiB",
        "all is captured after a pause of 412 ms\n",
        "✓ checkpoint is ready\n",
        "took    6.7 s\n",
        "pause   412 ms\n",
        "memory  2.00 GiB, of which 412 MiB are zeros\n",
        "stored  680 MiB, 3.0x smaller in 8 streams\n",
        "phases  shipping 6.2 s, dumping 412 ms, committing 80 ms, unaccounted 20 ms, starting 12 ms\n",
        f"hibernode restore {CHECKPOINT}\n",
    ):
        assert words in result.out
    assert not CONTROL.search(result.out)


def test_checkpoint_as_json_lines(served: Served, desk: FakeDesk) -> None:
    result = hibernode(served.path, "--json", "checkpoint", "trainer")
    events = [r["event"] for r in result.records if "event" in r]
    assert [e["status"] for e in events] == ["processing", "checkpoint_created", "ready"]
    assert events[-1]["profile"]["pause_ns"] == 412_300_000
    assert {r["progress"]["bytes_total"] for r in result.records if "progress" in r} == {2 * GIB}
    assert {e["action_id"] for e in events} == {desk.commands[0].action_id}


def test_checkpoint_hands_over_all_it_was_told(served: Served, desk: FakeDesk) -> None:
    args = ["--kill", "--async", "--compression", "zstd:9", "--streams", "4", "--criu-opts", '{"tcp": "close"}']
    args += ["--kind", "rootfs", "--directory", "file:///b", "--checkpoint-id", CHECKPOINT]
    assert hibernode(served.path, "checkpoint", "team/trainer", *args).code == 0
    command = desk.commands[0]
    assert isinstance(command, CheckpointCommand)
    assert (command.target.namespace, command.target.pod_name) == ("team", "trainer")
    assert (command.checkpoint_id, command.kind, command.reason) == (CHECKPOINT, "rootfs", "manual")
    chosen = command.overrides
    assert (chosen.asynchronous, chosen.compression, chosen.streams) == (True, "zstd:9", 4)
    assert chosen.directory == "file:///b"
    assert json.loads(chosen.criu_opts) == {"tcp": "close", "leave_running": False}


@pytest.mark.parametrize(
    ("args", "target"),
    [
        (["--pid", "7"], {"pid": 7}),
        (["--pod", ACTION], {"pod_id": ACTION}),
        (["--container", "3f0c"], {"container": "3f0c"}),
        (["team-a/web-0"], {"namespace": "team-a", "pod_name": "web-0"}),
    ],
)
def test_checkpoint_of_something_else(served: Served, desk: FakeDesk, args: list[str], target: dict[str, object]) -> None:
    assert hibernode(served.path, "checkpoint", *args).code == 0
    command = desk.commands[0]
    assert isinstance(command, CheckpointCommand)
    assert command.target.model_dump(exclude_defaults=True) == target
    assert command.overrides.criu_opts == ""


def test_checkpoint_without_waiting(served: Served, desk: FakeDesk) -> None:
    desk.script = holding
    told = hibernode(served.path, "checkpoint", "trainer", "--no-wait", "--json").document
    assert told == {"action_id": desk.commands[0].action_id, "checkpoint_id": desk.commands[0].checkpoint_id}
    shown = hibernode(served.path, "checkpoint", "trainer", "--no-wait").out
    assert f"hibernode watch {desk.commands[1].action_id}\n" in shown
    assert desk.cancelled == []
    served.release()
    assert hibernode(served.path, "watch", told["action_id"]).code == 0


def test_a_refusal_is_told_without_waiting_too(served: Served, desk: FakeDesk) -> None:
    desk.fail["submit"] = Busy("the workload has another action")
    result = hibernode(served.path, "checkpoint", "trainer", "--no-wait")
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: the workload has another action [busy]\n"


def test_restore(served: Served, desk: FakeDesk) -> None:
    result = hibernode(served.path, "restore", CHECKPOINT, "--name", "again", "--criu-opts", '{"tcp": "close"}')
    assert result.code == 0
    assert "✓ it runs again\n" in result.out
    assert (desk.commands[0].checkpoint_id, desk.commands[0].overrides.pod_name) == (CHECKPOINT, "again")
    hibernode(served.path, "restore", CHECKPOINT, "--lazy", "--criu-opts", '{"tcp": "close"}')
    assert json.loads(desk.commands[1].overrides.criu_opts) == {"tcp": "close", "restore": "lazy"}
    records = hibernode(served.path, "restore", CHECKPOINT, "--json").records
    assert records[-1]["event"]["status"] == "ready"


def test_status_of_all_and_of_one(served: Served, desk: FakeDesk) -> None:
    assert hibernode(served.path, "status").out == "no actions yet on this node\n"
    hibernode(served.path, "checkpoint", "trainer")
    action = desk.commands[0].action_id
    table = hibernode(served.path, "status").out
    assert re.search(rf"^{action}  checkpoint  ready +7s ago +7\.0 s +412 ms +trainer$", table, re.MULTILINE)
    one = hibernode(served.path, "status", action).out
    assert re.search(r"^target +pod default/trainer$", one, re.MULTILINE)
    assert re.search(r"^pause +412 ms$", one, re.MULTILINE)
    assert hibernode(served.path, "status", "--json").document["actions"][0]["action_id"] == action
    assert hibernode(served.path, "status", action, "--json").document["last"]["seq"] == 3


def test_status_shows_the_latest_and_says_how_to_see_the_rest(served: Served) -> None:
    for _ in range(22):
        hibernode(served.path, "checkpoint", "trainer")
    out = hibernode(served.path, "status").out
    assert out.endswith("and 2 older: hibernode status --all\n")
    assert len(hibernode(served.path, "status", "--all").out.splitlines()) == 23


def test_status_of_a_failed_action_shows_why_and_is_no_failure(served: Served, desk: FakeDesk) -> None:
    desk.script = failing(NotFound("no job named trainer", hint="`hibernode jobs` lists them"))
    hibernode(served.path, "checkpoint", "trainer")
    result = hibernode(served.path, "status", desk.commands[0].action_id)
    assert result.code == 0
    assert "no job named trainer [not_found]" in result.out
    assert re.search(r"error .*not_found$", hibernode(served.path, "status").out, re.MULTILINE)


def test_watch_of_one_ends_with_it(served: Served, desk: FakeDesk) -> None:
    hibernode(served.path, "checkpoint", "trainer")
    action = desk.commands[0].action_id
    assert "✓ checkpoint is ready\n" in hibernode(served.path, "watch", action).out
    assert hibernode(served.path, "watch", action, "--json").records[-1]["event"]["status"] == "ready"
    desk.script = failing(DumpFailed("criu said no"))
    hibernode(served.path, "checkpoint", "trainer")
    assert hibernode(served.path, "watch", desk.commands[1].action_id).code == 1


def test_cancel(served: Served, desk: FakeDesk) -> None:
    desk.script = holding
    hibernode(served.path, "checkpoint", "trainer", "--no-wait")
    action = desk.commands[0].action_id
    assert hibernode(served.path, "cancel", action).out.startswith("✓ asked it to stop\n")
    assert hibernode(served.path, "cancel", action, "--json").document == {"action_id": action, "found": True}
    unknown = hibernode(served.path, "cancel", ACTION)
    assert (unknown.code, desk.cancelled) == (1, [action, action, ACTION])
    assert unknown.err.startswith(f"error: no action {ACTION} is running here [not_found]\n")


def test_list(served: Served) -> None:
    out = hibernode(served.path, "list").out
    row = rf"^{CHECKPOINT}  trainer +62m ago  2\.00 GiB  680 MiB   3\.0x  412 ms  node-a  simple$"
    assert re.search(row, out, re.MULTILINE)
    assert len(hibernode(served.path, "list", "--json").document["checkpoints"]) == 2


def test_inspect(served: Served) -> None:
    out = hibernode(served.path, "inspect", CHECKPOINT).out
    assert re.search(r"^command +python train\.py --epochs 90$", out, re.MULTILINE)
    assert re.search(r"^made with +CRIU 4\.2\.1", out, re.MULTILINE)
    assert re.search(r"^trainer +2 +2\.00 GiB +412 MiB +8 +680 MiB$", out, re.MULTILINE)
    document = hibernode(served.path, "inspect", CHECKPOINT, "--json").document
    assert document["location"] == f"s3://checkpoints/prod/{CHECKPOINT}"
    assert document["manifest"]["images"][0]["tasks"][0]["pid"] == 4242


def test_an_increment_is_listed_with_its_bases_and_its_own_bytes(served: Served, desk: FakeDesk) -> None:
    whole, old = desk.manifests[0], desk.manifests[1]
    (image,) = whole.images
    base = BaseRef(
        **old.images[0].model_dump(exclude={"tasks", "files", "files_bytes", "bases", "digests", "name"}), name=image.name,
        digests=image.index, checkpoint_id=old.checkpoint_id,
    )  # fmt: skip
    changed = image.model_copy(update={"bases": [base], "referenced": 1 << 18})
    desk.manifests = [whole.model_copy(update={"images": [changed]}), old]
    out = hibernode(served.path, "list").out
    assert re.search(rf"^{CHECKPOINT}  trainer +62m ago  2\.00 GiB  680 MiB   3\.0x      1  412 ms", out, re.MULTILINE)
    out = hibernode(served.path, "inspect", CHECKPOINT).out
    assert re.search(rf"^bases +{old.checkpoint_id}$", out, re.MULTILINE)
    assert re.search(r"^trainer +2 +2\.00 GiB +412 MiB +1\.00 GiB +8 +680 MiB$", out, re.MULTILINE)


@pytest.mark.parametrize(("option", "wanted"), [("--increment", "auto"), (f"--increment={CHECKPOINT}", CHECKPOINT)])
def test_an_increment_is_asked_for(served: Served, desk: FakeDesk, option: str, wanted: str) -> None:
    assert hibernode(served.path, "checkpoint", "trainer", option, "--kill").code == 0
    assert json.loads(desk.commands[0].overrides.criu_opts) == {"increment": wanted, "leave_running": False}


def test_verify(served: Served, desk: FakeDesk) -> None:
    good = hibernode(served.path, "verify", CHECKPOINT)
    assert (good.code, good.out.splitlines()[0]) == (0, "✓ every byte is what was written")
    assert hibernode(served.path, "verify", CHECKPOINT, "--json").records[-1]["bytes"] == 680 * MIB
    desk.verdicts[-1:] = [
        Verdict(ok=False, bytes=9, frames=1, seconds=1.0, code="corrupt", message="frame 7 of pages-1.zst is damaged")
    ]
    bad = hibernode(served.path, "verify", CHECKPOINT)
    assert bad.code == 1
    assert bad.err.startswith("error: frame 7 of pages-1.zst is damaged [corrupt]\nhint: ")
    assert hibernode(served.path, "verify", CHECKPOINT, "--json").error["code"] == "corrupt"


def test_delete_asks_first_and_needs_someone_to_ask(served: Served, desk: FakeDesk) -> None:
    nobody = hibernode(served.path, "delete", CHECKPOINT)
    assert (nobody.code, desk.deleted) == (2, [])
    assert "add --yes" in nobody.err
    assert hibernode(served.path, "delete", CHECKPOINT, "--yes").code == 0
    document = hibernode(served.path, "delete", CHECKPOINT, "--yes", "--json").document
    assert document == {"checkpoint_id": CHECKPOINT, "deleted": True}
    assert desk.deleted == [CHECKPOINT, CHECKPOINT]


@pytest.mark.parametrize(("key", "code", "deleted"), [("y\n", 0, [CHECKPOINT]), ("n\n", 1, []), ("\n", 1, [])])
def test_delete_on_a_terminal(served: Served, desk: FakeDesk, key: str, code: int, deleted: list[str]) -> None:
    terminal = Terminal(served.path, "delete", CHECKPOINT)
    terminal.wait_for("cannot be brought back")
    os.write(terminal._ours, key.encode())
    assert terminal.end() == code
    assert desk.deleted == deleted


def test_gc_shows_and_removes_nothing(served: Served, desk: FakeDesk) -> None:
    result = hibernode(served.path, "gc")
    assert result.code == 0
    assert [line.split()[:2] for line in result.out.splitlines()[1:4]] == [
        ["upload", ACTION],
        ["attempt", ACTION],
        ["checkpoint", CHECKPOINT],
    ]
    assert re.search(r"checkpoint +\S+ +trainer +30d 00h +2.00 GiB +there are newer ones", result.out)
    assert "would go: 1 checkpoint, 1 attempt, 1 upload (2.29 GiB)\n" in result.out
    assert result.out.endswith("nothing is removed yet; to do it: hibernode gc --apply\n")
    assert desk.collected == [GarbageRequest()]


def test_gc_says_how_to_do_just_that(served: Served, desk: FakeDesk) -> None:
    rules = ["--keep-last", "3", "--keep-days", "0.5", "--grace", "2d", "--directory", "file:///a b"]
    line = hibernode(served.path, "gc", *rules).out.splitlines()[-1].partition("hibernode gc ")[2]
    assert line == "--keep-last 3 --keep-days 0.5 --grace 172800 --directory 'file:///a b' --apply"
    asked = GarbageRequest(keep_last=3, keep_days=0.5, grace=172800.0, directory="file:///a b")
    assert desk.collected == [asked]
    assert hibernode(served.path, "gc", *shlex.split(line)).code == 0
    assert desk.collected[1] == asked.model_copy(update={"apply": True})


@pytest.mark.parametrize(
    ("said", "seconds"), [("0", 0), ("90", 90), ("1.5m", 90), ("12h", 43200), ("2d", 172800), ("1w", 604800)]
)
def test_gc_understands_times(served: Served, desk: FakeDesk, said: str, seconds: float) -> None:
    assert hibernode(served.path, "gc", "--grace", said).code == 0
    assert desk.collected == [GarbageRequest(grace=seconds)]


def test_gc_with_apply_tells_each_and_goes_on_after_a_failure(served: Served, desk: FakeDesk) -> None:
    done = hibernode(served.path, "gc", "--apply", "--keep-last", "0")
    assert done.code == 0
    assert f"✓ removed upload {ACTION}/main/pages-0.zst\n" in done.out
    assert done.out.endswith("removed: 1 checkpoint, 1 attempt, 1 upload (2.29 GiB)\n")
    assert desk.collected == [GarbageRequest(apply=True, keep_last=0)]
    ends = {"state": "failed", "code": "store_unavailable", "message": "no answer\x1b[2J"}
    desk.garbage[:2] = [desk.garbage[0].model_copy(update=ends), desk.garbage[1].model_copy(update={"state": "in_use"})]
    partly = hibernode(served.path, "gc", "--apply")
    assert partly.code == 1
    assert not CONTROL.search(partly.out + partly.err)
    assert "✗ failed: upload " in partly.out
    assert "✗ in use: attempt " in partly.out
    assert partly.out.endswith("removed: 1 checkpoint (2.00 GiB)\n")
    assert partly.err.startswith("error: 1 of 3 could not be removed; the first: no answer")
    assert "[store_unavailable]\nhint: what is left is found again: repeat the command\n" in partly.err


def test_gc_tells_what_stays(served: Served, desk: FakeDesk) -> None:
    stays = desk.garbage[2].model_copy(
        update={"state": "kept", "reason": "unreadable", "code": "corrupt", "message": "it is damaged", "checkpoint_id": ACTION}
    )
    foreign = [stays.model_copy(update={"reason": "foreign", "code": ""}) for _ in range(2)]
    desk.garbage = [stays, *foreign]
    result = hibernode(served.path, "gc")
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        f"✗ checkpoint {ACTION} stays: it is damaged [corrupt]\n"
        "left alone, because hibernode did not write all of it: 2 ids\n"
        "✓ there is nothing to remove\n"
    )
    assert hibernode(served.path, "gc", "--apply").out.endswith("nothing was removed\n")


def test_gc_as_json_lines(served: Served, desk: FakeDesk) -> None:
    result = hibernode(served.path, "gc", "--json")
    assert [(each["what"], each["state"], each["bytes"]) for each in result.records] == [
        ("upload", "found", 0),
        ("attempt", "found", 300 * MIB),
        ("checkpoint", "found", 2 * GIB),
    ]
    desk.garbage[0] = desk.garbage[0].model_copy(update={"state": "failed", "code": "no_room", "message": "full"})
    partly = hibernode(served.path, "gc", "--json", "--apply")
    assert (partly.code, partly.error["code"], len(partly.records)) == (1, "no_room", 3)


def test_doctor_says_what_to_mend(served: Served, desk: FakeDesk) -> None:
    sick = hibernode(served.path, "doctor")
    assert sick.code == 1
    assert "✓ criu   4.2.1\n" in sick.out
    assert "✗ store  no room on the device\n" in sick.out
    assert "mend: free some space under /var/lib/hibernode/store\n" in sick.out
    assert "! GPUs   none  (not required)\n" in sick.out
    assert sick.err == "error: a required check fails: store [unfit]\n"
    as_json = hibernode(served.path, "doctor", "--json")
    assert (as_json.code, as_json.error["code"]) == (1, "unfit")
    assert [c["ok"] for c in as_json.document["checks"]] == [True, False, False]
    desk.checks = [check for check in desk.checks if check.name != "store"]
    assert hibernode(served.path, "doctor").code == 0  # what is not required is no reason


def test_nodes(served: Served) -> None:
    out = hibernode(served.path, "nodes").out
    gpus = r"2 × NVIDIA H100 +1\.00 of 160 GiB"
    assert re.search(rf"^node-a +1 +12\.5 +64 +400 of 512 GiB +{gpus} .*s3://checkpoints/prod$", out, re.MULTILINE)
    assert [n["node"] for n in hibernode(served.path, "nodes", "--json").document["nodes"]] == ["node-a", "node-b"]


def test_nodes_say_which_pods_ask_for_nonsense(served: Served, desk: FakeDesk) -> None:
    known = {"namespace": "ml", "uid": "u-1"}
    wishes = [
        HeartbeatWish(name="well", interval=600, keep_last=3, **known),
        HeartbeatWish(name="bad", problem="it is soon", **known),
    ]
    desk.node = desk.node.model_copy(update={"heartbeats": wishes})
    out = hibernode(served.path, "nodes").out
    assert "! pod ml/bad has no heartbeats: it is soon\n" in out
    assert "ml/well" not in out
    told = hibernode(served.path, "nodes", "--json").document["nodes"][0]["heartbeats"]
    assert [each["interval"] for each in told] == [600, 0]


def test_nodes_say_why_their_gpus_are_not_known(served: Served, desk: FakeDesk) -> None:
    one = GPUS.gpus[0]
    for inventory, shown in (
        (GpuInventory(), r"\? the node does not say {2,}\S"),
        (GpuInventory(state="absent", reason="no NVIDIA driver"), r"512 GiB {3,}\d"),
        (GpuInventory(state="ok", reason=""), r"512 GiB {3,}\d"),
        (
            GPUS.model_copy(update={"state": "silent", "reason": "NVML does not answer"}),
            "2 × NVIDIA H100, NVML does not answer +1.00 of 160 GiB",
        ),
        (GPUS.model_copy(update={"gpus": [one, Gpu(index=1)]}), "1 × NVIDIA H100, 1 × unknown GPU +0.00 of 80.0 GiB"),
    ):
        desk.node = desk.node.model_copy(update={"gpu_inventory": inventory})
        first = next(line for line in hibernode(served.path, "nodes").out.splitlines() if line.startswith("node-a"))
        assert re.search(shown, first), first
    told = hibernode(served.path, "nodes", "--json").document["nodes"][0]["gpu_inventory"]
    assert (told["gpus"][0]["memory_used"], "memory_used" in told["gpus"][1]) == (0, False)


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS: list[HibernodeError] = [
    BadCommand("no such compression: gzip", hint="zstd, zstd:<level>, lz4 or none"),
    NotFound("no job named trainer in namespace default", hint="`hibernode jobs` lists them"),
    Refused("gpu_mig", "mig is on", prop="mig", found="on", wanted="off", hint="100 % off, größer"),
    StoreUnavailable("no answer from s3"),
    Busy("the workload has another action"),
    Cancelled("asked for"),
    Corrupt("wrong digest"),
    DumpFailed("criu said no", log="one\ntwo\nError: connected TCP socket"),
    Stuck("left suspended", hint="look at it"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.code)
def test_each_error_of_a_call_is_one_line_a_hint_and_a_code(served: Served, desk: FakeDesk, error: HibernodeError) -> None:
    desk.fail = {"submit": error, "actions": error, "watch": error, "verify": error, "collect_garbage": error}
    for args in (["checkpoint", "trainer"], ["status"], ["watch"], ["verify", CHECKPOINT], ["gc"]):
        shown = hibernode(served.path, *args)
        assert shown.code == 1
        assert shown.err.splitlines()[0] == f"error: {error.message} [{error.code}]"
        assert (f"\nhint: {error.hint}\n" in shown.err) == bool(error.hint)
        told = hibernode(served.path, *args, "--json")
        assert (told.code, told.out) == (1, "")
        assert told.error == {
            "code": error.code,
            "message": error.message,
            "hint": error.hint,
            "details": error.details,
        }


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.code)
def test_each_way_an_action_fails(served: Served, desk: FakeDesk, error: HibernodeError) -> None:
    desk.script = failing(error)
    shown = hibernode(served.path, "checkpoint", "trainer")
    assert shown.code == 1
    assert shown.err.splitlines()[0] == f"error: {error.message} [{error.code}]"
    if error.retry:
        assert "hint: the same command may succeed later" in shown.err
    if "log" in error.details:
        assert shown.err.endswith("log:\n  one\n  two\n  Error: connected TCP socket\n")
    told = hibernode(served.path, "checkpoint", "trainer", "--json")
    assert told.records[-1]["event"]["code"] == error.code
    assert (told.code, told.error["code"], told.error["details"]) == (1, error.code, error.details)


def test_a_defect_of_the_daemon_shows_no_traceback(served: Served, desk: FakeDesk, caplog: pytest.LogCaptureFixture) -> None:
    desk.fail["doctor"] = ZeroDivisionError("secret")
    result = hibernode(served.path, "doctor")
    assert result.code == 1
    assert result.err == "error: a defect of the daemon [internal]\nhint: the daemon's log has the details\n"
    assert "ZeroDivisionError" in caplog.text


def test_what_comes_from_elsewhere_cannot_steer_the_terminal(served: Served, desk: FakeDesk) -> None:
    desk.fail["actions"] = NotFound("a\x1b[2Jb\r\nc", hint="\x1b]0;title\x07")
    result = hibernode(served.path, "status")
    assert not CONTROL.search(result.err)
    assert result.err.splitlines()[0] == "error: a\N{REPLACEMENT CHARACTER}[2Jb c [not_found]"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["checkpoint"], "give one of: NAME of a job or pod, --pod UID, --container ID, --pid PID"),
        (["checkpoint", "a", "--pid", "7"], "give one of: NAME of a job or pod, --pod UID, --container ID, --pid PID"),
        (["checkpoint", "--pid", "7", "-n", "x"], "--namespace goes with a NAME"),
        (["checkpoint", "a/b", "-n", "x"], "a/b and --namespace x name two namespaces"),
        (["checkpoint", "a", "--criu-opts", "{"], "--criu-opts is not JSON"),
        (["checkpoint", "a", "--criu-opts", "[]"], "--criu-opts is not a JSON object"),
        (["checkpoint", "a", "--kill", "--criu-opts", '{"leave_running": true}'], "--kill and --criu-opts disagree"),
        (["checkpoint", "a", "--increment", "--criu-opts", '{"increment": "none"}'], "--increment and --criu-opts disagree"),
        (["checkpoint", "a", "--streams", "65"], "65 is not in the range"),
        (["checkpoint", "a", "--checkpoint-id", "x"], "'x' is not a valid UUID"),
        (["stop", "a", "--signal", "HUP"], "'HUP' is not one of"),
        (["gc", "--grace", "soon"], "soon is not a time like 90, 30m, 12h or 2d"),
        (["gc", "--keep-last", "-1"], "-1 is not in the range"),
        (["restore"], "missing argument 'CHECKPOINT_ID'"),
        (["restore", CHECKPOINT, "--lazy", "--criu-opts", '{"restore": "eager"}'], "--lazy and --criu-opts disagree"),
        (["hibernate"], "no such command 'hibernate'"),
        (["list", "--frobnicate"], "no such option '--frobnicate'"),
    ],
)
def test_a_command_line_that_makes_no_sense(served: Served, desk: FakeDesk, args: list[str], words: str) -> None:
    result = hibernode(served.path, *args)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert words in result.err
    assert "--help` shows what it takes" in result.err
    told = hibernode(served.path, *args, "--json")
    assert (told.code, told.error["code"]) == (2, "usage")
    assert desk.commands == []


@pytest.mark.parametrize("name", [name for names in SECTIONS.values() for name in names])
def test_without_a_daemon(tmp_path: Path, name: str) -> None:
    more = {"run": ["--name", "x", "true"], "stop": ["x"], "checkpoint": ["x"], "cancel": [ACTION], "delete": [ACTION, "-y"]}
    more |= {key: [CHECKPOINT] for key in ("restore", "inspect", "verify")}
    missing = tmp_path / "h.sock"
    args = [name, "--json", *more.get(name, [])]
    told = hibernode(missing, *args)
    assert (told.code, told.error["code"]) == (3, "daemon_unreachable")
    shown = hibernode(missing, name, *more.get(name, []))
    assert shown.err.startswith(f"error: no daemon: there is no socket {missing} [daemon_unreachable]\nhint: start it with ")


def test_with_a_dead_daemon_and_with_something_else(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    result = hibernode(tmp_path / "dead", "jobs")
    assert result.code == 3
    assert "nobody answers on" in result.err
    (tmp_path / "file").touch()
    assert hibernode(tmp_path / "file", "jobs").code == 3
    assert hibernode(tmp_path / ("x" * 200), "jobs").code == 3


def test_a_daemon_that_stops_in_the_middle(tmp_path: Path) -> None:
    with serving(FakeDesk(holding), tmp_path / "h.sock") as served:
        terminal = Terminal(served.path, "checkpoint", "trainer")
        terminal.wait_for("dumping")
        served.call(served.server.stop())
        assert terminal.end() == 3
        action = served.desk.commands[0].action_id
    assert "error: the daemon went away: the daemon is stopping" in terminal.words
    assert f"hint: the action is in its journal: hibernode status {action}" in terminal.words


def test_the_socket_can_be_given_in_three_ways(served: Served, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert hibernode(nowhere, "jobs", "--socket", str(served.path)).code == 0
    assert hibernode(nowhere, "--socket", str(served.path), "jobs").code == 0
    assert hibernode(served.path, "jobs").code == 0
    assert hibernode(nowhere, "jobs").code == 3


def test_the_default_socket_is_the_daemons() -> None:
    assert Path(DEFAULT_SOCKET) == Config().socket


# --- help and completion ----------------------------------------------------------------------------------------------


def test_help_names_every_command_and_every_exit_code() -> None:
    out = CliRunner().invoke(cli, ["--help"], prog_name="hibernode").output
    for words in (
        *(n for names in SECTIONS.values() for n in names),
        "130  Ctrl-C",
        "3    no daemon",
        "node ",
        "check-config",
        "Completion",
    ):
        assert words in out
    overview = out.partition("Jobs:")[2].partition("Exit codes")[0]
    assert "..." not in overview  # no line of it is cut short


@pytest.mark.parametrize("name", [name for names in SECTIONS.values() for name in names])
def test_the_help_of_each_command_teaches(name: str) -> None:
    out = CliRunner().invoke(cli, [name, "--help"], prog_name="hibernode").output
    assert f"Examples:\n    hibernode {name}" in out
    assert "--json" in out
    assert "--socket" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_no_command_at_all_shows_the_help() -> None:
    result = CliRunner().invoke(cli, [], prog_name="hibernode")
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: hibernode [OPTIONS] COMMAND")


def test_completion_knows_checkpoints_and_is_silent_without_a_daemon(served: Served, tmp_path: Path) -> None:
    asking = {"_HIBERNODE_COMPLETE": "bash_complete", "COMP_WORDS": "hibernode restore ", "COMP_CWORD": "2"}
    assert f"plain,{CHECKPOINT}" in hibernode(served.path, **asking).out
    assert hibernode(tmp_path / "none", **asking).out.strip() == ""
    assert "plain,trainer" in hibernode(served.path, **asking | {"COMP_WORDS": "hibernode stop "}).out


def test_other_commands_can_be_added_and_their_errors_look_the_same() -> None:
    def refuse() -> None:
        raise Refused("config", "configuration key x: no", prop="x", found=1, wanted=2, hint="mend it")

    cli.add_command(click.Command("refuse", callback=refuse, help="Says no."))
    try:
        result = CliRunner().invoke(cli, ["refuse"], prog_name="hibernode")
        assert (result.exit_code, result.stderr) == (1, "error: configuration key x: no [config]\nhint: mend it\n")
        assert "\n  refuse        Says no.\n" in CliRunner().invoke(cli, ["--help"]).output
    finally:
        del cli.commands["refuse"]


def test_the_group_alone_loads_no_client() -> None:
    """The daemon is started through it, under a tight memory limit."""
    program = "import sys, hibernode.cli; print([m for m in ('rich', 'grpc', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=DEADLINE)
    assert out.stdout == "[]\n"


# --- terminals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_bar_moves_and_fits(tmp_path: Path, columns: int) -> None:
    with serving(FakeDesk(succeeding(pace=0.4)), tmp_path / "h.sock") as served:  # each is to be drawn, ten times a second
        terminal = Terminal(served.path, "checkpoint", "trainer", columns=columns)
        assert terminal.end() == 0
    frames = [f for f in re.split(r"\x1b\[2K|\r", terminal.seen) if "dumping" in f or "shipping" in f]
    bars = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", f).rstrip("\n") for f in frames]
    bars = [b for b in bars if "%" in b]
    assert any("25%" in b for b in bars)
    assert any("75%" in b for b in bars)
    assert all(len(b.splitlines()[0]) <= columns for b in bars)
    if columns >= 80:
        assert any(re.search(r"━+ +50%  1\.00 of 2\.00 GiB  3\d\d MiB/s  3\.0x  \ds left", b) for b in bars), bars
    assert terminal.words.rstrip().splitlines()[-1].startswith("  bring it back:  hibernode restore ")
    assert "\x1b[?25h" in terminal.seen  # the cursor is back


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("args", [["jobs"], ["list"], ["status"], ["nodes"], ["doctor"], ["inspect", CHECKPOINT]])
def test_tables_fit_the_terminal_and_keep_their_ids(served: Served, desk: FakeDesk, args: list[str], columns: int) -> None:
    hibernode(served.path, "checkpoint", "trainer")
    terminal = Terminal(served.path, *args, columns=columns)
    terminal.end()
    if args != ["inspect", CHECKPOINT]:  # its options may be long, and wrap
        assert all(len(line) <= columns for line in terminal.words.splitlines()), terminal.words
    if args == ["list"]:
        assert CHECKPOINT in terminal.words
    if args == ["status"]:
        assert desk.commands[0].action_id in terminal.words


def test_ctrl_c_ends_the_watching_and_not_the_action(tmp_path: Path) -> None:
    with serving(FakeDesk(holding), tmp_path / "h.sock") as served:
        terminal = Terminal(served.path, "checkpoint", "trainer")
        terminal.wait_for("dumping")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
        action = served.desk.commands[0].action_id
        assert f"interrupted: action {action} goes on\n" in terminal.words
        assert f"hibernode cancel {action}\n" in terminal.words
        assert "Traceback" not in terminal.words
        assert served.desk.cancelled == []
        served.release()
        assert hibernode(served.path, "watch", action).code == 0


def test_ctrl_c_without_an_action(served: Served, desk: FakeDesk) -> None:
    terminal = Terminal(served.path, "watch")
    terminal.wait_for("watching all actions")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "goes on" not in terminal.words


def test_watching_all_shows_a_line_for_each(tmp_path: Path) -> None:
    with serving(FakeDesk(succeeding(pace=0.1)), tmp_path / "h.sock") as served:
        terminal = Terminal(served.path, "watch", columns=120)
        terminal.wait_for("watching all actions")
        hibernode(served.path, "checkpoint", "one")
        served.desk.script = failing(DumpFailed("criu said no"))
        hibernode(served.path, "checkpoint", "two")
        first, second = (command.action_id for command in served.desk.commands)
        terminal.wait_for("criu said no")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 130
    assert f"{first}  ready: checkpoint done in 6.7 s" in terminal.words
    assert f"{second}  error: criu said no [dump_failed]" in terminal.words
    assert re.search(rf"{first[:8]}  (dumping|shipping) +━", terminal.words)


@pytest.mark.parametrize("env", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"TERM": "dumb"}])
def test_a_pipe_gets_no_control_characters_whatever_the_environment_says(tmp_path: Path, env: dict[str, str]) -> None:
    with serving(FakeDesk(succeeding(pace=0.01)), tmp_path / "h.sock") as served:
        out = subprocess.run(
            [*PROGRAM, "checkpoint", "trainer"],
            capture_output=True,
            text=True,
            check=True,
            timeout=DEADLINE,
            env=os.environ | env | {"HIBERNODE_SOCKET_PATH": str(served.path), "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
    assert "checkpoint is ready" in out
    assert not CONTROL.search(out)


def test_a_terminal_that_can_nothing_gets_plain_lines(tmp_path: Path) -> None:
    with serving(FakeDesk(), tmp_path / "h.sock") as served:
        terminal = Terminal(served.path, "checkpoint", "trainer", TERM="dumb")
        assert terminal.end() == 0
    assert not CONTROL.search(terminal.seen.replace("\r\n", "\n"))


def test_no_colour_means_none(served: Served) -> None:
    terminal = Terminal(served.path, "doctor", NO_COLOR="1")
    terminal.end()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.seen)


def test_an_output_that_knows_only_ascii(served: Served) -> None:
    out = subprocess.run(
        [*PROGRAM, "doctor"],
        capture_output=True,
        check=False,
        timeout=DEADLINE,
        env=os.environ
        | {"HIBERNODE_SOCKET_PATH": str(served.path), "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert b"+ criu   4.2.1" in out.stdout
    assert out.stderr == b"error: a required check fails: store [unfit]\n"


def test_a_reader_that_leaves_early_causes_no_noise(served: Served) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*PROGRAM, "list", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"HIBERNODE_SOCKET_PATH": str(served.path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(timeout=DEADLINE)
    assert err == b""


def test_a_rate_is_that_of_the_last_seconds() -> None:
    speeds = Speeds()
    for second in range(1, 11):  # fast at first, then slow
        done = min(second, 4) * 100 * MIB + max(0, second - 4) * MIB
        speed = speeds.of(pb.Progress(action_id=ACTION, bytes_done=done, seconds=float(second)))
    assert speed == MIB
    assert speeds.of(pb.Progress(action_id=ACTION, bytes_done=5 * MIB, seconds=1.0)) == 5 * MIB  # another attempt


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (text.size(0), "0 B"),
        (text.size(999), "999 B"),
        (text.size(1023), "1.00 KiB"),
        (text.size(1536), "1.50 KiB"),
        (text.size(680 * MIB), "680 MiB"),
        (text.size(1023 * MIB), "1.00 GiB"),
        (text.size(81 * GIB), "81.0 GiB"),
        (text.sizes(768 * MIB, 2 * GIB), "0.75 of 2.00 GiB"),
        (text.rate(412 * MIB), "412 MiB/s"),
        (text.ratio(300, 100), "3.0x"),
        (text.ratio(300, 0), ""),
        (text.pause(412_300_000), "412 ms"),
        (text.pause(3_210_000), "3.2 ms"),
        (text.pause(12_431_000_000), "12,431 ms"),
        (text.duration(0.08), "80 ms"),
        (text.duration(0.9999), "1.0 s"),
        (text.duration(59.99), "1m 00s"),
        (text.duration(125), "2m 05s"),
        (text.duration(11_520), "3h 12m"),
        (text.duration(187_200), "2d 04h"),
        (text.left(0.2), "1s left"),
        (text.left(3600), "1h 00m left"),
        (text.age(0, 3700), "62m ago"),
        (text.age(100, 50), "0s ago"),
        (text.age(0, 400_000), "5d ago"),
    ],
)
def test_numbers_as_people_read_them(shown: str, wanted: str) -> None:
    assert shown == wanted
