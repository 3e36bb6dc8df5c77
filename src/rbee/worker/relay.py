"""Answer a relayed request: as a stream of the engine's own frames, or as one response."""

from __future__ import annotations

import re
import time
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.dialects import BLANK_EVERY_S, DONE, Chunk, Dialect
from rbee.contracts.frames import FrameSplitter, failure_start, line_start
from rbee.errors import RbeeError, WorkerError
from rbee.worker.asking import as_stream, canonical_frame, is_usage_alone, wants_usage
from rbee.worker.closing import Closing
from rbee.worker.engine_client import EngineClient
from rbee.worker.mending import Mender
from rbee.worker.reading import observe_frames, read_answer
from rbee.worker.reply import Reply
from rbee.worker.vectors import shortened, wanted_of

EMBEDDINGS = "/v1/embeddings"

# Chunks that say something about use or ending. In the text of an answer these quotes would be escaped.
_TELLING = re.compile(rb'"(?:usage|timings)":\s?\{|"(?:finish|stop)_reason":\s?"')

_encode = msgspec.json.Encoder().encode


async def relay_stream(
    engine: EngineClient, dialect: Dialect, body: bytes, closing: Closing, reply: Reply, mender: Mender
) -> None:
    """Pass the engine's frames on, mended where that has to be, each as soon as it is whole.

    The closing line is written before the last frame is sent.

    Raises:
        RbeeError: The engine refused, failed or broke off; what was whole before has been sent.
    """
    splitter, tally = FrameSplitter(), closing.tally
    async with engine.stream(dialect.path, body) as parts:
        await reply.start_stream()
        async for part in parts:
            whole = splitter.feed(part)
            if not whole:
                continue
            tally.note_arrival()
            failure = failure_start(whole)
            if failure >= 0:
                await reply.write(mender.frames(whole[:failure]))
                observe_frames(whole[failure:], tally)  # raises what the frame tells
            if _TELLING.search(whole):
                observe_frames(whole, tally)
            if any(line_start(whole, last) >= 0 for last in dialect.last_lines):
                closing.completed()
                await reply.end(mender.frames(whole))
                return
            if mended := mender.frames(whole):
                await reply.write(mended)
    raise await engine.broken_off()


class _Pulse:
    """Shows whoever waits for a whole answer that it grows, at its first piece and then once a second at most."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._has_grown = False
        self._rests_until = 0.0

    def grow(self) -> None:
        """Take note of a piece."""
        self._has_grown = True

    async def beat(self) -> None:
        """Send a blank, if it is time for one."""
        now = time.monotonic()
        if self._has_grown and now >= self._rests_until:
            self._has_grown, self._rests_until = False, now + BLANK_EVERY_S
            await self._reply.blank()


async def relay_whole(
    engine: EngineClient, dialect: Dialect, body: dict[str, Any], closing: Closing, reply: Reply, mender: Mender
) -> None:
    """Ask for a stream, so that the engine stops when the caller leaves, and answer with what it makes.

    Until then, blanks tell that it comes: without them a standstill could not be told from a long answer.
    """
    assembler, pulse = dialect.assembler(), _Pulse(reply)

    def take(_: bytes, chunk: Chunk) -> None:
        assembler.add(chunk)
        pulse.grow()

    asked = as_stream(body, dialect, engine.traits)
    await read_answer(engine, dialect, _encode(asked), closing.tally, take, pulse.beat)
    answer = _encode(mender.whole(assembler.result()))
    closing.completed()
    await reply.whole(answer)


async def relay_foreign_stream(
    engine: EngineClient, dialect: Dialect, body: dict[str, Any], closing: Closing, reply: Reply, mender: Mender
) -> None:
    """Pass on the frames of an engine that is not built in, each in the one form that everybody reads.

    What the caller did not ask for, its usage, is asked for all the same, and not passed on.

    Raises:
        RbeeError: The engine refused, failed or broke off; what was whole before has been sent.
    """
    hides_usage = not wants_usage(body)
    ready = bytearray()

    def take(data: bytes, chunk: Chunk) -> None:
        if not chunk or (hides_usage and is_usage_alone(chunk)):  # it says nothing, or nothing to this caller
            return
        mended = mender.chunk(chunk)
        if mended is not None:
            ready.extend(canonical_frame(data if mended is chunk else _encode(mended), mended, dialect))

    async def flush() -> None:
        if ready and not reply.is_started:
            await reply.start_stream()
        if ready:
            await reply.write(bytes(ready))
            ready.clear()

    asked = _encode(as_stream(body, dialect, engine.traits))
    try:
        await read_answer(engine, dialect, asked, closing.tally, take, flush)
    except RbeeError:
        await flush()  # what came with it
        raise
    if (rest := mender.rest()) is not None:
        ready.extend(canonical_frame(_encode(rest), rest, dialect))
    closing.completed()
    if not dialect.last_types:
        ready.extend(b"data: " + DONE + b"\n\n")
    if not reply.is_started:
        await reply.start_stream()
    await reply.end(bytes(ready))


class _Used(Struct):
    """The parts of a long answer that are looked at."""

    usage: dict[str, Any] | None = None
    input_tokens: int | None = None


async def relay_plain(
    engine: EngineClient,
    path: str,
    asked: dict[str, Any],
    body: bytes,
    closing: Closing,
    reply: Reply,
    mender: Mender,
) -> None:
    """Pass on what is no generation: embeddings, rankings, counted tokens; `body` is `asked` as it came."""
    wanted = wanted_of(asked) if path == EMBEDDINGS else None
    if wanted is None:
        answer = await engine.ask("POST", path, body)
    else:
        answer = shortened(await engine.ask("POST", path, _encode({**asked, "encoding_format": "float"})), wanted)
    closing.tally.note_arrival()
    try:
        used = msgspec.json.decode(answer, type=_Used)
    except msgspec.MsgspecError as error:
        raise WorkerError("The engine's answer cannot be read.") from error
    counted = {} if used.input_tokens is None else {"input_tokens": used.input_tokens}
    closing.tally.observe({"usage": {**counted, **(used.usage or {})}})
    closing.completed()
    await reply.whole(mender.named(answer))
