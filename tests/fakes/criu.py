"""A CRIU that works: it speaks the real page protocol on the real socket pair, and a restore reads back what a dump sent.

What it dumps is the scripted memory of a `Machine`. A restore rebuilds the memory from pagemap and pages files, with pycriu's own
messages, and compares it bit for bit: an image that lost or moved a page fails there.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pycriu.images import pagemap_pb2

from hibernode.errors import Corrupt, DumpFailed, RestoreFailed
from hibernode.flow import Stopped
from hibernode.model import FRAME_PAGES, PAGE, Cancel, TaskFacts
from hibernode.ports import CriuFacts, CriuOptions, Demands, DumpStats, Identity, Prepared
from hibernode.transfer import pageproto
from hibernode.transfer.pageproto import Header, Wire
from tests.fakes.machine import ROOT, Machine, Run
from tests.fakes.script import Script

VERSION = 40201
Fault = Literal["", "eof", "hang", "lie", "garbage", "cut"]
PATIENCE = 20.0  # seconds; a test that waits longer hangs


class FakeCriu:
    """ports.Criu. Steps: `criu.facts`, `.dump`, `.dump half`, `.dump end`, `.tasks`, `.keeper`, `.restore`, `.restore end`.

    `fault`, half way through a dump: `eof` closes the socket and claims success, `hang` sends nothing more until our end is closed,
    `lie` claims one page more than was sent, `garbage` sends an unknown command, `cut` ends inside a segment.
    """

    def __init__(self, machine: Machine, script: Script, fault: Fault = "") -> None:
        self._machine, self._script, self._wire = machine, script, Wire(VERSION)
        self.fault: Fault = fault
        self.dumps = self.restores = 0
        self.dumping = threading.Event()  # a dump is half way
        self.gate = threading.Event()  # a dump goes on from there
        self.gate.set()

    def facts(self) -> CriuFacts:
        self._script.step("criu.facts")
        return CriuFacts(VERSION, "/usr/sbin/criu")

    def check(self) -> str:
        return ""

    # --- dump ---------------------------------------------------------------------------------------------------------------

    def dump(self, pid: int, images: Path, pages: socket.socket, options: CriuOptions, cancel: Cancel) -> DumpStats:
        assert pid == ROOT
        try:
            cancel.check()
            pages.settimeout(PATIENCE)
            self._script.step("criu.dump")
            self.dumps += 1
            self._machine.stopped = True
            try:
                sent = self._dump(images, pages)
            except BaseException:
                self._machine.stopped = False  # it rolls back
                raise
            self._machine.stopped = options.leave_stopped
            return DumpStats(1000, 2000, sent)
        except ConnectionError as e:
            raise DumpFailed(f"the page socket: {e}") from e
        finally:
            pages.close()

    def _dump(self, images: Path, pages: socket.socket) -> int:
        runs = self._machine.runs
        half = len(runs) // 2
        last = -1
        for n, run in enumerate(runs):
            if n == half and not self._half(pages):
                return sum(r.count for r in runs if r.content is not None)
            if run.dst_id != last:
                self._open(pages, run.dst_id)
                last = run.dst_id
            self._send(pages, run)
        if not runs and not self._half(pages):
            return 0
        (images / "pstree.img").write_bytes(json.dumps([t.model_dump() for t in self._machine.tasks]).encode())
        (images / "memory.img").write_bytes(b"\0" * 100_000)
        pages.sendall(self._header(pageproto.CLOSE))
        if pages.recv(4) != pageproto.CLOSED:
            raise DumpFailed("the page server did not confirm the end")
        self._script.step("criu.dump end")
        return sum(r.count for r in runs if r.content is not None) + (self.fault == "lie")

    def _half(self, pages: socket.socket) -> bool:
        """Half way: wait for the gate, then play the fault. False: the dump ends here, and claims to be complete."""
        self.dumping.set()
        assert self.gate.wait(PATIENCE)
        self._script.step("criu.dump half")
        match self.fault:
            case "eof":
                return False
            case "hang":
                assert not pages.recv(1), "nothing was asked"
                raise DumpFailed("the page socket was closed")
            case "garbage":
                pages.sendall(self._header(0x77))
            case "cut":
                pages.sendall(self._header(pageproto.ADD_F, pageproto.PRESENT, 10, 0x1000, 1) + bytes(PAGE))
                return False
        return True

    def _open(self, pages: socket.socket, dst_id: int) -> None:
        pages.sendall(self._header(pageproto.PARENT, dst_id=dst_id))
        if pages.recv(4, socket.MSG_WAITALL) != pageproto.NO_PARENT:
            raise DumpFailed("no answer to PARENT")
        pages.sendall(self._header(pageproto.OPEN2, dst_id=dst_id))
        if pages.recv(1) != pageproto.NO_PARENT_IMAGE:
            raise DumpFailed("no answer to OPEN2")

    def _send(self, pages: socket.socket, run: Run) -> None:
        pages.sendall(self._header(pageproto.ADD_F, run.flags, run.count, run.vaddr, run.dst_id))
        if run.content is not None:
            pages.sendall(run.content)

    def _header(self, command: int, flags: int = 0, pages: int = 0, vaddr: int = 0, dst_id: int = 0) -> bytes:
        return self._wire.encode(Header(command, flags, pages, vaddr, dst_id))

    # --- restore ------------------------------------------------------------------------------------------------------------

    def environment(self) -> Mapping[str, str]:
        raise NotImplementedError

    def demands(self, images: Path) -> Demands:
        raise NotImplementedError

    def stats(self, images: Path) -> DumpStats:
        raise NotImplementedError

    def why(self, what: str, error: Exception, log: Path) -> DumpFailed:
        raise NotImplementedError

    def keeper(self, pages: socket.socket) -> FakeKeeper:
        try:
            self._script.step("criu.keeper")
        except BaseException:
            pages.close()
            raise
        return FakeKeeper(self._machine, self._script, pages, self._wire)

    def let_go(self, work: Path) -> None:
        self._script.note("criu.let_go")

    def tasks(self, images: Path) -> list[TaskFacts]:
        self._script.step("criu.tasks")
        try:
            return [TaskFacts(**task) for task in json.loads((images / "pstree.img").read_bytes())]
        except (OSError, ValueError) as e:
            raise Corrupt(f"pstree.img: {e}") from e

    def restore(self, images: Path, options: CriuOptions, prepared: Prepared, cancel: Cancel) -> int:
        cancel.check()
        self._script.step("criu.restore")
        self.restores += 1
        assert self.tasks(images) == self._machine.tasks
        assert (images / "memory.img").read_bytes() == b"\0" * 100_000
        found, wanted = read_memory(images), expected(self._machine.runs, lazy=options.lazy)
        assert found == wanted, "the memory that came back is another one"
        assert not self._machine.processes(), "the pids are taken"
        self._machine.restored = True  # half made, if it fails now: CRIU that is killed leaves what it has made
        self._script.step("criu.restore end")
        return ROOT


class FakeKeeper:
    """ports.Keeper: it asks for every page that may come late, as `criu lazy-pages` does, and compares them. Steps: `keeper.begin`,
    `.wait`, `.half`: when half of them are in."""

    def __init__(self, machine: Machine, script: Script, pages: socket.socket, wire: Wire) -> None:
        self._machine, self._script, self._pages, self._wire = machine, script, pages, wire
        self._pages.settimeout(PATIENCE)
        self._woken = self.all_in = False

    def begin(self, images: Path, procs: Sequence[str], own: Sequence[str]) -> None:
        self._script.step("keeper.begin")
        assert (images / "pstree.img").exists()
        assert procs
        assert own

    def told(self, tree: Sequence[Identity]) -> None:
        assert tree

    def wait(self, seconds: float) -> bool:
        self._script.step("keeper.wait")
        lazy = [run for run in self._machine.runs if run.lazy]
        try:
            for n, run in enumerate(lazy):
                if n == len(lazy) // 2:
                    self._script.step("keeper.half")
                assert self._fill(run) == run.content, "the memory that came is another one"
            self._pages.sendall(self._wire.encode(Header(pageproto.FORCE_CLOSE, 0, 0, 0, 0)))
            assert self._receive(4) == pageproto.CLOSED
        except ConnectionError as e:
            if self._woken:
                raise Stopped from e
            self._lose()
            raise RestoreFailed(f"the page socket: {e}", reason="lazy_pages") from e
        self.all_in = True
        return True

    def _fill(self, run: Run) -> bytes:
        """In pieces, which may come shorter than they are asked for."""
        content = b""
        while len(content) < run.count * PAGE:
            at = len(content) // PAGE
            wanted = min(run.count - at, 300)
            self._pages.sendall(self._wire.encode(Header(pageproto.GET, 0, wanted, run.vaddr + at * PAGE, run.dst_id >> 8)))
            header = self._wire.decode(self._receive(self._wire.size))
            assert (header.command, header.flags) == (pageproto.ADD_F, pageproto.PRESENT)
            assert (header.vaddr, header.dst_id) == (run.vaddr + at * PAGE, run.dst_id >> 8)
            assert 0 < header.pages <= wanted
            content += self._receive(header.pages * PAGE)
        return content

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (more := self._pages.recv(size - len(data))):
                raise ConnectionError("closed")
            data += more
        return data

    def wake(self) -> None:
        self._woken = True
        with contextlib.suppress(OSError):
            self._pages.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._script.note("keeper.close")
        self._pages.close()
        if not self.all_in:
            self._lose()

    def _lose(self) -> None:
        if self._machine.restored:
            self._machine.kill_restored()


Memory = dict[str, list[tuple[int, int, int, bytes]]]


def expected(runs: list[Run], *, lazy: bool = False) -> Memory:
    """What `read_memory` finds in an image of `runs`: per pagemap file (address, pages, flags, content). `lazy`: nothing, where it may come
    late, and entries no longer than a frame."""
    found: Memory = {}
    for run in runs:
        kind = "" if run.dst_id & 0xFF == pageproto.TASK else "shmem-"
        step = FRAME_PAGES if lazy else run.count
        for at in range(0, run.count, step):
            content = (run.content or b"")[at * PAGE : (at + step) * PAGE]
            entry = (
                run.vaddr + at * PAGE,
                min(step, run.count - at),
                run.flags,
                bytes(len(content)) if lazy and run.lazy else content,
            )
            found.setdefault(f"pagemap-{kind}{run.dst_id >> 8}.img", []).append(entry)
    return found


def read_memory(images: Path) -> Memory:
    """The memory in CRIU's own files, read as CRIU reads them: entries in order, content end to end in the pages file."""
    found: Memory = {}
    for path in sorted(images.glob("pagemap-*.img")):
        head, *entries = _messages(path.read_bytes())
        pages_id = pagemap_pb2.pagemap_head.FromString(head).pages_id
        content, at, rows = (images / f"pages-{pages_id}.img").read_bytes(), 0, []
        for entry in map(pagemap_pb2.pagemap_entry.FromString, entries):
            count = entry.nr_pages
            size = count * PAGE if entry.flags & pageproto.PRESENT else 0
            rows.append((entry.vaddr, count, entry.flags, content[at : at + size]))
            at += size
        assert at == len(content), f"{path.name}: {len(content) - at} bytes belong to nobody"
        found[path.name] = rows
    return found


def _messages(data: bytes) -> Iterator[bytes]:
    assert data[:8] == struct.pack("<II", 0x54564319, 0x56084025)
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        yield data[at + 4 : at + 4 + size]
        at += 4 + size
