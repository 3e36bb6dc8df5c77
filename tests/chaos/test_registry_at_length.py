"""The registry's state machine, longer and more often than in the unit tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.chaos.conftest import Size
from tests.unit.jobs.test_registry_model import RegistryMachine


@pytest.mark.timeout(24 * 3600)
def test_registry_agrees_with_a_dictionary_at_length(size: Size, figure: Callable[[str, object], None]) -> None:
    """Two programs on one file: every transition, leases, late owners, clock jumps and crashes among writes."""
    programs, steps = size.of(40, 5_000), size.of(40, 100)
    before = RegistryMachine.steps_made
    run_state_machine_as_test(
        RegistryMachine,
        settings=settings(
            max_examples=programs,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    figure("programs of at most so many steps", f"{programs} of {steps}")
    figure("steps made, each compared with the dictionary", RegistryMachine.steps_made - before)
