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
from typing import Any, NamedTuple

from hibernode._pb import cri_pb2
from hibernode._pb import hibernode_pb2 as pb
from tests.containers import images
from tests.containers.containerd import CALL_LIMIT, PATH, STATES, Containerd, found
from tests.containers.pods import Container, Mount, Pod
from tests.containers.restoring import FROM, SOCKET, WRAPPER, restores
from tests.daemon import Daemon, ready
from tests.keeper import wait_until
from tests.servers import S3Server, beside_python

NAME = "containers"
MEASURES = ("pause", "durable", "restore")
_PROGRAM = Path(__file__).parent / "programs" / "held.c"
_DISK = "/var/tmp"
_MEMORY = "/dev/shm"
_LIMIT = 300.0  # seconds for anything
_BOUNDARY = 64  # MiB: what the program holds is so many times this, or less


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


class Beat(NamedTuple):
    token: str
    number: int
    checks: int
    state: str
    at: int  # ns


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
    if size % min(size, _BOUNDARY):
        raise SystemExit(f"run: --size: {_BOUNDARY} MiB or less, or so many times that")
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
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
        subprocess.run(["gcc", *flags, "-o", disk / "programs/held", _PROGRAM, "-lm"], check=True)
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
                store=f"file://{disk}/store", arena=f"{mebibytes}MiB", settings=settings, call_limit=_LIMIT, start_limit=_LIMIT
            )
            daemons[name] = stack.enter_context(daemon)
        programs = Mount(f"{disk}/programs", "/bench", readonly=True)
        held = Container("app", images.COUNTER, ["/bench/held", str(size)], mounts=[programs])
        pod = stack.enter_context(Pod(node, [held]))
        wait_until(lambda: "ready" in pod.lines(), _LIMIT, "the program to fill its memory")
        yield _Bench(disk, memory, node, pod, held, daemons, server, url, arena)


@dataclass(frozen=True)
class _Bench:
    disk: Path
    memory: Path
    node: Containerd
    pod: Pod
    held: Container
    daemons: Mapping[str, Daemon]
    server: S3Server
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
        taken, daemon, planted = Taken(), self.daemons[how.arena], _beats(self.pod.lines())[-1]
        directory = self.url if how.store == "S3" else ""
        began = time.time()
        event = ready(daemon.checkpoint(pb.Target(pod_id=self.pod.uid), directory=directory))
        taken.durable = time.time() - began
        taken.pause = self._pause(began)
        taken.said_pause, taken.stored = event.profile.pause_ns / 1e9, event.profile.stored_bytes
        taken.steps = {f"checkpoint: {name}": cost.seconds for name, cost in event.profile.phases.items()}
        notes = {FROM: event.checkpoint_id, **({"hibernode.io/store": directory} if directory else {})}
        began = time.time()
        with Pod(self.node, [self.held], handler="hibernode", annotations=notes) as new:
            taken.restore = _goes_on(new.lines, planted, began).at / 1e9 - began
            wait_until(lambda: restores(self.daemons["default"])[-1] == "ready", _LIMIT, "the restore to be told")
            self._insist_whole(new.lines, new.pid(), planted)
            actions = self.daemons["default"].stub.ListActions(pb.Empty(), timeout=_LIMIT).actions
            last = [action.last for action in actions if action.type == "restore"][-1]
            taken.steps |= {f"restore: {name}": cost.seconds for name, cost in last.profile.phases.items()}
        store = self.server.root / self.server.bucket / "ours" if directory else self.disk / "store"
        shutil.rmtree(store / event.checkpoint_id)
        return taken

    # --- the peer -------------------------------------------------------------------------------------------------------------

    def _runc(self, how: _Runc) -> Taken:
        taken, planted = Taken(), _beats(self.pod.lines())[-1]
        with tempfile.TemporaryDirectory(dir=self.disk if how.images == _DISK else self.memory) as work:
            image, object_ = Path(work) / "image", f"peer-{uuid.uuid4().hex}.tar.zst"
            words = ["--root", str(STATES), "checkpoint", "--leave-running", "--image-path", str(image), "--work-path", work]
            began = time.time()
            self._run([str(self.node.runc), *words, self.pod.ids["app"]])
            dumped = time.time()
            self._shell(f"tar -C {image} -cf - . | zstd -q -T0 -{how.level} {self._put(how, object_, Path(work) / 'packed')}")
            taken.durable, taken.said_pause = time.time() - began, dumped - began
            taken.steps = {"checkpoint: runc": dumped - began, "checkpoint: tar, zstd, upload": taken.durable - (dumped - began)}
            taken.pause = self._pause(began)
            place = self.server.root / self.server.bucket / object_ if how.store == "S3" else self.disk / object_
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
            self._shell(f"{self._get(how, object_)} | zstd -q -d | tar -C {image} -xf -")
            fetched = time.time()
            runc = [str(self.node.runc), "--root", str(bundle / "runc")]
            words = [*runc, "restore", "--bundle", str(bundle), "--image-path", str(image), "--work-path", str(bundle), "new"]
            lines = stack.enter_context(_lines(words, ending=lambda: self._run([*runc, "delete", "--force", "new"])))
            beat = _goes_on(lambda: lines, planted, began)
            taken.restore = beat.at / 1e9 - began
            taken.steps |= {
                "restore: bundle": fetching - began - taken.sandbox,
                "restore: download, zstd, tar": fetched - fetching,
            }
            taken.steps["restore: runc"] = beat.at / 1e9 - fetched
            pid = json.loads((bundle / "runc/new/state.json").read_bytes())["init_process_pid"]
            self._insist_whole(lambda: lines, pid, planted)

    def _put(self, how: _Runc, name: str, packed: Path) -> str:
        if how.store == "directory":
            return f"| dd of={self.disk}/{name} bs=4M iflag=fullblock conv=fsync status=none"
        # from a file: `rclone rcat`, straight from the pipe, took twice as long
        return f">{packed} && {beside_python('rclone')} copyto {packed} peer:{self.server.bucket}/{name}"

    def _get(self, how: _Runc, name: str) -> str:
        return (
            f"cat {self.disk}/{name}"
            if how.store == "directory"
            else f"{beside_python('rclone')} cat peer:{self.server.bucket}/{name}"
        )

    def _shell(self, line: str) -> None:
        self._run(["bash", "-c", f"set -o pipefail; {line}"])

    def _run(self, words: Sequence[str]) -> None:
        rclone = {
            "TYPE": "s3", "PROVIDER": "Rclone", "ENDPOINT": self.server.endpoint_url, "ACCESS_KEY_ID": self.server.access_key_id,
            "SECRET_ACCESS_KEY": self.server.secret_access_key, "NO_CHECK_BUCKET": "true", "CHUNK_SIZE": "8Mi",
        }  # fmt: skip
        env = {"PATH": PATH, "RCLONE_CONFIG": "", **{f"RCLONE_CONFIG_PEER_{name}": value for name, value in rclone.items()}}
        done = subprocess.run(
            words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

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

    # --- what the program has seen --------------------------------------------------------------------------------------------

    def _pause(self, began: float) -> float:
        """The longest gap since then."""
        now = time.time_ns()
        wait_until(lambda: _beats(self.pod.lines()[-3:])[-1:] and _beats(self.pod.lines()[-3:])[-1].at > now, _LIMIT, "a beat")
        lines = self.pod.lines()
        gaps = [tuple(map(int, line.split()[1:3])) for line in lines if line.startswith("gap ")]
        return max((to - since for since, to in gaps if to > began * 1e9), default=0) / 1e9

    def _insist_whole(self, lines: Callable[[], Sequence[str]], pid: int, planted: Beat) -> None:
        """All of its memory is what it wrote before anything was measured."""
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: _beats(lines())[-1].checks > planted.checks, _LIMIT, "a look at the memory")
        last = _beats(lines())[-1]
        if (last.state, last.token) != ("whole", planted.token):
            raise RuntimeError(f"not what it was: {planted}, {last}")

    # --- the machine ----------------------------------------------------------------------------------------------------------

    def ceilings(self) -> dict[str, float]:
        """GB/s of this memory and this disk, in this round: of what the peer has to pack, and of what it has then."""
        with tempfile.TemporaryDirectory(dir=self.memory) as work:
            image, packed, copy = Path(work) / "image", Path(work) / "packed", self.disk / "copy"
            words = ["--root", str(STATES), "checkpoint", "--leave-running", "--image-path", str(image), "--work-path", work]
            self._run([str(self.node.runc), *words, self.pod.ids["app"]])
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
                self._shell(line)
                rates[name] = (size or packed.stat().st_size) / (time.time() - began) / 1e9
            copy.unlink()
        return rates


def _beats(lines: Sequence[str]) -> list[Beat]:
    words = [line.split() for line in lines if line.startswith("beat ")]
    return [Beat(word[1], int(word[2]), int(word[3]), word[4], int(word[5])) for word in words if len(word) == 6]


def _goes_on(lines: Callable[[], Sequence[str]], planted: Beat, began: float) -> Beat:
    """The first beat of what was restored: of the process that had that beat before its checkpoint, or this is no restore."""
    wait_until(lambda: _beats(lines()), _LIMIT, "a beat of what was restored")
    first = _beats(lines())[0]
    if first.at < began * 1e9:
        raise RuntimeError(f"a beat of before its restore: {first}")
    if first.token != planted.token or first.number <= planted.number:
        raise RuntimeError(f"another process: {planted}, {first}")
    return first


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
        process.wait(_LIMIT)
        reader.join(_LIMIT)
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
        f"{found['mebibytes']} MiB, {found['rounds']} rounds; arenas: {arenas}; load of the machine {_spread(loads, '')}",
        "",
    ]
    keys = {"pause": "pause", "as it says itself": "said_pause", "durable": "durable", "restore": "restore"}
    rows = {
        name: [*(_spread([each[key] for each in rounds]) for key in keys.values()), f"{_stored(rounds)} MiB"]
        for name, rounds in found["taken"].items()
    }
    lines += _table("", [*keys, "stored"], rows)
    rows = {
        f"{ours} / {peer}": [_spread(found["ratios"][ours][peer][f"{each}_ratio"], "") for each in MEASURES]
        for ours, peers in PEERS.items()
        for peer in peers
    }
    lines += ["", *_table("ratio", [f"{each}_ratio" for each in MEASURES], rows), ""]
    ceilings = found["ceilings"]
    return "\n".join([*lines, *(f"{name}: {_spread([each[name] for each in ceilings], ' GB/s')}" for name in ceilings[0])])


def _table(name: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    wide = max(map(len, rows))
    lines = [
        f"| {name:{wide}} |" + "".join(f" {head:>20} |" for head in heads),
        f"|{'-' * (wide + 2)}|" + f"{'-' * 22}|" * len(heads),
    ]
    return lines + [f"| {row:{wide}} |" + "".join(f" {cell:>20} |" for cell in cells) for row, cells in rows.items()]


def _stored(rounds: Sequence[Mapping[str, Any]]) -> int:
    return int(statistics.median(each["stored"] for each in rounds)) >> 20


def _spread(values: Sequence[float], unit: str = " s") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f}-{max(values):.2f})" if values else "-"


def _told(one: Taken) -> str:
    return f"pause {one.pause:.2f} s, durable {one.durable:.2f} s, restore {one.restore:.2f} s, {one.stored >> 20} MiB"
