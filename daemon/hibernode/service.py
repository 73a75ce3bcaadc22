"""The daemon: builds every port by hand, in order, and runs it. With `__main__` the only place that knows the drivers."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import signal
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import structlog

from hibernode import __version__
from hibernode.arrivals import Arrivals
from hibernode.bus import NodeBus
from hibernode.children import Children
from hibernode.config import Config, usable, without_secrets
from hibernode.courier import Courier
from hibernode.desk import Desk
from hibernode.dispatch import BEHIND, Dispatcher
from hibernode.drivers import kubernetes
from hibernode.drivers.criu import Criu
from hibernode.drivers.gpu.nvidia import Nvidia
from hibernode.drivers.gpu.nvml import Nvml
from hibernode.drivers.host import LinuxHost, on_node
from hibernode.drivers.keyring import Keyring
from hibernode.drivers.localdir import LocalDir
from hibernode.drivers.notary import Notary
from hibernode.drivers.workloads import cgroup
from hibernode.drivers.workloads.cri import Cri
from hibernode.drivers.workloads.kinds import AllWorkloads
from hibernode.drivers.workloads.kubelet import Kubelet
from hibernode.drivers.workloads.pod import Containers
from hibernode.drivers.workloads.process import Jobs, ProcessWorkloads
from hibernode.errors import Refused
from hibernode.flow import share_memory
from hibernode.journal import Journal
from hibernode.metrics import Metrics, Readings
from hibernode.model import Event, Progress
from hibernode.node import Node
from hibernode.outbox import Outbox
from hibernode.ports import Store
from hibernode.prestop import Asking, PrestopServer
from hibernode.rpc import RpcServer
from hibernode.runtime import RuntimeServer
from hibernode.systemd import notify, ping_interval
from hibernode.transfer.arena import Arena

_DRAIN = 30.0  # seconds running actions get after the first SIGTERM; the unit's TimeoutStopSec is longer
_THREADS = 64  # for questions, at most, beside those that actions wait in; made as they are needed
_log = structlog.get_logger("hibernode")


def run(settings: Config, dress: Callable[[Node], Node] = lambda node: node) -> None:
    """Until SIGTERM or SIGINT; a second one cancels what still runs. Raises what keeps it from starting.

    `dress` may stand something before the node's ports: the crash matrix injects its faults there, into this daemon and no other."""
    if os.geteuid():
        raise Refused("not_root", "the daemon needs root", prop="uid", found=os.geteuid(), wanted=0, hint="CRIU does")
    log_to_stderr(settings)
    share_memory()
    with Alone(settings) as alone:
        asyncio.run(serve(settings, alone, dress))


class Alone(contextlib.AbstractContextManager["Alone"]):
    """The one daemon of its `state_dir` and of its `work_dir`, for as long as it lives. To a second one every running action would look
    like one that a crash ended: it would kill restored trees, empty work directories and take commands.

    Two locks, because each directory may be shared without the other. The kernel lets go of them when the process ends, however it
    does, and no child inherits them: jobs and restored trees outlive the daemon.
    """

    def __init__(self, settings: Config) -> None:
        self._paths = (settings.state_dir / "lock", settings.work_dir / ".lock")
        self._held = contextlib.ExitStack()
        self._locks: list[int] = []

    def __enter__(self) -> Self:
        """Raises Refused("daemon_running") at once; but one that says that it is stopping is waited for, as systemd would."""
        with contextlib.ExitStack() as held:
            for path in self._paths:
                with usable("state_dir, work_dir", path.parent):
                    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    _insist_ours(path.parent)
                    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                held.callback(os.close, lock)
                _lock(lock, path.parent)
                self._locks.append(lock)
            self._say("running")
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def stopping(self) -> None:
        """From now on it is worth waiting for the end of this daemon."""
        self._say("stopping")

    def _say(self, state: str) -> None:
        for lock in self._locks:
            with contextlib.suppress(OSError):  # a full disk: the lock holds without
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()} {state}\n".encode(), 0)


def _insist_ours(directory: Path) -> None:
    """Nobody else may make files there, nor have made it: what is verified and what CRIU reads afterwards must be the same files."""
    facts = directory.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        kind = "directory" if stat.S_ISDIR(facts.st_mode) else "link, or something else,"
        raise Refused(
            "config",
            f"others can change what is in {directory}",
            prop="state_dir, work_dir",
            found=f"a {kind} of user {facts.st_uid} with mode {stat.S_IMODE(facts.st_mode):04o}",
            wanted=f"a directory of user {os.geteuid()} that nobody else can write to",
            hint=f"look at what is in it, remove it, and let the daemon make it; or `chmod go-w {directory}`",
        )


def _lock(lock: int, directory: Path) -> None:
    with contextlib.suppress(BlockingIOError):
        return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    pid, _, state = os.pread(lock, 100, 0).decode(errors="replace").strip().partition(" ")
    if state != "stopping":
        raise Refused(
            "daemon_running",
            f"another daemon, pid {pid or 'unknown'}, works in {directory}",
            prop="lock",
            found=f"held by pid {pid or 'unknown'}",
            wanted="free",
            hint="one daemon per node; a second one for tests needs a state_dir, a work_dir and a socket of its own",
        )
    _log.info("waiting for the end of the daemon before", pid=pid, directory=str(directory))
    return fcntl.flock(lock, fcntl.LOCK_EX)


async def serve(settings: Config, alone: Alone, dress: Callable[[Node], Node]) -> None:
    """Build, start, tell systemd, wait for a signal, drain."""
    # Actions spend their lives in threads, waiting: none may keep a question from being answered.
    threads = _THREADS + (1 + BEHIND) * settings.limits.actions
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads, "hibernode"))
    arrivals = Arrivals()
    this, metrics, bus = dress(build(settings, arrivals)), Metrics(__version__), open_bus(settings)
    outbox = Outbox(this.journal)

    def observe(update: Event | Progress) -> None:
        if isinstance(update, Event):
            metrics.observe_event(update)
        else:
            metrics.observe_progress(update)

    dispatcher = Dispatcher(this, observe)
    courier = Courier(dispatcher, this, outbox, bus) if bus is not None else None
    metrics.read_from(
        Readings(
            actions_running=lambda: dispatcher.running,
            arena_used=lambda: this.arena.used_bytes,
            arena_total=lambda: this.arena.total_bytes,
            outbox=lambda: len(outbox),
            bus_connected=lambda: bus is not None and bus.connected,
            queues={"chunks": lambda: this.arena.used_bytes >> 22, "arena": lambda: this.arena.waiting},
            gpus=this.inventory.gpus,
        )
    )
    desk, stop = Desk(dispatcher, this, courier), _signals(dispatcher.cancel_all)
    prestop = _prestop(settings, desk)
    rpc, runtime = RpcServer(desk, settings.socket), RuntimeServer(desk, arrivals, settings.containers.socket)
    if settings.metrics.listen:
        metrics.serve(settings.metrics.listen)
    try:
        await dispatcher.start()
        await rpc.start()
        await runtime.start()
        if prestop is not None:
            prestop.start()
        if courier is not None:
            courier.start()
        _log.info(
            "ready",
            node=settings.node,
            version=__version__,
            socket=str(settings.socket),
            bus=without_secrets(settings.bus.url) or None,
        )
        notify("READY=1")
        await _beat_until(stop)
        notify("STOPPING=1")
        alone.stopping()
        await dispatcher.stop(_DRAIN)
        if courier is not None:
            await courier.stop()
    finally:
        if prestop is not None:
            await prestop.stop()
        await runtime.stop()
        await rpc.stop()
        metrics.stop()


def _prestop(settings: Config, desk: Desk) -> PrestopServer | None:
    """Where there is an API server to ask whether a pod is being deleted."""
    of = settings.kubernetes
    if not of.prestop or (cluster := kubernetes.connect(of)) is None:
        return None
    name = of.node_name or settings.node
    asking = Asking(lambda: cluster.pods(node=name), lambda: not cluster.node(name).schedulable)
    return PrestopServer(desk, asking, lambda: on_node(of.prestop))


def _signals(cancel_all: Callable[[str], None]) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one cancels every action."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def handle() -> None:
        if stop.is_set():
            cancel_all("a second signal: the daemon is stopping now")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle)
    return stop


async def _beat_until(stop: asyncio.Event) -> None:
    """Answer systemd's watchdog from the loop that does the work, so that a stuck loop is noticed."""
    interval = ping_interval()
    while not stop.is_set():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), interval)
        notify("WATCHDOG=1")


def build(settings: Config, arrivals: Arrivals) -> Node:
    """The node's ports, one after the other. Sweeps: whoever calls it is `Alone`. Raises Refused for what a person has to mend."""
    children = Children()
    children.adopt_orphans()
    cgroup.remove_empty()
    with usable("state_dir", settings.state_dir):
        criu = Criu(settings.criu_path(), children, settings.state_dir / "criu-plugins")
        processes = ProcessWorkloads(Jobs(settings.state_dir / "jobs", children), criu, children)
        workloads = AllWorkloads(processes, _containers(settings, arrivals, criu, children))
        journal = Journal(settings.state_dir / "journal")
    criu.facts()  # too old or missing: refuse to start
    host = LinuxHost()
    with usable("arena.size", settings.arena.size):
        arena = Arena(settings.arena.size, at_once=max(2, host.load().cpus))
    return Node(
        config=settings,
        workloads=workloads,
        jobs=workloads,
        criu=criu,
        gpu=Nvidia(settings.gpu, settings.state_dir / "gpu", children),
        host=host,
        inventory=Nvml(settings.gpu.nvml),
        arena=arena,
        journal=journal,
        open_store=store_opener(settings),
        notary=Notary(settings.signing),
        keyring=Keyring(settings.encryption, children),
    )


def _containers(settings: Config, arrivals: Arrivals, criu: Criu, children: Children) -> Containers:
    """Where no container runtime listens now there are no pods: it may have been started later than this daemon."""
    of = settings.containers
    with usable("containers.cri", of.cri):
        cri = Cri(of.cri) if of.cri else None
    server = kubernetes.connect(settings.kubernetes)
    kubelet = Kubelet(server, settings.kubernetes.node_name or settings.node) if server is not None else None
    return Containers(cri, of.roots, of.runc, arrivals, criu, children, kubelet)


def insist_usable(settings: Config) -> None:
    """What a daemon would refuse of its configuration when it starts, without starting one."""
    store_opener(settings)("")
    Notary(settings.signing)
    Keyring(settings.encryption, Children())


def open_bus(settings: Config) -> NodeBus | None:
    if not settings.bus.url:
        return None
    from hibernode.drivers.nats import NatsNode  # noqa: PLC0415

    return NatsNode(settings.bus, settings.cluster, settings.node, record_ttl=3 * settings.limits.node_interval)


class _Place(NamedTuple):
    """Where a store is: what is compared and what is opened are the same words."""

    scheme: str
    bucket: str
    names: tuple[str, ...]  # of the path, one after the other

    def is_in(self, root: _Place) -> bool:
        return self[:2] == root[:2] and self.names[: len(root.names)] == root.names


_URL = re.compile(r"(?:(?P<file>file)://(?=/)|s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9.-]*))(?P<path>(?:/[^/?#%\\]*)*)")


def _place(url: str) -> _Place:
    """Refused("directory") for what is no store, and for anything in it that two readers could read as two places: dots, escapes,
    control characters (urllib drops some of them), white space at its ends."""
    found = _URL.fullmatch(url) if url.isprintable() and url == url.strip() else None
    names = tuple(name for name in found["path"].split("/") if name) if found else ()
    if found is None or {".", ".."} & set(names):
        raise Refused(
            "directory",
            f"not a store: {url[:200]!r}",
            prop="url",
            found=url[:200],
            wanted="file:///path or s3://bucket/prefix",
            hint="plain names between the slashes, none of them . or ..",
        )
    return _Place("file" if found["file"] else "s3", found["bucket"] or "", names)


def store_opener(settings: Config) -> Callable[[str], Store]:
    """By URL, "" being the configured one; Refused("directory") for one that no rule of the configuration allows."""
    urls = (settings.store.url, *settings.store.allowed)
    roots = [_place(url) for url in urls]

    @lru_cache(maxsize=64)
    def opened(place: _Place) -> Store:
        if place.scheme == "file":
            return LocalDir(Path("/", *place.names))
        from hibernode.drivers.s3 import S3  # noqa: PLC0415 - boto3 costs 40 MB: only who uses it pays

        return S3(place.bucket, "/".join(place.names), settings.store.s3)

    def allowed(url: str) -> Store:
        place = _place(url) if url else roots[0]
        if not any(place.is_in(root) for root in roots):
            raise Refused(
                "directory",
                f"the store {url!r} is not allowed on this node",
                prop="directory",
                found=url,
                wanted=" or under ".join(urls),
                hint="add it to `allowed` in [store]",
            )
        return opened(place)

    return allowed


def log_to_stderr(settings: Config) -> None:
    """One line per change of state: for people on a terminal, JSON otherwise. The standard library's loggers come along."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    on_terminal = sys.stderr.isatty() if settings.log.format == "auto" else settings.log.format == "console"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if on_terminal else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=[*shared, structlog.processors.format_exc_info])
    )
    logging.basicConfig(level=settings.log.level.upper(), handlers=[handler], force=True)
