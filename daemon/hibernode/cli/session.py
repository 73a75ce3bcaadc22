"""What every client command shares: a connection, a screen, a way to end, names to complete."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli.client import Client
from hibernode.cli.failure import Answered, LeftRunning
from hibernode.cli.group import DEFAULT_SOCKET
from hibernode.cli.screen import Screen, ago
from hibernode.errors import HibernodeError

COMMANDS: dict[str, click.Command] = {}


class Session:
    """What a command works with: the daemon, the screen, and the action it stands for once one is begun."""

    def __init__(self, client: Client, screen: Screen) -> None:
        self.client = client
        self.screen = screen
        self.action_id = ""


def command(name: str, **settings: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command with --json and --socket that gets a Session, and ends with an error and never with a traceback."""

    def wrap(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(*, as_json: bool, socket: str | None, **given: Any) -> None:
            root = click.get_current_context().find_root().params
            path = Path(socket or root.get("socket") or DEFAULT_SOCKET)
            screen = Screen(as_json=as_json or bool(root.get("as_json")))
            with Client(path) as client:
                session = Session(client, screen)
                _guarded(session, bool(root.get("traceback")), lambda: function(session, **given))

        made: click.Command = click.command(name, cls=click.Command, **settings)(run)
        made.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."))
        made.params.append(click.Option(["--socket"], metavar="PATH", help="Where the daemon listens."))
        COMMANDS[name] = made
        return made

    return wrap


def _guarded(session: Session, traceback: bool, work: Callable[[], None]) -> None:
    try:
        work()
    except KeyboardInterrupt:
        raise _left(session) from None
    except (HibernodeError, click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
        raise  # said by the group; a closed pipe is ended quietly
    except Exception as e:  # the last line of the command line
        if traceback:
            raise
        message = f"a defect of this command: {type(e).__name__}: {e}"
        raise Answered("internal", message, hint="`hibernode --traceback ...` shows where it happened") from e


def _left(session: Session) -> LeftRunning:
    if not session.action_id:
        return LeftRunning("interrupted")
    return LeftRunning(
        f"interrupted: action {session.action_id} goes on",
        hint=f"watch it again: hibernode watch {session.action_id}\ncancel it:      hibernode cancel {session.action_id}",
    )


# --- completion, and what names mean --------------------------------------------------------------------------------


def completing(ask: Callable[[Client], Iterable[tuple[str, str]]]) -> Callable[..., list[CompletionItem]]:
    """Offers what the daemon knows; silent when there is none, because a shell waits for the answer."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        path = Path(ctx.params.get("socket") or ctx.find_root().params.get("socket") or DEFAULT_SOCKET)
        try:
            with Client(path) as client:
                return [CompletionItem(v, help=h) for v, h in ask(client) if v.startswith(incomplete)]
        except HibernodeError:
            return []

    return complete


def known_checkpoints(client: Client) -> list[tuple[str, str]]:
    answer: pb.Checkpoints = client.ask(client.stub.ListCheckpoints, pb.Empty(), timeout=2.0)
    return [(c.checkpoint_id, f"{c.workload}, {ago(c.created_at)}") for c in answer.checkpoints]


def known_actions(client: Client) -> list[tuple[str, str]]:
    answer: pb.Actions = client.ask(client.stub.ListActions, pb.Empty(), timeout=2.0)
    return [(a.action_id, f"{a.type} of {a.target}, {a.status}") for a in answer.actions]


def known_jobs(client: Client) -> list[tuple[str, str]]:
    answer: pb.Workloads = client.ask(client.stub.FindWorkloads, pb.Target(), timeout=2.0)
    return [(job_name(w), w.state) for w in answer.workloads]


checkpoint_argument = click.argument("checkpoint_id", shell_complete=completing(known_checkpoints))
namespace_option = click.option("--namespace", "-n", default="", help="Namespace of the job or pod; `default` if not given.")


def job_name(workload: pb.Workload) -> str:
    return workload.name if workload.namespace in ("", "default") else f"{workload.namespace}/{workload.name}"


def split_name(name: str, namespace: str) -> tuple[str, str]:
    """`[NAMESPACE/]NAME` and --namespace: (namespace, name)."""
    space, slash, rest = name.partition("/")
    if not slash:
        return namespace or "default", name
    if namespace and namespace != space:
        raise click.UsageError(f"{name} and --namespace {namespace} name two namespaces")
    return space, rest
