"""What an MCP tool gave, as the result of a contract step."""

import base64
from collections.abc import Callable
from typing import Final, cast

import orjson
from mcp import types

from openinteractions.models.port import Json
from openinteractions.wire import pictures
from openinteractions.wire.media import sniff, standard_base64

MAX_CHARS: Final = 200_000
"""Of text; more would fill the window of most models."""
_MAX_MEDIA_CHARS: Final = 10 * 2**20
"""Of base64, all images of a result together."""
_MAX_IMAGES: Final = 20
_MAX_BLOCKS: Final = 1000
_HIDDEN_CHARS: Final = 2 * MAX_CHARS
"""Of one text, looked through for secrets; what comes after is cut off in any case."""
# Those that every vendor takes in a tool's result.
_IMAGES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})


def result_of(result: types.CallToolResult, hide: Callable[[str], str]) -> str | Json | list[Json]:
    """A string, an object or content blocks.

    Args:
        result: As the server gave it.
        hide: Takes secrets out of a text.
    """
    if result.content or result.structured_content is None:
        found = _Blocks(hide)
        for block in result.content[:_MAX_BLOCKS]:
            found.add(block)
        return found.close(len(result.content) - _MAX_BLOCKS)
    text = orjson.dumps(result.structured_content).decode()
    # What has a secret in it, or is too long, is shown as text.
    is_short = isinstance(result.structured_content, dict) and len(text) <= MAX_CHARS
    if is_short and text == hide(text):
        return cast("Json", result.structured_content)
    found = _Blocks(hide)
    found.say(text)
    return found.close()


class _Blocks:
    """Collects text and images, within bounds."""

    def __init__(self, hide: Callable[[str], str]) -> None:
        self._hide = hide
        self._blocks: list[Json] = []
        self._chars = 0
        self._left_out = 0
        self._media_chars = 0

    def add(self, block: types.ContentBlock) -> None:
        match block:
            case types.TextContent():
                self.say(block.text)
            case types.ImageContent():
                self._show(block.mime_type, block.data)
            case types.AudioContent():
                self._mention(block.mime_type, block.data)
            case types.ResourceLink():
                about = f": {block.description}" if block.description else ""
                self.say(f"[Resource '{block.name}' at {block.uri}{about}]")
            case types.EmbeddedResource():
                self._embed(block.resource)

    def say(self, text: str) -> None:
        room = MAX_CHARS - self._chars
        start = text[:_HIDDEN_CHARS]
        if room:
            start = self._hide(start)
        kept = start[:room]
        self._left_out += len(start) - len(kept) + max(0, len(text) - _HIDDEN_CHARS)
        self._chars += len(kept)
        if kept:
            self._blocks.append({"type": "text", "text": kept})

    def close(self, blocks_left_out: int = 0) -> str | list[Json]:
        """A string where there is only text."""
        if blocks_left_out > 0:
            note = f"[{blocks_left_out} more blocks were left out. Ask for less at once.]"
            self._blocks.append({"type": "text", "text": note})
        if self._left_out:
            note = f"[{self._left_out} more characters were left out. Ask for less at once.]"
            self._blocks.append({"type": "text", "text": note})
        if all(block["type"] == "text" for block in self._blocks):
            return "\n".join(block["text"] for block in self._blocks)
        return self._blocks

    def _embed(self, resource: types.TextResourceContents | types.BlobResourceContents) -> None:
        kind = resource.mime_type or "application/octet-stream"
        if isinstance(resource, types.TextResourceContents):
            self.say(f"[Resource {resource.uri}]\n{resource.text}")
        elif kind in _IMAGES:
            self._show(kind, resource.blob)
        else:
            self._mention(kind, resource.blob)

    def _show(self, mime_type: str, data: str) -> None:
        shown = [block for block in self._blocks if block["type"] == "image"]
        is_too_much = self._media_chars + len(data) > _MAX_MEDIA_CHARS or len(shown) >= _MAX_IMAGES
        if mime_type not in _IMAGES or is_too_much:
            self._mention(mime_type, data)
            return
        # Servers wrap it in lines; a vendor would refuse the whole request for a bad one.
        data = standard_base64(data) or ""
        kind = sniff(data)
        if kind not in _IMAGES:
            self.say(f"[{mime_type}: left out, since its data is not base64 of such an image]")
            return
        problem = pictures.problem(base64.b64decode(data))
        if problem is not None:
            self.say(f"[{mime_type}: left out, since it {problem}]")
            return
        self._media_chars += len(data)
        self._blocks.append({"type": "image", "mime_type": kind, "data": data})

    def _mention(self, mime_type: str, data: str) -> None:
        self.say(f"[{mime_type}, about {len(data) * 3 // 4} bytes: left out]")
