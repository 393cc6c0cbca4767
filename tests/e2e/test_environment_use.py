"""The quota of environments, what is counted of their files, and runs that keep none."""

import json
from collections.abc import Generator
from typing import Any

import pytest
from google.genai import Client
from google.genai._gaos.lib import compat_errors as raised

from openinteractions.models.port import Finished, ToolCall
from tests.e2e.sandboxed import serving_sandboxes
from tests.e2e.server import USAGE, Fakes, Server, answer, sdk, turn
from tests.sandbox.engine import DockerEngine

CODE = [{"type": "code_execution"}]
MOST = 2

pytestmark = pytest.mark.filterwarnings("ignore:.*usage is experimental:UserWarning")


@pytest.fixture(scope="module")
def server(upstreams: Fakes, docker_engine: DockerEngine) -> Generator[Server]:
    more = f"max_environments = {MOST}\n"
    with serving_sandboxes(upstreams, docker_engine, name="use", more=more) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Generator[Client]:
    with sdk(server) as made:
        yield made
        for one in made.environments.list(page_size=1000).environments or ():
            made.environments.delete(one.id)


def ran(client: Client, fakes: Fakes, command: str, **how: Any) -> tuple[Any, Any]:
    """An interaction whose model runs a command, and the command's result."""
    call = ToolCall("c1", "code_execution", {"language": "bash", "code": command})
    fakes.acme.replies += [turn(call, Finished("tool_calls", USAGE)), answer("Done.")]
    done = client.interactions.create(model="acme/m", input="go", tools=CODE, **how)
    assert done.status == "completed", done
    (result,) = (step for step in done.steps if step.type == "code_execution_result")
    return done, result


def test_code_that_never_runs_takes_none_of_the_quota(client: Client, fakes: Fakes) -> None:
    fakes.acme.replies += [answer("No code needed.")] * (MOST + 2)
    idle = [
        client.interactions.create(model="acme/m", input="hello", tools=CODE)
        for _ in range(MOST + 2)
    ]
    made = [client.environments.create() for _ in range(MOST)]
    # At once, and not after a minute for each of four retries.
    with pytest.raises(raised.BadRequestError, match=r"has 2 environments.*max_environments"):
        client.environments.create()
    done, result = ran(client, fakes, "echo ran", previous_interaction_id=idle[0].id)
    assert result.is_error
    assert "has 2 environments" in result.result
    assert "delete some" in result.result
    assert "delete some" in json.dumps(fakes.acme.requests[-1].json)
    assert done.output_text == "Done."
    client.environments.delete(made[0].id)
    _, result = ran(client, fakes, "echo ran", previous_interaction_id=done.id)
    assert (result.result, result.is_error) == ("ran\n", False)
    with pytest.raises(raised.BadRequestError):
        client.environments.create()
    client.interactions.delete(idle[1].id)
    with pytest.raises(raised.NotFoundError):
        client.environments.get(idle[1].environment_id)


def test_counts_are_those_after_the_run(client: Client, fakes: Fakes) -> None:
    source = {"type": "inline", "content": "1", "target": "workspace/one"}
    made = client.environments.create(sources=[source])

    def shown() -> list[tuple[str, str]]:
        (listed,) = client.environments.list().environments
        one = client.environments.get(made.id)
        return [(str(row.file_count), str(row.size_bytes)) for row in (listed, one)]

    assert shown() == [("1", "1")] * 2
    ran(client, fakes, "echo -n two > two; echo -n three > three", environment=made.id)
    assert shown() == [("3", "9")] * 2
    ran(client, fakes, "rm two; rm one", environment=made.id)
    assert shown() == [("1", "5")] * 2


def test_what_is_not_stored_may_have_an_environment_of_its_own(
    client: Client, fakes: Fakes, server: Server
) -> None:
    source = {"type": "inline", "content": "given", "target": "workspace/in"}
    config = {"type": "remote", "sources": [source], "env": {"A": "b"}}
    for environment, said in (("remote", "\n"), (config, "given b\n")):
        command = "echo $(cat in 2>/dev/null) $A"
        _, result = ran(client, fakes, command, store=False, environment=environment)
        assert result.result == said
    kept = client.environments.create()
    with pytest.raises(raised.BadRequestError, match="where it names one that is there"):
        client.interactions.create(model="acme/m", input="x", store=False, environment=kept.id)
    rows = server.fetch("select id::text from environments where deleted_at is null")
    assert [row[0].replace("-", "") for row in rows] == [kept.id.replace("-", "")]
