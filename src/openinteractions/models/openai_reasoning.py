"""What a model behind the OpenAI wire thought before it called a tool, kept and given back.

Kimi and DeepSeek refuse a call in the history without the reasoning that led to it; every other
reasoning model works better with it. It is the `signature` of a thought step: the assistant
message's fields as JSON, `{"reasoning_content": …}` or whichever the server used.
"""

from typing import Any, Final, cast
from urllib.parse import urlsplit

import orjson

from openinteractions.models.port import Json

# `reasoning_details` is OpenRouter's and MiniMax's, in which a vendor's own signatures travel:
# https://openrouter.ai/docs/guides/best-practices/reasoning-tokens#preserving-reasoning
_TEXTS: Final = ("reasoning_content", "reasoning")
_DETAILS: Final = "reasoning_details"
_GROWING: Final = {"reasoning.text": "text", "reasoning.summary": "summary"}
_MOST_CHARS: Final = 256 * 1024

# What goes where the reasoning of a call is another model's, or was lost. Moonshot takes an empty
# one for none; DeepSeek wants one in every message once a tool was called:
# https://github.com/earendil-works/pi/pull/4178
# https://api-docs.deepseek.com/guides/thinking_mode
_BLANKS: Final = {"moonshot.ai": " ", "moonshot.cn": " ", "kimi.com": " ", "deepseek.com": ""}


def blank_for(base_url: str) -> str | None:
    """What this server wants for the reasoning of a message that has none; None: nothing."""
    host = urlsplit(base_url).hostname or ""
    return _BLANKS.get(".".join(host.rsplit(".", 2)[-2:]))


class Reasoning:
    """Collects the reasoning of one turn."""

    def __init__(self) -> None:
        self._field = ""
        self._texts: list[str] = []
        self._details: list[Json] = []
        self._detail_chars = 0

    def feed(self, delta: Json) -> str:
        """Take what a delta has of it; give the text that can be shown."""
        for detail in _objects(delta.get(_DETAILS)):
            self._add_detail(detail)
        for field in _TEXTS:
            text = delta.get(field)
            if text and isinstance(text, str):
                self._field = self._field or field
                self._texts.append(text)
                return text
        return ""

    def sealed(self) -> str | None:
        """All of it, to be given back; None if there was none.

        Of text that is too long the end is kept: it is nearest to the call.
        """
        if self._details and self._detail_chars <= _MOST_CHARS:
            return orjson.dumps({_DETAILS: self._details}).decode()
        if self._texts:
            return orjson.dumps({self._field: "".join(self._texts)[-_MOST_CHARS:]}).decode()
        return None

    def _add_detail(self, detail: Json) -> None:
        self._detail_chars += len(orjson.dumps(detail))
        if self._detail_chars > _MOST_CHARS:
            return
        last = self._details[-1] if self._details else {}
        key = _GROWING.get(str(detail.get("type")))
        is_more = key is not None and all(
            last.get(name) == detail.get(name) for name in ("type", "index")
        )
        if not is_more or key is None:
            self._details.append(dict(detail))
            return
        grown = f"{last.get(key) or ''}{detail.get(key) or ''}"
        last.update({name: value for name, value in detail.items() if value is not None})
        last[key] = grown


def opened(signature: object) -> Json:
    """The fields of an assistant message that a signature stands for."""
    if not isinstance(signature, str):
        return {}
    try:
        value: Any = orjson.loads(signature)
    except orjson.JSONDecodeError:
        return {}  # A client has put its own words there.
    fields = cast("Json", value) if isinstance(value, dict) else {}
    found = {name: fields[name] for name in _TEXTS if isinstance(fields.get(name), str)}
    details = _objects(fields.get(_DETAILS))
    return {**found, **({_DETAILS: details} if details else {})}


def _objects(value: Any) -> list[Json]:  # noqa: ANN401 - any JSON
    found = cast("list[Any]", value) if isinstance(value, list) else []
    return [cast("Json", item) for item in found if isinstance(item, dict)]
