"""A daemon whose store stops answering at a given request, and goes on when it is told to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hibernode._pb import hibernode_pb2 as pb
from hibernode.drivers.s3 import S3
from tests import keeper
from tests.daemon import Daemon
from tests.fakes.s3_faults import FaultProxy, Hold
from tests.keeper import wait_until
from tests.node.workload import LIMIT, Program
from tests.servers import S3Server

KILL = {"leave_running": False}
STREAM, MANIFEST = "pages-0.zst", "manifest.json"
# In which phase which request waits, and of which object.
REQUESTS = {
    "preflight": ("PutObject", "attempt"),
    "shipping": ("PutObject", STREAM),  # of a workload that fits one part
    "committing": ("PutObject", MANIFEST),
    "fetching": ("GetObject", STREAM),
}


class Bench:
    """The daemon, and its store behind a proxy. The daemon's own patience with the store is longer than any test."""

    def __init__(self, server: S3Server, limits: dict[str, float]) -> None:
        self._proxy = FaultProxy(server.endpoint_url)
        self._store = S3(server.bucket, "stalls", server.settings())  # not through the proxy
        s3 = {
            **server.settings().model_dump(exclude_defaults=True), "secret_access_key": server.secret_access_key,
            "endpoint_url": self._proxy.url,
        }  # fmt: skip
        self.daemon = Daemon(store=f"s3://{server.bucket}/stalls", settings={"store": {"s3": s3}, "limits": limits})

    @contextmanager
    def running(self) -> Iterator[Bench]:
        with self._proxy, self.daemon:
            yield self

    @contextmanager
    def held(self, phase: str) -> Iterator[Hold]:
        """Inside, the first request of this phase waits, at most until the end."""
        hold, (operation, key) = Hold(), REQUESTS[phase]
        self._proxy.play(operation, hold, times=1, key=key)
        try:
            yield hold
        finally:
            hold.release()
            self._proxy.heal()

    def begin(self, program: Program, phase: str, hold: Hold, **overrides: Any) -> tuple[str, Iterator[pb.Update]]:
        """A checkpoint that has come to the request that waits: its action, and its updates."""
        action = str(uuid.uuid4())
        updates = self.daemon.begin_checkpoint(program.target, action_id=action, streams=1, **overrides)
        self.reached(action, phase, hold)
        return action, iter(updates)

    def begin_restore(self, checkpoint_id: str, hold: Hold) -> tuple[str, Iterator[pb.Update]]:
        action = str(uuid.uuid4())
        command = pb.RestoreCommand(action_id=action, checkpoint_id=checkpoint_id)
        updates = self.daemon.stub.Restore(command, timeout=LIMIT)
        self.reached(action, "fetching", hold)
        return action, iter(updates)

    def reached(self, action: str, phase: str, hold: Hold) -> None:
        assert hold.held.wait(LIMIT), f"no request of {phase} came"
        assert self.daemon.stub.GetAction(pb.ActionId(action_id=action), timeout=10).phase == phase

    def left(self) -> list[str]:
        """What is in the store, seen or unseen, and at work."""
        found = [f"an open upload of {upload.key}" for upload in self._store.open_uploads()]
        return found + [facts.key for facts in self._store.list()] + [str(path) for path in self.daemon.at_work()]

    def empty(self) -> None:
        """For the next test."""
        self.daemon.empty()
        for facts in list(self._store.list()):
            self._store.delete(facts.key)
        assert not self.left()


def runs(program: Program, within: float, what: str) -> None:
    """It is neither stopped nor traced, at the latest after so many seconds."""
    wait_until(lambda: keeper.state(program.pid) in ("R", "S"), within, f"a workload that runs {what}")
