"""The command line: a gRPC client, and nothing more. `cli` is the group; commands can be added to it."""

from hibernode.cli.group import cli

__all__ = ["cli"]
