"""Programs for a home in which workers count: the real hive, told to start the counting worker."""

from __future__ import annotations

import sys
from pathlib import Path

from rbee.testing.tiny_gguf import tiny_gguf

HIVE = "rbee-hive"
WORKER = "llama-worker-rbee"

_SCRIPTS = {
    HIVE: (
        "from pathlib import Path\n"
        "from rbee.hive.__main__ import main\n"
        f'main(Path(__file__).with_name("{WORKER}"))\n'
    ),
    WORKER: "from rbee.testing.counting.worker import main\nmain()\n",
}


def write_programs(directory: Path) -> None:
    """Write executable scripts, under the programs' own names, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in _SCRIPTS.items():
        path = directory / name
        path.write_text(f"#!{sys.executable}\n{text}", "utf-8")
        path.chmod(0o700)


def write_model(path: Path) -> str:
    """Write a model file that a counting worker takes; returns its reference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_gguf(salt=path.name.encode()[:64]))
    return str(path)
