"""Simulated processes in one real one: each with its machine's clock, its own chance and its own voice."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from types import FunctionType, ModuleType
from typing import Any

from rbee.jobs.registry import JobRegistry
from rbee.narration.emit import _Speaker
from rbee.narration.scope import Scope
from rbee.narration.sinks import Sink
from rbee.queen.hives import HiveBook
from rbee.testing.virtual_clock import OWNER, VirtualLoop
from rbee.worker.tally import Tally

EPOCH_S = 1_800_000_000.0


class _Nowhere:
    def write(self, line: bytes) -> bool:
        """Drop it."""
        return True


_NOBODY = _Speaker("nobody", _Nowhere(), Scope())


class Machine:
    """A computer: its address, and how far its clock is off."""

    def __init__(self, name: str, address: str) -> None:
        """Begin with a clock that is right."""
        self.name = name
        self.address = address
        self.clock_off_s = 0.0


class Process:
    """One process.

    Attributes:
        is_alive: It was not killed.
        chance: Its random numbers; no other process draws from them.
        speaker: Who narrates in it, and where to.
        on_death: Done when it ends: the kernel closes what it had open.
    """

    def __init__(self, loop: VirtualLoop, name: str, machine: Machine, seed: object, *, actor: str) -> None:
        """Make a process that does nothing yet; `name` is its own in the whole run."""
        self.loop = loop
        self.name = name
        self.machine = machine
        self.is_alive = True
        self.chance = random.Random(f"{seed} {name}")
        self.speaker = _Speaker(actor, _Nowhere(), Scope())
        self.on_death: list[Callable[[], None]] = []
        self._steps_left: int | None = None
        self._held: list[asyncio.Handle] | None = None
        self._graveyard: list[object] = []
        self._context = contextvars.Context()
        self._context.run(OWNER.set, self)

    def speak(self, sink: Sink, names: Scope) -> None:
        """Say where it narrates to, and in whose name."""
        self.speaker = _Speaker(self.speaker.actor, sink, names)

    def context(self) -> contextvars.Context:
        """Return a context of its own for one task of this process."""
        return self._context.copy()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin a task of this process."""
        return self.loop.create_task(work, context=self.context())

    def may_run(self, handle: asyncio.Handle) -> bool:
        """Keep what a killed or stopped process would do."""
        if not self.is_alive:
            self._graveyard.append(handle)
            return False
        if self._held is not None:
            self._held.append(handle)
            return False
        if self._steps_left is not None:
            self._steps_left -= 1
            if self._steps_left < 0:
                self.kill()
                self._graveyard.append(handle)
                return False
        return True

    def kill_after(self, steps: int) -> None:
        """SIGKILL between two steps, so many from now: at whatever it does just then."""
        self._steps_left = steps

    @property
    def is_stopped(self) -> bool:
        """Tell whether it stands still."""
        return self._held is not None

    def stop(self) -> None:
        """SIGSTOP."""
        if self._held is None:
            self._held = []

    def go_on(self) -> None:
        """SIGCONT: everything that came due meanwhile happens now."""
        held, self._held = self._held, None
        for handle in held or ():
            self.loop._ready.append(handle)  # type: ignore[attr-defined]

    def kill(self) -> None:
        """SIGKILL: from here on it does nothing, not even in a `finally`. A second one changes nothing."""
        if not self.is_alive:
            return
        self.is_alive = False
        for handle in self._held or ():
            self._graveyard.append(handle)
        self._held = None
        self.loop.drop_readers(self)
        for close in self.on_death:
            close()

    def now_s(self) -> float:
        """Return the time by its machine's clock, in seconds since 1970."""
        return EPOCH_S + self.loop.time() + self.machine.clock_off_s


def current() -> Process | None:
    """Return the process that this code runs in; None for the simulation itself."""
    owner = OWNER.get()
    return owner if isinstance(owner, Process) else None


class _World:
    """What stands in for the modules that ask the real world: clocks and chance."""

    def __init__(self, loop: VirtualLoop, seed: object) -> None:
        self._loop = loop
        self._chance = random.Random(f"{seed} world")

    @property
    def chance(self) -> random.Random:
        process = current()
        return self._chance if process is None else process.chance

    def time(self) -> float:
        process = current()
        return EPOCH_S + self._loop.time() if process is None else process.now_s()

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    def monotonic(self) -> float:
        return self._loop.time()

    def random(self) -> float:
        return self.chance.random()

    def uniform(self, low: float, high: float) -> float:
        return self.chance.uniform(low, high)

    def randrange(self, *bounds: int) -> int:
        return self.chance.randrange(*bounds)

    def urandom(self, count: int) -> bytes:
        return self.chance.randbytes(count)

    def uuid4(self) -> uuid.UUID:
        return uuid.UUID(int=self.chance.getrandbits(128), version=4)

    def token_urlsafe(self, count: int) -> str:
        return self.chance.randbytes(count).hex()

    def token_hex(self, count: int) -> str:
        return self.chance.randbytes(count).hex()


class _Voice:
    """Stands in for who speaks in this process: whichever simulated one it is."""

    @property
    def speaker(self) -> _Speaker:
        process = current()
        return _NOBODY if process is None or not process.is_alive else process.speaker


_CLOCKED: tuple[Callable[..., Any], ...] = (HiveBook.__init__, Tally.__init__, JobRegistry.__init__)
_ASKED = ("time", "random", "uuid", "secrets")


@contextlib.contextmanager
def virtual_world(loop: VirtualLoop, seed: object) -> Iterator[None]:
    """Let every module of rbee see virtual clocks and seeded chance, and speak as the process it runs in."""
    world = _World(loop, seed)
    with contextlib.ExitStack() as stack:
        for module in _modules():
            for name in _ASKED:
                if isinstance(getattr(module, name, None), ModuleType):
                    stack.enter_context(replaced(module, name, world))
            if getattr(module, "time_ns", None) is time.time_ns:
                stack.enter_context(replaced(module, "time_ns", world.time_ns))
        stack.enter_context(replaced(sys.modules["rbee.contracts.ids"], "os", world))
        stack.enter_context(replaced(sys.modules["rbee.narration.emit"], "_Process", _Voice()))
        for function in _CLOCKED:
            stack.enter_context(_late_clock(function, world))
        yield


def _modules() -> list[ModuleType]:
    found = [(name, module) for name, module in sys.modules.items() if name.startswith("rbee.")]
    return [module for name, module in found if not name.startswith("rbee.testing")]


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Let an attribute be another one for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _late_clock(function: Callable[..., Any], world: _World) -> Iterator[None]:
    """Let a default argument that is a clock be the virtual one."""
    assert isinstance(function, FunctionType)
    clocks: dict[object, object] = {time.monotonic: world.monotonic, time.time: world.time}
    by_place, by_name = function.__defaults__, function.__kwdefaults__
    function.__defaults__ = tuple(_swap(clocks, value) for value in by_place or ()) or None
    if by_name:
        function.__kwdefaults__ = {name: _swap(clocks, value) for name, value in by_name.items()}
    try:
        yield
    finally:
        function.__defaults__, function.__kwdefaults__ = by_place, by_name


def _swap(clocks: dict[object, object], value: Any) -> Any:
    return clocks.get(value, value) if callable(value) else value
