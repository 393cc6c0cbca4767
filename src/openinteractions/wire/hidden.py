"""What answers do not show of a definition, put back into what a caller sends after reading one.

Hidden is what `check.public_tool` and `check.public_environment` leave out. It stays with what
carries it and is shown: headers with the address of an MCP server, a content with its target,
injected headers with their host. So a secret never goes where its owner has not sent it.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final, TypeAlias, cast

from openinteractions.wire.check import public_tool
from openinteractions.wire.environment import public_source, variables
from openinteractions.wire.fields import Json

Path: TypeAlias = tuple[str | int, ...]
Nulls: TypeAlias = frozenset[Path]
"""Where the request has an explicit null: what lies there goes."""

_ENV: Final = ("base_environment", "env")
_HOSTS: Final = ("base_environment", "network", "allowlist")


def nulls(value: object, path: Path = ()) -> Iterator[Path]:
    """The places of all nulls in a JSON value."""
    if isinstance(value, dict):
        for key, item in cast("Json", value).items():
            yield from nulls(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(cast("list[object]", value)):
            yield from nulls(item, (*path, index))
    elif value is None:
        yield path


def without_null_variables(environment: object) -> object:
    """A request's environment without the variables that are null, which its type does not take."""
    if not isinstance(environment, dict):
        return environment
    config = cast("Json", environment)
    env: object = config.get("env")
    if isinstance(env, dict):
        return {**config, "env": _without_nulls(cast("Json", env))}
    if isinstance(env, list):
        maps = cast("list[object]", env)
        kept = [_without_nulls(cast("Json", m)) if isinstance(m, dict) else m for m in maps]
        return {**config, "env": kept}
    return config


def tools(given: Sequence[Json], before: Sequence[Json], gone: Nulls) -> list[Json]:
    """Valid tools, with the headers and credentials of those that were there before."""
    return [
        tool if old is None else _tool(tool, old, ("tools", index), gone)
        for index, (tool, old) in enumerate(_paired(given, before, _address))
    ]


def environment(given: str | Json, before: str | Json | None, gone: Nulls) -> str | Json:
    """A valid environment, with the contents, variables and injected headers that it does not name.

    Raises:
        Invalid: A variable is wrong.
    """
    if isinstance(given, str) or not isinstance(before, dict):
        return given
    merged = dict(given)
    if "sources" in given:
        pairs = _paired(given["sources"], before.get("sources", ()), _place)
        merged["sources"] = [
            source
            if old is None
            else _source(source, old, ("base_environment", "sources", index), gone)
            for index, (source, old) in enumerate(pairs)
        ]
    if hosts := _hosts(given):
        pairs = _paired(hosts, _hosts(before), _domain)
        merged["network"] = {
            "allowlist": [
                host
                if old is None
                else _kept(host, old, ("transform", "credential"), (*_HOSTS, index), gone)
                for index, (host, old) in enumerate(pairs)
            ]
        }
    env = _env(given.get("env"), before.get("env"), gone)
    if env:
        return {**merged, "env": env}
    return {key: value for key, value in merged.items() if key != "env"}


def _without_nulls(fields: Json) -> Json:
    return {key: value for key, value in fields.items() if value is not None}


def _paired(
    given: Sequence[Json], before: Sequence[Json], key: Callable[[Json], Hashable]
) -> Iterator[tuple[Json, Json | None]]:
    """Each item with the one that was there under the same key; several of a key in their order."""
    left: dict[Hashable, list[Json]] = {}
    for old in before:
        left.setdefault(key(old), []).append(old)
    for item in given:
        found = left.get(key(item))
        yield item, found.pop(0) if found else None


def _address(tool: Json) -> Hashable:
    return tool["type"], tool.get("name"), public_tool(tool).get("url")


def _place(source: Json) -> Hashable:
    return source["type"], source["target"]


def _domain(host: Json) -> Hashable:
    domain: str = host["domain"]
    return domain.lower()


def _hosts(config: Json) -> list[Json]:
    network: object = config.get("network")
    hosts: object = cast("Json", network).get("allowlist") if isinstance(network, dict) else None
    return cast("list[Json]", hosts) if isinstance(hosts, list) else []


def _kept(given: Json, old: Json, names: Sequence[str], path: Path, gone: Nulls) -> Json:
    """An object with the hidden fields that it does not name; those that it names as empty go."""
    kept = {
        name: old[name]
        for name in names
        if name in old and name not in given and (*path, name) not in gone
    }
    named = {key: value for key, value in given.items() if value or key not in names}
    return named | kept


def _tool(given: Json, old: Json, path: Path, gone: Nulls) -> Json:
    if given["type"] != "mcp_server":
        return given
    merged = _kept(given, old, ("headers", "credential"), path, gone)
    is_as_shown = given["url"] == public_tool(old)["url"]
    return {**merged, "url": old["url"]} if is_as_shown else merged


def _source(given: Json, old: Json, path: Path, gone: Nulls) -> Json:
    merged = dict(given)
    if "source" in old and given.get("source") == public_source(old)["source"]:
        merged["source"] = old["source"]
    # A content is nothing without its encoding.
    if given.get("encoding") == old.get("encoding"):
        return _with_content(merged, old, path, gone)
    return merged


def _with_content(given: Json, old: Json, path: Path, gone: Nulls) -> Json:
    is_named = "content" in given or (*path, "content") in gone
    return given if is_named or "content" not in old else {**given, "content": old["content"]}


def _env(
    given: Json | list[Json] | None, before: Json | list[Json] | None, gone: Nulls
) -> Json | list[Json] | None:
    """The variables that are named, and those before that are not."""
    # A variable is one step below, or two where maps stand in a list.
    removed = {path[-1] for path in gone if path[:2] == _ENV and _is_variable(path[2:])}
    named = {} if given is None else variables(given)
    if _ENV in gone or (given is not None and not named and not removed):
        return None
    old = {} if before is None else variables(before)
    merged = {name: value for name, value in old.items() if name not in removed} | named
    # In the form that the caller has given, where that says it all.
    if merged == old:
        return before
    return given if merged == named else merged


def _is_variable(path: Path) -> bool:
    match path:
        case (str(),) | (int(), str()):
            return True
        case _:
            return False
