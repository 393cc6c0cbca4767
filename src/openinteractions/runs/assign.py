"""Who runs which of a run's tools: the caller, the model's vendor, or this server."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from openinteractions.errors import Invalid
from openinteractions.loop import approval
from openinteractions.loop.structured import enforced, require_schema
from openinteractions.models.port import Json, Warning  # noqa: A004 - the contract's word
from openinteractions.tools.port import Means
from openinteractions.tools.toolbox import SANDBOXED, toolbox

_SEARCHES: Final = frozenset({"gemini", "anthropic"})
"""Kinds of providers whose vendor searches the web itself."""
_VENDORS: Final = frozenset(
    {"google_search", "url_context", "code_execution", "google_maps", "file_search", "computer_use"}
)
"""Tools that a vendor may run; all others are functions to a model."""
_NO_SEARCH: Final = (
    "this server has no search backend; its operator can set one up (settings search.*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Powers:
    """What this server and the model's vendor can do for a run."""

    vendor_runs_code: bool
    """Whether a vendor that can run `code_execution` itself does so."""
    mixes: bool = True
    """Whether the model takes tools that its vendor runs beside functions."""
    search_types: frozenset[str] = frozenset()
    """What the configured search backend can search for; empty: there is none."""
    servers: Mapping[int, Json] = field(default_factory=dict[int, Any])
    """The entry of each `mcp_server` among the tools, by its place."""
    secrets: Json | None = None
    """Theirs."""
    no_sandbox: str | None = None
    """Why no sandbox can be had now; None: one can, or nobody has looked."""


@dataclass(frozen=True, slots=True)
class _Case:
    """For whom the tools are."""

    kinds: set[str]
    powers: Powers
    is_agent: bool
    approve: Sequence[str]

    def asks_for(self, kind: str) -> bool:
        """Whether tools of a type need consent."""
        return any(fnmatchcase(kind, pattern.lower()) for pattern in self.approve)

    def is_ours(self, kind: str) -> bool:
        """Whether this server runs it, also where the vendor could."""
        is_vendors = self.powers.mixes and self.kinds == {"gemini"}
        return self.is_agent or not is_vendors or self.asks_for(kind)

    def is_function(self, kind: str) -> bool:
        """Whether the model sees tools of a type as functions."""
        if kind == "google_search":
            return self.asks_for(kind)
        if kind == "code_execution":
            return self.is_ours(kind) or not self.powers.vendor_runs_code
        return self.is_ours(kind) if kind == "url_context" else kind not in _VENDORS


@dataclass(slots=True)
class Assigned:
    """The tools of a run."""

    passed: list[Json] = field(default_factory=list[Json])
    """Functions of the caller's, and tools that the vendor runs."""
    own: list[Json] = field(default_factory=list[Json])
    """Those that this server runs, without their secrets."""
    warnings: list[Warning] = field(default_factory=list[Warning])

    @property
    def needs_sandbox(self) -> bool:
        """Whether some of them run in one."""
        return any(tool["type"] in SANDBOXED for tool in self.own)

    def names(self) -> list[str]:
        """The names of this server's tools, as the model calls them."""
        return [each["name"] for each in toolbox(self.own, Means()).declarations()]

    def all_names(self) -> list[str]:
        """Those of the caller's functions and the vendor's tools as well."""
        return [*self.names(), *(tool.get("name", tool["type"]) for tool in self.passed)]


def assign(
    tools: Sequence[Json],
    kinds: set[str],
    powers: Powers,
    *,
    is_agent: bool,
    is_default: bool,
    approve: Sequence[str],
) -> Assigned:
    """Decide who runs each tool.

    Args:
        tools: As the request, or the agent, has them.
        kinds: Of the providers that may be asked.
        powers: What this server can do.
        is_agent: An agent's pages are fetched here, past the rules of its environment.
        is_default: What cannot be had is left out, with a warning, instead of refused.
        approve: Patterns of tools that need consent: these are run here.

    Raises:
        Invalid: A tool cannot be had; the message names it, and what would help.
    """
    found = Assigned()
    case = _Case(kinds, replace(powers, mixes=True), is_agent, approve)
    if any(case.is_function(tool["type"]) for tool in tools):
        case = replace(case, powers=powers)
    for number, tool in enumerate(tools):
        reason = _place(tool, number, case, found)
        if reason is None:
            continue
        if not is_default:
            raise Invalid(
                f"The tool '{tool['type']}' at 'tools[{number}]' cannot be had: {reason}."
            )
        message = f"The agent works without {tool['type']}: {reason}."
        found.warnings.append(Warning("tool_left_out", f"tools.{tool['type']}", message))
    _join_deferred(tools, found)
    _refuse_doubles(tools, {*found.names(), *((approval.NAME,) if approve else ())})
    return found


def _place(tool: Json, number: int, case: _Case, found: Assigned) -> str | None:
    """Put one tool where it belongs; the reason, where it belongs nowhere."""
    match tool["type"]:
        case "function":
            found.passed.append(_function(tool, number))
        case "tool_search":
            _tool_search(tool, number, found)
        case "mcp_server":
            found.own.append(case.powers.servers[number])
        case "google_search":
            return _search(tool, case, found)
        case "url_context":
            (found.own if case.is_ours("url_context") else found.passed).append(tool)
        case "code_execution" if case.powers.vendor_runs_code and not case.is_ours(tool["type"]):
            found.passed.append(tool)
        case kind if kind in SANDBOXED:
            if case.powers.no_sandbox is not None:
                return case.powers.no_sandbox.rstrip(".")
            found.own.append(tool)
        case kind if case.is_agent:
            return f"agents do not support {kind}"
        case _:
            found.passed.append(tool)
    return None


def _search(tool: Json, case: _Case, found: Assigned) -> str | None:
    """Gemini searches itself; else the operator's backend does, else a vendor that can."""
    kinds, types = case.kinds, case.powers.search_types
    is_vendors = kinds == {"gemini"} or (not types and len(kinds) == 1 and kinds <= _SEARCHES)
    if is_vendors and not case.powers.mixes:
        return _search_here(tool, case, found)
    if is_vendors and not case.asks_for("google_search"):
        found.passed.append(tool)
        return None
    if is_vendors and not types:
        return "a search that the model's vendor runs cannot wait for consent"
    return _search_here(tool, case, found) if types else _NO_SEARCH


def _search_here(tool: Json, case: _Case, found: Assigned) -> str | None:
    """The operator's backend searches; without one, a model that does not do both goes without."""
    types = case.powers.search_types
    if not types:
        message = f"This model searches only where it has no functions, and {_NO_SEARCH}."
        found.warnings.append(Warning("tool_left_out", "tools.google_search", message))
        return None
    unknown = [kind for kind in tool.get("search_types", ()) if kind not in types]
    if unknown:
        return f"this server's search backend has no '{unknown[0]}'"
    found.own.append(tool)
    return None


def _function(tool: Json, number: int) -> Json:
    parameters = tool.get("parameters")
    if not isinstance(parameters, dict):
        return tool
    require_schema(parameters, f"tools[{number}].parameters")  # pyright: ignore[reportUnknownArgumentType]
    return {**tool, "parameters": enforced(parameters)}


def _tool_search(tool: Json, number: int, found: Assigned) -> None:
    if tool.get("execution", "server") == "server":
        found.own.append({"type": "tool_search", "functions": []})
        return
    if "name" not in tool:
        raise Invalid(f"'tools[{number}].name' is missing: a tool_search that the client runs.")
    kept = {key: tool[key] for key in ("name", "description", "parameters") if key in tool}
    found.passed.append(_function({"type": "function", **kept, "loads": True}, number))


def _join_deferred(tools: Sequence[Json], found: Assigned) -> None:
    """Give the tool search what it can load; without one nothing could be loaded."""
    later = [tool for tool in found.passed if tool.get("defer_loading")]
    search = next((tool for tool in found.own if tool["type"] == "tool_search"), None)
    if search is not None:
        search["functions"] = later
        if not later:
            raise Invalid("'tool_search' needs functions with 'defer_loading' in 'tools'.")
    elif later and not any(tool.get("loads") for tool in found.passed):
        number = next(n for n, tool in enumerate(tools) if tool.get("defer_loading"))
        raise Invalid(f"'tools[{number}].defer_loading' needs a tool of type 'tool_search'.")


def _refuse_doubles(tools: Sequence[Json], own: set[str]) -> None:
    """A model tells tools apart by their names."""
    for number, name in _function_names(tools):
        if name in own:
            raise Invalid(
                f"Invalid value at 'tools[{number}].name': '{name}' is a tool of the server's in "
                "this request; give the function another name."
            )


def _function_names(tools: Sequence[Json]) -> Iterator[tuple[int, str]]:
    for number, tool in enumerate(tools):
        if tool["type"] in ("function", "tool_search") and "name" in tool:
            yield number, tool["name"]
