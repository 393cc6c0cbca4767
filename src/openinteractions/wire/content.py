"""Content blocks: text, image, audio, document and video, and the annotations of text."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required, TypeAlias

from pydantic import AfterValidator, Field, Tag, with_config
from typing_extensions import TypedDict

from openinteractions.wire.fields import (
    BY_SHAPE,
    BY_TYPE,
    FIRST_FAULT,
    LOWER,
    REPLAYED,
    REQUEST,
    Duration,
    Name,
    type_or,
)
from openinteractions.wire.media import checked_media

Resolution: TypeAlias = Annotated[Literal["low", "medium", "high", "ultra_high"], LOWER]


@with_config(REPLAYED)
class UrlCitation(TypedDict, total=False):
    """A cited web page. Indices are UTF-8 byte offsets into the text, the end exclusive."""

    type: Required[Annotated[Literal["url_citation"], LOWER]]
    url: str
    title: str
    start_index: int
    end_index: int


@with_config(REPLAYED)
class FileCitation(TypedDict, total=False):
    """A cited file."""

    type: Required[Annotated[Literal["file_citation"], LOWER]]
    document_uri: str
    file_name: str
    source: str
    page_number: int
    media_id: str
    custom_metadata: dict[str, Any]
    start_index: int
    end_index: int


@with_config(REPLAYED)
class PlaceCitation(TypedDict, total=False):
    """A cited place on the map."""

    type: Required[Annotated[Literal["place_citation"], LOWER]]
    place_id: str
    name: str
    url: str
    review_snippets: list[dict[str, Any]]
    start_index: int
    end_index: int


@with_config(REPLAYED)
class SpeechMetadata(TypedDict, total=False):
    """Who speaks, and how."""

    type: Required[Annotated[Literal["speech_metadata"], LOWER]]
    speaker: str
    style: str
    start_index: int
    end_index: int


@with_config(REPLAYED)
class WordInfo(TypedDict, total=False):
    """When a word of a transcript is spoken."""

    type: Required[Annotated[Literal["word_info"], LOWER]]
    text: str
    start_offset: str
    end_offset: str
    speaker: str
    start_index: int
    end_index: int


Annotation: TypeAlias = Annotated[
    Annotated[UrlCitation, Tag("url_citation")]
    | Annotated[FileCitation, Tag("file_citation")]
    | Annotated[PlaceCitation, Tag("place_citation")]
    | Annotated[SpeechMetadata, Tag("speech_metadata")]
    | Annotated[WordInfo, Tag("word_info")],
    BY_TYPE,
]


@with_config(REQUEST)
class TextContent(TypedDict, total=False):
    """A block of text."""

    type: Annotated[Literal["text"], LOWER]
    """May be left out where `text` is there."""
    text: Required[str]
    annotations: Annotated[list[Annotation], FIRST_FAULT]


@with_config(REQUEST)
class AudioProcessing(TypedDict, total=False):
    """Which part of an audio is looked at."""

    type: Required[Annotated[Literal["static"], LOWER]]
    start_offset: Duration
    end_offset: Duration


@with_config(REQUEST)
class PageOptions(TypedDict, total=False):
    """Which pages of a document are looked at, and how."""

    start_page: int
    end_page: int
    content_layers: list[Annotated[Literal["page_image", "page_text"], LOWER]]


@with_config(REQUEST)
class SpreadsheetOptions(TypedDict, total=False):
    """Which cells of a spreadsheet are looked at, and how."""

    sheet_index: int
    visible_cells: str
    content_layers: list[Annotated[Literal["visual", "data", "formulas"], LOWER]]


@with_config(REQUEST)
class DocumentProcessing(TypedDict, total=False):
    """How a document is looked at."""

    type: Required[Annotated[Literal["static"], LOWER]]
    page_options: PageOptions
    spreadsheet_options: SpreadsheetOptions


@with_config(REQUEST)
class VideoProcessing(TypedDict, total=False):
    """Which part of a video is looked at, and how."""

    type: Required[Annotated[Literal["static"], LOWER]]
    fps: Annotated[float, Field(gt=0)]
    start_offset: Duration
    end_offset: Duration
    content_layers: list[Annotated[Literal["frames", "audio", "transcript"], LOWER]]


_Static: TypeAlias = Annotated[Literal["static"], LOWER, Tag("string")]
_Video: TypeAlias = Annotated[Literal["static", "agentic"], LOWER, Tag("string")]


@with_config(REQUEST)
class ImageContent(TypedDict, total=False):
    """An image: exactly one of `data` and `uri`."""

    type: Required[Annotated[Literal["image"], LOWER]]
    data: str
    """Base64."""
    uri: Name
    mime_type: str
    resolution: Resolution


@with_config(REQUEST)
class AudioContent(TypedDict, total=False):
    """An audio: exactly one of `data` and `uri`."""

    type: Required[Annotated[Literal["audio"], LOWER]]
    data: str
    """Base64."""
    uri: Name
    mime_type: str
    channels: Annotated[int, Field(gt=0)]
    sample_rate: Annotated[int, Field(gt=0)]
    processing: Annotated[_Static | Annotated[AudioProcessing, Tag("object")], BY_SHAPE]


@with_config(REQUEST)
class DocumentContent(TypedDict, total=False):
    """A document: exactly one of `data` and `uri`."""

    type: Required[Annotated[Literal["document"], LOWER]]
    data: str
    """Base64."""
    uri: Name
    mime_type: str
    resolution: Resolution
    processing: Annotated[_Static | Annotated[DocumentProcessing, Tag("object")], BY_SHAPE]


@with_config(REQUEST)
class VideoContent(TypedDict, total=False):
    """A video: exactly one of `data` and `uri`."""

    type: Required[Annotated[Literal["video"], LOWER]]
    data: str
    """Base64."""
    uri: Name
    mime_type: str
    name: str
    """A name by which the model can refer to this video."""
    resolution: Resolution
    processing: Annotated[_Video | Annotated[VideoProcessing, Tag("object")], BY_SHAPE]


@with_config(REPLAYED)
class ReplayedText(TypedDict, total=False):
    """A block of text that a model wrote."""

    type: Annotated[Literal["text"], LOWER]
    text: Required[str]
    annotations: Annotated[list[Annotation], FIRST_FAULT]


@with_config(REPLAYED)
class ReplayedMedia(TypedDict, total=False):
    """A media block that a model made."""

    type: Required[Annotated[Literal["image", "audio", "document", "video"], LOWER]]
    data: str
    uri: str
    mime_type: str


def _text_if_untyped(fields: Mapping[str, object]) -> str | None:
    return "text" if "text" in fields else None


BY_CONTENT = type_or(_text_if_untyped)

CHECKED = AfterValidator(checked_media)
Text: TypeAlias = Annotated[TextContent, Tag("text")]
Image: TypeAlias = Annotated[ImageContent, CHECKED, Tag("image")]
Audio: TypeAlias = Annotated[AudioContent, CHECKED, Tag("audio")]
Document: TypeAlias = Annotated[DocumentContent, CHECKED, Tag("document")]
Video: TypeAlias = Annotated[VideoContent, CHECKED, Tag("video")]

Content: TypeAlias = Annotated[Text | Image | Audio | Document | Video, BY_CONTENT]
"""A block that a caller writes."""

ReplayedContent: TypeAlias = Annotated[
    Annotated[ReplayedText, Tag("text")]
    | Annotated[ReplayedMedia, CHECKED, Tag("image")]
    | Annotated[ReplayedMedia, CHECKED, Tag("audio")]
    | Annotated[ReplayedMedia, CHECKED, Tag("document")]
    | Annotated[ReplayedMedia, CHECKED, Tag("video")],
    BY_CONTENT,
]
"""A block that a model wrote, sent back."""
