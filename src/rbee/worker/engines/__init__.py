"""Engines: what runs a model. The front needs to know of one only where it answers, and with which key."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class EngineAddress(Struct, frozen=True):
    """Where a loaded engine answers HTTP: a unix socket, and the key it asks for."""

    socket_path: str
    key: str


class Engine(Protocol):
    """Loads one model and answers the OpenAI routes for it."""

    @property
    def name(self) -> str:
        """The engine's name, such as `llama_cpp`."""

    @property
    def version(self) -> str:
        """The version of the engine's package."""

    def load(self) -> EngineAddress:
        """Load the model; blocks until it can be asked, and may hold up every thread of the process.

        Raises:
            ModelInvalidError: The model cannot be loaded: file or memory.
            StartError: Anything else stood in the way.
        """
