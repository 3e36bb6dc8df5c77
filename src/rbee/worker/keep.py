"""Answer a kept request: each piece of the answer is one `token` line on the worker's stdout."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from rbee.contracts.dialects import Channel, Chunk, Dialect
from rbee.contracts.events import MAX_TOKEN_LINE_BYTES
from rbee.errors import StorageFullError, WorkerError
from rbee.narration import FileSink
from rbee.worker.asking import as_stream, is_usage_alone, wants_usage
from rbee.worker.calls import Call
from rbee.worker.closing import Closing
from rbee.worker.engine_client import EngineClient
from rbee.worker.mending import Mender
from rbee.worker.reading import Take, read_answer
from rbee.worker.tally import Tally

_encode = msgspec.json.Encoder().encode


class TokenLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One piece of a kept answer, as it stands on stdout."""

    v: int
    kind: str
    ts: int
    actor: str
    job_id: str | None = None
    correlation_id: str | None = None
    worker_id: str | None = None
    attempt: int
    text: str
    tokens: int
    channel: Channel
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    chunk: Raw | UnsetType = UNSET


class TokenWriter:
    """Writes token lines, each with one write, and notices when one is lost."""

    def __init__(
        self,
        sink: FileSink,
        *,
        worker_id: str,
        call: Call,
        dialect: Dialect,
        tally: Tally,
        timings: bool,
        mender: Mender,
    ) -> None:
        """Take where to write and whose answer it is.

        Args:
            sink: The worker's stdout.
            timings: The caller asked for the engine's timings in every chunk.
            mender: Mends the engine's JSON, where that is shown.
        """
        self._sink = sink
        self._worker_id = worker_id
        self._call = call
        self._dialect = dialect
        self._tally = tally
        self._timings = timings
        self._mender = mender
        self._told_prompt = False

    def write(self, data: bytes, chunk: Chunk) -> None:
        """Write the token line of one chunk.

        Raises:
            WorkerError: The line would be longer than 1 MiB.
            StorageFullError: It could not be written whole.
        """
        shown = self._mender.chunk(chunk) if self._call.keep == "chunk" else chunk
        if shown is not None:
            self._put(data, chunk, shown)

    def end(self) -> None:
        """Write the line of what is told behind all of the engine's chunks, if any is; raises as `write`."""
        rest = self._mender.rest()
        if rest is not None:
            self._put(b"", {}, rest)

    def _put(self, data: bytes, chunk: Chunk, shown: Chunk) -> None:
        line = self._line(data, chunk, shown)
        if len(line) > MAX_TOKEN_LINE_BYTES:
            raise WorkerError(f"A piece of the answer has more than the {MAX_TOKEN_LINE_BYTES} bytes of a line.")
        if not self._sink.write(line):
            raise StorageFullError("A piece of the answer could not be written to the worker's output.")
        self._tally.frames = (self._tally.frames or 0) + 1

    def _line(self, data: bytes, chunk: Chunk, shown: Chunk) -> bytes:
        delta, call = self._dialect.delta(chunk), self._call
        if delta.text:
            self._tally.note_delta()
        return _encode(
            TokenLine(
                v=1,
                kind="token",
                ts=time.time_ns(),
                actor="worker",
                job_id=call.job_id,
                correlation_id=call.correlation_id,
                worker_id=self._worker_id,
                attempt=call.attempt,
                text=delta.text,
                tokens=self._tally.completion_tokens or 0,
                channel=delta.channel,
                prompt_tokens=self._prompt_tokens_once(),
                finish_reason=self._tally.finish_reason,
                chunk=self._raw(data, chunk, shown) if call.keep == "chunk" else UNSET,
            )
        )

    def _prompt_tokens_once(self) -> int | None:
        """Return the size of the prompt on the first line that can tell it: the closing line may never come."""
        if self._told_prompt or self._tally.prompt_tokens is None:
            return None
        self._told_prompt = True
        return self._tally.prompt_tokens

    def _raw(self, data: bytes, chunk: Chunk, shown: Chunk) -> Raw:
        """Return the JSON without the timings that only we asked for; the last ones the engine always sends."""
        if "timings" in chunk and not self._timings and not _is_ending(chunk):
            return Raw(_encode({key: value for key, value in shown.items() if key != "timings"}))
        return Raw(data if shown is chunk and b"\n" not in data else _encode(shown))


def _is_ending(chunk: Chunk) -> bool:
    choices = chunk.get("choices")
    finished = any(choice.get("finish_reason") for choice in choices) if isinstance(choices, list) else False
    return finished or "usage" in chunk or isinstance(chunk.get("response"), dict)


async def keep(
    engine: EngineClient, dialect: Dialect, body: dict[str, Any], closing: Closing, writer: TokenWriter
) -> None:
    """Narrate the answer: one token line for each data frame of the engine."""
    closing.tally.frames = 0
    if engine.traits.is_built_in:
        asked = {**body, "stream": True, "timings_per_token": True}
        await read_answer(engine, dialect, _encode(asked), closing.tally, writer.write)
    else:
        asked = as_stream(body, dialect, engine.traits)
        await read_answer(engine, dialect, _encode(asked), closing.tally, _without_usage(body, writer))
    writer.end()
    closing.completed()


def _without_usage(body: dict[str, Any], writer: TokenWriter) -> Take:
    """Leave out the chunk with the usage, which we asked for, where the caller did not."""
    if wants_usage(body):
        return writer.write

    def take(data: bytes, chunk: Chunk) -> None:
        if not is_usage_alone(chunk):
            writer.write(data, chunk)

    return take
