"""Agents of google-adk against a running server, as an application builds them.

Runs in an environment of its own (`scripts/adk`), since google-adk needs another google-genai than
we have. `../test_adk.py` starts it with a scene and what the user says, and reads what it prints.
"""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from google.adk.agents import BaseAgent, LlmAgent, ManagedAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.models import Gemini
from google.adk.runners import InMemoryRunner
from google.adk.tools import FunctionTool
from google.genai import Client, types

URL = os.environ["OI_URL"]
APP = "shop"
USER = "ada"


def price_of(item: str) -> dict[str, Any]:
    """Says what an item costs.

    Args:
        item: Its name.
    """
    return {"item": item, "euros": len(item)}


def shopkeeper() -> BaseAgent:
    """An agent of ADK's own loop: our server is its model, the tool runs here."""
    return LlmAgent(
        name="shopkeeper",
        model=Gemini(model="gemini-3.5-flash", use_interactions_api=True, base_url=URL),
        instruction="You keep a shop.",
        tools=[FunctionTool(price_of)],
    )


def programmer() -> BaseAgent:
    """An agent whose loop, tools and sandbox are our server's."""
    client = Client(http_options=types.HttpOptions(base_url=URL))
    return ManagedAgent(
        name="programmer",
        agent_id="antigravity-preview-09-2026",
        environment={"type": "remote"},
        agent_config={"type": "antigravity", "max_total_tokens": 100_000},
        instruction="Be brief.",
        tools=[types.Tool(code_execution=types.ToolCodeExecution())],
        api_client=client,
    )


SCENES: dict[str, Callable[[], BaseAgent]] = {"shopkeeper": shopkeeper, "programmer": programmer}


async def say(runner: InMemoryRunner, texts: Sequence[str], mode: StreamingMode) -> list[Any]:
    """Say each text, in one session; the events of each turn."""
    session = await runner.session_service.create_session(app_name=APP, user_id=USER)
    turns: list[Any] = []
    for text in texts:
        events = runner.run_async(
            user_id=USER,
            session_id=session.id,
            new_message=types.Content(role="user", parts=[types.Part(text=text)]),
            run_config=RunConfig(streaming_mode=mode),
        )
        turns.append([e.model_dump(mode="json", exclude_none=True) async for e in events])
    return turns


async def main(scene: str, *texts: str) -> None:
    """Hold the same conversation twice, and print both: read whole, then streamed."""
    runner = InMemoryRunner(agent=SCENES[scene](), app_name=APP)
    modes = (StreamingMode.NONE, StreamingMode.SSE)
    print(json.dumps([await say(runner, texts, mode) for mode in modes]))
    await runner.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
