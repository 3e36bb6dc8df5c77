"""`rbee chat`: a conversation, line by line."""

from __future__ import annotations

import typer

from rbee.keeper.commands.infer import MaxTokens, Model, Quiet, System, Temperature


def chat(
    context: typer.Context,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    quiet: Quiet = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; /exit or Ctrl-D ends the conversation."""
    from rbee.keeper.asking import model_argument
    from rbee.keeper.conversation import Conversation, hold

    conversation = Conversation(
        model=model_argument(model), system=system, max_tokens=max_tokens, temperature=temperature
    )
    raise typer.Exit(hold(conversation, context.obj.settings(), quiet=quiet))
