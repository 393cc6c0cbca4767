"""The container engine: which one, and whether sandboxes can be started on it."""

import asyncio
from typing import Final

from openinteractions.sandbox.docker import DockerBackend, tls_context
from openinteractions.sandbox.port import Health, SandboxError
from openinteractions.settings import SandboxSettings

_PATIENCE_S: Final = 10.0


def backend(settings: SandboxSettings) -> DockerBackend:
    """The engine that the settings name.

    Raises:
        BackendDown: Its address or its certificates are wrong.
    """
    certs = settings.docker_certs
    tls = None if certs is None else tls_context(certs.expanduser())
    return DockerBackend(settings.engine_url(), tls=tls)


async def examine(engine: DockerBackend, settings: SandboxSettings) -> Health:
    """What the engine says, if sandboxes can be started on it.

    Raises:
        AppError: They cannot; the message says what to do.
    """
    try:
        async with asyncio.timeout(_PATIENCE_S):
            health = await engine.health()
            image = await engine.image_id(settings.image)
    except TimeoutError as error:
        raise SandboxError("The container engine does not answer in time.") from error
    if image is None:
        raise SandboxError(
            f"The engine has no image '{settings.image}': run scripts/sandbox-image."
        )
    if settings.runtime is not None and settings.runtime not in health.runtimes:
        raise SandboxError(
            f"The engine has no runtime '{settings.runtime}': install it, or change "
            "sandbox.runtime."
        )
    return health
