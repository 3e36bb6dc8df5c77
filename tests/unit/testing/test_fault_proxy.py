"""The fault proxy: carries faithfully, and does exactly what it was told to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rbee.testing.fault_proxy import FaultProxy, Faults

WAIT_S = 20.0
DATA = bytes(range(256)) * 40


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """Answer every byte with itself, and an end with an end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def of(cls, proxy: FaultProxy) -> Client:
        """Connect."""
        host, _, port = proxy.url.removeprefix("http://").partition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def ask(self, data: bytes) -> bytes:
        """Send and read as much back."""
        self.writer.write(data)
        async with asyncio.timeout(WAIT_S):
            return await self.reader.readexactly(len(data))

    async def rest(self) -> bytes:
        """Read to the end."""
        async with asyncio.timeout(WAIT_S):
            return await self.reader.read()


@asynccontextmanager
async def proxied(seed: int = 1) -> AsyncIterator[tuple[FaultProxy, Client]]:
    """Give a proxy before an echo, and a client of it."""
    async with echo() as url, FaultProxy(url, seed=seed) as proxy:
        client = await Client.of(proxy)
        try:
            yield proxy, client
        finally:
            client.writer.transport.abort()


async def test_bytes_and_ends_pass_both_ways() -> None:
    """A half-closed connection still answers."""
    async with proxied() as (proxy, client):
        assert await client.ask(DATA) == DATA
        client.writer.write(b"last")
        client.writer.write_eof()
        assert await client.rest() == b"last"
        (connection,) = proxy.connections or [None]
        assert connection is None or connection.bytes_to_client == len(DATA) + 4
    assert proxy.accepted == 1


@pytest.mark.parametrize(
    "faults",
    [
        {"slice_bytes": (1, 16)},
        {"latency_s": 0.02, "jitter_s": 0.02},
        {"bytes_per_s": 100_000.0},
        {"slice_bytes": (1, 400), "jitter_s": 0.005, "latency_s": 0.005, "bytes_per_s": 1_000_000.0},
    ],
    ids=lambda faults: " ".join(faults),
)
async def test_slow_and_sliced_bytes_are_the_same_bytes(faults: dict[str, object]) -> None:
    """In their order."""
    async with proxied() as (proxy, client):
        proxy.toward_client = Faults(**faults)  # type: ignore[arg-type]
        other = await Client.of(proxy)
        assert await other.ask(DATA) == DATA
        other.writer.transport.abort()
        assert await client.ask(b"plain") == b"plain"


async def test_limited_bandwidth_takes_its_time() -> None:
    """Twice the bytes of a second are not there in one."""
    async with proxied() as (proxy, client):
        proxy.toward_server.bytes_per_s = 10_000
        begun = asyncio.get_running_loop().time()
        assert await client.ask(DATA) == DATA
        assert asyncio.get_running_loop().time() - begun >= 1.0


async def test_pieces_are_of_the_wanted_size_and_follow_from_the_seed() -> None:
    """The same seed cuts alike."""
    faults = Faults(slice_bytes=(1, 16))
    pieces = faults.pieces(DATA, random.Random(7))
    assert b"".join(pieces) == DATA
    assert {len(piece) for piece in pieces} <= set(range(1, 17))
    assert pieces == faults.pieces(DATA, random.Random(7))
    assert pieces != faults.pieces(DATA, random.Random(8))


@pytest.mark.parametrize("limit", [0, 1, 100, len(DATA) - 1])
async def test_connection_is_cut_after_exactly_so_many_bytes(limit: int) -> None:
    """By an end, or by a reset, which the client can tell apart."""
    async with proxied() as (proxy, _):
        proxy.next_toward_client.extend(
            [Faults(cut_after_bytes=limit, cut_by="fin"), Faults(cut_after_bytes=limit, cut_by="rst")]
        )
        ended, torn = await Client.of(proxy), await Client.of(proxy)
        ended.writer.write(DATA)
        assert await ended.rest() == DATA[:limit]
        torn.writer.write(DATA)
        with pytest.raises(ConnectionResetError):
            await torn.rest()
        following = await Client.of(proxy)
        assert await following.ask(DATA) == DATA
        for client in (ended, torn, following):
            client.writer.transport.abort()


async def test_partition_holds_bytes_and_ends_back_and_heals() -> None:
    """Nobody is told; what waited arrives, the end last."""
    async with proxied() as (proxy, client):
        await client.ask(b"before")
        proxy.pause()
        client.writer.write(b"during")
        client.writer.write_eof()
        late = await Client.of(proxy)
        late.writer.write(b"new")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.reader.read(1)
        proxy.resume()
        assert await client.rest() == b"during"
        assert await late.reader.readexactly(3) == b"new"
        late.writer.transport.abort()


async def test_one_connection_and_one_direction_can_be_paused_alone() -> None:
    """The others go on."""
    async with proxied() as (proxy, client):
        other = await Client.of(proxy)
        await asyncio.gather(client.ask(b"a"), other.ask(b"b"))
        first = min(proxy.connections, key=lambda connection: connection.number)
        first.toward_client = Faults()
        first.toward_client.pause()
        client.writer.write(b"held")
        assert await other.ask(b"goes") == b"goes"
        assert first.bytes_to_client == 1
        first.toward_client.resume()
        assert await client.reader.readexactly(4) == b"held"
        other.writer.transport.abort()


async def test_reset_and_refusal_are_heard_at_once() -> None:
    """And end when they are taken back."""
    async with proxied() as (proxy, client):
        await client.ask(b"x")
        proxy.is_refusing = True
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        refused = await Client.of(proxy)
        with pytest.raises(ConnectionResetError):
            await refused.rest()
        proxy.is_refusing = False
        back = await Client.of(proxy)
        assert await back.ask(b"back") == b"back"
        back.writer.transport.abort()


async def test_lost_connection_stays_lost_and_new_ones_come_back() -> None:
    """A black hole: no end, no answer."""
    async with proxied() as (proxy, client):
        await client.ask(b"x")
        proxy.lose(also_new=True)
        during = await Client.of(proxy)
        for lost in (client, during):
            lost.writer.write(b"hello")
        proxy.find()
        after = await Client.of(proxy)
        assert await after.ask(b"after") == b"after"
        for lost in (client, during):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await lost.reader.read(1)
            lost.writer.transport.abort()
        after.writer.transport.abort()


async def test_target_that_is_gone_is_a_reset_and_one_that_moved_is_found() -> None:
    """As the client of a server that is not there would hear it."""
    async with echo() as url:
        gone = url
    async with echo() as url, FaultProxy(gone) as proxy:
        client = await Client.of(proxy)
        with pytest.raises(ConnectionResetError):
            await client.rest()
        proxy.move(url)
        found = await Client.of(proxy)
        assert await found.ask(b"x") == b"x"
        found.writer.transport.abort()
