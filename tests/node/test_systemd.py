"""The unit file under a real systemd: what readiness, watchdog, restart, crash, stop and a bad configuration do to daemon and jobs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.node.workload import PROGRAMS, Beat, beats
from tests.systemd_machine import Machine, until

pytestmark = pytest.mark.node

ROOT = Path(__file__).resolve().parents[2]
UNIT = ROOT / "systemd" / "hibernode.service"
WATCHDOG = ROOT / "systemd" / "hibernode-watchdog.service"
API = ROOT / "systemd" / "hibernode-api.service"
HIBERNODE = str(Path(sys.executable).parent / "hibernode")
COUNTER = [sys.executable, str(PROGRAMS / "counter.py"), "0.01"]
LOADED = 'metrics = { listen = "" }\narena = { size = "16MiB" }\ntransfer = { streams = 1, compression = "zstd:15" }\n'


class Node:
    """The daemon's unit on a machine of its own, and the command line of that machine."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self.machine, self._directory = machine, directory

    def start(self) -> None:
        self.machine.run("systemctl", "start", "hibernode")

    def state(self) -> dict[str, str]:
        return self.machine.show("hibernode", "ActiveState", "MainPID", "NRestarts", "Result", "ExecMainStatus")

    def daemon(self) -> str:
        return self.state()["MainPID"]

    def next_daemon(self, after: str) -> str:
        """Its pid, once a daemon other than `after` is ready."""

        def other() -> str:
            now = self.state()
            return now["MainPID"] if now["ActiveState"] == "active" and now["MainPID"] != after else ""

        return until(other, f"a daemon after {after}", 30, self.machine.story)

    def ask(self, *words: str) -> Any:
        """The last JSON document of an answer."""
        return json.loads(self.machine.run(HIBERNODE, "--json", *words).stdout.strip().splitlines()[-1])

    def job(self, name: str, *arguments: str) -> str:
        """Start a counter; its pid, once it counts."""
        pid = str(self.ask("run", "--name", name, "--", *COUNTER, *arguments)["pid"])
        self.beat(name)
        return pid

    def beat(self, name: str, after: Beat | None = None) -> Beat:
        """Its last one; waits for one that is later than `after`. The log is read from outside: the daemon may be down."""

        def last() -> Beat | None:
            found = beats(self._log(name).read_text().rpartition("\n")[0].splitlines())
            return found[-1] if found and (after is None or found[-1].counter > after.counter) else None

        return until(last, f"a beat of {name} after {after}", why=self.machine.story)

    def _log(self, name: str) -> Path:
        book = self._directory / "var-lib" / "hibernode" / "jobs"
        job = max(
            (json.loads(page.read_text()) for page in book.glob("[!.]*.json")),
            key=lambda job: (job["name"] == name, job["started_at"]),
        )
        return book / f"{job['uid']}.log"

    def checkpoint(self, *words: str) -> str:
        """Its id, once it is ready."""
        done = self.ask("checkpoint", *words)
        return str(done.get("event", done)["checkpoint_id"])

    def restored(self, name: str) -> str:
        """A job that was dumped, killed and restored; its pid."""
        pid = self.job(name)
        checkpoint = self.checkpoint(name)
        self.ask("stop", name)
        self.ask("restore", checkpoint)
        return pid

    def shell(self, script: str) -> str:
        return self.machine.run("sh", "-c", script).stdout.strip()

    def identity(self, pid: str) -> str:
        """The very process: its start time."""
        return self.shell(f"cut -d' ' -f22 /proc/{pid}/stat")

    def cgroup(self, pid: str) -> str:
        return self.shell(f"grep ^0:: /proc/{pid}/cgroup")

    def freeze_in_a_dump(self, name: str, pid: str) -> None:
        """Begin a checkpoint, and stop the daemon when CRIU holds the tree: the pages wait in the socket, the dump cannot end."""
        self.machine.run(HIBERNODE, "checkpoint", name, "--no-wait", "--json")
        self.shell(f"until grep -q '^TracerPid:.[1-9]' /proc/{pid}/status; do :; done; kill -STOP {self.daemon()}")
        assert self.shell(f"grep TracerPid: /proc/{pid}/status").split()[1] == self.shell("pgrep -x criu")

    def last_action(self) -> tuple[str, str]:
        last = self.ask("status")["actions"][-1]["last"]
        return last["status"], last.get("code", "")


Boot = Callable[..., AbstractContextManager[Node]]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """`with boot(drop_in) as node:` boots a machine with the unit; `settings` is the daemon's configuration."""

    @contextmanager
    def booted(*drop_in: str, settings: str = LOADED) -> Iterator[Node]:
        (tmp_path / "hibernode.toml").write_text(settings)
        logs = f"StandardOutput=append:{tmp_path}/unit.log\nStandardError=append:{tmp_path}/unit.log"

        def start(word: str) -> str:
            return f"ExecStart=\nExecStart={HIBERNODE} {word}\nEnvironment=HIBERNODE_CONFIG={tmp_path}/hibernode.toml"

        units = {
            "hibernode.service": UNIT.read_text(),
            "hibernode.service.d/test.conf": "\n".join(["[Service]", start("node"), logs, *drop_in, ""]),
            "hibernode-api.service": API.read_text(),
            "hibernode-watchdog.service": WATCHDOG.read_text(),
            "hibernode-watchdog.service.d/test.conf": "\n".join(["[Service]", start("watchdog"), logs, ""]),
        }
        with Machine(tmp_path, units) as machine:
            yield Node(machine, tmp_path)

    return booted


@pytest.mark.parametrize(("drop_in", "complaints"), [((), 0), (("NonSense=yes", "WatchdogSec=soon"), 2)])
def test_systemd_understands_every_line_of_the_unit(boot: Boot, drop_in: tuple[str, ...], complaints: int) -> None:
    with boot(*drop_in) as node:
        assert node.machine.show("hibernode", "LoadState") == {"LoadState": "loaded"}
        said = [line for line in node.machine.story().splitlines() if re.search(r"/(hibernode\.service|test\.conf):\d+: ", line)]
        assert len(said) == complaints, said


def test_it_is_active_only_when_it_answers_and_the_watchdog_leaves_it_alone(boot: Boot) -> None:
    with boot("WatchdogSec=2", "TimeoutAbortSec=1") as node:
        node.start()
        assert node.ask("jobs") == {"workloads": []}, "systemctl start returned, so it answers"
        assert node.shell("stat -c %a /run/hibernode /run/hibernode/hibernode.sock /var/lib/hibernode") == "700\n600\n700"
        daemon = node.daemon()

        def alive_for() -> float:
            times = node.machine.show("hibernode", "WatchdogTimestampMonotonic", "ActiveEnterTimestampMonotonic")
            return (int(times["WatchdogTimestampMonotonic"]) - int(times["ActiveEnterTimestampMonotonic"])) / 1e6

        until(lambda: alive_for() > 5, "pings", why=node.machine.story)
        assert (node.daemon(), node.state()["NRestarts"]) == (daemon, "0")

        pid = node.job("counter")
        node.shell(f"kill -STOP {daemon}")  # a loop that is stuck
        node.next_daemon(after=daemon)
        assert "Watchdog timeout" in node.machine.story()
        node.beat("counter", after=node.beat("counter"))
        assert node.ask("jobs")["workloads"][0]["pid"] == int(pid)


@pytest.mark.parametrize("end", ["systemctl restart hibernode", "kill -KILL {daemon}"])
def test_jobs_and_restored_trees_survive(boot: Boot, end: str) -> None:
    with boot() as node:
        node.start()
        pids = {"started": node.job("started"), "restored": node.restored("restored")}
        before = {name: (node.identity(pid), node.beat(name)) for name, pid in pids.items()}
        daemon = node.daemon()
        node.shell(end.format(daemon=daemon))
        node.next_daemon(after=daemon)
        known = {
            job["name"]: (str(job["pid"]), job["state"]) for job in node.ask("jobs")["workloads"] if job["state"] == "running"
        }
        for name, pid in pids.items():
            started, beat = before[name]
            now = node.beat(name, after=beat)
            assert (node.identity(pid), now.token, now.content) == (started, beat.token, beat.content)
            assert known[name] == (pid, "running")
            node.checkpoint(name)
            node.beat(name, after=node.beat(name))


@pytest.mark.parametrize(
    ("end", "outcome"),
    [("systemctl restart hibernode", ("ready", "ok")), ("kill -KILL {daemon}", ("error", "interrupted"))],
)
def test_a_frozen_workload_goes_on_when_the_daemon_ends(boot: Boot, end: str, outcome: tuple[str, str]) -> None:
    """In the middle of a dump: a restart lets it finish, a crash lets CRIU roll it back. Either way it runs, and can be dumped again."""
    with boot() as node:
        node.start()
        pid = node.job("large", "150")
        before, daemon = node.beat("large"), node.daemon()
        node.freeze_in_a_dump("large", pid)
        node.shell(end.format(daemon=daemon))
        node.next_daemon(after=daemon)
        now = node.beat("large", after=node.beat("large", after=before))
        assert (now.token, now.content) == (before.token, before.content)
        assert node.last_action() == outcome
        node.checkpoint("large")


@pytest.mark.parametrize(("mode", "survives"), [("process", True), ("mixed", False), ("control-group", False)])
def test_only_kill_mode_process_spares_a_job_in_the_units_own_cgroup(boot: Boot, mode: str, survives: bool) -> None:
    """Where cgroups are read-only a job cannot leave; here it is put back."""
    assert "\nKillMode=process\n" in UNIT.read_text()
    with boot(f"KillMode={mode}") as node:
        node.start()
        pid = node.job("counter")
        assert "/hibernode/" in node.cgroup(pid), "it has left by itself"
        before, daemon = node.identity(pid), node.daemon()
        node.shell(f"echo {pid} > /sys/fs/cgroup/system.slice/hibernode.service/cgroup.procs")
        node.machine.run("systemctl", "restart", "hibernode")
        node.next_daemon(after=daemon)
        alive = node.shell(f"cut -d' ' -f22 /proc/{pid}/stat 2>/dev/null || true") == before
        assert alive == survives


def test_a_stop_leaves_nothing_but_the_jobs(boot: Boot) -> None:
    with boot() as node:
        node.start()
        pids = {node.job("started"), node.restored("restored")}
        node.machine.run("systemctl", "stop", "hibernode")
        left = {line.split(maxsplit=1)[0]: line for line in node.shell("ps -eo pid=,args=").splitlines()}
        strangers = [line for pid, line in left.items() if pid not in pids | {"1"} and not _our_question(line)]
        assert (pids <= left.keys(), strangers) == (True, [])
        assert node.state() | {"MainPID": "0"} == {
            "ActiveState": "inactive", "MainPID": "0", "NRestarts": "0", "Result": "success", "ExecMainStatus": "0",
        }  # fmt: skip
        assert node.shell("ls /dev/shm/hibernode; ls -d /run/hibernode 2>/dev/null || true") == ""
        for name in ("started", "restored"):
            node.beat(name, after=node.beat(name))


def _our_question(line: str) -> bool:
    return line.split()[1] in ("ps", "sh")


def test_a_bad_configuration_ends_with_78_and_is_not_tried_again(boot: Boot) -> None:
    with boot("RestartSec=0", settings="nonsense = 1\n") as node:
        assert node.machine.run("systemctl", "start", "hibernode", check=False).returncode == 1
        state = node.state()
        assert (state["ActiveState"], state["ExecMainStatus"], state["NRestarts"]) == ("failed", "78", "0")
        assert "configuration key nonsense" in node.machine.story()


def test_what_check_config_says_before_the_start_would_be_tried_again(boot: Boot) -> None:
    """Why the unit has no ExecStartPre=: systemd compares the exit status of the main process only."""
    before = f"ExecStartPre={shlex.join([HIBERNODE, 'check-config'])}"
    with boot("RestartSec=0", before, settings="nonsense = 1\n") as node:
        node.machine.run("systemctl", "start", "hibernode", check=False)
        until(lambda: int(node.state()["NRestarts"]) > 1, "another try", why=node.machine.story)


def test_workloads_do_not_inherit_the_daemons_oom_score(boot: Boot, tmp_path: Path) -> None:
    """A score above 0 stands in for the unit's -900, which takes CAP_SYS_RESOURCE."""
    with boot("OOMScoreAdjust=321") as node:
        node.start()
        assert node.shell(f"cat /proc/{node.daemon()}/oom_score_adj") == "321"
        job = node.job("job")
        stranger = node.shell(f"setsid {shlex.join(COUNTER)} </dev/null >>{tmp_path}/stranger.log 2>&1 & echo $!")
        until(lambda: beats((tmp_path / "stranger.log").read_text().splitlines()), "a beat", why=node.machine.story)
        checkpoint = node.checkpoint("--pid", stranger)
        node.shell(f"kill -KILL {stranger}; while [ -e /proc/{stranger} ]; do :; done")
        node.ask("restore", checkpoint)
        assert [node.shell(f"cat /proc/{pid}/oom_score_adj") for pid in (job, stranger)] == ["0", "0"]


def test_a_mount_namespace_of_the_unit_would_break_restores(boot: Boot, tmp_path: Path) -> None:
    """Why the unit has no sandbox: jobs would live in it, and what was dumped outside cannot come back inside."""
    lines = [line for line in UNIT.read_text().splitlines() if not line.startswith("#")]
    sandbox = (
        "Protect",
        "Private",
        "Restrict",
        "SystemCall",
        "NoNew",
        "Capability",
        "MemoryDeny",
        "Lock",
        "UMask",
        "ReadOnly",
        "Bind",
    )
    allowed = ("RestartPreventExitStatus",)
    assert [line for line in lines if line.startswith(sandbox) and not line.startswith(allowed)] == []
    with boot("PrivateMounts=yes") as node:
        node.start()
        namespaces = [node.shell(f"readlink /proc/{pid}/ns/mnt") for pid in ("1", node.job("job"))]
        assert namespaces[0] != namespaces[1]
        stranger = node.shell(f"setsid {shlex.join(COUNTER)} </dev/null >>{tmp_path}/stranger.log 2>&1 & echo $!")
        until(lambda: beats((tmp_path / "stranger.log").read_text().splitlines()), "a beat", why=node.machine.story)
        checkpoint = node.checkpoint("--pid", stranger)
        node.shell(f"kill -KILL {stranger}; while [ -e /proc/{stranger} ]; do :; done")
        failed = node.machine.run(HIBERNODE, "restore", checkpoint, "--json", check=False)
        assert failed.returncode == 1


# --- the watchdog's unit ----------------------------------------------------------------------------------------------------------

HASTY = LOADED + "watchdog = { interval = 0.1, grace = 1 }\nlimits = { pause = 1 }\n"


@pytest.mark.parametrize("unit", ["hibernode-watchdog", "hibernode-api"])
def test_systemd_understands_every_line_of_the_other_units(boot: Boot, unit: str) -> None:
    with boot() as node:
        assert node.machine.show(unit, "LoadState") == {"LoadState": "loaded"}
        assert [line for line in node.machine.story().splitlines() if re.search(rf"/{unit}\.service:\d+: ", line)] == []


def test_the_watchdog_ends_a_daemon_that_hangs_and_the_next_one_finds_its_workload_running(boot: Boot) -> None:
    """Long before systemd's own watchdog, which does not know that somebody waits. With the few rights that its unit leaves it."""
    with boot(settings=HASTY) as node:
        node.machine.run("systemctl", "start", "hibernode-watchdog", "hibernode")
        pid = node.job("large", "150")
        before, daemon = node.beat("large"), node.daemon()
        node.freeze_in_a_dump("large", pid)
        now = node.beat("large", after=node.beat("large", after=before))
        assert (now.token, now.content) == (before.token, before.content)
        node.next_daemon(after=daemon)
        assert node.last_action() == ("error", "interrupted")
        story = node.machine.story()
        assert "the daemon holds a workload past its deadline: killed" in story
        assert "Watchdog timeout" not in story
        assert "cannot lock its memory" not in story
        said = node.machine.run(HIBERNODE, "--json", "doctor", check=False).stdout  # other checks fail in this machine
        assert [check["ok"] for check in json.loads(said)["checks"] if check["name"] == "watchdog"] == [True]


def test_the_watchdog_outlives_the_daemon_and_comes_back_by_itself(boot: Boot) -> None:
    with boot(settings=HASTY) as node:
        node.machine.run("systemctl", "start", "hibernode-watchdog", "hibernode")

        def watchdog() -> str:
            return node.machine.show("hibernode-watchdog", "MainPID")["MainPID"]

        first = watchdog()
        node.machine.run("systemctl", "stop", "hibernode")
        assert watchdog() == first
        node.shell(f"kill -KILL {first}")
        until(lambda: watchdog() not in (first, "0"), "another watchdog", why=node.machine.story)
        began = float(node.shell("cut -d' ' -f1 /proc/uptime"))
        node.machine.run("systemctl", "stop", "hibernode-watchdog", check=False)
        assert float(node.shell("cut -d' ' -f1 /proc/uptime")) - began < 15
        assert node.machine.show("hibernode-watchdog", "ActiveState")["ActiveState"] in ("inactive", "failed")
