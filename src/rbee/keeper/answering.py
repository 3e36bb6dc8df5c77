"""Submit a job and draw its log to its end; on request cancel it instead."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import Any

from rbee.client import JobClient
from rbee.contracts.operations import Operation
from rbee.contracts.states import JobState
from rbee.contracts.views import JobView
from rbee.errors import RbeeError
from rbee.keeper.exit_codes import EXIT_FAILED, EXIT_FINE, EXIT_INTERRUPTED, EXIT_OUTPUT_CLOSED
from rbee.keeper.local_stack import find_queen
from rbee.keeper.render import OutputClosed, Screen
from rbee.keeper.settings import KeeperSettings

CANCEL_WAIT_S = 5.0


def client_of(settings: KeeperSettings, url: str, screen: Screen) -> JobClient:
    """Make the client of a command, which says when its queen is away and when she is back.

    A queen that was found in the home is looked for there again when she has moved; one that was named is not.
    """

    def on_contact(is_there: bool, why: str) -> None:
        if is_there:
            screen.say("keeper_back", "The queen is back; going on where it was.")
        else:
            screen.say("keeper_wait", f"The queen cannot be reached ({why}); trying again.")

    return JobClient(
        url,
        api_key=settings.api_key,
        correlation_id=settings.correlation_id,
        on_contact=on_contact,
        find_url=None if settings.queen_url else partial(find_queen, settings),
    )


async def ask(client: JobClient, operation: Operation, screen: Screen, stop: asyncio.Event) -> int:
    """Submit an operation, draw its log, and return the exit code its end stands for."""
    accepted = await client.submit(operation)
    return await watch(client, accepted.job_id, screen, stop)


async def watch(client: JobClient, job_id: str, screen: Screen, stop: asyncio.Event) -> int:
    """Draw a job's log to its end; when `stop` is set, or nobody reads the answer, cancel the job.

    Returns:
        0 completed, 1 failed or cancelled by somebody else, 130 cancelled here, 141 stdout was closed.
    """
    drawing = asyncio.ensure_future(draw_log(client, job_id, screen))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({drawing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            return await _cancelled(client, job_id, screen, drawing)
        try:
            end = drawing.result()
        except OutputClosed:
            await _ask_to_cancel(client, job_id, screen)
            return EXIT_OUTPUT_CLOSED
        return verdict(end, screen)
    finally:
        drawing.cancel()
        stopping.cancel()
        await asyncio.gather(drawing, stopping, return_exceptions=True)


async def draw_log(client: JobClient, job_id: str, screen: Screen, *, after: int = 0) -> dict[str, Any]:
    """Draw a job's log, and return its last event.

    Raises:
        RbeeError: The log cannot be read.
        OutputClosed: Nobody reads stdout any more.
    """
    end: dict[str, Any] = {}
    try:
        async with aclosing(client.follow(job_id, after=after)) as events:
            async for event in events:
                screen.show(event)
                end = event
    finally:
        screen.finish_answer()
    return end if end.get("kind") == "end" else _end_of(await client.job(job_id))


def _end_of(job: JobView) -> dict[str, Any]:
    """Make the end event of a job whose log had nothing more to say."""
    error = None if job.error is None else {"message": job.error.message, "remedy": job.error.remedy}
    return {"kind": "end", "state": str(job.state), "message": job.message, "error": error}


async def _cancelled(
    client: JobClient, job_id: str, screen: Screen, drawing: asyncio.Future[dict[str, Any]]
) -> int:
    """Cancel the job, wait a moment for its end, and say how that went."""
    screen.say("keeper_cancel", f"Cancelling {job_id}.")
    if await _ask_to_cancel(client, job_id, screen):
        await asyncio.wait({drawing}, timeout=CANCEL_WAIT_S)
        if not drawing.done():
            screen.say("keeper_cancel", f"{job_id} is still being stopped; rbee jobs show {job_id} tells more.")
    return EXIT_INTERRUPTED


async def _ask_to_cancel(client: JobClient, job_id: str, screen: Screen) -> bool:
    try:
        async with asyncio.timeout(CANCEL_WAIT_S):
            await client.cancel(job_id)
    except RbeeError as error:
        screen.problem(f"{job_id} could not be cancelled: {error.message}", remedy=error.remedy)
        return False
    except TimeoutError:
        screen.problem(
            f"{job_id} could not be cancelled: the queen did not answer.",
            remedy=f"Later: rbee jobs cancel {job_id}",
        )
        return False
    return True


def verdict(end: dict[str, Any], screen: Screen) -> int:
    """Tell what went wrong, if anything did, and return the exit code."""
    if end.get("state") == JobState.COMPLETED:
        return EXIT_FINE
    error = end.get("error") or {}
    if end.get("state") == JobState.CANCELLED:
        screen.problem("The job was cancelled.")
    else:
        message = error.get("message") or end.get("message") or "The job failed."
        screen.problem(
            f"{message}", last_lines=list(error.get("last_lines") or []), remedy=str(error.get("remedy") or "")
        )
    return EXIT_FAILED
