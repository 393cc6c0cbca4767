"""The `openinteractions` command."""

import asyncio
import errno
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from openinteractions import __version__
from openinteractions.errors import AppError
from openinteractions.settings import Settings, load

app = typer.Typer(
    name="openinteractions",
    help="A self-hosted, vendor-neutral server for the Interactions API.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
models_app = typer.Typer(help="Local models.", no_args_is_help=True)
interactions_app = typer.Typer(help="Interactions of all projects.", no_args_is_help=True)
secrets_app = typer.Typer(help="Secrets at rest.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")
app.add_typer(interactions_app, name="interactions")
app.add_typer(secrets_app, name="secrets")

Config = Annotated[Path | None, typer.Option(help="The TOML file with the settings.")]
DataDir = Annotated[Path | None, typer.Option(help="Embedded database and secrets.")]


def main() -> None:
    """Run the command; what the operator can mend is one line and exit code 2."""
    try:
        app()
    except AppError as error:
        print(f"openinteractions: {error.message}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        elif _is_database_lost(error):
            message = "the database was lost while starting or stopping: start again"
        else:
            raise
        print(f"openinteractions: {message}", file=sys.stderr)
        sys.exit(2)


_OF_FILES = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError)
_OF_THE_MACHINE: Final = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EADDRINUSE,
    errno.EADDRNOTAVAIL,
    errno.EROFS,
}


def _is_database_lost(error: BaseException) -> bool:
    """Whether an error, or every one of a group, is that the database went away."""
    from openinteractions.db.engine import LOST  # noqa: PLC0415 - only where something failed

    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return all(_is_database_lost(inner) for inner in group.exceptions)
    return isinstance(error, LOST) and not isinstance(error, _OF_FILES)


def _settings(config: Path | None, **options: Any) -> Settings:  # noqa: ANN401 - one per field
    from openinteractions import telemetry  # noqa: PLC0415 - commands load what they need

    settings = load(config, **options)
    telemetry.configure(level=settings.log.level, form=settings.log.format)
    return settings


def _run(work: Coroutine[Any, Any, None]) -> None:
    from openinteractions.cli.serve import loop_factory  # noqa: PLC0415 - as above

    async def cancellable() -> None:
        task = asyncio.current_task()
        assert task is not None
        # Like Ctrl-C: whatever was started for the command is stopped first.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            runner.run(cancellable())
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except asyncio.CancelledError:
            sys.exit(128 + signal.SIGTERM)


@app.callback(invoke_without_command=True)
def _root(
    *, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks one.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
    auth: Annotated[
        bool, typer.Option("--auth/--no-auth", help="Ask for API keys. Off: loopback only.")
    ] = True,
    worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Run a worker in the same process.")
    ] = True,
) -> None:
    """Run the server: the API, a worker, and the embedded database unless DATABASE_URL is set."""
    settings = _settings(config, host=host, port=port, data_dir=data_dir)
    from openinteractions.cli import serve as command  # noqa: PLC0415 - as above

    _run(command.serve(settings, auth=auth, worker=worker, config=config))


@app.command()
def worker(*, config: Config = None) -> None:
    """Run a worker on the database of DATABASE_URL."""
    settings = _settings(config)
    from openinteractions.cli import serve as command  # noqa: PLC0415 - as above

    _run(command.work(settings))


@app.command()
def broker(*, data_dir: DataDir = None, config: Config = None) -> None:
    """Run a sandbox broker on the database of DATABASE_URL, beside its container engine."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import broker as command  # noqa: PLC0415 - as above

    _run(command.run(settings))


@app.command()
def migrate(
    *,
    data_dir: DataDir = None,
    config: Config = None,
    revision: Annotated[str, typer.Option(help="Where to; `base` empties the schema.")] = "head",
) -> None:
    """Bring the database's schema to this version's."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import admin  # noqa: PLC0415 - as above

    _run(admin.migrate(settings, revision))


@app.command()
def demo(
    *,
    model: Annotated[str | None, typer.Option(help="`provider/model`, or a local model.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the data folder.")] = False,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Show the server working: start one, talk to it with the SDK, kill it, start it again."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import demo as command  # noqa: PLC0415 - as above

    command.demo(settings, model=model, config=config, keep=keep)


@models_app.command("pull")
def models_pull(
    name: Annotated[str | None, typer.Argument(help="Which; by free memory if left out.")] = None,
    *,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Download a local model, checked against its publisher's checksum."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import models as command  # noqa: PLC0415 - as above

    _run(command.pull(settings, name))


@models_app.command("list")
def models_list(*, data_dir: DataDir = None, config: Config = None) -> None:
    """List the local models."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import models as command  # noqa: PLC0415 - as above

    command.show(settings)


@app.command()
def doctor(*, data_dir: DataDir = None, config: Config = None) -> None:
    """Say what is wrong and what to do: exit code 0 well, 1 warnings, 2 problems."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import doctor as command  # noqa: PLC0415 - as above

    async def examine() -> None:
        sys.exit(await command.examine(settings))

    _run(examine())


@interactions_app.command("list")
def interactions_list(
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 50,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """List what is under way: those that run first, the oldest of them on top."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import interactions as command  # noqa: PLC0415 - as above

    _run(command.show(settings, limit=limit))


@interactions_app.command("cancel")
def interactions_cancel(
    interaction: Annotated[str, typer.Argument(help="Its id; `interactions list` shows it.")],
    *,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Cancel an interaction, with the commands that it runs."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import interactions as command  # noqa: PLC0415 - as above

    _run(command.cancel(settings, interaction))


@secrets_app.command("rotate")
def secrets_rotate(
    *,
    new_key_file: Annotated[
        Path | None, typer.Option(help="The new key, base64; one is made if left out.")
    ] = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Give the data folder a new master key, or seal everything with OI_MASTER_KEY."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import secrets as command  # noqa: PLC0415 - as above

    _run(command.rotate(settings, new_key_file))


@keys_app.command("create")
def keys_create(
    *,
    name: Annotated[str, typer.Option(help="What it is for.")] = "key",
    project: Annotated[str, typer.Option(help="Whose it is; made if new.")] = "default",
    max_cost_per_day: Annotated[float | None, typer.Option(help="US dollars a day.")] = None,
    max_tokens_per_day: Annotated[int | None, typer.Option(help="Tokens a day.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Make an API key and print it; it is shown this once."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import admin  # noqa: PLC0415 - as above

    budget = admin.budget(max_cost_per_day, max_tokens_per_day)
    _run(admin.create_key(settings, name=name, project=project, budget=budget))


@keys_app.command("list")
def keys_list(*, data_dir: DataDir = None, config: Config = None) -> None:
    """List the keys, without their secrets."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import admin  # noqa: PLC0415 - as above

    _run(admin.list_keys(settings))


@keys_app.command("revoke")
def keys_revoke(
    prefix: Annotated[str, typer.Argument(help="How the key begins; `keys list` shows it.")],
    *,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Revoke a key; it stops working at once."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import admin  # noqa: PLC0415 - as above

    _run(admin.revoke_key(settings, prefix))


@keys_app.command("retention")
def keys_retention(
    retention: Annotated[str, typer.Argument(help="Such as 7d or 12h; `default` lifts it.")],
    project: Annotated[str, typer.Argument(help="The project.")] = "default",
    *,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Set how long a project's new interactions are kept."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import admin  # noqa: PLC0415 - as above

    _run(admin.keep_project(settings, project=project, retention=retention))


@keys_app.command("limit")
def keys_limit(
    project: Annotated[str, typer.Argument(help="The project.")] = "default",
    *,
    max_cost_per_day: Annotated[float | None, typer.Option(help="US dollars a day.")] = None,
    max_tokens_per_day: Annotated[int | None, typer.Option(help="Tokens a day.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Set what a whole project may take in a day (UTC); without options, lift it."""
    settings = _settings(config, data_dir=data_dir)
    from openinteractions.cli import admin  # noqa: PLC0415 - as above

    budget = admin.budget(max_cost_per_day, max_tokens_per_day)
    _run(admin.limit_project(settings, project=project, budget=budget))
