"""Settings: one msgspec struct a program, each value from flag > environment > rbee.toml > default.

A settings class is the whole definition: its fields give the flags (`--idle-timeout-s`), the environment
variables (`RBEE_IDLE_TIMEOUT_S`, and a short one where `env` says so), the TOML keys (`idle_timeout_s` in the
program's table) and, through their types, the checks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec
from msgspec import Struct

from rbee.contracts.home import default_home
from rbee.contracts.strict import nearest
from rbee.errors import ConfigurationError


class Settings(Struct, kw_only=True, frozen=True):
    """What every program's settings build on.

    Attributes:
        program: The console script's name.
        table: The table of rbee.toml.
        env: Short environment names, by field.
        secrets: Fields that print as stars and are never flags.
        flags_only: Fields that are no part of rbee.toml.
        elsewhere: Fields that stand in another program's table: (table, key), by field.
    """

    program: ClassVar[str]
    table: ClassVar[str]
    env: ClassVar[dict[str, str]] = {}
    secrets: ClassVar[frozenset[str]] = frozenset({"api_key"})
    flags_only: ClassVar[frozenset[str]] = frozenset({"home"})
    elsewhere: ClassVar[dict[str, tuple[str, str]]] = {}

    home: Path = msgspec.field(default_factory=default_home)

    def shown(self) -> dict[str, Any]:
        """Return the values in force, secrets as stars."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: "***" if name in self.secrets and value else value for name, value in values.items()}

    def __repr__(self) -> str:
        """Print as what it is, secrets as stars."""
        values = ", ".join(f"{name}={value!r}" for name, value in self.shown().items())
        return f"{type(self).__name__}({values})"


S = TypeVar("S", bound=Settings)


def load_settings(
    cls: type[S],
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> S:
    """Fill a settings class from flags, environment, rbee.toml and defaults, in this order.

    Raises:
        ConfigurationError: A value or a key that does not fit, named with where it came from.
        SystemExit: On `--help` (0) and on a flag that is not known (2), by argparse.
    """
    environ = os.environ if environ is None else environ
    given: dict[str, tuple[Any, str]] = {}
    flags = _flags(cls, argv)
    for name, value in flags.items():
        given[name] = (value, "--" + name.replace("_", "-"))
    for name in cls.__struct_fields__:
        for variable in (f"RBEE_{name.upper()}", cls.env.get(name, "")):
            if variable and environ.get(variable) and name not in given:
                given[name] = (environ[variable], variable)
    home = Path(given["home"][0]) if "home" in given else default_home()
    path = home.expanduser() / "rbee.toml"
    for name, value in _toml(cls, path).items():
        given.setdefault(name, (value, f"`{name}` in {path}"))
    return cls(**{name: _convert(cls, name, value, where) for name, (value, where) in given.items()})


def _convert(cls: type[Settings], name: str, value: Any, where: str) -> Any:
    kind = msgspec.structs.fields(cls)[cls.__struct_fields__.index(name)].type
    try:
        if isinstance(value, str) and "tuple" in str(kind):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, str) and value.lower() in {"yes", "on", "no", "off"} and kind is bool:
            value = value.lower() in {"yes", "on"}
        return msgspec.convert(value, type=kind, strict=False, dec_hook=_path_hook)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigurationError(f"{where} cannot be used: {error}.") from None


def _path_hook(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value).expanduser()
    raise NotImplementedError(kind)


def _flags(cls: type[Settings], argv: Sequence[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog=cls.program, description=(cls.__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    fields = msgspec.structs.fields(cls)
    explained = _attribute_docs(cls)
    for field in fields:
        if field.name in cls.secrets:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = explained.get(field.name, "").replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, default=None, metavar=_metavar(field.name), help=text)
    from rbee import __version__

    parser.add_argument("--version", action="version", version=f"{cls.program} {__version__}")
    parsed = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    return {name: value for name, value in parsed.items() if value is not None}


def _metavar(name: str) -> str:
    return name.rsplit("_", 1)[-1].upper()


def _attribute_docs(cls: type[Settings]) -> dict[str, str]:
    """Read the `Attributes:` paragraph of a settings class: each field's line is its help text."""
    found: dict[str, str] = {"home": "Directory everything of this installation lives under (RBEE_HOME)."}
    lines = (cls.__doc__ or "").partition("Attributes:")[2].splitlines()
    current = ""
    for line in lines:
        name, colon, text = line.strip().partition(": ")
        if colon and name in cls.__struct_fields__:
            current = name
            found[current] = text
        elif current and line.strip():
            found[current] += " " + line.strip()
    return found


def _toml(cls: type[Settings], path: Path) -> dict[str, Any]:
    """Read the program's values off rbee.toml; keys for other programs are theirs to check."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from None
    known = [
        name for name in cls.__struct_fields__ if name not in cls.secrets | cls.flags_only | cls.elsewhere.keys()
    ]
    tables = {"keeper", "queen", "hive", "worker", "aliases", "models", "engines"}
    for key, value in document.items():
        if key not in tables:
            raise ConfigurationError(f"Unknown table or key `{key}` in {path}{nearest(key, tables)}.")
        if not isinstance(value, dict):
            raise ConfigurationError(f"`{key}` in {path} must be a table: [{key}].")
    table: dict[str, Any] = document.get(cls.table, {})
    for key in table:
        if key not in known:
            raise ConfigurationError(f"Unknown key `{cls.table}.{key}` in {path}{nearest(key, known)}.")
    borrowed = {
        name: document[other][key]
        for name, (other, key) in cls.elsewhere.items()
        if key in document.get(other, {})
    }
    return {**table, **borrowed}
