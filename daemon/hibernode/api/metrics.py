"""What Prometheus sees of the control plane. Label values are from our own source: operations, methods, statuses, codes of nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds


class Metrics:
    """One registry of its own; one loop."""

    def __init__(self, version: str, connected: Callable[[], bool]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Histogram(
            "hibernode_api_request_seconds",
            "Time to answer",
            ["method", "operation", "status"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._events = Counter("hibernode_api_events", "Events kept", ["type", "status"], registry=registry)
        Gauge("hibernode_api_bus_connected", "1 while the event stream is reached", registry=registry).set_function(connected)
        Gauge("hibernode_api_build_info", "Which version runs here", ["version"], registry=registry).labels(version).set(1)

    def request(self, method: str, operation: str, status: int, seconds: float) -> None:
        known = method if method in ("GET", "POST", "DELETE") else "other"
        self._requests.labels(known, operation, str(status)).observe(seconds)

    def events(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Kept, by type and status."""
        for (type_, status), count in counts.items():
            self._events.labels(type_, status).inc(count)

    def page(self) -> bytes:
        return generate_latest(self.registry)
