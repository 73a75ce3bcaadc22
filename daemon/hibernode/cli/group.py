"""The command group: its help, its errors and exit codes.

The commands themselves are loaded when one of them is called, and not by whoever only imports the group.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn, cast

import click

from hibernode.cli.failure import INTERRUPTED, USAGE, LeftRunning, Usage, as_json, as_text, exit_code
from hibernode.errors import HibernodeError

DEFAULT_SOCKET = "/run/hibernode/hibernode.sock"
SOCKET_VARIABLES = ["HIBERNODE_SOCKET_PATH", "HIBERNODE_SOCKET"]  # the second is the daemon's own key `socket`

SECTIONS = {
    "Jobs": ("run", "jobs", "stop"),
    "Actions": ("checkpoint", "restore", "status", "watch", "cancel"),
    "Checkpoints": ("list", "inspect", "verify", "delete", "gc"),
    "Nodes": ("doctor", "nodes"),
}


DAEMON = {  # run by `__main__` without click; here for the help
    "node": "Run the daemon of this machine, in the foreground.",
    "watchdog": "Give workloads back that a daemon which died or hangs has frozen.",
    "api": "Run the control plane: the REST API, and its page.",
    "check-config": "Print its configuration, and say whether it would start.",
}


class Group(click.Group):
    """Client commands, found by name when needed, and whatever else is added."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or _client_commands().get(cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's own shape
        return [name for names in SECTIONS.values() for name in names] + sorted(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            _section(formatter, title, self._described(ctx, names))
        _section(formatter, "Daemon", list(DAEMON.items()) + self._described(ctx, sorted(self.commands)))

    def _described(self, ctx: click.Context, names: Iterable[str]) -> list[tuple[str, str]]:
        commands = [(name, self.get_command(ctx, name)) for name in names]
        return [(name, c.get_short_help_str(limit=72)) for name, c in commands if c is not None and not c.hidden]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(given, prog_name, complete_var, False, **extra)
        try:
            sys.exit(super().main(given, prog_name, complete_var, False, **extra) or 0)
        except HibernodeError as e:
            _end(e, given)
        except click.exceptions.NoArgsIsHelpError as e:
            click.echo(e.format_message(), err=True)
            sys.exit(USAGE)
        except click.UsageError as e:
            _end(_usage(e), given)
        except click.Abort:
            _end(LeftRunning("interrupted"), given)
        except click.ClickException as e:
            _end(Usage(_lower(e.format_message())), given)


def _section(formatter: click.HelpFormatter, title: str, rows: list[tuple[str, str]]) -> None:
    with formatter.section(title):
        formatter.write_dl(rows, col_max=12, col_spacing=2)


def _client_commands() -> Mapping[str, click.Command]:
    return cast(MutableMapping[str, click.Command], importlib.import_module("hibernode.cli.commands").COMMANDS)


def _end(error: HibernodeError, args: Sequence[str]) -> NoReturn:
    """Say it on stderr, once, in the form that was asked for."""
    options = args[: args.index("--")] if "--" in args else args
    if "--json" in options:
        click.echo(as_json(error), err=True)
    elif exit_code(error) == INTERRUPTED:
        click.echo(f"\n{error.message}" + (f"\n{error.hint}" if error.hint else ""), err=True)
    else:
        click.echo(as_text(error), err=True)
    sys.exit(exit_code(error))


def _usage(error: click.UsageError) -> Usage:
    path = error.ctx.command_path if error.ctx else "hibernode"
    return Usage(_lower(error.format_message()).rstrip("."), hint=f"`{path} --help` shows what it takes")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Exit codes:
  0    done
  1    the action failed, or the daemon refused it
  2    the command line makes no sense
  3    no daemon answers
  130  Ctrl-C; an action that was begun goes on

\b
For scripts: --json prints one document, or one per line where things happen
over time (checkpoint, restore, watch, verify, gc); errors are one JSON document
on stderr, with a stable `code`.

\b
Completion, of checkpoints, actions and jobs too:
  bash  eval "$(_HIBERNODE_COMPLETE=bash_source hibernode)"
  zsh   eval "$(_HIBERNODE_COMPLETE=zsh_source hibernode)"
  fish  _HIBERNODE_COMPLETE=fish_source hibernode | source""",
)
@click.option(
    "--socket",
    envvar=SOCKET_VARIABLES,
    default=DEFAULT_SOCKET,
    show_default=True,
    metavar="PATH",
    help="Where the daemon listens. Also: HIBERNODE_SOCKET_PATH.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--traceback", is_flag=True, hidden=True, help="Show where a defect of the command line happened.")
def cli(**_: object) -> None:
    """Freeze a running job, keep it in an object store, and bring it back.

    hibernode talks to the daemon of this machine. A job that was started with `run` can be checkpointed while it runs:
    it pauses for a moment and goes on, and its memory is stored. `restore` brings it back as it was in that moment,
    after a crash, a reboot, or to make room for something else.

    \b
    A first round:
      hibernode doctor
      hibernode run --name counter -- python3 count.py
      hibernode checkpoint counter
      hibernode stop counter
      hibernode list
      hibernode restore CHECKPOINT_ID
    """
