"""What rbee.toml says about engines besides the built-in one: any server that OpenAI's clients know how to ask."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from rbee.contracts.heartbeats import Purpose
from rbee.contracts.strict import nearest
from rbee.errors import ConfigurationError, InvalidRequestError

BUILT_IN = "llama_cpp"
PLACEHOLDERS = (
    "model",
    "model_name",
    "port",
    "socket",
    "host",
    "context_tokens",
    "slots",
    "api_key",
    "device",
)

# `{word}` alone: JSON, and the double braces of templates, are words like any other.
_PLACEHOLDER = re.compile(r"(?<!\{)\{([A-Za-z_]+)\}(?!\})")
# What is shorter hides nothing, and stands in other words.
_SECRET_CHARS = 6
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")

Word = Annotated[str, Meta(max_length=32 * 1024)]
Command = Annotated[tuple[Word, ...], Meta(min_length=1, max_length=1024)]
UrlPath = Annotated[str, Meta(pattern=r"^/[!-~]*$", max_length=1024)]
Variable = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
Seconds = Annotated[float, Meta(gt=0, le=24 * 3600)]


class EngineSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A server that a worker starts, and asks in its users' name: its table `[engines.NAME]`.

    Attributes:
        command: The program and its arguments, with placeholders: `{model}` (the file's path, or what the engine
            knows the model by where it fetches it), `{model_name}` (the name users know the model by), `{host}`
            and `{port}` (where to listen) or `{socket}` (a unix socket), `{slots}`, `{context_tokens}` (of one
            request), `{api_key}`, `{device}` (`cpu` or `cuda`; `auto` where none was asked for).
        ready: The path that is answered with 200 once the model is loaded.
        ready_timeout_s: Seconds that may take.
        env: Variables of the engine's environment. Of the hive's, it has what a worker has: `PATH`, `HOME` and the
            like, and those of CUDA.
        api_key_env: The variable in which the engine is given the key it must ask for, where it is no argument.
        model_name: What a request's `model` is replaced by; `{model}` and `{model_name}` stand for what they do in
            the command.
        purposes: What its workers can be started for.
        needs_file: It is given a file of this machine; else it fetches the model itself, by name.
        prefill: It goes on from an assistant's message that stands last, so that an answer whose worker was lost
            can be continued.
    """

    command: Command
    ready: UrlPath = "/health"
    ready_timeout_s: Seconds = 600.0
    env: dict[Variable, str] = {}
    api_key_env: Variable | None = None
    model_name: Annotated[str, Meta(min_length=1, max_length=1024)] = "{model_name}"
    purposes: Annotated[tuple[Purpose, ...], Meta(min_length=1)] = ("generate",)
    needs_file: bool = True
    prefill: bool = False

    def without_values(self, words: str, *more: str) -> str:
        """Return some words with `***` for each value of `env`, and of `more`, of 6 characters or more."""
        for value in sorted([*more, *self.env.values()], key=len, reverse=True):
            if len(value) >= _SECRET_CHARS:
                words = words.replace(value, "***")
        return words

    def listens_on_socket(self) -> bool:
        """Tell whether it is to listen on a unix socket rather than on a port."""
        return "socket" in self.placeholders()

    def placeholders(self) -> set[str]:
        """Return the placeholders of the command."""
        return {name for word in self.command for name in _PLACEHOLDER.findall(word)}


class EngineTable(Struct, kw_only=True, frozen=True):
    """All engines of rbee.toml, by name; `llama_cpp` is always there and has no settings here."""

    engines: dict[str, EngineSettings] = {}

    def names(self) -> tuple[str, ...]:
        """Return the names of all engines, the built-in one first."""
        return (BUILT_IN, *self.engines)

    def fetching(self) -> tuple[str, ...]:
        """Return the names of those that fetch their models themselves."""
        return tuple(name for name, settings in self.engines.items() if not settings.needs_file)

    def find(self, name: str) -> EngineSettings | None:
        """Return an engine's settings, None for the built-in one.

        Raises:
            InvalidRequestError: There is none of that name; it names those there are.
        """
        if name == BUILT_IN:
            return None
        if name not in self.engines:
            known = self.names()
            raise InvalidRequestError(
                f"There is no engine `{name[:64]}`{nearest(name, known)}. There are: {', '.join(known)}.",
                remedy=f"Describe it in rbee.toml of the hive's home, under [engines.{name[:64]}].",
                param="engine",
            )
        return self.engines[name]


def fill(word: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders of a word that `values` has; everything else stays as it stands."""
    return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), word)


def load_engine_table(path: Path) -> EngineTable:
    """Read `[engines.NAME]` of rbee.toml; a file that is missing describes none.

    Raises:
        ConfigurationError: A key or a value that does not fit, named with its place.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return EngineTable()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from None
    tables = document.get("engines", {})
    for name, values in tables.items():
        _check_keys(name, values, path)
    try:
        table = msgspec.convert({"engines": tables}, type=EngineTable)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path} says of an engine what cannot be used: {error}.") from None
    for name, settings in table.engines.items():
        _check_placeholders(name, settings, path)
    return table


def _check_keys(name: str, values: Any, path: Path) -> None:
    known = EngineSettings.__struct_fields__
    if not isinstance(values, dict):
        raise ConfigurationError(f"`engines.{name}` in {path} must be a table: [engines.{name}].")
    if name == BUILT_IN:
        raise ConfigurationError(
            f"`{BUILT_IN}` in {path} is the engine that is built in.", remedy="Give yours another name."
        )
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"`{name}` in {path} is no engine's name: small letters, digits, - and _, a letter first."
        )
    for key in values:
        if key not in known:
            raise ConfigurationError(f"Unknown key `{key}` in [engines.{name}] of {path}{nearest(key, known)}.")


def _check_placeholders(name: str, settings: EngineSettings, path: Path) -> None:
    found = settings.placeholders()
    place = f"the command of [engines.{name}] in {path}"
    for placeholder in sorted(found - set(PLACEHOLDERS)):
        raise ConfigurationError(
            f"Unknown placeholder {{{placeholder}}} in {place}{nearest(placeholder, PLACEHOLDERS)}."
        )
    if ("port" in found) == ("socket" in found):
        raise ConfigurationError(f"One of {{port}} and {{socket}} must stand in {place}: it says where to listen.")
    for placeholder in sorted(set(_PLACEHOLDER.findall(settings.model_name)) - {"model", "model_name"}):
        raise ConfigurationError(
            f"Unknown placeholder {{{placeholder}}} in `model_name` of [engines.{name}] in {path}."
        )
