"""The numbers people put on a dashboard: right, bounded, and in a form Prometheus reads."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hibernode.errors import Refused
from hibernode.metrics import Metrics, Readings
from hibernode.model import Event, GpuInventory, PhaseCost, Profile, Progress, Status
from tests.fakes.machine import GPUS

A1 = "11111111-1111-4111-8111-111111111111"
A2 = "22222222-2222-4222-8222-222222222222"


def event(action: str = A1, status: Status = Status.PROCESSING, **more: object) -> Event:
    base: dict[str, object] = {"action_id": action, "seq": 1, "type": "checkpoint", "status": status}
    return Event.model_validate(base | {"checkpoint_id": A2, "node": "n", "time": 1.0} | more)


def progress(done: int, stored: int, action: str = A1) -> Progress:
    return Progress(action_id=action, phase="dumping", bytes_done=done, bytes_total=100, stored_bytes=stored, seconds=1.0)


PROFILE = Profile(
    phases={"dumping": PhaseCost(seconds=0.4, bytes=10), "shipping": PhaseCost(seconds=2.0)},
    unaccounted=0.1,
    pause_ns=412_000_000,
    gpu_ns=300_000_000,
    total_duration=2_500_000_000,
    raw_bytes=1000,
    zero_bytes=300,
    stored_bytes=400,
)


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    made = Metrics("1.2.3")
    yield made
    made.stop()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_terminal_event_is_counted_with_its_profile(metrics: Metrics) -> None:
    metrics.observe_event(event())
    assert value(metrics, "hibernode_actions_total", type="checkpoint", status="ready", code="ok") is None
    metrics.observe_event(event(status=Status.READY, profile=PROFILE))
    assert value(metrics, "hibernode_actions_total", type="checkpoint", status="ready", code="ok") == 1
    assert value(metrics, "hibernode_pause_seconds_sum") == pytest.approx(0.412)
    assert value(metrics, "hibernode_gpu_pause_seconds_sum", type="checkpoint") == pytest.approx(0.3)
    assert value(metrics, "hibernode_pause_seconds_bucket", le="0.25") == 0
    assert value(metrics, "hibernode_pause_seconds_bucket", le="0.5") == 1
    assert value(metrics, "hibernode_phase_seconds_sum", type="checkpoint", phase="shipping") == 2.0
    assert value(metrics, "hibernode_phase_seconds_sum", type="checkpoint", phase="unaccounted") == pytest.approx(0.1)
    assert value(metrics, "hibernode_action_duration_seconds_sum", type="checkpoint") == 2.5
    assert value(metrics, "hibernode_raw_bytes_total", type="checkpoint") == 1000
    assert value(metrics, "hibernode_stored_bytes_total", type="checkpoint") == 400
    assert value(metrics, "hibernode_zero_bytes_total") == 300
    assert value(metrics, "hibernode_build_info", version="1.2.3") == 1


def test_bytes_run_with_the_action_and_are_counted_once(metrics: Metrics) -> None:
    metrics.observe_progress(progress(500, 200))  # nobody announced it: ignored
    metrics.observe_event(event())
    metrics.observe_progress(progress(500, 200))
    assert value(metrics, "hibernode_raw_bytes_total", type="checkpoint") == 500
    metrics.observe_progress(progress(100, 50))  # a second attempt starts from nothing
    assert value(metrics, "hibernode_raw_bytes_total", type="checkpoint") == 600
    metrics.observe_event(event(status=Status.READY, profile=PROFILE))
    assert value(metrics, "hibernode_raw_bytes_total", type="checkpoint") == 500 + 1000
    metrics.observe_progress(progress(900, 900))  # late: the action has ended
    assert value(metrics, "hibernode_raw_bytes_total", type="checkpoint") == 1500


def test_an_action_that_froze_nothing_has_no_pause(metrics: Metrics) -> None:
    failed = event(status=Status.ERROR, code="not_found", profile=Profile())
    metrics.observe_event(failed)
    assert value(metrics, "hibernode_actions_total", type="checkpoint", status="error", code="not_found") == 1
    assert value(metrics, "hibernode_pause_seconds_count") == 0


def test_codes_cannot_grow_without_bound(metrics: Metrics) -> None:
    metrics.observe_event(event(status=Status.ERROR, code="No such file /proc/1234"))
    for n in range(200):
        metrics.observe_event(event(status=Status.ERROR, code=f"reason_{n}"))
    families = {f.name: f for f in metrics.registry.collect()}
    codes = {s.labels["code"] for s in families["hibernode_actions"].samples if s.name.endswith("_total")}
    assert len(codes) == 65
    assert "other" in codes


def test_readings_are_taken_when_somebody_looks(metrics: Metrics) -> None:
    depth = {"commands": 3.0}
    metrics.read_from(
        Readings(
            actions_running=lambda: 2,
            arena_used=lambda: 5 << 20,
            arena_total=lambda: 512 << 20,
            outbox=lambda: 7,
            bus_connected=lambda: True,
            queues={"commands": lambda: depth["commands"]},
        )
    )
    assert value(metrics, "hibernode_queue_depth", queue="commands") == 3
    depth["commands"] = 0
    assert value(metrics, "hibernode_queue_depth", queue="commands") == 0
    assert value(metrics, "hibernode_actions_running") == 2
    assert value(metrics, "hibernode_arena_used_bytes") == 5 << 20
    assert value(metrics, "hibernode_arena_bytes") == 512 << 20
    assert value(metrics, "hibernode_outbox_depth") == 7
    assert value(metrics, "hibernode_bus_connected") == 1


def test_the_page_is_what_prometheus_reads_and_stops_cleanly(metrics: Metrics) -> None:
    metrics.observe_event(event(status=Status.READY, profile=PROFILE))
    port = metrics.serve("127.0.0.1:0")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        names = {family.name for family in text_string_to_metric_families(answer.read().decode())}
    assert names >= {
        "hibernode_actions",
        "hibernode_pause_seconds",
        "hibernode_phase_seconds",
        "hibernode_raw_bytes",
        "hibernode_stored_bytes",
        "hibernode_zero_bytes",
        "hibernode_action_duration_seconds",
        "hibernode_build_info",
        "process_resident_memory_bytes",
    }
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
        assert answer.status == 200
    metrics.stop()
    metrics.stop()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of this test may still be in TIME_WAIT
        free.bind(("127.0.0.1", port))


def test_a_port_in_use_is_refused_with_a_hint(metrics: Metrics) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Refused, match="already in use") as caught:
            metrics.serve(listen)
    assert caught.value.code == "metrics_listen"
    assert caught.value.details["found"] == listen
    assert caught.value.hint


@pytest.mark.parametrize("listen", ["9465", "localhost:", "localhost:http", "localhost:70000"])
def test_an_address_that_is_none_is_refused(metrics: Metrics, listen: str) -> None:
    with pytest.raises(Refused, match="not an address"):
        metrics.serve(listen)


def sample(metrics: Metrics, name: str, labels: dict[str, str] | None = None) -> float | None:
    """As `value`, for labels that include `name`."""
    return metrics.registry.get_sample_value(name, labels)


def test_gpus_are_read_when_somebody_looks(metrics: Metrics) -> None:
    machine: list[GpuInventory] = []
    readings = Readings(*[lambda: 0.0] * 4, bus_connected=lambda: True, gpus=lambda: machine[-1])
    metrics.read_from(readings)  # asks no driver
    machine.append(GPUS)
    one, other = ({"gpu": str(gpu.index), "uuid": gpu.uuid, "name": gpu.name} for gpu in GPUS.gpus)
    assert sample(metrics, "hibernode_gpu_inventory", {"state": "ok"}) == 1
    assert sample(metrics, "hibernode_gpus") == 2
    assert sample(metrics, "hibernode_gpu_memory_bytes", one) == 80 << 30
    assert [sample(metrics, "hibernode_gpu_memory_used_bytes", labels) for labels in (one, other)] == [0, 1 << 30]
    assert [sample(metrics, "hibernode_gpu_processes", labels) for labels in (one, other)] == [0, 1]
    assert sample(metrics, "hibernode_gpu_rows_pending", one) == 0
    assert sample(metrics, "hibernode_gpu_ecc_uncorrected_errors", one) == 0


def test_what_is_unknown_of_gpus_has_no_sample(metrics: Metrics) -> None:
    one, other = GPUS.gpus
    machine = [GPUS.model_copy(update={"gpus": [one.model_copy(update={"processes": None}), other]})]
    metrics.read_from(Readings(*[lambda: 0.0] * 4, bus_connected=lambda: True, gpus=lambda: machine[-1]))
    labels = {"gpu": "0", "uuid": one.uuid, "name": one.name}
    assert sample(metrics, "hibernode_gpu_processes", labels) is None
    assert sample(metrics, "hibernode_gpu_memory_bytes", labels) == 80 << 30
    for state in ("silent", "mismatch", "of a state that is no word"):
        machine.append(GPUS.model_copy(update={"state": state, "reason": "why"}))
        assert sample(metrics, "hibernode_gpu_inventory", {"state": state if " " not in state else "other"}) == 1
        assert sample(metrics, "hibernode_gpus") is None
        assert sample(metrics, "hibernode_gpu_memory_bytes", labels) is None
    machine.append(GpuInventory(state="absent", reason="no NVIDIA driver"))
    assert (sample(metrics, "hibernode_gpus"), sample(metrics, "hibernode_gpu_inventory", {"state": "absent"})) == (0, 1)
