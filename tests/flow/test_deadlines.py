"""Every phase has a deadline and a way out: a hang is injected into each call of each phase. On fakes; `tests/node/test_deadlines.py` has
the real ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hibernode import catalog
from hibernode.errors import DeadlineExceeded, StoreUnavailable
from hibernode.journal import Entry, Tree
from hibernode.model import Cancel, Outcome, Status
from hibernode.recovery import recover
from hibernode.transfer import format
from tests.fakes.machine import ROOT, memory
from tests.fakes.script import Script
from tests.flow.rig import DEADLINE, Background, Rig, checkpoint_command, new_id, until
from tests.flow.test_dispatch import KILL, crashed, eventually, for_nobody, node, running
from tests.flow.test_failures import caught, insist_on_checkpoint, insist_on_restore

pytestmark = pytest.mark.timeout(60)

LIMITS = {
    "preflight": "preflight",
    "dumping": "pause",
    "shipping": "transfer",
    "committing": "commit",
    "fetching": "transfer",
    "restoring": "restore",
    "probing": "preflight",
}
RUNS = memory(40)
SHORT = 0.03  # seconds; whoever is slower than that without a hang misses the same deadline
LONGER = 0.5  # where that would be missed: one call alone hangs there
# Of no phase: the journal's own disk, what is told, and what comes after `ready`.
NO_PHASE = ("journal.", "report", "workload.kill", "store.delete attempt")


@dataclass(frozen=True)
class Call:
    """The n-th of its name, not of all: threads take turns as it happens."""

    name: str
    n: int
    phase: str


class Phases(Script):
    """In which phase each call is made."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self._rig, self.found = rig, list[Call]()

    def step(self, name: str) -> None:
        super().step(name)
        if not name.startswith(NO_PHASE):
            self.found.append(Call(name, self.calls.count(name), self._rig.entry.record.phase))


class Hangs(Script):
    """A call hangs until its action is told to stop, and then is late, or gives up. A store hangs on until the workload runs."""

    def __init__(self, at: Call, rig: Rig, *, gives_up: bool) -> None:
        super().__init__()
        self._at, self._rig, self._gives_up = at, rig, gives_up

    def step(self, name: str) -> None:
        super().step(name)
        if (name, self.calls.count(name)) != (self._at.name, self._at.n):
            return
        self.failed = name
        rig = self._rig
        until(lambda: bool(rig.cancel.reason), f"a deadline for {name}")
        if name.startswith("store."):
            until(lambda: not rig.machine.stopped, f"a workload that runs while {name} hangs")
            if self._gives_up:
                raise StoreUnavailable(f"{name} gave up")


def calls_of(rig: Rig, act: Callable[[], object]) -> list[Call]:
    script = Phases(rig)
    rig.rescript(script)
    act()
    return script.found


def short(phase: str) -> dict[str, float]:
    """The limits under which a hang in `phase` is over soon; a stream's may begin in the one and be met in the other."""
    seconds = LONGER if phase == "probing" else SHORT
    return dict.fromkeys(("pause", "transfer") if phase in ("dumping", "shipping") else [LIMITS[phase]], seconds)


def insist_on_deadline(raised: BaseException | None, call: Call) -> None:
    where, phase = str(call), call.phase
    assert isinstance(raised, DeadlineExceeded), f"{where}: {raised!r}"
    assert raised.code == "deadline"
    found = str(raised.details["phase"])
    assert found == phase or {found, phase} == {"dumping", "shipping"}, where
    assert f"limits.{LIMITS[found]}" in raised.hint, where


@pytest.mark.parametrize(("kill", "gives_up"), [(False, True), (True, False)])
def test_a_checkpoint_hangs_at_every_step(tmp_path: Path, kill: bool, gives_up: bool) -> None:
    overrides = {"streams": 2, **({"criu_opts": KILL} if kill else {})}

    def rig_of(directory: Path, **limits: float) -> Rig:
        return Rig(directory, RUNS, limits=limits)

    rig = rig_of(tmp_path / "count")
    calls, hung = calls_of(rig, lambda: rig.checkpoint(**overrides)), set[str]()
    for n, call in enumerate(calls):
        rig, made = rig_of(tmp_path / str(n), **short(call.phase)), new_id()
        rig.rescript(Hangs(call, rig, gives_up=gives_up))
        raised = caught(lambda: rig.checkpoint(made, **overrides))  # noqa: B023
        if rig.script.failed:
            hung.add(call.phase)
            insist_on_deadline(raised, call)
        insist_on_checkpoint(rig, made, raised=raised, kill=kill)
    assert hung == {"preflight", "dumping", "shipping", "committing"}


@pytest.mark.parametrize("gives_up", [False, True])
def test_a_restore_hangs_at_every_step(tmp_path: Path, gives_up: bool) -> None:
    first = Rig(tmp_path / "first", RUNS)
    made = first.checkpoint(streams=2)

    def rig_of(directory: Path, **limits: float) -> Rig:
        rig = Rig(directory, RUNS, limits=limits)
        rig.store.objects, rig.store._modified = {**first.store.objects}, {**first.store._modified}
        rig.end_of_original()
        rig.node.config.work_dir.mkdir(parents=True)
        return rig

    rig = rig_of(tmp_path / "count")
    calls, hung = calls_of(rig, lambda: rig.restore(made)), set[str]()
    for n, call in enumerate(calls):
        rig = rig_of(tmp_path / str(n), **short(call.phase))
        rig.rescript(Hangs(call, rig, gives_up=gives_up))
        raised = caught(lambda: rig.restore(made))  # noqa: B023
        if rig.script.failed:
            hung.add(call.phase)
            insist_on_deadline(raised, call)
        insist_on_restore(rig, raised)
        marks = [key for key in rig.store.objects if "/uses/" in key]
        assert not marks or (gives_up and call.name.startswith("store.delete")), "it says for a day that it reads"
    assert hung == {"preflight", "fetching", "restoring", "probing"}


async def test_a_deadline_is_no_reason_to_try_again(tmp_path: Path) -> None:
    """Also where the store's own patience ends after ours, with an error that is."""

    class GivesUp(Script):
        def step(self, name: str) -> None:
            super().step(name)
            if name == "store.check":
                (action,) = desk.dispatcher._running.values()
                until(lambda: bool(action.cancel.reason), "the deadline")
                raise StoreUnavailable("no answer")

    rig = node(tmp_path, GivesUp(), preflight=LONGER, attempts=5)
    async with running(rig) as desk:
        last = await desk.end(await desk.send(checkpoint_command()))
        assert (last.code, last.retry, last.details["phase"]) == ("deadline", False, "preflight")
    assert rig.script.calls.count("store.check") == 1


# --- the point of no return -----------------------------------------------------------------------------------------------------


def test_a_cancel_counts_until_the_point_of_no_return() -> None:
    cancel, woken = Cancel(), list[str]()
    with cancel.waking(lambda: woken.append("woken")):
        cancel.close()
        cancel.set("too late")
    assert not woken
    assert not cancel.reason
    cancel.check()
    other = Cancel()
    other.set("in time", DeadlineExceeded("too long"))
    with pytest.raises(DeadlineExceeded):
        other.close()


# --- recovery -------------------------------------------------------------------------------------------------------------------


class HangingStore(Script):
    """It does not answer until `answers` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers = threading.Event(), threading.Event()

    def step(self, name: str) -> None:
        super().step(name)
        if name == "store.get manifest.json":
            self.asked.set()
            assert self.answers.wait(DEADLINE)


def recovered_while_it_hangs(rig: Rig, entry: Entry, script: HangingStore) -> Outcome:
    """What recovery makes of a commit with the workload held; the store answers when the workload runs again."""
    trees = (Tree(pid=ROOT, start_time=1000 + ROOT),)
    entry.update(phase="committing", status=Status.CHECKPOINT_CREATED, trees=trees, kill=True)
    rig.machine.stopped = True
    recovering: Background[Outcome] = Background(lambda: recover(rig.node, entry))
    until(lambda: not rig.machine.stopped, "a workload that goes on while the store hangs")
    script.answers.set()
    found = recovering.result()
    assert found is not None
    return found


def test_a_recovery_holds_nobody_longer_than_a_commit_may_take(tmp_path: Path) -> None:
    """The daemon died while it committed, the workload is held to be killed, and the store hangs."""
    rig = Rig(tmp_path, limits={"commit": SHORT})
    rig.rescript(script := HangingStore())
    entry = rig.node.journal.begin(checkpoint_command())
    found = recovered_while_it_hangs(rig, entry, script)
    assert found.code == "interrupted"
    assert rig.machine.alive


def test_a_recovery_kills_nobody_whom_it_has_let_go_on(tmp_path: Path) -> None:
    """As before, but the checkpoint turns out to be whole: it is `ready`, and what has run on meanwhile is not killed."""
    rig = Rig(tmp_path, limits={"commit": LONGER})
    manifest = catalog.read(rig.store, made := rig.checkpoint(), rig.node.notary)
    rig.rescript(script := HangingStore())
    entry = rig.node.journal.begin(checkpoint_command(made))
    mine = manifest.model_copy(update={"action_id": entry.action_id})
    rig.store.objects[catalog.manifest_key(made)] = format.encode_manifest(mine, rig.node.notary)
    found = recovered_while_it_hangs(rig, entry, script)
    assert found.status == Status.READY
    assert rig.machine.alive
    assert not entry.record.kill, "nor does the next daemon kill it"


async def test_a_store_that_hangs_keeps_no_other_workload_waiting(tmp_path: Path) -> None:
    rig, held, other = node(tmp_path), checkpoint_command(), for_nobody()
    crashed(rig, held, "committing", kill=True)
    crashed(rig, other, "dumping", trees=(Tree(pid=ROOT, start_time=1000 + ROOT),))
    rig.machine.stopped = True
    rig.rescript(script := HangingStore())
    async with asyncio.timeout(DEADLINE):
        starting = asyncio.ensure_future(_start_and_stop(rig))
        await eventually(script.asked.is_set, "the question to the store")
        await eventually(lambda: not rig.machine.stopped, "a workload that goes on meanwhile")
        script.answers.set()
        await starting


async def _start_and_stop(rig: Rig) -> None:
    async with running(rig):
        pass
