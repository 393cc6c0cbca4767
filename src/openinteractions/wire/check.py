"""What types cannot say: combinations, names, formats; and what a response may repeat."""

import re
import unicodedata
from typing import Any, cast

from openinteractions.errors import Invalid
from openinteractions.wire.environment import public_source
from openinteractions.wire.explain import shown
from openinteractions.wire.fields import Json

MAX_ID_CHARS = 256
MAX_LABELS = 64
MAX_LABEL_CHARS = 63

_LABEL_CATEGORIES = frozenset({"Ll", "Lo", "Lm", "Mn", "Mc", "Nd", "Nl", "No"})
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")
_ECHOED = (
    "labels",
    "system_instruction",
    "generation_config",
    "agent_config",
    "response_format",
    "response_mime_type",
    "response_modalities",
    "safety_settings",
    "previous_interaction_id",
    "webhook_config",
    "cached_content",
    "limits",
)


_BUILT_IN = ("antigravity", "deep-research-", "code-mender")


def named_agent(body: Json) -> Json:
    """The body with the id of a built-in agent at `agent`: samples pass it as `model` too."""
    model: str | None = body.get("model")
    if model is None or "agent" in body or not model.startswith(_BUILT_IN):
        return body
    rest = {key: value for key, value in body.items() if key != "model"}
    return {**rest, "agent": model}


def combinations(body: Json) -> None:
    """Refuse fields that do not go together.

    Raises:
        Invalid: The message names both fields.
    """
    _model_or_agent(body)
    if body.get("background") and not body.get("store", True):
        raise Invalid("'background' needs the interaction to be stored; 'store' must not be false.")
    if "webhook_config" in body and not body.get("background"):
        raise Invalid("'webhook_config' needs 'background' to be true.")
    if "labels" in body:
        _labels(body["labels"])
    if "tools" in body or "generation_config" in body:
        tools(body)


def _model_or_agent(body: Json) -> None:
    if "model" in body and "agent" in body:
        raise Invalid("Only one of 'model' and 'agent' may be given.")
    if "model" in body:
        if "agent_config" in body:
            raise Invalid("'agent_config' needs an 'agent'; it is not allowed with 'model'.")
    elif "agent" in body:
        for name in ("generation_config", "cached_content"):
            if name in body:
                raise Invalid(f"'{name}' needs a 'model'; it is not allowed with 'agent'.")
        for name in ("response_format", "response_mime_type", "response_modalities"):
            if body.get(name):
                raise Invalid(f"'{name}' is not supported with 'agent': agents answer in text.")
    else:
        raise Invalid("Missing required parameter 'model' or 'agent'.")


def _labels(labels: dict[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise Invalid(f"Invalid value at 'labels': expected at most {MAX_LABELS} labels.")
    for key, value in labels.items():
        if not key or not key[0].isalpha() or not _is_label(key):
            raise Invalid(
                f"Invalid label key '{shown(key)}' at 'labels': expected at most "
                f"{MAX_LABEL_CHARS} lowercase letters, digits, '_' and '-', a letter first."
            )
        if not _is_label(value):
            raise Invalid(
                f"Invalid value at 'labels.{shown(key)}': expected at most {MAX_LABEL_CHARS} "
                "lowercase letters, digits, '_' and '-'."
            )


def _is_label(text: str) -> bool:
    return len(text) <= MAX_LABEL_CHARS and all(
        char in "_-" or unicodedata.category(char) in _LABEL_CATEGORIES for char in text
    )


def tools(body: Json) -> None:
    """Refuse tools that do not go together, and a choice among them that names others.

    Raises:
        Invalid: The message names them.
    """
    given = cast("list[Json]", body.get("tools", []))
    names: set[str] = set()
    for index, tool in enumerate(given):
        if tool["type"] == "function":
            if tool["name"] in names:
                raise Invalid(f"Duplicate function name '{tool['name']}' at 'tools[{index}]'.")
            names.add(tool["name"])
    kinds = {tool["type"] for tool in given}
    if {"google_search", "file_search"} <= kinds:
        raise Invalid("The tools 'google_search' and 'file_search' cannot be used together.")
    # The tools of MCP servers and environments are known only later.
    if "mcp_server" not in kinds and "environment" not in body:
        _tool_choice(body.get("generation_config", {}).get("tool_choice"), names | kinds)


def _tool_choice(choice: str | Json | None, known: set[str]) -> None:
    if isinstance(choice, dict):
        for name in choice["allowed_tools"].get("tools", ()):
            if name not in known:
                raise Invalid(
                    f"Unknown tool '{shown(name)}' at "
                    "'generation_config.tool_choice.allowed_tools.tools'."
                )


def model_id(text: str) -> str:
    """The model's id without `models/`.

    Raises:
        Invalid: It is empty, too long, or holds control characters.
    """
    return _checked_id(text.removeprefix("models/"), "model")


def agent_id(text: str) -> str:
    """The agent's id without `agents/`.

    Raises:
        Invalid: It is empty, too long, or holds control characters.
    """
    return _checked_id(text.removeprefix("agents/"), "agent")


def _checked_id(text: str, name: str) -> str:
    if not text or text.isspace():
        raise Invalid(f"{name.capitalize()} '' is invalid or not found.")
    if len(text) > MAX_ID_CHARS:
        raise Invalid(f"Invalid value at '{name}': expected at most {MAX_ID_CHARS} characters.")
    if not text.isprintable():
        raise Invalid(f"Invalid value at '{name}': it holds control characters.")
    return text


def formats(body: Json) -> tuple[Json | None, list[Json]]:
    """The response format as a JSON Schema (`{}`: any JSON; None: no JSON) and media formats.

    Raises:
        Invalid: Two formats for text, or a schema for plain text.
    """
    given: Any = body.get("response_format", [])
    entries = cast("list[Json]", given if isinstance(given, list) else [given])
    schemas: list[Json | None] = []
    media: list[Json] = []
    for entry in entries:
        kind = entry.get("type")
        if kind == "text":
            schemas.append(_text_schema(entry))
        elif kind in ("image", "audio", "video"):
            media.append(entry)
        else:
            schemas.append(entry)
    if len(schemas) > 1:
        raise Invalid("Only one text format may be given at 'response_format'.")
    return _with_mime_type(body.get("response_mime_type"), schemas), media


def _text_schema(entry: Json) -> Json | None:
    mime_type = entry.get("mime_type")
    if mime_type == "text/plain" and "schema" in entry:
        raise Invalid("'schema' needs the mime_type application/json at 'response_format'.")
    if mime_type == "application/json":
        return entry.get("schema", {})
    return entry.get("schema")


def _with_mime_type(mime_type: str | None, schemas: list[Json | None]) -> Json | None:
    schema = schemas[0] if schemas else None
    if mime_type is None:
        return schema
    if mime_type.lower() not in ("application/json", "text/plain"):
        raise Invalid(
            f"Invalid enum value '{shown(mime_type)}' at 'response_mime_type'. "
            "Expected one of: application/json, text/plain."
        )
    if mime_type.lower() == "application/json":
        return schema if schema is not None else {}
    if schema is not None:
        raise Invalid("'response_mime_type' text/plain does not go with a JSON response_format.")
    return None


def echo(body: Json) -> Json:
    """What a response repeats of a valid request. Secrets are left out, keys and all."""
    repeated: Json = {name: body[name] for name in _ECHOED if name in body}
    repeated["service_tier"] = body.get("service_tier", "standard")
    if "tools" in body:
        repeated["tools"] = [public_tool(tool) for tool in body["tools"]]
    if "environment" in body:
        repeated["environment"] = public_environment(body["environment"])
    return repeated


def _without(fields: Json, *secret: str) -> Json:
    return {key: value for key, value in fields.items() if key not in secret}


def public_tool(tool: Json) -> Json:
    """A tool as its caller may see it again: without secrets."""
    match tool["type"]:
        case "mcp_server":
            shown_tool = _without(tool, "headers", "credential")
            url: str = _USERINFO.sub("", tool["url"])
            # A key may stand in the query.
            return {**shown_tool, "url": url.partition("?")[0]}
        case "retrieval":
            return {
                key: _without(cast("Json", value), "api_key") if isinstance(value, dict) else value
                for key, value in tool.items()
            }
        case _:
            return tool


def public_environment(environment: str | Json) -> str | Json:
    """An `environment` as its caller may see it again: without contents and secrets."""
    if isinstance(environment, str):
        return environment
    public = _without(environment, "env")
    if "sources" in public:
        public["sources"] = [public_source(source) for source in public["sources"]]
    network = public.get("network")
    allowed = cast("Json", network).get("allowlist") if isinstance(network, dict) else None
    if isinstance(allowed, list):
        entries = cast("list[Json]", allowed)
        hosts = [_without(entry, "transform", "credential") for entry in entries]
        public["network"] = {"allowlist": hosts}
    return public
