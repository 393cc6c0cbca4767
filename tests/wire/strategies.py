"""Random JSON, requests and steps."""

import copy

from hypothesis import strategies as st

TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
BASE64 = st.sampled_from(["AAAA", "AAA=", "AA==", "/9j/4AAQ"])


def _with(required, optional):
    return st.fixed_dictionaries(required, optional=optional)


ANNOTATION = _with(
    {"type": st.just("url_citation"), "url": TEXT},
    {"start_index": st.integers(0, 99), "end_index": st.integers(0, 99), "title": TEXT},
)
TEXT_BLOCK = _with(
    {"type": st.just("text"), "text": TEXT}, {"annotations": st.lists(ANNOTATION, max_size=2)}
)
MEDIA_BLOCK = st.one_of(
    _with({"type": st.just("image"), "mime_type": st.just("image/png"), "data": BASE64}, {}),
    _with(
        {"type": st.just("audio"), "data": BASE64},
        {"mime_type": st.sampled_from(["audio/l16", "audio/wav"]), "channels": st.integers(1, 2)},
    ),
    _with({"type": st.just("video"), "uri": TEXT}, {"name": TEXT}),
    _with({"type": st.just("document"), "uri": TEXT}, {"mime_type": st.just("application/pdf")}),
)
BLOCKS = st.lists(TEXT_BLOCK | MEDIA_BLOCK, max_size=5)
SIGNED = {"signature": st.sampled_from(["", "QQ=="]), "is_error": st.booleans(), "extra": JSON}


def _call(kind, arguments, **more):
    return _with(
        {"type": st.just(kind), "id": TEXT, **more},
        {"arguments": arguments, "signature": SIGNED["signature"], "extra": JSON},
    )


def _result(kind, result, **more):
    return _with({"type": st.just(kind), "call_id": TEXT, **more}, {"result": result, **SIGNED})


QUERIES = st.fixed_dictionaries({"queries": st.lists(TEXT, max_size=2)})
ROWS = st.lists(OBJECT, max_size=2)
STEP = st.one_of(
    _with({"type": st.just("user_input"), "content": BLOCKS}, {}),
    _with({"type": st.just("model_output")}, {"content": BLOCKS, "error": OBJECT, "extra": JSON}),
    _with(
        {"type": st.just("thought")},
        {"summary": st.lists(TEXT_BLOCK, max_size=3), **SIGNED},
    ),
    _with(
        {"type": st.just("function_call"), "id": TEXT, "name": TEXT, "arguments": OBJECT},
        {"signature": TEXT, "extra": JSON},
    ),
    _result("function_result", TEXT | OBJECT | BLOCKS, name=TEXT),
    _call("code_execution_call", st.fixed_dictionaries({"code": TEXT, "language": TEXT})),
    _result("code_execution_result", TEXT | BLOCKS),
    *(_call(f"{name}_call", QUERIES) for name in ("google_search", "google_maps", "retrieval")),
    *(_result(f"{name}_result", ROWS) for name in ("google_search", "google_maps", "url_context")),
    _call("url_context_call", st.fixed_dictionaries({"urls": st.lists(TEXT, max_size=2)})),
    _call("file_search_call", st.nothing()),
    _result("file_search_result", st.nothing()),
    _result("retrieval_result", st.nothing()),
    _call("processing_call", st.nothing()),
    _result("processing_result", st.nothing()),
    _call("tool_search_call", OBJECT),
    _result("tool_search_result", ROWS),
    _call("mcp_server_tool_call", OBJECT, name=TEXT, server_name=TEXT),
    _result("mcp_server_tool_result", TEXT | OBJECT | BLOCKS, name=TEXT, server_name=TEXT),
)

_KEYS = st.sampled_from(
    [
        "type",
        "text",
        "role",
        "content",
        "data",
        "uri",
        "mime_type",
        "processing",
        "name",
        "id",
        "call_id",
        "result",
        "model",
        "agent",
        "tools",
        "input",
        "schema",
        "env",
        "network",
        "extra",
    ]
)


def _places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, (*path, index))


@st.composite
def mutated(draw, bodies):
    """A body with one to three places replaced, removed, or joined by a new key."""
    body = copy.deepcopy(draw(st.sampled_from(bodies)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in _places(body) if p] or [("model",)]))
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "remove", "add", "wrap"]))
        if change == "remove":
            del parent[path[-1]]
        elif change == "wrap":
            parent[path[-1]] = draw(st.sampled_from([[parent[path[-1]]], {"type": "text"}]))
        elif change == "add" and isinstance(parent, dict):
            parent[draw(_KEYS)] = draw(JSON | STEP)
        else:
            parent[path[-1]] = draw(JSON | STEP | st.sampled_from(["STATIC", "Text", "", "AA-_"]))
        if not body:
            break
    return body
