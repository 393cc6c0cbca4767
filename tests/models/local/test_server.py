"""The child process: its start, its deaths and its end."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import aiohttp
import psutil
import pytest

from openinteractions.errors import ModelUnavailable, SetupError
from openinteractions.models.local.server import LocalServer, ServerSpec, check_platform

PROMPT = "a very secret prompt"


@pytest.fixture
def spec(folder: Path) -> ServerSpec:
    return ServerSpec(
        name="smollm2-135m",
        path=folder / "SmolLM2-135M-Instruct.Q4_1.gguf",
        log=folder / "logs" / "child.log",
        threads=1,
        parallel=1,
        context_tokens=512,
    )


async def complete(session: aiohttp.ClientSession, server: LocalServer, **headers: str) -> int:
    async with server.use():
        child = server._child
        assert child is not None
        headers = headers or {"Authorization": f"Bearer {child.api_key}"}
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2}
        url = f"{child.base_url}/v1/chat/completions"
        async with session.post(url, json=body, headers=headers) as response:
            return response.status


async def gone(pid: int) -> None:
    async with asyncio.timeout(5):
        while is_alive(pid):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_it_starts_once_for_many_and_ends_with_its_context(spec, session):
    async with LocalServer(spec, session) as server:
        assert server.pid is None
        await asyncio.gather(*(server.ensure() for _ in range(3)))
        pid = server.pid
        assert await complete(session, server) == 200
        assert server.pid == pid
    await gone(pid)


async def test_only_who_has_the_key_may_ask_and_nobody_can_read_it(spec, session):
    async with LocalServer(spec, session) as server:
        assert await complete(session, server, Authorization="Bearer guess") == 401
        child, process = server._child, psutil.Process(server.pid)
        assert child.api_key not in " ".join(process.cmdline())
        assert child.api_key not in str(process.environ())
        assert {conn.laddr.ip for conn in process.net_connections()} == {"127.0.0.1"}


async def test_the_child_inherits_no_secrets(spec, session, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-secret")
    async with LocalServer(spec, session) as server:
        await server.ensure()
        environment = psutil.Process(server.pid).environ()

    assert "GEMINI_API_KEY" not in environment
    assert environment["GOMP_SPINCOUNT"] == "1000"


async def test_the_log_holds_complaints_but_no_prompts(spec, session):
    async with LocalServer(spec, session) as server:
        await complete(session, server)
        body = {"messages": [{"role": "user", "content": PROMPT * 1000}]}
        child = server._child
        headers = {"Authorization": f"Bearer {child.api_key}"}
        url = f"{child.base_url}/v1/chat/completions"
        async with session.post(url, json=body, headers=headers) as response:
            assert response.status == 400

    log = spec.log.read_text()
    assert "exceeds the available context size" in log
    assert PROMPT not in log


async def test_after_a_kill_the_next_request_works(spec, session):
    async with LocalServer(spec, session) as server:
        await complete(session, server)
        first = server.pid
        os.kill(first, signal.SIGKILL)
        await gone(first)

        assert await complete(session, server) == 200
        assert server.pid != first


async def test_deaths_in_a_row_cost_a_pause(spec, session):
    async with LocalServer(spec, session) as server:
        for _ in range(2):
            await server.ensure()
            os.kill(server.pid, signal.SIGKILL)
            await gone(server.pid)
        with pytest.raises(ModelUnavailable) as caught:
            await server.ensure()

        assert 0 < caught.value.retry_after_s <= 1
        await asyncio.sleep(caught.value.retry_after_s)
        assert await complete(session, server) == 200


async def test_a_file_that_cannot_be_loaded_is_unavailable_and_names_the_log(
    spec, session, tmp_path
):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(1000))
    async with LocalServer(replace(spec, path=broken), session) as server:
        with pytest.raises(ModelUnavailable, match=r"child\.log"):
            await server.ensure()


async def test_whoever_gives_up_waiting_leaves_the_start_to_others(spec, session):
    async with LocalServer(spec, session) as server:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await server.ensure()
        pid = server.pid
        assert await complete(session, server) == 200
        assert pid in (None, server.pid)


async def test_it_stops_when_idle_and_starts_again(spec, session):
    async with LocalServer(spec, session, idle_stop=timedelta(seconds=0.1)) as server:
        await complete(session, server)
        await gone(server.pid)
        assert server.pid is None
        assert await complete(session, server) == 200


async def test_it_dies_with_its_parent(spec, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, os, aiohttp
        from pathlib import Path
        from openinteractions.models.local.server import LocalServer, ServerSpec

        async def main():
            spec = ServerSpec(
                name="x", path=Path({str(spec.path)!r}), log=Path({str(spec.log)!r}),
                threads=1, parallel=1, context_tokens=512,
            )
            async with aiohttp.ClientSession() as session, LocalServer(spec, session) as server:
                await server.ensure()
                os.write(2, f"pid={{server.pid}}\\n".encode())
                await asyncio.sleep(60)

        asyncio.run(main())
        """)
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    async for line in parent.stderr:
        if line.startswith(b"pid="):
            break
    pid = int(line.removeprefix(b"pid="))
    assert psutil.pid_exists(pid)

    parent.kill()
    await parent.wait()

    await gone(pid)


async def test_the_child_ends_when_its_input_ends_before_it_began():
    child = Path(sys.modules[LocalServer.__module__].__file__).with_name("child.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(child),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, complaint = await process.communicate()

    assert process.returncode == 1
    assert b"ended before the first line" in complaint


def test_a_processor_without_avx2_is_told():
    check_platform("flags : fpu sse avx avx2 fma")
    with pytest.raises(SetupError, match="AVX2"):
        check_platform("flags : fpu sse avx fma")


def test_native_code_stays_out_of_this_process():
    code = (
        "import sys, json, openinteractions.models.local.runtime;"
        "print(json.dumps([name for name in sys.modules if 'xllamacpp' in name]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(out.stdout) == []
