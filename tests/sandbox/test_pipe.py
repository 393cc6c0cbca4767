"""Commands over the pipe: the real supervisor as a plain process, the line to it cut at will."""
# ruff: noqa: ASYNC240 - a test looks into /proc

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import struct
import sys
import time
from pathlib import Path

import pytest

from openinteractions.errors import TooMany
from openinteractions.sandbox import pipe as pipes
from openinteractions.sandbox.frames import MAGIC
from openinteractions.sandbox.pipe import Omitted, Pipe
from openinteractions.sandbox.port import Exit, Gone, Output, SandboxError
from tests.sandbox.pipes import (
    collect,
    command,
    first_output,
    host,
    opened,
    refuse,
    run,
    shell,
    supervisor,
)

HUGE = b"1" + b"0" * 400
DEEP = b"[" * 900 + b"]" * 900


def alive(needle: str) -> list[int]:
    """Processes with this text in their command line."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and needle.encode() in (folder / "cmdline").read_bytes():
                state = (folder / "stat").read_text().rpartition(") ")[2][0]
                found += [int(folder.name)] if state not in "ZX" else []
    return found


async def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        await asyncio.sleep(0.01)


async def test_a_command_gives_both_streams_and_its_result():
    async with supervisor() as pipe:
        out, err, end = await run(pipe, shell("echo out; echo err >&2; exit 3"))
        assert (out, err) == (b"out\n", b"err\n")
        assert (end.outcome, end.code, end.signal) == ("exited", 3, None)
        assert not end.timed_out
        assert not end.truncated
        assert end.output_bytes == 8
        assert 0 < end.wall_s < 10
        _, _, end = await run(pipe, shell("kill -TERM $$"))
        assert (end.outcome, end.code, end.signal) == ("exited", None, 15)


async def test_folder_environment_and_arguments_arrive_as_given(tmp_path):
    async with supervisor() as pipe:
        given = command(
            [
                sys.executable,
                "-c",
                "import os,sys; print(os.getcwd(), os.environ['A'], sys.argv[1:])",
                "ä b",
                "",
                "$x",
            ],
            cwd=str(tmp_path),
            env={"A": "1 2"},
        )
        out, err, end = await run(pipe, given)
        assert end.code == 0, err
        assert out.decode() == f"{tmp_path} 1 2 ['ä b', '', '$x']\n"


@pytest.mark.parametrize(
    ("argv", "fields", "code", "text"),
    [
        (["no-such-program"], {}, 127, b"no-such-program: No such file or directory\n"),
        (["/etc/passwd"], {}, 126, b"/etc/passwd: Permission denied\n"),
        (["true"], {"cwd": "/nowhere"}, 127, b"/nowhere: No such file or directory\n"),
        (["true", "a\0b"], {}, 126, b"true: embedded null byte\n"),
        (["true", "x" * 3_000_000], {}, 126, b"true: Argument list too long\n"),
    ],
)
async def test_what_cannot_be_started_ends_as_a_shell_would_say(argv, fields, code, text):
    async with supervisor() as pipe:
        _, err, end = await run(pipe, command(argv, **fields))
        assert (end.code, err) == (code, text)


async def test_an_id_is_started_once_ever(tmp_path):
    async with supervisor() as pipe:
        given = shell("echo x >> log; cat log", cwd=str(tmp_path))
        starts = await asyncio.gather(*(pipe.start(given) for _ in range(5)))
        assert sorted(starts) == [False] * 4 + [True]
        assert (await collect(pipe, given.id))[0] == b"x\n"
        assert not await pipe.start(given)
        await pipe.forget(given.id)
        assert not await pipe.start(given)
        with pytest.raises(Gone):
            await collect(pipe, given.id)
        assert (tmp_path / "log").read_text() == "x\n"


async def test_unknown_ids_are_gone():
    async with supervisor() as pipe:
        for work in (
            collect(pipe, "no"),
            pipe.write_stdin("no", b"x" * 500_000),
            pipe.end_stdin("no"),
            pipe.signal("no", 15),
            pipe.kill("no"),
            pipe.resize("no", 1, 1),
        ):
            with pytest.raises(Gone):
                await work
        await pipe.forget("no")


async def test_requests_that_make_no_sense_are_refused():
    async with supervisor() as pipe:
        with pytest.raises(SandboxError):
            await pipe.start(command([]))
        with pytest.raises(SandboxError):
            await pipe.start(command(["1"], session="s", pty=(5, 5)))
        given = shell("sleep 60")
        await pipe.start(given)
        with pytest.raises(SandboxError):
            await pipe.signal(given.id, 4000)
        with pytest.raises(SandboxError):
            await collect(pipe, given.id, 1)
        with pytest.raises(TooMany):
            await pipe.forget(given.id)
        with pytest.raises(SandboxError):
            await pipe._ask("nonsense")


async def test_input_is_taken_in_order_and_ends():
    async with supervisor() as pipe:
        given = command(["cat"], has_stdin=True)
        await pipe.start(given)
        data = os.urandom(400_000)
        writing = asyncio.ensure_future(_write_all(pipe, given.id, data))
        out, _, end = await collect(pipe, given.id)
        await writing
        assert out == data
        assert end.code == 0
        with pytest.raises(Gone, match="input"):
            await pipe.write_stdin(given.id, b"late")


async def _write_all(pipe: Pipe, name: str, data: bytes) -> None:
    for at in range(0, len(data), 150_000):
        await pipe.write_stdin(name, data[at : at + 150_000])
    await pipe.end_stdin(name)


async def test_input_that_nobody_reads_waits_and_ends_with_the_command():
    async with supervisor() as pipe:
        given = command(["sleep", "60"], has_stdin=True)
        await pipe.start(given)
        writing = asyncio.ensure_future(pipe.write_stdin(given.id, bytes(1_000_000)))
        await asyncio.sleep(0.2)
        assert not writing.done()
        assert (await pipe.ping())["running"] == 1
        await pipe.kill(given.id)
        with pytest.raises(Gone):
            await asyncio.wait_for(writing, 5)


async def test_without_input_there_is_none():
    async with supervisor() as pipe:
        out, _, end = await run(pipe, command(["cat"]))
        assert (out, end.code) == (b"", 0)


async def test_a_terminal_has_a_size_an_input_and_an_end():
    async with supervisor() as pipe:
        given = shell(
            "tty >/dev/null && stty size; read line; echo got $line; stty size; cat", pty=(30, 100)
        )
        await pipe.start(given)
        assert (await first_output(pipe, given.id)).startswith(b"30 100")
        await pipe.resize(given.id, 40, 120)
        await pipe.write_stdin(given.id, b"hello\n")
        await asyncio.sleep(0.3)
        await pipe.end_stdin(given.id)
        out, err, end = await asyncio.wait_for(collect(pipe, given.id), 10)
        assert b"got hello\r\n40 120\r\n" in out
        assert (err, end.code) == (b"", 0)


async def test_control_c_in_a_terminal_interrupts():
    async with supervisor() as pipe:
        given = command(["sleep", "60"], pty=(24, 80))
        await pipe.start(given)
        await asyncio.sleep(0.2)
        await pipe.write_stdin(given.id, b"\x03")
        _, _, end = await asyncio.wait_for(collect(pipe, given.id), 10)
        assert end.signal == 2


async def test_a_signal_reaches_the_group():
    async with supervisor() as pipe:
        given = shell("trap 'echo caught; exit 4' USR1; echo ready; while :; do sleep 0.05; done")
        await pipe.start(given)
        assert (await first_output(pipe, given.id)).startswith(b"ready")
        await pipe.signal(given.id, 10)
        out, _, end = await asyncio.wait_for(collect(pipe, given.id), 10)
        assert (out, end.code, end.outcome) == (b"ready\ncaught\n", 4, "exited")
        await pipe.signal(given.id, 9)


ESCAPE = """
import os, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
argv = [sys.executable, "-c", "import time; time.sleep(600)", "{tag}"]
os.execvpe(argv[0], argv, {{}} if {cleared} else os.environ)
"""


@pytest.mark.parametrize("cleared", [False, True])
async def test_a_time_out_kills_the_whole_tree(cleared):
    """Even those who left their session, lost their parent and cleared their environment."""
    tag = f"escaped-{os.getpid()}-{cleared}"
    async with supervisor() as pipe:
        script = ESCAPE.format(cleared=cleared, tag=tag)
        argv = ["bash", "-c", '"$0" -c "$1"; sleep 600', sys.executable, script]
        given = command(argv, timeout_s=1.0)
        await pipe.start(given)
        await until(lambda: len(alive(tag)) >= 1)
        _, _, end = await asyncio.wait_for(collect(pipe, given.id), 20)
        assert (end.outcome, end.timed_out, end.signal) == ("killed", True, 9)
        assert alive(tag) == []
        assert 1.0 <= end.wall_s < 5


async def test_a_server_left_in_the_background_lives_on_until_it_is_killed():
    tag = f"9{os.getpid()}"
    async with supervisor() as pipe:
        given = shell(f"(while :; do echo noise; sleep 0.01; done; : {tag}) & echo $!; sleep 0.05")
        out, _, end = await run(pipe, given)
        assert (end.outcome, end.code) == ("exited", 0)
        assert end.wall_s < 2
        pid = int(out.split()[0])
        await asyncio.sleep(0.5)
        os.kill(pid, 0)
        _, _, again = await collect(pipe, given.id)
        assert again == end
        await pipe.kill(given.id)
        await until(lambda: not _is_running(pid))
        assert (await collect(pipe, given.id))[2] == end


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_much_output_is_bounded_and_the_mark_tells_how_much_is_missing():
    async with supervisor() as pipe:
        given = shell("seq 1 3000000; echo last", max_output_bytes=100_000)
        await pipe.start(given)
        whole = "".join(f"{n}\n" for n in range(1, 3_000_001)).encode() + b"last\n"
        live = [item async for item in pipe.follow(given.id)]
        end = live[-1]
        assert isinstance(end, Exit)
        assert end.truncated
        assert end.output_bytes == len(whole)
        _assert_follows(live, whole, 0)
        kept = [item async for item in pipe.follow(given.id)]
        _assert_follows(kept, whole, 0)
        marks = [item for item in kept if isinstance(item, Omitted)]
        assert [item.byte_count for item in marks] == [len(whole) - 100_000]
        assert marks[0].data == b"\n[... %d bytes of output omitted ...]\n" % (len(whole) - 100_000)
        assert sum(len(item.data) for item in kept if isinstance(item, Output)) < 100_100


def _assert_follows(items: list[Output | Exit], whole: bytes, offset: int) -> None:
    for item in items:
        if isinstance(item, Omitted):
            offset += item.byte_count
        elif isinstance(item, Output):
            assert item.data == whole[offset : offset + len(item.data)]
            offset += len(item.data)
    assert offset == len(whole)


async def test_a_flood_of_200_mb_neither_grows_nor_hinders():
    async with supervisor() as pipe:
        given = shell("head -c 200000000 /dev/zero", max_output_bytes=1 << 20)
        await pipe.start(given)
        following = asyncio.ensure_future(collect(pipe, given.id))
        while not following.done():
            state = await asyncio.wait_for(pipe.ping(), 30)
            await asyncio.sleep(0.01)
        out, _, end = following.result()
        assert end.output_bytes == 200_000_000
        assert len(out) < 10_000_000
        status = Path(f"/proc/{state['pid']}/status").read_text()
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
        assert peak < 100_000


async def test_a_follower_resumes_at_any_offset():
    async with supervisor() as pipe:
        given = shell("for i in $(seq 200); do echo out $i; echo err $i >&2; done")
        await run(pipe, given)
        pieces: list[Output] = [i async for i in pipe.follow(given.id) if isinstance(i, Output)]
        marked = b"".join(bytes([p.stream]) * len(p.data) for p in pieces)
        whole = b"".join(p.data for p in pieces)
        for offset in [0, 1, 7, 500, len(whole) - 1, len(whole)]:
            rest = [item async for item in pipe.follow(given.id, offset)]
            assert isinstance(rest[-1], Exit)
            outputs = [item for item in rest if isinstance(item, Output)]
            assert b"".join(item.data for item in outputs) == whole[offset:]
            assert b"".join(bytes([i.stream]) * len(i.data) for i in outputs) == marked[offset:]


async def test_followers_that_are_slow_or_break_off_do_not_disturb():
    async with supervisor() as pipe:
        given = shell("for i in $(seq 3); do head -c 300000 /dev/zero; sleep 0.1; done; echo end")
        await pipe.start(given)
        stuck = pipe.follow(given.id)
        assert await anext(stuck)
        broken = pipe.follow(given.id)
        assert await anext(broken)
        await broken.aclose()
        out, _, end = await asyncio.wait_for(collect(pipe, given.id), 10)
        assert (len(out), end.code) == (900_004, 0)
        await stuck.aclose()
        await asyncio.sleep(0.05)
        assert (await pipe.ping())["streams"] == 1


async def test_a_session_keeps_its_state_and_shows_the_last_expression():
    async with supervisor() as pipe:

        async def cell(code, **fields):
            out, err, end = await run(pipe, command([code], session="main", **fields))
            return out.decode(), err.decode(), end

        out, err, end = await cell("import sys\nx = 20\nprint('a', file=sys.stderr)\nx + 1")
        assert (out, err) == ("21\n", "a\n")
        assert (end.code, end.is_fresh_session) == (0, True)
        out, _, end = await cell("x * 2; None")
        assert (out, end.is_fresh_session) == ("", False)
        assert (await cell("_"))[0] == "21\n"
        out, err, end = await cell("def f():\n    return 1 / 0\nf()")
        assert end.code == 1
        assert "line 2, in f\n    return 1 / 0" in err
        assert "notebook" not in err
        assert (await cell("def g(:"))[1].rstrip().splitlines()[-1].startswith("SyntaxError")
        assert (await cell("import asyncio\nawait asyncio.sleep(0.01, 'slept')"))[0] == "'slept'\n"
        assert (await cell("import os\nos.environ['K']", env={"K": "v"}))[0] == "'v'\n"
        assert (await cell("import subprocess\nsubprocess.run(['echo', 'child']).returncode"))[
            0
        ] == "child\n0\n"
        assert (await cell("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A())))"))[
            0
        ] == "<class '__main__.A'>\n"
        assert (await cell("input()"))[1].rstrip().endswith("EOFError: EOF when reading a line")
        out, _, end = await cell("raise SystemExit(7)")
        assert end.code == 7
        _, err, end = await cell("x")
        assert "NameError" in err
        assert end.is_fresh_session


async def test_sessions_are_apart_and_cells_of_one_wait_for_each_other():
    async with supervisor() as pipe:
        await run(pipe, command(["x = 1"], session="a"))
        _, err, end = await run(pipe, command(["x"], session="b"))
        assert end.is_fresh_session
        assert b"NameError" in err
        cells = [
            command(["x += 1; import time; time.sleep(0.05); x"], session="a") for _ in range(4)
        ]
        outs = await asyncio.gather(*(run(pipe, one) for one in cells))
        assert sorted(out for out, _, _ in outs) == [b"2\n", b"3\n", b"4\n", b"5\n"]


@pytest.mark.parametrize("how", ["timeout", "kill", "signal", "death"])
async def test_a_session_that_is_stopped_is_fresh_next_time(how):
    async with supervisor() as pipe:
        await run(pipe, command(["x = 1"], session="s"))
        code = (
            "import os; os._exit(9)"
            if how == "death"
            else "import time\nprint('on')\ntime.sleep(600)"
        )
        given = command([code], session="s", timeout_s=0.5 if how == "timeout" else None)
        await pipe.start(given)
        if how == "kill":
            await asyncio.sleep(0.2)
            await pipe.kill(given.id)
        elif how == "signal":
            await asyncio.sleep(0.2)
            await pipe.signal(given.id, 2)
        _, err, end = await asyncio.wait_for(collect(pipe, given.id), 10)
        assert not end.is_fresh_session
        expected = {
            "timeout": ("killed", None, 9),
            "kill": ("killed", None, 9),
            "signal": ("exited", 130, None),
            "death": ("exited", 9, None),
        }[how]
        assert (end.outcome, end.code, end.signal) == expected
        assert end.timed_out == (how == "timeout")
        assert (b"KeyboardInterrupt" in err) == (how == "signal")
        assert end.has_ended_session
        out, _, end = await run(pipe, command(["'x' in globals()"], session="s"))
        assert (out, end.is_fresh_session) == (b"False\n", True)
        assert not end.has_ended_session


FORGE = """
import os, socket
for name in os.listdir("/proc/self/fd"):
    try:
        channel = socket.socket(fileno=int(name))
    except OSError:
        continue
    answer = {answer!r}
    channel.sendall(len(answer).to_bytes(4, "big") + answer)
    channel.detach()
"""


@pytest.mark.parametrize(
    "answer",
    [
        b'{"code": 0, "max_rss_bytes": NaN}',
        b'{"code": 0, "cpu_s": -1e999, "max_rss_bytes": 1e999}',
        b'{"code": 0, "max_rss_bytes": %b}' % HUGE,
        b'{"code": %b, "cpu_s": %b}' % (HUGE, HUGE),
        b"[" * 60_000,
        b"\xff",
        b"{}",
    ],
)
async def test_code_that_answers_for_its_interpreter_harms_only_itself(answer):
    async with supervisor() as pipe:
        forge = command([FORGE.format(answer=answer)], session="s", timeout_s=5)
        assert await pipe.start(forge)
        _, _, end = await asyncio.wait_for(collect(pipe, forge.id), 20)
        assert end.outcome in {"exited", "killed"}
        assert end.cpu_s < 1
        assert end.max_rss_bytes == 0
        out, _, end = await run(pipe, command(["6 * 7"], session="t"))
        assert (out, end.code) == (b"42\n", 0)


async def test_a_cell_that_waits_can_be_killed_before_it_runs(tmp_path):
    async with supervisor() as pipe:
        first = command(["import time; time.sleep(0.5)"], session="s")
        second = command([f"open({str(tmp_path / 'ran')!r}, 'w')"], session="s")
        await pipe.start(first)
        await pipe.start(second)
        await pipe.kill(second.id)
        assert (await collect(pipe, first.id))[2].code == 0
        assert (await collect(pipe, second.id))[2].outcome == "killed"
        assert not (tmp_path / "ran").exists()


async def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


async def test_connections_leave_through_the_pipe():
    seen: list[str] = []

    async def answer(kind, connection):
        seen.append(kind)
        asked = await connection.read()
        await connection.write(kind.encode() + b":" + asked)
        await connection.end()
        assert await connection.read() == b""

    async with supervisor(on_connect=answer) as pipe:
        ports = {kind: await free_port() for kind in ("proxy", "https", "http")}
        assert await pipe.configure(**ports, dns=None) == []
        assert await pipe.configure(**ports, dns=None) == []
        for kind, port in ports.items():
            script = f"exec 3<>/dev/tcp/127.0.0.1/{port}; printf hi >&3; cat <&3"
            out, err, _ = await run(pipe, shell(script))
            assert (out, err) == (f"{kind}:hi".encode(), b"")
        assert seen == ["proxy", "https", "http"]
        assert (await pipe.ping())["listening"] == ports


async def test_a_port_that_is_taken_is_told():
    async with supervisor() as pipe:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            (problem,) = await pipe.configure(proxy=port, https=None, http=None, dns=None)
            assert "proxy" in problem
            assert "in use" in problem


async def test_names_are_answered_over_udp_and_tcp():
    asked = struct.pack(">6H", 5, 256, 1, 0, 0, 0) + b"\x03foo\x04test\0" + struct.pack(">HH", 1, 1)
    async with supervisor() as pipe:
        port = await free_port()
        assert await pipe.configure(proxy=None, https=None, http=None, dns=port) == []
        with socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.setblocking(False)
            await asyncio.get_running_loop().sock_connect(udp, ("127.0.0.1", port))
            await asyncio.get_running_loop().sock_sendall(udp, asked)
            by_udp = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(udp, 512), 5)
        assert by_udp.endswith(b"\x7f\0\0\1")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((len(asked).to_bytes(2, "big") + asked) * 2)
        for _ in range(2):
            size = int.from_bytes(await reader.readexactly(2), "big")
            assert await reader.readexactly(size) == by_udp
        writer.close()
        await writer.wait_closed()


async def test_a_port_of_the_sandbox_is_reached_from_outside():
    async with supervisor() as pipe:
        port = await free_port()
        server = (
            "import socket\n"
            f"s = socket.create_server(('127.0.0.1', {port}))\n"
            "print('up', flush=True)\n"
            "while True:\n"
            "    c, _ = s.accept()\n"
            "    while d := c.recv(65536): c.sendall(d)\n"
            "    c.close()\n"
        )
        with pytest.raises(Gone, match=str(port)):
            await pipe.dial(port)
        given = command([sys.executable, "-u", "-c", server])
        await pipe.start(given)
        assert (await first_output(pipe, given.id)).startswith(b"up")
        connection = await pipe.dial(port)
        data = os.urandom(2_000_000)
        sending = asyncio.ensure_future(connection.write(data))
        back = b""
        while len(back) < len(data):
            back += await asyncio.wait_for(connection.read(), 10)
        await sending
        assert back == data
        await connection.end()
        assert await connection.read() == b""
        await connection.close()
        again = await pipe.dial(port)
        await again.close()


async def test_a_new_host_finds_its_commands_again():
    async with host() as running:
        async with opened(running) as first:
            long = shell("for i in $(seq 40); do echo $i; sleep 0.02; done")
            await first.start(long)
            follower = first.follow(long.id)
            item = await anext(follower)
            assert isinstance(item, Output)
            seen = len(item.data)
            await first.close()
            with pytest.raises(ConnectionError):
                async for _ in follower:
                    pass
        async with opened(running, is_fresh=False) as second:
            assert [one["id"] for one in await second.list()] == [long.id]
            assert not await second.start(long)
            out, _, end = await collect(second, long.id, seen)
            whole = "".join(f"{n}\n" for n in range(1, 41)).encode()
            assert item.data + out == whole
            assert end.code == 0
            await second.shutdown()
            await asyncio.wait_for(running.process.wait(), 10)


@pytest.mark.parametrize("seed", range(12))
async def test_the_line_may_be_cut_anywhere(seed):
    """Each host is cut off after any number of bytes in or out; the last one learns everything."""
    chance = random.Random(seed)
    whole = "".join(f"line {n}\n" for n in range(1, 20_001)).encode()
    given = shell("for i in $(seq 20000); do echo line $i; done", max_output_bytes=1 << 22)
    got: list[bytes] = []
    async with host() as running:
        async with opened(running) as pipe:
            await pipe.start(given)
        for _ in range(25):
            if chance.random() < 0.7:
                cut = {"inbound": chance.randint(1, 250_000)}
            else:
                cut = {"outbound": chance.randint(1, 100_000)}
            with contextlib.suppress(SandboxError, ConnectionError):
                async with attached(running, **cut) as pipe:
                    await read_on(pipe, given.id, got)
        async with attached(running) as pipe:
            end = await asyncio.wait_for(read_on(pipe, given.id, got), 20)
        assert b"".join(got) == whole
        assert end.code == 0


@contextlib.asynccontextmanager
async def attached(running, **cut):
    line = running.attach(**cut)
    pipe = await Pipe.open(line, is_fresh=False, on_connect=refuse)
    try:
        yield pipe
    finally:
        await pipe.close()


async def read_on(pipe: Pipe, name: str, got: list[bytes]) -> Exit:
    async for item in pipe.follow(name, sum(map(len, got))):
        if isinstance(item, Exit):
            return item
        got.append(item.data)
    raise AssertionError("no result")


async def test_rubbish_on_the_line_is_survived():
    async with host() as running, opened(running) as pipe:
        given = shell("for i in $(seq 2000); do echo $i; done; sleep 0.3; echo end")
        await pipe.start(given)
        following = asyncio.ensure_future(collect(pipe, given.id))
        for _ in range(20):
            await asyncio.sleep(0.02)
            assert running.line is not None
            running.line.inject(os.urandom(50) + MAGIC + b"\0" * 60)
        out, _, end = await asyncio.wait_for(following, 20)
        assert out == "".join(f"{n}\n" for n in range(1, 2001)).encode() + b"end\n"
        assert end.code == 0
        await pipe.ping()


async def test_what_commands_print_never_reaches_the_line():
    """Standard streams of the supervisor are not those of what it starts."""
    async with supervisor() as pipe:
        state = await pipe.ping()
        script = (
            f"ls -l /proc/self/fd; readlink /proc/{state['pid']}/fd/0 /proc/{state['pid']}/fd/1"
        )
        out, _, _ = await run(pipe, shell(script))
        assert out.count(b"/dev/null") >= 2
        assert b"socket:" not in out


async def test_thousands_of_small_commands_leave_nothing_behind():
    async with supervisor() as pipe:
        state = await pipe.ping()
        folder = Path(f"/proc/{state['pid']}")
        for turn in range(25):
            given = [command(["true"]) for _ in range(80)]
            await asyncio.gather(*(pipe.start(one) for one in given))
            ends = await asyncio.gather(*(collect(pipe, one.id) for one in given))
            assert {end.code for _, _, end in ends} == {0}
            await asyncio.gather(*(pipe.forget(one.id) for one in given))
            if turn == 4:
                early = _memory(folder)
        state = await pipe.ping()
        assert state["kept"] == state["running"] == 0
        assert state["problems"] == []
        assert len(list((folder / "fd").iterdir())) < 20
        assert _memory(folder) - early < 8_000
        children = (folder / f"task/{state['pid']}/children").read_text()
        assert children == ""


def _memory(folder: Path) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+) kB", (folder / "status").read_text())[0])


async def test_too_many_at_once_are_refused():
    async with supervisor() as pipe:
        running = [shell("sleep 600") for _ in range(256)]
        await asyncio.gather(*(pipe.start(one) for one in running))
        one_more = shell("true")
        with pytest.raises(TooMany):
            await pipe.start(one_more)
        assert len(await pipe.list()) == 256
        await pipe.kill(running[0].id)
        assert (await run(pipe, one_more))[2].code == 0


async def test_losing_the_line_is_told():
    async with host() as running, opened(running) as pipe:
        given = shell("sleep 600")
        await pipe.start(given)
        following = asyncio.ensure_future(collect(pipe, given.id))
        await asyncio.sleep(0.05)
        running.process.kill()
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(following, 5)
        assert "ended" in await asyncio.wait_for(pipe.wait_lost(), 5)
        with pytest.raises(ConnectionError):
            await pipe.ping()


class Silent:
    """A channel whose other side never says a word."""

    async def read(self, limit=65536):
        await asyncio.Event().wait()

    async def write(self, data):
        pass

    async def end(self):
        pass

    async def close(self):
        pass


async def test_a_supervisor_that_never_answers_is_an_error(monkeypatch):
    monkeypatch.setattr(pipes.Mux.start, "__kwdefaults__", {"is_resync": False, "timeout_s": 0.2})
    with pytest.raises(SandboxError, match="does not answer"):
        await Pipe.open(Silent(), is_fresh=True, on_connect=refuse)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"no json",
        b"[" * 50_000,
    ],
)
def test_results_that_are_no_object_are_refused(content):
    with pytest.raises(SandboxError):
        pipes._item(3, content)


@pytest.mark.parametrize("amount", [HUGE, b"1e999", b"-1e999", b"NaN", b"-" + HUGE, b"true", DEEP])
def test_amounts_that_cannot_be_are_none(amount):
    fields = b'{"cpu_s": %b, "wall_s": %b, "max_rss_bytes": %b}' % (amount, amount, amount)
    assert pipes._item(3, fields) == Exit(outcome="exited")
    listed = pipes._listed(json.loads(b'{"id": %b, "age_s": %b}' % (amount, amount)))
    assert (listed["id"], listed["age_s"]) == ("", 0.0)


@pytest.mark.parametrize("code", [b"[]", b"{}", b"1", b"true", HUGE, DEEP])
def test_refusals_that_make_no_sense_are_the_sandboxs_fault(code):
    with pytest.raises(SandboxError):
        pipes._item(5, b'{"error": %b, "message": %b}' % (code, code))
    with pytest.raises(Gone):
        pipes._item(5, b'{"error": "unknown", "message": %b}' % code)


def test_results_are_checked_field_by_field():
    lies = {
        "outcome": "unknown",
        "code": 99999,
        "signal": "9",
        "timed_out": 1,
        "cpu_s": float("inf"),
        "wall_s": -1,
        "max_rss_bytes": True,
        "output_bytes": 1 << 80,
        "more": {},
    }
    assert pipes._item(3, json.dumps(lies).encode()) == Exit(outcome="exited")
    with pytest.raises(SandboxError):
        pipes._item(9, b"{}")
    with pytest.raises(Gone):
        pipes._item(5, b'{"error": "unknown", "message": "x"}')
