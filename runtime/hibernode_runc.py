#!/usr/bin/python3 -ISE
"""hibernode-runc: an OCI runtime in front of runc, which turns the creation of one container into its restore.

containerd's shim calls create, start, ..., kill, delete. All of it is runc's, unchanged (exec: the same process, the same descriptors), but
for a container that is no sandbox and has the annotation `hibernode.io/restore-from`:

    create    asks the node's daemon for the container's image; `runc restore --detach`, then `runc pause`
    start     asks whether its restore goes on; `runc resume`

So nothing of it runs before it is started, as everybody expects who made it. If the daemon does not answer, or the restore fails, the
annotation `hibernode.io/on-failure` decides: `fail` (the container is not made; a kubelet tries again), or `start-fresh`.

What it costs: 14 ms for each call beside the 4 ms that runc itself takes to say its version, 11 of them Python's start (median of 60 calls
on two cores). A container has some five of them in its life.

Standard library only, any Python from 3.8 on: it runs on the node itself. HIBERNODE_RUNC names runc, HIBERNODE_RUNTIME_SOCKET the daemon's
socket; both reach it through containerd's environment.
"""

import os
import sys

TAKES_VALUE = {
    "--root",
    "--log",
    "--log-format",
    "--criu",
    "--rootless",
    "--bundle",
    "-b",
    "--pid-file",
    "--console-socket",
    "--preserve-fds",
}
PLACES = ("/usr/sbin", "/usr/bin", "/usr/local/sbin", "/usr/local/bin")
SOCKET = "/run/hibernode/runtime.sock"
PATIENCE = 10.0  # seconds for a daemon that is there to take a call
RESTORE_FROM, ON_FAILURE = "hibernode.io/restore-from", "hibernode.io/on-failure"
PASSED_ON = ("--no-pivot", "--no-subreaper")  # words of create that restore has, too
PR_SET_PDEATHSIG, SIGKILL = 1, 9
MARK = "hibernode-restored"  # in runc's directory of the container's state: it was made by a restore, and waits for its start
LOG_LINES = 40


def find_runc():
    given = os.environ.get("HIBERNODE_RUNC", "")
    ours = os.path.realpath(sys.argv[0])
    for path in [given] if given else [place + "/runc" for place in PLACES]:
        if os.access(path, os.X_OK) and os.path.realpath(path) != ours:
            return path
    sys.exit("hibernode-runc: no runc in " + (given or ", ".join(PLACES)) + "; set HIBERNODE_RUNC")


def parse(words):
    """runc's own words: (global ones, verb, options, the rest)"""
    general, options, rest, i = [], {}, [], 0
    while i < len(words) and words[i].startswith("-"):
        n = 2 if words[i] in TAKES_VALUE else 1
        general += words[i : i + n]
        i += n
    verb = words[i] if i < len(words) else ""
    i += 1
    while i < len(words):
        name, equals, value = words[i].partition("=")
        if name in TAKES_VALUE and not equals:
            options[name] = words[i + 1] if i + 1 < len(words) else ""
            i += 1
        elif name.startswith("-"):
            options[name] = value if equals else True
        else:
            rest.append(words[i])
        i += 1
    return general, verb, options, rest


def value_of(general, name, default):
    for i, word in enumerate(general):
        if word == name and i + 1 < len(general):
            return general[i + 1]
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return default


class Call:
    """One call for a container that is restored. What it needs beyond the words is imported here: every other call must cost nothing."""

    def __init__(self, runc, general, options, container):
        import contextlib  # noqa: PLC0415 - see above
        import ctypes  # noqa: PLC0415
        import json  # noqa: PLC0415
        import socket  # noqa: PLC0415
        import subprocess  # noqa: PLC0415

        self.contextlib, self.ctypes = contextlib, ctypes
        self.json, self.socket, self.subprocess = json, socket, subprocess
        self.runc, self.general, self.options, self.container = runc, general, options, container
        self.root = value_of(general, "--root", "/run/runc")
        self.bundle = bundle_of(options)
        self.mark = mark_of(general, container)

    def say(self, level, message):
        """Where the shim looks for what went wrong: the file of --log, in JSON; else on standard error."""
        log = value_of(self.general, "--log", "")
        if log and value_of(self.general, "--log-format", "") == "json":
            with open(log, "a") as file:
                file.write(self.json.dumps({"level": level, "msg": "hibernode: " + message}) + "\n")
        else:
            print("hibernode: " + message, file=sys.stderr)

    def quietly(self, *words):
        """runc, for us: none of the container's descriptors."""
        null = self.subprocess.DEVNULL
        return self.subprocess.run(
            [self.runc, *self.general, *words], stdin=null, stdout=null, stderr=null, check=False
        ).returncode

    def annotations(self):
        try:
            with open(os.path.join(self.bundle, "config.json")) as file:
                return self.json.load(file).get("annotations") or {}
        except (OSError, ValueError, AttributeError):
            return {}  # runc says what is wrong with it

    def end(self):
        """Nothing of it runs any more, not for a moment: who is paused dies when he goes on."""
        self.quietly("kill", self.container, "KILL")
        self.quietly("resume", self.container)
        self.quietly("delete", "--force", self.container)

    def connect(self):
        connection = self.socket.socket(self.socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(os.environ.get("HIBERNODE_RUNTIME_SOCKET", SOCKET))
        return connection

    def ask(self, connection, question, patience):
        connection.settimeout(patience)
        connection.sendall(self.json.dumps(question).encode() + b"\n")
        line = connection.makefile("rb").readline()
        if not line:
            raise OSError("it has ended")
        return self.json.loads(line)

    def create(self, notes):
        """The exit code; None: runc is to make it."""
        question = {"call": "create", "id": self.container, "root": self.root, "bundle": self.bundle, "annotations": notes}
        try:
            connection = self.connect()
        except OSError as error:
            return self.failed(notes, f"the daemon does not answer: {error}", untouched=True)
        try:
            with connection:
                order = self.ask(connection, question, None)  # as long as an image takes; the shim has a limit of its own
                if order["do"] == "start":
                    return None
                if order["do"] == "fail":
                    return self.failed(notes, self.read(order), untouched=order.get("untouched") is True)
                code, log = self.restore(order)
                try:
                    answer = self.ask(connection, {"ok": code == 0, "log": log}, PATIENCE)
                    why = self.read(answer) if answer["do"] == "fail" else ""
                except (OSError, ValueError, KeyError) as error:
                    why = f"the daemon does not answer any more: {error}"
        except (OSError, ValueError, KeyError) as error:
            return self.failed(notes, f"the daemon does not answer: {error}")
        if code == 0 and not why:
            return 0
        if code == 0:  # nobody answers for it
            self.end()
        return self.failed(notes, why or next((line for line in log if "Error" in line), "runc restore failed"))

    def read(self, answer):
        hint = "; hint: " + answer["hint"] if answer.get("hint") else ""
        return f"{answer['message']} ({answer['code']}){hint}"

    def failed(self, notes, why, untouched=False):
        """Started anew in what may be half filled with the files of its checkpoint it would run on neither image: then it is not made,
        and whoever makes it again, with a new root, hears of the failure before anything is begun."""
        if untouched and notes.get(ON_FAILURE) == "start-fresh":
            self.say("warning", why + "; started anew, as " + ON_FAILURE + " says")
            return None
        self.say("error", "cannot restore: " + why)
        return 1

    def restore(self, order):
        """(exit code, the end of CRIU's log). It is paused when it is there: nothing of it runs before its start."""
        words = [self.runc, *self.general, "restore", "--detach", "--bundle", self.bundle]
        words += ["--image-path", order["images"], "--work-path", order["images"], *order["flags"]]
        for name in ("--pid-file", "--console-socket"):
            if name in self.options:
                words += [name, self.options[name]]
        words += [name for name in PASSED_ON if name in self.options]
        libc = self.ctypes.CDLL(None)
        done = self.subprocess.run(
            [*words, self.container],
            close_fds=False,  # with the container's standard streams, as runc create has them
            env={**os.environ, **order["env"]},
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, SIGKILL),  # a shim that gives up kills us alone
            check=False,
        )
        if done.returncode == 0 and self.quietly("pause", self.container) == 0:
            with open(self.mark, "w"):
                return 0, []
        log = self.tail(os.path.join(order["images"], "restore.log"))
        self.end()
        return done.returncode or 1, log

    def tail(self, path):
        try:
            with open(path, "rb") as file:
                lines = file.read()[-65536:].decode(errors="replace").splitlines()
        except OSError:
            return []
        return ([line for line in lines if "Error" in line or "Warn" in line] or lines)[-LOG_LINES:]

    def start(self):
        try:
            with self.connect() as connection:
                answer = self.ask(connection, {"call": "start", "id": self.container}, PATIENCE)
                why = self.read(answer) if answer["do"] == "fail" else ""
                if not why:
                    code = self.quietly("resume", self.container)
                    if code == 0:
                        os.unlink(self.mark)
                        self.tell(connection)
                        return 0
                    why = "runc resume failed"
        except (OSError, ValueError, KeyError) as error:
            why = f"the daemon does not answer: {error}"
        self.quietly("kill", self.container, "KILL")
        self.quietly("resume", self.container)
        self.say("error", "cannot start what was restored: " + why)
        return 1

    def tell(self, connection):
        """It runs. Should nobody hear it any more, the next daemon finds the restore half done, and ends it."""
        with self.contextlib.suppress(OSError, ValueError):
            self.ask(connection, {"ok": True}, PATIENCE)


def bundle_of(options):
    return os.path.realpath(options.get("--bundle") or options.get("-b") or ".")


def mark_of(general, container):
    return os.path.join(value_of(general, "--root", "/run/runc"), container, MARK)


def is_meant(options):
    """It may have our annotation: of all other containers the file is not understood, which would take three times as long."""
    try:
        with open(os.path.join(bundle_of(options), "config.json"), "rb") as file:
            return RESTORE_FROM.encode() in file.read()
    except OSError:
        return False  # runc says what is wrong with it


def main(words):
    runc = find_runc()
    general, verb, options, rest = parse(words)
    if verb == "create" and rest and is_meant(options):
        call = Call(runc, general, options, rest[-1])  # runc takes one: what is before it belongs to a word that we do not know
        notes = call.annotations()
        if notes.get(RESTORE_FROM) and notes.get("io.kubernetes.cri.container-type") != "sandbox":
            code = call.create(notes)
            if code is not None:
                sys.exit(code)
    elif verb == "start" and rest and os.path.exists(mark_of(general, rest[-1])):
        sys.exit(Call(runc, general, options, rest[-1]).start())
    os.execv(runc, ["runc", *words])


if __name__ == "__main__":
    main(sys.argv[1:])
