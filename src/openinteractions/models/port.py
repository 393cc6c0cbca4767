"""The port between the loop and a model vendor.

An adapter knows one wire format. It turns steps into that vendor's messages (`compile`), says what
it cannot honour (`check`), and runs one model turn as a stream of small typed events (`stream`).
It never retries, never falls back and keeps no state between calls: that lives once, in the loop.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias

Json: TypeAlias = dict[str, Any]
"""One JSON object as `orjson.loads` gives it."""

THOUGHTS_AS_GIVEN: Final = "as_given"
"""A `thinking_summaries` that no caller sends: show what a model thinks anyway. The request asks
for it only where every model of its kind takes that; a model that shows nothing is no downgrade."""

FinishReason: TypeAlias = Literal["stop", "tool_calls", "max_tokens", "content_filter"]
ThinkingLevel: TypeAlias = Literal["minimal", "low", "medium", "high", "xhigh"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Annotations:
    """Citations on the text block that is open, as contract annotations.

    `start_index` and `end_index` are UTF-8 byte offsets into that block, end exclusive.
    """

    annotations: list[Json]


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """A piece of a thought summary. Adapters send it only where `ModelCall.shows_thoughts`."""

    text: str


@dataclass(frozen=True, slots=True)
class ThoughtSignature:
    """The vendor's opaque token for the thought that is open; it closes that thought.

    Sent without any ThoughtDelta where the vendor thinks but shows nothing.
    """

    signature: str


@dataclass(frozen=True, slots=True)
class Media:
    """One whole image, audio, video or document block of the answer."""

    content: Json
    """A contract content block: `{"type", "mime_type", "data" (standard base64), …}`. Adapters
    merge a vendor's audio chunks of one utterance into one block."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One whole call of a client function (or of a server tool that the loop runs)."""

    id: str | None
    """The vendor's id; None where the vendor has none (the loop mints one)."""
    name: str
    arguments: Json
    signature: str | None = None
    malformed: str | None = None
    """The raw argument text, where it is not a JSON object; `arguments` is then empty."""


@dataclass(frozen=True, slots=True)
class VendorStep:
    """A whole step that the vendor itself ran (native search, code execution, URL context …)."""

    step: Json
    """A contract step, `signature` still raw."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Always the last event of a complete turn; a stream that ends without it broke off."""

    reason: FinishReason
    usage: Json
    """Contract usage, all ints: `total_input_tokens` (cached ones included),
    `total_cached_tokens`, `total_output_tokens` (thinking excluded), `total_thought_tokens`,
    `total_tool_use_tokens`, `total_tokens` and the `*_by_modality` lists where known."""
    message: str | None = None
    """What the vendor said beside the reason, for example why content was filtered."""


ModelEvent: TypeAlias = (
    TextDelta
    | Annotations
    | ThoughtDelta
    | ThoughtSignature
    | Media
    | ToolCall
    | VendorStep
    | Finished
)


@dataclass(frozen=True, slots=True)
class Warning:  # noqa: A001 - the contract's word for it
    """A documented downgrade that the interaction records (`warnings` on the wire)."""

    code: str
    field: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCall:
    """One turn's request, vendor-neutral. Dictionaries are contract shapes, already validated."""

    model: str
    """The upstream's own name of the model (no provider prefix)."""
    messages: Sequence[bytes]
    """The conversation, oldest first: what `compile` returned for each turn, concatenated."""
    system: str | None = None
    tools: Sequence[Json] = ()
    """Contract tools. `function` for client functions; other types only where `check` let them."""
    tool_choice: str | Json | None = None
    """`"auto" | "any" | "none" | "validated"` or `{"allowed_tools": {"mode", "tools": [...]}}`."""
    generation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The contract's `generation_config` without `tool_choice`; `max_output_tokens` is clamped."""
    json_schema: Json | None = None
    """The answer must be one JSON document of this schema; `{}` means any JSON."""
    response_formats: Sequence[Json] = ()
    """Image, audio and video entries of `response_format`."""
    modalities: Sequence[str] = ()
    """`response_modalities`, lower case."""
    safety_settings: Sequence[Json] = ()
    service_tier: str | None = None

    @property
    def shows_thoughts(self) -> bool:
        """Whether thought summaries are wanted, asked for or as they come."""
        return self.generation.get("thinking_summaries") in ("auto", THOUGHTS_AS_GIVEN)


class Model(Protocol):
    """One vendor's wire format, bound to one provider's address and credentials."""

    def compile(self, steps: Sequence[Json], model: str) -> list[bytes]:
        """Turn one interaction's steps into this vendor's messages, each one JSON object.

        Pure and cacheable. Steps are contract steps with media inlined as base64 `data` (or a
        `uri` of a kind that `takes_uri` allows) and with `signature` present only if this
        provider and model issued it, in its raw form. Steps are whole interactions: a call may
        be answered in the next one. `thought` steps without a signature, and anything else that
        is not for the model, are left out; a result whose call is unknown cannot occur.

        Raises:
            Invalid: A content type this vendor cannot take; the message names it.
        """
        ...

    def takes_uri(self, content_type: str, uri: str) -> bool:
        """Whether the vendor itself fetches such a `uri`; else the caller inlines the bytes."""
        ...

    def check(self, call: ModelCall) -> list[Warning]:
        """Say what of this call will be downgraded (the interaction records it).

        Raises:
            Invalid: A field that cannot be honoured at all; the message names it.
        """
        ...

    def stream(self, call: ModelCall) -> AbstractAsyncContextManager[AsyncIterator[ModelEvent]]:
        """Run one turn. Leaving the context closes the connection, also mid-answer.

        Raises (on entering or while iterating):
            ModelUnavailable: Transient; `retry_after_s` says how long the vendor asks to wait.
            ModelRejected: Final for this request.
            ContextOverflow: The input is too long.
        """
        ...
