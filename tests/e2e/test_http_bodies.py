"""Plain HTTP against a running server: bodies of every bad kind."""

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.server import BODY_SILENCE_S, MAX_BODY, Fakes, Server, answer
from tests.e2e.wire import MODEL, V, call, create, raw, request_bytes

GOOD = json.dumps({"model": MODEL, "input": "Hi"}).encode()
PATH = f"{V}/interactions"
DEEP = json.loads("[" * 150 + "]" * 150)

NOT_JSON = {
    "empty": b"",
    "blank": b"  \r\n",
    "cut": b'{"model": "x"',
    "list": b"[]",
    "null": b"null",
    "string": b'"x"',
    "number": b"1",
    "bad UTF-8": b'{"model": "gemini-3.5-flash", "input": "\xff\xfe"}',
    "overlong UTF-8": b'{"model": "gemini-3.5-flash", "input": "\xc0\x80"}',
    "UTF-8 surrogate": b'{"model": "gemini-3.5-flash", "input": "\xed\xa0\x80"}',
    "UTF-16": '{"model": "gemini-3.5-flash", "input": "Hi"}'.encode("utf-16"),
    "lone surrogate": rb'{"model": "gemini-3.5-flash", "input": "\ud800"}',
    "lone surrogate as key": rb'{"model": "gemini-3.5-flash", "input": "x", "\udc00": 1}',
    "NaN": b'{"model": "x", "input": NaN}',
    "Infinity": b'{"model": "x", "input": "x", "generation_config": {"temperature": Infinity}}',
    "trailing text": GOOD + b"x",
    "two documents": GOOD + GOOD,
    "raw control character": b'{"model": "x", "input": "\x01"}',
    "100k brackets": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100k open brackets": b"[" * 100_000,
    "100k braces": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "zeros": b"\x00" * 1000,
    "form": b"model=x&input=y",
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_what_is_no_json_object_is_refused(server: Server, fakes: Fakes, case: str) -> None:
    message = create(server, NOT_JSON[case]).error(400)
    assert len(message) < 500
    assert fakes.acme.requests == []


WRONG: dict[str, dict[str, Any]] = {
    "huge integer": {"generation_config": {"seed": 10**30}},
    "huge float": {"generation_config": {"temperature": 1e308}},
    "negative": {"generation_config": {"max_output_tokens": -1}},
    "integer past 32 bits": {"generation_config": {"max_output_tokens": 2**31}},
    "huge limit": {"limits": {"max_total_tokens": 10**40}},
    "flag as text": {"stream": "yes please"},
    "model as number": {"model": 5},
    "model as list": {"model": []},
    "no model": {"model": ""},
    "input as number": {"input": 5},
    "empty list": {"input": []},
    "empty content": {"input": [{"type": "user_input", "content": []}]},
    "list in list": {"input": [[]]},
    "null in list": {"input": [None]},
    "no such content": {"input": [{"type": "hologram", "data": "x"}]},
    "no base64": {"input": [{"type": "image", "mime_type": "image/png", "data": "?"}]},
    "no data": {"input": [{"type": "image", "mime_type": "image/png"}]},
    "no such mime type": {"input": [{"type": "image", "mime_type": "x/y", "data": "aaaa"}]},
    "file uri": {"input": [{"type": "image", "mime_type": "image/png", "uri": "file:///etc"}]},
    "no uri": {"input": [{"type": "image", "mime_type": "image/png", "uri": "http://["}]},
    "arguments as text": {"input": [{"type": "function_call", "id": "a", "arguments": "x"}]},
    "labels as list": {"labels": ["a"]},
    "label as number": {"labels": {"a": 1}},
    "deep schema": {"response_format": {"type": "text", "schema": DEEP}},
    "bad pattern": {
        "response_format": {"type": "text", "schema": {"type": "string", "pattern": "("}}
    },
    "branch off nothing": {"previous_interaction_id": "x@"},
    "branch past the end": {"previous_interaction_id": "x@99999999999999"},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused(server: Server, fakes: Fakes, case: str) -> None:
    message = create(server, WRONG[case]).error(400)
    assert len(message) < 1000
    assert fakes.acme.requests == []


ODD = ["\x00", "a\x00b", "\x01\x1f\x7f", "\u2028", "\ufeff", "\uffff", "🦕" * 999, " ", "\u202e"]
PLACES: dict[str, Any] = {
    "model": lambda text: {"model": text},
    "input": lambda text: {"input": text},
    "content": lambda text: {"input": [{"type": "text", "text": text}]},
    "step": lambda text: {
        "input": [{"type": "user_input", "content": [{"type": "text", "text": text}]}]
    },
    "replayed": lambda text: {
        "input": [
            {"type": "thought", "signature": text, "summary": [{"type": "text", "text": text}]},
            {"type": "function_call", "id": text, "name": text, "arguments": {text: text}},
            {"type": "function_result", "call_id": text, "name": text, "result": text},
        ]
    },
    "system": lambda text: {"system_instruction": text},
    "previous": lambda text: {"previous_interaction_id": text},
    "labels": lambda text: {"labels": {text: text}},
    "label value": lambda text: {"labels": {"a": text}},
    "tool": lambda text: {"tools": [{"type": "function", "name": text, "description": text}]},
    "parameter": lambda text: {
        "tools": [
            {
                "type": "function",
                "name": "f",
                "description": text,
                "parameters": {"type": "object", "properties": {text: {"description": text}}},
            }
        ]
    },
    "schema": lambda text: {
        "response_format": {"type": "text", "schema": {"title": text, "enum": ["ok", text]}}
    },
    "stop": lambda text: {"generation_config": {"stop_sequences": [text]}},
    "uri": lambda text: {
        "input": [{"type": "image", "mime_type": "image/png", "uri": f"https://x/{text}"}]
    },
    "tier": lambda text: {"service_tier": text},
    "unknown key": lambda text: {text: text},
    "token": lambda text: {"continuation_token": text},
    "annotation": lambda text: {
        "input": [
            {"type": "text", "text": text, "annotations": [{"type": "url_citation", "url": text}]}
        ]
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_odd_characters_do_no_harm_anywhere(server: Server, fakes: Fakes, place: str) -> None:
    for text in ODD:
        body = PLACES[place](text)
        for store in (True, False):
            found = create(server, body | {"store": store})
            assert found.status in {200, 400, 404}, (text, found.body)
            if found.status != 200:
                found.error(found.status)
        if found.status == 200:
            stored = create(server, body).json()
            seen = call(server, "GET", f"{PATH}/{stored['id']}?include_input=true")
            assert seen.json()["status"] == stored["status"]
            assert call(server, "GET", f"{PATH}/{stored['id']}?stream=true").status == 200
            if isinstance(body.get("input"), str):
                assert seen.json()["input"] == text


def test_lists_and_results_still_work_after_odd_characters(server: Server, fakes: Fakes) -> None:
    create(server, {"input": "\x00", "system_instruction": "\x00"})
    found = call(server, "GET", f"{PATH}?page_size=1000")
    assert found.status == 200
    assert found.json()["interactions"]


def test_odd_characters_of_a_model_are_kept(server: Server, fakes: Fakes) -> None:
    text = "a\x00b\u2028\n\r\n\ud83e\udd95".encode("utf-16", "surrogatepass").decode("utf-16")
    fakes.acme.replies += [answer(*text), answer(text)]
    streamed = create(server, {"stream": True})
    frames = [line[6:] for line in streamed.body.split(b"\n") if line.startswith(b"data: {")]
    events = [json.loads(frame) for frame in frames]
    shown = "".join(e["delta"]["text"] for e in events if e["event_type"] == "step.delta")
    assert shown == text
    seen = call(server, "GET", f"{PATH}/{events[0]['interaction']['id']}").json()
    assert seen["steps"][-1]["content"][0]["text"] == text
    assert create(server, {}).json()["steps"][0]["content"][0]["text"] == text


def test_very_many_steps_do_no_harm(server: Server, fakes: Fakes) -> None:
    steps = [{"type": "user_input", "content": "a"}] * 40_000
    for store in (True, False):
        assert "step" in create(server, {"input": steps, "store": store}).error(400)


@pytest.mark.parametrize(
    "reference", ["#/$defs/nope", "http://127.0.0.1:1/x", "file:///etc/passwd"]
)
def test_schema_references_lead_nowhere(server: Server, fakes: Fakes, reference: str) -> None:
    fakes.acme.default = answer('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"$ref": reference}}}
    found = create(server, {"response_format": {"type": "text", "schema": schema}})
    assert found.status in {200, 400}
    if found.status == 200:
        assert "internal" not in {one["code"] for one in found.json().get("errors", [])}


def test_nulls_are_as_if_absent(server: Server, fakes: Fakes) -> None:
    body = {"tools": None, "stream": None, "store": None, "labels": None, "agent": None}
    assert create(server, body).json()["status"] == "completed"


def test_integers_may_be_text(server: Server, fakes: Fakes) -> None:
    assert create(server, {"limits": {"max_total_tokens": "100000"}}).status == 200


def test_string_steps_are_taken(server: Server, fakes: Fakes) -> None:
    create(server, {"input": [{"type": "user_input", "content": "From a string"}]})
    assert "From a string" in json.dumps(fakes.acme.requests[-1].json)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "x", ""])
def test_content_type_does_not_matter(server: Server, fakes: Fakes, kind: str) -> None:
    assert create(server, {}, content_type=kind).status == 200


def test_bodies_where_none_belongs_are_ignored(server: Server, fakes: Fakes) -> None:
    made = create(server, {}).json()["id"]
    for body in (b"", b"{}", b"not json \xff"):
        headers = {"content_type": "application/json"}
        assert call(server, "GET", f"{PATH}/{made}", body, **headers).status == 200
        assert call(server, "POST", f"{PATH}/{made}/cancel", body, **headers).status == 200
    assert call(server, "DELETE", f"{PATH}/{made}", b"{}").json() == {}


# ---- size and pace


def too_long() -> bytes:
    return json.dumps({"model": MODEL, "input": "x" * MAX_BODY}).encode()


def test_long_body_is_refused_by_its_declared_length(server: Server, fakes: Fakes) -> None:
    head = request_bytes("POST", PATH, b"", f"Content-Length: {MAX_BODY + 1}")
    [found] = raw(server, head, count=1)
    assert str(MAX_BODY) in found.error(413)


@pytest.mark.parametrize("declared", [True, False])
def test_long_body_is_refused(server: Server, fakes: Fakes, declared: bool) -> None:
    body = too_long()
    framing = f"Content-Length: {len(body)}"
    if not declared:
        framing = "Transfer-Encoding: chunked"
        size = 65_536
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    answers = raw(server, request_bytes("POST", PATH, b"", framing, close=True), body, wait_s=5)
    # The refusal may come while the client still sends, and be lost with the connection.
    assert [one.status for one in answers] in ([413], [])
    assert fakes.acme.requests == []
    assert call(server, "GET", "/healthz").status == 200


def test_longest_body_is_taken(server: Server, fakes: Fakes) -> None:
    room = MAX_BODY - len(json.dumps({"model": MODEL, "input": ""}))
    body = json.dumps({"model": MODEL, "input": "x" * room}).encode()
    assert len(body) == MAX_BODY
    assert create(server, body).json()["status"] == "completed"
    create(server, body + b" ").error(413)


def test_chunked_body_is_taken(server: Server, fakes: Fakes) -> None:
    chunks = b"%x\r\n%b\r\n3;a=b\r\n   \r\n0\r\nx-trailer: 1\r\n\r\n" % (len(GOOD), GOOD)
    head = request_bytes("POST", PATH, b"", "Transfer-Encoding: chunked", close=True)
    [found] = raw(server, head, chunks)
    assert found.json()["status"] == "completed"


def test_slow_body_is_cut_off(server: Server, fakes: Fakes) -> None:
    began = time.monotonic()
    [found] = raw(server, request_bytes("POST", PATH, b'{"mo', "Content-Length: 400"), count=1)
    assert "paused" in found.error(400)
    assert BODY_SILENCE_S * 0.8 < time.monotonic() - began < BODY_SILENCE_S + 30


def test_body_that_never_ends_is_no_request(server: Server, fakes: Fakes) -> None:
    at = urlsplit(server.url)
    for _ in range(20):
        with socket.create_connection((at.hostname, at.port), timeout=5) as connection:
            connection.sendall(request_bytes("POST", PATH, GOOD[:-3], "Content-Length: 400"))
    assert call(server, "GET", "/readyz").status == 200
    assert fakes.acme.requests == []


def test_expect_continue_is_answered(server: Server, fakes: Fakes) -> None:
    at = urlsplit(server.url)
    headers = (f"Content-Length: {len(GOOD)}", "Expect: 100-continue")
    with socket.create_connection((at.hostname, at.port), timeout=5) as connection:
        connection.sendall(request_bytes("POST", PATH, b"", *headers, close=True))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(GOOD)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
