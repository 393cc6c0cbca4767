"""What Gemini's built-in tools did, as contract steps and annotations.

Gemini tells it beside the text, in `groundingMetadata` and `urlContextMetadata`, mostly at the
answer's end. It wants none of it back, which the signature `{}` of these steps says.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from openinteractions import ids
from openinteractions.models.port import Json, VendorStep

_NOT_REPLAYED: Final = "{}"


def _no_strings() -> list[str]:
    return []


def _no_objects() -> list[Json]:
    return []


@dataclass(slots=True)
class Grounding:
    """Gathers the metadata of one answer over its chunks."""

    queries: list[str] = field(default_factory=_no_strings)
    image_queries: list[str] = field(default_factory=_no_strings)
    suggestions: str | None = None
    chunks: list[Json] = field(default_factory=_no_objects)
    widget: str | None = None
    urls: dict[str, str] = field(default_factory=dict[str, str])
    """Status by URL, in order."""
    told: set[str] = field(default_factory=set[str])
    """Tools whose steps are out already, by step type without its suffix."""

    def absorb(self, grounding: Json) -> Iterator[Json]:
        """Take a `groundingMetadata`; yield its annotations, offsets as Gemini gives them.

        Gemini's offsets are UTF-8 bytes from the start of the part `partIndex`, which each
        annotation still carries.
        """
        self.queries = grounding.get("webSearchQueries") or self.queries
        self.image_queries = grounding.get("imageSearchQueries") or self.image_queries
        chunks: list[Json] = grounding.get("groundingChunks") or self.chunks
        self.chunks = chunks
        self.widget = grounding.get("googleMapsWidgetContextToken") or self.widget
        entry: Json = grounding.get("searchEntryPoint") or {}
        self.suggestions = entry.get("renderedContent") or self.suggestions
        for support in grounding.get("groundingSupports") or ():
            segment: Json = support.get("segment") or {}
            indices: list[int] = support.get("groundingChunkIndices") or []
            for index in indices:
                if index < len(chunks):
                    yield {**_citation(chunks[index]), **_place(segment)}

    def absorb_urls(self, metadata: Json) -> None:
        """Take a `urlContextMetadata`."""
        for entry in metadata.get("urlMetadata") or ():
            status: str = entry.get("urlRetrievalStatus") or "URL_RETRIEVAL_STATUS_ERROR"
            self.urls[entry["retrievedUrl"]] = status.removeprefix("URL_RETRIEVAL_STATUS_").lower()

    def steps(self, *, final: bool) -> Iterator[VendorStep]:
        """The steps that are not out yet; before the answer's end only those known in full."""
        if self.urls:
            yield from self._tell("url_context", self._url_steps)
        if (self.queries or self.suggestions) and (final or self.suggestions):
            yield from self._tell("google_search", self._search_steps)
        if not final:
            return
        if self.image_queries:
            yield from self._tell("image_search", self._image_search_steps)
        if any("maps" in chunk for chunk in self.chunks):
            yield from self._tell("google_maps", self._map_steps)
        if any("retrievedContext" in chunk for chunk in self.chunks):
            yield from self._tell("file_search", lambda: _pair("file_search", {}, {}))

    def counts(self) -> list[Json]:
        """The contract's `grounding_tool_count`."""
        found = {
            "google_search": len(self.queries) + len(self.image_queries),
            "google_maps": int(any("maps" in chunk for chunk in self.chunks)),
            "retrieval": int(any("retrievedContext" in chunk for chunk in self.chunks)),
        }
        return [{"type": kind, "count": count} for kind, count in found.items() if count]

    def _tell(self, tool: str, pair: Callable[[], Sequence[Json]]) -> Iterator[VendorStep]:
        if tool not in self.told:
            self.told.add(tool)
            yield from map(VendorStep, pair())

    def _url_steps(self) -> Sequence[Json]:
        result = [{"url": url, "status": status} for url, status in self.urls.items()]
        return _pair("url_context", {"arguments": {"urls": list(self.urls)}}, {"result": result})

    def _search_steps(self) -> Sequence[Json]:
        suggestions = [{"search_suggestions": self.suggestions}] if self.suggestions else []
        call = {"search_type": "web_search", "arguments": {"queries": self.queries}}
        return _pair("google_search", call, {"result": suggestions, "is_error": False})

    def _image_search_steps(self) -> Sequence[Json]:
        call = {"search_type": "image_search", "arguments": {"queries": self.image_queries}}
        return _pair("google_search", call, {"result": [], "is_error": False})

    def _map_steps(self) -> Sequence[Json]:
        found = [chunk["maps"] for chunk in self.chunks if "maps" in chunk]
        names = {"title": "name", "placeId": "place_id", "uri": "url"}
        places = [{names[key]: place[key] for key in names if key in place} for place in found]
        result: Json = {"places": places}
        if self.widget:
            result["widget_context_token"] = self.widget
        # Gemini does not say what it asked Maps for.
        return _pair("google_maps", {"arguments": {"queries": []}}, {"result": [result]})


def citations(metadata: Json) -> Iterator[Json]:
    """The annotations of a `citationMetadata`: text that follows some source closely."""
    for citation in metadata.get("citations") or metadata.get("citationSources") or ():
        if citation.get("uri") and citation.get("endIndex"):
            source: Json = {"type": "url_citation", "url": citation["uri"]}
            if citation.get("title"):
                source["title"] = citation["title"]
            yield {**source, **_place(citation)}


def _pair(tool: str, call: Json, result: Json) -> Sequence[Json]:
    call_id = ids.call_id()
    sealed = {"signature": _NOT_REPLAYED}
    return (
        {"type": f"{tool}_call", "id": call_id, **call, **sealed},
        {"type": f"{tool}_result", "call_id": call_id, **result, **sealed},
    )


def _place(segment: Json) -> Json:
    return {
        "part": segment.get("partIndex") or 0,
        "start_index": segment.get("startIndex") or 0,
        "end_index": segment.get("endIndex") or 0,
    }


def _citation(chunk: Json) -> Json:
    if "maps" in chunk:
        names = {"placeId": "place_id", "title": "name", "uri": "url"}
        return _renamed("place_citation", names, chunk["maps"])
    if "retrievedContext" in chunk:
        names = {
            "uri": "document_uri",
            "title": "file_name",
            "text": "source",
            "pageNumber": "page_number",
            "mediaId": "media_id",
        }
        context = chunk["retrievedContext"]
        cited = _renamed("file_citation", names, context)
        if context.get("customMetadata"):
            cited["custom_metadata"] = _custom(context["customMetadata"])
        return cited
    if "image" in chunk:
        return _renamed("url_citation", {"sourceUri": "url", "title": "title"}, chunk["image"])
    return _renamed("url_citation", {"uri": "url", "title": "title"}, chunk.get("web") or {})


def _renamed(kind: str, names: dict[str, str], source: Json) -> Json:
    return {"type": kind, **{names[key]: source[key] for key in names if key in source}}


def _custom(entries: Sequence[Json]) -> Json:
    custom: dict[str, Any] = {}
    for entry in entries:
        values = [value for name, value in entry.items() if name != "key"]
        custom[entry["key"]] = values[0] if values else None
    return custom
