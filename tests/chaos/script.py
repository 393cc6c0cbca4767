"""What the upstream says and how it fails: a function of the seed, so that a run can be repeated.

A turn is named by its prompt, `c<chain>.<turn>`; its answer and its history follow from the name.
"""

import random
from collections import Counter

from tests.fakes.openai import FakeOpenAI
from tests.fakes.upstream import Received, Reply
from tests.house import reply, said

TURNS = 3


def answer(prompt: str) -> str:
    """The one right answer."""
    return "".join(words(prompt))


def words(prompt: str) -> list[str]:
    rng = random.Random(prompt)
    count = rng.randint(8, 24)
    return [f"re {prompt}:", *(f" w{number}é" for number in range(count))]


def history(prompt: str) -> list[tuple[str, str]]:
    """What a model is to see when this turn is asked for."""
    chain, _, turn = prompt.partition(".")
    seen: list[tuple[str, str]] = []
    for number in range(int(turn)):
        earlier = f"{chain}.{number}"
        seen += [("user", earlier), ("assistant", answer(earlier))]
    return [*seen, ("user", prompt)]


class Upstream(FakeOpenAI):
    """Answers every turn rightly, but for what the seed makes of each try."""

    def __init__(self, seed: int, *, gap_s: float) -> None:
        super().__init__()
        self.wrong_histories: list[tuple[str, list[tuple[str, str]]]] = []
        self.tries: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._seed = seed
        self._gap_s = gap_s
        self.default = self._script

    def _script(self, received: Received) -> Reply:
        self.requests.clear()
        seen = said(received)
        prompt = seen[-1][1]
        self.tries[prompt] += 1
        if seen != history(prompt):
            self.wrong_histories.append((prompt, seen))
        rng = random.Random(f"{self._seed} {prompt} {self.tries[prompt]}")
        return self._reply(rng, prompt)

    def _reply(self, rng: random.Random, prompt: str) -> Reply:
        texts = words(prompt)
        gap_s = self._gap_s * rng.uniform(0.5, 1.5)
        chance = rng.random()
        where = rng.randint(0, len(texts) + 2)
        if chance > 0.1:
            return reply(*texts, gap_s=gap_s)
        if chance < 0.03:
            status = rng.choice([429, 500])
            self.failures[str(status)] += 1
            headers = {"Retry-After": "0"} if status == 429 else {}
            return Reply(status=status, headers=headers)
        kind = rng.choice(["cut_after", "cut_after", "stall_after", "error_after"])
        self.failures[kind] += 1
        return reply(*texts, gap_s=gap_s, **{kind: where})
