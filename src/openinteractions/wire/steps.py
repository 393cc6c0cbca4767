"""Step types.

A caller writes `user_input` and `function_result`; every other type is sent back as it was
received, so its unknown keys are kept.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Required, TypeAlias

from pydantic import Tag, with_config
from typing_extensions import TypedDict

from openinteractions.wire.content import (
    BY_CONTENT,
    Audio,
    Document,
    Image,
    ReplayedContent,
    Text,
    Video,
)
from openinteractions.wire.fields import (
    BY_SHAPE,
    BY_TYPE,
    FIRST_FAULT,
    LOWER,
    REPLAYED,
    REQUEST,
    Name,
    type_or,
)
from openinteractions.wire.tools import FunctionTool

_String: TypeAlias = Annotated[str, Tag("string")]
_Object: TypeAlias = Annotated[dict[str, Any], Tag("object")]

ResultBlock: TypeAlias = Annotated[
    Text | Image | Audio | Document | Video | Annotated[FunctionTool, Tag("function")], BY_CONTENT
]
"""An item of a result: content, or a function that a client-side tool search has found."""
Result: TypeAlias = Annotated[
    _String | _Object | Annotated[list[ResultBlock], FIRST_FAULT, Tag("list")], BY_SHAPE
]


@with_config(REQUEST)
class FunctionResultStep(TypedDict, total=False):
    """The result of a function call."""

    type: Required[Annotated[Literal["function_result"], LOWER]]
    call_id: Required[Name]
    name: str
    result: Required[Result]
    """A string, an object (given to the model as JSON), or a list of content blocks."""
    is_error: bool
    signature: str
    usage: dict[str, Any]
    """As this server shows it on results of its own tools, which may be sent back; not read."""
    step_usage: dict[str, Any]
    """Likewise."""


UserBlock: TypeAlias = Annotated[
    Text | Image | Audio | Document | Video | Annotated[FunctionResultStep, Tag("function_result")],
    BY_CONTENT,
]
UserContent: TypeAlias = Annotated[
    _String | Annotated[list[UserBlock], FIRST_FAULT, Tag("list")], BY_SHAPE
]
ModelContent: TypeAlias = Annotated[
    _String | Annotated[list[ReplayedContent], FIRST_FAULT, Tag("list")], BY_SHAPE
]


@with_config(REQUEST)
class UserInputStep(TypedDict, total=False):
    """What the user says."""

    type: Required[Annotated[Literal["user_input"], LOWER]]
    content: UserContent
    """Blocks; a string is one text block."""


@with_config(REQUEST)
class Turn(TypedDict, total=False):
    """An older form of a step: who speaks, and the content."""

    role: Required[Annotated[Literal["user", "model", "assistant"], LOWER]]
    content: Required[UserContent]


@with_config(REPLAYED)
class ModelOutputStep(TypedDict, total=False):
    """What the model says."""

    type: Required[Annotated[Literal["model_output"], LOWER]]
    content: ModelContent
    error: dict[str, Any]
    """Why the output broke off."""


@with_config(REPLAYED)
class ThoughtStep(TypedDict, total=False):
    """What the model thinks: a signature to send back, and perhaps a summary."""

    type: Required[Annotated[Literal["thought"], LOWER]]
    signature: str
    summary: Annotated[list[ReplayedContent], FIRST_FAULT]


@with_config(REPLAYED)
class FunctionCallStep(TypedDict, total=False):
    """A function that the model calls."""

    type: Required[Annotated[Literal["function_call"], LOWER]]
    id: Required[Name]
    name: Required[Name]
    arguments: Required[dict[str, Any]]
    signature: str


@with_config(REPLAYED)
class CodeArguments(TypedDict, total=False):
    """Code to run."""

    language: str
    code: str


@with_config(REPLAYED)
class QueryArguments(TypedDict, total=False):
    """What to search for."""

    queries: list[str]


@with_config(REPLAYED)
class UrlArguments(TypedDict, total=False):
    """What to read."""

    urls: list[str]


@with_config(REPLAYED)
class ToolSearchArguments(TypedDict, total=False):
    """Which functions to load."""

    function_names: list[str]


@with_config(REPLAYED)
class CodeExecutionCallStep(TypedDict, total=False):
    """Code that the model runs."""

    type: Required[Annotated[Literal["code_execution_call"], LOWER]]
    id: Required[Name]
    arguments: CodeArguments
    signature: str


@with_config(REPLAYED)
class CodeExecutionResultStep(TypedDict, total=False):
    """What the code printed."""

    type: Required[Annotated[Literal["code_execution_result"], LOWER]]
    call_id: Required[Name]
    result: ModelContent
    is_error: bool
    signature: str


@with_config(REPLAYED)
class SearchCallStep(TypedDict, total=False):
    """A search of the web, the map or a store."""

    type: Required[
        Annotated[Literal["google_search_call", "google_maps_call", "retrieval_call"], LOWER]
    ]
    id: Required[Name]
    search_type: str
    retrieval_type: str
    arguments: QueryArguments
    signature: str


@with_config(REPLAYED)
class UrlContextCallStep(TypedDict, total=False):
    """Web pages that the model reads."""

    type: Required[Annotated[Literal["url_context_call"], LOWER]]
    id: Required[Name]
    arguments: UrlArguments
    signature: str


@with_config(REPLAYED)
class ToolSearchCallStep(TypedDict, total=False):
    """Functions that the model loads."""

    type: Required[Annotated[Literal["tool_search_call"], LOWER]]
    id: Required[Name]
    arguments: ToolSearchArguments
    signature: str


@with_config(REPLAYED)
class PlainCallStep(TypedDict, total=False):
    """A call whose arguments are not shown."""

    type: Required[Annotated[Literal["file_search_call", "processing_call"], LOWER]]
    id: Required[Name]
    signature: str


@with_config(REPLAYED)
class ListResultStep(TypedDict, total=False):
    """The result of a server-side tool: a list of findings."""

    type: Required[
        Annotated[
            Literal[
                "google_search_result",
                "url_context_result",
                "google_maps_result",
                "tool_search_result",
            ],
            LOWER,
        ]
    ]
    call_id: Required[Name]
    result: Annotated[list[dict[str, Any]], FIRST_FAULT]
    is_error: bool
    signature: str


@with_config(REPLAYED)
class PlainResultStep(TypedDict, total=False):
    """The end of a server-side call whose findings show as citations."""

    type: Required[
        Annotated[Literal["file_search_result", "retrieval_result", "processing_result"], LOWER]
    ]
    call_id: Required[Name]
    is_error: bool
    signature: str


@with_config(REPLAYED)
class McpServerToolCallStep(TypedDict, total=False):
    """A tool of an MCP server that the model calls."""

    type: Required[Annotated[Literal["mcp_server_tool_call"], LOWER]]
    id: Required[Name]
    server_name: Required[Name]
    name: Required[Name]
    arguments: Required[dict[str, Any]]


@with_config(REPLAYED)
class McpServerToolResultStep(TypedDict, total=False):
    """What the MCP server's tool answered."""

    type: Required[Annotated[Literal["mcp_server_tool_result"], LOWER]]
    call_id: Required[Name]
    server_name: str
    name: str
    result: Result


def _turn_or_text(fields: Mapping[str, object]) -> str | None:
    if "role" in fields:
        return "turn"
    return "text" if "text" in fields else None


Step: TypeAlias = (
    Annotated[UserInputStep, Tag("user_input")]
    | Annotated[ModelOutputStep, Tag("model_output")]
    | Annotated[ThoughtStep, Tag("thought")]
    | Annotated[FunctionCallStep, Tag("function_call")]
    | Annotated[FunctionResultStep, Tag("function_result")]
    | Annotated[CodeExecutionCallStep, Tag("code_execution_call")]
    | Annotated[CodeExecutionResultStep, Tag("code_execution_result")]
    | Annotated[SearchCallStep, Tag("google_search_call")]
    | Annotated[ListResultStep, Tag("google_search_result")]
    | Annotated[SearchCallStep, Tag("google_maps_call")]
    | Annotated[ListResultStep, Tag("google_maps_result")]
    | Annotated[UrlContextCallStep, Tag("url_context_call")]
    | Annotated[ListResultStep, Tag("url_context_result")]
    | Annotated[PlainCallStep, Tag("file_search_call")]
    | Annotated[PlainResultStep, Tag("file_search_result")]
    | Annotated[SearchCallStep, Tag("retrieval_call")]
    | Annotated[PlainResultStep, Tag("retrieval_result")]
    | Annotated[ToolSearchCallStep, Tag("tool_search_call")]
    | Annotated[ListResultStep, Tag("tool_search_result")]
    | Annotated[McpServerToolCallStep, Tag("mcp_server_tool_call")]
    | Annotated[McpServerToolResultStep, Tag("mcp_server_tool_result")]
    | Annotated[PlainCallStep, Tag("processing_call")]
    | Annotated[PlainResultStep, Tag("processing_result")]
)
AnyStep: TypeAlias = Annotated[Step, BY_TYPE]
"""Any step."""

InputItem: TypeAlias = Annotated[
    Step | Annotated[Turn, Tag("turn")] | Text | Image | Audio | Document | Video,
    type_or(_turn_or_text),
]
Input: TypeAlias = Annotated[
    _String
    | Annotated[InputItem, Tag("object")]
    | Annotated[list[InputItem], FIRST_FAULT, Tag("list")],
    BY_SHAPE,
]
"""A string, a content block, a list of them, or a list of steps."""
