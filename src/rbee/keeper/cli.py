"""The command `rbee`: what there is to type, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rbee.errors import RbeeError
from rbee.keeper.commands import chat, down, hives, infer, jobs, logs, models, status, up, workers
from rbee.keeper.exit_codes import EXIT_FINE, EXIT_INTERRUPTED, EXIT_OUTPUT_CLOSED
from rbee.keeper.render import OutputClosed, Screen
from rbee.keeper.settings import GlobalOptions

_GLOBAL_OPTIONS = ("--queen", "--home", "--correlation-id")

app = typer.Typer(
    name="rbee",
    help="Run language models on the computers you own, and know at every moment what each of them is doing.",
    epilog="--queen, --home and --correlation-id may stand anywhere. The API key is read from RBEE_API_KEY.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(infer.infer)
app.command()(chat.chat)
app.command()(up.up)
app.command()(down.down)
app.command()(status.status)
app.add_typer(jobs.app, name="jobs")
app.add_typer(workers.app, name="workers")
app.add_typer(hives.app, name="hives")
app.add_typer(models.app, name="models")
app.command()(logs.logs)


def _version(wanted: bool) -> None:
    if wanted:
        from rbee import __version__

        print(f"rbee {__version__}")
        raise typer.Exit


@app.callback()
def _globals(
    context: typer.Context,
    queen: Annotated[
        str | None, typer.Option(metavar="URL", help="The queen to ask (RBEE_QUEEN_URL); else the home's own.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where this installation lives (RBEE_HOME).")
    ] = None,
    correlation_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Ties together what this call causes (RBEE_CORRELATION_ID).")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = GlobalOptions(queen=queen, home=home, correlation_id=correlation_id)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rbee` and return its exit code: 0 fine, 1 job failed, 2 usage, 3 not ready, 130 interrupted."""
    code = _run(list(sys.argv[1:] if arguments is None else arguments))
    if code == EXIT_OUTPUT_CLOSED:
        _let_go_of_stdout()
    return code


def _run(arguments: list[str]) -> int:
    try:
        app(args=hoisted(arguments), prog_name="rbee")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_FINE
    except RbeeError as error:
        Screen().error(error)
        return error.exit_code
    except OutputClosed:
        return EXIT_OUTPUT_CLOSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return EXIT_FINE


def hoisted(arguments: Sequence[str]) -> list[str]:
    """Move the global options to the front, so that they may stand behind a command as well."""
    front: list[str] = []
    rest: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word == "--":
            rest += [word, *left]
            break
        if word in _GLOBAL_OPTIONS and left:
            front += [word, left.pop(0)]
        elif word.partition("=")[0] in _GLOBAL_OPTIONS and "=" in word:
            front.append(word)
        else:
            rest.append(word)
    return front + rest


def _let_go_of_stdout() -> None:
    """Point stdout nowhere, or its last flush would complain of a reader that is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
