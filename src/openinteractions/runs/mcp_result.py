"""What an MCP tool gave, as the result of a contract step."""

from collections.abc import Callable
from typing import Final, cast

import orjson
from mcp import types

from openinteractions.models.port import Json

MAX_CHARS: Final = 200_000
"""Of text; more would fill the window of most models."""
_MAX_MEDIA_CHARS: Final = 10 * 2**20
"""Of base64, all images of a result together."""
_MAX_IMAGES: Final = 20
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
        for block in result.content:
            found.add(block)
        return found.close()
    text = orjson.dumps(result.structured_content).decode()
    # What has a secret in it, or is too long, is shown as text.
    if isinstance(result.structured_content, dict) and text == hide(text)[:MAX_CHARS]:
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
        text = self._hide(text)
        room = MAX_CHARS - self._chars
        kept = text[:room]
        self._left_out += len(text) - len(kept)
        self._chars += len(kept)
        if kept:
            self._blocks.append({"type": "text", "text": kept})

    def close(self) -> str | list[Json]:
        """A string where there is only text."""
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
        self._media_chars += len(data)
        self._blocks.append({"type": "image", "mime_type": mime_type, "data": data})

    def _mention(self, mime_type: str, data: str) -> None:
        self.say(f"[{mime_type}, about {len(data) * 3 // 4} bytes: left out]")
