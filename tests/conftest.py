"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

# The demo model is downloaded once per checkout, not once per home.
os.environ.setdefault("RBEE_TEST_MODELS", str(Path(__file__).parent.parent / ".cache" / "models"))
