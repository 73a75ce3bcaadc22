"""Refusals, pure: everything that is wrong is said before anything is frozen, each with a code, the property and both values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from hibernode.config import Config
from hibernode.errors import Corrupt, NoRoom, Refused
from hibernode.model import MAX_STREAMS, PAGE, CheckpointCommand, CriuOpts, HostFacts, Manifest, Overrides
from hibernode.ports import CriuFacts, CriuOptions, Load, ProcessFacts, show_version
from hibernode.transfer import format
from hibernode.transfer.codec import parse_compression

BEST_RATIO = 50  # no memory compresses better in practice: a store with less room than this leaves cannot hold the image

_NO_OPTS = CriuOpts()


@dataclass(frozen=True)
class Options:
    """What the node's configuration and one command's overrides come to."""

    criu: CriuOptions
    compression: str
    level: int | None
    streams: int
    kill: bool
    criu_opts: CriuOpts


def options(overrides: Overrides, config: Config, cpus: int, made_with: CriuOpts = _NO_OPTS) -> Options:
    """Merge: the command's overrides over those a checkpoint was `made_with` over the configuration. Refused names the key."""
    opts = _criu_opts(overrides.criu_opts)
    inherited = made_with.model_dump(include=made_with.model_fields_set - opts.model_fields_set - {"leave_running"})
    opts = opts.model_copy(update=inherited)
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
        ),
        compression=compression,
        level=parse_compression(compression),
        streams=overrides.streams or config.transfer.streams or min(cpus, 8),
        kill=not opts.leave_running,
        criu_opts=opts,
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


def checkpoint(command: CheckpointCommand, processes: Sequence[ProcessFacts], criu: CriuOptions) -> None:
    """Can this workload be dumped at all?"""
    if command.kind != "simple":
        raise Refused(
            "kind",
            f"kind {command.kind!r} needs a container; this is a process",
            prop="kind",
            found=command.kind,
            wanted="simple",
            hint="leave it out",
        )
    for process in processes:
        _process(process, criu)


def _process(process: ProcessFacts, criu: CriuOptions) -> None:
    who = f"process {process.pid} ({process.comm!r})"
    if process.tracer:
        raise Refused(
            "traced", f"{who} is traced by pid {process.tracer}", prop="TracerPid", found=process.tracer, wanted=0,
            hint="detach the debugger or strace; or another CRIU is at work",
        )  # fmt: skip
    for descriptor, what in process.fds:
        if what == "anon_inode:[io_uring]":
            raise Refused(
                "io_uring", f"{who} uses io_uring (descriptor {descriptor})", prop=f"fd {descriptor}", found=what,
                wanted="no io_uring descriptor", hint="CRIU cannot save io_uring; run the workload without it",
            )  # fmt: skip
        if what.startswith("/dev/nvidia"):
            raise Refused(
                "gpu_open", f"{who} has {what} open", prop=f"fd {descriptor}", found=what, wanted="no GPU device",
                hint="this version saves host state only",
            )  # fmt: skip
        if what.startswith(("/dev/pts/", "/dev/tty")):
            raise Refused(
                "terminal", f"{who} holds the terminal {what}", prop=f"fd {descriptor}", found=what, wanted="no terminal",
                hint="start it with `hibernode run`, or under setsid with its output in a file opened for appending",
            )  # fmt: skip
    if process.tcp and criu.tcp == "refuse":
        raise Refused(
            "tcp_established", f"{who} has {len(process.tcp)} established TCP connections", prop="tcp", found=process.tcp[0],
            wanted="none", hint='say {"tcp": "close"} (closed when restored) or {"tcp": "established"} in criu_opts',
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
    if len(manifest.images) != 1:
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
    if criu.version // 100 < made.criu_version // 100:
        raise Refused(
            "criu_too_old", "the checkpoint was made by a newer CRIU", prop="criu", found=str(criu),
            wanted=show_version(made.criu_version),
            hint="`scripts/setup` provides a newer one",
        )  # fmt: skip


def restore_room(manifest: Manifest, work_free: int, load: Load) -> None:
    """An eager restore holds the image's pages once, first on tmpfs and then, page by page, in the tree; and beside them the small images,
    as they are stored and as they are. The index is in memory only, as large as its image can have made it."""
    room = sum((image.pages - image.zero_pages) * PAGE + image.files.size + image.files_bytes for image in manifest.images)
    memory = room + max(format.index_limit(image) for image in manifest.images)  # a claim of ours too: the index is read for it
    for prop, found, need in (("work_dir free bytes", work_free, room), ("memory available", load.memory_available, memory)):
        if found < need:
            raise NoRoom(
                f"the restore needs {need} bytes, {prop} is {found}", hint="free memory, or make the tmpfs of work_dir larger",
                property=prop, found=found, wanted=need,
            )  # fmt: skip


def pids(blockers: Sequence[tuple[int, str]]) -> None:
    """CRIU restores the same pids: they must be free."""
    if blockers:
        pid, holder = blockers[0]
        raise Refused(
            "pid_taken", f"pid {pid} is taken by {holder}", prop="pid", found=f"{pid}: {holder}", wanted="free",
            hint="stop that process, or restore on another node", pids=[pid for pid, _ in blockers][:100],
        )  # fmt: skip
