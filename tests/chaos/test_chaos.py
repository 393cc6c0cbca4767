"""The short chaos; `make chaos` is the long one."""

import pytest

from tests.chaos.run import chaos

SEED = 20


@pytest.mark.timeout(300)
async def test_every_run_ends_well_whatever_dies():
    verdict = await chaos(runs=60, seed=SEED, limit_s=200)
    print(verdict.text)
    assert not verdict.wrong, "\n".join([*verdict.wrong, verdict.text])
