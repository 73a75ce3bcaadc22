"""All client commands, by name: importing this loads them."""

from __future__ import annotations

from hibernode.cli import actions, checkpoints, gc, jobs, nodes
from hibernode.cli.session import COMMANDS

__all__ = ["COMMANDS", "actions", "checkpoints", "gc", "jobs", "nodes"]
