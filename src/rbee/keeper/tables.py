"""Tables: drawn on a terminal, plain columns otherwise; and numbers as people read them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TextIO

import msgspec
from msgspec import Struct

from rbee.narration.lines import plain_text


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], out: TextIO | None = None) -> None:
    """Write rows under their column names; None is shown as a dash."""
    out = out or sys.stdout
    cells = [[_cell(value) for value in row] for row in rows]
    if out.isatty():
        _draw(columns, cells, out)
    else:
        out.write(plain_table(columns, cells))
    out.flush()


def show_fields(value: Struct, out: TextIO | None = None, **more: object) -> None:
    """Write what a struct holds and what is given besides, a field a line; what is nested, as JSON."""
    fields = {**msgspec.to_builtins(value), **more}
    rows = [
        (name, msgspec.json.encode(held).decode() if isinstance(held, (dict, list)) else held)
        for name, held in fields.items()
    ]
    show_table(("field", "value"), rows, out)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns, two spaces between them, a header first."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=out).print(table)


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else plain_text(str(value)).replace("\n", " ")


def size(size_bytes: int | None) -> str | None:
    """Write a number of bytes as people do: `98.4 MB`."""
    if size_bytes is None:
        return None
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def ago(moment: datetime, now: datetime | None = None) -> str:
    """Write how long ago a moment was: `12 s`, `5 min`, `3 h`, `2 d`."""
    seconds = max(0.0, ((now or datetime.now(UTC)) - moment).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
