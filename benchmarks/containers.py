"""A container in a pod: pause, time until it is durable, restore, against `runc checkpoint`, tar, zstd and an upload.

One pod of a real containerd, made by CRI, holds its memory (`programs/held.c`) and runs on through all of it. In each round every variant
makes a checkpoint of it, and a new container of that, in turns; the first round is not counted. Ours is a whole daemon, and the new pod is
made as a kubelet makes one. The peer is what a careful operator would write: `runc checkpoint --leave-running`, `tar | zstd -T0` to where
it is to lie (`dd conv=fsync`, or rclone's multipart upload), and as a stream back into a new sandbox, with `runc restore` at its end. Not
`ctr tasks checkpoint`: containerd writes the image a second time, into its own store, before anybody can upload it.

Both pauses are what the program inside has seen: the longest time that its thread, which wakes every millisecond, did not. A restore is
over with the first beat of the old process, by its own clock; afterwards it looks at all of its memory, and must find what it wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.held import BOUNDARY, LIMIT, Beat, Lines, beats, build, goes_on, insist_whole, pause
from benchmarks.peer import Stores
from benchmarks.tables import spread, table
from hibernode._pb import cri_pb2
from hibernode._pb import hibernode_pb2 as pb
from tests.containers import images
from tests.containers.containerd import CALL_LIMIT, PATH, STATES, Containerd, found
from tests.containers.pods import Container, Mount, Pod
from tests.containers.restoring import FROM, SOCKET, WRAPPER, restores
from tests.daemon import Daemon, ready
from tests.keeper import wait_until
from tests.servers import S3Server

NAME = "containers"
MEASURES = ("pause", "durable", "restore")
_DISK = "/var/tmp"
_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class _Ours:
    store: str
    arena: str = "default"


@dataclass(frozen=True)
class _Runc:
    store: str
    images: str  # where runc's image lies on its way
    level: int = 3  # zstd's own default


VARIANTS: dict[str, _Ours | _Runc] = {
    "ours, directory": _Ours("directory"),
    "ours, all in the arena": _Ours("directory", arena="all"),
    "ours, S3": _Ours("S3"),
    "runc to disk, directory": _Runc("directory", _DISK),
    "runc to tmpfs, directory": _Runc("directory", _MEMORY),
    "runc to tmpfs, zstd -1, directory": _Runc("directory", _MEMORY, level=1),
    "runc to disk, S3": _Runc("S3", _DISK),
}
PEERS = {  # with whom each of ours is compared
    "ours, directory": [name for name, how in VARIANTS.items() if isinstance(how, _Runc) and how.store == "directory"],
    "ours, all in the arena": [name for name, how in VARIANTS.items() if isinstance(how, _Runc) and how.store == "directory"],
    "ours, S3": ["runc to disk, S3"],
}


@dataclass
class Taken:
    """One checkpoint and one restore. Seconds."""

    pause: float = 0.0
    said_pause: float = 0.0  # ours: as the daemon says; the peer's: how long runc's command took
    durable: float = 0.0
    restore: float = 0.0
    sandbox: float = 0.0  # of the restore: until there was a new sandbox
    stored: int = 0  # bytes
    load: float = 0.0  # of the machine, before
    steps: dict[str, float] = field(default_factory=dict)


def measure(*, quick: bool, size: int = 0, rounds: int = 0) -> dict[str, Any]:
    """Every round: variant -> what was taken."""
    size, rounds = size or (256 if quick else 2048), rounds or (2 if quick else 3)
    if size % min(size, BOUNDARY):
        raise SystemExit(f"run: --size: {BOUNDARY} MiB or less, or so many times that")
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    ceilings = list[dict[str, float]]()
    with _bench(size) as bench:
        for turn in range(rounds + 1):
            at = turn % len(VARIANTS)
            for name in [*VARIANTS][at:] + [*VARIANTS][:at]:
                one = bench.once(name, VARIANTS[name])
                print(f"round {turn}: {name}: {_told(one)}", flush=True)
                if turn:  # the first is for the caches
                    taken[name].append(vars(one))
            if turn:
                ceilings.append(bench.ceilings())
        told = {"mebibytes": size, "rounds": rounds, "arena_mebibytes": bench.arena}
    return {**told, "taken": taken, "ratios": _ratios(taken), "ceilings": ceilings}


@contextlib.contextmanager
def _bench(size: int) -> Iterator[_Bench]:
    with contextlib.ExitStack() as stack:
        disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-", dir=_DISK)))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hn-bench-", dir=_MEMORY)))
        (disk / "programs").mkdir()
        build(disk / "programs/held")
        env = {"HIBERNODE_RUNTIME_SOCKET": str(SOCKET), "HIBERNODE_RUNC": str(found("runc"))}
        node = stack.enter_context(Containerd(wrapper=WRAPPER, env=env, wanted=[images.PAUSE, images.COUNTER]))
        server = stack.enter_context(S3Server(disk / "s3"))
        s3 = server.settings().model_dump(exclude_defaults=True)
        s3 = {**s3, "secret_access_key": server.secret_access_key, "part_size": 8 << 20}
        url = f"s3://{server.bucket}/ours"
        arena = {"default": 512, "all": size * 5 // 4 + 64}
        daemons = {}
        for name, mebibytes in arena.items():
            containers = {"cri": node.address, "roots": [str(STATES)], **({"socket": str(SOCKET)} if name == "default" else {})}
            settings = {"containers": containers, "store": {"allowed": [url], "s3": s3}}
            daemon = Daemon(
                store=f"file://{disk}/store", arena=f"{mebibytes}MiB", settings=settings, call_limit=LIMIT, start_limit=LIMIT
            )
            daemons[name] = stack.enter_context(daemon)
        programs = Mount(f"{disk}/programs", "/bench", readonly=True)
        held = Container("app", images.COUNTER, ["/bench/held", str(size)], mounts=[programs])
        pod = stack.enter_context(Pod(node, [held]))
        wait_until(lambda: "ready" in pod.lines(), LIMIT, "the program to fill its memory")
        yield _Bench(disk, memory, node, pod, held, daemons, Stores(disk, server), url, arena)


@dataclass(frozen=True)
class _Bench:
    disk: Path
    memory: Path
    node: Containerd
    pod: Pod
    held: Container
    daemons: Mapping[str, Daemon]
    stores: Stores
    url: str
    arena: Mapping[str, int]  # MiB

    def once(self, name: str, how: _Ours | _Runc) -> Taken:
        os.sync()  # what the one before has left to be written is not to slow this one
        load = os.getloadavg()[0]
        try:
            taken = self._ours(how) if isinstance(how, _Ours) else self._runc(how)
        except Exception as e:
            e.add_note(f"in {name!r}")
            raise
        taken.load = load
        return taken

    # --- ours -----------------------------------------------------------------------------------------------------------------

    def _ours(self, how: _Ours) -> Taken:
        taken, daemon, planted = Taken(), self.daemons[how.arena], beats(self.pod.lines())[-1]
        directory = self.url if how.store == "S3" else ""
        began = time.time()
        event = ready(daemon.checkpoint(pb.Target(pod_id=self.pod.uid), directory=directory))
        taken.durable = time.time() - began
        taken.pause = pause(self.pod.lines, began)
        taken.said_pause, taken.stored = event.profile.pause_ns / 1e9, event.profile.stored_bytes
        taken.steps = {f"checkpoint: {name}": cost.seconds for name, cost in event.profile.phases.items()}
        notes = {FROM: event.checkpoint_id, **({"hibernode.io/store": directory} if directory else {})}
        began = time.time()
        with Pod(self.node, [self.held], handler="hibernode", annotations=notes) as new:
            taken.restore = goes_on(new.lines, planted, began).at / 1e9 - began
            wait_until(lambda: restores(self.daemons["default"])[-1] == "ready", LIMIT, "the restore to be told")
            _look(new.lines, new.pid(), planted)
            actions = self.daemons["default"].stub.ListActions(pb.Empty(), timeout=LIMIT).actions
            last = [action.last for action in actions if action.type == "restore"][-1]
            taken.steps |= {f"restore: {name}": cost.seconds for name, cost in last.profile.phases.items()}
        store = self.stores.place("S3", "ours") if directory else self.disk / "store"
        shutil.rmtree(store / event.checkpoint_id)
        return taken

    # --- the peer -------------------------------------------------------------------------------------------------------------

    def _runc(self, how: _Runc) -> Taken:
        taken, planted = Taken(), beats(self.pod.lines())[-1]
        with tempfile.TemporaryDirectory(dir=self.disk if how.images == _DISK else self.memory) as work:
            image, object_ = Path(work) / "image", f"peer-{uuid.uuid4().hex}.tar.zst"
            words = ["--root", str(STATES), "checkpoint", "--leave-running", "--image-path", str(image), "--work-path", work]
            began = time.time()
            self.stores.run([str(self.node.runc), *words, self.pod.ids["app"]])
            dumped = time.time()
            put = self.stores.put(how.store, object_, Path(work) / "packed")
            self.stores.shell(f"tar -C {image} -cf - . | zstd -q -T0 -{how.level} {put}")
            taken.durable, taken.said_pause = time.time() - began, dumped - began
            taken.steps = {"checkpoint: runc": dumped - began, "checkpoint: tar, zstd, upload": taken.durable - (dumped - began)}
            taken.pause = pause(self.pod.lines, began)
            place = self.stores.place(how.store, object_)
            taken.stored = place.stat().st_size
            shutil.rmtree(image)
            self._bring_back(how, taken, image, object_, planted)
            place.unlink()
        return taken

    def _bring_back(self, how: _Runc, taken: Taken, image: Path, object_: str, planted: Beat) -> None:
        began = time.time()
        with Pod(self.node, []) as new, contextlib.ExitStack() as stack:
            taken.sandbox = time.time() - began
            bundle = stack.enter_context(self._bundle(new))
            image.mkdir()
            fetching = time.time()
            self.stores.shell(f"{self.stores.get(how.store, object_)} | zstd -q -d | tar -C {image} -xf -")
            fetched = time.time()
            runc = [str(self.node.runc), "--root", str(bundle / "runc")]
            words = [*runc, "restore", "--bundle", str(bundle), "--image-path", str(image), "--work-path", str(bundle), "new"]
            lines = stack.enter_context(_lines(words, ending=lambda: self.stores.run([*runc, "delete", "--force", "new"])))
            beat = goes_on(lambda: lines, planted, began)
            taken.restore = beat.at / 1e9 - began
            taken.steps |= {
                "restore: bundle": fetching - began - taken.sandbox,
                "restore: download, zstd, tar": fetched - fetching,
            }
            taken.steps["restore: runc"] = beat.at / 1e9 - fetched
            pid = json.loads((bundle / "runc/new/state.json").read_bytes())["init_process_pid"]
            _look(lambda: lines, pid, planted)

    @contextlib.contextmanager
    def _bundle(self, new: Pod) -> Iterator[Path]:
        """What the old container was made of, in the new sandbox: its own root file system and cgroup."""
        with tempfile.TemporaryDirectory(dir=self.disk) as made:
            bundle = Path(made)
            for name in ("rootfs", "upper", "work"):
                (bundle / name).mkdir()
            old = self.node.home / f"state/io.containerd.runtime.v2.task/k8s.io/{self.pod.ids['app']}"
            spec = json.loads((old / "config.json").read_bytes())
            request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=new.sandbox, verbose=True)
            sandbox = json.loads(self.node.cri.PodSandboxStatus(request, timeout=CALL_LIMIT).info["info"])["pid"]
            for space in spec["linux"]["namespaces"]:
                if space.get("path"):
                    name = {"network": "net"}.get(space["type"], space["type"])
                    space["path"] = f"/proc/{sandbox}/ns/{name}"
            spec["linux"]["cgroupsPath"] = f"{self.node.cgroup}/kubepods/burstable/pod{new.uid}/new"
            spec["root"]["path"] = str(bundle / "rootfs")
            (bundle / "config.json").write_text(json.dumps(spec))
            layers = f"lowerdir={self.node.images[images.COUNTER].rootfs},upperdir={bundle}/upper,workdir={bundle}/work"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, bundle / "rootfs"], check=True)
            try:
                yield bundle
            finally:
                subprocess.run(["umount", bundle / "rootfs"], check=True)

    # --- the machine ----------------------------------------------------------------------------------------------------------

    def ceilings(self) -> dict[str, float]:
        """GB/s of this memory and this disk, in this round: of what the peer has to pack, and of what it has then."""
        with tempfile.TemporaryDirectory(dir=self.memory) as work:
            image, packed, copy = Path(work) / "image", Path(work) / "packed", self.disk / "copy"
            words = ["--root", str(STATES), "checkpoint", "--leave-running", "--image-path", str(image), "--work-path", work]
            self.stores.run([str(self.node.runc), *words, self.pod.ids["app"]])
            raw = sum(path.stat().st_size for path in image.iterdir())
            rates = {}
            for name, line, size in (
                ("zstd -T0 -3", f"tar -C {image} -cf - . | zstd -q -T0 -3 >{packed}", raw),
                ("zstd -T0 -1", f"tar -C {image} -cf - . | zstd -q -T0 -1 >{packed}", raw),
                ("zstd -d", f"zstd -q -d -c {packed} >/dev/null", raw),
                ("disk write", f"dd if={packed} of={copy} bs=4M conv=fsync status=none", 0),
                ("copy of files on tmpfs", f"cat {image}/* >{work}/copy", raw),
            ):
                began = time.time()
                self.stores.shell(line)
                rates[name] = (size or packed.stat().st_size) / (time.time() - began) / 1e9
            copy.unlink()
        return rates


def _look(lines: Lines, pid: int, planted: Beat) -> None:
    """All of its memory is what it was."""
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: beats(lines())[-1].checks > planted.checks, LIMIT, "a look at the memory")
    insist_whole({planted.token: planted}, {beat.token: beat for beat in beats(lines())})


@contextlib.contextmanager
def _lines(words: Sequence[str], *, ending: Callable[[], None]) -> Iterator[list[str]]:
    """What a command says while it runs; `ending` makes it end."""
    process = subprocess.Popen(
        words, env={"PATH": PATH}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = list[str]()
    reader = threading.Thread(target=lambda: lines.extend(line.rstrip("\n") for line in process.stdout or ()), daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        ending()
        process.wait(LIMIT)
        reader.join(LIMIT)
        if process.stdout:
            process.stdout.close()


# --- words ----------------------------------------------------------------------------------------------------------------------


def _ratios(taken: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Ours over the peer's, of each round: ours -> peer -> `pause_ratio`, ... -> list."""

    def of(ours: str, peer: str) -> dict[str, list[float]]:
        pairs = list(zip(taken[ours], taken[peer], strict=True))
        return {f"{each}_ratio": [a[each] / b[each] for a, b in pairs if b[each]] for each in MEASURES}

    return {ours: {peer: of(ours, peer) for peer in peers} for ours, peers in PEERS.items()}


def render(found: Mapping[str, Any]) -> str:
    """Medians, and from the least to the greatest of the rounds; a ratio is of one round."""
    loads = [each["load"] for rounds in found["taken"].values() for each in rounds]
    arenas = ", ".join(f"{name}: {size} MiB" for name, size in found["arena_mebibytes"].items())
    lines = [
        f"{found['mebibytes']} MiB, {found['rounds']} rounds; arenas: {arenas}; load of the machine {spread(loads, '')}",
        "",
    ]
    keys = {"pause": "pause", "as it says itself": "said_pause", "durable": "durable", "restore": "restore"}
    rows = {
        name: [*(spread([each[key] for each in rounds]) for key in keys.values()), f"{_stored(rounds)} MiB"]
        for name, rounds in found["taken"].items()
    }
    lines += table("", [*keys, "stored"], rows)
    rows = {
        f"{ours} / {peer}": [spread(found["ratios"][ours][peer][f"{each}_ratio"], "") for each in MEASURES]
        for ours, peers in PEERS.items()
        for peer in peers
    }
    lines += ["", *table("ratio", [f"{each}_ratio" for each in MEASURES], rows), ""]
    ceilings = found["ceilings"]
    return "\n".join([*lines, *(f"{name}: {spread([each[name] for each in ceilings], ' GB/s')}" for name in ceilings[0])])


def _stored(rounds: Sequence[Mapping[str, Any]]) -> int:
    return int(statistics.median(each["stored"] for each in rounds)) >> 20


def _told(one: Taken) -> str:
    return f"pause {one.pause:.2f} s, durable {one.durable:.2f} s, restore {one.restore:.2f} s, {one.stored >> 20} MiB"
