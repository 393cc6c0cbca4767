"""What the official SDK writes can be read."""

import orjson
import pytest
from google.genai._gaos.types import interactions as sdk

from openinteractions.wire.create import parse_create
from tests.wire.bodies import PNG, SDK_BODIES


def written(body) -> bytes:
    kind = sdk.CreateModelInteraction if "model" in body else sdk.CreateAgentInteraction
    return kind.model_validate(body).model_dump_json(by_alias=True, exclude_none=True).encode()


@pytest.mark.parametrize("body", [body for body in SDK_BODIES if "limits" not in body])
def test_bodies_survive_the_sdk(body):
    sent = orjson.loads(written(body))
    parsed = parse_create(orjson.dumps(sent), max_depth=64)
    assert parsed.steps == parse_create(orjson.dumps(body), max_depth=64).steps


def test_steps_that_were_received_can_be_sent_back():
    received = [
        {"type": "user_input", "content": [{"type": "text", "text": "q"}]},
        {"type": "thought", "signature": "QUJD"},
        {
            "type": "google_search_call",
            "id": "s1",
            "search_type": "web_search",
            "arguments": {"queries": ["q"]},
            "signature": "QQ==",
        },
        {
            "type": "google_search_result",
            "call_id": "s1",
            "result": [{"search_suggestions": "<div>"}],
            "is_error": False,
            "signature": "QQ==",
        },
        {
            "type": "url_context_call",
            "id": "u1",
            "arguments": {"urls": ["https://x"]},
            "signature": "QQ==",
        },
        {
            "type": "url_context_result",
            "call_id": "u1",
            "result": [{"url": "https://x", "status": "success"}],
        },
        {"type": "google_maps_call", "id": "g1", "arguments": {"queries": ["pizza"]}},
        {"type": "google_maps_result", "call_id": "g1", "result": [{"places": [{"name": "n"}]}]},
        {"type": "file_search_call", "id": "f1", "signature": "QQ=="},
        {"type": "file_search_result", "call_id": "f1", "signature": "QQ=="},
        {
            "type": "retrieval_call",
            "id": "r1",
            "retrieval_type": "rag_store",
            "arguments": {"queries": ["q"]},
        },
        {"type": "retrieval_result", "call_id": "r1", "is_error": False},
        {
            "type": "mcp_server_tool_call",
            "id": "m1",
            "server_name": "docs",
            "name": "s",
            "arguments": {},
        },
        {
            "type": "mcp_server_tool_result",
            "call_id": "m1",
            "server_name": "docs",
            "name": "s",
            "result": "…",
        },
        {"type": "processing_call", "id": "p1"},
        {"type": "processing_result", "call_id": "p1"},
        {"type": "tool_search_call", "id": "t1", "arguments": {"function_names": ["a"]}},
        {
            "type": "tool_search_result",
            "call_id": "t1",
            "result": [{"type": "function", "name": "a", "parameters": {}}],
        },
        {
            "type": "code_execution_call",
            "id": "c1",
            "arguments": {"language": "python", "code": "1"},
            "signature": "QQ==",
        },
        {
            "type": "code_execution_result",
            "call_id": "c1",
            "result": "1\n",
            "is_error": False,
            "signature": "QQ==",
        },
        {
            "type": "function_call",
            "id": "w",
            "name": "f",
            "arguments": {"a": 1},
            "signature": "Q3I0Qg==",
        },
        {
            "type": "function_result",
            "call_id": "w",
            "name": "f",
            "result": [{"type": "image", "mime_type": "image/png", "data": PNG}],
        },
        {
            "type": "model_output",
            "content": [
                {"type": "text", "text": "A cat:"},
                {
                    "type": "audio",
                    "mime_type": "audio/l16",
                    "sample_rate": 24000,
                    "channels": 1,
                    "data": "AAAA",
                },
            ],
        },
        {"type": "user_input", "content": [{"type": "text", "text": "more"}]},
    ]
    interaction = sdk.Interaction.model_validate(
        {"id": "v1_a", "status": "completed", "steps": received}
    )
    body = {"model": "m", "input": interaction.steps}
    parsed = parse_create(written(body), max_depth=64)
    assert parsed.steps == received
