"""Read an engine's streamed answer to its end, chunk by chunk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from rbee.contracts.dialects import DONE, Chunk, Dialect
from rbee.contracts.frames import FrameSplitter, frames_data
from rbee.errors import WorkerError
from rbee.worker.engine_client import EngineClient
from rbee.worker.engine_errors import error_in, translate_error
from rbee.worker.tally import Tally

Take = Callable[[bytes, Chunk], None]

_decode = msgspec.json.Decoder().decode


async def read_answer(
    engine: EngineClient,
    dialect: Dialect,
    body: bytes,
    tally: Tally,
    take: Take,
    flush: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Ask for a stream, count it, and hand on each of its chunks as bytes and decoded.

    Args:
        flush: Called after each part of the stream, when its chunks were handed on.

    Raises:
        RbeeError: The engine refused, failed or broke off, or `take` raised it.
    """
    splitter = FrameSplitter()
    async with engine.stream(dialect.path, body) as parts:
        async for part in parts:
            if _read_frames(splitter.feed(part), dialect, tally, take):
                return
            if flush is not None:
                await flush()
        if not engine.traits.is_built_in and _is_whole(splitter, dialect, tally, take):
            return
    raise await engine.broken_off()


def _read_frames(whole: bytes, dialect: Dialect, tally: Tally, take: Take) -> bool:
    """Hand on the chunks of some whole frames; tell whether the answer's last one was among them."""
    for data in frames_data(whole):
        tally.note_arrival()
        if data == DONE:
            return True
        chunk = decode_chunk(data)
        _count_and_hand_on(chunk, data, tally, take)
        if chunk.get("type") in dialect.last_types:
            return True
    return False


def _is_whole(splitter: FrameSplitter, dialect: Dialect, tally: Tally, take: Take) -> bool:
    """Tell whether an answer is whole although no last frame came: some servers end it with its finish reason.

    What stands behind the last whole frame counts where it is one but for its end.
    """
    rest = splitter.feed(b"\n\n")
    is_cut = any(data != DONE and not _is_json(data) for data in frames_data(rest))
    return not is_cut and (_read_frames(rest, dialect, tally, take) or tally.finish_reason is not None)


def _is_json(data: bytes) -> bool:
    try:
        _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


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
    if (told := error_in(chunk)) is not None:
        raise translate_error(told)
    return chunk


def observe_frames(whole: bytes, tally: Tally) -> None:
    """Count what some whole frames say about use and ending.

    Raises:
        RbeeError: One of them tells of an error, or cannot be read.
    """
    for data in frames_data(whole):
        if data != DONE:
            _count_and_hand_on(decode_chunk(data), data, tally)


def _count_and_hand_on(chunk: Chunk, data: bytes, tally: Tally, take: Take | None = None) -> None:
    try:
        tally.observe(chunk)
        if take is not None:
            take(data, chunk)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WorkerError("The engine sent a chunk of an unknown form.") from error
