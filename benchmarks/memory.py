"""Processes of real memory: pause, durable, restore, CPU time, against `criu dump`, tar, zstd and an upload, and against streams.

For each kind of memory (`programs/held.c`) one tree of processes goes through all of it. In each round every variant has its turn: a
checkpoint while the tree runs on, a kill, a restore; the next one checkpoints what this one has restored. The first round is not counted.
Ours is the daemon as it is installed, with an arena that fits. The peers have the same CRIU with the same options:

    criu, tar     `criu dump --leave-running` to tmpfs, `tar | zstd -T0`, an upload; back: download, unpack to tmpfs, `criu restore`
    streamer      `criu dump --stream` into criu-image-streamer, a pipe per CPU to a compressor, uploads as streams; back the same way

All pauses are what the processes have seen: the longest time that a thread that wakes every millisecond did not. A restore is over with
the first beat of the old process (of the last of them), by its own clock; afterwards all of the memory must be what was written. Ours is
restored twice: eagerly, and lazily, where `complete` is when all of it is back (`ready`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import held, stages, streamer
from benchmarks.held import BOUNDARY, LIMIT, Beat
from benchmarks.peer import Stores
from benchmarks.tables import spread, table
from tests import keeper
from tests.daemon import Daemon, pid_target, ready
from tests.keeper import Kept, wait_until
from tests.servers import S3Server, beside_python

NAME = "memory"
KINDS = {"float32": 1, "bf16": 1, "json": 1, "half-zero": 1, "mappings": 1, "processes": 8}  # and how many processes it is
_QUICK_KINDS = ("float32", "json", "half-zero")
_MEASURES = ("pause", "durable", "restore", "complete")
_COPIES = 4.2  # of the memory, on this machine at once: the process, the arena, an image and what it is packed into
_OUR_COPIES = 2.6  # the same without a peer, where one process is restored
_CPUS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Ours:
    store: str


@dataclass(frozen=True)
class _Tar:
    store: str
    level: int


@dataclass(frozen=True)
class _Stream:
    store: str
    pack: str
    unpack: str


VARIANTS: dict[str, _Ours | _Tar | _Stream] = {
    "ours, directory": _Ours("directory"),
    "ours, S3": _Ours("S3"),
    "criu, tar, zstd -3, directory": _Tar("directory", 3),
    "criu, tar, zstd -1, directory": _Tar("directory", 1),
    "criu, tar, zstd -3, S3": _Tar("S3", 3),
    "criu, tar, zstd -1, S3": _Tar("S3", 1),
    "streamer, zstd -1, directory": _Stream("directory", "zstd -q -1", "zstd -q -d"),
    "streamer, zstd -1, S3": _Stream("S3", "zstd -q -1", "zstd -q -d"),
    "streamer, lz4, directory": _Stream("directory", "lz4 -q -1", "lz4 -q -d"),
    "streamer, gzip, directory": _Stream("directory", "gzip -1", "gzip -d"),
}
_NOT_QUICK = ("criu, tar, zstd -1, S3", "streamer, zstd -1, S3", "streamer, lz4, directory", "streamer, gzip, directory")
_OURS = [name for name, how in VARIANTS.items() if isinstance(how, _Ours)]


@dataclass
class Taken:
    """One checkpoint and one restore."""

    pause: float = 0.0  # seconds, as all of these
    said_pause: float = 0.0  # ours: as the daemon says; the peer's: how long `criu dump` took
    durable: float = 0.0
    restore: float = 0.0
    complete: float = 0.0  # until all of it is back: ours, restored once more, lazily; of a peer, its restore
    lazy: float = 0.0  # ours: until it ran, of that
    cpu: float = 0.0  # of the daemon and its children, or of all that the peer ran, during the checkpoint
    restore_cpu: float = 0.0
    memory: int = 0  # bytes, ours: resident at the most, without the arena
    stored: int = 0  # bytes
    load: float = 0.0  # of the machine, before
    steps: dict[str, float] = field(default_factory=dict)  # ours, as the daemon says: seconds of each phase


def measure(*, quick: bool, size: int = 0, rounds: int = 0, kinds: str = "", only: Sequence[str] = ()) -> dict[str, Any]:
    """Every round: kind -> variant -> what was taken; None of what this machine has no program for, and of what is not wanted."""
    size, rounds = size or (512 if quick else 1024), rounds or (3 if quick else 5)
    wanted = kinds.split(",") if kinds else [*(_QUICK_KINDS if quick else KINDS)]
    if unknown := set(wanted) - set(KINDS):
        raise SystemExit(f"run: --kinds: no {', '.join(unknown)}; there are {', '.join(KINDS)}")
    if size % (8 * BOUNDARY) and size not in (64, 128, 256):
        raise SystemExit(f"run: --size: so many times {8 * BOUNDARY} MiB (or 64, 128, 256): eight processes hold {BOUNDARY} each")
    asked = [name for name in VARIANTS if (any(text in name for text in only) if only else not (quick and name in _NOT_QUICK))]
    runnable = {name: VARIANTS[name] for name in asked if _can(VARIANTS[name])}
    if not runnable.keys() & {*_OURS}:
        raise SystemExit(f"run: --only: nothing of ours is in it; there are {'; '.join(VARIANTS)}")
    _insist_room(size, _COPIES if runnable.keys() - {*_OURS} or max(KINDS[kind] for kind in wanted) > 1 else _OUR_COPIES)
    taken: dict[str, dict[str, Any]] = {kind: dict.fromkeys(VARIANTS) for kind in wanted}
    ceilings: dict[str, list[dict[str, float]]] = {kind: [] for kind in wanted}
    with bench(size, arena=size * 5 // 4 + 64) as made:
        for kind in wanted:
            taken[kind] |= {name: [] for name in runnable}
            with made.running(kind) as tree:
                tree.keep_sample()
                for turn in range(rounds + 1):
                    at = turn % len(runnable)
                    for name in [*runnable][at:] + [*runnable][:at]:
                        one = tree.once(name, runnable[name])
                        print(f"{kind}: round {turn}: {name}: {_told(one)}", flush=True)
                        if turn:  # the first is for the caches
                            taken[kind][name].append(vars(one))
                    if turn:
                        ceilings[kind].append(stages.rates(tree.sample, made.memory, made.stores))
        told = {"mebibytes": size, "rounds": rounds, "arena_mebibytes": made.arena >> 20, "streamer": bool(streamer.program())}
    pairs = {kind: _pairs(of) for kind, of in taken.items()}
    efficiency = {kind: _efficiency(size << 20, of, ceilings[kind]) for kind, of in taken.items()}
    ratios, worst = _ratios(pairs, efficiency)
    return {
        **told, "taken": taken, "ceilings": ceilings, "pairs": pairs, "efficiency": efficiency, "ratios": ratios, "worst": worst
    }  # fmt: skip


def _can(how: _Ours | _Tar | _Stream) -> bool:
    return not isinstance(how, _Stream) or bool(streamer.program() and shutil.which(how.pack.split()[0]))


def _insist_room(size: int, copies: float) -> None:
    """Rather than have the kernel kill somebody: a tmpfs is memory, too."""
    if size * copies > room():
        raise SystemExit(f"run: --size {size} needs {size * copies:.0f} MiB of memory, and {room()} are available")


def room() -> int:
    """MiB of memory that are available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) >> 10


@contextlib.contextmanager
def bench(size: int, *, arena: int) -> Iterator[Bench]:
    """A daemon with so large an arena (MiB), two stores, and a program that holds `size` MiB."""
    with contextlib.ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-", dir="/var/tmp")))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-", dir="/dev/shm")))
        (disk / "plugins").mkdir()
        program = held.build(disk / "held")
        server = stack.enter_context(S3Server(disk / "s3"))
        s3 = {**server.settings().model_dump(exclude_defaults=True), "secret_access_key": server.secret_access_key}
        url = f"s3://{server.bucket}/ours"
        settings = {"store": {"allowed": [url], "s3": {**s3, "part_size": 8 << 20}}}
        store = f"file://{disk}/store"
        made = Daemon(store=store, arena=f"{arena}MiB", settings=settings, call_limit=LIMIT, start_limit=LIMIT)
        daemon = stack.enter_context(made)
        yield Bench(size, disk, memory, program, daemon, Stores(disk, server), url, arena << 20)


@dataclass(frozen=True)
class Bench:
    size: int  # MiB
    disk: Path
    memory: Path
    program: Path
    daemon: Daemon
    stores: Stores
    url: str
    arena: int

    @contextlib.contextmanager
    def running(self, kind: str) -> Iterator[Tree]:
        log = self.disk / f"{kind}.log"
        tree = Tree(self, Kept([str(self.program), str(self.size), kind], log), log)
        try:
            wait_until(lambda: len(tree.last()) == KINDS[kind], LIMIT, "the program to fill its memory")
            yield tree
        finally:
            tree.end()
            tree.sample.unlink(missing_ok=True)


class Tree:
    """The processes, wherever they were restored last: their pids stay the same."""

    def __init__(self, bench: Bench, kept: Kept, log: Path) -> None:
        self._bench, self._log, self.pid = bench, log, kept.pid
        self._kept: Kept | None = kept  # None: the daemon restored it, and keeps it
        self._mark = 0  # in the log: what it said before does not count
        self.sample = bench.memory / "sample"

    def once(self, name: str, how: _Ours | _Tar | _Stream) -> Taken:
        self._mark = self._whole_lines()
        wait_until(lambda: len(self.last()) == len(self._tree()), LIMIT, "a beat of each")
        planted = self.last()
        os.sync()  # what the one before has left to be written is not to slow this one
        taken = Taken(load=os.getloadavg()[0])
        try:
            with tempfile.TemporaryDirectory(dir=self._bench.memory) as work:
                (Path(work) / "image").mkdir()
                match how:
                    case _Ours():
                        self._ours(how, taken, planted)
                    case _Tar():
                        self._tar(how, taken, planted, Path(work))
                    case _Stream():
                        self._stream(how, taken, planted, Path(work))
            self.insist_whole(planted)
        except Exception as e:
            e.add_note(f"in {name!r}")
            raise
        return taken

    def keep_sample(self) -> None:
        """Of what it has written into memory of its own: what is compressed and stored alone."""
        with self.sample.open("wb") as out:
            for pid in self._tree():
                with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                    for start, end in _anonymous(pid):
                        memory.seek(start)
                        while piece := memory.read(min(end - memory.tell(), 1 << 20, stages.SAMPLE - out.tell())):
                            out.write(piece)

    # --- ours -----------------------------------------------------------------------------------------------------------------

    def _ours(self, how: _Ours, taken: Taken, planted: Mapping[str, Beat]) -> None:
        daemon, directory = self._bench.daemon, self._bench.url if how.store == "S3" else ""
        Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")  # VmHWM begins anew
        cpu, began = _cpu(daemon.pid), time.time()
        event = ready(daemon.checkpoint(pid_target(self.pid), directory=directory))
        taken.durable, taken.cpu = time.time() - began, _cpu(daemon.pid) - cpu
        taken.pause = held.pause(self.lines, began)
        taken.said_pause, taken.stored = event.profile.pause_ns / 1e9, event.profile.stored_bytes
        taken.steps = {f"checkpoint: {name}": cost.seconds for name, cost in event.profile.phases.items()}
        self.end()
        cpu, began = _cpu(daemon.pid), time.time()
        restored = ready(daemon.restore(event.checkpoint_id, directory=directory))
        taken.steps |= {f"restore: {name}": cost.seconds for name, cost in restored.profile.phases.items()}
        taken.restore = self.back(planted, began)
        taken.restore_cpu, taken.memory = _cpu(daemon.pid) - cpu, _peak(daemon.pid) - self._bench.arena
        self.insist_whole(planted)
        self.end()
        began = time.time()
        ready(daemon.restore(event.checkpoint_id, directory=directory, criu_opts={"restore": "lazy"}))
        taken.complete = time.time() - began
        taken.lazy = self.back(planted, began)
        store = self._bench.stores.place("S3", "ours") if directory else self._bench.disk / "store"
        shutil.rmtree(store / event.checkpoint_id)

    def saved(self, directory: str) -> tuple[str, dict[str, Beat]]:
        """Checkpointed by our daemon, and killed: its id, and the last beats."""
        self._mark = self._whole_lines()
        wait_until(lambda: len(self.last()) == len(self._tree()), LIMIT, "a beat of each")
        planted = self.last()
        event = ready(self._bench.daemon.checkpoint(pid_target(self.pid), directory=directory))
        self.end()
        return event.checkpoint_id, planted

    # --- the peers ------------------------------------------------------------------------------------------------------------

    def _tar(self, how: _Tar, taken: Taken, planted: Mapping[str, Beat], work: Path) -> None:
        stores, object_, image = self._bench.stores, f"peer-{uuid.uuid4().hex}.tar.zst", work / "image"
        cpu, began = _cpu_of_children(), time.time()
        self._dump(work)
        taken.said_pause = time.time() - began
        stores.shell(f"tar -C {image} -cf - . | zstd -q -T0 -{how.level} {stores.put(how.store, object_, work / 'packed')}")
        taken.durable, taken.cpu = time.time() - began, _cpu_of_children() - cpu
        taken.pause = held.pause(self.lines, began)
        taken.stored = stores.size(how.store, object_)
        self.end()
        (work / "packed").unlink(missing_ok=True)
        shutil.rmtree(image)
        image.mkdir()
        cpu, began = _cpu_of_children(), time.time()
        stores.shell(f"{stores.get(how.store, object_)} | zstd -q -d | tar -C {image} -xf -")
        self._restore(work)
        taken.restore = taken.complete = self.back(planted, began)
        taken.restore_cpu = _cpu_of_children() - cpu + _cpu_of_keeper(self.pid)
        stores.remove(how.store, object_)

    def _stream(self, how: _Stream, taken: Taken, planted: Mapping[str, Beat], work: Path) -> None:
        stores, image, env = self._bench.stores, work / "image", self._bench.stores.environment()
        objects = [f"peer-{uuid.uuid4().hex}-{n}" for n in range(_CPUS)]
        cpu, began = _cpu_of_children(), time.time()
        lines = [f"{how.pack} {stores.stream(how.store, name)}" for name in objects]
        streamer.stream("capture", image, lines, env, lambda: self._dump(work, "--stream"))
        taken.durable, taken.cpu = time.time() - began, _cpu_of_children() - cpu
        taken.pause = held.pause(self.lines, began)
        taken.stored = sum(stores.size(how.store, name) for name in objects)
        self.end()
        cpu, began = _cpu_of_children(), time.time()
        lines = [f"{stores.get(how.store, name)} | {how.unpack}" for name in objects]
        streamer.stream("serve", image, lines, env, lambda: self._restore(work, "--stream"))
        taken.restore = taken.complete = self.back(planted, began)
        taken.restore_cpu = _cpu_of_children() - cpu + _cpu_of_keeper(self.pid)
        for name in objects:
            stores.remove(how.store, name)

    def _criu(self, work: Path, command: str, *options: str) -> list[str]:
        """As our daemon has it, as far as the command line goes."""
        rest = [
            "-D",
            str(work / "image"),
            "-W",
            str(work),
            "-o",
            f"{command}.log",
            "--manage-cgroups=ignore",
            "--network-lock",
            "skip",
        ]
        return ["env", f"CRIU_LIBS_DIR={self._bench.disk / 'plugins'}", beside_python("criu"), command, *rest, *options]

    def _dump(self, work: Path, *options: str) -> None:
        self._bench.stores.run(self._criu(work, "dump", "-t", str(self.pid), "--leave-running", *options))

    def _restore(self, work: Path, *options: str) -> None:
        said = work / "said"
        self._kept = Kept(self._criu(work, "restore", "-d", *options), said)
        if code := self._kept.exit_code(LIMIT):
            raise RuntimeError(f"criu restore: {code}\n{said.read_text()[-1000:]}{(work / 'restore.log').read_text()[-2000:]}")

    # --- what the program says ------------------------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """Since the mark, whole ones."""
        with self._log.open("rb") as log:
            log.seek(self._mark)
            return log.read().rpartition(b"\n")[0].decode().splitlines()

    def last(self) -> dict[str, Beat]:
        """The last beat of each process."""
        return {beat.token: beat for beat in held.beats(self.lines())}

    def end(self) -> None:
        """Kill it; what it said does not count any more."""
        keeper.kill_all(keeper.descendants(self.pid))  # before its root: with that the daemon removes its cgroup, if it is empty
        keeper.kill_tree(self.pid)
        if self._kept:
            self._kept.kill()
            self._kept = None
        self._mark = self._log.stat().st_size

    def _whole_lines(self) -> int:
        return self._log.read_bytes().rfind(b"\n") + 1

    def _tree(self) -> list[int]:
        return [self.pid, *keeper.descendants(self.pid)]

    def back(self, planted: Mapping[str, Beat], began: float) -> float:
        """Seconds until the last of them beat: the old ones, all of them."""
        wait_until(lambda: planted.keys() <= self.last().keys(), LIMIT, "a beat of each that was restored")
        firsts = {beat.token: beat for beat in reversed(held.beats(self.lines()))}
        for token, before in planted.items():
            held.insist_same(before, firsts[token], began)
        return max(first.at for first in firsts.values()) / 1e9 - began

    def insist_whole(self, planted: Mapping[str, Beat]) -> None:
        for pid in self._tree():
            os.kill(pid, signal.SIGUSR1)
        wait_until(
            lambda: all(self.last()[token].checks > planted[token].checks for token in planted), LIMIT, "a look at the memory"
        )
        held.insist_whole(planted, self.last())


def _anonymous(pid: int) -> Iterator[tuple[int, int]]:
    """Where its own memory without a file begins and ends."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        where, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights.startswith("rw") and inode == "0" and not name:
            start, end = where.split("-")
            yield int(start, 16), int(end, 16)


def _cpu(pid: int) -> float:
    """Seconds of processor time of it and of the children that it has waited for."""
    return sum(map(int, keeper.fields(pid)[11:15])) / os.sysconf("SC_CLK_TCK")


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _cpu_of_keeper(pid: int) -> float:
    """Of a restore: its keeper has waited for CRIU, and for nobody else yet."""
    return _cpu(int(keeper.fields(pid)[1]))


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10


# --- ratios -----------------------------------------------------------------------------------------------------------------------


def _pairs(taken: Mapping[str, Any]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Ours over the peer's of the same store, of each round: ours -> peer -> `pause`, ... -> list."""

    def of(ours: str, peer: str) -> dict[str, list[float]]:
        rounds = list(zip(taken[ours], taken[peer], strict=True))
        return {each: [a[each] / b[each] for a, b in rounds if b[each]] for each in _MEASURES}

    return {
        ours: {
            peer: of(ours, peer)
            for peer, how in VARIANTS.items()
            if how.store == VARIANTS[ours].store and peer not in _OURS and taken[peer] is not None
        }
        for ours in _OURS
        if taken[ours] is not None
    }


def _efficiency(size: int, taken: Mapping[str, Any], ceilings: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """The rate until durable over that of the slowest stage, of each round: ours -> list."""
    return {
        ours: [
            size / one["durable"] / 1e9 / stages.slowest(rates, VARIANTS[ours].store, one["stored"] / size)
            for one, rates in zip(taken[ours], ceilings, strict=True)
        ]
        for ours in _OURS
        if taken[ours] is not None
    }


def _ratios(pairs: Mapping[str, Any], efficiency: Mapping[str, Any]) -> tuple[dict[str, float | None], dict[str, str]]:
    """The worst workload's median of each, and which that is: over all kinds, both stores, and every peer of its sort."""

    def of(measure: str, sort: type) -> dict[str, float]:
        return {
            f"{kind}: {ours} / {peer}": statistics.median(ratios[measure])
            for kind, found in pairs.items()
            for ours, peers in found.items()
            for peer, ratios in peers.items()
            if isinstance(VARIANTS[peer], sort) and ratios[measure]
        }

    rates = {f"{kind}: {ours}": statistics.median(rounds) for kind, found in efficiency.items() for ours, rounds in found.items()}
    all_of = {
        "pause_vs_criu_dump": of("pause", _Tar),
        "durable_vs_tar_zstd": of("durable", _Tar),
        "durable_vs_streamer": of("durable", _Stream),
        "restore_vs_tar_zstd": of("restore", _Tar),
        "lazy_complete_vs_tar_zstd": of("complete", _Tar),
    }
    worst = {name: max(found, key=found.__getitem__) for name, found in all_of.items() if found}
    worst["pipeline_efficiency"] = least = min(rates, key=rates.__getitem__)
    ratios: dict[str, float | None] = {name: round(found[worst[name]], 3) if found else None for name, found in all_of.items()}
    return {**ratios, "pipeline_efficiency": round(rates[least], 3)}, worst


# --- words ------------------------------------------------------------------------------------------------------------------------


def render(found: Mapping[str, Any]) -> str:
    """Medians, and from the least to the greatest of the rounds; a ratio is of one round."""
    return "\n".join([_head(found), *(line for kind in found["taken"] for line in _kind(kind, found)), *_worst(found)])


def _head(found: Mapping[str, Any]) -> str:
    loads = [one["load"] for of in found["taken"].values() for rounds in of.values() if rounds for one in rounds]
    return (
        f"{found['mebibytes']} MiB, {found['rounds']} rounds, arena {found['arena_mebibytes']} MiB; "
        f"load of the machine {spread(loads, '')}{'' if found['streamer'] else '; no criu-image-streamer in PATH'}"
    )


def _kind(kind: str, found: Mapping[str, Any]) -> list[str]:
    gigabytes = (found["mebibytes"] << 20) / 1e9
    taken = {name: rounds for name, rounds in found["taken"][kind].items() if rounds}

    def row(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
        cells = [spread([one[each] for one in rounds]) for each in _MEASURES]
        cells += [spread([one[each] / gigabytes for one in rounds], "") for each in ("cpu", "restore_cpu")]
        most = max(one["memory"] for one in rounds) >> 20
        return [*cells, str(int(statistics.median(one["stored"] for one in rounds)) >> 20), str(most) if most else "-"]

    heads = [*_MEASURES, "CPU s/GB", "restore, CPU s/GB", "stored, MiB", "daemon, MiB"]
    ratios = {
        f"{ours} / {peer}": [spread(of[each], "") for each in _MEASURES]
        for ours, peers in found["pairs"][kind].items()
        for peer, of in peers.items()
    }
    alone = found["ceilings"][kind]
    rates = {
        name: [spread([each[of] for each in alone], "") for of in (name, name + stages.COST)]
        for name in alone[0]
        if not name.endswith(stages.COST)
    }
    return [
        "", *table(kind, heads, {name: row(rounds) for name, rounds in taken.items()}),
        *(["", *table(f"{kind}: ours / peer", _MEASURES, ratios)] if ratios else ()),
        "", *table(f"{kind}: alone", ["GB/s", "CPU s/GB"], rates),
    ]  # fmt: skip


def _worst(found: Mapping[str, Any]) -> list[str]:
    rows = {
        name: ["null" if ratio is None else f"{ratio:.2f}", found["worst"].get(name, "-")]
        for name, ratio in found["ratios"].items()
    }
    return ["", *table("the worst workload's median", ["", "of"], rows)]


def _told(one: Taken) -> str:
    seconds = f"pause {one.pause:.2f} s, durable {one.durable:.2f} s, restore {one.restore:.2f} s, CPU {one.cpu:.1f} s"
    return f"{seconds}, {one.stored >> 20} MiB"
