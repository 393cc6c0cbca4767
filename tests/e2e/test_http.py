"""Plain HTTP against a running server: routes, keys, ids, lists, browsers, operators."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.server import KEY, UPSTREAM_KEYS, Fakes, Server, answer
from tests.e2e.wire import MODEL, V, call, create, raw, request_bytes

NOWHERE = "v1_" + "0" * 32


@pytest.fixture
def made(server: Server, fakes: Fakes) -> str:
    """The id of an interaction."""
    return create(server, {}).json()["id"]


# ---- routes


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1", 404),
        ("GET", "/v2/interactions", 404),
        ("GET", "/v1/triggers", 404),
        ("POST", "/v1beta/triggers", 404),
        ("GET", "/v1beta/interactions/", 404),
        ("GET", "//v1beta/interactions", 404),
        ("GET", "/v1beta/interactions//", 404),
        ("POST", "/v1beta/interactions/", 405),
        ("PUT", "/v1beta/interactions", 405),
        ("PATCH", f"/v1beta/interactions/{NOWHERE}", 405),
        ("POST", f"/v1beta/interactions/{NOWHERE}", 405),
        ("POST", f"/v1beta/interactions/{NOWHERE}:destroy", 405),
        ("DELETE", "/v1beta/interactions", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_wrong_routes_are_told_in_json(
    server: Server, fakes: Fakes, method: str, path: str, status: int
) -> None:
    found = call(server, method, path, b"{}")
    found.error(status)
    assert "location" not in found.headers
    if status == 405:
        allowed = found.headers["allow"].split(", ")
        assert method not in allowed
        assert set(allowed) & {"GET", "POST"}


@pytest.mark.parametrize("version", ["v1", "v1beta", "v1alpha"])
def test_every_version_has_the_same_routes(server: Server, fakes: Fakes, version: str) -> None:
    base = f"/{version}/interactions"
    made = call(server, "POST", base, {"model": MODEL, "input": "Hi"}).json()["id"]
    assert call(server, "GET", f"{base}/{made}?stream=false").json()["id"] == made
    assert call(server, "GET", f"{base}?page_size=1").json()["interactions"][0]["id"] == made
    assert call(server, "POST", f"{base}/{made}/cancel").json()["status"] == "completed"
    assert call(server, "POST", f"{base}/{made}:cancel").json()["status"] == "completed"
    gone = call(server, "DELETE", f"{base}/{made}")
    assert (gone.status, gone.json()) == (200, {})
    call(server, "GET", f"{base}/{made}").error(404)


@pytest.mark.parametrize(
    "odd",
    [
        "%00",
        "%ff%fe",
        "%ED%A0%80",
        "%0d%0aX-Evil:%201",
        "%2e%2e",
        "..",
        "../..",
        "a/b/c",
        "a%2Fb",
        "interactions/x",
        "interactions/interactions/x",
        "x" * 20_000,
        "%F0%9F%A6%95",
        "'; drop table interactions; --".replace(" ", "%20"),
        "{id}",
        "v1_" + "g" * 32,
        "v1_" + "0" * 31,
        "v1_" + "0" * 33,
        NOWHERE + "%0a",
        NOWHERE + "@0",
        NOWHERE.upper(),
        ":stream",
        ":cancel",
        "cancel",
        "/cancel",
    ],
)
def test_odd_ids_are_not_found(server: Server, fakes: Fakes, odd: str) -> None:
    for method, suffix in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", ":cancel")):
        found = call(server, method, f"{V}/interactions/{odd}{suffix}")
        found.error(405 if found.status == 405 else 404)
        assert "x-evil" not in found.headers
        assert len(found.body) < 1000
    assert call(server, "GET", f"{V}/interactions/{odd}?stream=true").status == 404


def test_ids_come_with_their_collection_too(server: Server, made: str) -> None:
    for form in (f"interactions/{made}", f"interactions%2F{made}"):
        assert call(server, "GET", f"{V}/interactions/{form}").json()["id"] == made
        assert call(server, "POST", f"{V}/interactions/{form}/cancel").json()["id"] == made
    body = {"previous_interaction_id": f"interactions/{made}"}
    assert create(server, body).json()["previous_interaction_id"] == made


def test_unknown_query_parameters_are_ignored(server: Server, made: str) -> None:
    found = call(server, "GET", f"{V}/interactions/{made}?alt=sse&$prettyPrint=1&x&=&%00=%00")
    assert found.json()["id"] == made
    found = call(
        server, "POST", f"{V}/interactions?alt=sse&foo=bar", {"model": MODEL, "input": "x"}
    )
    assert found.headers["content-type"] == "application/json"


@pytest.mark.parametrize("query", ["stream=maybe", "include_input=2x", "stream=", "stream=%00"])
def test_wrong_query_values_are_named(server: Server, made: str, query: str) -> None:
    message = call(server, "GET", f"{V}/interactions/{made}?{query}").error(400)
    assert query.split("=", maxsplit=1)[0] in message


def test_stream_frames_are_as_the_contract_says(server: Server, fakes: Fakes) -> None:
    fakes.acme.replies.append(answer("a\nb", "\u2028c"))
    found = create(server, {"stream": True}, accept="application/json")
    assert found.headers["content-type"].startswith("text/event-stream")
    assert "content-encoding" not in found.headers
    assert found.body.endswith(b"event: done\ndata: [DONE]\n\n")
    frames = found.body.decode().split("\n\n")
    assert frames.pop() == ""
    for frame in frames[:-1]:
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        data = json.loads(fields["data"])
        assert data["event_type"] == fields["event"]
        assert data["event_id"] == fields["id"]
    interaction_id = json.loads(re.search(rb"data: (.*)", found.body)[1])["interaction"]["id"]
    again = call(server, "GET", f"{V}/interactions/{interaction_id}:stream")
    assert again.body == found.body
    event_id = fields["id"]
    by_alias = call(
        server, "GET", f"{V}/interactions/{interaction_id}?stream=true&lastEventId={event_id}"
    )
    assert by_alias.body.count(b"event: interaction.completed") == 1
    assert by_alias.body.count(b"event: step") == 0


# ---- keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x_goog_api_key": ""},
        {"x_goog_api_key": "oi_wrong"},
        {"x_goog_api_key": KEY[:-1]},
        {"x_goog_api_key": KEY + "x"},
        {"x_goog_api_key": KEY.upper()},
        {"x_goog_api_key": "é" * 50},
        {"x_goog_api_key": "x" * 30_000},
        {"x_goog_api_key": "' or 1=1 --"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer  "},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
    ],
)
def test_without_a_good_key_nothing_happens(
    server: Server, fakes: Fakes, headers: dict[str, str]
) -> None:
    body = {"model": MODEL, "input": "Hi"}
    for method, path in (
        ("POST", f"{V}/interactions"),
        ("GET", f"{V}/interactions"),
        ("GET", f"{V}/interactions/{NOWHERE}"),
        ("GET", f"{V}/interactions/{NOWHERE}?stream=true"),
        ("POST", f"{V}/interactions/{NOWHERE}/cancel"),
        ("DELETE", f"{V}/interactions/{NOWHERE}"),
    ):
        message = call(server, method, path, body, key=None, **headers).error(401)
        assert KEY[3:10] not in message
    assert fakes.acme.requests == []


def test_keys_come_in_three_places(server: Server, made: str) -> None:
    path = f"{V}/interactions/{made}"
    assert call(server, "GET", path, key=None, authorization=f"bearer {KEY}").status == 200
    assert call(server, "GET", f"{path}?key={KEY}", key=None).status == 200
    call(server, "GET", f"{path}?key=wrong", key=None).error(401)
    call(server, "GET", f"{path}?key=%00", key=None).error(401)


def test_a_key_with_a_nul_is_no_key(server: Server) -> None:
    head = f"GET {V}/interactions HTTP/1.1\r\nHost: x\r\nx-goog-api-key: {KEY}\x00\r\n\r\n"
    answers = raw(server, head.encode(), wait_s=2)
    assert all(400 <= one.status < 500 for one in answers)


# ---- lists


def listed(server: Server, query: str = "") -> Any:
    found = call(server, "GET", f"{V}/interactions?{query}")
    assert found.status == 200, found.body
    return found.json()


def test_list_is_paged_newest_first(server: Server, fakes: Fakes) -> None:
    made = [create(server, {"labels": {"page": "ed"}}).json()["id"] for _ in range(5)]
    seen: list[str] = []
    token = ""
    pages = 0
    while True:
        page = listed(server, f"label=page:ed&page_size=2&page_token={token}")
        assert all("steps" not in one for one in page["interactions"])
        seen += [one["id"] for one in page["interactions"]]
        pages += 1
        if "next_page_token" not in page:
            break
        token = page["next_page_token"]
    assert seen == made[::-1]
    assert pages == 3
    camel = listed(server, "label=page:ed&pageSize=4")
    assert len(camel["interactions"]) == 4
    rest = listed(server, f"label=page:ed&pageToken={camel['next_page_token']}")
    assert [one["id"] for one in rest["interactions"]] == made[:1]


def test_list_is_narrowed(server: Server, fakes: Fakes) -> None:
    one = create(server, {"labels": {"kind": "n", "a": "12"}}).json()
    two = create(server, {"labels": {"kind": "n"}, "model": "anth/x"}).json()

    def found(query: str) -> list[str]:
        return [item["id"] for item in listed(server, "label=kind:n&" + query)["interactions"]]

    assert found("") == [two["id"], one["id"]]
    assert found("model=anth/x") == [two["id"]]
    assert found("label=a:12") == [one["id"]]
    assert found("label=a:1") == []
    assert found("status=failed") == []
    assert found("status=failed&status=completed") == [two["id"], one["id"]]
    assert found("agent=x") == []
    assert found(f"created_after={quote(two['created'])}") == [two["id"]]
    assert found(f"created_before={quote(two['created'])}") == [one["id"]]


@pytest.mark.parametrize(
    "query",
    [
        "page_size=-1",
        "page_size=x",
        "page_size=1.5",
        "page_size=%00",
        "page_token=x",
        "page_token=%00",
        "page_token=" + "A" * 32,
        "page_token=" + "A" * 8000,
        "page_token=%C3%A9",
        "status=",
        "status=nope",
        "status=%00",
        "label=nocolon",
        "label=:x",
        "label=a:%00",
        "label=%00:a",
        "created_after=yesterday",
        "created_after=2026-01-01T00:00:00",
        "created_before=%00",
    ],
)
def test_wrong_list_queries_are_refused(server: Server, query: str) -> None:
    call(server, "GET", f"{V}/interactions?{query}").error(400)


@pytest.mark.parametrize(
    "query",
    [
        "page_size=0",
        "page_size=",
        "page_size=99999999999999999999",
        "page_token=",
        "model=%00",
        "agent=%00",
        "model=%ED%A0%80",
        "label=a:%ff",
        "label=" + "a" * 5000 + ":b",
        "created_after=0001-01-01T00:00:00Z",
        "created_after=9999-12-31T23:59:59Z",
        "created_after=0001-01-01T00:00:00%2B14:00",
        "created_before=9999-12-31T23:59:59-14:00",
        "created_after=-1",
        "created_after=1e300",
        "created_after=99999999999999999999",
        "status=completed&" * 300,
    ],
)
def test_odd_list_queries_do_no_harm(server: Server, query: str) -> None:
    assert call(server, "GET", f"{V}/interactions?{query}").status in {200, 400}


def test_a_page_token_belongs_to_its_filters(server: Server, fakes: Fakes) -> None:
    for _ in range(2):
        create(server, {})
    token = listed(server, "page_size=1")["next_page_token"]
    found = call(server, "GET", f"{V}/interactions?status=completed&page_token={token}")
    assert "other filters" in found.error(400)


# ---- browsers and connections


def test_browsers_may_call(server: Server, made: str) -> None:
    preflight = call(
        server,
        "OPTIONS",
        f"{V}/interactions",
        key=None,
        origin="https://app.example",
        access_control_request_method="POST",
        access_control_request_headers="content-type,x-goog-api-key,x-goog-api-client",
    )
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] in {"*", "https://app.example"}
    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert "x-goog-api-key" in allowed
    found = call(server, "GET", f"{V}/interactions/{made}", origin="https://app.example")
    assert "retry-after" in found.headers["access-control-expose-headers"].lower()
    refused = call(server, "GET", f"{V}/interactions/x", origin="https://app.example")
    assert refused.headers["access-control-allow-origin"] == "*"
    refused.error(404)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE"])
def test_other_methods_do_no_harm(server: Server, made: str, method: str) -> None:
    for path in ("/healthz", f"{V}/interactions", f"{V}/interactions/{made}"):
        found = call(server, method, path)
        assert found.status in {200, 204, 405}
    assert call(server, "GET", f"{V}/interactions/{made}").status == 200


def test_a_connection_outlives_errors(server: Server, fakes: Fakes) -> None:
    good = json.dumps({"model": MODEL, "input": "Hi"}).encode()
    answers = raw(
        server,
        request_bytes("GET", f"{V}/interactions/x")
        + request_bytes("POST", f"{V}/interactions", b"{")
        + request_bytes("PUT", f"{V}/interactions", b"{}")
        + request_bytes("POST", f"{V}/interactions", good)
        + request_bytes("DELETE", f"{V}/interactions/x", b"")
        + request_bytes("GET", "/healthz", close=True),
    )
    assert [one.status for one in answers] == [404, 400, 405, 200, 404, 200]


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: -1",
        "Content-Length: x",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 99999999999999999999999",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Transfer-Encoding: gzip, nonsense",
        "x-evil: a\x00b",
        "no colon here",
        ": no name",
        "x-long: " + "a" * 200_000,
    ],
)
def test_broken_requests_do_no_harm(server: Server, fakes: Fakes, head: str) -> None:
    sent = request_bytes("POST", f"{V}/interactions", b"{}hey", head, close=True)
    assert all(400 <= one.status < 500 for one in raw(server, sent, wait_s=3))
    assert fakes.acme.requests == []
    assert call(server, "GET", "/healthz").status == 200


# ---- operators


def test_health_needs_no_key(server: Server) -> None:
    assert call(server, "GET", "/healthz", key=None).json() == {"status": "ok"}
    assert call(server, "GET", "/readyz", key=None).json() == {"status": "ready"}


def test_reference_page_loads_nothing_from_elsewhere(server: Server) -> None:
    page = call(server, "GET", "/docs", key=None)
    assert page.headers["content-type"].startswith("text/html")
    text = page.body.decode()
    assert "openapi.json" in text
    assert not re.findall(r"""(?:https?:)?//[\w.-]+\.\w+""", text)
    assert not re.findall(r"""\b(?:src|@import|url\()""", text)


def test_description_is_whole(server: Server) -> None:
    found = call(server, "GET", "/openapi.json", key=None).json()
    assert found["openapi"].startswith("3.1")
    assert set(found["paths"]) >= {
        "/v1beta/interactions",
        "/v1beta/interactions/{interaction_id}",
        "/v1beta/interactions/{interaction_id}/cancel",
    }
    named = set(found["components"]["schemas"])
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(found))) <= named


def test_logs_hold_no_user_text_and_no_secrets(server: Server, fakes: Fakes) -> None:
    word = "marzipan-submarine"
    fakes.acme.replies.append(answer(f"answer {word}"))
    body: dict[str, Any] = {
        "input": f"prompt {word}",
        "system_instruction": word,
        "labels": {word: word},
        "tools": [{"type": "function", "name": word, "description": word}],
    }
    create(server, body)
    list(create(server, body | {"stream": True}).body)
    create(server, body | {"store": False})
    create(server, body | {"flavour": word})
    create(server, body | {word: 1, "model": word})
    create(server, f'{{"input": "{word}'.encode())
    call(server, "GET", f"{V}/interactions/{word}?last_event_id={word}&key={KEY}&label={word}:x")
    call(server, "GET", f"{V}/{word}?{word}")
    call(server, "GET", f"{V}/interactions", key=word)
    log = Path(server.log).read_text()
    assert '"event":"request"' in log
    assert KEY not in log
    assert not any(key in log for key in UPSTREAM_KEYS.values())
    # A path that no route knows is the one thing that is written as it came.
    assert [line for line in log.splitlines() if word in line and '"status":404' not in line] == []
