"""The bodies of custom agents: what is taken, in which form, what is refused in what words."""

from typing import Any

import orjson
import pytest

from openinteractions.errors import Invalid
from openinteractions.wire import agents
from openinteractions.wire.agents import Change, parse_create, parse_name, parse_update, public

LEAST = {"id": "a", "base_agent": "antigravity-preview-05-2026"}
MCP = {"type": "mcp_server", "name": "m", "url": "https://u:pw@h/mcp", "headers": {"X": "SECRET"}}


def created(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return parse_create(orjson.dumps(body), max_depth=50)


def changed(body: Any, name: str = "a") -> Change:
    return parse_update(orjson.dumps(body), name, max_depth=50)


def refused(body: dict[str, Any]) -> str:
    with pytest.raises(Invalid) as raised:
        created(body)
    return raised.value.message


def test_a_definition_comes_in_normal_form():
    body = {
        **LEAST,
        "base_agent": "Antigravity",
        "description": None,
        "system_instruction": "Be kind.",
        "agent_config": {"type": "ANTIGRAVITY", "max_total_tokens": "5000", "model": "x/y"},
        "tools": [{"type": "CODE_EXECUTION"}, {"type": "browser"}, {"type": "tool_search"}],
        "base_environment": {"type": "Remote", "network": "DISABLED", "env": {"A": "1"}},
    }
    assert created(body) == (
        "a",
        {
            "base_agent": "antigravity",
            "system_instruction": "Be kind.",
            "agent_config": {"type": "antigravity", "max_total_tokens": 5000, "model": "x/y"},
            "tools": [{"type": "code_execution"}, {"type": "browser"}, {"type": "tool_search"}],
            "base_environment": {"type": "remote", "network": "disabled", "env": {"A": "1"}},
        },
    )


def test_our_own_configuration_is_free_in_form():
    config = {"type": "dynamic", "max_steps": 3, "approve": ["browser"], "house": {"a": None}}
    assert created({**LEAST, "agent_config": config})[1]["agent_config"] == config


@pytest.mark.parametrize(
    "name", ["a", "A9", "0", "a.b_c-d", "x" * 63, "antigravit", "my-gemini-1", "versions"]
)
def test_ids_that_are_taken(name: str):
    assert created({**LEAST, "id": name})[0] == name


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "_a", "a b", "a/b", "a@1", "a:b", "ä", "x" * 64, "a\n", "agents/a"]
)
def test_ids_that_are_not(name: str):
    assert refused({**LEAST, "id": name}).startswith("Invalid value at 'id': expected 1 to 63")


@pytest.mark.parametrize("prefix", agents.RESERVED_PREFIXES)
def test_reserved_prefixes_are_named(prefix: str):
    for name in (f"{prefix}x", f"{prefix.upper()}x", prefix, prefix.title()):
        told = refused({**LEAST, "id": name})
        assert told == f"Invalid value at 'id': the prefix '{prefix}' is reserved."


def test_the_contracts_prefixes_are_reserved():
    assert len(agents.RESERVED_PREFIXES) == 16


@pytest.mark.parametrize("name", [*sorted(agents.BUILT_IN), "Deep-Research", "ANTIGRAVITY"])
def test_ids_of_built_in_agents_are_refused(name: str):
    assert refused({**LEAST, "id": name}).endswith(f"'{name}' is a built-in agent.")


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"id": None}, "Missing required parameter 'id'."),
        ({"base_agent": None}, "Missing required parameter 'base_agent'."),
        ({"base_agent": "gemini-2.5"}, "Invalid enum value 'gemini-2.5' at 'base_agent'."),
        ({"base_agent": "deep-research-preview-04-2026"}, "Invalid enum value 'deep-research"),
        ({"baseAgent": "antigravity"}, "Did you mean 'base_agent'?"),
        ({"version": 3}, "Unknown parameter 'version'."),
        ({"name": "x"}, "Unknown parameter 'name'."),
        ({"description": "x" * 10_001}, "Invalid value at 'description': expected at most 10000"),
        ({"system_instruction": "x" * 200_001}, "at 'system_instruction': expected at most"),
        ({"system_instruction": 5}, "Invalid value at 'system_instruction': expected a string."),
        ({"tools": [{"type": "code_execution"}] * 129}, "at 'tools': expected at most 128 items."),
        ({"tools": [{"type": "retrieval"}]}, "Invalid enum value 'retrieval' at 'tools[0].type'."),
        ({"tools": [{"type": "file_search"}]}, "'file_search' at 'tools[0].type'."),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "Duplicate function name 'f'"),
        ({"tools": [{"type": "browser", "x": 1}]}, "Unknown parameter 'x' at 'tools[0]'."),
        ({"agent_config": {"type": "deep-research"}}, "'deep-research' at 'agent_config.type'."),
        ({"agent_config": {"type": "antigravity", "x": 1}}, "'x' at 'agent_config'."),
        ({"agent_config": {"type": "dynamic", "version": 1}}, "'agent_config.version'"),
        ({"agent_config": {"type": "dynamic", "max_steps": 0}}, "at 'agent_config.max_steps'"),
        ({"base_environment": {"type": "local"}}, "'local' at 'base_environment.type'."),
        ({"base_environment": {"type": "remote", "x": 1}}, "'x' at 'base_environment'."),
        ({"base_environment": ""}, "Invalid value at 'base_environment': expected a non-empty"),
        (
            {
                "base_environment": {
                    "type": "remote",
                    "environment_id": "a",
                    "from_environment": "b",
                }
            },
            "Only one of 'environment_id' and 'from_environment'",
        ),
    ],
)
def test_what_is_refused_is_named(extra: dict[str, Any], told: str):
    assert told in refused({**LEAST, **extra})


def test_an_update_sets_and_removes():
    change = changed({"id": "a", "description": None, "tools": [], "base_agent": "antigravity"})
    before = {"base_agent": "antigravity-preview-05-2026", "description": "x", "agent_config": {}}
    assert change.over(before) == {"base_agent": "antigravity", "tools": [], "agent_config": {}}
    assert changed({}).over(before) == before


def test_a_null_inside_a_given_field_is_as_absent_as_in_a_create():
    change = changed({"agent_config": {"type": "antigravity", "model": None}})
    assert change.given == {"agent_config": {"type": "antigravity"}}
    assert change.removed == frozenset()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"base_agent": None}, "'base_agent' can be changed, but not removed."),
        ({"id": "b"}, "Invalid value at 'id': it is 'a'"),
        ({"descripton": None}, "Unknown parameter 'descripton'. Did you mean 'description'?"),
        ({"tools": [{"type": "x"}]}, "at 'tools[0].type'"),
        ({"tools": [{"type": "function", "name": "f"}] * 2}, "Duplicate function name 'f'"),
        ([], "must be a JSON object"),
    ],
)
def test_updates_that_are_refused(body: Any, told: str):
    with pytest.raises(Invalid) as raised:
        changed(body)
    assert told in raised.value.message


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a", ("a", None)),
        ("agents/a", ("a", None)),
        ("a@3", ("a", 3)),
        ("agents/a.b@999999999", ("a.b", 999_999_999)),
        ("a@", None),
        ("a@0", None),
        ("a@01", None),
        ("a@-1", None),
        ("a@x", None),
        ("a@1@2", None),
        ("a@1000000000", None),
        ("a@٣", None),
        ("a\n", None),
        ("", None),
        ("x" * 64, None),
    ],
)
def test_names_and_pins(text: str, name: Any):
    assert parse_name(text) == name


def test_what_is_shown_has_no_secrets():
    definition = {
        "base_agent": "antigravity",
        "tools": [{**MCP, "credential": "c"}],
        "base_environment": {
            "type": "remote",
            "env": {"A": "SECRET"},
            "network": {"allowlist": [{"domain": "h", "transform": {"X": "SECRET"}}]},
            "sources": [{"type": "inline", "target": "a", "content": "SECRET"}],
        },
    }
    assert public(definition) == {
        "base_agent": "antigravity",
        "tools": [{"type": "mcp_server", "name": "m", "url": "https://h/mcp"}],
        "base_environment": {
            "type": "remote",
            "network": {"allowlist": [{"domain": "h"}]},
            "sources": [{"type": "inline", "target": "a"}],
        },
    }
    assert "SECRET" in str(definition)


def test_the_schemas_say_what_is_required():
    schemas = agents.request_schemas()
    assert schemas["CreateAgent"]["required"] == ["id", "base_agent"]
    assert "required" not in schemas["UpdateAgent"]
    assert {"FunctionTool", "McpServerTool", "EnvironmentConfig"} <= schemas.keys()
