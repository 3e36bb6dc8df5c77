"""The example configuration lists every setting, at its default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

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


def _shown(default: Any) -> Any:
    if default is None or default is msgspec.NODEFAULT:
        return ""
    return list(default) if isinstance(default, tuple) else default
