"""A network in memory: machines, delays that differ, broken connections, cut cables; all of it seeded.

It carries HTTP between applications without sockets: a request is one parcel to a server's machine, its answer
is the parcels that the application sends. A connection keeps its order, as TCP does; a cable that is cut holds
what is on the way until it is whole again. Each connection draws from a chance of its own, so that a run does not
depend on the order in which things of the same moment happen.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import Struct
from starlette.types import ASGIApp, Message

from rbee.testing.virtual_clock import VirtualLoop
from rbee.testing.virtual_process import Machine, Process

WINDOW_BYTES = 256 * 1024
_DELAY_S = (0.0002, 0.002)


class Weather(Struct, frozen=True):
    """How the network is: shares of requests, and seconds.

    Attributes:
        broken: Connections that are reset somewhere between request and the end of the answer.
        repeated: Requests that arrive a second time, later.
        slow: Parcels that take up to `slow_s`.
    """

    broken: float = 0.0
    repeated: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.0


FINE = Weather()


class Trace:
    """A number that two runs share only when they did the same at the same times."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.sum = 0
        self.count = 0

    def add(self, now_s: float, *words: object) -> None:
        """Take note of something that happened; what happens at the same time may come in any order."""
        text = repr((round(now_s, 9), *words)).encode()
        self.sum = (self.sum + int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())) % 2**64
        self.count += 1

    def digest(self) -> str:
        """Return it to compare."""
        return f"{self.sum:016x}-{self.count}"


class Asked(Struct, frozen=True):
    """A request on its way."""

    method: str
    path: str
    query: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Reset(Struct, frozen=True):
    """The other end is gone."""

    refused: bool = False


class Start(Struct, frozen=True):
    """An answer's first line."""

    status: int
    headers: list[tuple[bytes, bytes]]


class Body(Struct, frozen=True):
    """A piece of an answer."""

    data: bytes


class End(Struct, frozen=True):
    """The end of an answer."""


Item = Start | Body | End | Reset


class Pipe:
    """One direction of one connection: in order, with delays, held while the cable is cut."""

    def __init__(
        self, network: Network, ends: frozenset[str], chance: random.Random, deliver: Callable[[Any], None]
    ):
        self._network = network
        self._ends = ends
        self._chance = chance
        self._deliver = deliver
        self._queue: deque[Any] = deque()
        self._last_s = 0.0
        self._due = 0

    def send(self, item: object, extra_s: float = 0.0) -> None:
        """Send something; it arrives behind what was sent before. Nothing does once the world has ended."""
        network = self._network
        if network.loop.is_closed():  # what a killed process left is cleared up by then
            return
        at_s = max(self._last_s, network.loop.time() + network.delay_s(self._chance) + extra_s)
        self._last_s = at_s
        self._queue.append(item)
        network.loop.call_at(at_s, self._arrive, context=network.context)

    def _arrive(self) -> None:
        if self._network.is_cut(self._ends):
            self._due += 1
            self._network.hold(self)
        else:
            self._deliver(self._queue.popleft())

    def release(self) -> None:
        """Let what was held arrive, unless the cable is cut again."""
        if not self._network.is_cut(self._ends):
            due, self._due = self._due, 0
            for _ in range(due):
                self._deliver(self._queue.popleft())
        else:
            self._network.hold(self)


class Network:
    """Carries requests to whoever listens."""

    def __init__(self, loop: VirtualLoop, seed: object, machines: list[Machine]) -> None:
        """Begin whole and quick."""
        self.loop = loop
        self.seed = seed
        self.weather = FINE
        self.trace = Trace()
        self.context = contextvars.Context()
        self.faults: list[str] = []
        self.counts: dict[str, int] = {}
        self._machines = {machine.address: machine for machine in machines}
        self._listeners: dict[tuple[str, int], tuple[ASGIApp, Process]] = {}
        self._cut: dict[frozenset[str], int] = {}
        self._held: dict[Pipe, None] = {}
        self._numbers: dict[str, int] = {}
        self._connections: dict[Process, dict[Connection, None]] = {}

    def count(self, what: str) -> None:
        """Count something for the report."""
        self.counts[what] = self.counts.get(what, 0) + 1

    # Servers

    def listen(self, address: str, port: int, app: ASGIApp, process: Process) -> None:
        """Serve an application until its process dies."""
        self._listeners[address, port] = (app, process)
        process.on_death.append(lambda: self.unlisten(address, port, process))

    def unlisten(self, address: str, port: int, process: Process) -> None:
        """Take no connection any more, unless somebody else listens there by now."""
        if self._listeners.get((address, port), (None, None))[1] is process:
            del self._listeners[address, port]

    def listener(self, address: str, port: int) -> tuple[ASGIApp, Process] | None:
        """Return who listens."""
        return self._listeners.get((address, port))

    # Cables

    def cut(self, one: Machine, other: Machine) -> None:
        """Cut a cable; what is on the way waits."""
        ends = frozenset({one.address, other.address})
        self._cut[ends] = self._cut.get(ends, 0) + 1

    def mend(self, one: Machine, other: Machine) -> None:
        """Make a cable whole again."""
        ends = frozenset({one.address, other.address})
        self._cut[ends] -= 1
        if not self._cut[ends]:
            del self._cut[ends]
            held, self._held = self._held, {}
            for pipe in held:
                pipe.release()

    def is_cut(self, ends: frozenset[str]) -> bool:
        """Tell whether nothing goes between two machines."""
        return ends in self._cut

    def hold(self, pipe: Pipe) -> None:
        """Have a pipe wait for its cable."""
        self._held[pipe] = None

    def delay_s(self, chance: random.Random) -> float:
        """Return how long one parcel takes."""
        weather = self.weather
        if weather.slow and chance.random() < weather.slow:
            return chance.uniform(0.0, weather.slow_s)
        return chance.uniform(*_DELAY_S)

    # Connections

    def connect(self, client: Process, address: str, port: int, asked: Asked) -> Connection:
        """Send a request."""
        number = self._numbers[client.name] = self._numbers.get(client.name, 0) + 1
        connection = Connection(self, client, address, port, asked, f"{client.name}#{number}")
        self.register(client, connection)
        connection.begin()
        return connection

    def register(self, process: Process, connection: Connection) -> None:
        """Break a connection when one of its ends dies."""
        if process not in self._connections:
            self._connections[process] = {}
            process.on_death.append(lambda: self._died(process))
        self._connections[process][connection] = None

    def forget(self, process: Process, connection: Connection) -> None:
        """Take note that an end has left the connection by itself."""
        self._connections.get(process, {}).pop(connection, None)

    def _died(self, process: Process) -> None:
        for connection in self._connections.pop(process, {}):
            connection.end_died(process)


class Connection:
    """One request and its answer.

    Attributes:
        name: The client's name and the number of its request.
        items: What has arrived at the client, and was not taken yet.
        arrived: Set whenever something arrives there.
        is_connected: The server's kernel has taken the request.
    """

    def __init__(
        self,
        network: Network,
        client: Process,
        address: str,
        port: int,
        asked: Asked,
        name: str,
        *,
        is_echo: bool = False,
    ) -> None:
        self._network = network
        self._client = client
        self._place = (address, port)
        self._asked = asked
        self._is_echo = is_echo
        self.name = name
        self._chance = random.Random(f"{network.seed} {name}")
        ends = frozenset({client.machine.address, address})
        self._to_server = Pipe(network, ends, self._chance, self._at_server)
        self._to_client = Pipe(network, ends, self._chance, self._at_client)
        self.items: deque[Item] = deque()
        self.arrived = asyncio.Event()
        self.is_connected = False
        self._server: Process | None = None
        self._calls: list[_Call] = []
        self._breaks_after = self._fate()
        self._is_over = False
        self.unread_bytes = 0

    def _fate(self) -> int:
        """Choose when it breaks: -1 never, 0 before the request arrives, n after n parcels of the answer."""
        weather = self._network.weather
        if self._is_echo or not weather.broken or self._chance.random() >= weather.broken:
            return -1
        self._network.count("connections broken")
        return self._chance.choice((0, 0, 1, 1, 1, 2, 3, 5, 8))

    def begin(self) -> None:
        """Send the request; it may arrive twice."""
        weather = self._network.weather
        if self._breaks_after == 0:
            self._to_client.send(Reset())
            return
        self._to_server.send(self._asked)
        if weather.repeated and _may_repeat(self._asked) and self._chance.random() < weather.repeated:
            self._network.count("requests repeated")
            late_s = self._chance.choice((0.0, 0.01, 0.3, 2.0)) * self._chance.random()
            echo = Connection(
                self._network, self._client, *self._place, self._asked, f"{self.name}'", is_echo=True
            )
            echo._to_server.send(self._asked, late_s)

    # At the server

    def _at_server(self, item: Asked | Reset) -> None:
        if isinstance(item, Reset):
            for call in self._calls:
                call.leave()
            return
        found = self._network.listener(*self._place)
        if found is None:
            self._to_client.send(Reset(refused=True))
            return
        app, process = found
        self.is_connected = True
        self._server = process
        self._network.register(process, self)
        if self._breaks_after == 1 and self._chance.random() < 0.5:  # the request is done, its answer is lost
            self._to_client.send(Reset())
        call = _Call(self._network, self, app, process, item)
        self._calls.append(call)
        process.spawn(call.run())

    def answer(self, item: Item) -> None:
        """Send a parcel of the answer."""
        if self._is_over:
            return
        if self._breaks_after > 0:
            self._breaks_after -= 1
            if self._breaks_after == 0:
                item = Reset()
        if isinstance(item, Body) and not self._is_echo:
            self.unread_bytes += len(item.data)
        self._to_client.send(item)
        if isinstance(item, (End, Reset)):
            self._is_over = True
            if self._server is not None:
                self._network.forget(self._server, self)
        if isinstance(item, Reset):
            for call in self._calls:
                call.leave()

    # At the client

    def _at_client(self, item: Item) -> None:
        self._network.trace.add(self._network.loop.time(), self.name, _size_of(item))
        if self._is_echo:  # nobody waits for it
            return
        self.is_connected = True
        self.items.append(item)
        self.arrived.set()

    def taken(self, data: bytes) -> None:
        """Take note that the client has read a piece."""
        before, self.unread_bytes = self.unread_bytes, self.unread_bytes - len(data)
        if before > WINDOW_BYTES >= self.unread_bytes:
            for call in self._calls:
                call.has_room.set()

    def leave(self) -> None:
        """Close the client's end."""
        self._network.forget(self._client, self)
        self._to_server.send(Reset())

    def end_died(self, process: Process) -> None:
        """Let the other end know."""
        if process is self._client:
            self._to_server.send(Reset())
        else:
            self._is_over = True
            self._to_client.send(Reset())


def _may_repeat(asked: Asked) -> bool:
    """Tell whether a request may be sent again by whoever lost its answer; never one whose answer is relayed."""
    is_relayed = asked.path == "/v1/chat/completions" and (b"x-rbee-keep", b"1") not in asked.headers
    return asked.method != "GET" and not is_relayed


def _size_of(item: Item) -> object:
    match item:
        case Start():
            return item.status
        case Body():
            return len(item.data)
        case _:
            return type(item).__name__


class _Call:
    """One request at its server."""

    def __init__(
        self, network: Network, connection: Connection, app: ASGIApp, process: Process, asked: Asked
    ) -> None:
        self._network = network
        self._connection = connection
        self._app = app
        self._process = process
        self._asked = asked
        self._has_left = asyncio.Event()
        self._is_read = False
        self._is_ended = False
        self.has_room = asyncio.Event()

    def leave(self) -> None:
        """Take note that the caller has gone."""
        self._has_left.set()
        self.has_room.set()

    async def run(self) -> None:
        """Run the application on it."""
        asked = self._asked
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": asked.method,
            "scheme": "http",
            "path": asked.path,
            "raw_path": asked.path.encode(),
            "query_string": asked.query.encode(),
            "root_path": "",
            "headers": asked.headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 1),
            "state": {},
        }
        try:
            await self._app(scope, self._receive, self._send)
        except Exception as error:  # noqa: BLE001  # what a server would log
            self._network.faults.append(f"{asked.method} {asked.path} raised {type(error).__name__}: {error}")
        if not self._is_ended:
            self._connection.answer(Reset())

    async def _receive(self) -> Message:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._asked.body, "more_body": False}
        if not self._is_ended:
            await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._has_left.is_set() or self._is_ended:
            return
        if message["type"] == "http.response.start":
            self._connection.answer(Start(message["status"], list(message.get("headers", []))))
            return
        if data := message.get("body", b""):
            while self._connection.unread_bytes > WINDOW_BYTES and not self._has_left.is_set():
                self.has_room.clear()
                await self.has_room.wait()
            self._connection.answer(Body(bytes(data)))
        if not message.get("more_body", False):
            self._is_ended = True
            self._connection.answer(End())
            self._has_left.set()
