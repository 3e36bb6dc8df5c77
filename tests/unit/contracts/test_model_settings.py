"""What rbee.toml says about models: aliases, settings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.contracts.model_settings import ModelSettings, ModelTable, load_model_table
from rbee.errors import ConfigurationError


def _table(tmp_path: Path, text: str) -> ModelTable:
    path = tmp_path / "rbee.toml"
    path.write_text(text)
    return load_model_table(path)


def test_no_file_says_nothing(tmp_path: Path) -> None:
    """A home without rbee.toml has no aliases, and every model its defaults."""
    table = load_model_table(tmp_path / "rbee.toml")
    assert table.resolve("smollm2:135m") == "smollm2:135m"
    assert table.of("smollm2:135m") == ModelSettings()


def test_alias_stands_for_its_model_and_has_its_settings(tmp_path: Path) -> None:
    """A model's settings hold under its other names too."""
    text = '[aliases]\nfast = "smollm2:135m"\n[models."smollm2:135m"]\nslots = 8\nforced = {top_p = 0.5}\n'
    table = _table(tmp_path, text)
    assert table.resolve("fast") == "smollm2:135m"
    assert table.of("fast") == ModelSettings(slots=8, forced={"top_p": 0.5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[models."a:b"]\nslot = 8\n', r"did you mean `slots`"),
        ('[models."a:b"]\nslots = 0\n', r"models"),
        ("[models]\nslots = 4\n", r"must be a table"),
        ('[aliases]\na = "b"\nb = "smollm2:135m"\n', r"an alias too"),
        ('[aliases]\na = "smollm2:135m"\n[models.a]\nslots = 2\n', r"belong into"),
        ("[aliases]\na = 3\n", r"aliases"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    """A misspelt key or a wrong value stops the start."""
    with pytest.raises(ConfigurationError, match=message):
        _table(tmp_path, text)
