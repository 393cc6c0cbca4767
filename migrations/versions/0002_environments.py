"""Sandboxes: brokers, environments, executions, credentials and the egress log."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A migration that cannot get its lock fails, instead of stopping every query behind it.
    op.execute("set local lock_timeout = '4s'")
    op.create_table(
        "brokers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("backend", sa.Text(), nullable=False),
        sa.Column("capacity", sa.Integer(), nullable=False),
        sa.Column("running", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "seen", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_brokers")),
    )
    op.create_table(
        "credentials",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default="active", nullable=False),
        sa.Column("public", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("token_sealed", sa.LargeBinary(), nullable=True),
        sa.Column("token_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("refreshing_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("project_id", "id", name=op.f("pk_credentials")),
    )
    op.create_table(
        "egress_log",
        sa.Column("environment_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column(
            "at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=True),
        sa.Column("path", sa.Text(), nullable=True),
        sa.Column("decision", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("rule", sa.Text(), nullable=True),
        sa.Column("credential", sa.Text(), nullable=True),
        sa.Column("status", sa.SmallInteger(), nullable=True),
        sa.Column("bytes_up", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("bytes_down", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("environment_id", "id", name=op.f("pk_egress_log")),
    )
    op.create_index(
        op.f("ix_egress_log_at"), "egress_log", ["at"], unique=False, postgresql_using="brin"
    )
    op.create_table(
        "environments",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("broker", sa.Text(), nullable=True),
        sa.Column("has_disk", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("public", sa.LargeBinary(), nullable=True),
        sa.Column("sealed", sa.LargeBinary(), nullable=True),
        sa.Column("revision", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("file_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "accessed_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environments")),
    )
    op.create_index(
        op.f("ix_environments_broker"),
        "environments",
        ["broker"],
        unique=False,
        postgresql_where=sa.text("has_disk"),
    )
    op.create_index(
        op.f("ix_environments_expires_at"),
        "environments",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("expired_at is null"),
    )
    op.create_index(
        op.f("ix_environments_project_id"),
        "environments",
        ["project_id", sa.literal_column("id desc")],
        unique=False,
        postgresql_where=sa.text("deleted_at is null"),
    )
    op.create_table(
        "executions",
        sa.Column("environment_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("interaction_id", sa.Uuid(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("sandbox", sa.Text(), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("exit", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("output", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("environment_id", "id", name=op.f("pk_executions")),
    )
    op.create_index(
        op.f("ix_executions_started_at"),
        "executions",
        ["started_at"],
        unique=False,
        postgresql_using="brin",
    )


def downgrade() -> None:
    op.execute("set local lock_timeout = '4s'")
    op.drop_index(
        op.f("ix_executions_started_at"), table_name="executions", postgresql_using="brin"
    )
    op.drop_table("executions")
    op.drop_index(
        op.f("ix_environments_project_id"),
        table_name="environments",
        postgresql_where=sa.text("deleted_at is null"),
    )
    op.drop_index(
        op.f("ix_environments_expires_at"),
        table_name="environments",
        postgresql_where=sa.text("expired_at is null"),
    )
    op.drop_index(
        op.f("ix_environments_broker"),
        table_name="environments",
        postgresql_where=sa.text("has_disk"),
    )
    op.drop_table("environments")
    op.drop_index(op.f("ix_egress_log_at"), table_name="egress_log", postgresql_using="brin")
    op.drop_table("egress_log")
    op.drop_table("credentials")
    op.drop_table("brokers")
