"""The eight faults of a broker, each by its name: a real nats-server behind a proxy that cuts, a real daemon, real CRIU.

Whatever the broker does, of every action the stream has each status once and in order, and exactly one terminal event, which is the
journal's; the workload is the old process with its data, frozen no longer than the dump took; no command is left, nothing is at work.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hibernode.drivers.nats import COMMANDS, EVENTS, NODES
from hibernode.model import CancelCommand, CheckpointCommand, Event, Overrides, RestoreCommand, Target
from tests import keeper
from tests.daemon import Daemon, failed, pid_target, ready
from tests.fakes.broker_faults import BrokerProxy
from tests.keeper import wait_until
from tests.matrix.bus import CLUSTER, Bus
from tests.node.workload import LIMIT, Program, Untouched, goes_on, python

pytestmark = pytest.mark.node

NODE = "test-node"
ACK_WAIT = 1.0  # seconds until the broker gives a command out again
SETTLE = 40.0  # seconds for what takes two, on a machine that does something else as well
NOBODY = 4194300  # a pid that is none
KILL = json.dumps({"leave_running": False})
PROCESSING, CREATED, READY = (f'"status":"{status}"'.encode() for status in ("processing", "checkpoint_created", "ready"))
ACK = b"+ACK"

Command = CheckpointCommand | RestoreCommand
C = TypeVar("C", CheckpointCommand, RestoreCommand, CancelCommand)


class Bench:
    """A daemon, its broker, and the way between them."""

    def __init__(self, daemon: Daemon, bus: Bus, proxy: BrokerProxy) -> None:
        self.daemon, self.bus, self.proxy = daemon, bus, proxy
        self._sent: dict[str, int] = {}  # actions of this test, and the first event that is not lost with the broker

    # --- what is asked of it ---

    def checkpoint(self, program: Program, **how: Any) -> CheckpointCommand:
        return self.send(checkpoint_of(program, **how))

    def restore(self, checkpoint_id: str) -> RestoreCommand:
        return self.send(RestoreCommand(action_id=new_id(), checkpoint_id=checkpoint_id))

    def send(self, command: C) -> C:
        """File it with the broker."""
        self.bus.send(command)
        if not isinstance(command, CancelCommand):
            self.expect(command.action_id)
        return command

    def killed(self, program: Program) -> None:
        """By its checkpoint, after `ready`; what it says from now on, it says restored."""
        wait_until(lambda: not keeper.alive(program.pid), LIMIT, "its end")
        program.kill()

    # --- what it came to ---

    def records(self) -> dict[str, dict[str, Any]]:
        """The daemon's journal."""
        found = [json.loads(path.read_text()) for path in (self.daemon.state_dir / "journal").glob("*.json")]
        return {record["action_id"]: record for record in found}

    def ended(self, command: Command) -> None:
        """Wait for it: as the daemon knows, whatever the broker does."""
        wait_until(lambda: self.records().get(command.action_id, {}).get("phase") == "done", SETTLE, "the end of an action")

    @contextmanager
    def saying(self, words: str) -> Iterator[None]:
        """Before it ends, the daemon's log has said so."""
        at = len(self.daemon.log)
        yield
        wait_until(lambda: words in self.daemon.log[at:], SETTLE, words)

    def settle(self) -> None:
        """Until no command is unanswered, no action at work, no event unsent."""

        def settled() -> bool:
            records = self.records()
            known = self._sent.keys() <= records.keys()
            told = all(record["phase"] == "done" and record["published"] >= record["seq"] for record in records.values())
            return known and told and not self.bus.unanswered()

        wait_until(settled, SETTLE, "quiet")

    def stored(self, action_id: str, marker: bytes) -> bool:
        return any(event.action_id == action_id and event.status.value in marker.decode() for event in self.bus.stream())

    def told(self, command: Command) -> Event:
        """Its end, when all is quiet."""
        self.insist()
        return [event for event in self.bus.stream() if event.action_id == command.action_id][-1]

    def insist(self) -> None:
        """All is quiet, and of every action of this test the stream has what the journal has: each status once, forward, one end."""
        self.settle()
        stream, records = self.bus.stream(), self.records()
        for action, first in self._sent.items():
            found = [event for event in stream if event.action_id == action]
            kept = [(event["seq"], event["status"]) for event in records[action]["events"]]
            assert [(event.seq, event.status.value) for event in found] == kept[first - 1 :]
            assert [seq for seq, _ in kept] == list(range(1, len(kept) + 1))
            assert len({status for _, status in kept}) == len(kept)
            assert [event.status.terminal for event in found] == [False] * (len(found) - 1) + [True]
        assert not [found for found in map(keeper.describe, keeper.descendants(self.daemon.pid)) if "criu" in found]
        assert not self.daemon.at_work()
        assert self.checkpoints() == sorted(path.name for path in self.daemon.store_dir.glob("[!.]*"))

    def heal(self) -> None:
        self.proxy.heal()
        self.bus.server.resume()
        if not self.bus.server.runs:
            self.bus.server.start()

    def forget(self) -> None:
        """For the next test."""
        self._sent.clear()
        self.daemon.empty()

    def expect(self, action_id: str, first: int = 1) -> None:
        """All events of this action are to be told too; `first`: the broker has lost those before."""
        self._sent[action_id] = first

    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self.daemon.store_dir.glob("*/manifest.json"))


def new_id() -> str:
    return str(uuid.uuid4())


def checkpoint_of(program: Program, *, slow: bool = False, kill: bool = False, expires_at: float = 0.0) -> CheckpointCommand:
    return CheckpointCommand(
        action_id=new_id(), checkpoint_id=new_id(), target=Target(pid=program.pid), expires_at=expires_at,
        overrides=Overrides(compression="zstd:12" if slow else "none", streams=1, criu_opts=KILL if kill else ""),
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bus = Bus(tmp_path_factory.mktemp("broker") / "nats", NODE)
    try:
        with BrokerProxy(bus.server.port) as proxy:
            settings = {"cluster": CLUSTER, "bus": {"ack_wait": ACK_WAIT}, "limits": {"node_interval": 1.0}}
            with Daemon(node=NODE, bus=proxy.url, settings=settings) as daemon:
                yield Bench(daemon, bus, proxy)
    finally:
        bus.close()


@pytest.fixture
def bench(shared_bench: Bench) -> Iterator[Bench]:
    """After each test the broker is well again, and everything was told."""
    try:
        yield shared_bench
        shared_bench.heal()
        shared_bench.insist()
    finally:
        shared_bench.forget()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with Program(tmp_path, python("counter.py", 0.01, "slow:1")) as running:
        running.beat()
        yield running


# --- 1. it is gone while an action runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_broker_is_gone_while_a_checkpoint_runs(bench: Bench, program: Program, kill: bool) -> None:
    """From its first event on; it comes back when all is over."""
    gone = bench.proxy.at(PROCESSING, lambda: bench.bus.server.stop(kill=kill))
    with Untouched(program):
        command = bench.checkpoint(program)
        gone.wait()
        bench.ended(command)
    bench.bus.server.start()
    assert bench.told(command).status.value == "ready"
    assert bench.checkpoints() == [command.checkpoint_id]


def test_broker_is_gone_while_a_restore_runs(bench: Bench, program: Program) -> None:
    before = program.beat()
    checkpoint = bench.checkpoint(program, kill=True)
    assert bench.told(checkpoint).status.value == "ready"
    bench.killed(program)
    gone = bench.proxy.at(PROCESSING, lambda: bench.bus.server.stop(kill=True))
    command = bench.restore(checkpoint.checkpoint_id)
    gone.wait()
    bench.ended(command)
    goes_on(program, before)
    bench.bus.server.start()
    assert bench.told(command).status.value == "ready"
    goes_on(program, before)


# --- 2. it is away for a long time ------------------------------------------------------------------------------------------------


def test_broker_is_away_for_long(bench: Bench, program: Program) -> None:
    """People go on by gRPC, daemons come and go, one of them by SIGKILL: everything is told when it is back, in order."""
    bench.bus.server.stop()
    with Untouched(program):
        ready(bench.daemon.checkpoint(program.target))
        for _ in range(10):
            failed(bench.daemon.checkpoint(pid_target(NOBODY)), "not_found")
        assert bench.daemon.stop() == 0
        bench.daemon.start()
        ready(bench.daemon.checkpoint(program.target))
        for _ in range(10):
            failed(bench.daemon.checkpoint(pid_target(NOBODY)), "not_found")
        bench.daemon.kill()
        bench.daemon.start()
    waiting = [record for record in bench.records().values() if record["published"] < record["seq"]]
    assert len(waiting) == 22
    assert not any(record["published"] for record in waiting)
    for record in waiting:
        bench.expect(record["action_id"])
    bench.bus.server.start()
    bench.insist()
    began = [event.action_id for event in bench.bus.stream() if event.seq == 1][-22:]
    assert began == [record["action_id"] for record in sorted(waiting, key=lambda record: record["began_at"])]


def test_commands_sent_while_the_node_is_down(bench: Bench, program: Program) -> None:
    """They are done when it comes up, in their order; but one whose time has passed is not."""
    bench.daemon.stop()
    with Untouched(program):
        soon = time.time() + 0.1
        late = bench.checkpoint(program, expires_at=soon)
        good = bench.checkpoint(program, expires_at=soon + 600)
        wait_until(lambda: time.time() > soon, LIMIT, "an hour that has passed")
        bench.daemon.start()
        end = bench.told(late)
    assert (end.status.value, end.code) == ("error", "expired")
    assert bench.told(good).status.value == "ready"
    assert bench.checkpoints() == [good.checkpoint_id]


# --- 3. it hangs ------------------------------------------------------------------------------------------------------------------


def test_broker_hangs_in_the_middle(bench: Bench, program: Program) -> None:
    """It has got an event and says nothing. The daemon says it again, and the broker, awake, gets it twice."""
    asleep = bench.proxy.at(PROCESSING, bench.bus.server.pause)
    with Untouched(program), bench.saying("events wait"):
        command = bench.checkpoint(program)
        asleep.wait()
        bench.ended(command)
    bench.bus.server.resume()
    assert bench.told(command).status.value == "ready"


def test_broker_is_slow(bench: Bench, program: Program) -> None:
    """It wakes up before anybody has lost patience."""
    asleep = bench.proxy.at(PROCESSING, bench.bus.server.pause)
    with Untouched(program):
        command = bench.checkpoint(program)
        asleep.wait()
        bench.ended(command)
        bench.bus.server.resume()
        assert bench.told(command).status.value == "ready"


# --- 4. it gives a command out again ------------------------------------------------------------------------------------------------


def test_broker_redelivers_a_command_that_was_never_begun(bench: Bench, program: Program) -> None:
    """A daemon took it and died before it wrote it down."""
    bench.daemon.kill()
    command = bench.checkpoint(program)
    bench.bus.take_and_forget()
    with Untouched(program):
        bench.daemon.start()
        assert bench.told(command).status.value == "ready"
    assert bench.checkpoints() == [command.checkpoint_id]


def test_broker_redelivers_a_command_at_work(bench: Bench, program: Program) -> None:
    again = bench.proxy.at(PROCESSING, bench.bus.give_out_again)
    with Untouched(program):
        command = bench.checkpoint(program, slow=True)
        again.wait()
        assert bench.told(command).status.value == "ready"
    assert bench.checkpoints() == [command.checkpoint_id]


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_broker_redelivers_a_command_whose_acknowledgement_was_lost(bench: Bench, program: Program, later: bool) -> None:
    """It is answered with what was written down; the workload, which was killed, is not killed again after its restore. Also after so
    long that the broker knows no message ids any more."""

    def lose() -> None:
        if later:
            bench.bus.forget_ids()
        bench.proxy.reset()

    before = program.beat()
    lost = bench.proxy.at(ACK, lose)
    command = bench.checkpoint(program, kill=True)
    lost.wait()
    bench.killed(program)
    ready(bench.daemon.restore(command.checkpoint_id))
    assert bench.told(command).status.value == "ready"
    goes_on(program, before)


def test_broker_redelivers_after_the_daemon_was_killed_at_work(bench: Bench, program: Program) -> None:
    killed = bench.proxy.at(CREATED, bench.daemon.kill)
    with Untouched(program):
        command = bench.checkpoint(program, slow=True)
        killed.wait()
        bench.daemon.start()
        end = bench.told(command)
    assert (end.status.value, end.code) in (("error", "interrupted"), ("ready", "ok"))
    assert bench.checkpoints() == ([command.checkpoint_id] if end.code == "ok" else [])


@pytest.mark.parametrize("told", [False, True], ids=["not told", "told"])
def test_broker_redelivers_after_the_daemon_was_killed_as_it_told_the_end(bench: Bench, program: Program, told: bool) -> None:
    """The end is written down, and not acknowledged. Whether it was told is not written down."""

    def kill() -> None:
        bench.daemon.kill()
        if not told:
            bench.proxy.reset()

    killed = bench.proxy.at(READY, kill)
    with Untouched(program):
        command = bench.checkpoint(program)
        killed.wait()
        bench.daemon.start()
        assert bench.told(command).status.value == "ready"
    assert bench.checkpoints() == [command.checkpoint_id]


# --- 5. it has a command twice --------------------------------------------------------------------------------------------------------


def test_broker_has_a_command_twice(bench: Bench, program: Program) -> None:
    """Under different message ids, so that it knows nothing of it: while it runs, and after its end."""
    command = checkpoint_of(program, slow=True)
    twice = bench.proxy.at(PROCESSING, lambda: bench.bus.send_again(command))
    with Untouched(program):
        bench.send(command)
        twice.wait()
        assert bench.told(command).status.value == "ready"
        bench.bus.send_again(command)
        assert bench.told(command).status.value == "ready"
    assert bench.checkpoints() == [command.checkpoint_id]


def test_broker_has_another_command_of_the_same_id(bench: Bench, program: Program) -> None:
    """Another target, another verb: the first one counts, and nobody touches what the others name."""
    first = checkpoint_of(program, slow=True)
    other_target = first.model_copy(update={"target": Target(pid=NOBODY), "checkpoint_id": new_id()})
    other_verb = RestoreCommand(action_id=first.action_id, checkpoint_id=first.checkpoint_id)

    def others() -> None:
        bench.bus.send_again(other_target)
        bench.bus.send_again(other_verb)

    during = bench.proxy.at(PROCESSING, others)
    with Untouched(program):
        bench.send(first)
        during.wait()
        assert bench.told(first).status.value == "ready"
        others()
        end = bench.told(first)
    assert (end.type, end.status.value, end.checkpoint_id) == ("checkpoint", "ready", first.checkpoint_id)
    assert bench.checkpoints() == [first.checkpoint_id]


# --- 6. it has commands in the wrong order --------------------------------------------------------------------------------------------


def test_broker_has_a_cancel_before_its_checkpoint(bench: Bench, program: Program) -> None:
    command = checkpoint_of(program)
    with Untouched(program):
        bench.send(CancelCommand(action_id=command.action_id))
        bench.send(command)
        end = bench.told(command)
    assert (end.status.value, end.code) == ("error", "cancelled")
    assert not bench.checkpoints()


def test_broker_has_a_cancel_after_the_end(bench: Bench, program: Program) -> None:
    with Untouched(program):
        command = bench.checkpoint(program)
        assert bench.told(command).status.value == "ready"
        bench.send(CancelCommand(action_id=command.action_id))
        assert bench.told(command).status.value == "ready"
    assert bench.checkpoints() == [command.checkpoint_id]


def test_broker_has_a_restore_before_its_checkpoint_is_ready(bench: Bench, program: Program) -> None:
    """Refused, whether the checkpoint has not begun or is being made; the checkpoint is not disturbed, and restores afterwards."""
    before = program.beat()
    command = checkpoint_of(program, slow=True, kill=True)
    early = [bench.restore(command.checkpoint_id)]
    assert bench.told(early[0]).code == "not_found"
    meanwhile = bench.proxy.at(PROCESSING, lambda: early.append(bench.restore(command.checkpoint_id)))
    bench.send(command)
    meanwhile.wait()
    assert bench.told(command).status.value == "ready"
    assert [(bench.told(each).status.value, bench.told(each).code) for each in early] == [("error", "not_found")] * 2
    bench.killed(program)
    assert bench.told(bench.restore(command.checkpoint_id)).status.value == "ready"
    goes_on(program, before)


# --- 7. it loses its state ------------------------------------------------------------------------------------------------------------


def test_broker_starts_again_with_nothing(bench: Bench, program: Program) -> None:
    """It died in the middle of an action, and its disk with it. What it had is gone; what it had not got yet is told to the new one."""
    gone = bench.proxy.at(CREATED, lambda: bench.bus.server.stop(kill=True))
    with Untouched(program):
        command = bench.checkpoint(program)
        gone.wait()
        bench.ended(command)
        bench.bus.forget()
        bench.bus.server.start()
        bench.expect(command.action_id, first=2)
        assert bench.told(command).status.value == "ready"
        assert bench.told(bench.checkpoint(program)).status.value == "ready"
    wait_until(lambda: bench.bus.nodes() == [NODE], SETTLE, "the node's record")


def test_broker_loses_its_streams(bench: Bench, program: Program) -> None:
    """Under a connection that lives, in the middle of an action."""
    lost = bench.proxy.at(CREATED, lambda: bench.bus.delete_streams(COMMANDS, EVENTS, NODES))
    with Untouched(program):
        command = bench.checkpoint(program)
        lost.wait()
        bench.ended(command)
        wait_until(lambda: bench.bus.has(COMMANDS, EVENTS, NODES), SETTLE, "streams made anew")
        bench.expect(command.action_id, first=2)
        assert bench.told(command).status.value == "ready"
        assert bench.told(bench.checkpoint(program)).status.value == "ready"


def test_broker_loses_a_consumer(bench: Bench, program: Program) -> None:
    """With a command in the daemon's hand and another that nobody has taken: both are done once."""
    another = CheckpointCommand(action_id=new_id(), checkpoint_id=new_id(), target=Target(pid=NOBODY))

    def lose() -> None:
        bench.bus.delete_consumer()
        bench.send(another)

    lost = bench.proxy.at(PROCESSING, lose)
    with Untouched(program):
        command = bench.checkpoint(program, slow=True)
        lost.wait()
        assert bench.told(command).status.value == "ready"
        assert bench.told(another).code == "not_found"
    assert bench.checkpoints() == [command.checkpoint_id]


# --- 8. it breaks the connection --------------------------------------------------------------------------------------------------------


def test_broker_breaks_off_in_the_middle_of_a_command(bench: Bench, program: Program) -> None:
    cut = bench.proxy.at(b'"checkpoint_id"', bench.proxy.reset, down=True)
    with Untouched(program):
        command = bench.checkpoint(program)
        cut.wait()
        assert bench.told(command).status.value == "ready"
    assert bench.checkpoints() == [command.checkpoint_id]


@pytest.mark.parametrize("marker", [PROCESSING, CREATED, READY], ids=["processing", "checkpoint_created", "ready"])
def test_broker_breaks_off_in_the_middle_of_an_event(bench: Bench, program: Program, marker: bytes) -> None:
    cut = bench.proxy.at(marker, bench.proxy.reset)
    with Untouched(program):
        command = bench.checkpoint(program)
        cut.wait()
        assert bench.told(command).status.value == "ready"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("marker", [PROCESSING, READY], ids=["processing", "ready"])
def test_broker_stores_an_event_and_breaks_off_before_it_says_so(
    bench: Bench, program: Program, marker: bytes, later: bool
) -> None:
    """The daemon cannot know, and tells it again: it is in the stream once. Also after so long that the broker knows no message ids
    any more."""

    def lose_the_answer() -> None:
        wait_until(lambda: bench.stored(command.action_id, marker), LIMIT, "the event in the stream")
        if later:
            bench.bus.forget_ids()
        bench.proxy.reset()

    command = checkpoint_of(program)
    cut = bench.proxy.at(marker, lose_the_answer, whole=True)
    with Untouched(program):
        bench.send(command)
        cut.wait()
        assert bench.told(command).status.value == "ready"


def test_broker_breaks_off_at_every_word(bench: Bench, program: Program) -> None:
    """The command, each event, the acknowledgement, one after the other."""
    cuts = [bench.proxy.at(b'"checkpoint_id"', bench.proxy.reset, down=True)]
    cuts += [bench.proxy.at(marker, bench.proxy.reset) for marker in (PROCESSING, CREATED, READY, ACK)]
    with Untouched(program):
        command = bench.checkpoint(program)
        for cut in cuts:
            cut.wait()
        assert bench.told(command).status.value == "ready"


def test_broker_stalls_and_breaks_off(bench: Bench, program: Program) -> None:
    """Nothing comes through from the terminal event on, and what was on its way is lost."""
    stalled = bench.proxy.at(READY, bench.proxy.stall)
    with Untouched(program):
        command = bench.checkpoint(program)
        stalled.wait()
        bench.ended(command)
        with bench.saying("events wait"):
            bench.proxy.reset()
        bench.proxy.heal()
        assert bench.told(command).status.value == "ready"
