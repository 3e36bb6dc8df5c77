"""See runs of the simulation: `python -m tests.chaos.simulation SEED [COUNT] [--log JOB]`."""

from __future__ import annotations

import argparse
import gc
import json
import sqlite3
from pathlib import Path

from rbee.contracts.events import events_in
from tests.chaos.simulation.run import Outcome, grounds, simulate

COLLECT_EVERY = 20


def main() -> None:
    """Run some seeds and print what each came to; with `--log`, also the logs whose names end so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--log", help="the end of a job's or worker's id")
    given = parser.parse_args()
    with grounds() as where:
        for seed in range(given.seed, given.seed + given.count):
            show(simulate(seed, where, look=lambda database: print_logs(database, given.log)))
            if seed % COLLECT_EVERY == 0:
                gc.collect()


def show(outcome: Outcome) -> None:
    """Print one line, and one for each thing that did not hold."""
    print(
        f"{outcome.seed} {outcome.digest} jobs {outcome.jobs} virtual {outcome.virtual_s:.0f} s, "
        f"rest {outcome.rest_s:.1f} s, cpu {outcome.cpu_s:.2f} s {outcome.states} {outcome.made} "
        f"{ {word: count for word, count in outcome.said.items() if count} }",
        flush=True,
    )
    for fault in outcome.faults:
        print(f"  !! {fault}", flush=True)


def print_logs(database: Path, ending: str | None) -> None:
    """Print logs, an event a line."""
    if ending is None:
        return
    connection = sqlite3.connect(database)
    rows = connection.execute(
        "SELECT log_id, body FROM log_rows WHERE log_id LIKE ? ORDER BY log_id, last_seq", (f"%{ending}",)
    )
    for log_id, body in rows:
        for line in events_in(body):
            event = json.loads(line)
            words = [event.get(name) for name in ("action", "state", "reason", "attempt", "text", "message")]
            place = event.get("src", {})
            print(
                log_id[-6:],
                event["seq"],
                event["kind"],
                *words,
                place.get("id", "")[-24:],
                place.get("offset", ""),
            )
    connection.close()


if __name__ == "__main__":
    main()
