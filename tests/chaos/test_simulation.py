"""The simulation: whatever goes wrong, what was promised holds, and everything comes to rest."""

from __future__ import annotations

import gc
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import Size
from tests.chaos.simulation.nemesis import descriptors
from tests.chaos.simulation.run import Grounds, Outcome, grounds, simulate

COLLECT_EVERY = 20
SHOWN_MAX = 20


@pytest.fixture
def where() -> Iterator[Grounds]:
    with grounds() as laid_out:
        yield laid_out


@pytest.mark.timeout(24 * 3600)
def test_whatever_goes_wrong_the_promises_hold(
    size: Size, seed: int, figure: Callable[[str, object], None], where: Grounds
) -> None:
    """Queen, hives, workers, cables and clocks fail at random; jobs end once, and logs are what was read."""
    chance = random.Random(seed)
    outcomes: list[Outcome] = []
    for number in range(size.of(60, 50_000)):
        outcome = simulate(chance.randrange(2**31), where)
        assert not outcome.faults, told(outcome)
        outcomes.append(outcome)
        if number % COLLECT_EVERY == 0:
            gc.collect()
    report(outcomes, figure)


def test_same_seed_is_the_same_run(size: Size, seed: int, where: Grounds) -> None:
    """Everything that goes over the network, when, and every log at the end are the same the second time."""
    for number in range(size.of(2, 50)):
        first, again = (simulate(seed + number, where) for _ in range(2))
        assert (first.digest, first.steps, first.states) == (again.digest, again.steps, again.states)


def test_run_leaves_no_file_open(seed: int, where: Grounds) -> None:
    """What killed processes had open is closed with them."""
    simulate(seed, where)
    gc.collect()
    before = descriptors()
    simulate(seed, where)
    gc.collect()
    assert descriptors() == before


def told(outcome: Outcome) -> str:
    """Say what did not hold, and how to see it again."""
    lines = [f"seed {outcome.seed} at {revision()}: simulate({outcome.seed}, …) shows it again", str(outcome.made)]
    return "\n".join([*lines, *outcome.faults[:SHOWN_MAX]])


def revision() -> str:
    """Return the hash of the code that runs, where that is known."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return asked.stdout.strip() or "an unknown revision"


def report(outcomes: list[Outcome], figure: Callable[[str, object], None]) -> None:
    """Add a run's figures to the table."""
    made: Counter[str] = Counter()
    states: Counter[str] = Counter()
    said: Counter[str] = Counter()
    for outcome in outcomes:
        made.update(outcome.made)
        states.update(outcome.states)
        said.update(outcome.said)
    rests = sorted(outcome.rest_s for outcome in outcomes)
    figure("seeds", len(outcomes))
    figure("jobs", ", ".join(f"{count} {state.strip()}" for state, count in states.most_common()))
    figure("faults made", ", ".join(f"{count} {kind}" for kind, count in made.most_common()))
    figure("told in the logs", ", ".join(f"{count} {word}" for word, count in said.most_common()))
    figure("steps", sum(outcome.steps for outcome in outcomes))
    figure("virtual time", f"{sum(outcome.virtual_s for outcome in outcomes) / 3600:.1f} h")
    figure("at rest, p50 and max", f"{rests[len(rests) // 2]:.1f} s, {rests[-1]:.1f} s of virtual time")
    figure("processor time a seed", f"{sum(outcome.cpu_s for outcome in outcomes) / len(outcomes):.3f} s")
