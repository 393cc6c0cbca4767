"""Options of a request: generation, response format, safety, limits, webhooks, agents."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required, TypeAlias, cast

from pydantic import Discriminator, Field, Tag, WithJsonSchema, with_config
from typing_extensions import TypedDict

from openinteractions.wire.fields import (
    BY_SHAPE,
    BY_TYPE,
    LOWER,
    REPLAYED,
    REQUEST,
    Count,
    Duration,
    Json,
    Name,
    Positive,
    fold,
    type_of,
)
from openinteractions.wire.tools import ToolChoice

ThinkingLevel: TypeAlias = Annotated[Literal["minimal", "low", "medium", "high", "xhigh"], LOWER]
ThinkingSummaries: TypeAlias = Annotated[Literal["auto", "none"], LOWER]
Modality: TypeAlias = Annotated[Literal["text", "image", "audio", "video", "document"], LOWER]
ServiceTier: TypeAlias = Annotated[Literal["flex", "standard", "priority", "deferred"], LOWER]
Delivery: TypeAlias = Annotated[Literal["inline", "uri"], LOWER]
ImageSize: TypeAlias = Annotated[Literal["512", "1K", "2K", "4K"], fold("1K", "2K", "4K")]
AspectRatio: TypeAlias = Literal[
    "1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9", "1:8", "8:1", "1:4",
    "4:1",
]  # fmt: skip


@with_config(REQUEST)
class Speech(TypedDict, total=False):
    """One speaker's voice."""

    voice: str
    language: str
    speaker: str


@with_config(REQUEST)
class Speakers(TypedDict, total=False):
    """Several speakers."""

    speakers: list[Speech]


@with_config(REQUEST)
class TranscriptionMode(TypedDict, total=False):
    """How a transcript is written."""

    type: Required[Annotated[Literal["verbatim", "smart"], LOWER]]
    source_text: str
    diarization_mode: str
    timestamp_granularities: list[str]


@with_config(REQUEST)
class TranscriptionConfig(TypedDict, total=False):
    """Transcription of speech."""

    mode: Annotated[
        Annotated[Literal["verbatim", "smart"], LOWER, Tag("string")]
        | Annotated[TranscriptionMode, Tag("object")],
        BY_SHAPE,
    ]
    language_codes: list[str]
    custom_vocabulary: list[str]
    language_hints: list[str]
    adaptation_phrases: list[str]
    diarization_mode: str
    timestamp_granularities: list[str]


@with_config(REQUEST)
class VideoConfig(TypedDict, total=False):
    """Making of videos."""

    task: Annotated[
        Literal[
            "text_to_video", "image_to_video", "reference_to_video", "edit", "extend", "upscale"
        ],
        LOWER,
    ]


@with_config(REQUEST)
class ImageConfig(TypedDict, total=False):
    """Making of images (deprecated: use `response_format`)."""

    aspect_ratio: AspectRatio
    image_size: ImageSize


@with_config(REQUEST)
class GenerationConfig(TypedDict, total=False):
    """How a model writes."""

    max_output_tokens: Annotated[int, Field(gt=0, le=2**31 - 1)]
    seed: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
    stop_sequences: list[str]
    temperature: Annotated[float, Field(ge=0, le=2)]
    top_p: Annotated[float, Field(ge=0, le=1)]
    top_k: Annotated[int, Field(gt=0, le=2**31 - 1)]
    presence_penalty: Annotated[float, Field(ge=-2, le=2)]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)]
    thinking_level: ThinkingLevel
    thinking_summaries: ThinkingSummaries
    tool_choice: ToolChoice
    speech_config: Annotated[
        Annotated[Speakers, Tag("object")] | Annotated[list[Speech], Tag("list")], BY_SHAPE
    ]
    transcription_config: TranscriptionConfig
    video_config: VideoConfig
    image_config: ImageConfig


@with_config(REQUEST)
class TextFormat(TypedDict, total=False):
    """The answer as text, or as one JSON document of a schema."""

    type: Required[Annotated[Literal["text"], LOWER]]
    mime_type: Annotated[Literal["application/json", "text/plain"], LOWER]
    schema: dict[str, Any]


@with_config(REQUEST)
class ImageFormat(TypedDict, total=False):
    """Images in the answer."""

    type: Required[Annotated[Literal["image"], LOWER]]
    mime_type: Annotated[Literal["image/jpeg", "image/png", "image/webp"], LOWER]
    aspect_ratio: AspectRatio
    image_size: ImageSize
    delivery: Delivery


@with_config(REQUEST)
class AudioFormat(TypedDict, total=False):
    """Audio in the answer."""

    type: Required[Annotated[Literal["audio"], LOWER]]
    mime_type: Annotated[
        Literal[
            "audio/mp3", "audio/ogg_opus", "audio/l16", "audio/wav", "audio/alaw", "audio/mulaw"
        ],
        LOWER,
    ]
    sample_rate: Annotated[int, Field(gt=0)]
    bit_rate: Annotated[int, Field(gt=0)]
    delivery: Delivery


@with_config(REQUEST)
class VideoFormat(TypedDict, total=False):
    """Video in the answer."""

    type: Required[Annotated[Literal["video"], LOWER]]
    aspect_ratio: Literal["16:9", "9:16"]
    resolution: Annotated[Literal["360p", "720p", "1080p", "4k"], LOWER]
    duration: Duration
    delivery: Delivery
    gcs_uri: str


_JSON_SCHEMA_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}


def _format_of(value: object) -> str | None:
    """A typed format by its `type`; anything else that can be one is a bare JSON Schema."""
    kind = type_of(value)
    if kind is not None and kind not in _JSON_SCHEMA_TYPES:
        return kind
    # The two forms cannot be confused: "text", "image" and so on are no types of JSON Schema.
    if not isinstance(value, dict):
        return None
    given = cast("Mapping[str, object]", value).get("type")
    return "schema" if given is None or isinstance(given, (str, list)) else None


_BARE_SCHEMA = {
    "type": "object",
    "description": "A bare JSON Schema of the answer.",
    "not": {
        "required": ["type"],
        "properties": {"type": {"enum": ["text", "image", "audio", "video"]}},
    },
}
ResponseFormat: TypeAlias = Annotated[
    Annotated[TextFormat, Tag("text")]
    | Annotated[ImageFormat, Tag("image")]
    | Annotated[AudioFormat, Tag("audio")]
    | Annotated[VideoFormat, Tag("video")]
    | Annotated[dict[str, Any], WithJsonSchema(_BARE_SCHEMA), Tag("schema")],
    Discriminator(_format_of),
]
ResponseFormats: TypeAlias = Annotated[
    Annotated[ResponseFormat, Tag("object")] | Annotated[list[ResponseFormat], Tag("list")],
    BY_SHAPE,
]


@with_config(REQUEST)
class SafetySetting(TypedDict, total=False):
    """From where on harmful content is blocked."""

    type: Required[
        Annotated[
            Literal[
                "hate_speech",
                "dangerous_content",
                "harassment",
                "sexually_explicit",
                "civic_integrity",
                "image_hate",
                "image_dangerous_content",
                "image_harassment",
                "image_sexually_explicit",
                "jailbreak",
            ],
            LOWER,
        ]
    ]
    threshold: Required[
        Annotated[
            Literal[
                "block_low_and_above",
                "block_medium_and_above",
                "block_only_high",
                "block_none",
                "off",
            ],
            LOWER,
        ]
    ]
    method: Annotated[Literal["severity", "probability"], LOWER]


CallbackUri = Annotated[str, Field(pattern=r"^https?://[^\s/]", max_length=2048)]


@with_config(REQUEST)
class WebhookConfig(TypedDict, total=False):
    """Where to send the events of a background interaction."""

    uris: Annotated[list[CallbackUri], Field(max_length=10)]
    """Used in place of the registered webhooks."""
    user_metadata: dict[str, Any]
    """Comes back in each event."""


Approve: TypeAlias = Annotated[list[Name], Field(max_length=100)]
"""Names of tools that this server runs, `*` for any part of one. A call of theirs waits until a
`function_result` for it says `approve`, `deny`, or gives other arguments."""


@with_config(REQUEST)
class Limits(TypedDict, total=False):
    """What an interaction may use. An extension of this server."""

    max_total_tokens: Count
    max_cost_usd: Positive
    max_steps: Count
    max_seconds: Positive
    approve: Approve


@with_config(REQUEST)
class AntigravityConfig(TypedDict, total=False):
    """Options of the general agent."""

    type: Required[Annotated[Literal["antigravity"], LOWER]]
    max_total_tokens: Count
    model: Name


@with_config(REQUEST)
class DeepResearchConfig(TypedDict, total=False):
    """Options of the research agent."""

    type: Required[Annotated[Literal["deep-research"], LOWER]]
    thinking_summaries: ThinkingSummaries
    visualization: Annotated[Literal["off", "auto"], LOWER]
    collaborative_planning: bool
    enable_bigquery_tool: bool


@with_config(REQUEST)
class CodeMenderConfig(TypedDict, total=False):
    """Options of the code-repair agent."""

    type: Required[Annotated[Literal["code-mender"], LOWER]]
    model: Name
    session_id: str
    session_config: dict[str, Any]
    find_request: dict[str, Any]
    fix_request: dict[str, Any]


@with_config(REPLAYED)
class DynamicConfig(TypedDict, total=False):
    """Options of any agent, free in form; what this server does not know, it says (`warnings`)."""

    type: Required[Annotated[Literal["dynamic"], LOWER]]
    model: Name
    fallback_models: list[Name]
    max_total_tokens: Count
    max_cost_usd: Positive
    max_steps: Count
    max_seconds: Positive
    approve: Approve
    version: Count
    """Which version of a custom agent."""
    thinking_summaries: ThinkingSummaries
    collaborative_planning: bool


AgentConfig: TypeAlias = Annotated[
    Annotated[AntigravityConfig, Tag("antigravity")]
    | Annotated[DeepResearchConfig, Tag("deep-research")]
    | Annotated[CodeMenderConfig, Tag("code-mender")]
    | Annotated[DynamicConfig, Tag("dynamic")],
    BY_TYPE,
]


def unknown_options(config: Json) -> list[str]:
    """Keys of a `dynamic` configuration that mean nothing to this server."""
    return sorted(config.keys() - DynamicConfig.__annotations__.keys() - _OF_OTHERS)


_OF_OTHERS = {"visualization", "enable_bigquery_tool"}
"""Options of other types that hold in a `dynamic` one too."""
