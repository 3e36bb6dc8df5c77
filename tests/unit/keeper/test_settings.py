"""The keeper's settings: flag over environment over file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rbee.errors import ConfigurationError
from rbee.keeper.settings import GlobalOptions


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RBEE_") or name.endswith("_PORT")]:
        monkeypatch.delenv(name)


def test_flag_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in turn."""
    (tmp_path / "rbee.toml").write_text('[keeper]\nqueen_url = "http://file"\n[hive]\nport = 1\n')
    options = GlobalOptions(home=tmp_path)
    assert (options.settings().queen_url, options.settings().hive_port) == ("http://file", 1)
    monkeypatch.setenv("RBEE_QUEEN_URL", "http://env")
    monkeypatch.setenv("HIVE_PORT", "2")
    assert (options.settings().queen_url, options.settings().hive_port) == ("http://env", 2)
    given = GlobalOptions(home=tmp_path, queen="http://flag").settings(hive_port=3)
    assert (given.queen_url, given.hive_port) == ("http://flag", 3)


def test_key_is_read_from_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file it is an unknown word; shown, it is stars."""
    monkeypatch.setenv("RBEE_API_KEY", "secret")
    settings = GlobalOptions(home=tmp_path).settings()
    assert (settings.api_key, settings.shown()["api_key"]) == ("secret", "***")
    (tmp_path / "rbee.toml").write_text('[keeper]\napi_key = "secret"\n')
    with pytest.raises(ConfigurationError, match="api_key"):
        GlobalOptions(home=tmp_path).settings()


@pytest.mark.parametrize("given", ["a b", "x" * 129, "é"])
def test_correlation_id_that_cannot_be_sent_is_refused(given: str, tmp_path: Path) -> None:
    """With the form it should have."""
    with pytest.raises(ConfigurationError, match="correlation id"):
        GlobalOptions(home=tmp_path, correlation_id=given).settings()
