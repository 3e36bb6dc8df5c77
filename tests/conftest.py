"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

from tests.chaos.options import (
    pytest_addoption,
    pytest_configure,
    pytest_configure_node,
    pytest_terminal_summary,
)

__all__ = ["pytest_addoption", "pytest_configure", "pytest_configure_node", "pytest_terminal_summary"]

# The demo model is downloaded once per checkout, not once per home.
os.environ.setdefault("RBEE_TEST_MODELS", str(Path(__file__).parent.parent / ".cache" / "models"))

# A busy machine is slow, not wrong. CI tries the same examples every time, everybody else new ones.
settings.register_profile(
    "rbee", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("rbee")
