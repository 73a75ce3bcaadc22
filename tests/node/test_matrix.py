"""The crash matrix itself: a handful of its cases with the real daemon and CRIU, and the proof that it sees what it is there to see."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import cast

import pytest

from hibernode.model import Event
from tests.daemon import ROOT
from tests.matrix import cases, checks, table
from tests.matrix.bench import Subject
from tests.matrix.cases import Case, parse
from tests.matrix.checks import Census
from tests.matrix.programs import Beat

pytestmark = pytest.mark.node

PLAYED = {
    "keep/process/die@journal.dumping.after#1": "interrupted",
    "kill/job/die@journal.killing.before#1": "ok",
    "kill/process/raise:store_unavailable@store.put.manifest.before#1": "store_unavailable",
    "restore/process/die@criu.restore.after#1": "interrupted",
    "restore/job/cancel@journal.restoring.before#1": "cancelled",
    "keep/process/raise:enospc@journal.preflight.before#1": "no_room",
    "kill/process/raise:enospc*4@event.ready.before#1": "ok",
    "kill/job/raise:enospc@journal.killing.before#1": "ok",
}
ON_A_GPU = {
    "keep/gpu/helper_killed@driver.unlock#2": "ok",
    "keep/gpu/helper_and_daemon_killed@driver.checkpoint#1": "interrupted",
    "kill/gpu/driver_says:2@driver.checkpoint#3": "gpu_failed",
    "keep/gpu/child_dies@tree.suspend.after#1": "ok",
    "restore/gpu/daemon_killed@driver.restore#1": "interrupted",
}
SURVEY = {
    (direction, subject): {"journal.dumping.before": 1, "store.write.stream.before": 9, "criu.dump.after": 1}
    for direction in cases.DIRECTIONS
    for subject in ("process", "job", "gpu", "chain")
}


@pytest.mark.parametrize("played", [PLAYED, ON_A_GPU], ids=["memory", "gpu"])
def test_a_few_cases_leave_nothing_frozen_half_done_or_behind(tmp_path: Path, played: dict[str, str]) -> None:
    """As anybody runs it: a process of its own, in rooms of its own."""
    words = [word for case in played for word in ("--case", case)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "daemon"), str(ROOT)])}
    argv = [sys.executable, "-m", "tests.matrix", "--benches", "1", "--output", str(tmp_path / "result.json"), *words]
    ran = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = table.read(tmp_path / "result.json")
    assert [row["case"] for row in result["rows"] if not row["fired"]] == []
    assert {row["case"]: row["code"] for row in result["rows"]} == played
    assert result["reader"]["bad"] == 0


@pytest.mark.parametrize("case", sorted({case.fault: case for case in cases.full(SURVEY, 1)}.values(), key=lambda case: case.id))
def test_the_name_of_a_case_is_enough_to_play_it_again(case: Case) -> None:
    assert parse(case.id) == case


def test_a_quick_run_has_every_fault_and_the_seed_decides_its_order() -> None:
    chosen = cases.quick(SURVEY, 1, 200)
    assert len(chosen) == len(set(chosen)) == 200
    assert {case.fault for case in chosen} == {case.fault for case in cases.full(SURVEY, 1)}
    assert chosen == cases.quick(SURVEY, 1, 200)
    assert chosen != cases.quick(SURVEY, 2, 200)


def test_what_names_no_case_is_refused() -> None:
    for text in ("", "keep/process", "keep/pod/die@x#1", "hold/job/die@x#1", "keep/job/die@x"):
        with pytest.raises(ValueError, match="no case"):
            parse(text)


# --- it sees what it is there to see ------------------------------------------------------------------------------------------


def told(*statuses: str) -> list[Event]:
    """Events of one action with these statuses."""
    common = {"action_id": str(uuid.UUID(int=1)), "type": "checkpoint", "checkpoint_id": "", "node": "", "time": 0.0}
    return [
        Event.model_validate({**common, "seq": seq, "status": status}, strict=False) for seq, status in enumerate(statuses, 1)
    ]


@pytest.mark.parametrize(
    ("statuses", "counters"),
    [
        (("processing", "checkpoint_created", "ready"), []),
        (("processing", "error", "error"), ["duplicate_terminals", "illegal_statuses"]),
        (("processing", "ready", "error"), ["duplicate_terminals", "illegal_statuses"]),
        (("processing", "checkpoint_created", "processing", "ready"), ["illegal_statuses"]),
    ],
)
def test_statuses_that_go_back_or_end_twice_are_found(statuses: tuple[str, ...], counters: list[str]) -> None:
    assert [finding.counter for finding in checks.statuses(told(*statuses))] == counters


STRANGERS = {
    "another process": Beat("other", 20, 0, 20, 7),
    "counts backwards": Beat("token", 9, 0, 20, 7),
    "its memory has changed": Beat("token", 20, 1, 20, 7),
    "another pid": Beat("token", 20, 0, 20, 8),
}


@pytest.mark.parametrize("now", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_workload_that_is_not_the_old_one_is_found(now: Beat) -> None:
    before = Beat("token", 10, 0, 10, 7)
    assert checks.same((before,), (Beat("token", 20, 0, 20, 7),)) == []
    assert [finding.counter for finding in checks.same((before,), (now,))] == ["lost_workloads"]


@pytest.mark.parametrize("seen", [[], ["7 is LOCKED"]])
def test_gpu_state_that_nobody_gives_back_is_found(seen: list[str]) -> None:
    class Suspended:
        def suspended(self) -> list[str]:
            return seen

    assert [finding.counter for finding in checks.on_gpu(cast(Subject, Suspended()), 0.0)] == ["left_suspended"] * len(seen)


def test_what_a_daemon_has_more_than_before_is_found() -> None:
    before = Census.of(["pipe", "pipe"], ["MainThread"], 30)
    assert Census.of(["pipe"], ["MainThread"], 30).beyond(before) == []
    more = Census.of(["pipe", "pipe", "pipe", "/some/file"], ["MainThread", "main collect"], 31)
    assert more.beyond(before) == ["1 x pipe", "1 x /some/file", "thread main collect", "1 mounts"]


def test_a_result_is_good_only_if_every_counter_is_0() -> None:
    row = {"case": "keep/job/die@x#1", "fired": True, "status": "error", "code": "interrupted", "findings": []}
    rest = {"killed_by_criu": False, "restored": False, "restarts": 1, "increment": False}
    assert table.good(table.summary([{**row, **rest}], []))
    for counter in (*checks.COUNTERS, *checks.MORE):
        finding = {"counter": counter, "text": "seen"}
        assert not table.good(table.summary([{**row, **rest, "findings": [finding]}], []))
        assert not table.good(table.summary([{**row, **rest}], [finding]))
    assert not table.good(table.summary([{**row, **rest}], [], reader={"bad": 1}))
    assert not table.good(table.summary([{**row, **rest, "fired": False}], []))
