"""What rbee.toml says about single models: other names for them, and how each is loaded and asked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from rbee.contracts.heartbeats import Purpose
from rbee.contracts.strict import nearest
from rbee.errors import ConfigurationError

Slots = Annotated[int, Meta(ge=1, le=256)]
Tokens = Annotated[int, Meta(ge=16, le=10_000_000)]
Workers = Annotated[int, Meta(ge=1, le=1024)]
KeepAlive = Annotated[float, Meta(ge=-1, le=365 * 24 * 3600)]
ModelName = Annotated[str, Meta(min_length=1, max_length=1024)]


class ModelSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How one model is loaded and asked: its table `[models."…"]`.

    Attributes:
        engine: What runs it: `llama_cpp`, or an engine of the configuration. By default a worker that is there
            will do whatever its engine is, and one that is started has llama.cpp.
        purpose: What its workers are started for; by default what is asked of it.
        slots: Requests that one worker answers at the same time; the queen's setting by default.
        context_tokens: Tokens of one request; the queen's setting by default.
        keep_alive_s: Seconds a worker may be idle before it is stopped, negative for ever; the queen's setting by
            default.
        device: Where its workers run, such as `cuda:0`; the hive's choice by default.
        workers_max: How many workers it may have at most; by default one on a processor, and as many as there is
            room for on GPUs.
        preload: A worker is started as soon as a hive can take it, and kept.
        pinned: Its workers are never stopped to make room for another model.
        defaults: Parameters of a request that does not give them.
        forced: Parameters of every request, whatever it gives.
        stripped: Parameters that are taken out of every request.
    """

    engine: str | None = None
    purpose: Purpose | None = None
    slots: Slots | None = None
    context_tokens: Tokens | None = None
    keep_alive_s: KeepAlive | None = None
    device: str | None = None
    workers_max: Workers | None = None
    preload: bool = False
    pinned: bool = False
    defaults: dict[str, Any] = {}
    forced: dict[str, Any] = {}
    stripped: tuple[str, ...] = ()


class ModelTable(Struct, kw_only=True, frozen=True):
    """All that rbee.toml says about models, by name.

    Attributes:
        aliases: Other names, and the models they stand for.
        models: Settings by the model they are for.
    """

    aliases: dict[ModelName, ModelName] = {}
    models: dict[ModelName, ModelSettings] = {}

    def resolve(self, name: str) -> str:
        """Return the model that a name stands for; a name that is no alias stands for itself."""
        return self.aliases.get(name, name)

    def of(self, model: str) -> ModelSettings:
        """Return the settings of a model, or of what its alias stands for."""
        return self.models.get(self.resolve(model)) or _DEFAULT


class SettingsInForce(Struct, kw_only=True, frozen=True):
    """What a queen goes by: her defaults, and what her rbee.toml says of single models.

    Attributes:
        model: The model of a request that names none.
        slots: Requests that a worker answers at the same time, where its model says nothing else.
        context_tokens: Tokens of one request, where its model says nothing else.
        keep_alive_s: Seconds that a worker may be idle, where its model says nothing else.
        table: Aliases, and settings by model.
    """

    model: str
    slots: int
    context_tokens: int
    keep_alive_s: float
    table: ModelTable

    def of(self, model: str) -> ModelSettings:
        """Return the settings of a model, the queen's defaults where it has none of its own."""
        own = self.table.of(model)
        return msgspec.structs.replace(
            own,
            slots=self.slots if own.slots is None else own.slots,
            context_tokens=self.context_tokens if own.context_tokens is None else own.context_tokens,
            keep_alive_s=self.keep_alive_s if own.keep_alive_s is None else own.keep_alive_s,
        )


_DEFAULT = ModelSettings()


def load_model_table(path: Path) -> ModelTable:
    """Read `[aliases]` and `[models."…"]` of rbee.toml; a file that is missing says nothing.

    Raises:
        ConfigurationError: A key or a value that does not fit, named with its place.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return ModelTable()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from None
    tables = {name: document.get(name, {}) for name in ("aliases", "models")}
    _check_keys(tables["models"], path)
    try:
        table = msgspec.convert(tables, type=ModelTable)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path} says of a model what cannot be used: {error}.") from None
    for name, model in table.aliases.items():
        if model in table.aliases:
            raise ConfigurationError(f"The alias `{name}` in {path} stands for `{model}`, which is an alias too.")
        if name in table.models:
            raise ConfigurationError(
                f'`{name}` in {path} is an alias of `{model}`; its settings belong into [models."{model}"].'
            )
    return table


def _check_keys(models: Mapping[str, Any], path: Path) -> None:
    known = ModelSettings.__struct_fields__
    for model, values in models.items():
        if not isinstance(values, dict):
            raise ConfigurationError(f'`models.{model}` in {path} must be a table: [models."{model}"].')
        for key in values:
            if key not in known:
                raise ConfigurationError(
                    f'Unknown key `{key}` in [models."{model}"] of {path}{nearest(key, known)}.'
                )
