"""Commands about the jobs of this machine."""

from __future__ import annotations

import os

import click

from hibernode._pb import hibernode_pb2 as pb
from hibernode.cli import text
from hibernode.cli.screen import Cell, Column, ago
from hibernode.cli.session import (
    Session,
    command,
    completing,
    job_name,
    known_jobs,
    namespace_option,
    split_name,
)


@command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--name", required=True, help="What the job is called from now on.")
@namespace_option
@click.option("--cwd", default="", metavar="DIR", help="Where it runs; here, if not given.")
@click.option("--env", "-e", "variables", multiple=True, metavar="K=V", help="Set a variable for it. May be repeated.")
@click.option("--clean-env", is_flag=True, help="Give it only the variables set with --env.")
@click.argument("argv", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    session: Session,
    name: str,
    namespace: str,
    cwd: str,
    variables: tuple[str, ...],
    clean_env: bool,
    argv: tuple[str, ...],
) -> None:
    """Start a job that can be checkpointed.

    The daemon starts COMMAND and looks after it: it runs on when you log out, its output goes to a log, and its name is
    what `checkpoint`, `stop` and `jobs` know it by. It gets your environment and your working directory.

    \b
    Examples:
      hibernode run --name counter -- python3 count.py
      hibernode run --name trainer --cwd /srv/train --env EPOCHS=90 -- python train.py --resume
      hibernode run --name team-a/trainer -- ./train.sh
    """
    space, job = split_name(name, namespace)
    environment = {} if clean_env else dict(os.environ)
    for variable in variables:
        key, equals, value = variable.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--env wants NAME=VALUE, not {variable}")
        environment[key] = value
    request = pb.RunRequest(
        name=job, namespace=space, argv=[_utf8("the command", a) for a in argv], cwd=os.path.abspath(cwd or os.getcwd())
    )
    request.env.update({_utf8("a variable's name", k): _utf8(f"variable {k}", v) for k, v in environment.items()})
    started: pb.Workload = session.client.ask(session.client.stub.RunJob, request)
    if session.screen.as_json:
        session.screen.document(text.plain(started))
        return
    session.screen.good(f"started {job_name(started)}")
    session.screen.fields([("pid", str(started.pid)), ("log", text.shown(started.log))], indent=2)
    session.screen.say(("  checkpoint it:  ", "dim"), f"hibernode checkpoint {job_name(started)}")


def _utf8(what: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.UsageError(f"{what} is not valid UTF-8 (unset it, or use --clean-env)") from None
    return value


@command("jobs")
def jobs(session: Session) -> None:
    """Show the jobs and pods of this machine.

    All jobs that were started with `run`, or brought back with `restore`: those that run and those that have ended. Where the
    machine has a container runtime, the pods that run, too.

    \b
    Examples:
      hibernode jobs
      hibernode jobs --json | jq -r '.workloads[] | select(.state == "running") | .name'
    """
    answer: pb.Workloads = session.client.ask(session.client.stub.FindWorkloads, pb.Target())
    if session.screen.as_json:
        session.screen.document(text.plain(answer))
        return
    columns = [
        Column("NAME"),
        Column("KIND", keep=1),
        Column("STATE"),
        Column("PID", right=True),
        Column("MEMORY", right=True),
        Column("PROCESSES", right=True, keep=2),
        Column("STARTED", keep=3),
        Column("COMMAND", flexible=True),
    ]
    session.screen.table(
        columns,
        [_job_row(w) for w in answer.workloads],
        empty="no jobs yet; start one with: hibernode run --name NAME -- COMMAND",
    )


def _job_row(w: pb.Workload) -> list[Cell]:
    style = {"running": "green", "killed": "red"}.get(w.state, "dim")
    alive = w.pid > 0
    return [
        job_name(w),
        w.kind,
        (w.state, style),
        str(w.pid) if alive else "",
        text.size(w.rss) if alive else "",
        str(w.processes) if alive else "",
        ago(w.started_at),
        text.shown(w.command or w.uid),
    ]


@command("stop")
@click.argument("name", shell_complete=completing(known_jobs))
@namespace_option
@click.option("--signal", default="TERM", type=click.Choice(["TERM", "KILL"], case_sensitive=False), show_default=True)
def stop(session: Session, name: str, namespace: str, signal: str) -> None:
    """End a job.

    It gets SIGTERM and time to clean up, then SIGKILL; with `--signal KILL` it gets no time. Its checkpoints stay.

    \b
    Examples:
      hibernode stop trainer
      hibernode stop team-a/trainer --signal KILL
    """
    space, job = split_name(name, namespace)
    request = pb.StopRequest(name=job, namespace=space, signal=signal.upper())
    ended: pb.Workload = session.client.ask(session.client.stub.StopJob, request)
    if session.screen.as_json:
        session.screen.document(text.plain(ended))
    else:
        session.screen.good(f"{job_name(ended)} is {ended.state}")
