"""Which cases there are: a fault, a point or a moment, a workload, a direction. One line of text names a case, and is enough to run it.

    <direction>/<subject>/<fault>@<point>#<nth>

`keep` and `kill` are checkpoints after which the workload runs on or is killed, `restore` brings it back. The points are not listed here:
one run of each direction without a fault says which there are (`Survey`), so that a new step of the product is in the matrix by itself.

The workload `alone` is a process without a child, and is played through restores only. Of it, and of `process` and `job`, which share
hardly any memory with their children, the filler brings the pages while CRIU holds them, which is a phase of its own. The workload `chain`
is a process whose checkpoints are increments: it is played through what they do, and through what others do to the checkpoints that they
refer to. The workload `gpu` is not played through everything that has nothing to do with it. It has points of its own beside the daemon's:
at `driver.<call>` the GPU driver is in the middle of that call, on both processes (#1), on the root (#2), or on the child (#3).
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.matrix.bench import SUBJECTS

DIRECTIONS = ("keep", "kill", "restore")
Survey = Mapping[tuple[str, str], Mapping[str, int]]  # (direction, subject) -> point -> hits of one run without a fault

# The moments at which somebody from outside acts: what they do is the fault. Each is a phase that is about to be, or is, written down.
_MOMENTS = {
    "keep": ("begin", "preflight", "dumping", "shipping", "committing", "done"),
    "kill": ("begin", "preflight", "dumping", "shipping", "committing", "killing", "done"),
    "restore": ("begin", "preflight", "fetching", "restoring", "probing", "done"),
}
_FILLED = ("alone", "process", "job")
_HELD = {  # where somebody would stand still, or be half there, if the daemon did
    "keep": ("journal.dumping.after", "criu.dump.after"),
    "kill": (
        "criu.dump.after",
        "journal.shipping.after",
        "journal.committing.after",
        "journal.killing.before",
        "journal.killing.after",
    ),
    "restore": ("criu.restore.after", "journal.probing.after"),
}
_STALLING = ("store.write.stream.before", "store.commit.stream.before", "store.stat.stream.before", "store.put.manifest.before")
_CRIU = {"keep": "criu.dump", "kill": "criu.dump", "restore": "criu.restore"}
# Of CRIU's own fault injection (criu/include/fault-injection.h): what fails, or takes another way, in a dump and in a restore.
_CRIU_FAULTS = {"keep": (1, 3, 5, 136, 127, 129, 135, 137), "kill": (1, 3, 5, 136, 129, 135), "restore": (2, 6, 7, 8, 127, 133)}
_WEIGHTS = {
    "die": 8,
    "raise": 8,
    "criu_fault": 3,
    "die_twice": 2,
    "die_at_random": 2,
}  # in a quick run; of the others there is one
_NOT_COUNTED = ("criu.facts", "journal.published")  # as often as it happens to be
_BREAKING = ("workload.thaw", "workload.kill", "criu.restore", "workloads.prepare", "workload.processes", "criu.tasks")
_CALLS = {  # of the driver, in an action that comes to its end
    "keep": ("lock", "checkpoint", "restore", "unlock"),
    "kill": ("lock", "checkpoint"),
    "restore": ("restore", "unlock"),
}
_UNDOING = ("restore", "unlock")  # in the undo of a checkpoint: `act` has its dump fail
_VICTIMS = (1, 2, 3)  # both, root, child
_NEAR_GPU = (  # points between two of the driver's calls, and where the daemon writes down how far it is
    "gpu.restored",
    "tree.suspend",
    "tree.resume",
    "tree.close.before",
    "criu.dump",
    "criu.restore",
    "journal.suspending",
    "journal.dumping.after",
    "journal.resuming",
    "journal.shipping.after",
    "journal.killing",
    "journal.probing",
)
_GPU_MOMENTS = {  # of what does not come from the GPU's side, too
    "keep": ("tree.suspend.after", "tree.resume.before"),
    "kill": ("tree.suspend.after", "journal.shipping.after"),
    "restore": ("criu.restore.after", "tree.resume.after"),
}
_ANSWERS = {  # CUresult: not ready, not supported, out of memory, operating system; after `done` it is done all the same
    "lock": ("600", "999"),
    "checkpoint": ("801", "2", "304.done"),
    "restore": ("2", "304", "999.done"),
    "unlock": ("304", "999.done"),
}
_FATAL = (1, 2, 3, 5, 6)  # of these, the ones that nothing survives
_TRIES = 12  # of what comes at random
_Fault = tuple[Any, ...]  # (fault, point[, argument[, times[, nth]]])
_WHOSE = "store.get.attempt"  # a store that never says whose an attempt is keeps the mark of it, for a collection
_FOREVER = 1000  # times: until the plan is over

_ID = re.compile(
    r"(?P<direction>\w+)/(?P<subject>\w+)/(?P<fault>[a-z0-9_]+)(:(?P<argument>[\w.]+))?(\*(?P<times>\d+))?"
    r"@(?P<point>[\w.+-]*)#(?P<nth>\d+)"
)


@dataclass(frozen=True)
class Case:
    direction: str
    subject: str
    fault: str
    point: str = ""
    argument: str = ""  # which error, which number of CRIU's, which point of recovery
    times: int = 1
    nth: int = 1  # hit of the point; for what comes at a random moment, the number of the try

    @property
    def id(self) -> str:
        argument = f":{self.argument}" if self.argument else ""
        times = f"*{self.times}" if self.times > 1 else ""
        return f"{self.direction}/{self.subject}/{self.fault}{argument}{times}@{self.point}#{self.nth}"


def parse(text: str) -> Case:
    """ValueError if it names no case."""
    found = _ID.fullmatch(text)
    if found is None or found["direction"] not in DIRECTIONS or found["subject"] not in SUBJECTS:
        raise ValueError(f"no case: {text!r}")
    return Case(
        found["direction"], found["subject"], found["fault"], found["point"], found["argument"] or "",
        int(found["times"] or 1), int(found["nth"]),
    )  # fmt: skip


def full(survey: Survey, seed: int) -> list[Case]:
    """All of them, in an order that the seed decides."""
    cases = [case for where in survey for case in _of(*where, survey[where])]
    random.Random(seed).shuffle(cases)
    return cases


def quick(survey: Survey, seed: int, count: int) -> list[Case]:
    """A part: of every fault some, and of every point some, as evenly as `count` allows."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in full(survey, seed):
        groups.setdefault((case.direction, case.fault), []).append(case)
    chosen: list[Case] = []
    while len(chosen) < count and any(groups.values()):
        for (_, fault), group in groups.items():
            for _ in range(min(_WEIGHTS.get(fault, 1), len(group), count - len(chosen))):
                chosen.append(_freshest(group, chosen))
    return chosen


def _freshest(group: list[Case], chosen: list[Case]) -> Case:
    """The first of the group whose point and workload were chosen least; taken out of it."""
    seen = [case.point for case in chosen]
    subjects = [case.subject for case in chosen if case.fault == group[0].fault]
    best = min(group, key=lambda case: (seen.count(case.point), subjects.count(case.subject)))
    group.remove(best)
    return best


def _of(direction: str, subject: str, points: Mapping[str, int]) -> Iterator[Case]:
    """Of one direction and workload."""
    if subject == "alone" and direction != "restore":  # as of any process
        return
    moments, held = _MOMENTS[direction], _HELD[direction]
    if direction == "restore" and subject in _FILLED:
        moments, held = (*moments[:-2], "holding", *moments[-2:]), ("journal.holding.after", *held)
    if subject in ("gpu", "chain"):
        parts = (_in_driver(direction), _near_gpu(direction, points), _around_gpu(direction))
        for fault, point, *more in itertools.chain(
            *(parts if subject == "gpu" else (_inside(points), _around_bases(direction, points)))
        ):
            yield Case(direction, subject, fault, point, *more)
        return
    for fault, point, *more in (
        *_inside(points),
        *_outside(direction, moments),
        *_at_random(direction),
        *_with_criu(direction),
        *_left_alone(direction, points, moments, held),
    ):
        yield Case(direction, subject, fault, point, *more)


def _inside(points: Mapping[str, int]) -> Iterator[_Fault]:
    """The daemon dies at every point, at its first hit, one in the middle and its last; and what a port can raise, it raises."""
    for point, hits in points.items():
        for nth in sorted({1, (hits + 1) // 2, hits}) if not point.startswith(_NOT_COUNTED) else (1,):
            yield "die", point, "", 1, nth
        yield from _raised(point)


def _outside(direction: str, moments: Sequence[str]) -> Iterator[_Fault]:
    """What others do while a phase is written down."""
    faults = ["sigterm", "sigterm_twice", "pause_daemon", "cancel", "cancel_by_call", "redeliver", "die_redelivered"]
    faults += ["bus_stopped", "bus_silent"]
    if direction != "restore":
        faults += ["workload_dies", "child_dies"]
    for moment in moments:
        for side, fault in itertools.product(("before", "after"), faults):
            yield fault, f"journal.{moment}.{side}"
        for second in _recovery_points(direction):
            yield "die_twice", f"journal.{moment}.after", second


def _at_random(direction: str) -> Iterator[_Fault]:
    """What comes at a moment that nobody has chosen, again and again."""
    point = f"{_CRIU[direction]}.before"
    faults = ["criu_killed", "criu_and_daemon_killed", "pause_criu", "cancel_at_random", "sigterm_at_random"]
    if direction != "restore":
        faults.append("workload_dies_at_random")
    for nth in range(1, _TRIES + 1):
        yield "die_at_random", "", "", 1, nth
        yield from ((fault, point, "", 1, nth) for fault in faults)


def _with_criu(direction: str) -> Iterator[_Fault]:
    """CRIU's own faults; and the daemon dies while it undoes what they have done."""
    undo = "place.kill.before" if direction == "restore" else "workload.thaw.before"
    for number in _CRIU_FAULTS[direction]:
        yield "criu_fault", f"{_CRIU[direction]}.before", str(number)
        if number in _FATAL:
            yield "criu_fault_and_die", undo, str(number)


def _left_alone(direction: str, points: Mapping[str, int], moments: Sequence[str], held: Sequence[str]) -> Iterator[_Fault]:
    """Nobody starts the daemon again, it stands still for ever, CRIU does, a store does for longer than a phase may take: the workload
    runs on all the same, by the watchdog or by the deadline, and that is seen before anybody comes to help."""
    for moment, side in itertools.product(moments[1:], ("before", "after")):
        yield "watch_die", f"journal.{moment}.{side}"
    for point in held:
        yield "watch_stop", point
    for nth in range(1, _TRIES // 2 + 1):
        for fault in (
            "watch_die_at_random",
            "watch_criu_stopped",
            "watch_criu_stopped_daemon_dies",
            "watch_criu_dies_daemon_stopped",
        ):
            yield fault, f"{_CRIU[direction]}.before", "", 1, nth
    for point in _STALLING:
        if point in points:
            yield "stall_long", point


def _in_driver(direction: str) -> Iterator[_Fault]:
    """Somebody dies, or stands still, while the driver is at work; nobody comes to help; the driver fails, hangs, or takes its time."""
    for call in _CALLS[direction]:
        point = f"driver.{call}"
        yield from (("helper_killed", point, "", 1, nth) for nth in _VICTIMS)
        for fault in ("daemon_killed", "helper_and_daemon_killed"):
            yield from ((fault, point, "", 1, nth) for nth in _VICTIMS[:2])
        for fault in ("pause_helper", "watch_daemon_killed", "watch_helper_and_daemon_killed", "driver_hangs", "driver_slow"):
            yield fault, point
        yield "child_dies", point, "", 1, 3
        for answer in _ANSWERS[call]:
            yield "driver_says", point, answer, 1, 2 if answer == _ANSWERS[call][0] else 3
    if direction != "restore":
        yield "driver_says", "driver.lock", "600", _FOREVER
        yield "driver_says", "driver.checkpoint", "801", _FOREVER
    if direction == "kill":
        for call, fault in itertools.product(_UNDOING, ("helper_killed", "daemon_killed", "helper_and_daemon_killed")):
            yield fault, f"driver.{call}", "", 1, 2


def _near_gpu(direction: str, points: Mapping[str, int]) -> Iterator[_Fault]:
    """The daemon, its helper, or both, end between two calls; and the port fails."""
    for point in points:
        if point.startswith(_NEAR_GPU):
            yield "die", point
            if point.startswith(("tree.", "criu.")):
                yield "helper_killed", point
            if point.startswith(("tree.suspend", "tree.resume", "criu.")):
                yield "helper_and_daemon_killed", point
        if point.startswith(("gpu.check", "gpu.find.before", "gpu.restored.before", "tree.suspend", "tree.resume")):
            yield "raise", point, "gpu_failed", 1
    for nth in range(1, _TRIES // 6 + 1):
        for fault in ("helper_killed_at_random", "helper_and_daemon_killed_at_random"):
            yield fault, f"{_CRIU[direction]}.before", "", 1, nth
            yield fault, "tree.resume.before" if direction == "restore" else "tree.suspend.before", "", 1, nth


def _around_gpu(direction: str) -> Iterator[_Fault]:
    """What comes from elsewhere, while GPU state is on its way."""
    faults = ["sigterm_twice", "pause_daemon", "cancel", "die_redelivered"]
    faults += ["child_dies", "workload_dies"] if direction != "restore" else []
    for point, fault in itertools.product(_GPU_MOMENTS[direction], faults):
        yield fault, point
    point = f"{_CRIU[direction]}.before"
    for nth, fault in itertools.product(range(1, 3), ("criu_killed", "criu_and_daemon_killed", "cancel_at_random")):
        yield fault, point, "", 1, nth
    yield from (("die_at_random", "", "", 1, nth) for nth in _VICTIMS)
    for number in _CRIU_FAULTS[direction]:
        if number in _FATAL:
            yield "criu_fault", point, str(number)
    yield "watch_die", _HELD[direction][0]
    yield "watch_stop", _HELD[direction][0]


def _around_bases(direction: str, points: Mapping[str, int]) -> Iterator[_Fault]:
    """Others delete and collect while a checkpoint begins to refer to what they want gone, or is restored from it; and what else may come
    while marks are put and taken back."""
    moments = [f"journal.{moment}.{side}" for moment in _MOMENTS[direction] for side in ("before", "after")]
    marks = [point for point in points if point.startswith("store.") and ".reference." in point]
    reads = [point for point in points if point.startswith(("store.read_into.", "store.put.manifest"))]
    yield from itertools.product(("base_deleted", "collected"), (*moments, *marks, *reads))
    yield from itertools.product(("cancel", "sigterm_twice", "die_redelivered"), (*moments[::2], *marks))
    for second in _recovery_points(direction):
        yield "die_twice", _HELD[direction][0], second
    point = f"{_CRIU[direction]}.before"
    for nth in range(1, _TRIES // 2 + 1):
        yield "die_at_random", "", "", 1, nth
        yield from ((fault, point, "", 1, nth) for fault in ("criu_killed", "criu_and_daemon_killed", "cancel_at_random"))
    yield from (("watch_die", point) for point in _HELD[direction])


def _raised(point: str) -> Iterator[tuple[str, str, str, int]]:
    """What can come out of this point: (fault, point, error, times)."""
    port, method, *_ = point.split(".")
    before = point.endswith(".before")
    if port == "store" and method not in ("abort", "free_bytes") and (before or method != "upload"):
        writes = method in ("upload", "write", "commit", "put", "check")
        errors = ["store_unavailable", "no_room" if writes else "corrupt"]
        for error in errors:
            yield "raise", point, error, 1
        if not point.startswith(_WHOSE):
            yield "raise", point, errors[0], _FOREVER
        if before:
            yield "stall", point, "", 1
    elif port in ("journal", "event") and before:
        yield "raise", point, "enospc", 1
        yield "raise", point, "enospc", 4
    elif point.startswith(("criu.dump", "criu.restore")):
        yield "raise", point, "dump_failed" if "dump" in point else "restore_failed", 1
        yield "raise", point, "eio", 1
    elif (
        point.startswith(_BREAKING) and point != "workloads.prepare.after"
    ):  # whoever does not give a place back has to clean it up
        yield "raise", point, "eio", 1
        yield "raise", point, "enospc", 2


def _recovery_points(direction: str) -> tuple[str, ...]:
    """Where the next daemon dies in turn, while it recovers."""
    undo = "workloads.kill" if direction == "restore" else "workloads.thaw"
    return (f"{undo}.before", f"{undo}.after", "event.error.before", "event.error.after", "journal.done.before")
