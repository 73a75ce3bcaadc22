"""A node of fakes, and what must be true of it after an action, however it ended."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from hibernode import catalog
from hibernode.checkpoint import checkpoint
from hibernode.children import Children
from hibernode.config import Config
from hibernode.drivers.keyring import Keyring
from hibernode.drivers.notary import Notary
from hibernode.errors import DumpFailed, HibernodeError, Internal, NotFound, RestoreFailed, StoreUnavailable
from hibernode.journal import Entry, Journal, Record, mark_of
from hibernode.model import Cancel, CheckpointCommand, Meter, Overrides, RestoreCommand, Status, Target
from hibernode.node import Attempt, Node
from hibernode.restore import restore
from hibernode.transfer.arena import Arena
from tests.fakes.criu import FakeCriu
from tests.fakes.gpu import FakeGpu
from tests.fakes.machine import FACTS, FakeHost, FakeInventory, FakeWorkloads, Machine, Run
from tests.fakes.script import Script
from tests.fakes.store import MemoryStore

T = TypeVar("T")

ARENA = Arena(16 << 20)  # one for all: the smallest that is allowed, four chunks
DEADLINE = 20.0  # seconds, for whatever is waited for


class ScriptedEntry(Entry):
    """A page of the journal whose disk can fail."""

    def __init__(self, path: Path, record: Record, script: Script) -> None:
        super().__init__(path, record)
        self._script = script

    def update(self, **changes: object) -> None:
        self._script.step(f"journal.update {changes.get('phase', '')}".rstrip())
        super().update(**changes)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for it; fail if it does not come."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE} s"
        time.sleep(0.001)


class Background(Generic[T]):
    """Something that runs beside the test; `result` waits for it, and raises what it raised."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._found: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._work()
        except BaseException as e:
            self._error = e

    def result(self) -> T | None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error
        return self._found


def new_id() -> str:
    return str(uuid.uuid4())


class Rig:
    """One node. `script` counts and breaks every call on its outside."""

    def __init__(self, directory: Path, runs: list[Run] | None = None, script: Script | None = None, **settings: object) -> None:
        self.script = script or Script()
        self.machine = Machine(runs or [])
        self.store = MemoryStore(self.script)
        self.criu = FakeCriu(self.machine, self.script)
        workloads = FakeWorkloads(self.machine, self.criu, self.script)
        self.directory = directory
        self.statuses: list[Status] = []
        self.cancel = Cancel()
        config = Config.model_validate({"work_dir": directory / "work", "state_dir": directory / "state", **settings})
        self.node = Node(
            config=config,
            workloads=workloads,
            jobs=workloads,
            criu=self.criu,
            gpu=FakeGpu(self.machine, self.script),
            host=FakeHost(self.machine, self.script),
            inventory=FakeInventory(self.machine),
            arena=ARENA,
            journal=Journal(directory / "state" / "journal"),
            open_store=lambda url: self.store,
            notary=Notary(config.signing),
            keyring=Keyring(config.encryption, Children()),
        )

    def rescript(self, script: Script) -> None:
        """From now on everything counts there."""
        self.script = script
        workloads = FakeWorkloads(self.machine, self.criu, script)
        self.store._script = self.criu._script = script
        self.node = Node(
            **{
                **{
                    name: getattr(self.node, name)
                    for name in ("config", "criu", "inventory", "arena", "journal", "open_store", "notary", "keyring")
                },
                "workloads": workloads,
                "jobs": workloads,
                "gpu": FakeGpu(self.machine, script),
                "host": FakeHost(self.machine, script),
            }
        )

    # --- actions ------------------------------------------------------------------------------------------------------------

    def checkpoint(self, checkpoint_id: str = "", **overrides: object) -> str:
        """The page `checkpoint`, at once. Returns the checkpoint id."""
        command = checkpoint_command(checkpoint_id, **overrides)
        checkpoint(self.node, command, self._attempt(command))
        return command.checkpoint_id

    def restore(self, checkpoint_id: str, **overrides: object) -> None:
        command = RestoreCommand(action_id=new_id(), checkpoint_id=checkpoint_id, overrides=Overrides.model_validate(overrides))
        try:
            restore(self.node, command, self._attempt(command))
        finally:
            mark_of(self.node.config.work_dir, command.action_id).unlink(
                missing_ok=True
            )  # as the dispatcher does with an outcome

    def _attempt(self, command: CheckpointCommand | RestoreCommand) -> Attempt:
        record = self.node.journal.begin(command).record
        entry = ScriptedEntry(self.directory / "state" / f"{command.action_id}.json", record, self.script)
        self.statuses.clear()
        self.cancel = Cancel()
        self.entry = entry
        return Attempt(entry, Meter(), self.cancel, self._report)

    def _report(self, status: Status, pod_spec: str = "") -> None:
        self.script.step(f"report {status}")
        self.statuses.append(status)

    def end_of_original(self) -> None:
        """The original tree is gone, as it is where a checkpoint is restored."""
        self.machine.alive = self.machine.stopped = False

    # --- what must be true ----------------------------------------------------------------------------------------------------

    def leftovers(self, checkpoint_id: str) -> list[str]:
        """What an action must not leave behind, whatever happened."""
        found = self.at_work()
        keys = [key for key in self.store.objects if key.startswith(checkpoint_id)]
        if (
            keys
            and Status.READY not in self.statuses
            and not (self.script.failed == "report ready" and self.whole(checkpoint_id))
        ):
            found += [f"object {key} without `ready`" for key in keys]  # whole, and nobody could be told: it is kept
        if Status.READY in self.statuses and not self.whole(checkpoint_id):
            found.append("`ready`, and no whole checkpoint")
        return found

    def at_work(self) -> list[str]:
        """What an action has only while it runs, beside what it writes into the store."""
        work = self.node.config.work_dir
        found = [f"open upload {upload.key}" for upload in self.store.uploads]
        found += [f"work directory {name}" for name in os.listdir(work)] if work.exists() else []
        found += [f"{ARENA.used_bytes} bytes of the arena"] if ARENA.used_bytes else []
        found += [f"GPU state {self.machine.gpu}"] if self.machine.gpu == "CHECKPOINTED" and self.machine.alive else []
        found += [f"{self.machine.prepared} prepared places"] if self.machine.prepared else []
        return found + [f"claim {key}" for key in self.node.claims._taken]

    def whole(self, checkpoint_id: str) -> bool:
        """Is the checkpoint there, with every object it names?"""
        failing, self.store._script = self.store._script, Script()
        try:
            catalog.check_sizes(self.store, catalog.read(self.store, checkpoint_id, self.node.notary))
        except NotFound:
            return False
        finally:
            self.store._script = failing
        return True


def checkpoint_command(checkpoint_id: str = "", **overrides: object) -> CheckpointCommand:
    return CheckpointCommand(
        action_id=new_id(),
        checkpoint_id=checkpoint_id or new_id(),
        target=Target(pod_name=FACTS.name),
        overrides=Overrides.model_validate(overrides),
    )


@contextlib.contextmanager
def nothing_outlives() -> Iterator[None]:
    """No thread and no descriptor more than before."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    assert not set(threading.enumerate()) - threads, "threads are left"
    assert not (left := _descriptors() - descriptors), f"descriptors are left: {left}"


def _descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return {each for each in found if "/proc/" not in each}


def fitting_error(step: str) -> HibernodeError:
    """What the outside would raise there."""
    if step.startswith("criu.dump"):
        return DumpFailed(f"scripted failure of {step}")
    if step.startswith("criu.restore"):
        return RestoreFailed(f"scripted failure of {step}")
    if step.startswith(("workload", "prepared")):
        return NotFound(f"scripted failure of {step}")
    return StoreUnavailable(f"scripted failure of {step}")


def defect(step: str) -> HibernodeError:
    return Internal(f"scripted failure of {step}")
