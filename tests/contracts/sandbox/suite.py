"""One contract for every backend, with real containers.

How a backend joins, in `test_<name>_backend.py`:

    class TestAcme(BackendContract):
        def new_backend(self) -> Backend: return AcmeBackend(...)
        @pytest.fixture
        def run_id(self) -> str: ...

`await started(argv)` gives a running container of the test's own; it is removed at the end.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from openinteractions.sandbox.port import (
    Backend,
    BackendDown,
    Duplex,
    Gone,
    Limits,
    Mount,
    SandboxError,
    SandboxSpec,
)

RUN_LABEL = "openinteractions.test"
LABEL = "openinteractions.case"
SMALL = Limits(cpus=1, memory_bytes=128 * 2**20, pids=48, tmp_bytes=32 * 2**20)
PATIENCE_S = 30

Start = Callable[..., Awaitable[str]]


async def read_until(stream: Duplex, mark: bytes) -> bytes:
    """What comes, up to a piece that ends with a mark."""
    got = bytearray()
    async with asyncio.timeout(PATIENCE_S):
        while not got.endswith(mark):
            piece = await stream.read()
            assert piece, f"the stream ended after {bytes(got)!r}"
            got += piece
    return bytes(got)


async def read_all(stream: Duplex) -> bytes:
    got = bytearray()
    async with asyncio.timeout(PATIENCE_S):
        while piece := await stream.read():
            got += piece
    return bytes(got)


async def say(stream: Duplex, script: str) -> str:
    """Have a shell run a script; what it printed."""
    await stream.write(f"{{ {script}\n}}; echo 'do''ne'\n".encode())
    return (await read_until(stream, b"done\n")).removesuffix(b"done\n").decode()


class BackendContract:
    image = "openinteractions/sandbox:slim"

    def new_backend(self) -> Backend:
        raise NotImplementedError

    @pytest.fixture
    def run_id(self) -> str:
        """Marks what this run of the tests has started."""
        raise NotImplementedError

    @pytest.fixture
    async def backend(self) -> AsyncGenerator[Backend]:
        backend = self.new_backend()
        yield backend
        await backend.close()

    @pytest.fixture
    def spec(self, run_id: str) -> SandboxSpec:
        mark = secrets.token_hex(6)
        return SandboxSpec(
            name=f"oi-test-{mark}",
            image=self.image,
            argv=["bash"],
            limits=SMALL,
            env={"GREETING": "hel lo=ü"},
            labels={RUN_LABEL: run_id, LABEL: mark, "openinteractions.other": "a b"},
        )

    @pytest.fixture
    async def started(self, backend: Backend, spec: SandboxSpec) -> AsyncGenerator[Start]:
        refs: list[str] = []

        async def start(argv: Sequence[str] = ("bash",), **fields: object) -> str:
            ref = await backend.create(replace(spec, argv=argv, **fields))
            refs.append(ref)
            return ref

        yield start
        for ref in refs:
            await backend.remove(ref)

    async def test_says_how_it_is(self, backend):
        health = await backend.health()
        assert health.version
        assert all(health.runtimes)

    async def test_bytes_go_both_ways_untouched(self, backend, started):
        stream = await backend.attach(await started(["cat"]))
        sent = os.urandom(3 * 2**20) + bytes(range(256))

        async def send() -> None:
            for at in range(0, len(sent), 100_000):
                await stream.write(sent[at : at + 100_000])

        got = bytearray()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            group.create_task(send())
            while len(got) < len(sent):
                piece = await stream.read(50_000)
                assert 0 < len(piece) <= 50_000
                got += piece
        assert bytes(got) == sent
        await stream.close()

    async def test_who_reads_slowly_holds_the_process_and_loses_nothing(self, backend, started):
        stream = await backend.attach(await started())
        size = 30_000_000
        await stream.write(f"head -c {size} /dev/zero; echo done\n".encode())
        await asyncio.sleep(1)
        got = await read_until(stream, b"done\n")
        assert len(got) == size + 5
        await stream.close()

    async def test_a_process_that_does_not_read_makes_the_writer_wait(self, backend, started):
        stream = await backend.attach(await started(["sleep", "60"]))

        async def write() -> None:
            for _ in range(1000):
                await stream.write(bytes(100_000))

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(write(), 3)
        await stream.close()

    async def test_a_stream_can_be_opened_again_and_the_process_lives_on(self, backend, started):
        ref = await started()
        first = await backend.attach(ref)
        await say(first, "kept=yes")
        await first.close()
        second = await backend.attach(ref)
        assert await say(second, "echo $kept") == "yes\n"
        await second.close()
        with pytest.raises(ConnectionError):
            await second.write(b"x")
        assert await second.read() == b""

    async def test_errors_of_the_main_process_are_not_mixed_in(self, backend, started):
        stream = await backend.attach(await started())
        assert await say(stream, "echo a; echo b >&2; echo c") == "a\nc\n"
        await stream.close()

    async def test_the_stream_ends_with_the_process(self, backend, started, spec):
        ref = await started()
        stream = await backend.attach(ref)
        await stream.write(b"echo bye; exit 3\n")
        assert await read_all(stream) == b"bye\n"
        await stream.close()
        async with asyncio.timeout(PATIENCE_S):
            # The engine hears of the end a moment after the stream.
            while (await backend.list(spec.labels))[0].is_running:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        with pytest.raises(Gone):
            await backend.attach(ref)

    async def test_who_is_removed_is_gone_and_removing_again_is_nothing(
        self, backend, started, spec
    ):
        ref = await started()
        stream = await backend.attach(ref)
        await backend.remove(ref)
        assert await read_all(stream) == b""
        with pytest.raises(Gone):
            await backend.attach(ref)
        await asyncio.gather(backend.remove(ref), backend.remove(ref))
        assert list(await backend.list({LABEL: spec.labels[LABEL]})) == []

    async def test_a_stream_that_nobody_reads_does_not_hold_a_removal(self, backend, started):
        ref = await started()
        stream = await backend.attach(ref)
        await stream.write(b"head -c 50000000 /dev/zero\n")
        assert await stream.read()
        async with asyncio.timeout(10):
            await backend.remove(ref)

    async def test_lists_what_has_all_the_labels(self, backend, started, spec):
        ref = await started()
        found = await backend.list(spec.labels)
        assert [(each.ref, each.is_running) for each in found] == [(ref, True)]
        assert spec.labels.items() <= found[0].labels.items()
        other = {**spec.labels, LABEL: "another"}
        assert list(await backend.list(other)) == []

    async def test_the_process_has_no_rights_and_no_network(self, backend, started):
        stream = await backend.attach(await started())
        assert await say(stream, "id -u; id -g; hostname; echo $GREETING") == (
            "1000\n1000\nsandbox\nhel lo=ü\n"
        )
        status = await say(stream, "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/1/status")
        assert status.split() == [
            "CapEff:", "0000000000000000", "CapBnd:", "0000000000000000",
            "NoNewPrivs:", "1", "Seccomp:", "2",
        ]  # fmt: skip
        assert await say(stream, "ls /sys/class/net") == "lo\n"
        for path in ("/x", "/etc/x", "/var/tmp/x", "/workspace/x", "/proc/sys/kernel/x"):
            assert await say(stream, f"touch {path} 2>/dev/null || echo refused") == "refused\n"
        await stream.close()

    async def test_temporary_folders_are_there_and_bounded(self, backend, started):
        stream = await backend.attach(await started())
        for path in ("/tmp", "/run", "/run/oi", "/dev/shm"):
            assert await say(stream, f"echo hi >{path}/x && cat {path}/x") == "hi\n"
            flags = await say(stream, f"grep ' {path} ' /proc/mounts | cut -d' ' -f4")
            assert {"nosuid", "nodev"} <= set(flags.strip().split(","))
        sizes = await say(stream, "df -k --output=size /tmp /run /run/oi /dev/shm | tail -n +2")
        assert sum(map(int, sizes.split())) * 1024 <= SMALL.tmp_bytes
        full = await say(stream, "head -c 50000000 /dev/zero >/tmp/big 2>/dev/null || echo full")
        assert full == "full\n"
        run = "rm /tmp/big; printf '#!/bin/sh\\necho ran\\n' >/tmp/s; chmod +x /tmp/s; /tmp/s"
        assert await say(stream, run) == "ran\n"
        await stream.close()

    async def test_memory_processes_and_core_files_are_limited(self, backend, started):
        stream = await backend.attach(await started())
        hog = "python3 -c 'x = b\"1\" * (400 << 20)' 2>/dev/null; echo $?"
        assert await say(stream, hog) == "137\n"
        bomb = (
            "python3 -c '\nimport subprocess as s\nn = 0\ntry:\n"
            '    while n < 100: s.Popen(["sleep", "30"]); n += 1\n'
            "except OSError: print(n)\n'"
        )
        assert 20 < int(await say(stream, bomb)) < SMALL.pids
        assert await say(stream, "ulimit -c") == "0\n"
        await stream.close()

    async def test_low_ports_and_names_are_the_supervisors(self, backend, started):
        """It listens on 53, 80 and 443 without any right."""
        stream = await backend.attach(await started())
        bind = "python3 -c 'import socket; print(socket.create_server((\"127.0.0.1\", 53)) and 1)'"
        assert await say(stream, bind) == "1\n"
        assert await say(stream, "grep nameserver /etc/resolv.conf") == "nameserver 127.0.0.1\n"
        name = "python3 -c 'import socket; print(socket.gethostbyname(\"sandbox\"))'"
        assert await say(stream, name) == "127.0.0.1\n"
        await stream.close()

    @pytest.fixture
    def shared(self, tmp_path: Path) -> Path:
        (tmp_path / "seen").write_text("by the sandbox")
        tmp_path.chmod(0o777)
        return tmp_path

    async def test_folders_of_the_host_are_mounted(self, backend, started, shared):
        mount = Mount(source=shared, target="/workspace")
        stream = await backend.attach(await started(mounts=[mount]))
        assert await say(stream, "cat /workspace/seen; echo back >/workspace/new") == (
            "by the sandbox"
        )
        assert (shared / "new").read_text() == "back\n"
        await stream.close()

    async def test_no_such_image_says_how_to_make_it(self, started):
        with pytest.raises(BackendDown, match=r"'oi/none:1'.*scripts/sandbox-image"):
            await started(image="oi/none:1")

    async def test_no_such_runtime_says_so(self, started):
        with pytest.raises(BackendDown, match="no runtime 'oi-none'"):
            await started(runtime="oi-none")

    async def test_a_name_is_given_once(self, backend, started, spec):
        ref = await started()
        with pytest.raises(SandboxError):
            await started()
        assert [each.ref for each in await backend.list(spec.labels)] == [ref]

    async def test_what_does_not_start_leaves_nothing(self, backend, started, spec, tmp_path):
        with pytest.raises(SandboxError):
            await started(mounts=[Mount(source=tmp_path / "absent", target="/workspace")])
        with pytest.raises(Gone):
            await backend.attach("0123456789ab")
        assert list(await backend.list(spec.labels)) == []
