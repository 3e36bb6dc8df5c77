"""What is said of an engine that cannot be asked, or breaks off."""

from __future__ import annotations

import asyncio

import pytest

from rbee.errors import WorkerError, WorkerLostError
from rbee.worker.engine_client import EngineClient
from rbee.worker.engines import EngineAddress, EngineTraits

TRAITS = EngineTraits(name="cook", is_built_in=False)


class SmallProcess:
    """An engine's process that has ended, or goes on."""

    def __init__(self, end: str = "") -> None:
        """Take how it ended."""
        self._end = end

    async def ended(self) -> str:
        """Wait for its end."""
        if not self._end:
            await asyncio.Event().wait()
        return self._end

    async def stop(self, grace_s: float) -> None:
        """Do nothing."""

    def kill(self) -> None:
        """Do nothing."""


async def free_port() -> int:
    """Return a port on which nobody listens."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


@pytest.mark.parametrize(
    ("process", "kind", "said"),
    [
        (
            SmallProcess("The engine cook was ended by SIGKILL."),
            WorkerLostError,
            "The engine cook was ended by SIG",
        ),
        (SmallProcess(), WorkerError, "The engine broke off: Cannot connect to host"),
        (None, WorkerError, "The engine broke off: Cannot connect to host"),
    ],
)
async def test_end_of_an_engine_is_the_loss_of_its_worker(
    process: SmallProcess | None, kind: type[WorkerError], said: str
) -> None:
    """Then another worker may do better; of one that goes on, it is told what happened."""
    url = f"http://127.0.0.1:{await free_port()}"
    client = EngineClient(EngineAddress("", "key", url, TRAITS, process))
    try:
        with pytest.raises(WorkerError, match=said) as caught:
            await client.ask("GET", "/v1/models")
    finally:
        await client.close()
    assert type(caught.value) is kind
