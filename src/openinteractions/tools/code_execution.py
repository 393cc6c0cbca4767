"""The tool `code_execution`: code of the model's, run in the sandbox of its run.

Python keeps its variables from call to call, and shows the figures that it leaves open. Every call
is keyed (ruling R5): a run that is taken over waits for the execution that it finds.
"""

import asyncio
import base64
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from openinteractions.errors import RequestError, Unready
from openinteractions.models.port import Json, ToolCall
from openinteractions.sandbox.port import Exit, NotBegun, SandboxError
from openinteractions.tools import output
from openinteractions.tools.port import Call, Done, Means, Tool, Workplace
from openinteractions.wire import pictures

NAME = "code_execution"
TIMEOUT_S = 600.0

_MAX_ARGUMENT_BYTES = 100 * 1024
"""The kernel takes at most 128 KiB as one argument of a command."""
_MAX_FIGURES_BYTES = 8 * 2**20
_MAX_FIGURES = 4
_MAX_WORDS = 1000
"""Looked at among what else is printed meanwhile."""
_MAX_FIGURE_CHARS = 4 * 2**20
"""Of base64."""
_PNG = b"\x89PNG\r\n\x1a\n"
_WORD = re.compile(r"\S+")
_SESSION = "main"
_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "bash": ("/bin/bash", "-c"),
    "javascript": ("node", "-e"),
}
_PYTHON = "python"
_ALIASES: Mapping[str, str] = {
    "py": _PYTHON,
    "python3": _PYTHON,
    "sh": "bash",
    "shell": "bash",
    "js": "javascript",
    "node": "javascript",
    "nodejs": "javascript",
}
"""What models call the languages, too."""
_DRAWS = ("plt", "matplotlib", "plot", "fig", "sns", "seaborn")
_SHOW_FIGURES = """
def _oi_figures():
    import sys
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return
    import base64, io
    for number in pyplot.get_fignums()[:4]:
        data = io.BytesIO()
        pyplot.figure(number).savefig(data, format="png", bbox_inches="tight")
        print(base64.b64encode(data.getvalue()).decode())
    pyplot.close("all")
_oi_figures()
del _oi_figures
"""

_DESCRIPTION = """\
Runs code in a Linux sandbox and returns what it prints. Use it for every calculation, for data, \
for files, and to try things out instead of guessing.

- `python`: variables, imports and functions stay for later calls. The value of a last expression \
is shown. Figures of matplotlib that are open at the end are returned as images.
- `bash`: a shell of its own for each call, in /workspace.
- `javascript`: Node, for each call anew.

Files in /workspace stay for later calls and later turns; /tmp does not. A call ends after ten \
minutes: start servers and other long jobs in the background. Where there is network access at \
all, it may be limited to some hosts; a refusal says why. Of an output longer than 24 kB you see \
the beginning and the end; a file in /home/agent/outputs, named there, has the whole."""

_PARAMETERS: Json = {
    "type": "object",
    "properties": {
        "language": {
            "type": "string",
            "enum": ["python", "bash", "javascript"],
            "description": "What the code is written in.",
        },
        "code": {"type": "string", "description": "The code to run."},
    },
    "required": ["language", "code"],
}


def tools(config: Json, means: Means) -> Mapping[str, Tool]:
    """The one tool that this is, by its name."""
    del config
    return {NAME: CodeExecution(means.workplace)}


class CodeExecution:
    """Implements `tools.port.Tool`; keyed."""

    is_pure = False

    def __init__(self, workplace: Workplace | None) -> None:
        self._place = workplace

    def declaration(self) -> Json:
        """The function that the model sees."""
        return {
            "type": "function",
            "name": NAME,
            "description": _DESCRIPTION,
            "parameters": _PARAMETERS,
        }

    def call_step(self, call: ToolCall) -> Json:
        """A `code_execution_call` step; its language by the name that it is declared with."""
        language: Any = call.arguments.get("language") or _PYTHON
        if isinstance(language, str):
            language = _ALIASES.get(language.lower(), language.lower())
        arguments = {**call.arguments, "language": language}
        return {"type": "code_execution_call", "arguments": arguments}

    def failure(self, message: str) -> Json:
        """A `code_execution_result` step that says what went wrong."""
        return _failed(message)

    async def run(self, call: Call) -> Json:
        """Run the code; a `code_execution_result` step."""
        try:
            return await self._run(call.step["arguments"], call.key)
        except NotBegun as error:
            return _failed(f"Not run: {error.message}")
        except Unready as error:
            return _failed(
                f"The sandbox could not be reached, so it is unknown whether this ran: "
                f"{error.message}"
            )
        except (RequestError, SandboxError) as error:
            return _failed(f"The sandbox could not run this: {error.message}")

    async def stop(self, key: str) -> None:
        """Kill the code that runs, and what shows its figures."""
        assert self._place is not None
        await self._place.kill(key)
        await self._place.kill(_figures_of(key))

    async def _run(self, arguments: Json, key: str) -> Json:
        assert self._place is not None
        language, code = str(arguments.get("language")), str(arguments.get("code") or "")
        if language == _PYTHON:
            done = await self._python(code, key)
            figures = await self._figures(code, key) if done.exit.outcome == "exited" else []
            return _result(done, await output.shown(self._place, done, key), figures)
        command = _COMMANDS.get(language)
        if command is None:
            return _failed(f"There is no language {language!r}: use python, bash or javascript.")
        if len(code.encode()) > _MAX_ARGUMENT_BYTES:
            return _failed("The code is longer than 100 kB: write it into a file in parts.")
        done = await self._place.execute(
            key, [*command, code], timeout_s=TIMEOUT_S, max_output_bytes=output.KEPT_BYTES
        )
        return _result(done, await output.shown(self._place, done, key))

    async def _python(self, code: str, key: str) -> Done:
        assert self._place is not None
        return await self._place.execute(
            key,
            [code],
            session=_SESSION,
            timeout_s=TIMEOUT_S,
            max_output_bytes=output.KEPT_BYTES,
        )

    async def _figures(self, code: str, key: str) -> list[Json]:
        """The figures that the code has left open, as image blocks."""
        if not any(word in code for word in _DRAWS):
            return []
        assert self._place is not None
        drawn = await self._place.execute(
            _figures_of(key),
            [_SHOW_FIGURES],
            session=_SESSION,
            timeout_s=60.0,
            max_output_bytes=_MAX_FIGURES_BYTES,
        )
        if drawn.exit.code != 0 or drawn.exit.truncated:
            return []
        return await asyncio.to_thread(_images, drawn.text)


def _images(text: str) -> list[Json]:
    """The first words that are PNG files in base64, as image blocks; why, where one is not shown.

    They come from a sandbox, where any code may print into them.
    """
    found = (
        png
        for word in islice(_WORD.finditer(text), _MAX_WORDS)
        if word.end() - word.start() <= _MAX_FIGURE_CHARS and (png := _png(word[0])) is not None
    )
    return [_figure(png) for png in islice(found, _MAX_FIGURES)]


def _png(data: str) -> bytes | None:
    if not data.startswith("iVBOR"):
        return None
    try:
        png = base64.b64decode(data, validate=True)
    except ValueError:
        return None
    return png if png.startswith(_PNG) else None


def _figure(png: bytes) -> Json:
    problem = pictures.problem(png)
    if problem is not None:
        return {"type": "text", "text": f"[A figure is not shown: it {problem}.]"}
    data = base64.b64encode(png).decode()
    return {"type": "image", "mime_type": "image/png", "data": data}


def _figures_of(key: str) -> str:
    return f"{key}.figures"


def _result(done: Done, text: str, figures: list[Json] | None = None) -> Json:
    remark = _remark(done.exit)
    remarks = " ".join(([] if remark is None else [remark]) + _notes(done.exit))
    if remarks:
        text = f"{text.rstrip()}\n[{remarks}]".lstrip() if text.strip() else f"[{remarks}]"
    result: Any = text
    if figures:
        result = [*([{"type": "text", "text": text}] if text else []), *figures]
    return {"type": "code_execution_result", "result": result, "is_error": remark is not None}


_UNKNOWN = (
    "Outcome unknown: the sandbox was lost while this ran. It may have taken effect, in part or as "
    "a whole; look before it is repeated."
)
_OUT_OF_MEMORY = (
    "The sandbox ran out of memory meanwhile, and a process was killed for it: work on less at "
    "once."
)
_SESSION_ENDED = "The Python session has ended with it: its variables and imports are gone."
_SESSION_NEW = "The Python session is a new one: it has no variables of earlier calls."


def _remark(end: Exit) -> str | None:
    """What the output alone does not say about a bad end; None for a good one."""
    if end.outcome == "unknown":
        return _UNKNOWN
    if end.timed_out:
        return f"Stopped: it ran longer than {TIMEOUT_S:g} seconds."
    if end.outcome == "killed":
        return output.stopped(end)
    if end.signal is not None:
        return f"Ended by signal {end.signal}."
    return f"Exit code {end.code}." if end.code else None


def _notes(end: Exit) -> list[str]:
    """What the model should know besides, of a good end too."""
    notes: list[str] = []
    if end.out_of_memory:
        notes.append(_OUT_OF_MEMORY)
    if end.has_ended_session:
        notes.append(_SESSION_ENDED)
    elif end.is_fresh_session and end.code:
        notes.append(_SESSION_NEW)
    return notes


def _failed(message: str) -> Json:
    return {"type": "code_execution_result", "result": message, "is_error": True}
