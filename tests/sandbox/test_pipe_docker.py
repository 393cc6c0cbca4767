"""The pipe to a real, hardened container."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from openinteractions.sandbox.docker import DockerBackend
from openinteractions.sandbox.pipe import Pipe, boot_argv
from openinteractions.sandbox.port import Gone, Limits, Output, SandboxSpec
from tests.sandbox.engine import SLIM, DockerEngine
from tests.sandbox.pipes import collect, first_output, refuse, run, shell
from tests.sandbox.pipes import command as bare_command


def command(argv, **fields):
    return bare_command(argv, **{"cwd": "/tmp", **fields})


@dataclass
class Box:
    backend: DockerBackend
    ref: str

    @asynccontextmanager
    async def pipe(self, *, is_fresh=False, on_connect=refuse) -> AsyncGenerator[Pipe]:
        channel = await self.backend.attach(self.ref)
        pipe = await Pipe.open(channel, is_fresh=is_fresh, on_connect=on_connect)
        try:
            yield pipe
        finally:
            await pipe.close()


@pytest.fixture
async def box(docker_engine: DockerEngine, request) -> AsyncGenerator[Box]:
    backend = DockerBackend()
    spec = SandboxSpec(
        name=docker_engine.broker_name(f"pipe-{time.time_ns()}"),
        image=SLIM,
        argv=boot_argv(),
        limits=Limits(memory_bytes=512 * 2**20, pids=128, tmp_bytes=64 * 2**20),
        labels={"openinteractions.test": docker_engine.run_id},
    )
    ref = await backend.create(spec)
    try:
        yield Box(backend, ref)
    finally:
        await backend.remove(ref)
        await backend.close()


async def test_commands_run_as_an_unprivileged_user_behind_the_filter(box):
    async with box.pipe(is_fresh=True) as pipe:
        state = await pipe.ping()
        assert state["seccomp"] == "installed"
        assert state["problems"] == []
        out, _, end = await run(
            pipe, shell("id -u; grep -E 'Seccomp:|NoNewPrivs|CapEff' /proc/self/status")
        )
        assert end.code == 0
        assert out.split()[0] == b"1000"
        assert b"Seccomp:\t2" in out
        probe = (
            "import ctypes, socket\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "print(libc.syscall(425, 1, 0), ctypes.get_errno())\n"
            "for family in (40, 38, 17):\n"
            "    try: socket.socket(family, socket.SOCK_RAW); print('open')\n"
            "    except OSError as error: print(error.errno)\n"
        )
        out, _, _ = await run(pipe, command(["python3", "-c", probe]))
        assert out.split() == [b"-1", b"38", b"97", b"97", b"97"]


async def test_commands_cannot_look_into_the_supervisor(box):
    async with box.pipe(is_fresh=True) as pipe:
        pid = (await pipe.ping())["pid"]
        at = f"/proc/{pid}"
        script = f"ls {at}/fd; cat {at}/environ; cat {at}/mem; echo x > {at}/fd/3"
        out, err, _ = await run(pipe, shell(script))
        assert out == b""
        assert err.count(b"ermission denied") == 4


async def test_a_new_host_takes_over_a_running_container(box):
    given = shell("for i in $(seq 50); do echo $i; sleep 0.02; done; cat", has_stdin=True)
    async with box.pipe(is_fresh=True) as first:
        await first.start(given)
        seen = await first_output(first, given.id)
    await asyncio.sleep(0.3)
    async with box.pipe() as second:
        await second.write_stdin(given.id, b"the end\n")
        await second.end_stdin(given.id)
        out, _, end = await asyncio.wait_for(collect(second, given.id, len(seen)), 20)
        assert seen + out == "".join(f"{n}\n" for n in range(1, 51)).encode() + b"the end\n"
        assert end.code == 0


async def test_two_hosts_at_once_leave_the_last_one_working(box):
    async with box.pipe(is_fresh=True) as first, box.pipe() as second:
        out, _, _ = await run(second, shell("echo second"))
        assert out == b"second\n"
        assert "another host" in await asyncio.wait_for(first.wait_lost(), 5)
        assert (await second.ping())["running"] == 0


async def test_a_fork_bomb_ends_when_killed(box):
    """Short lives that leave their session and outrun every look, bounded by the container."""
    bomb = """
import os, time
for _ in range(20):
    if not os.fork():
        while True:
            os.setsid() if os.getsid(0) != os.getpid() else None
            try:
                if os.fork(): os._exit(0)
            except OSError: time.sleep(0.001)
"""
    async with box.pipe(is_fresh=True) as pipe:
        bystander = shell("for i in $(seq 600); do sleep 0.1; done; echo done")
        await pipe.start(bystander)
        given = command(["python3", "-c", bomb])
        await pipe.start(given)
        await asyncio.sleep(1)
        await asyncio.wait_for(pipe.kill(given.id), 30)
        _, _, end = await collect(pipe, given.id)
        assert end.outcome in {"killed", "exited"}
        await asyncio.sleep(0.2)
        out, err, end = await run(pipe, shell("ls -d /proc/[0-9]* | wc -l"))
        assert end.code == 0, err
        assert int(out) < 15
        assert [one["is_running"] for one in await pipe.list() if one["id"] == bystander.id] == [
            True
        ]


async def test_a_memory_hog_is_killed_and_the_supervisor_lives(box):
    hog = "x = []\nwhile True: x.append(bytearray(10_000_000))"
    async with box.pipe(is_fresh=True) as pipe:
        _, _, end = await asyncio.wait_for(run(pipe, command(["python3", "-c", hog])), 60)
        assert (end.outcome, end.signal) == ("exited", 9)
        assert (await run(pipe, shell("echo alive")))[0] == b"alive\n"


async def test_privileged_ports_and_names_lead_to_the_host(box):
    async def answer(kind, connection):
        head = await connection.read()
        await connection.write(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        asked.append((kind, head.split(b"\r\n")[0]))
        await connection.end()

    asked: list[tuple[str, bytes]] = []
    async with box.pipe(is_fresh=True, on_connect=answer) as pipe:
        assert await pipe.configure() == []
        out, err, _ = await run(pipe, shell("curl -sS http://example.com/a"))
        assert (out, err) == (b"hello", b"")
        out, _, _ = await run(pipe, shell("curl -sS -x http://127.0.0.1:3128 http://other.test/b"))
        assert out == b"hello"
        assert asked == [
            ("http", b"GET /a HTTP/1.1"),
            ("proxy", b"GET http://other.test/b HTTP/1.1"),
        ]
        code = "import socket; print(socket.getaddrinfo('pypi.org', 443, type=socket.SOCK_STREAM))"
        out, _, _ = await run(pipe, command(["python3", "-c", code]))
        assert out.count(b"127.0.0.1") == 1


async def test_a_terminal_and_a_session_work_inside(box):
    async with box.pipe(is_fresh=True) as pipe:
        out, _, end = await run(pipe, shell("tty && stty size", pty=(33, 99)))
        assert b"33 99" in out
        assert end.code == 0
        await run(pipe, command(["import numpy as np\na = np.arange(4)"], session="s"))
        out, _, end = await run(pipe, command(["a.sum()"], session="s"))
        assert b"6" in out
        assert not end.is_fresh_session


async def test_shutdown_ends_the_container(box):
    async with box.pipe(is_fresh=True) as pipe:
        await pipe.start(shell("sleep 600"))
        await pipe.shutdown()
        await asyncio.wait_for(pipe.wait_lost(), 10)
    await asyncio.sleep(1)
    with pytest.raises(Gone):
        await box.backend.attach(box.ref)


async def test_much_output_passes(box):
    async with box.pipe(is_fresh=True) as pipe:
        given = shell("head -c 50000000 /dev/zero", max_output_bytes=64 << 20)
        await pipe.start(given)
        size = 0
        async for item in pipe.follow(given.id):
            size += len(item.data) if isinstance(item, Output) else 0
        assert size == 50_000_000
