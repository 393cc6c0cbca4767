"""Parts of the supervisor that need no pipe: kept output, names, the system call filter."""

import json
import platform
import socket
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openinteractions.sandbox.supervisor import seccomp, spool
from openinteractions.sandbox.supervisor.loopback import dns_answer
from openinteractions.sandbox.supervisor.spool import Spool


def replay(kept: Spool, offset: int = 0) -> list[tuple[int, int, bytes | int]]:
    """Everything from an offset on: offset, stream (0 is a gap), content."""
    found: list[tuple[int, int, bytes | int]] = []
    while (piece := kept.read(offset)) is not None:
        kind, content = piece
        found.append((offset, 0 if isinstance(content, int) else kind, content))
        offset += content if isinstance(content, int) else len(content)
    assert offset == kept.end
    return found


writes = st.lists(
    st.tuples(st.sampled_from([1, 2]), st.binary(min_size=1, max_size=300)), max_size=40
)


@given(writes, st.integers(2, 2000), st.floats(0, 1))
def test_what_is_kept_is_what_was_written_from_any_offset(written, capacity, where):
    kept = Spool(capacity)
    whole, owners = b"", b""
    for stream, data in written:
        kept.append(stream, data)
        whole += data
        owners += bytes([stream]) * len(data)
    assert kept.end == len(whole)
    start = int(where * len(whole))
    missing = 0
    for offset, stream, content in replay(kept, start):
        if isinstance(content, int):
            missing += content
            continue
        assert content == whole[offset : offset + len(content)]
        assert set(owners[offset : offset + len(content)]) == {stream}
    assert kept.is_truncated == (len(whole) > capacity)
    if len(whole) <= capacity:
        assert missing == 0
    elif start == 0:
        assert missing == len(whole) - capacity
    assert kept.held <= capacity


def test_alternating_streams_stay_bounded(monkeypatch):
    monkeypatch.setattr(spool, "_MAX_PIECES", 16)
    kept = Spool(100_000)
    for n in range(500):
        kept.append(1 + n % 2, b"%03d" % n)
    pieces = replay(kept)
    assert len(pieces) <= 34
    assert pieces[0] == (0, 1, b"000")
    assert pieces[-1] == (1497, 2, b"499")
    assert sum(stream == 0 for _, stream, _ in pieces) == 1
    assert kept.is_truncated


def test_dropped_output_is_a_gap():
    kept = Spool(1000)
    kept.append(1, b"abc")
    kept.drop()
    kept.append(1, b"de")
    assert replay(kept) == [(0, 0, 5)]
    assert kept.is_truncated
    assert kept.held == 0


def question(name: str, kind: int = 1, *, count: int = 1, flags: int = 0x0100) -> bytes:
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    return (
        struct.pack(">6H", 77, flags, count, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)
    )


def test_names_lead_to_the_loopback():
    asked = question("pypi.org")
    answer = dns_answer(asked + b"extra, such as EDNS")
    assert answer is not None
    assert struct.unpack(">6H", answer[:12]) == (77, 0x8180, 1, 1, 0, 0)
    assert answer[12:].startswith(asked[12:])
    assert answer.endswith(b"\0\4\x7f\0\0\1")


@pytest.mark.parametrize("kind", [28, 15, 16, 65, 255])
def test_other_questions_are_answered_empty(kind):
    answer = dns_answer(question("pypi.org", kind))
    assert answer is not None
    assert struct.unpack(">6H", answer[:12]) == (77, 0x8180, 1, 0, 0, 0)


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"short",
        question("a.b", count=0),
        question("a.b", count=2),
        question("a.b", flags=0x8180),
        question("a.b")[:-3],
        question("a" * 63 + ".b", flags=0)[:40],
        question(".".join(["a" * 60] * 5)),
        question("a.b")[:12] + b"\xc0\x0c" + b"\0" * 8,
    ],
)
def test_what_is_no_question_is_ignored(broken):
    assert dns_answer(broken) is None


@given(st.binary(max_size=600))
def test_any_datagram_is_survived(data):
    dns_answer(data)


def evaluate(code: list[tuple[int, int, int, int]], number: int, arch: int, argument: int) -> int:
    """Run a filter as the kernel would."""
    memory = {0: number, 4: arch, 16: argument}
    at = value = 0
    while True:
        operation, yes, no, operand = code[at]
        at += 1
        if operation == 0x20:
            value = memory[operand]
        elif operation == 0x06:
            return operand
        else:
            is_met = {
                0x15: value == operand,
                0x35: value >= operand,
                0x45: bool(value & operand),
            }[operation]
            at += yes if is_met else no


ALLOWED, ABSENT, DENIED, NO_FAMILY = 0x7FFF0000, 0x50026, 0x50001, 0x50061


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_decides_by_call_and_argument(machine):
    code = seccomp.program(machine)
    arch, socket_, clone = (
        seccomp._AUDIT[machine],
        seccomp._SOCKET[machine],
        seccomp._CLONE[machine],
    )

    def decide(number, argument=0, arch=arch):
        return evaluate(code, number, arch, argument)

    assert decide(0) == decide(63) == ALLOWED
    assert [decide(number) for number in (425, 426, 427, 435)] == [ABSENT] * 4
    assert {decide(number) for number in seccomp._DENIED[machine].values()} == {DENIED}
    assert [decide(socket_, family) for family in (0, 1, 2, 10, 16)] == [ALLOWED] * 5
    assert [decide(socket_, family) for family in (17, 31, 38, 40, 44)] == [NO_FAMILY] * 5
    assert decide(clone, 0x10000000) == decide(clone, 0x00020000) == DENIED
    assert decide(clone, 0x01200011) == decide(clone, 0x003D0F00) == ALLOWED
    assert decide(0, arch=0x40000003) == ABSENT
    if machine == "x86_64":
        assert decide(0x40000000 + 41) == ABSENT
    assert len(code) < 64 * 8
    assert all(jump < 256 for _, *jumps, _ in code for jump in jumps)


PROBE = """
import ctypes, json, os, socket, subprocess, threading
from openinteractions.sandbox.supervisor import seccomp
said = seccomp.install()
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    return ctypes.get_errno() if libc.syscall(number, *arguments) < 0 else 0
def family(number):
    try:
        socket.socket(number, socket.SOCK_DGRAM).close()
    except OSError as error:
        return error.errno
    return 0
thread = threading.Thread(target=lambda: None)
thread.start(); thread.join()
print(json.dumps({
    "said": said,
    "io_uring": call(425, 1, 0),
    "unshare": call(272 if os.uname().machine == "x86_64" else 97, 0x10000000),
    "families": [family(n) for n in (40, 38, 2, 1)],
    "child": subprocess.run(["true"]).returncode,
}))
"""


@pytest.mark.skipif(platform.machine() not in seccomp._AUDIT, reason="no filter for this processor")
def test_the_filter_holds_and_ordinary_programs_still_run():
    answer = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, check=True, timeout=30
    )
    found = json.loads(answer.stdout)
    assert found == {
        "said": "installed",
        "io_uring": 38,
        "unshare": 1,
        "families": [97, 97, 0, 0],
        "child": 0,
    }
    assert hasattr(socket, "AF_INET")
