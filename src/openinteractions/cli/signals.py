"""The signals that stop a long-running command."""

import asyncio
import signal
from collections.abc import Callable

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_stop(action: Callable[[], None]) -> None:
    """From now on these signals do this. A signal that `nohup` or a shell ignores stays ignored."""
    loop = asyncio.get_running_loop()
    for number in _STOP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, action)
