"""Hooks: commands and HTTP calls that an environment wants made around its agent's tools.

They are read from `.agents/hooks.json` (https://ai.google.dev/gemini-api/docs/agent-hooks). Both
kinds run in the sandbox, so that an HTTP hook goes through the egress proxy with its rules and
added secrets. They are keyed by their call (ruling R5): who takes a run over finds a hook's
execution instead of starting it again, so there is nothing to note. A hook that fails allows.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Final, Literal, TypeAlias

import orjson
import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema

from openinteractions.errors import RequestError
from openinteractions.models.port import Json, ToolCall
from openinteractions.sandbox.port import SandboxError
from openinteractions.tools.port import Call, Done, Tool, Workplace
from openinteractions.tools.workspace.tool import FileTool

_log = structlog.get_logger(__name__)

Event: TypeAlias = Literal["pre", "post"]

DEFAULT_TIMEOUT_S: Final = 30.0
MAX_TIMEOUT_S: Final = 300.0
MAX_HOOKS: Final = 32
"""Of one environment; what is beyond is left out, and noted."""
MAX_RULES: Final = 64
"""Of one file, likewise."""

_EVENTS: Mapping[str, Event] = {"pre_tool_execution": "pre", "post_tool_execution": "post"}
_MAX_MATCHER_CHARS: Final = 200
_MAX_NOTES: Final = 50
_MAX_GROUP_CHARS: Final = 64
_MAX_ERROR_CHARS: Final = 8_000
_MAX_REASON_CHARS: Final = 300
_MAX_PAYLOAD_BYTES: Final = 2**20
_MAX_REPLY_BYTES: Final = 64 * 1024
_CHUNK_CHARS: Final = 96 * 1024
"""The kernel takes at most 128 KiB as one argument of a command."""
_EXEMPT: Final = frozenset({"mcp_server_tool_call", "tool_search_call"})
"""Calls of these never reach the sandbox."""

# What an expression may be made of: nothing that is costly to compile, so no repetition with a
# count and no class of Unicode; `\w` is ASCII, as RE2 has it.
_TOKEN: Final = re.compile(
    r"\\[dDwWsSbB]|\\[!-/:-@\[-`{-~]"
    r"|\[\^?(?:[^\[\]\\]|\\[dDwWsS]|\\[!-/:-@\[-`{-~])+\]"
    r"|\((?:\?i\)|\?i?:|(?!\?))|[^\[\]{}\\(]"
)
_CLASSES: Final = {
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\W": "[^0-9A-Za-z_]",
    r"\s": r"[\t\n\f\r ]",
    r"\S": r"[^\t\n\f\r ]",
    r"\b": r"(?-u:\b)",
    r"\B": r"(?-u:\B)",
}
_ESCAPED: Final = re.compile(r"\\.")

# $1 arguments are the handler's command; what follows them is its standard input, in pieces.
_FEED = 'run=("${@:2:$1}"); printf %s "${@:$1+2}" | "${run[@]}" 2>/dev/null'


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """One handler, and the tools that it is for. It survives JSON: `Hook(**values)`."""

    event: Event
    group: str
    """The name that hooks.json gives it, for logs."""
    matcher: str
    """An expression for a tool's whole name, a part of RE2; "" and "*" mean every tool."""
    type: Literal["command", "http"]
    target: str
    """The command line, or the URL."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    timeout_s: float = DEFAULT_TIMEOUT_S

    def matches(self, name: str) -> bool:
        """Whether it is for the tool of this name."""
        return _predicate(self.matcher)(name)


# ---- reading hooks.json


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Handler(_Part):
    timeout: Annotated[float, Field(gt=0)] = DEFAULT_TIMEOUT_S


class _CommandHandler(_Handler):
    type: Literal["command"]
    command: Annotated[str, Field(min_length=1, max_length=16_384, pattern=r"^[^\x00]*$")]


_HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}$")]
_HeaderValue = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]{1,4096}$")]


class _HttpHandler(_Handler):
    type: Literal["http"]
    url: Annotated[str, Field(pattern=r"^https?://[^\s\x00-\x1f]+$", max_length=4096)]
    headers: Annotated[dict[_HeaderName, _HeaderValue], Field(max_length=50)] = {}


class _Rule(_Part):
    matcher: Annotated[str, Field(max_length=_MAX_MATCHER_CHARS)] = ""
    hooks: list[Any]


class _Group(_Part):
    enabled: bool = True
    pre_tool_execution: list[Any] = []
    post_tool_execution: list[Any] = []


_HANDLER: TypeAdapter[_CommandHandler | _HttpHandler] = TypeAdapter(
    Annotated[_CommandHandler | _HttpHandler, Field(discriminator="type")]
)
_GROUPS: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def parse(text: str, *, source: str) -> tuple[list[Hook], list[str]]:
    """The hooks of one hooks.json, in its order, and what is wrong with it.

    Whatever cannot be read is left out and noted; the rest counts. Never raises for bad content.

    Args:
        text: The file.
        source: Its path, for the notes.
    """
    notes: list[str] = []
    found = list(islice(_parsed(text, source, notes), MAX_HOOKS + 1))
    if len(found) > MAX_HOOKS:
        notes.insert(0, f"{source}: more than {MAX_HOOKS} hooks; the others are left out.")
    return found[:MAX_HOOKS], notes[:_MAX_NOTES]


def _parsed(text: str, source: str, notes: list[str]) -> Iterator[Hook]:
    try:
        groups = _GROUPS.validate_python(orjson.loads(text))
    except (orjson.JSONDecodeError, ValidationError):
        notes.append(f"{source}: not a JSON object; no hooks are read from it.")
        return
    rules = list(islice(_rules(groups, source, notes), MAX_RULES + 1))
    if len(rules) > MAX_RULES:
        notes.insert(0, f"{source}: more than {MAX_RULES} rules; the others are left out.")
    for rule, event, name, where in rules[:MAX_RULES]:
        yield from _of_rule(rule, event, name, where, notes)


def _rules(
    groups: dict[str, Any], source: str, notes: list[str]
) -> Iterator[tuple[Any, Event, str, str]]:
    """Every rule with its event, its group's name, and where it is."""
    for name, value in groups.items():
        shown = harmless(name, _MAX_GROUP_CHARS)
        where = f"{source}: group '{shown}'"
        try:
            group = _Group.model_validate(value)
        except ValidationError:
            notes.append(f"{where} is not understood; left out.")
            continue
        if group.enabled:
            for key, event in _EVENTS.items():
                for rule in getattr(group, key):
                    yield rule, event, shown, f"{where}, {key}"


def _of_rule(value: Any, event: Event, group: str, where: str, notes: list[str]) -> Iterator[Hook]:  # noqa: ANN401 - JSON
    try:
        rule = _Rule.model_validate(value)
    except ValidationError:
        notes.append(f"{where}: a rule is not understood; left out.")
        return
    if rule.hooks and _compiled(rule.matcher) is None:
        matcher = harmless(rule.matcher, _MAX_MATCHER_CHARS)
        notes.append(f"{where}: the matcher '{matcher}' is no usable expression; left out.")
        return
    # One more than count: whether there are too many is for the caller to see.
    for entry in rule.hooks[: MAX_HOOKS + 1]:
        try:
            handler = _HANDLER.validate_python(entry)
        except ValidationError:
            notes.append(f"{where}: a handler is not understood; left out.")
            continue
        is_command = isinstance(handler, _CommandHandler)
        yield Hook(
            event=event,
            group=group,
            matcher=rule.matcher,
            type=handler.type,
            target=handler.command if is_command else handler.url,
            headers={} if is_command else handler.headers,
            timeout_s=min(handler.timeout, MAX_TIMEOUT_S),
        )


@functools.lru_cache(maxsize=256)
def _compiled(matcher: str) -> Callable[[str], bool] | None:
    """Whether a name matches as a whole; None if the expression is not usable.

    Matched by the Rust engine that pydantic brings: like RE2 it takes linear time and knows no
    backreferences and no look-around, and an expression comes from whoever can write the file.
    """
    if matcher in ("", "*"):
        return lambda _: True
    plain = _plain(matcher)
    if plain is None:
        return None
    try:
        schema = core_schema.str_schema(pattern=rf"\A(?:{plain})\z", regex_engine="rust-regex")
        return SchemaValidator(schema).isinstance_python
    except SchemaError:
        return None


def _plain(matcher: str) -> str | None:
    """The expression with ASCII classes; None if it is more than those may be that come here."""
    if len(matcher) > _MAX_MATCHER_CHARS or not (matcher.isascii() and matcher.isprintable()):
        return None
    parts: list[str] = []
    at = depth = 0
    while at < len(matcher):
        token = _TOKEN.match(matcher, at)
        if token is None:
            return None
        found, at = token[0], token.end()
        # Else `a)|(b` would close the group that stands for the whole name.
        depth += found in ("(", "(?:", "(?i:")
        depth -= found == ")"
        if depth < 0:
            return None
        parts.append(_ESCAPED.sub(lambda escape: _CLASSES.get(escape[0], escape[0]), found))
    return "".join(parts)


def _predicate(matcher: str) -> Callable[[str], bool]:
    return _compiled(matcher) or (lambda _: False)


# ---- running them


def hooked(
    tools: Mapping[str, Tool],
    hooks: Sequence[Hook],
    *,
    workplace: Workplace | None,
    environment_id: str,
) -> Mapping[str, Tool]:
    """The same tools, with the hooks that are for them around each call.

    Args:
        tools: By their names. Those of MCP servers, and `tool_search`, are left as they are.
        hooks: What `parse` has found. Their places number them, so within one run they stay.
        workplace: Where hooks run; None where only declarations are needed.
        environment_id: As the public API shows it.
    """
    if workplace is None or not hooks:
        return tools
    numbered = list(enumerate(hooks))
    wrapped: dict[str, Tool] = {}
    for name, tool in tools.items():
        mine = [(number, hook) for number, hook in numbered if hook.matches(name)]
        is_exempt = tool.call_step(ToolCall(None, name, {}))["type"] in _EXEMPT
        wrapped[name] = (
            tool
            if is_exempt or not mine
            else _Hooked(tool, name, mine, workplace=workplace, environment_id=environment_id)
        )
    return wrapped


class _Hooked:
    """Implements `tools.port.Tool` around another one; of that one's class."""

    def __init__(
        self,
        tool: Tool,
        name: str,
        hooks: Sequence[tuple[int, Hook]],
        *,
        workplace: Workplace,
        environment_id: str,
    ) -> None:
        self._tool = tool
        self._name = name
        self._hooks = hooks
        self._place = workplace
        self._environment_id = environment_id

    @property
    def is_pure(self) -> bool:
        return self._tool.is_pure

    def declaration(self) -> Json:
        return self._tool.declaration()

    def call_step(self, call: ToolCall) -> Json:
        return self._tool.call_step(call)

    def failure(self, message: str) -> Json:
        return self._tool.failure(message)

    async def run(self, call: Call) -> Json:
        """Ask the hooks before, run the tool unless one denies it, tell the hooks after."""
        args: Json = call.step["arguments"]
        if isinstance(self._tool, FileTool):
            # A hook that looks for `/private/` has to see it, however the model has written it.
            args = self._tool.meant(args)
        payload: Json = {
            "tool_call": {"name": self._name, "args": args},
            "environment_id": self._environment_id,
        }
        for number, hook in self._of("pre"):
            reply = await self._ask(hook, _key(call.key, number, hook), payload)
            if reply.get("decision") == "deny":
                said = reply.get("reason")
                # Whatever else it is, `str` may not come to an end with it.
                reason = said if isinstance(said, str) and said else "no reason was given."
                return self._tool.failure(f"Denied by a hook: {reason[:_MAX_ERROR_CHARS]}")
        result = await self._tool.run(call)
        if result.get("is_error"):
            payload["error"] = _text(result.get("result"))[:_MAX_ERROR_CHARS]
        for number, hook in self._of("post"):
            await self._ask(hook, _key(call.key, number, hook), payload)
        return result

    async def stop(self, key: str) -> None:
        """Kill the tool's execution, and its hooks'."""
        await self._tool.stop(key)
        for number, hook in self._hooks:
            await self._place.kill(_key(key, number, hook))

    def _of(self, event: Event) -> list[tuple[int, Hook]]:
        return [(number, hook) for number, hook in self._hooks if hook.event == event]

    async def _ask(self, hook: Hook, key: str, payload: Json) -> Json:
        """What a hook says; nothing if it fails, which is logged."""
        try:
            return await self._reply(hook, key, payload)
        except _Failed as failure:
            why = str(failure)
        except (RequestError, SandboxError) as error:
            why = error.message
        _log.warning(
            "hook.failed",
            group=hook.group,
            event_name=hook.event,
            tool=self._name,
            reason=harmless(why, _MAX_REASON_CHARS),
        )
        return {}

    async def _reply(self, hook: Hook, key: str, payload: Json) -> Json:
        # ASCII, so that any cut is between characters.
        body = _ascii(payload)
        if len(body) > _MAX_PAYLOAD_BYTES:
            raise _Failed("the call is too large to be shown to a hook")
        pieces = [body[at : at + _CHUNK_CHARS] for at in range(0, len(body), _CHUNK_CHARS)]
        command = _command(hook)
        done = await self._place.execute(
            key,
            ["/bin/bash", "-c", _FEED, "hook", str(len(command)), *command, *pieces],
            timeout_s=hook.timeout_s,
            max_output_bytes=_MAX_REPLY_BYTES,
        )
        return _decision(hook, done)


def harmless(text: str, most: int) -> str:
    """A sandbox's text for a log: bounded, and what does not print is escaped."""
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode-escape").decode() for c in cut)


class _Failed(Exception):
    """A hook did not answer; the message says why."""


def _key(key: str, number: int, hook: Hook) -> str:
    return f"{key}.{hook.event}.{number}"


def _ascii(payload: Json) -> str:
    text = orjson.dumps(payload).decode()
    if text.isascii():
        return text
    return "".join(c if c.isascii() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    """JSON's escape: one, or two surrogates."""
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _command(hook: Hook) -> list[str]:
    if hook.type == "command":
        return ["/bin/bash", "-c", hook.target]
    headers = {"Content-Type": "application/json", "User-Agent": "openinteractions", **hook.headers}
    named = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    limit = ("--max-time", f"{hook.timeout_s:g}", "--proto", "=http,https")
    posted = ("--data-binary", "@-", "-H", "Expect:", *named)
    return ["curl", "-qsg", *limit, *posted, "-w", r"\n%{http_code}", "--url", hook.target]


def _decision(hook: Hook, done: Done) -> Json:
    if done.exit.timed_out:
        raise _Failed(f"it took longer than {hook.timeout_s:g} s")
    if done.exit.outcome != "exited" or done.exit.code != 0:
        raise _Failed(f"it ended badly ({done.exit.outcome}, exit code {done.exit.code})")
    text = done.text
    if hook.type == "http":
        text, _, status = text.rpartition("\n")
        if not status.startswith("2"):
            raise _Failed(f"it was answered with status {status[:3]}")
    if not text.strip() or hook.event == "post":
        return {}
    try:
        return _GROUPS.validate_python(orjson.loads(text))
    except (orjson.JSONDecodeError, ValidationError):
        raise _Failed("its answer is not a JSON object") from None


def _text(result: Any) -> str:  # noqa: ANN401 - whatever a tool's result holds
    return result if isinstance(result, str) else orjson.dumps(result, default=str).decode()
