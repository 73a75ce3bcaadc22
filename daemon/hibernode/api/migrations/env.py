"""What alembic runs: on the connection that it is given, in the transaction that this is in."""

from __future__ import annotations

from alembic import context

from hibernode.api.db import tables

context.configure(connection=context.config.attributes["connection"], target_metadata=tables)
with context.begin_transaction():
    context.run_migrations()
