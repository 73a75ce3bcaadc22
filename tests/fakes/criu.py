"""A CRIU that works: it speaks the real page protocol on the real socket pair, and a restore reads back what a dump sent.

What it dumps is the scripted memory of a `Machine`. A restore rebuilds the memory from pagemap and pages files, with pycriu's own
messages, and compares it bit for bit: an image that lost or moved a page fails there.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import socket
import struct
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pycriu.images import pagemap_pb2

from hibernode import filler
from hibernode.errors import Corrupt, DumpFailed, RestoreFailed
from hibernode.flow import Stopped
from hibernode.missing import Extent
from hibernode.model import PAGE, Cancel, TaskFacts
from hibernode.ports import CriuFacts, CriuOptions, Demands, DumpStats, Held, Identity, Prepared
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
        self.unable = "no filler here"  # of restores that are not lazy; "": it brings the pages of all
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

    def keeper(self, turns: socket.socket, memory: int) -> FakeKeeper:
        try:
            self._script.step("criu.keeper")
        except BaseException:
            turns.close()
            raise
        return FakeKeeper(self._machine, self._script, turns, memory)

    def let_go(self, work: Path) -> None:
        self._script.note("criu.let_go")

    def tasks(self, images: Path) -> list[TaskFacts]:
        self._script.step("criu.tasks")
        try:
            return [TaskFacts(**task) for task in json.loads((images / "pstree.img").read_bytes())]
        except (OSError, ValueError) as e:
            raise Corrupt(f"pstree.img: {e}") from e

    def unfit(self) -> str:
        return self.unable

    def restore(
        self,
        images: Path,
        options: CriuOptions,
        prepared: Prepared,
        cancel: Cancel,
        held: Held | None = None,
    ) -> int:
        cancel.check()
        self._script.step("criu.restore")
        self.restores += 1
        assert self.tasks(images) == self._machine.tasks
        assert (images / "memory.img").read_bytes() == b"\0" * 100_000
        found, wanted = read_memory(images), expected(self._machine.runs, lazy=options.lazy or held is not None)
        assert found == wanted, "the memory that came back is another one"
        assert not self._machine.processes(), "the pids are taken"
        self._machine.restored = True  # half made, if it fails now: CRIU that is killed leaves what it has made
        if held is not None:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                held.hold(ours.fileno())
                self._fill(held)
        self._script.step("criu.restore end")
        return ROOT

    def _fill(self, held: Held) -> None:
        try:
            held.fill()
        except BaseException:
            if self._machine.restored:  # the keeper may have done it
                self._machine.kill_restored()
            raise


class FakeKeeper:
    """ports.Keeper, and its filler: it takes every row that may come late, the last of them first, and compares their pages. What is in
    none holds zeros. Steps: `keeper.begin`, `.wait`, `.half`: when half of them are in."""

    def __init__(self, machine: Machine, script: Script, turns: socket.socket, memory: int) -> None:
        self._machine, self._script, self._turns = machine, script, turns
        self._turns.settimeout(PATIENCE)
        self._memory = mmap.mmap(memory, 0)
        self._rows: dict[int, list[tuple[int, Extent]]] = {}  # row -> process and pages
        self._woken = self.all_in = False

    def begin(self, images: Path, table: Path, procs: Sequence[str], own: Sequence[str]) -> None:
        self._script.step("keeper.begin")
        assert (images / "pstree.img").exists()
        assert procs
        assert own
        columns = array("Q", table.read_bytes())
        for at in range(0, len(columns), filler.COLUMNS):
            pid, *extent = columns[at : at + filler.COLUMNS]
            found = Extent(*extent)
            self._rows.setdefault(found.row, []).append((pid, found))

    def hold(self, criu: int) -> None:
        self._script.note("keeper.hold")
        assert criu > 2

    def told(self, tree: Sequence[Identity]) -> None:
        assert tree

    def wait(self, seconds: float) -> bool:
        self._script.step("keeper.wait")
        memory = {
            (run.dst_id >> 8, run.vaddr // PAGE + n): (run.content or b"")[n * PAGE : (n + 1) * PAGE]
            for run in self._machine.runs
            for n in range(run.count if run.lazy else 0)
        }
        half = len(self._rows) - len(self._rows) // 2
        try:
            if self._rows:
                self._turns.send(filler.TURN.pack(max(self._rows), filler.WANTED))
            while self._rows:
                if len(self._rows) == half:
                    self._script.step("keeper.half")
                self._take(memory)
        except OSError as e:
            if self._woken:
                raise Stopped from e
            self._lose()
            raise RestoreFailed(f"the socket of turns: {e}", reason="lazy_pages") from e
        assert not any(content.strip(b"\0") for content in memory.values()), "pages that are in no row, and hold something"
        self.all_in = True
        self._turns.close()
        return True

    def _take(self, memory: dict[tuple[int, int], bytes]) -> None:
        if not (data := self._turns.recv(filler.TURN.size)):
            raise ConnectionError("closed")
        row, slot = filler.TURN.unpack(data)
        slots = len(self._memory) // (filler.SLOT + filler.KEPT)
        at = slots * filler.SLOT + slot * filler.KEPT
        bits = int.from_bytes(self._memory[at : at + filler.KEPT], "little")
        for pid, extent in self._rows.pop(row):
            for n in range(extent.pages):
                place = slot * filler.SLOT + (extent.at + n) * PAGE
                found = self._memory[place : place + PAGE] if bits >> extent.at + n & 1 else bytes(PAGE)
                assert found == memory.pop((pid, extent.page + n)), "the memory that came is another one"
        self._turns.send(filler.TURN.pack(row, slot))

    def wake(self) -> None:
        self._woken = True
        with contextlib.suppress(OSError):
            self._turns.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._script.note("keeper.close")
        self._turns.close()
        self._memory.close()
        if not self.all_in:
            self._lose()

    def _lose(self) -> None:
        if self._machine.restored:
            self._machine.kill_restored()


Memory = dict[str, list[tuple[int, int, int, bytes]]]


def expected(runs: list[Run], *, lazy: bool = False) -> Memory:
    """What `read_memory` finds in an image of `runs`: per pagemap file (address, pages, flags, content). `lazy`: nothing, where it may come
    late."""
    found: Memory = {}
    for run in runs:
        kind = "" if run.dst_id & 0xFF == pageproto.TASK else "shmem-"
        content = bytes(run.count * PAGE) if lazy and run.lazy else run.content or b""
        found.setdefault(f"pagemap-{kind}{run.dst_id >> 8}.img", []).append((run.vaddr, run.count, run.flags, content))
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
