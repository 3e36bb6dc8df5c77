"""Draw on the terminal: the answer on stdout, narration and problems on stderr."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from rbee.contracts.events import encode_json
from rbee.errors import RbeeError
from rbee.keeper.progress import Downloads, is_progress
from rbee.narration.lines import format_bracket, plain_text

_COLOURS = {"keeper": "36", "queen": "35", "hive": "33", "worker": "32"}
_OTHER_COLOUR = "34"
_LAST_LINES_MAX = 20


class OutputClosed(Exception):
    """Whoever read our stdout has gone."""


def is_coloured(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal that wants colour (`NO_COLOR`, `TERM=dumb`)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def draw(event: dict[str, Any], *, coloured: bool) -> str:
    """Return an event's bracket form, its actor column in colour where wanted."""
    line = format_bracket(event)
    if not coloured:
        return line
    actor, bracket, rest = line.partition("]")
    colour = _COLOURS.get(str(event.get("actor")), _OTHER_COLOUR)
    return f"\x1b[{colour}m{actor}{bracket}\x1b[0m{rest}"


class Screen:
    """The two streams of the keeper, which may be one and the same terminal.

    Args:
        quiet: Draw no narration, neither of the job nor of the keeper; problems are still told.
        as_json: Write each event on stdout as one JSON line, and draw none of them.
    """

    def __init__(
        self, out: TextIO | None = None, err: TextIO | None = None, *, quiet: bool = False, as_json: bool = False
    ) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._quiet = quiet
        self._as_json = as_json
        self._coloured = is_coloured(self._err)
        self._plain_answer = self._out.isatty()
        self._is_shared = _are_the_same(self._out, self._err)
        self._answer_is_open = False
        self._line_is_open = False
        self._downloads = Downloads(self._err)

    def say(self, action: str, message: str) -> None:
        """Draw a sentence of the keeper's own."""
        if not self._quiet:
            self._draw({"actor": "keeper", "action": action, "message": message})

    def show(self, event: dict[str, Any]) -> None:
        """Draw one event of a log, each kind in its way.

        Raises:
            OutputClosed: Nobody reads stdout any more.
        """
        kind = event.get("kind")
        if self._as_json:
            self.json(event)
        elif kind == "token":
            if event.get("channel") in (None, "answer"):
                self.answer(str(event.get("text", "")))
        elif kind == "narration":
            self.narrate(event)
        elif kind == "end":
            self._downloads.forget(str(event.get("job_id") or ""))
        elif kind == "gap":
            self.narrate({"actor": "queen", "action": "queen_gap", "message": _gap(event)})

    def narrate(self, event: dict[str, Any]) -> None:
        """Draw a narration; of a download's many only what a person wants to see."""
        if self._quiet:
            return
        if is_progress(event):
            if self._downloads.is_drawn_as_bar(event):
                self._break_line()
                self._downloads.move_bar(event)
                return
            if not self._downloads.is_worth_a_line(event):
                return
        self._draw(event)

    def answer(self, text: str) -> None:
        """Write a piece of the answer on stdout, at once.

        Raises:
            OutputClosed: Nobody reads it any more.
        """
        if text:
            self._downloads.clear()
            self._write_out(plain_text(text) if self._plain_answer else text)
            self._answer_is_open = self._line_is_open = not text.endswith("\n")

    def finish_answer(self) -> None:
        """End the answer's last line, where the answer did not do so itself."""
        self._downloads.clear()
        is_open = self._line_is_open if self._is_shared else self._answer_is_open
        if is_open:
            self._write_out("\n")
        self._answer_is_open = self._line_is_open = False

    def json(self, value: Any) -> None:
        """Write a value as one line of JSON on stdout.

        Raises:
            OutputClosed: Nobody reads it any more.
        """
        self._write_out(encode_json(value).decode() + "\n")

    def print(self, text: str) -> None:
        """Write a line on stdout, without control characters.

        Raises:
            OutputClosed: Nobody reads it any more.
        """
        self._write_out(plain_text(text) + "\n")

    def log_entry(self, event: dict[str, Any], text: str) -> None:
        """Write an entry of a log that was asked for on stdout: as JSON, or as the text given.

        Raises:
            OutputClosed: Nobody reads it any more.
        """
        if self._as_json:
            self.json(event)
        else:
            self.print(text)

    def problem(self, message: str, *, last_lines: list[str] | None = None, remedy: str = "") -> None:
        """Tell on stderr what failed, the last lines of what failed, and what to do; quiet or not."""
        lines = [f"rbee: {message}"]
        lines += [f"    | {line}" for line in (last_lines or [])[-_LAST_LINES_MAX:]]
        if remedy:
            lines.append(remedy)
        self._write_err("".join(plain_text(line).replace("\n", " ") + "\n" for line in lines))

    def error(self, error: RbeeError) -> None:
        """Tell an error."""
        self.problem(error.message, last_lines=error.details.get("last_lines"), remedy=error.remedy)

    def _draw(self, event: dict[str, Any]) -> None:
        self._write_err(draw(event, coloured=self._coloured) + "\n")

    def _write_err(self, text: str) -> None:
        """Write on stderr at the start of a line; a stderr that is gone never stops the answer."""
        self._downloads.clear()
        self._break_line()
        try:
            self._err.write(text)
            self._err.flush()
        except (OSError, ValueError):
            self._quiet = True

    def _break_line(self) -> None:
        """Where both streams are one terminal, go to the start of a line."""
        if self._is_shared and self._line_is_open:
            self._line_is_open = False
            try:
                self._err.write("\n")
            except (OSError, ValueError):
                self._quiet = True

    def _write_out(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError as error:
            raise OutputClosed from error


def _gap(event: dict[str, Any]) -> str:
    lost = [f"{event[f'lost_{unit}']} {unit}" for unit in ("lines", "bytes") if event.get(f"lost_{unit}")]
    return (
        f"Something is missing here ({event.get('reason', 'unknown')}): {' and '.join(lost) or 'of unknown size'}."
    )


def _are_the_same(one: TextIO, other: TextIO) -> bool:
    """Tell whether two streams end in the same terminal, pipe or file."""
    try:
        return os.path.sameopenfile(one.fileno(), other.fileno())
    except (OSError, ValueError):
        return False
