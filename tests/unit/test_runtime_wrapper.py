"""The OCI runtime in front of runc, with a runc that only writes down how it was called: all but our own containers pass as they are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

WRAPPER = Path(__file__).resolve().parents[2] / "runtime" / "hibernode_runc.py"
OURS = {"hibernode.io/restore-from": "an-id", "io.kubernetes.cri.container-type": "container"}

# Every call on a line, its words quoted by their ends; it says what it was given, and how long it lived is nobody's business.
RUNC = """#!/bin/sh
printf '<%s>' "$@" >>"$CALLS"; echo >>"$CALLS"
if [ -t 0 ]; then :; else cat; fi
echo "to stderr" >&2
exit "${CODE:-0}"
"""


class Shim:
    """Calls the wrapper as containerd's shim does."""

    def __init__(self, home: Path) -> None:
        self.bundle, self.state, self.log = home / "bundle", home / "state", home / "log.json"
        self._calls, self._socket = home / "calls", home / "none.sock"
        self.bundle.mkdir()
        runc = home / "runc"
        runc.write_text(RUNC)
        runc.chmod(0o755)
        self.env = {
            **os.environ, "HIBERNODE_RUNC": str(runc), "HIBERNODE_RUNTIME_SOCKET": str(self._socket), "CALLS": str(self._calls),
        }  # fmt: skip

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def spec(self, annotations: dict[str, str] | None) -> None:
        (self.bundle / "config.json").write_text(json.dumps({} if annotations is None else {"annotations": annotations}))

    def call(self, *words: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        env = {**self.env, "CODE": str(code)}
        return subprocess.run(
            [str(WRAPPER), *words], env=env, input=stdin, capture_output=True, text=True, timeout=30, check=False
        )

    def create(self, *more: str) -> subprocess.CompletedProcess[str]:
        general = ["--root", str(self.state), "--log", str(self.log), "--log-format", "json"]
        return self.call(*general, "create", *more, "--bundle", str(self.bundle), "an-id-of-it")

    @property
    def said(self) -> str:
        lines = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return "".join(line["msg"] for line in lines if line["level"] == "error")

    def daemon(self, *answers: dict[str, str]) -> threading.Thread:
        """Answers one caller, a line for each line."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._socket))
        listener.listen()

        def serve() -> None:
            with listener, listener.accept()[0] as guest, guest.makefile("rwb") as stream:
                for answer in answers:
                    if not stream.readline():
                        return
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def shim(tmp_path: Path) -> Shim:
    return Shim(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--version"],
        ["--root", "/r", "state", "id"],
        ["--root=/r", "--log=/l", "--log-format=json", "--systemd-cgroup", "kill", "--all", "id", "15"],
        ["--newer", "value", "create", "--bundle", "/nowhere", "id"],
        ["create", "--bundle=/nowhere", "--unknown", "value", "id"],
        ["create"],
        ["start", "id"],
        ["exec", "--process", "/p", "--detach", "--pid-file=/x", "id"],
        ["delete", "--force", "id"],
        ["restore", "--image-path", "a b", "", "id"],
        ["events", "create", "start"],
    ],
)
def test_every_other_call_is_runcs_own(shim: Shim, words: Sequence[str]) -> None:
    done = shim.call(*words, code=23, stdin="in\n")
    assert shim.calls == ["".join(f"<{word}>" for word in words) or "<>"]
    assert (done.returncode, done.stdout, done.stderr) == (23, "in\n", "to stderr\n")


@pytest.mark.parametrize(
    "annotations",
    [None, {}, {"else.io/x": "hibernode.io/restore-from"}, {**OURS, "io.kubernetes.cri.container-type": "sandbox"},
     {**OURS, "hibernode.io/restore-from": ""}],
)  # fmt: skip
def test_a_container_that_is_not_to_be_restored_is_runcs(shim: Shim, annotations: dict[str, str] | None) -> None:
    shim.spec(annotations)
    assert shim.create("--no-pivot").returncode == 0
    assert len(shim.calls) == 1
    assert "<create><--no-pivot>" in shim.calls[0]


def test_a_specification_that_is_no_json_is_runcs_to_complain_of(shim: Shim) -> None:
    (shim.bundle / "config.json").write_text("hibernode.io/restore-from {")
    assert shim.create().returncode == 0
    assert len(shim.calls) == 1


def test_without_a_daemon_it_is_not_made_and_says_why(shim: Shim) -> None:
    shim.spec(OURS)
    assert shim.create().returncode == 1
    assert shim.calls == []
    assert shim.said.startswith("hibernode: cannot restore: the daemon does not answer: ")
    shim.spec({**OURS, "hibernode.io/on-failure": "start-fresh"})
    assert shim.create().returncode == 0
    assert len(shim.calls) == 1


def test_what_the_daemon_refuses_is_said_with_code_and_hint(shim: Shim) -> None:
    shim.spec(OURS)
    serving = shim.daemon({"do": "fail", "code": "privileges", "message": "no", "hint": "do so"})
    assert shim.create().returncode == 1
    serving.join(10)
    assert shim.calls == []
    assert shim.said == "hibernode: cannot restore: no (privileges); hint: do so"


@pytest.mark.parametrize("untouched", [True, False, None])
def test_it_is_started_anew_only_where_nothing_was_begun(shim: Shim, untouched: bool | None) -> None:
    """Its root may have some of the checkpoint's files by then: a daemon that does not say so may have been at it."""
    shim.spec({**OURS, "hibernode.io/on-failure": "start-fresh"})
    answer = {"do": "fail", "code": "corrupt", "message": "no", "hint": ""} | (
        {} if untouched is None else {"untouched": untouched}
    )
    serving = shim.daemon(answer)  # type: ignore[arg-type]
    assert shim.create().returncode == (0 if untouched else 1)
    serving.join(10)
    assert len(shim.calls) == (1 if untouched else 0)


@pytest.mark.parametrize("answers", [(), ({"do": "restore", "images": "/nowhere", "flags": [], "env": {}},)])
def test_nor_where_the_daemon_dies_or_criu_fails(shim: Shim, answers: tuple[dict[str, object], ...]) -> None:
    shim.spec({**OURS, "hibernode.io/on-failure": "start-fresh"})
    serving = shim.daemon(*answers)  # type: ignore[arg-type]
    assert shim.create().returncode == 1
    serving.join(10)
    assert not [line for line in shim.calls if "<create>" in line]


def test_what_an_order_restores_is_paused_before_anybody_hears_of_it(shim: Shim, tmp_path: Path) -> None:
    shim.spec(OURS)
    (shim.state / "an-id-of-it").mkdir(parents=True)
    order = {"do": "restore", "images": str(tmp_path), "flags": ["--auto-dedup"], "env": {"A": "b"}}
    serving = shim.daemon(order, {"do": "done"})  # type: ignore[arg-type]
    assert shim.create("--no-pivot", "--pid-file", "/p", "--console-socket=/c").returncode == 0
    serving.join(10)
    restore, pause = shim.calls
    for words in ("<restore><--detach>", "<--auto-dedup>", "<--pid-file></p>", "<--console-socket></c>", "<--no-pivot>"):
        assert words in restore
    assert pause.endswith("<pause><an-id-of-it>")


@pytest.mark.parametrize("answers", [[], [{"do": "fail", "code": "cancelled", "message": "it has ended", "hint": ""}]])
def test_what_nobody_answers_for_is_ended(shim: Shim, tmp_path: Path, answers: list[dict[str, str]]) -> None:
    shim.spec(OURS)
    (shim.state / "an-id-of-it").mkdir(parents=True)
    order = {"do": "restore", "images": str(tmp_path), "flags": [], "env": {}}
    serving = shim.daemon(order, *answers)  # type: ignore[arg-type]
    assert shim.create().returncode == 1
    serving.join(10)
    verbs = [words for line in shim.calls for words in ("restore", "pause", "kill", "resume", "delete") if f"<{words}>" in line]
    assert verbs == ["restore", "pause", "kill", "resume", "delete"], "killed before it goes on"
    assert ("it has ended (cancelled)" if answers else "does not answer any more") in shim.said


@pytest.mark.parametrize("there", [True, False])
def test_what_was_restored_for_a_daemon_that_has_ended_does_not_start(shim: Shim, there: bool) -> None:
    (shim.state / "id").mkdir(parents=True)
    (shim.state / "id" / "hibernode-restored").touch()
    serving = shim.daemon({"do": "fail", "code": "restore_failed", "message": "ended", "hint": ""}) if there else None
    done = shim.call("--root", str(shim.state), "start", "id")
    if serving:
        serving.join(10)
    assert done.returncode == 1
    assert "cannot start what was restored" in done.stderr
    assert [line.split("><")[-2:] for line in shim.calls] == [["id", "KILL>"], ["resume", "id>"]]


def test_what_was_restored_starts_by_going_on(shim: Shim) -> None:
    mark = shim.state / "id" / "hibernode-restored"
    mark.parent.mkdir(parents=True)
    mark.touch()
    serving = shim.daemon({"do": "start"}, {"do": "done"})
    assert shim.call("--root", str(shim.state), "start", "id").returncode == 0
    serving.join(10)
    assert [line.split("><")[-2:] for line in shim.calls] == [["resume", "id>"]]
    assert not mark.exists()
    assert shim.call("--root", str(shim.state), "start", "id").returncode == 0
    assert shim.calls[-1].endswith("<start><id>"), "the second time it is runc's"
