"""`rbee workers`: the processes that hold models."""

from __future__ import annotations

from typing import Annotated

import typer

from rbee.keeper.commands.infer import AsJson, Quiet

app = typer.Typer(help="List, start and stop workers.", no_args_is_help=True)


@app.command("list")
def list_workers(context: typer.Context, as_json: AsJson = False) -> None:
    """List the workers of all hives."""
    from rbee.keeper.reading import read
    from rbee.keeper.tables import show_table

    screen, workers = read(context.obj.settings(), lambda client: client.workers())
    if as_json:
        screen.json(workers)
        return
    show_table(
        ("worker", "state", "model", "slots", "pid", "hive"),
        [
            (
                worker.worker_id,
                worker.state,
                worker.model,
                f"{worker.slots_used}/{worker.slots}",
                worker.pid,
                worker.hive_id,
            )
            for worker in workers
        ],
    )


@app.command("spawn")
def spawn_worker(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="name:tag, hf:org/repo:QUANT or the path of a .gguf file.")],
    hive: Annotated[str | None, typer.Option(metavar="ID", help="On this hive.")] = None,
    slots: Annotated[int | None, typer.Option(metavar="N", help="How many answers at once (4).")] = None,
    context_tokens: Annotated[int | None, typer.Option(metavar="N", help="Context of one answer (4096).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, …")] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="llama_cpp, or an engine of the hive's rbee.toml.")
    ] = None,
    keep_alive: Annotated[
        float | None, typer.Option(metavar="S", help="Idle seconds until it stops; -1: never.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Start a worker with a model loaded."""
    from rbee.keeper.asking import model_argument
    from rbee.keeper.ordering import order

    wanted = {
        "model": model_argument(model),
        "hive_id": hive,
        "slots": slots,
        "context_tokens": context_tokens,
        "device": device,
        "engine": engine,
        "keep_alive": keep_alive,
    }
    settings = context.obj.settings()
    raise typer.Exit(order(settings, "worker_spawn", wanted, starts_stack=True, quiet=quiet, as_json=as_json))


@app.command("stop")
def stop_worker(
    context: typer.Context,
    worker_id: Annotated[str, typer.Argument(metavar="WORKER", help="The worker's id.")],
    drain: Annotated[float | None, typer.Option(metavar="S", min=0, help="Let answers end first (30).")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stop a worker, and return when its process and memory are really gone."""
    from rbee.keeper.ordering import order

    wanted = {"worker_id": worker_id, "drain_s": drain}
    settings = context.obj.settings()
    raise typer.Exit(order(settings, "worker_stop", wanted, starts_stack=False, quiet=quiet, as_json=as_json))
