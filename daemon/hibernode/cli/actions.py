"""Commands that begin, follow and end actions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping

import click

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli import text
from hibernode.cli.failure import Answered, Unreachable
from hibernode.cli.follow import TERMINAL, costs, failure_of, follow
from hibernode.cli.screen import Cell, Column, Screen, ago, status
from hibernode.cli.session import (
    Session,
    checkpoint_argument,
    command,
    completing,
    known_actions,
    known_jobs,
    namespace_option,
    split_name,
)

SHOWN_ACTIONS = 20  # of those that have ended, in `status`

directory_option = click.option("--directory", default="", metavar="URL", help="Another store: file:///... or s3://...")
criu_option = click.option("--criu-opts", default="", metavar="JSON", help='CRIU options, e.g. \'{"tcp": "close"}\'.')
wait_option = click.option("--wait/--no-wait", default=True, help="Wait for the end (the default), or only for the start.")


@command("checkpoint")
@click.argument("name", default="", metavar="[NAME]", shell_complete=completing(known_jobs))
@click.option("--pod", default="", metavar="UID", help="A pod, by its UID, instead.")
@click.option("--container", default="", metavar="ID", help="A single container, by the id that runc has for it, instead.")
@click.option("--pid", type=click.IntRange(1), metavar="PID", help="A process and its children, instead.")
@namespace_option
@click.option("--kill", is_flag=True, help="End it when its checkpoint is stored and verified.")
@click.option("--async", "asynchronous", is_flag=True, help="Free the slot of this action once all is captured.")
@click.option("--kind", type=click.Choice(["simple", "rootfs", "rootfsonly"]), default="simple", show_default=True)
@click.option("--compression", default="", metavar="HOW", help="zstd, zstd:LEVEL, lz4 or none; else as configured.")
@click.option("--streams", default=0, type=click.IntRange(0, 64), metavar="N", help="Parallel streams; 0 = as configured.")
@directory_option
@criu_option
@click.option(
    "--increment", is_flag=False, flag_value="auto", default="", metavar="[ID]",
    help="Store only pages that an earlier checkpoint of it has not: the last one, or ID.",
)  # fmt: skip
@click.option("--checkpoint-id", type=click.UUID, help="Its id, if you want to choose it.")
@wait_option
def checkpoint(
    session: Session,
    name: str,
    pod: str,
    container: str,
    pid: int | None,
    namespace: str,
    kill: bool,
    asynchronous: bool,
    kind: str,
    compression: str,
    streams: int,
    directory: str,
    criu_opts: str,
    increment: str,
    checkpoint_id: uuid.UUID | None,
    wait: bool,
) -> None:
    """Store a running job, pod, container or process, and let it go on.

    NAME is a job's or, where no job is called so, a pod's; of another namespace than `default` it is NAMESPACE/NAME.

    It pauses while its memory is captured, and goes on; then its memory is compressed, stored and checked. The
    command ends when the checkpoint can be restored. Ctrl-C ends the watching only, not the checkpoint.

    \b
    Examples:
      hibernode checkpoint trainer
      hibernode checkpoint trainer --kill              make room for something else
      hibernode checkpoint team-a/web-0                a pod: all its containers at one moment
      hibernode checkpoint --container 3f0c1c          one container, of a pod or of none
      hibernode checkpoint --pid 4242 --compression zstd:9
      hibernode checkpoint trainer --increment         again and again: the first is a full one
      hibernode checkpoint trainer --no-wait --json | jq -r .action_id
    """
    chosen = ({"leave_running": ("--kill", False)} if kill else {}) | (
        {"increment": ("--increment", increment)} if increment else {}
    )
    command = pb.CheckpointCommand(
        action_id=str(uuid.uuid4()),
        checkpoint_id=str(checkpoint_id or uuid.uuid4()),
        target=_target(name, pod, container, pid, namespace),
        kind=kind,
        reason="manual",
        overrides=pb.Overrides(
            asynchronous=asynchronous,
            compression=compression,
            criu_opts=_criu_opts(criu_opts, chosen),
            directory=directory,
            streams=streams,
        ),
    )
    _act(session, command, wait=wait, what=f"checkpoint of {name or pod or container or f'pid {pid}'}")


def _target(name: str, pod: str, container: str, pid: int | None, namespace: str) -> pb.Target:
    if sum(map(bool, (name, pod, container, pid))) != 1:
        raise click.UsageError("give one of: NAME of a job or pod, --pod UID, --container ID, --pid PID")
    if name:
        space, job = split_name(name, namespace)
        return pb.Target(namespace=space, pod_name=job)
    if namespace:
        raise click.UsageError("--namespace goes with a NAME")
    return pb.Target(pod_id=pod, container=container, pid=pid or 0)


@command("restore")
@checkpoint_argument
@click.option("--name", default="", help="What to call the job; as before, if not given.")
@directory_option
@click.option("--lazy", is_flag=True, help="Let it run at once; its memory comes while it runs.")
@criu_option
@wait_option
def restore(session: Session, checkpoint_id: str, name: str, directory: str, lazy: bool, criu_opts: str, wait: bool) -> None:
    """Bring back what a checkpoint holds, as it was.

    It runs on from the moment it was captured. Whatever does not fit (an image that is damaged, pids that are taken,
    too little memory) is refused before anything is touched. The checkpoint stays; it can be restored again.

    With --lazy a process or a job runs in a fraction of a second, whatever its size: what it touches is fetched first, the rest in
    the background, and the restore is `ready` when all of it is there. Until then it hangs on the store: should the store, the
    daemon or the restore end before that, it is killed. See "Lazy restores" in docs/operations.md.

    A pod comes back by making one: with the runtime class `hibernode` and the annotation `hibernode.io/restore-from`.

    \b
    Examples:
      hibernode restore 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10
      hibernode restore 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10 --name trainer-2
      hibernode restore 6f0c2a1e-58d1-4c5e-9d4f-0a4b6c2d7e10 --lazy
    """
    command = pb.RestoreCommand(
        action_id=str(uuid.uuid4()),
        checkpoint_id=checkpoint_id,
        reason="manual",
        overrides=pb.Overrides(
            criu_opts=_criu_opts(criu_opts, {"restore": ("--lazy", "lazy")} if lazy else None), directory=directory, pod_name=name
        ),
    )
    _act(session, command, wait=wait, what=f"restore of {checkpoint_id}")


def _act(session: Session, command: pb.CheckpointCommand | pb.RestoreCommand, *, wait: bool, what: str) -> None:
    """File a command, and see it through if so asked."""
    screen = session.screen
    session.action_id = command.action_id
    updates = session.client.submit(command)
    ids: list[tuple[str, Cell]] = [("action", command.action_id), ("checkpoint", command.checkpoint_id)]
    if not wait:
        if screen.as_json:
            screen.document({"action_id": command.action_id, "checkpoint_id": command.checkpoint_id})
        else:
            screen.good(f"{what} is accepted")
            screen.fields(ids, indent=2)
            screen.say(("  watch it:  ", "dim"), f"hibernode watch {command.action_id}")
        return
    if not screen.as_json:
        screen.say(what)
        screen.fields(ids, indent=2)
    _see_through(session, updates)


def _see_through(session: Session, updates: Iterable[pb.Update]) -> None:
    """Follow one action to its end; a failed one is an error of this command."""
    try:
        last = follow(session.screen, updates)
    except Unreachable as e:
        again = f"the action is in its journal: hibernode status {session.action_id}"
        raise Unreachable(e.message, hint=again) from e
    if last is None:
        raise Unreachable("the daemon stopped telling before the end", hint=f"hibernode status {session.action_id}")
    if last.status == "error":
        raise failure_of(last)
    if not session.screen.as_json:
        _report(session.screen, last)


def _report(screen: Screen, event: pb.Event) -> None:
    screen.good(f"{event.type} is ready" if event.type == "checkpoint" else "it runs again")
    screen.fields(costs(event.profile), indent=2)
    if event.type == "checkpoint":
        screen.say(("  bring it back:  ", "dim"), f"hibernode restore {event.checkpoint_id}")


@command("status")
@click.argument("action_id", default="", metavar="[ACTION_ID]", shell_complete=completing(known_actions))
@click.option("--all", "everything", is_flag=True, help="All that this node remembers, not only the latest.")
def show_status(session: Session, action_id: str, everything: bool) -> None:
    """Show what is being done, and what was done lately.

    With an ACTION_ID: all there is to know about this one, with its pause, its sizes, and where its time went.

    \b
    Examples:
      hibernode status
      hibernode status 0b1f7a52-3c44-4f0e-8a6b-5d9e1c2f3a40
      hibernode status --json | jq '.actions[] | select(.status == "error")'
    """
    if action_id:
        one: pb.Action = session.client.ask(session.client.stub.GetAction, pb.ActionId(action_id=action_id))
        _one_action(session.screen, one)
        return
    answer: pb.Actions = session.client.ask(session.client.stub.ListActions, pb.Empty())
    if session.screen.as_json:
        session.screen.document(text.plain(answer))
        return
    actions = sorted(answer.actions, key=lambda a: (a.status in TERMINAL, -a.began_at))
    running = sum(a.status not in TERMINAL for a in actions)
    shown = actions if everything else actions[: running + SHOWN_ACTIONS]
    session.screen.table(_ACTION_COLUMNS, [_action_row(a) for a in shown], empty="no actions yet on this node")
    if len(shown) < len(actions):
        session.screen.say((f"and {len(actions) - len(shown)} older: hibernode status --all", "dim"))


_ACTION_COLUMNS = [
    Column("ACTION"),
    Column("TYPE"),
    Column("STATUS"),
    Column("BEGAN", keep=5),
    Column("TOOK", keep=3, right=True),
    Column("PAUSE", keep=2, right=True),
    Column("TARGET", keep=4, flexible=True),
    Column("PHASE", keep=1),
]


def _action_row(a: pb.Action) -> list[Cell]:
    ended = a.status in TERMINAL
    took = text.duration((a.ended_at or time.time()) - a.began_at) if a.began_at else ""
    pause = text.pause(a.last.profile.pause_ns) if a.last.profile.pause_ns else ""
    return [
        a.action_id,
        a.type,
        status(a.status),
        ago(a.began_at),
        took,
        pause,
        text.shown(a.target.removeprefix("pod ").removeprefix("default/")),
        (a.last.code if a.status == "error" else "" if ended else a.phase, "dim"),
    ]


def _one_action(screen: Screen, a: pb.Action) -> None:
    if screen.as_json:
        screen.document(text.plain(a))
        return
    ended = a.status in TERMINAL
    screen.fields(
        [
            ("action", a.action_id),
            ("type", a.type),
            ("target", text.shown(a.target)),
            ("checkpoint", a.checkpoint_id),
            ("status", status(a.status)),
            ("phase", "" if ended else a.phase),
            ("began", f"{text.moment(a.began_at)} ({ago(a.began_at)})" if a.began_at else ""),
            ("ended", f"{text.moment(a.ended_at)} ({ago(a.ended_at)})" if a.ended_at else ""),
            *costs(a.last.profile),
            ("error", f"{text.shown(a.last.message)} [{a.last.code}]" if a.status == "error" else ""),
            ("hint", text.shown(a.last.hint)),
        ]
    )


@command("watch")
@click.argument("action_id", default="", metavar="[ACTION_ID]", shell_complete=completing(known_actions))
def watch(session: Session, action_id: str) -> None:
    """Follow an action to its end, or everything that happens here.

    With an ACTION_ID it ends with the action, and its exit code says how that went. Without one it goes on until
    Ctrl-C. Where its output is no terminal it prints plain lines.

    \b
    Examples:
      hibernode watch
      hibernode watch 0b1f7a52-3c44-4f0e-8a6b-5d9e1c2f3a40
      hibernode watch --json >> /var/log/hibernode-actions.jsonl
    """
    stub = session.client.stub
    updates = session.client.stream(stub.WatchActions(pb.ActionId(action_id=action_id)))
    if action_id:
        session.action_id = action_id
        _see_through(session, updates)
        return
    if session.screen.live:
        session.screen.say(("watching all actions; Ctrl-C ends it", "dim"))
    follow(session.screen, updates, names=True)


@command("cancel")
@click.argument("action_id", shell_complete=completing(known_actions))
def cancel(session: Session, action_id: str) -> None:
    """Ask an action to stop.

    A checkpoint that is cancelled leaves the job running and nothing in the store; a restore that is cancelled leaves
    nothing running. It ends as `error` with the code `cancelled`, unless it was done before.

    \b
    Examples:
      hibernode cancel 0b1f7a52-3c44-4f0e-8a6b-5d9e1c2f3a40
    """
    reply: pb.CancelReply = session.client.ask(session.client.stub.Cancel, pb.ActionId(action_id=action_id))
    if not reply.found:
        raise Answered("not_found", f"no action {action_id} is running here", hint="`hibernode status` lists them")
    if session.screen.as_json:
        session.screen.document({"action_id": action_id, "found": True})
    else:
        session.screen.good("asked it to stop")
        session.screen.say(("  see it end:  ", "dim"), f"hibernode watch {action_id}")


def _criu_opts(value: str, more: Mapping[str, tuple[str, object]] | None = None) -> str:
    """`value` checked to be a JSON object, with `more` in it (key -> which option says so, and what), as the daemon wants it."""
    try:
        options = json.loads(value) if value else {}
    except ValueError as e:
        raise click.UsageError(f"--criu-opts is not JSON: {e}") from None
    if not isinstance(options, dict):
        raise click.UsageError('--criu-opts is not a JSON object, such as {"tcp": "close"}')
    for key, (option, wanted) in (more or {}).items():
        if options.setdefault(key, wanted) != wanted:
            raise click.UsageError(f"{option} and --criu-opts disagree about {key}")
    return json.dumps(options) if options else ""
