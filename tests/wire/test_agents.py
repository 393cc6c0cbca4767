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


def changed(body: Any, name: str = "a", mask: str | None = None) -> Change:
    return parse_update(orjson.dumps(body), name, update_mask=mask, max_depth=50)


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


# ---- what a change does not name


HIDDEN = {
    "base_agent": "antigravity",
    "tools": [{**MCP, "url": "https://u:pw@h/mcp?key=SECRET", "credential": "c"}],
    "base_environment": {
        "type": "remote",
        "sources": [
            {"type": "inline", "target": "a.txt", "content": "SECRET"},
            {"type": "inline", "target": "b.bin", "content": "U0VDUkVU", "encoding": "base64"},
            {"type": "repository", "target": "r", "source": "https://u:SECRET@git.example.com/r"},
        ],
        "network": {
            "allowlist": [
                {"domain": "a.example.com", "transform": {"X": "SECRET"}},
                {"domain": "b.example.com", "credential": "SECRET"},
                {"domain": "b.example.com", "transform": [{"Y": "SECRET"}]},
                {"domain": "open.example.com"},
            ]
        },
        "env": {"A": "SECRET", "B": {"credential": "SECRET"}},
    },
}


def after(**fields: Any) -> Any:
    return changed(fields).over(HIDDEN)


def shown_environment() -> Any:
    return public(HIDDEN)["base_environment"]


def test_what_is_shown_can_be_sent_back():
    shown = public(HIDDEN)
    assert "SECRET" not in str(shown)
    assert after(**shown) == HIDDEN


def test_what_is_hidden_stays_where_something_else_changes():
    environment = shown_environment()
    environment["network"]["allowlist"].reverse()
    environment["network"]["allowlist"].append({"domain": "new.example.com"})
    del environment["sources"][1]
    environment["sources"].append({"type": "inline", "target": "new.txt", "content": "new"})
    found = after(base_environment=environment)["base_environment"]
    was = HIDDEN["base_environment"]
    hosts = was["network"]["allowlist"]
    # Of two rules for a host, the first one is the first one again.
    assert found["network"]["allowlist"] == [
        hosts[3],
        hosts[1],
        hosts[2],
        hosts[0],
        {"domain": "new.example.com"},
    ]
    assert found["sources"] == [was["sources"][0], was["sources"][2], environment["sources"][-1]]
    assert found["env"] == was["env"]
    least = after(base_environment={"type": "remote"})["base_environment"]
    assert least == {"type": "remote", "env": was["env"]}


def test_a_new_value_replaces_and_the_others_stay():
    environment = shown_environment()
    environment["sources"][0]["content"] = "new"
    environment["sources"][1] |= {"content": "new", "encoding": "utf-8"}
    environment["sources"][2]["source"] = "https://v:new@git.example.com/r"
    environment["network"]["allowlist"][0]["transform"] = {"Z": "new"}
    environment["network"]["allowlist"][1]["transform"] = {"Z": "new"}
    environment["env"] = [{"B": "new"}, {"C": "new"}]
    found = after(base_environment=environment)["base_environment"]
    assert found["sources"] == environment["sources"]
    assert found["network"]["allowlist"][:2] == [
        {"domain": "a.example.com", "transform": {"Z": "new"}},
        {"domain": "b.example.com", "transform": {"Z": "new"}, "credential": "SECRET"},
    ]
    assert found["env"] == {"A": {"value": "SECRET"}, "B": {"value": "new"}, "C": {"value": "new"}}
    headers = {"Y": "new"}
    (tool,) = after(tools=[{**public(HIDDEN)["tools"][0], "headers": headers}])["tools"]
    assert tool == {**HIDDEN["tools"][0], "headers": headers}


def test_a_form_of_the_variables_is_kept_where_it_says_all_of_them():
    env = [{"A": "1"}, {"B": "2"}]
    assert after(base_environment={"type": "remote", "env": env})["base_environment"]["env"] == env


@pytest.mark.parametrize(
    ("env", "left"),
    [
        (None, None),
        ({}, None),
        ([], None),
        ({"A": None}, {"B": {"credential": "SECRET"}}),
        ([{"A": None}], {"B": {"credential": "SECRET"}}),
        ({"A": None, "B": None}, None),
        ({"A": None, "B": "new"}, {"B": "new"}),
        ({"absent": None}, HIDDEN["base_environment"]["env"]),
        ({"A": ""}, {"A": {"value": ""}, "B": {"credential": "SECRET"}}),
    ],
)
def test_null_and_empty_variables_go(env: Any, left: Any):
    found = after(base_environment={"type": "remote", "env": env})["base_environment"]
    assert found == {"type": "remote"} | ({} if left is None else {"env": left})


@pytest.mark.parametrize("empty", [None, {}])
def test_null_and_empty_headers_go(empty: Any):
    tool = public(HIDDEN)["tools"][0]
    (found,) = after(tools=[{**tool, "headers": empty}])["tools"]
    assert found == {key: value for key, value in HIDDEN["tools"][0].items() if key != "headers"}
    environment = shown_environment()
    environment["network"]["allowlist"][0]["transform"] = empty
    hosts = after(base_environment=environment)["base_environment"]["network"]["allowlist"]
    assert hosts == [
        {"domain": "a.example.com"},
        *HIDDEN["base_environment"]["network"]["allowlist"][1:],
    ]


def test_null_credentials_and_contents_go():
    tool = {**public(HIDDEN)["tools"][0], "credential": None}
    assert "credential" not in after(tools=[tool])["tools"][0]
    environment = shown_environment()
    environment["network"]["allowlist"][1]["credential"] = None
    environment["sources"][0]["content"] = None
    found = after(base_environment=environment)["base_environment"]
    assert found["network"]["allowlist"][1] == {"domain": "b.example.com"}
    assert found["sources"][0] == {"type": "inline", "target": "a.txt"}


def test_an_empty_content_is_one():
    environment = shown_environment()
    environment["sources"][0]["content"] = ""
    found = after(base_environment=environment)["base_environment"]["sources"][0]
    assert found == {"type": "inline", "target": "a.txt", "content": ""}


@pytest.mark.parametrize(
    "moved",
    [
        {"url": "https://elsewhere.example.com/mcp"},
        {"url": "http://h/mcp"},
        {"url": "https://h/mcp/other"},
        {"name": "other"},
    ],
)
def test_a_tools_secrets_do_not_go_to_another_address(moved: Any):
    (found,) = after(tools=[{**public(HIDDEN)["tools"][0], **moved}])["tools"]
    assert "SECRET" not in str(found)
    assert "credential" not in found


@pytest.mark.parametrize(
    ("where", "index", "moved"),
    [
        ("sources", 0, {"target": "other"}),
        ("sources", 1, {"encoding": None}),
        ("sources", 2, {"target": "other"}),
        ("sources", 2, {"source": "https://evil.example.com/r"}),
        ("allowlist", 0, {"domain": "evil.example.com"}),
        ("allowlist", 0, {"domain": "*.a.example.com"}),
        ("allowlist", 3, {"domain": "evil.example.com"}),
    ],
)
def test_what_is_hidden_goes_nowhere_else(where: str, index: int, moved: Any):
    environment = shown_environment()
    items = environment["sources"] if where == "sources" else environment["network"]["allowlist"]
    items[index] |= moved
    environment["env"] = None
    found = after(base_environment=environment)["base_environment"]
    now = found["sources"] if where == "sources" else found["network"]["allowlist"]
    assert not {"content", "transform", "credential"} & now[index].keys()
    assert "SECRET" not in str(now[index])
    assert "U0VDUkVU" not in str(now[index])


def test_an_environment_of_another_kind_replaces_all():
    for environment in ("remote", "0" * 32):
        assert after(base_environment=environment)["base_environment"] == environment
    for before in ({}, {"base_environment": "remote"}):
        given = {"type": "remote", "env": {"A": "1"}}
        assert changed({"base_environment": given}).over(before)["base_environment"] == given
    assert "base_environment" not in after(base_environment=None)


def test_wrong_variables_are_told():
    for env, told in (
        ({"1A": "x"}, "Invalid name '1A' at 'env'"),
        ([{"A": "x"}, {"A": "y"}], "Duplicate name 'A' at 'env'"),
        ({"A": {}}, "Invalid value at 'env.A'"),
        ({"A": {"value": None}}, "'base_environment.env.A.value': expected a string"),
    ):
        with pytest.raises(Invalid) as raised:
            after(base_environment={"type": "remote", "env": env})
        assert told in raised.value.message


def test_what_cannot_be_set_must_be_as_it_is():
    shown = {"version": 3, "created": "2026-01-01T00:00:00Z", "updated": "2026-01-02T00:00:00Z"}
    change = changed({**shown, "description": "x"})
    assert change.given == {"description": "x"}
    change.check(shown)
    changed({"version": None}).check(shown)
    for name, value in (("version", 2), ("created", "2020-01-01T00:00:00Z"), ("updated", "")):
        with pytest.raises(Invalid, match=f"at '{name}': it is .*cannot be set.*read it again"):
            changed({name: value}).check(shown)


def test_an_update_mask_chooses():
    body = {"description": "x", "system_instruction": None, "tools": None, "version": 7}
    change = changed(body, mask="description, tools")
    assert (change.given, change.removed, change.seen) == ({"description": "x"}, {"tools"}, {})
    assert changed(body, mask="system_instruction").given == {}


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ("descripton", "Unknown path 'descripton' in 'update_mask'. Did you mean 'description'?"),
        ("description,", "Unknown path '' in 'update_mask'."),
        ("*", "Unknown path '*' in 'update_mask'."),
        ("id", "Unknown path 'id' in 'update_mask'."),
        ("version", "Unknown path 'version' in 'update_mask'."),
        ("description,tools", "'update_mask' names 'tools', which the body does not have."),
    ],
)
def test_wrong_masks(mask: str, told: str):
    with pytest.raises(Invalid) as raised:
        changed({"id": "a", "version": 1, "description": "x"}, mask=mask)
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
