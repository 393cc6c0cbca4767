"""Messages as the bytes that go to a vendor."""

from typing import Any, cast

import orjson

from openinteractions.models.port import Json

_NUL = "\0"
_SHOWN = "\ufffd"
_ESCAPED = b"\\u0000"


def encoded(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """The value as JSON, with a replacement character for each NUL of its texts.

    A command or a page may print NULs; some servers refuse them, some cut the text there.
    """
    dumped = orjson.dumps(value)
    return orjson.dumps(_without_nuls(value)) if _ESCAPED in dumped else dumped


def _without_nuls(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return value.replace(_NUL, _SHOWN)
    if isinstance(value, list):
        return [_without_nuls(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        items = cast("Json", value).items()
        return {_without_nuls(name): _without_nuls(item) for name, item in items}
    return value
