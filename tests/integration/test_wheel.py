"""The wheel by itself: built once, installed into an empty environment, and used there."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_wheel_installs_into_an_empty_environment_and_answers(tmp_path: Path, rbee_models: Path) -> None:
    """Nothing of the checkout is needed: `rbee infer` answers, `rbee down` leaves nothing."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("rbee-*.whl")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    constraints = ["-c", str(ROOT / "constraints.txt")]
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*install, *constraints, str(wheel)], check=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RBEE_", "PYTHON"))}
    env |= {
        "HOME": str(tmp_path),
        "RBEE_HOME": str(tmp_path / "home"),
        "RBEE_MODELS": str(rbee_models),
        "QUEEN_PORT": "0",
        "HIVE_PORT": "0",
    }
    rbee = str(environment / "bin" / "rbee")
    try:
        asked = subprocess.run(
            [rbee, "infer", "--max-tokens", "8", "Hi"], env=env, cwd=tmp_path, capture_output=True, text=True
        )
    finally:
        down = subprocess.run([rbee, "down"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    assert "worker_inference" in asked.stderr
    assert down.returncode == 0, down.stderr
