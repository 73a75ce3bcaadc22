"""`hibernode ...`: `node` is the daemon (`service.py`), `watchdog` watches over it (`watchdog.py`), `api` is the control plane (`api/`),
`check-config` shows their configuration; everything else is `cli.py`.

Each is imported only when it is meant: click and rich would cost the daemon memory that it promises not to need, and the daemon's
drivers would cost the command line its quick start.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hibernode import config
from hibernode.config import Config
from hibernode.errors import HibernodeError, Refused

EXIT_CONFIG = 78  # EX_CONFIG; the unit does not start again after it, because that would not help
EXIT_RUNNING = 75  # EX_TEMPFAIL; another one is at work: it may have ended when the unit tries again
_RUNNING = ("daemon_running", "watchdog_running")
_NOT_FOR_NODE = ("rich", "greenlet")  # structlog takes them along wherever they are, 4 MiB for tracebacks in colour

_WATCHDOG = """\
Watch over the daemon of this machine, and give back every workload that it had frozen, if it or CRIU dies or hangs. Runs until SIGTERM,
as a process of its own: under systemd hibernode-watchdog.service, in Kubernetes a second container with hostPID.
"""
_WATCHDOG_DOES = """\
It looks every `watchdog.interval` seconds, and acts on what is older than `watchdog.grace`:
  no daemon comes back      what it held goes on; what it had half restored is killed
  a daemon hangs            what is past its deadline and still held: the daemon is killed
  CRIU is stopped or hangs  it goes on; if it holds the tree without a daemon, it is killed
It only reads: the daemon's lock and journal in `state_dir`, and /proc. It needs root, the daemon's
pid namespace and its `state_dir`, and neither store nor network. Every act is a line of its log.

examples:
  hibernode watchdog          until SIGTERM
  hibernode watchdog --once   look once, and act without grace on what no daemon answers for
"""


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    match words:
        case ["node", *rest]:
            sys.exit(_node(rest))
        case ["watchdog", *rest]:
            sys.exit(_watchdog(rest))
        case ["api", "token", *rest]:
            sys.exit(_api_token(rest))
        case ["api", *rest]:
            sys.exit(_api(rest))
        case ["gpu-helper", *rest]:
            from hibernode.drivers.gpu import helper  # noqa: PLC0415 - see above

            sys.exit(helper.main(rest))
        case ["check-config", *rest]:
            sys.exit(_check_config(rest))
        case _:
            from hibernode.cli import cli  # noqa: PLC0415 - see above

            cli(words, prog_name="hibernode")


def _node(words: Sequence[str]) -> int:
    """Run the node daemon until SIGTERM or SIGINT."""
    arguments = _parser("node", "Run the node daemon: commands from JetStream and gRPC, until SIGTERM.").parse_args(words)
    for name in _NOT_FOR_NODE:
        sys.modules[name] = None  # type: ignore[assignment] # as if it were not installed
    from hibernode import service  # noqa: PLC0415 - see above

    try:
        service.run(_load(arguments))
    except HibernodeError as e:
        return _complain(e)
    return 0


def _watchdog(words: Sequence[str]) -> int:
    """Run the watchdog until SIGTERM, or look once."""
    parser = _parser("watchdog", _WATCHDOG, _WATCHDOG_DOES)
    parser.add_argument("--once", action="store_true", help="look once and end: for cron, or by hand where no watchdog runs")
    arguments = parser.parse_args(words)
    from hibernode import watchdog  # noqa: PLC0415 - see above

    try:
        watchdog.run(_load(arguments), once=arguments.once)
    except HibernodeError as e:
        return _complain(e)
    return 0


_API = """\
Run the control plane: the Actions REST API and its page, over the event stream and a database. Any number of servers may run on one
PostgreSQL; SQLite is for one. Runs until SIGTERM.
"""
_API_DOES = """\
It needs `bus.url`. `api.database` is SQLite in `state_dir` unless you say postgresql://user:password@host/name.
At its start a server brings the database to the tables of its version.

examples:
  hibernode api token new ops          print a new token; it is shown once
  hibernode api                        serve on `api.listen`, 127.0.0.1:9466 by default
  hibernode api --migrate              bring the database to this version, and end
  hibernode api --print-openapi        the document of the API
"""


def _api(words: Sequence[str]) -> int:
    """Run the API server until SIGTERM or SIGINT."""
    parser = _parser("api", _API, _API_DOES)
    parser.add_argument("--print-openapi", action="store_true", help="print the document of the API and end")
    parser.add_argument("--migrate", action="store_true", help="bring the database to this version and end")
    arguments = parser.parse_args(words)
    try:
        from hibernode.api import migrate, server  # noqa: PLC0415 - see above
    except ModuleNotFoundError as e:
        return _complain(
            Refused("config", f"{e.name} is not installed", prop="packages", found="none", wanted=e.name, hint=_NO_API)
        )
    try:
        if arguments.print_openapi:
            sys.stdout.write(json.dumps(server.document(), indent=2) + "\n")
            return 0
        settings = _load(arguments)
        if arguments.migrate:
            sys.stdout.write(f"the database is at version {migrate.migrate(server.database_of(settings))}\n")
            return 0
        from hibernode import service  # noqa: PLC0415
        from hibernode.drivers.nats import NatsControl  # noqa: PLC0415

        service.log_to_stderr(settings)
        server.run(settings, NatsControl(settings.bus, settings.cluster))
    except HibernodeError as e:
        return _complain(e)
    return 0


_NO_API = "pip install 'hibernode[api]'"


def _api_token(words: Sequence[str]) -> int:
    """Make, list or remove tokens of the API."""
    parser = _parser(
        "api token", "Make, list or remove the tokens that open the API. Works on the database; no server needs to run."
    )
    parser.add_argument("what", choices=("new", "list", "remove"), help="new prints the token, once; it is kept as its SHA-256")
    parser.add_argument("name", nargs="?", default="", help="whose it is")
    parser.add_argument("--read-only", action="store_true", help="it may look, and change nothing")
    parser.add_argument("--days", type=float, default=0.0, help="it opens for so many days; 0: until it is removed")
    arguments = parser.parse_args(words)
    from hibernode.api import migrate, server, tokens  # noqa: PLC0415 - see above

    try:
        database = server.database_of(_load(arguments))
        migrate.migrate(database)
        if arguments.what == "list":
            sys.stdout.write("".join(f"{token.name}\t{'read' if token.read_only else 'write'}\n" for token in database.tokens()))
        elif arguments.what == "new":
            secret = tokens.make(database, arguments.name, read_only=arguments.read_only, days=arguments.days)
            sys.stdout.write(f"{secret}\n")
        else:
            tokens.remove(database, arguments.name)
    except HibernodeError as e:
        return _complain(e)
    return 0


def _check_config(words: Sequence[str]) -> int:
    """Print every value (secrets hidden) and say whether a daemon would start with them."""
    parser = _parser("check-config", "Read the configuration as the daemon would, print it with secrets hidden, and exit.")
    parser.add_argument("--defaults", action="store_true", help="print the built-in defaults instead")
    arguments = parser.parse_args(words)
    from hibernode import service  # noqa: PLC0415 - see above

    try:
        settings = config.load(None, {}) if arguments.defaults else _load(arguments)
        service.insist_usable(settings)
    except HibernodeError as e:
        return _complain(e)
    sys.stdout.write(config.render(settings))
    return 0


def _parser(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"hibernode {name}", description=what, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, help="TOML file; else $HIBERNODE_CONFIG, else /etc/hibernode/hibernode.toml if there"
    )
    return parser


def _load(arguments: argparse.Namespace) -> Config:
    path = arguments.config or (Path(found) if (found := os.environ.get("HIBERNODE_CONFIG")) else None)
    default = Path("/etc/hibernode/hibernode.toml")
    return config.load(path or (default if default.exists() else None))


def _complain(error: HibernodeError) -> int:
    sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
    return EXIT_RUNNING if error.code in _RUNNING else EXIT_CONFIG


if __name__ == "__main__":
    main()
