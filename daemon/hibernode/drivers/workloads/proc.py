"""What /proc says of processes. Knows the files and their fields; decides nothing."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hibernode.model import PAGE
from hibernode.ports import Identity, ProcessFacts

_FIRST = 1  # process of the machine: its namespaces are the machine's
_PF_KTHREAD = 0x00200000  # include/linux/sched.h
_ESTABLISHED = "01"  # include/net/tcp_states.h
GONE = (FileNotFoundError, ProcessLookupError)
_PIDFD_GETFD = 438  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Stat:
    """Of /proc/<pid>/stat, the fields that are used here."""

    pid: int
    comm: str
    state: str
    ppid: int
    flags: int
    start_time: int
    rss: int


def stat(pid: int, path: str = "") -> Stat:
    """Raises FileNotFoundError or ProcessLookupError when there is no such process."""
    with open(path or f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        text = file.read()
    comm, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
    return Stat(pid, comm, rest[0], int(rest[1]), int(rest[6]), int(rest[19]), int(rest[21]) * PAGE)


def start_time(pid: int) -> int:
    """0 when there is no such process. With the pid it is an identity: pids come again."""
    try:
        return stat(pid).start_time
    except GONE:
        return 0


def now() -> int:
    """What the start time of a process that began now would be."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def state(pid: int) -> str:
    """R, S, D, T, t, Z, X as in proc(5); empty when there is no such process."""
    try:
        return stat(pid).state
    except GONE:
        return ""


def alive(pid: int, started: int) -> bool:
    """This very process is there and not a zombie."""
    try:
        found = stat(pid)
    except GONE:
        return False
    return found.start_time == started and found.state not in ("Z", "X")


def thread_states(pid: int) -> set[str]:
    """Of all its threads; empty when there is no such process. The first one may be a zombie while the others run on."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except GONE:
        return set()
    states = set()
    for thread in threads:
        try:
            states.add(stat(int(thread), f"/proc/{pid}/task/{thread}/stat").state)
        except GONE:
            continue
    return states


def stops(pid: int) -> bool:
    """Whether it is stopped, or will be as soon as it comes to run: CRIU sends SIGSTOP and detaches, and on a busy machine the process
    still looks as if it ran for some milliseconds. What is pending is read first: a signal that is taken in between is seen as a state."""
    try:
        status = _status(pid)
    except GONE:
        return False
    return bool(int(status["ShdPnd"], 16) >> (signal.SIGSTOP - 1) & 1) or "T" in thread_states(pid)


def tracers(pid: int) -> set[int]:
    """Who traces a thread of it. CRIU holds a tree as its tracer while the code it put there runs, in any state."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except GONE:
        return set()
    found = set()
    for thread in threads:
        try:
            found.add(int(_status(pid, f"/task/{thread}")["TracerPid"]))
        except (*GONE, KeyError):
            continue  # ended; of what ends while it is read, a part is there
    return found - {0}


def traced_by(tracer: int) -> list[Identity]:
    """Every process with a thread that `tracer` traces."""
    return [(found.pid, found.start_time) for found in everybody() if tracer in tracers(found.pid)]


def everybody() -> Iterator[Stat]:
    """Every process that is there."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                yield stat(int(name))
            except GONE:
                continue


def tree(root: int) -> list[int]:
    """`root` and all its descendants now, parents first."""
    return [root, *(pid for pid, _ in forest([(root, start_time(root))]) if pid != root)]


def forest(roots: Iterable[Identity]) -> list[Identity]:
    """Those of `roots` that are there, and all descendants that these have now, parents first."""
    there, children = _everybody_by_parent()
    pids = _with_descendants([pid for pid, started in roots if _is(there, pid, started)], children)
    return [(pid, there[pid].start_time) for pid in pids]


def families(roots: Iterable[Identity]) -> dict[Identity, list[Stat]]:
    """Each of `roots` that is there, with all descendants that it has now, itself first: one look at /proc for however many."""
    there, children = _everybody_by_parent()
    found = [(pid, started) for pid, started in roots if _is(there, pid, started)]
    return {root: [there[pid] for pid in _with_descendants([root[0]], children)] for root in found}


def _everybody_by_parent() -> tuple[dict[int, Stat], Mapping[int, list[int]]]:
    there, children = {}, defaultdict[int, list[int]](list)
    for found in everybody():
        there[found.pid] = found
        children[found.ppid].append(found.pid)
    return there, children


def _is(there: Mapping[int, Stat], pid: int, started: int) -> bool:
    return started != 0 and pid in there and there[pid].start_time == started


def _with_descendants(roots: Iterable[int], children: Mapping[int, list[int]]) -> list[int]:
    pids = dict.fromkeys(roots)
    queue = list(pids)
    for pid in queue:
        new = [child for child in children.get(pid, ()) if child not in pids]
        pids.update(dict.fromkeys(new))
        queue += new
    return queue


def facts(pid: int) -> ProcessFacts:
    """Everything preflight asks about one process. Raises FileNotFoundError or ProcessLookupError when it is gone."""
    of = stat(pid)
    status = _status(pid)
    return ProcessFacts(
        pid=pid,
        start_time=of.start_time,
        comm=of.comm,
        state=of.state,
        tgid=int(status["Tgid"]),
        kernel_thread=bool(of.flags & _PF_KTHREAD),
        tracer=int(status["TracerPid"]),
        uid=int(status["Uid"].split()[0]),
        rss=of.rss,
        ids=frozenset(int(each) for key in ("Uid", "Gid") for each in status[key].split()[:3]),
        limits=of.state in ("Z", "X") or _shows_limits(pid),
        nodes_network=of.state not in ("Z", "X") and _in_nodes_network(pid),
        fds=() if of.state == "Z" else tuple(descriptors(pid)),
        cuda=_has_cuda(pid),
    )


def _in_nodes_network(pid: int) -> bool:
    """False where the machine's cannot be looked at: that needs CAP_SYS_PTRACE, if its first process has rights that the daemon has not."""
    its, ours = (os.stat(f"/proc/{who}/ns/net").st_ino for who in (pid, "self"))
    if its == ours:
        return False
    try:
        return os.stat(f"/proc/{_FIRST}/ns/net").st_ino == its
    except PermissionError:
        return False


def _shows_limits(pid: int) -> bool:
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE)
    except PermissionError:
        return False
    return True


def _has_cuda(pid: int) -> bool:
    with open(f"/proc/{pid}/maps", "rb") as file:  # of a zombie it is empty
        return any(b"/libcuda.so" in line for line in file)


def _status(pid: int, thread: str = "") -> dict[str, str]:
    with open(f"/proc/{pid}{thread}/status", encoding="utf-8", errors="replace") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


def pids_inside(pid: int) -> list[int]:
    """Its pid in every pid namespace that it is in, this one's first."""
    return [int(each) for each in _status(pid)["NSpid"].split()]


def descriptors(pid: int) -> Iterator[tuple[int, str]]:
    """(descriptor, what it is open on). Raises FileNotFoundError or ProcessLookupError when the process is gone."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield int(name), os.readlink(f"/proc/{pid}/fd/{name}")
        except GONE:
            continue  # closed while we looked


def connections(pid: int, fds: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """Established TCP connections among the descriptors `fds` of `pid`: "address:port -> address:port", its own end first."""
    inodes = {what[8:-1] for _, what in fds if what.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6") if inodes else ():
        try:
            with open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
                rows = [line.split() for line in file][1:]
        except GONE:
            continue
        found += [f"{_end(row[1])} -> {_end(row[2])}" for row in rows if row[3] == _ESTABLISHED and row[9] in inodes]
    return tuple(found)


def _end(text: str) -> str:
    """`0100007F:1F90` is 127.0.0.1:8080. An IPv4 address within an IPv6 one is itself: so the other end may know it."""
    words, _, port = text.partition(":")
    raw = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    found = getattr(address, "ipv4_mapped", None) or address
    return f"[{found}]:{int(port, 16)}" if found.version == 6 else f"{found}:{int(port, 16)}"


@contextlib.contextmanager
def borrowed(pid: int, number: int) -> Iterator[int]:
    """A copy, for this moment, of a descriptor that a process has. OSError where it has none of that number, or none for us."""
    pidfd = os.pidfd_open(pid)
    try:
        if (copy := _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(pidfd)
    try:
        yield copy
    finally:
        os.close(copy)


def command_line(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [part.decode(errors="replace") for part in file.read().split(b"\0")[:-1]]
    except GONE:
        return []
