"""Shapes of our own additions beside the contract, for the OpenAPI description."""

from pydantic import BaseModel

from openinteractions.wire.interaction import Interaction


class InteractionList(BaseModel):
    """One page of interactions, newest first, without their steps."""

    interactions: list[Interaction]
    next_page_token: str | None = None
