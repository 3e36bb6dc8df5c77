"""One attempt at a relayed call: a worker is asked, and what it says is passed on as it comes."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from typing import Any

import aiohttp

from rbee.client.answers import error_from
from rbee.contracts.dialects import BLANK_EVERY_S, DIALECTS
from rbee.contracts.frames import FrameSplitter, failure_start, line_start
from rbee.errors import (
    ConflictError,
    HiveLostError,
    OverloadedError,
    RbeeError,
    UnavailableError,
    WorkerError,
    WorkerLostError,
)
from rbee.jobs import RunningJob
from rbee.queen.answering import Answering, failure_of, told_in
from rbee.queen.callers import Call, Caller
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import Placement

PASSED_HEADERS = ("content-type", "cache-control", "x-accel-buffering")
EVENT_STREAM = "text/event-stream"
AGAIN_S = 0.25
ANSWER_BYTES_MAX = 64 * 1024 * 1024
# An answer that failed when its head was sent already: the status and the body that it would have had.
_FAILED = re.compile(rb"([45]\d\d) ")


class Passing:
    """Asks workers, and passes their answers on."""

    def __init__(self, worker_api: WorkerApi, answering: Answering) -> None:
        self._worker_api = worker_api
        self._answering = answering

    async def pass_on(
        self, job: RunningJob, placement: Placement, call: Call, body: bytes, caller: Caller
    ) -> None:
        """Ask the worker for `body`, pass on what it says, and end the response.

        Raises:
            WorkerLostError: It ended, or broke off.
            HiveLostError: Its hive is lost.
            RbeeError: It refused, failed or stood still; by now it has stopped, or is being stopped itself.
        """
        try:
            await self._pass_while_alive(job, placement, call, body, caller)
            await caller.finish()
        except WorkerLostError as error:
            raise await self._answering.true_cause(placement, error) from error
        except HiveLostError:
            await self._answering.stop(placement, job.record.correlation_id)  # as soon as its hive is back
            raise
        except asyncio.CancelledError:
            if job.stop is not None:  # else the queen ends
                await self._settle(job, placement)
            raise
        except RbeeError as error:
            if placement.is_refused:  # no log waits for what its worker says at last
                raise
            fields = await self._settle(job, placement)
            told = failure_of(fields) if fields is not None and fields.get("outcome") == "failed" else None
            if told is None or told.code != error.code:
                raise
            # A refusal may quote what was asked. The closing line does not, and is what a log may hold of it.
            raise caller.narrated(error, told.message) from error

    async def _settle(self, job: RunningJob, placement: Placement) -> dict[str, Any] | None:
        """Wait for the closing line of a request that was refused, or left; where none comes, have it stopped.

        A worker that does not stop it is stopped itself, so that its slot is free.
        """
        fields = await self._answering.relayed_closing(placement)
        if fields is None:
            await self._answering.stop(placement, job.record.correlation_id)
        return fields

    async def _pass_while_alive(
        self, job: RunningJob, placement: Placement, call: Call, body: bytes, caller: Caller
    ) -> None:
        """Pass the bytes on for as long as the worker is known to be there and gives some."""
        passing = asyncio.ensure_future(self._pass(job, placement, call, body, caller))
        watching = asyncio.ensure_future(
            self._answering.relayed_alive(
                placement,
                call.operation,
                lambda: caller.is_waited_for,
                shown_every_s=0.0 if call.is_stream else BLANK_EVERY_S,
            )
        )
        try:
            await asyncio.wait({passing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                watching.result()  # raises
            passing.result()
        finally:
            for task in (passing, watching):
                task.cancel()
            await asyncio.gather(passing, watching, return_exceptions=True)

    async def _pass(self, job: RunningJob, placement: Placement, call: Call, body: bytes, caller: Caller) -> None:
        async with AsyncExitStack() as stack:
            answer = await self._ask(stack, placement, call.path, body, job.record.correlation_id)
            await placement.on_disk()
            headers = {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers}
            if answer.content_type == EVENT_STREAM:
                await self._pass_frames(answer, placement, call, headers, caller)
            else:
                whole = await _read_whole(answer, placement)
                await caller.start(answer.status, headers)
                await caller.send(caller.take(whole, placement.attempt))

    async def _ask(
        self, stack: AsyncExitStack, placement: Placement, path: str, body: bytes, correlation_id: str
    ) -> aiohttp.ClientResponse:
        """Ask until the worker answers: its slots may be full of jobs that were given up, its port not open yet.

        The same request asked again starts nothing twice. That the worker has ended is for its watcher to say.
        """
        began_at = asyncio.get_running_loop().time()
        was_cut = False
        refused: UnavailableError | None = None
        while True:
            asking = self._worker_api.relay(placement, path, body, correlation_id)
            try:
                return await stack.enter_async_context(asking)
            except OverloadedError:
                pass
            except ConflictError as error:
                if was_cut:
                    raise WorkerLostError("The worker was cut off before its answer began.") from error
                if refused is not None:  # it had taken the request on, and its engine refused
                    raise refused from error
                raise
            except (WorkerLostError, UnavailableError) as error:
                was_cut |= isinstance(error, WorkerLostError)
                refused = error if isinstance(error, UnavailableError) else refused
                if not self._answering.is_asked_again(placement, began_at):
                    raise
            await asyncio.sleep(AGAIN_S)

    async def _pass_frames(
        self,
        answer: aiohttp.ClientResponse,
        placement: Placement,
        call: Call,
        headers: dict[str, str],
        caller: Caller,
    ) -> None:
        """Pass a stream on, whole frames at a time.

        Raises:
            WorkerLostError: It ended without its last frame.
            RbeeError: What it told of in its last frame.
        """
        splitter, last = FrameSplitter(), b""
        try:
            async for part in answer.content.iter_any():
                frames = splitter.feed(part)
                if not frames:
                    continue
                placement.heard_at = asyncio.get_running_loop().time()
                failure = failure_start(frames)
                last = frames if failure < 0 else frames[:failure]
                if last and not caller.has_answer:  # until then, a refusal is a status
                    await caller.start(answer.status, headers)
                if last and (taken := caller.take(last, placement.attempt)):
                    await caller.send(taken)
                if failure >= 0:
                    raise told_in(frames[failure:])
        except aiohttp.ClientError:
            if not _has_last_frame(call.path, last):
                raise
        if not _has_last_frame(call.path, last):
            raise WorkerLostError("The worker broke off its answer.")


async def _read_whole(answer: aiohttp.ClientResponse, placement: Placement) -> bytes:
    """Read an answer that does not stream; the blanks before it tell that the worker is at it.

    Raises:
        WorkerError: It is too long.
        RbeeError: What it failed with after its head.
    """
    whole = bytearray()
    async for part in answer.content.iter_any():
        placement.heard_at = asyncio.get_running_loop().time()
        whole += part if whole else part.lstrip(b" ")
        if len(whole) > ANSWER_BYTES_MAX:
            raise WorkerError(f"The worker's answer has more than {ANSWER_BYTES_MAX} bytes.")
    failed = _FAILED.match(whole)
    if failed:
        raise error_from(int(failed[1]), bytes(whole[failed.end() :]), url=str(answer.url))
    return bytes(whole)


def _has_last_frame(path: str, frames: bytes) -> bool:
    return any(line_start(frames, line) >= 0 for line in DIALECTS[path].last_lines)
