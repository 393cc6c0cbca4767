"""Every table, on one page.

A conversation is a tree of *segments*. A turn (one interaction) is `(segment, depth)`; its steps
are `(segment, depth, idx)`, so reading a conversation is a few index range scans and adding a turn
costs the same at any depth. A fork opens a segment that points at its parent; nothing is copied.

Payloads are JSON as bytes, spliced into answers unparsed; JSONB only for what is queried. There are
no foreign keys between the hot tables (interactions, steps, events, jobs): each is written by one
statement that also writes its parent, and a key check on every step would cost more than the row.
Times are the database's clock.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_NOW = func.now()


def _moment(name: str, *, default: bool = False) -> Column[object]:
    return Column(
        name,
        DateTime(timezone=True),
        nullable=not default,
        server_default=_NOW if default else None,
    )


projects = Table(
    "projects",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    # How long its interactions are kept; null: as the server's setting says.
    Column("retention", Interval),
    _moment("created_at", default=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("project_id", Uuid, ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    # SHA-256 of a key with 256 random bits: nothing to guess, so no slow hash is needed.
    Column("hash", LargeBinary, nullable=False, unique=True),
    Column("prefix", Text, nullable=False),
    _moment("created_at", default=True),
    _moment("revoked_at"),
    Index(None, "project_id"),
)

# Only lines that branch off another have a row; the first one of a tree is just its id.
segments = Table(
    "segments",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    Column("parent_id", Uuid),
    Column("parent_depth", Integer),
    # Last step of the parent turn that belongs to this line (inclusive); null: the whole turn.
    Column("parent_idx", SmallInteger),
    # Serves: which segments hang on this one (delete, expiry).
    Index(None, "parent_id", postgresql_where=text("parent_id is not null")),
)

interactions = Table(
    "interactions",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    Column("key_id", Uuid),
    Column("segment_id", Uuid, nullable=False),
    Column("depth", Integer, nullable=False),
    Column("previous_id", Uuid),
    Column("parent_run_id", Uuid),
    # The process (workers.id) that took the create.
    Column("created_by", BigInteger),
    Column("status", Text, nullable=False),
    Column("model", Text),
    Column("agent", Text),
    Column("background", Boolean, nullable=False, server_default=text("false")),
    # Its deltas are in `events`; else its stream is read from its steps.
    Column("logged", Boolean, nullable=False, server_default=text("false")),
    Column("input_form", Text, nullable=False, server_default="steps"),
    Column("input_count", SmallInteger, nullable=False, server_default=text("0")),
    Column("labels", JSONB),
    Column("environment_id", Uuid),
    # What a response echoes of the request, as a JSON object; null once deleted.
    Column("echo", LargeBinary),
    # The resolved run spec, frozen at create (alias, tools, limits); null once deleted.
    Column("spec", LargeBinary),
    # What a run knows beyond its steps; written with every step commit.
    Column("run_state", LargeBinary),
    # Secrets of the request, encrypted; never read by a route.
    Column("sealed", LargeBinary),
    Column("webhook", LargeBinary),
    Column("usage", LargeBinary),
    Column("errors", LargeBinary),
    Column("warnings", LargeBinary),
    Column("idempotency_key", Text),
    Column("request_hash", LargeBinary),
    # The epoch that wrote the last state: tells an owner whose answer was lost what happened.
    Column("epoch", Integer, nullable=False, server_default=text("1")),
    _moment("created_at", default=True),
    _moment("updated_at", default=True),
    _moment("expires_at"),
    _moment("deleted_at"),
    UniqueConstraint("segment_id", "depth"),
    # Serves: GET /interactions, newest first, in keyset pages.
    Index(None, "project_id", text("id desc"), postgresql_where=text("deleted_at is null")),
    # Serves: expiry. Block ranges, since rows come in about the order in which they expire.
    Index(None, "expires_at", postgresql_using="brin"),
    # Holds: one interaction for each Idempotency-Key of a project.
    Index(
        "uq_interactions_idempotency",
        "project_id",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key is not null"),
    ),
    postgresql_with={"fillfactor": "80"},
)

steps = Table(
    "steps",
    metadata,
    Column("segment_id", Uuid, primary_key=True),
    Column("depth", Integer, primary_key=True),
    Column("idx", SmallInteger, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    Column("type", Text, nullable=False),
    # Content blocks whose `data` lies in `blobs` have `blob` (its SHA-256) in its place.
    Column("media", Boolean, nullable=False, server_default=text("false")),
    Column("data", LargeBinary, nullable=False),
)

events = Table(
    "events",
    metadata,
    # The interaction's created_at: the partition key, by the database's clock.
    Column("born", DateTime(timezone=True), primary_key=True),
    Column("interaction_id", Uuid, primary_key=True),
    # epoch * 2^20 + number of the row's first event.
    Column("seq", BigInteger, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    # One flush: events joined by line feeds, see openinteractions.events.types.
    Column("data", LargeBinary, nullable=False),
    postgresql_partition_by="RANGE (born)",
)

workers = Table(
    "workers",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("role", Text, nullable=False),
    _moment("started_at", default=True),
    _moment("seen", default=True),
)

jobs = Table(
    "jobs",
    metadata,
    # A run's job has its interaction's id.
    Column("id", Uuid, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    Column("kind", Text, nullable=False),
    Column("args", JSONB, nullable=False, server_default=text("'{}'")),
    # Its place in its project's line: when it came, moved by its service tier. A better tier is a
    # head start, so that nothing waits for ever.
    _moment("rank_at", default=True),
    # At most one job with the same key runs at a time.
    Column("key", Text),
    Column("provider", Text),
    # 0 queued, 1 running; a job that ended is deleted, one that failed for good is 3.
    Column("state", SmallInteger, nullable=False, server_default=text("0")),
    _moment("run_at", default=True),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("max_attempts", Integer, nullable=False, server_default=text("5")),
    # The fencing token: +1 at each claim. Who writes with an older one writes nothing.
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("worker_id", BigInteger),
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("last_error", Text),
    _moment("created_at", default=True),
    CheckConstraint("state in (0, 1, 3)", name="state"),
    CheckConstraint("(state = 1) = (worker_id is not null)", name="owner"),
    # Serves: claim.
    Index("ix_jobs_ready", "project_id", "rank_at", "id", postgresql_where=text("state = 0")),
    # Serves: is there an older sibling of this key.
    Index(
        "ix_jobs_key",
        "key",
        "rank_at",
        "id",
        postgresql_where=text("state = 0 and key is not null"),
    ),
    # Serves: heartbeat and sweep; and how much of each project and provider runs (fair claim).
    Index(
        "ix_jobs_running", "worker_id", "project_id", "provider", postgresql_where=text("state = 1")
    ),
    # Holds: one running job a key, whatever the code does.
    Index(
        "uq_jobs_running_key",
        "key",
        unique=True,
        postgresql_where=text("state = 1 and key is not null"),
    ),
    postgresql_with={
        "fillfactor": "70",
        "autovacuum_vacuum_scale_factor": "0.02",
        "autovacuum_vacuum_cost_delay": "0",
    },
)

spend = Table(
    "spend",
    metadata,
    # Serves: what a project spent in a time, since ids are ordered by time.
    Column("project_id", Uuid, primary_key=True),
    Column("id", Uuid, primary_key=True),
    Column("key_id", Uuid),
    # Null for store=false.
    Column("interaction_id", Uuid),
    Column("model", Text, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    # Billionths of a US dollar; null where no price is known.
    Column("cost_nanousd", BigInteger),
    _moment("created_at", default=True),
)

budgets = Table(
    "budgets",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("project_id", Uuid, ForeignKey("projects.id"), nullable=False),
    # Null: the whole project's.
    Column("key_id", Uuid, ForeignKey("api_keys.id")),
    Column("max_nanousd", BigInteger),
    Column("max_tokens", BigInteger),
    # The day (UTC) that the counters below belong to; an older one counts as zero.
    Column("day", Date, nullable=False, server_default=text("'-infinity'")),
    Column("used_nanousd", BigInteger, nullable=False, server_default=text("0")),
    Column("used_tokens", BigInteger, nullable=False, server_default=text("0")),
    UniqueConstraint("project_id", "key_id", postgresql_nulls_not_distinct=True),
)

lost_responses = Table(
    "lost_responses",
    metadata,
    # Creates whose answer never reached the caller: a retry of the same request joins them
    # (ruling R15). Looked at only shortly after one was added.
    Column("project_id", Uuid, primary_key=True),
    Column("request_hash", LargeBinary, primary_key=True),
    Column("interaction_id", Uuid, primary_key=True),
    _moment("at", default=True),
)

signing_keys = Table(
    "signing_keys",
    metadata,
    Column("kid", Text, primary_key=True),
    # The private key, encrypted with the master key.
    Column("sealed", LargeBinary, nullable=False),
    _moment("created_at", default=True),
)

blobs = Table(
    "blobs",
    metadata,
    Column("project_id", Uuid, primary_key=True),
    Column("sha256", LargeBinary, primary_key=True),
    Column("mime_type", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    _moment("created_at", default=True),
)

blob_uses = Table(
    "blob_uses",
    metadata,
    Column("project_id", Uuid, primary_key=True),
    Column("sha256", LargeBinary, primary_key=True),
    Column("segment_id", Uuid, primary_key=True),
    Column("depth", Integer, primary_key=True),
)

brokers = Table(
    "brokers",
    metadata,
    # Chosen by the operator and kept over restarts: environments live where their broker is.
    Column("name", Text, primary_key=True),
    # `unix:///…/broker.sock` or `https://host:port`.
    Column("address", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("backend", Text, nullable=False),
    # How many sandboxes it may run, and how many it runs.
    Column("capacity", Integer, nullable=False),
    Column("running", Integer, nullable=False, server_default=text("0")),
    # Why it cannot start a sandbox at present; null: it can.
    Column("problem", Text),
    _moment("started_at", default=True),
    _moment("seen", default=True),
)

environments = Table(
    "environments",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    # brokers.name; null until it is first needed.
    Column("broker", Text),
    Column("has_disk", Boolean, nullable=False, server_default=text("false")),
    # `sources` and `network` as the caller sees them again: no transform values, no variables.
    Column("public", LargeBinary),
    # `network` with its transforms, and `env`, as the request had them: encrypted JSON.
    Column("sealed", LargeBinary),
    # +1 whenever `sealed` changes, so that a broker knows that what it has read is old.
    Column("revision", Integer, nullable=False, server_default=text("1")),
    Column("file_count", BigInteger, nullable=False, server_default=text("0")),
    Column("size_bytes", BigInteger, nullable=False, server_default=text("0")),
    # When its files were counted last, and when something may have changed them since.
    _moment("counted_at", default=True),
    _moment("changed_at"),
    # Made for a run that may need one, asked for by nobody, and not used yet: it does not count
    # towards the quota.
    Column("is_tentative", Boolean, nullable=False, server_default=text("false")),
    _moment("created_at", default=True),
    _moment("updated_at", default=True),
    _moment("accessed_at", default=True),
    _moment("expires_at"),
    # Its files are gone; the row stays a while, so that its id says `expired`.
    _moment("expired_at"),
    _moment("deleted_at"),
    # Serves: GET /environments, newest first, in keyset pages.
    Index(None, "project_id", text("id desc"), postgresql_where=text("deleted_at is null")),
    # Serves: expiry.
    Index(None, "expires_at", postgresql_where=text("expired_at is null")),
    # Serves: what a broker has.
    Index(None, "broker", postgresql_where=text("has_disk")),
    # Serves: the early end of those that were never used.
    Index(
        None,
        "accessed_at",
        postgresql_where=text("is_tentative and expired_at is null and deleted_at is null"),
    ),
)

executions = Table(
    "executions",
    metadata,
    Column("environment_id", Uuid, primary_key=True),
    # Minted by the run, never by a model (ruling R4).
    Column("id", Text, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    Column("interaction_id", Uuid),
    Column("epoch", Integer, nullable=False),
    # The container that it was sent to.
    Column("sandbox", Text, nullable=False),
    _moment("started_at", default=True),
    _moment("ended_at"),
    # How it ended, JSON, and its output (bounded); null while it runs.
    Column("exit", JSONB),
    Column("output", LargeBinary),
    Index(None, "started_at", postgresql_using="brin"),
)

credentials = Table(
    "credentials",
    metadata,
    Column("project_id", Uuid, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("type", Text, nullable=False),
    Column("status", Text, nullable=False, server_default="active"),
    # What is no secret: header_name, prefix, trusted_domains, injection_location, token_url …
    Column("public", JSONB, nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    # The access token of an oauth2 credential, encrypted, and when it ends.
    Column("token_sealed", LargeBinary),
    _moment("token_expires_at"),
    # One process refreshes at a time: until then it is somebody's.
    _moment("refreshing_until"),
    _moment("created_at", default=True),
    _moment("updated_at", default=True),
)

agents = Table(
    "agents",
    metadata,
    Column("project_id", Uuid, primary_key=True),
    # Chosen by the caller.
    Column("id", Text, primary_key=True),
    # The current one. One that is made again under the id of a deleted one counts on from there, so
    # that a pinned version never becomes another; those before `first_version` are the deleted's.
    Column("version", Integer, nullable=False),
    Column("first_version", Integer, nullable=False),
    _moment("created_at", default=True),
    _moment("deleted_at"),
    # Serves: GET /agents, newest first, in keyset pages.
    Index(
        None,
        "project_id",
        text("created_at desc"),
        text("id desc"),
        postgresql_where=text("deleted_at is null"),
    ),
)

agent_versions = Table(
    "agent_versions",
    metadata,
    Column("project_id", Uuid, primary_key=True),
    Column("agent_id", Text, primary_key=True),
    Column("version", Integer, primary_key=True),
    # The definition as its caller sees it again, as a JSON object.
    Column("public", LargeBinary, nullable=False),
    # `tools` and `base_environment` with their secrets, encrypted JSON; null: they have none.
    Column("sealed", LargeBinary),
    # environments.id: what calls get copies of, where `base_environment` has sources. Made with
    # the first call, and again once it has expired.
    Column("template_id", Uuid),
    _moment("created_at", default=True),
)

consents = Table(
    "consents",
    metadata,
    # A human's yes to a call of a tool, by the interaction that asked: it counts once.
    Column("interaction_id", Uuid, primary_key=True),
    Column("call_id", Text, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    _moment("given_at", default=True),
)

egress_log = Table(
    "egress_log",
    metadata,
    Column("environment_id", Uuid, primary_key=True),
    # Ordered by time.
    Column("id", Uuid, primary_key=True),
    Column("project_id", Uuid, nullable=False),
    _moment("at", default=True),
    Column("host", Text, nullable=False),
    Column("port", Integer, nullable=False),
    # `tunnel`, `https` (opened) or `http`.
    Column("kind", Text, nullable=False),
    Column("method", Text),
    # Without its query.
    Column("path", Text),
    Column("decision", Text, nullable=False),
    Column("reason", Text),
    # The allowlist entry that matched, and the credential that was added.
    Column("rule", Text),
    Column("credential", Text),
    Column("status", SmallInteger),
    Column("bytes_up", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes_down", BigInteger, nullable=False, server_default=text("0")),
    Column("duration_ms", Integer),
    Index(None, "at", postgresql_using="brin"),
)
