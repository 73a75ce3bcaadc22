"""Commands about what is in the store."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import click

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli import text
from hibernode.cli.failure import Answered, Unreachable
from hibernode.cli.screen import Bar, Cell, Column, Screen, ago
from hibernode.cli.session import (
    Session,
    checkpoint_argument,
    command,
)


@command("list")
def list_checkpoints(session: Session) -> None:
    """Show the checkpoints in the store, the newest first.

    \b
    Examples:
      hibernode list
      hibernode list --json | jq -r '.checkpoints[] | select(.kind == "simple").checkpoint_id'
    """
    answer: pb.Checkpoints = session.client.ask(session.client.stub.ListCheckpoints, pb.Empty())
    if session.screen.as_json:
        session.screen.document(text.plain(answer))
        return
    bases = any(c.bases for c in answer.checkpoints)
    columns = [
        Column("CHECKPOINT"),
        Column("OF", flexible=True),
        Column("MADE"),
        Column("MEMORY", right=True, keep=5),
        Column("STORED", right=True),
        Column("RATIO", right=True, keep=3),
        *([Column("BASES", right=True, keep=1)] if bases else []),
        Column("PAUSE", right=True, keep=4),
        Column("NODE", keep=2, flexible=True),
        Column("KIND", keep=1),
    ]
    session.screen.table(
        columns,
        [_checkpoint_row(c, bases=bases) for c in sorted(answer.checkpoints, key=lambda c: -c.created_at)],
        empty="no checkpoints yet; make one with: hibernode checkpoint NAME",
    )


def _checkpoint_row(c: pb.Checkpoint, *, bases: bool) -> list[Cell]:
    return [
        c.checkpoint_id,
        text.shown(c.workload.removeprefix("default/")),
        ago(c.created_at),
        text.size(c.raw_bytes),
        text.size(c.stored_bytes),
        text.ratio(c.raw_bytes, c.stored_bytes),
        *([str(len(c.bases) or "")] if bases else []),
        text.pause(c.pause_ns),
        c.node,
        c.kind,
    ]


@command("inspect")
@checkpoint_argument
def inspect(session: Session, checkpoint_id: str) -> None:
    """Show what is in a checkpoint, and what it needs to be restored.

    This reads its manifest only; `verify` reads everything. With --json: the manifest as it is stored, and where it is.

    \b
    Examples:
      hibernode inspect 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10
      hibernode inspect 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10 --json | jq .manifest.host
    """
    request = pb.CheckpointId(checkpoint_id=checkpoint_id)
    reply: pb.InspectReply = session.client.ask(session.client.stub.Inspect, request)
    manifest = json.loads(reply.manifest)
    if session.screen.as_json:
        session.screen.document({"location": reply.location, "manifest": manifest})
        return
    session.screen.fields(_manifest_fields(manifest, reply.location))
    session.screen.say()
    bases = any("bases" in image for image in manifest["images"])
    columns = [
        Column("IMAGE", flexible=True),
        Column("PROCESSES", right=True),
        Column("MEMORY", right=True),
        Column("ZEROS", right=True),
        *([Column("IN BASES", right=True)] if bases else []),
        Column("STREAMS", right=True),
        Column("STORED", right=True),
    ]
    session.screen.table(columns, [_image_row(image, bases=bases) for image in manifest["images"]], empty="no images")


def _manifest_fields(m: Mapping[str, Any], location: str) -> list[tuple[str, Cell]]:
    workload, host, wrapped = m["workload"], m["host"], m.get("encryption")
    version = host["criu_version"]
    smaller = text.ratio(m["raw_bytes"], m["stored_bytes"])
    options = ", ".join(f"{key}={json.dumps(value)}" for key, value in m["criu_opts"].items() if value is not None)
    name = f"{workload['namespace']}/{workload['name']}" if workload["kind"] == "job" else workload["name"]
    bases = sorted({base["checkpoint_id"] for image in m["images"] for base in image.get("bases", ())})
    return [
        ("checkpoint", m["checkpoint_id"]),
        ("of", text.shown(f"{workload['kind']} {name}")),
        ("command", text.shown(" ".join(workload["argv"]))),
        ("made", f"{text.moment(m['created_at'])} ({ago(m['created_at'])}) on {m['node']}"),
        ("where", text.shown(location)),
        ("kind", m["kind"]),
        ("pause", text.pause(m["pause_ns"])),
        ("memory", f"{text.size(m['raw_bytes'])}, of which {text.size(m['zero_bytes'])} are zeros"),
        (
            "stored",
            f"{text.size(m['stored_bytes'])} with {m['compression']}" + (f", {smaller} smaller" if smaller else ""),
        ),
        ("bases", text.shown(", ".join(bases))),
        (
            "made with",
            f"CRIU {version // 10000}.{version // 100 % 100}.{version % 100}, hibernode {host['hibernode'] or '?'}",
        ),
        ("host", text.shown(f"{host['arch']}, Linux {host['kernel']}, {host['cpu_model']}").rstrip(", ")),
        ("encrypted", text.shown(f"{wrapped['cipher']}, data key wrapped by {wrapped['key']}") if wrapped else "no"),
        ("options", options),
        ("format", str(m["format_version"])),
    ]


def _image_row(image: Mapping[str, Any], *, bases: bool) -> list[Cell]:
    stored = sum(stream["size"] for stream in image["streams"]) + image["index"]["size"] + image["files"]["size"]
    return [
        text.shown(image["name"]),
        str(len(image["tasks"])),
        text.size(image["pages"] * 4096),
        text.size(image["zero_pages"] * 4096),
        *([text.size(image.get("referenced", 0) * 4096)] if bases else []),
        str(len(image["streams"])),
        text.size(stored),
    ]


@command("verify")
@checkpoint_argument
def verify(session: Session, checkpoint_id: str) -> None:
    """Read all of a checkpoint and compare every digest.

    The exit code is 0 only if each byte is what was written. Nothing is changed.

    \b
    Examples:
      hibernode verify 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10
    """
    stub = session.client.stub
    replies = session.client.stream(stub.Verify(pb.CheckpointId(checkpoint_id=checkpoint_id)))
    last = _verified(session.screen, replies)
    if last is None:
        raise Unreachable("the daemon stopped telling before the end", hint="try again")
    if not last.ok:
        hint = f"it cannot be restored; `hibernode delete {checkpoint_id}` removes it"
        raise Answered(last.code or "corrupt", last.message or "the stored bytes are not what was written", hint=hint)
    if not session.screen.as_json:
        session.screen.good("every byte is what was written")
        speed = text.rate(last.bytes / last.seconds) if last.seconds else ""
        read = f"{text.size(last.bytes)} in {last.frames} frames"
        session.screen.fields([("read", read), ("took", text.duration(last.seconds)), ("rate", speed)], indent=2)


def _verified(screen: Screen, replies: Iterable[pb.VerifyReply]) -> pb.VerifyReply | None:
    last: pb.VerifyReply | None = None
    if not screen.live:
        for last in replies:
            if screen.as_json:
                screen.record(text.plain(last))
        return last
    with screen.watching() as board:
        board.show("", Bar("", "verifying", None, ()))
        for last in replies:
            speed = text.rate(last.bytes / last.seconds) if last.seconds else ""
            board.show("", Bar("", "verifying", None, (text.size(last.bytes), f"{last.frames} frames", speed)))
    return last


@command("delete")
@checkpoint_argument
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def delete(session: Session, checkpoint_id: str, yes: bool) -> None:
    """Remove a checkpoint from the store, for good.

    \b
    Examples:
      hibernode delete 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10
      hibernode delete 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10 --yes
    """
    if not yes:
        _ask_first(session, checkpoint_id)
    session.client.ask(session.client.stub.DeleteCheckpoint, pb.CheckpointId(checkpoint_id=checkpoint_id))
    if session.screen.as_json:
        session.screen.document({"checkpoint_id": checkpoint_id, "deleted": True})
    else:
        session.screen.good(f"checkpoint {checkpoint_id} is deleted")


def _ask_first(session: Session, checkpoint_id: str) -> None:
    if session.screen.as_json or not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: add --yes")
    if not click.confirm(f"delete checkpoint {checkpoint_id}? it cannot be brought back", err=True):
        _kept()


def _kept() -> NoReturn:
    click.echo("nothing is deleted", err=True)
    raise click.exceptions.Exit(1)
