"""The example configuration lists every setting, at its default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rbee.contracts.engine_settings import load_engine_table
from rbee.contracts.model_settings import ModelSettings, load_model_table
from rbee.contracts.settings import Settings
from rbee.hive.settings import HiveSettings
from rbee.keeper.settings import KeeperSettings
from rbee.queen.settings import QueenSettings
from rbee.worker.settings import WorkerSettings

EXAMPLE = Path(__file__).parents[2] / "examples" / "rbee.example.toml"


@pytest.mark.parametrize("cls", [KeeperSettings, QueenSettings, HiveSettings, WorkerSettings])
def test_example_lists_every_setting_at_its_default(cls: type[Settings]) -> None:
    """What the example says is what the code does."""
    switched_on = re.sub(r"(?m)^# (?=\w+ = )", "", EXAMPLE.read_text("utf-8"))
    table: dict[str, Any] = tomllib.loads(switched_on)[cls.table]
    hidden = cls.secrets | cls.flags_only | cls.elsewhere.keys()
    expected = {
        field.name: _shown(field.default) for field in msgspec.structs.fields(cls) if field.name not in hidden
    }
    assert table == expected


def test_example_shows_every_setting_of_a_model(tmp_path: Path) -> None:
    """Switched on, it can be read, and says of one model all that can be said."""
    commented = re.findall(r"(?m)^#   (.*)$", EXAMPLE.read_text("utf-8"))
    path = tmp_path / "rbee.toml"
    path.write_text("\n".join(commented), "utf-8")
    table, shown = load_model_table(path), tomllib.loads(path.read_text("utf-8"))
    ((model, settings),) = shown["models"].items()
    assert table.resolve("fast") == model
    assert list(settings) == list(ModelSettings.__struct_fields__)
    assert list(load_engine_table(path).engines) == ["llama-server"]


def _shown(default: Any) -> Any:
    if default is None or default is msgspec.NODEFAULT:
        return ""
    return list(default) if isinstance(default, tuple) else default
