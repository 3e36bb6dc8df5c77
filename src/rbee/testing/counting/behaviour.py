"""How a counting worker behaves as a whole: read from a file next to its model file, so a test can change it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from rbee.contracts.home import write_whole


class Behaviour(Struct, frozen=True, kw_only=True):
    """What the workers of one model do.

    Attributes:
        rate: Tokens a second of each answer; looked up anew when one begins.
        load: How a load ends: well, with an error in good order, with SIGKILL, or never.
        load_s: How long it takes.
        failures: How many loads end as `load` says; those after it end well. -1: all.
        ignores_term: SIGTERM does nothing.
    """

    rate: float = 50.0
    load: Literal["ok", "fail", "crash", "hang"] = "ok"
    load_s: float = 0.0
    failures: int = -1
    ignores_term: bool = False


def behave(model: Path, behaviour: Behaviour) -> None:
    """Have the workers of `model` behave so from their next start on; the rate holds from their next answer on."""
    write_whole(_file(model), msgspec.json.encode(behaviour))


def behaviour_of(model: Path) -> Behaviour:
    """Read how a worker of `model` behaves."""
    try:
        return msgspec.json.decode(_file(model).read_bytes(), type=Behaviour)
    except FileNotFoundError:
        return Behaviour()


def note_load(model: Path) -> int:
    """Note that a load began; returns how many began before."""
    with _loads_file(model).open("ab", buffering=0) as file:
        file.write(b".")
        return file.tell() - 1


def loads_of(model: Path) -> int:
    """Return how many loads of a model have begun, in all workers."""
    path = _loads_file(model)
    return path.stat().st_size if path.exists() else 0


def _file(model: Path) -> Path:
    return model.with_name(f"{model.name}.behaviour.json")


def _loads_file(model: Path) -> Path:
    return model.with_name(f"{model.name}.loads")
