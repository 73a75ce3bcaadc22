"""What must be true after a case, however it ended. Each function says what is not, as findings; none is good."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from hibernode._pb import hibernode_pb2 as pb
from hibernode.errors import NotFound
from hibernode.model import Event
from tests import keeper as processes
from tests.matrix.bench import Bench, Subject
from tests.matrix.programs import Beats, held

# What the issue counts, and what else may be wrong. All of them must be 0.
COUNTERS = ("left_frozen", "half_checkpoints", "wrong_ready", "duplicate_terminals", "leaks")
MORE = (
    "left_suspended",
    "lost_workloads",
    "half_restores",
    "illegal_statuses",
    "no_terminal",
    "not_killed",
    "ran_twice",
    "daemon_failed",
    "bases",
    "defects",
    "harness",
)
_UNNAMED = re.compile(r"^Thread-\d+ \(")  # numbered as they come
_UNDER_USES = re.compile("/uses/")
DELETED = 20.0  # seconds until nobody reads any more what is to be deleted
PATIENCE = 3.0  # seconds something may take to go away by itself
GIVEN_BACK = (
    15.0  # seconds until GPU state is back that no daemon gives back: its helper waits 5 s for one, and may have to be started
)


@dataclass(frozen=True)
class Finding:
    counter: str
    text: str


Findings = list[Finding]


def statuses(events: Sequence[Event]) -> Findings:
    """Forward only, numbered upwards, one end."""
    found: Findings = []
    told = [(event.seq, event.status.value) for event in events]
    terminals = [event for event in events if event.status.terminal]
    if len(terminals) > 1:
        found.append(Finding("duplicate_terminals", f"{told}"))
    ranks, seqs = [event.status.rank for event in events], [event.seq for event in events]
    if any(a >= b for each in (ranks, seqs) for a, b in itertools.pairwise(each)):
        found.append(Finding("illegal_statuses", f"{told}"))
    return found


def goes_on(subject: Subject, before: Beats) -> Findings:
    """The same processes, with their memory, and they run."""
    if found := on_gpu(subject):
        return found
    start = subject.beats.read()
    now = subject.beats.a_pass_after(start) if start else subject.beats.wait()
    if not now:
        alive = subject.living()
        states = {pid: processes.describe(pid) for pid in alive}
        if len(alive) == len(before):
            return [Finding("left_frozen", f"no beats: {states}")]
        return [Finding("lost_workloads", f"of {[beat.pid for beat in before]} there are only {states}")]
    return [*same(before, now), *(Finding("left_frozen", f"{beat.pid}: {why}") for beat in now if (why := held(beat.pid)))]


def on_gpu(subject: Subject, patience: float = PATIENCE) -> Findings:
    """What it has on a GPU is there, and nobody keeps it from its next call. An action that has ended has given it back itself: less time
    than the helper gives to a daemon that may come back."""
    return _gone(subject.suspended, "left_suspended", "not on its GPU", patience)


def same(before: Beats, now: Beats) -> Findings:
    """`now` is `before`, further on: token, counter, memory."""
    found: Findings = []
    for old, new in zip(before, now, strict=True):
        if (old.token, old.pid) != (new.token, new.pid):
            found.append(Finding("lost_workloads", f"{old} has become {new}"))
        elif new.counter <= old.counter:
            found.append(Finding("lost_workloads", f"it counts backwards: {old}, {new}"))
        if new.wrong:
            found.append(Finding("lost_workloads", f"its memory has changed: {new}"))
    return found


def nothing_lives(subject: Subject, counter: str) -> Findings:
    """Nothing of it, or nothing any more."""
    return _gone(lambda: [processes.describe(pid) for pid in subject.living()], counter, "alive")


def in_store(bench: Bench, checkpoint_id: str) -> list[str]:
    return [facts.key for facts in bench.store.list(f"{checkpoint_id}/")]


def no_checkpoint(bench: Bench, checkpoint_id: str, *, unknown: bool) -> Findings:
    """Nothing of it in the store. Where the outcome is unknown, there may be a whole one."""
    keys = in_store(bench, checkpoint_id)
    if not keys or (unknown and any(key.endswith("/manifest.json") for key in keys)):
        return []
    if any(key.endswith("/manifest.json") for key in keys):
        return [Finding("half_checkpoints", f"not ready, and there is a manifest: {keys}")]
    return [Finding("leaks", f"objects without a manifest: {keys}")]


def stale(bench: Bench) -> set[str]:
    """Marks of those that are not there."""
    keys = {facts.key for facts in bench.store.list()}
    return {key for key in keys if "/refs/" in key and f"{key.rpartition('/')[2]}/manifest.json" not in keys}


def no_more_stale(bench: Bench, before: set[str]) -> Findings:
    """Where nobody died; who is being collected loses his manifest before his marks."""
    return _gone(lambda: sorted(stale(bench) - before), "bases", "marks of nobody")


def guarded(bench: Bench) -> Findings:
    """Who refers to others has a mark in each, and they are there."""
    keys = {facts.key for facts in bench.store.list()}
    found: Findings = []
    for each in sorted(key.partition("/")[0] for key in keys if key.endswith("/manifest.json")):
        for base in _bases(bench, each):
            lost = [name for name in (f"{base}/manifest.json", f"{base}/refs/{each}") if name not in keys]
            found += [Finding("bases", f"{each} refers to {base}, and there is no {name}") for name in lost]
    return found


def _bases(bench: Bench, checkpoint_id: str) -> list[str]:
    try:
        return bench.bases(checkpoint_id)
    except NotFound:
        return []  # since it was listed


def can_be_deleted(bench: Bench) -> Findings:
    """Garbage is collected, then each checkpoint is deleted, who refers to others before them: nothing is left in the store."""
    _collect(bench)
    deadline, later = time.monotonic() + DELETED, False
    while ids := [facts.key.partition("/")[0] for facts in bench.store.list() if facts.key.endswith("/manifest.json")]:
        said = {each: _deleted(bench, each) for each in ids}
        if all(said.values()) and time.monotonic() > deadline:
            if later:
                return [Finding("bases", f"cannot be deleted: {said}")]
            for key in _uses(bench):  # that could not be taken back, from a store that was away: they count for a day
                bench.store.delete(key)
            later = True
    _collect(bench)
    uses = _uses(bench)
    left = [facts.key for facts in bench.store.list() if facts.key not in uses]
    return [Finding("leaks", f"in the store, when all was deleted: {left[:8]}")] if left else []


def _uses(bench: Bench) -> list[str]:
    return [facts.key for facts in bench.store.list() if _UNDER_USES.search(facts.key)]


def _collect(bench: Bench) -> None:
    list(bench.stub.CollectGarbage(pb.GarbageRequest(apply=True, grace=0), timeout=30))


def _deleted(bench: Bench, checkpoint_id: str) -> str:
    """Why not, if it is not."""
    try:
        bench.stub.DeleteCheckpoint(pb.CheckpointId(checkpoint_id=checkpoint_id), timeout=30)
    except grpc.RpcError as e:
        return str(e.details())
    return ""


def verifies(bench: Bench, checkpoint_id: str) -> Findings:
    """Every byte of it is there."""
    try:
        *_, last = bench.stub.Verify(pb.CheckpointId(checkpoint_id=checkpoint_id), timeout=30)
    except grpc.RpcError as e:
        answered = "hibernode-code" in dict(e.trailing_metadata() or ())  # else there was no daemon to ask
        return [Finding("wrong_ready" if answered else "harness", f"it does not verify: {e.details()}")]
    except ValueError:
        return [Finding("harness", "nobody said whether it verifies")]
    return [] if last.ok else [Finding("wrong_ready", f"it does not verify: {last.message}")]


def nothing_left(bench: Bench, baseline: Census | None) -> Findings:
    """No upload, no file at work, no helper, and the daemon is as it was."""
    found = [
        *_gone(lambda: [upload.key for upload in bench.store.open_uploads()], "leaks", "open uploads"),
        *_gone(bench.at_work, "leaks", "in the work directory"),
        *_gone(lambda: [processes.describe(pid) for pid in bench.stray_criu()], "leaks", "CRIU's processes"),
        *_gone(lambda: [processes.describe(pid) for pid in bench.helpers()[1:]], "leaks", "more than one GPU helper"),
    ]
    if baseline is not None:
        found += _gone(lambda: census(bench).beyond(baseline), "leaks", "in the daemon")
    return found


def no_helper(bench: Bench) -> Findings:
    """At the end: it has given back everything, and ends when it is told to."""
    found = _gone(bench.suspends, "left_suspended", "in the GPU helper's journal", GIVEN_BACK)
    bench.end_helper()
    return found + _gone(lambda: [processes.describe(pid) for pid in bench.helpers()], "leaks", "a GPU helper")


def _gone(look: Callable[[], Sequence[str]], counter: str, what: str, patience: float = PATIENCE) -> Findings:
    """Until nothing is seen, or patience ends."""
    deadline = time.monotonic() + patience
    while seen := look():
        if time.monotonic() > deadline:
            return [Finding(counter, f"{what}: {list(seen)[:8]}")]
        time.sleep(0.02)
    return []


@dataclass(frozen=True)
class Census:
    """What a daemon has of this machine."""

    descriptors: Counter[str]
    threads: Counter[str]
    mounts: int

    @classmethod
    def of(cls, descriptors: Sequence[str], threads: Sequence[str], mounts: int) -> Census:
        return cls(Counter(descriptors), Counter(threads), mounts)

    def beyond(self, baseline: Census) -> list[str]:
        """What there is more of than there was."""
        more = [f"{count} x {what}" for what, count in (self.descriptors - baseline.descriptors).items()]
        more += [f"thread {name}" for name in (self.threads - baseline.threads).elements()]
        return more + ([f"{self.mounts - baseline.mounts} mounts"] if self.mounts > baseline.mounts else [])

    def __or__(self, other: Census) -> Census:
        """The larger of each."""
        return Census(self.descriptors | other.descriptors, self.threads | other.threads, max(self.mounts, other.mounts))


def census(bench: Bench) -> Census:
    """Of the running daemon. Pool threads and sockets of calls come and go: they are counted apart, by the bench's end."""
    daemon = bench.insist_running()
    threads = [_UNNAMED.sub("Thread (", name) for name in daemon.census()[0] if not name.startswith("hibernode_")]
    mounts = len(Path(f"/proc/{daemon.pid}/mountinfo").read_text().splitlines())
    return Census.of(_descriptors(daemon.pid), threads, mounts)


def _descriptors(pid: int) -> list[str]:
    """What they point at, without numbers that are new each time. Calls of the bench are left out: it is the one that holds them."""
    found, sockets = [], _sockets(pid)
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            at = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        what = sockets.get(at, "socket") if at.startswith("socket:") else at.partition("[")[0].partition(":[")[0]
        if not what.endswith(("/d.sock", "/behind", "/behind (deleted)")):  # the door of the daemon, and what is behind it
            found.append(what)
    return found


def _sockets(pid: int) -> dict[str, str]:
    """`socket:[inode]` -> what it is, as far as /proc says."""
    found = {}
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        found[f"socket:[{words[6]}]"] = f"unix socket {words[7] if len(words) > 7 else ''}".rstrip()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        found[f"socket:[{words[9]}]"] = f"tcp socket, state {words[3]}"
    return found
