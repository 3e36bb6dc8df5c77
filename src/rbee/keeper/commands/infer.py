"""`rbee infer`: ask once, read the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import asyncio

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="name:tag, hf:org/repo:QUANT or the path of a .gguf file."),
]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Stop an answer after so many tokens.")]
Temperature = Annotated[float | None, typer.Option(metavar="T", help="0 always takes the likeliest word.")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="How the model shall behave.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No narration on stderr.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]


def infer(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The question; `-` or nothing reads it from stdin.")] = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed draws the same words.")] = None,
    system: System = None,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="Fail after so many seconds.")] = None,
    queue_timeout: Annotated[
        float | None,
        typer.Option(metavar="S", help="Fail if its turn has not come after so many seconds."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Each event as one JSON line on stdout.")] = False,
    quiet: Quiet = False,
) -> None:
    """Ask a model; the answer comes on stdout as it is made, the narration on stderr.

    Starts queen and hive in the background, and fetches a model, where there is none yet. Ctrl-C cancels.
    """
    from rbee.keeper.answering import ask, client_of
    from rbee.keeper.asking import model_argument, operation, read_prompt
    from rbee.keeper.local_stack import ensure_queen
    from rbee.keeper.render import Screen
    from rbee.keeper.running import run_stoppable, unless_stopped

    settings = context.obj.settings()
    wanted = operation(
        "infer",
        prompt=read_prompt(prompt),
        model=model_argument(model),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        system=system,
        timeout_s=timeout,
        queue_timeout_s=queue_timeout,
    )
    screen = Screen(quiet=quiet, as_json=as_json)

    async def main(stop: asyncio.Event) -> int:
        url = await unless_stopped(stop, ensure_queen(settings, screen))
        async with client_of(settings, url, screen) as client:
            return await ask(client, wanted, screen, stop)

    raise typer.Exit(run_stoppable(main))
