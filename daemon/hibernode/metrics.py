"""What Prometheus sees: how events become counters and histograms, and the page that shows them.

Label values are bounded: type and status come from closed sets, codes and phases from our own source, and as that is a
habit and no law, each of these two labels takes `_KINDS` different values and files the rest under "other".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from hibernode.errors import Refused
from hibernode.model import Event, Gpu, GpuInventory, Profile, Progress

PAUSE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
PHASE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 1800)
ACTION_BUCKETS = (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14400)

_KINDS = 64
_WORD = re.compile(r"^[a-z][a-z0-9_]{0,47}$")

Read = Callable[[], float]  # called by the thread that serves a scrape: must neither block nor raise


@dataclass(frozen=True)
class Readings:
    """What is read at the moment somebody looks, instead of being counted."""

    actions_running: Read
    arena_used: Read  # bytes
    arena_total: Read  # bytes
    outbox: Read  # events not yet published
    bus_connected: Callable[[], bool]
    queues: Mapping[str, Read] = field(default_factory=dict)
    gpus: Callable[[], GpuInventory] | None = None  # ports.Inventory.gpus: may block for a moment


@dataclass
class _Counted:
    """What of a running action is in the byte counters already."""

    type: str
    raw: int = 0
    stored: int = 0


class Metrics:
    """One registry of its own. `observe_*` are called by one thread, the event loop's; scrapes may come at any time."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._running: dict[str, _Counted] = {}  # action id -> counted so far; an action leaves with its terminal event
        self._codes = _Words()
        self._phases = _Words()
        self._server: tuple[WSGIServer, Thread] | None = None
        self._count_actions()
        self._count_bytes()
        build = Gauge("hibernode_build_info", "Which version runs here", ["version"], registry=self.registry)
        build.labels(version).set(1)

    def _count_actions(self) -> None:
        r = self.registry
        self._actions = Counter("hibernode_actions", "Actions that ended", ["type", "status", "code"], registry=r)
        self._pause = Histogram(
            "hibernode_pause_seconds",
            "How long a workload was frozen for a checkpoint",
            buckets=PAUSE_BUCKETS,
            registry=r,
        )
        self._gpu_pause = Histogram(
            "hibernode_gpu_pause_seconds",
            "Of a pause, or of a restore: how long GPU state took to save and to bring back",
            ["type"],
            buckets=PAUSE_BUCKETS,
            registry=r,
        )
        self._phase = Histogram(
            "hibernode_phase_seconds",
            "Time per phase of an action",
            ["type", "phase"],
            buckets=PHASE_BUCKETS,
            registry=r,
        )
        self._lazy = Histogram(
            "hibernode_lazy_running_seconds",
            "Of a lazy restore: from the command until the tree ran, before its pages were there",
            buckets=PHASE_BUCKETS,
            registry=r,
        )
        self._duration = Histogram(
            "hibernode_action_duration_seconds",
            "From the command to the terminal event",
            ["type"],
            buckets=ACTION_BUCKETS,
            registry=r,
        )

    def _count_bytes(self) -> None:
        r = self.registry
        self._raw = Counter("hibernode_raw_bytes", "Memory pages moved, zero pages included", ["type"], registry=r)
        self._stored = Counter("hibernode_stored_bytes", "What these take in the store", ["type"], registry=r)
        self._zero = Counter("hibernode_zero_bytes", "Pages of zeros, which are not stored", registry=r)

    def read_from(self, readings: Readings) -> None:
        """From now on show these too. Once per `Metrics`."""
        r = self.registry
        for name, help_text, read in (
            ("hibernode_actions_running", "Actions at work now", readings.actions_running),
            ("hibernode_arena_used_bytes", "Arena memory that holds pages now", readings.arena_used),
            ("hibernode_arena_bytes", "Size of the arena", readings.arena_total),
            ("hibernode_outbox_depth", "Events on disk that the bus has not confirmed", readings.outbox),
            ("hibernode_bus_connected", "1 while the event stream is reached", readings.bus_connected),
        ):
            Gauge(name, help_text, registry=r).set_function(read)
        depth = Gauge("hibernode_queue_depth", "Items that wait", ["queue"], registry=r)
        for queue, read in readings.queues.items():
            depth.labels(queue).set_function(read)
        if readings.gpus is not None:
            r.register(_Gpus(readings.gpus))

    def observe_event(self, event: Event) -> None:
        """Count one event; once for each, or the counts are wrong."""
        counted = self._running.setdefault(event.action_id, _Counted(event.type))
        if not event.status.terminal:
            return
        del self._running[event.action_id]
        self._actions.labels(event.type, event.status.value, self._codes.bounded(event.code or "ok")).inc()
        if event.profile is not None:
            self._observe_profile(event.type, event.profile, counted)

    def _observe_profile(self, type_: str, profile: Profile, counted: _Counted) -> None:
        self._duration.labels(type_).observe(profile.total_duration / 1e9)
        if profile.pause_ns:
            self._pause.observe(profile.pause_ns / 1e9)
        if profile.gpu_ns:
            self._gpu_pause.labels(type_).observe(profile.gpu_ns / 1e9)
        if "filling" in profile.phases:
            self._lazy.observe(sum(cost.seconds for phase, cost in profile.phases.items() if phase not in ("filling", "probing")))
        for phase, cost in profile.phases.items():
            self._phase.labels(type_, self._phases.bounded(phase)).observe(cost.seconds)
        self._phase.labels(type_, "unaccounted").observe(profile.unaccounted)
        self._zero.inc(profile.zero_bytes)
        self._advance(counted, profile.raw_bytes, profile.stored_bytes)

    def observe_progress(self, progress: Progress) -> None:
        """Let the byte counters run with the action. Ignored if the action has ended or was never announced."""
        counted = self._running.get(progress.action_id)
        if counted is not None:
            self._advance(counted, progress.bytes_done, progress.stored_bytes)

    def _advance(self, counted: _Counted, raw: int, stored: int) -> None:
        # A second attempt of an action counts its bytes from 0 again; a counter never goes back.
        self._raw.labels(counted.type).inc(raw - counted.raw if raw >= counted.raw else raw)
        self._stored.labels(counted.type).inc(stored - counted.stored if stored >= counted.stored else stored)
        counted.raw, counted.stored = raw, stored

    def serve(self, listen: str) -> int:
        """Show the page on `host:port` until `stop`, on every path: `/healthz` too may ask whether the process lives.
        Returns the port that was taken (0 lets the system choose). Raises Refused("metrics_listen")."""
        host, port = _address(listen)
        try:
            self._server = start_http_server(port, host, registry=self.registry)
        except OSError as e:
            raise Refused(
                "metrics_listen",
                f"cannot listen for metrics on {listen}: {(e.strerror or str(e)).lower()}",
                prop="metrics.listen",
                found=listen,
                wanted="an address that is free",
                hint='choose another `listen` in [metrics], or "" for no metrics',
            ) from e
        return self._server[0].server_port

    def stop(self) -> None:
        """Close the page; the port is free when this returns. Blocks up to half a second; harmless when repeated."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None


_OF_A_GPU: tuple[tuple[str, str, Callable[[Gpu], float | None]], ...] = (
    ("hibernode_gpu_memory_bytes", "Memory of this GPU", lambda gpu: gpu.memory_total),
    ("hibernode_gpu_memory_used_bytes", "Of it, what is used", lambda gpu: gpu.memory_used),
    ("hibernode_gpu_processes", "Processes with a CUDA context there, as NVML lists them", lambda gpu: gpu.processes),
    (
        "hibernode_gpu_ecc_uncorrected_errors",
        "Uncorrected memory errors since the driver was loaded",
        lambda gpu: gpu.ecc_uncorrected,
    ),
    ("hibernode_gpu_rows_pending", "1 while rows of its memory wait to be remapped by a reset", lambda gpu: gpu.rows_pending),
)


class _Gpus(Collector):
    """The GPUs as they are when somebody looks. What is unknown has no sample: 0 would be a lie."""

    def __init__(self, read: Callable[[], GpuInventory]) -> None:
        self._read = read
        self._states = _Words()

    def describe(self) -> list[GaugeMetricFamily]:
        """Without this the registry would ask the driver for the names."""
        return self._families()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        found = self._read()
        state, count, *of_a_gpu = self._families()
        state.add_metric([self._states.bounded(found.state)], 1)
        if found.known:
            count.add_metric([], len(found.gpus))
            for family, (_, _, read) in zip(of_a_gpu, _OF_A_GPU, strict=True):
                for gpu in found.gpus:
                    if (value := read(gpu)) is not None:
                        family.add_metric([str(gpu.index), gpu.uuid, gpu.name], value)
        return iter([state, count, *of_a_gpu])

    def _families(self) -> list[GaugeMetricFamily]:
        state = GaugeMetricFamily(
            "hibernode_gpu_inventory", "1, with how the GPUs can be asked: ok, absent, or what is wrong", labels=["state"]
        )
        count = GaugeMetricFamily("hibernode_gpus", "GPUs of this machine, where that is known", labels=[])
        return [state, count, *(GaugeMetricFamily(name, about, labels=["gpu", "uuid", "name"]) for name, about, _ in _OF_A_GPU)]


class _Words:
    """Lets through the first `_KINDS` different words; anything else is "other"."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def bounded(self, word: str) -> str:
        if word not in self._seen:
            if len(self._seen) >= _KINDS or not _WORD.match(word):
                return "other"
            self._seen.add(word)
        return word


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise Refused(
            "metrics_listen",
            f"not an address to listen on: {listen}",
            prop="metrics.listen",
            found=listen,
            wanted="host:port, such as 127.0.0.1:9465 or [::1]:9465",
        )
    return host.strip("[]") or "0.0.0.0", int(port)  # ":9465" asks for all addresses
