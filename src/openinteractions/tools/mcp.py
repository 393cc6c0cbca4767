"""Tools of MCP servers.

An entry of `own_tools` holds what the server said of its tools when the interaction was created:
`{"type": "mcp_server", "name", "url", "tools": [{"name", "description", "parameters"}]}`. A tool
that the server marks as changing nothing has `is_pure`, one that may be repeated `is_repeatable`.
"""

from collections.abc import Mapping

from openinteractions.errors import RequestError
from openinteractions.models.calls import mcp_function
from openinteractions.models.port import Json, ToolCall
from openinteractions.tools.port import Call, McpServer, Means, Tool

TIMEOUT_S = 300.0
_UNKNOWN = (
    "Outcome unknown: the server that made this call was lost before it had an answer. The call "
    "may have taken effect; look before it is repeated."
)
_MAX_DESCRIPTION_CHARS = 4096


def tools(config: Json, means: Means) -> Mapping[str, Tool]:
    """The tools that one entry of a run's `own_tools` stands for, by name."""
    server = means.servers.get(config["name"])
    return {
        mcp_function(config["name"], known["name"]): McpTool(config["name"], known, server)
        for known in config["tools"]
    }


class McpTool:
    """Implements `Tool`."""

    def __init__(self, server_name: str, known: Json, server: McpServer | None) -> None:
        """A tool of a server.

        Args:
            server_name: As the request calls the server.
            known: What the server said of it.
            server: None where only the declaration is needed.
        """
        self._server_name = server_name
        self._name: str = known["name"]
        self._known = known
        self._server = server

    @property
    def is_pure(self) -> bool:
        """The server says that it changes nothing."""
        return bool(self._known.get("is_pure"))

    def declaration(self) -> Json:
        """The function that the model sees."""
        about: str = self._known.get("description") or ""
        return {
            "type": "function",
            "name": mcp_function(self._server_name, self._name),
            "description": about[:_MAX_DESCRIPTION_CHARS]
            or f"{self._name}, a tool of the MCP server {self._server_name}.",
            "parameters": self._known["parameters"],
        }

    def call_step(self, call: ToolCall) -> Json:
        """A `mcp_server_tool_call` step, with the name that the server knows."""
        return {
            "type": "mcp_server_tool_call",
            "server_name": self._server_name,
            "name": self._name,
            "arguments": call.arguments,
        }

    async def run(self, call: Call) -> Json:
        """Ask the server; a call that may have been made already only where it may be repeated."""
        assert self._server is not None
        if not (self.is_pure or self._known.get("is_repeatable")):
            if call.begun is not None:
                return self.failure(_UNKNOWN)
            await call.begin({})
        try:
            result, is_error = await self._server.call(
                self._name, call.step["arguments"], timeout_s=TIMEOUT_S
            )
        except RequestError as error:
            return self.failure(error.message)
        return self._result(result, is_error=is_error)

    def failure(self, message: str) -> Json:
        """A result that says what is wrong."""
        return self._result(message, is_error=True)

    async def stop(self, key: str) -> None:
        """Nothing to do: a call that is cancelled tells its server so itself."""

    def _result(self, result: object, *, is_error: bool) -> Json:
        return {
            "type": "mcp_server_tool_result",
            "server_name": self._server_name,
            "name": self._name,
            "result": result,
            "is_error": is_error,
        }
