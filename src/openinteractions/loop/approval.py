"""Tools that need a human's consent (ruling R24).

A call of such a tool is not committed as its own step but as a function call named `approval`, for
which the run waits like for any function of the caller's. The caller's `function_result` approves,
denies, or edits the arguments; the next interaction then begins with the tool's own call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, cast

import orjson

from openinteractions.errors import Invalid
from openinteractions.models.port import Json, ToolCall
from openinteractions.tools.port import Call, Tool
from openinteractions.tools.toolbox import Toolbox

NAME = "approval"
MARK = "asks_for_consent"
"""Key of such a call: a function of the caller's may have the same name."""
_WORDS: Mapping[str, "Verdict"] = {
    "approve": "approve",
    "approved": "approve",
    "allow": "approve",
    "yes": "approve",
    "deny": "deny",
    "denied": "deny",
    "reject": "deny",
    "no": "deny",
    "edit": "edit",
}

Verdict: TypeAlias = Literal["approve", "deny", "edit"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a human said about one call."""

    verdict: Verdict
    arguments: Json | None = None
    """In place of the model's, where the verdict is `edit`."""


class Supervised(Toolbox):
    """A toolbox some of whose tools need consent."""

    def __init__(self, tools: Toolbox, patterns: Sequence[str]) -> None:
        """Ask before tools whose names match one of the patterns (`*` stands for anything)."""
        super().__init__(tools.all())
        self._patterns = list(patterns)

    def find(self, name: str) -> Tool | None:
        """The tool that a model's call means; one that needs consent only asks for it."""
        tool = super().find(name)
        if tool is None or not self._needs_consent(name):
            return tool
        return Asking(tool, name)

    def _needs_consent(self, name: str) -> bool:
        return any(means(pattern, name, self) for pattern in self._patterns)


def means(pattern: str, name: str, tools: Toolbox) -> bool:
    """Whether a pattern means the tool of this name.

    A tool of an MCP server is also known by the names that the server and the request give: the
    model's name for it may be a shortened one.
    """
    tool = Toolbox.find(tools, name)
    if tool is None:
        return False
    step = tool.call_step(ToolCall(None, name, {}))
    known = {name, f"{step['server_name']}__{step['name']}"} if "server_name" in step else {name}
    return any(fnmatchcase(each.lower(), pattern.lower()) for each in known)


class Asking:
    """Stands for a tool that needs consent: its call asks for it. Implements `tools.port.Tool`."""

    is_pure = False

    def __init__(self, tool: Tool, name: str) -> None:
        self._tool = tool
        self._name = name

    def declaration(self) -> Json:
        """The tool's own: the model does not know that somebody is asked."""
        return self._tool.declaration()

    def call_step(self, call: ToolCall) -> Json:
        """The function call that asks."""
        arguments = {"tool": self._name, "arguments": self.meant(call)}
        return {"type": "function_call", "name": NAME, "arguments": arguments, MARK: True}

    def meant(self, call: ToolCall) -> Json:
        """The arguments as the tool takes them."""
        return self._tool.call_step(call)["arguments"]

    async def run(self, call: Call) -> Json:
        """Never called: the caller answers."""
        raise NotImplementedError

    def failure(self, message: str) -> Json:
        """Of the tool."""
        return self._tool.failure(message)

    async def stop(self, key: str) -> None:
        """Nothing runs."""


def carried_out(pending: Sequence[Json], steps: Sequence[Json], tools: Toolbox) -> list[Json]:
    """The calls that the answers in an input have approved, in their order.

    Each is `{call_id, tool, arguments}`: who asked, and what is to be called.

    Args:
        pending: The open calls of the interaction before.
        steps: The input.
        tools: The new interaction's.

    Raises:
        Invalid: An answer to an approval says neither yes nor no, or its tool is gone.
    """
    asked = {call["id"]: call for call in pending if call.get(MARK)}
    answers = {
        step["call_id"]: step
        for step in steps
        if step["type"] == "function_result" and step["call_id"] in asked
    }
    approved: list[Json] = []
    for call_id, call in asked.items():
        answer = answers.get(call_id)
        if answer is None:
            continue
        decision = read(answer)
        if decision.verdict == "deny":
            continue
        name: str = call["arguments"]["tool"]
        if tools.find(name) is None:
            raise Invalid(
                f"The tool '{name}' was approved, but this request does not have it: repeat the "
                "'tools' (and 'agent') of the request before."
            )
        arguments = decision.arguments
        if arguments is None:
            arguments = call["arguments"]["arguments"]
        approved.append({"call_id": call_id, "tool": name, "arguments": arguments})
    return approved


def read(answer: Json) -> Decision:
    """What the `function_result` of an approval says.

    Raises:
        Invalid: It says neither yes nor no; the message shows how to.
    """
    if answer.get("is_error"):
        return Decision("deny")
    said = _plain(answer.get("result"))
    if isinstance(said, str):
        verdict = _WORDS.get(said.strip().strip(".!").lower())
        if verdict in ("approve", "deny"):
            return Decision(verdict)
    elif isinstance(said, dict):
        fields = cast("Json", said)
        verdict = _WORDS.get(str(fields.get("decision", "")).lower())
        if verdict is None and isinstance(fields.get("approved"), bool):
            verdict = "approve" if fields["approved"] else "deny"
        arguments: Any = fields.get("arguments")
        if verdict is not None and arguments is None and verdict != "edit":
            return Decision(verdict)
        if verdict is not None and isinstance(arguments, dict):
            return Decision(verdict, None if verdict == "deny" else cast("Json", arguments))
    raise Invalid(
        f"Invalid result for the approval '{answer['call_id']}': expected 'approve', 'deny', or "
        '{"decision": "approve" | "deny" | "edit", "arguments": {…}, "reason": "…"}.'
    )


def _plain(result: Any) -> Any:  # noqa: ANN401 - any JSON
    """A result without its wrapping: content blocks of text, or JSON in a string."""
    if isinstance(result, list):
        blocks = cast("list[Any]", result)
        if len(blocks) == 1 and isinstance(blocks[0], dict):
            return _plain(cast("Json", blocks[0]).get("text"))
        return blocks
    if isinstance(result, str) and result.lstrip().startswith("{"):
        try:
            return orjson.loads(result)
        except orjson.JSONDecodeError:
            return result
    return result
