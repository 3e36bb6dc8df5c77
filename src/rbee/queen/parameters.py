"""What a model's settings do to a request for it: fill in, force, take out. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.model_settings import ModelSettings
from rbee.contracts.operations import Infer
from rbee.errors import ConfigurationError

_INFER_FIELDS = (
    *(
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "ignore_eos",
        "response_format",
        "keep_alive",
    ),
    *("timeout_s", "queue_timeout_s", "first_token_timeout_s", "idle_timeout_s"),
)
# One thing, called otherwise by each route: how much may be answered.
LIMITS = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"})


class Change(Struct, frozen=True):
    """What was changed of a request, by the names of its parameters."""

    filled: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    stripped: tuple[str, ...] = ()

    def sentence(self, model: str) -> str:
        """Say in a sentence what was changed, without any value; empty when nothing was."""
        told = [
            f"{verb} {_joined(names)}"
            for verb, names in (
                ("filled in", self.filled),
                ("forced", self.forced),
                ("took out", self.stripped),
            )
            if names
        ]
        return f"The settings of {model} {_joined(told)}." if told else ""


def apply_settings(settings: ModelSettings, call: dict[str, Any], *, limit: str = "max_tokens") -> Change:
    """Change a request as its model's settings say; what they force stands, whatever was filled in or taken out.

    Args:
        settings: The model's settings.
        call: The request, changed in place.
        limit: What the request's route calls the limit of the answer's tokens, by whatever name the settings do.
    """
    stripped = [name for entry in settings.stripped for name in _same(entry) if name in call]
    for name in stripped:
        call.pop(name, None)
    filled: list[str] = []
    for entry, value in settings.defaults.items():
        if all(call.get(name) is None for name in _same(entry)):
            filled.append(_own(entry, limit))
            call[filled[-1]] = value
    forced: list[str] = []
    for entry, value in settings.forced.items():
        own = _own(entry, limit)
        given = {name: call.pop(name) for name in _same(entry) if name in call}
        call[own] = value
        if given != {own: value}:
            forced.append(own)
    return Change(
        tuple(name for name in filled if name not in forced), tuple(forced), tuple(dict.fromkeys(stripped))
    )


def settle_infer(settings: ModelSettings, operation: Infer) -> tuple[Infer, Change]:
    """Change an `infer` as its model's settings say, as far as it has fields for what they name.

    Raises:
        ConfigurationError: A value of the settings that such a field cannot have.
    """
    known = frozenset(_INFER_FIELDS) | LIMITS
    heeded = msgspec.structs.replace(
        settings,
        defaults={name: value for name, value in settings.defaults.items() if name in known},
        forced={name: value for name, value in settings.forced.items() if name in known},
    )
    given = {name: value for name in _INFER_FIELDS if (value := getattr(operation, name)) is not None}
    change = apply_settings(heeded, given)
    if change == Change():
        return operation, change
    told = msgspec.to_builtins(operation)
    for name in _INFER_FIELDS:
        told.pop(name, None)
    try:
        return msgspec.convert({**told, **given}, Infer), change
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"The settings of a model say what cannot be asked: {error}.") from None


def _same(name: str) -> Iterable[str]:
    return sorted(LIMITS) if name in LIMITS else (name,)


def _own(name: str, limit: str) -> str:
    return limit if name in LIMITS else name


def _joined(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
