"""Settings: flag over environment over rbee.toml over default, every refusal named, secrets as stars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import pytest
from msgspec import Meta

from rbee.contracts.settings import Settings, load_settings
from rbee.errors import ConfigurationError


class CookSettings(Settings, kw_only=True, frozen=True):
    """Cook things.

    Attributes:
        port: Where to cook, 100%
            of the time.
        names: Whom to cook for.
    """

    program: ClassVar[str] = "cook"
    table: ClassVar[str] = "queen"
    env: ClassVar[dict[str, str]] = {"port": "COOK_PORT"}

    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    names: tuple[str, ...] = ()
    is_hot: bool = False
    salt_s: Annotated[float, Meta(gt=0)] = 1.5
    vessel: Path = Path("pot")
    api_key: str | None = None


def load(home: Path, *argv: str, toml: str | None = None, **environ: str) -> CookSettings:
    if toml is not None:
        (home / "rbee.toml").write_text(toml)
    return load_settings(CookSettings, ["--home", str(home), *argv], environ)


def test_value_comes_from_flag_then_environment_then_file_then_default(tmp_path: Path) -> None:
    toml = "[queen]\nport = 3\n"
    everything = {"RBEE_PORT": "2", "COOK_PORT": "1"}
    assert load(tmp_path).port is None
    assert load(tmp_path, toml=toml).port == 3
    assert load(tmp_path, toml=toml, COOK_PORT="1").port == 1
    assert load(tmp_path, toml=toml, **everything).port == 2
    assert load(tmp_path, "--port", "0", toml=toml, **everything).port == 0


def test_empty_environment_variable_counts_as_absent(tmp_path: Path) -> None:
    assert load(tmp_path, COOK_PORT="", RBEE_PORT="").port is None


def test_home_of_the_environment_says_which_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "rbee.toml").write_text("[queen]\nport = 3\n")
    settings = load_settings(CookSettings, [], {"RBEE_HOME": str(tmp_path)})
    assert (settings.home, settings.port) == (tmp_path, 3)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--names", "a, b,,c "], ("a", "b", "c")),
        (["--names", ""], ()),
        ([], ("x", "y")),
    ],
)
def test_list_is_words_between_commas(tmp_path: Path, argv: list[str], expected: tuple[str, ...]) -> None:
    assert load(tmp_path, *argv, toml='[queen]\nnames = ["x", "y"]\n').names == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("1", True), ("yes", True), ("On", True), ("false", False), ("no", False)]
)
def test_truth_is_read_off_the_usual_words(tmp_path: Path, text: str, expected: bool) -> None:
    assert load(tmp_path, RBEE_IS_HOT=text).is_hot is expected


def test_truth_as_a_flag_has_both_forms(tmp_path: Path) -> None:
    assert load(tmp_path, "--is-hot").is_hot is True
    assert load(tmp_path, "--no-is-hot", RBEE_IS_HOT="1").is_hot is False


def test_path_has_its_tilde_expanded(tmp_path: Path) -> None:
    assert load(tmp_path, "--vessel", "~/pot").vessel == Path.home() / "pot"


@pytest.mark.parametrize(
    ("argv", "environ", "toml", "message"),
    [
        (["--port", "65536"], {}, "", r"--port cannot be used: Expected `int` <= 65535"),
        ([], {"COOK_PORT": "many"}, "", r"COOK_PORT cannot be used: Expected `int \| null`, got `str`"),
        ([], {"RBEE_SALT_S": "nan"}, "", r"RBEE_SALT_S cannot be used: Expected `float` > 0.0"),
        ([], {"RBEE_IS_HOT": "perhaps"}, "", r"RBEE_IS_HOT cannot be used"),
        ([], {}, "[queen]\nport = []\n", r"`port` in .*rbee.toml cannot be used: Expected `int \| null`"),
        ([], {}, "[queen]\nprot = 1\n", r"Unknown key `queen.prot` in .*rbee.toml \(did you mean `port`\?\)"),
        ([], {}, "[queen]\napi_key = 'x'\n", r"Unknown key `queen.api_key`"),
        ([], {}, "[queen]\nhome = '/x'\n", r"Unknown key `queen.home`"),
        ([], {}, "[quen]\nport = 1\n", r"Unknown table or key `quen` in .* \(did you mean `queen`\?\)"),
        ([], {}, "port = 1\n", r"Unknown table or key `port`"),
        ([], {}, "queen = 1\n", r"`queen` in .*rbee.toml must be a table: \[queen\]"),
        ([], {}, "[queen\n", r"rbee.toml cannot be read"),
    ],
)
def test_wrong_value_is_refused_with_where_it_came_from(
    tmp_path: Path, argv: list[str], environ: dict[str, str], toml: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, *argv, toml=toml, **environ)


def test_tables_of_other_programs_are_theirs_to_check(tmp_path: Path) -> None:
    assert load(tmp_path, toml="[hive]\nwhatever = 1\n[queen]\nport = 4\n").port == 4


def test_unknown_flag_and_secret_as_flag_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--prot", "--api-key"):
        with pytest.raises(SystemExit) as caught:
            load(tmp_path, flag, "1")
        assert caught.value.code == 2
    assert "unrecognized arguments: --prot" in capsys.readouterr().err


def test_help_tells_each_field_and_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(tmp_path, "--help")
    told = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Where to cook, 100% of the time." in told
    assert "api" not in told


def test_secret_is_stars_wherever_settings_are_shown(tmp_path: Path) -> None:
    settings = load(tmp_path, RBEE_API_KEY="canary")
    assert settings.api_key == "canary"
    assert settings.shown()["api_key"] == "***"
    assert "canary" not in f"{settings} {settings!r}"
    assert load(tmp_path).shown()["api_key"] is None
