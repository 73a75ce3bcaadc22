"""Refusals, pure: everything that is wrong is said before anything is frozen, each with a code, the property and both values."""

from __future__ import annotations

import ipaddress
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from hibernode.config import Config
from hibernode.errors import Corrupt, NoRoom, Refused
from hibernode.model import (
    MAX_STREAMS,
    PAGE,
    CheckpointCommand,
    CriuOpts,
    Gpu,
    GpuCard,
    GpuImage,
    GpuInventory,
    GpuProcess,
    HostFacts,
    Manifest,
    Overrides,
    WorkloadFacts,
    WorkloadKind,
    lacking,
)
from hibernode.ports import CriuFacts, CriuOptions, Load, ProcessFacts, show_version
from hibernode.transfer import format
from hibernode.transfer.codec import Level, parse_compression

REMAPS = 13  # of CUDA: its driver (580) can bring state back onto another GPU
BEST_RATIO = 50  # no memory compresses better in practice: a store with less room than this leaves cannot hold the image

WORK_ROOM = "work_dir free bytes"  # as an error has it
_NO_OPTS = CriuOpts()
_TAKEN = frozenset({"attempt", "manifest.json", "removing", "unwanted"})  # by objects beside the folders of containers (gc.py)
_ONCE = {"leave_running", "increment", "restore"}  # keys of criu_opts that are of one command alone: no checkpoint keeps them


@dataclass(frozen=True)
class Options:
    """What the node's configuration and one command's overrides come to."""

    criu: CriuOptions
    compression: str
    level: Level
    streams: int
    kill: bool
    criu_opts: CriuOpts
    increment: str = ""  # as `CriuOpts` has it; empty: not said


def options(overrides: Overrides, config: Config, cpus: int, made_with: CriuOpts | None = None) -> Options:
    """Merge: the command's overrides over those a checkpoint was `made_with` over the configuration. Refused names the key."""
    opts = _criu_opts(overrides.criu_opts)
    if opts.increment and made_with is not None:
        raise Refused(
            "criu_opts", "criu_opts: increment is of a checkpoint, not of a restore", prop="criu_opts.increment", found=opts.increment,
            wanted="not there", hint="leave it out: what a checkpoint refers to is read with it",
        )  # fmt: skip
    made_with = made_with or _NO_OPTS
    inherited = made_with.model_dump(include=made_with.model_fields_set - opts.model_fields_set - _ONCE)
    increment, restoring = opts.increment or "", opts.restore
    opts = opts.model_copy(update={**inherited, **dict.fromkeys(_ONCE - {"leave_running"})})  # older readers do not know them
    opts = opts.model_copy(update={"tcp": opts.tcp or config.criu.tcp})  # in the manifest, too: a restore needs the same
    compression = overrides.compression or config.transfer.compression
    if not 0 <= overrides.streams <= MAX_STREAMS:
        raise Refused(
            "streams", f"streams: {overrides.streams} is out of range", prop="streams", found=overrides.streams,
            wanted=f"1 to {MAX_STREAMS}", hint="leave it out, or say 0, for as many as the node thinks good",
        )  # fmt: skip
    return Options(
        criu=CriuOptions(
            leave_stopped=not opts.leave_running,
            tcp=opts.tcp or "refuse",
            shell_job=opts.shell_job,
            ext_unix_sk=opts.ext_unix_sk,
            file_locks=opts.file_locks,
            link_remap=opts.link_remap,
            ghost_limit=config.criu.ghost_limit if opts.ghost_limit is None else opts.ghost_limit,
            timeout=opts.timeout or config.criu.timeout,
            log_level=config.criu.log_level,
            lazy=restoring == "lazy",
        ),
        compression=compression,
        level=parse_compression(compression),
        streams=overrides.streams or config.transfer.streams or min(cpus, 8),
        kill=not opts.leave_running,
        criu_opts=opts,
        increment=increment,
    )


def _criu_opts(text: str) -> CriuOpts:
    try:
        return CriuOpts.model_validate_json(text) if text else CriuOpts()
    except ValidationError as e:
        first = e.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        known = key in CriuOpts.model_fields  # else nobody knows what it is: it may be secret
        raise Refused(
            "criu_opts",
            f"criu_opts: {key or 'the text'}: {first['msg'].lower()}",
            prop=f"criu_opts.{key}" if key else "criu_opts",
            found=json.dumps(first.get("input"), default=str)[:200] if known else key or "no JSON object",
            wanted="one of " + ", ".join(CriuOpts.model_fields),
            hint='a JSON object in a string, for example {"tcp": "close", "leave_running": false}',
        ) from None


def expired(command_expires_at: float, now: float) -> None:
    if command_expires_at and now > command_expires_at:
        raise Refused(
            "expired", "the command came too late", prop="expires_at", found=now, wanted=f"before {command_expires_at}",
            hint="give it again; is the clock of this node right?",
        )  # fmt: skip


def checkpoint(
    command: CheckpointCommand,
    facts: WorkloadFacts,
    processes: Sequence[ProcessFacts],
    criu: CriuOptions,
    *,
    endable: bool = True,
) -> None:
    """Can this workload be dumped at all, and killed, if it is to be? `endable`: as Workload has it."""
    if criu.lazy:
        raise Refused(
            "criu_opts", "criu_opts: restore: how a checkpoint is restored is said when it is", prop="criu_opts.restore", found="lazy",
            wanted="nothing, in the command of a checkpoint", hint="say it in the command of the restore",
        )  # fmt: skip
    if criu.leave_stopped and not endable:
        raise Refused(
            "kubelet", f"{facts.namespace}/{facts.name} is a pod of Kubernetes, and this node cannot delete it: what is killed in it is "
            "started anew", prop="criu_opts.leave_running", found=False, wanted=True,
            hint="set [kubernetes] so that the daemon can delete it; or leave this out, and delete it when its checkpoint is ready. "
            "A static pod ends when its manifest is taken away",
        )  # fmt: skip
    if command.kind != "simple" and not facts.contained:
        raise Refused(
            "kind",
            f"kind {command.kind!r} needs a container; this is a process",
            prop="kind",
            found=command.kind,
            wanted="simple",
            hint="leave it out",
        )
    for name in sorted({facts.name if facts.kind == "container" else "", *(each.name for each in facts.containers)} & _TAKEN):
        raise Refused(
            "container_name", f"what is stored of container {name!r} would lie where a checkpoint has a mark", prop="container",
            found=name, wanted=f"another name than {', '.join(sorted(_TAKEN))}", hint="rename it",
        )  # fmt: skip
    if criu.link_remap and (facts.contained or not criu.leave_stopped):  # criu/cr-dump.c: delete_link_remaps
        raise Refused(
            "link_remap", "CRIU takes away the names that it gives to deleted files where a workload runs on after its dump, and a restore "
            "would miss them", prop="criu_opts.link_remap", found=True, wanted="a process that is killed by its checkpoint",
            hint="leave it out; or say leave_running: false",
        )  # fmt: skip
    for process in processes:
        _process(process, facts.kind, criu)
    if criu.tcp == "established":
        _own_network(processes)
    if facts.contained and criu.tcp == "established":
        _both_ends(processes)


def whole(lacking: Sequence[ProcessFacts]) -> None:
    """Nobody may be `lacking` pages."""
    for process in lacking:
        raise Refused(
            "filling", f"pages of process {process.pid} ({process.comm!r}) are still missing: its tree is being restored lazily",
            prop=f"memory of pid {process.pid}", found="userfaultfd, missing pages", wanted="all pages",
            hint="wait until that restore is `ready`",
        )  # fmt: skip


def _process(process: ProcessFacts, kind: WorkloadKind, criu: CriuOptions) -> None:
    who = f"process {process.pid} ({process.comm!r})"
    if process.tracer:
        raise Refused(
            "traced", f"{who} is traced by pid {process.tracer}", prop="TracerPid", found=process.tracer, wanted=0,
            hint="detach the debugger or strace; or another CRIU is at work",
        )  # fmt: skip
    if not process.limits:
        raise Refused(
            "cap_sys_resource", f"{who} is not root's, and CRIU may not read its limits here", prop="uids and gids",
            found=sorted(process.ids - {0}), wanted="0, or CAP_SYS_RESOURCE",
            hint="give the daemon CAP_SYS_RESOURCE: `hibernode doctor` shows what it has",
        )  # fmt: skip
    for descriptor, what in process.fds:
        if what == "anon_inode:[io_uring]":
            raise Refused(
                "io_uring", f"{who} uses io_uring (descriptor {descriptor})", prop=f"fd {descriptor}", found=what,
                wanted="no io_uring descriptor", hint="CRIU cannot save io_uring; run the workload without it",
            )  # fmt: skip
        if what.startswith(("/dev/pts/", "/dev/tty")) and kind in ("process", "job"):  # of a container runc brings it back
            raise Refused(
                "terminal", f"{who} holds the terminal {what}", prop=f"fd {descriptor}", found=what, wanted="no terminal",
                hint="start it with `hibernode run`, or under setsid with its output in a file opened for appending",
            )  # fmt: skip
    if process.tcp and criu.tcp == "refuse":
        raise Refused(
            "tcp_established", f"{who} has {len(process.tcp)} established TCP connections", prop="tcp", found=process.tcp[0],
            wanted="none", hint='say {"tcp": "close"} (closed when restored) or {"tcp": "established"} in criu_opts',
        )  # fmt: skip


def _own_network(processes: Sequence[ProcessFacts]) -> None:
    """CRIU closes the network namespace of what it dumps, whether there are connections or not, unless it is its own."""
    for process in processes:
        if process.nodes_network:
            raise Refused(
                "host_network", f"process {process.pid} ({process.comm!r}) is in the network of the node and the daemon in another: CRIU "
                "would close all of the node's meanwhile", prop="network", found="the node's", wanted="the pod's own",
                hint='its connections can be closed, {"tcp": "close"} in criu_opts, or kept by a daemon that is in the same network',
            )  # fmt: skip


def _both_ends(processes: Sequence[ProcessFacts]) -> None:
    """A connection within a pod is kept if both of its ends are in one image. Containers are restored one after the other, each runs from
    then on, and the kernel answers for the end that is not there yet: the connection is over."""
    ends: dict[str, set[str]] = {}  # whose each connection is
    for process in processes:
        for connection in process.tcp:
            ends.setdefault(connection, set()).add(process.image)
    for process in processes:
        for connection in process.tcp:
            own, _, other = connection.partition(" -> ")
            inside = ipaddress.ip_address(own.rpartition(":")[0].strip("[]")).is_loopback
            there = ends.get(f"{other} -> {own}", set())
            beside = sorted(there - {process.image})
            if beside or (inside and process.image not in there):
                raise Refused(
                    "tcp_peer", f"process {process.pid} of container {process.image!r} is connected to another container", prop="tcp",
                    found=connection + (f" in {beside[0]!r}" if beside else ""), wanted="both ends in one container",
                    hint='a connection is kept within one container, or with the world outside: say {"tcp": "close"} in criu_opts',
                )  # fmt: skip


def room(rss: int, store_free: int | None, work_free: int) -> None:
    """Refuse what certainly does not fit; what may fit is tried, and a full disk later leaves the workload as it was."""
    if store_free is not None and store_free < rss // BEST_RATIO:
        raise NoRoom(
            "the store has too little room", hint="free some, or delete old checkpoints", property="store free bytes",
            found=store_free, wanted=rss // BEST_RATIO,
        )  # fmt: skip
    if work_free < 16 << 20:
        raise NoRoom(
            "the work directory has too little room", hint="`work_dir` should be on tmpfs", property="work_dir free bytes",
            found=work_free, wanted=16 << 20,
        )  # fmt: skip


def restore(manifest: Manifest, here: HostFacts, criu: CriuFacts) -> None:
    """Does this image fit this machine?"""
    made = manifest.host
    one = manifest.workload.kind != "pod"
    if manifest.layers and not manifest.workload.contained:
        raise Corrupt(f"a {manifest.workload.kind} has no writable layer, the manifest names {len(manifest.layers)}")
    if manifest.kind != "rootfsonly" and (not manifest.images or (one and len(manifest.images) != 1)):
        raise Corrupt(f"a {manifest.workload.kind} has one image, the manifest names {len(manifest.images)}")
    for code, prop, found, wanted in (
        ("arch", "arch", here.arch, made.arch),
        ("page_size", "page_size", here.page_size, made.page_size),
        ("page_size", "page_size", made.page_size, PAGE),
    ):
        if found != wanted:
            raise Refused(
                code, f"the checkpoint was made with {prop} {wanted}, here it is {found}", prop=prop, found=found, wanted=wanted,
                hint="restore it on a machine of the same kind",
            )  # fmt: skip
    if missing := lacking(made.cpu_flags, here.cpu_flags):
        names = ", ".join(missing[:100])  # of a manifest: there may be any number
        raise Refused(
            "cpu_features", f"this CPU lacks what the checkpoint's processes may use: {names}", prop="CPU flags",
            found=f"{here.cpu_model or 'unknown CPU'}, without {names}", wanted=f"{made.cpu_model or 'unknown CPU'}, with {names}",
            hint="restore it on a node whose CPU has them all: of the same generation, or newer", missing=missing[:100],
        )  # fmt: skip
    if criu.version // 100 < made.criu_version // 100:
        raise Refused(
            "criu_too_old", "the checkpoint was made by a newer CRIU", prop="criu", found=str(criu),
            wanted=show_version(made.criu_version),
            hint="`scripts/setup` provides a newer one",
        )  # fmt: skip


def lazy(manifest: Manifest, *, allowed: bool) -> None:
    """Can this checkpoint be restored before its pages are there, and may it be on this node?"""
    if not allowed:
        raise Refused(
            "lazy_off", "this node does not restore lazily", prop="criu.lazy", found=False, wanted=True,
            hint="leave it out; or `lazy = true` in [criu], which is the default",
        )  # fmt: skip
    if manifest.workload.contained or manifest.layers:
        raise Refused(
            "lazy_kind", f"a {manifest.workload.kind} cannot be restored lazily", prop="criu_opts.restore", found="lazy", wanted="eager",
            hint="processes and jobs can; leave it out",
        )  # fmt: skip
    if manifest.gpu is not None:
        raise Refused(
            "lazy_gpu", "a workload with state on GPUs cannot be restored lazily: the driver reads all of it at once",
            prop="criu_opts.restore", found="lazy", wanted="eager", hint="leave it out",
        )  # fmt: skip


def restore_room(manifest: Manifest, work_free: int, load: Load, *, filled: bool = False) -> None:
    """A restore holds the image's pages once, first on tmpfs and then, page by page, in the tree; and beside them the small images, as
    they are stored and as they are. The index is in memory only, as large as its image can have made it. Of one that is `filled` most
    pages are never on tmpfs; which, only the index knows."""
    memory = sum((image.pages - image.zero_pages) * PAGE + image.files.size + image.files_bytes for image in manifest.images)
    room = sum(image.files.size + image.files_bytes for image in manifest.images) if filled else memory  # and see `fetch.Supply`
    parts = (*manifest.parts, *manifest.bases)
    memory += max(format.index_limit(part) for part in parts)  # a claim of ours too: the index is read for it
    for prop, found, need in ((WORK_ROOM, work_free, room), ("memory available", load.memory_available, memory)):
        insist_room(prop, found, need)


def insist_room(prop: str, found: int, need: int) -> None:
    if found < need:
        raise NoRoom(
            f"the restore needs {need} bytes, {prop} is {found}", hint="free memory, or make the tmpfs of work_dir larger",
            property=prop, found=found, wanted=need,
        )  # fmt: skip


def gpu_memory(image: GpuImage, here: GpuInventory, room: int) -> int:
    """Bytes that the workload's processes will have of their own when they are suspended, as they have them on GPUs now. Refused if their
    cgroups, or the machine, have not `room` for that: the kernel would kill them, and all would be lost. Where NVML does not say what one
    has, it may have all that is used."""
    known = all(process.gpus for process in image.processes)
    size = image.memory if known else sum(gpu.memory_used or 0 for gpu in here.gpus)
    needed = size * 11 // 10  # a tenth for the driver's own (gpu.md, section 8)
    if needed > room:
        raise Refused(
            "host_memory", "there is too little memory for what the workload has on GPUs", prop="memory available", found=room,
            wanted=needed, hint="free memory, or raise the limit of its cgroup; or have the workload empty its caches first",
        )  # fmt: skip
    return size


def gpu_image(pids: Sequence[int], here: GpuInventory, users: Mapping[int, Mapping[str, int]]) -> GpuImage:
    """What a restore will compare. Refused if the machine cannot say what it has: what nobody can compare, nobody can restore."""
    cards = [_card(gpu) for gpu in here.gpus]
    if here.state != "ok" or not here.driver or None in cards:
        raise Refused(
            "gpu_inventory", "it is not known which GPUs this node has", prop="NVML", found=here.reason or "a GPU without its facts",
            wanted="driver, and of every GPU UUID, name, compute capability and memory", hint="`hibernode doctor` says more",
        )  # fmt: skip
    used = {uuid for pid in pids for uuid in users.get(pid, {})}
    for gpu in here.gpus:
        for code, mode, on in (("gpu_mig", "MIG", gpu.mig), ("gpu_mps", "MPS", gpu.mps_processes)):
            if on and (gpu.uuid in used or not used):
                raise Refused(
                    code, f"GPU {gpu.index} ({gpu.name}) is used through {mode}, which the driver cannot save", prop=mode, found="on",
                    wanted="off", hint=f"run the workload on a GPU without {mode}",
                )  # fmt: skip
    processes = [GpuProcess(pid=pid, gpus=dict(users.get(pid, {}))) for pid in pids]
    return GpuImage(driver=here.driver, cards=[card for card in cards if card], processes=processes)


def gpu_workload(workload: WorkloadFacts, design: str) -> None:
    """CRIU seizes the processes of a container while its cgroup is frozen, and waits for ever for one that was stopped before."""
    if workload.contained and design == "stop":
        raise Refused(
            "gpu_design", f"a process of this {workload.kind} uses a GPU, and cannot be saved while it stands still", prop="gpu.design",
            found=design, wanted="lock", hint='say `design = "lock"` in [gpu]',
        )  # fmt: skip


def _card(gpu: Gpu) -> GpuCard | None:
    if not gpu.uuid.startswith("GPU-") or not gpu.name or gpu.memory_total is None:
        return None
    return GpuCard(uuid=gpu.uuid, name=gpu.name, compute_capability=gpu.compute_capability, memory_total=gpu.memory_total)


def gpu_places(image: GpuImage, here: GpuInventory) -> list[dict[str, str]]:
    """Which GPU takes the place of which: the same where it is here, else one of the same kind. Maps to be tried, none where all are the
    same: the driver wants every GPU named that the process could see, and nobody can tell which these were; so first all for which
    there is a place, then those that were used. Refused if the driver is another, or a used one has no place."""
    if image.driver != here.driver:
        raise Refused(
            "gpu_driver_mismatch", "the checkpoint was made with another driver", prop="NVIDIA driver", found=here.driver or "none",
            wanted=image.driver, hint="restore it on a node with the same driver",
        )  # fmt: skip
    used = {uuid for process in image.processes for uuid in process.gpus} or {card.uuid for card in image.cards}
    cards = sorted(image.cards, key=lambda card: card.uuid not in used)
    free = {card.uuid: card for gpu in here.gpus if (card := _card(gpu))}
    places = {card.uuid: card.uuid for card in cards if card.uuid in used and free.pop(card.uuid, None) is not None}
    for card in cards:
        if card.uuid in places:
            continue
        same = card.uuid if card.uuid in free else next((uuid for uuid, other in free.items() if _kind(other) == _kind(card)), "")
        if same:
            places[card.uuid] = same
            del free[same]
        elif card.uuid in used:
            raise Refused(
                "gpu_model", f"there is no GPU here for {card.name} {card.uuid}", prop="GPU",
                found=", ".join(f"{gpu.name} {gpu.compute_capability} of {gpu.memory_total} bytes" for gpu in here.gpus) or "none",
                wanted=f"{card.name} {card.compute_capability} of {card.memory_total} bytes",
                hint="restore it on a node with the same GPUs",
            )  # fmt: skip
    if all(places[uuid] == uuid for uuid in used):
        return []
    if int(here.cuda.partition(".")[0] or 0) < REMAPS:
        raise Refused(
            "gpu_driver_too_old", "this driver cannot bring state back onto another GPU", prop="CUDA", found=here.cuda,
            wanted=f"{REMAPS}.0", hint="driver 580 can; or restore it where it was",
        )  # fmt: skip
    return [places, *([alone] if (alone := {uuid: places[uuid] for uuid in used}) != places else [])]


def gpu_room(image: GpuImage, places: Sequence[Mapping[str, str]], here: GpuInventory) -> None:
    """A restore that finds too little device memory cannot be repeated (gpu.md, section 2), so it is not begun."""
    free = {gpu.uuid: gpu.memory_free for gpu in here.gpus}
    needed = defaultdict[str, int](int)
    for process in image.processes:
        for uuid, size in process.gpus.items():
            needed[places[0].get(uuid, uuid) if places else uuid] += size
    for uuid, size in needed.items():
        if (found := free.get(uuid)) is not None and found < size:
            raise Refused(
                "vram", f"GPU {uuid} has too little memory free", prop="GPU memory free", found=found, wanted=size,
                hint="end what else uses it, or restore on another node",
            )  # fmt: skip


def _kind(card: GpuCard) -> tuple[str, str, int]:
    return card.name, card.compute_capability, card.memory_total


def pids(blockers: Sequence[tuple[int, str]]) -> None:
    """CRIU restores the same pids: they must be free."""
    if blockers:
        pid, holder = blockers[0]
        raise Refused(
            "pid_taken", f"pid {pid} is taken by {holder}", prop="pid", found=f"{pid}: {holder}", wanted="free",
            hint="stop that process, or restore on another node", pids=[pid for pid, _ in blockers][:100],
        )  # fmt: skip
