"""All settings, as one tree, read once at the entry point; below it, values are arguments.

Sources, strongest first: command-line options, environment (`OI_…`, nested names joined by two
underscores), the TOML file (`--config`, `OI_CONFIG`, else `openinteractions.toml` in the working
folder), the defaults here. `docs/settings.md` documents every field; a test holds the two together.
"""

import os
import re
import tomllib
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from openinteractions.errors import SetupError

DEFAULT_CONFIG = Path("openinteractions.toml")
_VENDOR_KEYS = {
    "gemini": ("GEMINI_API_KEY", "gemini", "https://generativelanguage.googleapis.com"),
    "openai": ("OPENAI_API_KEY", "openai", "https://api.openai.com/v1"),
    "anthropic": ("ANTHROPIC_API_KEY", "anthropic", "https://api.anthropic.com"),
}

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(value: object) -> object:
    """Read `90`, `"90"` or `"1.5h"` (ms, s, m, h, d) as a duration; a bare number is seconds."""
    match = (
        re.fullmatch(r"\s*([0-9.]+)\s*(ms|s|m|h|d)?\s*", value) if isinstance(value, str) else None
    )
    return float(match[1]) * _UNITS[match[2] or "s"] if match else value


def duration(text: str) -> timedelta:
    """Read a duration as the settings do.

    Raises:
        SetupError: It is none, or not positive.
    """
    try:
        value = TypeAdapter(Duration).validate_python(text)
    except ValidationError:
        value = timedelta(0)
    if value <= timedelta(0):
        raise SetupError(f"{text!r} is no duration: write 90, 12h or 7d")
    return value


Duration = Annotated[timedelta, BeforeValidator(_duration)]

ProviderKind = Literal["openai", "gemini", "anthropic", "local"]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _looked_up(secret: SecretStr | None) -> str | None:
    """An API key, with `env:NAME` looked up.

    Raises:
        SetupError: The named variable is not set.
    """
    if secret is None:
        return None
    text = secret.get_secret_value()
    if not text.startswith("env:"):
        return text
    name = text.removeprefix("env:")
    value = os.environ.get(name)  # noqa: TID251 - settings are the entry point
    if not value:
        raise SetupError(f"api_key = {text!r}: the environment variable {name} is not set")
    return value


class ProviderSettings(_Group):
    """One upstream, addressed as `<name>/<model>`."""

    kind: ProviderKind
    """Its wire format: `openai`, `gemini`, `anthropic` or `local`."""
    base_url: str | None = None
    """Root of its API; the vendor's public address if left out."""
    api_key: SecretStr | None = None
    """A literal, or `env:NAME` to read an environment variable."""
    connect_timeout: Duration = timedelta(seconds=10)
    """Time to reach the upstream."""
    idle_timeout: Duration = timedelta(seconds=120)
    """Longest silence inside an answer before it counts as broken off."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Extra request headers."""

    def key(self) -> str | None:
        """The API key, with `env:NAME` looked up.

        Raises:
            SetupError: The named variable is not set.
        """
        return _looked_up(self.api_key)


class PriceSettings(_Group):
    """US dollars per million tokens; overrides the packaged table."""

    input: float = Field(ge=0)
    cached_input: float | None = Field(default=None, ge=0)
    output: float = Field(ge=0)


class ModelSettings(_Group):
    """Which model an ID means."""

    default: str | None = None
    """What `openinteractions demo` and examples use; the first provider's model if left out."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Requested ID → `provider/model`, so that an application runs on another model unchanged."""
    fallbacks: dict[str, list[str]] = Field(default_factory=dict)
    """`provider/model` → those to try, in order, while it stays down."""
    prices: dict[str, PriceSettings] = Field(default_factory=dict)
    """Model ID → price."""
    context_tokens: dict[str, Annotated[int, Field(ge=1024)]] = Field(default_factory=dict)
    """Model ID → its context window, in tokens; overrides the packaged table."""
    attempts: int = Field(default=4, ge=1, le=20)
    """Tries of one model for one turn before the next in the chain, the first included."""
    max_retry_wait: Duration = timedelta(seconds=30)
    """Longest single wait between tries, whatever `Retry-After` asks."""


class AgentSettings(_Group):
    """Built-in agents."""

    model: str | None = None
    """What built-in agents think with, unless a request says otherwise."""


class NetworkSettings(_Group):
    """Outbound requests made for users."""

    allow: list[IPv4Network | IPv6Network] = Field(default_factory=list[IPv4Network | IPv6Network])
    """Private ranges that the SSRF guard lets users' URLs reach."""


class SearchSettings(_Group):
    """The backend that the tool `google_search` asks where the vendor has no search of its own."""

    kind: Literal["searxng", "brave", "tavily", "json"] | None = None
    """What it is; without one, `google_search` works with Gemini models only."""
    url: str | None = None
    """Root of a SearXNG; of `json` a template with `{query}` and, if need be, `{limit}`; else the
    vendor's public address if left out."""
    api_key: SecretStr | None = None
    """A literal, or `env:NAME` to read an environment variable."""
    results: int = Field(default=8, ge=1, le=20)
    """Most results of one query."""
    timeout: Duration = timedelta(seconds=15)
    """Longest that one request to it may take."""
    key_header: str = "Authorization"
    """Of `json`: the header of the key; `Authorization` gets `Bearer` before it."""
    results_field: str = "results"
    """Of `json`: where the list of results lies, as names with dots between; empty: the answer is
    the list."""
    title_field: str = "title"
    """Of `json`: a result's title, likewise."""
    url_field: str = "url"
    """Of `json`: a result's URL, likewise."""
    snippet_field: str = "snippet"
    """Of `json`: a result's excerpt, likewise."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """Refuse what could not be asked."""
        if self.kind in ("searxng", "json") and not self.url:
            raise ValueError(f"search.kind = {self.kind!r} needs search.url")
        if self.kind == "json" and "{query}" not in (self.url or ""):
            raise ValueError("search.url needs a {query} where the query belongs")
        if self.kind in ("brave", "tavily") and self.api_key is None:
            raise ValueError(f"search.kind = {self.kind!r} needs search.api_key")
        return self

    def key(self) -> str | None:
        """The API key, with `env:NAME` looked up.

        Raises:
            SetupError: The named variable is not set.
        """
        return _looked_up(self.api_key)


class LimitSettings(_Group):
    """What one server, request or run may take."""

    max_body_bytes: int = Field(default=100 * 2**20, ge=1024)
    """Largest request body, in bytes; a larger one is a 413."""
    max_json_depth: int = Field(default=100, ge=8, le=200)
    """Deepest nesting of a request body; deeper is a 400."""
    body_timeout: Duration = timedelta(seconds=60)
    """Longest silence of a client inside its request body."""
    max_steps: int = Field(default=200, ge=1)
    """Most steps that one interaction may generate."""
    max_run_time: Duration = timedelta(hours=2)
    """Longest one interaction may run."""
    max_fetch_bytes: int = Field(default=50 * 2**20, ge=1024)
    """Largest file fetched from a `uri` in the input, in bytes."""


class WorkerSettings(_Group):
    """Leases and concurrency."""

    concurrency: int = Field(default=1000, ge=1)
    """Runs at once in one worker process."""
    project_concurrency: int = Field(default=500, ge=1)
    """Runs at once of one project, over all workers."""
    provider_concurrency: int = Field(default=1000, ge=1)
    """Runs at once that wait on one provider, over all workers."""
    heartbeat: Duration = timedelta(seconds=3)
    """How often a process says that it lives."""
    dead_after: Duration = timedelta(seconds=10)
    """Silence after which its runs go to another worker."""
    max_attempts: int = Field(default=5, ge=1)
    """Deaths without progress after which a run is failed."""
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on which a worker of its own serves `/metrics`, on all addresses, without a key."""
    upkeep_interval: Duration = timedelta(minutes=15)
    """How often expired interactions and event logs are dropped."""
    flush_interval: Duration = timedelta(milliseconds=25)
    """How long stream deltas are gathered before they are committed."""


class NetworkPolicy(_Group):
    """Hosts that sandboxes may reach."""

    mode: Literal["open", "disabled", "allowlist"] = "open"
    """`open`: every public address; `disabled`: none; `allowlist`: only `domains`."""
    domains: list[str] = Field(default_factory=list)
    """Exact hosts, `*.example.com` (not the apex), or `*`."""


class SandboxSettings(_Group):
    """Sandboxes, and the broker that runs them."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """Whether `serve` runs a broker: `auto` where a container engine answers."""
    docker_url: str | None = None
    """The engine: `unix:///…` or `tcp://…`; `DOCKER_HOST`, else the usual socket, if left out."""
    docker_certs: Path | None = None
    """Folder with `ca.pem`, `cert.pem` and `key.pem` for an engine behind TLS."""
    image: str = "openinteractions/sandbox:latest"
    """What sandboxes are started from; `scripts/sandbox-image` builds it."""
    runtime: str | None = None
    """The engine's runtime for sandboxes, such as `runsc` (gVisor)."""
    broker: str = "local"
    """This broker's name. Environments stay with it: keep it over restarts, one name a broker."""
    listen: str | None = None
    """Where the broker listens: `unix:///…` or `https://0.0.0.0:8090`; a socket in its data
    folder if left out."""
    address: str | None = None
    """How other machines reach this broker, if not by `listen`."""
    tls_cert: Path | None = None
    """Certificate chain of a broker that listens on https."""
    tls_key: Path | None = None
    """Its private key."""
    tls_ca: Path | None = None
    """What clients check brokers' certificates with; the system's roots if left out."""
    data_dir: Path | None = None
    """Files of the environments; `sandboxes` in the data folder if left out."""
    disk: Literal["auto", "image", "folder"] = "auto"
    """`image`: a file system of its own for each environment, which bounds its size (needs root);
    `folder`: a plain folder; `auto`: images where they work."""
    cpus: float = Field(default=2.0, gt=0)
    """Processors of one sandbox."""
    memory_bytes: int = Field(default=2 * 2**30, ge=128 * 2**20)
    """Memory of one sandbox, temporary files included."""
    pids: int = Field(default=512, ge=32)
    """Processes and threads of one sandbox."""
    disk_bytes: int = Field(default=4 * 2**30, ge=16 * 2**20)
    """Files of one environment."""
    tmp_bytes: int = Field(default=512 * 2**20, ge=2**20)
    """Temporary files of one sandbox; they count as memory."""
    warm: int = Field(default=1, ge=0)
    """Sandboxes kept ready, so that a first command need not wait."""
    max_running: int = Field(default=20, ge=1)
    """Sandboxes that one broker runs at once; the idlest one is stopped for the next."""
    idle_stop: Duration = timedelta(minutes=15)
    """An environment's sandbox stops after so long without use; its files stay."""
    ttl: Duration = timedelta(days=7)
    """An environment is deleted after so long without use."""
    max_environments: int = Field(default=1000, ge=1)
    """Environments of one project; those expired, deleted or never used do not count."""
    log_retention: Duration = timedelta(days=7)
    """How long egress decisions and executions are kept."""
    network: NetworkPolicy = Field(default_factory=NetworkPolicy)
    """Where an environment that says nothing may connect to."""
    ceiling: NetworkPolicy = Field(default_factory=NetworkPolicy)
    """What no request can go beyond."""
    ports: list[int] = Field(default_factory=lambda: [80, 443])
    """Ports of other hosts that sandboxes may connect to."""
    skills_dir: Path | None = None
    """Folder of skills for sources of type `skill_registry`, one folder each."""
    gcs_url: str = "https://storage.googleapis.com"
    """Where sources of type `gcs` are read from."""
    code_execution: Literal["sandbox", "vendor"] = "sandbox"
    """Who runs a model's `code_execution` tool: our sandbox, or the vendor where it has one."""

    def home(self, data: Path) -> Path:
        """The broker's data folder, expanded; not created.

        Args:
            data: The server's data folder.
        """
        chosen = self.data_dir
        return data / "sandboxes" if chosen is None else chosen.expanduser().absolute()

    def engine_url(self) -> str:
        """Where the container engine listens."""
        usual = os.environ.get("DOCKER_HOST")  # noqa: TID251 - settings are the entry point
        return self.docker_url or usual or "unix:///var/run/docker.sock"


class LocalSettings(_Group):
    """The built-in local model."""

    model: str | None = None
    """Which packaged model; by free memory if left out."""
    gguf: Path | None = None
    """An own GGUF file instead of a packaged model."""
    models_dir: Path | None = None
    """Where packaged models are kept; the user's cache folder if left out."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; up to four of the machine's if left out."""
    context_tokens: int = Field(default=8192, ge=512)
    """Context window, shared by the parallel slots."""
    parallel: int = Field(default=2, ge=1, le=16)
    """Answers at once."""


class LogSettings(_Group):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"
    """`auto`: text on a terminal, else JSON."""


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix="OI_",
        env_nested_delimiter="__",
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port to listen on; 0 picks a free one."""
    public_url: str | None = None
    """Base of URIs that the server hands out; the request's own address if left out."""
    data_dir: Path | None = None
    """Embedded database and secrets; the user's data folder if left out."""
    database_url: SecretStr | None = None
    """`postgresql://…` of your own PostgreSQL 15 or later (also `DATABASE_URL`); left out: the
    embedded one."""
    database_pool: int = Field(default=20, ge=2)
    """Most database connections of one process."""
    bootstrap_api_key: SecretStr | None = None
    """An API key to make sure of at start, for scripted set-ups."""
    master_key: SecretStr | None = None
    """Seals secrets at rest: 32 bytes, base64; left out: a file in the data folder."""
    old_master_keys: list[SecretStr] = Field(default_factory=list[SecretStr])
    """Master keys that open what was sealed with them, but seal nothing more."""
    cors_origins: list[str] = Field(default_factory=lambda: ["*"])
    """Web origins that may call the API."""
    retention: Duration = timedelta(days=55)
    """How long stored interactions are kept."""
    event_retention: Duration = timedelta(days=2)
    """How long the event log of an ended interaction is kept; its stream is then read from its
    steps."""

    traces: bool = False
    """Send OpenTelemetry traces; on by itself where `OTEL_EXPORTER_OTLP_ENDPOINT` is set."""

    providers: dict[str, ProviderSettings] = Field(default_factory=dict)
    models: ModelSettings = Field(default_factory=ModelSettings)
    agents: AgentSettings = Field(default_factory=AgentSettings)
    network: NetworkSettings = Field(default_factory=NetworkSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    sandbox: SandboxSettings = Field(default_factory=SandboxSettings)
    local: LocalSettings = Field(default_factory=LocalSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    @field_validator("database_url", "bootstrap_api_key", "master_key", mode="before")
    @classmethod
    def _blank_is_left_out(cls, value: object) -> object:
        """An `.env` file has lines like `OI_MASTER_KEY=`."""
        return None if value == "" else value

    @field_validator("providers")
    @classmethod
    def _provider_names(cls, value: dict[str, ProviderSettings]) -> dict[str, ProviderSettings]:
        for name in value:
            if not name or "/" in name or name != name.strip():
                raise ValueError(f"provider name {name!r}: no slash, no blanks")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: options and file arrive merged in `init_settings`, see `load`."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings

    def home(self) -> Path:
        """The data folder, expanded; not created."""
        if self.data_dir is not None:
            return self.data_dir.expanduser().absolute()
        root = os.environ.get("XDG_DATA_HOME")  # noqa: TID251 - settings are the entry point
        base = Path(root) if root else Path.home() / ".local" / "share"
        return base / "openinteractions"

    def master_keys(self) -> tuple[str | None, list[str]]:
        """The master key, None for the data folder's file, and the old ones."""
        key = None if self.master_key is None else self.master_key.get_secret_value()
        return key, [old.get_secret_value() for old in self.old_master_keys]

    def models_home(self) -> Path:
        """The folder of the local models' files, expanded; not created.

        Not in the data folder: the files are large, public and the same for every data folder.
        """
        if self.local.models_dir is not None:
            return self.local.models_dir.expanduser().absolute()
        root = os.environ.get("XDG_CACHE_HOME")  # noqa: TID251 - settings are the entry point
        base = Path(root) if root else Path.home() / ".cache"
        return base / "openinteractions" / "models"


def load(config: Path | None = None, **options: Any) -> Settings:  # noqa: ANN401 - one per field
    """Read the settings.

    Args:
        config: The TOML file; None means `OI_CONFIG`, else the default file if it exists.
        options: Values from the command line; None ones are left out. They win over everything.

    Raises:
        SetupError: The file is missing or not TOML, or a value is wrong; the message names it.
    """
    env = os.environ  # noqa: TID251 - settings are the entry point
    values = _read_toml(config or (Path(env["OI_CONFIG"]) if env.get("OI_CONFIG") else None))
    if "database_url" not in values and env.get("DATABASE_URL"):
        values["database_url"] = env["DATABASE_URL"]
    if env.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        values.setdefault("traces", True)
    try:
        settings = Settings(**values)
        chosen = {key: value for key, value in options.items() if value is not None}
        if chosen:
            settings = Settings.model_validate(settings.model_dump() | chosen)
    except ValidationError as error:
        raise SetupError(_explain(error)) from None
    _add_vendor_keys(settings, env)
    return settings


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None and not DEFAULT_CONFIG.exists():
        return {}
    path = path or DEFAULT_CONFIG
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SetupError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"the configuration {path} is not valid TOML: {error}") from error


def _explain(error: ValidationError) -> str:
    lines = [
        f"  {'.'.join(str(part) for part in item['loc']) or '(root)'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)
    ]
    return "wrong settings:\n" + "\n".join(lines)


def _add_vendor_keys(settings: Settings, env: Any) -> None:  # noqa: ANN401 - os.environ's type
    """A vendor's own key variable configures that vendor, unless the name is taken."""
    for kind, (variable, name, base_url) in _VENDOR_KEYS.items():
        if env.get(variable) and name not in settings.providers:
            settings.providers[name] = ProviderSettings.model_validate(
                {"kind": kind, "base_url": base_url, "api_key": f"env:{variable}"}
            )
