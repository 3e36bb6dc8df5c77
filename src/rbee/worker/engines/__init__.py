"""Engines: what runs a model. The front needs to know of one only where it answers, and how it is to be asked."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class EngineTraits(Struct, frozen=True, kw_only=True):
    """How an engine is to be asked.

    Attributes:
        name: Its name, such as `llama_cpp`.
        is_built_in: It is the llama.cpp of this worker: it tells its timings when asked for them, and its frames
            can be passed on as they are. Of any other engine nothing but OpenAI's form is taken for granted.
        model_name: What a request's `model` is replaced by; None leaves it as it is.
        has_prefill: It goes on from an assistant's message that stands last.
    """

    name: str = "llama_cpp"
    is_built_in: bool = True
    model_name: str | None = None
    has_prefill: bool = True


class EngineProcess(Protocol):
    """The process of an engine that does not run in the worker's own."""

    async def ended(self) -> str:
        """Wait for its end, and return how it ended in one sentence."""

    async def stop(self, grace_s: float) -> None:
        """Stop it with everything it started: TERM, `grace_s`, KILL; returns when all of that is gone."""

    def kill(self) -> None:
        """Kill it, and what it left when it has ended, at once and from any thread."""


class EngineAddress(Struct, frozen=True):
    """Where a loaded engine answers HTTP, and how it is to be asked.

    Attributes:
        socket_path: Its unix socket; empty where it listens on a port.
        key: The key it asks for.
        url: Its address on a port; of a socket, only what the `Host` header says.
        traits: How it is to be asked.
        process: Its process; None where it runs in the worker's own.
    """

    socket_path: str
    key: str
    url: str = "http://engine"
    traits: EngineTraits = EngineTraits()
    process: EngineProcess | None = None


class Engine(Protocol):
    """Loads one model and answers the OpenAI routes for it."""

    @property
    def name(self) -> str:
        """The engine's name, such as `llama_cpp`."""

    @property
    def version(self) -> str | None:
        """The version of the engine's package, where it is known."""

    @property
    def holds_threads(self) -> bool:
        """Tell whether loading holds up every thread of the process."""

    def load(self) -> EngineAddress:
        """Load the model; blocks until it can be asked.

        Raises:
            ModelInvalidError: The model cannot be loaded: file or memory.
            StartError: Anything else stood in the way.
        """

    def kill(self) -> None:
        """Kill what `load` started besides this process, at once and from any thread."""
