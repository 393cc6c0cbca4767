"""What needs a sandbox where no broker lives: whether a retry may help is told."""

import pytest
from tests import house

BODY = {"model": house.MODEL, "input": "go", "tools": [{"type": "code_execution"}]}


@pytest.mark.parametrize(
    ("enabled", "was_there", "status"),
    [("auto", False, 503), ("off", False, 400), ("off", True, 503)],
)
async def test_only_where_none_will_come_no_retry_is_asked_for(
    database_url: str, enabled: str, was_there: bool, status: int
):
    async with (
        house.upstream() as fake,
        house.opened(database_url, fake, sandbox={"enabled": enabled}) as server,
    ):
        async with server.database.hot() as connection:
            await connection.execute("delete from brokers")
            if was_there:
                await connection.execute(
                    "insert into brokers (name, address, host, pid, backend, capacity, seen) "
                    "values ('b', 'unix:///b.sock', 'h', 1, 'none', 1, now() - interval '1 hour')"
                )
        answered, told = await server.call("POST", "interactions", BODY)
        assert answered == status
        assert ("sandbox.enabled" in told["error"]["message"]) is (status == 400)
