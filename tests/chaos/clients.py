"""Callers who want their answers whatever happens, and remember everything they were shown."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from tests.chaos.script import TURNS
from tests.chaos.stage import KEY
from tests.house import Frame, Frames

_BROKEN = (aiohttp.ClientError, asyncio.IncompleteReadError, ConnectionError, TimeoutError, OSError)
_RUNNING = {"in_progress", "queued"}
_SILENCE_S = 6.0
"""After which a reader looks elsewhere: an api may be stalled."""


@dataclass(eq=False)
class Reading:
    """One reader's whole view of one stream, over all its connections."""

    interaction_id: str = ""
    frames: list[Frame] = field(default_factory=list[Frame])
    connections: int = 0
    is_done: bool = False


@dataclass(eq=False)
class Asked:
    """One interaction as its caller knows it."""

    prompt: str
    interaction_id: str = ""
    status: str = ""
    background: bool = True


class World:
    """Both apis, and what callers have seen of them."""

    def __init__(self, seed: int, ports: Sequence[int], deadline_s: float) -> None:
        self.seed = seed
        self._bases = [f"http://127.0.0.1:{port}" for port in ports]
        self._deadline = time.monotonic() + deadline_s
        self.asked: list[Asked] = []
        self.readings: list[Reading] = []
        self.retries = 0

    def session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=_SILENCE_S)
        headers = {"x-goog-api-key": KEY}
        # A connection of its own each time, as over a load balancer.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        return aiohttp.ClientSession(
            timeout=timeout, headers=headers, connector=connector, read_bufsize=2**20
        )

    def _base(self, rng: random.Random) -> str:
        return rng.choice(self._bases)

    async def _pause(self, why: object) -> None:
        self.retries += 1
        assert time.monotonic() < self._deadline, f"out of time; last: {why!r}"
        await asyncio.sleep(0.2)

    async def call(
        self,
        http: aiohttp.ClientSession,
        rng: random.Random,
        method: str,
        path: str,
        body: Any = None,
        **headers: str,
    ) -> Any:
        """One request, tried until it is answered."""
        data = None if body is None else orjson.dumps(body)
        while True:
            url = f"{self._base(rng)}/v1beta/{path}"
            try:
                async with http.request(method, url, data=data, headers=headers) as response:
                    text = await response.read()
                    if response.status == 200:
                        return orjson.loads(text)
                    assert response.status == 503, (method, path, response.status, text)
                    why: object = text
            except _BROKEN as error:
                why = error
            await self._pause(why)

    async def read(
        self,
        http: aiohttp.ClientSession,
        rng: random.Random,
        reading: Reading,
        create: tuple[Any, str] | None = None,
    ) -> None:
        """Read a stream to its end over as many connections as it takes, from any api.

        Args:
            http: Makes the connections.
            rng: Says which api, and when this reader hangs up for no reason.
            reading: What it has seen; with `create`, of an interaction to be made.
            create: The body and the Idempotency-Key.
        """
        self.readings.append(reading)
        while not reading.is_done:
            reading.connections += 1
            patience = rng.choice([1, 3, 8, 10**6, 10**6])
            try:
                await self._read_once(http, rng, reading, create, patience)
            except _BROKEN as error:
                await self._pause(error)

    async def _read_once(
        self,
        http: aiohttp.ClientSession,
        rng: random.Random,
        reading: Reading,
        create: tuple[Any, str] | None,
        patience: int,
    ) -> None:
        base = f"{self._base(rng)}/v1beta/interactions"
        if not reading.interaction_id:
            assert create is not None
            body, key = create
            request = http.post(base, data=orjson.dumps(body), headers={"Idempotency-Key": key})
        else:
            url = f"{base}/{reading.interaction_id}?stream=true"
            if reading.frames:
                url += f"&last_event_id={reading.frames[-1].id}"
            request = http.get(url)
        async with request as response:
            if response.status != 200:
                text = await response.read()
                assert response.status == 503, (response.status, text)
                raise ConnectionError(text)
            frames = Frames(response)
            while patience:
                patience -= 1
                frame = await frames.next()
                if frame is None:
                    reading.is_done = True
                    return
                reading.frames.append(frame)
                if not reading.interaction_id:
                    reading.interaction_id = frame.data["interaction"]["id"]
                if frame.kind == "interaction.completed":
                    # Who asks for what comes after the last event is sent it again, by design.
                    reading.is_done = True
                    return


async def chain(world: World, number: int, *, delay_s: float) -> None:
    """One conversation of background runs, each continuing the one before."""
    rng = random.Random(f"{world.seed} chain {number}")
    await asyncio.sleep(delay_s)
    previous: str | None = None
    async with world.session() as http, asyncio.TaskGroup() as readers:
        for turn in range(TURNS):
            prompt = f"c{number}.{turn}"
            body: dict[str, Any] = {"model": "fake/m", "input": prompt, "background": True}
            if previous is not None:
                body["previous_interaction_id"] = previous
            asked = Asked(prompt)
            world.asked.append(asked)
            key = f"{world.seed}-{prompt}"
            if rng.random() < 0.6:
                reading = Reading()
                await world.read(http, rng, reading, ({**body, "stream": True}, key))
                asked.interaction_id = reading.interaction_id
            else:
                made = await world.call(
                    http, rng, "POST", "interactions", body, **{"Idempotency-Key": key}
                )
                asked.interaction_id = made["id"]
                if rng.random() < 0.5:
                    # Not streamed when it was created: read from its steps as they come.
                    extra = Reading(made["id"])
                    other = random.Random(f"{world.seed} extra {prompt}")
                    readers.create_task(world.read(http, other, extra))
            asked.status = await _ended(world, http, rng, asked.interaction_id)
            if rng.random() < 0.3:
                late = Reading(asked.interaction_id)
                readers.create_task(world.read(http, random.Random(f"late {prompt}"), late))
            previous = asked.interaction_id


async def _ended(world: World, http: aiohttp.ClientSession, rng: random.Random, key: str) -> str:
    while True:
        now = await world.call(http, rng, "GET", f"interactions/{key}")
        if now["status"] not in _RUNNING:
            return now["status"]
        await world._pause("still running")


async def foreground(world: World, number: int, *, delay_s: float) -> None:
    """A caller who waits for the answer; one in three does not ask again if it breaks off."""
    rng = random.Random(f"{world.seed} foreground {number}")
    await asyncio.sleep(delay_s)
    prompt = f"f{number}.0"
    asked = Asked(prompt, background=False)
    world.asked.append(asked)
    body = {"model": "fake/m", "input": prompt}
    key = f"{world.seed}-{prompt}"
    async with world.session() as http:
        match number % 3:
            case 0:
                reading = Reading()
                await world.read(http, rng, reading, ({**body, "stream": True}, key))
                asked.interaction_id = reading.interaction_id
            case 1:
                made = await world.call(
                    http, rng, "POST", "interactions", body, **{"Idempotency-Key": key}
                )
                asked.interaction_id = made["id"]
                asked.status = made["status"]
            case _:
                await _ask_once(world, http, rng, body, key)


async def _ask_once(
    world: World, http: aiohttp.ClientSession, rng: random.Random, body: Any, key: str
) -> None:
    url = f"{world._base(rng)}/v1beta/interactions"
    try:
        async with http.post(
            url, data=orjson.dumps(body), headers={"Idempotency-Key": key}
        ) as response:
            await response.read()
    except _BROKEN:
        pass
