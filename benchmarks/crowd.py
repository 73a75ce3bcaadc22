"""Thousands of nodes as the broker sees them: a connection each, a consumer with a request that waits, records, pings.
A process of its own.

It speaks NATS by itself, as `storm.py` does: a real daemon is a process of 75 MiB. What it sends is what a real daemon sent (`nodes.py`
records it), under each node's own names. On standard input it is told what to do, a line each:

    grow N            until there are N nodes, made ready as a daemon does it; then says {"seconds", "requests"}
    again             all of them lose their connection and come back in the same moment; then says the same
    count             says what was sent and received since it was asked last, by kind

A checkpoint command is answered as a daemon answers it that needs three seconds: three events, each behind the one before, progress four
times a second, then the acknowledgement.
"""

from __future__ import annotations

import heapq
import json
import os
import select
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hibernode import wire
from hibernode.config import Bus
from hibernode.drivers import nats
from hibernode.model import WorkloadView

SHIPS, CREATED = 3.0, 1.0  # seconds from its command until a checkpoint is ready, and until its workload runs on
PROGRESS = 0.25  # seconds, as `limits.progress_interval`
GROWING = 64  # nodes that are made ready at the same time
_BUFFER = 1 << 16


def pod_of(node: str) -> str:
    """The UID of the one workload that it has."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, node))


class Node:
    """One of them. Its requests go one after the other while it is made ready, as a daemon's do."""

    def __init__(self, crowd: Crowd, name: str, *, known: bool = False) -> None:
        """`known`: it was there before, and has its consumer."""
        self.gone = False
        self.crowd, self.name, self.inbox = crowd, name, f"_INBOX.{crowd.cluster}.{name}"
        self.socket = socket.create_connection((crowd.host, crowd.port))
        self.socket.setblocking(False)
        self.rest, self.waits, self.places = b"", list[bytes](), dict[str, int]()
        consumer = nats._taker(Bus(), crowd.cluster, name)
        make = f"$JS.API.CONSUMER.CREATE.{nats.COMMANDS}.{consumer.name}.{consumer.filter_subject}"
        wanted = json.dumps({"stream_name": nats.COMMANDS, "config": consumer.as_dict(), "action": ""}).encode()
        look = (f"$JS.API.CONSUMER.INFO.{nats.COMMANDS}.{consumer.name}", b"")
        looks = [(f"$JS.API.STREAM.INFO.{each}", b"") for each in (nats.COMMANDS, nats.EVENTS, nats.NODES)]
        requests = [*looks, look, look] if known else [*looks, look, (make, wanted), look]
        self.waits = [self.asking("setup", subject, data) for subject, data in requests][::-1]
        self.next_pull = f"$JS.API.CONSUMER.MSG.NEXT.{nats.COMMANDS}.{consumer.name}"
        options = json.dumps({"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "name": name})
        listens = f"SUB {self.inbox}.> 1\r\nSUB hibernode.find.{crowd.cluster} 2\r\n"
        self.send("hello", f"CONNECT {options}\r\n{listens}".encode() + self.waits.pop())

    def asking(self, kind: str, subject: str, data: bytes, headers: bytes = b"") -> bytes:
        if headers:
            head = f"HPUB {subject} {self.inbox}.{kind} {len(headers)} {len(headers) + len(data)}\r\n"
            return head.encode() + headers + data + b"\r\n"
        return f"PUB {subject} {self.inbox}.{kind} {len(data)}\r\n".encode() + data + b"\r\n"

    def send(self, kind: str, data: bytes) -> None:
        if self.socket.send(data) != len(data):
            raise RuntimeError(f"{self.name}: the broker does not read")
        self.crowd.counts[f"sent {kind}"] += 1

    # --- what it does again and again -------------------------------------------------------------------------------------------

    def record(self) -> None:
        if self.gone:
            return
        data = self.crowd.record(self.name)
        self.send("record", self.asking("record", f"{nats.RECORDS}.{self.crowd.cluster}.{self.name}", data))
        self.crowd.later(self.crowd.node_interval, self.record)

    def ping(self) -> None:
        if self.gone:
            return
        self.send("ping", b"PING\r\n")
        self.crowd.later(nats.ALIVE, self.ping)

    def pull(self) -> None:
        request = json.dumps({"batch": 1, "expires": int(nats.PULL * 1e9)}).encode()
        self.send("pull", self.asking("pull", self.next_pull, request))

    # --- what comes -------------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        data = self.rest + self.socket.recv(_BUFFER)
        if not data:
            raise RuntimeError(f"{self.name}: the broker has gone")
        at = 0
        while (end := data.find(b"\r\n", at)) >= 0:
            words = data[at:end].split(b" ")
            verb, at_next = words[0], end + 2
            if verb in (b"MSG", b"HMSG"):
                size = int(words[-1])
                if len(data) < at_next + size + 2:
                    break
                headers = int(words[-2]) if verb == b"HMSG" else 0
                self.hear(words, data[at_next + headers : at_next + size])
                at_next += size + 2
            elif verb == b"PING":
                self.send("pong", b"PONG\r\n")
            elif verb == b"-ERR":
                raise RuntimeError(f"{self.name}: {data[at:end]!r}")
            at = at_next
        self.rest = data[at:]

    def hear(self, words: list[bytes], data: bytes) -> None:
        subject = words[1].decode()
        kind = subject.removeprefix(f"{self.inbox}.")
        if words[2] == b"2":
            self.crowd.counts["heard find"] += 1
            if self.crowd.asked_for(data) == self.name:
                reply = words[3].decode()
                answer = wire.encode_found(self.name, [self.crowd.workload(self.name)])
                self.send("found", f"PUB {reply} {len(answer)}\r\n".encode() + answer + b"\r\n")
        elif subject.startswith("hibernode.cmd."):
            self.pull()
            self.crowd.counts["heard command"] += 1
            if subject.endswith(".checkpoint"):
                self.begin(json.loads(data)["action_id"], words[3].decode())
        elif kind == "pull":  # its time is over
            self.pull()
        elif kind == "setup":
            if b'"error"' in data and b"consumer not found" not in data:
                raise RuntimeError(f"{self.name}: {data[:500]!r}")
            self.crowd.requests += 1
            if self.waits:
                self.send("setup", self.waits.pop())
            else:
                self.crowd.is_ready(self)
        elif kind.startswith("event."):
            self.places[kind.removeprefix("event.")] = json.loads(data)["seq"]

    # --- a checkpoint -------------------------------------------------------------------------------------------------------------

    def begin(self, action_id: str, reply: str) -> None:
        later, steps = self.crowd.later, (0.0, CREATED, SHIPS)
        for number, after in enumerate(steps):
            later(after, lambda n=number: self.event(action_id, n))
        for n in range(1, int(SHIPS / PROGRESS)):
            later(n * PROGRESS, lambda: self.progress(action_id))
        later(SHIPS + 0.05, lambda: self.send("ack", self.asking("ack", reply, b"+ACK")))

    def event(self, action_id: str, number: int) -> None:
        if number and action_id not in self.places:  # the stream has not said where the one before is
            self.crowd.later(0.05, lambda: self.event(action_id, number))
            return
        place = self.places.pop(action_id, 0)
        head = f"NATS/1.0\r\nNats-Msg-Id: {action_id}.{number + 1}\r\nNats-Expected-Last-Subject-Sequence: {place}\r\n\r\n"
        data = self.crowd.fill(self.crowd.templates["events"][number], self.name, action_id)
        subject = f"hibernode.evt.{self.crowd.cluster}.{self.name}.{action_id}"
        self.send("event", self.asking(f"event.{action_id}", subject, data, head.encode()))

    def progress(self, action_id: str) -> None:
        data = self.crowd.fill(self.crowd.templates["progress"], self.name, action_id)
        head = f"PUB hibernode.progress.{self.crowd.cluster}.{self.name}.{action_id} {len(data)}\r\n"
        self.send("progress", head.encode() + data + b"\r\n")


class Crowd:
    def __init__(self, host: str, port: int, cluster: str, node_interval: float, templates: dict[str, Any]) -> None:
        self.host, self.port, self.cluster, self.node_interval, self.templates = host, port, cluster, node_interval, templates
        self.counts, self.requests = Counter[str](), 0
        self._nodes, self._wanted, self._growing, self._began = dict[int, Node](), 0, 0, 0.0
        self._due, self._turn = list[tuple[float, int, Callable[[], None]]](), 0
        self._epoll = select.epoll()
        self._asked: tuple[bytes, str] = (b"", "")
        self._names = dict[str, str]()  # by pod

    # --- what it says -----------------------------------------------------------------------------------------------------------

    def workload(self, node: str) -> WorkloadView:
        return WorkloadView(
            kind="job", namespace="default", name=f"trainer-{node}", uid=pod_of(node), pid=4711, rss=1 << 29, processes=3
        )

    def record(self, node: str) -> bytes:
        data = self.fill(self.templates["record"], node, "")
        return data.replace(self.templates["pod"].encode(), pod_of(node).encode())

    def fill(self, template: str, node: str, action_id: str) -> bytes:
        text = template.replace(self.templates["node"], node).replace(self.templates["action"], action_id)
        return text.replace(self.templates["time"], f"{time.time():.3f}").encode()

    def asked_for(self, request: bytes) -> str:
        """The node that has it; all of them are asked the same."""
        if self._asked[0] != request:
            self._asked = request, self._names.get(wire.decode_find(request).pod_id, "")
        return self._asked[1]

    # --- its loop -----------------------------------------------------------------------------------------------------------------

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        self._turn += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._turn, work))

    def run(self) -> None:
        self._epoll.register(0, select.EPOLLIN)
        orders = b""
        while True:
            wait = max(0.0, min(0.1, self._due[0][0] - time.monotonic())) if self._due else 0.1
            for descriptor, _ in self._epoll.poll(wait, 1000):
                if descriptor:
                    self._nodes[descriptor].read()
                elif not (came := os.read(0, 4096)):
                    return
                else:
                    *lines, orders = (orders + came).split(b"\n")
                    for line in lines:
                        self._obey(line.decode())
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()

    def _obey(self, order: str) -> None:
        match order.split():
            case ["grow", number]:
                self._wanted, self._began, self.requests = int(number), time.monotonic(), 0
                while self._growing < GROWING and len(self._nodes) < self._wanted:
                    self._begin()
            case ["again"]:
                self._began, self.requests, before = time.monotonic(), 0, list(self._nodes.values())
                self._nodes.clear()
                for node in before:
                    node.gone = True
                    self._epoll.unregister(node.socket)
                    node.socket.close()
                for node in before:
                    self._begin(node.name)
            case ["count"]:
                self._say(dict(self.counts))
                self.counts.clear()
            case other:
                raise SystemExit(f"crowd: {other}")

    def _begin(self, known: str = "") -> None:
        node = Node(self, known or f"node-{len(self._nodes):05}", known=bool(known))
        self._nodes[node.socket.fileno()] = node
        self._names[pod_of(node.name)] = node.name
        self._epoll.register(node.socket, select.EPOLLIN)
        self._growing += 1

    def is_ready(self, node: Node) -> None:
        """It goes on by itself; where its turns lie is spread, as they are where nodes were started at any time."""
        node.pull()
        part = (int(node.name[-5:]) * 0.618034) % 1.0
        self.later(part * self.node_interval, node.record)
        self.later(part * nats.ALIVE, node.ping)
        self._growing -= 1
        if len(self._nodes) < self._wanted:
            self._begin()
        elif not self._growing:
            self._say({"seconds": time.monotonic() - self._began, "requests": self.requests})

    def _say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)


def main(words: list[str]) -> int:
    host, port, cluster, node_interval, templates = words
    Crowd(host, int(port), cluster, float(node_interval), json.loads(Path(templates).read_text())).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
