"""Install peers beside rbee's own environment: a virtual environment for each set of them, in `.cache/peers`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

INSTALL_TIMEOUT_S = 300

_ROOT = Path(__file__).parent.parent.parent


class PeersMissingError(Exception):
    """The peers could not be installed."""


def peers_python(name: str) -> Path:
    """Return the interpreter of the environment that has the peers of `<name>.txt`; made when it is not there.

    Raises:
        PeersMissingError: pip could not install them, perhaps for want of a network.
    """
    wanted = (Path(__file__).parent / f"{name}.txt").read_text("utf-8")
    place = _ROOT / ".cache" / "peers" / name
    python, installed = place / "bin" / "python", place / "installed.txt"
    if python.exists() and installed.exists() and installed.read_text("utf-8") == wanted:
        return python
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, symlinks=True)
    try:
        _pip(python, wanted.split())
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        shutil.rmtree(place, ignore_errors=True)
        raise PeersMissingError(f"The peers in {name}.txt could not be installed.") from error
    installed.write_text(wanted, "utf-8")
    return python


def _pip(python: Path, packages: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *packages]
    subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
