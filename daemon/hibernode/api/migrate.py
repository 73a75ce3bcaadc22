"""Brings a database to the tables that this version needs: alembic, with the steps in `migrations/`."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from hibernode.api.db import Database
from hibernode.errors import Refused

_LOCK = 0x68696265  # of PostgreSQL, for all servers that start at the same time: "hibe"


def migrate(database: Database) -> str:
    """Take every step that is missing, in one transaction: all of them or none. The version it has then. Servers that start together do
    it one after the other. Refused for a database that a newer version has made."""
    with database.writing() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        config = _config(connection)
        steps = ScriptDirectory.from_config(config)
        current = MigrationContext.configure(connection).get_current_revision()
        head = steps.get_current_head() or ""
        if current is not None and current not in {step.revision for step in steps.walk_revisions()}:
            raise Refused(
                "config", "the database was made by a newer version", prop="api.database", found=current, wanted=head,
                hint="start that version, or give this one a database of its own",
            )  # fmt: skip
        command.upgrade(config, "head")
        return head


def _config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
