"""A storm of events, published as nodes do: with their ids and places, each confirmed by the stream. A process of its own.

It speaks NATS by itself: nats-py would take a core for it, of the machine that is measured. One line on standard output for each tenth of a
second: when, and how many events the stream has confirmed.
"""

from __future__ import annotations

import argparse
import random
import re
import select
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from hibernode import wire
from hibernode.model import Event, PhaseCost, Profile, Status

NODES = 50
STATUSES = (Status.PROCESSING, Status.CHECKPOINT_CREATED, Status.READY)
SPREAD = 3.0  # seconds from one event of an action to the next, at most: so thousands of actions are open at any time
LEAD = 5_000  # events that may be on their way to the stream
_TICK = 0.01  # seconds
_ID, _TIME = "00000000-0000-4000-8000-000000000000", 1_700_000_000.125
_CONFIRMED = re.compile(rb'MSG storm\.(\d+) 1 \d+\r\n\{[^}]*?"seq":(\d+)[^}]*\}\r\n')


def profile() -> Profile:
    """Of a checkpoint of 512 MiB."""
    phases = {name: PhaseCost(seconds=0.1234, bytes=1 << 28) for name in ("preflight", "dumping", "shipping", "committing")}
    return Profile(
        phases=phases, unaccounted=0.0123, pause_ns=223_456_789, total_duration=987_654_321, total_io=1 << 28, raw_bytes=1 << 29,
        zero_bytes=1 << 26, stored_bytes=1 << 28, streams=4,
    )  # fmt: skip


def ids(actions: int, seed: int) -> list[str]:
    """In the order in which they begin."""
    chance = random.Random(seed)
    return [str(uuid.UUID(int=chance.getrandbits(128), version=4)) for _ in range(actions)]


def order(actions: int, rate: float, seed: int) -> list[tuple[int, int]]:
    """(action, event of it), as they are published."""
    chance, times = random.Random(seed), list[tuple[float, int, int]]()
    for n in range(actions):
        at = n * len(STATUSES) / rate
        for k in range(len(STATUSES)):
            times.append((at, n, k))
            at += chance.uniform(0.1, SPREAD)
    return [(n, k) for _, n, k in sorted(times)]


class Storm:
    def __init__(self, url: str, cluster: str, actions: int, rate: float, seed: int) -> None:
        self._cluster, self._rate = cluster, rate
        self._ids, self._order = ids(actions, seed), order(actions, rate, seed)
        self._texts = [[_template(f"node-{n:02}", k) for k in range(len(STATUSES))] for n in range(NODES)]
        self._place = [0] * actions  # of each action's last event in the stream
        self._confirmed, self._rest, self._out = 0, b"", list[str]()
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port))
        self._socket.sendall(
            b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}\r\nSUB storm.* 1\r\nPING\r\n'
        )

    def run(self) -> None:
        sent, began, said = 0, time.time(), 0.0
        while self._confirmed < len(self._order):
            now = time.time()
            due = min(len(self._order), int((now - began) * self._rate), self._confirmed + LEAD)
            for place in range(sent, due):
                self._send(*self._order[place], now)
            self._flush()
            sent = max(sent, due)
            self._hear(_TICK)
            if time.time() - said >= 0.1:
                said = self._say()
        self._say()

    def _say(self) -> float:
        now = time.time()
        print(f"{now:.3f} {self._confirmed}", flush=True)
        return now

    def _send(self, n: int, k: int, now: float) -> None:
        while k and self._place[n] <= 0:  # a node waits for the word on the event before
            self._flush()
            self._hear(_TICK)
        node, action_id = n % NODES, self._ids[n]
        data = self._texts[node][k].replace(_ID, action_id).replace(str(_TIME), f"{now:.3f}")
        headers = f"NATS/1.0\r\nNats-Msg-Id: {action_id}.{k + 1}\r\nNats-Expected-Last-Subject-Sequence: {self._place[n]}\r\n\r\n"
        self._place[n] = 0
        subject = f"hibernode.evt.{self._cluster}.node-{node:02}.{action_id}"
        self._out.append(f"HPUB {subject} storm.{n} {len(headers)} {len(headers) + len(data)}\r\n{headers}{data}\r\n")

    def _flush(self) -> None:
        self._socket.sendall("".join(self._out).encode())
        self._out.clear()

    def _hear(self, seconds: float) -> None:
        if not select.select([self._socket], [], [], seconds)[0]:
            return
        came = self._rest + self._socket.recv(1 << 20)
        if b'"error"' in came or b"-ERR" in came or b"NATS/1.0 503" in came or not came:
            raise RuntimeError(f"the stream refuses: {came[-500:]!r}")
        if b"PING\r\n" in came:
            self._socket.sendall(b"PONG\r\n")
        end = 0
        for found in _CONFIRMED.finditer(came):
            self._place[int(found[1])] = int(found[2])
            self._confirmed += 1
            end = found.end()
        self._rest = came[end:] if end else came[-(1 << 16) :]


def _template(node: str, k: int) -> str:
    status = STATUSES[k]
    details: dict[str, object] = {"location": f"s3://bucket/checkpoints/{_ID}"} if status == Status.READY else {}
    event = Event(
        action_id=_ID, seq=k + 1, type="checkpoint", status=status, checkpoint_id=_ID, node=node, time=_TIME,
        code="ok" if status == Status.READY else "", details=details, profile=profile() if k else None,
    )  # fmt: skip
    return wire.encode_event(event).decode()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("storm")
    for name, kind in (("url", str), ("cluster", str), ("actions", int), ("rate", float), ("seed", int)):
        parser.add_argument(name, type=kind)
    Storm(**vars(parser.parse_args(words))).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
