"""`rbee models`: the model files on the hives' disks."""

from __future__ import annotations

from typing import Annotated

import typer

from rbee.keeper.commands.infer import AsJson, Quiet

app = typer.Typer(help="Fetch, list and remove models.", no_args_is_help=True)

ModelArgument = Annotated[str, typer.Argument(help="name:tag, hf:org/repo:QUANT or the path of a .gguf file.")]
Hive = Annotated[str | None, typer.Option("--hive", metavar="ID", help="On this hive.")]


@app.command("pull")
def pull_model(
    context: typer.Context, model: ModelArgument, hive: Hive = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Bring a model's file to a hive."""
    from rbee.keeper.asking import model_argument
    from rbee.keeper.ordering import order

    wanted = {"model": model_argument(model), "hive_id": hive}
    settings = context.obj.settings()
    raise typer.Exit(order(settings, "model_download", wanted, starts_stack=True, quiet=quiet, as_json=as_json))


@app.command("list")
def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models on every hive's disk."""
    from rbee.keeper.reading import read
    from rbee.keeper.tables import show_table, size

    screen, hives = read(context.obj.settings(), lambda client: client.hives())
    if as_json:
        screen.json([{"hive_id": hive.hive_id, "models": hive.models} for hive in hives])
        return
    show_table(
        ("model", "size", "hive", "path"),
        [
            (model.model, size(model.size_bytes), hive.hive_id, model.path)
            for hive in hives
            for model in hive.models
        ],
    )


@app.command("rm")
def remove_model(
    context: typer.Context, model: ModelArgument, hive: Hive = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Remove a model's file from a hive."""
    from rbee.keeper.asking import model_argument
    from rbee.keeper.ordering import order

    wanted = {"model": model_argument(model), "hive_id": hive}
    settings = context.obj.settings()
    raise typer.Exit(order(settings, "model_delete", wanted, starts_stack=False, quiet=quiet, as_json=as_json))
