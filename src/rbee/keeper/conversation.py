"""A conversation: the messages so far, and the loop that adds to them."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from rbee.client import JobClient
from rbee.errors import RbeeError
from rbee.keeper.answering import ask, client_of
from rbee.keeper.asking import operation
from rbee.keeper.exit_codes import EXIT_FINE, EXIT_OUTPUT_CLOSED
from rbee.keeper.local_stack import ensure_queen
from rbee.keeper.render import Screen
from rbee.keeper.running import unless_stopped, until_done
from rbee.keeper.settings import KeeperSettings

LEAVE = ("/exit", "/quit", "/bye")


class Conversation:
    """The messages so far; `fields` (model, system, …) go with every question."""

    def __init__(self, **fields: Any) -> None:
        self.messages: list[dict[str, str]] = []
        self._fields = fields

    def question(self, text: str) -> Any:
        """Return the operation that asks `text` after all that was said.

        Raises:
            InvalidRequestError: A value the operation does not take.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        return operation("infer", messages=asked, **self._fields)

    def add(self, text: str, answer: str) -> None:
        """Remember a question and its answer, which may be half of one; without any, both are forgotten."""
        if answer:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


class ListeningScreen(Screen):
    """A screen that remembers the answer it shows."""

    heard = ""

    def answer(self, text: str) -> None:
        """Show a piece of the answer, and remember it."""
        self.heard += text
        super().answer(text)


def hold(conversation: Conversation, settings: KeeperSettings, *, quiet: bool) -> int:
    """Ask, answer, and so on until /exit or Ctrl-D.

    Raises:
        RbeeError: There is no queen to talk to, and none can be started.
    """
    conversation.question("?")  # what cannot be asked is refused before anything is started
    with asyncio.Runner() as runner:
        screen = Screen(quiet=quiet)

        url = ""

        async def prepare(stop: asyncio.Event) -> int:
            nonlocal url
            url = await unless_stopped(stop, ensure_queen(settings, screen))
            return EXIT_FINE

        code = runner.run(until_done(prepare))
        while code == EXIT_FINE:
            text = _line()
            if text is None or text.strip() in LEAVE:
                break
            if text.strip() and _turn(runner, conversation, settings, url, text, quiet) == EXIT_OUTPUT_CLOSED:
                code = EXIT_OUTPUT_CLOSED
    return code


def _line() -> str | None:
    """Read the next line; None at the end. Ctrl-C drops the line that was begun."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends the conversation)", file=sys.stderr)


def _turn(
    runner: asyncio.Runner,
    conversation: Conversation,
    settings: KeeperSettings,
    url: str,
    text: str,
    quiet: bool,
) -> int:
    """Ask one question and show its answer; what goes wrong is told and ends nothing."""
    screen = ListeningScreen(quiet=quiet)

    async def main(stop: asyncio.Event) -> int:
        async with client_of(settings, url, screen) as client:
            return await _answered(client, stop)

    async def _answered(client: JobClient, stop: asyncio.Event) -> int:
        return await ask(client, conversation.question(text), screen, stop)

    try:
        code = runner.run(until_done(main))
    except RbeeError as error:
        screen.error(error)
        code = error.exit_code
    conversation.add(text, screen.heard)
    return code
