"""Tool declarations."""

from typing import Annotated, Any, Literal, Required, TypeAlias

from pydantic import Field, Tag, with_config
from typing_extensions import TypedDict

from openinteractions.wire.fields import BY_SHAPE, BY_TYPE, LOWER, REQUEST, Name

FunctionName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}$")]
Mode: TypeAlias = Annotated[Literal["auto", "any", "none", "validated"], LOWER]


@with_config(REQUEST)
class FunctionTool(TypedDict, total=False):
    """A function that the caller runs: its call parks the interaction in `requires_action`."""

    type: Required[Annotated[Literal["function"], LOWER]]
    name: Required[FunctionName]
    description: str
    parameters: dict[str, Any]
    """A JSON Schema of the arguments."""
    defer_loading: bool
    """Show the model only the name and `short_description` until it asks (see `tool_search`)."""
    short_description: str


@with_config(REQUEST)
class CodeExecutionTool(TypedDict):
    """Runs code in the sandbox."""

    type: Annotated[Literal["code_execution"], LOWER]


@with_config(REQUEST)
class UrlContextTool(TypedDict):
    """Reads web pages."""

    type: Annotated[Literal["url_context"], LOWER]


@with_config(REQUEST)
class BrowserTool(TypedDict):
    """Operates a browser in the sandbox. An extension of this server."""

    type: Annotated[Literal["browser"], LOWER]


@with_config(REQUEST)
class GoogleSearchTool(TypedDict, total=False):
    """Searches the web."""

    type: Required[Annotated[Literal["google_search"], LOWER]]
    search_types: list[
        Annotated[Literal["web_search", "image_search", "enterprise_web_search"], LOWER]
    ]


@with_config(REQUEST)
class GoogleMapsTool(TypedDict, total=False):
    """Searches the map."""

    type: Required[Annotated[Literal["google_maps"], LOWER]]
    enable_widget: bool
    latitude: Annotated[float, Field(ge=-90, le=90)]
    longitude: Annotated[float, Field(ge=-180, le=180)]


@with_config(REQUEST)
class FileSearchTool(TypedDict, total=False):
    """Searches file stores."""

    type: Required[Annotated[Literal["file_search"], LOWER]]
    file_search_store_names: list[str]
    metadata_filter: str
    top_k: Annotated[int, Field(gt=0)]


@with_config(REQUEST)
class ComputerUseTool(TypedDict, total=False):
    """Operates a browser, a phone or a desktop."""

    type: Required[Annotated[Literal["computer_use"], LOWER]]
    environment: Annotated[Literal["browser", "mobile", "desktop"], LOWER]
    excluded_predefined_functions: list[str]
    enable_prompt_injection_detection: bool
    disabled_safety_policies: list[
        Annotated[
            Literal[
                "financial_transactions",
                "sensitive_data_modification",
                "communication_tool",
                "account_creation",
                "data_modification",
                "user_consent_management",
                "legal_terms_and_agreements",
            ],
            LOWER,
        ]
    ]


@with_config(REQUEST)
class AllowedTools(TypedDict, total=False):
    """Which tools may, or must, be called."""

    mode: Mode
    tools: list[str]


@with_config(REQUEST)
class McpServerTool(TypedDict, total=False):
    """A remote MCP server (streamable HTTP), whose tools this server calls."""

    type: Required[Annotated[Literal["mcp_server"], LOWER]]
    name: Required[Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")]]
    url: Required[Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=4096)]]
    headers: dict[str, str]
    """Sent with every call; never given back."""
    allowed_tools: list[
        Annotated[Annotated[str, Tag("string")] | Annotated[AllowedTools, Tag("object")], BY_SHAPE]
    ]
    """Names, or objects that hold names."""
    credential: Name
    """The id of a stored credential."""


@with_config(REQUEST)
class ExaSearchConfig(TypedDict, total=False):
    """Exa, a search engine."""

    api_key: Required[str]
    custom_config: dict[str, Any]


@with_config(REQUEST)
class ParallelSearchConfig(TypedDict, total=False):
    """Parallel, a search engine."""

    api_key: str
    custom_config: dict[str, Any]


@with_config(REQUEST)
class VertexSearchConfig(TypedDict, total=False):
    """Vertex AI Search."""

    datastores: list[str]
    engine: str


@with_config(REQUEST)
class RetrievalTool(TypedDict, total=False):
    """Searches an enterprise store."""

    type: Required[Annotated[Literal["retrieval"], LOWER]]
    retrieval_types: list[
        Annotated[
            Literal["vertex_ai_search", "rag_store", "exa_ai_search", "parallel_ai_search"], LOWER
        ]
    ]
    exa_ai_search_config: ExaSearchConfig
    parallel_ai_search_config: ParallelSearchConfig
    rag_store_config: dict[str, Any]
    vertex_ai_search_config: VertexSearchConfig


@with_config(REQUEST)
class ToolSearchTool(TypedDict, total=False):
    """Lets the model load functions that were declared with `defer_loading`."""

    type: Required[Annotated[Literal["tool_search"], LOWER]]
    execution: Annotated[Literal["server", "client"], LOWER]
    name: FunctionName
    description: str
    parameters: dict[str, Any]


Tool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CodeExecutionTool, Tag("code_execution")]
    | Annotated[UrlContextTool, Tag("url_context")]
    | Annotated[BrowserTool, Tag("browser")]
    | Annotated[GoogleSearchTool, Tag("google_search")]
    | Annotated[GoogleMapsTool, Tag("google_maps")]
    | Annotated[FileSearchTool, Tag("file_search")]
    | Annotated[ComputerUseTool, Tag("computer_use")]
    | Annotated[McpServerTool, Tag("mcp_server")]
    | Annotated[RetrievalTool, Tag("retrieval")]
    | Annotated[ToolSearchTool, Tag("tool_search")],
    BY_TYPE,
]


@with_config(REQUEST)
class ToolChoiceObject(TypedDict):
    """A choice among some of the tools."""

    allowed_tools: AllowedTools


ToolChoice: TypeAlias = Annotated[
    Annotated[Mode, Tag("string")] | Annotated[ToolChoiceObject, Tag("object")], BY_SHAPE
]
