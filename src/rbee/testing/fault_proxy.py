"""A TCP proxy that does to connections what bad networks do, on command and from a seed.

```python
async with FaultProxy("http://127.0.0.1:8500", seed=1) as proxy:
    proxy.toward_client.latency_s = 0.2      # every connection, from now on
    client = JobClient(proxy.url)
    ...
    proxy.pause()                            # a partition: nothing passes, no FIN, no RST
    proxy.resume()                           # what waited arrives
    proxy.reset()                            # RST on every open connection
```
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import deque
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

READ_BYTES = 16 * 1024
PIECES_WAITING_MAX = 64
CONNECT_S = 5.0
_RESET = struct.pack("ii", 1, 0)


class Faults:
    """What happens to the bytes that go one way; may be changed while they go.

    Args:
        latency_s: How much later each piece arrives.
        jitter_s: At most so much is added to, or taken from, the latency; pieces never overtake each other.
        bytes_per_s: No more pass in a second.
        slice_bytes: Pieces of at least and at most so many bytes are sent, each by itself.
        cut_after_bytes: The connection ends when so many have passed.
        cut_by: By an orderly end (`fin`) or a reset (`rst`).
    """

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        jitter_s: float = 0.0,
        bytes_per_s: float | None = None,
        slice_bytes: tuple[int, int] | None = None,
        cut_after_bytes: int | None = None,
        cut_by: Literal["fin", "rst"] = "rst",
    ) -> None:
        self.latency_s = latency_s
        self.jitter_s = jitter_s
        self.bytes_per_s = bytes_per_s
        self.slice_bytes = slice_bytes
        self.cut_after_bytes = cut_after_bytes
        self.cut_by = cut_by
        self._may_pass = asyncio.Event()
        self._may_pass.set()

    def pause(self) -> None:
        """Hold everything back, ends of connections included."""
        self._may_pass.clear()

    def resume(self) -> None:
        """Let go on what was held back."""
        self._may_pass.set()

    async def until_resumed(self) -> None:
        """Wait while it is paused."""
        await self._may_pass.wait()

    def delay_s(self, dice: random.Random) -> float:
        """Return how much later the next piece arrives."""
        return max(0.0, self.latency_s + dice.uniform(-self.jitter_s, self.jitter_s))

    def pieces(self, data: bytes, dice: random.Random) -> list[bytes]:
        """Cut what was read into the pieces that are sent."""
        if self.slice_bytes is None:
            return [data]
        found, at = [], 0
        while at < len(data):
            size = dice.randint(*self.slice_bytes)
            found.append(data[at : at + size])
            at += size
        return found


class Connection:
    """One connection through the proxy; both ways may be given faults of their own.

    Attributes:
        toward_client: What happens to what the server says.
        toward_server: What happens to what the client says.
        bytes_to_client: How much of what the server said was passed on.
        bytes_to_server: How much of what the client said was passed on.
    """

    def __init__(self, number: int, toward_client: Faults, toward_server: Faults, dice: random.Random) -> None:
        self.number = number
        self.toward_client = toward_client
        self.toward_server = toward_server
        self.bytes_to_client = 0
        self.bytes_to_server = 0
        self.is_lost = False
        self._dice = dice
        self._writers: list[asyncio.StreamWriter] = []

    def reset(self) -> None:
        """Reset both ends at once (RST)."""
        for writer in self._writers:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    def lose(self) -> None:
        """Let nothing pass any more, for ever, and tell neither end."""
        self.is_lost = True

    async def carry(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Carry bytes both ways until both ends have ended, or it was cut."""
        self._writers = [client[1], server[1]]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._one_way(client[0], server[1], is_to_client=False))
                group.create_task(self._one_way(server[0], client[1], is_to_client=True))
        except* OSError:  # one end reset it: so does the other
            self.reset()
        finally:
            for writer in self._writers:
                writer.close()

    async def _one_way(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_to_client: bool
    ) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_WAITING_MAX)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read(reader, waiting, is_to_client=is_to_client))
            group.create_task(self._write(waiting, writer, is_to_client=is_to_client))

    def _faults(self, is_to_client: bool) -> Faults:
        return self.toward_client if is_to_client else self.toward_server

    async def _read(
        self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]], *, is_to_client: bool
    ) -> None:
        """Read, and say when each piece is due."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            data = await reader.read(READ_BYTES)
            due = max(due, loop.time() + self._faults(is_to_client).delay_s(self._dice))
            await waiting.put((due, data))
            if not data:
                return

    async def _write(
        self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, *, is_to_client: bool
    ) -> None:
        """Pass on what is due."""
        loop = asyncio.get_running_loop()
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                await self._pass(b"", writer, self._faults(is_to_client))
                writer.write_eof()
                return
            for piece in self._faults(is_to_client).pieces(data, self._dice):
                if not await self._send(piece, writer, is_to_client=is_to_client):
                    return

    async def _send(self, piece: bytes, writer: asyncio.StreamWriter, *, is_to_client: bool) -> bool:
        """Pass one piece on; false when that was the end."""
        faults = self._faults(is_to_client)
        limit = faults.cut_after_bytes
        passed = self.bytes_to_client if is_to_client else self.bytes_to_server
        is_cut = limit is not None and passed + len(piece) >= limit
        if is_cut and limit is not None:
            piece = piece[: max(0, limit - passed)]
        await self._pass(piece, writer, faults)
        if is_to_client:
            self.bytes_to_client += len(piece)
        else:
            self.bytes_to_server += len(piece)
        if is_cut and faults.cut_by == "rst":
            await asyncio.sleep(0)  # what was written is on its way
            self.reset()
        elif is_cut:
            for each in self._writers:
                each.close()
        return not is_cut

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter, faults: Faults) -> None:
        await faults.until_resumed()
        if self.is_lost:
            await asyncio.Event().wait()  # until the proxy ends
        if faults.bytes_per_s is not None:
            await asyncio.sleep(len(piece) / faults.bytes_per_s)
        writer.write(piece)
        await writer.drain()


class FaultProxy:
    """Listens on loopback and carries every connection to `target`; use it as an asynchronous context manager.

    Args:
        target: Where connections go, `http://host:port`; may be changed later (`move`).
        seed: Where the dice begin: pieces, jitter.

    Attributes:
        toward_client: What happens to what servers say, on all connections without faults of their own.
        toward_server: What happens to what clients say.
        next_toward_client: Faults of the next connections, one each.
        is_refusing: New connections are reset at once.
        connections: Those that are open.
        accepted: How many there were.
    """

    def __init__(self, target: str, *, seed: int = 0) -> None:
        self.toward_client = Faults()
        self.toward_server = Faults()
        self.next_toward_client: deque[Faults] = deque()
        self.is_refusing = False
        self.connections: set[Connection] = set()
        self.accepted = 0
        self.url = ""
        self._loses_new = False
        self._seed = seed
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.move(target)

    def move(self, target: str) -> None:
        """Carry new connections to another address."""
        parts = urlsplit(target)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=READ_BYTES)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every connection and listen no more."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def pause(self) -> None:
        """Let nothing pass in either direction, as in a partition."""
        self.toward_client.pause()
        self.toward_server.pause()

    def resume(self) -> None:
        """Heal the partition; what waited arrives."""
        self.toward_client.resume()
        self.toward_server.resume()

    def reset(self) -> None:
        """Reset every open connection."""
        for connection in tuple(self.connections):
            connection.reset()

    def lose(self, *, also_new: bool = False) -> None:
        """Swallow for ever what goes over the open connections; over new ones as well until `find`."""
        self._loses_new = also_new
        for connection in self.connections:
            connection.lose()

    def find(self) -> None:
        """Carry new connections again; those that were lost stay so."""
        self._loses_new = False

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        toward_client = self.next_toward_client.popleft() if self.next_toward_client else self.toward_client
        dice = random.Random(f"{self._seed} {self.accepted}")
        connection = Connection(self.accepted, toward_client, self.toward_server, dice)
        connection.is_lost = self._loses_new
        connection._writers = [writer]
        self.accepted += 1
        self.connections.add(connection)
        try:
            await self._join(connection, reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()  # the proxy ends
        finally:
            self.connections.discard(connection)

    async def _join(
        self, connection: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.is_refusing:
            connection.reset()
            return
        try:
            async with asyncio.timeout(CONNECT_S):
                server = await asyncio.open_connection(*self._address, limit=READ_BYTES)
        except (OSError, TimeoutError):
            connection.reset()
            return
        await connection.carry((reader, writer), server)
