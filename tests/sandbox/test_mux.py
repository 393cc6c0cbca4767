"""The multiplexer: streams that do not disturb each other, over a line that may break anywhere."""

import asyncio
import json
import os
import random
import socket
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openinteractions.sandbox import mux as muxes
from openinteractions.sandbox.frames import MAGIC, MAX_PAYLOAD, PADDING, Decoder, Encoder
from openinteractions.sandbox.mux import DATA, HELLO, MAX_STREAMS, OPEN, WELCOME, WINDOW, Mux


class End:
    """One end of a socket pair, with an ear on what is written and read."""

    def __init__(self, ours: socket.socket) -> None:
        ours.setblocking(False)
        self.socket = ours
        self.mangle = lambda data: data

    async def read(self, limit):
        return await asyncio.get_running_loop().sock_recv(self.socket, limit)

    async def write(self, data):
        await asyncio.get_running_loop().sock_sendall(self.socket, self.mangle(data))


async def serve(stream):
    """Kinds of streams that tests ask for."""
    if stream.kind == "echo":
        while piece := await stream.read():
            await stream.write(piece)
        await stream.end()
    elif stream.kind == "answer":
        question = await stream.read_all(1 << 20)
        await stream.write(question[::-1])
        await stream.end()
    elif stream.kind == "flood":
        while True:
            await stream.write(bytes(MAX_PAYLOAD))
    elif stream.kind == "idle":
        await asyncio.Event().wait()
    elif stream.kind == "fail":
        raise ConnectionResetError("on purpose")


@asynccontextmanager
async def pair(on_open=serve, host_on_open=serve):
    left, right = socket.socketpair()
    with left, right:
        near, far = End(left), End(right)
        host = Mux(near.read, near.write, True, host_on_open)
        guest = Mux(far.read, far.write, False, on_open)
        await guest.start()
        await host.start()
        try:
            yield host, guest, near, far
        finally:
            await host.close()
            await guest.close()


async def ask(mux, data, kind="answer"):
    stream = await mux.open(kind)
    await stream.write(data)
    await stream.end()
    answer = await asyncio.wait_for(stream.read_all(1 << 24), 10)
    await stream.close()
    return answer


frames = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=8
)
rubbish = st.one_of(st.binary(max_size=60), st.just(MAGIC), st.just(MAGIC + b"\0" * 30))


@given(frames, st.lists(rubbish, min_size=8, max_size=8), st.integers(0, 99))
def test_every_frame_is_found_among_rubbish_however_it_is_cut(sent, between, seed):
    chance = random.Random(seed)
    encoder, decoder = Encoder(), Decoder()
    line = b""
    for (kind, stream, payload), dirt in zip(sent, between, strict=False):
        line += dirt + encoder.pack(kind, stream, payload) + payload
    line += PADDING
    found = []
    while line:
        size = chance.randint(1, 400) if len(line) < 20_000 else len(line) - 19_999
        found += decoder.feed(line[:size])
        line = line[size:]
    assert [(one.kind, one.stream, one.payload) for one in found] == sent
    assert [one.sequence for one in found] == list(range(len(sent)))


def test_a_flipped_bit_costs_only_its_frame():
    encoder, decoder = Encoder(), Decoder()
    line = b"".join(encoder.pack(DATA, 1, bytes([n] * 50)) + bytes([n] * 50) for n in range(5))
    broken = bytearray(line)
    broken[2 * 71 + 40] ^= 4
    found = decoder.feed(bytes(broken))
    assert [one.sequence for one in found] == [0, 1, 3, 4]
    assert decoder.bad == 1


def test_a_decoder_holds_back_less_than_a_frame():
    decoder = Decoder()
    for _ in range(50):
        decoder.feed(os.urandom(100_000))
        decoder.feed(MAGIC + b"\xff" * 100)
    assert len(decoder._rest) <= len(PADDING)


async def test_what_is_written_comes_back():
    async with pair() as (host, guest, _, _):
        data = os.urandom(3_000_000)
        assert await ask(host, b"hello") == b"olleh"
        stream = await host.open("echo", {"a": 1})
        sending = asyncio.ensure_future(stream.write(data))
        back = b""
        while len(back) < len(data):
            back += await stream.read(random.Random(len(back)).randint(1, 200_000))
        await sending
        assert back == data
        await stream.end()
        assert await stream.read() == b""
        await stream.close()
        assert await ask(guest, b"other way") == b"yaw rehto"
        await asyncio.sleep(0.05)
        assert host.stream_count == guest.stream_count == 0
        assert host._granted == guest._granted == 0


async def test_a_reader_that_is_slow_holds_up_nobody_else():
    async with pair() as (host, guest, _, _):
        floods = [await host.open("flood") for _ in range(5)]
        await asyncio.sleep(0.2)
        for _ in range(20):
            assert await ask(host, b"ab") == b"ba"
        held = sum(sum(map(len, one._chunks)) for one in floods)
        assert 0 < held <= 5 * muxes._WINDOW
        for one in floods:
            await one.close()
        await asyncio.sleep(0.1)
        assert host.stream_count == guest.stream_count == 0


async def test_streams_get_their_turns():
    async with pair() as (host, _, _, _):
        floods = [await host.open("flood") for _ in range(4)]
        counts = [0] * len(floods)

        async def count(index):
            while True:
                counts[index] += len(await floods[index].read(1 << 20))

        tasks = [asyncio.ensure_future(count(index)) for index in range(4)]
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        assert min(counts) > 1 << 20
        assert max(counts) < 3 * min(counts)


async def test_closing_after_the_end_loses_nothing():
    async def say(stream):
        await stream.write(bytes(100_000))
        await stream.end()

    async with pair(say) as (host, _, _, _):
        for _ in range(50):
            stream = await host.open("say")
            assert len(await stream.read_all(1 << 20)) == 100_000
            await stream.close()


async def test_a_reset_reaches_the_other_side_with_its_reason():
    async with pair() as (host, guest, _, _):
        stream = await host.open("fail")
        with pytest.raises(ConnectionResetError, match="broken off"):
            await stream.read()
        with pytest.raises(ConnectionResetError):
            await stream.write(b"x")
        await stream.close()
        other = await host.open("idle")
        await asyncio.sleep(0.05)
        (far,) = guest._streams.values()
        other.reset("enough")
        with pytest.raises(ConnectionResetError, match="enough"):
            await far.read()


async def test_after_the_end_nothing_can_be_written():
    async with pair() as (host, _, _, _):
        stream = await host.open("idle")
        await stream.end()
        with pytest.raises(BrokenPipeError):
            await stream.write(b"x")
        await stream.close()


async def test_rubbish_between_frames_harms_nothing():
    async with pair() as (host, _, near, far):
        for end in (near, far):
            end.mangle = lambda data: os.urandom(40) + data + MAGIC + b"\xff" * 40
        for _ in range(30):
            assert await ask(host, b"abc") == b"cba"
        assert not host._resyncs


@pytest.mark.parametrize("is_near", [True, False])
async def test_a_lost_frame_resets_all_streams_and_the_pipe_lives_on(is_near):
    async with pair() as (host, _, near, far):
        idle = await host.open("echo")
        await asyncio.sleep(0.05)
        end = near if is_near else far
        keep, end.mangle = end.mangle, lambda data: b""
        lost = await host.open("answer")
        await lost.write(b"x")
        await lost.end()
        await asyncio.sleep(0.05)
        end.mangle = keep
        await idle.write(b"y")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(lost.read(), 5)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(idle.read(), 5)
        assert await ask(host, b"again") == b"niaga"


class Cut:
    """A guest that stays while hosts come and go; a host's line ends after some bytes."""

    def __init__(self) -> None:
        self.to_guest: asyncio.Queue[bytes] = asyncio.Queue()
        self.to_host: asyncio.Queue[bytes] | None = None
        self.left: int | None = None

    async def guest_read(self, limit):
        return await self.to_guest.get()

    async def guest_write(self, data):
        for at in range(0, len(data), 1000):
            if self.to_host is not None:
                self.to_host.put_nowait(data[at : at + 1000])
            await asyncio.sleep(0)

    def attach(self, left):
        self.left, self.to_host = left, asyncio.Queue()
        return Mux(self.host_read, self.host_write, True, serve)

    async def host_read(self, limit):
        assert self.to_host is not None
        return await self.to_host.get()

    async def host_write(self, data):
        if self.left is not None:
            data, self.left = data[: self.left], max(self.left - len(data), 0)
        self.to_guest.put_nowait(data)
        if self.left == 0:
            raise ConnectionResetError("cut")


@pytest.mark.parametrize("seed", range(40))
async def test_a_new_host_takes_over_wherever_the_old_one_was_cut_off(seed):
    """Both directions are cut at any byte; whatever was half sent, the next host gets through."""
    chance, cut = random.Random(seed), Cut()
    guest = Mux(cut.guest_read, cut.guest_write, False, serve)
    await guest.start()
    for left in [*(chance.randint(1, 300_000) for _ in range(3)), None]:
        host = cut.attach(left)
        try:
            await host.start(is_resync=True, timeout_s=10)
            for _ in range(4):
                data = chance.randbytes(chance.randint(0, 90_000))
                assert await ask(host, data) == data[::-1]
            flood = await host.open("flood")
            await flood.read()
        except ConnectionError:
            assert left is not None
        cut.to_host = None
        await host.close()
    await guest.close()


class Hostile:
    """A peer that speaks frames by hand."""

    def __init__(self, theirs: socket.socket) -> None:
        self.end = End(theirs)
        self.encoder, self.decoder = Encoder(), Decoder()

    async def send(self, kind, stream=0, payload=b""):
        await self.end.write(self.encoder.pack(kind, stream, payload) + payload)

    async def greet(self):
        while True:
            for frame in self.decoder.feed(await self.end.read(1 << 20)):
                if frame.kind == HELLO:
                    await self.send(WELCOME, 0, frame.payload)
                    return


@asynccontextmanager
async def besieged(on_open=serve, kinds=None):
    left, right = socket.socketpair()
    with left, right:
        near, peer = End(left), Hostile(right)
        host = Mux(near.read, near.write, True, on_open, kinds)
        starting = asyncio.ensure_future(host.start())
        await peer.greet()
        await starting
        try:
            yield host, peer
        finally:
            await host.close()


async def test_a_peer_cannot_open_endless_streams():
    async with besieged() as (host, peer):
        for number in range(2, 2 * MAX_STREAMS + 200, 2):
            await peer.send(OPEN, number, json.dumps(["idle", {}]).encode())
        await asyncio.sleep(0.1)
        assert host.stream_count == host._visitors == MAX_STREAMS


async def test_streams_of_a_kind_that_nobody_serves_are_refused_at_once():
    visited = []

    async def visit(stream):
        visited.append(stream.kind)

    async with besieged(visit, kinds={"proxy"}) as (host, peer):
        for number in range(2, 60_000, 2):
            await peer.send(OPEN, number, b'["other", {}]')
        await peer.send(OPEN, 2, b'["proxy", {}]')
        await asyncio.sleep(0.1)
        assert visited == ["proxy"]
        assert len(host._control) <= muxes._MAX_CONTROL
        assert len(host._ready) <= 1
        assert not host.lost.is_set()


async def test_a_peer_that_opens_streams_and_reads_nothing_is_given_up():
    async def visit(stream):
        """Over at once."""

    async with besieged(visit) as (host, peer):
        for number in range(2, 200_000, 2):
            writing = asyncio.ensure_future(peer.send(OPEN, number, b'["proxy", {}]'))
            await asyncio.wait([writing], timeout=0.5)
            writing.cancel()
            if host.lost.is_set():
                break
        assert "does not read" in host.why
        assert not host._ready


@pytest.mark.parametrize("is_reader", [True, False])
async def test_a_reader_or_writer_that_breaks_loses_the_pipe(is_reader, monkeypatch):
    def broken(*_):
        raise OverflowError("on purpose")

    async with pair() as (host, _, _, _):
        stream = await host.open("idle")
        reading = asyncio.ensure_future(stream.read())
        monkeypatch.setattr(host, "_receive" if is_reader else "_batch", broken)
        with pytest.raises(ConnectionError):
            await ask(host, b"x")
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reading, 5)
        assert "on purpose" in host.why


async def test_a_peer_that_sends_without_asking_does_not_break_the_writer():
    async with besieged() as (host, peer):
        await peer.send(OPEN, 2, b'["idle", {}]')
        await asyncio.sleep(0.05)
        (stream,) = host._streams.values()
        # As if 8 GiB had been read since it last took note.
        stream.grant = 8 << 30
        host.tell_window(stream)
        await asyncio.sleep(0.05)
        assert not host.lost.is_set()
        assert stream.grant == 0


async def test_a_peer_that_sends_more_than_allowed_is_cut_off():
    async with besieged() as (host, peer):
        await peer.send(OPEN, 2, b'["idle", {}]')
        for _ in range(3):
            await peer.send(DATA, 2, bytes(MAX_PAYLOAD))
        await asyncio.sleep(0.05)
        assert host.stream_count == 0
        assert not host.lost.is_set()


async def test_tiny_frames_do_not_cost_an_object_each():
    async with besieged() as (host, peer):
        await peer.send(OPEN, 2, b'["idle", {}]')
        line = b"".join(peer.encoder.pack(DATA, 2, b"x") + b"x" for _ in range(100_000))
        await peer.end.write(line)
        await asyncio.sleep(0.1)
        (stream,) = host._streams.values()
        assert sum(map(len, stream._chunks)) == 100_000
        assert len(stream._chunks) < 10


@pytest.mark.parametrize(
    "payload", [b"", b"1", b"[]", b'["a"]', b"[1, {}]", b'["a", []]', b"\xff", b"[" * 60_000]
)
async def test_streams_with_a_broken_header_are_refused(payload):
    async with besieged() as (host, peer):
        await peer.send(OPEN, 2, payload)
        await peer.send(OPEN, 3, b'["idle", {}]')  # a number of ours
        await peer.send(DATA, 77, b"nobody's")
        await peer.send(WINDOW, 77, b"\xff" * 8)
        await peer.send(200, 2, b"what")
        await peer.send(OPEN, 4, b'["idle", {}]')
        await asyncio.sleep(0.05)
        assert list(host._streams) == [4]
        assert not host.lost.is_set()


async def test_a_peer_that_only_sends_rubbish_is_given_up():
    async with besieged() as (host, peer):
        rubbish = os.urandom(1 << 20)
        for _ in range(200):
            writing = asyncio.ensure_future(peer.end.write(rubbish))
            await asyncio.wait([writing], timeout=0.5)
            writing.cancel()
            if host.lost.is_set():
                break
        assert "rubbish" in host.why


async def test_a_peer_that_forges_frames_is_given_up_within_a_read():
    """Each head begins inside the frame before it, and each frame's sum is wrong."""
    head = bytearray(11)
    head[: len(MAGIC)] = MAGIC
    head[6:10] = (65535).to_bytes(4, "big")
    async with besieged() as (host, peer):
        await peer.end.write(bytes(head) * 23_000)
        async with asyncio.timeout(20):
            await host.lost.wait()
        assert "rubbish" in host.why
        assert host._decoder.bad == muxes._MAX_BAD + 1


async def test_a_peer_that_keeps_losing_frames_is_given_up():
    async with besieged() as (host, peer):
        for _ in range(100):
            peer.encoder.pack(DATA, 1)  # counted, never sent
            await peer.send(DATA, 1)
            await asyncio.sleep(0.01)
            if host.lost.is_set():
                break
            await peer.greet()
            await asyncio.sleep(0.01)
        assert "missing" in host.why


async def test_everybody_learns_that_the_line_has_ended():
    async with pair() as (host, _, _, far):
        stream = await host.open("idle")
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0.01)
        far.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(reading, 5)
        await asyncio.wait_for(host.lost.wait(), 5)
        with pytest.raises(ConnectionError):
            await host.open("echo")


async def test_nobody_there_is_an_error_in_time():
    left, right = socket.socketpair()
    with left, right:
        near = End(left)
        host = Mux(near.read, near.write, True, serve)
        with pytest.raises(ConnectionError, match="does not answer"):
            await host.start(timeout_s=0.2)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.binary(max_size=5000), max_size=20), st.integers(1, 6000))
async def test_bytes_stay_in_order_whatever_the_pieces(pieces, limit):
    async with pair() as (host, _, _, _):
        stream = await host.open("echo")
        for piece in pieces:
            await stream.write(piece)
        await stream.end()
        back = b""
        while piece := await stream.read(limit):
            assert len(piece) <= limit
            back += piece
        assert back == b"".join(pieces)
        await stream.close()


async def test_a_host_gives_way_to_another_one():
    """An engine shows the guest's bytes to all that are attached."""
    left, right = socket.socketpair()
    with left, right:
        near, peer = End(left), Hostile(right)
        host = Mux(near.read, near.write, True, serve)
        starting = asyncio.ensure_future(host.start())
        await peer.greet()
        await starting
        await peer.send(WELCOME, 0, b"another!")
        await peer.send(DATA, 1, b"and its frames")
        await asyncio.wait_for(host.lost.wait(), 5)
        assert "another host" in host.why
        peer.end.socket.setblocking(False)
        await asyncio.sleep(0.05)
        with pytest.raises(BlockingIOError):
            peer.end.socket.recv(1)
        await host.close()
