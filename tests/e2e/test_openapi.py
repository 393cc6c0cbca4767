"""The server against its own description: made-up requests, and what they get."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.e2e.server import KEY, Fakes, Server
from tests.e2e.wire import MODEL, create

OPERATIONS = [
    ("/v1beta/interactions", "POST"),
    ("/v1beta/interactions", "GET"),
    ("/v1beta/interactions/{interaction_id}", "GET"),
    ("/v1beta/interactions/{interaction_id}/cancel", "POST"),
    ("/v1beta/interactions/{interaction_id}", "DELETE"),
]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    unsupported_method,
]
EXAMPLES = 60
PLAIN = {"model", "input", "stream", "store", "labels", "service_tier", "system_instruction"}


@pytest.fixture(scope="session")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_description_is_valid(schema: Any) -> None:
    schema.validate()


def test_every_operation_is_tried(schema: Any) -> None:
    operations = [one.ok() for one in schema.get_all_operations()]
    found = {(one.path, one.method.upper()) for one in operations}
    assert {one for one in found if "/interactions" in one[0]} == set(OPERATIONS)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_made_up_requests(
    server: Server, fakes: Fakes, schema: Any, path: str, method: str, mode: GenerationMode
) -> None:
    known = create(server, {}).json()["id"]
    statuses: list[int] = []

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        # Nobody guesses an id, a model, or which fields go together.
        if len(statuses) % 3 and "interaction_id" in (case.path_parameters or {}):
            case.path_parameters["interaction_id"] = known
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL
            if len(statuses) % 3:
                case.body = {k: v for k, v in case.body.items() if k in PLAIN}
            if len(statuses) % 3 == 2:
                case.body["input"] = "Hi"
        answer = case.call_and_validate(headers={"x-goog-api-key": KEY}, checks=CHECKS)
        statuses.append(answer.status_code)

    run()
    assert len(statuses) >= EXAMPLES // 2
    assert mode is not GenerationMode.POSITIVE or 200 in statuses
