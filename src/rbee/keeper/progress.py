"""The progress of downloads: a bar on a terminal, else a line at each tenth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def is_progress(event: dict[str, Any]) -> bool:
    """Tell whether a narration says how far a download is."""
    return event.get("action") == "model_download" and isinstance(_fields(event).get("done_bytes"), int)


def tenth(event: dict[str, Any]) -> int | None:
    """Return how many tenths are done, 0 to 10; None when the whole is not known."""
    fields = _fields(event)
    total = fields.get("total_bytes")
    if not isinstance(total, int) or total <= 0:
        return None
    return min(10, max(0, int(fields["done_bytes"]) * 10 // total))


class Downloads:
    """What is drawn of the downloads on one stream."""

    def __init__(self, err: TextIO) -> None:
        self._err = err
        self._is_terminal = err.isatty()
        self._told: dict[str, int | None] = {}
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def is_drawn_as_bar(self, event: dict[str, Any]) -> bool:
        """Tell whether the event moves the bar; a finished download is told by a line."""
        return self._is_terminal and tenth(event) != 10

    def is_worth_a_line(self, event: dict[str, Any]) -> bool:
        """Tell whether a tenth was reached that was not told yet."""
        model, reached = _model(event), tenth(event)
        is_new = model not in self._told or self._told[model] != reached
        self._told[model] = reached
        return is_new

    def move_bar(self, event: dict[str, Any]) -> None:
        """Draw the bar where the event says it is."""
        if self._bar is None:
            self._bar = _new_bar(self._err)
            self._bar.start()
        model, fields = _model(event), _fields(event)
        total = fields.get("total_bytes") or None
        if model not in self._tasks:
            self._tasks[model] = self._bar.add_task(model, total=total)
        self._bar.update(self._tasks[model], completed=fields["done_bytes"], total=total, refresh=True)

    def clear(self) -> None:
        """Take the bar off the screen, so that something else can be drawn there."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks = {}


def _fields(event: dict[str, Any]) -> dict[str, Any]:
    fields = event.get("fields")
    return fields if isinstance(fields, dict) else {}


def _model(event: dict[str, Any]) -> str:
    return str(event.get("model") or _fields(event).get("model") or "model")


def _new_bar(err: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(file=err),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
