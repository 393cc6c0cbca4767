"""A kept Python interpreter: runs one cell after the other, as a notebook does.

Run as `python3 -c <this file> <fd>`. Each message on that socket is four bytes of length and JSON:
a request `{code, env}` is answered with `{code, is_over, cpu_s, max_rss_bytes}`.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import inspect
import json
import linecache
import os
import resource
import socket
import sys
import traceback
import types
from typing import Any

_HEAD = 4
_INTERRUPTED = 130


class Notebook:
    """State that lives from cell to cell."""

    def __init__(self) -> None:
        self.module = types.ModuleType("__main__")
        self.module.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = self.module
        sys.argv = [""]
        self._count = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, code: str) -> tuple[int, bool]:
        """Run a cell, show its last expression; return an exit code and whether all is over."""
        self._count += 1
        name = f"<cell {self._count}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            self._run(code, name)
        except SystemExit as exit_:
            return self._exit_code(exit_), True
        except KeyboardInterrupt:
            self._explain(name)
            return _INTERRUPTED, True
        except BaseException:  # noqa: BLE001 - whatever a cell raises is shown, and the state is kept
            self._explain(name)
            return 1, False
        return 0, False

    def _run(self, code: str, name: str) -> None:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        if tree.body:
            self._evaluate(compile(tree, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
        if isinstance(last, ast.Expr):
            shown = ast.Expression(last.value)
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            sys.displayhook(self._evaluate(compile(shown, name, "eval", flags)))

    def _evaluate(self, code: types.CodeType) -> Any:  # noqa: ANN401 - a value of the cell's
        value = eval(code, self.module.__dict__)  # noqa: S307 - running code is what this is for
        if not code.co_flags & inspect.CO_COROUTINE:
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(value)

    def _exit_code(self, exit_: SystemExit) -> int:
        if exit_.code is None or isinstance(exit_.code, int):
            return (exit_.code or 0) & 255
        sys.stderr.write(f"{exit_.code}\n")
        return 1

    def _explain(self, name: str) -> None:
        """Print the traceback from the cell on; a broken exception must not break the notebook."""
        try:
            kind, error, trace = sys.exc_info()
            while trace is not None and trace.tb_frame.f_code.co_filename != name:
                trace = trace.tb_next
            traceback.print_exception(kind, error, trace)
        except BaseException:  # noqa: BLE001 - its own __str__ may raise
            sys.stderr.write("the error of this cell could not be shown\n")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _receive(channel: socket.socket) -> dict[str, Any] | None:
    raw = _receive_exactly(channel, _HEAD)
    return json.loads(_receive_exactly(channel, int.from_bytes(raw, "big"))) if raw else None


def _receive_exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        piece = channel.recv(size - len(parts))
        if not piece:
            return b""
        parts += piece
    return bytes(parts)


def _used() -> tuple[float, int]:
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    cpu_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return cpu_s, max(own.ru_maxrss, children.ru_maxrss) * 1024


def main() -> None:
    """Serve requests until the other end is gone, or a cell says that all is over."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    notebook = Notebook()
    is_over = False
    while not is_over:
        request = _receive(channel)
        if not request:
            break
        os.environ.update(request["env"])  # noqa: TID251 - the cell's own environment
        before, _ = _used()
        code, is_over = notebook.run(request["code"])
        _flush()
        after, peak = _used()
        answer = json.dumps(
            {"code": code, "is_over": is_over, "cpu_s": after - before, "max_rss_bytes": peak}
        ).encode()
        channel.sendall(len(answer).to_bytes(_HEAD, "big") + answer)
    _flush()
    os._exit(0)


if __name__ == "__main__":
    main()
