"""Large media: out of the rows, back into the answers, and by `uri`."""

import base64
import os
import urllib.error
import urllib.request

import pytest
from google.genai import Client

from openinteractions.models.port import Finished, Media, TextDelta
from tests.e2e.server import USAGE, Fakes, Server, answer, turn

BIG = os.urandom(60_000)
IMAGE = {"type": "image", "mime_type": "image/png", "data": base64.b64encode(BIG).decode()}
BY_URI = {"type": "image", "delivery": "uri"}


def fetch(url: str, key: str | None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"x-goog-api-key": key} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_image_comes_back_whole_and_reaches_the_next_turn(
    client: Client, fakes: Fakes, *, stream: bool
) -> None:
    painted = turn(TextDelta("Here:"), Media(IMAGE), Finished("stop", USAGE))
    fakes.goog.replies += [painted, answer("A dot.")]
    if stream:
        events = list(
            client.interactions.create(
                model="goog/painter", input="A dot", response_modalities=["image"], stream=True
            )
        )
        made_id = events[-1].interaction.id
        shown = [e.delta for e in events if e.event_type == "step.delta"]
        assert any(getattr(delta, "data", None) == IMAGE["data"] for delta in shown)
    else:
        made = client.interactions.create(
            model="goog/painter", input="A dot", response_modalities=["image"]
        )
        assert base64.b64decode(made.output_image.data) == BIG
        made_id = made.id
    assert base64.b64decode(client.interactions.get(made_id).output_image.data) == BIG
    client.interactions.create(
        model="goog/painter", input="What is it?", previous_interaction_id=made_id
    )
    assert IMAGE["data"] in str(fakes.goog.requests[-1].json)


def test_delivery_by_uri_needs_the_key_and_reaches_the_next_turn(
    client: Client, fakes: Fakes, server: Server
) -> None:
    fakes.goog.replies += [turn(Media(IMAGE), Finished("stop", USAGE)), answer("A dot.")]
    made = client.interactions.create(model="goog/painter", input="A dot", response_format=[BY_URI])
    image = made.output_image
    assert (image.data, image.mime_type) == (None, "image/png")
    assert image.uri.startswith(server.url + "/v1beta/media/")
    assert fetch(image.uri, server.key) == (200, BIG)
    assert fetch(image.uri, None)[0] == 401
    assert client.interactions.get(made.id).output_image.uri == image.uri
    client.interactions.create(
        model="goog/painter", input="What is it?", previous_interaction_id=made.id
    )
    assert IMAGE["data"] in str(fakes.goog.requests[-1].json)
    client.interactions.delete(made.id)


def test_delivery_by_uri_is_refused_where_nothing_is_stored(client: Client) -> None:
    with pytest.raises(Exception, match="delivery"):
        client.interactions.create(
            model="goog/painter", input="A dot", response_format=[BY_URI], store=False
        )
