"""Many kept answers at once: what a token costs queen and hive, and how late it is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from benchmarks.bench_pipeline import run
from benchmarks.report import Row, main

TITLE = "Kept token streams, each with a reader of its own"


def measure(is_small: bool) -> Sequence[Row]:
    """Measure; ends the program with 1 when an event was lost or came twice."""
    streams, rate, seconds = (8, 50, 1.0) if is_small else (128, 200, 10.0)
    found = asyncio.run(run(int(rate * seconds), files=1, jobs=streams, rate=rate * streams))
    if found.wrong:
        sys.exit("Lost or repeated: " + "; ".join(found.wrong))
    spent_s = (found.spent_s["queen"] + found.spent_s["hive"]) * 1e6 / found.events
    wanted = ("", "") if is_small else ("<= 40 CPU-s", "<= 8 ms")
    return [
        Row(f"{streams} streams at {rate}/s: queen + hive per million", f"{spent_s:.1f} CPU-s", wanted=wanted[0]),
        Row("p50 / p99", f"{found.p50_ms:.2f} / {found.p99_ms:.2f} ms", wanted=wanted[1]),
        Row("events read", f"{found.per_s:,.0f}/s"),
        found.cpu_row("each"),
    ]


if __name__ == "__main__":
    main(TITLE, measure)
