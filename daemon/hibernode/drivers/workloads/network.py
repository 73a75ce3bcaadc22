"""Networks of containers: which addresses one has, and what a CRIU that was killed has left closed in it.

What is done in a network namespace is done by a thread of its own that goes there (setns(2)) and ends there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hibernode.children import Children
from hibernode.drivers.workloads import proc
from hibernode.errors import Refused
from hibernode.ports import Endpoint

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_TCP_REPAIR, _REPAIR_ON = 19, 1  # include/uapi/linux/tcp.h
_PATIENCE = 2.0  # seconds for a program that takes a few milliseconds
# What CRIU (4.2, criu/net.c) gives iptables-restore to open a network that it has closed; where it has not that is an error, and nothing
# is done.
_OPEN = b"*filter\n:CRIU - [0:0]\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n-X CRIU\nCOMMIT\n"
_T = TypeVar("_T")
_log = logging.getLogger("hibernode.network")
_libc = ctypes.CDLL(None, use_errno=True)


def insist_there(name: str, spec: Mapping[str, Any], sockets: Collection[Endpoint], *, kept: bool) -> None:
    """Refused("no_address") for the first socket of container `name` whose own address is not there, where it is to be made: CRIU could not
    bind it. Of connections that is so where they are `kept`. Where the network cannot be looked into, CRIU has to find it out."""
    wanted = [each for each in sockets if kept or not each.connected]
    if not wanted:
        return
    missing = _within(_of(spec), lambda: next((each for each in wanted if not _has(each.address)), None))
    if missing is None:
        return
    what = f"a connection to {missing.peer}" if missing.connected else "a socket"
    raise Refused(
        "no_address", f"container {name!r} has {what} from {missing.address}, and the new pod has not that address", prop="address",
        found="none", wanted=missing.address,
        hint='annotate the pod with hibernode.io/criu-opts: {"tcp": "close"}, and its connections are closed' if missing.connected
        else "what listens, or sends, on one address alone can be restored only where that is: let it bind 0.0.0.0",
    )  # fmt: skip


def reopen(pids: Collection[int], children: Children) -> None:
    """Undo what a CRIU has left that was killed while it saved connections of these processes: their network is closed for all that are in
    it, and their sockets are in repair. They had better be frozen still: what one asks of a socket in repair fails. No CRIU may be at work
    on them. Best effort, logged; harmless when repeated. Takes some milliseconds for each network, `_PATIENCE` if something is wrong."""
    spaces: dict[int, str] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            space = f"/proc/{pid}/ns/net"
            spaces.setdefault(os.stat(space).st_ino, space)
    for space in spaces.values():
        try:
            opened = _within(
                space, lambda: [_restored(program, children) for program in ("iptables-restore", "ip6tables-restore")]
            )
        except OSError as e:
            _log.warning("cannot see whether a network is left closed: %s", e)
            continue
        if opened and any(opened):
            _log.warning("a network was left closed by a CRIU that was killed, and is open again")
    for pid in pids:  # last: a socket that leaves it asks its peer how things stand, and nobody would ask again
        with contextlib.suppress(OSError):
            _end_repair(pid)


def _of(spec: Mapping[str, Any]) -> str:
    """Where the network namespace is that the container will be in; "": a new one."""
    found = [each for each in (spec.get("linux") or {}).get("namespaces") or () if each.get("type") == "network"]
    return str(found[0].get("path") or "") if found else "/proc/1/ns/net"  # the machine's: runc's own


def _within(space: str, work: Callable[[], _T]) -> _T | None:
    """None where it cannot be reached."""
    try:
        descriptor = os.open(space, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None

    def go() -> _T:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return work()

    try:
        with ThreadPoolExecutor(1, "network") as pool:
            return pool.submit(go).result()
    finally:
        os.close(descriptor)


def _has(address: str) -> bool:
    """As CRIU will find out."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as e:
            return e.errno != errno.EADDRNOTAVAIL
    return True


def _restored(program: str, children: Children) -> bool:
    with tempfile.TemporaryFile() as rules:
        rules.write(_OPEN)
        rules.seek(0)
        try:
            child = children.spawn([program, "--noflush"], given=rules.fileno())
        except FileNotFoundError:
            return False  # a CRIU cannot have closed it without, either
        try:
            return children.wait(child, _PATIENCE) == 0
        except subprocess.TimeoutExpired:
            child.kill()
            children.wait(child)
            return False


def _end_repair(pid: int) -> None:
    for number, what in proc.descriptors(pid):
        if what.startswith("socket:"):
            with contextlib.suppress(OSError), proc.borrowed(pid, number) as copy:
                _end_repair_of(copy)


def _end_repair_of(descriptor: int) -> None:
    """Raises OSError for what is no TCP socket."""
    with socket.socket(fileno=os.dup(descriptor)) as found:
        if found.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == _REPAIR_ON:
            found.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 0)
