"""The child process: one llama.cpp HTTP server on loopback, for as long as its parent lives.

Run by path, as a script of its own (`server.py` does), so that it imports nothing of this program
and a crash in native code costs this process only. The first line of standard input is a JSON
object of the keyword arguments of `serve`; the API key travels there, since arguments and
environment can be read from outside. The end of standard input means that the parent is gone or
wants no more. The one line on standard output says where the server listens.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def serve(  # noqa: PLR0913 - one field of a JSON document each
    *,
    path: str,
    name: str,
    api_key: str,
    threads: int,
    parallel: int,
    context_tokens: int,
    template: str | None,
) -> tuple[object, str]:
    """Load the model and start to listen.

    Returns:
        The server, which stops when it is collected, and its base URL.
    """
    # The one place that loads it; by name, since it has no type stubs.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.model_alias = {name}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [api_key]
    # The default is "*": any web page that the user visits could talk to the port.
    params.cors_origins = ""
    params.ui = False
    params.offline = True
    params.endpoint_props = False
    params.endpoint_slots = True
    # Trying which parameters fit into memory costs seconds at start.
    params.fit_params = False
    params.n_ctx = context_tokens
    params.n_parallel = parallel
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 256
    params.use_jinja = True
    if template is not None:
        params.chat_template = template
    # Warnings and errors; the levels above would log prompts.
    params.verbosity = 1
    server = xllamacpp.Server(params)
    return server, str(server.listening_address)


def main() -> None:
    """Serve until standard input ends or a signal asks to stop."""
    if sys.platform == "linux":
        # Also without a chance to close the pipe: SIGKILL of the parent ends this process.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches the whole group; the parent decides when this process stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Native code may print: keep the ready line's pipe clear of that.
    ready = os.dup(1)
    os.dup2(2, 1)
    arguments: dict[str, Any] = json.loads(_first_line())
    server, base_url = serve(**arguments)
    os.write(ready, json.dumps({"base_url": base_url}).encode() + b"\n")
    os.close(ready)
    while os.read(0, 4096):
        pass
    del server
    # Native destructors at interpreter exit are of no use to a process that keeps no state.
    os._exit(0)


def _first_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(0, 65536)
        if not chunk:
            sys.exit(f"{Path(__file__).name}: standard input ended before the first line")
        line += chunk
    return line


if __name__ == "__main__":
    main()
