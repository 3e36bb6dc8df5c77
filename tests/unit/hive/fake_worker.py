"""A worker program that does what its model file says: the file is Python, run with `say` at hand."""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = """#!{python}
import json, os, signal, subprocess, sys, time

def say(action, message="Something.", **fields):
    ids = {{name.lower(): os.environ[name] for name in ("JOB_ID", "CORRELATION_ID") if name in os.environ}}
    print(json.dumps({{"v": 1, "kind": "narration", "ts": 5, "actor": "worker", "action": action,
                      "message": message, **ids, "fields": fields}}, separators=(",", ":")), flush=True)

def ready(url="http://127.0.0.1:9"):
    say("worker_ready", url=url)

def wait():
    while True:
        signal.pause()

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
exec(open(sys.argv[sys.argv.index("--model") + 1]).read())
"""


def make_program(directory: Path) -> Path:
    """Write the program, and return where it is."""
    path = directory / "fake-worker"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o700)
    return path


def is_alive(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1] not in (b"Z", b"X")
    except FileNotFoundError:
        return False
