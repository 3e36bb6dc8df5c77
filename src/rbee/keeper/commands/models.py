"""`rbee models`: the model files on the hives' disks."""

from __future__ import annotations

from typing import Annotated

import typer

from rbee.keeper.commands.infer import AsJson, Quiet

app = typer.Typer(help="Fetch, list, show and remove models; tell what fits.", no_args_is_help=True)

_NAME = "name:tag, hf:org/repo:QUANT, the path of a .gguf file, or an alias."
ModelArgument = Annotated[str, typer.Argument(help=_NAME)]
ModelArguments = Annotated[list[str], typer.Argument(help=_NAME, metavar="MODEL...")]
Hive = Annotated[str | None, typer.Option("--hive", metavar="ID", help="On this hive.")]


@app.command("pull")
def pull_models(
    context: typer.Context,
    models: ModelArguments,
    hive: Hive = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Bring models' files to a hive; what an interrupted pull left is gone on with."""
    from rbee.keeper.asking import model_argument
    from rbee.keeper.ordering import order_all

    wishes = [{"model": model_argument(model), "hive_id": hive} for model in dict.fromkeys(models)]
    settings = context.obj.settings()
    raise typer.Exit(
        order_all(settings, "model_download", wishes, starts_stack=True, quiet=quiet, as_json=as_json)
    )


@app.command("list")
def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models on every hive's disk, what is being fetched, and what cannot be loaded."""
    from rbee.keeper.model_tables import faults, models_table
    from rbee.keeper.reading import read
    from rbee.keeper.tables import show_table

    screen, hives = read(context.obj.settings(), lambda client: client.hives())
    if as_json:
        screen.json(
            [
                {
                    "hive_id": hive.hive_id,
                    "models": hive.models,
                    "downloads": hive.downloads,
                    "unusable_models": hive.unusable_models,
                }
                for hive in hives
            ]
        )
    else:
        show_table(*models_table(hives))
        for fault in faults(hives):
            screen.print(fault)


@app.command("show")
def show_model(context: typer.Context, model: ModelArgument, as_json: AsJson = False) -> None:
    """Show all that is known of a model, the settings in force for it, and the memory it needs."""
    from rbee.client import JobClient
    from rbee.keeper.asking import model_argument
    from rbee.keeper.model_tables import ModelShown, model_fields, shown_model
    from rbee.keeper.reading import read
    from rbee.keeper.tables import show_table

    name = model_argument(model) or model

    async def ask(client: JobClient) -> ModelShown:
        return shown_model(name, await client.hives(), await client.model_settings())

    screen, shown = read(context.obj.settings(), ask)
    if as_json:
        screen.json(shown)
    else:
        show_table(("field", "value"), model_fields(shown))


@app.command("rm")
def remove_model(
    context: typer.Context, model: ModelArgument, hive: Hive = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Remove a model's file, or what an interrupted pull left of it, from a hive."""
    from rbee.keeper.asking import model_argument
    from rbee.keeper.ordering import order

    wanted = {"model": model_argument(model), "hive_id": hive}
    settings = context.obj.settings()
    raise typer.Exit(order(settings, "model_delete", wanted, starts_stack=False, quiet=quiet, as_json=as_json))


@app.command("recommend")
def recommend_models(context: typer.Context, as_json: AsJson = False) -> None:
    """Tell which models fit each device with the slots and the context in force, and what to try first."""
    from rbee.client import JobClient
    from rbee.contracts.model_settings import SettingsInForce
    from rbee.keeper.model_tables import classes_table, fits_table
    from rbee.keeper.reading import read
    from rbee.keeper.recommending import Recommendation, recommend
    from rbee.keeper.tables import show_table

    async def ask(client: JobClient) -> tuple[Recommendation, SettingsInForce]:
        settings = await client.model_settings()
        return recommend(await client.hives(), settings), settings

    screen, (found, settings) = read(context.obj.settings(), ask)
    if as_json:
        screen.json(found)
        return
    show_table(*fits_table(found))
    for device in found.devices:
        if not device.is_usable:
            screen.print(f"{device.device} ({device.name}) of {device.hive_id} is not used: {device.note}")
    screen.print(
        f"\nAny other model, by its size: the best quantization that fits with {settings.slots} slots of "
        f"{settings.context_tokens} tokens, and the memory it needs."
    )
    show_table(*classes_table(found))
    screen.print(f"\n{found.why}")
    if found.command is not None:
        screen.print(f"Try: {found.command}")
