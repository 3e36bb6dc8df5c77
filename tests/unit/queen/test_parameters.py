"""What a model's settings do to a request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.model_settings import ModelSettings
from rbee.contracts.operations import Infer
from rbee.errors import ConfigurationError
from rbee.queen.parameters import LIMITS, Change, apply_settings, settle_infer

NAMES = st.sampled_from(["temperature", "top_p", "seed", "max_tokens", "max_completion_tokens"])
VALUES = st.dictionaries(NAMES, st.integers(0, 3), max_size=4)


def test_settings_that_change_nothing_say_nothing() -> None:
    """What the caller gave as it is forced is no change."""
    call: dict[str, Any] = {"seed": 7, "temperature": 1}
    settings = ModelSettings(defaults={"temperature": 0}, forced={"seed": 7}, stripped=("top_k",))
    assert apply_settings(settings, call) == Change()
    assert call == {"seed": 7, "temperature": 1}
    assert Change().sentence("m") == ""


def test_each_change_is_told_by_name() -> None:
    """One sentence, no values; a limit is told by the name that the route has for it."""
    call: dict[str, Any] = {"seed": 1, "logit_bias": {}, "max_completion_tokens": 4000}
    settings = ModelSettings(
        defaults={"temperature": 0.1, "top_p": 0.2, "top_k": 3},
        forced={"seed": 7, "max_tokens": 64},
        stripped=("logit_bias",),
    )
    change = apply_settings(settings, call, limit="max_output_tokens")
    assert call == {"temperature": 0.1, "top_p": 0.2, "top_k": 3, "seed": 7, "max_output_tokens": 64}
    assert change.sentence("m") == (
        "The settings of m filled in temperature, top_p and top_k, forced seed and max_output_tokens "
        "and took out logit_bias."
    )


@given(given_values=VALUES, defaults=VALUES, forced=VALUES, stripped=st.lists(NAMES, max_size=3))
def test_forced_stands_stripped_goes_and_the_rest_is_the_callers(
    given_values: dict[str, int], defaults: dict[str, int], forced: dict[str, int], stripped: list[str]
) -> None:
    """Whatever is configured: of each parameter one value is left, by the rule that goes first."""
    call = dict(given_values)
    apply_settings(ModelSettings(defaults=defaults, forced=forced, stripped=tuple(stripped)), call)
    assert len(LIMITS & call.keys()) <= 1 or not (LIMITS & {*forced, *stripped})
    for name in ("temperature", "top_p", "seed"):
        left = {} if name in stripped else given_values
        expected = forced.get(name, left.get(name, defaults.get(name)))
        assert call.get(name) == expected


@given(given_values=VALUES, defaults=VALUES, forced=VALUES)
def test_applied_again_settings_change_nothing(
    given_values: dict[str, int], defaults: dict[str, int], forced: dict[str, int]
) -> None:
    """A request that has the settings has them."""
    settings = ModelSettings(defaults=defaults, forced=forced)
    call = dict(given_values)
    apply_settings(settings, call)
    before = dict(call)
    again = apply_settings(settings, call)
    assert call == before
    assert again.filled == ()


def test_infer_takes_of_the_settings_what_it_has_fields_for() -> None:
    """Its limit by the name it has for it; what else it asks stays as it was."""
    settings = ModelSettings(
        defaults={"temperature": 0.5, "min_p": 0.1, "max_completion_tokens": 64},
        forced={"seed": 7, "mirostat": 2},
        stripped=("stop", "logit_bias"),
    )
    asked = Infer(prompt="Hi", stop=["."], seed=3, priority=4, model="fast")
    settled, change = settle_infer(settings, asked)
    assert settled == Infer(prompt="Hi", temperature=0.5, max_tokens=64, seed=7, priority=4, model="fast")
    assert change == Change(filled=("temperature", "max_tokens"), forced=("seed",), stripped=("stop",))
    assert settle_infer(settings, settled) == (settled, Change())
    assert settle_infer(ModelSettings(), asked) == (asked, Change())


def test_setting_that_an_infer_cannot_have_is_named() -> None:
    """It is the configuration that has to be mended."""
    with pytest.raises(ConfigurationError, match="temperature"):
        settle_infer(ModelSettings(forced={"temperature": "hot"}), Infer(prompt="Hi"))
