"""specs of pods as nodes tell them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "pod_specs",
        sa.Column("action_id", sa.Text(), nullable=False),
        sa.Column("pod_spec", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("action_id"),
    )


def downgrade() -> None:
    op.drop_table("pod_specs")
