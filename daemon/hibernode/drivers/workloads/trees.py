"""What is done to whole trees of processes: let go on, kill. Where the daemon signals other
people's processes; the GPU helper, a process of its own, has `drivers/gpu/halting.py`, and the keeper of a lazy restore kills by itself.

A process is a pid and when it began, because pids come again; it is signalled through a pidfd, so that nobody else is ever met. A tree
that is to die is stopped first: what is stopped does not fork, so that the list of it comes to an end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from hibernode.children import Children
from hibernode.drivers.workloads import cgroup, freezer, proc
from hibernode.errors import Stuck
from hibernode.ports import Identity

KILL_DEADLINE = 30.0  # seconds for SIGKILLed processes to end: freeing much memory takes time
HOLD_LIMIT = 5.0  # seconds for a tree to stop; one that does not (a frozen cgroup, a dead NFS server) is killed as it is
REAP_GRACE = 2.0  # seconds a parent of somebody else gets to wait for what was killed
_AT_REST = {"T", "t", "Z", "X"}  # states in which a thread does nothing
DEAD = {"Z", "X"}
_log = logging.getLogger("hibernode.trees")


def thaw(processes: Iterable[Identity], leave: Collection[Identity] = ()) -> None:
    """SIGCONT to what is stopped of these and of what descends from them, or is about to stop, except those in `leave`."""
    for process in proc.forest(processes):
        if process not in leave and proc.stops(process[0]):
            send(process, signal.SIGCONT)


def send(process: Identity, number: signal.Signals) -> None:
    """To this very process, if it is there."""
    with _pidfd(process) as pidfd, contextlib.suppress(ProcessLookupError):
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, number)


def kill(processes: Iterable[Identity], children: Children, place: str = "", patience: float | None = None) -> None:
    """SIGKILL these, what descends from them, and whoever lives in the cgroups of `place`; all of them have ended when it returns, and
    those that the daemon or a parent who waits is responsible for are reaped. Stuck if they do not end, in `KILL_DEADLINE` or `patience`
    seconds."""
    deadline = time.monotonic() + (KILL_DEADLINE if patience is None else patience)
    if place:
        cgroup.kill(place)
    known = dict.fromkeys(processes)
    while found := _held(known, place):
        # Children first: the kernel sends SIGCONT to a stopped process group that its last parent leaves.
        for process in reversed(found):
            send(process, signal.SIGKILL)
        for process in found:
            _wait_dead(process, deadline)
    _wait_reaped(known, children)


def empty(places: Sequence[str], end: Callable[[Sequence[Identity]], None]) -> None:
    """`end`, which kills and waits, gets whoever lives in these cgroups until nobody does: one may be born there while it is at work, by a
    CRIU that is itself one of them. Who is frozen gets his SIGKILL first and goes on then, so that he does nothing else any more. Stuck if
    one has no pid here."""
    while True:
        found = [(pid, proc.start_time(pid)) for place in places for pid in freezer.members(place)]
        if any(pid == 0 for pid, _ in found):
            raise Stuck("a process is not in the pid namespace of the daemon", hint="in a pod it needs hostPID: true")
        living = [process for process in found if proc.alive(*process)]
        for process in living:
            send(process, signal.SIGKILL)
        freezer.thaw(places)
        end(living)
        if not living:
            return


def kill_now(processes: Sequence[Identity], place: str = "") -> list[Identity]:
    """As `kill`, for who may not wait: SIGKILL what is alive of them now; who that was. To be called again until it is nobody: that also
    catches who was being born meanwhile."""
    found = dict.fromkeys(_living(processes, place))
    if place:
        cgroup.kill(place)
    for process in reversed(_held(dict.fromkeys([*processes, *found]), place)):
        send(process, signal.SIGKILL)
        found[process] = None
    return list(found)


def _held(known: dict[Identity, None], place: str) -> Sequence[Identity]:
    """Everything alive that `kill` means, parents first, stopped; `known` grows by it. Who was seen once is not lost when his parent
    ends."""
    limit = time.monotonic() + HOLD_LIMIT
    stopped: set[Identity] = set()
    while True:
        at_rest = all(proc.thread_states(pid) <= _AT_REST for pid, _ in stopped)
        found = _living(known, place)
        new = [process for process in found if process not in stopped]
        known.update(dict.fromkeys(new))
        if (at_rest and not new) or time.monotonic() > limit:
            return found
        for process in new:
            send(process, signal.SIGSTOP)
        stopped.update(new)
        if not new:
            select.select([], [], [], 0.002)


def _living(known: Iterable[Identity], place: str) -> Sequence[Identity]:
    members = [(pid, proc.start_time(pid)) for pid in cgroup.members(place)] if place else []
    found = proc.forest([*known, *members])
    return [(pid, began) for pid, began in found if pid != os.getpid() and proc.thread_states(pid) - DEAD]


def ends(process: Identity, seconds: float) -> bool:
    """Have all its threads ended within so many seconds? Its zombie may still be there."""
    with _pidfd(process) as pidfd:
        if pidfd is None:
            return True
        poller = select.poll()  # not select, which knows no descriptor over 1023
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(max(0.0, seconds) * 1000))


def _wait_dead(process: Identity, deadline: float) -> None:
    if not ends(process, deadline - time.monotonic()):
        raise Stuck(
            f"process {process[0]} does not end after SIGKILL",
            hint="its state in `ps` says what it waits for",
            pid=process[0],
        )


def _wait_reaped(processes: Iterable[Identity], children: Children) -> None:
    """A zombie is no harm, but it keeps its pid, and its parent may need a moment to wait for it."""
    limit = time.monotonic() + REAP_GRACE
    while True:
        children.reap()
        left = [pid for pid, began in processes if began and proc.start_time(pid) == began]  # 0 is nobody
        if not left:
            return
        if time.monotonic() > limit:
            _log.warning("killed, and their parents do not wait for them: %s", left[:100])
            return
        select.select([], [], [], 0.005)


@contextmanager
def _pidfd(process: Identity) -> Iterator[int | None]:
    """None if it is gone."""
    pid, began = process
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield pidfd if proc.start_time(pid) == began else None
    finally:
        os.close(pidfd)
