"""Read an engine's streamed answer to its end, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from rbee.contracts.dialects import DONE, Chunk, Dialect
from rbee.contracts.frames import FrameSplitter, frames_data
from rbee.errors import RbeeError, WorkerError
from rbee.worker.engine_client import EngineClient
from rbee.worker.engine_errors import translate_error
from rbee.worker.tally import Tally

Take = Callable[[bytes, Chunk], None]

_decode = msgspec.json.Decoder().decode


async def read_answer(engine: EngineClient, dialect: Dialect, body: bytes, tally: Tally, take: Take) -> None:
    """Ask for a stream, count it, and hand on each of its chunks as bytes and decoded.

    Raises:
        RbeeError: The engine refused, failed or broke off, or `take` raised it.
    """
    splitter = FrameSplitter()
    async with engine.stream(dialect.path, body) as parts:
        async for part in parts:
            for data in frames_data(splitter.feed(part)):
                tally.note_arrival()
                if data == DONE:
                    return
                chunk = decode_chunk(data)
                _count_and_hand_on(chunk, data, tally, take)
                if chunk.get("type") in dialect.last_types:
                    return
    raise broken_off()


def decode_chunk(data: bytes) -> Chunk:
    """Decode one chunk; `null`, which the engine sends where a choice has no first words, says nothing.

    Raises:
        RbeeError: The chunk tells of an error, or cannot be read.
    """
    try:
        chunk: Any = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerError("The engine sent a chunk that is not JSON.") from error
    if not isinstance(chunk, dict):
        return {}
    if isinstance(chunk.get("error"), dict):
        raise translate_error(chunk["error"])
    return chunk


def observe_frames(whole: bytes, tally: Tally) -> None:
    """Count what some whole frames say about use and ending.

    Raises:
        RbeeError: One of them tells of an error, or cannot be read.
    """
    for data in frames_data(whole):
        if data != DONE:
            _count_and_hand_on(decode_chunk(data), data, tally)


def broken_off() -> RbeeError:
    """Make the error of a stream that ended before its answer did."""
    return WorkerError("The engine broke off its answer.")


def _count_and_hand_on(chunk: Chunk, data: bytes, tally: Tally, take: Take | None = None) -> None:
    try:
        tally.observe(chunk)
        if take is not None:
            take(data, chunk)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WorkerError("The engine sent a chunk of an unknown form.") from error
