"""`rbee jobs`: what was asked for, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rbee.keeper.commands.infer import AsJson, Quiet

if TYPE_CHECKING:
    import asyncio

app = typer.Typer(help="List, show, follow and cancel jobs.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@app.command("list")
def list_jobs(
    context: typer.Context,
    state: Annotated[
        str | None, typer.Option(help="Only jobs in this state: queued, running, completed, failed, cancelled.")
    ] = None,
    operation: Annotated[str | None, typer.Option(help="Only jobs of this operation, such as infer.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="How many, newest first (1 to 500).")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    from rbee.keeper.reading import read
    from rbee.keeper.tables import ago, show_table

    screen, page = read(
        context.obj.settings(),
        lambda client: client.jobs(state=state, operation=operation, model=model, limit=limit),
    )
    if as_json:
        screen.json(page.data)
        return
    show_table(
        ("job", "operation", "state", "reason", "model", "created"),
        [
            (job.job_id, job.operation, job.state, job.reason, job.model, ago(job.created_at) + " ago")
            for job in page.data
        ],
    )


@app.command("show")
def show_job(context: typer.Context, job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job, and where it was placed and why."""
    from rbee.keeper.log_reading import last_placement
    from rbee.keeper.reading import read
    from rbee.keeper.tables import show_fields

    settings = context.obj.settings()
    screen, job = read(settings, lambda client: client.job(job_id))
    if as_json:
        screen.json(job)
    else:
        _, placement = read(settings, lambda client: last_placement(client, job_id))
        show_fields(job, placement=placement)


@app.command("follow")
def follow_job(
    context: typer.Context,
    job_id: JobId,
    after: Annotated[int, typer.Option(metavar="N", min=0, help="Begin behind event number N.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Each event as one JSON line on stdout.")] = False,
    quiet: Quiet = False,
) -> None:
    """Follow a job's log from its first event to its end. Ctrl-C leaves; the job goes on."""
    from rbee.keeper.answering import client_of, draw_log, verdict
    from rbee.keeper.local_stack import require_queen
    from rbee.keeper.render import Screen
    from rbee.keeper.running import run_stoppable, unless_stopped

    settings = context.obj.settings()
    url = require_queen(settings)
    screen = Screen(quiet=quiet, as_json=as_json)

    async def main(stop: asyncio.Event) -> int:
        async with client_of(settings, url, screen) as client:
            return verdict(await unless_stopped(stop, draw_log(client, job_id, screen, after=after)), screen)

    raise typer.Exit(run_stoppable(main))


@app.command("cancel")
def cancel_job(context: typer.Context, job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job; one that has ended stays as it is."""
    from rbee.keeper.reading import read

    screen, job = read(context.obj.settings(), lambda client: client.cancel(job_id))
    if as_json:
        screen.json(job)
    else:
        screen.print(f"{job.job_id} is {'being cancelled' if job.ended_at is None else job.state}.")
