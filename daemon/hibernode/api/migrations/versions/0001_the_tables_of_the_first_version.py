"""the tables of the first version"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "actions",
        sa.Column("action_id", sa.Text(), nullable=False),
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("updated_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("cluster", sa.Text(), server_default="", nullable=False),
        sa.Column("node", sa.Text(), server_default="", nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("kind", sa.Text(), server_default="", nullable=False),
        sa.Column("namespace", sa.Text(), server_default="", nullable=False),
        sa.Column("pod_name", sa.Text(), server_default="", nullable=False),
        sa.Column("pod_id", sa.Text(), server_default="", nullable=False),
        sa.Column("overrides", sa.JSON(), server_default="{}", nullable=False),
        sa.Column("host", sa.JSON(), server_default="{}", nullable=False),
        sa.Column("source", sa.Text(), server_default="", nullable=False),
        sa.Column("expires_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("completed_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("seq", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("provisional", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("code", sa.Text(), server_default="", nullable=False),
        sa.Column("message", sa.Text(), server_default="", nullable=False),
        sa.Column("hint", sa.Text(), server_default="", nullable=False),
        sa.Column("retry", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("details", sa.JSON(), server_default="{}", nullable=False),
        sa.Column("profile", sa.JSON(), server_default="{}", nullable=False),
        sa.Column("location", sa.Text(), server_default="", nullable=False),
        sa.Column("deleted_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("purged_at", sa.Double(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("action_id"),
    )
    op.create_index("actions_checkpoint", "actions", ["checkpoint_id"], unique=False)
    op.create_index("actions_newest", "actions", ["created_at", "action_id"], unique=False)
    op.create_index("actions_node", "actions", ["node", "created_at", "action_id"], unique=False)
    op.create_index("actions_pod_id", "actions", ["pod_id", "created_at", "action_id"], unique=False)
    op.create_index("actions_pod_name", "actions", ["pod_name", "created_at", "action_id"], unique=False)
    op.create_index("actions_status", "actions", ["status", "created_at", "action_id"], unique=False)
    op.create_index("actions_type", "actions", ["type", "created_at", "action_id"], unique=False)
    op.create_table(
        "events",
        sa.Column("action_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), server_default="", nullable=False),
        sa.Column("time", sa.Double(), server_default="0", nullable=False),
        sa.Column("code", sa.Text(), server_default="", nullable=False),
        sa.Column("message", sa.Text(), server_default="", nullable=False),
        sa.Column("hint", sa.Text(), server_default="", nullable=False),
        sa.Column("details", sa.JSON(), server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("action_id", "seq"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "heartbeats",
        sa.Column("heartbeat_id", sa.Text(), nullable=False),
        sa.Column("cluster", sa.Text(), server_default="", nullable=False),
        sa.Column("namespace", sa.Text(), server_default="", nullable=False),
        sa.Column("pod_name", sa.Text(), server_default="", nullable=False),
        sa.Column("pod_id", sa.Text(), server_default="", nullable=False),
        sa.Column("interval", sa.Double(), nullable=False),
        sa.Column("keep_last", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("configured", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("next_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("last_action_id", sa.Text(), server_default="", nullable=False),
        sa.Column("message", sa.Text(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("heartbeat_id"),
    )
    op.create_table(
        "moves",
        sa.Column("move_id", sa.Text(), nullable=False),
        sa.Column("cluster", sa.Text(), server_default="", nullable=False),
        sa.Column("node", sa.Text(), server_default="", nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("namespace", sa.Text(), server_default="", nullable=False),
        sa.Column("pod_name", sa.Text(), server_default="", nullable=False),
        sa.Column("pod_id", sa.Text(), server_default="", nullable=False),
        sa.Column("checkpoint_action_id", sa.Text(), server_default="", nullable=False),
        sa.Column("restore_action_id", sa.Text(), server_default="", nullable=False),
        sa.Column("state", sa.Text(), server_default="", nullable=False),
        sa.Column("message", sa.Text(), server_default="", nullable=False),
        sa.Column("created_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("updated_at", sa.Double(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("move_id"),
    )
    op.create_index(op.f("ix_moves_state"), "moves", ["state"], unique=False)
    op.create_table(
        "nodes",
        sa.Column("cluster", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("seen_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("record", sa.JSON(), server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("cluster", "node"),
    )
    op.create_table(
        "tokens",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("read_only", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("expires_at", sa.Double(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("sha256"),
    )
    op.create_table(
        "uploads",
        sa.Column("action_id", sa.Text(), nullable=False),
        sa.Column("uploaded_at", sa.Double(), server_default="0", nullable=False),
        sa.Column("pod_id", sa.Text(), server_default="", nullable=False),
        sa.Column("pod_spec", sa.Text(), nullable=True),
        sa.Column("pod_metadata_spec", sa.Text(), nullable=True),
        sa.Column("persistent_volume_claim", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("action_id"),
    )
    op.create_index(op.f("ix_uploads_pod_id"), "uploads", ["pod_id"], unique=False)
