"""Steps for the adapters' contract: small builders, and one history with every step type."""

import base64

from openinteractions.models.port import Json

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n-not-really").decode()


def user(*content: str | Json) -> Json:
    """A `user_input` step."""
    return {
        "type": "user_input",
        "content": [text(c) if isinstance(c, str) else c for c in content],
    }


def said(words: str) -> Json:
    """A `model_output` step of one text block."""
    return {"type": "model_output", "content": [text(words)]}


def text(words: str) -> Json:
    """A text content block."""
    return {"type": "text", "text": words}


# Every step type of the contract, with a word by which each must be found again in the request.
HISTORY: list[Json] = [
    user("question-one"),
    {"type": "thought", "summary": [text("foreign-plan")]},
    {"type": "model_output", "content": [{**text("answer-one"), "annotations": []}]},
    {
        "type": "code_execution_call",
        "id": "c1",
        "arguments": {"language": "python", "code": "print('code-word')"},
    },
    {
        "type": "code_execution_result",
        "call_id": "c1",
        "result": "code-output\n",
        "is_error": False,
    },
    {
        "type": "google_search_call",
        "id": "s1",
        "search_type": "web_search",
        "arguments": {"queries": ["search-word"]},
    },
    {
        "type": "google_search_result",
        "call_id": "s1",
        "result": [{"search_suggestions": "search-found"}],
    },
    {"type": "url_context_call", "id": "u1", "arguments": {"urls": ["https://url-word.example"]}},
    {
        "type": "url_context_result",
        "call_id": "u1",
        "result": [{"url": "https://url-word.example", "status": "success"}],
    },
    {"type": "google_maps_call", "id": "g1", "arguments": {"queries": ["maps-word"]}},
    {
        "type": "google_maps_result",
        "call_id": "g1",
        "result": [
            {"places": [{"name": "maps-found", "place_id": "places/1", "url": "https://m"}]}
        ],
    },
    {"type": "file_search_call", "id": "f1"},
    {"type": "file_search_result", "call_id": "f1"},
    {
        "type": "retrieval_call",
        "id": "r1",
        "retrieval_type": "rag_store",
        "arguments": {"queries": ["retrieval-word"]},
    },
    {"type": "retrieval_result", "call_id": "r1", "is_error": False},
    {
        "type": "mcp_server_tool_call",
        "id": "m1",
        "server_name": "docs",
        "name": "lookup",
        "arguments": {"q": "mcp-word"},
    },
    {
        "type": "mcp_server_tool_result",
        "call_id": "m1",
        "server_name": "docs",
        "name": "lookup",
        "result": {"hit": "mcp-found"},
    },
    {"type": "processing_call", "id": "p1"},
    {"type": "processing_result", "call_id": "p1"},
    {"type": "tool_search_call", "id": "t1", "arguments": {"function_names": ["tool-word"]}},
    {
        "type": "tool_search_result",
        "call_id": "t1",
        "result": [{"type": "function", "name": "tool-word", "parameters": {}}],
    },
    {
        "type": "function_call",
        "id": "fc1",
        "name": "get_weather",
        "arguments": {"city": "call-word"},
    },
    {
        "type": "function_call",
        "id": "fc2",
        "name": "get_weather",
        "arguments": {"city": "other-word"},
    },
    {
        "type": "function_result",
        "call_id": "fc1",
        "name": "get_weather",
        "result": {"temp": "result-object"},
    },
    {
        "type": "function_result",
        "call_id": "fc2",
        "name": "get_weather",
        "result": [text("result-block"), {"type": "image", "mime_type": "image/png", "data": PNG}],
        "is_error": True,
    },
    {
        "type": "model_output",
        "content": [text("broken-answer")],
        "error": {"code": 13, "message": "broke off"},
    },
    said("answer-two"),
    {"type": "code_execution_call", "id": "c2", "arguments": {"code": "open('open-word')"}},
]
PRESENT = """
    question-one answer-one code-word code-output search-word search-found url-word maps-word
    maps-found retrieval-word mcp-word mcp-found tool-word call-word other-word result-object
    result-block answer-two open-word question-two
""".split()  # noqa: SIM905 - it reads better
ABSENT = ("foreign-plan", "broken-answer")
