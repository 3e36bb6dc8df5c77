"""The progress of downloads: a bar on a terminal, else a line at each tenth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_Key = tuple[str, str]
"""A job and a model."""


def is_progress(event: dict[str, Any]) -> bool:
    """Tell whether a narration says how far a download is."""
    return event.get("action") == "model_download" and isinstance(_fields(event).get("done_bytes"), int)


def is_done(event: dict[str, Any]) -> bool:
    """Tell whether a download has ended, and what it brought was checked."""
    return _fields(event).get("is_done") is True


def tenth(event: dict[str, Any]) -> int | None:
    """Return how many tenths are done, 0 to 10; None when the whole is not known."""
    fields = _fields(event)
    total = fields.get("total_bytes")
    if not isinstance(total, int) or total <= 0:
        return None
    return min(10, max(0, int(fields["done_bytes"]) * 10 // total))


class Downloads:
    """What is drawn of the downloads on one stream: a bar for each that has not ended."""

    def __init__(self, err: TextIO) -> None:
        self._err = err
        self._is_terminal = err.isatty()
        self._told: dict[_Key, int | None] = {}
        self._at: dict[_Key, tuple[int, int | None]] = {}
        self._bar: Progress | None = None
        self._tasks: dict[_Key, TaskID] = {}

    def is_drawn_as_bar(self, event: dict[str, Any]) -> bool:
        """Tell whether the event moves the bar; a finished download is told by a line."""
        return self._is_terminal and not is_done(event)

    def is_worth_a_line(self, event: dict[str, Any]) -> bool:
        """Tell whether it has ended, or a tenth was reached that was not told yet."""
        key, reached = _key(event), tenth(event)
        self._at.pop(key, None)
        is_new = is_done(event) or key not in self._told or self._told[key] != reached
        self._told[key] = reached
        return is_new

    def move_bar(self, event: dict[str, Any]) -> None:
        """Draw the bars of all downloads where they are, this one where the event says."""
        key, fields = _key(event), _fields(event)
        self._at[key] = (fields["done_bytes"], fields.get("total_bytes") or None)
        if self._bar is None:
            self._bar = _new_bar(self._err)
            self._bar.start()
        for each, (done, total) in self._at.items():
            if each not in self._tasks:
                self._tasks[each] = self._bar.add_task(each[1], total=total)
            self._bar.update(self._tasks[each], completed=done, total=total)
        self._bar.refresh()

    def forget(self, job_id: str) -> None:
        """Draw no bar any more for a job that has ended."""
        if any(key[0] == job_id for key in self._at):
            self.clear()
            self._at = {key: at for key, at in self._at.items() if key[0] != job_id}

    def clear(self) -> None:
        """Take the bars off the screen, so that something else can be drawn there."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks = {}


def _fields(event: dict[str, Any]) -> dict[str, Any]:
    fields = event.get("fields")
    return fields if isinstance(fields, dict) else {}


def _key(event: dict[str, Any]) -> _Key:
    model = event.get("model") or _fields(event).get("model") or "model"
    return str(event.get("job_id") or ""), str(model)


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
