"""Routes whose endpoints read the request themselves."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class DirectRoute(APIRoute):
    """Hands the request to the endpoint as it is, its only parameter; documented like any other.

    FastAPI's search for parameters and dependencies takes a twentieth of a turn's CPU, also where
    it finds none.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The endpoint."""
        return self.endpoint
