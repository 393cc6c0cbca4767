"""Environments that nobody has used yet, and when their files were counted."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # A migration that cannot get its lock fails, instead of stopping every query behind it.
    op.execute("set local lock_timeout = '4s'")
    op.add_column(
        "environments",
        sa.Column("is_tentative", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    op.add_column(
        "environments", sa.Column("changed_at", sa.DateTime(timezone=True), nullable=True)
    )
    op.add_column(
        "environments",
        sa.Column(
            "counted_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
    )
    op.create_index(
        op.f("ix_environments_accessed_at"),
        "environments",
        ["accessed_at"],
        unique=False,
        postgresql_where=sa.text("is_tentative and expired_at is null and deleted_at is null"),
    )


def downgrade() -> None:
    op.execute("set local lock_timeout = '4s'")
    op.drop_index(
        op.f("ix_environments_accessed_at"),
        table_name="environments",
        postgresql_where=sa.text("is_tentative and expired_at is null and deleted_at is null"),
    )
    op.drop_column("environments", "counted_at")
    op.drop_column("environments", "changed_at")
    op.drop_column("environments", "is_tentative")
